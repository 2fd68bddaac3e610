// Types of the kernels: elements in memory, operands of products, and how they are moved.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/activation.h"
#include "common/problem.h"
#include "cuda/device.cuh"

namespace adapter_ext::cuda {

template <class X>
using Accumulate = std::conditional_t<std::is_same_v<X, double>, double, float>;

inline constexpr int kThreads = 128;  // of a block, but where a kernel says otherwise
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kBlock = 64;  // columns, and bottleneck elements, worked on at a time

// Elements of a 16-byte access.
template <class T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ bool is_aligned(const void* pointer, int64_t row_bytes = 0) {
  return ((reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(row_bytes)) & 15) == 0;
}

// Reads n elements from an address aligned to them (to 16 bytes, if they are more).
template <class T, int n, class C>
__device__ __forceinline__ void load_aligned(C (&to)[n], const T* from) {
  constexpr int bytes = n * static_cast<int>(sizeof(T));
  static_assert(bytes % 8 == 0);
  alignas(16) T parts[n];
  if constexpr (bytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < bytes / 16; ++i) {
      const uint4 raw = reinterpret_cast<const uint4*>(from)[i];
      memcpy(parts + i * (n * 16 / bytes), &raw, 16);
    }
  } else {
    const uint2 raw = *reinterpret_cast<const uint2*>(from);
    memcpy(parts, &raw, 8);
  }
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = static_cast<C>(parts[i]);
}

// Reads n elements of which `count` are there; the others become zero. `aligned` says that all rows
// of the matrix start at multiples of 16 bytes.
template <class T, int n, class C>
__device__ __forceinline__ void load(C (&to)[n], const T* from, int64_t count, bool aligned) {
  if (aligned && count >= n) return load_aligned(to, from);
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = i < count ? static_cast<C>(from[i]) : C(0);
}

// Writes n elements to an address aligned to them (to 16 bytes, if they are more).
template <class T, int n>
__device__ __forceinline__ void put(T* to, const T (&from)[n]) {
  constexpr int bytes = n * static_cast<int>(sizeof(T));
  if constexpr (bytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < bytes / 16; ++i) {
      uint4 raw;
      memcpy(&raw, from + i * (n * 16 / bytes), 16);
      reinterpret_cast<uint4*>(to)[i] = raw;
    }
  } else {
    static_assert(bytes == 8 || bytes == 4);
    std::conditional_t<bytes == 8, uint2, uint32_t> raw;
    memcpy(&raw, from, bytes);
    *reinterpret_cast<decltype(raw)*>(to) = raw;
  }
}

template <class T, int n, class C>
__device__ __forceinline__ void store_aligned(T* to, const C (&from)[n]) {
  alignas(16) T parts[n];
#pragma unroll
  for (int i = 0; i < n; ++i) parts[i] = static_cast<T>(from[i]);
  put(to, parts);
}

template <class T, class C>
__device__ __forceinline__ void store(T* to, const C (&from)[kVector<T>], int64_t count,
                                      bool aligned) {
  if (aligned && count >= kVector<T>) return store_aligned(to, from);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    if (i < count) to[i] = static_cast<T>(from[i]);
  }
}

// Writes two neighbours to an address aligned to both.
template <class T>
__device__ __forceinline__ void store_pair(T* to, T first, T second) {
  put(to, {first, second});
}

// Weights are stored in x's type or in float32; this reads n elements from the one at `index`.
template <class X, int n, class C>
__device__ __forceinline__ void load_weights(C (&to)[n], const void* weights, bool is_float,
                                             int64_t index, int64_t count, bool aligned) {
  if constexpr (!std::is_same_v<X, float>) {
    if (is_float) {
      return load(to, static_cast<const float*>(weights) + index, count, aligned);
    }
  }
  load(to, static_cast<const X*>(weights) + index, count, aligned);
}

template <class C, class X>
__device__ __forceinline__ C load_weight(const void* weights, bool is_float, int64_t index) {
  return is_float ? static_cast<C>(static_cast<const float*>(weights)[index])
                  : static_cast<C>(static_cast<const X*>(weights)[index]);
}

// What activations need of scalars (common/activation.h).
template <class C>
struct ScalarMath {
  static ADAPTER_EXT_HOST_DEVICE C exp(C v) { return ::exp(v); }
  static ADAPTER_EXT_HOST_DEVICE C expm1(C v) { return ::expm1(v); }
  static ADAPTER_EXT_HOST_DEVICE C splat(double v) { return static_cast<C>(v); }
  static ADAPTER_EXT_HOST_DEVICE C select(bool condition, C yes, C no) {
    return condition ? yes : no;
  }
  struct Gaussian {
    C cdf, pdf;
  };
  static ADAPTER_EXT_HOST_DEVICE Gaussian gaussian(C v) {
    constexpr double sqrt_half = 0.70710678118654752440, scale = 0.39894228040143267794;
    return {static_cast<C>(0.5) * ::erfc(-v * static_cast<C>(sqrt_half)),
            static_cast<C>(scale) * ::exp(static_cast<C>(-0.5) * v * v)};
  }
};

// A kernel for each activation would be seven times the code; here it is a branch that all threads
// take alike, at rows x bottleneck elements.
template <class C>
__device__ C value_of(Activation activation, C h) {
  switch (activation) {
    case Activation::kIdentity: return activate<Activation::kIdentity, ScalarMath<C>>(h);
    case Activation::kHardtanh: return activate<Activation::kHardtanh, ScalarMath<C>>(h);
    case Activation::kRelu: return activate<Activation::kRelu, ScalarMath<C>>(h);
    case Activation::kSelu: return activate<Activation::kSelu, ScalarMath<C>>(h);
    case Activation::kSwish: return activate<Activation::kSwish, ScalarMath<C>>(h);
    case Activation::kGelu: return activate<Activation::kGelu, ScalarMath<C>>(h);
    default: return activate<Activation::kGeluTanh, ScalarMath<C>>(h);
  }
}
template <class C>
__device__ C derivative_of(Activation activation, C h) {
  using M = ScalarMath<C>;
  switch (activation) {
    case Activation::kIdentity: return activation_derivative<Activation::kIdentity, M>(h);
    case Activation::kHardtanh: return activation_derivative<Activation::kHardtanh, M>(h);
    case Activation::kRelu: return activation_derivative<Activation::kRelu, M>(h);
    case Activation::kSelu: return activation_derivative<Activation::kSelu, M>(h);
    case Activation::kSwish: return activation_derivative<Activation::kSwish, M>(h);
    case Activation::kGelu: return activation_derivative<Activation::kGelu, M>(h);
    default: return activation_derivative<Activation::kGeluTanh, M>(h);
  }
}

// The sum over groups of `lanes` neighbouring lanes, the same in all of them.
template <int lanes, class C>
__device__ __forceinline__ C sum_over_lanes(C value) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

}  // namespace adapter_ext::cuda
