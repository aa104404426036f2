// out[b, :, k, :] = in[b, :, index[b, k], :] for each of some tensors, as bytes
//
// A tensor's runs (ops.h) are copied by vectors of 16 bytes, or of the largest power of two that divides its addresses,
// strides and runs. There are no tails: the result is contiguous, so its runs start at multiples of their length, and a
// width that does not divide that fits not even the second.
//
// Grid    one launch for every kTensors tensors, whose descriptions are kernel parameters: a captured CUDA graph keeps
//         its own, and nothing is copied. The blocks of a tensor follow those of the one before.
// Block   256 threads: as many runs at a time as its threads hold, kRuns times. A run of more than 256 vectors takes
//         several blocks.
// Thread  one vector, at the same place of kRuns runs: kRuns positions, then kRuns vectors, are under way together.
//         Neighbours in a warp write neighbouring vectors.
//
// Moves what is kept twice, a little more where short runs share sectors with dropped ones. Per vector one division for
// each of B, outer, K and inner that is not 1 or the last: 20 to 60 instructions, against 32 bytes moved.
#include <algorithm>
#include <cstdint>

#include "check.cuh"
#include "launch.cuh"
#include "ops.h"

namespace vlprune::cuda {
namespace {

constexpr int kThreads = 256, kLogThreads = 8;
constexpr int kRuns = 4;      // of a thread
constexpr int kTensors = 32;  // of a launch; the parameters take less than 4 KB

struct Place {
  const char* in;
  char* out;
  uint64_t outer, inner;
  uint64_t runs;                                                   // batch * outer * keep * inner
  uint64_t vectors;                                                // of a run
  int64_t batch_stride, outer_stride, token_stride, inner_stride;  // in bytes
  unsigned first_block, column_blocks;                             // blocks that share a run
  int log_lanes, log_bytes;                                        // threads of a run, bytes of a vector
};

struct Params {
  const int64_t* index;  // [batch, keep]
  uint64_t keep, tokens;
  int count;
  Place place[kTensors];
};
static_assert(sizeof(Params) <= 4096);

// a / b and a % b; the division of 64 bits only where it is needed.
struct Divided {
  uint64_t quotient, rest;
};
__device__ __forceinline__ Divided divide(uint64_t a, uint64_t b) {
  if ((a | b) >> 32 == 0) {
    const uint32_t quotient = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return {quotient, static_cast<uint32_t>(a) - quotient * static_cast<uint32_t>(b)};
  }
  return {a / b, a % b};
}

template <typename Vector>
__device__ __forceinline__ void copy_block(const Params& p, const Place& place, unsigned block) {
  const unsigned lane = threadIdx.x & ((1u << place.log_lanes) - 1), group = threadIdx.x >> place.log_lanes;
  const unsigned groups = kThreads >> place.log_lanes;
  const uint64_t column = uint64_t{block % place.column_blocks} * kThreads + lane;  // one block: lanes may be fewer
  if (column >= place.vectors) return;
  const uint64_t first = uint64_t{block / place.column_blocks} * (groups * kRuns) + group;

  int64_t offset[kRuns];  // without the token's
  uint64_t token[kRuns];
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const uint64_t run = first + r * groups;
    offset[r] = 0;
    token[r] = 0;
    if (run >= place.runs) continue;
    Divided row = {run, 0};
    if (place.inner > 1) {
      row = divide(run, place.inner);
      offset[r] += row.rest * place.inner_stride;
    }
    row = divide(row.quotient, p.keep);
    const uint64_t k = row.rest;
    if (place.outer > 1) {
      row = divide(row.quotient, place.outer);
      offset[r] += row.rest * place.outer_stride;
    }
    offset[r] += row.quotient * place.batch_stride;
    token[r] = __ldg(p.index + row.quotient * p.keep + k);
  }
  bool outside = false;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) outside |= token[r] >= p.tokens;  // also what is negative
  if (outside) __trap();

