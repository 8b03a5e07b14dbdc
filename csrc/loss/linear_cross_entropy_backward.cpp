// The backward of the head and its loss. Logits are made anew, for a block of the vocabulary at a time, and
// become their gradients G at once, in the order that each of two products wants them in:
//
//   dW = Gᵀ·hidden, written once; dhidden = Σ over blocks of G·W
#include "loss/logit_tiles.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t, typename Gemm>
class Backward {
 public:
  explicit Backward(const LossBackward& args)
      : a_(args),
        p_(args.problem),
        tiles_(p_),
        rows_(tiles_.groups * kGroup),
        width_(round_up(p_.H, kPanel)),
        block_(words_of_a_block()),
        parts_(parts_of_a_block()) {}

  void run() {
    Arena size;
    lay_out(size);
    const CallScratch memory(size.used());
    Arena arena = memory.arena();
    lay_out(arena);
    for_row_groups<scalar_t>(
        p_, [&](const scalar_t* rows, int64_t group, int64_t count) { prepare(rows, group, count); });
    for (int64_t first = 0; first < p_.V; first += block_) {
      grad_logits(first);
      if (a_.grad_weight != nullptr) {
        grad_weight(first);
      }
      if (a_.grad_hidden != nullptr) {
        grad_hidden(first);
      }
    }
    if (a_.grad_hidden != nullptr) {
      store_grad_hidden();
    }
    if (a_.grad_bias != nullptr) {
      store_grad_bias();
    }
  }

 private:
  using Tiles = LogitTiles<scalar_t, Gemm>;
  using op_t = typename Gemm::op_t;
  using acc_t = typename Gemm::acc_t;
  using V = Vec<acc_t>;
  using Scratch = PanelScratch<Gemm>;
  static constexpr int64_t kVectors = Tiles::kVectors, kWords = Tiles::kWords;
  static constexpr int64_t kStep = Blocking<Gemm>::kStep;
  // Blocks of words, and their parts, are whole pieces of the operand that the logits' gradients become.
  static constexpr int64_t kPiece = std::max(kWords, kStep);
  static_assert(kPiece % kWords == 0 && kPiece % kStep == 0);

  // The gradients of a block's logits take up to 8 MB in either order.
  int64_t words_of_a_block() const {
    const int64_t words = (8 << 20) / (rows_ * Blocking<Gemm>::kBytes);
    return std::min(std::clamp<int64_t>(words, 1024, 16384) / kPiece * kPiece, round_up(p_.V, kPiece));
  }

  // The rows' gradients are summed in as many parts of a block as make some 16 tasks of them.
  int64_t parts_of_a_block() const {
    const int64_t tasks = tiles_.chunks * ((width_ + kWords - 1) / kWords);
    return std::clamp<int64_t>(16 / std::max<int64_t>(tasks, 1), 1, block_ / kPiece);
  }

  void lay_out(Arena& arena) {
    tiles_.lay_out(arena);
    if (a_.grad_weight != nullptr) {
      hidden_ = Operands<Gemm>(arena, width_ / kGroup, rows_ * kGroup, kGroup);
      // Rows that are an odd number of cache lines apart: a power of two would put them all into one set of
      // L1.
      const int64_t ld = rows_ + 64 / sizeof(op_t);
      grads_t_ = Operands<Gemm>(arena, block_, ld, ld);
    }
    if (a_.grad_hidden != nullptr) {
      grads_ = Operands<Gemm>(arena, tiles_.groups, kGroup * block_, kStep);
      sums_ = arena.take<acc_t>(parts_ * rows_ * width_);
    }
    if (a_.grad_bias != nullptr) {
      biases_ = arena.take<acc_t>(tiles_.chunks * round_up(p_.V, kWords));
    }
    row_ = arena.take<Row>(tiles_.groups);
  }

