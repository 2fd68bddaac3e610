// The ops linear_adapter (inference), linear_adapter_forward and linear_adapter_backward (training)
// for any backend: they check tensors, allocate the results and fill in the kernels' structs.
// `Backend::run(problem, x)` computes; x tells the device. `Backend::allocated(results)` is told of
// the memory of the results beforehand.
#pragma once

#include <limits>
#include <list>
#include <tuple>

#include "tensor_checks.h"

namespace adapter_ext {

using TensorList = std::vector<Tensor>;

// The arguments that both ops share, and the structs made of them.
class LinearAdapterArguments {
 public:
  static constexpr const char* kOp = "linear_adapter";
  // A code of compute_type beyond those of DataType.
  static constexpr int64_t kTf32 = 4;

  LinearAdapterArguments(const Tensor& x, const TensorList& weights,
                         const std::optional<Tensor>& order, const std::optional<Tensor>& offsets,
                         int64_t activation, int64_t norm_position, double eps, bool residual,
                         int64_t compute_type, double dropout, double stochastic_depth,
                         int64_t depth_mode, const std::optional<Tensor>& l2_lambda,
                         const std::optional<Tensor>& seed)
      : x_(as_contiguous(x)), device_(adapter_ext::device(x)) {
    p_.data_type = data_type({kOp, "x"}, x);
    accumulate_type_ = p_.data_type == DataType::kFloat64 ? ScalarType::Double : ScalarType::Float;
    if (x.dim() < 1 || x.size(x.dim() - 1) < 1) {
      fail({kOp, "x"}, "expected shape [..., D] with D >= 1, got ", shape_text(x));
    }
    p_.hidden_size = x.size(x.dim() - 1);
    p_.rows = x.numel() / p_.hidden_size;
    const auto check_code = [](const char* name, int64_t code, int64_t first, int64_t last) {
      if (code < first || code > last) {
        fail({kOp, name}, "expected a code in [", first, ", ", last, "], got ", code);
      }
    };
    check_code("activation", activation, 0, static_cast<int64_t>(Activation::kGeluTanh));
    check_code("norm_position", norm_position, 0, 1);
    check_code("depth_mode", depth_mode, 0, 1);
    check_code("compute_type", compute_type, -1, kTf32);
    if (compute_type == static_cast<int64_t>(DataType::kFloat64) &&
        p_.data_type != DataType::kFloat64) {
      fail({kOp, "compute_type"}, "expected float64 with x of float64 alone, got x of ",
           type_text(x.scalar_type()));
    }
    const auto check_chance = [](const char* name, double probability) {
      if (!(probability >= 0.0 && probability <= 1.0)) {
        fail({kOp, name}, "expected a value in [0, 1], got ", probability);
      }
    };
    check_chance("dropout", dropout);
    check_chance("stochastic_depth", stochastic_depth);
    if (!(eps > 0.0 && eps < std::numeric_limits<double>::infinity())) {
      fail({kOp, "eps"}, "expected a finite value above 0, got ", eps);
    }
    if (compute_type == kTf32) {
      if (p_.data_type != DataType::kFloat32 || !is_cuda(x)) {
        fail({kOp, "compute_type"}, "expected TF32 with x of float32 on a CUDA device alone, got ",
             type_text(x.scalar_type()), " on ", device_text(device_));
      }
      p_.tf32 = true;
      compute_type = -1;
    }
    p_.activation = static_cast<Activation>(activation);
    p_.norm_position = static_cast<NormPosition>(norm_position);
    p_.depth_mode = static_cast<DepthMode>(depth_mode);
    p_.residual = residual;
    p_.eps = eps;
    p_.dropout = dropout;
    p_.stochastic_depth = stochastic_depth;
    set_adapters(weights);
    p_.operand_type = compute_type >= 0                ? static_cast<DataType>(compute_type)
                      : p_.weight_type == p_.data_type ? p_.data_type
                                                       : DataType::kFloat32;
    set_routing(order, offsets);
    if (seed) {
      check_device({kOp, "seed"}, *seed, device_);
      check_type({kOp, "seed"}, *seed, {ScalarType::Long});
      if (seed->numel() != 1) {
        fail({kOp, "seed"}, "expected one element, got shape ", shape_text(*seed));
      }
      p_.seed = static_cast<const int64_t*>(seed->data_ptr());
    } else if (dropout > 0.0 || stochastic_depth > 0.0) {
      fail({kOp, "seed"}, "expected a tensor where dropout or stochastic_depth is above 0");
    }
    if (l2_lambda) {
      check_device({kOp, "l2_lambda"}, *l2_lambda, device_);
      check_type({kOp, "l2_lambda"}, *l2_lambda, {accumulate_type_});
      check_shape({kOp, "l2_lambda"}, *l2_lambda, {p_.routing.adapters});
      l2_lambda_ = as_contiguous(*l2_lambda);
      p_.l2_lambda = l2_lambda_->data_ptr();
    }
  }

