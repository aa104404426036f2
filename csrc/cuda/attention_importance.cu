// out[b, j] = sum_i query_weight[b, i] * R_h(head_weight[h] * p[b, h, i, j]),  R = sum or max over the heads,
// p = exp(scale * <q[b, h, i], k[b, h / (H / Hkv), j]> - lse[b, h, i])
//
// Many queries, attention_importance_kernel:
// Grid    B * ceil(Tk/128) * parts: a block has 128 keys of a sample and an equal part of what they meet, in order. For
//         a sum that is every tile of 128 queries of every head, queries fastest; for a maximum every tile of 64
//         queries (fp32: 128), and with each of them all heads, one after another. Tiles that no query sees are left
//         out.
// Block   256 threads, one tile of scores at a time in one pipeline (tile.cuh).
// Warp    32 x 64 of the tile, for a maximum in fp16/bf16 16 x 64.
// Thread  the scores of its 8 or 16 columns in 2, 4 or 8 rows; for a maximum it keeps their largest p. It adds up its
//         columns; at the end, the lanes and then the warps that share a column add theirs, in a fixed order.
// finish_importance_kernel adds the parts, in order, and applies the mask; one thread per key.
//
// Few queries (at most kFewQueries), few_queries_kernel:
// Grid    B * ceil(Tk/16).
// Block   256 threads, 16 keys of a sample and all heads.
// Warp    every eighth bundle of four rows, queries of heads that share a key head.
// Thread  every eighth 16 bytes of four keys.
//
// Many queries: 2 d flops, an exponential and 4 more instructions for each of B H Tq Tk scores, against 2 (128 + 128) d
// elements from L2 for a tile of 128 x 128: at d = 128 in bf16, 64 flops a byte (a maximum: 43) and 1/16 cycle of an SM
// for the exponential beside 1/16 to 1/8 for the product. Few queries: k is read once, and that is what it takes.
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

template <typename T>
struct Params {
  const T* q;
  const T* k;
  const float* lse;
  const float* head_weight;
  const float* query_weight;
  float* partial;
  int64_t b, tq, tk, d, parts;
  int h, hkv, group;  // H, Hkv, H / Hkv
  int64_t q_batch, q_head, q_token, k_batch, k_head, k_token;
  int64_t head_weight_stride;
  int64_t key_tiles;
  float scale;
  bool causal;
  bool vector;  // all rows start at multiples of 16 bytes, and d is one of kVector<T>
};

// What is added to a row's scaled scores: minus infinity where no key was visible.
__device__ __forceinline__ float minus_lse(float lse) { return lse == -INFINITY ? lse : -lse; }

// fp32: within 1 unit in the last place; fp16/bf16: within 2 + 1.2 |x| of them.
template <typename T>
__device__ __forceinline__ float exp_of(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return expf(x);
  } else {
    return __expf(x);
  }
}

template <typename T>
__device__ __forceinline__ float head_weight_of(const Params<T>& p, int64_t b, int64_t h) {
  return p.head_weight == nullptr ? 1.0f : __ldg(p.head_weight + b * p.head_weight_stride + h);
}

template <typename T>
__device__ __forceinline__ float query_weight_of(const Params<T>& p, int64_t b, int64_t i) {
  return p.query_weight == nullptr ? 1.0f : __ldg(p.query_weight + b * p.tq + i);
}

// The place of a tile among those that a block's keys meet: queries fastest for a sum, heads fastest for a maximum.
template <class Tile, bool kMax>
struct Place {
  using T = typename Tile::T;
  const Params<T>& p;
  int64_t b, key;  // of the block; its first key
  int first_query_tile, query_tiles;
  int query_tile, head;

  __device__ __forceinline__ Place(const Params<T>& params, int64_t of_sample, int64_t first_key) : p(params) {
    b = of_sample, key = first_key;
    const int64_t unseen = p.causal ? max(key - (p.tk - p.tq), int64_t{0}) : 0;  // queries that see none of the keys
    query_tiles = static_cast<int>((p.tq + Tile::kRows - 1) / Tile::kRows);
    first_query_tile = static_cast<int>(min(unseen / Tile::kRows, int64_t{query_tiles}));
    query_tile = first_query_tile, head = 0;
  }

