// Tiles of A . B^T with fp32 accumulation, where the rows of A and of B lie contiguously in memory: the part that
// leave_one_out and retrieval_rank share. A tile has kRows rows of A, kCols rows of B, and belongs to one block of
// kThreads threads. SimtTile takes fp32 and adds in the order of k by fused multiply-adds; TensorTile takes fp16, bf16.
//
// Each thread owns kThreadRows x kSegments segments: value(r, s, 0 .. kSegment-1) are kSegment = 16 / sizeof(T)
// neighbours in row row(r), from column column(s) on, so that an epilogue reads and writes 16 bytes straight from
// registers. Lanes that differ only in the bits of kRowLanes hold the same rows.
//
// stream_tiles() runs a sequence of tiles as one pipeline: kStages slots of shared memory, each kDepth deep in k, so
// the loads of the next tile are under way while the last one is being finished.
#pragma once

#include <cstdint>

#include "dtype.cuh"
#include "mma.cuh"

namespace vlprune::cuda {

// The operands of one tile: pointers to its first rows at k = 0, and how many of its rows exist (the others read as
// zero).
template <typename T>
struct Panels {
  const T* a;
  const T* b;
  int a_rows, b_rows;
};

// What is the same for all tiles of a launch.
struct PanelShape {
  int64_t a_stride, b_stride;  // between rows, in elements
  int64_t depth;               // length of k
};

// 128 x 128 by 256 threads: 4 x 2 warps of 32 x 64, in which a thread at (y, x) of 4 x 8 owns rows 4y..4y+3 and columns
// 4x..4x+3 of each of the 16 x 32 quarters. Shared memory is k-major, [kDepth][128 + 4] floats per panel: 8 rows and 8
// columns are four conflict-free 16-byte loads per 64 multiply-adds. Lanes i and i^1 share their columns, i and i^2
// their rows, so that half a warp's load fits one pass. The transposing 4-byte copies (lane = 4 rows x 8 k, bank 4k +
// row) meet no conflict either, and make every alignment the same.
struct SimtTile {
  using T = float;
  static constexpr int kThreads = 256, kBlocksPerSM = 2;
  static constexpr int kRows = 128, kCols = 128, kDepth = 16, kStages = 2;
  static constexpr int kSegment = 4, kSegments = 2, kThreadRows = 8, kRowLanes = 0b01110;
  static constexpr int kPitch = 128 + 4;  // floats; keeps 16-byte alignment and shifts each k by four banks
  static constexpr int kPanelFloats = kDepth * kPitch;
  static constexpr int kSharedBytes = kStages * 2 * kPanelFloats * 4;

  __device__ __forceinline__ explicit SimtTile(char* shared) : shared_(reinterpret_cast<float*>(shared)) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    first_row_ = (warp / 2) * 32 + (lane / 16 * 2 + lane % 2) * 4;
    first_column_ = (warp % 2) * 64 + (lane / 2 % 8) * 4;
  }

  __device__ __forceinline__ int row(int r) const { return first_row_ + (r / 4) * 16 + r % 4; }
  __device__ __forceinline__ int column(int s) const { return first_column_ + s * 32; }
  __device__ __forceinline__ float value(int r, int s, int e) const { return acc_[r][s * 4 + e]; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) acc_[i][j] = 0.0f;
    }
  }

  __device__ __forceinline__ void load(int slot, const Panels<float>& panels, const PanelShape& shape, int64_t k0) {
    float* a = shared_ + slot * 2 * kPanelFloats;
    load_panel(a, panels.a, shape.a_stride, panels.a_rows, k0, shape.depth);
    load_panel(a + kPanelFloats, panels.b, shape.b_stride, panels.b_rows, k0, shape.depth);
  }

  __device__ __forceinline__ void start(int) {}

  template <class Turn>
  __device__ __forceinline__ void multiply(int slot, int, Turn&& turn) {
    const float* a = shared_ + slot * 2 * kPanelFloats + first_row_;
    const float* b = shared_ + slot * 2 * kPanelFloats + kPanelFloats + first_column_;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float x[8], y[8];
      load_fragment(x, a + k * kPitch, 16);
      load_fragment(y, b + k * kPitch, 32);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) acc_[i][j] = fmaf(x[i], y[j], acc_[i][j]);
      }
    }
    turn();
  }

 private:
  static __device__ __forceinline__ void load_fragment(float (&x)[8], const float* shared, int step) {
    const float4 low = *reinterpret_cast<const float4*>(shared);
    const float4 high = *reinterpret_cast<const float4*>(shared + step);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  }

  static __device__ __forceinline__ void load_panel(float* shared, const float* data, int64_t stride, int rows,
                                                    int64_t k0, int64_t depth) {
    const int row0 = threadIdx.x / 8, k_in = threadIdx.x % 8;
    const float* src = data + row0 * stride + k0 + k_in;
    float* dst = shared + k_in * kPitch + row0;
    const bool whole = rows == 128 && k0 + kDepth <= depth;  // the same in the whole block
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int k = 0; k < kDepth; k += 8) {
        const bool valid = whole || (row0 + 32 * i < rows && k0 + k + k_in < depth);
        copy_async<4>(dst + k * kPitch + 32 * i, valid ? src + k : data, valid);
      }
      src += 32 * stride;
    }
  }

  float* shared_;
  int first_row_, first_column_;
  float acc_[8][8];
};

