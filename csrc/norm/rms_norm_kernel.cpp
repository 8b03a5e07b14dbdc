// A row at a time: once for its sum, again while it lies in cache.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <cmath>

#include "common/rows.h"
#include "norm/rms_norm.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

// Elements that are worth waking a thread for.
constexpr int64_t kGrain = 1 << 15;

template <typename acc_t, typename scalar_t>
acc_t mean_square(const scalar_t* x, int64_t channels) {
  Vec<acc_t> sum0(acc_t(0)), sum1(acc_t(0));
  for_row<acc_t>(channels, [&](int64_t c, int64_t count) {
    Vec<acc_t> x0, x1;
    load_row<acc_t>(x + c, count, acc_t(0), x0, x1);
    sum0 = at::vec::fmadd(x0, x0, sum0);
    sum1 = at::vec::fmadd(x1, x1, sum1);
  });
  return sum_of(sum0, sum1) / static_cast<acc_t>(channels);
}

// Gradients of one row: `grad_x` is written and `weight_sums` added to, where they are wanted.
template <typename acc_t, typename scalar_t>
void row_backward(const scalar_t* x, const scalar_t* grad_y, const acc_t* scale, acc_t rstd, int64_t channels,
                  scalar_t* grad_x, acc_t* weight_sums) {
  using vec_t = Vec<acc_t>;
  vec_t sum0(acc_t(0)), sum1(acc_t(0));
  vec_t x0, x1, d0, d1, s0, s1;
  const auto load = [&](int64_t c, int64_t count) {
    load_row<acc_t>(x + c, count, acc_t(0), x0, x1);
    load_row<acc_t>(grad_y + c, count, acc_t(0), d0, d1);
    load_two(scale + c, s0, s1);
  };
  if (grad_x != nullptr) {
    for_row<acc_t>(channels, [&](int64_t c, int64_t count) {
      load(c, count);
      sum0 = at::vec::fmadd(d0 * s0, x0, sum0);
      sum1 = at::vec::fmadd(d1 * s1, x1, sum1);
    });
  }
  const vec_t by(rstd), back(sum_of(sum0, sum1) / static_cast<acc_t>(channels) * rstd * rstd);
  for_row<acc_t>(channels, [&](int64_t c, int64_t count) {
    load(c, count);
    if (weight_sums != nullptr) {
      vec_t w0, w1;
      load_two(weight_sums + c, w0, w1);
      store_row(weight_sums + c, at::vec::fmadd(d0, x0 * by, w0), at::vec::fmadd(d1, x1 * by, w1));
    }
    if (grad_x != nullptr) {
      store_row<acc_t>(grad_x + c, count, (d0 * s0 - x0 * back) * by, (d1 * s1 - x1 * back) * by);
    }
  });
}

}  // namespace

void rms_norm(const NormProblem& p, double eps, void* y, void* rstd) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, p.dtype, "rms_norm", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto* scale = static_cast<const acc_t*>(p.scale);
    const int64_t grain = std::max<int64_t>(1, kGrain / p.channels);
    at::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const scalar_t* x = static_cast<const scalar_t*>(p.x) + r * p.channels;
        scalar_t* out = static_cast<scalar_t*>(y) + r * p.channels;
        const acc_t by = 1 / std::sqrt(mean_square<acc_t>(x, p.channels) + static_cast<acc_t>(eps));
        static_cast<acc_t*>(rstd)[r] = by;
        for_row<acc_t>(p.channels, [&](int64_t c, int64_t count) {
          Vec<acc_t> x0, x1, s0, s1;
          load_row<acc_t>(x + c, count, acc_t(0), x0, x1);
          load_two(scale + c, s0, s1);
          store_row<acc_t>(out + c, count, x0 * Vec<acc_t>(by) * s0, x1 * Vec<acc_t>(by) * s1);
        });
      }
    });
  });
}

void rms_norm_backward(const NormProblem& p, const void* grad_y, const void* rstd, const NormChunks& chunks,
                       void* grad_x, void* weight_sums) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, p.dtype, "rms_norm_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    static_assert(kScaleStep % kRowStep<acc_t> == 0);
    const int64_t grain = std::max<int64_t>(1, kGrain / (p.channels * chunks.rows));
    at::parallel_for(0, chunks.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        acc_t* sums = weight_sums ? static_cast<acc_t*>(weight_sums) + chunk * p.padded_channels() : nullptr;
        const int64_t last = std::min(p.rows, (chunk + 1) * chunks.rows);
        for (int64_t r = chunk * chunks.rows; r < last; ++r) {
          const int64_t at = r * p.channels;
          row_backward<acc_t>(static_cast<const scalar_t*>(p.x) + at,
                              static_cast<const scalar_t*>(grad_y) + at, static_cast<const acc_t*>(p.scale),
                              static_cast<const acc_t*>(rstd)[r], p.channels,
                              grad_x ? static_cast<scalar_t*>(grad_x) + at : nullptr, sums);
        }
      }
    });
  });
}

}  // namespace pyvlm::CPU_CAPABILITY