  const LinearAdapterProblem& problem() const { return p_; }
  const Tensor& x() const { return x_; }
  const Device& device() const { return device_; }
  ScalarType accumulate_type() const { return accumulate_type_; }
  bool stacked() const { return p_.adapters.list == nullptr; }

 private:
  // `weights` holds norm_weight, norm_bias, down and up, as many tensors of each, in this order.
  void set_adapters(const TensorList& weights) {
    const size_t count = weights.size() / 4;
    if (weights.size() % 4 != 0) {
      fail({kOp, "weights"}, "expected four lists of one length, got ", weights.size(),
           " tensors in all");
    }
    const Tensor* norm_weight = weights.data();
    const Tensor* norm_bias = norm_weight + count;
    const Tensor* down = norm_bias + count;
    const Tensor* up = down + count;
    // One tensor of three dimensions is a stack.
    const bool stack = count == 1 && down[0].dim() == 3;
    const int64_t dims = stack ? 3 : 2;
    p_.weight_type = count ? data_type({kOp, "down", 0}, down[0]) : p_.data_type;
    const ScalarType x_type = x_.scalar_type(), type = count ? down[0].scalar_type() : x_type;
    p_.largest_bottleneck = 0;
    views_.resize(count);
    // A parameter of a list may be a transposed tensor. A stack is too much to be copied unasked.
    const auto in_rows = [&](const Tensor& tensor) -> const Tensor& {
      const int64_t last = tensor.dim() - 1;
      if (stack || tensor.size(last) <= 1 || tensor.stride(last) == 1) return tensor;
      return copies_.emplace_back(as_contiguous(tensor));
    };
    for (size_t a = 0; a < count; ++a) {
      const int64_t i = stack ? -1 : static_cast<int64_t>(a);
      const auto check = [&](const Tensor& tensor, const char* argument, int64_t expected_dims) {
        const ArgumentName name{kOp, argument, i};
        check_device(name, tensor, device_);
        if (p_.data_type == DataType::kFloat32) {
          check_type(name, tensor, {ScalarType::Float});
        } else {
          check_type(name, tensor, {x_type, ScalarType::Float});
        }
        if (tensor.scalar_type() != type) {
          fail(name, "expected the dtype of down, ", type_text(type), ", got ",
               type_text(tensor.scalar_type()));
        }
        if (tensor.dim() != expected_dims) {
          fail(name, "expected ", expected_dims, " dimensions, got shape ", shape_text(tensor));
        }
        const int64_t last = tensor.dim() - 1;
        if (stack && tensor.size(last) > 1 && tensor.stride(last) != 1) {
          fail(name, "expected a last dimension with stride 1, got stride ", tensor.stride(last));
        }
      };
      check(down[a], "down", dims);
      check(up[a], "up", dims);
      check(norm_weight[a], "norm_weight", dims - 1);
      check(norm_bias[a], "norm_bias", dims - 1);
      const int64_t r = down[a].size(dims - 2), width = p_.hidden_size;
      if (r < 1) fail({kOp, "down", i}, "expected a bottleneck >= 1, got ", shape_text(down[a]));
      if (stack) {
        const int64_t adapters = down[a].size(0);
        check_shape({kOp, "down"}, down[a], {adapters, r, width});
        check_shape({kOp, "up"}, up[a], {adapters, width, r});
        check_shape({kOp, "norm_weight"}, norm_weight[a], {adapters, width});
        check_shape({kOp, "norm_bias"}, norm_bias[a], {adapters, width});
      } else {
        check_shape({kOp, "down", i}, down[a], {r, width});
        check_shape({kOp, "up", i}, up[a], {width, r});
        check_shape({kOp, "norm_weight", i}, norm_weight[a], {width});
        check_shape({kOp, "norm_bias", i}, norm_bias[a], {width});
      }
      const Tensor &down_rows = in_rows(down[a]), &up_rows = in_rows(up[a]);
      views_[a] = {in_rows(norm_weight[a]).data_ptr(),
                   in_rows(norm_bias[a]).data_ptr(),
                   down_rows.data_ptr(),
                   up_rows.data_ptr(),
                   down_rows.stride(dims - 2),
                   up_rows.stride(dims - 2),
                   r};
      p_.largest_bottleneck = r > p_.largest_bottleneck ? r : p_.largest_bottleneck;
    }
    if (stack) {
      const int64_t size = size_of(p_.weight_type);
      p_.adapters = {nullptr,
                     views_[0],
                     norm_weight[0].stride(0) * size,
                     norm_bias[0].stride(0) * size,
                     down[0].stride(0) * size,
                     up[0].stride(0) * size};
      p_.routing.adapters = down[0].size(0);
    } else {
      // Never null, which would say "stacked".
      if (views_.empty()) views_.reserve(1);
      p_.adapters.list = views_.data();
      p_.routing.adapters = static_cast<int64_t>(count);
    }
  }

