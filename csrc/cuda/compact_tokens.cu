// out[b, :, k, :] = in[b, :, index[b, k], :] for each of some tensors, as bytes
//
// A tensor's runs (ops.h) are copied by vectors of 16 bytes, or of the largest power of two that divides its addresses,
// strides and runs.
//
// Grid    one launch for every kTensors tensors, blocks as in token_runs.cuh.
// Thread  one vector, at the same place of kRuns runs: kRuns positions, then kRuns vectors, are under way together.
//
// Moves what is kept twice, a little more where short runs share sectors with dropped ones.
#include <algorithm>
#include <cstdint>

#include "check.cuh"
#include "ops.h"
#include "token_runs.cuh"

namespace vlprune::cuda {
namespace {

constexpr int kThreads = TokenRuns::kThreads;
constexpr int kRuns = 4;  // of a thread

struct Params {
  const int64_t* index;  // [batch, keep]
  TokenRuns runs;
};
static_assert(sizeof(Params) <= 4096);

template <typename Vector>
__device__ __forceinline__ void copy_block(const Params& p, const TokenRuns::Place& place, unsigned block) {
  const RunsOfThread own(place, block, kRuns);
  if (!own.exists) return;

  int64_t offset[kRuns];  // without the token's
  uint64_t token[kRuns];
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const uint64_t run = own.first + r * own.groups;
    offset[r] = 0;
    token[r] = 0;
    if (run >= place.runs) continue;
    const RunPlace at(p.runs, place, run);
    offset[r] = at.offset;
    token[r] = __ldg(p.index + at.b * p.runs.keep + at.k);
  }
  bool outside = false;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) outside |= token[r] >= p.runs.tokens;  // also what is negative
  if (outside) __trap();

  Vector vector[kRuns];
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    if (own.first + r * own.groups >= place.runs) continue;
    const char* const run = place.in + offset[r] + static_cast<int64_t>(token[r]) * place.token_stride;
    vector[r] = reinterpret_cast<const Vector*>(run)[own.column];
  }
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const uint64_t run = own.first + r * own.groups;
    if (run < place.runs) reinterpret_cast<Vector*>(place.out)[run * place.vectors + own.column] = vector[r];
  }
}

__global__ void __launch_bounds__(kThreads) compact_tokens_kernel(const __grid_constant__ Params p) {
  const TokenRuns::Place& place = p.runs.place[p.runs.tensor()];
  const unsigned block = blockIdx.x - place.first_block;
  switch (place.log_bytes) {
    case 4: return copy_block<uint4>(p, place, block);
    case 3: return copy_block<uint2>(p, place, block);
    case 2: return copy_block<uint32_t>(p, place, block);
    case 1: return copy_block<uint16_t>(p, place, block);
    default: return copy_block<uint8_t>(p, place, block);
  }
}

}  // namespace

void compact_tokens(const CompactTokens& args, void* stream) {
  for (int64_t begin = 0; begin < args.count; begin += TokenRuns::kTensors) {
    Params p = {};
    p.index = args.index;
    p.runs.batch = args.batch, p.runs.keep = args.keep, p.runs.tokens = args.tokens;
    int64_t blocks = 0;
    for (int64_t t = begin; t < std::min(args.count, begin + TokenRuns::kTensors); ++t) {
      const TokenTensor& tensor = args.tensors[t];
      blocks += p.runs.add(tensor, log_of_vector(tensor, args.batch, args.tokens), kRuns, blocks);
    }
    if (blocks == 0) continue;
    compact_tokens_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    VLPRUNE_CHECK_LAUNCH("compact_tokens");
  }
}

}  // namespace vlprune::cuda
