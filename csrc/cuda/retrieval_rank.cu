// rank[v, n] = #{ m : <query[v, n], gallery[v or 0, m]> > best[v, n] }
// best[v, n] = max over p of <query[v, n], gallery[v or 0, positives[n, p]]>
//
// No score is ever stored but the best. The launches:
//   best_score_kernel    best and rank = 0. fp32: one thread per query; fp16/bf16: one warp per 16 queries.
//   count_higher_kernel  adds the number of higher scores to rank, and sets its sign bit where a score is NaN.
//   finish_rank_kernel   one thread per query: negative ranks become -1.
// fp32 has the tensor cores decide first, between the first two:
//   split_kernel         one warp per row: x = high + low + rest in bf16, and |x|.
//   count_higher_kernel  on SplitTile: low.high + high.low + high.high, within `tolerance` |x| |y| of the score. A pair
//                        closer to the best than that is not decided, but listed.
//   settle_kernel        one thread per listed pair: the score itself. Where the list was too short, rank = 0, and the
//                        exact count_higher_kernel, which else does nothing, starts over.
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
// M = 25000, D = 512 that is 128 Gflop against 31 MB (bf16): bound by arithmetic. bf16 does 85 operations per byte from
// L2, and for each 32 of k a tile moves 88 KB through shared memory (64 read, 24 written: 704 cycles at 128 bytes) for
// 2.1 Mflop (512 cycles at Hopper's full tensor rate). Exact fp32 is bound by the FMA units (67 Tflop/s on an H200: 1.9
// ms), whatever the tile; three products of bf16 are 384 Gflop at up to 989 Tflop/s.
//
// This file is one room although it is long: both ways to count share tiles, ranks and list, and are launched as one.
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
  // Of fp32 and of its split rows.
  const float* query_norm;    // [V, N]
  const float* gallery_norm;  // [V or 1, M], norm_step apart
  int64_t norm_step;
  float tolerance;
  uint64_t* listed;  // how many pairs were to be listed, and the first `capacity` of them: query << 32 | item; or null
  int64_t capacity;
};

// The larger of two scores, NaN if either is.
__device__ __forceinline__ float max_or_nan(float x, float y) { return y > x || y != y ? y : x; }

__device__ __forceinline__ float exact_score(const Params<float>& p, const float* query, const float* item) {
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
  return score;
}

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
    best = max_or_nan(best, exact_score(p, query, gallery + positives[i] * p.d));
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

// ---- fp32 by bf16 ----
// high = bf16(x), low = bf16(x - high), so that |x - high - low| <= 2^-18 |x|. Rows of split_depth(D) elements, zeros
// after the D-th, high before low.
int64_t split_depth(int64_t d) { return ceil_div(d, kSplitDepth) * kSplitDepth; }

// Norms within these bounds, or 0: no product of two over- or underflows, nor does what is left out of it.
constexpr float kLeastNorm = 0x1p-45f, kGreatestNorm = 0x1p60f;

// |approximate - exact score| <= tolerance |x| |y|, where each step of the tensor cores adds 16 products to a sum with
// an error of at most 2^-20 of the greatest of them. Low parts come first, when the sum is below 2^-7. In order:
// low.low and what the split leaves out; the steps; the fused multiply-adds of the exact score, whose rounding counts
// as well.
float split_tolerance(int64_t d) {
  const double steps = split_depth(d) / 16.0;
  return static_cast<float>(1.02 * (0x3.1p-18 + steps * (1 + 2 * 0x1p-7) * 0x1p-20 + d * 0x1p-24));
}

__global__ void __launch_bounds__(256)
    split_kernel(const float* rows, int64_t count, int64_t d, int64_t depth, __nv_bfloat16* split, float* norm) {
  const int64_t row = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= count) return;  // the whole warp
  const float* x = rows + row * d;
  __nv_bfloat16* high = split + row * 2 * depth;
  float square = 0.0f, most = 0.0f;
  for (int64_t k = lane; k < depth; k += 32) {
    const float value = k < d ? __ldg(x + k) : 0.0f;
    const auto top = from_float<__nv_bfloat16>(value);
    high[k] = top;
    high[depth + k] = from_float<__nv_bfloat16>(value - to_float(top));
    square = fmaf(value, value, square);
    most = fmaxf(most, fabsf(value));
  }
