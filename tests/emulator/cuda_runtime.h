// What the kernels use of CUDA's runtime and device functions, for the emulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)
#define threadIdx ::emulator::thread_index
#define blockIdx ::emulator::block_index
#define blockDim ::emulator::block_size
#define gridDim ::emulator::grid_size

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  operator emulator::Index() const { return {x, y, z}; }
};
// What moves as a whole. The compiler may take a copy apart, so its alignment is looked at here.
template <typename T>
struct alignas(2 * sizeof(T)) Vector2 {
  T x, y;
  Vector2() = default;
  Vector2(T x_, T y_) : x(x_), y(y_) {}
  Vector2(const Vector2& from) { *this = from; }
  Vector2& operator=(const Vector2& from) {
    emulator::moves(&from, this, sizeof(from));
    x = from.x, y = from.y;
    return *this;
  }
};
template <typename T>
struct alignas(4 * sizeof(T)) Vector4 {
  T x, y, z, w;
  Vector4() = default;
  Vector4(T x_, T y_, T z_, T w_) : x(x_), y(y_), z(z_), w(w_) {}
  Vector4(const Vector4& from) { *this = from; }
  Vector4& operator=(const Vector4& from) {
    emulator::moves(&from, this, sizeof(from));
    x = from.x, y = from.y, z = from.z, w = from.w;
    return *this;
  }
};
using uint2 = Vector2<uint32_t>;
using uint4 = Vector4<uint32_t>;
using float2 = Vector2<float>;
using float4 = Vector4<float>;
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- host ----
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = struct Stream*;

inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Few, so that a block gets several tiles.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  emulator::set_max_dynamic_shared(bytes);
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

// ---- device: threads that meet ----
#define __syncthreads() ::emulator::sync_block(EMULATOR_SITE)
#define __syncwarp() ::emulator::sync_warp(0xffffffffu, EMULATOR_SITE)
#define __shfl_xor_sync(mask, value, bits) ::emulator::shuffle_xor(mask, value, bits, EMULATOR_SITE)
#define __shfl_up_sync(mask, value, distance) ::emulator::shuffle_up(mask, value, distance, EMULATOR_SITE)
#define __shfl_sync(mask, value, from) ::emulator::shuffle(mask, value, from, EMULATOR_SITE)
#define __any_sync(mask, predicate) ::emulator::any(mask, predicate, EMULATOR_SITE)
#define __match_any_sync(mask, value) ::emulator::match_any(mask, value, EMULATOR_SITE)
#define __trap() ::emulator::fail("trap")

namespace emulator {

inline unsigned lane() {
  return (thread_index.x + block_size.x * (thread_index.y + block_size.y * thread_index.z)) % 32;
}

template <typename T>
T shuffle_xor(unsigned mask, T value, int bits, Site site) {
  return unwrap<T>(exchange(wrap(value), mask, site)[lane() ^ bits]);
}

template <typename T>
T shuffle_up(unsigned mask, T value, unsigned distance, Site site) {
  const Payload* payloads = exchange(wrap(value), mask, site);
  return lane() < distance ? value : unwrap<T>(payloads[lane() - distance]);
}

template <typename T>
T shuffle(unsigned mask, T value, int from, Site site) {
  return unwrap<T>(exchange(wrap(value), mask, site)[from % 32]);
}

inline bool any(unsigned mask, bool predicate, Site site) {
  const Payload* payloads = exchange(wrap(predicate), mask, site);
  bool found = false;
  for (int i = 0; i < 32; ++i) found |= unwrap<bool>(payloads[i]);
  return found;
}

template <typename T>
unsigned match_any(unsigned mask, T value, Site site) {
  const Payload* payloads = exchange(wrap(value), mask, site);
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) same |= static_cast<unsigned>(unwrap<T>(payloads[i]) == value) << i;
  return same;
}

}  // namespace emulator

// Not instrumented, for these accesses are atomic; one thread runs at a time.
#define EMULATOR_ATOMIC(name, updated)                        \
  template <typename T, typename U>                           \
  __attribute__((no_sanitize_thread)) T name(T* p, U value) { \
    emulator::atomic(p, sizeof(T));                           \
    const T old = *p, with = static_cast<T>(value);           \
    *p = updated;                                             \
    return old;                                               \
  }
EMULATOR_ATOMIC(atomicAdd, old + with)
EMULATOR_ATOMIC(atomicOr, old | with)
EMULATOR_ATOMIC(atomicMax, with > old ? with : old)
#undef EMULATOR_ATOMIC

// ---- device: loads, stores, arithmetic ----
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcg(T* p, T value) {
  *p = value;
}

using std::isnan;
template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __expf(float a) { return std::exp(a); }
inline uint32_t __float_as_uint(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float a;
  std::memcpy(&a, &bits, sizeof(a));
  return a;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline int __popc(uint32_t a) { return __builtin_popcount(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(a); }
inline uint32_t __funnelshift_rc(uint32_t low, uint32_t high, uint32_t shift) {
  return shift >= 32 ? high : static_cast<uint32_t>((uint64_t{high} << 32 | low) >> shift);
}
