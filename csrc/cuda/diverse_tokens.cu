// kept[b, i] = whether token i is among the first keep_b that the greedy choice of ops.h takes from sample b
//
// Four launches.
//   gram_kernel     gram[b, i, j] = <x_i, x_j>, by tiles on and above the diagonal (tile.cuh), the latter written a
//                   second time, transposed.
//   scale_kernel    scale_i from the diagonal, which then becomes NaN, so that no token is close to itself.
//   closest_kernel  closest_i = max_j gram_ij scale_i scale_j: what the first choice is by.
//   choose_kernel   keep_b times: the first token of least closest; its row of gram raises closest of the others.
//
// Grid    (gram) one block per resident slot of the device; together they share out B n (n + 1) / 2 tiles with
//         n = ceil(T / 128), each block a contiguous run of them. (scale) one thread per token. (closest) one warp per
//         token. (choose) one block per sample.
// Block   (gram) 256 threads, tiles of 128 x 128 in one pipeline. (choose) 256 to 1024 threads by the number of tokens.
// Thread  (choose) up to kHeldTokens tokens, kBlock apart, their closest and scale in registers. kHeld = false: any
//         number of tokens, closest and scale in global memory.
//
// Moves B T d elements in; from L2, 256 d elements a tile; writes 4 B T^2 bytes, read by closest_kernel, and keep / T
// of them once more by choose_kernel. B T (T + 128) d flops: at B = 8, T = 576, d = 4096 (bf16) 13 Gflop against 38 MB
// and 2 x 11 MB of gram. What choose_kernel takes is waiting, keep times in a row: for a reduction over the block, and
// for a row of gram from L2.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cub/block/block_reduce.cuh>
#include <type_traits>

#include "check.cuh"
#include "diversity.h"
#include "dtype.cuh"
#include "launch.cuh"
#include "ops.h"
#include "tile.cuh"

namespace vlprune::cuda {
namespace {

constexpr int kHeldTokens = 4;
constexpr uint32_t kNone = 0xffffffffu;

template <typename T>
struct GramParams {
  const T* x;
  float* gram;
  int64_t tokens, d, batch_stride, token_stride;
  int64_t tiles;  // of all samples
  int64_t side, tiles_of_sample;
};

// The place of a tile in the order of the launch: columns fastest, from the diagonal on, then rows, then samples.
template <class Tile>
struct Place {
  using T = typename Tile::T;
  static_assert(Tile::kRows == Tile::kCols);
  const GramParams<T>& p;
  int sample;
  int row_tile = 0, column_tile;

  __device__ __forceinline__ Place(const GramParams<T>& params, int64_t tile) : p(params) {
    sample = static_cast<int>(tile / p.tiles_of_sample);
    int64_t rest = tile % p.tiles_of_sample;
    for (; rest >= p.side - row_tile; ++row_tile) rest -= p.side - row_tile;
    column_tile = row_tile + static_cast<int>(rest);
  }

  __device__ __forceinline__ void advance() {
    if (++column_tile < p.side) return;
    column_tile = ++row_tile;
    if (row_tile < p.side) return;
    row_tile = column_tile = 0;
    ++sample;
  }

  __device__ __forceinline__ int64_t first(int tile) const { return int64_t{tile} * Tile::kRows; }
  __device__ __forceinline__ int count(int tile) const {
    return static_cast<int>(min(p.tokens - first(tile), int64_t{Tile::kRows}));
  }
  __device__ __forceinline__ Panels<T> panels() const {
    const T* x = p.x + int64_t{sample} * p.batch_stride;
    return {x + first(row_tile) * p.token_stride, x + first(column_tile) * p.token_stride, count(row_tile),
            count(column_tile)};
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSM)
    gram_kernel(const __grid_constant__ GramParams<typename Tile::T> p) {
  extern __shared__ __align__(128) char shared[];
  const int64_t first = p.tiles * blockIdx.x / gridDim.x, last = p.tiles * (blockIdx.x + int64_t{1}) / gridDim.x;
  Place<Tile> place(p, first);
  const PanelShape shape = {p.token_stride, p.token_stride, p.d};
  stream_tiles<Tile>(shared, shape, place, static_cast<int>(last - first), [&](const Tile& tile) {
    const bool vector = p.tokens % 4 == 0;  // all rows of gram start at multiples of 16 bytes
    const int rows = place.count(place.row_tile), columns = place.count(place.column_tile);
    const int64_t first_token = place.sample * p.tokens;
    const int64_t first_row = place.first(place.row_tile), first_column = place.first(place.column_tile);
#pragma unroll
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      const int row = tile.row(r);
      if (row >= rows) continue;
      float* const out = p.gram + (first_token + first_row + row) * p.tokens + first_column;
#pragma unroll
      for (int s = 0; s < Tile::kSegments; ++s) {
#pragma unroll
        for (int e = 0; e < Tile::kSegment; e += 4) {
          const int column = tile.column(s) + e;
          float product[4];
#pragma unroll
          for (int f = 0; f < 4; ++f) product[f] = tile.value(r, s, e + f);
          if (vector && column < columns) {
            *reinterpret_cast<float4*>(out + column) = make_float4(product[0], product[1], product[2], product[3]);
          } else {
#pragma unroll
            for (int f = 0; f < 4; ++f) {
              if (column + f < columns) out[column + f] = product[f];
            }
          }
        }
      }
    }
    if (place.row_tile < place.column_tile) {  // so no row is past the last
      float* const mirror = p.gram + (first_token + first_column) * p.tokens + first_row;
#pragma unroll
      for (int s = 0; s < Tile::kSegments; ++s) {
#pragma unroll
        for (int e = 0; e < Tile::kSegment; ++e) {
          const int column = tile.column(s) + e;
          if (column >= columns) continue;
          float* const out = mirror + column * p.tokens;
#pragma unroll
          for (int r = 0; r < Tile::kThreadRows; ++r) out[tile.row(r)] = tile.value(r, s, e);
        }
      }
    }
    place.advance();
  });
}

struct Tokens {
  float* gram;
  float* scale;
  float* closest;
  const uint8_t* candidate;
  const int64_t* keep_of_sample;
  uint8_t* kept;
  int64_t batch, tokens, keep;

