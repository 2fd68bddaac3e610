#include "cpu/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>

namespace adapter_ext::cpu {

namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack

// Whether an address has a page already; not so what is allocated and was never written.
bool has_page(uintptr_t address) {
  const auto size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  unsigned char state = 0;
  return mincore(reinterpret_cast<void*>(address / size * size), 1, &state) != 0 ||
         (state & 1) != 0;
}

// Advice to the system; where it does not take it, faults bring the pages.
void advise(const Memory& memory, int advice) {
  static_cast<void>(madvise(memory.begin, static_cast<size_t>(memory.bytes), advice));
}

// Memory of whole pages of `page` bytes.
struct NewMemory {
  std::vector<Memory> pieces;
  int64_t page;
  int64_t bytes = 0;

  // Adds the whole pages of a result that has none yet.
  void add(const Memory& result) {
    const auto size = static_cast<uintptr_t>(page);
    const auto address = reinterpret_cast<uintptr_t>(result.begin);
    const uintptr_t begin = (address + size - 1) / size * size;
    const uintptr_t end = (address + static_cast<uintptr_t>(result.bytes)) / size * size;
    if (begin >= end || has_page(begin + (end - begin) / 2)) return;
    pieces.push_back({reinterpret_cast<void*>(begin), static_cast<int64_t>(end - begin)});
    bytes += pieces.back().bytes;
  }

  // Calls with the parts of a task's share, one of `tasks` about equal ones.
  template <class Function>
  void share(int64_t task, int64_t tasks, Function&& function) const {
    const int64_t first = bytes / page * task / tasks * page;
    const int64_t last = bytes / page * (task + 1) / tasks * page;
    int64_t before = 0;
    for (const Memory& piece : pieces) {
      const int64_t begin = std::clamp<int64_t>(first - before, 0, piece.bytes);
      const int64_t end = std::clamp<int64_t>(last - before, 0, piece.bytes);
      if (begin < end) function(Memory{static_cast<char*>(piece.begin) + begin, end - begin});
      before += piece.bytes;
    }
  }
};

// Gets huge pages until that has taken as long as to get all in small ones, then those. The page of
// 2 MiB takes a fifth of a millisecond, 512 small ones up to one; but several where a hypervisor
// has taken back what its guest had free, or where the system has to move others' pages first.
// Those that were waited for are at hand in the next calls.
void populate_huge(const Memory& memory) {
  using Clock = std::chrono::steady_clock;
  constexpr auto small_pages = std::chrono::milliseconds(1);  // for 2 MiB
  const auto end = Clock::now() + small_pages * (memory.bytes / kHugePage);
  for (int64_t done = 0; done < memory.bytes;) {
    char* const begin = static_cast<char*>(memory.begin) + done;
    advise({begin, kHugePage}, kPopulateWrite);
    done += kHugePage;
    if (Clock::now() > end && done < memory.bytes) {
      const Memory rest = {begin + kHugePage, memory.bytes - done};
      advise(rest, MADV_NOHUGEPAGE);
      advise(rest, kPopulateWrite);
      return;
    }
  }
}

}  // namespace

void prepare(const std::vector<Memory>& results, const Parallel& parallel) {
  constexpr int64_t many_bytes = 32 << 20;  // from here on the C library's memory is always new
  constexpr int64_t few_bytes = 256 << 10;
  constexpr int64_t worthwhile = 1 << 20;  // entering tasks takes time too
  NewMemory huge{{}, kHugePage};
  NewMemory small{{}, sysconf(_SC_PAGESIZE)};
  for (const Memory& result : results) {
    if (result.bytes >= many_bytes) {
      huge.add(result);
    } else if (result.bytes >= few_bytes) {
      small.add(result);
    }
  }
  if (huge.bytes + small.bytes < worthwhile) return;
  for (const Memory& piece : huge.pieces) advise(piece, MADV_HUGEPAGE);
  parallel(parallel.threads, [&](int64_t task) {
    huge.share(task, parallel.threads, populate_huge);
    small.share(task, parallel.threads,
                [](const Memory& memory) { advise(memory, kPopulateWrite); });
  });
}

void* thread_scratch(int slot, int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  struct Buffer {
    std::unique_ptr<void, Free> memory;
    int64_t capacity = 0;
  };
  thread_local Buffer buffers[3];
  Buffer& buffer = buffers[slot];
  if (bytes > buffer.capacity) {
    buffer.memory.reset();
    buffer.capacity = 0;
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.memory.reset(std::aligned_alloc(64, static_cast<size_t>(rounded)));
    if (!buffer.memory) throw std::bad_alloc();
    buffer.capacity = rounded;
  }
  return buffer.memory.get();
}

}  // namespace adapter_ext::cpu
