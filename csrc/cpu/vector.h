// Vectors of the instruction set that a file is compiled for, by the compiler's vector extension:
// one source for SSE2, AVX2, AVX-512 and NEON. CMake compiles each kernel file once a level and
// sets ADAPTER_EXT_CPU_LEVEL, the namespace that keeps the copies apart.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/macros.h"

namespace adapter_ext::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The compiler's own 16-bit float, which converts. Before 13, GCC has _Float16 in C++ on x86 alone.
#if defined(__aarch64__)
using NativeFloat16 = __fp16;
#else
using NativeFloat16 = _Float16;
#endif

inline namespace ADAPTER_EXT_CPU_LEVEL {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T, int lanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};
template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <class C>
using Vector = typename VectorOf<C, kLanes<C>>::type;
template <class C>
using Bits = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
template <class C>
using BitsVector = Vector<Bits<C>>;

template <class C>
ADAPTER_EXT_HOST_DEVICE Vector<C> splat(C value) {
  return value - Vector<C>{};
}

template <class To, class From>
ADAPTER_EXT_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class C>
ADAPTER_EXT_HOST_DEVICE Vector<C> select(BitsVector<C> condition, Vector<C> yes, Vector<C> no) {
  return condition ? yes : no;
}

// ---- Loads and stores, converting between the stored type X and the accumulate type C.

template <class C, class X>
ADAPTER_EXT_HOST_DEVICE Vector<C> load(const X* from) {
  constexpr int lanes = kLanes<C>;
  if constexpr (std::is_same_v<X, C>) {
    Vector<C> v;
    std::memcpy(&v, from, sizeof(v));
    return v;
  } else if constexpr (std::is_same_v<X, BFloat16>) {
    typename VectorOf<uint16_t, lanes>::type half;
    std::memcpy(&half, from, sizeof(half));
    const auto wide = __builtin_convertvector(half, typename VectorOf<uint32_t, lanes>::type) << 16;
    using Wide = typename VectorOf<float, lanes>::type;
    return __builtin_convertvector(bit_cast<Wide>(wide), Vector<C>);
  } else if constexpr (std::is_same_v<X, Float16>) {
#if defined(__AVX512F__)
    if constexpr (lanes == 16) {
      __m256i half;
      std::memcpy(&half, from, sizeof(half));
      return bit_cast<Vector<C>>(_mm512_cvtph_ps(half));
    }
#elif defined(__F16C__)
    if constexpr (lanes == 8) {
      __m128i half;
      std::memcpy(&half, from, sizeof(half));
      return bit_cast<Vector<C>>(_mm256_cvtph_ps(half));
    }
#endif
    typename VectorOf<NativeFloat16, lanes>::type half;
    std::memcpy(&half, from, sizeof(half));
    return __builtin_convertvector(half, Vector<C>);
  } else {
    typename VectorOf<X, lanes>::type v;
    std::memcpy(&v, from, sizeof(v));
    return __builtin_convertvector(v, Vector<C>);
  }
}

// Rounds to nearest, ties to even; NaN stays NaN.
ADAPTER_EXT_HOST_DEVICE auto bfloat16_bits(Vector<float> v) {
#if defined(__AVX512BF16__)
  // The instruction takes subnormal numbers as zero.
  constexpr int subnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(bit_cast<__m512>(v), subnormal) == 0, 1)) {
    return bit_cast<typename VectorOf<uint16_t, kLanes<float>>::type>(
        _mm512_cvtneps_pbh(bit_cast<__m512>(v)));
  }
#endif
  const auto bits = bit_cast<Vector<uint32_t>>(v);
  const auto rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const auto quiet = (bits >> 16) | 0x40u;
  const auto is_nan = bit_cast<Vector<uint32_t>>(v != v);
  const Vector<uint32_t> result = (is_nan & quiet) | (~is_nan & rounded);
  return __builtin_convertvector(result, typename VectorOf<uint16_t, kLanes<float>>::type);
}