  // What the gradients of a group's logits are made of: softmax·scale − label − smoothing.
  struct Row {
    acc_t lse[kGroup], scale[kGroup], label[kGroup], smoothing[kGroup];
  };

  void prepare(const scalar_t* rows, int64_t group, int64_t count) const {
    tiles_.pack(rows, group, count);
    for (int64_t c = 0; c < width_ && a_.grad_weight != nullptr; c += kGroup) {
      pack_rows<Gemm>(hidden_[c / kGroup].from(group * kGroup * kGroup), kGroup, 0, rows + c, p_.H, count,
                      p_.H - c, kGroup, kGroup);
    }
    Row& row = row_[group];
    for (int64_t i = 0; i < kGroup; ++i) {
      const bool there = i < count;
      // Rows that only fill up the tile have a softmax of zeros.
      row.lse[i] = there ? static_cast<const acc_t*>(a_.lse)[p_.row[group * kGroup + i]] : acc_t(1e30);
      const double scale = there ? a_.scale : 0;
      row.scale[i] = static_cast<acc_t>(scale * (1 + (there ? 2 * p_.z_loss * row.lse[i] : 0)));
      row.label[i] = static_cast<acc_t>(scale * (1 - p_.label_smoothing));
      row.smoothing[i] = static_cast<acc_t>(scale * p_.label_smoothing / static_cast<double>(p_.V));
    }
    if (a_.grad_hidden != nullptr) {
      for (int64_t part = 0; part < parts_; ++part) {
        acc_t* sums = sums_ + (part * rows_ + group * kGroup) * width_;
        std::fill(sums, sums + kGroup * width_, acc_t(0));
      }
    }
  }

  int64_t panels_of(int64_t first) const { return (std::min(block_, p_.V - first) + kPanel - 1) / kPanel; }

  void grad_logits(int64_t block) const {
    for_panels<GradScratch>(tiles_.chunks, panels_of(block), kPanel * std::min(kChunk, rows_) * p_.H,
                            [&](const GradScratch& x, int64_t chunk, int64_t first, int64_t count) {
                              [[maybe_unused]] const typename Gemm::Session session;
                              tiles_.multiply(x.panels, chunk, block / kPanel + first, count);
                              std::fill(x.bias, x.bias + kWords * V::size(), acc_t(0));
                              for (int64_t group = 0; group < tiles_.groups_of(chunk); ++group) {
                                differentiate(x, block, chunk, group, first, count);
                              }
                              for (int64_t w = 0; w < kWords && a_.grad_bias != nullptr; w += 16) {
                                const int64_t word = block + first * kPanel + w;
                                sum_lanes(biases_ + chunk * round_up(p_.V, kWords) + word,
                                          x.bias + w * V::size());
                              }
                            });
  }

  struct GradScratch {
    Scratch panels;
    Operands<Gemm> turned;  // a tile [64 words, 32 rows]
    acc_t* bias;            // [256 words, lanes]

    explicit GradScratch(Arena& arena)
        : panels(arena),
          turned(arena, 1, kPanel * kGroup, kGroup),
          bias(arena.take<acc_t>(kWords * V::size())) {}
  };

