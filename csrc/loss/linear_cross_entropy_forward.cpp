// The forward of the head and its loss. Each 256 words leave, for every row, the largest of their logits and
// the sum of their exponentials; these are then brought together in the words' order, so that the number of
// threads does not matter. Their exponential is the one of at::vec, and exact at 0: with one word that counts
// the loss is 0.
#include <cmath>
#include <limits>

#include "loss/logit_tiles.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t, typename Gemm>
class Forward {
 public:
  explicit Forward(const LossForward& args)
      : a_(args),
        p_(args.problem),
        tiles_(p_),
        panels_((p_.V + kPanel - 1) / kPanel),
        rounds_((panels_ + kPanelsAtOnce - 1) / kPanelsAtOnce),
        rows_(tiles_.groups * kGroup) {}

  void run() {
    Arena size;
    lay_out(size);
    const CallScratch memory(size.used());
    Arena arena = memory.arena();
    lay_out(arena);
    for_row_groups<scalar_t>(
        p_, [&](const scalar_t* rows, int64_t group, int64_t count) { tiles_.pack(rows, group, count); });
    for_panels<PanelScratch<Gemm>>(
        tiles_.chunks, panels_, kPanel * std::min(kChunk, rows_) * p_.H,
        [&](const PanelScratch<Gemm>& x, int64_t chunk, int64_t first, int64_t count) {
          [[maybe_unused]] const typename Gemm::Session session;
          tiles_.multiply(x, chunk, first, count);
          for (int64_t group = 0; group < tiles_.groups_of(chunk); ++group) {
            reduce(x, chunk, group, first, std::min(count * kPanel, p_.V - first * kPanel));
          }
        });
    run_each(tiles_.groups, kGroup * rounds_ * 16, [&](int64_t group) { combine(group); });
    for (int64_t i = 0; i < p_.R; ++i) {
      *a_.loss += losses_[i];
    }
  }

 private:
  using Tiles = LogitTiles<scalar_t, Gemm>;
  using acc_t = typename Gemm::acc_t;
  using V = Vec<acc_t>;
  static constexpr int64_t kVectors = Tiles::kVectors;

  void lay_out(Arena& arena) {
    tiles_.lay_out(arena);
    largest_ = arena.take<acc_t>(rounds_ * rows_);
    exponentials_ = arena.take<acc_t>(rounds_ * rows_);
    logits_ = arena.take<acc_t>(p_.label_smoothing > 0 ? rounds_ * rows_ : 0);
    targets_ = arena.take<acc_t>(rows_);
    losses_ = arena.take<double>(rows_);
  }

  // What the words of some panels leave of a group of rows.
  void reduce(const PanelScratch<Gemm>& x, int64_t chunk, int64_t group, int64_t first, int64_t words) const {
    const int64_t row = chunk * kChunk + group * kGroup;
    const int64_t place = first / kPanelsAtOnce * rows_ + row;
    V largest[kVectors], sum[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) {
      largest[v] = V(std::numeric_limits<acc_t>::lowest());
      sum[v] = V(acc_t(0));
    }
    const bool changed = p_.bias != nullptr || p_.softcap > 0;
    for (int64_t w = 0; w < words; ++w) {
      acc_t* logits = Tiles::logits(x, w, group);
      const V bias(tiles_.bias(first * kPanel + w));
      for (int64_t v = 0; v < kVectors; ++v) {
        V logit = V::loadu(logits + v * V::size());
        if (changed) {
          logit = logit + bias;
          if (p_.softcap > 0) {
            logit = tiles_.cap(logit);
          }
          logit.store(logits + v * V::size());
        }
        largest[v] = at::vec::maximum(largest[v], logit);
        sum[v] = sum[v] + logit;
      }
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      if (p_.label_smoothing > 0) {
        sum[v].store(logits_ + place + v * V::size());
      }
      largest[v].store(largest_ + place + v * V::size());
      sum[v] = V(acc_t(0));
    }
    for (int64_t w = 0; w < words; ++w) {
      const acc_t* logits = Tiles::logits(x, w, group);
      for (int64_t v = 0; v < kVectors; ++v) {
        sum[v] = sum[v] + (V::loadu(logits + v * V::size()) - largest[v]).exp_u20();
      }
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      sum[v].store(exponentials_ + place + v * V::size());
    }
    for (int64_t i = 0; i < std::min(kGroup, p_.R - row); ++i) {
      const int64_t word = p_.label[row + i] - first * kPanel;
      if (word >= 0 && word < words) {
        targets_[row + i] = Tiles::logits(x, word, group)[i];
      }
    }
  }

  // The rows' log Z and their losses.
  void combine(int64_t group) const {
    const int64_t row = group * kGroup;
    for (int64_t lane = 0; lane < kGroup; lane += V::size()) {
      const int64_t first = row + lane;
      V largest = V::loadu(largest_ + first), sum(acc_t(0)), logits(acc_t(0));
      for (int64_t i = 1; i < rounds_; ++i) {
        largest = at::vec::maximum(largest, V::loadu(largest_ + i * rows_ + first));
      }
      for (int64_t i = 0; i < rounds_; ++i) {
        const V below = V::loadu(largest_ + i * rows_ + first) - largest;
        sum = at::vec::fmadd(V::loadu(exponentials_ + i * rows_ + first), below.exp_u20(), sum);
        if (p_.label_smoothing > 0) {
          logits = logits + V::loadu(logits_ + i * rows_ + first);
        }
      }
      acc_t tops[V::size()], sums[V::size()], of_all[V::size()];
      largest.store(tops);
      sum.store(sums);
      logits.store(of_all);
      for (int64_t i = 0; i < std::min<int64_t>(V::size(), p_.R - first); ++i) {
        const double lse = tops[i] + std::log(static_cast<double>(sums[i]));
        double loss = lse - (1 - p_.label_smoothing) * targets_[first + i] + p_.z_loss * lse * lse;
        if (p_.label_smoothing > 0) {
          loss -= p_.label_smoothing / static_cast<double>(p_.V) * of_all[i];
        }
        losses_[first + i] = loss;
        static_cast<acc_t*>(a_.lse)[p_.row[first + i]] = static_cast<acc_t>(lse);
      }
    }
  }

  const LossForward& a_;
  const LossProblem& p_;
  Tiles tiles_;
  int64_t panels_, rounds_, rows_;
  acc_t *largest_, *exponentials_, *logits_;  // [rounds, rows] of 256 words each
  acc_t* targets_;                            // [rows]: the label's logit
  double* losses_;                            // [rows]
};

}  // namespace

void linear_cross_entropy_forward(const LossForward& args) {
  with_engine(args.problem.dtype,
              [&](auto scalar, auto engine) { Forward<decltype(scalar), decltype(engine)>(args).run(); });
}

}  // namespace pyvlm::CPU_CAPABILITY
