// plus = weight + eps z, minus = weight - eps z,  z ~ N(0, 1) of (seed, tensor, element) by philox.h
//
// Work is the sequence of chunks of 64 elements, those of 16 counters, dealt out to the threads; number j of counter
// 16 c + l belongs to element 64 c + 16 j + l, so that a vector of counters makes vectors of neighbours. Bytes moved:
// weight read once, plus and minus written once.
#include "cpu/isa.h"
#include "cpu/simd.h"
#include "philox.h"

namespace vlprune::cpu::VLPRUNE_ISA {
namespace {

constexpr int64_t kChunk = 64, kCounters = 16;

#if VLPRUNE_ISA_IS_avx512

struct Lane {
  using F = Vec;
  using I = __m512i;
  static constexpr int64_t kCount = 16;

  static VLPRUNE_INLINE I integer(uint32_t value) { return _mm512_set1_epi32(int32_t(value)); }
  static VLPRUNE_INLINE I ascending(uint32_t first) {
    return add(integer(first), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  }
  static VLPRUNE_INLINE I even(I a, I b) { return _mm512_mul_epu32(a, b); }
  static VLPRUNE_INLINE I odd(I a, I b) { return _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32)); }
  static VLPRUNE_INLINE I mulhi(I a, I b) {
    return _mm512_mask_mov_epi32(_mm512_srli_epi64(even(a, b), 32), 0xaaaa, odd(a, b));
  }
  static VLPRUNE_INLINE I mullo(I a, I b) {
    return _mm512_mask_mov_epi32(even(a, b), 0xaaaa, _mm512_slli_epi64(odd(a, b), 32));
  }
  static VLPRUNE_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static VLPRUNE_INLINE I xor_(I a, I b) { return _mm512_xor_si512(a, b); }
  template <int n>
  static VLPRUNE_INLINE I shift_right(I a) {
    return _mm512_srli_epi32(a, n);
  }
  template <int n>
  static VLPRUNE_INLINE I shift_left(I a) {
    return _mm512_slli_epi32(a, n);
  }
  static VLPRUNE_INLINE F number(float value) { return broadcast(value); }
  static VLPRUNE_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static VLPRUNE_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static VLPRUNE_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static VLPRUNE_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static VLPRUNE_INLINE F from_int(I a) { return _mm512_cvtepi32_ps(a); }
  static VLPRUNE_INLINE I bits(F a) { return _mm512_castps_si512(a); }
  static VLPRUNE_INLINE F floating(I a) { return _mm512_castsi512_ps(a); }
  static VLPRUNE_INLINE F choose(I flag, F a, F b) {
    return _mm512_mask_mov_ps(b, _mm512_test_epi32_mask(flag, flag), a);
  }
};

#elif VLPRUNE_ISA_IS_avx2

struct Lane {
  using F = Vec;
  using I = __m256i;
  static constexpr int64_t kCount = 8;

  static VLPRUNE_INLINE I integer(uint32_t value) { return _mm256_set1_epi32(int32_t(value)); }
  static VLPRUNE_INLINE I ascending(uint32_t first) {
    return add(integer(first), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
  }
  static VLPRUNE_INLINE I even(I a, I b) { return _mm256_mul_epu32(a, b); }
  static VLPRUNE_INLINE I odd(I a, I b) { return _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32)); }
  static VLPRUNE_INLINE I mulhi(I a, I b) {
    return _mm256_blend_epi32(_mm256_srli_epi64(even(a, b), 32), odd(a, b), 0xaa);
  }
  static VLPRUNE_INLINE I mullo(I a, I b) {
    return _mm256_blend_epi32(even(a, b), _mm256_slli_epi64(odd(a, b), 32), 0xaa);
  }
  static VLPRUNE_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static VLPRUNE_INLINE I xor_(I a, I b) { return _mm256_xor_si256(a, b); }
  template <int n>
  static VLPRUNE_INLINE I shift_right(I a) {
    return _mm256_srli_epi32(a, n);
  }
  template <int n>
  static VLPRUNE_INLINE I shift_left(I a) {
    return _mm256_slli_epi32(a, n);
  }
  static VLPRUNE_INLINE F number(float value) { return broadcast(value); }
  static VLPRUNE_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static VLPRUNE_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static VLPRUNE_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static VLPRUNE_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static VLPRUNE_INLINE F from_int(I a) { return _mm256_cvtepi32_ps(a); }
  static VLPRUNE_INLINE I bits(F a) { return _mm256_castps_si256(a); }
  static VLPRUNE_INLINE F floating(I a) { return _mm256_castsi256_ps(a); }
  static VLPRUNE_INLINE F choose(I flag, F a, F b) {
    return _mm256_blendv_ps(b, a, floating(_mm256_slli_epi32(flag, 31)));
  }
};

