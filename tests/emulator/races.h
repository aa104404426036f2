// Which accesses of memory race: two of the same byte by different threads, at least one of them a write, not both
// atomic, and nothing that orders them. A block's barrier orders all accesses of its threads before it and after it, a
// warp's those of its lanes; nothing orders two blocks.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>

namespace emulator {

// Who accessed a byte, and after how many of its block's and its warp's barriers, all of it in a word; 0: nobody.
class Access {
 public:
  Access() = default;
  Access(uint64_t block, unsigned thread, unsigned block_epoch, unsigned warp_epoch, bool atomic)
      : bits_(1 | uint64_t{atomic} << 1 | uint64_t{thread} << 2 | (block & 0xffffff) << 12 |
              uint64_t{block_epoch & 0x3fff} << 36 | uint64_t{warp_epoch & 0x3fff} << 50) {}

  bool happened() const { return bits_ & 1; }
  bool atomic() const { return bits_ >> 1 & 1; }
  unsigned thread() const { return bits_ >> 2 & 0x3ff; }
  unsigned block() const { return bits_ >> 12 & 0xffffff; }

  bool races_with(const Access& now) const {
    if (!happened() || (atomic() && now.atomic())) return false;
    if (block() != now.block()) return true;
    if (thread() == now.thread() || block_epoch() != now.block_epoch()) return false;
    return thread() / 32 != now.thread() / 32 || warp_epoch() == now.warp_epoch();
  }
  bool by_thread_of(const Access& other) const { return thread() == other.thread() && block() == other.block(); }

 private:
  unsigned block_epoch() const { return bits_ >> 36 & 0x3fff; }
  unsigned warp_epoch() const { return bits_ >> 50; }
  uint64_t bits_ = 0;
};

// The last write of some memory, and the last reads by two threads.
struct Record {
  Access write, read[2];

  // The access that races with `now`; if there is none, one that has not happened.
  Access note(const Access& now, bool writes) {
    Access race;
    if (write.races_with(now)) race = write;
    if (writes) {
      for (const Access& earlier : read) {
        if (earlier.races_with(now)) race = earlier;
      }
      write = now;
    } else {
      if (read[0].happened() && !read[0].by_thread_of(now)) read[1] = read[0];
      read[0] = now;
    }
    return race;
  }
};

// Four bytes: one record until a part of them is accessed, then one for each.
struct Word {
  Record byte[4];
  bool split = false;
};

class Ledger {
 public:
  void clear() {
    lines_.clear();
    recent_.fill({});
  }

  // As Record::note.
  Access note(uintptr_t address, size_t bytes, const Access& now, bool writes) {
    Access race;
    const auto note_in = [&](Record& record) {
      const Access found = record.note(now, writes);
      if (found.happened()) race = found;
    };
    for (const uintptr_t end = address + bytes; address < end;) {
      Word& word = at(address);
      const size_t first = address % 4, count = std::min<size_t>(4 - first, end - address);
      if (count != 4 && !word.split) {
        word.split = true;
        for (int i = 1; i < 4; ++i) word.byte[i] = word.byte[0];
      }
      for (size_t i = first; i < (word.split ? first + count : 1); ++i) note_in(word.byte[i]);
      address += count;
    }
    return race;
  }

 private:
  static constexpr size_t kLineBytes = 64;
  using Line = std::array<Word, kLineBytes / 4>;

  Word& at(uintptr_t address) {
    const uintptr_t number = address / kLineBytes;
    Recent& recent = recent_[number % recent_.size()];
    if (recent.line == nullptr || recent.number != number) {
      std::unique_ptr<Line>& found = lines_[number];
      if (found == nullptr) found = std::make_unique<Line>();
      recent = {number, found.get()};
    }
    return (*recent.line)[address % kLineBytes / 4];
  }

  struct Recent {
    uintptr_t number = 0;
    Line* line = nullptr;
  };
  std::unordered_map<uintptr_t, std::unique_ptr<Line>> lines_;
  std::array<Recent, 4096> recent_;
};

}  // namespace emulator
