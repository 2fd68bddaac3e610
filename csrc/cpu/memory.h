// Pages of memory, and memory that threads keep.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/plan.h"

namespace adapter_ext::cpu {

// Prepares the memory of results, where it is new. A fault for each 4 KiB can take longer than the
// kernels: all threads ask for pages, many at a time; for a result of so much that it is always new
// huge ones, as long as the system has them at hand. No page reaches beyond a result.
void prepare(const std::vector<Memory>& results, const Parallel& parallel);

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
