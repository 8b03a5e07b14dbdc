// The softmax of rows of logits.
#pragma once

#include <ATen/core/ScalarType.h>

#include <limits>

#include "common/arena.h"
#include "common/vec_math.h"
#include "moe/routing.h"

namespace pyvlm::CPU_CAPABILITY {

// Rows in scratch memory are as long as a whole number of these.
inline constexpr int64_t kRowBlock = 64;
inline int64_t padded(int64_t experts) { return (experts + kRowBlock - 1) / kRowBlock * kRowBlock; }

template <typename T>
inline Vec<T> natural_exp(const Vec<T>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    return exp2<Precision::full>(x * Vec<T>(1.442695041f));
  }
#endif
  return x.exp();  // exp_u20 would make a number of NaN
}

// A row's result depends on nothing but the row: equal rows have equal bits, wherever they are.
template <typename scalar_t>
class RowSoftmax {
 public:
  using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

  RowSoftmax(const Logits& logits, Arena& arena)
      : logits_(logits), widened_(arena.take<acc_t>(padded(logits.experts))) {}

  // Into the cache, while other rows are worked on: the hardware starts anew at every page, of which 16 rows
  // of 64 experts are one.
  void prefetch(int64_t row) const {
    const scalar_t* x = static_cast<const scalar_t*>(logits_.data) + row * logits_.stride;
    for (int64_t e = 0; e < logits_.experts; e += static_cast<int64_t>(64 / sizeof(scalar_t))) {
      __builtin_prefetch(x + e);
    }
  }

  // Writes the probabilities of a row and zeros up to the next whole vector. False where the row has none: it
  // holds NaN, +inf or nothing but -inf.
  bool operator()(int64_t row, acc_t* p) const {
    const acc_t* x = widened(row);
    V top(kLowest);
    for (int64_t e = 0; e < logits_.experts; e += V::size()) {
      top = at::vec::clamp_min(load(x, e), top);
    }
    const auto larger = [](const V& a, const V& b) { return at::vec::clamp_min(a, b); };
    const V shift(at::vec::vec_reduce_all<acc_t>(larger, top));
    V sum(acc_t(0));
    for (int64_t e = 0; e < logits_.experts; e += V::size()) {
      const V y = natural_exp(load(x, e) - shift);
      y.store(p + e);
      sum = sum + y;
    }
    const auto plus = [](const V& a, const V& b) { return a + b; };
    const acc_t total = at::vec::vec_reduce_all<acc_t>(plus, sum);
    const V scale(acc_t(1) / total);
    for (int64_t e = 0; e < logits_.experts; e += V::size()) {
      (V::loadu(p + e) * scale).store(p + e);
    }
    return total > 0;  // not NaN
  }

 private:
  using V = Vec<acc_t>;
  static constexpr acc_t kLowest = -std::numeric_limits<acc_t>::infinity();

  // The row in acc_t, as it lies or converted.
  const acc_t* widened(int64_t row) const {
    const scalar_t* x = static_cast<const scalar_t*>(logits_.data) + row * logits_.stride;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      return x;
    } else {
      at::vec::convert(x, widened_, logits_.experts);
      return widened_;
    }
  }

  // A vector of a row; behind its end, -inf.
  V load(const acc_t* x, int64_t e) const {
    const int64_t left = logits_.experts - e;
    return left >= V::size() ? V::loadu(x + e) : V::set(V(kLowest), V::loadu(x + e, left), left);
  }

  Logits logits_;
  acc_t* widened_;
};

template <typename Function>
inline void with_dtype_of(const Logits& logits, const Function& function) {
  switch (logits.dtype) {
    case at::kDouble:
      return function(double{});
    case at::kBFloat16:
      return function(at::BFloat16{});
    case at::kHalf:
      return function(at::Half{});
    default:
      return function(float{});
  }
}

}  // namespace pyvlm::CPU_CAPABILITY
