// What the CUDA names in simt.h need of the machine that runs kernels.
//
// One block runs at a time; each of its threads is a fiber, which runs until it waits for others.
// Where a kernel does what CUDA forbids, the launch ends and throws.
#pragma once

#include <source_location>
#include <string>

#include "cuda_types.h"

// The thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace simt {

struct Launch {
  const char* name;
  dim3 grid;
  int threads;
  int shared_bytes;
  bool early;  // may begin before the launches before are done, up to wait_for_previous()
  void (*call)(const void* kernel, const void* params);
  const void* kernel;
  const void* params;
};

struct Limits {
  int multiprocessors;
  int shared_bytes;
};

// Runs all blocks. Throws std::runtime_error, with the kernel's name, if anything was wrong.
void run(const Launch& launch);

Limits limits();
unsigned char* shared_memory();
int lane();

int thread_index();

// Ends the launch with an error of a kind ("race", "assertion", ...). Places are addresses in the
// code; the first is the caller's where it is null.
[[noreturn]] void fail(const char* kind, const std::string& what, const void* place = nullptr,
                       const void* other_place = nullptr);
[[noreturn]] void fail_assertion(const char* expression, const char* file, int line);

// Waits for all threads of the block. Returns whether any of their values is not zero.
bool wait_for_block(const char* name, bool value, const std::source_location& where);

// Waits until all lanes of the mask are here too; then one of them calls `execute` with the
// operands of all lanes, null for those that take no part.
using Execute = void (*)(void* const* operands);
void wait_for_lanes(const char* name, unsigned mask, bool whole_warp, void* operands,
                    Execute execute);
void wait_for_warp(unsigned mask);

void load_matrices(bool transposed, uint32_t (&to)[4], const void* from);
enum class OperandType { kBFloat16, kFloat16, kTf32 };
void multiply_add(OperandType type, float (&sum)[4], const uint32_t* a, const uint32_t* b);

void copy_async(void* to, const void* from, int count);
void copy_async_commit();
void copy_async_wait(int groups);

// Waits until launches before are done. They are, as one launch runs at a time; but what they wrote
// must not be used before, and no thread may return before.
void wait_for_previous();
bool waits_for_previous();  // whether the thread that runs has still to do so

// Says that an atomic operation is about to happen.
void report_atomic(const void* address, int bytes);

}  // namespace simt
