// The schemas of all ops.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace adapter_ext {

inline void define_ops(torch::stable::detail::StableLibrary& library) {
  library.def("route(Tensor ids, int num_adapters) -> (Tensor order, Tensor offsets)");
  // Options that a call leaves at the end cost it nothing: each argument that Python passes takes
  // some 0.3 us.
  const std::string inputs = "Tensor[] weights, Tensor? order=None, Tensor? offsets=None";
  const std::string options =
      "int activation=4, int norm_position=0, float eps=1e-5, bool residual=True, "
      "int compute_type=-1, float dropout=0., float stochastic_depth=0., int depth_mode=0, "
      "Tensor? l2_lambda=None, Tensor? seed=None";
  library.def(
      ("linear_adapter(Tensor x, " + inputs + ", " + options + ") -> (Tensor y, Tensor aux)")
          .c_str());
  library.def(("linear_adapter_forward(Tensor x, " + inputs + ", " + options +
               ") -> (Tensor y, Tensor aux, Tensor saved)")
                  .c_str());
  library.def(
      ("linear_adapter_backward(Tensor grad_y, Tensor? grad_aux, Tensor x, Tensor[] weights, "
       "Tensor? order, Tensor? offsets, Tensor saved, int[] needed, " +
       options + ") -> Tensor[]")
          .c_str());
}

}  // namespace adapter_ext
