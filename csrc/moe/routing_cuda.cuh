// Routers on CUDA: the kernels, and the launches that make a routing of them. No header of torch stands here,
// so that the tests can compile this file for the host, where they emulate what CUDA adds to C++.
//
// Letters, as in pyvlm/ops/moe.py: T tokens, E experts, S slots (token, expert), G groups of consecutive
// tokens; W = ceil(T / 32) words of 32 tokens, C = ceil(T / 256) chunks of 256.
//
// A routing is a sparse E x T matrix. Between the kernels it is a matrix of bits, which is 32 times smaller
// than the probabilities. What is added up by atomics is integer: the order of the sums does not show.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "moe/routing_tile.cuh"

namespace pyvlm::routing {

constexpr int kWords = 8;  // that a warp works on at once, so that each lane has 8 loads in flight
constexpr int kChunk = kWords * kWarp;  // tokens
constexpr int kDigit = 11;              // bits that one round of the radix select settles
constexpr int kBins = 1 << kDigit;
template <typename Prob>
constexpr Prob kLeastSum = std::numeric_limits<Prob>::epsilon();  // that weights are divided by

struct BitMatrix {
  int words;            // W
  unsigned* chosen_EW;  // bit i of word w: the expert works on token 32 w + i
  int* rank_EW;         // bits of the expert before the word
  int* count_E;         // bits of the expert
  int* count_C;         // bits of all experts in the chunk

  static size_t ints(int64_t tokens, int64_t experts) {
    return experts * (2 * blocks(tokens, kWarp) + 1) + blocks(tokens, kChunk);
  }
  static int blocks(int64_t tokens, int size) { return static_cast<int>((tokens + size - 1) / size); }

  BitMatrix(int* memory, int tokens, int experts) : words(blocks(tokens, kWarp)) {
    const size_t size = static_cast<size_t>(experts) * words;
    chosen_EW = reinterpret_cast<unsigned*>(memory);
    rank_EW = memory + size;
    count_E = rank_EW + size;
    count_C = count_E + experts;
  }
};

// The tensors of a routing. Their sizes follow from T, E and S, which the host knows.
template <typename Prob>
struct Lists {
  int* token_S;
  Prob* weight_S;
  int* expert_offsets;  // [E + 1]
  int* token_offsets;   // [T + 1]
  int* slot_S;
};

// Every pattern of a probability orders like the unsigned number that it is, and its two highest bits are 0.
// NaN counts as the largest, as torch.sort has it.
template <typename Prob>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};

// Negates the probabilities of the `top_k` best experts, ties to the lower one, and returns their sum.
template <typename Prob>
__device__ Prob mark_best(Prob* row, const Prob* bias_E, int experts, int top_k) {
  for (int k = 0; k < top_k; ++k) {
    int best = -1;
    Prob best_score = 0;
    for (int e = 0; e < experts; ++e) {
      const Prob score = bias_E == nullptr ? row[e] : row[e] + bias_E[e];
      if (!signbit(row[e]) && (best < 0 || score > best_score)) {
        best = e;
        best_score = score;
      }
    }
    row[best] = -row[best];
  }
  Prob sum = 0;
  for (int e = 0; e < experts; ++e) {
    sum += signbit(row[e]) ? -row[e] : 0;
  }
  return sum < kLeastSum<Prob> ? kLeastSum<Prob> : sum;
}

