// The forward of experts for many tokens: a row of products is an output channel, a column a token, so that
// weights are taken as they lie and the first product's results are the second one's operand.
#include "moe/expert_gemm.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t, typename Gemm>
class Forward {
 public:
  explicit Forward(const ExpertForward& args)
      : a_(args),
        p_(args.problem),
        channels_(p_.gated ? kPanel / 2 : kPanel),
        depth_(round_up(p_.H, Gemm::kDepth)),
        width_(round_up(p_.I, kPanel)),
        rows_(p_.S * p_.H) {}

  void run() {
    const std::vector<Batch> batches = make_batches(p_);
    int64_t groups = 0;
    for (const Batch& batch : batches) {
      groups = std::max(groups, batch.groups);
    }
    x_ = Operands<Gemm>(groups, kGroup * depth_, kGroup);
    act_ = Operands<Gemm>(groups, kGroup * width_, kGroup);
    for (const Batch& batch : batches) {
      pack_tokens(batch);
      up(batch);
      down(batch);
    }
    sum_slots<scalar_t>(p_, rows_.data(), a_.y);
  }

 private:
  using op_t = typename Gemm::op_t;
  using acc_t = typename Gemm::acc_t;
  using V = Vec<acc_t>;
  using Scratch = PanelScratch<Gemm>;
  static constexpr Precision kPrecision =
      std::is_same_v<scalar_t, at::BFloat16> ? Precision::bf16 : Precision::full;

  static const scalar_t* at(const void* tensor, int64_t offset) {
    return static_cast<const scalar_t*>(tensor) + offset;
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

  // Pre-activations and activations. A panel of gated experts is 32 gate rows and their 32 up rows.
  void up(const Batch& batch) const {
    const int64_t panels = (p_.I + channels_ - 1) / channels_;
    for_panels<Scratch>(batch.chunks.size(), panels, kPanel * kChunk * p_.H,
                        [&](const Scratch& x, int64_t i, int64_t first, int64_t count) {
      [[maybe_unused]] const typename Gemm::Session session;
      const Chunk& chunk = batch.chunks[i];
      const scalar_t* weights = at(p_.gate_up, chunk.expert * p_.U * p_.H);
      const auto pack = [&](Operand<op_t> to, int64_t panel, int64_t k, int64_t depth) {
        const int64_t c = (first + panel) * channels_, rows = std::min(channels_, p_.I - c);
        for (int64_t row = c; row < p_.U; row += p_.I, to = to.from(channels_ * to.ld)) {
          pack_a<Gemm>(to, weights + row * p_.H + k, p_.H, rows, std::min(depth, p_.H - k), channels_, depth);
        }
      };
      multiply_panels<Gemm, Streamed::a>(x, count, chunk.groups(), depth_, x_[chunk.group], x_.size, pack);
      for (int64_t panel = 0; panel < count; ++panel) {
        for (int64_t g = 0; g < chunk.groups(); ++g) {
          activate_tile(x.sum(panel, g), chunk, g, (first + panel) * channels_);
        }
      }
    });
  }

  void activate_tile(acc_t* sums, const Chunk& chunk, int64_t g, int64_t c) const {
    const int64_t channels = std::min(channels_, p_.I - c), slots = std::min(kGroup, chunk.slots - g * kGroup);
    static const std::vector<acc_t> ones(kGroup, acc_t(1));
    acc_t* tile = sums;
    for (int64_t row = c; row < p_.U; row += p_.I, tile += channels_ * kGroup) {
      if (p_.up_bias != nullptr) {
        add_bias(tile, at(p_.up_bias, chunk.expert * p_.U + row), channels);
      }
      if (a_.hidden != nullptr) {
        auto* hidden = static_cast<scalar_t*>(a_.hidden) + (chunk.first + g * kGroup) * p_.U + row;
        store_transposed(hidden, p_.U, int64_t(1), tile, kGroup, slots, channels, ones.data());
      }
    }
    const Operand<op_t> to = act_[chunk.group + g];
    with_activation(p_.activation, [&](auto activation) {
      const auto result = [&](int64_t row, int64_t lane) {
        const acc_t* from = sums + row * kGroup + lane;
        const V y = activate<activation.value, kPrecision>(V::loadu(from));
        return p_.gated ? y * V::loadu(from + channels_ * kGroup) : y;
      };
      for (int64_t row = 0; row < channels_; row += 2) {
        for (int64_t lane = 0; lane < kGroup; lane += V::size()) {
          store_b_pair<Gemm>(to, c + row, lane, result(row, lane), result(row + 1, lane));
        }
      }
    });
  }

  // Each slot's output, times its weight.
  void down(const Batch& batch) const {
    const int64_t panels = (p_.H + kPanel - 1) / kPanel, K = round_up(p_.I, Gemm::kDepth);
    for_panels<Scratch>(batch.chunks.size(), panels, kPanel * kChunk * p_.I,
                        [&](const Scratch& x, int64_t i, int64_t first, int64_t count) {
      [[maybe_unused]] const typename Gemm::Session session;
      const Chunk& chunk = batch.chunks[i];
      const scalar_t* weights = at(p_.down, chunk.expert * p_.H * p_.I);
      const auto pack = [&](const Operand<op_t>& to, int64_t panel, int64_t k, int64_t depth) {
        const int64_t row = (first + panel) * kPanel;
        pack_a<Gemm>(to, weights + row * p_.I + k, p_.I, std::min(kPanel, p_.H - row),
                     std::min(depth, p_.I - k), kPanel, depth);
      };
      multiply_panels<Gemm, Streamed::a>(x, count, chunk.groups(), K, act_[chunk.group], act_.size, pack);
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
          store_transposed(rows_.data() + slot * p_.H + row, p_.H, int64_t(1), tile, kGroup, slots, rows, of_lane);
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
  int64_t channels_, depth_, width_;
  Operands<Gemm> x_, act_;  // [depth, 32], [width, 32]: B operands
  Buffer<acc_t> rows_;      // [S, H]
};

}  // namespace

void expert_mlp_forward(const ExpertForward& args) {
  with_engine(args.problem.dtype,
              [&](auto scalar, auto engine) { Forward<decltype(scalar), decltype(engine)>(args).run(); });
}

}  // namespace pyvlm::CPU_CAPABILITY
