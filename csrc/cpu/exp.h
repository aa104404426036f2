// exp of a vector: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial in r (S. Moshier's expf, Cephes), times 2^n.
//
// Within 2 units in the last place of e^x, subnormal results too; 0 below -104, infinity above 89, NaN for NaN. The
// tests walk over it.
#pragma once

#include "cpu/simd.h"

namespace vlprune::cpu::VLPRUNE_ISA {

VLPRUNE_INLINE Vec exp(Vec x) {
  // Beyond these, e^x rounds to 0 and to infinity by itself.
  x = minimum(broadcast(89.0f), maximum(broadcast(-104.0f), x));
  const Vec rounder = broadcast(0x1.8p23f);  // added to a small number, it leaves no bits below the point
  const Vec n = sub(fmadd(x, broadcast(0x1.715476p+0f), rounder), rounder);
  // ln 2 in two parts: n times the first, of 9 bits, is exact, with and without fused multiply-adds.
  Vec r = fmadd(n, broadcast(-0.693359375f), x);
  r = fmadd(n, broadcast(2.12194440e-4f), r);
  Vec sum = broadcast(1.9875691500e-4f);
  sum = fmadd(sum, r, broadcast(1.3981999507e-3f));
  sum = fmadd(sum, r, broadcast(8.3334519073e-3f));
  sum = fmadd(sum, r, broadcast(4.1665795894e-2f));
  sum = fmadd(sum, r, broadcast(1.6666665459e-1f));
  sum = fmadd(sum, r, broadcast(5.0000001201e-1f));
  sum = add(fmadd(sum, mul(r, r), r), broadcast(1.0f));
  return times_power(sum, n);
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
