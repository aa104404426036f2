// Every launcher of the extension: one contract, a CPU and a CUDA declaration.
//
// All pointers are to memory the caller owns. Launchers allocate nothing, retain nothing and do not synchronise. Sizes
// and strides are in elements, int64_t. Shapes, dtypes and value ranges were checked by the caller
// (vlprune_ext/ops/*.py). cpu:: runs on at most `threads` threads; cuda:: runs on `stream` (a cudaStream_t) of the
// current device. The same inputs give the same bits on every run and for every thread count.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace vlprune {

// out[i, n, :] = base[n, :] - x[n, G_i] . weight[:, G_i]^T  with  G_i = [groups[i]*g, (groups[i]+1)*g)
struct LeaveOneOut {
  const void* x;          // [N, K], rows `x_stride` apart, last dimension contiguous
  const void* weight;     // [D, K], rows `weight_stride` apart, last dimension contiguous
  const void* base;       // [N, D], rows `base_stride` apart, last dimension contiguous
  void* out;              // [V, N, D], contiguous
  const int64_t* groups;  // [V] on the host, also for cuda::; 0 <= groups[i] < K / group_size
  int64_t n, d, v;        // N, D, V
  int64_t group_size;     // g
  int64_t x_stride, weight_stride, base_stride;
  DType dtype;  // of x, weight, base and out; products are accumulated in fp32, rounded once
};

// rank[v, n] = #{ m : <query[v,n], gallery[v or 0, m]> > best[v,n] },  best = max over p of the positives' scores.
// The positives' scores are computed by the same arithmetic as all others, so an exact copy of a positive never counts
// as higher. rank = -1 where any score of the row is NaN.
struct RetrievalRank {
  const void* query;         // [V, N, D], contiguous
  const void* gallery;       // [V or 1, M, D], contiguous
  const int64_t* positives;  // [N, P], contiguous; -1 pads a row; at least one entry >= 0 in each row
  float* best;               // [V, N] scratch
  int32_t* rank;             // [V, N]
  int64_t v, n, m, d, p;
  bool shared_gallery;  // true: gallery has a leading dimension of 1
  DType dtype;          // of query and gallery; scores are fp32
};

namespace cpu {
void leave_one_out(const LeaveOneOut& args, int threads);
void retrieval_rank(const RetrievalRank& args, int threads);
}  // namespace cpu

namespace cuda {
void leave_one_out(const LeaveOneOut& args, void* stream);
void retrieval_rank(const RetrievalRank& args, void* stream);
}  // namespace cuda

}  // namespace vlprune
