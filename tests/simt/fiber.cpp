#include "fiber.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the registers that calls preserve on the stack, and goes on where another stack left off.
// The library's swapcontext would ask the kernel for the signal mask each time.
extern "C" void simt_switch_stack(void** from, void* to);
asm(R"(
.text
.hidden simt_switch_stack
.globl simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
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
.size simt_switch_stack, . - simt_switch_stack
)");
#endif

namespace simt {
namespace {

#if defined(__x86_64__)
void* host_context;
#else
ucontext_t host_context;
#endif

// AddressSanitizer must know whose stack it sees.
#if defined(__SANITIZE_ADDRESS__)
const void* host_stack;
size_t host_stack_bytes;
void before_switch(void** fake_stack, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
}
void after_switch_to_fiber(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, &host_stack, &host_stack_bytes);
}
void after_switch_to_host(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
void forget(char* stack) { __asan_unpoison_memory_region(stack, Stacks::kBytes); }
#else
constexpr void* host_stack = nullptr;
constexpr size_t host_stack_bytes = 0;
void before_switch(void**, const void*, size_t) {}
void after_switch_to_fiber(void*) {}
void after_switch_to_host(void*) {}
void forget(char*) {}
#endif

}  // namespace

char* Stacks::at(size_t i) {
  constexpr size_t pitch = kBytes + kGuard;
  if (first_ == 0) {
    void* memory = mmap(nullptr, kMost * pitch, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (size_t k = 0; k < kMost; ++k) {
      mprotect(static_cast<char*>(memory) + k * pitch, kGuard, PROT_NONE);
    }
    first_ = reinterpret_cast<uintptr_t>(memory);
  }
  return reinterpret_cast<char*>(first_) + i * pitch + kGuard;
}

void fiber_started() { after_switch_to_fiber(nullptr); }

void Fiber::prepare(size_t stack, void (*entry)()) {
  stack_ = Stacks::at(stack);
  fake_stack_ = nullptr;
  if (!ended_) forget(stack_);
  ended_ = false;
#if defined(__x86_64__)
  // As if `entry` had just been called: a return address, and below what switching takes off.
  void** top = reinterpret_cast<void**>(stack_ + Stacks::kBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = Stacks::kBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::enter() {
  void* fake_stack = nullptr;
  before_switch(&fake_stack, stack_, Stacks::kBytes);
#if defined(__x86_64__)
  simt_switch_stack(&host_context, context_);
#else
  swapcontext(&host_context, &context_);
#endif
  after_switch_to_host(fake_stack);
}

void Fiber::switch_to_host(bool last) {
  before_switch(last ? nullptr : &fake_stack_, host_stack, host_stack_bytes);
#if defined(__x86_64__)
  simt_switch_stack(&context_, host_context);
#else
  swapcontext(&context_, &host_context);
#endif
}

void Fiber::leave() {
  switch_to_host(false);
  after_switch_to_fiber(fake_stack_);
}

void Fiber::end() {
  ended_ = true;
  switch_to_host(true);
  abort();
}

}  // namespace simt
