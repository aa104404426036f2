// What match_tokens computes alike on every device: a length's inverse, and the number by which matches are compared.
#pragma once

#include <math.h>

#include <cstdint>

#include "host_device.h"

namespace vlprune {

// 1 / sqrt(square), 0 for 0; NaN for what is no square of a length in fp32: infinity and NaN.
VLPRUNE_HOST_DEVICE float inverse_length(float square) {
  if (square == 0.0f) return 0.0f;
  return square < INFINITY ? 1.0f / sqrtf(square) : NAN;
}

// The greater the similarity, then the lower the target's place, the greater; kNoMatch is less than all of a number.
constexpr uint64_t kNoMatch = 0;
VLPRUNE_HOST_DEVICE uint64_t match_number(uint32_t similarity_bits, uint32_t place) {
  const uint32_t ordered = similarity_bits >> 31 != 0 ? ~similarity_bits : similarity_bits | 0x80000000u;
  return uint64_t{ordered} << 32 | uint64_t{~place};
}
VLPRUNE_HOST_DEVICE uint32_t similarity_bits_of(uint64_t number) {
  const uint32_t ordered = static_cast<uint32_t>(number >> 32);
  return ordered >> 31 != 0 ? ordered & 0x7fffffffu : ~ordered;
}
VLPRUNE_HOST_DEVICE uint32_t place_of(uint64_t number) { return ~static_cast<uint32_t>(number); }

}  // namespace vlprune
