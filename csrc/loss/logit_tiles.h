// Logits, a tile at a time: words times the rows that have a label. The rows are packed once and stay
// resident; weights are an operand as they lie, and each word is read once a chunk of rows.
#pragma once

#include "common/panel_gemm.h"
#include "loss/linear_cross_entropy.h"

namespace pyvlm::CPU_CAPABILITY {

// Calls work(rows, group, count) with the rows of each group of 32 that have a label, gathered.
template <typename scalar_t, typename Work>
void for_row_groups(const LossProblem& p, const Work& work) {
  run_tasks((p.R + kGroup - 1) / kGroup, kGroup * p.H, [&](TaskQueue& queue) {
    const ThreadScratch memory(kGroup * p.H * sizeof(scalar_t));
    auto* rows = memory.arena().template take<scalar_t>(kGroup * p.H);
    for (int64_t group = queue.next(); group >= 0; group = queue.next()) {
      const int64_t count = std::min(kGroup, p.R - group * kGroup);
      for (int64_t i = 0; i < count; ++i) {
        const auto* from = static_cast<const scalar_t*>(p.hidden) + p.row[group * kGroup + i] * p.H;
        std::copy(from, from + p.H, rows + i * p.H);
      }
      work(rows, group, count);
    }
  });
}

template <typename scalar_t, typename Gemm>
class LogitTiles {
 public:
  using op_t = typename Gemm::op_t;
  using acc_t = typename Gemm::acc_t;
  using V = Vec<acc_t>;
  static constexpr int64_t kVectors = kGroup / V::size();    // of a word and a group of rows
  static constexpr int64_t kWords = kPanelsAtOnce * kPanel;  // whose tiles there are at once

  const int64_t groups, chunks;  // of 32 and of 512 rows

  explicit LogitTiles(const LossProblem& p)
      : groups((p.R + kGroup - 1) / kGroup),
        chunks((p.R + kChunk - 1) / kChunk),
        p_(p),
        depth_(round_up(p.H, Gemm::kDepth)) {}

  void lay_out(Arena& arena) { rows_ = Operands<Gemm>(arena, groups, kGroup * depth_, kGroup); }

  // For the rows of one group, as they lie.
  void pack(const scalar_t* rows, int64_t group, int64_t count) const {
    pack_b_transposed<Gemm>(rows_[group], rows, p_.H, count, p_.H, kGroup, depth_);
  }

  int64_t groups_of(int64_t chunk) const {
    return std::min(kChunk / kGroup, groups - chunk * (kChunk / kGroup));
  }

  // Products of `count` panels of words with a chunk of rows: tiles [panel, group] of [64 words, 32 rows].
  void multiply(const PanelScratch<Gemm>& x, int64_t chunk, int64_t first, int64_t count) const {
    const auto panel = [&](const Operand<op_t>& scratch, int64_t i, int64_t k, int64_t depth) {
      const int64_t word = (first + i) * kPanel;
      const auto* from = static_cast<const scalar_t*>(p_.weight) + word * p_.H + k;
      return panel_of_rows<Gemm>(scratch, from, p_.H, p_.V - word, p_.H - k, depth);
    };
    multiply_streamed_a<Gemm>(x, count, groups_of(chunk), depth_, rows_[chunk * (kChunk / kGroup)],
                              rows_.size, panel);
  }

  // Where the tiles have a word, counted from their first one, and a group of the chunk.
  static acc_t* logits(const PanelScratch<Gemm>& x, int64_t word, int64_t group) {
    return x.sum(word / kPanel, group) + word % kPanel * kGroup;
  }

  acc_t bias(int64_t word) const {
    return p_.bias == nullptr ? acc_t(0) : static_cast<acc_t>(static_cast<const scalar_t*>(p_.bias)[word]);
  }

  // softcap·tanh(x / softcap), and its derivative.
  V cap(const V& x) const { return V(acc_t(p_.softcap)) * (x * V(acc_t(1 / p_.softcap))).tanh(); }
  V slope(const V& capped) const {
    const V tanh = capped * V(acc_t(1 / p_.softcap));
    return V(acc_t(1)) - tanh * tanh;
  }

 private:
  const LossProblem& p_;
  int64_t depth_;
  Operands<Gemm> rows_;  // of 32 rows [depth, 32], B operands
};

}  // namespace pyvlm::CPU_CAPABILITY