template <class C, class X>
ADAPTER_EXT_HOST_DEVICE void store(X* to, Vector<C> v) {
  constexpr int lanes = kLanes<C>;
  if constexpr (std::is_same_v<X, C>) {
    std::memcpy(to, &v, sizeof(v));
  } else if constexpr (std::is_same_v<X, BFloat16>) {
    const auto half = bfloat16_bits(v);
    std::memcpy(to, &half, sizeof(half));
  } else if constexpr (std::is_same_v<X, Float16>) {
#if defined(__AVX512F__)
    if constexpr (lanes == 16) {
      const __m256i half = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
      std::memcpy(to, &half, sizeof(half));
      return;
    }
#elif defined(__F16C__)
    if constexpr (lanes == 8) {
      const __m128i half = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
      std::memcpy(to, &half, sizeof(half));
      return;
    }
#endif
    const auto half = __builtin_convertvector(v, typename VectorOf<NativeFloat16, lanes>::type);
    std::memcpy(to, &half, sizeof(half));
  } else {
    const auto narrow = __builtin_convertvector(v, typename VectorOf<X, lanes>::type);
    std::memcpy(to, &narrow, sizeof(narrow));
  }
}

// Stores past the caches, for which `to` is a multiple of the size of the values; before others
// read them, finish_streams().
template <class C, class X>
ADAPTER_EXT_HOST_DEVICE void stream(X* to, Vector<C> v) {
  struct {
    X lane[kLanes<C>];
  } values;
  store<C>(values.lane, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(values) == 64) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bit_cast<__m512i>(values));
  }
#endif
#if defined(__AVX__)
  if constexpr (sizeof(values) == 32) {
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(values));
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(values) == 16) {
    return _mm_stream_si128(reinterpret_cast<__m128i*>(to), bit_cast<__m128i>(values));
  }
#endif
  std::memcpy(to, &values, sizeof(values));
}
ADAPTER_EXT_HOST_DEVICE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// A full vector, or the first `count` lanes of one (the others are zero).
struct FullVector {};
struct PartialVector {
  int64_t count;
};

template <class C, class X>
ADAPTER_EXT_HOST_DEVICE Vector<C> load(const X* from, FullVector) {
  return load<C>(from);
}
template <class C, class X>
ADAPTER_EXT_HOST_DEVICE Vector<C> load(const X* from, PartialVector part) {
  X padded[kLanes<C>] = {};
  for (int i = 0; i < kLanes<C>; ++i) {
    if (i < part.count) padded[i] = from[i];
  }
  return load<C>(padded);
}
template <class C, class X>
ADAPTER_EXT_HOST_DEVICE void store(X* to, Vector<C> v, FullVector) {
  store<C>(to, v);
}
template <class C, class X>
ADAPTER_EXT_HOST_DEVICE void store(X* to, Vector<C> v, PartialVector part) {
  X padded[kLanes<C>];
  store<C>(padded, v);
  for (int i = 0; i < kLanes<C>; ++i) {
    if (i < part.count) to[i] = padded[i];
  }
}

// Calls body(first, FullVector or PartialVector) for each vector of `count` elements.
template <class C, class Body>
ADAPTER_EXT_HOST_DEVICE void for_each_vector(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes<C> <= count; i += kLanes<C>) body(i, FullVector{});
  if (i < count) body(i, PartialVector{count - i});
}

