// csrc/cuda/mma.cuh as the PTX ISA describes its instructions, for the emulator. Products of the tensor cores are
// summed in double precision and rounded once, which is closer than they come themselves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace vlprune::cuda {

template <int kBytes>
void copy_async(void* dst, const void* src, bool valid) {
  static_assert(kBytes == 4 || kBytes == 16);
  emulator::copy_async(dst, src, kBytes, valid);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
  emulator::copy_async_wait(kPending);
}

inline void load_matrices(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fail("ldmatrix of a row that is not at 16 bytes");
  const emulator::Payload* payloads = emulator::exchange(emulator::wrap(row), 0xffffffffu, EMULATOR_SITE);
  uint32_t* const r[4] = {&r0, &r1, &r2, &r3};
  const unsigned lane = emulator::lane();
  for (int i = 0; i < 4; ++i) {
    const char* of_row = static_cast<const char*>(emulator::unwrap<const void*>(payloads[8 * i + lane / 4]));
    *r[i] = *reinterpret_cast<const uint32_t*>(of_row + lane % 4 * 4);
  }
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    float a[4][2], b[2][2];
  } mine;
  const auto unpack_pair = [](uint32_t packed, float* pair) {
    for (int e = 0; e < 2; ++e) {
      T element;
      element.bits = static_cast<uint16_t>(packed >> 16 * e);
      pair[e] = element;
    }
  };
  for (int i = 0; i < 4; ++i) unpack_pair(a[i], mine.a[i]);
  for (int i = 0; i < 2; ++i) unpack_pair(b[i], mine.b[i]);
  const emulator::Payload* payloads = emulator::exchange(emulator::wrap(mine), 0xffffffffu, EMULATOR_SITE);
  const unsigned g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const unsigned column = 2 * t + i % 2;
    double sum = c[i];
    for (unsigned quad = 0; quad < 4; ++quad) {  // lanes that hold row g of a, and row `column` of b
      const auto of_a = emulator::unwrap<Operands>(payloads[4 * g + quad]);
      const auto of_b = emulator::unwrap<Operands>(payloads[4 * column + quad]);
      for (int half = 0; half < 2; ++half) {
        for (int e = 0; e < 2; ++e) sum += double{of_a.a[2 * half + i / 2][e]} * of_b.b[half][e];
      }
    }
    c[i] = static_cast<float>(sum);
  }
}

}  // namespace vlprune::cuda
