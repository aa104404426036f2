// The device's element types, and their conversion to and from fp32, singly and 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "dtype.h"

namespace vlprune::cuda {

// The element type that a DTypeTag stands for.
template <class Tag>
struct ElementOf;
template <>
struct ElementOf<DTypeTag<DType::kFloat32>> {
  using type = float;
};
template <>
struct ElementOf<DTypeTag<DType::kFloat16>> {
  using type = __half;
};
template <>
struct ElementOf<DTypeTag<DType::kBFloat16>> {
  using type = __nv_bfloat16;
};

// Elements in 16 bytes, the widest load and store.
template <typename T>
inline constexpr int kVector = 16 / sizeof(T);

template <typename T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  return static_cast<T>(x);
}

template <typename T>
__device__ __forceinline__ void unpack(const uint4& packed, float (&x)[kVector<T>]) {
  T elements[kVector<T>];
  memcpy(elements, &packed, sizeof(packed));
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) x[i] = to_float(elements[i]);
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&x)[kVector<T>]) {
  T elements[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) elements[i] = from_float<T>(x[i]);
  uint4 packed;
  memcpy(&packed, elements, sizeof(packed));
  return packed;
}

}  // namespace vlprune::cuda
