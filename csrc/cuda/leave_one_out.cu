// out[i, n, :] = base[n, :] - x[n, G_i] . weight[:, G_i]^T  with  G_i = [groups[i] g, (groups[i] + 1) g)
//
// Grid    one block per resident slot of the device; together they share out V * ceil(N/128) * ceil(D/128) tiles, each
//         block a contiguous run of them, groups fastest: the base tile of a run stays in L1.
// Block   256 threads, one 128 x 128 tile of out[i] at a time, all tiles of a run in one pipeline (tile.cuh).
// Warp    32 x 64 of the tile.
// Thread  fp32: 8 rows x 2 segments of 4 columns; fp16/bf16: 4 rows x 2 segments of 8. A segment is one 16-byte load of
//         base and one 16-byte store.
//
// Moves V N D elements out, and reads x, weight and base at least once: N K + D K + N D. From L2, a tile reads 2 * 128
// g elements and a run reads 128 * 128 of base. For each element written it does 2 g operations: at g = 64 that is 64
// per byte in bf16 (bound by the stores), 32 per byte in fp32 (bound by the FMA units).
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "check.cuh"
#include "dtype.cuh"
#include "launch.cuh"
#include "ops.h"
#include "tile.cuh"

namespace vlprune::cuda {
namespace {

constexpr int kGroupsPerLaunch = 256;

// Passed by value, group ids included, so nothing is copied to the device and a captured graph keeps its own.
template <typename T>
struct Params {
  const T* x;
  const T* weight;
  const T* base;
  T* out;
  int64_t n, d, v, group_size, base_stride;
  PanelShape shape;
  int64_t tiles, column_tiles;
  bool vector_out;  // rows of base and out start at multiples of 16 bytes, and D is one of kVector<T>
  int64_t groups[kGroupsPerLaunch];
};

// The place of a tile in the order of the launch: group fastest, then columns, then rows.
template <class Tile>
struct Place {
  using T = typename Tile::T;
  const Params<T>& p;
  int i, column_tile, row_tile;

  __device__ __forceinline__ Place(const Params<T>& params, int64_t tile) : p(params) {
    i = static_cast<int>(tile % p.v);
    column_tile = static_cast<int>(tile / p.v % p.column_tiles);
    row_tile = static_cast<int>(tile / p.v / p.column_tiles);
  }

  __device__ __forceinline__ void advance() {
    if (++i < p.v) return;
    i = 0;
    if (++column_tile < p.column_tiles) return;
    column_tile = 0;
    ++row_tile;
  }

  __device__ __forceinline__ int64_t row() const { return int64_t{row_tile} * Tile::kRows; }
  __device__ __forceinline__ int64_t column() const { return int64_t{column_tile} * Tile::kCols; }
  __device__ __forceinline__ Panels<T> panels() const {
    const int64_t k = p.groups[i] * p.group_size;
    return {p.x + row() * p.shape.a_stride + k, p.weight + column() * p.shape.b_stride + k,
            static_cast<int>(min(p.n - row(), int64_t{Tile::kRows})),
            static_cast<int>(min(p.d - column(), int64_t{Tile::kCols}))};
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSM)
    leave_one_out_kernel(const __grid_constant__ Params<typename Tile::T> p) {
  using T = typename Tile::T;
  constexpr int kWidth = Tile::kSegment;
  extern __shared__ __align__(128) char shared[];
  const int64_t first = p.tiles * blockIdx.x / gridDim.x, last = p.tiles * (blockIdx.x + int64_t{1}) / gridDim.x;
  Place<Tile> place(p, first);
  stream_tiles<Tile>(shared, p.shape, place, static_cast<int>(last - first), [&](const Tile& tile) {
#pragma unroll
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      const int64_t row = place.row() + tile.row(r);
      if (row >= p.n) continue;
      const T* base = p.base + row * p.base_stride;
      T* out = p.out + (place.i * p.n + row) * p.d;
#pragma unroll
      for (int s = 0; s < Tile::kSegments; ++s) {
        const int64_t column = place.column() + tile.column(s);
        if (p.vector_out) {
          if (column >= p.d) continue;
          float y[kWidth];
          unpack<T>(__ldg(reinterpret_cast<const uint4*>(base + column)), y);
#pragma unroll
          for (int e = 0; e < kWidth; ++e) y[e] -= tile.value(r, s, e);
          __stcg(reinterpret_cast<uint4*>(out + column), pack<T>(y));
        } else {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            if (column + e < p.d) out[column + e] = from_float<T>(to_float(base[column + e]) - tile.value(r, s, e));
          }
        }
      }
    }
    place.advance();
  });
}

template <class Tile>
void launch(const LeaveOneOut& args, cudaStream_t stream) {
  using T = typename Tile::T;
  Params<T> p = {};
  p.x = static_cast<const T*>(args.x);
  p.weight = static_cast<const T*>(args.weight);
  p.base = static_cast<const T*>(args.base);
  p.n = args.n, p.d = args.d, p.group_size = args.group_size, p.base_stride = args.base_stride;
  p.shape = {args.x_stride, args.weight_stride, args.group_size};
  p.column_tiles = ceil_div(args.d, Tile::kCols);
  p.vector_out = is_aligned16(args.base) && is_aligned16(args.out) && args.base_stride % kVector<T> == 0 &&
                 args.d % kVector<T> == 0;

  const auto kernel = leave_one_out_kernel<Tile>;
  const int64_t slots = resident_blocks(kernel, Tile::kThreads, Tile::kSharedBytes, "leave_one_out");
  for (int64_t begin = 0; begin < args.v; begin += kGroupsPerLaunch) {
    p.v = std::min<int64_t>(args.v - begin, kGroupsPerLaunch);
    p.out = static_cast<T*>(args.out) + begin * args.n * args.d;
    p.tiles = p.v * ceil_div(args.n, Tile::kRows) * p.column_tiles;
    std::copy_n(args.groups + begin, p.v, p.groups);
    kernel<<<static_cast<unsigned>(std::min(p.tiles, slots)), Tile::kThreads, Tile::kSharedBytes, stream>>>(p);
    VLPRUNE_CHECK_LAUNCH("leave_one_out");
  }
}

template <bool kAligned, typename T>
using HalfTile = TensorTile<T, 4, 2, 2, 2, 3, kAligned>;

}  // namespace

void leave_one_out(const LeaveOneOut& args, void* stream) {
  if (args.v == 0 || args.n == 0 || args.d == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch(args.dtype, [&](auto tag) {
    using T = typename ElementOf<decltype(tag)>::type;
    if constexpr (std::is_same_v<T, float>) {
      launch<SimtTile>(args, cuda_stream);
    } else {
      const bool aligned = is_aligned16(args.x) && is_aligned16(args.weight) && args.x_stride % kVector<T> == 0 &&
                           args.weight_stride % kVector<T> == 0 && args.group_size % kVector<T> == 0;
      aligned ? launch<HalfTile<true, T>>(args, cuda_stream) : launch<HalfTile<false, T>>(args, cuda_stream);
    }
  });
}

}  // namespace vlprune::cuda
