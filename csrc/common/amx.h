// C[M, N] (+)= A[M, K] · B[K, N] in bf16 on Intel's tile registers (AMX). A is row-major, B lies as
// [K/2][N][2]; M, N and K are multiples of 32.
//
// One core of a Xeon, GFLOP/s, tiles in L2: 128x32x64 2,520, 128x32x128 1,940, with sums of 64 or 128 rows
// 1,720 to 1,800; oneDNN's microkernel 1,200 to 1,660, with sums 1,100. From registers alone: 3,100. All on
// zeros: random numbers take 15 to 25 % longer.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <immintrin.h>
#define PYVLM_HAS_AMX 1
#else
#define PYVLM_HAS_AMX 0
#endif

namespace pyvlm::CPU_CAPABILITY {

#if PYVLM_HAS_AMX

// Eight tile registers of 16 rows of 64 bytes, for the calling thread, as long as this lives.
class AmxTiles {
 public:
  AmxTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } static const config;  // static: GCC 12 believes that only its first 8 bytes are read
    _tile_loadconfig(&config);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

// Which planes of A and B are multiplied: one pair, all four of numbers that are sums of two, the six larger
// of sums of three. From one to the next only one side changes: six take 14 loads of tiles in place of 24.
template <int planes>
struct AmxPairs {
  static constexpr int kCount = 1, kA[kCount] = {0}, kB[kCount] = {0};
};
template <>
struct AmxPairs<2> {
  static constexpr int kCount = 4, kA[kCount] = {1, 1, 0, 0}, kB[kCount] = {1, 0, 0, 1};
};
template <>
struct AmxPairs<3> {
  static constexpr int kCount = 6, kA[kCount] = {2, 1, 1, 0, 0, 0}, kB[kCount] = {0, 0, 1, 1, 2, 0};
};

// Multiplies by blocks of 32 x 32, whose sums are in tiles 0 to 3. A block is stored between the first
// products of the next one, tile by tile: stored in one go, its four tiles would keep the multiplier waiting
// (a block of 8 products: 59 ns, and so 43).
template <int planes>
inline void amx_gemm(int64_t M, int64_t N, int64_t K, const at::BFloat16* a, int64_t lda, int64_t a_plane,
                     const at::BFloat16* b, int64_t ldb, int64_t b_plane, float* c, int64_t ldc,
                     bool accumulate) {
  using Pairs = AmxPairs<planes>;
  const int64_t a_bytes = lda * 2, b_bytes = ldb * 4, c_bytes = ldc * 4;
  float* done = nullptr;
  for (int64_t n = 0; n < N; n += 32) {
    for (int64_t m = 0; m < M; m += 32) {
      float* block = c + m * ldc + n;
      for (int64_t k = 0; k < K; k += 32) {
#pragma GCC unroll 6
        for (int i = 0; i < Pairs::kCount; ++i) {
          const at::BFloat16* a_tile = a + Pairs::kA[i] * a_plane + m * lda + k;
          const at::BFloat16* b_tile = b + Pairs::kB[i] * b_plane + k * ldb + 2 * n;
          const bool first = k == 0 && i == 0;
          const bool new_a = i == 0 || Pairs::kA[i] != Pairs::kA[i - 1];
          const bool new_b = i == 0 || Pairs::kB[i] != Pairs::kB[i - 1];
#define PYVLM_NEXT_TILE(tile, offset)               \
  if (first) {                                      \
    if (done != nullptr) {                          \
      _tile_stored(tile, done + (offset), c_bytes); \
    }                                               \
    if (accumulate) {                               \
      _tile_loadd(tile, block + (offset), c_bytes); \
    } else {                                        \
      _tile_zero(tile);                             \
    }                                               \
  }
          if (new_b) {
            _tile_loadd(4, b_tile, b_bytes);
          }
          if (new_a) {
            _tile_loadd(6, a_tile, a_bytes);
          }
          PYVLM_NEXT_TILE(0, 0)
          _tile_dpbf16ps(0, 6, 4);
          if (new_b) {
            _tile_loadd(5, b_tile + 32, b_bytes);
          }
          PYVLM_NEXT_TILE(1, 16)
          _tile_dpbf16ps(1, 6, 5);
          if (new_a) {
            _tile_loadd(7, a_tile + 16 * lda, a_bytes);
          }
          PYVLM_NEXT_TILE(2, 16 * ldc)
          _tile_dpbf16ps(2, 7, 4);
          PYVLM_NEXT_TILE(3, 16 * ldc + 16)
          _tile_dpbf16ps(3, 7, 5);
#undef PYVLM_NEXT_TILE
        }
      }
      done = block;
    }
  }
  if (done != nullptr) {
    _tile_stored(0, done, c_bytes);
    _tile_stored(1, done + 16, c_bytes);
    _tile_stored(2, done + 16 * ldc, c_bytes);
    _tile_stored(3, done + 16 * ldc + 16, c_bytes);
  }
}

#endif

}  // namespace pyvlm::CPU_CAPABILITY
