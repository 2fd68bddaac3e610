#include "cpu/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

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

void use_huge_pages(void* memory, int64_t bytes) {
  constexpr int64_t many_bytes = 32 << 20;  // from here on the C library's memory is always new
  constexpr uintptr_t page = 2 << 20;
  if (bytes < many_bytes) return;
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + page - 1) / page * page;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / page * page;
  if (has_page(begin + (end - begin) / 2)) return;
  // Advice: where the system does not take it, pages are small.
  static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
}
#else
void use_huge_pages(void*, int64_t) {}
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
