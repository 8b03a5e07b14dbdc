// The one product behind linear layers and their gradients. Rows of A are packed beforehand, in chunks of
// which part stays in L2; B streams past them in panels that fit L1, transposed on the way where it is a
// weight in y = x Wᵀ. Sums are in fp32, and cut by sizes alone: the same bits for any number of threads.
#include <algorithm>

#include "common/panel_gemm.h"
#include "linear/linear.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t>
class TiledProduct {
 public:
  explicit TiledProduct(const LinearProduct& p)
      : p_(p), size_(kGroup * round_up(p.D, kStep)), panels_((p.C + kPanel - 1) / kPanel) {
    const int64_t chunks = (p.R + kChunk - 1) / kChunk;
    chunk_ = round_up((p.R + chunks - 1) / chunks, kGroup);
  }

  void run() {
    // As many chunks are packed at a time as fit 32 MB, and at least one.
    const int64_t chunk_bytes = chunk_ / kGroup * size_ * static_cast<int64_t>(sizeof(float));
    const int64_t batch = chunk_ * std::max<int64_t>(1, (32 << 20) / std::max<int64_t>(chunk_bytes, 1));
    const int64_t groups = (std::min(batch, p_.R) + kGroup - 1) / kGroup;
    Arena size;
    a_ = Operands<Gemm>(size, groups, size_, kStep);
    const CallScratch memory(size.used());
    Arena arena = memory.arena();
    a_ = Operands<Gemm>(arena, groups, size_, kStep);
    for (first_ = 0; first_ < p_.R; first_ = end_) {
      end_ = std::min(p_.R, first_ + batch);
      p_.a_transposed ? pack_columns() : pack_groups();
      multiply();
    }
  }

 private:
  using Gemm = Brgemm<float>;
  using V = Vec<float>;
  using Scratch = PanelScratch<Gemm>;
  static constexpr int64_t kStep = Blocking<Gemm>::kStep;

  // Calls f(pointer, offset, rows) for pieces of `count` rows from `first` on that lie in one block.
  template <typename F>
  static void for_blocks(const Rows& rows, int64_t first, int64_t count, const F& f) {
    for (int64_t done = 0, n; done < count; done += n) {
      const int64_t block = (first + done) / rows.block, row = (first + done) % rows.block;
      n = std::min(count - done, rows.block - row);
      f(static_cast<scalar_t*>(rows.data) + block * rows.block_stride + row * rows.ld, done, n);
    }
  }

  // A as it lies, in groups of 32 rows, each in pieces of kStep columns.
  void pack_groups() const {
    run_each((end_ - first_ + kGroup - 1) / kGroup, kGroup * p_.D, [&](int64_t group) {
      const int64_t row = first_ + group * kGroup, count = std::min(kGroup, end_ - row);
      for_blocks(p_.a, row, count, [&](const scalar_t* from, int64_t at, int64_t rows) {
        const int64_t padded = at + rows < count ? rows : kGroup - at;
        for (int64_t d = 0; d < p_.D; d += kStep) {
          const int64_t depth = std::min(kStep, p_.D - d);
          pack_a<Gemm>(a_[group].from(d * kGroup + at * kStep), from + d, p_.a.ld, rows, depth, padded,
                       depth);
        }
      });
    });
  }

  // The same of a transposed A: a piece is kStep of its rows.
  void pack_columns() const {
    run_each((p_.D + kStep - 1) / kStep, kStep * (end_ - first_), [&](int64_t piece) {
      const int64_t d = piece * kStep;
      for (int64_t group = 0; group * kGroup < end_ - first_; ++group) {
        const int64_t row = first_ + group * kGroup, count = std::min(kGroup, end_ - row);
        for_blocks(p_.a, d, std::min(kStep, p_.D - d), [&](const scalar_t* from, int64_t at, int64_t depth) {
          pack_a_transposed<Gemm>(a_[group].from(d * kGroup + at), from + row, p_.a.ld, depth, count, depth,
                                  kGroup);
        });
      }
    });
  }

