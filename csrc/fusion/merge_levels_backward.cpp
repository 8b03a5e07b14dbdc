// The backward of merged levels, a section after another. With dY the gradient of the output and dM that of a
// section's sum:
//
//   dM = dY·W,  dW = dYᵀ·Σ_l α_l (γ_l ⊙ v̂_l + β_l),  g = γ_l ⊙ dM
//   dv_l = α_l rstd (g − mean(g) − v̂_l mean(g ⊙ v̂_l))
//
// The other gradients are made of three sums over tokens, E_l = Σ dM ⊙ v̂_l, D = Σ dM and S = Σ dY:
//
//   dα_l = <γ_l, E_l> + <β_l, D> + <b_l, S>,  dγ_l = α_l E_l,  dβ_l = α_l D,  db_l = α_l S
//
// Levels are read once, by a pass that makes dv_l, E_l, D and what dW multiplies. Sums over tokens are made
// in blocks of a fixed size, and theirs in order.
#include "fusion/merge_rows.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 2 * kGroup;  // tokens of a partial sum

template <typename scalar_t, typename Gemm>
class Backward {
 public:
  explicit Backward(const MergeBackward& args)
      : a_(args),
        p_(args.problem),
        groups_((p_.tokens() + kGroup - 1) / kGroup),
        blocks_((p_.tokens() + kBlock - 1) / kBlock),
        width_(round_up(p_.C, kPanel)),
        features_(round_up(p_.H, kPanel)),
        chunks_(cut_tokens(p_.tokens())),
        needs_products_(a_.grad_alpha != nullptr || a_.grad_gamma != nullptr),
        needs_merged_grad_(needs_products_ || a_.grad_beta != nullptr || a_.grad_levels != nullptr),
        needs_sums_(a_.grad_alpha != nullptr || a_.grad_beta != nullptr) {}

  void run() {
    Arena size;
    lay_out(size);
    const CallScratch memory(size.used());
    Arena arena = memory.arena();
    lay_out(arena);
    pack_grad_out();
    if (a_.grad_bias != nullptr || a_.grad_alpha != nullptr) {
      differentiate_bias();
    }
    for (int64_t section = 0; section < p_.sections; ++section) {
      if (needs_merged_grad_) {
        grad_merged(section);
      }
      if (needs_merged_grad_ || a_.grad_weight != nullptr) {
        read_levels(section);
      }
      if (needs_products_ || needs_sums_) {
        differentiate_norms(section);
      }
      if (a_.grad_weight != nullptr) {
        grad_weight(section);
      }
    }
  }

 private:
  using op_t = typename Gemm::op_t;
  using acc_t = typename Gemm::acc_t;
  using V = Vec<acc_t>;
  using Scratch = PanelScratch<Gemm>;
  static constexpr int64_t kPacked = Blocking<Gemm>::kStep;  // columns of a piece of an A operand
  static constexpr int64_t kStep = kRowStep<acc_t>;

  void lay_out(Arena& arena) {
    if (needs_merged_grad_) {
      grad_y_ = Operands<Gemm>(arena, groups_, kGroup * round_up(features_, kPacked), kPacked);
      grad_merged_ = arena.take<acc_t>(p_.tokens() * p_.C);
    }
    if (a_.grad_weight != nullptr) {
      // Rows that are an odd number of cache lines apart: a power of two would put them all into one set of
      // L1.
      constexpr int64_t line = 64 / sizeof(op_t);
      grad_y_t_ = Operands<Gemm>(arena, features_, groups_ * kGroup + line, groups_ * kGroup + line);
      merged_ = Operands<Gemm>(arena, width_ / kGroup, groups_ * kGroup * kGroup, kGroup);
    }
    out_sums_ = arena.take<acc_t>(blocks_ * p_.H);
    products_ = arena.take<acc_t>(blocks_ * p_.levels_of_section() * width_);
    sums_ = arena.take<acc_t>(blocks_ * width_);
    start_ = arena.take<acc_t>(width_);
  }

  acc_t alpha(int64_t level) const { return static_cast<const acc_t*>(p_.alpha)[level]; }

