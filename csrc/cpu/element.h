// Element types of the CPU kernels: storage, and one element's conversion to and from fp32 (round to nearest, ties to
// even).
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

namespace vlprune::cpu::VLPRUNE_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }
inline float to_float(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));  // infinity, NaN
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));           // normal
  const float subnormal = float(int32_t(magnitude)) * 0x1p-24f;                                  // exact
  return float_of(sign | bits_of(subnormal));
}

inline void from_float(float value, float* out) { *out = value; }
inline void from_float(float value, BFloat16* out) {
  const uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = nan ? 0x7fc0u : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void from_float(float value, Half* out) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // at least 65520 rounds to infinity
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;  // normal
  } else {
    // Adding 0.5 leaves exactly the bits of a subnormal half at the bottom of the sum, rounded by the adder.
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  }
  out->bits = uint16_t(sign | half);
}

template <typename Tag>
struct ElementOf;
template <>
struct ElementOf<DTypeTag<DType::kFloat32>> {
  using type = float;
};
template <>
struct ElementOf<DTypeTag<DType::kFloat16>> {
  using type = Half;
};
template <>
struct ElementOf<DTypeTag<DType::kBFloat16>> {
  using type = BFloat16;
};
template <typename Tag>
using Element = typename ElementOf<Tag>::type;

}  // namespace vlprune::cpu::VLPRUNE_ISA
