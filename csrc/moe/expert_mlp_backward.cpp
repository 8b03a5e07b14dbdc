// The backward of experts. A row of the products that make the gradients of tokens is a token: there the
// weights are the operand that comes in pairs of rows, which is a cheaper way to pack them than to transpose
// them. The gradients of weights sum over an expert's slots.
//
//   G = dY·W2, dw = <G, act>, dH = the activation's slope times w·G, dX = dH·W1
//   dW2 = (dY)ᵀ·(w·act), dW1 = dHᵀ·X
#include "moe/expert_slots.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t, typename Gemm>
class Backward {
 public:
  explicit Backward(const ExpertBackward& args)
      : a_(args),
        p_(args.problem),
        halves_(p_.gated ? 2 : 1),
        depth_(round_up(p_.H, kPanel)),
        width_(round_up(p_.I, kPanel)),
        panels_(width_ / kPanel),
        rounds_((panels_ + kPanelsAtOnce - 1) / kPanelsAtOnce) {}

  void run() {
    const std::vector<Batch> batches =
        make_batches(p_, (3 * depth_ + (1 + 2 * halves_) * width_) * Blocking<Gemm>::kBytes);
    int64_t groups = 0, chunks = 0;
    for (const Batch& batch : batches) {
      groups = std::max(groups, batch.groups);
      chunks = std::max<int64_t>(chunks, batch.chunks.size());
    }
    Arena size;
    lay_out(size, groups, chunks);
    const CallScratch memory(size.used());
    Arena arena = memory.arena();
    lay_out(arena, groups, chunks);
    for (const Batch& batch : batches) {
      pack_tokens(batch);
      grad_hidden(batch);
      if (a_.grad_weight != nullptr) {
        grad_weight(batch);
      }
      if (a_.grad_x != nullptr) {
        grad_x(batch);
      }
      if (a_.grad_down != nullptr) {
        grad_down(batch);
      }
      if (a_.grad_gate_up != nullptr) {
        grad_gate_up(batch);
      }
      if (a_.grad_up_bias != nullptr || a_.grad_down_bias != nullptr) {
        grad_biases(batch);
      }
    }
    if (a_.grad_x != nullptr) {
      sum_slots<acc_t>(p_, rows_, static_cast<scalar_t*>(a_.grad_x));
    }
  }

 private:
  using op_t = typename Gemm::op_t;
  using acc_t = typename Gemm::acc_t;
  using V = Vec<acc_t>;
  using Scratch = PanelScratch<Gemm>;
  static constexpr int64_t kStep = Blocking<Gemm>::kStep;
  static constexpr Precision kPrecision = kPrecisionOf<scalar_t>;

  static const scalar_t* at(const void* tensor, int64_t offset) {
    return static_cast<const scalar_t*>(tensor) + offset;
  }

  void lay_out(Arena& arena, int64_t groups, int64_t chunks) {
    const int64_t hidden = halves_ * width_;
    grad_y_ = Operands<Gemm>(arena, groups, kGroup * round_up(depth_, kStep), kStep);
    grad_hidden_ = Operands<Gemm>(arena, groups, kGroup * round_up(hidden, kStep), kStep);
    // Rows that are an odd number of cache lines apart: a power of two would put them all into one set of L1.
    constexpr int64_t line = 64 / sizeof(op_t);
    if (a_.grad_x != nullptr) {
      rows_ = arena.take<scalar_t>(p_.S * p_.H);
    }
    if (a_.grad_down != nullptr) {
      grad_y_t_ = Operands<Gemm>(arena, depth_, groups * kGroup + line, groups * kGroup + line);
      act_ = Operands<Gemm>(arena, width_ / kGroup, groups * kGroup * kGroup, kGroup);
    }
    if (a_.grad_gate_up != nullptr) {
      grad_hidden_t_ = Operands<Gemm>(arena, hidden, groups * kGroup + line, groups * kGroup + line);
      x_ = Operands<Gemm>(arena, depth_ / kGroup, groups * kGroup * kGroup, kGroup);
    }
    slots_ = groups * kGroup;
    grad_weights_ = arena.take<acc_t>(rounds_ * slots_);
    grad_biases_ = arena.take<acc_t>(chunks * hidden);
  }

