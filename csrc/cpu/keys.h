// What the selections order by: key = the bits of fp32 |w| * scale. Such floats are not negative and compare as
// unsigned integers; a NaN is above infinity.
#pragma once

#include "cpu/isa.h"
#include "cpu/simd.h"

namespace vlprune::cpu::VLPRUNE_ISA {

template <typename T>
VLPRUNE_INLINE uint32_t key_of(T weight, float scale) {
  return bits_of(to_float(weight) * scale) & 0x7fffffffu;
}

// A row of a weight and the scale of its columns (null: all 1).
template <typename T>
struct KeyRow {
  const T* weight;
  const float* scale;

  VLPRUNE_INLINE uint32_t operator[](int64_t i) const { return key_of(weight[i], scale == nullptr ? 1.0f : scale[i]); }
};

#if VLPRUNE_ISA_IS_avx512

using Bits = __m512i;
VLPRUNE_INLINE void store(uint32_t* p, Bits bits) { _mm512_storeu_si512(p, bits); }
template <typename T>
VLPRUNE_INLINE Bits keys_of(const T* weight, const float* scale) {
  const Vec w = load(weight);
  return _mm512_castps_si512(_mm512_abs_ps(scale == nullptr ? w : _mm512_mul_ps(w, load(scale))));
}
// The upper halves of 2 kLanes keys.
VLPRUNE_INLINE void store_high(uint16_t* p, Bits first, Bits second) {
  const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                       23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(first, odd, second));
}

#elif VLPRUNE_ISA_IS_avx2

using Bits = __m256i;
VLPRUNE_INLINE void store(uint32_t* p, Bits bits) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits); }
template <typename T>
VLPRUNE_INLINE Bits keys_of(const T* weight, const float* scale) {
  const Vec w = load(weight);
  const __m256i bits = _mm256_castps_si256(scale == nullptr ? w : _mm256_mul_ps(w, load(scale)));
  return _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
}
VLPRUNE_INLINE void store_high(uint16_t* p, Bits first, Bits second) {
  const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(first, 16), _mm256_srli_epi32(second, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

#endif

// keys[i] for i in [0, n).
template <typename T>
void load_keys(KeyRow<T> row, int64_t n, uint32_t* keys) {
  int64_t i = 0;
#if !VLPRUNE_ISA_IS_scalar
  for (; i + kLanes <= n; i += kLanes)
    store(keys + i, keys_of(row.weight + i, row.scale == nullptr ? nullptr : row.scale + i));
#endif
  for (; i < n; ++i) keys[i] = row[i];
}

// high[i] = key >> 16 for i in [0, n).
template <typename T>
void load_high_halves(KeyRow<T> row, int64_t n, uint16_t* high) {
  int64_t i = 0;
#if !VLPRUNE_ISA_IS_scalar
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const float* scale = row.scale == nullptr ? nullptr : row.scale + i;
    store_high(high + i, keys_of(row.weight + i, scale),
               keys_of(row.weight + i + kLanes, scale == nullptr ? nullptr : scale + kLanes));
  }
#endif
  for (; i < n; ++i) high[i] = uint16_t(row[i] >> 16);
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
