// plus[e] = weight[e] + eps z[e],  minus[e] = weight[e] - eps z[e],  z ~ N(0, 1): the four numbers of counter c are
// those of elements c / 16 * 64 + c % 16 + {0, 16, 32, 48}
//
// Grid    one thread per kCounters counters.
// Block   256 threads: 1024 counters, 4096 elements.
// Thread  kCounters neighbouring counters: four runs of kCounters elements, 16 apart, each one load and two stores of 8
//         bytes (fp16, bf16) or 16 (fp32). Four threads have 16 neighbours, and a warp 8 times 64 elements.
//
// Moves 3 count elements. In bf16 that is 6 bytes per element, against some 58 instructions, which are what bounds it:
// per counter 60 for Philox (a multiplication gives both halves), 140 for two Box-Muller pairs without fused
// multiply-adds, and 24 to scale, add, subtract and round. 132 x 128 lanes at 1.98 GHz do that for 5.8e11 elements per
// second, 3.5 TB/s.
#include <cstdint>

#include "check.cuh"
#include "dtype.cuh"
#include "launch.cuh"
#include "ops.h"
#include "philox.h"

namespace vlprune::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kCounters = 4;  // per thread; divides 16

// The lane of philox.h. The intrinsics are never contracted to fused multiply-adds.
struct CudaLane {
  using F = float;
  using I = uint32_t;
  static __device__ __forceinline__ I integer(uint32_t x) { return x; }
  using Word = I;
  static __device__ __forceinline__ Word split(I a) { return a; }
  static __device__ __forceinline__ I join(Word a) { return a; }
  static __device__ __forceinline__ void product(Word a, uint32_t m, Word& high, Word& low) {
    high = __umulhi(a, m);
    low = a * m;
  }
  static __device__ __forceinline__ Word xor3(Word a, Word b, uint32_t c) { return a ^ b ^ c; }
  static __device__ __forceinline__ I add(I a, I b) { return a + b; }
  static __device__ __forceinline__ I xor_(I a, I b) { return a ^ b; }
  template <int n>
  static __device__ __forceinline__ I shift_right(I a) {
    return a >> n;
  }
  template <int n>
  static __device__ __forceinline__ I shift_left(I a) {
    return a << n;
  }
  static __device__ __forceinline__ F number(float x) { return x; }
  static __device__ __forceinline__ F add(F a, F b) { return __fadd_rn(a, b); }
  static __device__ __forceinline__ F sub(F a, F b) { return __fsub_rn(a, b); }
  static __device__ __forceinline__ F mul(F a, F b) { return __fmul_rn(a, b); }
  static __device__ __forceinline__ F sqrt(F a) { return __fsqrt_rn(a); }
  static __device__ __forceinline__ F from_int(I a) { return __int2float_rn(static_cast<int32_t>(a)); }
  static __device__ __forceinline__ I bits(F a) { return __float_as_uint(a); }
  static __device__ __forceinline__ F floating(I a) { return __uint_as_float(a); }
  static __device__ __forceinline__ F choose(I flag, F a, F b) { return flag != 0 ? a : b; }
};

// Neighbours that are loaded and stored as one.
template <typename T>
struct alignas(kCounters * sizeof(T)) Run {
  T x[kCounters];
};

template <typename T>
struct Params {
  const T* weight;  // [count]
  T* plus;          // [count]
  T* minus;         // [count]
  int64_t count;
  uint64_t seed, tensor;
  float eps;
  bool vector;  // the three are aligned as a Run is
};

template <typename T>
__global__ void __launch_bounds__(kThreads) perturb_kernel(const Params<T> p) {
  const int64_t counter = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * kCounters;
  const int64_t first = counter / 16 * 64 + counter % 16;
  if (first >= p.count) return;
  const RoundKeys keys(p.seed);
  const bool whole = p.vector && first + 48 + kCounters <= p.count;

  Run<T> weight[4];  // loaded before the numbers are made, which hides the latency
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int64_t e = first + 16 * q;
    if (whole) {
      weight[q] = *reinterpret_cast<const Run<T>*>(p.weight + e);
    } else {
#pragma unroll
      for (int i = 0; i < kCounters; ++i) weight[q].x[i] = e + i < p.count ? p.weight[e + i] : from_float<T>(0.0f);
    }
  }

  float z[kCounters][4];
#pragma unroll
  for (int i = 0; i < kCounters; ++i) {
    normal4<CudaLane>(static_cast<uint32_t>(counter + i), static_cast<uint32_t>(counter >> 32), p.tensor, keys, z[i]);
  }

#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int64_t e = first + 16 * q;
    Run<T> plus, minus;
#pragma unroll
    for (int i = 0; i < kCounters; ++i) {
      const float w = to_float(weight[q].x[i]), step = __fmul_rn(p.eps, z[i][q]);
      plus.x[i] = from_float<T>(__fadd_rn(w, step));
      minus.x[i] = from_float<T>(__fsub_rn(w, step));
    }
    if (whole) {
      *reinterpret_cast<Run<T>*>(p.plus + e) = plus;
      *reinterpret_cast<Run<T>*>(p.minus + e) = minus;
    } else {
#pragma unroll
      for (int i = 0; i < kCounters; ++i) {
        if (e + i < p.count) p.plus[e + i] = plus.x[i], p.minus[e + i] = minus.x[i];
      }
    }
  }
}

}  // namespace

void perturb(const Perturb& args, void* stream) {
  if (args.count == 0) return;
  dispatch(args.dtype, [&](auto tag) {
    using T = typename ElementOf<decltype(tag)>::type;
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Run<T>) == 0; };
    const Params<T> p = {static_cast<const T*>(args.weight),
                         static_cast<T*>(args.plus),
                         static_cast<T*>(args.minus),
                         args.count,
                         args.seed,
                         args.tensor,
                         args.eps,
                         aligned(args.weight) && aligned(args.plus) && aligned(args.minus)};
    const int64_t counters = ceil_div(args.count, 64) * 16;
    const int64_t blocks = ceil_div(counters, kThreads * kCounters);
    perturb_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    VLPRUNE_CHECK_LAUNCH("perturb");
  });
}

}  // namespace vlprune::cuda
