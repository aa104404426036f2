// kept[b, i] = whether token i is among the first keep_b that the greedy choice of ops.h takes from sample b
//
// 1. gram[b, i, j] = <x_i, x_j> by the product of product.h. Work is the sequence of (sample, block of columns j, panel
//    of kRows rows i that begins at or above the block's last column), of which thread t owns the t-th equal part; what
//    lies above the block is written a second time, transposed.
// 2. By sample and token: scale_i of the diagonal, which then becomes NaN, so that no token is close to itself.
// 3. By sample and token: closest_i = max_j gram_ij scale_i scale_j.
// 4. By sample, keep_b times: the first token of least closest; its row of gram raises closest of the others.
//
// B T^2 d flops (half of all products, and the blocks on the diagonal), B T d elements read once a block; 4 B T^2 bytes
// written, read once by 3, and keep_b / T of them once more by 4.
#include "cpu/isa.h"
#include "cpu/product.h"
#include "diversity.h"

namespace vlprune::cpu::VLPRUNE_ISA {
namespace {

// Writes the products of a sample, and those above the block of columns a second time, transposed.
struct Store {
  static constexpr bool kPrefetches = false;

  float* gram;           // [T, T] of this sample
  int64_t tokens;        // T
  int64_t block_column;  // the first of the block

  VLPRUNE_INLINE void prefetch(int64_t, int64_t) const {}

  template <int R>
  VLPRUNE_INLINE void tile(const Tile<R>& tile, int64_t row, int64_t rows, int64_t column, int64_t width) {
    float products[R][kColumns];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) store(products[r] + i * kLanes, tile.sum[r][i]);
    for (int64_t r = 0; r < smaller(R, rows); ++r)
      for (int64_t c = 0; c < width; ++c) gram[(row + r) * tokens + column + c] = products[r][c];
    const int64_t above = smaller(smaller(R, rows), block_column - row);
    for (int64_t c = 0; c < width; ++c)
      for (int64_t r = 0; r < above; ++r) gram[(column + c) * tokens + row + r] = products[r][c];
  }

