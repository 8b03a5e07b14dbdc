// Comparing, counting and choosing among the probabilities of a row or of an expert, a vector at a time.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>

#include "moe/routing_rows.h"

namespace pyvlm::CPU_CAPABILITY {

// Bit i: is a[i] >= b[i], for kRowBlock values.
template <typename T>
uint64_t at_least(const T* a, const T* b) {
  uint64_t mask = 0;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    for (int i = 0; i < 64; i += 16) {
      const auto ge = _mm512_cmp_ps_mask(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), _CMP_GE_OQ);
      mask |= static_cast<uint64_t>(ge) << i;
    }
    return mask;
  }
#endif
  for (int i = 0; i < 64; ++i) {
    mask |= static_cast<uint64_t>(a[i] >= b[i]) << i;
  }
  return mask;
}

// Writes where a row reaches its bounds, in order, each plus `base`, and up to 16 numbers behind their end.
// Returns their end.
template <typename T>
int32_t* write_places(const T* row, const T* bounds, int64_t size, int32_t base, int32_t* places) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {  // no branch to be mispredicted
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i place = _mm512_add_epi32(lanes, _mm512_set1_epi32(base));
    for (int64_t i = 0; i < size; i += 16) {
      const auto ge = _mm512_cmp_ps_mask(_mm512_loadu_ps(row + i), _mm512_loadu_ps(bounds + i), _CMP_GE_OQ);
      _mm512_storeu_si512(places, _mm512_maskz_compress_epi32(ge, place));
      places += std::popcount(static_cast<uint32_t>(ge));
      place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
    }
    return places;
  }
#endif
  for (int64_t i = 0; i < size; i += kRowBlock) {
    for (uint64_t mask = at_least(row + i, bounds + i); mask != 0; mask &= mask - 1) {
      *places++ = base + static_cast<int32_t>(i + std::countr_zero(mask));
    }
  }
  return places;
}

// The first of the largest values of a row.
template <typename T>
int64_t argmax(const T* row, int64_t padded_size) {
  using V = Vec<T>;
  V top = V::loadu(row);
  for (int64_t i = V::size(); i < padded_size; i += V::size()) {
    top = at::vec::clamp_min(V::loadu(row + i), top);
  }
  const auto larger = [](const V& a, const V& b) { return at::vec::clamp_min(a, b); };
  const T largest = at::vec::vec_reduce_all<T>(larger, top);
  alignas(64) T wanted[kRowBlock];
  std::fill_n(wanted, kRowBlock, largest);
  for (int64_t i = 0;; i += kRowBlock) {
    if (const uint64_t mask = at_least(row + i, wanted); mask != 0) {
      return i + std::countr_zero(mask);
    }
  }
}

template <typename T, typename Condition>
int32_t count_if(const T* values, int64_t size, const Condition& condition) {
  int32_t count = 0;  // std::count_if counts in 64 bits, which takes twice the registers
  for (int64_t i = 0; i < size; ++i) {
    count += condition(values[i]);
  }
  return count;
}

// A bound that exactly the `wanted` largest values reach or, where that one is tied, the value that is tied.
// Bisects the bit patterns, which sort as the values do: none is negative. A step counts in cache, a vector
// at a time, with no branch to be mispredicted.
template <typename T>
T bound_of_best(const T* values, int64_t size, int64_t wanted) {
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Bits low = 0, high = std::bit_cast<Bits>(std::numeric_limits<T>::infinity());
  while (high - low > 1) {
    const Bits middle = low + (high - low) / 2;
    const T bound = std::bit_cast<T>(middle);
    const int64_t count = count_if(values, size, [&](T x) { return x >= bound; });
    (count >= wanted ? low : high) = middle;
    if (count == wanted) {
      break;
    }
  }
  return std::bit_cast<T>(low);
}

}  // namespace pyvlm::CPU_CAPABILITY
