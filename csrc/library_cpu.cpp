// Defines the ops, and registers their CPU kernels.

#include <torch/csrc/stable/library.h>

#include "cpu/linear_adapter.h"
#include "cpu/memory.h"
#include "linear_adapter.h"
#include "route.h"
#include "schemas.h"

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
  static void allocated(const std::vector<Memory>& results) { cpu::prepare(results, parallel()); }

  template <class Problem>
  static void run(const Problem& problem, const Tensor&) {
    cpu::linear_adapter(problem, parallel());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY(adapter_ext, library) { define_ops(library); }

STABLE_TORCH_LIBRARY_IMPL(adapter_ext, CPU, library) {
  library.impl("route", TORCH_BOX(&route_cpu));
  library.impl("linear_adapter", TORCH_BOX(&linear_adapter<CpuBackend>));
  library.impl("linear_adapter_forward", TORCH_BOX(&linear_adapter_forward<CpuBackend>));
  library.impl("linear_adapter_backward", TORCH_BOX(&linear_adapter_backward<CpuBackend>));
}

}  // namespace adapter_ext
