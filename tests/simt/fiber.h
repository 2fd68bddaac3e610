// Functions with stacks of their own, between which one host thread switches.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

// Stacks that are kept for the next launch. Each has a page below it that must not be touched.
class Stacks {
 public:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kBytes = 512 * 1024;
#else
  static constexpr size_t kBytes = 64 * 1024;
#endif
  static constexpr size_t kGuard = 4096;
  static constexpr size_t kMost = 1024;

  // The lowest address of stack `i`.
  static char* at(size_t i);
  static bool contain(const void* address) {
    return reinterpret_cast<uintptr_t>(address) - first_ < kMost * (kBytes + kGuard);
  }

 private:
  static inline uintptr_t first_ = 0;
};

class Fiber {
 public:
  // Prepares to run `entry`, which never returns: its last call is end(). What an earlier function
  // left on the stack is forgotten.
  void prepare(size_t stack, void (*entry)());
  void enter();  // called by the host thread; returns when the fiber leaves
  void leave();  // called by the fiber; returns when it is entered again
  [[noreturn]] void end();

 private:
  void switch_to_host(bool last);

  char* stack_ = nullptr;
  bool ended_ = true;
#if defined(__x86_64__)
  void* context_ = nullptr;  // the stack pointer
#else
  ucontext_t context_;
#endif
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

// What a new fiber calls first.
void fiber_started();

}  // namespace simt