  // From the logits of some panels for a group of rows to their gradients.
  void differentiate(const GradScratch& x, int64_t block, int64_t chunk, int64_t group, int64_t first,
                     int64_t count) const {
    const int64_t group_of_all = chunk * (kChunk / kGroup) + group, word = block + first * kPanel;
    const Row& row = row_[group_of_all];
    V lse[kVectors], scale[kVectors], label[kVectors], smoothing[kVectors], target[kVectors];
    acc_t targets[kGroup];
    for (int64_t i = 0; i < kGroup; ++i) {
      const int64_t r = group_of_all * kGroup + i;
      const int64_t at = r < p_.R ? p_.label[r] - word : -1;
      targets[i] = static_cast<acc_t>(at >= 0 && at < kWords ? at : -1);
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      lse[v] = V::loadu(row.lse + v * V::size());
      scale[v] = V::loadu(row.scale + v * V::size());
      label[v] = V::loadu(row.label + v * V::size());
      smoothing[v] = V::loadu(row.smoothing + v * V::size());
      target[v] = V::loadu(targets + v * V::size());
    }
    for (int64_t panel = 0; panel < count; ++panel) {
      const Operand<op_t> to = a_.grad_weight != nullptr
                                   ? grads_t_[(first + panel) * kPanel].from(group_of_all * kGroup)
                                   : x.turned[0];
      for (int64_t w = panel * kPanel; w < (panel + 1) * kPanel; ++w) {
        const acc_t* logits = Tiles::logits(x.panels, w, group);
        const bool there = word + w < p_.V;
        const V bias(there ? tiles_.bias(word + w) : acc_t(0)), index(static_cast<acc_t>(w));
        V grad[kVectors];
        for (int64_t v = 0; v < kVectors; ++v) {
          V logit = V::loadu(logits + v * V::size()) + bias;
          if (p_.softcap > 0) {
            logit = tiles_.cap(logit);
          }
          const V softmax = (logit - lse[v]).exp_u20();  // exact at 0
          grad[v] = softmax * scale[v] - smoothing[v] - V::blendv(V(acc_t(0)), label[v], target[v] == index);
          if (p_.softcap > 0) {
            grad[v] = grad[v] * tiles_.slope(logit);
          }
          if (!there) {
            grad[v] = V(acc_t(0));
          }
          if (a_.grad_bias != nullptr) {
            acc_t* sum = x.bias + w * V::size();
            (V::loadu(sum) + grad[v]).store(sum);
          }
        }
        for (int64_t v = 0; v < kVectors; v += 2) {
          store_a_row<Gemm>(to, w % kPanel, v * V::size(), grad[v], grad[v + 1]);
        }
      }
      if (a_.grad_hidden != nullptr) {
        const int64_t column = (first + panel) * kPanel;
        const Operand<op_t> rows =
            grads_[group_of_all].from(column / kStep * kStep * kGroup + column % kStep);
        for (int64_t plane = 0; plane < Gemm::kPlanes; ++plane) {
          transpose(rows.data + plane * rows.plane, rows.ld, to.data + plane * to.plane, to.ld, kPanel,
                    kGroup);
        }
      }
    }
  }

  void grad_weight(int64_t block) const {
    const int64_t column_chunks = (p_.H + kChunk - 1) / kChunk;
    for_panels<Scratch>(
        column_chunks, panels_of(block), kPanel * std::min(kChunk, p_.H) * rows_,
        [&](const Scratch& x, int64_t i, int64_t first, int64_t count) {
          [[maybe_unused]] const typename Gemm::Session session;
          const int64_t column = i * kChunk, groups = (std::min(kChunk, p_.H - column) + kGroup - 1) / kGroup;
          const auto operand = [&](const Operand<op_t>&, int64_t panel, int64_t k, int64_t) {
            return grads_t_[(first + panel) * kPanel].from(k);
          };
          multiply_streamed_a<Gemm>(x, count, groups, rows_, hidden_[column / kGroup], hidden_.size, operand);
          const int64_t word = block + first * kPanel;
          for (int64_t w = 0; w < std::min(count * kPanel, p_.V - word); ++w) {
            scalar_t* out = static_cast<scalar_t*>(a_.grad_weight) + (word + w) * p_.H + column;
            for (int64_t group = 0; group < groups; ++group) {
              store_sums(out + group * kGroup, p_.H - column - group * kGroup, Tiles::logits(x, w, group),
                         kGroup);
            }
          }
        });
  }

