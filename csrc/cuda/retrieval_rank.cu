// rank[v, n] = #{ m : <query[v, n], gallery[v or 0, m]> > best[v, n] }
// best[v, n] = max over p of <query[v, n], gallery[v or 0, positives[n, p]]>
//
// Three launches; no score is ever stored but the best.
//   best_score_kernel    best and rank = 0. fp32: one thread per query; fp16/bf16: one warp per 16 queries.
//   count_higher_kernel  adds the number of higher scores to rank, and sets its sign bit where a score is NaN.
//   finish_rank_kernel   one thread per query: negative ranks become -1.
//
// Grid    (count_higher) one block per resident slot of the device; together they share out V * ceil(N/kRows) *
//         ceil(M/kCols) tiles, each block a contiguous run of them, gallery fastest.
// Block   256 threads, one tile of scores at a time in one pipeline (tile.cuh): 128 x 128 fp32, 128 x 256 fp16/bf16.
// Warp    32 x 64 of the tile, or 64 x 64.
// Thread  8 rows, 8 or 16 scores of each. Lanes that share a row add up their counts, and one of them adds the sum to
//         rank, unless it is zero. Integer atomics: any order, the same bits.
//
// Exact ties: a positive's score comes from the same operations in the same order as every other score, i.e. fused
// multiply-adds in the order of k in fp32, m16n8k16 products in the order of k on the tensor cores.
//
// Moves V N D + (V or 1) M D elements in, 4 V N bytes out; from L2, (kRows + kCols) D elements per tile. At N = 5000,
// M = 25000, D = 512 that is 128 Gflop against 31 MB (bf16): bound by arithmetic. Exact fp32 is bound by the FMA units
// (67 Tflop/s on an H200: 1.9 ms), whatever the tile. bf16 does 85 operations per byte from L2, and for each 32 of k a
// tile moves 88 KB through shared memory (64 read, 24 written: 704 cycles at 128 bytes) for 2.1 Mflop (512 cycles at
// Hopper's full tensor rate).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "check.cuh"
#include "dtype.cuh"
#include "launch.cuh"
#include "ops.h"
#include "tile.cuh"