  void pack_tokens(const Batch& batch) const {
    run_tasks(batch.chunks.size(), kChunk * p_.H, [&](TaskQueue& queue) {
      const ThreadScratch memory(kGroup * p_.H * sizeof(scalar_t));
      scalar_t* rows = memory.arena().template take<scalar_t>(kGroup * p_.H);
      for (int64_t i = queue.next(); i >= 0; i = queue.next()) {
        const Chunk& chunk = batch.chunks[i];
        for (int64_t g = 0; g < chunk.groups(); ++g) {
          const int64_t count = std::min(kGroup, chunk.slots - g * kGroup), group = chunk.group + g;
          const int32_t* token = p_.token + chunk.first + g * kGroup;
          gather_rows(rows, p_.H, a_.grad_y, p_.H, token, count);
          for (int64_t c = 0; c < depth_; c += kStep) {
            pack_a<Gemm>(grad_y_[group].from(c * kGroup), rows + c, p_.H, count, std::min(kStep, p_.H - c),
                         kGroup, std::min(kStep, depth_ - c));
          }
          if (a_.grad_down != nullptr) {
            pack_a_transposed<Gemm>(grad_y_t_[0].from(group * kGroup), rows, p_.H, count, p_.H, kGroup,
                                    depth_);
          }
          if (a_.grad_gate_up != nullptr) {
            gather_rows(rows, p_.H, p_.x, p_.H, token, count);
            for (int64_t c = 0; c < depth_; c += kGroup) {
              pack_rows<Gemm>(x_[c / kGroup].from(group * kGroup * kGroup), kGroup, 0, rows + c, p_.H, count,
                              p_.H - c, kGroup, kGroup);
            }
          }
        }
      }
    });
  }

  void grad_hidden(const Batch& batch) const {
    for_panels<Scratch>(batch.chunks.size(), panels_, kPanel * kChunk * p_.H,
                        [&](const Scratch& x, int64_t i, int64_t first, int64_t count) {
                          [[maybe_unused]] const typename Gemm::Session session;
                          const Chunk& chunk = batch.chunks[i];
                          const scalar_t* weights = at(p_.down, chunk.expert * p_.H * p_.I);
                          const auto pack = [&](const Operand<op_t>& to, int64_t k, int64_t depth) {
                            const int64_t c = first * kPanel;
                            pack_rows<Gemm>(to, kPanel, kPanel * kStep, weights + k * p_.I + c, p_.I,
                                            p_.H - k, p_.I - c, depth, count * kPanel);
                          };
                          multiply_streamed_b<Gemm>(x, count, chunk.groups(), round_up(p_.H, Gemm::kDepth),
                                                    grad_y_[chunk.group], grad_y_.size, pack);
                          with_activation(p_.activation, [&](auto activation) {
                            for (int64_t slot = 0; slot < chunk.groups() * kGroup; slot += 2) {
                              differentiate<activation.value>(x, chunk, slot, first, count);
                            }
                          });
                          for (int64_t c = first * kPanel; c < (first + count) * kPanel; c += kPanel) {
                            if (a_.grad_gate_up != nullptr) {
                              transpose_tiles(chunk, c);
                            }
                            if (a_.grad_up_bias != nullptr) {
                              sum_tiles(grad_biases_ + i * halves_ * width_, chunk, c);
                            }
                          }
                        });
  }

