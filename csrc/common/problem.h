// The plain structs between bindings and kernels: pointers and sizes, no torch.
//
// Notation: x has `rows` rows of `hidden_size` elements, contiguous. A sample is what one routing
// id governs: `rows_per_sample` consecutive rows. Adapter a has a bottleneck r. "Accumulate type"
// is double for x of double, else float. The caller owns all memory; strides are in elements.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/macros.h"

namespace adapter_ext {

enum class DataType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };
constexpr int64_t size_of(DataType type) {
  return type == DataType::kFloat64 ? 8 : type == DataType::kFloat32 ? 4 : 2;
}

// The type in which x of type X is accumulated.
template <class X>
using Accumulate = std::conditional_t<std::is_same_v<X, double>, double, float>;

enum class Activation : int32_t { kIdentity, kHardtanh, kRelu, kSelu, kSwish, kGelu, kGeluTanh };
enum class NormPosition : int32_t { kPre, kPost };
enum class DepthMode : int32_t { kCall, kSample };

// Which samples each adapter has.
struct RoutingView {
  const int64_t* order;    // [samples], sorted by adapter; null: all samples use adapter 0
  const int64_t* offsets;  // [adapters + 1] into order; those from offsets[adapters] on have none
  int64_t adapters;
  int64_t samples;
  int64_t rows_per_sample;
};

// One adapter's weights. Rows of `down` [r, D] and `up` [D, r] may be strided.
struct AdapterView {
  const void* norm_weight;  // [D]
  const void* norm_bias;    // [D]
  const void* down;         // [r, D]
  const void* up;           // [D, r]
  int64_t down_stride;
  int64_t up_stride;
  int64_t bottleneck;
};

// One adapter's gradients, contiguous, in the weights' type; null: not wanted.
struct AdapterGradients {
  void* norm_weight;
  void* norm_bias;
  void* down;
  void* up;
};

// Adapters as one view each, or, for a bank of thousands, the first one's view and the distances
// to the next (so that adapters without rows cost nothing).
struct AdapterTable {
  const AdapterView* list;  // [adapters], or null: stacked
  AdapterView first;
  int64_t norm_weight_step, norm_bias_step, down_step, up_step;  // in bytes
};

struct LinearAdapterProblem {
  DataType data_type;    // of x and y
  DataType weight_type;  // data_type or kFloat32
  // Operands of the products are rounded to it; kFloat32 and data_type: not rounded, but on CUDA
  // 16-bit operands are.
  DataType operand_type;
  bool tf32;  // CUDA: products of float32 may round their operands to TF32
  Activation activation;
  NormPosition norm_position;
  DepthMode depth_mode;
  bool residual;
  double eps;
  double dropout;           // probability; 0: none
  double stochastic_depth;  // probability; 0: none
  const int64_t* seed;      // one element; null where there is nothing to draw
  int64_t rows;
  int64_t hidden_size;
  int64_t largest_bottleneck;  // r; saved activations have as many elements a row
  RoutingView routing;
  AdapterTable adapters;
  const void* l2_lambda;  // [adapters] in the accumulate type; null: no auxiliary loss
};

struct LinearAdapterForward : LinearAdapterProblem {
  const void* x;  // [rows, D]
  void* y;        // [rows, D]
  void* aux;      // [adapters], accumulate type
  // Saved for the backward, in the accumulate type; all null in inference.
  void* hidden;  // [rows, largest_bottleneck], before the activation
  void* mean;    // [rows]
  void* rstd;    // [rows]
};

struct LinearAdapterBackward : LinearAdapterProblem {
  const void* x;         // [rows, D]
  const void* grad_y;    // [rows, D]
  const void* grad_aux;  // [adapters], accumulate type; null: zero
  const void* hidden;
  const void* mean;
  const void* rstd;
  void* grad_x;                       // [rows, D]; null: not wanted
  const AdapterGradients* gradients;  // [adapters]
};

// Whether the operands of products are rounded to a 16-bit type that is not x's.
ADAPTER_EXT_HOST_DEVICE bool rounds_operands(const LinearAdapterProblem& problem) {
  return problem.operand_type != problem.data_type &&
         (problem.operand_type == DataType::kBFloat16 ||
          problem.operand_type == DataType::kFloat16);
}

// Memory of a result, which the kernels write whole.
struct Memory {
  void* begin;
  int64_t bytes;
};

}  // namespace adapter_ext
