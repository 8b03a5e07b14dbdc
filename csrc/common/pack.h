// Copies of tiles in the layouts that the engines of tile_gemm take their operands in. `rows` source rows of
// `cols` contiguous elements, `ld` apart; what lies beyond them in the destination is zero.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/tile_gemm.h"

namespace pyvlm::CPU_CAPABILITY {

// Elements of a block that transpose_block moves in registers; 1 where there is no such thing.
template <typename T>
inline constexpr int64_t kTransposed = std::is_same_v<T, float> ? 16 : 1;
#if defined(CPU_CAPABILITY_AVX512)
template <>
inline constexpr int64_t kTransposed<at::BFloat16> = 32;
#endif

// dst[d * ld_dst + i] = src[i * ld_src + d].
template <typename T>
void transpose(T* dst, int64_t ld_dst, const T* src, int64_t ld_src, int64_t rows, int64_t cols) {
  constexpr int64_t step = kTransposed<T>, block = step == 1 ? 16 : step;
  for (int64_t i0 = 0; i0 < rows; i0 += block) {
    for (int64_t d0 = 0; d0 < cols; d0 += block) {
      const int64_t m = std::min(block, rows - i0), n = std::min(block, cols - d0);
      if constexpr (step > 1) {
        if (m == block && n == block) {
          transpose_block(dst + d0 * ld_dst + i0, ld_dst, src + i0 * ld_src + d0, ld_src);
          continue;
        }
      }
      for (int64_t i = i0; i < i0 + m; ++i) {
        for (int64_t d = d0; d < d0 + n; ++d) {
          dst[d * ld_dst + i] = src[i * ld_src + d];
        }
      }
    }
  }
}

// One plane of a row.
template <int64_t planes, typename op_t, typename scalar_t>
void convert_row(op_t* dst, const scalar_t* src, int64_t cols, int64_t plane) {
  if constexpr (planes > 1) {
    using V = Vec<scalar_t>;
    for (int64_t d = 0; d < cols; d += 2 * V::size()) {
      const int64_t left = cols - d;
      V x0 = left >= V::size() ? V::loadu(src + d) : V::loadu(src + d, left);
      V x1 = left >= 2 * V::size() ? V::loadu(src + d + V::size())
                                   : V::loadu(src + d + V::size(), std::max<int64_t>(left - V::size(), 0));
      for (int64_t larger = 0; larger < plane; ++larger) {
        x0 = bf16_remainder(x0);
        x1 = bf16_remainder(x1);
      }
      store_row(dst + d, x0, x1);
    }
  } else {
    at::vec::convert(src, dst, cols);
  }
}

// Hands the source to `pack` in the engine's type, once a plane: as it lies, or converted in rows of its own.
template <typename Gemm, typename scalar_t, typename Pack>
void each_plane(const scalar_t* src, int64_t ld, int64_t rows, int64_t cols, const Pack& pack) {
  using op_t = typename Gemm::op_t;
  if constexpr (std::is_same_v<scalar_t, op_t>) {
    pack(src, ld, 0);
  } else {
    static thread_local std::vector<op_t> converted;
    const int64_t width = round_up(cols, 32);
    converted.resize(std::max<size_t>(converted.size(), rows * width));
    for (int64_t plane = 0; plane < Gemm::kPlanes; ++plane) {
      for (int64_t i = 0; i < rows; ++i) {
        if constexpr (Gemm::kPlanes > 1 && !std::is_same_v<scalar_t, float>) {
          static thread_local std::vector<float> widened;
          widened.resize(cols);
          at::vec::convert(src + i * ld, widened.data(), cols);
          convert_row<Gemm::kPlanes>(converted.data() + i * width, widened.data(), cols, plane);
        } else {
          convert_row<Gemm::kPlanes>(converted.data() + i * width, src + i * ld, cols, plane);
        }
      }
      pack(converted.data(), width, plane);
    }
  }
}

// Up to a vector of numbers as fp32, zeros behind them.
template <typename T>
inline Vec<float> load_float(const T* from, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    return count >= Vec<float>::size() ? Vec<float>::loadu(from)
                                       : Vec<float>::loadu(from, std::max<int64_t>(count, 0));
  } else {
    float widened[Vec<float>::size()] = {};
    at::vec::convert(from, widened, std::clamp<int64_t>(count, 0, Vec<float>::size()));
    return Vec<float>::loadu(widened);
  }
}