  void set_routing(const std::optional<Tensor>& order, const std::optional<Tensor>& offsets) {
    RoutingView& routing = p_.routing;
    if (order.has_value() != offsets.has_value()) {
      fail({kOp, "routing"}, "expected both routing.order and routing.offsets, or neither, got ",
           order ? "the former" : "the latter");
    }
    if (!order) {
      if (routing.adapters != 1) {
        fail({kOp, "routing"}, "expected a routing for ", routing.adapters,
             " adapters; without one there must be exactly 1 adapter");
      }
      routing.samples = x_.dim() > 1 ? x_.size(0) : 1;
    } else {
      for (const auto& [tensor, name] :
           {std::pair{&*order, "routing.order"}, std::pair{&*offsets, "routing.offsets"}}) {
        check_device({kOp, name}, *tensor, device_);
        check_type({kOp, name}, *tensor, {ScalarType::Long});
        check_contiguous({kOp, name}, *tensor);
      }
      check_shape({kOp, "routing.order"}, *order, {-1});
      if (offsets->dim() != 1 || offsets->size(0) != routing.adapters + 1) {
        fail({kOp, "routing"}, "expected one made for ", routing.adapters,
             " adapters (the weights'), got one for ", offsets->numel() - 1);
      }
      routing.order = static_cast<const int64_t*>(order->data_ptr());
      routing.offsets = static_cast<const int64_t*>(offsets->data_ptr());
      routing.samples = order->size(0);
    }
    const bool fits = routing.samples ? p_.rows % routing.samples == 0 : p_.rows == 0;
    if (!fits) {
      fail({kOp, "routing"}, "expected ids for the leading dimensions of x, ", shape_text(x_),
           ", got ", routing.samples, " ids");
    }
    routing.rows_per_sample = routing.samples ? p_.rows / routing.samples : 0;
  }

