// total[b, k] = sum of size,  out[b, :, k, :] = (sum of size * in) / total[b, k]  over a kept token and what merges
// into it
//
// Two launches, one more for every kTensors further tensors:
//   list_tokens_kernel   what merges into each kept token, in ascending order: a counting sort that keeps the order.
//   merge_tokens_kernel  the sums.
//
// list_tokens: a block per sample, a warp per part of its tokens (kMergeParts). Each warp counts its own, 32 tokens at
// a time, lanes of the same goal together; a scan over (kept token, part) turns counts into places; each warp writes
// its tokens there, again 32 at a time. The counters are a warp's own: no atomics. Then a thread per kept token adds
// sizes. merge_tokens: blocks as in token_runs.cuh. A thread has one vector of a run, 16 bytes or one element, and adds
// to it those of what merges, kAhead of which are under way together; one that is given nothing is copied.
//
// Moves what is kept or merges once in, what is kept once out; each product, sum and quotient is rounded by itself, as
// on every device.
#include <algorithm>
#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "check.cuh"
#include "dtype.cuh"
#include "ops.h"
#include "token_runs.cuh"

namespace vlprune::cuda {
namespace {

constexpr int kListThreads = 32 * kMergeParts;
constexpr int kAhead = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Params {
  const int64_t* index;  // [B, K]
  const int64_t* match;  // [B, T]
  const float* size;     // [B, T] or null
  float* total;          // [B, K]
  int32_t* lists;        // [B, 3, T]
  int32_t* ends;         // [B, kMergeParts, K]
  int64_t keep, tokens;
};

struct Sample {
  const int64_t* index;  // [K]
  const int64_t* match;  // [T]
  const float* size;     // [T] or null
  int32_t* place;        // [T], in index, or -1
  int32_t* token;        // what merges, by k and t
  float* weight;         // its size
  int32_t* end;          // [kMergeParts, K]: the last row, in token

  __device__ __forceinline__ Sample(const Params& p, int64_t b)
      : index(p.index + b * p.keep),
        match(p.match + b * p.tokens),
        size(p.size == nullptr ? nullptr : p.size + b * p.tokens),
        place(p.lists + b * 3 * p.tokens),
        token(place + p.tokens),
        weight(reinterpret_cast<float*>(token + p.tokens)),
        end(p.ends + b * kMergeParts * p.keep) {}

  __device__ __forceinline__ float size_of(int64_t t) const { return size == nullptr ? 1.0f : __ldg(size + t); }

  // Where t merges into, or -1.
  __device__ __forceinline__ int into(int64_t t, int64_t tokens) const {
    if (place[t] >= 0 || size_of(t) == 0.0f) return -1;
    const int64_t goal = __ldg(match + t);
    return static_cast<uint64_t>(goal) < static_cast<uint64_t>(tokens) ? place[goal] : -1;
  }
};

__global__ void __launch_bounds__(kListThreads) list_tokens_kernel(const __grid_constant__ Params p) {
  using Scan = cub::BlockScan<int32_t, kListThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage scan;
  const Sample of(p, blockIdx.x);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  for (int64_t t = thread; t < p.tokens; t += kListThreads) of.place[t] = -1;
  for (int64_t i = thread; i < kMergeParts * p.keep; i += kListThreads) of.end[i] = 0;
  __syncthreads();
  for (int64_t k = thread; k < p.keep; k += kListThreads) {
    const uint64_t kept = of.index[k];
    if (kept >= static_cast<uint64_t>(p.tokens)) __trap();  // also what is negative
    of.place[kept] = static_cast<int32_t>(k);
  }
  __syncthreads();

  // Calls f(t, k, peers) for the tokens of this warp, by 32; k: the goal or -1, peers: the lanes of the same.
  int32_t* const mine = of.end + warp * p.keep;
  const int64_t chunks = (p.tokens + 31) / 32;
  const int64_t first = chunks * warp / kMergeParts, last = chunks * (warp + 1) / kMergeParts;
  const auto for_own_tokens = [&](auto&& f) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t t = chunk * 32 + lane;
      const int k = t < p.tokens ? of.into(t, p.tokens) : -1;
      f(t, k, __match_any_sync(kAllLanes, k));
      __syncwarp();  // the counters are written before they are read again
    }
  };
  const auto is_leader = [&](unsigned peers) { return lane == __ffs(peers) - 1; };

  for_own_tokens([&](int64_t, int k, unsigned peers) {
    if (k >= 0 && is_leader(peers)) mine[k] += __popc(peers);
  });
  __syncthreads();

  int32_t listed = 0;
  for (int64_t chunk = 0; chunk < p.keep; chunk += kListThreads) {
    const int64_t k = chunk + thread;
    int32_t count = 0, before, total;
    for (int part = 0; k < p.keep && part < kMergeParts; ++part) count += of.end[part * p.keep + k];
    Scan(scan).ExclusiveSum(count, before, total);
    before += listed;
    for (int part = 0; k < p.keep && part < kMergeParts; ++part) {
      int32_t& end = of.end[part * p.keep + k];  // for now, where the list of this part begins
      const int32_t of_part = end;
      end = before;
      before += of_part;
    }
    listed += total;
    __syncthreads();  // before the scan's memory is used again
  }

  for_own_tokens([&](int64_t t, int k, unsigned peers) {
    int32_t at = 0;
    if (k >= 0) {
      at = mine[k] + __popc(peers & ((1u << lane) - 1));
      of.token[at] = static_cast<int32_t>(t);
      of.weight[at] = of.size_of(t);
    }
    __syncwarp();  // all have read their counter
    if (k >= 0 && is_leader(peers)) mine[k] = at + __popc(peers);
  });
  __syncthreads();

