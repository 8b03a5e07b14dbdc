// Slot lists on CUDA, without logits: of choices that were made elsewhere, and of several routings together.
// As moe/routing_cuda.cuh it needs no header of torch.
//
// Choices are sorted by expert, a stable counting sort. Letters, as in pyvlm/ops/moe_choices.py: T tokens, K
// choices a token, E experts, S = T K slots; C chunks of choices, one a block, and W warps of a block. Choice
// i is choice i % K of token i / K.
//
// Routings are merged as a matrix of bits, which every router on CUDA makes its lists of.
#pragma once

#include <cstddef>
#include <cstdint>

#include "moe/routing_cuda.cuh"
#include "moe/routing_tile.cuh"

namespace pyvlm::routing {

constexpr int kRounds = 8;  // in which a warp takes its part of a chunk, so that 8 loads are in flight
constexpr int kWarpChoices = kRounds * kWarp;
constexpr int kChoiceThreads = 256;
constexpr int kChunkChoices = kRounds * kChoiceThreads;

// A routing without weights: in their place stands which choice, or slot of the parts, each slot is.
using NumberedLists = Lists<int64_t>;

// What blocks tell each other where there are several; null where there is one.
struct ChunkCounts {
  int* before_EC;  // choices of the expert in the chunk; then in the chunks before it
  int* count_E;

  static size_t ints(int chunks, int experts) {
    return chunks == 1 ? 0 : static_cast<size_t>(experts) * (chunks + 1);
  }
  ChunkCounts(int* memory, int chunks, int experts)
      : before_EC(chunks == 1 ? nullptr : memory),
        count_E(chunks == 1 ? nullptr : memory + static_cast<size_t>(experts) * chunks) {}
};

inline int choice_chunks(int slots) { return (slots - 1) / kChunkChoices + 1; }

// The choices of a warp's lanes, round by round: experts, which are below 0 behind the last choice, and the
// lanes of a round that chose the same expert.
struct WarpChoices {
  int expert[kRounds];
  unsigned alike[kRounds];

  // Unsigned: behind the last choice numbers go beyond 2^31.
  __device__ static unsigned number(int round) {
    return static_cast<unsigned>(blockIdx.x) * kChunkChoices + threadIdx.x / kWarp * kWarpChoices +
           round * kWarp + lane_of_thread();
  }

  template <typename Index>
  __device__ WarpChoices(const Index* index_S, unsigned slots, int experts) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const unsigned i = number(round);
      const Index chosen = i < slots ? index_S[i] : -1;
      if (i < slots && (chosen < 0 || chosen >= experts)) {
        __trap();  // the caller said that there is no such expert
      }
      expert[round] = static_cast<int>(chosen);
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      alike[round] = __match_any_sync(kAllLanes, expert[round]);
    }
  }

  // Adds the warp's choices to next_E in their order; visit(round, what was there and what the lane adds to).
  template <typename Visit>
  __device__ void add_to(int* next_E, const Visit& visit) const {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const bool exists = expert[round] >= 0;
      const int next = exists ? next_E[expert[round]] : 0, below = __popc(alike[round] & lanes_below());
      __syncwarp();  // all have read what the first of them writes
      if (exists && below == 0) {
        next_E[expert[round]] = next + __popc(alike[round]);
      }
      __syncwarp();
      if (exists) {
        visit(round, next + below);
      }
    }
  }
};

// What each warp of the block chose: count_WE.
template <typename Index>
__device__ WarpChoices count_of_warps(const Index* index_S, int slots, int experts, int* count_WE) {
  for (int i = threadIdx.x; i < static_cast<int>(blockDim.x) / kWarp * experts; i += blockDim.x) {
    count_WE[i] = 0;
  }
  const WarpChoices choices(index_S, slots, experts);
  __syncthreads();
  choices.add_to(count_WE + threadIdx.x / kWarp * experts, [](int, int) {});
  __syncthreads();
  return choices;
}

__device__ inline int sum_of_warps(const int* count_WE, int experts, int e) {
  int sum = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    sum += count_WE[w * experts + e];
  }
  return sum;
}

// Reads the S choices, writes E counts a chunk. One block a multiprocessor is enough: see write_lists.
template <typename Index>
__global__ void __launch_bounds__(kChoiceThreads, 1)
    count_choices(const Index* index_S, int slots, int experts, ChunkCounts counts) {
  int* count_WE = reinterpret_cast<int*>(dynamic_memory);
  count_of_warps(index_S, slots, experts, count_WE);
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    counts.before_EC[static_cast<int64_t>(e) * gridDim.x + blockIdx.x] = sum_of_warps(count_WE, experts, e);
  }
}

// Adds up the chunks of one expert a block. Reads and writes E C counts.
__global__ void __launch_bounds__(kChoiceThreads) rank_chunks(int chunks, ChunkCounts counts) {
  int* of_chunk = counts.before_EC + static_cast<int64_t>(blockIdx.x) * chunks;
  int before = 0;
  for (int first = 0; first < chunks; first += blockDim.x) {
    const int chunk = first + threadIdx.x;
    int total;
    const int rank = before + exclusive_sum(chunk < chunks ? of_chunk[chunk] : 0, total);
    if (chunk < chunks) {
      of_chunk[chunk] = rank;
    }
    before += total;
  }
  if (threadIdx.x == 0) {
    counts.count_E[blockIdx.x] = before;
  }
}

