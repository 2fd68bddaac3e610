// The ops of csrc/library_cpu.cpp once more, as adapter_ext_simt, on CPU tensors: by the CUDA
// kernels, which a simulator runs.

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "cuda/linear_adapter.h"
#include "linear_adapter.h"
#include "route.h"
#include "schemas.h"

namespace adapter_ext {
namespace {

// Memory of exactly the size that a launcher asks for, full of NaN.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    void* memory = nullptr;
    const size_t size = static_cast<size_t>(bytes);
    if (posix_memalign(&memory, 256, size) != 0) throw std::bad_alloc();
    memory_.reset(memory);
    std::memset(memory, 0xff, size);
  }
  void* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
};

struct SimulatedBackend {
  template <class Problem>
  static void run(const Problem& problem, const Tensor&) {
    const Workspace workspace(cuda::workspace_bytes(problem));
    cuda::linear_adapter(problem, workspace.get(), nullptr);
  }
};

std::tuple<Tensor, Tensor> route_simulated(const Tensor& ids, int64_t num_adapters) {
  const RouteTensors tensors = check_route(ids, num_adapters);
  const int64_t samples = tensors.ids.numel();
  const Workspace workspace(cuda::route_workspace_bytes(samples, num_adapters));
  cuda::route(static_cast<const int64_t*>(tensors.ids.data_ptr()), samples, num_adapters,
              static_cast<int64_t*>(tensors.order.data_ptr()),
              static_cast<int64_t*>(tensors.offsets.data_ptr()), workspace.get(), nullptr);
  return {tensors.order, tensors.offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY(adapter_ext_simt, library) { define_ops(library); }

STABLE_TORCH_LIBRARY_IMPL(adapter_ext_simt, CPU, library) {
  library.impl("route", TORCH_BOX(&route_simulated));
  library.impl("linear_adapter", TORCH_BOX(&linear_adapter<SimulatedBackend>));
  library.impl("linear_adapter_forward", TORCH_BOX(&linear_adapter_forward<SimulatedBackend>));
  library.impl("linear_adapter_backward", TORCH_BOX(&linear_adapter_backward<SimulatedBackend>));
}

}  // namespace adapter_ext
