// The product of rows and columns that several ops are made of: scores[n, m] = sum_k left[n, k] * right[m, k], handed
// tile by tile to a visitor.
//
// Blocking follows Goto and van de Geijn (Anatomy of High-Performance Matrix Multiplication, 2008). A block of `right`
// is packed into panels of kColumns columns and stays in the L2 cache; one panel of kRows rows of `left` is packed into
// L1 and swept along them; a tile of kRows x kColumns sums lives in registers. Both are converted to fp32 while
// packing.
//
// Every sum has the same shape, whatever the tile, the block and the thread: k is cut into chunks of depth_of_chunk();
// each chunk is one chain of fused multiply-adds from zero in ascending order of k (a product and a sum where the
// instruction set has none), and the chunks are added up in order. Shorter chains round less than one of full length.
#pragma once

#include "cpu/isa.h"
#include "cpu/simd.h"

namespace vlprune::cpu::VLPRUNE_ISA {

constexpr int64_t kDepth = 256;                           // k in a packed panel, at most
constexpr int64_t kBlockColumns = 352;                    // columns in a block of that depth: a third of an L2 of 1 MB
constexpr int64_t kLeftFloats = kDepth * kRows + kLanes;  // one panel of left, and what packing overruns
constexpr int64_t kRightFloats = kDepth * kBlockColumns;  // the block of right
constexpr int64_t kPartialFloats = kScratchFloats - kKeptFloats - kLeftFloats - kRightFloats;  // sums of earlier chunks
static_assert(kPartialFloats >= kRows * kBlockColumns, "the scratch of a thread is too small");

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t depth_of_chunk(int64_t depth) { return ceil_div(depth, ceil_div(depth, kDepth)); }

// A matrix whose rows lie `stride` elements apart, last dimension contiguous.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;

  VLPRUNE_INLINE const T* row(int64_t r) const { return data + r * stride; }
  // Without the rows before `first` and the columns before k.
  VLPRUNE_INLINE Rows from(int64_t first, int64_t k) const { return {row(first) + k, stride}; }
};

// Some rows of such a matrix.
template <typename T>
struct GatheredRows {
  const T* data;
  int64_t stride;
  const int32_t* which;

  VLPRUNE_INLINE const T* row(int64_t r) const { return data + which[r] * stride; }
  VLPRUNE_INLINE GatheredRows from(int64_t first, int64_t k) const { return {data + k, stride, which + first}; }
};

// dst[k * ld + r] = src[r, k] for r < kLanes and k < depth, with zeros for r >= rows. Writes whole vectors in ascending
// order of k: with ld < kLanes each overwrites the zeros of the one before, and the last overruns by kLanes - ld.
template <int R, typename Source>  // R: rows, where that is known, else 0
void pack(float* dst, int64_t ld, Source src, int64_t rows, int64_t depth) {
  int64_t k = 0;
  if constexpr (R > 0) {
    for (; k + kLanes <= depth; k += kLanes) {
      Vec m[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) m[r] = r < R ? load(src.row(r) + k) : zero();
      transpose(m);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(dst + (k + i) * ld, m[i]);
    }
  }
  for (; k < depth; k += kLanes) {
    const int64_t count = smaller(kLanes, depth - k);
    Vec m[kLanes];
    for (int r = 0; r < kLanes; ++r) m[r] = r < rows ? load(src.row(r) + k, count) : zero();
    transpose(m);
    for (int64_t i = 0; i < count; ++i) store(dst + (k + i) * ld, m[i]);
  }
}

// Packs columns [0, count) of the block into panels of kColumns, each [depth][kColumns].
template <typename Source>
void pack_right(float* dst, Source src, int64_t count, int64_t depth) {
  for (int64_t m = 0; m < count; m += kLanes) {
    const int64_t lanes = smaller(kLanes, count - m);
    float* panel = dst + (m / kColumns) * kColumns * depth + m % kColumns;
    const Source from = src.from(m, 0);
    if (lanes == kLanes) {
      pack<kLanes>(panel, kColumns, from, lanes, depth);
    } else {
      pack<0>(panel, kColumns, from, lanes, depth);
    }
  }
  for (int64_t m = ceil_div(count, kLanes) * kLanes; m % kColumns != 0; m += kLanes) {  // what the last panel lacks
    float* panel = dst + (m / kColumns) * kColumns * depth + m % kColumns;
    for (int64_t k = 0; k < depth; ++k) store(panel + k * kColumns, zero());
  }
}

