// The schemas of all ops, and their CPU kernels.

#include <torch/csrc/stable/library.h>

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
  static void run(const Problem& problem) {
    cpu::linear_adapter(problem, parallel());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY(adapter_ext, library) {
  library.def("route(Tensor ids, int num_adapters) -> (Tensor order, Tensor offsets)");
  library.def(
      "linear_adapter_forward(Tensor x, Tensor[] norm_weight, Tensor[] norm_bias, Tensor[] down, "
      "Tensor[] up, Tensor? order, Tensor? offsets, int activation, int norm_position, float eps, "
      "float dropout, float stochastic_depth, int depth_mode, bool residual, Tensor? l2_lambda, "
      "Tensor? seed, int compute_type, bool save) -> (Tensor y, Tensor aux, Tensor hidden, "
      "Tensor mean, Tensor rstd)");
  library.def(
      "linear_adapter_backward(Tensor grad_y, Tensor? grad_aux, Tensor x, Tensor[] norm_weight, "
      "Tensor[] norm_bias, Tensor[] down, Tensor[] up, Tensor? order, Tensor? offsets, Tensor "
      "hidden, Tensor mean, Tensor rstd, int activation, int norm_position, float eps, float "
      "dropout, float stochastic_depth, int depth_mode, bool residual, Tensor? l2_lambda, Tensor? "
      "seed, int compute_type, int[] needed) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(adapter_ext, CPU, library) {
  library.impl("route", TORCH_BOX(&route_cpu));
  library.impl("linear_adapter_forward", TORCH_BOX(&linear_adapter_forward<CpuBackend>));
  library.impl("linear_adapter_backward", TORCH_BOX(&linear_adapter_backward<CpuBackend>));
}

}  // namespace adapter_ext
