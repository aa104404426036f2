// One vector of floats for each instruction set, and what the kernels do with it. kRows x (kVectors * kLanes) is the
// tile of results that the matrix product keeps in registers.
#pragma once

#include "cpu/element.h"

#if VLPRUNE_ISA_IS_avx512 || VLPRUNE_ISA_IS_avx2
#include <immintrin.h>
#endif

#define VLPRUNE_INLINE inline __attribute__((always_inline))

namespace vlprune::cpu::VLPRUNE_ISA {

// Product and sum of one score, with the rounding of fmadd() below.
VLPRUNE_INLINE float madd(float a, float b, float c) {
#if VLPRUNE_ISA_IS_scalar
  return a * b + c;
#else
  return __builtin_fmaf(a, b, c);
#endif
}

#if VLPRUNE_ISA_IS_avx512

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kRows = 9, kVectors = 3;  // 27 accumulators, three operands, one broadcast: 31 of 32 registers

VLPRUNE_INLINE Vec zero() { return _mm512_setzero_ps(); }
VLPRUNE_INLINE Vec broadcast(float value) { return _mm512_set1_ps(value); }
VLPRUNE_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
VLPRUNE_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
VLPRUNE_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
VLPRUNE_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
VLPRUNE_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
VLPRUNE_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
VLPRUNE_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
VLPRUNE_INLINE Vec minimum(Vec a, Vec b) { return _mm512_min_ps(a, b); }  // b where either is NaN
VLPRUNE_INLINE Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // likewise
VLPRUNE_INLINE Vec times_power(Vec v, Vec n) { return _mm512_scalef_ps(v, n); }

VLPRUNE_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }

VLPRUNE_INLINE Vec widen(__m256i bits, Half) { return _mm512_cvtph_ps(bits); }
VLPRUNE_INLINE Vec widen(__m256i bits, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
VLPRUNE_INLINE __m256i narrow(Vec v, Half) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VLPRUNE_INLINE __m256i narrow(Vec v, BFloat16) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

VLPRUNE_INLINE Vec load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
VLPRUNE_INLINE void store(float* p, Vec v, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), v); }
template <typename T>
VLPRUNE_INLINE Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <typename T>
VLPRUNE_INLINE Vec load(const T* p, int64_t count) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(count), p), T{});
}
template <typename T>
VLPRUNE_INLINE void store(T* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, T{}));
}
template <typename T>
VLPRUNE_INLINE void store(T* p, Vec v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), narrow(v, T{}));
}

// Bit i of the result: lane i is greater than / not comparable with itself.
VLPRUNE_INLINE uint32_t greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
VLPRUNE_INLINE uint32_t is_nan(Vec a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }

VLPRUNE_INLINE void transpose(Vec (&m)[16]) {
  Vec t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(m[2 * i], m[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(m[2 * i], m[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d lo = _mm512_castps_pd(t[4 * i]), lo2 = _mm512_castps_pd(t[4 * i + 2]);
    const __m512d hi = _mm512_castps_pd(t[4 * i + 1]), hi2 = _mm512_castps_pd(t[4 * i + 3]);
    m[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, lo2));
    m[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, lo2));
    m[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(hi, hi2));
    m[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(hi, hi2));
  }
  // m[4i + j] now holds, in its 128-bit part q, column 4q + j of rows 4i .. 4i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_f32x4(m[j], m[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_f32x4(m[j], m[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_f32x4(m[8 + j], m[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(m[8 + j], m[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    m[j] = _mm512_shuffle_f32x4(t[j], t[8 + j], 0x88);
    m[8 + j] = _mm512_shuffle_f32x4(t[j], t[8 + j], 0xdd);
    m[4 + j] = _mm512_shuffle_f32x4(t[4 + j], t[12 + j], 0x88);
    m[12 + j] = _mm512_shuffle_f32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

#else  // avx2 and scalar: whole vectors natively, parts of one through a buffer

#if VLPRUNE_ISA_IS_avx2

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kRows = 6, kVectors = 2;  // 12 accumulators, two operands, one broadcast: 15 of 16 registers

VLPRUNE_INLINE Vec zero() { return _mm256_setzero_ps(); }
VLPRUNE_INLINE Vec broadcast(float value) { return _mm256_set1_ps(value); }
VLPRUNE_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
VLPRUNE_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
VLPRUNE_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
VLPRUNE_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
VLPRUNE_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
VLPRUNE_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
VLPRUNE_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
VLPRUNE_INLINE Vec minimum(Vec a, Vec b) { return _mm256_min_ps(a, b); }  // b where either is NaN
VLPRUNE_INLINE Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // likewise
VLPRUNE_INLINE Vec times_power(Vec v, Vec n) {  // v * 2^n for a whole n in -252 .. 254, in two steps
  const __m256i power = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(power, 1), one = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, one), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(power, half), one), 23);
  return _mm256_mul_ps(_mm256_mul_ps(v, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

VLPRUNE_INLINE Vec widen(__m128i bits, Half) { return _mm256_cvtph_ps(bits); }
VLPRUNE_INLINE Vec widen(__m128i bits, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
VLPRUNE_INLINE __m128i narrow(Vec v, Half) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VLPRUNE_INLINE __m128i narrow(Vec v, BFloat16) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
template <typename T>
VLPRUNE_INLINE Vec load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <typename T>
VLPRUNE_INLINE void store(T* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, T{}));
}

VLPRUNE_INLINE uint32_t greater(Vec a, Vec b) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ))); }
VLPRUNE_INLINE uint32_t is_nan(Vec a) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q))); }

