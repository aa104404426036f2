// Instruction sets: which one runs, and the namespace that each copy of a kernel file is compiled into.
//
// CMake compiles every kernel file of this folder once per set, with that set's flags and
// VLPRUNE_ISA=scalar|avx2|avx512. All code in it lives in namespace vlprune::cpu::VLPRUNE_ISA: an inline function
// shared by name between two copies would be merged by the linker, and the copy it kept could hold instructions that
// the machine lacks. For the same reason kernel files use no templates of the standard library.
#pragma once

#include "ops.h"

namespace vlprune::cpu {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// The set in use: the best the machine has, or the one that VLPRUNE_FORCE_ISA names. Throws std::runtime_error where
// that word is unknown or names a set that the machine lacks.
Isa isa();
const char* isa_name(Isa isa);
bool isa_available(Isa isa);

// Overrides the choice for this process, by name; "" returns to the default. Throws like isa().
void force_isa(const char* name);

// Where one thread packs its operands: kScratchFloats floats on a cache line's boundary, owned by the calling thread
// and reused by every call on it. The product of product.h leaves the last kKeptFloats of them to its visitor.
constexpr int64_t kScratchFloats = 528 * 1024, kKeptFloats = 48 * 1024;
float* scratch();

namespace scalar {
VLPRUNE_FOR_EACH_OP(VLPRUNE_DECLARE, int threads);
}  // namespace scalar
namespace avx2 {
VLPRUNE_FOR_EACH_OP(VLPRUNE_DECLARE, int threads);
}  // namespace avx2
namespace avx512 {
VLPRUNE_FOR_EACH_OP(VLPRUNE_DECLARE, int threads);
}  // namespace avx512

}  // namespace vlprune::cpu