// kRowWarps x kColWarps warps (8 in all) of 16 kFragments x 64. Shared memory holds rows of 32 elements (64 bytes) in
// four 16-byte chunks, permuted within each row so that the eight rows of a matrix fragment lie in eight different bank
// groups. For A those are eight consecutive rows. For B, the tile's columns, column c of the j-th of four 8-column
// products stands for column 8(c/2) + 2j + c%2 of a group of 32: thus a lane, which is given columns 2t and 2t+1 of
// each product, owns 8 neighbouring columns. kAligned: all row starts are multiples of 16 bytes and depth is one of 8
// elements; else loads are element by element.
template <typename T_, int kRowWarps, int kColWarps, int kFragments, int kBlocks, int kStages_, bool kAligned>
struct TensorTile {
  using T = T_;
  static_assert(sizeof(T) == 2 && kRowWarps * kColWarps == 8);
  static constexpr int kThreads = 256, kBlocksPerSM = kBlocks;
  static constexpr int kRows = kRowWarps * kFragments * 16, kCols = kColWarps * 64, kDepth = 32, kStages = kStages_;
  static constexpr int kSegment = 8, kSegments = 2, kThreadRows = 2 * kFragments, kRowLanes = 0b00011;
  static constexpr int kPitch = kDepth * 2;  // bytes
  static constexpr int kSlotBytes = (kRows + kCols) * kPitch;
  static constexpr int kSharedBytes = kStages * kSlotBytes;

  __device__ __forceinline__ explicit TensorTile(char* shared) : shared_(shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row_warp = warp / kColWarps, col_warp = warp % kColWarps;
    first_row_ = row_warp * (16 * kFragments) + lane / 4;
    first_column_ = col_warp * 64 + (lane % 4) * 8;
    // The row and chunk that this lane names to load_matrices: lanes 0-7, 8-15, ... one matrix each.
    const int matrix = lane / 8, c = lane % 8;
    const int a_row = row_warp * (16 * kFragments) + (matrix % 2) * 8 + c, a_chunk = matrix / 2;
    const int b_row = col_warp * 64 + 8 * (c / 2) + 2 * (matrix / 2) + c % 2, b_chunk = matrix % 2;
    a_offset_ = a_row * kPitch + 16 * (a_chunk ^ a_swizzle(a_row));
    b_offset_ = (kRows + b_row) * kPitch + 16 * (b_chunk ^ b_swizzle(b_row));
  }

