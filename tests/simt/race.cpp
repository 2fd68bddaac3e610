// Compiled without -fsanitize=thread, unlike the kernels that call the functions below.
#include "race.h"

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "runtime.h"

namespace simt::race {
namespace {

constexpr int kWarp = 32;
constexpr int kNone = -1, kSeveral = -2;

enum class Kind { kRead, kWrite, kUpdate, kCopyStarts, kCopyEnds };

// What happened to a byte of shared memory. All that is older than the latest barrier of the block
// is of no interest, but for whether the byte was ever written.
struct Byte {
  uint32_t interval;               // which barrier interval the rest is about
  uint32_t written_block;          // the block that wrote it
  uint32_t pending_block;          // the block in which a copy to it is under way
  uint32_t write_time, read_time;  // by the clock of the warp
  uint32_t readers;                // lanes of reader_warp
  int16_t writer;                  // a thread
  int16_t reader_warp, reader;     // a warp or kSeveral; a thread
  int16_t copier;                  // the thread whose copy is under way
  bool updated;                    // its writers were atomic
  const void *write_place, *read_place, *copy_place;
};

// A byte of global memory: the blocks, counted from 1, that used it in this launch.
struct GlobalByte {
  uint32_t writer, reader;
  bool updated, several;
};
constexpr uintptr_t kPage = 4096;
using Page = std::array<GlobalByte, kPage>;

uintptr_t shared_begin = 0;
size_t shared_bytes = 0;
std::vector<Byte> bytes;
uint32_t interval = 0, block = 0;
uint32_t block_in_launch = 0;  // 0 outside of kernels

// Time of a warp: how often lanes of it have met. seen[t][lane] is the time of the last meeting of
// `lane` that thread t knows of: t comes after what that lane did before.
uint32_t clocks[Stacks::kMost / kWarp];
uint32_t seen[Stacks::kMost][kWarp];

using Pages = std::unordered_map<uintptr_t, std::unique_ptr<Page>>;
Pages pages;
std::vector<Pages> earlier_pages;  // of launches that may not be done yet
uintptr_t last_page_number = 0;
Page* last_page = nullptr;

bool ordered(int earlier, uint32_t time, int self) {
  return earlier == self || (earlier / kWarp == self / kWarp && time < seen[self][earlier % kWarp]);
}

const char* verb(Kind kind) {
  switch (kind) {
    case Kind::kRead: return "reads";
    case Kind::kWrite: return "writes";
    case Kind::kUpdate: return "updates";
    default: return "copies to";
  }
}

std::string text_of(Kind kind, size_t offset) {
  return std::string(verb(kind)) + " byte " + std::to_string(offset) + " of shared memory, ";
}

[[noreturn]] void fail_race(Kind kind, size_t offset, const char* what, int other,
                            const void* place, const void* other_place) {
  fail("race",
       text_of(kind, offset) + "which thread " + std::to_string(other) + " " + what +
           " with no barrier in between",
       place, other_place);
}

void touch_shared(Byte& byte, size_t offset, Kind kind, int self, const void* place) {
  const int warp = self / kWarp, lane = self % kWarp;
  if (byte.interval != interval) {
    byte.interval = interval;
    byte.writer = kNone;
    byte.reader_warp = kNone;
  }
  if (byte.pending_block == block) {
    if (kind == Kind::kCopyEnds && byte.copier == self) {
      byte.pending_block = 0;
    } else {
      fail("copy under way",
           text_of(kind, offset) + "to which a copy of thread " + std::to_string(byte.copier) +
               " is under way, before its copy_async_wait",
           place, byte.copy_place);
    }
  }
  if (byte.writer != kNone && !(kind == Kind::kUpdate && byte.updated) &&
      !ordered(byte.writer, byte.write_time, self)) {
    fail_race(kind, offset, "writes", byte.writer, place, byte.write_place);
  }
  if (kind == Kind::kRead || kind == Kind::kUpdate) {
    if (byte.written_block != block) {
      fail("uninitialised", text_of(kind, offset) + "which no thread has written", place);
    }
  }
  if (kind == Kind::kRead) {
    if (byte.reader_warp == kNone) {
      byte.reader_warp = static_cast<int16_t>(warp);
      byte.readers = 0;
    } else if (byte.reader_warp != warp) {
      byte.reader_warp = kSeveral;
      return;
    }
    // Who comes after this read comes after those that it comes after.
    for (uint32_t rest = byte.readers; rest; rest &= rest - 1) {
      const int other = __builtin_ctz(rest);
      if (byte.read_time < seen[self][other]) byte.readers &= ~(1u << other);
    }
    byte.readers |= 1u << lane;
    byte.read_time = clocks[warp];
    byte.reader = static_cast<int16_t>(self);
    byte.read_place = place;
    return;
  }
  if (byte.reader_warp == kSeveral || (byte.reader_warp >= 0 && byte.reader_warp != warp)) {
    fail_race(kind, offset, "reads", byte.reader, place, byte.read_place);
  }
  if (byte.reader_warp == warp) {
    for (uint32_t rest = byte.readers; rest; rest &= rest - 1) {
      const int other = warp * kWarp + __builtin_ctz(rest);
      if (!ordered(other, byte.read_time, self)) {
        fail_race(kind, offset, "reads", other, place, byte.read_place);
      }
    }
    byte.reader_warp = kNone;
  }
  if (kind == Kind::kCopyStarts) {
    byte.pending_block = block;
    byte.copier = static_cast<int16_t>(self);
    byte.copy_place = place;
  }
  byte.writer = static_cast<int16_t>(self);
  byte.write_time = clocks[warp];
  byte.write_place = place;
  byte.written_block = block;
  byte.updated = kind == Kind::kUpdate;
}

void touch_global(GlobalByte& byte, uintptr_t address, Kind kind, const void* place) {
  const uint32_t self = block_in_launch;
  const bool other_wrote = byte.writer != 0 && byte.writer != self;
  const bool other_read = byte.several || (byte.reader != 0 && byte.reader != self);
  const bool atomic = kind == Kind::kUpdate;
  if ((other_wrote && !(atomic && byte.updated)) || (other_read && kind != Kind::kRead)) {
    char at[32];
    snprintf(at, sizeof(at), "0x%zx", static_cast<size_t>(address));
    fail("race between blocks",
         std::string(verb(kind)) + " global memory at " + at + ", which another block " +
             (other_wrote ? "writes" : "reads"),
         place);
  }
  if (kind == Kind::kRead) {
    byte.several = byte.several || (byte.reader != 0 && byte.reader != self);
    byte.reader = self;
  } else {
    byte.updated = atomic && (byte.updated || byte.writer == 0);
    byte.writer = self;
  }
}

// Fails if a launch that may not be done uses the byte, too, and one of both writes.
void check_earlier(uintptr_t address, Kind kind, const void* place) {
  for (const Pages& earlier : earlier_pages) {
    const auto found = earlier.find(address / kPage);
    if (found == earlier.end()) continue;
    const GlobalByte& byte = (*found->second)[address % kPage];
    const bool read = byte.several || byte.reader != 0;
    if (byte.writer == 0 && (kind == Kind::kRead || !read)) continue;
    char at[32];
    snprintf(at, sizeof(at), "0x%zx", static_cast<size_t>(address));
    fail("race between kernels",
         std::string(verb(kind)) + " global memory at " + at + ", which a kernel before " +
             (byte.writer != 0 ? "writes" : "reads") + ", without waiting for it",
         place);
  }
}

// Host code calls the hooks too, perhaps in another thread.
bool in_kernel() { return block_in_launch != 0 && Stacks::contain(__builtin_frame_address(0)); }

void access(const void* pointer, size_t size, Kind kind, const void* place) {
  if (!in_kernel()) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const size_t offset = address - shared_begin;
  if (offset < shared_bytes) {
    if (size > shared_bytes - offset) {
      fail("out of bounds", text_of(kind, offset) + "and beyond its end", place);
    }
    const int self = thread_index();
    for (size_t i = 0; i < size; ++i)
      touch_shared(bytes[offset + i], offset + i, kind, self, place);
    return;
  }
  if (Stacks::contain(pointer)) return;
  const bool early = waits_for_previous();
  for (size_t i = 0; i < size; ++i) {
    if (early) check_earlier(address + i, kind, place);
    const uintptr_t page = (address + i) / kPage;
    if (page != last_page_number) {
      std::unique_ptr<Page>& found = pages[page];
      if (!found) found = std::make_unique<Page>();
      last_page_number = page;
      last_page = found.get();
    }
    touch_global((*last_page)[(address + i) % kPage], address + i, kind, place);
  }
}

void check_alignment(const void* pointer, size_t size, const void* place) {
  if (!in_kernel() || reinterpret_cast<uintptr_t>(pointer) % size == 0) return;
  fail("misaligned address", "an access to " + std::to_string(size) + " bytes", place);
}

}  // namespace

void begin_launch(bool early) {
  if (early) {
    earlier_pages.push_back(std::move(pages));
  } else {
    earlier_pages.clear();
  }
  pages.clear();
  last_page_number = 0;
  last_page = nullptr;
}

void begin_block(const void* shared, size_t size) {
  shared_begin = reinterpret_cast<uintptr_t>(shared);
  shared_bytes = size;
  if (bytes.size() < size) bytes.resize(size);
  ++block;
  ++interval;
  block_in_launch = 1 + blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
}

void end_block() {
  shared_bytes = 0;
  block_in_launch = 0;
}

void block_barrier() { ++interval; }

void warp_barrier(int warp, unsigned lanes) {
  uint32_t joined[kWarp] = {};
  const uint32_t now = ++clocks[warp];
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const uint32_t* known = seen[warp * kWarp + __builtin_ctz(rest)];
    for (int i = 0; i < kWarp; ++i) joined[i] = joined[i] < known[i] ? known[i] : joined[i];
  }
  for (int i = 0; i < kWarp; ++i) {
    if (lanes >> i & 1) joined[i] = now;
  }
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    memcpy(seen[warp * kWarp + __builtin_ctz(rest)], joined, sizeof(joined));
  }
}