  // From the products of two slots with dY to the gradients of their pre-activations, to the activations
  // times the slots' weights, and to the share that these panels have in the weights' gradients.
  template <Activation activation>
  void differentiate(const Scratch& x, const Chunk& chunk, int64_t slot, int64_t first, int64_t count) const {
    constexpr int64_t size = V::size();
    const int64_t row = chunk.group * kGroup + slot;
    V sums[2] = {V(acc_t(0)), V(acc_t(0))};
    for (int64_t c = 0; c < count * kPanel; c += 2 * size) {
      const int64_t channel = first * kPanel + c;
      const acc_t* products = x.sum(c / kPanel, slot / kGroup) + slot % kGroup * kPanel + c % kPanel;
      V act[2][2];
      for (int64_t j = 0; j < 2; ++j) {
        const bool there = slot + j < chunk.slots;
        const V by(there ? static_cast<const acc_t*>(p_.weight)[chunk.first + slot + j] : acc_t(0));
        const scalar_t* hidden = at(a_.hidden, (chunk.first + (there ? slot + j : 0)) * p_.U + channel);
        const int64_t channels = there ? p_.I - channel : 0;
        V gate[2], up[2], grad_gate[2], grad_up[2];
        load_columns<Gemm>(hidden, channels, gate[0], gate[1]);
        if (p_.gated) {
          load_columns<Gemm>(hidden + p_.I, channels, up[0], up[1]);
        }
        for (int64_t v = 0; v < 2; ++v) {
          const V product = V::loadu(products + j * kPanel + v * size), grad = product * by;
          V slope;
          act[j][v] = activate<activation, kPrecision>(gate[v], &slope);
          if (p_.gated) {
            grad_up[v] = grad * act[j][v];
            slope = slope * up[v];
            act[j][v] = act[j][v] * up[v];
          }
          grad_gate[v] = grad * slope;
          sums[j] = at::vec::fmadd(product, act[j][v], sums[j]);
          act[j][v] = act[j][v] * by;
        }
        store_gradient(row + j, channel, grad_gate);
        if (p_.gated) {
          store_gradient(row + j, width_ + channel, grad_up);
        }
      }
      for (int64_t v = 0; v < 2 && a_.grad_down != nullptr; ++v) {
        const int64_t lane = channel + v * size;
        store_b_pair<Gemm>(act_[lane / kGroup], row, lane % kGroup, act[0][v], act[1][v]);
      }
    }
    for (int64_t j = 0; j < 2; ++j) {
      grad_weights_[first / kPanelsAtOnce * slots_ + row + j] =
          at::vec::vec_reduce_all<acc_t>([](V a, V b) { return a + b; }, sums[j]);
    }
  }

  // Where grad_hidden_ has a slot of the batch from a column on.
  Operand<op_t> gradient(int64_t slot, int64_t column) const {
    return grad_hidden_[slot / kGroup].from(column / kStep * kStep * kGroup + slot % kGroup * kStep +
                                            column % kStep);
  }

  void store_gradient(int64_t slot, int64_t column, const V (&x)[2]) const {
    if constexpr (kSplitColumns<scalar_t, Gemm>) {
      store_pair(gradient(slot, column).data, x[0], x[1]);
    } else {
      store_a_row<Gemm>(gradient(slot, column), 0, 0, x[0], x[1]);
    }
  }

  void transpose_tiles(const Chunk& chunk, int64_t c) const {
    for (int64_t half = 0; half < halves_; ++half) {
      const int64_t column = half * width_ + c;
      for (int64_t slot = chunk.group * kGroup; slot < (chunk.group + chunk.groups()) * kGroup;
           slot += kGroup) {
        const Operand<op_t> from = gradient(slot, column), to = grad_hidden_t_[column].from(slot);
        for (int64_t plane = 0; plane < Gemm::kPlanes; ++plane) {
          transpose(to.data + plane * to.plane, to.ld, from.data + plane * from.plane, from.ld, kGroup,
                    kPanel);
        }
      }
    }
  }

  // sums[half, channel] of the gradients of a chunk.
  void sum_tiles(acc_t* sums, const Chunk& chunk, int64_t c) const {
    for (int64_t half = 0; half < halves_; ++half) {
      acc_t* to = sums + half * width_ + c;
      std::fill(to, to + kPanel, acc_t(0));
      for (int64_t row = 0; row < chunk.slots; ++row) {
        const Operand<op_t> from = gradient(chunk.group * kGroup + row, half * width_ + c);
        for (int64_t plane = 0; plane < Gemm::kPlanes; ++plane) {
          const op_t* grads = from.data + plane * from.plane;
          for (int64_t lane = 0; lane < kPanel; ++lane) {
            to[lane] += static_cast<acc_t>(grads[lane]);
          }
        }
      }
    }
  }