  __device__ __forceinline__ bool is_candidate(int64_t token) const {
    return candidate == nullptr || candidate[token] != 0;
  }
};

constexpr int kThreads = 256;  // of the two kernels that follow

__global__ void __launch_bounds__(kThreads) scale_kernel(const Tokens p) {
  const int64_t token = blockIdx.x * int64_t{kThreads} + threadIdx.x;  // of (b, i)
  if (token >= p.batch * p.tokens) return;
  float* const norm_sq = p.gram + token * p.tokens + token % p.tokens;
  p.scale[token] = cosine_scale(*norm_sq, p.is_candidate(token));
  *norm_sq = NAN;
}

// The same bits either way round. NaN where one of the two has no direction; fmaxf() passes over it.
__device__ __forceinline__ float cosine(float product, float scale, float other_scale) {
  return product * (scale * other_scale);
}

__global__ void __launch_bounds__(kThreads) closest_kernel(const Tokens p) {
  const int64_t token = blockIdx.x * int64_t{kThreads / 32} + threadIdx.x / 32;
  if (token >= p.batch * p.tokens) return;  // the whole warp
  const float* row = p.gram + token * p.tokens;
  const float* scale = p.scale + token / p.tokens * p.tokens;
  const float scale_of_row = p.scale[token];
  float most = -INFINITY;
#pragma unroll 4
  for (int64_t j = threadIdx.x % 32; j < p.tokens; j += 32) most = fmaxf(most, cosine(row[j], scale[j], scale_of_row));
#pragma unroll
  for (int lane_bit = 1; lane_bit < 32; lane_bit *= 2) {
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lane_bit));
  }
  if (threadIdx.x % 32 == 0) p.closest[token] = first_closest(most, scale_of_row, p.is_candidate(token));
}

struct Choice {
  float closest;
  uint32_t token;
};

struct First {
  __device__ __forceinline__ Choice operator()(const Choice& a, const Choice& b) const {
    return b.closest < a.closest || (b.closest == a.closest && b.token < a.token) ? b : a;
  }
};