  // Tiles, or for a maximum rows of them.
  __device__ __forceinline__ int64_t steps() const {
    return int64_t{query_tiles - first_query_tile} * (kMax ? 1 : p.h);
  }

  __device__ __forceinline__ void start(int64_t step) {
    const int span = query_tiles - first_query_tile;
    head = kMax ? 0 : static_cast<int>(step / span);
    query_tile = first_query_tile + static_cast<int>(kMax ? step : step % span);
  }

  __device__ __forceinline__ void advance() {
    if constexpr (kMax) {
      if (++head < p.h) return;
      head = 0;
      ++query_tile;
    } else {
      if (++query_tile < query_tiles) return;
      query_tile = first_query_tile;
      ++head;
    }
  }

  __device__ __forceinline__ int64_t query() const { return int64_t{query_tile} * Tile::kRows; }
  __device__ __forceinline__ Panels<T> panels() const {
    return {p.q + b * p.q_batch + head * p.q_head + query() * p.q_token,
            p.k + b * p.k_batch + head / p.group * p.k_head + key * p.k_token,
            static_cast<int>(min(p.tq - query(), int64_t{Tile::kRows})),
            static_cast<int>(min(p.tk - key, int64_t{Tile::kCols}))};
  }
};

// An fp32 tile's maxima take the registers of a second block.
template <class Tile, bool kMax>
inline constexpr int kBlocksPerSM = kMax && std::is_same_v<typename Tile::T, float> ? 1 : Tile::kBlocksPerSM;

template <class Tile, bool kMax>
__global__ void __launch_bounds__(Tile::kThreads, kBlocksPerSM<Tile, kMax>)
    attention_importance_kernel(const __grid_constant__ Params<typename Tile::T> p) {
  using T = typename Tile::T;
  constexpr int kRows = Tile::kThreadRows, kWidth = Tile::kSegment, kColumns = Tile::kSegments * kWidth;  // a thread's
  constexpr int kColWarps = Tile::kCols / 64, kRowWarps = Tile::kThreads / 32 / kColWarps;
  extern __shared__ __align__(128) char shared[];
  __shared__ float sums[kRowWarps][Tile::kCols];

  const int64_t part = blockIdx.x % p.parts, block = blockIdx.x / p.parts;
  const int64_t b = block / p.key_tiles, key = block % p.key_tiles * Tile::kCols;
  Place<Tile, kMax> place(p, b, key);
  const int64_t steps = place.steps(), first = steps * part / p.parts, last = steps * (part + 1) / p.parts;

  float sum[kColumns] = {};
  if (first < last) {
    float best[kMax ? kRows : 1][kColumns] = {};
    place.start(first);
    const int count = static_cast<int>((last - first) * (kMax ? p.h : 1));
    stream_tiles<Tile>(shared, {p.q_token, p.k_token, p.d}, place, count, [&](const Tile& tile) {
      const bool first_head = place.head == 0, last_head = place.head + 1 == p.h;
      const float head_weight = head_weight_of(p, b, place.head);
      const float* lse = p.lse + (b * p.h + place.head) * p.tq;
      // Columns that the tile's first row sees; each one after it sees one more.
      const int64_t visible = p.causal ? place.query() + p.tk - p.tq + 1 - key : Tile::kCols;
      const int sees = static_cast<int>(max(min(visible, int64_t{Tile::kCols}), int64_t{-Tile::kRows}));
      float minus[kRows], weight[kRows];
      bool blind = false;  // whether a row saw no key: then its scores may be anything, NaN too
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t i = place.query() + tile.row(r);
        const bool exists = i < p.tq;
        minus[r] = exists ? minus_lse(__ldg(lse + i)) : -INFINITY;
        weight[r] = exists ? query_weight_of(p, b, i) * (kMax ? 1.0f : head_weight) : 0.0f;
        blind |= exists && minus[r] == -INFINITY;
      }
      const auto weigh_tile = [&](auto whole_tile) {
        constexpr bool kWhole = decltype(whole_tile)::value;  // else some rows do not see some columns
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int column = tile.column(c / kWidth) + c % kWidth;
          float of_tile = 0.0f;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            float x = exp_of<T>(fmaf(tile.value(r, c / kWidth, c % kWidth), p.scale, minus[r]));
            if (!kWhole && (column >= sees + tile.row(r) || minus[r] == -INFINITY)) x = 0.0f;
            if constexpr (kMax) {
              x *= head_weight;
              x = first_head ? x : fmaxf(best[r][c], x);
              best[r][c] = x;
            }
            of_tile = fmaf(weight[r], x, of_tile);
          }
          if (!kMax || last_head) sum[c] += of_tile;
        }
      };
      if (sees >= Tile::kCols && !blind) {
        weigh_tile(std::true_type{});
      } else {
        weigh_tile(std::false_type{});
      }
      place.advance();
    });
  }

  // Lanes that differ in the other bits than kRowLanes hold the same columns.
  const Tile layout(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int lane_bit = 1; lane_bit < 32; lane_bit *= 2) {
      if (!(Tile::kRowLanes & lane_bit)) sum[c] += __shfl_xor_sync(0xffffffffu, sum[c], lane_bit);
    }
    if ((lane & ~Tile::kRowLanes) == 0) sums[warp / kColWarps][layout.column(c / kWidth) + c % kWidth] = sum[c];
  }
  __syncthreads();
  const int column = threadIdx.x;
  if (column < Tile::kCols && key + column < p.tk) {
    float total = sums[0][column];
#pragma unroll
    for (int w = 1; w < kRowWarps; ++w) total += sums[w][column];
    p.partial[(part * p.b + b) * p.tk + key + column] = total;
  }
}

