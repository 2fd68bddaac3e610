// CUDA's names for a C++ compiler: csrc/cuda/device.cuh includes this where there is no nvcc.
//
// Included first, or at least before any kernel: it defines `assert` for them.
#pragma once

#include <cassert>
// With all overloads at global scope, which is where kernels call exp, erf, fma and others.
#include <math.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

#undef assert
#define assert(expression) \
  ((expression) ? void(0) : ::simt::fail_assertion(#expression, __FILE__, __LINE__))

#if defined(__SANITIZE_THREAD__)
// The race detector sees what these do only if they are calls, to functions of its own.
extern "C" void* memcpy(void* to, const void* from, size_t bytes) noexcept asm("simt_memcpy");
extern "C" void* memset(void* to, int value, size_t bytes) noexcept asm("simt_memset");
#endif

inline constexpr int warpSize = 32;

// Barriers.

inline void __syncthreads(const std::source_location& where = std::source_location::current()) {
  simt::wait_for_block("__syncthreads", false, where);
}
inline int __syncthreads_or(int value,
                            const std::source_location& where = std::source_location::current()) {
  return simt::wait_for_block("__syncthreads_or", value != 0, where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::wait_for_warp(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { simt::fail("trap", "__trap was called"); }

// Exchanges between the lanes of a warp.

namespace simt {

// `source` is the lane to read from; one that takes no part gives a NaN.
template <class T>
__forceinline__ T shuffle(const char* name, unsigned mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  struct Operands {
    T value;
    int source;
    T result;
  } own{value, source, {}};
  wait_for_lanes(name, mask, false, &own, [](void* const* operands) {
    for (int lane = 0; lane < warpSize; ++lane) {
      auto* to = static_cast<Operands*>(operands[lane]);
      if (!to) continue;
      if (const auto* from = static_cast<const Operands*>(operands[to->source])) {
        to->result = from->value;
      } else {
        memset(&to->result, 0xff, sizeof(T));
      }
    }
  });
  return own.result;
}

// Calls function(values, members, lane) for the result of each lane.
template <class T, class Function>
__forceinline__ unsigned vote(const char* name, unsigned mask, T value, Function) {
  struct Operands {
    T value;
    unsigned result;
  } own{value, 0};
  wait_for_lanes(name, mask, false, &own, [](void* const* operands) {
    T values[warpSize] = {};
    unsigned members = 0;
    for (int lane = 0; lane < warpSize; ++lane) {
      if (!operands[lane]) continue;
      values[lane] = static_cast<const Operands*>(operands[lane])->value;
      members |= 1u << lane;
    }
    for (int lane = 0; lane < warpSize; ++lane) {
      if (operands[lane]) {
        static_cast<Operands*>(operands[lane])->result = Function{}(values, members, lane);
      }
    }
  });
  return own.result;
}

inline constexpr auto equal_lanes = []<class T>(const T* values, unsigned members, const T& like) {
  unsigned result = 0;
  for (int lane = 0; lane < warpSize; ++lane) {
    if ((members >> lane & 1) && values[lane] == like) result |= 1u << lane;
  }
  return result;
};

}  // namespace simt

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const int lane = simt::lane();
  return simt::shuffle("__shfl_sync", mask, value, (lane & -width) | (source & (width - 1)));
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
  const int lane = simt::lane(), source = lane ^ lanes;
  const bool inside = source < (lane & -width) + width;
  return simt::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned distance,
                                   int width = warpSize) {
  const int lane = simt::lane(), source = lane + static_cast<int>(distance);
  const bool inside = source < (lane & -width) + width;
  return simt::shuffle("__shfl_down_sync", mask, value, inside ? source : lane);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = warpSize) {
  const int lane = simt::lane(), source = lane - static_cast<int>(distance);
  return simt::shuffle("__shfl_up_sync", mask, value, source >= (lane & -width) ? source : lane);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  return simt::vote("__ballot_sync", mask, predicate != 0,
                    [](const bool* values, unsigned members, int) {
                      return simt::equal_lanes(values, members, true);
                    });
}
__forceinline__ int __any_sync(unsigned mask, int predicate) {
  return simt::vote("__any_sync", mask, predicate != 0,
                    [](const bool* values, unsigned members, int) {
                      return simt::equal_lanes(values, members, true) != 0u;
                    });
}
__forceinline__ int __all_sync(unsigned mask, int predicate) {
  return simt::vote("__all_sync", mask, predicate != 0,
                    [](const bool* values, unsigned members, int) {
                      return simt::equal_lanes(values, members, true) == members;
                    });
}
template <class T>
__forceinline__ unsigned __match_any_sync(unsigned mask, T value) {
  return simt::vote("__match_any_sync", mask, value,
                    [](const T* values, unsigned members, int lane) {
                      return simt::equal_lanes(values, members, values[lane]);
                    });
}
// CUDA promises no more than that the caller is among them.
inline unsigned __activemask() { return 1u << simt::lane(); }

// Bits and numbers.

inline int __popc(unsigned value) { return std::popcount(value); }
inline int __popcll(unsigned long long value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __clzll(long long value) {
  return std::countl_zero(static_cast<unsigned long long>(value));
}
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline unsigned __brev(unsigned value) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (value >> i & 1u) << (31 - i);
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int value) { return std::bit_cast<float>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return ::fma(a, b, c); }
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline float rsqrt(float value) { return 1.0f / sqrtf(value); }
inline double rsqrt(double value) { return 1.0 / ::sqrt(value); }

template <class T>
  requires std::is_arithmetic_v<T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
  requires std::is_arithmetic_v<T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

// Memory.

template <class T>
__forceinline__ T __ldg(const T* pointer) {
  return *pointer;
}

namespace simt {

// Blocks and threads take turns, so that nothing comes between the read and the write.
template <class T, class Function>
__attribute__((no_sanitize("thread"))) T update(T* address, Function&& function) {
  report_atomic(address, sizeof(T));
  const T before = *address;
  *address = function(before);
  return before;
}

}  // namespace simt

template <class T>
__forceinline__ T atomicAdd(T* address, std::type_identity_t<T> value) {
  return simt::update(address, [=](T before) { return static_cast<T>(before + value); });
}
template <class T>
__forceinline__ T atomicMax(T* address, std::type_identity_t<T> value) {
  return simt::update(address, [=](T before) { return before < value ? value : before; });
}
template <class T>
__forceinline__ T atomicMin(T* address, std::type_identity_t<T> value) {
  return simt::update(address, [=](T before) { return value < before ? value : before; });
}
template <class T>
__forceinline__ T atomicExch(T* address, std::type_identity_t<T> value) {
  return simt::update(address, [=](T) { return value; });
}
template <class T>
__forceinline__ T atomicCAS(T* address, std::type_identity_t<T> expected,
                            std::type_identity_t<T> value) {
  return simt::update(address, [=](T before) { return before == expected ? value : before; });
}

// The wrappers of device.cuh.

namespace adapter_ext::cuda {

__forceinline__ unsigned char* shared_memory() { return simt::shared_memory(); }

__forceinline__ int here(int number) { return number; }

__forceinline__ float quotient(float a, float b) { return a / b; }
__forceinline__ double quotient(double a, double b) { return a / b; }

__forceinline__ void require(bool holds) { assert(holds); }

__forceinline__ void copy_async(void* shared, const void* global, int count) {
  simt::copy_async(shared, global, count);
}
__forceinline__ void copy_async_commit() { simt::copy_async_commit(); }
template <int groups>
__forceinline__ void copy_async_wait() {
  simt::copy_async_wait(groups);
}

__forceinline__ void let_next_begin() {}
__forceinline__ void wait_for_previous() { simt::wait_for_previous(); }

template <bool transposed>
__forceinline__ void load_matrices(uint32_t (&to)[4], const void* shared) {
  simt::load_matrices(transposed, to, shared);
}

__forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  __nv_bfloat16) {
  simt::multiply_add(simt::OperandType::kBFloat16, sum, a, b);
}
__forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  __half) {
  simt::multiply_add(simt::OperandType::kFloat16, sum, a, b);
}
template <Space>
__forceinline__ void store_words(void* to, const uint32_t (&words)[4]) {
  *static_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
}
template <Space>
__forceinline__ void store_words(void* to, const uint32_t (&words)[2]) {
  *static_cast<uint2*>(to) = {words[0], words[1]};
}
template <Space>
__forceinline__ void store_words(void* to, const uint32_t (&word)[1]) {
  *static_cast<uint32_t*>(to) = word[0];
}

__forceinline__ uint32_t round_pair(float first, float second, __nv_bfloat16) {
  return simt::bfloat16_bits(first) | static_cast<uint32_t>(simt::bfloat16_bits(second)) << 16;
}
__forceinline__ uint32_t round_pair(float first, float second, __half) {
  return simt::half_bits(first) | static_cast<uint32_t>(simt::half_bits(second)) << 16;
}
template <class T>
__forceinline__ void unpack_pair(float (&to)[2], uint32_t bits, T) {
  T pair[2];
  memcpy(pair, &bits, 4);
  to[0] = static_cast<float>(pair[0]);
  to[1] = static_cast<float>(pair[1]);
}
__forceinline__ void multiply_add_tf32(float (&sum)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
  simt::multiply_add(simt::OperandType::kTf32, sum, a, b);
}
// To nearest, ties away from zero.
__forceinline__ float round_tf32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value;
  return std::bit_cast<float>((bits + 0x1000u) & ~0x1fffu);
}

struct Limits {
  int multiprocessors;
  int shared_memory;
};
inline Limits device_limits() {
  const simt::Limits limits = simt::limits();
  return {limits.multiprocessors, limits.shared_bytes};
}

enum class Begins { kInTurn, kEarly };

template <class Params, class Stream>
void launch(const char* name, void (*kernel)(Params), int64_t blocks, int threads, int64_t shared,
            Stream, const Params& params, Begins begins = Begins::kInTurn) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= 32764);
  using Kernel = void (*)(Params);
  const auto call = [](const void* kernel, const void* params) {
    (*static_cast<const Kernel*>(kernel))(*static_cast<const Params*>(params));
  };
  simt::run({name, dim3(static_cast<unsigned>(blocks)), threads, static_cast<int>(shared),
             begins == Begins::kEarly, call, &kernel, &params});
}

}  // namespace adapter_ext::cuda
