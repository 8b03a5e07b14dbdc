// C[M, N] (+)= A[M, K] · B[K, N] on one core, on tiles that fit its caches; all row-major.
// fp32 and bf16 take oneDNN's microkernel through torch (measured at the core's peak, against 40 % for
// torch.matmul in fp32 on AMD). bf16 wants B as [K/2][N][2]. fp64 exists for gradient checks, and is a plain
// loop.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace pyvlm::CPU_CAPABILITY {

inline void tile_gemm(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda, const float* b,
                      int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, accumulate, a, b, c, /*is_vnni=*/false);
}

inline void tile_gemm(int64_t M, int64_t N, int64_t K, const at::BFloat16* a, int64_t lda,
                      const at::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, accumulate, a, b, c, /*is_vnni=*/true);
}

inline void tile_gemm(int64_t M, int64_t N, int64_t K, const double* a, int64_t lda, const double* b,
                      int64_t ldb, double* c, int64_t ldc, bool accumulate) {
  for (int64_t m = 0; m < M; ++m) {
    double* row = c + m * ldc;
    if (!accumulate) {
      std::fill(row, row + N, 0.0);
    }
    for (int64_t k = 0; k < K; ++k) {
      const double scale = a[m * lda + k];
      const double* b_row = b + k * ldb;
      for (int64_t n = 0; n < N; ++n) {
        row[n] += scale * b_row[n];
      }
    }
  }
}

// Each thread that multiplied bf16 tiles gives the tile registers back before it does anything else.
template <typename op_t>
inline void tile_gemm_release() {
  at::native::cpublas::brgemm_release(/*is_vnni=*/std::is_same_v<op_t, at::BFloat16>);
}

}  // namespace pyvlm::CPU_CAPABILITY