constexpr int kFewThreads = 256, kFewWarps = kFewThreads / 32;
constexpr int kFewKeys = 16;  // of a block
constexpr int kFewRows = 4;   // (head, query) that meet the same load of k

template <typename T, bool kMax, bool kAligned>  // kAligned: Params::vector
__global__ void __launch_bounds__(kFewThreads, 1) few_queries_kernel(const __grid_constant__ Params<T> p) {
  constexpr int kWidth = kVector<T>, kLanes = 8, kThreadKeys = kFewKeys * kLanes / 32;
  // Of each warp: for a sum one row of totals, for a maximum one for each query.
  __shared__ float totals[kFewWarps][kMax ? kFewQueries : 1][kFewKeys];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slot = lane / kLanes;
  const int64_t blocks = (p.tk + kFewKeys - 1) / kFewKeys;
  const int64_t b = blockIdx.x / blocks, key = blockIdx.x % blocks * kFewKeys;
  // Thread keys are slot, slot + 4, ...; past the last key, the last.
  int64_t at[kThreadKeys];
#pragma unroll
  for (int x = 0; x < kThreadKeys; ++x) at[x] = min(key + slot + 4 * x, p.tk - 1) * p.k_token;

  // kWidth elements of a row from c on, zeros where there are none.
  const auto read = [&](const T* row, int64_t c) -> uint4 {
    if constexpr (kAligned) {
      return __ldg(reinterpret_cast<const uint4*>(row + c));
    } else {
      T elements[kWidth];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) elements[e] = c + e < p.d ? row[c + e] : from_float<T>(0.0f);
      uint4 packed;
      memcpy(&packed, elements, sizeof(packed));
      return packed;
    }
  };

  float sum[kThreadKeys] = {};
  const int tq = static_cast<int>(p.tq), rows = p.group * tq, bundles = (rows + kFewRows - 1) / kFewRows;
  if constexpr (kMax) {
    for (int i = 0; i < tq && lane % kLanes == 0; ++i) {
#pragma unroll
      for (int x = 0; x < kThreadKeys; ++x) totals[warp][i][slot + 4 * x] = -INFINITY;
    }
  }
  for (int bundle = warp; bundle < p.hkv * bundles; bundle += kFewWarps) {
    const int kv = bundle / bundles, row = bundle % bundles * kFewRows;
    const T* k = p.k + b * p.k_batch + kv * p.k_head;
    const T* q[kFewRows];
#pragma unroll
    for (int r = 0; r < kFewRows; ++r) {
      const int of_group = min(row + r, rows - 1);
      q[r] = p.q + b * p.q_batch + (kv * p.group + of_group / tq) * p.q_head + of_group % tq * p.q_token;
    }
    float dot[kFewRows][kThreadKeys] = {};
#pragma unroll 2
    for (int64_t c = lane % kLanes * kWidth; c < p.d; c += kLanes * kWidth) {
      uint4 packed[kThreadKeys];
#pragma unroll
      for (int x = 0; x < kThreadKeys; ++x) packed[x] = read(k + at[x], c);
#pragma unroll
      for (int r = 0; r < kFewRows; ++r) {
        if (row + r >= rows) break;  // the same in the whole warp
        float z[kWidth];
        unpack<T>(read(q[r], c), z);
#pragma unroll
        for (int x = 0; x < kThreadKeys; ++x) {
          float y[kWidth];
          unpack<T>(packed[x], y);
#pragma unroll
          for (int e = 0; e < kWidth; ++e) dot[r][x] = fmaf(z[e], y[e], dot[r][x]);
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kFewRows; ++r) {
      if (row + r >= rows) break;
      const int h = kv * p.group + (row + r) / tq, i = (row + r) % tq;
      const float minus = minus_lse(__ldg(p.lse + (b * p.h + h) * p.tq + i));
      const float head_weight = head_weight_of(p, b, h), query_weight = query_weight_of(p, b, i);
#pragma unroll
      for (int x = 0; x < kThreadKeys; ++x) {
        float score = dot[r][x];
#pragma unroll
        for (int lane_bit = 1; lane_bit < kLanes; lane_bit *= 2) {
          score += __shfl_xor_sync(0xffffffffu, score, lane_bit);
        }
        float value = exp_of<T>(fmaf(score, p.scale, minus));
        if (minus == -INFINITY || (p.causal && key + slot + 4 * x > i + p.tk - p.tq)) value = 0.0f;
        value *= head_weight;
        if constexpr (kMax) {
          float& best = totals[warp][i][slot + 4 * x];  // one lane's own
          if (lane % kLanes == 0) best = fmaxf(best, value);
        } else {
          sum[x] = fmaf(query_weight, value, sum[x]);
        }
      }
    }
  }

  if constexpr (!kMax) {
#pragma unroll
    for (int x = 0; x < kThreadKeys; ++x) {
      if (lane % kLanes == 0) totals[warp][0][slot + 4 * x] = sum[x];
    }
  }
  __syncthreads();
  const int own = threadIdx.x;
  if (own >= kFewKeys || key + own >= p.tk) return;
  float total = 0.0f;
  if constexpr (kMax) {
    for (int64_t i = 0; i < p.tq; ++i) {
      float best = totals[0][i][own];
#pragma unroll
      for (int w = 1; w < kFewWarps; ++w) best = fmaxf(best, totals[w][i][own]);
      total = fmaf(query_weight_of(p, b, i), best, total);
    }
  } else {
#pragma unroll
    for (int w = 0; w < kFewWarps; ++w) total += totals[w][0][own];
  }
  p.partial[b * p.tk + key + own] = total;
}

// partial and out may be the same.
__global__ void __launch_bounds__(256)
    finish_importance_kernel(const float* partial, const uint8_t* key_mask, float* out, int64_t keys, int64_t parts) {
  const int64_t index = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (index >= keys) return;
  float sum = partial[index];
  for (int64_t part = 1; part < parts; ++part) sum += partial[part * keys + index];
  out[index] = key_mask == nullptr || key_mask[index] != 0 ? sum : 0.0f;
}

template <class Tile, bool kMax>
void launch_tiles(Params<typename Tile::T> p, cudaStream_t stream) {
  p.key_tiles = ceil_div(p.tk, Tile::kCols);
  const auto kernel = attention_importance_kernel<Tile, kMax>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes),
        "attention_importance");
  const auto blocks = static_cast<unsigned>(p.b * p.key_tiles * p.parts);
  kernel<<<blocks, Tile::kThreads, Tile::kSharedBytes, stream>>>(p);
}

