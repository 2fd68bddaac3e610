// The types that kernels are compiled for, each pair in a file of its own (float32_tf32.cu and
// others). x of a 16-bit type with operands of the other one, and operands of fewer bits than x of
// float64, are rounded by MultiplyAdd.
#pragma once

#include "cuda/launch.h"
#include "cuda/product.cuh"

namespace adapter_ext::cuda {

template <class X, class P>
class Forward {
 public:
  static void run(const ForwardCall& call);
};

template <class X, class P>
class Backward {
 public:
  static void run(const BackwardCall& call);
};

}  // namespace adapter_ext::cuda
