// cub::BlockScan, for the emulator: like CUB's it has a barrier within and none at its end.
#pragma once

#include <cuda_runtime.h>

namespace cub {

enum BlockScanAlgorithm { BLOCK_SCAN_RAKING, BLOCK_SCAN_WARP_SCANS };

template <typename T, int kThreads, BlockScanAlgorithm = BLOCK_SCAN_RAKING>
class BlockScan {
 public:
  struct TempStorage {
    T of_warp[kThreads / 32];
  };
  explicit BlockScan(TempStorage& storage) : storage_(storage) {}

  void ExclusiveSum(T mine, T& before) {
    T total;
    ExclusiveSum(mine, before, total);
  }
  void ExclusiveSum(T mine, T& before, T& total) {
    if (blockDim.x * blockDim.y * blockDim.z != kThreads) emulator::fail("uses a BlockScan of other threads");
    const emulator::Payload* payloads = emulator::exchange(emulator::wrap(mine), 0xffffffffu, EMULATOR_SITE);
    before = 0;
    for (unsigned i = 0; i < emulator::lane(); ++i) before += emulator::unwrap<T>(payloads[i]);
    if (emulator::lane() == 31) storage_.of_warp[threadIdx.x / 32] = before + mine;
    __syncthreads();
    total = 0;
    for (unsigned warp = 0; warp < kThreads / 32; ++warp) {
      if (warp == threadIdx.x / 32) before += total;
      total += storage_.of_warp[warp];
    }
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