// A operand of [padded_rows, padded_cols]: the source as it stands.
template <typename Gemm, typename scalar_t>
void pack_a(const Operand<typename Gemm::op_t>& to, const scalar_t* from, int64_t from_ld, int64_t rows,
            int64_t cols, int64_t padded_rows, int64_t padded_cols) {
  using op_t = typename Gemm::op_t;
  if constexpr (Gemm::kPlanes > 1) {
    constexpr int64_t size = Vec<float>::size();
    for (int64_t i = 0; i < padded_rows; ++i) {
      const int64_t count = i < rows ? cols : 0;
      for (int64_t d = 0; d < padded_cols; d += 2 * size) {  // multiples of kDepth, which is that
        const scalar_t* row = from + i * from_ld + d;
        store_a_row<Gemm>(to, i, d, load_float(row, count - d), load_float(row + size, count - d - size));
      }
    }
  } else {
    each_plane<Gemm>(from, from_ld, rows, cols, [&](const op_t* src, int64_t ld, int64_t plane) {
      op_t* dst = to.data + plane * to.plane;
      for (int64_t i = 0; i < padded_rows; ++i) {
        const int64_t count = i < rows ? cols : 0;
        std::copy(src + i * ld, src + i * ld + count, dst + i * to.ld);
        std::fill(dst + i * to.ld + count, dst + i * to.ld + padded_cols, op_t(0));
      }
    });
  }
}

// A operand of [padded_cols, padded_rows]: the source transposed.
template <typename Gemm, typename scalar_t>
void pack_a_transposed(const Operand<typename Gemm::op_t>& to, const scalar_t* from, int64_t from_ld,
                       int64_t rows, int64_t cols, int64_t padded_rows, int64_t padded_cols) {
  using op_t = typename Gemm::op_t;
  each_plane<Gemm>(from, from_ld, rows, cols, [&](const op_t* src, int64_t ld, int64_t plane) {
    op_t* dst = to.data + plane * to.plane;
    transpose(dst, to.ld, src, ld, rows, cols);
    for (int64_t d = 0; d < padded_cols; ++d) {
      std::fill(dst + d * to.ld + (d < cols ? rows : 0), dst + d * to.ld + padded_rows, op_t(0));
    }
  });
}

// B operand of [padded_rows, padded_cols]: the source as it stands.
template <typename Gemm, typename scalar_t>
void pack_b(const Operand<typename Gemm::op_t>& to, const scalar_t* from, int64_t from_ld, int64_t rows,
            int64_t cols, int64_t padded_rows, int64_t padded_cols) {
  using op_t = typename Gemm::op_t;
  if constexpr (Gemm::kVnni == 1) {
    pack_a<Gemm>(to, from, from_ld, rows, cols, padded_rows, padded_cols);
  } else if constexpr (Gemm::kPlanes > 1) {
    for (int64_t i = 0; i < padded_rows; i += 2) {
      const scalar_t* row = from + i * from_ld;
      for (int64_t d = 0; d < padded_cols; d += Vec<float>::size()) {
        store_b_pair<Gemm>(to, i, d, load_float(row + d, i < rows ? cols - d : 0),
                           load_float(row + from_ld + d, i + 1 < rows ? cols - d : 0));
      }
    }
  } else {
    struct Pair {
      op_t first, second;
    };
    each_plane<Gemm>(from, from_ld, rows, cols, [&](const op_t* src, int64_t ld, int64_t plane) {
      for (int64_t i = 0; i < padded_rows; i += 2) {
        auto* out = reinterpret_cast<Pair*>(to.data + plane * to.plane + i * to.ld);
        const op_t* row = src + i * ld;
        if (i + 1 < rows) {
          int64_t d = 0;
#if defined(CPU_CAPABILITY_AVX512)
          for (; d + 32 <= cols; d += 32) {
            interleave(reinterpret_cast<op_t*>(out + d), row + d, row + ld + d);
          }
#endif
          for (; d < cols; ++d) {
            out[d] = {row[d], row[d + ld]};
          }
        } else if (i < rows) {
          for (int64_t d = 0; d < cols; ++d) {
            out[d] = {row[d], op_t(0)};
          }
        }
        std::fill(out + (i < rows ? cols : 0), out + padded_cols, Pair{op_t(0), op_t(0)});
      }
    });
  }
}

