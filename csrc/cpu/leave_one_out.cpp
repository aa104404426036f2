// out[i, n, d] = base[n, d] - sum_{k in group i} x[n, k] * weight[d, k]
//
// Work is the sequence of (variant, block of columns d, panel of kRows rows n); thread t owns the t-th equal part of it, so
// that it packs a block of the weight about once, streams x and base through it, and writes each element of out once.
// Bytes moved: x and weight once, out once, base once per variant (from the last-level cache where it fits).
#include "cpu/isa.h"
#include "cpu/product.h"

namespace vlprune::cpu::VLPRUNE_ISA {
namespace {

// Outputs larger than this are written past the caches: nothing of them would still be there when they are read.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

template <typename T, bool kStream>
struct Subtract {
  Rows<T> base;
  T* out;  // [N, D] of this variant
  int64_t d;

  VLPRUNE_INLINE void prefetch(int64_t row, int64_t rows, int64_t column) const {
    for (int64_t r = 0; r < rows; ++r) {
      const char* p = reinterpret_cast<const char*>(base.data + (row + r) * base.stride + column);
      for (size_t offset = 0; offset < kColumns * sizeof(T); offset += 64) __builtin_prefetch(p + offset);
    }
  }

  template <int R>
  VLPRUNE_INLINE void tile(const Tile<R>& tile, int64_t row, int64_t rows, int64_t column, int64_t width) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (r >= rows) break;
      const T* from = base.data + (row + r) * base.stride + column;
      T* to = out + (row + r) * d + column;
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half, from += kLanes, to += kLanes) {
        const int64_t count = width - half * kLanes;
        if (count >= kLanes) {
          const Vec difference = sub(load(from), tile.sum[r][half]);
          if constexpr (kStream) {
            stream(to, difference);
          } else {
            store(to, difference);
          }
        } else if (count > 0) {
          store(to, sub(load(from, count), tile.sum[r][half]), count);
        }
      }
    }
  }

  VLPRUNE_INLINE void end_of_panel(int64_t, int64_t) const {}
};

template <typename T, bool kStream>
void run(const LeaveOneOut& args, int threads) {
  const T* const x = static_cast<const T*>(args.x);
  const T* const weight = static_cast<const T*>(args.weight);
  const int64_t block = block_columns(args.group_size);
  const int64_t blocks = ceil_div(args.d, block);
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
      Subtract<T, kStream> visit{{static_cast<const T*>(args.base), args.base_stride},
                                 static_cast<T*>(args.out) + variant * args.n * args.d,
                                 args.d};
      multiply(Rows<T>{x + offset, args.x_stride}, panel * kRows, smaller(args.n, (panel + count) * kRows),
               Rows<T>{weight + offset, args.weight_stride}, column, smaller(block, args.d - column), args.group_size,
               /*packed=*/false, visit);
      item += count;
    }
    if constexpr (kStream) stream_fence();
  }
}

}  // namespace

void leave_one_out(const LeaveOneOut& args, int threads) {
  dispatch(args.dtype, [&](auto tag) {
    using T = Element<decltype(tag)>;
    const int64_t bytes = args.v * args.n * args.d * int64_t(sizeof(T));
    // Whole tiles must start on a cache line.
    const bool aligned = reinterpret_cast<uintptr_t>(args.out) % 64 == 0 && args.d * sizeof(T) % 64 == 0;
    if (bytes > kStreamBytes && aligned) {
      run<T, true>(args, threads);
    } else {
      run<T, false>(args, threads);
    }
  });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
