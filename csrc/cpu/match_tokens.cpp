// similarity[b, i] = max over targets j != i of <key[b, i], key[b, j]> / (|key[b, i]| |key[b, j]|), match[b, i] = that
// j
//
// Each thread lists the targets and the sources of whole samples; then it takes the lengths of runs of kLengths of
// them. The products are those of product.h, of the listed rows alone: the work is the sequence of (sample, block of
// targets, panel of kRows sources), of which thread t owns the t-th equal part. A panel's best targets of a block stay
// in registers and on the stack; then each is offered to match, which holds numbers (match_number.h) until the end, by
// an atomic maximum, because other blocks belong to other threads. A maximum: the same bits always.
// Flops: 2 d for each pair of source and target. Bytes moved: the targets once per thread at most, the sources once per
// block of targets; similarities never leave the registers but the best.
#include "cpu/isa.h"
#include "cpu/product.h"
#include "match_number.h"

namespace vlprune::cpu::VLPRUNE_ISA {
namespace {

constexpr int64_t kLengths = 64;
constexpr int64_t kWorthThreads = 1 << 14;  // tokens to go over once

struct Sample {
  int32_t* targets;
  int32_t* sources;
  int32_t* twins;   // of the sources: their places among the targets, or -1
  int32_t* counts;  // targets, sources
  float* inverse;   // of the targets' lengths
  float* similarity;
  uint64_t* number;

  Sample(const MatchTokens& args, int64_t b)
      : targets(args.lists + b * 3 * args.t),
        sources(targets + args.t),
        twins(sources + args.t),
        counts(args.counts + b * 2),
        inverse(args.inverse + b * args.t),
        similarity(args.similarity + b * args.t),
        number(reinterpret_cast<uint64_t*>(args.match) + b * args.t) {}
};

void list_tokens(const MatchTokens& args, int64_t b) {
  const Sample of(args, b);
  const uint8_t* const target = args.target + b * args.t;
  const uint8_t* const source = args.source == nullptr ? nullptr : args.source + b * args.t;
  int32_t targets = 0, sources = 0;
  for (int64_t t = 0; t < args.t; ++t) {
    const bool is_target = target[t] != 0, is_source = source == nullptr ? !is_target : source[t] != 0;
    if (is_source) {
      of.sources[sources] = int32_t(t);
      of.twins[sources++] = is_target ? targets : -1;
    }
    if (is_target) of.targets[targets++] = int32_t(t);
    of.number[t] = kNoMatch;
  }
  of.counts[0] = targets;
  of.counts[1] = sources;
}

template <typename T>
float inverse_length_of(const T* row, int64_t d) {
  constexpr int kSums = 4;
  Vec sum[kSums] = {zero(), zero(), zero(), zero()};
  int64_t k = 0;
  for (; k + kSums * kLanes <= d; k += kSums * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      const Vec x = load(row + k + i * kLanes);
      sum[i] = fmadd(x, x, sum[i]);
    }
  }
  for (; k < d; k += kLanes) {
    const Vec x = load(row + k, smaller(kLanes, d - k));
    sum[0] = fmadd(x, x, sum[0]);
  }
  float lane[kLanes];
  store(lane, add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int l = 0; l < step; ++l) lane[l] += lane[l + step];
  return inverse_length(lane[0]);
}

struct Nearest {
  static constexpr bool kPrefetches = false;

  const Sample& of;
  float best[kRows];
  int32_t place[kRows];  // of the best target, or -1

  explicit Nearest(const Sample& sample) : of(sample) { clear(); }
  void clear() {
    for (int r = 0; r < kRows; ++r) best[r] = -__builtin_inff(), place[r] = -1;
  }

  VLPRUNE_INLINE void prefetch(int64_t, int64_t) const {}

