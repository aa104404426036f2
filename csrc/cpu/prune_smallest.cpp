// weight[i, j] = 0 for the k least keys of row i, ties to the lower index;  key = bits of fp32 |weight| * scale
//
// Work is the sequence of rows, dealt out to the threads a few at a time. A row: write the upper halves of its keys to
// L1 (2 bytes each), find the half T of the k-th key by counting how many lie below this and that (about 6 passes over
// the halves, around the T of the row before, while the next row is fetched), drop all below T, then find the k-th
// among the few that share T the same way, by their lower halves. Bytes moved: weight read once and written once; the
// rest stays in L1 up to 10,000 columns or so.
#include "cpu/isa.h"
#include "cpu/keys.h"
#include "cpu/simd.h"

namespace vlprune::cpu::VLPRUNE_ISA {
namespace {

// A row is halves [in], then what shares the threshold: their lower halves [in] and indices [in].
constexpr int64_t kWidest = kScratchFloats * int64_t{sizeof(float)} / 8;

// How many of values[0 .. n) are less than limit.
int64_t count_below(const uint16_t* values, int64_t n, uint16_t limit) {
  int64_t count = 0, i = 0;
#if VLPRUNE_ISA_IS_avx512
  const __m512i limits = _mm512_set1_epi16(int16_t(limit));
  int64_t counts[2] = {};
  for (; i + 64 <= n; i += 64) {
    counts[0] += __builtin_popcount(_mm512_cmplt_epu16_mask(_mm512_loadu_si512(values + i), limits));
    counts[1] += __builtin_popcount(_mm512_cmplt_epu16_mask(_mm512_loadu_si512(values + i + 32), limits));
  }
  count = counts[0] + counts[1];
  for (; i < n; i += 32) {
    const __mmask32 valid = n - i >= 32 ? ~0u : (1u << (n - i)) - 1u;
    count +=
        __builtin_popcount(_mm512_mask_cmplt_epu16_mask(valid, _mm512_maskz_loadu_epi16(valid, values + i), limits));
  }
#else
#if VLPRUNE_ISA_IS_avx2
  if (limit == 0) return 0;
  const __m256i last = _mm256_set1_epi16(int16_t(limit - 1));
  while (i + 16 <= n) {  // 16-bit counters: flushed before they can overflow
    const int64_t end = i + 16 * 32767 < n - 15 ? i + 16 * 32767 : n - 15;
    __m256i counts = _mm256_setzero_si256();
    for (; i < end; i += 16) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
      counts = _mm256_sub_epi16(counts, _mm256_cmpeq_epi16(_mm256_min_epu16(v, last), v));
    }
    const __m256i pairs = _mm256_madd_epi16(counts, _mm256_set1_epi16(1));
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), pairs);
    for (int32_t lane : lanes) count += lane;
  }
#endif
  for (; i < n; ++i) count += values[i] < limit ? 1 : 0;
#endif
  return count;
}

// Where the k-th of values[0 .. n) (from 0, ascending) lies, with 0 <= k < n.
struct Place {
  uint16_t value;
  int64_t below;  // how many are less
};

// Looks around `guess` first, at twice the distance each time, and bisects what is left. Values lie below `end`.
// Meanwhile the `bytes` bytes in front of `ahead` are fetched: what the thread wants next.
Place find(const uint16_t* values, int64_t n, int64_t k, int32_t end, int32_t guess, const char* ahead, int64_t bytes) {
  int32_t low = 0, step = 4, next = guess;
  int64_t below_low = 0;
  const int64_t share = bytes / 4 + 63;
  bool above = false, under = false;
  while (end - low > 1) {
    for (int64_t left = bytes > share ? bytes - share : 0; bytes > left; bytes -= 64, ahead -= 64)
      __builtin_prefetch(ahead - 64, 1);
    const int64_t below = count_below(values, n, uint16_t(next));
    if (below <= k) {
      low = next, below_low = below, above = true;
    } else {
      end = next, under = true;
    }
    next = above && !under ? low + step : under && !above ? end - step : 0;
    step *= 2;
    if (next <= low || next >= end) next = low + (end - low) / 2;
  }
  return {uint16_t(low), below_low};
}

// Where the results go: zeros in the weight, or ones in a mask.
template <typename T>
struct Target {
  T* weight;
  uint8_t* mask;

  VLPRUNE_INLINE void drop(int64_t i) const {
    if (mask != nullptr) {
      mask[i] = 1;
    } else {
      weight[i] = T{};
    }
  }

  // Drops what has a half below limit; with a mask, the rest becomes 0.
  void drop_below(const uint16_t* high, int64_t n, uint16_t limit) const {
    int64_t i = 0;
    if (mask != nullptr) {
      for (; i < n; ++i) mask[i] = high[i] < limit ? 1 : 0;
      return;
    }
#if VLPRUNE_ISA_IS_avx512
    const __m512i limits = _mm512_set1_epi16(int16_t(limit));
    for (; i + 32 <= n; i += 32) {
      const __mmask32 kept = _mm512_cmpge_epu16_mask(_mm512_loadu_si512(high + i), limits);
      if constexpr (sizeof(T) == 2) {
        _mm512_storeu_si512(weight + i, _mm512_maskz_loadu_epi16(kept, weight + i));
      } else {
        _mm512_storeu_ps(weight + i, _mm512_maskz_loadu_ps(__mmask16(kept), weight + i));
        _mm512_storeu_ps(weight + i + 16, _mm512_maskz_loadu_ps(__mmask16(kept >> 16), weight + i + 16));
      }
    }
#elif VLPRUNE_ISA_IS_avx2
    const __m256i limits = _mm256_set1_epi16(int16_t(limit));
    for (; i + 16 <= n; i += 16) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high + i));
      const __m256i kept = _mm256_cmpeq_epi16(_mm256_max_epu16(v, limits), v);
      if constexpr (sizeof(T) == 2) {
        __m256i* p = reinterpret_cast<__m256i*>(weight + i);
        _mm256_storeu_si256(p, _mm256_and_si256(kept, _mm256_loadu_si256(p)));
      } else {
        for (int half = 0; half < 2; ++half) {
          float* p = weight + i + 8 * half;
          const __m128i part = half == 0 ? _mm256_castsi256_si128(kept) : _mm256_extracti128_si256(kept, 1);
          const __m256 wide = _mm256_castsi256_ps(_mm256_cvtepi16_epi32(part));
          _mm256_storeu_ps(p, _mm256_and_ps(wide, _mm256_loadu_ps(p)));
        }
      }
    }
