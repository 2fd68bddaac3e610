// The entry points that every CPU level has, in its own namespace.
#pragma once

#include "common/problem.h"
#include "cpu/plan.h"

namespace adapter_ext::cpu {

#if defined(__AVX512BF16__)
// The levels that multiply in bfloat16 leave other types of x to this one.
namespace avx512 {
void linear_adapter_forward(const LinearAdapterForward& problem, const Parallel& parallel);
void linear_adapter_backward(const LinearAdapterBackward& problem, const Parallel& parallel);
}  // namespace avx512
#endif

inline namespace ADAPTER_EXT_CPU_LEVEL {

void linear_adapter_forward(const LinearAdapterForward& problem, const Parallel& parallel);
void linear_adapter_backward(const LinearAdapterBackward& problem, const Parallel& parallel);
// Multiply-adds in registers alone, `iterations` times; returns how many floating-point operations.
double fma_loop(int64_t iterations);

}  // namespace ADAPTER_EXT_CPU_LEVEL
}  // namespace adapter_ext::cpu
