// C[M, N] (+)= A[M, K] · B[K, N] on one core, on tiles that fit its caches: one struct an engine, which says
// how its operands lie.
//
//   A        row-major, rows `ld` apart
//   B        row-major where kVnni is 1, else [K/2][N][2] (VNNI order), `ld` counted in columns
//   C        row-major, in acc_t
//   kDepth   K, and a tile's M and N, are padded with zeros to a multiple of this
//   kPlanes  a number is the sum of this many of op_t, each in a matrix of its own, `plane` apart
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <type_traits>

#include "common/amx.h"
#include "common/isa.h"
#include "common/vec_math.h"

namespace pyvlm::CPU_CAPABILITY {

template <typename op_t>
struct Operand {
  op_t* data;
  int64_t ld;
  int64_t plane = 0;

  Operand from(int64_t offset) const { return {data + offset, ld, plane}; }
};

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// C[M, N] (+)= A[M, K] · B[K, N].
template <typename Gemm>
struct Product {
  int64_t M, N, K;
  Operand<typename Gemm::op_t> a, b;
  typename Gemm::acc_t* c;
  int64_t ldc;
  bool accumulate;
};

// fp64 exists for gradient checks, and is a plain loop.
struct Fp64Gemm {
  using op_t = double;
  using acc_t = double;
  static constexpr int64_t kVnni = 1, kDepth = 1, kPlanes = 1;
  static constexpr int64_t kPanelBytes = 32 << 10;
  struct Session {};

  static void multiply(const Product<Fp64Gemm>& p) {
    for (int64_t m = 0; m < p.M; ++m) {
      double* row = p.c + m * p.ldc;
      if (!p.accumulate) {
        std::fill(row, row + p.N, 0.0);
      }
      for (int64_t k = 0; k < p.K; ++k) {
        const double scale = p.a.data[m * p.a.ld + k];
        const double* b_row = p.b.data + k * p.b.ld;
        for (int64_t n = 0; n < p.N; ++n) {
          row[n] += scale * b_row[n];
        }
      }
    }
  }
};

// oneDNN's microkernel through torch: measured at the core's peak, against 40 % for torch.matmul in fp32 on
// AMD.
template <typename T>
struct Brgemm {
  using op_t = T;
  using acc_t = float;
  static constexpr int64_t kVnni = std::is_same_v<T, at::BFloat16> ? 2 : 1, kDepth = kVnni, kPlanes = 1;
  // Of A, multiplied at once: what stays in L2. With 32 KB, which stay in L1, the sums are read and written
  // four times as often: merged levels in bf16 took 1.15 times as long, MoE-LLaVA's experts forward 1.1
  // (bf16) and 1.2 (fp32). 64 KB lie between, and 256 KB are no faster.
  static constexpr int64_t kPanelBytes = 128 << 10;

  // Each thread gives the tile registers back before it does anything else.
  struct Session {
    ~Session() { at::native::cpublas::brgemm_release(/*is_vnni=*/kVnni == 2); }
  };

  static void multiply(const Product<Brgemm>& p) {
    at::native::cpublas::brgemm(p.M, p.N, p.K, p.a.ld, p.b.ld, p.ldc, p.accumulate, p.a.data, p.b.data, p.c,
                                kVnni == 2);
  }
};

#if PYVLM_HAS_AMX

// planes = 2: fp16 as the sum of two bf16, which hold its 11 bits. planes = 3: fp32 as the sum of three,
// which hold its 24; of nine products the three smallest are left out, less than 2^-24 of the whole.
template <int planes>
struct AmxGemm {
  using op_t = at::BFloat16;
  using acc_t = float;
  static constexpr int64_t kVnni = 2, kDepth = 32, kPlanes = planes;
  static constexpr int64_t kPanelBytes = 32 << 10;  // two thirds of L1
  using Session = AmxTiles;

  static void multiply(const Product<AmxGemm>& p) {
    amx_gemm<planes>(p.M, p.N, p.K, p.a.data, p.a.ld, p.a.plane, p.b.data, p.b.ld, p.b.plane, p.c, p.ldc,
                     p.accumulate);
  }
};

#endif

// Two rows (k, k + 1) of a B operand from lane n on, one vector each.
template <typename Gemm>
inline void store_b_pair(const Operand<typename Gemm::op_t>& b, int64_t k, int64_t n,
                         Vec<typename Gemm::acc_t> even, Vec<typename Gemm::acc_t> odd) {
  typename Gemm::op_t* at = b.data + k * b.ld + n * Gemm::kVnni;
  if constexpr (Gemm::kVnni == 1) {
    even.store(at);
    odd.store(at + b.ld);
  } else {
    store_pair(at, even, odd);
    if constexpr (Gemm::kPlanes > 1) {
      for (int64_t plane = 1; plane < Gemm::kPlanes; ++plane) {
        even = bf16_remainder(even);
        odd = bf16_remainder(odd);
        store_pair(at + plane * b.plane, even, odd);
      }
    }
  }
}

// Two vectors of row m of an A operand from column k on.
template <typename Gemm>
inline void store_a_row(const Operand<typename Gemm::op_t>& a, int64_t m, int64_t k,
                        Vec<typename Gemm::acc_t> x0, Vec<typename Gemm::acc_t> x1) {
  typename Gemm::op_t* at = a.data + m * a.ld + k;
  store_row(at, x0, x1);
  if constexpr (Gemm::kPlanes > 1) {
    for (int64_t plane = 1; plane < Gemm::kPlanes; ++plane) {
      x0 = bf16_remainder(x0);
      x1 = bf16_remainder(x1);
      store_row(at + plane * a.plane, x0, x1);
    }
  }
}

// Calls f(scalar) with the tensors' type.
template <typename F>
void with_scalar(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kDouble:
      return f(double());
    case at::kFloat:
      return f(float());
    case at::kHalf:
      return f(at::Half());
    default:
      return f(at::BFloat16());
  }
}

// Calls f(scalar, engine) with the tensors' type and the GEMM engine that this machine has for it.
template <typename F>
void with_engine(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kDouble:
      return f(double(), Fp64Gemm());
    case at::kFloat:
#if PYVLM_HAS_AMX
      if (has_amx()) {
        return f(float(), AmxGemm<3>());
      }
#endif
      return f(float(), Brgemm<float>());
    case at::kHalf:
#if PYVLM_HAS_AMX
      if (has_amx()) {
        return f(at::Half(), AmxGemm<2>());
      }
#endif
      return f(at::Half(), Brgemm<float>());
    default:
#if PYVLM_HAS_AMX
      if (has_amx()) {
        return f(at::BFloat16(), AmxGemm<1>());
      }
#endif
      if (has_bf16_dot()) {
        return f(at::BFloat16(), Brgemm<at::BFloat16>());
      }
      return f(at::BFloat16(), Brgemm<float>());
  }
}

}  // namespace pyvlm::CPU_CAPABILITY
