// Runs CUDA kernels on the CPU, one thread of a block at a time, and fails where they would be wrong on a GPU:
//
//   - an access outside the memory that the caller named with allow(), outside shared memory, or not aligned;
//   - two threads of one launch that access the same byte, one of them writing, with nothing that orders them: a
//   block's
//     barriers order its threads, __syncwarp() orders a warp's, nothing orders two blocks, atomics do not race;
//   - threads of a block (or lanes of a warp) that wait at different barriers, or for one that never comes;
//   - a launch that a GPU would refuse: too many threads, too much shared memory, too large parameters.
//
// Threads run in an order drawn anew after each barrier, blocks in an order drawn for each launch, always the same
// draws. Shared memory starts as garbage, and what an asynchronous copy overwrites is garbage until the copy is waited
// for. Accesses are seen through the calls that -fsanitize=thread compiles in; emulator.cpp answers them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Of the thread that runs.
extern Index thread_index, block_index, block_size, grid_size;

struct Grid {
  const char* where;  // file and line of the launch
  Index blocks, threads;
  size_t shared_bytes;
};

// Memory that kernels launched by this thread of the host may access from now on, and none at all.
void allow(uintptr_t begin, size_t bytes);
void forbid_all();

// The attribute of the next launch, without which it gets no more than 48 KB.
void set_max_dynamic_shared(size_t bytes);

// Calls thread(context) once for each thread; throws std::runtime_error for what is wrong.
void run(const Grid& grid, size_t parameter_bytes, void (*thread)(const void*), const void* context);

[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail_unaligned(const void* from, const void* to, size_t bytes);

struct Site {
  const char* file;
  int line;
};
void sync_block(Site site);
void sync_warp(unsigned mask, Site site);

// What a lane passes to the others of its warp.
struct alignas(16) Payload {
  uint32_t word[12];
};
// Waits for all lanes of `mask`; returns the 32 payloads, which stay until the next exchange but one. Orders no memory.
const Payload* exchange(const Payload& payload, unsigned mask, Site site);

// The block's memory for one declaration of shared memory.
void* shared(Site site, size_t bytes, size_t alignment);
void* dynamic_shared();

// Access by an instruction that the compiler does not see.
void read(const void* p, size_t bytes);
void write(const void* p, size_t bytes);
void atomic(const void* p, size_t bytes);

// A copy by one instruction, which needs both addresses aligned to its size.
inline void moves(const void* from, const void* to, size_t bytes) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to);
  if (addresses % bytes != 0) fail_unaligned(from, to, bytes);
}

// Asynchronous copies of this thread, as cp.async.
void copy_async(void* dst, const void* src, size_t bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);

template <typename T>
Payload wrap(const T& value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(Payload));
  Payload payload;
  std::memcpy(&payload, &value, sizeof(T));
  return payload;
}

template <typename T>
__attribute__((no_sanitize_thread)) T unwrap(const Payload& payload) {
  T value;
  std::memcpy(&value, &payload, sizeof(T));
  return value;
}

template <typename Kernel, typename... Parameters>
void launch(const Grid& grid, const void* /* stream */, const Kernel& kernel, const Parameters&... parameters) {
  const auto call = [&] { kernel(parameters...); };  // on the host's stack, which threads may read
  run(
      grid, (size_t{0} + ... + sizeof(Parameters)),
      [](const void* context) { (*static_cast<decltype(&call)>(context))(); }, &call);
}

}  // namespace emulator

#define EMULATOR_SITE \
  ::emulator::Site { __FILE__, __LINE__ }
