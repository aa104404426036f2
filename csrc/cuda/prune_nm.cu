// weight[i, j] = 0 where j is among the n least of its group of m by (key[i, j], j);  groups are m consecutive columns
//
// Three ways, by m: 2, 4, 8, 16 as below; up to 64, one thread per group, which compares all pairs of it from memory;
// above, the groups are selected from as rows are (prune_smallest.cu).
//
// Grid    (rows, units): a unit is the longer of a group and a 16-byte vector.
// Block   256 threads, as many neighbouring units of a row as there are (up to 256, rounded to a power of two) by rows.
// Thread  one unit in each of kRows rows, blockDim.y apart, all loads under way together, under one load of the scales.
//
// Moves 2 out in elements. A key's place in its group is the number of keys that come before it: 3 instructions for
// each pair, so 3 (m - 1) / 2 per key, 4.5 at 2:4 and 22.5 at m = 16; with loading and storing about 10 and 28.
#include <algorithm>
#include <cstdint>

#include "check.cuh"
#include "keys.cuh"
#include "launch.cuh"
#include "ops.h"

namespace vlprune::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxGrid = 65535;  // in y

template <typename T>
struct Params {
  KeyMatrix<T> keys;
  T* weight;      // [keys.rows, keys.width], as keys.weight
  uint8_t* mask;  // [keys.rows, keys.width], contiguous, or null
  int n, m;
};

template <typename T, int kM>
inline constexpr int kUnit = kM > kVector<T> ? kM : kVector<T>;  // columns
template <typename T, int kM>
inline constexpr int kRows = kUnit<T, kM> >= 4 * kVector<T> ? 1 : 4 * kVector<T> / kUnit<T, kM>;  // of a thread

// pruned[i] for the n least of key[0 .. kM - 1], ties to the lower index.
template <int kM>
__device__ __forceinline__ void choose_least(const uint32_t* key, int n, bool* pruned) {
  int before[kM];  // how many come before i: at first all lower indices
#pragma unroll
  for (int i = 0; i < kM; ++i) before[i] = i;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = i + 1; j < kM; ++j) {
      const bool swapped = key[j] < key[i];
      before[i] += swapped;
      before[j] -= swapped;
    }
  }
#pragma unroll
  for (int i = 0; i < kM; ++i) pruned[i] = before[i] < n;
}

template <typename T, int kM>
__global__ void __launch_bounds__(kThreads) prune_nm_kernel(const Params<T> p) {
  constexpr int kColumns = kUnit<T, kM>, kVectors = kColumns / kVector<T>, kThreadRows = kRows<T, kM>;
  const int64_t first_row = blockIdx.x * int64_t{kThreadRows} * blockDim.y + threadIdx.y;
  const int step = gridDim.y * blockDim.x * kColumns;
  int column = (blockIdx.y * blockDim.x + threadIdx.x) * kColumns;
  for (; column < p.keys.width; column += step) {
    uint4 packed[kThreadRows][kVectors];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const int64_t i = first_row + r * int64_t{blockDim.y};
      if (i >= p.keys.rows) continue;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) packed[r][v] = p.keys.row(i).load(column + v * kVector<T>);
    }
    float scale[kVectors][kVector<T>];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) p.keys.row(0).load_scale(column + v * kVector<T>, scale[v]);

#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const int64_t i = first_row + r * int64_t{blockDim.y};
      if (i >= p.keys.rows) continue;
      const KeyRow<T> row = p.keys.row(i);
      uint32_t key[kColumns];
      bool pruned[kVectors][kVector<T>];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        row.to_keys(column + v * kVector<T>, packed[r][v], scale[v], key + v * kVector<T>);
      }
#pragma unroll
      for (int g = 0; g < kColumns; g += kM) choose_least<kM>(key + g, p.n, &pruned[0][0] + g);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int at = column + v * kVector<T>;
        if (p.mask != nullptr) {
          row.store_mask(p.mask + i * p.keys.width, at, pruned[v]);
        } else {
          row.store(p.weight + i * p.keys.stride, at, packed[r][v], pruned[v]);
        }
      }
    }
  }
}

constexpr int kMaxLoopGroup = 64;  // as many as `pruned` has bits

template <typename T>
__global__ void __launch_bounds__(kThreads) prune_any_nm_kernel(const Params<T> p) {
  const int64_t i = blockIdx.x * int64_t{blockDim.y} + threadIdx.y;
  if (i >= p.keys.rows) return;
  const KeyRow<T> row = p.keys.row(i);
  const auto key_at = [&](int j) {
    return key_of(to_float(row.weight[j]), row.scale == nullptr ? 1.0f : __ldg(row.scale + j));
  };
  const int groups = p.keys.width / p.m;
  for (int group = blockIdx.y * blockDim.x + threadIdx.x; group < groups; group += gridDim.y * blockDim.x) {
    const int first = group * p.m;
    uint64_t pruned = 0;
    for (int a = 0; a < p.m; ++a) {
      const uint32_t key = key_at(first + a);
      int before = 0;
      for (int b = 0; b < p.m; ++b) before += key_at(first + b) < key + (b < a ? 1 : 0);
      pruned |= uint64_t{before < p.n} << a;
    }
    for (int a = 0; a < p.m; ++a) {
      const bool flag = (pruned >> a & 1) != 0;
      if (p.mask != nullptr) {
        p.mask[i * p.keys.width + first + a] = flag;
      } else if (flag) {
        p.weight[i * p.keys.stride + first + a] = from_float<T>(0.0f);
      }
    }
  }
}

template <typename T>
void launch(void (*kernel)(Params<T>), const Params<T>& p, int unit, int rows_per_thread, cudaStream_t stream) {
  const int64_t units = ceil_div(p.keys.width, unit);
  unsigned across = 1;
  while (across < kThreads && across < units) across *= 2;
  const dim3 block(across, kThreads / across);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.keys.rows, int64_t{block.y} * rows_per_thread)),
                  static_cast<unsigned>(std::min<int64_t>(ceil_div(units, across), kMaxGrid)));
  kernel<<<grid, block, 0, stream>>>(p);
  VLPRUNE_CHECK_LAUNCH("prune_nm");
}

template <int kM, typename T>
void launch_unit(const Params<T>& p, cudaStream_t stream) {
  launch(prune_nm_kernel<T, kM>, p, kUnit<T, kM>, kRows<T, kM>, stream);
}

}  // namespace

void prune_nm(const PruneNM& args, void* stream) {
  if (args.keys.out == 0 || args.keys.in == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.m > kMaxLoopGroup) {
    prune_segments({args.keys, args.weight, args.mask, args.n, nullptr}, args.m, cuda_stream, "prune_nm");
    return;
  }
  dispatch(args.keys.dtype, [&](auto tag) {
    using T = typename ElementOf<decltype(tag)>::type;
    const Params<T> p = {KeyMatrix<T>(args.keys), static_cast<T*>(args.weight), args.mask, static_cast<int>(args.n),
                         static_cast<int>(args.m)};
    switch (args.m) {
      case 2: return launch_unit<2>(p, cuda_stream);
      case 4: return launch_unit<4>(p, cuda_stream);
      case 8: return launch_unit<8>(p, cuda_stream);
      case 16: return launch_unit<16>(p, cuda_stream);
      default: return launch(prune_any_nm_kernel<T>, p, static_cast<int>(args.m), 1, cuda_stream);
    }
  });
}

}  // namespace vlprune::cuda
