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
constexpr int64_t kTogether = 2 * kChunk;

#if VLPRUNE_ISA_IS_avx512

struct Lane {
  using F = Vec;
  using I = __m512i;
  static constexpr int64_t kCount = 16;

  static VLPRUNE_INLINE I integer(uint32_t value) { return _mm512_set1_epi32(int32_t(value)); }
  static VLPRUNE_INLINE I ascending(uint32_t first) {
    return add(integer(first), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  }
  // Counters at even and at odd places apart, each in the low half of 64 bits; what is above it does not count.
  struct Word {
    I even, odd;
  };
  static VLPRUNE_INLINE Word split(I a) { return {a, _mm512_srli_epi64(a, 32)}; }
  static VLPRUNE_INLINE I join(Word a) { return _mm512_mask_mov_epi32(a.even, 0xaaaa, _mm512_slli_epi64(a.odd, 32)); }
  static VLPRUNE_INLINE void product(Word a, uint32_t m, Word& high, Word& low) {
    low = {_mm512_mul_epu32(a.even, integer(m)), _mm512_mul_epu32(a.odd, integer(m))};
    high = {_mm512_srli_epi64(low.even, 32), _mm512_srli_epi64(low.odd, 32)};
  }
  static VLPRUNE_INLINE Word xor3(Word a, Word b, uint32_t c) {
    return {_mm512_ternarylogic_epi32(a.even, b.even, integer(c), 0x96),
            _mm512_ternarylogic_epi32(a.odd, b.odd, integer(c), 0x96)};
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
  struct Word {  // as above
    I even, odd;
  };
  static VLPRUNE_INLINE Word split(I a) { return {a, _mm256_srli_epi64(a, 32)}; }
  static VLPRUNE_INLINE I join(Word a) { return _mm256_blend_epi32(a.even, _mm256_slli_epi64(a.odd, 32), 0xaa); }
  static VLPRUNE_INLINE void product(Word a, uint32_t m, Word& high, Word& low) {
    low = {_mm256_mul_epu32(a.even, integer(m)), _mm256_mul_epu32(a.odd, integer(m))};
    high = {_mm256_srli_epi64(low.even, 32), _mm256_srli_epi64(low.odd, 32)};
  }
  static VLPRUNE_INLINE Word xor3(Word a, Word b, uint32_t c) {
    return {xor_(xor_(a.even, b.even), integer(c)), xor_(xor_(a.odd, b.odd), integer(c))};
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
  using Word = I;
  static VLPRUNE_INLINE Word split(I a) { return a; }
  static VLPRUNE_INLINE I join(Word a) { return a; }
  static VLPRUNE_INLINE void product(Word a, uint32_t m, Word& high, Word& low) {
    high = Word(uint64_t{a} * m >> 32);
    low = a * m;
  }
  static VLPRUNE_INLINE Word xor3(Word a, Word b, uint32_t c) { return a ^ b ^ c; }
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

// Two lanes in step, whose chains of operations hide each other's latency.
template <class L>
struct Twice {
  template <class V>
  struct Pair {
    V a, b;
  };
  using F = Pair<typename L::F>;
  using I = Pair<typename L::I>;
  using Word = Pair<typename L::Word>;

  static VLPRUNE_INLINE I integer(uint32_t value) { return {L::integer(value), L::integer(value)}; }
  static VLPRUNE_INLINE I add(I x, I y) { return {L::add(x.a, y.a), L::add(x.b, y.b)}; }
  static VLPRUNE_INLINE I xor_(I x, I y) { return {L::xor_(x.a, y.a), L::xor_(x.b, y.b)}; }
  static VLPRUNE_INLINE Word split(I x) { return {L::split(x.a), L::split(x.b)}; }
  static VLPRUNE_INLINE I join(Word x) { return {L::join(x.a), L::join(x.b)}; }
  static VLPRUNE_INLINE void product(Word x, uint32_t m, Word& high, Word& low) {
    L::product(x.a, m, high.a, low.a);
    L::product(x.b, m, high.b, low.b);
  }
  static VLPRUNE_INLINE Word xor3(Word x, Word y, uint32_t c) { return {L::xor3(x.a, y.a, c), L::xor3(x.b, y.b, c)}; }
  template <int n>
  static VLPRUNE_INLINE I shift_right(I x) {
    return {L::template shift_right<n>(x.a), L::template shift_right<n>(x.b)};
  }
  template <int n>
  static VLPRUNE_INLINE I shift_left(I x) {
    return {L::template shift_left<n>(x.a), L::template shift_left<n>(x.b)};
  }
  static VLPRUNE_INLINE F number(float value) { return {L::number(value), L::number(value)}; }
  static VLPRUNE_INLINE F add(F x, F y) { return {L::add(x.a, y.a), L::add(x.b, y.b)}; }
  static VLPRUNE_INLINE F sub(F x, F y) { return {L::sub(x.a, y.a), L::sub(x.b, y.b)}; }
  static VLPRUNE_INLINE F mul(F x, F y) { return {L::mul(x.a, y.a), L::mul(x.b, y.b)}; }
  static VLPRUNE_INLINE F sqrt(F x) { return {L::sqrt(x.a), L::sqrt(x.b)}; }
  static VLPRUNE_INLINE F from_int(I x) { return {L::from_int(x.a), L::from_int(x.b)}; }
  static VLPRUNE_INLINE I bits(F x) { return {L::bits(x.a), L::bits(x.b)}; }
  static VLPRUNE_INLINE F floating(I x) { return {L::floating(x.a), L::floating(x.b)}; }
  static VLPRUNE_INLINE F choose(I flag, F x, F y) {
    return {L::choose(flag.a, x.a, y.a), L::choose(flag.b, x.b, y.b)};
  }
};

VLPRUNE_INLINE void store_number(float* p, Lane::F z) {
#if VLPRUNE_ISA_IS_scalar
  *p = z;
#else
  store(p, z);
#endif
}

// z[0 .. kTogether) of chunks `chunk` and the next.
VLPRUNE_INLINE void numbers(int64_t chunk, uint64_t tensor, const RoundKeys& keys, float* z) {
  const uint64_t counter = uint64_t(chunk) * kCounters;
  const auto high = Lane::integer(uint32_t(counter >> 32));  // the same for both: chunk is even
  for (int64_t l = 0; l < kCounters; l += Lane::kCount) {
    const uint32_t low = uint32_t(counter) + uint32_t(l);
    Twice<Lane>::F four[4];
    normal4<Twice<Lane>>({Lane::ascending(low), Lane::ascending(low + kCounters)}, {high, high}, tensor, keys, four);
    for (int j = 0; j < 4; ++j) {
      store_number(z + kCounters * j + l, four[j].a);
      store_number(z + kChunk + kCounters * j + l, four[j].b);
    }
  }
}

template <typename T>
void run(const Perturb& args, int threads) {
  const T* const weight = static_cast<const T*>(args.weight);
  T* const plus = static_cast<T*>(args.plus);
  T* const minus = static_cast<T*>(args.minus);
  const int64_t pairs = (args.count + kTogether - 1) / kTogether;
  const RoundKeys keys(args.seed);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t pair = 0; pair < pairs; ++pair) {
    alignas(64) float z[kTogether];
    numbers(2 * pair, args.tensor, keys, z);
    const int64_t first = pair * kTogether;
    const int64_t size = args.count - first < kTogether ? args.count - first : kTogether;
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