  void grad_weight(const Batch& batch) const {
    run_each(batch.chunks.size(), kChunk * (p_.down_bias != nullptr ? p_.H : rounds_), [&](int64_t i) {
      const Chunk& chunk = batch.chunks[i];
      for (int64_t s = 0; s < chunk.slots; ++s) {
        acc_t sum(0);
        for (int64_t round = 0; round < rounds_; ++round) {
          sum += grad_weights_[round * slots_ + chunk.group * kGroup + s];
        }
        const scalar_t* grad = at(a_.grad_y, p_.token[chunk.first + s] * p_.H);
        for (int64_t h = 0; h < p_.H && p_.down_bias != nullptr; ++h) {
          sum += static_cast<acc_t>(grad[h]) * static_cast<acc_t>(*at(p_.down_bias, chunk.expert * p_.H + h));
        }
        static_cast<acc_t*>(a_.grad_weight)[chunk.first + s] = sum;
      }
    });
  }

  void grad_x(const Batch& batch) const {
    const int64_t panels = depth_ / kPanel, K = halves_ * width_;
    for_panels<Scratch>(
        batch.chunks.size(), panels, kPanel * kChunk * K,
        [&](const Scratch& x, int64_t i, int64_t first, int64_t count) {
          [[maybe_unused]] const typename Gemm::Session session;
          const Chunk& chunk = batch.chunks[i];
          const scalar_t* weights = at(p_.gate_up, chunk.expert * p_.U * p_.H);
          const auto pack = [&](Operand<op_t> to, int64_t k, int64_t depth) {
            const int64_t c = first * kPanel;
            for (int64_t end = k + depth, next; k < end; k = next) {  // gate and up rows are padded apart
              const int64_t half = k / width_, row = k % width_;
              next = std::min(end, (half + 1) * width_);
              pack_rows<Gemm>(to, kPanel, kPanel * kStep, weights + (half * p_.I + row) * p_.H + c, p_.H,
                              p_.I - row, p_.H - c, next - k, count * kPanel);
              to = to.from((next - k) * kPanel);
            }
          };
          multiply_streamed_b<Gemm>(x, count, chunk.groups(), K, grad_hidden_[chunk.group], grad_hidden_.size,
                                    pack);
          for (int64_t panel = 0; panel < count; ++panel) {
            const int64_t c = (first + panel) * kPanel;
            for (int64_t s = 0; s < chunk.slots; ++s) {
              const acc_t* from = x.sum(panel, s / kGroup) + s % kGroup * kPanel;
              store_sums(rows_ + (chunk.first + s) * p_.H + c, p_.H - c, from, kPanel);
            }
          }
        });
  }

  void grad_down(const Batch& batch) const {
    multiply_over_slots(batch, 1, p_.H, depth_, grad_y_t_, p_.I, act_, [&](int64_t e, int64_t row) {
      return static_cast<scalar_t*>(a_.grad_down) + (e * p_.H + row) * p_.I;
    });
  }

  void grad_gate_up(const Batch& batch) const {
    multiply_over_slots(batch, halves_, p_.I, width_, grad_hidden_t_, p_.H, x_, [&](int64_t e, int64_t row) {
      return static_cast<scalar_t*>(a_.grad_gate_up) + (e * p_.U + row) * p_.H;
    });
  }