namespace vlprune::cuda {
namespace {

constexpr int kNaN = INT32_MIN;  // the sign bit of a rank under construction; counts, at most M < 2^31, never reach it

template <typename T>
struct Params {
  const T* query;
  const T* gallery;
  const int64_t* positives;
  float* best;
  int32_t* rank;
  int64_t v, n, m, d, p;
  int64_t gallery_step;  // elements between the galleries of two variants; 0 when they share one
  int64_t tiles, row_tiles, column_tiles;
  bool vector;  // all rows start at multiples of 16 bytes
};

// The larger of two scores, NaN if either is.
__device__ __forceinline__ float max_or_nan(float x, float y) { return y > x || y != y ? y : x; }

// fp32: one thread per query.
__global__ void __launch_bounds__(64) best_score_kernel(const Params<float> p) {
  const int64_t index = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;  // of (v, n)
  if (index >= p.v * p.n) return;
  const float* query = p.query + index * p.d;
  const float* gallery = p.gallery + index / p.n * p.gallery_step;
  const int64_t* positives = p.positives + index % p.n * p.p;
  float best = -INFINITY;
  for (int64_t i = 0; i < p.p; ++i) {
    if (positives[i] < 0) continue;
    const float* item = gallery + positives[i] * p.d;
    float score = 0.0f;
    int64_t k = 0;
    if (p.vector) {
#pragma unroll 4
      for (; k < p.d; k += 4) {
        float x[4], y[4];
        unpack<float>(__ldg(reinterpret_cast<const uint4*>(query + k)), x);
        unpack<float>(__ldg(reinterpret_cast<const uint4*>(item + k)), y);
#pragma unroll
        for (int e = 0; e < 4; ++e) score = fmaf(x[e], y[e], score);
      }
    }
    for (; k < p.d; ++k) score = fmaf(query[k], item[k], score);
    best = max_or_nan(best, score);
  }
  p.best[index] = best;
  p.rank[index] = 0;
}

// fp16/bf16: one warp per 16 queries of one variant. Queries 0..7 meet their own positives in the columns of one
// product, queries 8..15 in those of a second; only the diagonals are used.
template <typename T>
__global__ void __launch_bounds__(64) best_score_kernel(const Params<T> p) {
  constexpr int kDepth = 32;  // as TensorTile: scores are padded with the same zeros
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t warps_per_variant = (p.n + 15) / 16;
  const int64_t warp = blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32;
  const int64_t v = warp / warps_per_variant, first = warp % warps_per_variant * 16;
  if (v >= p.v) return;  // the whole warp
  const T* gallery = p.gallery + v * p.gallery_step;

  // Elements k and k+1 of a row, zero where there are none.
  const auto load_pair = [&](const T* row, int64_t k) -> uint32_t {
    if (p.vector) return row != nullptr && k < p.d ? __ldg(reinterpret_cast<const uint32_t*>(row + k)) : 0;
    T pair[2] = {from_float<T>(0.0f), from_float<T>(0.0f)};
    if (row != nullptr && k < p.d) pair[0] = row[k];
    if (row != nullptr && k + 1 < p.d) pair[1] = row[k + 1];
    uint32_t packed;
    memcpy(&packed, pair, sizeof(packed));
    return packed;
  };

  const T* query[2];
  float best[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t n = first + 8 * h + g;
    query[h] = n < p.n ? p.query + (v * p.n + n) * p.d : nullptr;
    best[h] = -INFINITY;
  }
  for (int64_t i = 0; i < p.p; ++i) {
    const T* item[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t n = first + 8 * h + g;
      const int64_t positive = n < p.n ? p.positives[n * p.p + i] : -1;
      item[h] = positive >= 0 ? gallery + positive * p.d : nullptr;
    }
    float score[2][4] = {};
    for (int64_t k0 = 0; k0 < p.d; k0 += kDepth) {
#pragma unroll
      for (int64_t k = k0; k < k0 + kDepth; k += 16) {
        const uint32_t a[4] = {load_pair(query[0], k + 2 * t), load_pair(query[1], k + 2 * t),
                               load_pair(query[0], k + 2 * t + 8), load_pair(query[1], k + 2 * t + 8)};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t b[2] = {load_pair(item[h], k + 2 * t), load_pair(item[h], k + 2 * t + 8)};
          multiply_add<T>(score[h], a, b);
        }
      }
    }
    // Lane 4g + t holds columns 2t and 2t + 1 of row g in score[0][0..1], of row g + 8 in score[1][2..3].
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float own = g % 2 == 0 ? score[h][2 * h] : score[h][2 * h + 1];
      if (item[h] != nullptr) best[h] = max_or_nan(best[h], own);
    }
  }
  if (t != g / 2) return;  // column g is with lane t = g / 2
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t n = first + 8 * h + g;
    if (n >= p.n) continue;
    p.best[v * p.n + n] = best[h];
    p.rank[v * p.n + n] = 0;
  }
}

// The place of a tile in the order of the launch: gallery fastest, then queries, then variants.
template <class Tile>
struct Place {
  using T = typename Tile::T;
  const Params<T>& p;
  int column_tile, row_tile, v;

  __device__ __forceinline__ Place(const Params<T>& params, int64_t tile) : p(params) {
    column_tile = static_cast<int>(tile % p.column_tiles);
    row_tile = static_cast<int>(tile / p.column_tiles % p.row_tiles);
    v = static_cast<int>(tile / p.column_tiles / p.row_tiles);
  }

  __device__ __forceinline__ void advance() {
    if (++column_tile < p.column_tiles) return;
    column_tile = 0;
    if (++row_tile < p.row_tiles) return;
    row_tile = 0;
    ++v;
  }

