// below[i], equal[i] = how many keys of row i are less than / equal to *threshold;  key = bits of fp32 |weight| * scale
//
// Work is the sequence of rows, dealt out to the threads. Bytes moved: weight read once.
#include "cpu/isa.h"
#include "cpu/keys.h"
#include "cpu/simd.h"

namespace vlprune::cpu::VLPRUNE_ISA {
namespace {

constexpr int64_t kPart = 2048;  // keys of a row at a time

template <typename T>
void run(const CountKeys& args, int threads) {
  const Keys& keys = args.keys;
  const uint32_t threshold = uint32_t(*args.threshold);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < keys.out; ++i) {
    uint32_t* const part = reinterpret_cast<uint32_t*>(scratch());
    const T* const weight = static_cast<const T*>(keys.weight) + i * keys.stride;
    int64_t below = 0, equal = 0;
    for (int64_t j = 0; j < keys.in; j += kPart) {
      const int64_t size = kPart < keys.in - j ? kPart : keys.in - j;
      load_keys(KeyRow<T>{weight + j, keys.scale == nullptr ? nullptr : keys.scale + j}, size, part);
      uint32_t less = 0, same = 0;
      for (int64_t at = 0; at < size; ++at) {
        less += part[at] < threshold ? 1u : 0u;
        same += part[at] == threshold ? 1u : 0u;
      }
      below += less;
      equal += same;
    }
    args.below[i] = below;
    args.equal[i] = equal;
  }
}

}  // namespace

void count_keys(const CountKeys& args, int threads) {
  dispatch(args.keys.dtype, [&](auto tag) { run<Element<decltype(tag)>>(args, threads); });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
