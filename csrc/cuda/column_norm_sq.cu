// acc[j] += sum_n token_weight[n] * x[n, j]^2
//
// Two launches. column_norm_sq_kernel sums within chunks of kNormChunk rows, add_chunks_kernel adds the chunks to acc.
//
// Grid    one block per chunk and 32 vectors of columns; columns fastest.
// Block   8 warps, 32 kVector<T> columns x kNormChunk rows.
// Warp    16 consecutive rows. The 8 sums of a column meet in shared memory and are added in the order of the rows.
// Thread  one 16-byte vector of columns in each of the 16 rows, 8 loads under way together. add_chunks: one column.
//
// Moves N in elements of x once, and 8 in bytes per chunk for the partial sums (1/32 of x in bf16), from L2. At
// [2048, 4096] in bf16 there are 256 blocks, two per multiprocessor, each with half of its part of x under way: 64 KB
// per multiprocessor.
#include <cstdint>

#include "check.cuh"
#include "dtype.cuh"
#include "launch.cuh"
#include "ops.h"

namespace vlprune::cuda {
namespace {

constexpr int kWarps = 8, kRowsPerWarp = kNormChunk / kWarps;
constexpr int kBatch = 8;  // rows under way together
static_assert(kWarps * kRowsPerWarp == kNormChunk && kRowsPerWarp % kBatch == 0);

template <typename T>
struct Params {
  const T* x;                 // [n, in], rows x_stride apart
  const float* token_weight;  // [n] or null
  float* partial;             // [chunks, in]
  int64_t n, in, x_stride, column_tiles;
};

// kAligned: rows start at multiples of 16 bytes and hold whole vectors; else loads are element by element.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kWarps * 32) column_norm_sq_kernel(const Params<T> p) {
  constexpr int kColumns = 32 * kVector<T>;
  __shared__ __align__(16) float sums[kWarps][kColumns];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t chunk = blockIdx.x / p.column_tiles, first_column = blockIdx.x % p.column_tiles * kColumns;
  const int64_t column = first_column + lane * kVector<T>, first_row = chunk * kNormChunk + warp * kRowsPerWarp;

  float sum[kVector<T>] = {};
#pragma unroll 1
  for (int64_t row = first_row; row < min(first_row + kRowsPerWarp, p.n); row += kBatch) {
    const T* x = p.x + row * p.x_stride + column;
    uint4 packed[kBatch];
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      packed[r] = make_uint4(0, 0, 0, 0);
      if (row + r >= p.n) continue;
      if constexpr (kAligned) {
        if (column < p.in) packed[r] = __ldcs(reinterpret_cast<const uint4*>(x + r * p.x_stride));
      } else {
        T elements[kVector<T>];
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) {
          elements[e] = column + e < p.in ? x[r * p.x_stride + e] : from_float<T>(0.0f);
        }
        memcpy(&packed[r], elements, sizeof(packed[r]));
      }
    }
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      const float weight = p.token_weight == nullptr ? 1.0f : row + r < p.n ? __ldg(p.token_weight + row + r) : 0.0f;
      float value[kVector<T>];
      unpack<T>(packed[r], value);
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) sum[e] = fmaf(weight * value[e], value[e], sum[e]);
    }
  }
#pragma unroll
  for (int e = 0; e < kVector<T>; e += 4) {
    *reinterpret_cast<float4*>(&sums[warp][lane * kVector<T> + e]) =
        make_float4(sum[e], sum[e + 1], sum[e + 2], sum[e + 3]);
  }
  __syncthreads();

  const int c = threadIdx.x;
  if (c < kColumns && first_column + c < p.in) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[w][c];
    p.partial[chunk * p.in + first_column + c] = total;
  }
}

constexpr int kAddThreads = 64;  // few, for as many multiprocessors as possible

__global__ void __launch_bounds__(kAddThreads) add_chunks_kernel(float* acc,            // [in]
                                                                 const float* partial,  // [chunks, in]
                                                                 int64_t chunks, int64_t in) {
  const int64_t j = blockIdx.x * int64_t{kAddThreads} + threadIdx.x;
  if (j >= in) return;
  float total = acc[j];
#pragma unroll 16
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += __ldg(partial + chunk * in + j);
  acc[j] = total;
}

}  // namespace

void column_norm_sq(const ColumnNormSq& args, void* stream) {
  if (args.n == 0 || args.in == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t chunks = ceil_div(args.n, kNormChunk);
  dispatch(args.dtype, [&](auto tag) {
    using T = typename ElementOf<decltype(tag)>::type;
    const int64_t column_tiles = ceil_div(args.in, 32 * kVector<T>);
    const Params<T> p = {
        static_cast<const T*>(args.x), args.token_weight, args.partial, args.n, args.in, args.x_stride, column_tiles};
    const bool aligned =
        is_aligned16(args.x) && args.in % kVector<T> == 0 && (args.x_stride % kVector<T> == 0 || args.n == 1);
    const auto kernel = aligned ? column_norm_sq_kernel<T, true> : column_norm_sq_kernel<T, false>;
    kernel<<<static_cast<unsigned>(chunks * column_tiles), kWarps * 32, 0, cuda_stream>>>(p);
    VLPRUNE_CHECK_LAUNCH("column_norm_sq");
  });
  add_chunks_kernel<<<static_cast<unsigned>(ceil_div(args.in, kAddThreads)), kAddThreads, 0, cuda_stream>>>(
      args.acc, args.partial, chunks, args.in);
  VLPRUNE_CHECK_LAUNCH("column_norm_sq");
}

}  // namespace vlprune::cuda
