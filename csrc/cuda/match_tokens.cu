// similarity[b, i] = max over targets j != i of <key[b, i], key[b, j]> / (|key[b, i]| |key[b, j]|), match[b, i] = that
// j
//
// Four launches; no similarity is ever stored but the best.
//   list_tokens_kernel    the positions of the targets and of the sources, by a scan. One block per sample.
//   gather_tokens_kernel  their keys, side by side: targets from the first slot on, sources up to the last, rows padded
//                         with zeros to a multiple of 16 bytes; and the inverse of their lengths, those of the sources
//                         in similarity. One warp per slot; a lane has every 32nd 16 bytes, wherever the key lies.
//   match_tokens_kernel   the products. match holds numbers (match_number.h): each tile offers its best by an atomic
//                         maximum of integers: any order, the same bits.
//   finish_match_kernel   numbers to similarities and positions. One thread per token.
//
// Grid    (match_tokens) the host does not know how many targets there are: for each sample as many blocks as the
//         largest number of tiles takes; those past the sample's end at once. A block has a run of up to kMostTiles
//         neighbouring tiles, targets fastest.
// Block   256 threads, one tile of 128 sources x 128 targets at a time in one pipeline (tile.cuh).
// Warp    32 x 64 of the tile.
// Thread  8 or 4 rows, 8 or 16 similarities of each; lanes that share a row compare their best, one of them offers it.
//
// 2 d flops and about four more instructions for each pair of a source and a target, against 2 (128 + 128) d elements
// from L2 for a tile. Moves the keys in, out and in again, 4 T + 8 T bytes a few times.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cub/block/block_scan.cuh>
#include <type_traits>

#include "check.cuh"
#include "dtype.cuh"
#include "launch.cuh"
#include "match_number.h"
#include "ops.h"
#include "tile.cuh"

namespace vlprune::cuda {
namespace {

constexpr int kListThreads = 512, kGatherThreads = 256;
constexpr int64_t kMostTiles = 16;

template <typename T>
struct Params {
  const T* key;
  const uint8_t* target;
  const uint8_t* source;
  float* similarity;
  int64_t* match;
  int32_t* lists;
  int32_t* counts;
  float* inverse;
  T* gathered;
  int64_t b, t, d, slots, depth;
  int64_t batch_stride, token_stride;
  int64_t blocks, tiles;  // of a sample at most, of a block
  bool vector;            // all keys start at multiples of 16 bytes, and d is one of kVector<T>
};

template <typename T>
struct Sample {
  int32_t* targets;
  int32_t* sources;
  int32_t* twins;   // of the sources: their places among the targets, or -1
  int32_t* counts;  // targets, sources
  float* inverse;   // of the targets' lengths
  T* gathered;      // [slots, depth]

  __device__ __forceinline__ Sample(const Params<T>& p, int64_t b)
      : targets(p.lists + b * 3 * p.t),
        sources(targets + p.t),
        twins(sources + p.t),
        counts(p.counts + b * 2),
        inverse(p.inverse + b * p.t),
        gathered(p.gathered + b * p.slots * p.depth) {}
};

template <typename T>
__global__ void __launch_bounds__(kListThreads) list_tokens_kernel(const __grid_constant__ Params<T> p) {
  using Scan = cub::BlockScan<uint32_t, kListThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage scan;
  const int64_t b = blockIdx.x;
  const Sample<T> of(p, b);
  int32_t targets = 0, sources = 0;  // in the chunks so far
  for (int64_t chunk = 0; chunk < p.t; chunk += kListThreads) {
    const int64_t t = chunk + threadIdx.x, at = b * p.t + t;
    const bool exists = t < p.t;
    const bool is_target = exists && p.target[at] != 0;
    const bool is_source = exists && (p.source == nullptr ? !is_target : p.source[at] != 0);
    uint32_t before, total;  // targets << 16 | sources
    Scan(scan).ExclusiveSum(uint32_t{is_target} << 16 | uint32_t{is_source}, before, total);
    const int32_t target = targets + static_cast<int32_t>(before >> 16);
    const int32_t source = sources + static_cast<int32_t>(before & 0xffffu);
    if (is_target) of.targets[target] = static_cast<int32_t>(t);
    if (is_source) {
      of.sources[source] = static_cast<int32_t>(t);
      of.twins[source] = is_target ? target : -1;
    }
    if (exists) p.match[at] = kNoMatch;
    targets += static_cast<int32_t>(total >> 16);
    sources += static_cast<int32_t>(total & 0xffffu);
    __syncthreads();  // before the scan's memory is used again
  }
  if (threadIdx.x == 0) {
    of.counts[0] = targets;
    of.counts[1] = sources;
  }
}

template <typename T>
__global__ void __launch_bounds__(kGatherThreads) gather_tokens_kernel(const __grid_constant__ Params<T> p) {
  constexpr int kWidth = kVector<T>;
  const int64_t warp = blockIdx.x * int64_t{kGatherThreads / 32} + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t b = warp / p.slots, slot = warp % p.slots;
  if (b >= p.b) return;  // the whole warp, here and below
  const Sample<T> of(p, b);
  const int64_t source = slot - (p.slots - of.counts[1]);
  const bool is_target = slot < of.counts[0];
  if (!is_target && source < 0) return;
  const int64_t t = is_target ? of.targets[slot] : of.sources[source];
  const T* key = p.key + b * p.batch_stride + t * p.token_stride;
  T* gathered = of.gathered + slot * p.depth;

  float square = 0.0f;
  for (int64_t k = int64_t{lane} * kWidth; k < p.depth; k += 32 * kWidth) {
    uint4 packed;
    if (p.vector && k < p.d) {
      packed = __ldg(reinterpret_cast<const uint4*>(key + k));
    } else {
      T elements[kWidth];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) elements[e] = k + e < p.d ? key[k + e] : from_float<T>(0.0f);
      memcpy(&packed, elements, sizeof(packed));
    }
    *reinterpret_cast<uint4*>(gathered + k) = packed;
    float x[kWidth];
    unpack<T>(packed, x);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) square = fmaf(x[e], x[e], square);
  }
#pragma unroll
  for (int lane_bit = 1; lane_bit < 32; lane_bit *= 2) square += __shfl_xor_sync(0xffffffffu, square, lane_bit);
  if (lane == 0) *(is_target ? of.inverse + slot : p.similarity + b * p.t + t) = inverse_length(square);
}

