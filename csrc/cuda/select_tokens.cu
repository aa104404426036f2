// index[i, :] = the `keep` tokens of row i that come first by number (ops.h), ties to the lower position; ascending
//
// Radix selection (radix_select.cuh) of the number of the last token to keep: three levels of 11, 11 and 10 bits, fewer
// where all tokens that share the digits found stay. Then the kept ones in order: a scan over the block counts, for
// each thread, the tokens before its own that are below the bound and those that are equal to it; of the latter, the
// first `ties` stay.
//
// Grid    one block per row.
// Block   256 to 1024 threads by the number of tokens; kBins counters of digits in shared memory, filled by atomics.
// Thread  kFour neighbouring tokens, their numbers in registers. kHeld = false: rows of any number of tokens, four a
//         thread at a time, whose numbers each level reads anew.
//
// Moves rows tokens scores once (again from a cache) and rows keep positions. What takes time is waiting: for the load,
// and at the barriers of up to three levels and of the scans.
#include <cstdint>

#include "check.cuh"
#include "dtype.cuh"
#include "ops.h"
#include "radix_select.cuh"
#include "score_number.h"

namespace vlprune::cuda {
namespace {

constexpr int kFour = 4;

template <typename T>
struct Params {
  const T* score;          // [rows, tokens], rows `score_stride` apart
  const uint8_t* protect;  // [rows, tokens], rows `protect_stride` apart, or null
  int64_t* index;          // [rows, keep]
  int64_t score_stride, protect_stride;
  uint32_t tokens, keep;
};

template <typename T>
struct Row {
  const T* score;          // [tokens]
  const uint8_t* protect;  // [tokens] or null
  uint32_t tokens;
  bool crowded;  // as many are protected as are kept, or more

  __device__ __forceinline__ uint32_t count_protected(uint32_t first) const {
    uint32_t count = 0;
#pragma unroll
    for (int e = 0; e < kFour; ++e) count += first + e < tokens && protect[first + e] != 0;
    return count;
  }

  // The numbers of tokens first, first + 1, ..; kNever behind the last.
  __device__ __forceinline__ void load(uint32_t first, uint32_t (&number)[kFour]) const {
#pragma unroll
    for (int e = 0; e < kFour; ++e) {
      number[e] = first + e < tokens ? score_number(__float_as_uint(to_float(score[first + e]))) : kNever;
    }
    if (protect == nullptr) return;
#pragma unroll
    for (int e = 0; e < kFour; ++e) {
      if (first + e < tokens && (protect[first + e] != 0) != crowded) number[e] = crowded ? kNever : kAlways;
    }
  }
};

template <typename T, int kThreads, bool kHeld>
__global__ void __launch_bounds__(kThreads, 1) select_tokens_kernel(const Params<T> p) {
  using Counters = DigitCounters<kThreads>;
  using Scan = typename Counters::Scan;
  constexpr uint32_t kChunk = kThreads * kFour;
  static_assert(kChunk < 1 << 16, "two counts of a chunk share 32 bits");
  __shared__ Counters counters;
  counters.clear();

  const int64_t row_index = blockIdx.x;
  Row<T> row = {p.score + row_index * p.score_stride, nullptr, p.tokens, false};
  int64_t* const index = p.index + row_index * p.keep;
  const uint32_t mine = threadIdx.x * kFour;  // of each chunk; tokens + kChunk < 2^32

  if (p.protect != nullptr) {
    row.protect = p.protect + row_index * p.protect_stride;
    uint32_t count = 0, before, total;
    for (uint32_t chunk = 0; chunk < p.tokens; chunk += kChunk) count += row.count_protected(chunk + mine);
    Scan(counters.scan).ExclusiveSum(count, before, total);
    row.crowded = total >= p.keep;
  }

  uint32_t number[kFour];
  if constexpr (kHeld) row.load(mine, number);
  __syncthreads();  // the counters are clear, the scan is done

  const Bound bound = find_bound(counters, 32, p.keep, [&](auto&& f) {
    for (uint32_t chunk = 0; chunk < p.tokens; chunk += kChunk) {
      if constexpr (!kHeld) row.load(chunk + mine, number);
#pragma unroll
      for (int e = 0; e < kFour; ++e) {
        if (number[e] != kNever) f(number[e]);
      }
    }
  });

  uint32_t all_below = 0, all_equal = 0;  // in the chunks so far
  for (uint32_t chunk = 0; chunk < p.tokens; chunk += kChunk) {
    if constexpr (!kHeld) row.load(chunk + mine, number);
    uint32_t counts = 0, before, total;  // below << 16 | equal
#pragma unroll
    for (int e = 0; e < kFour; ++e) counts += number[e] < bound.bound ? 1u << 16 : number[e] == bound.bound;
    Scan(counters.scan).ExclusiveSum(counts, before, total);
    uint32_t below = all_below + (before >> 16), equal = all_equal + (before & 0xffffu);
#pragma unroll
    for (int e = 0; e < kFour; ++e) {
      const bool is_below = number[e] < bound.bound, is_equal = number[e] == bound.bound;
      if (is_below || (is_equal && equal < bound.ties)) index[below + min(equal, bound.ties)] = chunk + mine + e;
      below += is_below;
      equal += is_equal;
    }
    all_below += total >> 16;
    all_equal += total & 0xffffu;
    __syncthreads();  // before the scan's memory is used again
  }
}

template <typename T, int kThreads, bool kHeld>
void launch(const Params<T>& p, int64_t rows, cudaStream_t stream) {
  select_tokens_kernel<T, kThreads, kHeld><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(p);
  VLPRUNE_CHECK_LAUNCH("select_tokens");
}

}  // namespace

void select_tokens(const SelectTokens& args, void* stream) {
  if (args.rows == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch(args.dtype, [&](auto tag) {
    using T = typename ElementOf<decltype(tag)>::type;
    const Params<T> p = {static_cast<const T*>(args.score),
                         args.protect,
                         args.index,
                         args.score_stride,
                         args.protect_stride,
                         static_cast<uint32_t>(args.tokens),
                         static_cast<uint32_t>(args.keep)};
    if (args.tokens <= 256 * kFour) {
      launch<T, 256, true>(p, args.rows, cuda_stream);
    } else if (args.tokens <= 512 * kFour) {
      launch<T, 512, true>(p, args.rows, cuda_stream);
    } else if (args.tokens <= 1024 * kFour) {
      launch<T, 1024, true>(p, args.rows, cuda_stream);
    } else {
      launch<T, 1024, false>(p, args.rows, cuda_stream);
    }
  });
}

}  // namespace vlprune::cuda
