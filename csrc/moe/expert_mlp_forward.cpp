// The forward of experts for many tokens: a row of products is an output channel, a column a token, so that
// weights are taken as they lie and the first product's results are the second one's operand.
#include "moe/expert_slots.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t, typename Gemm>
class Forward {
 public:
  explicit Forward(const ExpertForward& args)
      : a_(args),
        p_(args.problem),
        halves_(p_.gated ? 2 : 1),
        depth_(round_up(p_.H, Gemm::kDepth)),
        width_(round_up(p_.I, kPanel)) {}

  void run() {
    const std::vector<Batch> batches = make_batches(p_, (depth_ + width_) * Blocking<Gemm>::kBytes);
    int64_t groups = 0;
    for (const Batch& batch : batches) {
      groups = std::max(groups, batch.groups);
    }
    Arena size;
    lay_out(size, groups);
    const CallScratch memory(size.used());
    Arena arena = memory.arena();
    lay_out(arena, groups);
    for (const Batch& batch : batches) {
      pack_tokens(batch);
      up(batch);
      down(batch);
    }
    sum_slots<acc_t>(p_, rows_, static_cast<scalar_t*>(a_.y));
  }

 private:
  using op_t = typename Gemm::op_t;
  using acc_t = typename Gemm::acc_t;
  using V = Vec<acc_t>;
  using Scratch = PanelScratch<Gemm>;
  static constexpr Precision kPrecision = kPrecisionOf<scalar_t>;

  static const scalar_t* at(const void* tensor, int64_t offset) {
    return static_cast<const scalar_t*>(tensor) + offset;
  }

  void lay_out(Arena& arena, int64_t groups) {
    x_ = Operands<Gemm>(arena, groups, kGroup * depth_, kGroup);
    act_ = Operands<Gemm>(arena, groups, kGroup * width_, kGroup);
    rows_ = arena.take<scalar_t>(p_.S * p_.H);
  }

  void pack_tokens(const Batch& batch) const {
    run_tasks(batch.chunks.size(), kChunk * p_.H, [&](TaskQueue& queue) {
      const int64_t ld = round_up(p_.H, 2);
      const ThreadScratch memory(kGroup * ld * sizeof(scalar_t));
      scalar_t* rows = memory.arena().template take<scalar_t>(kGroup * ld);
      for (int64_t i = queue.next(); i >= 0; i = queue.next()) {
        const Chunk& chunk = batch.chunks[i];
        for (int64_t g = 0; g < chunk.groups(); ++g) {
          const int64_t count = std::min(kGroup, chunk.slots - g * kGroup);
          gather_rows(rows, ld, p_.x, p_.H, p_.token + chunk.first + g * kGroup, count);
          pack_b_transposed<Gemm>(x_[chunk.group + g], rows, ld, count, p_.H, kGroup, depth_);
        }
      }
    });
  }

  // Pre-activations and activations. Of gated experts, panels of gate rows and of up rows take turns.
  void up(const Batch& batch) const {
    const int64_t panels = halves_ * width_ / kPanel;
    for_panels<Scratch>(
        batch.chunks.size(), panels, kPanel * kChunk * p_.H,
        [&](const Scratch& x, int64_t i, int64_t first, int64_t count) {
          [[maybe_unused]] const typename Gemm::Session session;
          const Chunk& chunk = batch.chunks[i];
          const scalar_t* weights = at(p_.gate_up, chunk.expert * p_.U * p_.H);
          const auto operand = [&](const Operand<op_t>& scratch, int64_t panel, int64_t k, int64_t depth) {
            const int64_t c = (first + panel) / halves_ * kPanel, row = panel % halves_ * p_.I + c;
            return panel_of_rows<Gemm>(scratch, weights + row * p_.H + k, p_.H, p_.I - c, p_.H - k, depth);
          };
          multiply_streamed_a<Gemm>(x, count, chunk.groups(), depth_, x_[chunk.group], x_.size, operand);
          for (int64_t panel = 0; panel < count; panel += halves_) {
            for (int64_t g = 0; g < chunk.groups(); ++g) {
              acc_t* tiles[] = {x.sum(panel, g), p_.gated ? x.sum(panel + 1, g) : nullptr};
              activate_tiles(tiles, chunk, g, (first + panel) / halves_ * kPanel);
            }
          }
        });
  }