#pragma unroll
  for (int lane_bit = 1; lane_bit < 32; lane_bit *= 2) {
    square += __shfl_xor_sync(0xffffffffu, square, lane_bit);
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lane_bit));
  }
  if (lane != 0) return;
  const float length = sqrtf(square);  // NaN if an element is
  const bool bounded = (length >= kLeastNorm && length <= kGreatestNorm) || (length == 0.0f && most == 0.0f);
  norm[row] = bounded ? length : INFINITY;  // decides nothing
}

// The products of split rows, as a tile three times as deep: low.high, high.low, high.high.
struct SplitTile : TensorTile<__nv_bfloat16, 2, 4, 4, 1, 4, true> {
  using TensorTile::TensorTile;
  static_assert(kDepth == kSplitDepth);

  __device__ __forceinline__ void load(int slot, Panels<__nv_bfloat16> panels, const PanelShape& shape, int64_t k0) {
    const int64_t depth = shape.a_stride / 2;
    const int part = (k0 >= depth) + (k0 >= 2 * depth);
    if (part == 0) panels.a += depth;
    if (part == 1) panels.b += depth;
    TensorTile::load(slot, panels, {shape.a_stride, shape.b_stride, depth}, k0 - part * depth);
  }
};

// Adds the pairs of a warp to the list. Bit 16 r + 8 s + e of `undecided`, two rows to a word: value(r, s, e).
template <class Tile, class Query, class Item>
__device__ __forceinline__ void list_pairs(const Params<typename Tile::T>& p, const uint32_t* undecided,
                                           Query&& query_of, Item&& item_of) {
  int mine = 0;
#pragma unroll
  for (int i = 0; i < Tile::kThreadRows / 2; ++i) mine += __popc(undecided[i]);
  if (!__any_sync(0xffffffffu, mine != 0)) return;
  const int lane = threadIdx.x % 32;
  int upto = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, upto, distance);
    if (lane >= distance) upto += before;
  }
  unsigned long long first = 0;
  if (lane == 31) first = atomicAdd(reinterpret_cast<unsigned long long*>(p.listed), uint64_t{0} + upto);
  uint64_t at = __shfl_sync(0xffffffffu, first, 31) + upto - mine;
