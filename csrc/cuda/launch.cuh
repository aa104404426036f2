// How many blocks of a kernel fit on the current device at once: the grid of kernels whose blocks share out their
// tiles.
#pragma once

#include <algorithm>
#include <cstdint>

#include "check.cuh"

namespace vlprune::cuda {

template <typename Kernel>
int64_t resident_blocks(Kernel* kernel, int threads, int shared_bytes, const char* op) {
  int device = 0, multiprocessors = 0, blocks = 0;
  check(cudaGetDevice(&device), op);
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), op);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), op);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), op);
  return static_cast<int64_t>(multiprocessors) * std::max(blocks, 1);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace vlprune::cuda