  // of_row(expert, row)[column] = the sum over an expert's slots of left[row] right[column].
  template <typename Row>
  void multiply_over_slots(const Batch& batch, int64_t halves, int64_t rows, int64_t padded_rows,
                           const Operands<Gemm>& left, int64_t columns, const Operands<Gemm>& right,
                           const Row& of_row) const {
    const int64_t chunks = (columns + kChunk - 1) / kChunk;
    for_panels<Scratch>(
        batch.experts * chunks, halves * padded_rows / kPanel, kPanel * kChunk * p_.S / p_.E,
        [&](const Scratch& x, int64_t i, int64_t first, int64_t count) {
          [[maybe_unused]] const typename Gemm::Session session;
          const int64_t e = i / chunks, column = i % chunks * kChunk;
          const int64_t group = batch.first_group[e], K = (batch.first_group[e + 1] - group) * kGroup;
          const int64_t groups = (std::min(kChunk, columns - column) + kGroup - 1) / kGroup;
          const auto operand = [&](const Operand<op_t>&, int64_t panel, int64_t k, int64_t) {
            return left[(first + panel) * kPanel].from(group * kGroup + k);
          };
          multiply_streamed_a<Gemm>(x, count, groups, K, right[column / kGroup].from(group * kGroup * kGroup),
                                    right.size, operand);
          for (int64_t panel = 0; panel < count; ++panel) {
            const int64_t half = (first + panel) * kPanel / padded_rows,
                          row = (first + panel) * kPanel % padded_rows;
            for (int64_t r = 0; r < std::min(kPanel, rows - row); ++r) {
              scalar_t* out = of_row(batch.first_expert + e, half * rows + row + r) + column;
              for (int64_t g = 0; g < groups; ++g) {
                store_sums(out + g * kGroup, columns - column - g * kGroup, x.sum(panel, g) + r * kGroup,
                           kGroup);
              }
            }
          }
        });
  }

  // The sums of a row, of which `count` are in the tensor.
  static void store_sums(scalar_t* to, int64_t count, const acc_t* sums, int64_t width) {
    for (int64_t c = 0; c < width; c += 2 * V::size()) {
      store_columns<Gemm>(to + c, count - c, V::loadu(sums + c), V::loadu(sums + c + V::size()));
    }
  }

  void grad_biases(const Batch& batch) const {
    run_each(batch.experts, p_.S / p_.E * p_.H, [&](int64_t i) {
      const int64_t e = batch.first_expert + i;
      std::vector<acc_t> sum(std::max(p_.U, p_.H));
      if (a_.grad_up_bias != nullptr) {
        for (size_t chunk = 0; chunk < batch.chunks.size(); ++chunk) {
          for (int64_t u = 0; u < p_.U && batch.chunks[chunk].expert == e; ++u) {
            sum[u] += grad_biases_[(chunk * halves_ + u / p_.I) * width_ + u % p_.I];
          }
        }
        at::vec::convert(sum.data(), static_cast<scalar_t*>(a_.grad_up_bias) + e * p_.U, p_.U);
      }
      if (a_.grad_down_bias != nullptr) {
        std::fill(sum.begin(), sum.end(), acc_t(0));
        for (int64_t s = p_.expert_offsets[e]; s < p_.expert_offsets[e + 1]; ++s) {
          const scalar_t* grad = at(a_.grad_y, p_.token[s] * p_.H);
          for (int64_t h = 0; h < p_.H; ++h) {
            sum[h] += static_cast<const acc_t*>(p_.weight)[s] * static_cast<acc_t>(grad[h]);
          }
        }
        at::vec::convert(sum.data(), static_cast<scalar_t*>(a_.grad_down_bias) + e * p_.H, p_.H);
      }
    });
  }

  const ExpertBackward& a_;
  const ExpertProblem& p_;
  int64_t halves_, depth_, width_, panels_, rounds_, slots_ = 0;
  Operands<Gemm> grad_y_;         // [32 slots, depth] in pieces of kStep columns, A operands
  Operands<Gemm> grad_y_t_;       // [depth, slots of the batch], an A operand
  Operands<Gemm> x_, act_;        // of 32 channels, [slots of the batch, 32], B operands; act times weight
  Operands<Gemm> grad_hidden_;    // [32 slots, halves * width], the same
  Operands<Gemm> grad_hidden_t_;  // [halves * width, slots of the batch], an A operand
  acc_t* grad_weights_;           // [rounds, slots of the batch]: the share of a few panels
  acc_t* grad_biases_;            // [chunks, halves, width]: each chunk's share
  scalar_t* rows_;                // [S, H]: each slot's gradient of x
};

}  // namespace

void expert_mlp_backward(const ExpertBackward& args) {
  with_engine(args.problem.dtype,
              [&](auto scalar, auto engine) { Backward<decltype(scalar), decltype(engine)>(args).run(); });
}

}  // namespace pyvlm::CPU_CAPABILITY