// B operand of [padded_cols, padded_rows]: the source transposed.
template <typename Gemm, typename scalar_t>
void pack_b_transposed(const Operand<typename Gemm::op_t>& to, const scalar_t* from, int64_t from_ld,
                       int64_t rows, int64_t cols, int64_t padded_rows, int64_t padded_cols) {
  using op_t = typename Gemm::op_t;
  if constexpr (Gemm::kVnni == 1) {
    pack_a_transposed<Gemm>(to, from, from_ld, rows, cols, padded_rows, padded_cols);
  } else {
    each_plane<Gemm>(from, from_ld, rows, cols, [&](const op_t* src, int64_t ld, int64_t plane) {
      op_t* dst = to.data + plane * to.plane;
      const int64_t even_cols = ld % 2 == 0 ? cols / 2 * 2 : 0;  // a pair of channels moves as one word
      transpose(reinterpret_cast<float*>(dst), to.ld, reinterpret_cast<const float*>(src), ld / 2, rows,
                even_cols / 2);
      for (int64_t d = even_cols; d < cols; ++d) {
        for (int64_t i = 0; i < rows; ++i) {
          dst[d / 2 * 2 * to.ld + i * 2 + d % 2] = src[i * ld + d];
        }
      }
      for (int64_t d = 0; d < padded_cols; d += 2) {
        op_t* row = dst + d * to.ld;
        std::fill(row + 2 * (d < cols ? rows : 0), row + 2 * padded_rows, op_t(0));
        for (int64_t i = 0; i < rows && d == cols - 1; ++i) {
          row[2 * i + 1] = op_t(0);  // an odd number of channels
        }
      }
    });
  }
}

// Sums of a tile, [cols, from_ld], times scale, into rows of a tensor: rows `ld` apart, their elements
// `stride`.
template <typename scalar_t, typename acc_t>
void store_transposed(scalar_t* dst, int64_t ld, int64_t stride, const acc_t* src, int64_t ld_src,
                      int64_t rows, int64_t cols, const acc_t* scale) {
  constexpr int64_t block = 16;
  alignas(64) acc_t turned[block * block];
  for (int64_t i0 = 0; i0 < rows; i0 += block) {
    const int64_t m = std::min(block, rows - i0);
    int64_t d0 = 0;
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<scalar_t, at::BFloat16> || std::is_same_v<scalar_t, float>) {
      constexpr int64_t channels = 64 / sizeof(scalar_t);
      for (; m == block && stride == 1 && d0 + channels <= cols; d0 += channels) {
        store_transposed_block(dst + i0 * ld + d0, ld, src + d0 * ld_src + i0, ld_src, scale + i0);
      }
    }
#endif
    for (; d0 < cols; d0 += block) {
      const int64_t n = std::min(block, cols - d0);
      transpose(turned, block, src + d0 * ld_src + i0, ld_src, n, m);
      for (int64_t i = 0; i < m; ++i) {
        scalar_t* out = dst + (i0 + i) * ld + d0 * stride;
        for (int64_t d = 0; d < n && stride == 1; ++d) {
          out[d] = static_cast<scalar_t>(turned[i * block + d] * scale[i0 + i]);
        }
        for (int64_t d = 0; d < n && stride != 1; ++d) {
          out[d * stride] = static_cast<scalar_t>(turned[i * block + d] * scale[i0 + i]);
        }
      }
    }
  }
}

}  // namespace pyvlm::CPU_CAPABILITY
