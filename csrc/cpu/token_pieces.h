// How compact_tokens and merge_tokens share out the kept tokens of some tensors.
#pragma once

#include "cpu/isa.h"

namespace vlprune::cpu::VLPRUNE_ISA {

constexpr int64_t kPiece = 64 * 1024;

// Calls f(t, b, k, count, in, out) for pieces of about kPiece bytes of the result of each tensor t: kept tokens k ..
// k + count - 1 of batch row b at one outer place, of which `in` is token 0 and `out` is token k. The threads do not
// wait for each other between tensors.
template <typename F>
void for_each_piece(const TokenTensor* tensors, int64_t tensor_count, int64_t batch, int64_t keep, int threads, F f) {
#pragma omp parallel num_threads(threads)
  for (int64_t t = 0; t < tensor_count; ++t) {
    const TokenTensor& tensor = tensors[t];
    const int64_t token = tensor.inner * tensor.run;  // bytes
    const int64_t together = 1 + kPiece / token, pieces = (keep + together - 1) / together;
#pragma omp for schedule(static) nowait
    for (int64_t piece = 0; piece < batch * tensor.outer * pieces; ++piece) {
      const int64_t row = piece / pieces, b = row / tensor.outer;  // of [B, outer]
      const int64_t k = piece % pieces * together;
      const int64_t count = keep - k < together ? keep - k : together;
      const char* const in =
          static_cast<const char*>(tensor.in) + b * tensor.batch_stride + row % tensor.outer * tensor.outer_stride;
      f(t, b, k, count, in, static_cast<char*>(tensor.out) + (row * keep + k) * token);
    }
  }
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
