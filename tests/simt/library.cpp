// The ops of csrc/library_cpu.cpp once more, as adapter_ext_simt, on CPU tensors: by the CUDA
// kernels, which a simulator runs.

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cuda/linear_adapter.h"
#include "linear_adapter.h"
#include "route.h"
#include "schemas.h"

// Of the PTX simulator; null in the stand-in, where AddressSanitizer knows what may be touched.
extern "C" __attribute__((weak)) void ptxsim_register_range(const void*, size_t, const char*);
extern "C" __attribute__((weak)) void ptxsim_unregister_range(const void*);

namespace adapter_ext {
namespace {

// The memory that a call may touch: any other is an error.
class Allowed {
 public:
  Allowed() = default;
  Allowed(const Allowed&) = delete;
  ~Allowed() {
    for (const void* memory : memory_) ptxsim_unregister_range(memory);
  }
  void add(const char* name, const void* memory, int64_t bytes) {
    if (!ptxsim_register_range || !memory || bytes <= 0) return;
    ptxsim_register_range(memory, static_cast<size_t>(bytes), name);
    memory_.push_back(memory);
  }

 private:
  std::vector<const void*> memory_;
};

int64_t size_of_sums(const LinearAdapterProblem& p) {
  return p.data_type == DataType::kFloat64 ? 8 : 4;
}

void allow_inputs(Allowed& allowed, const LinearAdapterProblem& p) {
  const int64_t adapters = p.routing.adapters, width = p.hidden_size;
  const int64_t size = size_of(p.weight_type);
  allowed.add("seed", p.seed, 8);
  allowed.add("order", p.routing.order, 8 * p.routing.samples);
  allowed.add("offsets", p.routing.offsets, 8 * (adapters + 1));
  allowed.add("l2_lambda", p.l2_lambda, adapters * size_of_sums(p));
  for (int64_t a = 0; a < adapters; ++a) {
    const AdapterView& view = p.adapters.list ? p.adapters.list[a] : p.adapters.first;
    const auto add = [&](const char* name, const void* first, int64_t step, int64_t elements) {
      const int64_t offset = p.adapters.list ? 0 : a * step;
      allowed.add(name, static_cast<const char*>(first) + offset, elements * size);
    };
    const int64_t r = view.bottleneck;
    add("norm_weight", view.norm_weight, p.adapters.norm_weight_step, width);
    add("norm_bias", view.norm_bias, p.adapters.norm_bias_step, width);
    add("down", view.down, p.adapters.down_step, (r - 1) * view.down_stride + width);
    add("up", view.up, p.adapters.up_step, (width - 1) * view.up_stride + r);
  }
}
void allow_saved(Allowed& allowed, const LinearAdapterProblem& p, const void* hidden,
                 const void* mean, const void* rstd) {
  allowed.add("hidden", hidden, p.rows * p.largest_bottleneck * size_of_sums(p));
  allowed.add("mean", mean, p.rows * size_of_sums(p));
  allowed.add("rstd", rstd, p.rows * size_of_sums(p));
}
void allow(Allowed& allowed, const LinearAdapterForward& p) {
  const int64_t bytes = p.rows * p.hidden_size * size_of(p.data_type);
  allow_inputs(allowed, p);
  allow_saved(allowed, p, p.hidden, p.mean, p.rstd);
  allowed.add("x", p.x, bytes);
  allowed.add("y", p.y, bytes);
  allowed.add("aux", p.aux, p.routing.adapters * size_of_sums(p));
}
void allow(Allowed& allowed, const LinearAdapterBackward& p) {
  const int64_t bytes = p.rows * p.hidden_size * size_of(p.data_type);
  allow_inputs(allowed, p);
  allow_saved(allowed, p, p.hidden, p.mean, p.rstd);
  allowed.add("x", p.x, bytes);
  allowed.add("grad_y", p.grad_y, bytes);
  allowed.add("grad_x", p.grad_x, bytes);
  allowed.add("grad_aux", p.grad_aux, p.routing.adapters * size_of_sums(p));
  for (int64_t a = 0; a < p.routing.adapters; ++a) {
    const int64_t vector = p.hidden_size * size_of(p.weight_type);
    const int64_t matrix =
        vector * (p.adapters.list ? p.adapters.list[a] : p.adapters.first).bottleneck;
    allowed.add("grad_norm_weight", p.gradients[a].norm_weight, vector);
    allowed.add("grad_norm_bias", p.gradients[a].norm_bias, vector);
    allowed.add("grad_down", p.gradients[a].down, matrix);
    allowed.add("grad_up", p.gradients[a].up, matrix);
  }
}

// Memory of exactly the size that a launcher asks for, full of NaN.
class Workspace {
 public:
  Workspace(Allowed& allowed, int64_t bytes) {
    void* memory = nullptr;
    const size_t size = static_cast<size_t>(bytes);
    if (posix_memalign(&memory, 256, size) != 0) throw std::bad_alloc();
    memory_.reset(memory);
    std::memset(memory, 0xff, size);
    allowed.add("workspace", memory, bytes);
  }
  void* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
};

struct SimulatedBackend {
  static void allocated(const std::vector<Memory>&) {}

  template <class Problem>
  static void run(const Problem& problem, const Tensor&) {
    Allowed allowed;
    allow(allowed, problem);
    const Workspace workspace(allowed, cuda::workspace_bytes(problem));
    cuda::linear_adapter(problem, workspace.get(), nullptr);
  }
};

std::tuple<Tensor, Tensor> route_simulated(const Tensor& ids, int64_t num_adapters) {
  const RouteTensors tensors = check_route(ids, num_adapters);
  const int64_t samples = tensors.ids.numel();
  Allowed allowed;
  allowed.add("ids", tensors.ids.data_ptr(), 8 * samples);
  allowed.add("order", tensors.order.data_ptr(), 8 * samples);
  allowed.add("offsets", tensors.offsets.data_ptr(), 8 * (num_adapters + 1));
  const Workspace workspace(allowed, cuda::route_workspace_bytes(samples, num_adapters));
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