// Softmax over experts, transposed, so that an expert's tokens are neighbours. With a top_k the tokens choose
// as well, and sum_T is what the chosen probabilities add up to; else no bit is set.
// Reads logits once, T E; writes probabilities once, T E; and 1/32 word of bits for each.
template <typename Logit, typename Prob>
__global__ void __launch_bounds__(kRows)
    probabilities(const Logit* logits_TE, const Prob* bias_E, int tokens, int experts, int top_k,
                  BitMatrix bits, Prob* prob_ET, Prob* sum_T) {
  Prob* tile = reinterpret_cast<Prob*>(dynamic_memory);
  const int first = blockIdx.x * blockDim.x, token = first + threadIdx.x;
  const int rows = min(static_cast<int>(blockDim.x), tokens - first);
  const Logit* source = logits_TE + static_cast<int64_t>(first) * experts;
  visit_tile(rows, experts, [=](int i, int at) { tile[at] = static_cast<Prob>(source[i]); });
  __syncthreads();

  Prob* row = tile + threadIdx.x * row_stride(experts);
  if (token < tokens) {
    softmax(row, experts);
    if (top_k > 0) {
      sum_T[token] = mark_best(row, bias_E, experts, top_k);
    }
  }
  const int word = token / kWarp;
  for (int e = 0; e < experts; ++e) {
    bool marked = false;
    if (token < tokens) {
      marked = signbit(row[e]) && top_k > 0;
      prob_ET[static_cast<int64_t>(e) * tokens + token] = marked ? -row[e] : row[e];
    }
    const unsigned chosen = __ballot_sync(kAllLanes, marked);
    if (lane_of_thread() == 0 && word < bits.words) {
      bits.chosen_EW[static_cast<int64_t>(e) * bits.words + word] = chosen;
    }
  }
  if (first % kChunk == 0 && threadIdx.x == 0) {
    bits.count_C[first / kChunk] = top_k * kChunk;  // nobody asks for the last one, which may be smaller
  }
}

// The groups of expert choice: all tokens are one where the pointers are null.
struct Groups {
  const int64_t* capacity_G;
  const int64_t* offsets;  // [G + 1]
  int count;
  int tokens, capacity;  // of the only group

  __device__ int begin(int g) const { return offsets == nullptr ? 0 : static_cast<int>(offsets[g]); }
  __device__ int end(int g) const { return offsets == nullptr ? tokens : static_cast<int>(offsets[g + 1]); }
  __device__ int taken(int g) const {
    const int64_t size = end(g) - begin(g), wanted = offsets == nullptr ? capacity : capacity_G[g];
    return static_cast<int>(wanted < size ? wanted : size);
  }
};

