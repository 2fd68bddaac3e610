#include "cpu/capability.h"

#include <cstdlib>
#include <stdexcept>

#if defined(ADAPTER_EXT_X86_LEVELS)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/linear_adapter.h"

// Each level's copy of the kernels; see kernels.h.
#define ADAPTER_EXT_DECLARE_LEVEL(level)                                                        \
  namespace adapter_ext::cpu::level {                                                           \
  void linear_adapter_forward(const LinearAdapterForward& problem, const Parallel& parallel);   \
  void linear_adapter_backward(const LinearAdapterBackward& problem, const Parallel& parallel); \
  double fma_loop(int64_t iterations);                                                          \
  }
ADAPTER_EXT_DECLARE_LEVEL(baseline)
#if defined(ADAPTER_EXT_X86_LEVELS)
ADAPTER_EXT_DECLARE_LEVEL(avx2)
ADAPTER_EXT_DECLARE_LEVEL(avx512)
ADAPTER_EXT_DECLARE_LEVEL(avx512_bf16)
ADAPTER_EXT_DECLARE_LEVEL(amx_bf16)
#endif
#undef ADAPTER_EXT_DECLARE_LEVEL

namespace adapter_ext::cpu {
namespace {

struct Kernels {
  Capability capability;
  void (*forward)(const LinearAdapterForward&, const Parallel&);
  void (*backward)(const LinearAdapterBackward&, const Parallel&);
  double (*fma_loop)(int64_t);
};

constexpr Kernels kKernels[] = {
    {Capability::kBaseline, baseline::linear_adapter_forward, baseline::linear_adapter_backward,
     baseline::fma_loop},
#if defined(ADAPTER_EXT_X86_LEVELS)
    {Capability::kAvx2, avx2::linear_adapter_forward, avx2::linear_adapter_backward,
     avx2::fma_loop},
    {Capability::kAvx512, avx512::linear_adapter_forward, avx512::linear_adapter_backward,
     avx512::fma_loop},
    {Capability::kAvx512Bf16, avx512_bf16::linear_adapter_forward,
     avx512_bf16::linear_adapter_backward, avx512::fma_loop},
    {Capability::kAmxBf16, amx_bf16::linear_adapter_forward, amx_bf16::linear_adapter_backward,
     avx512::fma_loop},
#endif
};

#if defined(ADAPTER_EXT_X86_LEVELS)
// Whether the machine has tiles and the kernel lets this process use them: their registers are so
// large that Linux saves them for those alone that ask.
bool has_amx_bf16() {
  constexpr unsigned bf16_bit = 1u << 22, tile_bit = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & bf16_bit) || !(d & tile_bit)) return false;
  constexpr unsigned tile_state = 3u << 17;  // of XCR0: the tiles' configuration and data
  unsigned enabled, high;
  __asm__("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
  if ((enabled & tile_state) != tile_state) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

bool machine_has(Capability capability) {
#if defined(ADAPTER_EXT_X86_LEVELS)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  switch (capability) {
    case Capability::kBaseline: return true;
    case Capability::kAvx2: return avx2;
    case Capability::kAvx512: return avx512;
    case Capability::kAvx512Bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    case Capability::kAmxBf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") && has_amx_bf16();
  }
#endif
  return capability == Capability::kBaseline;
}

// Whether a level that the machine has gains by the one below. Cores of Intel's start a vector of
// bfloat16 products every other cycle (measured on one of 2023: 1.34e9 a second, of multiply-adds
// 5.5e9), which is half the rate of float32: there, tiles are what makes them fast.
bool gains([[maybe_unused]] Capability capability) {
#if defined(ADAPTER_EXT_X86_LEVELS)
  if (capability == Capability::kAvx512Bf16) return !__builtin_cpu_is("intel");
#endif
  return true;
}

const Kernels* choose() {
  const char* forced = std::getenv("ADAPTER_EXT_CPU_CAPABILITY");
  if (forced && *forced) {
    for (const Kernels& kernels : kKernels) {
      if (std::string(forced) != name(kernels.capability)) continue;
      if (machine_has(kernels.capability)) return &kernels;
      throw std::runtime_error("ADAPTER_EXT_CPU_CAPABILITY=" + std::string(forced) +
                               ": this machine lacks these instructions");
    }
    std::string levels;
    for (const Kernels& kernels : kKernels) levels += std::string(" ") + name(kernels.capability);
    throw std::runtime_error("ADAPTER_EXT_CPU_CAPABILITY: expected one of" + levels + ", got '" +
                             forced + "'");
  }
  const Kernels* best = &kKernels[0];
  for (const Kernels& kernels : kKernels) {
    if (machine_has(kernels.capability) && gains(kernels.capability)) best = &kernels;
  }
  return best;
}

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace

const std::vector<Capability>& compiled_capabilities() {
  static const std::vector<Capability> all = [] {
    std::vector<Capability> levels;
    for (const Kernels& kernels : kKernels) levels.push_back(kernels.capability);
    return levels;
  }();
  return all;
}

std::vector<Capability> supported_capabilities() {
  std::vector<Capability> levels;
  for (const Kernels& kernels : kKernels) {
    if (machine_has(kernels.capability)) levels.push_back(kernels.capability);
  }
  return levels;
}

Capability capability() { return kernels().capability; }

const char* name(Capability capability) {
  switch (capability) {
    case Capability::kBaseline: return "baseline";
    case Capability::kAvx2: return "avx2";
    case Capability::kAvx512: return "avx512";
    case Capability::kAvx512Bf16: return "avx512_bf16";
    case Capability::kAmxBf16: return "amx_bf16";
  }
  return "unknown";
}

double fma_loop(long iterations) { return kernels().fma_loop(iterations); }

void linear_adapter(const LinearAdapterForward& problem, const Parallel& parallel) {
  kernels().forward(problem, parallel);
}

void linear_adapter(const LinearAdapterBackward& problem, const Parallel& parallel) {
  kernels().backward(problem, parallel);
}

}  // namespace adapter_ext::cpu