  void multiply() const {
    const int64_t chunks = (end_ - first_ + chunk_ - 1) / chunk_;
    for_panels<Scratch>(chunks, panels_, kPanel * chunk_ * p_.D,
                        [&](const Scratch& x, int64_t i, int64_t panel, int64_t count) {
                          [[maybe_unused]] const typename Gemm::Session session;
                          const int64_t row = first_ + i * chunk_, rows = std::min(chunk_, end_ - row);
                          const int64_t groups = (rows + kGroup - 1) / kGroup;
                          const auto pack = [&](const Operand<float>& to, int64_t k, int64_t depth) {
                            p_.b_transposed ? pack_b_columns(to, panel, count, k, depth)
                                            : pack_b_rows(to, panel, count, k, depth);
                          };
                          multiply_streamed_b<Gemm>(x, count, groups, p_.D, a_[i * chunk_ / kGroup], size_,
                                                    pack);
                          for (int64_t j = 0; j < count; ++j) {
                            store(x, j, (panel + j) * kPanel, row, rows);
                          }
                        });
  }

  void pack_b_rows(const Operand<float>& to, int64_t panel, int64_t count, int64_t k, int64_t depth) const {
    const int64_t c = panel * kPanel;
    for_blocks(p_.b, k, depth, [&](const scalar_t* from, int64_t at, int64_t rows) {
      pack_rows<Gemm>(to.from(at * kPanel), kPanel, kPanel * kStep, from + c, p_.b.ld, rows, p_.C - c, rows,
                      count * kPanel);
    });
  }

  void pack_b_columns(const Operand<float>& to, int64_t panel, int64_t count, int64_t k,
                      int64_t depth) const {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t c = (panel + j) * kPanel, columns = std::min(kPanel, p_.C - c);
      for_blocks(p_.b, c, columns, [&](const scalar_t* from, int64_t at, int64_t rows) {
        const int64_t padded = at + rows < columns ? rows : kPanel - at;
        pack_b_transposed<Gemm>(to.from(j * kPanel * kStep + at), from + k, p_.b.ld, rows, depth, padded,
                                depth);
      });
    }
  }

  // The sums of a panel's columns, from c on, for the rows of a chunk.
  void store(const Scratch& x, int64_t panel, int64_t c, int64_t first, int64_t count) const {
    const int64_t columns = std::min(kPanel, p_.C - c);
    alignas(64) float bias[kPanel] = {};
    if (p_.bias != nullptr) {
      at::vec::convert(static_cast<const scalar_t*>(p_.bias) + c, bias, columns);
    }
    for_blocks(p_.out, first, count, [&](scalar_t* to, int64_t at, int64_t rows) {
      for (int64_t r = at; r < at + rows; ++r) {
        const float* sums = x.sum(panel, r / kGroup) + r % kGroup * kPanel;
        scalar_t* out = to + (r - at) * p_.out.ld + c;
        for (int64_t v = 0; v < columns; v += 2 * V::size()) {
          V y0 = V::loadu(sums + v) + V::loadu(bias + v);
          V y1 = V::loadu(sums + v + V::size()) + V::loadu(bias + v + V::size());
          if (p_.accumulate) {
            V before0, before1;
            load_columns<Gemm>(out + v, columns - v, before0, before1);
            y0 = y0 + before0;
            y1 = y1 + before1;
          }
          store_columns<Gemm>(out + v, columns - v, y0, y1);
        }
      }
    });
  }

  const LinearProduct& p_;
  int64_t size_, panels_, chunk_;
  int64_t first_ = 0, end_ = 0;  // rows of A that are packed
  Operands<Gemm> a_;             // [32 rows, D] in pieces of kStep columns
};

}  // namespace

void linear_product(const LinearProduct& p) {
  p.dtype == at::kHalf ? TiledProduct<at::Half>(p).run() : TiledProduct<float>(p).run();
}

}  // namespace pyvlm::CPU_CAPABILITY