  __device__ __forceinline__ int row(int r) const { return first_row_ + r * 8; }
  __device__ __forceinline__ int column(int s) const { return first_column_ + s * 32; }
  __device__ __forceinline__ float value(int r, int s, int e) const {
    return acc_[r / 2][s][e / 2][2 * (r % 2) + e % 2];
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int j = 0; j < 32; ++j) acc_[i][j / 16][j / 4 % 4][j % 4] = 0.0f;
    }
  }

  __device__ __forceinline__ void load(int slot, const Panels<T>& panels, const PanelShape& shape, int64_t k0) {
    const int row0 = threadIdx.x / 4, chunk = threadIdx.x % 4;  // rows row0, row0 + 64, ... have one swizzle
    char* a = shared_ + slot * kSlotBytes + row0 * kPitch;
    load_panel<kRows>(a + 16 * (chunk ^ a_swizzle(row0)), panels.a, shape.a_stride, panels.a_rows, k0, shape.depth);
    load_panel<kCols>(a + kRows * kPitch + 16 * (chunk ^ b_swizzle(row0)), panels.b, shape.b_stride, panels.b_rows, k0,
                      shape.depth);
  }

  __device__ __forceinline__ void start(int slot) {
    if constexpr (kAhead) load_fragments(0, slot, 0);
  }

  // The turn comes in the middle: its waiting, address arithmetic and copies overlap with products already issued, and
  // with kAhead the next slot's first fragments are there when their turn comes.
  template <class Turn>
  __device__ __forceinline__ void multiply(int slot, int next_slot, Turn&& turn) {
    if constexpr (kAhead) {
      load_fragments(1, slot, 1);
      multiply_fragments(0);
      turn();
      load_fragments(0, next_slot, 0);
      multiply_fragments(1);
    } else {
      load_fragments(0, slot, 0);
      multiply_fragments(0);
      load_fragments(0, slot, 1);
      multiply_fragments(0);
      turn();
    }
  }

 private:
  // One block alone on a multiprocessor must hide the latency of fragments itself, and has the registers for it.
  static constexpr bool kAhead = kBlocks == 1;

  // Elements 16 k .. 16 k + 15 of a slot, i.e. two chunks: k is bit 1 of the chunk, so bit 5 of the address.
  __device__ __forceinline__ void load_fragments(int buffer, int slot, int k) {
    const char* a = shared_ + slot * kSlotBytes + (a_offset_ ^ (k << 5));
    const char* b = shared_ + slot * kSlotBytes + (b_offset_ ^ (k << 5));
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      uint32_t (&f)[4] = a_[buffer][i];
      load_matrices(f[0], f[1], f[2], f[3], a + i * 16 * kPitch);
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t (&f)[4][2] = b_[buffer][s];
        load_matrices(f[j][0], f[j][1], f[j + 1][0], f[j + 1][1], b + (s * 32 + j * 2) * kPitch);
      }
    }
  }

  __device__ __forceinline__ void multiply_fragments(int buffer) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_add<T>(acc_[i][s][j], a_[buffer][i], b_[buffer][s][j]);
      }
    }
  }

  static __device__ __forceinline__ int a_swizzle(int row) { return (row / 2) % 4; }
  static __device__ __forceinline__ int b_swizzle(int row) { return (row / 8) % 4; }

  template <int kPanelRows>
  static __device__ __forceinline__ void load_panel(char* dst, const T* data, int64_t stride, int rows, int64_t k0,
                                                    int64_t depth) {
    const int row0 = threadIdx.x / 4;
    const int64_t k = k0 + threadIdx.x % 4 * 8;
    const T* src = data + row0 * stride + k;
#pragma unroll
    for (int i = 0; i < kPanelRows / 64; ++i) {
      const bool valid = row0 + 64 * i < rows && k < depth;
      if constexpr (kAligned) {
        copy_async<16>(dst + i * 64 * kPitch, valid ? src : data, valid);
      } else {
        T elements[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) elements[e] = valid && k + e < depth ? src[e] : from_float<T>(0.0f);
        uint4 packed;
        memcpy(&packed, elements, sizeof(packed));
        *reinterpret_cast<uint4*>(dst + i * 64 * kPitch) = packed;
      }
      src += 64 * stride;
    }
  }

  char* shared_;
  int first_row_, first_column_, a_offset_, b_offset_;
  uint32_t a_[kAhead ? 2 : 1][kFragments][4], b_[kAhead ? 2 : 1][2][4][2];
  float acc_[kFragments][2][4][4];
};

// Runs `count` tiles. `Cursor` walks over them: panels() of the present one, then advance(). `finish(tile)` is called
// by all threads when a tile is complete, in the same order.
//
// Tile::multiply(slot, next_slot, turn) calls turn() when it has read all of `slot`: from there on `next_slot` is
// complete, for all threads, and `slot` is being refilled, because all threads have passed the barrier.
template <class Tile, class Cursor, class Finish>
__device__ __forceinline__ void stream_tiles(char* shared, const PanelShape& shape, Cursor cursor, int count,
                                             Finish&& finish) {
  Tile tile(shared);
  const int steps = shape.depth > 0 ? static_cast<int>((shape.depth + Tile::kDepth - 1) / Tile::kDepth) : 1;
  int tiles_to_load = count;
  int load_step = 0;
  Panels<typename Tile::T> panels = cursor.panels();
  const auto load_next = [&](int slot) {
    if (tiles_to_load > 0) {
      tile.load(slot, panels, shape, int64_t{load_step} * Tile::kDepth);
      if (++load_step == steps) {
        load_step = 0;
        cursor.advance();
        if (--tiles_to_load > 0) panels = cursor.panels();
      }
    }
    copy_async_commit();  // also when empty: the waits count groups
  };

#pragma unroll
  for (int slot = 0; slot < Tile::kStages; ++slot) load_next(slot);
  copy_async_wait<Tile::kStages - 1>();
  __syncthreads();
  tile.start(0);
  int slot = 0;
  for (; count > 0; --count) {
    tile.clear();
    for (int step = 0; step < steps; ++step) {
      const int next_slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
      tile.multiply(slot, next_slot, [&] {
        copy_async_wait<Tile::kStages - 2>();
        __syncthreads();
        load_next(slot);
      });
      slot = next_slot;
    }
    finish(tile);
  }
  copy_async_wait<0>();
}

}  // namespace vlprune::cuda
