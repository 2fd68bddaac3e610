// The activations and their derivatives, for scalars and vectors alike.
//
// `Math` supplies, for the value type V: exp, expm1, select(condition, V, V), splat(double) and
// gaussian(V) -> {cdf, pdf} of the standard normal distribution. NaN in gives NaN out.
#pragma once

#include "common/macros.h"
#include "common/problem.h"

namespace adapter_ext {

inline constexpr double kSeluScale = 1.0507009873554804934193349852946;
inline constexpr double kSeluAlpha = 1.6732632423543772848170429916717;
inline constexpr double kSqrtTwoOverPi = 0.79788456080286535587989211986876;
inline constexpr double kGeluCubic = 0.044715;

// The logistic function of h, and of -h, which is one minus it without the cancellation.
template <class V>
struct Sigmoid {
  V of, of_minus;
};

template <class Math, class V>
ADAPTER_EXT_HOST_DEVICE Sigmoid<V> sigmoid(V h) {
  const V zero = Math::splat(0.0), one = Math::splat(1.0);
  const V e = Math::exp(Math::select(h < zero, h, -h));  // at most 1
  const V large = one / (one + e), small = e * large;
  return {Math::select(h < zero, small, large), Math::select(h < zero, large, small)};
}

// act(h).
template <Activation activation, class Math, class V>
ADAPTER_EXT_HOST_DEVICE V activate(V h) {
  const V zero = Math::splat(0.0), one = Math::splat(1.0);
  if constexpr (activation == Activation::kIdentity) {
    return h;
  } else if constexpr (activation == Activation::kHardtanh) {
    return Math::select(h < -one, -one, Math::select(h > one, one, h));
  } else if constexpr (activation == Activation::kRelu) {
    return Math::select(h <= zero, zero, h);
  } else if constexpr (activation == Activation::kSelu) {
    return Math::splat(kSeluScale) *
           Math::select(h > zero, h, Math::splat(kSeluAlpha) * Math::expm1(h));
  } else if constexpr (activation == Activation::kSwish) {
    return h * sigmoid<Math>(h).of;
  } else if constexpr (activation == Activation::kGelu) {
    return h * Math::gaussian(h).cdf;
  } else {
    // 0.5 (1 + tanh u) = sigmoid(2 u), which does not cancel.
    const V u = Math::splat(kSqrtTwoOverPi) * (h + Math::splat(kGeluCubic) * h * h * h);
    return h * sigmoid<Math>(u + u).of;
  }
}

// `gradient` times act'(h); at kinks act' is what PyTorch's autograd has. Where it is 0 by
// definition the result is 0 whatever the gradient, infinite or NaN, as there.
template <Activation activation, class Math, class V>
ADAPTER_EXT_HOST_DEVICE V activation_gradient(V h, V gradient) {
  const V zero = Math::splat(0.0), one = Math::splat(1.0);
  if constexpr (activation == Activation::kIdentity) {
    return gradient;
  } else if constexpr (activation == Activation::kHardtanh) {
    return Math::select(h <= -one, zero, Math::select(h >= one, zero, gradient));
  } else if constexpr (activation == Activation::kRelu) {
    return Math::select(h <= zero, zero, gradient);
  } else if constexpr (activation == Activation::kSelu) {
    return gradient * (Math::splat(kSeluScale) *
                       Math::select(h > zero, one, Math::splat(kSeluAlpha) * Math::exp(h)));
  } else if constexpr (activation == Activation::kSwish) {
    const Sigmoid<V> s = sigmoid<Math>(h);
    return gradient * (s.of * (one + h * s.of_minus));
  } else if constexpr (activation == Activation::kGelu) {
    const auto normal = Math::gaussian(h);
    return gradient * (normal.cdf + h * normal.pdf);
  } else {
    // Beyond 64 it is 0 or 1 to the last bit, and the slope would overflow.
    const V bound = Math::splat(64.0);
    h = Math::select(h < -bound, -bound, Math::select(h > bound, bound, h));
    const V square = h * h;
    const V u = Math::splat(kSqrtTwoOverPi) * (h + Math::splat(kGeluCubic) * square * h);
    const V slope = Math::splat(kSqrtTwoOverPi) * (one + Math::splat(3.0 * kGeluCubic) * square);
    const Sigmoid<V> s = sigmoid<Math>(u + u);
    return gradient * (s.of + h * s.of * s.of_minus * (slope + slope));
  }
}

// Calls `function` with the activation as a template argument.
template <class Function>
ADAPTER_EXT_HOST_DEVICE void dispatch_activation(Activation activation, Function&& function) {
  switch (activation) {
    case Activation::kIdentity: return function.template operator()<Activation::kIdentity>();
    case Activation::kHardtanh: return function.template operator()<Activation::kHardtanh>();
    case Activation::kRelu: return function.template operator()<Activation::kRelu>();
    case Activation::kSelu: return function.template operator()<Activation::kSelu>();
    case Activation::kSwish: return function.template operator()<Activation::kSwish>();
    case Activation::kGelu: return function.template operator()<Activation::kGelu>();
    default: return function.template operator()<Activation::kGeluTanh>();
  }
}

}  // namespace adapter_ext
