// weight[i, j] = 0 where (key[i, j], j) is among the k least of row i;  key[i, j] = bits of |weight[i, j]| * scale[j]
//
// Radix selection: a digit of up to 11 bits per level, from the top of the keys' 31 bits. A level counts the digits of
// the keys that begin with the digits found so far, and finds the digit that holds the k-th. The search ends when all
// keys that share the found digits are to be pruned: mostly after two levels. Where only some of several equal keys
// are, a second search decides between them by column, in two levels for rows of up to 2^22.
//
// Grid    one block per row (or segment of one).
// Block   32 to 1024 threads by the width of the row; kBins counters of digits in shared memory, filled by atomics.
// Thread  kVectors 16-byte vectors, a block apart; their keys stay in registers. kVectors = 0: rows of any width, whose
//         keys each level reads anew. For the search, kBins / kThreads neighbouring counters.
//
// Moves 2 out in elements through memory. The last pass reads the row again, from L1: cheaper than the registers to
// keep it. Per key some 4 instructions to load, 5 and a shared atomic per level, 5 to write, and 60 / 16 per level for
// the search (a thread's share, 8 of 2048 counters, by its keys): about 27 at two levels. A warp's increments of one
// counter are one (ATOMS.POPC.INC), so equal keys cost no more than others.
#include <algorithm>
#include <cstdint>

#include "check.cuh"
#include "keys.cuh"
#include "launch.cuh"
#include "ops.h"
#include "radix_select.cuh"

namespace vlprune::cuda {
namespace {

template <typename T>
struct Params {
  KeyMatrix<T> keys;
  T* weight;                // [keys.rows, keys.width], as keys.weight
  uint8_t* mask;            // [keys.rows, keys.width], contiguous, or null
  int64_t k;                // where k_of_row is null
  const int64_t* k_of_row;  // [keys.rows] or null
  int width;                // of a segment
  unsigned segments;        // per row
};

// Once the key of the k-th is known, and shared by keys that are not all pruned: numbers in the same order, but among
// equal keys by column.
__device__ __forceinline__ uint32_t number_tied(uint32_t key, uint32_t kth, int column) {
  return key < kth ? 0 : key == kth ? column + 1 : kNoKey;
}

// Rows that a multiprocessor has in hand together, so that some load while others search; bounds the registers.
template <int kThreads>
inline constexpr int kRowsInHand = kThreads == 1024  ? 1
                                   : kThreads == 512 ? 2
                                   : kThreads == 256 ? 5
                                                     : 8;

template <typename T, int kThreads, int kVectors>
__global__ void __launch_bounds__(kThreads, kRowsInHand<kThreads>) prune_smallest_kernel(const Params<T> p) {
  __shared__ DigitCounters<kThreads> counters;
  counters.clear();

  unsigned row_index = blockIdx.x, first = 0;  // row and first column of the segment
  if (p.segments > 1) row_index = blockIdx.x / p.segments, first = blockIdx.x % p.segments * p.width;
  KeyRow<T> row = p.keys.row(row_index);
  row.weight += first;
  row.scale += row.scale == nullptr ? 0 : first;
  row.width = p.width;
  const int vectors = row.vectors();

  constexpr int kHeld = kVectors > 0 ? kVectors : 1;
  uint32_t held[kHeld][kVector<T>];
  if constexpr (kVectors > 0) {
    constexpr int kBatch = kThreads == 1024 ? 1 : 2;  // vectors under way together, as many as registers allow
#pragma unroll
    for (int batch = 0; batch < kVectors; batch += kBatch) {
      uint4 packed[kBatch];
#pragma unroll
      for (int v = batch; v < batch + kBatch && v < kVectors; ++v) {
        const int vector = v * kThreads + threadIdx.x;
        if (vector < vectors) packed[v - batch] = row.load(row.column(vector));
      }
#pragma unroll
      for (int v = batch; v < batch + kBatch && v < kVectors; ++v) {
        const int vector = v * kThreads + threadIdx.x;
        if (vector < vectors) {
          float scale[kVector<T>];
          row.load_scale(row.column(vector), scale);
          row.to_keys(row.column(vector), packed[v - batch], scale, held[v]);
        }
      }
    }
  }
  bool tied = false;
  uint32_t kth = 0;
  const auto number_vector_tied = [&](int column, uint32_t (&number)[kVector<T>]) {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) number[e] = number_tied(number[e], kth, column + e);
  };
  // f(column, numbers) for each vector of this thread; the numbers are the keys until there are ties to break.
  const auto for_each_vector = [&](auto&& f) {
    if constexpr (kVectors > 0) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int vector = v * kThreads + threadIdx.x;
        if (vector < vectors) f(row.column(vector), held[v]);
      }
    } else {
      for (int vector = threadIdx.x; vector < vectors; vector += kThreads) {
        row.load_keys(row.column(vector), held[0]);
        if (tied) number_vector_tied(row.column(vector), held[0]);
        f(row.column(vector), held[0]);
      }
    }
  };
  const auto for_each_number = [&](auto&& f) {
    for_each_vector([&](int, const uint32_t (&number)[kVector<T>]) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) f(number[e]);
    });
  };

  __syncthreads();  // the counters are clear

  const int64_t k = p.k_of_row == nullptr ? p.k : p.k_of_row[row_index];
  uint32_t bound = k > 0 ? 0x80000000u : 0;  // pruned are the numbers below
  if (k > 0 && k < p.width) {
    const Bound key = find_bound(counters, 31, static_cast<uint32_t>(k), for_each_number);
    bound = key.bound;
    if (key.ties > 0) {
      kth = key.bound, tied = true;
      if constexpr (kVectors > 0) for_each_vector(number_vector_tied);
      bound = find_bound(counters, 32 - __clz(p.width), static_cast<uint32_t>(k), for_each_number).bound;
    }
  } else if (k <= 0 && p.mask == nullptr) {
    return;
  }

  for_each_vector([&](int column, const uint32_t (&number)[kVector<T>]) {
    bool pruned[kVector<T>];
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) pruned[e] = number[e] < bound;
    if (p.mask != nullptr) {
      row.store_mask(p.mask + int64_t{row_index} * p.keys.width + first, column, pruned);
    } else {
      row.store(p.weight + row_index * p.keys.stride + first, column, row.load(column), pruned);
    }
  });
}