  void grad_hidden(int64_t block) const {
    const int64_t words = panels_of(block) * kPanel, rounds = (words + kPiece - 1) / kPiece;
    for_panels<Scratch>(tiles_.chunks * parts_, width_ / kPanel,
                        kPanel * std::min(kChunk, rows_) * words / parts_,
                        [&](const Scratch& x, int64_t i, int64_t first, int64_t count) {
                          [[maybe_unused]] const typename Gemm::Session session;
                          const int64_t chunk = i / parts_, part = i % parts_, c = first * kPanel;
                          const int64_t begin = rounds * part / parts_ * kPiece,
                                        end = std::min(rounds * (part + 1) / parts_ * kPiece, words);
                          if (begin == end) {
                            return;
                          }
                          const auto pack = [&](const Operand<op_t>& to, int64_t k, int64_t depth) {
                            const int64_t word = block + begin + k;
                            pack_rows<Gemm>(to, kPanel, kPanel * kStep,
                                            static_cast<const scalar_t*>(p_.weight) + word * p_.H + c, p_.H,
                                            p_.V - word, p_.H - c, depth, count * kPanel);
                          };
                          const int64_t group = chunk * (kChunk / kGroup);
                          multiply_streamed_b<Gemm>(x, count, tiles_.groups_of(chunk), end - begin,
                                                    grads_[group].from(begin * kGroup), grads_.size, pack);
                          for (int64_t r = 0; r < tiles_.groups_of(chunk) * kGroup; ++r) {
                            acc_t* sums = sums_ + ((part * rows_) + chunk * kChunk + r) * width_ + c;
                            for (int64_t panel = 0; panel < count; ++panel) {
                              const acc_t* from = x.sum(panel, r / kGroup) + r % kGroup * kPanel;
                              for (int64_t lane = 0; lane < kPanel; ++lane) {
                                sums[panel * kPanel + lane] += from[lane];
                              }
                            }
                          }
                        });
  }

  void store_grad_hidden() const {
    run_each(p_.R, parts_ * width_, [&](int64_t r) {
      acc_t* sums = sums_ + r * width_;
      for (int64_t part = 1; part < parts_; ++part) {
        const acc_t* more = sums + part * rows_ * width_;
        for (int64_t c = 0; c < width_; ++c) {
          sums[c] += more[c];
        }
      }
      store_sums(static_cast<scalar_t*>(a_.grad_hidden) + p_.row[r] * p_.H, p_.H, sums, width_);
    });
  }

  void store_grad_bias() const {
    const int64_t words = round_up(p_.V, kWords);
    for (int64_t chunk = 1; chunk < tiles_.chunks; ++chunk) {
      for (int64_t w = 0; w < p_.V; ++w) {
        biases_[w] += biases_[chunk * words + w];
      }
    }
    at::vec::convert(biases_, static_cast<scalar_t*>(a_.grad_bias), p_.V);
  }

  // The sums of a row, of which `count` are in the tensor.
  static void store_sums(scalar_t* to, int64_t count, const acc_t* sums, int64_t width) {
    for (int64_t c = 0; c < width; c += 2 * V::size()) {
      store_columns<Gemm>(to + c, count - c, V::loadu(sums + c), V::loadu(sums + c + V::size()));
    }
  }

  const LossBackward& a_;
  const LossProblem& p_;
  Tiles tiles_;
  int64_t rows_, width_, block_, parts_;  // rows and features, padded; words of a block, and its parts
  Operands<Gemm> hidden_;                 // of 32 features [rows, 32], B operands
  Operands<Gemm> grads_t_;                // [words, rows], an A operand
  Operands<Gemm> grads_;                  // of 32 rows, in pieces of kStep words, A operands
  acc_t* sums_;                           // [parts, rows, width]: of the rows' gradients
  acc_t* biases_;                         // [chunks, words of the vocabulary]
  Row* row_;                              // [groups]
};

}  // namespace

void linear_cross_entropy_backward(const LossBackward& args) {
  with_engine(args.problem.dtype,
              [&](auto scalar, auto engine) { Backward<decltype(scalar), decltype(engine)>(args).run(); });
}

}  // namespace pyvlm::CPU_CAPABILITY
