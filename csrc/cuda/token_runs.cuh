// Where the runs of some token tensors (ops.h) lie, for kernels that move many tensors in one launch: kTensors
// descriptions as kernel parameters, so that a captured CUDA graph keeps its own and nothing is copied. The blocks of a
// tensor follow those of the one before. A block has kThreads threads: as many runs at a time as they hold, one vector
// each; a run of more vectors takes several blocks. Neighbours in a warp write neighbouring vectors.
//
// There are no tails: the result is contiguous, so its runs start at multiples of their length, and a width that does
// not divide that fits not even the second. Per run one division for each of B, outer, K and inner that is not 1 or the
// last: 20 to 60 instructions.
#pragma once

#include <algorithm>
#include <cstdint>

#include "launch.cuh"
#include "ops.h"

namespace vlprune::cuda {

struct TokenRuns {
  static constexpr int kThreads = 256, kLogThreads = 8;
  static constexpr int kTensors = 32;  // of a launch; the parameters take less than 4 KB

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

  uint64_t batch, keep, tokens;
  int count;
  Place place[kTensors];

  // The tensor of this block.
  __device__ __forceinline__ int tensor() const {
    int t = 0;
    while (t + 1 < count && blockIdx.x >= place[t + 1].first_block) ++t;
    return t;
  }

  // Adds a tensor, in vectors of 2^log_bytes bytes of which a thread moves `of_thread`; returns how many blocks it
  // takes.
  int64_t add(const TokenTensor& tensor, int log_bytes, int of_thread, int64_t first_block) {
    const int64_t vectors = tensor.run >> log_bytes;
    int log_lanes = 0;
    while (log_lanes < kLogThreads && int64_t{1} << log_lanes < vectors) ++log_lanes;
    const int64_t runs = static_cast<int64_t>(batch * keep) * tensor.outer * tensor.inner;
    const int64_t column_blocks = ceil_div(vectors, kThreads);
    Place& added = place[count++];
    added.in = static_cast<const char*>(tensor.in);
    added.out = static_cast<char*>(tensor.out);
    added.outer = tensor.outer;
    added.inner = tensor.inner;
    added.runs = runs;
    added.vectors = vectors;
    added.batch_stride = tensor.batch_stride;
    added.outer_stride = tensor.outer_stride;
    added.token_stride = tensor.token_stride;
    added.inner_stride = tensor.inner_stride;
    added.first_block = static_cast<unsigned>(first_block);
    added.column_blocks = static_cast<unsigned>(column_blocks);
    added.log_lanes = log_lanes;
    added.log_bytes = log_bytes;
    return ceil_div(runs, int64_t{kThreads >> log_lanes} * of_thread) * column_blocks;
  }
};

// The largest power of two, up to 2^4, that divides all that the addresses of a tensor's runs are made of.
inline int log_of_vector(const TokenTensor& tensor, int64_t batch, int64_t tokens) {
  uint64_t parts = reinterpret_cast<uintptr_t>(tensor.in) | reinterpret_cast<uintptr_t>(tensor.out) | tensor.run;
  if (batch > 1) parts |= tensor.batch_stride;
  if (tensor.outer > 1) parts |= tensor.outer_stride;
  if (tokens > 1) parts |= tensor.token_stride;
  if (tensor.inner > 1) parts |= tensor.inner_stride;
  int log = 0;
  while (log < 4 && (parts >> log & 1) == 0) ++log;
  return log;
}

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

// What a thread moves: vector `column` of runs first, first + groups, .. below place.runs; nothing where !exists.
struct RunsOfThread {
  uint64_t first, groups, column;
  bool exists;

  __device__ __forceinline__ RunsOfThread(const TokenRuns::Place& place, unsigned block, int of_thread) {
    const unsigned lane = threadIdx.x & ((1u << place.log_lanes) - 1), group = threadIdx.x >> place.log_lanes;
    groups = TokenRuns::kThreads >> place.log_lanes;
    column = uint64_t{block % place.column_blocks} * TokenRuns::kThreads + lane;  // one block: lanes may be fewer
    exists = column < place.vectors;
    first = uint64_t{block / place.column_blocks} * (groups * of_thread) + group;
  }
};

// The place of a run: batch row, place among the kept tokens, and bytes from the tensor's start to the run of token 0.
struct RunPlace {
  uint64_t b, k;
  int64_t offset;

  __device__ __forceinline__ RunPlace(const TokenRuns& runs, const TokenRuns::Place& place, uint64_t run) {
    Divided row = {run, 0};
    offset = 0;
    if (place.inner > 1) {
      row = divide(run, place.inner);
      offset += row.rest * place.inner_stride;
    }
    row = divide(row.quotient, runs.keep);
    k = row.rest;
    if (place.outer > 1) {
      row = divide(row.quotient, place.outer);
      offset += row.rest * place.outer_stride;
    }
    b = row.quotient;
    offset += b * place.batch_stride;
  }
};

}  // namespace vlprune::cuda
