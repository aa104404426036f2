#include "emulator.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "races.h"

#if !defined(__x86_64__)
#error "The emulator switches between threads in x86-64 assembly"
#endif

// Saves the registers that a call keeps and the stack, and goes on with another stack.
extern "C" void emulator_switch(void** saved, void* next);
asm(R"(
.text
.p2align 4
.local emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

// The module's own memory, where constants lie.
extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" const char _end[] __attribute__((visibility("hidden")));

namespace emulator {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4096;  // the guard is where a stack would grow to
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kPlainSharedBytes = 48 << 10, kMaxSharedBytes = 227 << 10, kMaxParameterBytes = 4096;
constexpr int kGarbage = 0xff;  // NaN as a float, -1 as an index

// ---- threads ----
struct Copy {
  char* dst;
  const char* src;
  size_t bytes;
  bool valid;
};

struct Thread {
  void* stack_pointer;
  char* stack;
  Index index;
  unsigned number, block_epoch, warp_epoch, exchanges;
  std::vector<Copy> copies;  // issued, not committed
  std::deque<std::vector<Copy>> committed;
};

struct Barrier {
  Site site = {nullptr, 0};
  std::vector<Thread*> waiting;
};

struct Warp {
  Barrier barrier;
  unsigned live = 0;  // lanes that have not returned
  std::array<std::array<Payload, 32>, 2> payloads;
};

struct Range {
  uintptr_t begin, end;
};

// Threads of the host launch one after another, each with memory of its own.
std::mutex one_launch;
thread_local std::vector<Range> allowed;  // sorted by begin
thread_local Range last_range = {0, 0};
Range host_stack = {0, 0};
thread_local size_t max_dynamic_shared = kPlainSharedBytes;

// The present launch.
const Grid* grid;
void (*body)(const void*);
const void* context;
std::vector<Thread> threads;
std::vector<Warp> warps;
std::deque<Thread*> runnable;
thread_local Thread* self = nullptr;  // null on the host
unsigned live_threads;
Barrier block_barrier;
void* host;  // stack pointer
std::string failure;
std::minstd_rand draw;
Ledger global_ledger, shared_ledger;  // of the launch, of the block
uint64_t block_number;

// The present block's shared memory: a part for each declaration, apart from one another.
std::vector<char> arena;
size_t arena_used;
std::map<std::tuple<const char*, int>, Range> declared;
Range dynamic_range;
std::vector<Range> shared_ranges;
size_t shared_bytes;

std::string name(const Thread& thread) {
  return "thread (" + std::to_string(thread.index.x) + ", " + std::to_string(thread.index.y) + ") of block (" +
         std::to_string(block_index.x) + ", " + std::to_string(block_index.y) + ")";
}

std::string at(Site site) {
  const char* slash = strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

void go_on_with(Thread* next) {
  Thread* const left = self;
  self = next;
  thread_index = next->index;
  if (left == next) return;
  emulator_switch(&left->stack_pointer, next->stack_pointer);
}

// Leaves this thread for the next that can run, or for the host when none can.
void leave() {
  if (!runnable.empty()) {
    Thread* next = runnable.front();
    runnable.pop_front();
    go_on_with(next);
    return;
  }
  Thread* const left = self;
  self = nullptr;
  emulator_switch(&left->stack_pointer, host);
}

void release(std::vector<Thread*>& waiting) {
  std::shuffle(waiting.begin(), waiting.end(), draw);
  runnable.insert(runnable.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

void wait_at(Barrier& barrier, Site site, size_t expected) {
  if (barrier.waiting.empty()) {
    barrier.site = site;
  } else if (barrier.site.line != site.line || std::strcmp(barrier.site.file, site.file) != 0) {
    fail("waits at " + at(site) + ", others at " + at(barrier.site));
  }
  barrier.waiting.push_back(self);
  if (barrier.waiting.size() == expected) release(barrier.waiting);
  leave();
}

void wait_with_warp(unsigned mask, Site site) {
  Warp& warp = warps[self->number / 32];
  if (mask != 0xffffffffu) fail("a part of a warp meets at " + at(site) + ", which the emulator does not know");
  if (warp.live != 32) fail("meets lanes at " + at(site) + " that have returned or do not exist");
  wait_at(warp.barrier, site, 32);
}

void finish(const Copy& copy) {
  write(copy.dst, copy.bytes);
  if (copy.valid) {
    read(copy.src, copy.bytes);
    std::memcpy(copy.dst, copy.src, copy.bytes);
  } else {
    std::memset(copy.dst, 0, copy.bytes);
  }
}

void thread_main() {
  body(context);
  if (!self->copies.empty()) fail("returns with asynchronous copies that were not committed");
  while (!self->committed.empty()) copy_async_wait(0);
  --live_threads;
  Warp& warp = warps[self->number / 32];
  --warp.live;
  if (!warp.barrier.waiting.empty()) fail("has returned, its warp waits at " + at(warp.barrier.site));
  // Those that have returned count as arrived.
  if (!block_barrier.waiting.empty() && block_barrier.waiting.size() == live_threads) release(block_barrier.waiting);
  leave();
}

void prepare(Thread& thread) {
  // As emulator_switch() leaves a stack: six registers, then the address to return to, which itself has none.
  void** top = reinterpret_cast<void**>(thread.stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
  thread.copies.clear();
  thread.committed.clear();
  thread.block_epoch = thread.warp_epoch = thread.exchanges = 0;
}

void grow_to(unsigned count) {
  while (threads.size() < count) {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("emulator: no memory for stacks");
    mprotect(stack, kGuardBytes, PROT_NONE);
    threads.emplace_back();
    threads.back().stack = static_cast<char*>(stack);
  }
}

Range claim(size_t bytes, size_t alignment) {
  constexpr size_t kApart = 256;
  const uintptr_t base = reinterpret_cast<uintptr_t>(arena.data());
  const uintptr_t begin = (base + arena_used + kApart + alignment - 1) / alignment * alignment;
  arena_used = begin + bytes - base;
  if (arena_used + kApart > arena.size()) fail("more shared memory than a multiprocessor has");
  shared_bytes += bytes;
  if (shared_bytes - (dynamic_range.end - dynamic_range.begin) > kPlainSharedBytes) {
    fail("declares more than 48 KB of shared memory");
  }
  if (shared_bytes > kMaxSharedBytes) fail("takes more than 227 KB of shared memory");
  const Range range = {begin, begin + bytes};
  shared_ranges.push_back(range);
  return range;
}

void run_block() {
  const unsigned count = grid->threads.x * grid->threads.y * grid->threads.z;
  arena.assign(512 << 10, static_cast<char>(kGarbage));
  arena_used = shared_bytes = 0;
  declared.clear();
  shared_ledger.clear();
  shared_ranges.clear();
  dynamic_range = {0, 0};
  {
    const uintptr_t base = reinterpret_cast<uintptr_t>(arena.data());
    const uintptr_t begin = (base + 1023) / 1024 * 1024;
    dynamic_range = {begin, begin + grid->shared_bytes};
    arena_used = dynamic_range.end - base;
    shared_bytes = grid->shared_bytes;
    shared_ranges.push_back(dynamic_range);
  }
  warps.assign((count + 31) / 32, {});
  block_barrier = {};
  runnable.clear();
  live_threads = count;
  std::vector<Thread*> order;
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.number = i;
    thread.index = {i % grid->threads.x, i / grid->threads.x % grid->threads.y, i / grid->threads.x / grid->threads.y};
    ++warps[i / 32].live;
    prepare(thread);
    order.push_back(&thread);
  }
  release(order);
  self = runnable.front();
  runnable.pop_front();
  thread_index = self->index;
  emulator_switch(&host, self->stack_pointer);
  self = nullptr;
  if (!failure.empty()) throw std::runtime_error(failure);
  if (live_threads != 0) {
    std::string what = "emulator: " + std::string(grid->where) + ": block (" + std::to_string(block_index.x) + ", " +
                       std::to_string(block_index.y) + "): " + std::to_string(live_threads) + " threads wait for ever";
    if (!block_barrier.waiting.empty()) what += ", some at " + at(block_barrier.site);
    for (const Warp& warp : warps) {
      if (!warp.barrier.waiting.empty()) what += ", lanes at " + at(warp.barrier.site);
    }
    throw std::runtime_error(what);
  }
}

bool inside(const Range& range, uintptr_t begin, size_t bytes) {
  return begin >= range.begin && begin + bytes <= range.end;
}

bool is_shared(uintptr_t address, size_t bytes) {
  return std::any_of(shared_ranges.begin(), shared_ranges.end(),
                     [&](const Range& range) { return inside(range, address, bytes); });
}

bool is_allowed(uintptr_t address, size_t bytes) {
  if (inside(last_range, address, bytes)) return true;
  auto after = std::upper_bound(allowed.begin(), allowed.end(), address,
                                [](uintptr_t a, const Range& range) { return a < range.begin; });
  while (after != allowed.begin()) {  // ranges may overlap; few contain others
    --after;
    if (inside(*after, address, bytes)) {
      last_range = *after;
      return true;
    }
  }
  return false;
}

std::string hex(uintptr_t number) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%zx", static_cast<size_t>(number));
  return text;
}

enum class Kind { kRead, kWrite, kAtomic };

void access(uintptr_t address, size_t bytes, Kind kind, bool aligned, const void* from) {
  if (self == nullptr || !failure.empty()) return;
  const uintptr_t stack = reinterpret_cast<uintptr_t>(self->stack);
  if (address >= stack && address < stack + kStackBytes) return;
  const auto say = [&](const std::string& what) {
    static const char* const kNames[] = {"reads", "writes", "updates"};
    const uintptr_t code = reinterpret_cast<uintptr_t>(from) - reinterpret_cast<uintptr_t>(__ehdr_start);
    fail(std::string(kNames[static_cast<int>(kind)]) + " " + std::to_string(bytes) + " bytes at " + hex(address) +
         " [code +" + hex(code) + "], " + what);
  };
  const bool in_shared = is_shared(address, bytes);
  if (!in_shared && !is_allowed(address, bytes)) {
    const Range image = {reinterpret_cast<uintptr_t>(__ehdr_start), reinterpret_cast<uintptr_t>(_end)};
    if (inside(image, address, bytes) || inside(host_stack, address, bytes)) {
      if (kind == Kind::kRead) return;
      say("which is the host's");
    }
    std::string nearest = "outside all memory of the launch";
    for (const Range& range : allowed) {
      if (address + 4096 >= range.begin && address <= range.end + 4096) {
        nearest += "; near one of " + std::to_string(range.end - range.begin) + " bytes at " + hex(range.begin);
      }
    }
    for (const Range& range : shared_ranges) {
      if (address + 4096 >= range.begin && address <= range.end + 4096) {
        nearest +=
            "; near shared memory of " + std::to_string(range.end - range.begin) + " bytes at " + hex(range.begin);
      }
    }
    say(nearest);
  }
  if (!aligned || ((bytes & (bytes - 1)) == 0 && bytes <= 16 && address % bytes != 0)) say("which is not aligned");
  const Access now(block_number, self->number, self->block_epoch, self->warp_epoch, kind == Kind::kAtomic);
  const Access race = (in_shared ? shared_ledger : global_ledger).note(address, bytes, now, kind != Kind::kRead);
  if (race.happened()) {
    say("in a race with thread " + std::to_string(race.thread()) + " of block " + std::to_string(race.block()) +
        " (counted through, this is thread " + std::to_string(self->number) + " of block " +
        std::to_string(block_number) + ")");
  }
}

}  // namespace

// ---- interface ----
void allow(uintptr_t begin, size_t bytes) {
  if (bytes == 0) return;
  const Range range = {begin, begin + bytes};
  const auto place = std::lower_bound(allowed.begin(), allowed.end(), range, [](const Range& a, const Range& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  if (place != allowed.end() && place->begin == range.begin && place->end == range.end) return;
  allowed.insert(place, range);
}

void forbid_all() {
  allowed.clear();
  last_range = {0, 0};
}

void set_max_dynamic_shared(size_t bytes) { max_dynamic_shared = std::max(bytes, kPlainSharedBytes); }

void fail(const std::string& what) {
  failure = "emulator: " + std::string(grid->where) + ": " + name(*self) + " " + what;
  void* abandoned;
  self = nullptr;
  emulator_switch(&abandoned, host);
  std::abort();
}

void fail_unaligned(const void* from, const void* to, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(reinterpret_cast<uintptr_t>(from) % bytes != 0 ? from : to);
  fail("moves " + std::to_string(bytes) + " bytes at once at " + hex(address) + ", which is not aligned");
}

void run(const Grid& of, size_t parameter_bytes, void (*thread)(const void*), const void* of_thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error("emulator: " + std::string(of.where) + ": " + what);
  };
  const uint64_t count = uint64_t{of.threads.x} * of.threads.y * of.threads.z;
  if (count == 0 || count > kMaxThreads) refuse(std::to_string(count) + " threads in a block");
  const uint64_t blocks = uint64_t{of.blocks.x} * of.blocks.y * of.blocks.z;
  if (blocks == 0 || of.blocks.x > 0x7fffffffu || of.blocks.y > 65535 || of.blocks.z > 65535) {
    refuse("a grid of " + std::to_string(of.blocks.x) + " x " + std::to_string(of.blocks.y) + " blocks");
  }
  const size_t most = std::exchange(max_dynamic_shared, kPlainSharedBytes);
  if (of.shared_bytes > std::min(most, kMaxSharedBytes)) {
    refuse(std::to_string(of.shared_bytes) + " bytes of dynamic shared memory");
  }
  if (parameter_bytes > kMaxParameterBytes) refuse(std::to_string(parameter_bytes) + " bytes of parameters");

  pthread_attr_t attributes;
  void* stack;
  size_t stack_bytes;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &stack_bytes);
  pthread_attr_destroy(&attributes);
  host_stack = {reinterpret_cast<uintptr_t>(stack), reinterpret_cast<uintptr_t>(stack) + stack_bytes};

  grow_to(static_cast<unsigned>(count));
  grid = &of;
  body = thread;
  context = of_thread;
  block_size = of.threads;
  grid_size = of.blocks;
  failure.clear();
  global_ledger.clear();
  draw.seed(1);
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), draw);
  for (const uint64_t block : order) {
    block_number = block;
    block_index = {static_cast<unsigned>(block % of.blocks.x), static_cast<unsigned>(block / of.blocks.x % of.blocks.y),
                   static_cast<unsigned>(block / of.blocks.x / of.blocks.y)};
    run_block();
  }
}

void sync_block(Site site) {
  wait_at(block_barrier, site, live_threads);
  ++self->block_epoch;
}

void sync_warp(unsigned mask, Site site) {
  wait_with_warp(mask, site);
  ++self->warp_epoch;
}

const Payload* exchange(const Payload& payload, unsigned mask, Site site) {
  Warp& warp = warps[self->number / 32];
  auto& payloads = warp.payloads[self->exchanges++ % 2];
  payloads[self->number % 32] = payload;
  wait_with_warp(mask, site);
  return payloads.data();
}

void* shared(Site site, size_t bytes, size_t alignment) {
  const std::tuple<const char*, int> key = {site.file, site.line};
  auto found = declared.find(key);
  if (found == declared.end()) found = declared.emplace(key, claim(bytes, std::max<size_t>(alignment, 16))).first;
  return reinterpret_cast<void*>(found->second.begin);
}

void* dynamic_shared() { return reinterpret_cast<void*>(dynamic_range.begin); }

void read(const void* p, size_t bytes) {
  access(reinterpret_cast<uintptr_t>(p), bytes, Kind::kRead, true, __builtin_return_address(0));
}
void write(const void* p, size_t bytes) {
  access(reinterpret_cast<uintptr_t>(p), bytes, Kind::kWrite, true, __builtin_return_address(0));
}
void atomic(const void* p, size_t bytes) {
  access(reinterpret_cast<uintptr_t>(p), bytes, Kind::kAtomic, true, __builtin_return_address(0));
}

void copy_async(void* dst, const void* src, size_t bytes, bool valid) {
  if (!is_shared(reinterpret_cast<uintptr_t>(dst), bytes)) fail("copies asynchronously to what is not shared memory");
  if (reinterpret_cast<uintptr_t>(src) % bytes != 0) fail("copies asynchronously from what is not aligned");
  write(dst, bytes);
  if (valid) read(src, bytes);
  std::memset(dst, kGarbage, bytes);
  self->copies.push_back({static_cast<char*>(dst), static_cast<const char*>(src), bytes, valid});
}

void copy_async_commit() { self->committed.push_back(std::exchange(self->copies, {})); }

void copy_async_wait(int pending) {
  while (self->committed.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : self->committed.front()) finish(copy);
    self->committed.pop_front();
  }
}

}  // namespace emulator

