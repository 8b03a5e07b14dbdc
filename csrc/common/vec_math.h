// Vector arithmetic that at::vec does not have, or has slower: powers of two, and rows of a tile written as
// bf16 operands.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

namespace pyvlm::CPU_CAPABILITY {

template <typename T>
using Vec = at::vec::Vectorized<T>;

// Largest relative error allowed: of a result that is rounded to bf16, and of one that is kept.
enum class Precision { bf16, full };
template <typename scalar_t>
inline constexpr Precision kPrecisionOf =
    std::is_same_v<scalar_t, at::BFloat16> ? Precision::bf16 : Precision::full;

#if defined(CPU_CAPABILITY_AVX512)

// 2^x, 0 for -inf: the fraction above floor(x) goes through a minimax polynomial over [0, 1) (relative error
// 2.6e-6 or 7.5e-8), and vscalef does the rest. at::vec's exp_u20 takes 18 instructions, this 8 or 9.
template <Precision precision>
inline Vec<float> exp2(const Vec<float>& x) {
  constexpr int kAboveFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const __m512 f = _mm512_reduce_ps(x, kAboveFloor);
  __m512 y;
  if constexpr (precision == Precision::bf16) {
    y = _mm512_set1_ps(0.01353416792f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.05201146061f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.2414427569f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.6930038345f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.000002593f));
  } else {
    y = _mm512_set1_ps(0.001877576675f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.00898934009f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.05582631805f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.240153617f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.6931530732f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.9999999251f));
  }
  return _mm512_scalef_ps(y, x);
}

#else

template <Precision>
inline Vec<float> exp2(const Vec<float>& x) {
  return (x * Vec<float>(0.693147181f)).exp_u20();
}

#endif

template <Precision>
inline Vec<double> exp2(const Vec<double>& x) {
  return (x * Vec<double>(0.69314718055994530942)).exp();
}

// Two vectors of one row, one behind the other.
template <typename T>
inline void store_row(T* dst, const Vec<T>& x0, const Vec<T>& x1) {
  x0.store(dst);
  x1.store(dst + Vec<T>::size());
}

#if defined(CPU_CAPABILITY_AVX512)

// fp32's bits with half of bf16's last place added: bf16 is the upper half. Ties go up, which at::vec rounds
// to even: one value in 65,536 is a tie, and both are as near. Saves three instructions of five.
inline __m512i rounded(const Vec<float>& x) {
  return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
}

// What rounding to bf16 loses.
inline Vec<float> bf16_remainder(const Vec<float>& x) {
  return x - Vec<float>(_mm512_castsi512_ps(_mm512_and_si512(rounded(x), _mm512_set1_epi32(0xffff0000))));
}

inline void store_row(at::BFloat16* dst, const Vec<float>& x0, const Vec<float>& x1) {
  // Of 64 half-words, every upper one.
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                      23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                      45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  _mm512_storeu_si512(dst, _mm512_permutex2var_epi16(rounded(x0), _mm512_load_si512(kUpper), rounded(x1)));
}

// A vector of row k and the same of row k + 1, in VNNI order.
inline void store_pair(at::BFloat16* dst, const Vec<float>& even, const Vec<float>& odd) {
  constexpr __mmask32 kUpperHalves = 0xaaaaaaaa;
  _mm512_storeu_si512(
      dst, _mm512_mask_blend_epi16(kUpperHalves, _mm512_srli_epi32(rounded(even), 16), rounded(odd)));
}

#else

// fp32's bits rounded to nearest even at bf16's last place: bf16 is their upper half.
inline uint32_t round_to_bf16(uint32_t bits) { return bits + 0x7fff + (bits >> 16 & 1); }

inline void store_row(at::BFloat16* dst, const Vec<float>& x0, const Vec<float>& x1) {
  constexpr int64_t size = Vec<float>::size();
  alignas(64) uint32_t bits[2 * size];
  x0.store(reinterpret_cast<float*>(bits));
  x1.store(reinterpret_cast<float*>(bits + size));
  auto* out = reinterpret_cast<uint16_t*>(dst);
  for (int64_t c = 0; c < 2 * size; ++c) {
    out[c] = static_cast<uint16_t>(round_to_bf16(bits[c]) >> 16);
  }
}

inline void store_pair(at::BFloat16* dst, const Vec<float>& even, const Vec<float>& odd) {
  constexpr int64_t size = Vec<float>::size();
  alignas(64) uint32_t low[size], high[size];
  even.store(reinterpret_cast<float*>(low));
  odd.store(reinterpret_cast<float*>(high));
  auto* out = reinterpret_cast<uint32_t*>(dst);
  for (int64_t c = 0; c < size; ++c) {
    out[c] = (round_to_bf16(low[c]) >> 16) | (round_to_bf16(high[c]) & 0xffff0000u);
  }
}

#endif

// Transposes 16 x 16 words in registers. at::vec's transpose_mxn took five times as long.
#if defined(CPU_CAPABILITY_AVX512)

inline void transpose_words(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// dst[d * ld_dst + i] = src[i * ld_src + d] of 16 x 16 elements.
inline void transpose_block(float* dst, int64_t ld_dst, const float* src, int64_t ld_src) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) {
    r[i] = _mm512_loadu_si512(src + i * ld_src);
  }
  transpose_words(r);
  for (int d = 0; d < 16; ++d) {
    _mm512_storeu_si512(dst + d * ld_dst, r[d]);
  }
}