  Vector vector[kRuns];
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    if (first + r * groups >= place.runs) continue;
    const char* const run = place.in + offset[r] + static_cast<int64_t>(token[r]) * place.token_stride;
    vector[r] = reinterpret_cast<const Vector*>(run)[column];
  }
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const uint64_t run = first + r * groups;
    if (run < place.runs) reinterpret_cast<Vector*>(place.out)[run * place.vectors + column] = vector[r];
  }
}

__global__ void __launch_bounds__(kThreads) compact_tokens_kernel(const __grid_constant__ Params p) {
  int t = 0;
  while (t + 1 < p.count && blockIdx.x >= p.place[t + 1].first_block) ++t;
  const Place& place = p.place[t];
  const unsigned block = blockIdx.x - place.first_block;
  switch (place.log_bytes) {
    case 4: return copy_block<uint4>(p, place, block);
    case 3: return copy_block<uint2>(p, place, block);
    case 2: return copy_block<uint32_t>(p, place, block);
    case 1: return copy_block<uint16_t>(p, place, block);
    default: return copy_block<uint8_t>(p, place, block);
  }
}

// The largest power of two, up to 2^4, that divides all that the addresses of a tensor's runs are made of.
int log_of_vector(const TokenTensor& tensor, const CompactTokens& args) {
  uint64_t parts = reinterpret_cast<uintptr_t>(tensor.in) | reinterpret_cast<uintptr_t>(tensor.out) | tensor.run;
  if (args.batch > 1) parts |= tensor.batch_stride;
  if (tensor.outer > 1) parts |= tensor.outer_stride;
  if (args.tokens > 1) parts |= tensor.token_stride;
  if (tensor.inner > 1) parts |= tensor.inner_stride;
  int log = 0;
  while (log < 4 && (parts >> log & 1) == 0) ++log;
  return log;
}

// What fits a tensor best, and how many blocks it takes.
int64_t describe(const TokenTensor& tensor, const CompactTokens& args, Place& place) {
  const int log_bytes = log_of_vector(tensor, args);
  const int64_t vectors = tensor.run >> log_bytes;
  int log_lanes = 0;
  while (log_lanes < kLogThreads && int64_t{1} << log_lanes < vectors) ++log_lanes;
  const int64_t runs = args.batch * tensor.outer * args.keep * tensor.inner;
  const int64_t column_blocks = ceil_div(vectors, kThreads);
  place.in = static_cast<const char*>(tensor.in);
  place.out = static_cast<char*>(tensor.out);
  place.outer = tensor.outer;
  place.inner = tensor.inner;
  place.runs = runs;
  place.vectors = vectors;
  place.batch_stride = tensor.batch_stride;
  place.outer_stride = tensor.outer_stride;
  place.token_stride = tensor.token_stride;
  place.inner_stride = tensor.inner_stride;
  place.column_blocks = static_cast<unsigned>(column_blocks);
  place.log_lanes = log_lanes;
  place.log_bytes = log_bytes;
  return ceil_div(runs, int64_t{kThreads >> log_lanes} * kRuns) * column_blocks;
}

}  // namespace

void compact_tokens(const CompactTokens& args, void* stream) {
  for (int64_t begin = 0; begin < args.count; begin += kTensors) {
    Params p = {};
    p.index = args.index;
    p.keep = args.keep;
    p.tokens = args.tokens;
    p.count = static_cast<int>(std::min<int64_t>(kTensors, args.count - begin));
    int64_t blocks = 0;
    for (int t = 0; t < p.count; ++t) {
      p.place[t].first_block = static_cast<unsigned>(blocks);
      blocks += describe(args.tensors[begin + t], args, p.place[t]);
    }
    if (blocks == 0) continue;
    compact_tokens_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    VLPRUNE_CHECK_LAUNCH("compact_tokens");
  }
}

}  // namespace vlprune::cuda