#endif
    for (; i < n; ++i)
      if (high[i] < limit) weight[i] = T{};
  }
};

// indices[0 .. count) of what equals value, ascending; returns count.
int64_t find_equal(const uint16_t* values, int64_t n, uint16_t value, uint32_t* indices) {
  int64_t count = 0, i = 0;
#if VLPRUNE_ISA_IS_avx512
  const __m512i wanted = _mm512_set1_epi16(int16_t(value));
  for (; i + 32 <= n; i += 32) {
    uint32_t equal = _mm512_cmpeq_epi16_mask(_mm512_loadu_si512(values + i), wanted);
    for (; equal != 0; equal &= equal - 1) indices[count++] = uint32_t(i) + uint32_t(__builtin_ctz(equal));
  }
#elif VLPRUNE_ISA_IS_avx2
  const __m256i wanted = _mm256_set1_epi16(int16_t(value));
  for (; i + 16 <= n; i += 16) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
    uint32_t equal = uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi16(v, wanted))) & 0x55555555u;
    for (; equal != 0; equal &= equal - 1) indices[count++] = uint32_t(i) + uint32_t(__builtin_ctz(equal)) / 2;
  }
#endif
  for (; i < n; ++i)
    if (values[i] == value) indices[count++] = uint32_t(i);
  return count;
}

template <typename T>
void prune_row(KeyRow<T> row, Target<T> target, int64_t n, int64_t k, const T* next_row, int32_t& guess) {
  if (k == 0 || k == n) {
    for (int64_t i = 0; i < n; ++i) {
      if (target.mask != nullptr) target.mask[i] = k == n ? 1 : 0;
      if (target.mask == nullptr && k == n) target.weight[i] = T{};
    }
    return;
  }
  uint16_t* const high = reinterpret_cast<uint16_t*>(scratch());
  uint32_t* const indices = reinterpret_cast<uint32_t*>(scratch()) + (n + 1) / 2;
  uint16_t* const low = reinterpret_cast<uint16_t*>(indices + n);
  load_high_halves(row, n, high);
  const int64_t bytes = next_row == nullptr ? 0 : n * int64_t{sizeof(T)};
  const Place upper = find(high, n, k, 1 << 15, guess, reinterpret_cast<const char*>(next_row) + bytes, bytes);
  guess = upper.value > 0 ? upper.value : 1;  // rows of one matrix are much alike
  int64_t left = k - upper.below;             // to drop among those that share the half
  const int64_t sharing = left > 0 ? find_equal(high, n, upper.value, indices) : 0;
  for (int64_t i = 0; i < sharing; ++i) low[i] = uint16_t(row[indices[i]]);
  target.drop_below(high, n, upper.value);
  if (left == 0) return;
  const Place lower = find(low, sharing, left, 1 << 16, 1 << 15, nullptr, 0);
  int64_t ties = left - lower.below;
  for (int64_t i = 0; i < sharing; ++i) {
    if (low[i] < lower.value || (low[i] == lower.value && ties-- > 0)) target.drop(indices[i]);
  }
}

// The same for a row too wide for the scratch memory: 31 passes over the row itself.
template <typename T>
void prune_wide_row(KeyRow<T> row, Target<T> target, int64_t n, int64_t k) {
  uint32_t threshold = 0;
  int64_t below = 0;
  for (int bit = 30; bit >= 0; --bit) {
    const uint32_t candidate = threshold | 1u << bit;
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += row[i] < candidate ? 1 : 0;
    if (count <= k) threshold = candidate, below = count;
  }
  int64_t ties = k - below;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = row[i];
    if (target.mask != nullptr) target.mask[i] = 0;
    if (key < threshold || (key == threshold && ties-- > 0)) target.drop(i);
  }
}

template <typename T>
void run(const PruneSmallest& args, int threads) {
  const Keys& keys = args.keys;
#pragma omp parallel num_threads(threads)
  {
    int32_t guess = 1 << 14;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < keys.out; ++i) {
      const KeyRow<T> row{static_cast<const T*>(keys.weight) + i * keys.stride, keys.scale};
      const Target<T> target{args.mask != nullptr ? nullptr : static_cast<T*>(args.weight) + i * keys.stride,
                             args.mask != nullptr ? args.mask + i * keys.in : nullptr};
      const int64_t k = args.k_of_row != nullptr ? args.k_of_row[i] : args.k;
      if (keys.in <= kWidest - 2) {
        prune_row(row, target, keys.in, k, i + 1 < keys.out ? row.weight + keys.stride : nullptr, guess);
      } else {
        prune_wide_row(row, target, keys.in, k);
      }
    }
  }
}

}  // namespace

void prune_smallest(const PruneSmallest& args, int threads) {
  dispatch(args.keys.dtype, [&](auto tag) { run<Element<decltype(tag)>>(args, threads); });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