template <int kBlock, bool kHeld>
__global__ void __launch_bounds__(kBlock) choose_kernel(const Tokens p) {
  using Reduce = cub::BlockReduce<Choice, kBlock>;
  __shared__ typename Reduce::TempStorage storage;
  __shared__ uint32_t chosen;
  const int64_t first = blockIdx.x * p.tokens;
  const float* const scale = p.scale + first;
  const uint32_t tokens = static_cast<uint32_t>(p.tokens);

  float held_closest[kHeldTokens], held_scale[kHeldTokens];
  if constexpr (kHeld) {
#pragma unroll
    for (int e = 0; e < kHeldTokens; ++e) {
      const uint32_t i = threadIdx.x + e * kBlock;
      held_closest[e] = i < tokens ? p.closest[first + i] : kNotCandidate;
      held_scale[e] = i < tokens ? scale[i] : 0.0f;
    }
  }
  // f(token, closest, scale) for each of this thread's tokens, in order; f may change closest.
  const auto for_each = [&](auto&& f) {
    if constexpr (kHeld) {
#pragma unroll
      for (int e = 0; e < kHeldTokens; ++e) {
        const uint32_t i = threadIdx.x + e * kBlock;
        if (i < tokens) f(i, held_closest[e], held_scale[e]);
      }
    } else {
      for (uint32_t i = threadIdx.x; i < tokens; i += kBlock) f(i, p.closest[first + i], scale[i]);
    }
  };

  Choice mine = {kChosen, kNone};
  for_each([&](uint32_t i, float& closest, float) { mine = First{}(mine, {closest, i}); });
  const int64_t keep = p.keep_of_sample == nullptr ? p.keep : p.keep_of_sample[blockIdx.x];
  for (int64_t n = 0; n < keep; ++n) {
    const Choice best = Reduce(storage).Reduce(mine, First{});  // in thread 0
    if (threadIdx.x == 0) chosen = best.closest < kNotCandidate ? best.token : kNone;
    __syncthreads();
    const uint32_t token = chosen;  // not written again before all threads have come to the next reduction
    if (token == kNone) break;
    const float* const row = p.gram + (first + token) * p.tokens;
    const float scale_of_row = scale[token];
    mine = {kChosen, kNone};
    for_each([&](uint32_t i, float& closest, float scale_of_i) {
      if (n == 0 && closest < kLast) closest = -INFINITY;  // from here on it is those chosen that count
      const float raised = fmaxf(closest, cosine(row[i], scale_of_i, scale_of_row));
      closest = i == token ? kChosen : raised;
      mine = First{}(mine, {closest, i});
    });
  }
  for_each([&](uint32_t i, float& closest, float) { p.kept[first + i] = closest == kChosen; });
}

template <class Tile>
void launch_gram(const DiverseTokens& args, cudaStream_t stream) {
  using T = typename Tile::T;
  GramParams<T> p = {};
  p.x = static_cast<const T*>(args.x);
  p.gram = args.gram, p.tokens = args.tokens, p.d = args.d;
  p.batch_stride = args.batch_stride, p.token_stride = args.token_stride;
  p.side = ceil_div(args.tokens, Tile::kRows);
  p.tiles_of_sample = p.side * (p.side + 1) / 2;
  p.tiles = args.batch * p.tiles_of_sample;
  const auto kernel = gram_kernel<Tile>;
  const int64_t slots = resident_blocks(kernel, Tile::kThreads, Tile::kSharedBytes, "diverse_tokens");
  kernel<<<static_cast<unsigned>(std::min(p.tiles, slots)), Tile::kThreads, Tile::kSharedBytes, stream>>>(p);
  VLPRUNE_CHECK_LAUNCH("diverse_tokens");
}

template <int kBlock, bool kHeld>
void launch_choose(const Tokens& p, cudaStream_t stream) {
  choose_kernel<kBlock, kHeld><<<static_cast<unsigned>(p.batch), kBlock, 0, stream>>>(p);
  VLPRUNE_CHECK_LAUNCH("diverse_tokens");
}

template <bool kAligned, typename T>
using HalfTile = TensorTile<T, 4, 2, 2, kAligned ? 2 : 1, 3, kAligned>;

}  // namespace

void diverse_tokens(const DiverseTokens& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch(args.dtype, [&](auto tag) {
    using T = typename ElementOf<decltype(tag)>::type;
    if constexpr (std::is_same_v<T, float>) {
      launch_gram<SimtTile>(args, cuda_stream);
    } else {
      const bool aligned = is_aligned16(args.x) && args.d % kVector<T> == 0 && args.token_stride % kVector<T> == 0 &&
                           args.batch_stride % kVector<T> == 0;
      aligned ? launch_gram<HalfTile<true, T>>(args, cuda_stream) : launch_gram<HalfTile<false, T>>(args, cuda_stream);
    }
  });

  const Tokens p = {args.gram, args.scale, args.closest, args.candidate, args.keep_of_sample,
                    args.kept, args.batch, args.tokens,  args.keep};
  const int64_t tokens = args.batch * args.tokens;
  scale_kernel<<<static_cast<unsigned>(ceil_div(tokens, kThreads)), kThreads, 0, cuda_stream>>>(p);
  VLPRUNE_CHECK_LAUNCH("diverse_tokens");
  closest_kernel<<<static_cast<unsigned>(ceil_div(tokens, kThreads / 32)), kThreads, 0, cuda_stream>>>(p);
  VLPRUNE_CHECK_LAUNCH("diverse_tokens");
  if (args.tokens <= 256 * kHeldTokens) {
    launch_choose<256, true>(p, cuda_stream);
  } else if (args.tokens <= 512 * kHeldTokens) {
    launch_choose<512, true>(p, cuda_stream);
  } else if (args.tokens <= 1024 * kHeldTokens) {
    launch_choose<1024, true>(p, cuda_stream);
  } else {
    launch_choose<1024, false>(p, cuda_stream);
  }
}

}  // namespace vlprune::cuda