#pragma unroll
  for (int i = 0; i < Tile::kThreadRows / 2; ++i) {
    for (uint32_t rest = undecided[i]; rest != 0; rest &= rest - 1, ++at) {
      if (at >= static_cast<uint64_t>(p.capacity)) return;
      const int bit = __ffs(rest) - 1;
      p.listed[1 + at] = query_of(2 * i + bit / 16) << 32 | item_of(bit / 8 % 2, bit % 8);
    }
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
    return static_cast<int>(min(p.m - first_item(), int64_t{Tile::kCols}));
  }
  __device__ __forceinline__ int64_t first_item() const { return int64_t{column_tile} * Tile::kCols; }
  __device__ __forceinline__ Panels<T> panels() const {
    const T* gallery = p.gallery + v * p.gallery_step + first_item() * p.d;
    return {p.query + first_query() * p.d, gallery, rows(), columns()};
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSM)
    count_higher_kernel(const __grid_constant__ Params<typename Tile::T> p) {
  constexpr bool kSplit = std::is_same_v<Tile, SplitTile>;
  extern __shared__ __align__(128) char shared[];
  if (!kSplit && p.listed != nullptr && *p.listed <= static_cast<uint64_t>(p.capacity)) return;  // all is settled
  const int64_t first = p.tiles * blockIdx.x / gridDim.x, last = p.tiles * (blockIdx.x + int64_t{1}) / gridDim.x;
  Place<Tile> place(p, first);
  const PanelShape shape = {p.d, p.d, kSplit ? p.d / 2 * 3 : p.d};
  stream_tiles<Tile>(shared, shape, place, static_cast<int>(last - first), [&](const Tile& tile) {
    const float* best_scores = p.best + place.first_query();
    int32_t* ranks = p.rank + place.first_query();
    const int rows = place.rows(), columns = place.columns();
    const auto count_tile = [&](auto whole_tile) {
      constexpr bool kWhole = decltype(whole_tile)::value;              // else columns past M count for nothing
      [[maybe_unused]] uint32_t undecided[Tile::kThreadRows / 2] = {};  // of SplitTile
#pragma unroll
      for (int r = 0; r < Tile::kThreadRows; ++r) {
        const int row = tile.row(r);
        const float best = row < rows ? __ldg(best_scores + row) : 0.0f;
        float tolerance = 0.0f;
        if (kSplit && row < rows) tolerance = p.tolerance * __ldg(p.query_norm + place.first_query() + row);
        int32_t higher = 0;
        bool has_nan = false;
#pragma unroll
        for (int s = 0; s < Tile::kSegments; ++s) {
#pragma unroll
          for (int e = 0; e < Tile::kSegment; ++e) {
            if (!kWhole && tile.column(s) + e >= columns) continue;
            const float score = tile.value(r, s, e);
            if constexpr (kSplit) {
              const float* norms = p.gallery_norm + place.v * p.norm_step + place.first_item();
              const float above = score - best, within = tolerance * __ldg(norms + tile.column(s) + e);
              higher += above > within;
              const bool decided = above > within || above < -within || best != best;  // NaN decides nothing else
              undecided[r / 2] |= static_cast<uint32_t>(row < rows && !decided) << (r % 2 * 16 + s * 8 + e);
            } else {
              higher += score > best;
              has_nan |= score != score;
            }
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
      if constexpr (kSplit) {
        list_pairs<Tile>(
            p, undecided, [&](int r) { return static_cast<uint64_t>(place.first_query() + tile.row(r)); },
            [&](int s, int e) { return static_cast<uint64_t>(place.first_item() + tile.column(s) + e); });
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

__global__ void __launch_bounds__(256) settle_kernel(const __grid_constant__ Params<float> p) {
  const int64_t first = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, step = int64_t{gridDim.x} * blockDim.x;
  const uint64_t listed = *p.listed;
  if (listed > static_cast<uint64_t>(p.capacity)) {
    for (int64_t i = first; i < p.v * p.n; i += step) p.rank[i] = 0;
    return;
  }
  for (int64_t i = first; i < static_cast<int64_t>(listed); i += step) {
    const int64_t query = p.listed[1 + i] >> 32, item = p.listed[1 + i] & 0xffffffffu;
    const float* gallery = p.gallery + query / p.n * p.gallery_step;
    const float score = exact_score(p, p.query + query * p.d, gallery + item * p.d);
    if (score > p.best[query]) atomicAdd(p.rank + query, 1);
    if (score != score) atomicOr(p.rank + query, kNaN);
  }
}

__global__ void __launch_bounds__(256) finish_rank_kernel(const float* best, int32_t* rank, int64_t queries) {
  const int64_t index = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (index < queries && (rank[index] < 0 || isnan(best[index]))) rank[index] = -1;
}

template <typename T>
Params<T> params(const RetrievalRank& args) {
  Params<T> p = {};
  p.query = static_cast<const T*>(args.query);
  p.gallery = static_cast<const T*>(args.gallery);
  p.positives = args.positives, p.best = args.best, p.rank = args.rank;
  p.v = args.v, p.n = args.n, p.m = args.m, p.d = args.d, p.p = args.p;
  p.gallery_step = args.shared_gallery ? 0 : args.m * args.d;
  p.vector = is_aligned16(args.query) && is_aligned16(args.gallery) && args.d % kVector<T> == 0;
  return p;
}

template <typename T>
void find_best(const Params<T>& p, cudaStream_t stream) {
  constexpr int kBestThreads = 64;
  const int64_t best_threads = std::is_same_v<T, float> ? p.v * p.n : p.v * ceil_div(p.n, 16) * 32;
  best_score_kernel<<<static_cast<unsigned>(ceil_div(best_threads, kBestThreads)), kBestThreads, 0, stream>>>(p);
  VLPRUNE_CHECK_LAUNCH("retrieval_rank");
}

template <class Tile>
void count_higher(Params<typename Tile::T> p, cudaStream_t stream) {
  p.row_tiles = ceil_div(p.n, Tile::kRows), p.column_tiles = ceil_div(p.m, Tile::kCols);
  p.tiles = p.v * p.row_tiles * p.column_tiles;
  if (p.tiles == 0) return;
  const auto kernel = count_higher_kernel<Tile>;
  const int64_t slots = resident_blocks(kernel, Tile::kThreads, Tile::kSharedBytes, "retrieval_rank");
  kernel<<<static_cast<unsigned>(std::min(p.tiles, slots)), Tile::kThreads, Tile::kSharedBytes, stream>>>(p);
  VLPRUNE_CHECK_LAUNCH("retrieval_rank");
}

// Ranks of all pairs of which the tensor cores are sure, and then of the others; or none, and a list that is too short.
void count_by_split(Params<float>& p, const RetrievalRank& args, cudaStream_t stream) {
  const int64_t depth = split_depth(p.d), queries = p.v * p.n, items = (args.shared_gallery ? 1 : p.v) * p.m;
  auto* split = static_cast<__nv_bfloat16*>(args.split);
  check(cudaMemsetAsync(args.listed, 0, sizeof(*args.listed), stream), "retrieval_rank");
  const auto split_rows = [&](const float* rows, int64_t count, __nv_bfloat16* into, float* norm) {
    split_kernel<<<static_cast<unsigned>(ceil_div(count, 8)), 256, 0, stream>>>(rows, count, p.d, depth, into, norm);
    VLPRUNE_CHECK_LAUNCH("retrieval_rank");
  };
  split_rows(p.query, queries, split, args.norm);
  split_rows(p.gallery, items, split + queries * 2 * depth, args.norm + queries);
  p.listed = args.listed, p.capacity = queries <= UINT32_MAX ? args.capacity : 0;  // a pair has 32 bits for its query

  Params<__nv_bfloat16> q = {};
  q.query = split, q.gallery = split + queries * 2 * depth;
  q.best = p.best, q.rank = p.rank;
  q.v = p.v, q.n = p.n, q.m = p.m, q.d = 2 * depth;
  q.gallery_step = args.shared_gallery ? 0 : p.m * 2 * depth;
  q.query_norm = args.norm, q.gallery_norm = args.norm + queries, q.norm_step = args.shared_gallery ? 0 : p.m;
  q.tolerance = split_tolerance(p.d);
  q.listed = p.listed, q.capacity = p.capacity;
  count_higher<SplitTile>(q, stream);

  const int64_t slots = resident_blocks(settle_kernel, 256, 0, "retrieval_rank");
  const int64_t blocks = std::min(ceil_div(std::max(p.capacity, queries), 256), slots);
  settle_kernel<<<static_cast<unsigned>(blocks), 256, 0, stream>>>(p);
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
    Params<T> p = params<T>(args);
    find_best(p, cuda_stream);
    if constexpr (std::is_same_v<T, float>) {
      count_by_split(p, args, cuda_stream);
      count_higher<SimtTile>(p, cuda_stream);
    } else {
      p.vector ? count_higher<HalfTile<true, T>>(p, cuda_stream) : count_higher<HalfTile<false, T>>(p, cuda_stream);
    }
  });
  const int64_t queries = args.v * args.n;
  finish_rank_kernel<<<static_cast<unsigned>(ceil_div(queries, 256)), 256, 0, cuda_stream>>>(args.best, args.rank,
                                                                                             queries);
  VLPRUNE_CHECK_LAUNCH("retrieval_rank");
}

}  // namespace vlprune::cuda
