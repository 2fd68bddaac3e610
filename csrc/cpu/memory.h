// Pages of memory, and memory that threads keep.
#pragma once

#include <cstdint>

namespace adapter_ext::cpu {

// Asks for huge pages for memory that is about to be written whole, if it is so much that it is
// new: a fault for each 4 KiB takes longer than the kernels. No page reaches beyond the memory.
void use_huge_pages(void* memory, int64_t bytes);

// Three buffers of the calling thread, by slot, 64-byte aligned, at least `bytes` long. They are
// kept for the next call, since fresh memory costs a page fault every 4 KiB. Throws std::bad_alloc.
void* thread_scratch(int slot, int64_t bytes);

// Hands out pieces of a buffer of the thread.
class Scratch {
 public:
  template <class T>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

  Scratch(int slot, int64_t total) : next_(static_cast<char*>(thread_scratch(slot, total))) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return piece;
  }

 private:
  char* next_;
};

}  // namespace adapter_ext::cpu
