#include "placement/row_sums.h"

#include <ATen/Dispatch.h>

#include "common/vec_math.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t>
void sum(const RowSum& s) {
  using vec_t = Vec<scalar_t>;
  const auto row = [&](int64_t i) { return reinterpret_cast<const scalar_t*>(s.rows[i]); };
  auto* out = static_cast<scalar_t*>(s.out);
  for (int64_t c = s.begin; c < s.end; c += vec_t::size()) {
    const int64_t count = std::min<int64_t>(vec_t::size(), s.end - c);
    const auto load = [&](int64_t i) {
      return count == vec_t::size() ? vec_t::loadu(row(i) + c) : vec_t::loadu(row(i) + c, count);
    };
    vec_t sum = load(0);
    if constexpr (at::vec::is_reduced_floating_point_v<scalar_t>) {
      auto [low, high] = at::vec::convert_to_float<scalar_t>(sum);
      for (int64_t i = 1; i < s.count; ++i) {
        const auto [x0, x1] = at::vec::convert_to_float<scalar_t>(load(i));
        low = low + x0;
        high = high + x1;
      }
      sum = at::vec::convert_from_float<scalar_t>(low, high);
    } else {
      for (int64_t i = 1; i < s.count; ++i) {
        sum = sum + load(i);
      }
    }
    sum.store(out + c, count);
  }
}

}  // namespace

void sum_rows(const RowSum& s) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, s.dtype, "sum_rows", [&] { sum<scalar_t>(s); });
}

}  // namespace pyvlm::CPU_CAPABILITY
