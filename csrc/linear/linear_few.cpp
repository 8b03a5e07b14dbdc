// A few tokens through a linear layer: the weight is read once, row after row, and nothing is packed.
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
// How far ahead of its use the weight is asked for: a row is too short for the processor to guess the next.
constexpr int64_t kAhead = 512;

// out[t] = the products of one row of the weight with kTokens rows of x.
template <int64_t kTokens>
std::array<float, kTokens> row_products(const FewTokens& p, const float* w) {
  constexpr int64_t kStep = kRowStep<float>;
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
  std::array<float, kTokens> out;
  for (int64_t t = 0; t < kTokens; ++t) {
    out[t] = sum_of(sums[t][0], sums[t][1]);
    for (int64_t rest = k; rest < p.K; ++rest) {
      out[t] += w[rest] * p.x[t * p.K + rest];
    }
  }
  return out;
}

template <int64_t kTokens>
void products(const FewTokens& p) {
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / static_cast<int64_t>(sizeof(float)) / p.K);
  at::parallel_for(0, p.N, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const std::array<float, kTokens> row = row_products<kTokens>(p, p.weight + n * p.ld);
      for (int64_t t = 0; t < kTokens; ++t) {
        p.y[t * p.N + n] = row[t] + (p.bias == nullptr ? 0.f : p.bias[n]);
      }
    }
  });
}

// The problem of at most kCount tokens.
template <int64_t kCount>
void up_to(const FewTokens& p) {
  if constexpr (kCount > 0) {
    p.M == kCount ? products<kCount>(p) : up_to<kCount - 1>(p);
  }
}

}  // namespace

void linear_few(const FewTokens& p) { up_to<kMostFewTokens>(p); }

}  // namespace pyvlm::CPU_CAPABILITY
