// rank[v, n] = #{ m : <query[v,n], gallery[v,m]> > best[v,n] },  best = max_p <query[v,n], gallery[v,positives[n,p]]>
//
// First each thread takes rows (v, n) and computes best, with the chain of multiply-adds that every score has
// (product.h), so that equal embeddings tie. Then the work is the sequence of (variant, block of items m, panel of
// kRows queries n), of which thread t owns the t-th equal part; it counts a panel against a block in registers and adds
// the counts to rank, atomically, because other blocks belong to other threads. Sums of integers: the same bits always.
// Bytes moved: gallery once per thread at most, queries once per block of items; scores never leave the registers.
#include "cpu/isa.h"
#include "cpu/product.h"

namespace vlprune::cpu::VLPRUNE_ISA {
namespace {

constexpr uint32_t kNan = 0x80000000u;  // set in rank while counting: a score was NaN
constexpr int kChains = 8;              // independent sums in flight, to hide the latency of each

struct Count {
  static constexpr bool kPrefetches = false;

  const float* best;  // [N] of this variant
  int32_t* rank;      // [N] of this variant
  uint32_t higher[kRows] = {};
  uint32_t nan[kRows] = {};

  VLPRUNE_INLINE void prefetch(int64_t, int64_t) const {}

  template <int R>
  VLPRUNE_INLINE void tile(const Tile<R>& tile, int64_t row, int64_t rows, int64_t, int64_t width) {
    const uint64_t valid = (uint64_t{1} << width) - 1;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (r >= rows) break;
      const Vec threshold = broadcast(best[row + r]);
      uint64_t above = 0, unordered = 0;
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        above |= uint64_t{greater(tile.sum[r][i], threshold)} << (i * kLanes);
        unordered |= uint64_t{is_nan(tile.sum[r][i])} << (i * kLanes);
      }
      higher[r] += uint32_t(__builtin_popcountll(above & valid));
      nan[r] |= uint32_t((unordered & valid) != 0);
    }
  }

  VLPRUNE_INLINE void end_of_panel(int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      uint32_t* target = reinterpret_cast<uint32_t*>(rank + row + r);
      if (higher[r] != 0) __atomic_fetch_add(target, higher[r], __ATOMIC_RELAXED);
      if (nan[r] != 0) __atomic_fetch_or(target, kNan, __ATOMIC_RELAXED);
      higher[r] = nan[r] = 0;
    }
  }
};

// best[0 .. rows) for queries [row, row + rows) of one variant, rows <= kChains.
template <typename T>
void best_positive(const T* query, const T* gallery, const int64_t* positives, int64_t p, int64_t d, int64_t rows,
                   float* best) {
  bool any[kChains] = {};
  for (int64_t j = 0; j < p; ++j) {
    const T* item[kChains];
    const T* from[kChains];
    float sum[kChains] = {};
    for (int c = 0; c < kChains; ++c) {
      const int64_t r = c < rows ? c : 0;
      const int64_t index = positives[r * p + j];
      from[c] = query + r * d;
      item[c] = gallery + (index < 0 ? 0 : index) * d;
    }
    const int64_t chunk = depth_of_chunk(d);
    for (int64_t k0 = 0; k0 < d; k0 += chunk) {
      float part[kChains] = {};
      for (int64_t k = k0; k < smaller(d, k0 + chunk); ++k) {
#pragma GCC unroll 8
        for (int c = 0; c < kChains; ++c) part[c] = madd(to_float(from[c][k]), to_float(item[c][k]), part[c]);
      }
      for (int c = 0; c < kChains; ++c) sum[c] = k0 == 0 ? part[c] : sum[c] + part[c];
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (positives[r * p + j] < 0) continue;
      if (!any[r] || sum[r] > best[r]) best[r] = sum[r];
      any[r] = true;
    }
  }
}

template <typename T>
void run(const RetrievalRank& args, int threads) {
  const T* const query = static_cast<const T*>(args.query);
  const T* const gallery = static_cast<const T*>(args.gallery);
  const int64_t gallery_stride = args.shared_gallery ? 0 : args.m * args.d;

  const int64_t bundles = ceil_div(args.n, kChains);
#pragma omp parallel for num_threads(threads)
  for (int64_t item = 0; item < args.v * bundles; ++item) {
    const int64_t v = item / bundles, n = item % bundles * kChains;
    best_positive(query + (v * args.n + n) * args.d, gallery + v * gallery_stride, args.positives + n * args.p, args.p,
                  args.d, smaller(kChains, args.n - n), args.best + v * args.n + n);
    for (int64_t r = n; r < smaller(args.n, n + kChains); ++r) args.rank[v * args.n + r] = 0;
  }

  const int64_t block = block_columns(args.d);
  const int64_t blocks = ceil_div(args.m, block);
  const int64_t panels = ceil_div(args.n, kRows);
  const int64_t work = args.v * blocks * panels;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    int64_t item = work / threads * thread + smaller(thread, work % threads);
    const int64_t end = item + work / threads + (thread < work % threads ? 1 : 0);
    while (item < end) {
      const int64_t v = item / (blocks * panels), column = item / panels % blocks * block;
      const int64_t panel = item % panels, count = smaller(panels - panel, end - item);
      Count visit{args.best + v * args.n, args.rank + v * args.n};
      multiply(Rows<T>{query + v * args.n * args.d, args.d}, panel * kRows, smaller(args.n, (panel + count) * kRows),
               Rows<T>{gallery + v * gallery_stride, args.d}, column, smaller(block, args.m - column), args.d, visit);
      item += count;
    }
  }

#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < args.v * args.n; ++i)
    if (args.rank[i] < 0) args.rank[i] = -1;
}

}  // namespace

void retrieval_rank(const RetrievalRank& args, int threads) {
  dispatch(args.dtype, [&](auto tag) { run<Element<decltype(tag)>>(args, threads); });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
