// The schemas of all ops, and their CPU kernels.

#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/linear_adapter.h"
#include "linear_adapter.h"
#include "route.h"

namespace adapter_ext {
namespace {

cpu::Parallel parallel() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t tasks, void (*body)(int64_t, void*), void* context) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t task = begin; task < end; ++task) body(task, context);
            });
          }};
}

struct CpuBackend {
  template <class Problem>
  static void run(const Problem& problem, const Tensor&) {
    cpu::linear_adapter(problem, parallel());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY(adapter_ext, library) {
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

STABLE_TORCH_LIBRARY_IMPL(adapter_ext, CPU, library) {
  library.impl("route", TORCH_BOX(&route_cpu));
  library.impl("linear_adapter", TORCH_BOX(&linear_adapter<CpuBackend>));
  library.impl("linear_adapter_forward", TORCH_BOX(&linear_adapter_forward<CpuBackend>));
  library.impl("linear_adapter_backward", TORCH_BOX(&linear_adapter_backward<CpuBackend>));
}

}  // namespace adapter_ext
