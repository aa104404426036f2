// below[i] = #{ j : key[i, j] < threshold },  equal[i] = #{ j : key[i, j] = threshold }
//
// Grid    one block per row.
// Block   32, 256 or 1024 threads by the width of the row; each thread every kThreads-th vector.
// Thread  two counts in one 64-bit number, which the block adds up.
//
// Moves out in elements once, 16 out bytes of counts. Per key some 4 instructions to load and 4 to count.
#include <cstdint>
#include <cub/block/block_reduce.cuh>

#include "check.cuh"
#include "keys.cuh"
#include "launch.cuh"
#include "ops.h"

namespace vlprune::cuda {
namespace {

template <typename T>
struct Params {
  KeyMatrix<T> keys;
  const int64_t* threshold;  // [1]
  int64_t* below;            // [keys.rows]
  int64_t* equal;            // [keys.rows]
};

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) count_keys_kernel(const Params<T> p) {
  using Reduce = cub::BlockReduce<uint64_t, kThreads>;
  __shared__ typename Reduce::TempStorage reduce;
  const auto threshold = static_cast<uint32_t>(*p.threshold);
  const KeyRow<T> row = p.keys.row(blockIdx.x);
  uint32_t below = 0, equal = 0;
#pragma unroll 4
  for (int vector = threadIdx.x; vector < row.vectors(); vector += kThreads) {
    uint32_t key[kVector<T>];
    row.load_keys(row.column(vector), key);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) below += key[e] < threshold, equal += key[e] == threshold;
  }
  const uint64_t sum = Reduce(reduce).Sum(uint64_t{equal} << 32 | below);  // a row has fewer than 2^31 keys
  if (threadIdx.x == 0) {
    p.below[blockIdx.x] = static_cast<int64_t>(sum & 0xffffffffu);
    p.equal[blockIdx.x] = static_cast<int64_t>(sum >> 32);
  }
}

template <int kThreads, typename T>
void launch(const Params<T>& p, cudaStream_t stream) {
  count_keys_kernel<T, kThreads><<<static_cast<unsigned>(p.keys.rows), kThreads, 0, stream>>>(p);
  VLPRUNE_CHECK_LAUNCH("count_keys");
}

}  // namespace

void count_keys(const CountKeys& args, void* stream) {
  if (args.keys.out == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch(args.keys.dtype, [&](auto tag) {
    using T = typename ElementOf<decltype(tag)>::type;
    const Params<T> p = {KeyMatrix<T>(args.keys), args.threshold, args.below, args.equal};
    if (args.keys.in <= 1024) {
      launch<32>(p, cuda_stream);
    } else if (args.keys.in <= 16384) {
      launch<256>(p, cuda_stream);
    } else {
      launch<1024>(p, cuda_stream);
    }
  });
}

}  // namespace vlprune::cuda
