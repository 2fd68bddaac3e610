// Types of the kernels: elements in memory, operands of products, and how they are moved.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/activation.h"
#include "common/problem.h"
#include "cuda/device.cuh"

namespace adapter_ext::cuda {

inline constexpr int kBlock = 64;  // columns, and bottleneck elements, worked on at a time

// The threads of a block, and the rows of a tile that it works on.
template <int rows, int threads>
struct Shape {
  static constexpr int kRows = rows, kThreads = threads, kWarps = threads / 32;
};
using SmallTile = Shape<16, 128>;
using LargeTile = Shape<64, 256>;
// Blocks that a multiprocessor must have registers for: 128 a thread, where sums are floats. Where
// shared memory has room for one large tile alone, they may be more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
inline constexpr bool kOneLargeTile = true;
#else
inline constexpr bool kOneLargeTile = false;
#endif
template <class S, class C>
inline constexpr int kResident = kOneLargeTile && S::kThreads == LargeTile::kThreads
                                     ? 1
                                     : 2048 / static_cast<int>(sizeof(C)) / S::kThreads;
inline constexpr int kThreads = SmallTile::kThreads;  // of blocks without a tile
inline constexpr int kWarps = SmallTile::kWarps;

// Elements of a 16-byte access.
template <class T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Masked, so that the compiler knows that it is not negative, and divides it by shifts.
__device__ __forceinline__ int thread_index() { return here(static_cast<int>(threadIdx.x)) & 1023; }

// What lies at an offset of the block's shared memory, in bytes.
template <class T>
__device__ __forceinline__ T* shared_at(int offset) {
  return reinterpret_cast<T*>(shared_memory() + here(offset));
}

ADAPTER_EXT_HOST_DEVICE bool is_aligned(const void* pointer, int64_t row_bytes = 0) {
  return ((reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(row_bytes)) & 15) == 0;
}

// Two neighbours of a 16-bit type, from their bits.
template <class T, class C>
__device__ __forceinline__ void unpack(C& first, C& second, uint32_t bits) {
  float pair[2];
  unpack_pair(pair, bits, T{});
  first = static_cast<C>(pair[0]);
  second = static_cast<C>(pair[1]);
}

// Reads n elements from an address aligned to them (to 16 bytes, if they are more).
template <class T, int n, class C>
__device__ __forceinline__ void load_aligned(C (&to)[n], const T* from) {
  constexpr int bytes = n * static_cast<int>(sizeof(T));
  static_assert(bytes % 8 == 0);
  alignas(16) uint32_t words[bytes / 4];
  if constexpr (bytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < bytes / 16; ++i) {
      const uint4 raw = reinterpret_cast<const uint4*>(from)[i];
      memcpy(words + 4 * i, &raw, 16);
    }
  } else {
    const uint2 raw = *reinterpret_cast<const uint2*>(from);
    memcpy(words, &raw, 8);
  }
  if constexpr (sizeof(T) == 2 && !std::is_same_v<T, C>) {
#pragma unroll
    for (int i = 0; i < n; i += 2) unpack<T>(to[i], to[i + 1], words[i / 2]);
  } else {
    T parts[n];
    memcpy(parts, words, bytes);
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = static_cast<C>(parts[i]);
  }
}

// Reads n elements of which `count` are there; the others become zero. `aligned` says that all rows
// of the matrix start at multiples of 16 bytes.
template <class T, int n, class C>
__device__ __forceinline__ void load(C (&to)[n], const T* from, int count, bool aligned) {
  if (aligned && count >= n) return load_aligned(to, from);
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = i < count ? static_cast<C>(from[i]) : C(0);
}

// The bits of two neighbours of a 16-bit type, the first lower.
template <class T, class C>
__device__ __forceinline__ uint32_t pair_bits(C first, C second) {
  if constexpr (std::is_same_v<C, float>) {
    return round_pair(first, second, T{});
  } else {
    const T low = static_cast<T>(first), high = static_cast<T>(second);
    uint16_t low_bits, high_bits;
    memcpy(&low_bits, &low, 2);
    memcpy(&high_bits, &high, 2);
    return low_bits | static_cast<uint32_t>(high_bits) << 16;
  }
}

// Writes n elements to an address aligned to them (to 16 bytes, if they are more).
template <Space space, class T, int n, class C>
__device__ __forceinline__ void store_aligned(T* to, const C (&from)[n]) {
  constexpr int words = n * static_cast<int>(sizeof(T)) / 4;
  uint32_t word[words];
  if constexpr (sizeof(T) == 8) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      uint64_t bits;
      memcpy(&bits, &from[i], 8);
      word[2 * i] = static_cast<uint32_t>(bits);
      word[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    }
  } else {
#pragma unroll
    for (int i = 0; i < words; ++i) {
      if constexpr (sizeof(T) == 4) {
        word[i] = __float_as_uint(static_cast<float>(from[i]));
      } else {
        word[i] = pair_bits<T>(from[2 * i], from[2 * i + 1]);
      }
    }
  }
  constexpr int at_a_time = words < 4 ? words : 4;
  static_assert(words % at_a_time == 0);
#pragma unroll
  for (int i = 0; i < words; i += at_a_time) {
    uint32_t part[at_a_time];
#pragma unroll
    for (int k = 0; k < at_a_time; ++k) part[k] = word[i + k];
    store_words<space>(reinterpret_cast<uint32_t*>(to) + i, part);
  }
}

// Writes those of a vector's elements that are there, to global memory.
template <class T, class C>
__device__ __forceinline__ void store(T* to, const C (&from)[kVector<T>], int count, bool aligned) {
  if (aligned && count >= kVector<T>) return store_aligned<Space::kGlobal>(to, from);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    if (i < count) to[i] = static_cast<T>(from[i]);
  }
}

// Reads two neighbours from an address aligned to both.
template <class T, class C>
__device__ __forceinline__ void load_pair(C (&to)[2], const T* from) {
  if constexpr (sizeof(T) == 2) {
    unpack<T>(to[0], to[1], *reinterpret_cast<const uint32_t*>(from));
  } else {
    load_aligned(to, from);
  }
}

// Writes two neighbours to an address aligned to both.
template <Space space, class T>
__device__ __forceinline__ void store_pair(T* to, T first, T second) {
  const T pair[2] = {first, second};
  store_aligned<space>(to, pair);
}

// Weights are stored in x's type or in float32; this reads n elements from the one at `index`.
template <class X, int n, class C>
__device__ __forceinline__ void load_weights(C (&to)[n], const void* weights, bool is_float,
                                             int64_t index, int count, bool aligned) {
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

// Elements of h to their activations, in place.
template <class C, int n>
__device__ __forceinline__ void activate_all(Activation activation, C (&h)[n]) {
  dispatch_activation(activation, [&]<Activation kind>() {
#pragma unroll
    for (int e = 0; e < n; ++e) h[e] = activate<kind, ScalarMath<C>>(h[e]);
  });
}
// Gradients of act(h) to those of h, in place.
template <class C, int n>
__device__ __forceinline__ void gradients_before_activation(Activation activation, const C (&h)[n],
                                                            C (&gradient)[n]) {
  dispatch_activation(activation, [&]<Activation kind>() {
#pragma unroll
    for (int e = 0; e < n; ++e)
      gradient[e] = activation_gradient<kind, ScalarMath<C>>(h[e], gradient[e]);
  });
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
