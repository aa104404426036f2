// out[i, n, d] = base[n, d] - sum_{k in group i} x[n, k] * weight[d, k]
//
// Work is the sequence of (variant, block of columns d, panel of kRows rows n); thread t owns the t-th equal part of
// it, so that it packs a block of the weight about once, streams x and base through it, and writes each element of out
// once. Bytes moved: x and weight once, out once, base once per variant (from the last-level cache where it fits). Rows
// of out often lie a power of two apart, in the same few sets of L1, and stores that miss hold up the sums behind them;
// so both base and out are asked for while the sums are made.
#include "cpu/isa.h"
#include "cpu/product.h"

namespace vlprune::cpu::VLPRUNE_ISA {
namespace {

template <typename T>
struct Subtract {
  static constexpr bool kPrefetches = true;

  Rows<T> base;
  T* out;  // [N, D] of this variant
  int64_t d;

  VLPRUNE_INLINE void prefetch(int64_t row, int64_t column) const {
    const char* from = reinterpret_cast<const char*>(base.data + row * base.stride + column);
    const char* to = reinterpret_cast<const char*>(out + row * d + column);
    for (size_t offset = 0; offset < kColumns * sizeof(T); offset += 64) {
      __builtin_prefetch(from + offset);
      __builtin_prefetch(to + offset, 1);
    }
  }

  template <int R>
  VLPRUNE_INLINE void tile(const Tile<R>& tile, int64_t row, int64_t rows, int64_t column, int64_t width) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (r >= rows) break;
      const T* from = base.data + (row + r) * base.stride + column;
      T* to = out + (row + r) * d + column;
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i, from += kLanes, to += kLanes) {
        const int64_t count = width - i * kLanes;
        if (count >= kLanes) {
          store(to, sub(load(from), tile.sum[r][i]));
        } else if (count > 0) {
          store(to, sub(load(from, count), tile.sum[r][i]), count);
        }
      }
    }
  }

  VLPRUNE_INLINE void end_of_panel(int64_t, int64_t) const {}
};

template <typename T>
void run(const LeaveOneOut& args, int threads) {
  const T* const x = static_cast<const T*>(args.x);
  const T* const weight = static_cast<const T*>(args.weight);
  const int64_t blocks = ceil_div(args.d, block_columns(args.group_size));
  const int64_t block = ceil_div(ceil_div(args.d, blocks), kColumns) * kColumns;
  const int64_t panels = ceil_div(args.n, kRows);
  const int64_t work = args.v * blocks * panels;

#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    int64_t item = work / threads * thread + smaller(thread, work % threads);
    const int64_t end = item + work / threads + (thread < work % threads ? 1 : 0);
    while (item < end) {
      const int64_t variant = item / (blocks * panels), column = item / panels % blocks * block;
      const int64_t panel = item % panels, count = smaller(panels - panel, end - item);
      const int64_t offset = args.groups[variant] * args.group_size;
      Subtract<T> visit{{static_cast<const T*>(args.base), args.base_stride},
                        static_cast<T*>(args.out) + variant * args.n * args.d,
                        args.d};
      multiply(Rows<T>{x + offset, args.x_stride}, panel * kRows, smaller(args.n, (panel + count) * kRows),
               Rows<T>{weight + offset, args.weight_stride}, column, smaller(block, args.d - column), args.group_size,
               visit);
      item += count;
    }
  }
}

}  // namespace

void leave_one_out(const LeaveOneOut& args, int threads) {
  dispatch(args.dtype, [&](auto tag) { run<Element<decltype(tag)>>(args, threads); });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
