// weight[i, j] = 0 for the n least keys of every m consecutive ones of row i, ties to the lower index;
// key = bits of fp32 |weight| * scale
//
// Work is the sequence of rows, dealt out to the threads. Where m is a power of two that divides a vector, a key counts
// in registers how many of its group come before it: m - 1 rotations within the groups; it goes where they are fewer
// than n. Other m: the same count, one key at a time. Bytes moved: weight read once, written once.
#include "cpu/isa.h"
#include "cpu/keys.h"
#include "cpu/simd.h"

namespace vlprune::cpu::VLPRUNE_ISA {
namespace {

constexpr int64_t kPart = 8192;  // keys of a row at a time, at least one group

#if VLPRUNE_ISA_IS_avx512

// Bit i: key i is among the n least of its m.
template <int M>
VLPRUNE_INLINE uint32_t least(Bits keys, int64_t n) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i in_group = _mm512_and_si512(lane, _mm512_set1_epi32(M - 1));
  const __m512i group = _mm512_sub_epi32(lane, in_group);
  __m512i before = _mm512_setzero_si512();
#pragma GCC unroll 16
  for (int r = 1; r < M; ++r) {
    const __m512i other = _mm512_and_si512(_mm512_add_epi32(in_group, _mm512_set1_epi32(r)), _mm512_set1_epi32(M - 1));
    const __m512i key = _mm512_permutexvar_epi32(_mm512_add_epi32(group, other), keys);
    // An equal key comes first if its index is lower: then compare with one more.
    const __m512i more = _mm512_maskz_set1_epi32(_mm512_cmplt_epi32_mask(other, in_group), 1);
    const __mmask16 first = _mm512_cmplt_epu32_mask(key, _mm512_add_epi32(keys, more));
    before = _mm512_mask_add_epi32(before, first, before, _mm512_set1_epi32(1));
  }
  return _mm512_cmplt_epi32_mask(before, _mm512_set1_epi32(int32_t(n)));
}

template <typename T>
VLPRUNE_INLINE void zero(T* weight, uint32_t dropped) {
  const __mmask16 kept = __mmask16(~dropped);
  if constexpr (sizeof(T) == 2) {
    __m256i* const p = reinterpret_cast<__m256i*>(weight);
    _mm256_storeu_si256(p, _mm256_maskz_loadu_epi16(kept, weight));
  } else {
    _mm512_storeu_ps(weight, _mm512_maskz_loadu_ps(kept, weight));
  }
}

#elif VLPRUNE_ISA_IS_avx2

template <int M>
VLPRUNE_INLINE uint32_t least(Bits keys, int64_t n) {
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i in_group = _mm256_and_si256(lane, _mm256_set1_epi32(M - 1));
  const __m256i group = _mm256_sub_epi32(lane, in_group);
  __m256i before = _mm256_setzero_si256();
  keys = _mm256_min_epu32(keys, _mm256_set1_epi32(0x7ffffffe));  // the compare is signed, and one is added
#pragma GCC unroll 8
  for (int r = 1; r < M; ++r) {
    const __m256i other = _mm256_and_si256(_mm256_add_epi32(in_group, _mm256_set1_epi32(r)), _mm256_set1_epi32(M - 1));
    const __m256i key = _mm256_permutevar8x32_epi32(keys, _mm256_add_epi32(group, other));
    const __m256i more = _mm256_srli_epi32(_mm256_cmpgt_epi32(in_group, other), 31);
    before = _mm256_sub_epi32(before, _mm256_cmpgt_epi32(_mm256_add_epi32(keys, more), key));
  }
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(n)), before))));
}

template <typename T>
VLPRUNE_INLINE void zero(T* weight, uint32_t dropped) {
  const __m256i bit = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(int32_t(dropped)), bit);
  const __m256i kept = _mm256_cmpeq_epi32(chosen, _mm256_setzero_si256());
  if constexpr (sizeof(T) == 2) {
    __m128i* const p = reinterpret_cast<__m128i*>(weight);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
    _mm_storeu_si128(p, _mm_and_si128(words, _mm_loadu_si128(p)));
  } else {
    _mm256_storeu_ps(weight, _mm256_and_ps(_mm256_castsi256_ps(kept), _mm256_loadu_ps(weight)));
  }
}

#endif

#if !VLPRUNE_ISA_IS_scalar
// As many whole vectors of the row as there are; returns where they end.
template <int M, typename T>
int64_t prune_vectors(KeyRow<T> row, T* weight, uint8_t* mask, int64_t columns, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    const uint32_t dropped = least<M>(keys_of(row.weight + i, row.scale == nullptr ? nullptr : row.scale + i), n);
    if (mask == nullptr) {
      zero(weight + i, dropped);
    } else {
      for (int lane = 0; lane < kLanes; ++lane) mask[i + lane] = uint8_t(dropped >> lane & 1u);
    }
  }
  return i;
}
#endif

template <typename T>
void prune_row(KeyRow<T> row, T* weight, uint8_t* mask, int64_t columns, int64_t n, int64_t m) {
  int64_t i = 0;
#if !VLPRUNE_ISA_IS_scalar
  if (m == 2) i = prune_vectors<2>(row, weight, mask, columns, n);
  if (m == 4) i = prune_vectors<4>(row, weight, mask, columns, n);
  if (m == 8) i = prune_vectors<8>(row, weight, mask, columns, n);
#if VLPRUNE_ISA_IS_avx512
  if (m == 16) i = prune_vectors<16>(row, weight, mask, columns, n);
#endif
#endif
  uint32_t* const keys = reinterpret_cast<uint32_t*>(scratch());
  const int64_t part = m <= kPart ? kPart / m * m : m;
  for (; i < columns; i += part) {
    const int64_t size = part < columns - i ? part : columns - i;
    load_keys(KeyRow<T>{row.weight + i, row.scale == nullptr ? nullptr : row.scale + i}, size, keys);
    for (int64_t j = 0; j < size; ++j) {
      const int64_t group = j / m * m;
      int64_t before = 0;
      for (int64_t other = group; other < group + m; ++other)
        before += keys[other] < keys[j] || (keys[other] == keys[j] && other < j) ? 1 : 0;
      if (mask != nullptr) mask[i + j] = before < n ? 1 : 0;
      if (mask == nullptr && before < n) weight[i + j] = T{};
    }
  }
}

template <typename T>
void run(const PruneNM& args, int threads) {
  const Keys& keys = args.keys;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < keys.out; ++i) {
    const KeyRow<T> row{static_cast<const T*>(keys.weight) + i * keys.stride, keys.scale};
    prune_row(row, args.mask != nullptr ? nullptr : static_cast<T*>(args.weight) + i * keys.stride,
              args.mask != nullptr ? args.mask + i * keys.in : nullptr, keys.in, args.n, args.m);
  }
}

}  // namespace

void prune_nm(const PruneNM& args, int threads) {
  dispatch(args.keys.dtype, [&](auto tag) { run<Element<decltype(tag)>>(args, threads); });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