  template <int R>
  VLPRUNE_INLINE void tile(const Tile<R>& tile, int64_t row, int64_t rows, int64_t column, int64_t width) {
    const uint64_t valid = (uint64_t{1} << width) - 1;
    Vec scale[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const int64_t count = width - i * kLanes;
      const float* const inverse = of.inverse + column + i * kLanes;
      scale[i] = count >= kLanes ? load(inverse) : count > 0 ? load(inverse, count) : zero();
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (r >= rows) break;
      Vec score[kVectors];
      uint64_t above = 0;
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        score[i] = mul(tile.sum[r][i], scale[i]);
        above |= uint64_t{greater(score[i], broadcast(best[r]))} << (i * kLanes);
      }
      above &= valid;
      const int64_t self = of.twins[row + r] - column;
      if (self >= 0 && self < width) above &= ~(uint64_t{1} << self);
      if (above == 0) continue;
      float each[kColumns];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) store(each + i * kLanes, score[i]);
      for (; above != 0; above &= above - 1) {
        const int c = __builtin_ctzll(above);
        if (each[c] > best[r]) best[r] = each[c], place[r] = int32_t(column + c);
      }
    }
  }

  VLPRUNE_INLINE void end_of_panel(int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      if (place[r] < 0) continue;
      const uint64_t offered = match_number(bits_of(best[r] + 0.0f), uint32_t(place[r]));  // + 0: -0 equals 0
      uint64_t* const number = of.number + of.sources[row + r];
      uint64_t found = __atomic_load_n(number, __ATOMIC_RELAXED);
      while (found < offered &&
             !__atomic_compare_exchange_n(number, &found, offered, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      }
    }
    clear();
  }
};

template <typename T>
void run(const MatchTokens& args, int threads) {
  const T* const keys = static_cast<const T*>(args.key);
  const int64_t stride = args.key_strides[1];
  const bool is_large = args.b * args.t > kWorthThreads;

#pragma omp parallel for num_threads(threads) schedule(static) if (is_large)
  for (int64_t b = 0; b < args.b; ++b) list_tokens(args, b);

  const int64_t parts = ceil_div(args.t, kLengths);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < args.b * parts; ++item) {
    const int64_t b = item / parts, first = item % parts * kLengths;
    const Sample of(args, b);
    const T* const key = keys + b * args.key_strides[0];
    for (int64_t i = first; i < smaller(of.counts[0], first + kLengths); ++i)
      of.inverse[i] = inverse_length_of(key + of.targets[i] * stride, args.d);
    for (int64_t i = first; i < smaller(of.counts[1], first + kLengths); ++i)
      of.similarity[of.sources[i]] = inverse_length_of(key + of.sources[i] * stride, args.d);
  }

  const int64_t block = block_columns(args.d);
  const auto panels_of = [](const Sample& of) { return ceil_div(of.counts[1], kRows); };
  const auto work_of = [&](const Sample& of) { return ceil_div(of.counts[0], block) * panels_of(of); };
  int64_t work = 0;
  for (int64_t b = 0; b < args.b; ++b) work += work_of(Sample(args, b));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    int64_t item = work / threads * thread + smaller(thread, work % threads);  // counted from the sample's first
    int64_t left = work / threads + (thread < work % threads ? 1 : 0);
    for (int64_t b = 0; b < args.b && left > 0; ++b) {
      const Sample of(args, b);
      const int64_t panels = panels_of(of), items = work_of(of);
      const T* const key = keys + b * args.key_strides[0];
      Nearest visit(of);
      while (item < items && left > 0) {
        const int64_t column = item / panels * block, panel = item % panels;
        const int64_t count = smaller(panels - panel, left);
        multiply(GatheredRows<T>{key, stride, of.sources}, panel * kRows,
                 smaller(of.counts[1], (panel + count) * kRows), GatheredRows<T>{key, stride, of.targets}, column,
                 smaller(block, of.counts[0] - column), args.d, visit);
        item += count;
        left -= count;
      }
      item -= items;
    }
  }

#pragma omp parallel for num_threads(threads) schedule(static) if (is_large)
  for (int64_t i = 0; i < args.b * args.t; ++i) {
    const Sample of(args, i / args.t);
    const uint64_t number = of.number[i % args.t];
    const float similarity = float_of(similarity_bits_of(number)) * args.similarity[i];
    const bool exists = number != kNoMatch && similarity == similarity;  // else the source has no length
    args.similarity[i] = exists ? similarity : -__builtin_inff();
    args.match[i] = exists ? of.targets[place_of(number)] : -1;
  }
}

}  // namespace

void match_tokens(const MatchTokens& args, int threads) {
  dispatch(args.dtype, [&](auto tag) { run<Element<decltype(tag)>>(args, threads); });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
