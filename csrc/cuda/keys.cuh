// The keys that the selections order by (ops.h), 16 bytes of weights at a time, and what the pruning ops do with them:
// write zeros in place, or a mask.
#pragma once

#include <cstdint>

#include "dtype.cuh"
#include "launch.cuh"
#include "ops.h"

namespace vlprune::cuda {

// Stands for the columns outside a row: above every key, and alone in having bit 31 set.
constexpr uint32_t kNoKey = 0xffffffffu;

// |w| * scale, since scale >= 0; bit 31 is cleared last for the sake of a scale of -0.
__device__ __forceinline__ uint32_t key_of(float w, float scale) {
  return __float_as_uint(__fmul_rn(w, scale)) & 0x7fffffffu;
}

// A row of weights, or a segment of one, and what its columns are scaled by. A vector is kVector<T> columns from any
// column on, which may lie outside the row in part: load() and store() take care of that, and of alignment.
template <typename T>
struct KeyRow {
  const T* weight;     // [width]
  const float* scale;  // [width] or null
  int width;

  // For vectors at multiples of 16 bytes, wherever the row starts: vector v, 0 <= v < vectors(), begins at column(v).
  __device__ __forceinline__ int shift() const {
    return static_cast<int>(reinterpret_cast<uintptr_t>(weight) % 16 / sizeof(T));
  }
  __device__ __forceinline__ int vectors() const { return (shift() + width + kVector<T> - 1) / kVector<T>; }
  __device__ __forceinline__ int column(int v) const { return v * kVector<T> - shift(); }

  __device__ __forceinline__ bool inside(int column) const { return column >= 0 && column < width; }
  __device__ __forceinline__ bool whole(int column) const { return column >= 0 && column <= width - kVector<T>; }
  static __device__ __forceinline__ bool aligned(const void* p, int bytes = 16) {
    return reinterpret_cast<uintptr_t>(p) % bytes == 0;
  }

  // The weights of a vector as they lie in memory, zero outside the row. Not through the read-only cache: the pruning
  // ops write them later.
  __device__ __forceinline__ uint4 load(int column) const {
    uint4 packed;
    if (whole(column) && aligned(weight + column)) {
      packed = *reinterpret_cast<const uint4*>(weight + column);
    } else {
      T elements[kVector<T>];
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        elements[e] = inside(column + e) ? weight[column + e] : from_float<T>(0.0f);
      }
      memcpy(&packed, elements, sizeof(packed));
    }
    return packed;
  }

  __device__ __forceinline__ void load_scale(int column, float (&s)[kVector<T>]) const {
    if (scale == nullptr) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) s[e] = 1.0f;
    } else if (whole(column) && aligned(scale + column)) {
#pragma unroll
      for (int e = 0; e < kVector<T>; e += 4) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(scale + column + e));
        s[e] = four.x, s[e + 1] = four.y, s[e + 2] = four.z, s[e + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) s[e] = inside(column + e) ? __ldg(scale + column + e) : 0.0f;
    }
  }

  // The keys of what load() and load_scale() gave for `column`; kNoKey outside the row.
  __device__ __forceinline__ void to_keys(int column, const uint4& packed, const float (&s)[kVector<T>],
                                          uint32_t* key /* [kVector<T>] */) const {
    float w[kVector<T>];
    unpack<T>(packed, w);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) key[e] = key_of(w[e], s[e]);
    if (!whole(column)) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) key[e] = inside(column + e) ? key[e] : kNoKey;
    }
  }

  __device__ __forceinline__ void load_keys(int column, uint32_t (&key)[kVector<T>]) const {
    float s[kVector<T>];
    const uint4 packed = load(column);
    load_scale(column, s);
    to_keys(column, packed, s, key);
  }

  // Zeroes the pruned weights of a vector: out is `weight` as it may be written, packed is what load() gave.
  __device__ __forceinline__ void store(T* out, int column, uint4 packed, const bool (&pruned)[kVector<T>]) const {
    if (whole(column) && aligned(out + column)) {
      uint32_t word[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
          word[i] = pruned[i] ? 0 : word[i];
        } else {
          word[i] &= (pruned[2 * i] ? 0 : 0x0000ffffu) | (pruned[2 * i + 1] ? 0 : 0xffff0000u);
        }
      }
      *reinterpret_cast<uint4*>(out + column) = make_uint4(word[0], word[1], word[2], word[3]);
    } else {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        if (inside(column + e) && pruned[e]) out[column + e] = from_float<T>(0.0f);
      }
    }
  }

  // The same for a mask [width]: 1 for the pruned, 0 for the rest.
  __device__ __forceinline__ void store_mask(uint8_t* mask, int column, const bool (&pruned)[kVector<T>]) const {
    if (whole(column) && aligned(mask + column, kVector<T>)) {
      uint32_t word[kVector<T> / 4] = {};
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) word[e / 4] |= pruned[e] ? 1u << e % 4 * 8 : 0;
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<uint32_t*>(mask + column) = word[0];
      } else {
        *reinterpret_cast<uint2*>(mask + column) = make_uint2(word[0], word[1]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        if (inside(column + e)) mask[column + e] = pruned[e];
      }
    }
  }
};

// All rows, for a kernel's parameters. Fewer than 2^31 rows of fewer than 2^30 columns.
template <typename T>
struct KeyMatrix {
  const T* weight;     // [rows, width], rows `stride` apart
  const float* scale;  // [width] or null
  int64_t rows, stride;
  int width;

  explicit KeyMatrix(const Keys& keys)
      : weight(static_cast<const T*>(keys.weight)),
        scale(keys.scale),
        rows(keys.out),
        stride(keys.stride),
        width(static_cast<int>(keys.in)) {}

  __device__ __forceinline__ KeyRow<T> row(int64_t i) const { return {weight + i * stride, scale, width}; }

  // Whether every row starts at a multiple of 16 bytes.
  bool aligned_rows() const { return is_aligned16(weight) && (stride % kVector<T> == 0 || rows == 1); }
};

// prune_smallest over segments of `width` consecutive columns instead of rows; in % width == 0. `op` is named in
// errors. In prune_smallest.cu.
void prune_segments(const PruneSmallest& args, int64_t width, cudaStream_t stream, const char* op);

}  // namespace vlprune::cuda