  Tensor x_;
  Device device_;
  std::optional<Tensor> l2_lambda_;
  ScalarType accumulate_type_;
  LinearAdapterProblem p_{};
  std::vector<AdapterView> views_;
  std::list<Tensor> copies_;  // of weights, which views refer to
};

inline Tensor new_result(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type,
                         std::vector<Memory>& results) {
  Tensor result = empty(like, shape, type);
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(result.get(), &bytes));
  results.push_back({result.data_ptr(), bytes});
  return result;
}

struct LinearAdapterResults {
  Tensor y, aux, saved;
};

// What the forward leaves for the backward in one tensor, since each costs a call some
// microseconds: hidden [rows, r], mean [rows], rstd [rows] in the accumulate type.
inline std::vector<int64_t> saved_shape(const LinearAdapterProblem& problem) {
  return {problem.rows * (problem.largest_bottleneck + 2)};
}

template <class Problem>
void set_saved(Problem& problem, const Tensor& saved) {
  const int64_t size = problem.data_type == DataType::kFloat64 ? 8 : 4;
  char* start = static_cast<char*>(saved.data_ptr());
  problem.hidden = start;
  problem.mean = start + problem.rows * problem.largest_bottleneck * size;
  problem.rstd = start + problem.rows * (problem.largest_bottleneck + 1) * size;
}

// What the backward needs is saved only where `save` says so.
template <class Backend>
LinearAdapterResults run_forward(const LinearAdapterArguments& arguments, bool save) {
  LinearAdapterForward problem{};
  static_cast<LinearAdapterProblem&>(problem) = arguments.problem();
  const Tensor& x = arguments.x();
  const ScalarType type = arguments.accumulate_type();
  const auto sizes = x.sizes();
  std::vector<Memory> memory;
  Tensor y = new_result(x, {sizes.begin(), sizes.end()}, x.scalar_type(), memory);
  Tensor aux = empty(x, {problem.routing.adapters}, type);
  LinearAdapterResults results{y, aux, y};
  problem.x = x.data_ptr();
  problem.y = y.data_ptr();
  problem.aux = aux.data_ptr();
  if (save) {
    results.saved = new_result(x, saved_shape(problem), type, memory);
    set_saved(problem, results.saved);
  }
  Backend::allocated(memory);
  Backend::run(problem, x);
  return results;
}

