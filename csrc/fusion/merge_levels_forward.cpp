// The forward of merged levels, a section after another: the sum of its levels, normalised on the way from
// memory to the operand of a product, and the product with its weight, which is taken as it lies.
#include "fusion/merge_rows.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t, typename Gemm>
class Forward {
 public:
  explicit Forward(const MergeForward& args)
      : a_(args),
        p_(args.problem),
        groups_((p_.tokens() + kGroup - 1) / kGroup),
        width_(round_up(p_.C, kStep)),
        depth_(round_up(p_.C, Gemm::kDepth)),
        panels_((p_.H + kPanel - 1) / kPanel),
        rounds_((panels_ + kPanelsAtOnce - 1) / kPanelsAtOnce),
        chunks_(cut_tokens(p_.tokens())) {}

  void run() {
    Arena size;
    lay_out(size);
    const CallScratch memory(size.used());
    Arena arena = memory.arena();
    lay_out(arena);
    for (int64_t section = 0; section < p_.sections; ++section) {
      merge(section);
      multiply(section);
    }
  }

 private:
  using op_t = typename Gemm::op_t;
  using acc_t = typename Gemm::acc_t;
  using V = Vec<acc_t>;
  using Scratch = PanelScratch<Gemm>;
  static constexpr int64_t kStep = kRowStep<acc_t>;
  static constexpr int64_t kSums = kPanelsAtOnce * kChunk * kPanel;

  void lay_out(Arena& arena) {
    x_ = Operands<Gemm>(arena, groups_, kGroup * depth_, kGroup);
    start_ = arena.take<acc_t>(width_);
    if (p_.sections > 1) {
      sums_ = arena.take<acc_t>(chunks_.size() * rounds_ * kSums);
    }
  }

  acc_t alpha(int64_t level) const { return static_cast<const acc_t*>(p_.alpha)[level]; }

  // x_ = Σ_l α_l (γ_l ⊙ v̂_l + β_l) over the levels of a section, tokens as columns.
  void merge(int64_t section) const {
    const int64_t count = p_.levels_of_section(), first = section * count, ld = round_up(p_.C, 2);
    std::fill(start_, start_ + width_, acc_t(0));
    for (int64_t level = first; level < first + count; ++level) {
      const acc_t* beta = of_level<acc_t>(p_.beta, level, p_.beta_stride);
      for (int64_t c = 0; c < p_.C; ++c) {
        start_[c] += alpha(level) * beta[c];
      }
    }
    run_tasks(groups_, kGroup * count * p_.C, [&](TaskQueue& queue) {
      Arena size;
      Rows measured(size, width_, ld);
      const ThreadScratch memory(size.used());
      Arena arena = memory.arena();
      const Rows rows(arena, width_, ld);
      for (int64_t group = queue.next(); group >= 0; group = queue.next()) {
        const int64_t token = group * kGroup, tokens = std::min(kGroup, p_.tokens() - token);
        for (int64_t t = 0; t < tokens; t += kRows) {
          merge_rows(rows.sums, rows.merged + t * ld, ld, token + t, std::min(kRows, tokens - t), first,
                     count);
        }
        pack_b_transposed<Gemm>(x_[group], rows.merged, ld, tokens, p_.C, kGroup, depth_);
      }
    });
  }

  struct Rows {
    acc_t* sums;       // [kRows, width]
    scalar_t* merged;  // [kGroup, ld]

    Rows(Arena& arena, int64_t width, int64_t ld)
        : sums(arena.take<acc_t>(kRows * width)), merged(arena.take<scalar_t>(kGroup * ld)) {}
  };

  void merge_rows(acc_t* sums, scalar_t* merged, int64_t ld, int64_t token, int64_t tokens, int64_t first,
                  int64_t count) const {
    for (int64_t t = 0; t < tokens; ++t) {
      std::copy(start_, start_ + width_, sums + t * width_);
    }
    for_rows<scalar_t>(p_, first, count, token, tokens,
                       [&](int64_t level, int64_t t, const scalar_t* row, const scalar_t* next) {
                         const acc_t mean = mean_of(row, next), rstd = rstd_of(row, mean);
                         if (a_.mean != nullptr) {
                           static_cast<acc_t*>(a_.mean)[level * p_.tokens() + token + t] = mean;
                           static_cast<acc_t*>(a_.rstd)[level * p_.tokens() + token + t] = rstd;
                         }
                         add_normalised(sums + t * width_, row, mean, alpha(level) * rstd,
                                        of_level<acc_t>(p_.gamma, level, p_.gamma_stride));
                       });
    for (int64_t t = 0; t < tokens; ++t) {
      for_row<acc_t>(p_.C, [&](int64_t c, int64_t left) {
        const acc_t* sum = sums + t * width_ + c;
        store_row(merged + t * ld + c, left, V::loadu(sum), V::loadu(sum + V::size()));
      });
    }
  }

