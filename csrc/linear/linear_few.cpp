// A few tokens through a linear layer: the weight is read once, row after row, and nothing is packed.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>

#include "common/rows.h"
#include "linear/linear.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

using V = Vec<float>;

// Bytes of weight that are worth waking a thread for.
constexpr int64_t kGrainBytes = 1 << 16;
// Bytes ahead of its use that the weight is asked for: a row is too short for the processor to guess the
// next.
constexpr int64_t kAheadBytes = 2048;

// y[t, n] for kTokens rows of x and row n of the weight.
template <int64_t kTokens, typename scalar_t>
void row_products(const FewTokens& p, int64_t n) {
  constexpr int64_t kStep = kRowStep<float>, kAhead = kAheadBytes / sizeof(scalar_t);
  const auto *w = static_cast<const scalar_t*>(p.weight) + n * p.ld,
             *bias = static_cast<const scalar_t*>(p.bias);
  std::array<std::array<V, 2>, kTokens> sums;
  for (auto& sum : sums) {
    sum = {V(0.f), V(0.f)};
  }
  int64_t k = 0;
  for (; k + kStep <= p.K; k += kStep) {
    __builtin_prefetch(w + k + kAhead);
    V w0, w1, x0, x1;
    load_two(w + k, w0, w1);
    for (int64_t t = 0; t < kTokens; ++t) {
      load_two(p.x + t * p.K + k, x0, x1);
      sums[t][0] = at::vec::fmadd(w0, x0, sums[t][0]);
      sums[t][1] = at::vec::fmadd(w1, x1, sums[t][1]);
    }
  }
  for (int64_t t = 0; t < kTokens; ++t) {
    float y = sum_of(sums[t][0], sums[t][1]);
    for (int64_t rest = k; rest < p.K; ++rest) {
      y += static_cast<float>(w[rest]) * p.x[t * p.K + rest];
    }
    y += bias == nullptr ? 0.f : static_cast<float>(bias[n]);
    static_cast<scalar_t*>(p.y)[t * p.N + n] = static_cast<scalar_t>(y);
  }
}

template <int64_t kTokens, typename scalar_t>
void products(const FewTokens& p) {
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / static_cast<int64_t>(sizeof(scalar_t)) / p.K);
  at::parallel_for(0, p.N, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      row_products<kTokens, scalar_t>(p, n);
    }
  });
}

// The problem of at most kCount tokens.
template <int64_t kCount, typename scalar_t>
void up_to(const FewTokens& p) {
  if constexpr (kCount > 0) {
    p.M == kCount ? products<kCount, scalar_t>(p) : up_to<kCount - 1, scalar_t>(p);
  }
}

}  // namespace

void linear_few(const FewTokens& p) {
  AT_DISPATCH_SWITCH(p.dtype, "linear_few",
                     AT_DISPATCH_CASE(at::kFloat, [&] { up_to<kMostFewTokens, scalar_t>(p); })
                         AT_DISPATCH_CASE(at::kBFloat16, [&] { up_to<kMostFewTokens, scalar_t>(p); })
                             AT_DISPATCH_CASE(at::kHalf, [&] { up_to<kMostFewTokens, scalar_t>(p); }));
}

}  // namespace pyvlm::CPU_CAPABILITY
