// acc[j] += sum_n token_weight[n] x[n, j]^2
//
// Work is the sequence of (chunk of kNormChunk rows, stripe of kStripe columns); a thread sums its stripe of a chunk,
// in ascending order of rows, into partial[chunk], four rows at a time so that a sum is loaded and stored once for four
// terms. Then the chunks are added to acc in order. Bytes moved: x once; partial, 1/64 of that in 16 bits, twice.
#include "cpu/isa.h"
#include "cpu/simd.h"

namespace vlprune::cpu::VLPRUNE_ISA {
namespace {

constexpr int64_t kStripe = 4096;
constexpr int64_t kAhead = 1024;  // bytes that are asked for ahead in each of the rows

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// sum[j] = first ? 0 : sum[j], then + w[r] row[r][j]^2 for the rows in order.
template <int R, typename T>
VLPRUNE_INLINE void add_rows(float* sum, const T* const* row, const float* weight, int64_t columns, bool first) {
  const auto step = [&](int64_t j, auto... count) {
    Vec s = first ? zero() : load(sum + j, count...);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec x = load(row[r] + j, count...);
      s = fmadd(mul(x, broadcast(weight[r])), x, s);
    }
    store(sum + j, s, count...);
  };
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) __builtin_prefetch(reinterpret_cast<const char*>(row[r] + j) + kAhead);
    step(j);
  }
  if (j < columns) step(j, columns - j);
}

template <typename T>
void run(const ColumnNormSq& args, int threads) {
  const int64_t chunks = (args.n + kNormChunk - 1) / kNormChunk;
  const int64_t stripes = (args.in + kStripe - 1) / kStripe;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < chunks * stripes; ++item) {
    const int64_t chunk = item / stripes, column = item % stripes * kStripe;
    const int64_t columns = smaller(kStripe, args.in - column);
    const int64_t first = chunk * kNormChunk, end = smaller(args.n, first + kNormChunk);
    const T* const x = static_cast<const T*>(args.x) + column;
    float* const sum = args.partial + chunk * args.in + column;
    for (int64_t n = first; n < end;) {
      const T* row[4];
      float weight[4];
      const int64_t rows = end - n >= 4 ? 4 : 1;
      for (int64_t r = 0; r < rows; ++r) {
        row[r] = x + (n + r) * args.x_stride;
        weight[r] = args.token_weight == nullptr ? 1.0f : args.token_weight[n + r];
      }
      if (rows == 4) {
        add_rows<4>(sum, row, weight, columns, n == first);
      } else {
        add_rows<1>(sum, row, weight, columns, n == first);
      }
      n += rows;
    }
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t stripe = 0; stripe < stripes; ++stripe) {
    const int64_t end = smaller(args.in, (stripe + 1) * kStripe);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t j = stripe * kStripe; j < end; ++j) args.acc[j] += args.partial[chunk * args.in + j];
  }
}

}  // namespace

void column_norm_sq(const ColumnNormSq& args, int threads) {
  dispatch(args.dtype, [&](auto tag) { run<Element<decltype(tag)>>(args, threads); });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