// Of 32 sums [32 channels, 16 rows], `ld_src` apart, rows of 32 bf16 channels, each times its scale.
inline void store_transposed_block(at::BFloat16* dst, int64_t ld_dst, const float* src, int64_t ld_src,
                                   const float* scale) {
  constexpr __mmask32 kUpperHalves = 0xaaaaaaaa;
  const Vec<float> by = Vec<float>::loadu(scale);
  __m512i r[16];
  for (int i = 0; i < 16; ++i) {
    const Vec<float> even = Vec<float>::loadu(src + 2 * i * ld_src) * by;
    const Vec<float> odd = Vec<float>::loadu(src + (2 * i + 1) * ld_src) * by;
    r[i] = _mm512_mask_blend_epi16(kUpperHalves, _mm512_srli_epi32(rounded(even), 16), rounded(odd));
  }
  transpose_words(r);
  for (int i = 0; i < 16; ++i) {
    _mm512_storeu_si512(dst + i * ld_dst, r[i]);
  }
}

// The same of 16 sums in fp32.
inline void store_transposed_block(float* dst, int64_t ld_dst, const float* src, int64_t ld_src,
                                   const float* scale) {
  const Vec<float> by = Vec<float>::loadu(scale);
  __m512i r[16];
  for (int i = 0; i < 16; ++i) {
    r[i] = _mm512_castps_si512(Vec<float>::loadu(src + i * ld_src) * by);
  }
  transpose_words(r);
  for (int i = 0; i < 16; ++i) {
    _mm512_storeu_si512(dst + i * ld_dst, r[i]);
  }
}

// dst[d * ld_dst + i] = src[i * ld_src + d] of 32 x 32 bf16.
inline void transpose_block(at::BFloat16* dst, int64_t ld_dst, const at::BFloat16* src, int64_t ld_src) {
  alignas(64) static constexpr uint16_t kLower[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                      22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                                      44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
  const __m512i lower = _mm512_load_si512(kLower), upper = _mm512_add_epi16(lower, _mm512_set1_epi16(1));
  __m512i left[16], right[16];
  for (int i = 0; i < 16; ++i) {
    left[i] = _mm512_loadu_si512(src + i * ld_src);
    right[i] = _mm512_loadu_si512(src + (16 + i) * ld_src);
  }
  transpose_words(left);
  transpose_words(right);
  for (int i = 0; i < 16; ++i) {
    _mm512_storeu_si512(dst + 2 * i * ld_dst, _mm512_permutex2var_epi16(left[i], lower, right[i]));
    _mm512_storeu_si512(dst + (2 * i + 1) * ld_dst, _mm512_permutex2var_epi16(left[i], upper, right[i]));
  }
}

// 32 bf16 as fp32: those at even places, and those at odd ones. store_pair writes them back.
inline void load_split(const at::BFloat16* from, Vec<float>& even, Vec<float>& odd) {
  const __m512i words = _mm512_loadu_si512(from);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff0000)));
}

// Two rows of 32 bf16 in VNNI order, the columns at even places first. In their own order they cost three
// times as many instructions, and those on one port.
inline void interleave_split(at::BFloat16* dst, const at::BFloat16* even, const at::BFloat16* odd) {
  constexpr __mmask32 kUpperHalves = 0xaaaaaaaa;
  const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
  _mm512_storeu_si512(dst, _mm512_mask_blend_epi16(kUpperHalves, a, _mm512_slli_epi32(b, 16)));
  _mm512_storeu_si512(dst + 32, _mm512_mask_blend_epi16(kUpperHalves, _mm512_srli_epi32(a, 16), b));
}

// Two rows of 32 bf16 in VNNI order.
inline void interleave(at::BFloat16* dst, const at::BFloat16* even, const at::BFloat16* odd) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kFirst), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
  _mm512_storeu_si512(dst, _mm512_permutex2var_epi16(a, first, b));
  _mm512_storeu_si512(dst + 32, _mm512_permutex2var_epi16(a, second, b));
}

#else

inline void transpose_block(float* dst, int64_t ld_dst, const float* src, int64_t ld_src) {
  at::vec::transpose_mxn<float, 16, 16>(src, ld_src, dst, ld_dst);
}

#endif

// out[j] = the sum over the lanes of vector j, for 16 vectors one behind the other.
inline void sum_lanes(float* out, const float* vectors) {
#if defined(CPU_CAPABILITY_AVX512)
  alignas(64) float turned[256];
  transpose_block(turned, 16, vectors, 16);
  Vec<float> sums[4];
  for (int i = 0; i < 4; ++i) {
    sums[i] = (Vec<float>::loadu(turned + 64 * i) + Vec<float>::loadu(turned + 64 * i + 16)) +
              (Vec<float>::loadu(turned + 64 * i + 32) + Vec<float>::loadu(turned + 64 * i + 48));
  }
  ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(out);
#else
  for (int j = 0; j < 16; ++j) {
    out[j] = at::vec::vec_reduce_all<float>([](Vec<float> x, Vec<float> y) { return x + y; },
                                            Vec<float>::loadu(vectors + j * Vec<float>::size()));
  }
#endif
}

inline void sum_lanes(double* out, const double* vectors) {
  for (int j = 0; j < 16; ++j) {
    out[j] = at::vec::vec_reduce_all<double>([](Vec<double> x, Vec<double> y) { return x + y; },
                                             Vec<double>::loadu(vectors + j * Vec<double>::size()));
  }
}

// Two vectors of consecutive elements, as they lie or in fp32.
template <typename T>
inline void load_two(const T* from, Vec<T>& x0, Vec<T>& x1) {
  x0 = Vec<T>::loadu(from);
  x1 = Vec<T>::loadu(from + Vec<T>::size());
}
template <typename T>
  requires(!std::is_same_v<T, float>)
inline void load_two(const T* from, Vec<float>& x0, Vec<float>& x1) {
  std::tie(x0, x1) = at::vec::convert_to_float<T>(Vec<T>::loadu(from));
}

}  // namespace pyvlm::CPU_CAPABILITY