// Expert choice of one expert in one group a block: a radix select finds the probability of the last token
// that is taken, and a pass in the order of tokens sets bits, of equal ones as many as are left over.
// Reads the probabilities once a digit, mostly two of the three, and once to compare: E T each time, mostly
// from L2. A warp has the same chunks in every group, so that words lie alike; two groups may share a word.
template <typename Key>
__global__ void __launch_bounds__(1024)
    select_tokens(const Key* prob_ET, int tokens, int experts, Groups groups, BitMatrix bits) {
  constexpr int kBits = 8 * sizeof(Key) - 2;
  constexpr Key kLargest = (Key{1} << kBits) - 1, kOutside = ~Key{0};
  static __shared__ int histogram[kBins];
  static __shared__ int found[3];
  const int group = blockIdx.x / experts, expert = blockIdx.x % experts;
  const int begin = groups.begin(group), end = groups.end(group), taken = groups.taken(group);
  if (begin < 0 || begin > end || end > tokens || (taken < 1 && begin < end)) {
    __trap();  // nobody has looked at the groups before, as that would wait for the device
  }
  const int lane = lane_of_thread(), warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Key* prob_T = prob_ET + static_cast<int64_t>(expert) * tokens;
  const auto load = [=](int chunk, Key(&keys)[kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int token = chunk * kChunk + i * kWarp + lane;
      const bool inside = begin <= token && token < end;
      const Key key = inside ? prob_T[token] : 0;
      keys[i] = !inside ? kOutside : key < kLargest ? key : kLargest;
    }
  };
  Key keys[kWords];

  Key threshold = 0;                // of which the bits from `high` on are settled
  int left = taken;                 // to take from the keys that agree with it in these bits
  bool all = taken == end - begin;  // of these are taken
  for (int high = kBits; high > 0 && !all;) {
    const int low = high > kDigit ? high - kDigit : 0;
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
      histogram[bin] = 0;
    }
    __syncthreads();
    for (int chunk = begin / kChunk + warp; chunk * kChunk < end; chunk += warps) {
      load(chunk, keys);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if (keys[i] >> high == threshold >> high) {
          atomicAdd(&histogram[(keys[i] >> low) & ((1 << (high - low)) - 1)], 1);
        }
      }
    }
    __syncthreads();
    // Thread 0 has the highest bins.
    const int own = kBins / blockDim.x, top = kBins - 1 - threadIdx.x * own;
    int sum = 0, total;
    for (int bin = top; bin > top - own; --bin) {
      sum += histogram[bin];
    }
    int above = exclusive_sum(sum, total);
    if (above < left && left <= above + sum) {
      int bin = top;
      for (; above + histogram[bin] < left; --bin) {
        above += histogram[bin];
      }
      found[0] = bin;
      found[1] = left - above;
      found[2] = histogram[bin];
    }
    __syncthreads();
    threshold |= static_cast<Key>(found[0]) << low;
    left = found[1];
    all = left == found[2];
    high = low;
  }

  int before = 0;  // slots of the expert in the groups before
  for (int g = threadIdx.x; g < group; g += blockDim.x) {
    before += groups.taken(g);
  }
  before = block_sum(before);
  if (group == groups.count - 1 && threadIdx.x == 0) {
    bits.count_E[expert] = before + taken;
  }
  int equal_before = 0;
  for (int first = begin / kChunk; first * kChunk < end; first += warps) {
    const int chunk = first + warp;
    load(chunk, keys);
    unsigned above[kWords], equal[kWords];
    int count = 0;  // of those above; of the equal ones in the upper half: a block has 2^13 tokens at once
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      above[i] = __ballot_sync(kAllLanes, keys[i] > threshold && keys[i] != kOutside);
      equal[i] = __ballot_sync(kAllLanes, keys[i] == threshold);
      count += __popc(above[i]) + (__popc(equal[i]) << 16);
    }
    int total;
    const int sum = __shfl_sync(kAllLanes, exclusive_sum(lane == 0 ? count : 0, total), 0);
    int equals = equal_before + (sum >> 16);
    const int start = before + (sum & 0xffff) + min(equals, left) - min(equal_before, left);
    int rank = start;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const bool tie = (equal[i] >> lane & 1) != 0 && equals + __popc(equal[i] & lanes_below()) < left;
      const unsigned chosen = above[i] | __ballot_sync(kAllLanes, tie);
      const int word = chunk * kWords + i;
      const int64_t at = static_cast<int64_t>(expert) * bits.words + word;
      if (lane == 0 && chosen != 0) {
        atomicOr(&bits.chosen_EW[at], chosen);
      }
      if (lane == 0 && begin <= word * kWarp && word * kWarp < end) {
        bits.rank_EW[at] = rank;
      }
      rank += __popc(chosen);
      equals += __popc(equal[i]);
    }
    if (lane == 0 && rank > start) {
      atomicAdd(&bits.count_C[chunk], rank - start);
    }
    before += (total & 0xffff) + min(equal_before + (total >> 16), left) - min(equal_before, left);
    equal_before += total >> 16;
  }
}

// Adds up the bits of one expert a block. Reads and writes E W words.
__global__ void __launch_bounds__(1024) rank_words(BitMatrix bits) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * bits.words;
  int before = 0;
  for (int first = 0; first < bits.words; first += blockDim.x) {
    const int word = first + threadIdx.x;
    int total;
    const int rank = exclusive_sum(word < bits.words ? __popc(bits.chosen_EW[row + word]) : 0, total);
    if (word < bits.words) {
      bits.rank_EW[row + word] = before + rank;
    }
    before += total;
  }
  if (threadIdx.x == 0) {
    bits.count_E[blockIdx.x] = before;
  }
}

