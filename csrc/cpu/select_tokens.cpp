// index[i, :] = the `keep` tokens of row i that come first by number (ops.h), ties to the lower position; ascending
//
// Work is the sequence of rows, dealt out to the threads. A thread has the numbers of its row in scratch memory (of a
// row that does not fit, a part at a time, anew for each pass) and finds the number of the last token to keep by radix
// selection: digits of up to 11 bits from the top, each from a histogram of the numbers that begin with the digits
// found so far. One more pass writes the positions. Bytes moved: score and protect read once, index written once.
#include "cpu/isa.h"
#include "cpu/simd.h"
#include "score_number.h"

namespace vlprune::cpu::VLPRUNE_ISA {
namespace {

constexpr int64_t kPart = kScratchFloats;  // numbers of a row at a time
constexpr int64_t kBlock = 64;             // scores widened at a time
constexpr int kBits = 11, kBins = 1 << kBits;

// A row of scores. One thread's; its numbers lie in that thread's scratch memory.
template <typename T>
struct Row {
  const T* score;          // [tokens]
  const uint8_t* protect;  // [tokens] or null
  int64_t tokens;
  bool crowded;         // as many are protected as are kept, or more
  int64_t loaded = -1;  // the first token of the part whose numbers are there

  // numbers[j] of tokens first .. first + size.
  void load_numbers(int64_t first, int64_t size, uint32_t* numbers) const {
    int64_t j = 0;
    for (; j + kBlock <= size; j += kBlock) {
      float x[kBlock];
      for (int64_t e = 0; e < kBlock; e += kLanes) store(x + e, load(score + first + j + e));
      for (int64_t e = 0; e < kBlock; ++e) numbers[j + e] = score_number(bits_of(x[e]));
    }
    for (; j < size; ++j) numbers[j] = score_number(bits_of(to_float(score[first + j])));
    if (protect == nullptr) return;
    const uint32_t other = crowded ? kNever : kAlways;
    for (j = 0; j < size; ++j) numbers[j] = (protect[first + j] != 0) == crowded ? numbers[j] : other;
  }

  // f(first, numbers, size) for each part, in order.
  template <class F>
  VLPRUNE_INLINE void for_each_part(F&& f) {
    uint32_t* const numbers = reinterpret_cast<uint32_t*>(scratch());
    for (int64_t first = 0; first < tokens; first += kPart) {
      const int64_t size = tokens - first < kPart ? tokens - first : kPart;
      if (first != loaded) load_numbers(first, size, numbers);
      loaded = first;
      f(first, numbers, size);
    }
  }
};

// The first tokens by number: all below `number`, and the first `ties` of those equal to it.
struct Bound {
  uint32_t number;
  int64_t ties;
};

template <typename T>
Bound find_bound(Row<T>& row, int64_t keep) {
  uint32_t prefix = 0;  // the digits found so far, in their place
  int high = 32;
  while (high > 0) {
    const int shift = high > kBits ? high - kBits : 0;
    uint32_t bins[kBins] = {};
    row.for_each_part([&](int64_t, const uint32_t* numbers, int64_t size) {
      for (int64_t j = 0; j < size; ++j) {
        const uint32_t rest = numbers[j] ^ prefix;
        if (uint64_t{rest} >> high == 0) ++bins[rest >> shift];
      }
    });
    uint32_t digit = 0;
    while (keep > bins[digit]) keep -= bins[digit++];
    prefix |= digit << shift;
    if (keep == bins[digit]) return {prefix + (1u << shift), 0};  // no overflow: kNever is never kept
    high = shift;
  }
  return {prefix, keep};
}

template <typename T>
void select_row(Row<T> row, int64_t keep, int64_t* index) {
  const Bound bound = find_bound(row, keep);
  int64_t count = 0, ties = bound.ties;
  row.for_each_part([&](int64_t first, const uint32_t* numbers, int64_t size) {
    for (int64_t j = 0; j < size && count < keep; ++j) {
      const bool tied = numbers[j] == bound.number && ties > 0;
      index[count] = first + j;  // overwritten by the next token unless kept
      count += numbers[j] < bound.number || tied ? 1 : 0;
      ties -= tied ? 1 : 0;
    }
  });
}

template <typename T>
void run(const SelectTokens& args, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < args.rows; ++i) {
    const T* const score = static_cast<const T*>(args.score) + i * args.score_stride;
    const uint8_t* const protect = args.protect == nullptr ? nullptr : args.protect + i * args.protect_stride;
    int64_t count = 0;
    for (int64_t j = 0; protect != nullptr && j < args.tokens; ++j) count += protect[j] != 0 ? 1 : 0;
    select_row(Row<T>{score, protect, args.tokens, count >= args.keep}, args.keep, args.index + i * args.keep);
  }
}

}  // namespace

void select_tokens(const SelectTokens& args, int threads) {
  dispatch(args.dtype, [&](auto tag) { run<Element<decltype(tag)>>(args, threads); });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