  int64_t tokens_of_block(int64_t block) const { return std::min(kBlock, p_.tokens() - block * kBlock); }

  // dY as operands, and its sums over the tokens of each block.
  void pack_grad_out() const {
    run_each(blocks_, kBlock * p_.H, [&](int64_t block) {
      const scalar_t* grad = static_cast<const scalar_t*>(a_.grad_out) + block * kBlock * p_.H;
      const int64_t tokens = tokens_of_block(block);
      for (int64_t t = 0; t < tokens; t += kGroup) {
        const scalar_t* rows = grad + t * p_.H;
        const int64_t count = std::min(kGroup, tokens - t), group = (block * kBlock + t) / kGroup;
        for (int64_t c = 0; c < features_ && needs_merged_grad_; c += kPacked) {
          pack_a<Gemm>(grad_y_[group].from(c * kGroup), rows + c, p_.H, count,
                       std::clamp<int64_t>(p_.H - c, 0, kPacked), kGroup, std::min(kPacked, features_ - c));
        }
        if (a_.grad_weight != nullptr) {
          pack_a_transposed<Gemm>(grad_y_t_[0].from(group * kGroup), rows, p_.H, count, p_.H, kGroup,
                                  features_);
        }
      }
      acc_t* sum = out_sums_ + block * p_.H;
      std::fill(sum, sum + p_.H, acc_t(0));
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < p_.H; ++h) {
          sum[h] += static_cast<acc_t>(grad[t * p_.H + h]);
        }
      }
    });
  }

  // The sum of the blocks' rows, `stride` apart.
  std::vector<acc_t> sum_blocks(const acc_t* rows, int64_t stride, int64_t size) const {
    std::vector<acc_t> sum(size);
    for (int64_t block = 0; block < blocks_; ++block) {
      for (int64_t c = 0; c < size; ++c) {
        sum[c] += rows[block * stride + c];
      }
    }
    return sum;
  }

  void differentiate_bias() const {
    const std::vector<acc_t> sum = sum_blocks(out_sums_, p_.H, p_.H);
    for (int64_t level = 0; level < p_.L && a_.bias != nullptr; ++level) {
      const acc_t* bias = of_level<acc_t>(a_.bias, level, a_.bias_stride);
      auto* grad_bias = static_cast<acc_t*>(a_.grad_bias);
      acc_t product(0);
      for (int64_t h = 0; h < p_.H; ++h) {
        product += bias[h] * sum[h];
        if (grad_bias != nullptr) {
          grad_bias[level * a_.bias_stride + h] += alpha(level) * sum[h];
        }
      }
      if (a_.grad_alpha != nullptr) {
        static_cast<acc_t*>(a_.grad_alpha)[level] += product;
      }
    }
  }

  // dM, a row a token: the weight is the operand that comes in pairs of rows.
  void grad_merged(int64_t section) const {
    const scalar_t* weight = static_cast<const scalar_t*>(p_.weight) + section * p_.H * p_.C;
    for_panels<Scratch>(chunks_.size(), width_ / kPanel, kPanel * kChunk * p_.H,
                        [&](const Scratch& x, int64_t i, int64_t first, int64_t count) {
                          [[maybe_unused]] const typename Gemm::Session session;
                          const TokenChunk& chunk = chunks_[i];
                          const auto pack = [&](const Operand<op_t>& to, int64_t k, int64_t depth) {
                            const int64_t c = first * kPanel;
                            pack_rows<Gemm>(to, kPanel, kPanel * kPacked, weight + k * p_.C + c, p_.C,
                                            p_.H - k, p_.C - c, depth, count * kPanel);
                          };
                          multiply_streamed_b<Gemm>(x, count, chunk.groups(), round_up(p_.H, Gemm::kDepth),
                                                    grad_y_[chunk.group()], grad_y_.size, pack);
                          for (int64_t t = 0; t < chunk.tokens; ++t) {
                            for (int64_t panel = 0; panel < count; ++panel) {
                              const int64_t c = (first + panel) * kPanel;
                              store_merged(grad_merged_ + (chunk.first + t) * p_.C + c, p_.C - c,
                                           x.sum(panel, t / kGroup) + t % kGroup * kPanel);
                            }
                          }
                        });
  }

  // A panel's sums of a row, of which `count` are there, in the order of the tensors.
  static void store_merged(acc_t* to, int64_t count, const acc_t* sums) {
    for (int64_t c = 0; c < std::min(kPanel, count); c += kStep) {
      V x0 = V::loadu(sums + c), x1 = V::loadu(sums + c + V::size());
      if constexpr (kSplitColumns<scalar_t, Gemm>) {
        std::tie(x0, x1) = at::vec::interleave2(x0, x1);
      }
      store_row(to + c, count - c, x0, x1);
    }
  }

  // Scratch memory of a thread that reads levels.
  struct Rows {
    acc_t* sums;       // [kRows, width]
    scalar_t* merged;  // [kGroup, C]

    Rows(Arena& arena, int64_t width, int64_t C)
        : sums(arena.take<acc_t>(kRows * width)), merged(arena.take<scalar_t>(kGroup * C)) {}
  };

  void read_levels(int64_t section) const {
    const int64_t count = p_.levels_of_section(), first = section * count;
    std::fill(start_, start_ + width_, acc_t(0));
    for (int64_t level = first; level < first + count; ++level) {
      const acc_t* beta = of_level<acc_t>(p_.beta, level, p_.beta_stride);
      for (int64_t c = 0; c < p_.C; ++c) {
        start_[c] += alpha(level) * beta[c];
      }
    }
    run_tasks(blocks_, 4 * kBlock * count * p_.C, [&](TaskQueue& queue) {
      Arena size;
      Rows(size, width_, p_.C);
      const ThreadScratch memory(size.used());
      Arena arena = memory.arena();
      const Rows rows(arena, width_, p_.C);
      for (int64_t block = queue.next(); block >= 0; block = queue.next()) {
        read_block(rows, block, first, count);
      }
    });
  }

  void read_block(const Rows& rows, int64_t block, int64_t first, int64_t count) const {
    acc_t *products = products_ + block * count * width_, *sums = sums_ + block * width_;
    std::fill(products, products + (needs_products_ ? count * width_ : 0), acc_t(0));
    std::fill(sums, sums + width_, acc_t(0));
    const int64_t begin = block * kBlock, end = begin + tokens_of_block(block);
    for (int64_t token = begin; token < end; token += kRows) {
      const int64_t tokens = std::min(kRows, end - token);
      for (int64_t t = 0; t < tokens; ++t) {
        std::copy(start_, start_ + width_, rows.sums + t * width_);
        if (needs_sums_) {
          add_row(sums, grad_merged_ + (token + t) * p_.C);
        }
      }
      for_rows<scalar_t>(p_, first, count, token, tokens,
                         [&](int64_t level, int64_t t, const scalar_t* row, const scalar_t* next) {
                           differentiate_row(level, token + t, row, next, products + (level - first) * width_,
                                             rows.sums + t * width_);
                         });
      if (a_.grad_weight != nullptr) {
        pack_merged(rows, token, tokens, end);
      }
    }
  }

  void add_row(acc_t* sums, const acc_t* row) const {
    for_row<acc_t>(p_.C, [&](int64_t c, int64_t left) {
      V x0, x1;
      load_row(row + c, left, acc_t(0), x0, x1);
      (V::loadu(sums + c) + x0).store(sums + c);
      (V::loadu(sums + c + V::size()) + x1).store(sums + c + V::size());
    });
  }

  // All that one row of one level takes part in.
  void differentiate_row(int64_t level, int64_t token, const scalar_t* row, const scalar_t* next,
                         acc_t* products, acc_t* merged) const {
    const int64_t at = level * p_.tokens() + token;
    const acc_t* grad = grad_merged_ + token * p_.C;
    const acc_t* gamma = of_level<acc_t>(p_.gamma, level, p_.gamma_stride);
    const acc_t mean = static_cast<const acc_t*>(a_.mean)[at], rstd = static_cast<const acc_t*>(a_.rstd)[at];
    const V by_mean(mean), by_rstd(rstd), by_alpha(alpha(level));
    const auto load = [&](int64_t c, int64_t left, V(&x)[2], V(&by)[2]) {
      load_row(row + c, left, mean, x[0], x[1]);
      load_row(gamma + c, left, acc_t(0), by[0], by[1]);
      for (int64_t v = 0; v < 2; ++v) {
        x[v] = (x[v] - by_mean) * by_rstd;
      }
    };
    V grad_mean(acc_t(0)), grad_product(acc_t(0));  // the means of g and of g ⊙ v̂
    if (a_.grad_levels != nullptr) {
      V sum[2] = {grad_mean, grad_mean}, product[2] = {grad_mean, grad_mean};
      for_row<acc_t>(p_.C, [&](int64_t c, int64_t left) {
        V x[2], by[2], g[2];
        load(c, left, x, by);
        load_row(grad + c, left, acc_t(0), g[0], g[1]);
        for (int64_t v = 0; v < 2; ++v) {
          g[v] = g[v] * by[v];
          sum[v] = sum[v] + g[v];
          product[v] = at::vec::fmadd(g[v], x[v], product[v]);
        }
      });
      grad_mean = V(sum_of(sum[0], sum[1]) / static_cast<acc_t>(p_.C));
      grad_product = V(sum_of(product[0], product[1]) / static_cast<acc_t>(p_.C));
    }
    const V scale = by_alpha * by_rstd;
    for_row<acc_t>(p_.C, [&](int64_t c, int64_t left) {
      V x[2], by[2], g[2];
      prefetch_row<acc_t>(next + c);
      load(c, left, x, by);
      if (a_.grad_weight != nullptr) {
        add_products(merged + c, x, {by[0] * by_alpha, by[1] * by_alpha});
      }
      if (!needs_merged_grad_) {
        return;
      }
      load_row(grad + c, left, acc_t(0), g[0], g[1]);
      if (needs_products_) {
        add_products(products + c, x, g);
      }
      if (a_.grad_levels != nullptr) {
        for (int64_t v = 0; v < 2; ++v) {
          g[v] = (g[v] * by[v] - grad_mean - x[v] * grad_product) * scale;
        }
        store_row(static_cast<scalar_t*>(a_.grad_levels[level]) + token * p_.C + c, left, g[0], g[1]);
      }
    });
  }

  static void add_products(acc_t* sums, const V (&x)[2], const V (&y)[2]) {
    for (int64_t v = 0; v < 2; ++v) {
      acc_t* sum = sums + v * V::size();
      at::vec::fmadd(x[v], y[v], V::loadu(sum)).store(sum);
    }
  }

  // Rows of Σ_l α_l (γ_l ⊙ v̂_l + β_l) as an operand, as soon as those of a group are there.
  void pack_merged(const Rows& rows, int64_t token, int64_t tokens, int64_t end) const {
    const int64_t place = token % kGroup, group = token / kGroup;
    for (int64_t t = 0; t < tokens; ++t) {
      for_row<acc_t>(p_.C, [&](int64_t c, int64_t left) {
        const acc_t* sum = rows.sums + t * width_ + c;
        store_row(rows.merged + (place + t) * p_.C + c, left, V::loadu(sum), V::loadu(sum + V::size()));
      });
    }
    if (place + tokens < kGroup && token + tokens < end) {
      return;
    }
    for (int64_t c = 0; c < width_; c += kGroup) {
      pack_rows<Gemm>(merged_[c / kGroup].from(group * kGroup * kGroup), kGroup, 0, rows.merged + c, p_.C,
                      place + tokens, p_.C - c, kGroup, kGroup);
    }
  }

  void differentiate_norms(int64_t section) const {
    const int64_t count = p_.levels_of_section();
    const std::vector<acc_t> sum = sum_blocks(sums_, width_, needs_sums_ ? p_.C : 0);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t level = section * count + i;
      const std::vector<acc_t> product =
          sum_blocks(products_ + i * width_, count * width_, needs_products_ ? p_.C : 0);
      const acc_t *gamma = of_level<acc_t>(p_.gamma, level, p_.gamma_stride),
                  *beta = of_level<acc_t>(p_.beta, level, p_.beta_stride);
      for (int64_t c = 0; c < p_.C && a_.grad_gamma != nullptr; ++c) {
        static_cast<acc_t*>(a_.grad_gamma)[level * p_.gamma_stride + c] += alpha(level) * product[c];
      }
      for (int64_t c = 0; c < p_.C && a_.grad_beta != nullptr; ++c) {
        static_cast<acc_t*>(a_.grad_beta)[level * p_.beta_stride + c] += alpha(level) * sum[c];
      }
      for (int64_t c = 0; c < p_.C && a_.grad_alpha != nullptr; ++c) {
        static_cast<acc_t*>(a_.grad_alpha)[level] += gamma[c] * product[c] + beta[c] * sum[c];
      }
    }
  }

  // dW, a row an output feature.
  void grad_weight(int64_t section) const {
    const int64_t column_chunks = (p_.C + kChunk - 1) / kChunk;
    auto* grad = static_cast<scalar_t*>(a_.grad_weight) + section * p_.H * p_.C;
    for_panels<Scratch>(column_chunks, features_ / kPanel, kPanel * kChunk * p_.tokens(),
                        [&](const Scratch& x, int64_t i, int64_t first, int64_t count) {
                          [[maybe_unused]] const typename Gemm::Session session;
                          const int64_t column = i * kChunk, columns = std::min(kChunk, p_.C - column);
                          const int64_t column_groups = (columns + kGroup - 1) / kGroup;
                          const auto operand = [&](const Operand<op_t>&, int64_t panel, int64_t k, int64_t) {
                            return grad_y_t_[(first + panel) * kPanel].from(k);
                          };
                          multiply_streamed_a<Gemm>(x, count, column_groups, groups_ * kGroup,
                                                    merged_[column / kGroup], merged_.size, operand);
                          for (int64_t panel = 0; panel < count; ++panel) {
                            const int64_t row = (first + panel) * kPanel;
                            for (int64_t r = 0; r < std::min(kPanel, p_.H - row); ++r) {
                              for (int64_t g = 0; g < column_groups; ++g) {
                                store_sums(grad + (row + r) * p_.C + column + g * kGroup,
                                           columns - g * kGroup, x.sum(panel, g) + r * kGroup, kGroup);
                              }
                            }
                          }
                        });
  }

  // The sums of a row, of which `count` are in the tensor.
  static void store_sums(scalar_t* to, int64_t count, const acc_t* sums, int64_t width) {
    for (int64_t c = 0; c < std::min(width, count); c += kStep) {
      store_columns<Gemm>(to + c, count - c, V::loadu(sums + c), V::loadu(sums + c + V::size()));
    }
  }

  const MergeBackward& a_;
  const MergeProblem& p_;
  int64_t groups_, blocks_, width_, features_;
  std::vector<TokenChunk> chunks_;
  bool needs_products_, needs_merged_grad_, needs_sums_;
  Operands<Gemm> grad_y_;         // [32 tokens, features] in pieces of kPacked columns, A operands
  Operands<Gemm> grad_y_t_;       // [features, tokens], an A operand
  Operands<Gemm> merged_;         // of 32 channels, [tokens, 32], B operands
  acc_t* grad_merged_ = nullptr;  // [tokens, C]: dM
  acc_t* out_sums_;               // [blocks, H]: shares of S
  acc_t* products_;               // [blocks, levels of a section, width]: shares of E
  acc_t* sums_;                   // [blocks, width]: shares of D
  acc_t* start_;                  // [width]: Σ_l α_l β_l
};

}  // namespace

void merge_levels_backward(const MergeBackward& args) {
  with_engine(args.problem.dtype,
              [&](auto scalar, auto engine) { Backward<decltype(scalar), decltype(engine)>(args).run(); });
}

}  // namespace pyvlm::CPU_CAPABILITY