// From bits to lists: a chunk of tokens a block, a word of tokens a warp, a token a lane.
// Reads 2 E W words, and of the probabilities the chosen ones; writes the 3 S + T entries of the lists.
// At least one block a multiprocessor: without saying so, ptxas for sm_100 keeps to 32 registers and spills.
template <typename Prob>
__global__ void __launch_bounds__(kChunk, 1)
    write_lists(const Prob* prob_ET, const Prob* sum_T, int tokens, int experts, int slots, BitMatrix bits,
                Lists<Prob> lists) {
  int* offset_E = reinterpret_cast<int*>(dynamic_memory);
  int total = 0, slots_before = 0;
  for (int first = 0; first < experts; first += blockDim.x) {
    const int e = first + threadIdx.x;
    const int offset = slots_before + exclusive_sum(e < experts ? bits.count_E[e] : 0, total);
    slots_before += total;
    if (e < experts) {
      offset_E[e] = offset;
      if (blockIdx.x == 0) {
        lists.expert_offsets[e] = offset;
      }
    }
  }
  if (slots_before != slots) {
    __trap();  // the lists have other sizes: the caller's number of slots is not what the groups give
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    lists.expert_offsets[experts] = lists.token_offsets[tokens] = slots;
  }
  int chunks_before = 0;
  for (int c = threadIdx.x; c < static_cast<int>(blockIdx.x); c += blockDim.x) {
    chunks_before += bits.count_C[c];
  }
  chunks_before = block_sum(chunks_before);

  const int token = blockIdx.x * kChunk + threadIdx.x, word = token / kWarp, lane = lane_of_thread();
  // Each lane loads one expert's word, and all look at it in turn.
  const auto visit_experts = [=](const auto& visit) {
    for (int first = 0; first < experts && word < bits.words; first += kWarp) {
      const bool exists = first + lane < experts;
      const int64_t at = static_cast<int64_t>(first + lane) * bits.words + word;
      const unsigned own_chosen = exists ? bits.chosen_EW[at] : 0;
      const int own_rank = exists ? offset_E[first + lane] + bits.rank_EW[at] : 0;
      for (int i = 0; i < min(kWarp, experts - first); ++i) {
        const unsigned chosen = __shfl_sync(kAllLanes, own_chosen, i);
        const int rank = __shfl_sync(kAllLanes, own_rank, i);
        if (chosen >> lane & 1) {
          visit(first + i, rank + __popc(chosen & lanes_below()));
        }
      }
    }
  };
  int count = 0;
  visit_experts([&](int, int) { ++count; });
  int place = chunks_before + exclusive_sum(count, total);
  if (token < tokens) {
    lists.token_offsets[token] = place;
  }
  const Prob scale = sum_T == nullptr || token >= tokens ? 1 : sum_T[token];
  visit_experts([&](int expert, int slot) {
    lists.slot_S[place++] = slot;
    lists.token_S[slot] = token;
    lists.weight_S[slot] = prob_ET[static_cast<int64_t>(expert) * tokens + token] / scale;
  });
}

// The gradient of the logits. With W the weights of the slots as a dense matrix, G their gradients, and D_t
// the sum of W_te G_te over e, it is W G - P D where the weights are probabilities P, and W G - W D where
// they are normalised. A normalised row far below 1 was divided by the epsilon in place of its sum, and is of
// the first form. Reads logits and 3 S entries of the lists once, writes T E.
template <typename Logit, typename Prob>
__global__ void __launch_bounds__(kRows)
    logit_gradients(const Prob* grad_S, const Logit* logits_TE, const int* token_S, const Prob* weight_S,
                    const int* expert_offsets, int tokens, int experts, bool normalize, Logit* grad_TE) {
  Prob* tile = reinterpret_cast<Prob*>(dynamic_memory);
  int* slots = reinterpret_cast<int*>(tile + blockDim.x * row_stride(experts));
  const int first = blockIdx.x * blockDim.x, rows = min(static_cast<int>(blockDim.x), tokens - first);
  const int64_t origin = static_cast<int64_t>(first) * experts;
  visit_tile(rows, experts, [=](int i, int at) {
    tile[at] = static_cast<Prob>(logits_TE[origin + i]);
    slots[at] = -1;
  });
  __syncthreads();
  for (int e = threadIdx.x / kWarp; e < experts; e += blockDim.x / kWarp) {
    int begin = expert_offsets[e];
    const int end = expert_offsets[e + 1];
    for (int beyond = end; begin < beyond;) {  // the expert's first slot that lies in the tile
      const int middle = begin + (beyond - begin) / 2;
      if (token_S[middle] < first) {
        begin = middle + 1;
      } else {
        beyond = middle;
      }
    }
    for (int s = begin + lane_of_thread(); s < end && token_S[s] < first + rows; s += kWarp) {
      slots[(token_S[s] - first) * row_stride(experts) + e] = s;
    }
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < rows) {
    Prob* row = tile + threadIdx.x * row_stride(experts);
    const int* slot = slots + threadIdx.x * row_stride(experts);
    softmax(row, experts);
    Prob inner = 0, sum = 0;
    for (int e = 0; e < experts; ++e) {
      if (slot[e] >= 0) {
        inner += weight_S[slot[e]] * grad_S[slot[e]];
        sum += weight_S[slot[e]];
      }
    }
    const bool of_weights = normalize && sum > Prob(0.5);
    for (int e = 0; e < experts; ++e) {
      const Prob weight = slot[e] >= 0 ? weight_S[slot[e]] : 0, grad = slot[e] >= 0 ? grad_S[slot[e]] : 0;
      row[e] = weight * grad - inner * (of_weights ? weight : row[e]);
    }
  }
  __syncthreads();
  visit_tile(rows, experts, [=](int i, int at) { grad_TE[origin + i] = static_cast<Logit>(tile[at]); });
}