template <typename T, bool kAligned>
using SumTile = TensorTile<T, 4, 2, 2, kAligned ? 2 : 1, 3, kAligned>;
template <typename T, bool kAligned>
using MaxTile = TensorTile<T, 4, 2, 1, kAligned ? 2 : 1, 3, kAligned>;

template <typename T, bool kMax>
void launch(const AttentionImportance& args, cudaStream_t stream) {
  Params<T> p = {};
  p.q = static_cast<const T*>(args.q);
  p.k = static_cast<const T*>(args.k);
  p.lse = args.lse, p.head_weight = args.head_weight, p.query_weight = args.query_weight, p.partial = args.partial;
  p.b = args.b, p.h = static_cast<int>(args.h), p.hkv = static_cast<int>(args.hkv), p.group = p.h / p.hkv;
  p.tq = args.tq, p.tk = args.tk, p.d = args.d, p.parts = args.parts;
  p.q_batch = args.q_strides[0], p.q_head = args.q_strides[1], p.q_token = args.q_strides[2];
  p.k_batch = args.k_strides[0], p.k_head = args.k_strides[1], p.k_token = args.k_strides[2];
  p.head_weight_stride = args.head_weight_stride;
  p.scale = args.scale, p.causal = args.causal;
  p.vector = is_aligned16(args.q) && is_aligned16(args.k) && args.d % kVector<T> == 0;
  for (int i = 0; i < 3; ++i) {
    p.vector = p.vector && args.q_strides[i] % kVector<T> == 0 && args.k_strides[i] % kVector<T> == 0;
  }

  if (args.tq <= kFewQueries && args.parts == 1) {
    const auto blocks = static_cast<unsigned>(args.b * ceil_div(args.tk, kFewKeys));
    const auto kernel = p.vector ? few_queries_kernel<T, kMax, true> : few_queries_kernel<T, kMax, false>;
    kernel<<<blocks, kFewThreads, 0, stream>>>(p);
  } else if constexpr (std::is_same_v<T, float>) {
    launch_tiles<SimtTile, kMax>(p, stream);
  } else if (p.vector) {
    launch_tiles<std::conditional_t<kMax, MaxTile<T, true>, SumTile<T, true>>, kMax>(p, stream);
  } else {
    launch_tiles<std::conditional_t<kMax, MaxTile<T, false>, SumTile<T, false>>, kMax>(p, stream);
  }
  VLPRUNE_CHECK_LAUNCH("attention_importance");

  if (args.parts > 1 || args.key_mask != nullptr) {
    const int64_t keys = args.b * args.tk;
    finish_importance_kernel<<<static_cast<unsigned>(ceil_div(keys, 256)), 256, 0, stream>>>(
        args.partial, args.key_mask, args.out, keys, args.parts);
    VLPRUNE_CHECK_LAUNCH("attention_importance");
  }
}

}  // namespace

void attention_importance(const AttentionImportance& args, void* stream) {
  if (args.b == 0 || args.tk == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch(args.dtype, [&](auto tag) {
    using T = typename ElementOf<decltype(tag)>::type;
    args.max ? launch<T, true>(args, cuda_stream) : launch<T, false>(args, cuda_stream);
  });
}

}  // namespace vlprune::cuda
