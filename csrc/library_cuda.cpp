// The ops' CUDA kernels. Loaded only into a torch that was built for CUDA.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cuda/linear_adapter.h"
#include "linear_adapter.h"
#include "route.h"

// Declared by torch where it is itself compiled for CUDA; we use no CUDA headers.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace adapter_ext {
namespace {

cuda::Stream current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cuda::Stream>(stream);
}

// Device memory that a launch needs. The allocator gives it to others on the same stream alone, so
// it may be freed as soon as the launch is queued.
Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {(bytes + 7) / 8}, ScalarType::Long);
}

struct CudaBackend {
  static void allocated(const std::vector<Memory>&) {}

  template <class Problem>
  static void run(const Problem& problem, const Tensor& x) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const Tensor memory = workspace(x, cuda::workspace_bytes(problem));
    cuda::linear_adapter(problem, memory.data_ptr(), current_stream(x));
  }
};

std::tuple<Tensor, Tensor> route_cuda(const Tensor& ids, int64_t num_adapters) {
  const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  const RouteTensors tensors = check_route(ids, num_adapters);
  const int64_t count = tensors.ids.numel();
  const Tensor memory = workspace(ids, cuda::route_workspace_bytes(count, num_adapters));
  cuda::route(static_cast<const int64_t*>(tensors.ids.data_ptr()), count, num_adapters,
              static_cast<int64_t*>(tensors.order.data_ptr()),
              static_cast<int64_t*>(tensors.offsets.data_ptr()), memory.data_ptr(),
              current_stream(ids));
  return {tensors.order, tensors.offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adapter_ext, CUDA, library) {
  library.impl("route", TORCH_BOX(&route_cuda));
  library.impl("linear_adapter", TORCH_BOX(&linear_adapter<CudaBackend>));
  library.impl("linear_adapter_forward", TORCH_BOX(&linear_adapter_forward<CudaBackend>));
  library.impl("linear_adapter_backward", TORCH_BOX(&linear_adapter_backward<CudaBackend>));
}

}  // namespace adapter_ext
