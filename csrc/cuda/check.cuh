// Errors of the CUDA runtime as exceptions that name the op.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace vlprune::cuda {

inline void check(cudaError_t status, const char* op) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("vlprune_ext: ") + op + ": CUDA error: " + cudaGetErrorString(status));
  }
}

}  // namespace vlprune::cuda

#define VLPRUNE_CHECK_LAUNCH(op) ::vlprune::cuda::check(cudaGetLastError(), op)
