// Which instruction set the CPU kernels use.
#pragma once

#include <string>
#include <vector>

// What adapter_ext._C uses of the library of ops.
#define ADAPTER_EXT_EXPORT __attribute__((visibility("default")))

namespace adapter_ext::cpu {

enum class Capability { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };

// Levels that this library was compiled for, lowest first.
ADAPTER_EXT_EXPORT const std::vector<Capability>& compiled_capabilities();

// Those of them that this machine can run.
ADAPTER_EXT_EXPORT std::vector<Capability> supported_capabilities();

// The fastest of them, or the one that the environment variable ADAPTER_EXT_CPU_CAPABILITY names
// (baseline, avx2, avx512, avx512_bf16, amx_bf16). Decided once a process. Throws
// std::runtime_error where the variable names a level that was not compiled or that the machine
// lacks.
ADAPTER_EXT_EXPORT Capability capability();

ADAPTER_EXT_EXPORT const char* name(Capability capability);

// Floating-point operations of `iterations` rounds of multiply-adds in registers alone, at the
// level in use: the machine's ceiling, against which benchmarks compare.
ADAPTER_EXT_EXPORT double fma_loop(long iterations);

}  // namespace adapter_ext::cpu