  acc_t mean_of(const scalar_t* row, const scalar_t* next) const {
    V sum0(acc_t(0)), sum1(acc_t(0));
    for_row<acc_t>(p_.C, [&](int64_t c, int64_t left) {
      V x0, x1;
      prefetch_row<acc_t>(next + c);
      load_row(row + c, left, acc_t(0), x0, x1);
      sum0 = sum0 + x0;
      sum1 = sum1 + x1;
    });
    return sum_of(sum0, sum1) / static_cast<acc_t>(p_.C);
  }

  // The row is in L1 by now: a second look at it costs less than what squares of large means would cancel.
  acc_t rstd_of(const scalar_t* row, acc_t mean) const {
    const V by_mean(mean);
    V sum0(acc_t(0)), sum1(acc_t(0));
    for_row<acc_t>(p_.C, [&](int64_t c, int64_t left) {
      V x0, x1;
      load_row(row + c, left, mean, x0, x1);
      x0 = x0 - by_mean;
      x1 = x1 - by_mean;
      sum0 = at::vec::fmadd(x0, x0, sum0);
      sum1 = at::vec::fmadd(x1, x1, sum1);
    });
    return acc_t(1) / std::sqrt(sum_of(sum0, sum1) / static_cast<acc_t>(p_.C) + static_cast<acc_t>(p_.eps));
  }

  void add_normalised(acc_t* sums, const scalar_t* row, acc_t mean, acc_t scale, const acc_t* gamma) const {
    const V by_mean(mean), by_scale(scale);
    for_row<acc_t>(p_.C, [&](int64_t c, int64_t left) {
      V x[2], by[2];
      load_row(row + c, left, mean, x[0], x[1]);
      load_row(gamma + c, left, acc_t(0), by[0], by[1]);
      for (int64_t v = 0; v < 2; ++v) {
        acc_t* sum = sums + c + v * V::size();
        at::vec::fmadd((x[v] - by_mean) * by_scale, by[v], V::loadu(sum)).store(sum);
      }
    });
  }

  // A task is a chunk of tokens and a round of panels, whose sums stay where they are from section to
  // section.
  void multiply(int64_t section) const {
    const bool last = section + 1 == p_.sections;
    for_panels<Scratch>(
        chunks_.size() * rounds_, kPanelsAtOnce, kPanel * kChunk * p_.C,
        [&](Scratch x, int64_t task, int64_t, int64_t) {
          const int64_t first = task % rounds_ * kPanelsAtOnce;
          const int64_t count = std::min(kPanelsAtOnce, panels_ - first);
          [[maybe_unused]] const typename Gemm::Session session;
          const TokenChunk& chunk = chunks_[task / rounds_];
          if (p_.sections > 1) {
            x.sums = sums_ + task * kSums;
          }
          const scalar_t* weight =
              static_cast<const scalar_t*>(p_.weight) + (section * p_.H + first * kPanel) * p_.C;
          const auto operand = [&](const Operand<op_t>& scratch, int64_t panel, int64_t k, int64_t depth) {
            const int64_t row = panel * kPanel;
            return panel_of_rows<Gemm>(scratch, weight + row * p_.C + k, p_.C, p_.H - first * kPanel - row,
                                       p_.C - k, depth);
          };
          multiply_streamed_a<Gemm>(x, count, chunk.groups(), depth_, x_[chunk.group()], x_.size, operand,
                                    /*accumulate=*/section > 0);
          if (last) {
            store(x, chunk, first, count);
          }
        });
  }

  void store(const Scratch& x, const TokenChunk& chunk, int64_t first, int64_t count) const {
    static const std::vector<acc_t> ones(kGroup, acc_t(1));
    for (int64_t group = 0; group < chunk.groups(); ++group) {
      const int64_t token = chunk.first + group * kGroup;
      const int64_t tokens = std::min(kGroup, chunk.first + chunk.tokens - token);
      for (int64_t panel = 0; panel < count; ++panel) {
        const int64_t row = (first + panel) * kPanel, rows = std::min(kPanel, p_.H - row);
        acc_t* tile = x.sum(panel, group);
        for (int64_t r = 0; r < rows; ++r) {
          const V bias(static_cast<const acc_t*>(a_.bias)[row + r]);
          for (acc_t* sum = tile + r * kGroup; sum < tile + (r + 1) * kGroup; sum += V::size()) {
            (V::loadu(sum) + bias).store(sum);
          }
        }
        store_transposed(static_cast<scalar_t*>(a_.out) + token * p_.H + row, p_.H, int64_t(1), tile, kGroup,
                         tokens, rows, ones.data());
      }
    }
  }

  const MergeForward& a_;
  const MergeProblem& p_;
  int64_t groups_, width_, depth_, panels_, rounds_;
  std::vector<TokenChunk> chunks_;
  Operands<Gemm> x_;       // of 32 tokens, [depth, 32], a B operand
  acc_t* start_;           // [width]: what is the same for all tokens
  acc_t* sums_ = nullptr;  // [chunks, rounds, kSums], as PanelScratch has them
};

}  // namespace

void merge_levels_forward(const MergeForward& args) {
  with_engine(args.problem.dtype,
              [&](auto scalar, auto engine) { Forward<decltype(scalar), decltype(engine)>(args).run(); });
}

}  // namespace pyvlm::CPU_CAPABILITY
