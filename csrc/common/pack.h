// Copies of tiles in the layouts that tile_gemm takes its operands in. `rows` source rows of `cols`
// contiguous elements, `ld` apart; what lies beyond them in the destination is zero. scalar_t is the tensors'
// type, op_t the operands'.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace pyvlm::CPU_CAPABILITY {

// How many consecutive k a B operand keeps together (VNNI order).
template <typename op_t>
inline constexpr int64_t kVnni = std::is_same_v<op_t, at::BFloat16> ? 2 : 1;

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// dst[d * ld_dst + i] = src[i * ld_src + d], by blocks that stay in registers.
template <typename dst_t, typename src_t>
void transpose(dst_t* dst, int64_t ld_dst, const src_t* src, int64_t ld_src, int64_t rows, int64_t cols) {
  constexpr int64_t block = 16;
  for (int64_t i0 = 0; i0 < rows; i0 += block) {
    for (int64_t d0 = 0; d0 < cols; d0 += block) {
      const int64_t m = std::min(block, rows - i0), n = std::min(block, cols - d0);
      if constexpr (std::is_same_v<dst_t, src_t>) {
        if (m == block && n == block) {
          at::vec::transpose_mxn<src_t, block, block>(src + i0 * ld_src + d0, ld_src, dst + d0 * ld_dst + i0,
                                                      ld_dst);
          continue;
        }
      }
      for (int64_t i = i0; i < i0 + m; ++i) {
        for (int64_t d = d0; d < d0 + n; ++d) {
          dst[d * ld_dst + i] = static_cast<dst_t>(src[i * ld_src + d]);
        }
      }
    }
  }
}

// The lower and the upper half of a 32-bit word.
struct Bf16Pair {
  at::BFloat16 first, second;
};

// B operand of [cols, width]: the source transposed. cols must be a multiple of kVnni.
template <typename op_t, typename scalar_t>
void pack_b_transposed(op_t* dst, const scalar_t* src, int64_t ld, int64_t rows, int64_t cols,
                       int64_t width) {
  constexpr int64_t vnni = kVnni<op_t>;
  if constexpr (vnni == 1) {
    transpose(dst, width, src, ld, rows, cols);
  } else if (ld % vnni == 0) {
    // A pair of neighbouring channels moves as one word.
    transpose(reinterpret_cast<float*>(dst), width, reinterpret_cast<const float*>(src), ld / vnni, rows,
              cols / vnni);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < cols; ++d) {
        dst[d / vnni * vnni * width + i * vnni + d % vnni] = src[i * ld + d];
      }
    }
  }
  for (int64_t d = 0; d < cols; d += vnni) {
    std::fill(dst + d * width + rows * vnni, dst + (d + vnni) * width, op_t(0));
  }
}

// B operand of [padded_rows, cols]: the source as it stands. padded_rows must be a multiple of kVnni.
template <typename op_t, typename scalar_t>
void pack_b(op_t* dst, const scalar_t* src, int64_t ld, int64_t rows, int64_t cols, int64_t padded_rows) {
  if constexpr (kVnni<op_t> == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      std::copy(src + i * ld, src + i * ld + cols, dst + i * cols);
    }
    std::fill(dst + rows * cols, dst + padded_rows * cols, op_t(0));
  } else {
    for (int64_t i = 0; i < padded_rows; i += 2) {
      auto* out = reinterpret_cast<Bf16Pair*>(dst + i * cols);
      for (int64_t d = 0; d < cols; ++d) {
        out[d].first = i < rows ? src[i * ld + d] : op_t(0);
        out[d].second = i + 1 < rows ? src[(i + 1) * ld + d] : op_t(0);
      }
    }
  }
}

// A operand of [cols, width]: the source transposed.
template <typename op_t, typename scalar_t>
void pack_a_transposed(op_t* dst, const scalar_t* src, int64_t ld, int64_t rows, int64_t cols,
                       int64_t width) {
  transpose(dst, width, src, ld, rows, cols);
  for (int64_t d = 0; d < cols; ++d) {
    std::fill(dst + d * width + rows, dst + (d + 1) * width, op_t(0));
  }
}

// Sums of a tile, [cols, ld_src], times scale, into rows of a tensor: rows `ld` apart, their elements
// `stride`.
template <typename scalar_t, typename acc_t>
void store_transposed(scalar_t* dst, int64_t ld, int64_t stride, const acc_t* src, int64_t ld_src,
                      int64_t rows, int64_t cols, acc_t scale) {
  constexpr int64_t block = 16;
  alignas(64) acc_t turned[block * block];
  for (int64_t i0 = 0; i0 < rows; i0 += block) {
    for (int64_t d0 = 0; d0 < cols; d0 += block) {
      const int64_t m = std::min(block, rows - i0), n = std::min(block, cols - d0);
      transpose(turned, block, src + d0 * ld_src + i0, ld_src, n, m);
      for (int64_t i = 0; i < m; ++i) {
        scalar_t* out = dst + (i0 + i) * ld + d0 * stride;
        for (int64_t d = 0; d < n; ++d) {
          out[d * stride] = static_cast<scalar_t>(turned[i * block + d] * scale);
        }
      }
    }
  }
}

// A operand of [rows, cols]: the source as it stands, in op_t.
template <typename op_t, typename scalar_t>
void pack_a(op_t* dst, const scalar_t* src, int64_t ld, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < cols; ++d) {
      dst[i * cols + d] = static_cast<op_t>(src[i * ld + d]);
    }
  }
}

}  // namespace pyvlm::CPU_CAPABILITY
