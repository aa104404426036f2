// A function that CPU and CUDA sources share: always inline, so that no copy outlives the flags it was compiled with.
#pragma once

#if defined(__CUDACC__)
#define VLPRUNE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VLPRUNE_HOST_DEVICE inline __attribute__((always_inline))
#endif