#else

struct Lane {
  using F = float;
  using I = uint32_t;
  static constexpr int64_t kCount = 1;

  static VLPRUNE_INLINE I integer(uint32_t value) { return value; }
  static VLPRUNE_INLINE I ascending(uint32_t first) { return first; }
  static VLPRUNE_INLINE I mulhi(I a, I b) { return I(uint64_t{a} * b >> 32); }
  static VLPRUNE_INLINE I mullo(I a, I b) { return a * b; }
  static VLPRUNE_INLINE I add(I a, I b) { return a + b; }
  static VLPRUNE_INLINE I xor_(I a, I b) { return a ^ b; }
  template <int n>
  static VLPRUNE_INLINE I shift_right(I a) {
    return a >> n;
  }
  template <int n>
  static VLPRUNE_INLINE I shift_left(I a) {
    return a << n;
  }
  static VLPRUNE_INLINE F number(float value) { return value; }
  static VLPRUNE_INLINE F add(F a, F b) { return a + b; }
  static VLPRUNE_INLINE F sub(F a, F b) { return a - b; }
  static VLPRUNE_INLINE F mul(F a, F b) { return a * b; }
  static VLPRUNE_INLINE F sqrt(F a) { return __builtin_sqrtf(a); }
  static VLPRUNE_INLINE F from_int(I a) { return float(int32_t(a)); }
  static VLPRUNE_INLINE I bits(F a) { return bits_of(a); }
  static VLPRUNE_INLINE F floating(I a) { return float_of(a); }
  static VLPRUNE_INLINE F choose(I flag, F a, F b) { return flag != 0 ? a : b; }
};

#endif

VLPRUNE_INLINE void store_number(float* p, Lane::F z) {
#if VLPRUNE_ISA_IS_scalar
  *p = z;
#else
  store(p, z);
#endif
}

// z[0 .. 64) of a chunk.
VLPRUNE_INLINE void numbers(int64_t chunk, const Perturb& args, float* z) {
  const uint64_t counter = uint64_t(chunk) * kCounters;
  for (int64_t l = 0; l < kCounters; l += Lane::kCount) {
    Lane::F four[4];
    normal4<Lane>(Lane::ascending(uint32_t(counter) + uint32_t(l)), Lane::integer(uint32_t(counter >> 32)), args.tensor,
                  args.seed, four);
    for (int j = 0; j < 4; ++j) store_number(z + kCounters * j + l, four[j]);
  }
}

template <typename T>
void run(const Perturb& args, int threads) {
  const T* const weight = static_cast<const T*>(args.weight);
  T* const plus = static_cast<T*>(args.plus);
  T* const minus = static_cast<T*>(args.minus);
  const int64_t chunks = (args.count + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    alignas(64) float z[kChunk];
    numbers(chunk, args, z);
    const int64_t first = chunk * kChunk;
    const int64_t size = args.count - first < kChunk ? args.count - first : kChunk;
    const Vec eps = broadcast(args.eps);
    const auto step = [&](int64_t i, auto... count) {
      const Vec w = load(weight + first + i, count...), change = mul(eps, load(z + i, count...));
      store(plus + first + i, add(w, change), count...);
      store(minus + first + i, sub(w, change), count...);
    };
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) step(i);
    if (i < size) step(i, size - i);
  }
}

}  // namespace

void perturb(const Perturb& args, int threads) {
  dispatch(args.dtype, [&](auto tag) { run<Element<decltype(tag)>>(args, threads); });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