  __device__ __forceinline__ int64_t first_query() const { return v * p.n + int64_t{row_tile} * Tile::kRows; }
  __device__ __forceinline__ int rows() const {
    return static_cast<int>(min(p.n - int64_t{row_tile} * Tile::kRows, int64_t{Tile::kRows}));
  }
  __device__ __forceinline__ int columns() const {
    return static_cast<int>(min(p.m - int64_t{column_tile} * Tile::kCols, int64_t{Tile::kCols}));
  }
  __device__ __forceinline__ Panels<T> panels() const {
    const T* gallery = p.gallery + v * p.gallery_step + int64_t{column_tile} * Tile::kCols * p.d;
    return {p.query + first_query() * p.d, gallery, rows(), columns()};
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSM)
    count_higher_kernel(const __grid_constant__ Params<typename Tile::T> p) {
  extern __shared__ __align__(128) char shared[];
  const int64_t first = p.tiles * blockIdx.x / gridDim.x, last = p.tiles * (blockIdx.x + int64_t{1}) / gridDim.x;
  Place<Tile> place(p, first);
  stream_tiles<Tile>(shared, {p.d, p.d, p.d}, place, static_cast<int>(last - first), [&](const Tile& tile) {
    const float* best_scores = p.best + place.first_query();
    int32_t* ranks = p.rank + place.first_query();
    const int rows = place.rows(), columns = place.columns();
    const auto count_tile = [&](auto whole_tile) {
      constexpr bool kWhole = decltype(whole_tile)::value;  // else columns past M count for nothing
#pragma unroll
      for (int r = 0; r < Tile::kThreadRows; ++r) {
        const int row = tile.row(r);
        const float best = row < rows ? __ldg(best_scores + row) : 0.0f;
        int32_t higher = 0;
        bool has_nan = false;
#pragma unroll
        for (int s = 0; s < Tile::kSegments; ++s) {
#pragma unroll
          for (int e = 0; e < Tile::kSegment; ++e) {
            if (!kWhole && tile.column(s) + e >= columns) continue;
            const float score = tile.value(r, s, e);
            higher += score > best;
            has_nan |= score != score;
          }
        }
        if (has_nan) higher |= 1 << 16;  // far above a tile's count, so that one sum serves both
#pragma unroll
        for (int lane_bit = 1; lane_bit < 32; lane_bit *= 2) {
          if (Tile::kRowLanes & lane_bit) higher += __shfl_xor_sync(0xffffffffu, higher, lane_bit);
        }
        if (row < rows && (threadIdx.x & Tile::kRowLanes) == 0) {
          if ((higher & 0xffff) != 0) atomicAdd(ranks + row, higher & 0xffff);
          if (higher >> 16 != 0) atomicOr(ranks + row, kNaN);
        }
      }
    };
    if (columns == Tile::kCols) {
      count_tile(std::true_type{});
    } else {
      count_tile(std::false_type{});
    }
    place.advance();
  });
}

__global__ void __launch_bounds__(256) finish_rank_kernel(const float* best, int32_t* rank, int64_t queries) {
  const int64_t index = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (index < queries && (rank[index] < 0 || isnan(best[index]))) rank[index] = -1;
}

template <class Tile>
void launch(const RetrievalRank& args, cudaStream_t stream) {
  using T = typename Tile::T;
  Params<T> p = {};
  p.query = static_cast<const T*>(args.query);
  p.gallery = static_cast<const T*>(args.gallery);
  p.positives = args.positives, p.best = args.best, p.rank = args.rank;
  p.v = args.v, p.n = args.n, p.m = args.m, p.d = args.d, p.p = args.p;
  p.gallery_step = args.shared_gallery ? 0 : args.m * args.d;
  p.vector = is_aligned16(args.query) && is_aligned16(args.gallery) && args.d % kVector<T> == 0;
  p.row_tiles = ceil_div(args.n, Tile::kRows), p.column_tiles = ceil_div(args.m, Tile::kCols);
  p.tiles = args.v * p.row_tiles * p.column_tiles;
  const int64_t queries = args.v * args.n;

  constexpr int kBestThreads = 64;
  const int64_t best_threads = std::is_same_v<T, float> ? queries : args.v * ceil_div(args.n, 16) * 32;
  best_score_kernel<<<static_cast<unsigned>(ceil_div(best_threads, kBestThreads)), kBestThreads, 0, stream>>>(p);
  VLPRUNE_CHECK_LAUNCH("retrieval_rank");

  if (p.tiles > 0) {
    const auto kernel = count_higher_kernel<Tile>;
    const int64_t slots = resident_blocks(kernel, Tile::kThreads, Tile::kSharedBytes, "retrieval_rank");
    kernel<<<static_cast<unsigned>(std::min(p.tiles, slots)), Tile::kThreads, Tile::kSharedBytes, stream>>>(p);
    VLPRUNE_CHECK_LAUNCH("retrieval_rank");
  }

  finish_rank_kernel<<<static_cast<unsigned>(ceil_div(queries, 256)), 256, 0, stream>>>(p.best, p.rank, queries);
  VLPRUNE_CHECK_LAUNCH("retrieval_rank");
}

template <bool kAligned, typename T>
using HalfTile = TensorTile<T, 2, 4, 4, 1, 4, kAligned>;

}  // namespace

void retrieval_rank(const RetrievalRank& args, void* stream) {
  if (args.v == 0 || args.n == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch(args.dtype, [&](auto tag) {
    using T = typename ElementOf<decltype(tag)>::type;
    if constexpr (std::is_same_v<T, float>) {
      launch<SimtTile>(args, cuda_stream);
    } else {
      const bool aligned = is_aligned16(args.query) && is_aligned16(args.gallery) && args.d % kVector<T> == 0;
      aligned ? launch<HalfTile<true, T>>(args, cuda_stream) : launch<HalfTile<false, T>>(args, cuda_stream);
    }
  });
}

}  // namespace vlprune::cuda
