// Rows of any length and dtype, read and written as pairs of vectors.
#pragma once

#include <algorithm>

#include "common/vec_math.h"

namespace pyvlm::CPU_CAPABILITY {

// Elements of a row that are worked on at once. Rows of sums in scratch memory are padded to them.
template <typename acc_t>
inline constexpr int64_t kRowStep = 2 * Vec<acc_t>::size();

// kRowStep elements of a row that has `count` left; `beyond` stands in for those behind its end.
template <typename acc_t, typename scalar_t>
inline void load_row(const scalar_t* from, int64_t count, acc_t beyond, Vec<acc_t>& x0, Vec<acc_t>& x1) {
  if (count >= kRowStep<acc_t>) {
    load_two(from, x0, x1);
    return;
  }
  acc_t padded[kRowStep<acc_t>];
  std::fill(std::copy(from, from + count, padded), padded + kRowStep<acc_t>, beyond);
  load_two(padded, x0, x1);
}

template <typename acc_t, typename scalar_t>
inline void store_row(scalar_t* to, int64_t count, const Vec<acc_t>& x0, const Vec<acc_t>& x1) {
  scalar_t padded[kRowStep<acc_t>];
  scalar_t* out = count >= kRowStep<acc_t> ? to : padded;
  if constexpr (std::is_same_v<scalar_t, at::Half>) {
    at::vec::convert_from_float<at::Half>(x0, x1).store(out);
  } else {
    store_row(out, x0, x1);
  }
  if (out == padded) {
    std::copy(padded, padded + count, to);
  }
}

// Calls f(c, count) for the pieces of a row, of which all but the last have kRowStep elements.
template <typename acc_t, typename F>
inline void for_row(int64_t size, const F& f) {
  int64_t c = 0;
  for (; c + kRowStep<acc_t> <= size; c += kRowStep<acc_t>) {
    f(c, kRowStep<acc_t>);
  }
  if (c < size) {
    f(c, size - c);
  }
}

template <typename acc_t>
inline acc_t sum_of(const Vec<acc_t>& x0, const Vec<acc_t>& x1) {
  return at::vec::vec_reduce_all<acc_t>([](Vec<acc_t> a, Vec<acc_t> b) { return a + b; }, x0 + x1);
}

}  // namespace pyvlm::CPU_CAPABILITY