template <int R>
struct Tile {
  Vec sum[R][kVectors];
};

template <int R>
VLPRUNE_INLINE void accumulate(Tile<R>& tile, const float* left, const float* right, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) columns[i] = load(right + i * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec l = broadcast(left[r]);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) tile.sum[r][i] = fmadd(l, columns[i], tile.sum[r][i]);
    }
    left += kRows;
    right += kColumns;
  }
}

// One panel of R rows swept along the block. `partial` holds the sums of the chunks before (null for a single chunk).
template <int R, typename Visitor>
void sweep(const float* left, const float* right, float* partial, bool first, bool last, int64_t depth, int64_t row,
           int64_t rows, int64_t column, int64_t columns, Visitor& visit) {
  for (int64_t c = 0; c < columns; c += kColumns) {
    const int64_t width = smaller(kColumns, columns - c);
    Tile<R> tile;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) tile.sum[r][i] = zero();
    int64_t done = 0;
    if (Visitor::kPrefetches && last) {  // what the visitor will touch is asked for row by row while the sums are made
      const int64_t step = depth / R;
      for (int64_t r = 0; r < smaller(R, rows); ++r, done += step) {
        visit.prefetch(row + r, column + c);
        accumulate(tile, left + done * kRows, right + done * kColumns, step);
      }
    }
    accumulate(tile, left + done * kRows, right + done * kColumns, depth - done);
    if (!first) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i)
          tile.sum[r][i] = add(load(partial + r * kColumns + i * kLanes), tile.sum[r][i]);
      }
    }
    if (last) {
      visit.tile(tile, row, rows, column + c, width);
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) store(partial + r * kColumns + i * kLanes, tile.sum[r][i]);
      }
    }
    right += kColumns * depth;
    if (partial != nullptr) partial += kRows * kColumns;
  }
  if (last) visit.end_of_panel(row, rows);
}

// How many columns `multiply` may be asked for at once.
inline int64_t block_columns(int64_t depth) { return kRightFloats / depth_of_chunk(depth) / kColumns * kColumns; }

// scores[n, m] for n in [row, row_end), row a multiple of kRows, and m in [column, column + columns), columns at most
// block_columns(depth).
template <typename Left, typename Right, typename Visitor>
void multiply(Left left, int64_t row, int64_t row_end, Right right, int64_t column, int64_t columns, int64_t depth,
              Visitor& visit) {
  float* const left_panel = scratch();
  float* const right_block = left_panel + kLeftFloats;
  const int64_t chunk = depth_of_chunk(depth);
  const int64_t panels = ceil_div(columns, kColumns);
  float* const partial = chunk < depth ? right_block + kRightFloats : nullptr;
  const int64_t rows_at_once =
      partial == nullptr ? row_end - row : kPartialFloats / (kRows * kColumns * panels) * kRows;

  for (int64_t n0 = row; n0 < row_end; n0 += rows_at_once) {
    const int64_t n1 = smaller(row_end, n0 + rows_at_once);
    for (int64_t k = 0; k < depth; k += chunk) {
      const int64_t size = smaller(chunk, depth - k);
      const bool first = k == 0, last = k + size == depth;
      pack_right(right_block, right.from(column, k), columns, size);
      for (int64_t n = n0; n < n1; n += kRows) {
        const int64_t rows = smaller(kRows, n1 - n);
        const Left from = left.from(n, k);
        if (rows == kRows) {
          pack<kRows>(left_panel, kRows, from, rows, size);
        } else {
          pack<0>(left_panel, kRows, from, rows, size);
        }
        float* tiles = partial == nullptr ? nullptr : partial + (n - n0) * kColumns * panels;
#define VLPRUNE_SWEEP(R) sweep<R>(left_panel, right_block, tiles, first, last, size, n, rows, column, columns, visit)
        if (rows <= 1)
          VLPRUNE_SWEEP(1);
        else if (rows <= kRows / 2)
          VLPRUNE_SWEEP(kRows / 2);
        else
          VLPRUNE_SWEEP(kRows);
#undef VLPRUNE_SWEEP
      }
    }
  }
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