VLPRUNE_INLINE void transpose(Vec (&m)[8]) {
  Vec t[8];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Vec lo = _mm256_unpacklo_ps(m[4 * i], m[4 * i + 1]), hi = _mm256_unpackhi_ps(m[4 * i], m[4 * i + 1]);
    const Vec lo2 = _mm256_unpacklo_ps(m[4 * i + 2], m[4 * i + 3]),
              hi2 = _mm256_unpackhi_ps(m[4 * i + 2], m[4 * i + 3]);
    t[4 * i] = _mm256_shuffle_ps(lo, lo2, 0x44);
    t[4 * i + 1] = _mm256_shuffle_ps(lo, lo2, 0xee);
    t[4 * i + 2] = _mm256_shuffle_ps(hi, hi2, 0x44);
    t[4 * i + 3] = _mm256_shuffle_ps(hi, hi2, 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    m[j] = _mm256_permute2f128_ps(t[j], t[4 + j], 0x20);
    m[4 + j] = _mm256_permute2f128_ps(t[j], t[4 + j], 0x31);
  }
}

#else  // scalar: four floats at a time in the compiler's own vector type, which every CPU can run

typedef float Vec __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kRows = 4, kVectors = 2;

VLPRUNE_INLINE Vec broadcast(float value) { return Vec{value, value, value, value}; }
VLPRUNE_INLINE Vec zero() { return broadcast(0.0f); }
template <typename T>
VLPRUNE_INLINE Vec load(const T* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <typename T>
VLPRUNE_INLINE void store(T* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
}
VLPRUNE_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return a * b + c; }
VLPRUNE_INLINE Vec add(Vec a, Vec b) { return a + b; }
VLPRUNE_INLINE Vec sub(Vec a, Vec b) { return a - b; }
VLPRUNE_INLINE Vec mul(Vec a, Vec b) { return a * b; }
VLPRUNE_INLINE Vec div(Vec a, Vec b) { return a / b; }
VLPRUNE_INLINE Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
VLPRUNE_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
VLPRUNE_INLINE Vec times_power(Vec v, Vec n) {
  typedef int32_t Whole __attribute__((vector_size(16)));
  const Whole power = __builtin_convertvector(n, Whole), half = power >> 1;
  const Whole first = (half + 127) << 23, second = (power - half + 127) << 23;
  Vec low, high;
  std::memcpy(&low, &first, sizeof low);
  std::memcpy(&high, &second, sizeof high);
  return v * low * high;
}

VLPRUNE_INLINE uint32_t greater(Vec a, Vec b) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= uint32_t(a[i] > b[i]) << i;
  return mask;
}
VLPRUNE_INLINE uint32_t is_nan(Vec a) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= uint32_t(a[i] != a[i]) << i;
  return mask;
}

VLPRUNE_INLINE void transpose(Vec (&m)[4]) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float swapped = m[i][j];
      m[i][j] = m[j][i];
      m[j][i] = swapped;
    }
}

#endif

template <typename T>
VLPRUNE_INLINE Vec load(const T* p, int64_t count) {
  T part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}
template <typename T>
VLPRUNE_INLINE void store(T* p, Vec v, int64_t count) {
  T part[kLanes];
  store(part, v);
  for (int64_t i = 0; i < count; ++i) p[i] = part[i];
}

#endif

constexpr int kColumns = kVectors * kLanes;

}  // namespace vlprune::cpu::VLPRUNE_ISA
