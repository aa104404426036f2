// Chooses the instruction set at run time and forwards each launcher to the copy compiled for it.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace vlprune::cpu {
namespace {

constexpr int kUndecided = -1;
std::atomic<int> chosen{kUndecided};

Isa best_isa() {
  if (isa_available(Isa::kAvx512)) return Isa::kAvx512;
  if (isa_available(Isa::kAvx2)) return Isa::kAvx2;
  return Isa::kScalar;
}

Isa parse_isa(const std::string& name) {
  for (Isa candidate : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
    if (name != isa_name(candidate)) continue;
    if (!isa_available(candidate))
      throw std::runtime_error("VLPRUNE_FORCE_ISA=" + name +
                               ": this machine or this build lacks it; the best here is " + isa_name(best_isa()));
    return candidate;
  }
  throw std::runtime_error("VLPRUNE_FORCE_ISA=" + name + ": unknown instruction set, expected scalar, avx2 or avx512");
}

Isa default_isa() {
  const char* forced = std::getenv("VLPRUNE_FORCE_ISA");
  return forced != nullptr && *forced != '\0' ? parse_isa(forced) : best_isa();
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return "scalar";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
  }
  return "?";
}

bool isa_available(Isa isa) {
  if (isa == Isa::kScalar) return true;
#if VLPRUNE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Isa isa() {
  int value = chosen.load(std::memory_order_relaxed);
  if (value == kUndecided) {
    value = static_cast<int>(default_isa());
    chosen.store(value, std::memory_order_relaxed);
  }
  return static_cast<Isa>(value);
}

void force_isa(const char* name) {
  const Isa value = *name != '\0' ? parse_isa(name) : default_isa();
  chosen.store(static_cast<int>(value), std::memory_order_relaxed);
}

float* scratch() {
  alignas(64) static thread_local float buffer[kScratchFloats];
  return buffer;
}

#if VLPRUNE_X86
#define VLPRUNE_FORWARD(op, Args, where)                   \
  void op(const Args& args, where) {                       \
    switch (isa()) {                                       \
      case Isa::kAvx512: return avx512::op(args, threads); \
      case Isa::kAvx2: return avx2::op(args, threads);     \
      case Isa::kScalar: return scalar::op(args, threads); \
    }                                                      \
  }
#else
#define VLPRUNE_FORWARD(op, Args, where) \
  void op(const Args& args, where) { scalar::op(args, threads); }
#endif
VLPRUNE_FOR_EACH_OP(VLPRUNE_FORWARD, int threads)

}  // namespace vlprune::cpu
