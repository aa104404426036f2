// cub::BlockReduce, for the emulator: like CUB's it has a barrier within, none at its end, and a result in thread 0
// alone.
#pragma once

#include <cuda_runtime.h>

namespace cub {

template <typename T, int kThreads>
class BlockReduce {
 public:
  struct TempStorage {
    T of_warp[kThreads / 32];
  };
  explicit BlockReduce(TempStorage& storage) : storage_(storage) {}

  template <typename Operation>
  T Reduce(T mine, const Operation& operation) {
    if (blockDim.x * blockDim.y * blockDim.z != kThreads) emulator::fail("uses a BlockReduce of other threads");
    const emulator::Payload* payloads = emulator::exchange(emulator::wrap(mine), 0xffffffffu, EMULATOR_SITE);
    T result = mine;
    if (emulator::lane() == 0) {
      for (int i = 1; i < 32; ++i) result = operation(result, emulator::unwrap<T>(payloads[i]));
      storage_.of_warp[threadIdx.x / 32] = result;
    }
    __syncthreads();
    if (threadIdx.x != 0) {
      std::memset(static_cast<void*>(&result), 0xcb, sizeof(result));
      return result;
    }
    for (int warp = 1; warp < kThreads / 32; ++warp) result = operation(result, storage_.of_warp[warp]);
    return result;
  }
  T Sum(T mine) {
    return Reduce(mine, [](const T& a, const T& b) { return a + b; });
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