// kKeys: of a thread, in registers; 0 for any number.
template <typename T, int kThreads, int kKeys>
void launch(const Params<T>& p, cudaStream_t stream, const char* op) {
  const auto blocks = static_cast<unsigned>(p.keys.rows * p.segments);
  prune_smallest_kernel<T, kThreads, kKeys / kVector<T>><<<blocks, kThreads, 0, stream>>>(p);
  VLPRUNE_CHECK_LAUNCH(op);
}

}  // namespace

void prune_segments(const PruneSmallest& args, int64_t width, cudaStream_t stream, const char* op) {
  if (args.keys.out == 0 || args.keys.in == 0) return;
  dispatch(args.keys.dtype, [&](auto tag) {
    using T = typename ElementOf<decltype(tag)>::type;
    const KeyMatrix<T> keys(args.keys);
    const int64_t segments = args.keys.in / width;
    const Params<T> p = {keys,
                         static_cast<T*>(args.weight),
                         args.mask,
                         args.k,
                         args.k_of_row,
                         static_cast<int>(width),
                         static_cast<unsigned>(segments)};
    const bool aligned = keys.aligned_rows() && (segments == 1 || width % kVector<T> == 0);
    const int64_t room = width + (aligned ? 0 : kVector<T> - 1);  // a row that starts inside a vector
    if (room <= 32 * 8) {
      launch<T, 32, 8>(p, stream, op);
    } else if (room <= 128 * 8) {
      launch<T, 128, 8>(p, stream, op);
    } else if (room <= 256 * 16) {
      launch<T, 256, 16>(p, stream, op);
    } else if (room <= 512 * 24) {
      launch<T, 512, 24>(p, stream, op);
    } else if (room <= 1024 * 32) {
      launch<T, 1024, 32>(p, stream, op);
    } else {
      launch<T, 1024, 0>(p, stream, op);
    }
  });
}

void prune_smallest(const PruneSmallest& args, void* stream) {
  prune_segments(args, args.keys.in, static_cast<cudaStream_t>(stream), "prune_smallest");
}

}  // namespace vlprune::cuda