template <class C>
ADAPTER_EXT_HOST_DEVICE C horizontal_sum(Vector<C> v) {
  // Halves are added until one lane is left: a fixed order.
  for (int half = kLanes<C> / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

// ---- Elementary functions.

template <class C>
struct VectorMath {
  using V = Vector<C>;
  struct Gaussian {
    V cdf;
    V pdf;
  };

  ADAPTER_EXT_HOST_DEVICE static V splat(double value) {
    return cpu::splat<C>(static_cast<C>(value));
  }
  ADAPTER_EXT_HOST_DEVICE static V select(BitsVector<C> condition, V yes, V no) {
    return cpu::select<C>(condition, yes, no);
  }

  ADAPTER_EXT_HOST_DEVICE static V exp(V x) {
    if constexpr (std::is_same_v<C, double>) {
      return lanewise(x, [](double v) { return std::exp(v); });
    } else {
      const auto [n, r] = reduce(x);
      return scale(exp_core(r), n);
    }
  }

  ADAPTER_EXT_HOST_DEVICE static V expm1(V x) {
    if constexpr (std::is_same_v<C, double>) {
      return lanewise(x, [](double v) { return std::expm1(v); });
    } else {
      // Near zero r + r^2 p(r) is exact where exp(x) - 1 would cancel.
      const V near = x + x * x * exp_polynomial(x);
      const V far = exp(x) - splat(1.0);
      return select((x > splat(-0.35)) & (x < splat(0.35)), near, far);
    }
  }

  // Of the standard normal distribution. In float, with z = |x| / sqrt(2):
  // erfc(z) = s p(s) exp(-z^2), s = 1 / (1 + 0.4 z), p interpolating erfc(z) exp(z^2) / s at
  // Chebyshev nodes, relative error of the formula 3.1e-9.
  ADAPTER_EXT_HOST_DEVICE static Gaussian gaussian(V x) {
    constexpr double inverse_sqrt_2 = 0.70710678118654752440;
    constexpr double inverse_sqrt_2pi = 0.39894228040143267794;
    if constexpr (std::is_same_v<C, double>) {
      return {
          lanewise(x, [](double v) { return 0.5 * std::erfc(-v * 0.70710678118654752440); }),
          lanewise(x, [](double v) { return std::exp(-0.5 * v * v) * 0.39894228040143267794; })};
    } else {
      const V z = select(x < splat(0.0), -x, x) * splat(inverse_sqrt_2);
      const V s = splat(1.0) / (splat(1.0) + splat(0.4) * z);
      constexpr double p[] = {0.22568880896739027, 0.22536863246256492,  0.21075927198603525,
                              0.1534115233284193,  0.18634105363849499,  -0.07927014024020947,
                              0.21782306869161833, -0.14686872031480852, -0.04135443426532914,
                              0.06421887829055131, -0.01611794351717653};
      V polynomial = splat(p[10]);
      for (int i = 9; i >= 0; --i) polynomial = polynomial * s + splat(p[i]);
      const V density = exp(splat(-0.5) * x * x);
      const V tail = splat(0.5) * s * polynomial * density;  // P(X > |x|)
      return {select(x > splat(0.0), splat(1.0) - tail, tail), density * splat(inverse_sqrt_2pi)};
    }
  }

 private:
  struct Reduced {
    V n;
    V r;
  };

  template <class Function>
  ADAPTER_EXT_HOST_DEVICE static V lanewise(V x, Function function) {
    for (int i = 0; i < kLanes<C>; ++i) x[i] = function(x[i]);
    return x;
  }

  // x = n ln 2 + r with n integral and |r| <= ln 2 / 2; x is clamped to where exp is 0 or inf.
  ADAPTER_EXT_HOST_DEVICE static Reduced reduce(V x) {
    x = select(x > splat(89.0), splat(89.0), x);
    x = select(x < splat(-104.0), splat(-104.0), x);
    const V magic = splat(12582912.0);  // 1.5 * 2^23: adding it rounds to an integer
    const V n = (x * splat(1.4426950408889634) + magic) - magic;
    const V r = (x - n * splat(0.693145751953125)) - n * splat(1.4286068203094172e-06);
    return {n, r};
  }

  // (exp(r) - 1 - r) / r^2, interpolated at Chebyshev nodes of |r| <= 0.35.
  ADAPTER_EXT_HOST_DEVICE static V exp_polynomial(V r) {
    constexpr double p[] = {0.5, 0.16666573381900845, 0.04166655011030512, 0.008363773874405574,
                            0.0013926926614021907};
    V polynomial = splat(p[4]);
    for (int i = 3; i >= 0; --i) polynomial = polynomial * r + splat(p[i]);
    return polynomial;
  }
  ADAPTER_EXT_HOST_DEVICE static V exp_core(V r) {
    return splat(1.0) + (r + r * r * exp_polynomial(r));
  }

  // v 2^n in two steps, so that results go through the subnormals to 0 and up to infinity.
  ADAPTER_EXT_HOST_DEVICE static V scale(V v, V n) {
    const auto exponent = __builtin_convertvector(n, BitsVector<C>);
    const auto half = exponent >> 1;
    const auto power = [](BitsVector<C> e) { return bit_cast<V>((e + 127) << 23); };
    return v * power(half) * power(exponent - half);
  }
};

}  // namespace ADAPTER_EXT_CPU_LEVEL
}  // namespace adapter_ext::cpu
