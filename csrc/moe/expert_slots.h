// What the forward and the backward of experts share: how slots are cut, gathered and summed by token.
#pragma once

#include <algorithm>
#include <vector>

#include "common/activations.h"
#include "common/panel_gemm.h"
#include "moe/expert_mlp.h"

namespace pyvlm::CPU_CAPABILITY {

// Consecutive slots of an expert. Groups are numbered through all chunks of a batch.
struct Chunk {
  int64_t expert, first, slots, group;

  int64_t groups() const { return (slots + kGroup - 1) / kGroup; }
};

// Experts whose scratch memory is there at the same time.
struct Batch {
  int64_t first_expert, experts;
  std::vector<Chunk> chunks;
  int64_t groups = 0;
  std::vector<int64_t> first_group;  // of each expert, and the end
};

inline std::vector<Batch> make_batches(const ExpertProblem& p, int64_t slot_bytes) {
  // As little as threads do not starve on, and up to 32 MB.
  const int64_t limit = std::max<int64_t>(512 * at::get_num_threads(), (32 << 20) / slot_bytes);
  std::vector<Batch> batches;
  int64_t slots = 0;
  for (int64_t e = 0; e < p.E; ++e) {
    const int64_t first = p.expert_offsets[e], count = p.expert_offsets[e + 1] - first;
    if (batches.empty() || slots + count > limit) {
      batches.push_back({e, 0, {}, 0, {0}});
      slots = 0;
    }
    Batch& batch = batches.back();
    const int64_t pieces = std::max<int64_t>(1, (count + kChunk - 1) / kChunk);
    const int64_t piece = round_up((count + pieces - 1) / pieces, kGroup);
    for (int64_t at = 0; at < count; at += piece) {
      batch.chunks.push_back({e, first + at, std::min(piece, count - at), batch.groups});
      batch.groups += batch.chunks.back().groups();
    }
    batch.experts += 1;
    batch.first_group.push_back(batch.groups);
    slots += count;
  }
  return batches;
}

// Rows of [T, H] by their numbers, one behind the other, `ld` apart.
template <typename scalar_t>
void gather_rows(scalar_t* to, int64_t ld, const void* rows, int64_t width, const int32_t* index,
                 int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const scalar_t* from = static_cast<const scalar_t*>(rows) + index[i] * width;
    std::copy(from, from + width, to + i * ld);
  }
}

// out[t] = the sum of the rows of token t's slots, in their order.
template <typename acc_t, typename row_t, typename scalar_t>
void sum_slots(const ExpertProblem& p, const row_t* rows, scalar_t* out) {
  using V = Vec<acc_t>;
  constexpr int64_t kTokens = 16, kStep = 2 * V::size();
  run_tasks((p.T + kTokens - 1) / kTokens, kTokens * p.H * (1 + p.S / std::max<int64_t>(p.T, 1)),
            [&](TaskQueue& queue) {
              for (int64_t task = queue.next(); task >= 0; task = queue.next()) {
                for (int64_t t = task * kTokens; t < std::min((task + 1) * kTokens, p.T); ++t) {
                  const int32_t *begin = p.slot + p.token_offsets[t], *end = p.slot + p.token_offsets[t + 1];
                  int64_t h = 0;
                  for (; h + kStep <= p.H; h += kStep) {
                    acc_t sum[kStep];
                    V x0, x1, sum0(acc_t(0)), sum1(acc_t(0));
                    for (const int32_t* slot = begin; slot < end; ++slot) {
                      load_two(rows + *slot * p.H + h, x0, x1);
                      sum0 = sum0 + x0;
                      sum1 = sum1 + x1;
                    }
                    sum0.store(sum);
                    sum1.store(sum + V::size());
                    at::vec::convert(sum, out + t * p.H + h, kStep);
                  }
                  for (; h < p.H; ++h) {
                    acc_t sum(0);
                    for (const int32_t* slot = begin; slot < end; ++slot) {
                      sum += static_cast<acc_t>(rows[*slot * p.H + h]);
                    }
                    out[t * p.H + h] = static_cast<scalar_t>(sum);
                  }
                }
              }
            });
}

}  // namespace pyvlm::CPU_CAPABILITY