  const int32_t* const end = of.end + (kMergeParts - 1) * p.keep;
  for (int64_t k = thread; k < p.keep; k += kListThreads) {
    const int first_given = k == 0 ? 0 : end[k - 1], last_given = end[k];
    float total = of.size_of(of.index[k]);
#pragma unroll 8
    for (int i = first_given; i < last_given; ++i) total = __fadd_rn(total, of.weight[i]);
    p.total[blockIdx.x * p.keep + k] = total;
  }
}

struct MergeParams {
  Params lists;
  DType dtype[TokenRuns::kTensors];
  TokenRuns runs;
};
static_assert(sizeof(MergeParams) <= 4096);

template <typename T>
__device__ __forceinline__ void widen(const uint4& packed, float (&x)[kVector<T>]) {
  unpack<T>(packed, x);
}
template <typename T>
__device__ __forceinline__ void widen(const T& element, float (&x)[1]) {
  x[0] = to_float(element);
}
template <typename T>
__device__ __forceinline__ void narrow(const float (&x)[kVector<T>], uint4& packed) {
  packed = pack<T>(x);
}
template <typename T>
__device__ __forceinline__ void narrow(const float (&x)[1], T& element) {
  element = from_float<T>(x[0]);
}

template <typename T, typename Vector>
__device__ __forceinline__ void merge_block(const MergeParams& p, const TokenRuns::Place& place, unsigned block) {
  constexpr int kWidth = sizeof(Vector) / sizeof(T);
  const RunsOfThread own(place, block, 1);
  if (!own.exists || own.first >= place.runs) return;
  const RunPlace at(p.runs, place, own.first);
  const Sample of(p.lists, at.b);
  const auto read = [&](int64_t token) {
    return reinterpret_cast<const Vector*>(place.in + at.offset + token * place.token_stride)[own.column];
  };

  const int64_t self = __ldg(of.index + at.k);
  const int32_t* const end = of.end + (kMergeParts - 1) * p.runs.keep + at.k;
  const int first = at.k == 0 ? 0 : __ldg(end - 1), last = __ldg(end);
  Vector result = read(self);
  if (first < last) {
    float sum[kWidth], x[kWidth];
    const float own_size = of.size_of(self), total = __ldg(p.lists.total + at.b * p.runs.keep + at.k);
    widen<T>(result, x);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) sum[e] = own_size == 0.0f ? 0.0f : __fmul_rn(own_size, x[e]);
    for (int i = first; i < last; i += kAhead) {
      Vector vector[kAhead];
      float weight[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (i + j >= last) break;
        vector[j] = read(__ldg(of.token + i + j));
        weight[j] = __ldg(of.weight + i + j);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (i + j >= last) break;
        widen<T>(vector[j], x);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) sum[e] = __fadd_rn(sum[e], __fmul_rn(weight[j], x[e]));
      }
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) sum[e] = __fdiv_rn(sum[e], total);
    narrow<T>(sum, result);
  }
  reinterpret_cast<Vector*>(place.out)[own.first * place.vectors + own.column] = result;
}

__global__ void __launch_bounds__(TokenRuns::kThreads) merge_tokens_kernel(const __grid_constant__ MergeParams p) {
  const int t = p.runs.tensor();
  const TokenRuns::Place& place = p.runs.place[t];
  const unsigned block = blockIdx.x - place.first_block;
  const auto merge = [&](auto element) {
    using T = decltype(element);
    place.log_bytes == 4 ? merge_block<T, uint4>(p, place, block) : merge_block<T, T>(p, place, block);
  };
  switch (p.dtype[t]) {
    case DType::kFloat32: return merge(float{});
    case DType::kFloat16: return merge(__half{});
    case DType::kBFloat16: return merge(__nv_bfloat16{});
  }
}

}  // namespace

void merge_tokens(const MergeTokens& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  MergeParams p = {};
  p.lists = {args.index, args.match, args.size, args.total, args.lists, args.ends, args.keep, args.tokens};
  list_tokens_kernel<<<static_cast<unsigned>(args.batch), kListThreads, 0, cuda_stream>>>(p.lists);
  VLPRUNE_CHECK_LAUNCH("merge_tokens");

  p.runs.batch = args.batch, p.runs.keep = args.keep, p.runs.tokens = args.tokens;
  for (int64_t begin = 0; begin < args.count; begin += TokenRuns::kTensors) {
    int64_t blocks = 0;
    p.runs.count = 0;
    for (int64_t t = begin; t < std::min(args.count, begin + TokenRuns::kTensors); ++t) {
      const TokenTensor& tensor = args.tensors[t];
      const auto dtype = static_cast<DType>(args.dtypes[t]);
      const int log_of_element = dtype == DType::kFloat32 ? 2 : 1;
      const int log_bytes = log_of_vector(tensor, args.batch, args.tokens) == 4 ? 4 : log_of_element;
      p.dtype[p.runs.count] = dtype;
      blocks += p.runs.add(tensor, log_bytes, 1, blocks);
    }
    merge_tokens_kernel<<<static_cast<unsigned>(blocks), TokenRuns::kThreads, 0, cuda_stream>>>(p);
    VLPRUNE_CHECK_LAUNCH("merge_tokens");
  }
}

}  // namespace vlprune::cuda