  void activate_tiles(acc_t* const (&tiles)[2], const Chunk& chunk, int64_t g, int64_t c) const {
    const int64_t channels = std::min(kPanel, p_.I - c), slots = std::min(kGroup, chunk.slots - g * kGroup);
    static const std::vector<acc_t> ones(kGroup, acc_t(1));
    for (int64_t half = 0; half < halves_; ++half) {
      const int64_t row = half * p_.I + c;
      if (p_.up_bias != nullptr) {
        add_bias(tiles[half], at(p_.up_bias, chunk.expert * p_.U + row), channels);
      }
      if (a_.hidden != nullptr) {
        auto* hidden = static_cast<scalar_t*>(a_.hidden) + (chunk.first + g * kGroup) * p_.U + row;
        store_transposed(hidden, p_.U, int64_t(1), tiles[half], kGroup, slots, channels, ones.data());
      }
    }
    const Operand<op_t> to = act_[chunk.group + g];
    with_activation(p_.activation, [&](auto activation) {
      const auto result = [&](int64_t at) {
        const V y = activate<activation.value, kPrecision>(V::loadu(tiles[0] + at));
        return p_.gated ? y * V::loadu(tiles[1] + at) : y;
      };
      for (int64_t row = 0; row < kPanel; row += 2) {
        for (int64_t lane = 0; lane < kGroup; lane += V::size()) {
          const int64_t at = row * kGroup + lane;
          store_b_pair<Gemm>(to, c + row, lane, result(at), result(at + kGroup));
        }
      }
    });
  }

  // Each slot's output, times its weight.
  void down(const Batch& batch) const {
    const int64_t panels = (p_.H + kPanel - 1) / kPanel, K = round_up(p_.I, Gemm::kDepth);
    for_panels<Scratch>(
        batch.chunks.size(), panels, kPanel * kChunk * p_.I,
        [&](const Scratch& x, int64_t i, int64_t first, int64_t count) {
          [[maybe_unused]] const typename Gemm::Session session;
          const Chunk& chunk = batch.chunks[i];
          const scalar_t* weights = at(p_.down, chunk.expert * p_.H * p_.I);
          const auto operand = [&](const Operand<op_t>& scratch, int64_t panel, int64_t k, int64_t depth) {
            const int64_t row = (first + panel) * kPanel;
            return panel_of_rows<Gemm>(scratch, weights + row * p_.I + k, p_.I, p_.H - row, p_.I - k, depth);
          };
          multiply_streamed_a<Gemm>(x, count, chunk.groups(), K, act_[chunk.group], act_.size, operand);
          for (int64_t g = 0; g < chunk.groups(); ++g) {
            const int64_t slot = chunk.first + g * kGroup, slots = std::min(kGroup, chunk.slots - g * kGroup);
            const acc_t* weight = static_cast<const acc_t*>(p_.weight) + slot;
            alignas(64) acc_t of_lane[kGroup] = {};
            std::copy(weight, weight + slots, of_lane);
            for (int64_t panel = 0; panel < count; ++panel) {
              const int64_t row = (first + panel) * kPanel, rows = std::min(kPanel, p_.H - row);
              acc_t* tile = x.sum(panel, g);
              if (p_.down_bias != nullptr) {
                add_bias(tile, at(p_.down_bias, chunk.expert * p_.H + row), rows);
              }
              store_transposed(rows_ + slot * p_.H + row, p_.H, int64_t(1), tile, kGroup, slots, rows,
                               of_lane);
            }
          }
        });
  }

  static void add_bias(acc_t* tile, const scalar_t* bias, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      const V of_row(static_cast<acc_t>(bias[row]));
      for (int64_t lane = 0; lane < kGroup; lane += V::size()) {
        acc_t* sum = tile + row * kGroup + lane;
        (V::loadu(sum) + of_row).store(sum);
      }
    }
  }

  const ExpertForward& a_;
  const ExpertProblem& p_;
  int64_t halves_, depth_, width_;
  Operands<Gemm> x_, act_;  // [depth, 32], [width, 32]: B operands
  scalar_t* rows_;          // [S, H], rounded as each expert's output is
};

}  // namespace

void expert_mlp_forward(const ExpertForward& args) {
  with_engine(args.problem.dtype,
              [&](auto scalar, auto engine) { Forward<decltype(scalar), decltype(engine)>(args).run(); });
}

}  // namespace pyvlm::CPU_CAPABILITY
