// What diverse_tokens chooses by: the same on every device.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace vlprune {

// Instead of the greatest similarity of a token: what keeps it behind all others, and out of the choice. Cosines, also
// rounded ones, are below.
constexpr float kLast = 2.0f, kNotCandidate = 3.0f, kChosen = 4.0f;
// Of a sum of squares from here on a token has no direction, and of one below kShortest it counts as zeros: no product
// of two tokens overflows, nor of two scales.
constexpr float kLongest = 0x1p126f, kShortest = 0x1p-126f;

// 1 / |x| from <x, x>: 0 for a token of zeros, NaN for one without a direction and for one that is no candidate.
VLPRUNE_HOST_DEVICE float cosine_scale(float norm_sq, bool candidate) {
  if (!candidate || !(norm_sq < kLongest)) return NAN;
  return norm_sq >= kShortest ? 1.0f / sqrtf(norm_sq) : 0.0f;
}

// What a token is first chosen by: `most` is its greatest cosine with another candidate.
VLPRUNE_HOST_DEVICE float first_closest(float most, float scale, bool candidate) {
  if (!candidate) return kNotCandidate;
  return scale == scale ? most : kLast;
}

}  // namespace vlprune
