// Radix selection by a block: the bound of the `rank` least of the numbers that its threads hold, digit by digit from
// the top, each from a histogram in shared memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cub/block/block_scan.cuh>

namespace vlprune::cuda {

// Counters of one digit, all zero except between count() and the end of find().
template <int kThreads>
struct DigitCounters {
  static constexpr int kBins = std::min(8 * kThreads, 2048), kPerThread = kBins / kThreads;
  static constexpr int kBits = kBins == 256 ? 8 : kBins == 1024 ? 10 : 11;
  static_assert(kBins == 1 << kBits);
  using Scan = cub::BlockScan<uint32_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;

  struct Found {
    uint32_t digit;
    uint32_t below, count;  // how many counted ones have a lower digit, this digit
  };

  alignas(16) uint32_t bins[kBins];
  typename Scan::TempStorage scan;
  Found found;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) bins[i * kThreads + threadIdx.x] = 0;
  }

  __device__ __forceinline__ void count(uint32_t digit) { atomicAdd(&bins[digit], 1u); }

  // The digit of the one of that rank, from 1, among all that the block has counted. Called by all threads.
  __device__ __forceinline__ Found find(uint32_t rank) {
    __syncthreads();
    uint32_t* mine = bins + threadIdx.x * kPerThread;
    uint32_t sum = 0, below;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) sum += mine[i];
    Scan(scan).ExclusiveSum(sum, below);
    if (below < rank && rank <= below + sum) {  // true of one thread
      int i = 0;
      while (rank > below + mine[i]) below += mine[i++];
      found = {threadIdx.x * kPerThread + i, below, mine[i]};
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) mine[i] = 0;
    __syncthreads();
    return found;  // not written again before all threads have come to the next find()
  }
};

// The `rank` least of some numbers: all below `bound`, and `ties` of those equal to it.
struct Bound {
  uint32_t bound, ties;
};

// for_each_number(f) calls f for each number of this thread; those of more than `high` bits are passed over. high
// <= 32.
template <class Counters, class ForEach>
__device__ __forceinline__ Bound find_bound(Counters& counters, int high, uint32_t rank, ForEach&& for_each_number) {
  uint32_t prefix = 0;  // the digits found so far, in their place
  while (high > 0) {
    const int shift = max(high - Counters::kBits, 0);
    for_each_number([&](uint32_t number) {
      const uint32_t rest = number ^ prefix;
      if (__funnelshift_rc(rest, 0, high) == 0) counters.count(rest >> shift);  // rest >> high, also for 32
    });
    const auto found = counters.find(rank);
    prefix |= found.digit << shift;
    rank -= found.below;
    if (rank == found.count) return {prefix + (1u << shift), 0};
    high = shift;
  }
  return {prefix, rank};
}

}  // namespace vlprune::cuda
