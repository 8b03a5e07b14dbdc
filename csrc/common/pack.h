// Copies of tiles in the layouts that tile_gemm takes its operands in. `rows` source rows of `cols`
// contiguous elements, `ld` apart; what lies beyond them in the destination is zero. scalar_t is the tensors'
// type, op_t the operands'.
#pragma once

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

// B operand of [cols, width]: the source transposed. cols must be a multiple of kVnni.
template <typename op_t, typename scalar_t>
void pack_b_transposed(op_t* dst, const scalar_t* src, int64_t ld, int64_t rows, int64_t cols,
                       int64_t width) {
  constexpr int64_t vnni = kVnni<op_t>;
  constexpr int64_t block = 16;  // 16 source rows stay in L1 while their columns are walked
  for (int64_t i0 = 0; i0 < width; i0 += block) {
    const int64_t filled = std::clamp<int64_t>(rows - i0, 0, block);
    const int64_t n = std::min(block, width - i0);
    for (int64_t d = 0; d < cols; d += vnni) {
      op_t* out = dst + d * width + i0 * vnni;
      for (int64_t i = 0; i < filled; ++i) {
        for (int64_t p = 0; p < vnni; ++p) {
          out[i * vnni + p] = static_cast<op_t>(src[(i0 + i) * ld + d + p]);
        }
      }
      std::fill(out + filled * vnni, out + n * vnni, op_t(0));
    }
  }
}

// B operand of [padded_rows, cols]: the source as it stands. padded_rows must be a multiple of kVnni.
template <typename op_t, typename scalar_t>
void pack_b(op_t* dst, const scalar_t* src, int64_t ld, int64_t rows, int64_t cols, int64_t padded_rows) {
  constexpr int64_t vnni = kVnni<op_t>;
  for (int64_t i = 0; i < padded_rows; i += vnni) {
    for (int64_t p = 0; p < vnni; ++p) {
      op_t* out = dst + i * cols + p;
      const scalar_t* in = src + (i + p) * ld;
      if (i + p < rows) {
        for (int64_t d = 0; d < cols; ++d) {
          out[d * vnni] = static_cast<op_t>(in[d]);
        }
      } else {
        for (int64_t d = 0; d < cols; ++d) {
          out[d * vnni] = op_t(0);
        }
      }
    }
  }
}

// A operand of [cols, width]: the source transposed.
template <typename op_t, typename scalar_t>
void pack_a_transposed(op_t* dst, const scalar_t* src, int64_t ld, int64_t rows, int64_t cols,
                       int64_t width) {
  for (int64_t d = 0; d < cols; ++d) {
    op_t* out = dst + d * width;
    for (int64_t i = 0; i < rows; ++i) {
      out[i] = static_cast<op_t>(src[i * ld + d]);
    }
    std::fill(out + rows, out + width, op_t(0));
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
