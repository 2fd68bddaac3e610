// The CPU kernels of linear_adapter.
#pragma once

#include "common/problem.h"
#include "cpu/plan.h"

namespace adapter_ext::cpu {

// Both run at the level that capability() names. They throw std::bad_alloc where memory runs out.
void linear_adapter(const LinearAdapterForward& problem, const Parallel& parallel);
void linear_adapter(const LinearAdapterBackward& problem, const Parallel& parallel);

}  // namespace adapter_ext::cpu
