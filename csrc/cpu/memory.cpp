#include "cpu/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace adapter_ext::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
namespace {

// Whether an address has a page already; not so what is allocated and was never written.
bool has_page(uintptr_t address) {
  const auto size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  unsigned char state = 0;
  return mincore(reinterpret_cast<void*>(address / size * size), 1, &state) != 0 ||
         (state & 1) != 0;
}

}  // namespace

void prepare(const std::vector<Memory>& results, [[maybe_unused]] const Parallel& parallel) {
  constexpr int64_t many_bytes = 32 << 20;  // from here on the C library's memory is always new
  constexpr int64_t few_bytes = 256 << 10;
  const auto small_page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  std::vector<Memory> missing;
  int64_t missing_bytes = 0;
  for (const auto& [memory, bytes] : results) {
    if (bytes < few_bytes) continue;
    const bool many = bytes >= many_bytes;
    const auto page = many ? uintptr_t{2} << 20 : small_page;
    const auto address = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t begin = (address + page - 1) / page * page;
    const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / page * page;
    if (has_page(begin + (end - begin) / 2)) continue;
    const Memory whole = {reinterpret_cast<void*>(begin), static_cast<int64_t>(end - begin)};
    // This and what follows are advice: where the system does not take it, faults bring pages.
    if (many) {
      static_cast<void>(madvise(whole.begin, end - begin, MADV_HUGEPAGE));
    } else {
      missing.push_back(whole);
      missing_bytes += whole.bytes;
    }
  }
#if defined(MADV_POPULATE_WRITE)
  constexpr int64_t worthwhile = 1 << 20;  // entering tasks takes time too
  if (missing_bytes < worthwhile) return;
  parallel(parallel.threads, [&](int64_t task) {
    const auto size = static_cast<int64_t>(small_page);
    const auto bound = [&](int64_t tasks) {
      return missing_bytes / size * tasks / parallel.threads * size;
    };
    int64_t before = 0;
    for (const auto& [memory, bytes] : missing) {
      const int64_t begin = std::clamp<int64_t>(bound(task) - before, 0, bytes);
      const int64_t end = std::clamp<int64_t>(bound(task + 1) - before, 0, bytes);
      if (begin < end) {
        static_cast<void>(madvise(static_cast<char*>(memory) + begin,
                                  static_cast<size_t>(end - begin), MADV_POPULATE_WRITE));
      }
      before += bytes;
    }
  });
#endif
}
#else
void prepare(const std::vector<Memory>&, const Parallel&) {}
#endif

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
