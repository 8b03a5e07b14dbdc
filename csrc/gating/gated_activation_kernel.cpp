// One pass over gate and up; the backward computes the activation again, so that only these two are kept.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include "common/activations.h"
#include "common/rows.h"
#include "gating/gated_activation.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

// Elements that are worth waking a thread for.
constexpr int64_t kGrain = 1 << 15;

template <typename scalar_t>
const scalar_t* row(const GatedRows& rows, int64_t r) {
  return rows.data == nullptr ? nullptr : static_cast<const scalar_t*>(rows.data) + r * rows.ld;
}

// Two vectors of up, which are ones where there is none.
template <typename acc_t, typename scalar_t>
void load_up(const scalar_t* up, int64_t c, int64_t count, Vec<acc_t>& u0, Vec<acc_t>& u1) {
  if (up != nullptr) {
    load_row<acc_t>(up + c, count, acc_t(0), u0, u1);
  } else {
    u0 = u1 = Vec<acc_t>(acc_t(1));
  }
}

// Calls f(activation, scalar, r) for all rows, with both as compile-time constants.
template <typename F>
void for_rows(const GatedProblem& p, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / p.channels);
  with_activation(p.activation, [&](auto activation) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, p.dtype, "gated_activation", [&] {
      at::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          f(activation, scalar_t(), r);
        }
      });
    });
  });
}

}  // namespace

void gated_activation(const GatedProblem& p, void* y, int64_t y_ld) {
  for_rows(p, [&](auto activation, auto scalar, int64_t r) {
    using scalar_t = decltype(scalar);
    using acc_t = at::opmath_type<scalar_t>;
    const scalar_t *gate = row<scalar_t>(p.gate, r), *up = row<scalar_t>(p.up, r);
    scalar_t* out = static_cast<scalar_t*>(y) + r * y_ld;
    for_row<acc_t>(p.channels, [&](int64_t c, int64_t count) {
      Vec<acc_t> g0, g1, u0, u1;
      load_row<acc_t>(gate + c, count, acc_t(0), g0, g1);
      load_up(up, c, count, u0, u1);
      constexpr Precision precision = kPrecisionOf<scalar_t>;
      store_row<acc_t>(out + c, count, activate<activation.value, precision>(g0) * u0,
                       activate<activation.value, precision>(g1) * u1);
    });
  });
}

void gated_activation_backward(const GatedProblem& p, const GatedRows& grad_y, void* grad_gate,
                               void* grad_up) {
  for_rows(p, [&](auto activation, auto scalar, int64_t r) {
    using scalar_t = decltype(scalar);
    using acc_t = at::opmath_type<scalar_t>;
    const scalar_t *gate = row<scalar_t>(p.gate, r), *up = row<scalar_t>(p.up, r);
    const scalar_t* grad = row<scalar_t>(grad_y, r);
    scalar_t* to_gate = static_cast<scalar_t*>(grad_gate) + r * p.channels;
    scalar_t* to_up = static_cast<scalar_t*>(grad_up) + r * p.channels;
    for_row<acc_t>(p.channels, [&](int64_t c, int64_t count) {
      Vec<acc_t> g0, g1, u0, u1, d0, d1, slope0, slope1;
      load_row<acc_t>(gate + c, count, acc_t(0), g0, g1);
      load_up(up, c, count, u0, u1);
      load_row<acc_t>(grad + c, count, acc_t(0), d0, d1);
      constexpr Precision precision = kPrecisionOf<scalar_t>;
      const Vec<acc_t> a0 = activate<activation.value, precision>(g0, &slope0);
      const Vec<acc_t> a1 = activate<activation.value, precision>(g1, &slope1);
      if (up != nullptr) {
        store_row<acc_t>(to_up + c, count, d0 * a0, d1 * a1);
      }
      store_row<acc_t>(to_gate + c, count, d0 * u0 * slope0, d1 * u1 * slope1);
    });
  });
}

}  // namespace pyvlm::CPU_CAPABILITY