  VLPRUNE_INLINE void end_of_panel(int64_t, int64_t) const {}
};

// The cosines of a token with some others, the same bits either way round. NaN where one of the two has no direction.
VLPRUNE_INLINE Vec cosines(const float* row, const float* scale, Vec scale_of_row) {
  return mul(load(row), mul(load(scale), scale_of_row));
}
VLPRUNE_INLINE float cosine(float product, float scale, float scale_of_row) { return product * (scale * scale_of_row); }

// The greatest of a row of cosines, passing over NaN.
float greatest(const float* row, const float* scale, float scale_of_row, int64_t tokens) {
  const Vec factor = broadcast(scale_of_row);
  Vec most = broadcast(-INFINITY);
  int64_t j = 0;
  for (; j + kLanes <= tokens; j += kLanes) most = maximum(cosines(row + j, scale + j, factor), most);
  float lanes[kLanes];
  store(lanes, most);
  float best = -INFINITY;
  for (int lane = 0; lane < kLanes; ++lane) best = lanes[lane] > best ? lanes[lane] : best;
  for (; j < tokens; ++j) {
    const float similarity = cosine(row[j], scale[j], scale_of_row);
    best = similarity > best ? similarity : best;
  }
  return best;
}

// Raises closest to a row of cosines where that is more, passing over NaN. Returns the least.
float raise(float* closest, const float* row, const float* scale, float scale_of_row, int64_t tokens) {
  const Vec factor = broadcast(scale_of_row);
  Vec least = broadcast(kChosen);
  int64_t i = 0;
  for (; i + kLanes <= tokens; i += kLanes) {
    const Vec raised = maximum(cosines(row + i, scale + i, factor), load(closest + i));
    store(closest + i, raised);
    least = minimum(raised, least);
  }
  float lanes[kLanes];
  store(lanes, least);
  float best = kChosen;
  for (int lane = 0; lane < kLanes; ++lane) best = lanes[lane] < best ? lanes[lane] : best;
  for (; i < tokens; ++i) {
    const float similarity = cosine(row[i], scale[i], scale_of_row);
    closest[i] = similarity > closest[i] ? similarity : closest[i];
    best = closest[i] < best ? closest[i] : best;
  }
  return best;
}

// The first token whose closest is `value`, which one has and none is below.
int64_t first_of(const float* closest, float value, int64_t tokens) {
  constexpr uint32_t kAll = uint32_t((uint64_t{1} << kLanes) - 1);
  const Vec bound = broadcast(value);
  int64_t i = 0;
  while (i + kLanes <= tokens && greater(load(closest + i), bound) == kAll) i += kLanes;
  while (closest[i] > value) ++i;
  return i;
}

void choose(const float* gram, const float* scale, float* closest, int64_t tokens, int64_t keep, uint8_t* kept) {
  float least = kChosen;
  for (int64_t i = 0; i < tokens; ++i) least = closest[i] < least ? closest[i] : least;
  for (int64_t n = 0; n < keep && least < kNotCandidate; ++n) {
    const int64_t chosen = first_of(closest, least, tokens);
    closest[chosen] = kChosen;
    // From here on it is those chosen that count.
    for (int64_t i = 0; n == 0 && i < tokens; ++i) closest[i] = closest[i] < kLast ? -INFINITY : closest[i];
    least = raise(closest, gram + chosen * tokens, scale, scale[chosen], tokens);
  }
  for (int64_t i = 0; i < tokens; ++i) kept[i] = closest[i] == kChosen ? 1 : 0;
}

template <typename T>
void run(const DiverseTokens& args, int threads) {
  const int64_t tokens = args.tokens, all_tokens = args.batch * tokens;
  constexpr int64_t kBlock = kBlockColumns / kColumns * kColumns;
  const auto panels = [&](int64_t column) { return ceil_div(smaller(tokens, column + kBlock), kRows); };
  int64_t of_sample = 0;
  for (int64_t column = 0; column < tokens; column += kBlock) of_sample += panels(column);
  const int64_t work = args.batch * of_sample;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    int64_t item = work / threads * thread + smaller(thread, work % threads);
    const int64_t end = item + work / threads + (thread < work % threads ? 1 : 0);
    while (item < end) {
      const int64_t b = item / of_sample;
      int64_t panel = item % of_sample, column = 0;
      for (; panel >= panels(column); column += kBlock) panel -= panels(column);
      const int64_t count = smaller(panels(column) - panel, end - item);
      const int64_t columns = smaller(kBlock, tokens - column);
      const Rows<T> x{static_cast<const T*>(args.x) + b * args.batch_stride, args.token_stride};
      Store visit{args.gram + b * tokens * tokens, tokens, column};
      multiply(x, panel * kRows, smaller(column + columns, (panel + count) * kRows), x, column, columns, args.d, visit);
      item += count;
    }
  }

  const auto is_candidate = [&](int64_t i) { return args.candidate == nullptr || args.candidate[i] != 0; };
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < all_tokens; ++i) {
    float& norm_sq = args.gram[i * tokens + i % tokens];
    args.scale[i] = cosine_scale(norm_sq, is_candidate(i));
    norm_sq = NAN;
  }

#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < all_tokens; ++i) {
    const float* const scale = args.scale + i / tokens * tokens;
    const float most = greatest(args.gram + i * tokens, scale, args.scale[i], tokens);
    args.closest[i] = first_closest(most, args.scale[i], is_candidate(i));
  }

#pragma omp parallel for num_threads(threads)
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t keep = args.keep_of_sample == nullptr ? args.keep : args.keep_of_sample[b];
    choose(args.gram + b * tokens * tokens, args.scale + b * tokens, args.closest + b * tokens, tokens, keep,
           args.kept + b * tokens);
  }
}

}  // namespace

void diverse_tokens(const DiverseTokens& args, int threads) {
  dispatch(args.dtype, [&](auto tag) { run<Element<decltype(tag)>>(args, threads); });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