void read(const void* address, size_t size, const void* place) {
  access(address, size, Kind::kRead, place);
}
void write(const void* address, size_t size, const void* place) {
  access(address, size, Kind::kWrite, place);
}
void update(const void* address, size_t size, const void* place) {
  access(address, size, Kind::kUpdate, place);
}
void copy_starts(const void* to, size_t size, const void* place) {
  access(to, size, Kind::kCopyStarts, place);
}
void copy_ends(const void* to, size_t size, const void* place) {
  access(to, size, Kind::kCopyEnds, place);
}

}  // namespace simt::race

// What compilers call with -fsanitize=thread.

using simt::race::access;
using simt::race::check_alignment;
using simt::race::Kind;

#define SIMT_HOOKS(size)                                              \
  void __tsan_read##size(void* address) {                             \
    check_alignment(address, size, __builtin_return_address(0));      \
    access(address, size, Kind::kRead, __builtin_return_address(0));  \
  }                                                                   \
  void __tsan_write##size(void* address) {                            \
    check_alignment(address, size, __builtin_return_address(0));      \
    access(address, size, Kind::kWrite, __builtin_return_address(0)); \
  }                                                                   \
  void __tsan_volatile_read##size(void* address) {                    \
    check_alignment(address, size, __builtin_return_address(0));      \
    access(address, size, Kind::kRead, __builtin_return_address(0));  \
  }                                                                   \
  void __tsan_volatile_write##size(void* address) {                   \
    check_alignment(address, size, __builtin_return_address(0));      \
    access(address, size, Kind::kWrite, __builtin_return_address(0)); \
  }                                                                   \
  void __tsan_unaligned_read##size(void* address) {                   \
    access(address, size, Kind::kRead, __builtin_return_address(0));  \
  }                                                                   \
  void __tsan_unaligned_write##size(void* address) {                  \
    access(address, size, Kind::kWrite, __builtin_return_address(0)); \
  }

extern "C" {

SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)

void __tsan_read_range(void* address, size_t size) {
  access(address, size, Kind::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t size) {
  access(address, size, Kind::kWrite, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

// Guards of local static variables, in host code.
uint8_t __tsan_atomic8_load(const volatile uint8_t* address, int) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}

// Instead of memcpy and memset; see simt.h.
void* simt_memcpy(void* to, const void* from, size_t size) {
  access(from, size, Kind::kRead, __builtin_return_address(0));
  access(to, size, Kind::kWrite, __builtin_return_address(0));
  return memcpy(to, from, size);
}
void* simt_memset(void* to, int value, size_t size) {
  access(to, size, Kind::kWrite, __builtin_return_address(0));
  return memset(to, value, size);
}
}