template <class Backend>
std::tuple<Tensor, Tensor> linear_adapter(
    const Tensor& x, const TensorList& weights, const std::optional<Tensor>& order,
    const std::optional<Tensor>& offsets, int64_t activation, int64_t norm_position, double eps,
    bool residual, int64_t compute_type, double dropout, double stochastic_depth,
    int64_t depth_mode, const std::optional<Tensor>& l2_lambda, const std::optional<Tensor>& seed) {
  const auto results =
      run_forward<Backend>({x, weights, order, offsets, activation, norm_position, eps, residual,
                            compute_type, dropout, stochastic_depth, depth_mode, l2_lambda, seed},
                           false);
  return {results.y, results.aux};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> linear_adapter_forward(
    const Tensor& x, const TensorList& weights, const std::optional<Tensor>& order,
    const std::optional<Tensor>& offsets, int64_t activation, int64_t norm_position, double eps,
    bool residual, int64_t compute_type, double dropout, double stochastic_depth,
    int64_t depth_mode, const std::optional<Tensor>& l2_lambda, const std::optional<Tensor>& seed) {
  const auto results =
      run_forward<Backend>({x, weights, order, offsets, activation, norm_position, eps, residual,
                            compute_type, dropout, stochastic_depth, depth_mode, l2_lambda, seed},
                           true);
  return {results.y, results.aux, results.saved};
}

// Returns the gradients that `needed` asks for, in its order: a flag for x, then one for each
// tensor of `weights`.
template <class Backend>
TensorList linear_adapter_backward(const Tensor& grad_y, const std::optional<Tensor>& grad_aux,
                                   const Tensor& x, const TensorList& weights,
                                   const std::optional<Tensor>& order,
                                   const std::optional<Tensor>& offsets, const Tensor& saved,
                                   const std::vector<int64_t>& needed, int64_t activation,
                                   int64_t norm_position, double eps, bool residual,
                                   int64_t compute_type, double dropout, double stochastic_depth,
                                   int64_t depth_mode, const std::optional<Tensor>& l2_lambda,
                                   const std::optional<Tensor>& seed) {
  const LinearAdapterArguments arguments(x, weights, order, offsets, activation, norm_position, eps,
                                         residual, compute_type, dropout, stochastic_depth,
                                         depth_mode, l2_lambda, seed);
  constexpr const char* op = "linear_adapter_backward";
  LinearAdapterBackward problem{};
  static_cast<LinearAdapterProblem&>(problem) = arguments.problem();
  const Tensor& from = arguments.x();
  const ScalarType type = arguments.accumulate_type();
  check_device({op, "saved"}, saved, arguments.device());
  check_type({op, "saved"}, saved, {type});
  check_shape({op, "saved"}, saved, {saved_shape(problem)[0]});
  check_contiguous({op, "saved"}, saved);
  check_device({op, "grad_y"}, grad_y, arguments.device());
  check_type({op, "grad_y"}, grad_y, {from.scalar_type()});
  if (grad_y.sizes() != x.sizes()) {
    fail({op, "grad_y"}, "expected the shape of x, ", shape_text(x), ", got ", shape_text(grad_y));
  }
  const size_t count = weights.size() / 4;
  if (needed.size() != 1 + weights.size()) {
    fail({op, "needed"}, "expected ", 1 + weights.size(), " flags, got ", needed.size());
  }
  const Tensor grad = as_contiguous(grad_y);
  std::optional<Tensor> aux;
  if (grad_aux) {
    check_device({op, "grad_aux"}, *grad_aux, arguments.device());
    check_type({op, "grad_aux"}, *grad_aux, {type});
    check_shape({op, "grad_aux"}, *grad_aux, {problem.routing.adapters});
    aux = as_contiguous(*grad_aux);
  }
  TensorList results;
  std::vector<Memory> memory;
  const auto result = [&](const Tensor& like, int64_t flag) -> void* {
    if (!flag) return nullptr;
    const auto sizes = like.sizes();
    results.push_back(new_result(like, {sizes.begin(), sizes.end()}, like.scalar_type(), memory));
    return results.back().data_ptr();
  };
  problem.grad_x = result(from, needed[0]);
  std::vector<AdapterGradients> gradients(count);
  constexpr void* AdapterGradients::* fields[] = {&AdapterGradients::norm_weight,
                                                  &AdapterGradients::norm_bias,
                                                  &AdapterGradients::down, &AdapterGradients::up};
  for (size_t i = 0; i < weights.size(); ++i) {
    gradients[i % count].*fields[i / count] = result(weights[i], needed[1 + i]);
  }
  if (arguments.stacked()) {
    // Each adapter's gradients within the stacks, which are contiguous.
    const AdapterGradients first = gradients[0];
    const int64_t size = size_of(problem.weight_type);
    const int64_t width = problem.hidden_size, matrix = width * problem.largest_bottleneck;
    gradients.resize(static_cast<size_t>(problem.routing.adapters));
    for (int64_t a = 0; a < problem.routing.adapters; ++a) {
      const auto at = [&](void* base, int64_t elements) -> void* {
        return base ? static_cast<char*>(base) + a * elements * size : nullptr;
      };
      gradients[static_cast<size_t>(a)] = {at(first.norm_weight, width), at(first.norm_bias, width),
                                           at(first.down, matrix), at(first.up, matrix)};
    }
  }
  problem.x = from.data_ptr();
  problem.grad_y = grad.data_ptr();
  problem.grad_aux = aux ? aux->data_ptr() : nullptr;
  set_saved(problem, saved);
  problem.gradients = gradients.data();
  Backend::allocated(memory);
  Backend::run(problem, from);
  return results;
}

}  // namespace adapter_ext
