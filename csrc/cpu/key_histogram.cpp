// counts[digit(key)] += 1 for every key whose upper digits are *prefix;  key = bits of fp32 |weight| * scale
//
// Work is the sequence of rows, dealt out to the threads; each counts into four histograms of its own in L1 (a bin that
// is hit again at once waits for the store before), then adds them to counts, atomically. Sums of integers: the same
// always. Bytes moved: weight read once.
#include "cpu/isa.h"
#include "cpu/keys.h"
#include "cpu/simd.h"

namespace vlprune::cpu::VLPRUNE_ISA {
namespace {

constexpr int64_t kPart = 2048;  // keys of a row at a time
constexpr int kCopies = 4;

template <typename T>
void run(const KeyHistogram& args, int threads) {
  const Keys& keys = args.keys;
  const int shift = args.level == 0 ? 20 : args.level == 1 ? 10 : 0;
  const int prefix_shift = args.level == 1 ? 20 : 10;
  const uint32_t digit_mask = args.level == 0 ? 0x7ffu : 0x3ffu;
  const bool all = args.level == 0;
  const uint32_t prefix = all ? 0 : uint32_t(*args.prefix);

#pragma omp parallel num_threads(threads)
  {
    uint32_t* const part = reinterpret_cast<uint32_t*>(scratch());
    int64_t* const counts = reinterpret_cast<int64_t*>(part + kPart);  // [kCopies][kHistogramBins]
    for (int64_t bin = 0; bin < kCopies * kHistogramBins; ++bin) counts[bin] = 0;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < keys.out; ++i) {
      const T* const weight = static_cast<const T*>(keys.weight) + i * keys.stride;
      for (int64_t j = 0; j < keys.in; j += kPart) {
        const int64_t size = kPart < keys.in - j ? kPart : keys.in - j;
        load_keys(KeyRow<T>{weight + j, keys.scale == nullptr ? nullptr : keys.scale + j}, size, part);
        for (int64_t at = 0; at < size; ++at) {
          if (all || part[at] >> prefix_shift == prefix)
            ++counts[(at % kCopies) * kHistogramBins + (part[at] >> shift & digit_mask)];
        }
      }
    }
    for (int64_t bin = 0; bin < kHistogramBins; ++bin) {
      int64_t sum = 0;
      for (int copy = 0; copy < kCopies; ++copy) sum += counts[copy * kHistogramBins + bin];
      if (sum != 0) __atomic_fetch_add(args.counts + bin, sum, __ATOMIC_RELAXED);
    }
  }
}

}  // namespace

void key_histogram(const KeyHistogram& args, int threads) {
  dispatch(args.keys.dtype, [&](auto tag) { run<Element<decltype(tag)>>(args, threads); });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