// Reads the S choices and what the chunks before this one chose, writes the 4 S + T entries of the lists.
template <typename Index>
__global__ void __launch_bounds__(kChoiceThreads, 1)
    place_choices(const Index* index_S, int slots, int top_k, int experts, ChunkCounts counts,
                  NumberedLists lists) {
  int* next_WE = reinterpret_cast<int*>(dynamic_memory);
  const WarpChoices choices = count_of_warps(index_S, slots, experts, next_WE);
  const bool alone = counts.count_E == nullptr;
  int experts_before = 0;
  for (int first = 0; first < experts; first += blockDim.x) {
    const int e = first + threadIdx.x;
    const bool exists = e < experts;
    int total;
    const int count = !exists ? 0 : alone ? sum_of_warps(next_WE, experts, e) : counts.count_E[e];
    const int offset = experts_before + exclusive_sum(count, total);
    experts_before += total;
    if (exists) {
      int next = alone ? offset : offset + counts.before_EC[static_cast<int64_t>(e) * gridDim.x + blockIdx.x];
      for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
        const int of_warp = next_WE[w * experts + e];
        next_WE[w * experts + e] = next;
        next += of_warp;
      }
      if (blockIdx.x == 0) {
        lists.expert_offsets[e] = offset;
      }
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    lists.expert_offsets[experts] = lists.token_offsets[slots / top_k] = slots;
  }
  __syncthreads();

  choices.add_to(next_WE + threadIdx.x / kWarp * experts, [&](int round, int slot) {
    const unsigned i = WarpChoices::number(round), token = i / top_k, first = token * top_k;
    lists.weight_S[slot] = i;
    lists.token_S[slot] = static_cast<int>(token);
    int rank = 0;  // among the token's slots, which lie as its experts do
    for (unsigned other = first; other < first + top_k; ++other) {
      const Index expert = index_S[other];
      rank += expert < choices.expert[round] || (expert == choices.expert[round] && other < i);
    }
    lists.slot_S[first + rank] = slot;
    if (i == first) {
      lists.token_offsets[token] = static_cast<int>(i);
    }
  });
}

// A routing of some tokens, and which rows of the whole they are.
struct Part {
  const int* token_S;
  const int* expert_offsets;  // [E + 1]
  const int64_t* row_T;
  int slots, tokens;
  int first;  // of its slots among those of all parts
};

// A slot a thread. Sets the bits of a part, and notes which slot each is; reads 2 S entries, writes S of
// each.
__global__ void __launch_bounds__(kChunk)
    set_bits(Part part, int tokens, int experts, BitMatrix bits, int64_t* slot_ET) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (s >= part.slots) {
    return;
  }
  int expert = 0;
  for (int beyond = experts; expert + 1 < beyond;) {  // the last expert that begins at the slot or before it
    const int middle = expert + (beyond - expert) / 2;
    if (part.expert_offsets[middle] <= s) {
      expert = middle;
    } else {
      beyond = middle;
    }
  }
  const int token = part.token_S[s];
  const int64_t row = token >= 0 && token < part.tokens ? part.row_T[token] : -1;
  if (row < 0 || row >= tokens) {
    __trap();  // nobody has looked at them before, as that would wait for the device
  }
  atomicOr(&bits.chosen_EW[static_cast<int64_t>(expert) * bits.words + row / kWarp], 1u << row % kWarp);
  atomicAdd(&bits.count_C[row / kChunk], 1);
  slot_ET[static_cast<int64_t>(expert) * tokens + row] = part.first + s;
}

// The launches, as in moe/routing_cuda.cuh: one where the choices are one chunk, else three. There is at
// least one choice.
template <typename Launch, typename Index>
void routing_from_choices(const Launch& launch, const Index* index_S, int slots, int top_k, int experts,
                          const ChunkCounts& counts, const NumberedLists& lists) {
  const int chunks = choice_chunks(slots);
  const int threads = slots <= kWarpChoices ? kWarp : kChoiceThreads;  // of few choices all are one warp's
  const size_t bytes = static_cast<size_t>(threads / kWarp) * experts * sizeof(int);
  if (chunks > 1) {
    launch(&count_choices<Index>, chunks, threads, bytes, index_S, slots, experts, counts);
    launch(&rank_chunks, experts, kChoiceThreads, size_t{0}, chunks, counts);
  }
  launch(&place_choices<Index>, chunks, threads, bytes, index_S, slots, top_k, experts, counts, lists);
}

// One launch for each part that has slots, and two. `bits` is zero before. There is at least one token.
template <typename Launch>
void merge_routings(const Launch& launch, const Part* parts, int count, int tokens, int experts, int slots,
                    const BitMatrix& bits, int64_t* slot_ET, const NumberedLists& lists) {
  for (const Part* part = parts; part < parts + count; ++part) {
    if (part->slots > 0) {
      launch(&set_bits, BitMatrix::blocks(part->slots, kChunk), kChunk, size_t{0}, *part, tokens, experts,
             bits, slot_ET);
    }
  }
  launch(&rank_words, experts, 1024, size_t{0}, bits);
  launch_lists(launch, slot_ET, static_cast<const int64_t*>(nullptr), tokens, experts, slots, bits, lists);
}

}  // namespace pyvlm::routing