// The launches. `launch(kernel, blocks, threads, bytes of dynamic memory, arguments...)` puts one on a
// stream; nothing here waits for the device or looks at its memory. There is at least one token.

template <typename Launch, typename Logit, typename Prob>
void launch_probabilities(const Launch& launch, const Logit* logits, const Prob* bias, int tokens,
                          int experts, int top_k, const BitMatrix& bits, Prob* prob_ET, Prob* sum_T) {
  const int rows = tile_rows(experts, sizeof(Prob));
  launch(&probabilities<Logit, Prob>, BitMatrix::blocks(tokens, rows), rows,
         rows * row_stride(experts) * sizeof(Prob), logits, bias, tokens, experts, top_k, bits, prob_ET,
         sum_T);
}

template <typename Launch, typename Prob>
void launch_lists(const Launch& launch, const Prob* prob_ET, const Prob* sum_T, int tokens, int experts,
                  int slots, const BitMatrix& bits, const Lists<Prob>& lists) {
  launch(&write_lists<Prob>, BitMatrix::blocks(tokens, kChunk), kChunk, experts * sizeof(int), prob_ET, sum_T,
         tokens, experts, slots, bits, lists);
}

template <typename Launch, typename Logit, typename Prob>
void expert_choice(const Launch& launch, const Logit* logits, int tokens, int experts, const Groups& groups,
                   int slots, const BitMatrix& bits, Prob* prob_ET, const Lists<Prob>& lists) {
  launch_probabilities(launch, logits, static_cast<const Prob*>(nullptr), tokens, experts, 0, bits, prob_ET,
                       static_cast<Prob*>(nullptr));
  int threads = 128;  // as many as a group of mean size gives work to
  while (threads < 1024 && int64_t{threads} * kWords * groups.count < tokens) {
    threads *= 2;
  }
  using Key = typename KeyOf<Prob>::type;
  launch(&select_tokens<Key>, groups.count * experts, threads, size_t{0},
         reinterpret_cast<const Key*>(prob_ET), tokens, experts, groups, bits);
  launch_lists(launch, prob_ET, static_cast<const Prob*>(nullptr), tokens, experts, slots, bits, lists);
}

// Without a capacity, so that the number of slots, T top_k, is known.
template <typename Launch, typename Logit, typename Prob>
void token_choice(const Launch& launch, const Logit* logits, const Prob* bias, int tokens, int experts,
                  int top_k, bool normalize, const BitMatrix& bits, Prob* prob_ET, Prob* sum_T,
                  const Lists<Prob>& lists) {
  launch_probabilities(launch, logits, bias, tokens, experts, top_k, bits, prob_ET, sum_T);
  launch(&rank_words, experts, 1024, size_t{0}, bits);
  launch_lists(launch, prob_ET, normalize ? static_cast<const Prob*>(sum_T) : nullptr, tokens, experts,
               tokens * top_k, bits, lists);
}

template <typename Launch, typename Logit, typename Prob>
void routing_backward(const Launch& launch, const Prob* grad_S, const Logit* logits, const int* token_S,
                      const Prob* weight_S, const int* expert_offsets, int tokens, int experts,
                      bool normalize, Logit* grad_logits) {
  const size_t bytes = sizeof(Prob) + sizeof(int);
  const int rows = tile_rows(experts, bytes);
  launch(&logit_gradients<Logit, Prob>, BitMatrix::blocks(tokens, rows), rows,
         rows * row_stride(experts) * bytes, grad_S, logits, token_S, weight_S, expert_offsets, tokens,
         experts, normalize, grad_logits);
}

}  // namespace pyvlm::routing
