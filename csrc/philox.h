// Counter-based normal numbers, the same bits on every device and instruction set: Philox4x32-10 (Salmon et al.,
// Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) and Box-Muller with polynomials of our own.
//
// The same bits because each step is an integer operation or a single fp32 operation of IEEE 754 rounded to nearest:
// no fused multiply-add, no library function but the square root. A `Lane` supplies them, for one number or for a
// vector of them:
//   F, I                     fp32 and uint32
//   integer(uint32_t)        constant
//   add, xor_                of I
//   Word, split, join        what a round of Philox works on, and the way from I and back
//   product(Word, uint32_t, Word& high, Word& low)  both halves of the product
//   xor3(Word, Word, uint32_t)
//   shift_right<n>(I), shift_left<n>(I)  logical
//   number(float)            constant
//   add, sub, mul, sqrt      of F
//   from_int(I)              the value read as int32, rounded to nearest
//   bits(F), floating(I)     reinterpreted
//   choose(I flag, F a, F b) a where flag != 0, else b;  flag is 0 or 1
#pragma once

#include <cstdint>

#include "host_device.h"

namespace vlprune {

// What the 64-bit key adds to each round; the same for all counters.
struct RoundKeys {
  uint32_t first[10], second[10];

  VLPRUNE_HOST_DEVICE explicit RoundKeys(uint64_t seed) {
    for (uint32_t round = 0; round < 10; ++round) {
      first[round] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
      second[round] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
    }
  }
};

// The four words of counter (low, high, tensor) under the key.
template <class Lane>
VLPRUNE_HOST_DEVICE void philox4(typename Lane::I low, typename Lane::I high, uint64_t tensor, const RoundKeys& keys,
                                 typename Lane::I (&word)[4]) {
  using W = typename Lane::Word;
  W w0 = Lane::split(low), w1 = Lane::split(high);
  W w2 = Lane::split(Lane::integer(static_cast<uint32_t>(tensor)));
  W w3 = Lane::split(Lane::integer(static_cast<uint32_t>(tensor >> 32)));
  for (int round = 0; round < 10; ++round) {
    W high0, low0, high1, low1;
    Lane::product(w0, 0xD2511F53u, high0, low0);
    Lane::product(w2, 0xCD9E8D57u, high1, low1);
    w0 = Lane::xor3(high1, w1, keys.first[round]);
    w1 = low1;
    w2 = Lane::xor3(high0, w3, keys.second[round]);
    w3 = low0;
  }
  word[0] = Lane::join(w0);
  word[1] = Lane::join(w1);
  word[2] = Lane::join(w2);
  word[3] = Lane::join(w3);
}

// log(u) for u in (0, 1], to about 1e-7: u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
template <class Lane>
VLPRUNE_HOST_DEVICE typename Lane::F log_of(typename Lane::F u) {
  using F = typename Lane::F;
  using I = typename Lane::I;
  const I shifted = Lane::add(Lane::bits(u), Lane::integer(0x3f800000u - 0x3f3504f3u));
  const F e = Lane::from_int(Lane::add(Lane::template shift_right<23>(shifted), Lane::integer(0u - 127u)));
  const I mantissa =
      Lane::add(Lane::template shift_right<9>(Lane::template shift_left<9>(shifted)), Lane::integer(0x3f3504f3u));
  const F f = Lane::sub(Lane::floating(mantissa), Lane::number(1.0f));
  F p = Lane::number(-0.103494622f);
  p = Lane::add(Lane::mul(p, f), Lane::number(0.162782907f));
  p = Lane::add(Lane::mul(p, f), Lane::number(-0.172008142f));
  p = Lane::add(Lane::mul(p, f), Lane::number(0.198940799f));
  p = Lane::add(Lane::mul(p, f), Lane::number(-0.249734595f));
  p = Lane::add(Lane::mul(p, f), Lane::number(0.333350897f));
  p = Lane::add(Lane::mul(p, f), Lane::number(-0.500002861f));
  const F log1p = Lane::add(Lane::mul(Lane::mul(p, f), f), f);
  return Lane::add(Lane::mul(e, Lane::number(0.693147181f)), log1p);
}

// Two independent normal numbers of two random words: radius from all bits of the first, quadrant from the top two bits
// of the second, angle within +-45 degrees of its middle from the rest. |z| <= 6.7.
template <class Lane>
VLPRUNE_HOST_DEVICE void box_muller(typename Lane::I first, typename Lane::I second, typename Lane::F& z0,
                                    typename Lane::F& z1) {
  using F = typename Lane::F;
  using I = typename Lane::I;
  const F u = Lane::mul(Lane::add(Lane::from_int(Lane::template shift_right<1>(first)), Lane::number(0.5f)),
                        Lane::number(0x1p-31f));
  const F radius = Lane::sqrt(Lane::mul(Lane::number(-2.0f), log_of<Lane>(u)));

  const F a = Lane::mul(Lane::from_int(Lane::template shift_left<2>(second)), Lane::number(0.785398163f * 0x1p-31f));
  const F a2 = Lane::mul(a, a);
  F s = Lane::number(-1.95175939e-4f);
  s = Lane::add(Lane::mul(s, a2), Lane::number(8.33218079e-3f));
  s = Lane::add(Lane::mul(s, a2), Lane::number(-0.166666552f));
  const F sine = Lane::add(Lane::mul(Lane::mul(s, a2), a), a);
  F c = Lane::number(-1.35980872e-3f);
  c = Lane::add(Lane::mul(c, a2), Lane::number(4.16563191e-2f));
  c = Lane::add(Lane::mul(c, a2), Lane::number(-0.499998957f));
  const F cosine = Lane::add(Lane::mul(c, a2), Lane::number(1.0f));

  // A quarter turn takes (cos, sin) to (-sin, cos).
  const I quarter = Lane::template shift_right<31>(Lane::template shift_left<1>(second));
  const I half = Lane::template shift_right<31>(second);
  const F x = Lane::choose(quarter, sine, cosine), y = Lane::choose(quarter, cosine, sine);
  const I flip_y = Lane::template shift_left<31>(half);
  const I flip_x = Lane::template shift_left<31>(Lane::xor_(quarter, half));
  z0 = Lane::mul(radius, Lane::floating(Lane::xor_(Lane::bits(x), flip_x)));
  z1 = Lane::mul(radius, Lane::floating(Lane::xor_(Lane::bits(y), flip_y)));
}

// Four normal numbers of counter `low + 2^32 high` of a tensor's stream.
template <class Lane>
VLPRUNE_HOST_DEVICE void normal4(typename Lane::I low, typename Lane::I high, uint64_t tensor, const RoundKeys& keys,
                                 typename Lane::F (&z)[4]) {
  typename Lane::I word[4];
  philox4<Lane>(low, high, tensor, keys, word);
  box_muller<Lane>(word[0], word[1], z[0], z[1]);
  box_muller<Lane>(word[2], word[3], z[2], z[3]);
}

}  // namespace vlprune