// ---- what -fsanitize=thread calls ----
#define EMULATOR_HOOK(bytes)                                                                                           \
  extern "C" void __tsan_read##bytes(void* p) {                                                                        \
    emulator::access(reinterpret_cast<uintptr_t>(p), bytes, emulator::Kind::kRead, true, __builtin_return_address(0)); \
  }                                                                                                                    \
  extern "C" void __tsan_write##bytes(void* p) {                                                                       \
    emulator::access(reinterpret_cast<uintptr_t>(p), bytes, emulator::Kind::kWrite, true,                              \
                     __builtin_return_address(0));                                                                     \
  }                                                                                                                    \
  extern "C" void __tsan_unaligned_read##bytes(void* p) {                                                              \
    emulator::access(reinterpret_cast<uintptr_t>(p), bytes, emulator::Kind::kRead,                                     \
                     reinterpret_cast<uintptr_t>(p) % bytes == 0, __builtin_return_address(0));                        \
  }                                                                                                                    \
  extern "C" void __tsan_unaligned_write##bytes(void* p) {                                                             \
    emulator::access(reinterpret_cast<uintptr_t>(p), bytes, emulator::Kind::kWrite,                                    \
                     reinterpret_cast<uintptr_t>(p) % bytes == 0, __builtin_return_address(0));                        \
  }
EMULATOR_HOOK(1)
EMULATOR_HOOK(2)
EMULATOR_HOOK(4)
EMULATOR_HOOK(8)
EMULATOR_HOOK(16)

extern "C" void __tsan_read_range(void* p, unsigned long bytes) {
  emulator::access(reinterpret_cast<uintptr_t>(p), bytes, emulator::Kind::kRead, true, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, unsigned long bytes) {
  emulator::access(reinterpret_cast<uintptr_t>(p), bytes, emulator::Kind::kWrite, true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
