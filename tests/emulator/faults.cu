// Kernels that are wrong, one way each, and what they would be if they were right: the emulator must refuse the one and
// run the other (test_emulator.py).
#include "faults.h"

#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "check.cuh"
#include "mma.cuh"

namespace faults {
namespace {

constexpr int kThreads = 64;

// Each kernel writes 0 .. kThreads-1, or a sum of them, to out[0 .. kThreads-1].
__global__ void bounds_kernel(int32_t* out, bool faulty) {
  if (threadIdx.x == 0 && faulty) out[kThreads] = 0;
  out[threadIdx.x] = threadIdx.x;
}

__global__ void alignment_kernel(int32_t* out, bool faulty) {
  if (threadIdx.x >= kThreads / 4) return;
  const uint32_t first = 4 * threadIdx.x;
  auto* four = reinterpret_cast<uint4*>(out + first - (faulty && threadIdx.x == 7 ? 2 : 0));
  *four = make_uint4(first, first + 1, first + 2, first + 3);
}

__global__ void shared_bounds_kernel(int32_t* out, bool faulty) {
  __shared__ int32_t shared[kThreads];
  shared[threadIdx.x + (faulty ? 1 : 0)] = threadIdx.x;
  out[threadIdx.x] = threadIdx.x;
}

__global__ void barrier_kernel(int32_t* out, bool faulty) {
  __shared__ int32_t shared[kThreads];
  shared[threadIdx.x] = threadIdx.x;
  if (!faulty) __syncthreads();
  out[threadIdx.x] = kThreads - 1 - shared[kThreads - 1 - threadIdx.x];
}

// A value that is read, then overwritten by another thread.
__global__ void late_barrier_kernel(int32_t* out, bool faulty) {
  __shared__ int32_t shared;
  if (threadIdx.x == 0) shared = 1;
  __syncthreads();
  const int32_t one = shared;
  if (!faulty) __syncthreads();
  if (threadIdx.x == kThreads - 1) shared = 2;
  out[threadIdx.x] = threadIdx.x * one;
}

// A shuffle makes lanes meet, but not their memory.
__global__ void warp_kernel(int32_t* out, bool faulty) {
  __shared__ int32_t shared[kThreads];
  shared[threadIdx.x] = threadIdx.x;
  if (!faulty) __syncwarp();
  __shfl_xor_sync(0xffffffffu, 0, 1);
  out[threadIdx.x] = shared[threadIdx.x ^ 1] ^ 1;
}

__global__ void blocks_kernel(int32_t* out, bool faulty) {  // two blocks
  const int place = faulty ? threadIdx.x : blockIdx.x * kThreads / 2 + threadIdx.x / 2;
  if (faulty || threadIdx.x % 2 == 0) out[place] = place;
}

__global__ void atomic_kernel(int32_t* out, bool faulty) {
  out[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const int32_t zero = threadIdx.x / kThreads;
  if (faulty) {
    out[0] += zero;
  } else {
    atomicAdd(out, zero);
  }
}

__global__ void divergent_kernel(int32_t* out, bool faulty) {
  if (faulty && threadIdx.x == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = threadIdx.x;
}

__global__ void lanes_kernel(int32_t* out, bool faulty) {
  out[threadIdx.x] = threadIdx.x;
  if (faulty && threadIdx.x == 5) return;
  __syncwarp();
}

__global__ void copy_kernel(int32_t* out, bool faulty) {
  __shared__ int32_t shared[kThreads];
  out[threadIdx.x] = threadIdx.x;
  vlprune::cuda::copy_async<4>(shared + threadIdx.x, out + threadIdx.x, true);
  vlprune::cuda::copy_async_commit();
  if (!faulty) vlprune::cuda::copy_async_wait<0>();
  out[threadIdx.x] = shared[threadIdx.x];  // garbage until then
  vlprune::cuda::copy_async_wait<0>();
}

__global__ void scan_kernel(int32_t* out, bool faulty) {
  using Scan = cub::BlockScan<int32_t, kThreads>;
  __shared__ typename Scan::TempStorage scan;
  int32_t before, first;
  Scan(scan).ExclusiveSum(threadIdx.x == 0 ? 1 : 0, first);
  if (!faulty) __syncthreads();
  Scan(scan).ExclusiveSum(1, before);
  out[threadIdx.x] = before + first - (threadIdx.x == 0 ? 0 : 1);
}

__global__ void plain_kernel(int32_t* out, bool) { out[threadIdx.x] = threadIdx.x; }

__global__ void trap_kernel(int32_t* out, bool faulty) {
  if (faulty && threadIdx.x == 3) __trap();
  out[threadIdx.x] = threadIdx.x;
}

}  // namespace

void launch(const std::string& name, int32_t* out, bool faulty) {
  const cudaStream_t stream = nullptr;
  void (*kernel)(int32_t*, bool) = nullptr;
  int blocks = 1, threads = kThreads, shared_bytes = 0;
  if (name == "bounds") kernel = bounds_kernel;
  if (name == "alignment") kernel = alignment_kernel;
  if (name == "shared bounds") kernel = shared_bounds_kernel;
  if (name == "barrier") kernel = barrier_kernel;
  if (name == "late barrier") kernel = late_barrier_kernel;
  if (name == "warp") kernel = warp_kernel;
  if (name == "blocks") kernel = blocks_kernel, blocks = 2;
  if (name == "atomic") kernel = atomic_kernel;
  if (name == "divergent") kernel = divergent_kernel;
  if (name == "lanes") kernel = lanes_kernel;
  if (name == "copy") kernel = copy_kernel;
  if (name == "scan") kernel = scan_kernel;
  if (name == "trap") kernel = trap_kernel;
  if (name == "threads") kernel = plain_kernel, threads = faulty ? 1056 : kThreads;
  if (name == "shared memory") {
    kernel = plain_kernel, shared_bytes = 64 << 10;
    if (!faulty)
      vlprune::cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10), "");
  }
  if (kernel == nullptr) throw std::invalid_argument("no kernel is named " + name);
  kernel<<<blocks, threads, shared_bytes, stream>>>(out, faulty);
}

}  // namespace faults