// The place of a tile among those of a sample: targets fastest.
template <class Tile>
struct Place {
  using T = typename Tile::T;
  const T* targets;  // keys
  const T* sources;
  int64_t depth;
  int target_count, source_count;
  int column_tile, row_tile, column_tiles;

  __device__ __forceinline__ Place(const Params<T>& p, const Sample<T>& of)
      : targets(of.gathered), depth(p.depth), target_count(of.counts[0]), source_count(of.counts[1]) {
    sources = targets + (p.slots - source_count) * depth;
    column_tiles = (target_count + Tile::kCols - 1) / Tile::kCols;
  }

  __device__ __forceinline__ int64_t tiles() const {
    return int64_t{column_tiles} * ((source_count + Tile::kRows - 1) / Tile::kRows);
  }
  __device__ __forceinline__ void start(int64_t tile) {
    column_tile = static_cast<int>(tile % column_tiles);
    row_tile = static_cast<int>(tile / column_tiles);
  }
  __device__ __forceinline__ void advance() {
    if (++column_tile < column_tiles) return;
    column_tile = 0;
    ++row_tile;
  }

  __device__ __forceinline__ int column() const { return column_tile * Tile::kCols; }
  __device__ __forceinline__ int row() const { return row_tile * Tile::kRows; }
  __device__ __forceinline__ int columns() const { return min(target_count - column(), Tile::kCols); }
  __device__ __forceinline__ int rows() const { return min(source_count - row(), Tile::kRows); }
  __device__ __forceinline__ Panels<T> panels() const {
    return {sources + row() * depth, targets + column() * depth, rows(), columns()};
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSM)
    match_tokens_kernel(const __grid_constant__ Params<typename Tile::T> p) {
  constexpr int kWidth = Tile::kSegment, kColumns = Tile::kSegments * kWidth;  // a thread's
  extern __shared__ __align__(128) char shared[];
  const int64_t b = blockIdx.x / p.blocks, first = blockIdx.x % p.blocks * p.tiles;
  const Sample<typename Tile::T> of(p, b);
  Place<Tile> place(p, of);
  const int count = static_cast<int>(min(p.tiles, place.tiles() - first));
  if (count <= 0) return;
  place.start(first);
  auto* const numbers = reinterpret_cast<unsigned long long*>(p.match) + b * p.t;

  stream_tiles<Tile>(shared, {p.depth, p.depth, p.depth}, place, count, [&](const Tile& tile) {
    const int rows = place.rows(), columns = place.columns();
    float scale[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = tile.column(c / kWidth) + c % kWidth;
      scale[c] = column < columns ? __ldg(of.inverse + place.column() + column) : NAN;  // which is never the best
    }
#pragma unroll
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      const int row = place.row() + tile.row(r);
      const bool exists = tile.row(r) < rows;
      const int self = exists ? __ldg(of.twins + row) - place.column() : -1;
      float best = -INFINITY;
      int best_column = -1;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = tile.column(c / kWidth) + c % kWidth;
        const float score = tile.value(r, c / kWidth, c % kWidth) * scale[c];
        if (score > best && column != self) best = score, best_column = column;
      }
      unsigned long long number = kNoMatch;
      if (best_column >= 0) number = match_number(__float_as_uint(best + 0.0f), place.column() + best_column);  // no -0
#pragma unroll
      for (int lane_bit = 1; lane_bit < 32; lane_bit *= 2) {
        if (Tile::kRowLanes & lane_bit) number = max(number, __shfl_xor_sync(0xffffffffu, number, lane_bit));
      }
      if (exists && number != kNoMatch && (threadIdx.x & Tile::kRowLanes) == 0) {
        atomicMax(numbers + __ldg(of.sources + row), number);
      }
    }
    place.advance();
  });
}

