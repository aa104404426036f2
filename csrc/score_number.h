// What select_tokens orders by: the same on every device.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "ops.h"

namespace vlprune {

// number(score) of ops.h, from the bits of fp32 score.
VLPRUNE_HOST_DEVICE uint32_t score_number(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t number = bits > 0x80000000u ? bits : magnitude ^ 0x7fffffffu;
  return magnitude > 0x7f800000u ? kNoScore : number;
}

}  // namespace vlprune