__global__ void __launch_bounds__(256)
    finish_match_kernel(float* similarity, int64_t* match, const int32_t* lists, int64_t b, int64_t t) {
  const int64_t index = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (index >= b * t) return;
  const uint64_t number = match[index];
  const float found = __uint_as_float(similarity_bits_of(number)) * similarity[index];
  const bool exists = number != kNoMatch && found == found;  // else the source has no length
  similarity[index] = exists ? found : -INFINITY;
  match[index] = exists ? lists[index / t * 3 * t + place_of(number)] : -1;
}

// The largest number of tiles of a sample of t tokens.
template <class Tile>
int64_t most_tiles(int64_t t, bool may_be_both) {
  if (may_be_both) return ceil_div(t, Tile::kRows) * ceil_div(t, Tile::kCols);
  int64_t most = 0;
  for (int64_t row = 0; row < t; row += Tile::kRows) {  // row + 1 sources at least, so t - row - 1 targets at most
    most = std::max(most, (row / Tile::kRows + 1) * ceil_div(t - row - 1, Tile::kCols));
  }
  return most;
}

template <class Tile>
void launch(const MatchTokens& args, cudaStream_t stream) {
  using T = typename Tile::T;
  Params<T> p = {};
  p.key = static_cast<const T*>(args.key);
  p.target = args.target, p.source = args.source, p.similarity = args.similarity, p.match = args.match;
  p.lists = args.lists, p.counts = args.counts, p.inverse = args.inverse, p.gathered = static_cast<T*>(args.gathered);
  p.b = args.b, p.t = args.t, p.d = args.d, p.slots = args.slots, p.depth = args.depth;
  p.batch_stride = args.key_strides[0], p.token_stride = args.key_strides[1];
  p.vector = is_aligned16(args.key) && args.d % kVector<T> == 0 && (args.b == 1 || p.batch_stride % kVector<T> == 0) &&
             (args.t == 1 || p.token_stride % kVector<T> == 0);

  list_tokens_kernel<T><<<static_cast<unsigned>(args.b), kListThreads, 0, stream>>>(p);
  VLPRUNE_CHECK_LAUNCH("match_tokens");
  const int64_t gather_blocks = ceil_div(args.b * args.slots, kGatherThreads / 32);
  gather_tokens_kernel<T><<<static_cast<unsigned>(gather_blocks), kGatherThreads, 0, stream>>>(p);
  VLPRUNE_CHECK_LAUNCH("match_tokens");

  const int64_t most = most_tiles<Tile>(args.t, args.source != nullptr);
  if (most > 0) {
    const auto kernel = match_tokens_kernel<Tile>;
    const int64_t resident = resident_blocks(kernel, Tile::kThreads, Tile::kSharedBytes, "match_tokens");
    p.tiles = std::clamp(args.b * most / (2 * resident), int64_t{1}, kMostTiles);
    p.blocks = ceil_div(most, p.tiles);
    kernel<<<static_cast<unsigned>(args.b * p.blocks), Tile::kThreads, Tile::kSharedBytes, stream>>>(p);
    VLPRUNE_CHECK_LAUNCH("match_tokens");
  }

  const auto finish_blocks = static_cast<unsigned>(ceil_div(args.b * args.t, 256));
  finish_match_kernel<<<finish_blocks, 256, 0, stream>>>(args.similarity, args.match, args.lists, args.b, args.t);
  VLPRUNE_CHECK_LAUNCH("match_tokens");
}

}  // namespace

void match_tokens(const MatchTokens& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch(args.dtype, [&](auto tag) {
    using T = typename ElementOf<decltype(tag)>::type;
    using Tile = std::conditional_t<std::is_same_v<T, float>, SimtTile, TensorTile<T, 4, 2, 2, 2, 3, true>>;
    launch<Tile>(args, cuda_stream);
  });
}

}  // namespace vlprune::cuda
