// The launchers of linear_adapter: adapters in launch parameters, and the choice of types.
#include <stdexcept>
#include <string>

#include "cuda/instances.h"
#include "cuda/linear_adapter.h"

namespace adapter_ext::cuda {
namespace {

// Lists that the launch parameters of other kernels have no room for are brought to device memory
// by those of a kernel that has no others, some at a time: a copy from the caller's memory could
// not be captured in a CUDA graph.
template <int most>
struct ListParams {
  Adapter* to;
  int count;
  Adapter from[most];
};
constexpr int kShortList = 64, kLongList = 320;
static_assert(sizeof(ListParams<kLongList>) <= 32764);  // as many bytes as a launch can have

template <int most>
__global__ void list_kernel(const __grid_constant__ ListParams<most> params) {
  const int words = params.count * static_cast<int>(sizeof(Adapter) / 8);
  uint64_t* to = reinterpret_cast<uint64_t*>(params.to);
  const uint64_t* from = reinterpret_cast<const uint64_t*>(params.from);
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) to[i] = from[i];
}

const AdapterGradients* gradients_of(const LinearAdapterForward&) { return nullptr; }
const AdapterGradients* gradients_of(const LinearAdapterBackward& problem) {
  return problem.gradients;
}

// Kernels count columns, and the elements of a tile's rows of the bottleneck, in 32 bits.
void check_widths(const LinearAdapterProblem& problem) {
  constexpr int64_t limit = int64_t{1} << 24;
  if (problem.hidden_size >= limit || problem.largest_bottleneck >= limit) {
    throw std::runtime_error(
        "linear_adapter: x: expected D and bottlenecks below 2^24 on a CUDA device, got " +
        std::to_string(problem.hidden_size) + " and " + std::to_string(problem.largest_bottleneck));
  }
}

template <class ProblemType>
Call<ProblemType> make_call(const ProblemType& problem, void* workspace, int64_t* bytes,
                            Stream stream) {
  check_widths(problem);
  Call<ProblemType> call{problem, {}, device_limits(), workspace, bytes, stream};
  const AdapterTable& table = problem.adapters;
  const AdapterGradients* gradients = gradients_of(problem);
  Adapters& adapters = call.adapters;
  const int64_t count = problem.routing.adapters;
  if (!table.list) {
    const int64_t size = size_of(problem.weight_type);
    adapters.stacked = true;
    adapters.adapter[0] = {table.first, gradients && count ? gradients[0] : AdapterGradients{}};
    adapters.norm_weight_step = table.norm_weight_step;
    adapters.norm_bias_step = table.norm_bias_step;
    adapters.down_step = table.down_step;
    adapters.up_step = table.up_step;
    adapters.gradient_vector_step = problem.hidden_size * size;
    adapters.gradient_matrix_step = problem.hidden_size * problem.largest_bottleneck * size;
    return call;
  }
  const auto some = [&](Adapter* to, int64_t first, int64_t number) {
    for (int64_t i = 0; i < number; ++i) {
      to[i] = {table.list[first + i], gradients ? gradients[first + i] : AdapterGradients{}};
    }
  };
  if (count <= Adapters::kInline) {
    some(adapters.adapter, 0, count);
    return call;
  }
  Carver carver(workspace);
  Adapter* list = carver.take<Adapter>(count);
  adapters.list = list;
  call.workspace = workspace ? static_cast<char*>(workspace) + carver.bytes() : nullptr;
  if (bytes) {
    *bytes = carver.bytes();
    return call;
  }
  const auto bring = [&]<int most>(int64_t first) {
    ListParams<most> params;
    params.to = list + first;
    params.count = static_cast<int>(std::min<int64_t>(count - first, most));
    some(params.from, first, params.count);
    launch("linear_adapter's list of adapters", &list_kernel<most>, 1, kThreads, 0, stream, params);
  };
  int64_t first = 0;
  for (; count - first > kShortList; first += kLongList) {
    bring.template operator()<kLongList>(first);
  }
  if (first < count) bring.template operator()<kShortList>(first);
  return call;
}

template <template <class, class> class Kernels, class ProblemType>
void dispatch(const Call<ProblemType>& call) {
  const LinearAdapterProblem& p = call.problem;
  const auto run = [&]<class X, class P>() { Kernels<X, P>::run(call); };
  // Tensor cores round operands to 16 bits: where x and the weights have those bits already, or
  // where the caller asks for it (as autocast does, with x of 16 bits and weights of float32).
  switch (p.data_type) {
    case DataType::kFloat64: return run.template operator()<double, MultiplyAdd<double>>();
    case DataType::kFloat32:
      switch (p.operand_type) {
        case DataType::kBFloat16:
          return run.template operator()<float, TensorCore<__nv_bfloat16>>();
        case DataType::kFloat16: return run.template operator()<float, TensorCore<__half>>();
        default:
          return p.tf32 ? run.template operator()<float, Tf32>()
                        : run.template operator()<float, MultiplyAdd<float>>();
      }
    case DataType::kBFloat16:
      return p.operand_type == p.data_type
                 ? run.template operator()<__nv_bfloat16, TensorCore<__nv_bfloat16>>()
                 : run.template operator()<__nv_bfloat16, MultiplyAdd<float>>();
    case DataType::kFloat16:
      return p.operand_type == p.data_type ? run.template operator()<__half, TensorCore<__half>>()
                                           : run.template operator()<__half, MultiplyAdd<float>>();
  }
}

template <template <class, class> class Kernels, class ProblemType>
int64_t bytes_of(const ProblemType& problem) {
  int64_t list = 0;
  auto call = make_call(problem, nullptr, &list, nullptr);
  int64_t own = 0;
  call.bytes = &own;
  dispatch<Kernels>(call);
  return list + own;
}

}  // namespace

int64_t workspace_bytes(const LinearAdapterForward& problem) { return bytes_of<Forward>(problem); }
int64_t workspace_bytes(const LinearAdapterBackward& problem) {
  return bytes_of<Backward>(problem);
}

void linear_adapter(const LinearAdapterForward& problem, void* workspace, Stream stream) {
  dispatch<Forward>(make_call(problem, workspace, nullptr, stream));
}
void linear_adapter(const LinearAdapterBackward& problem, void* workspace, Stream stream) {
  dispatch<Backward>(make_call(problem, workspace, nullptr, stream));
}

}  // namespace adapter_ext::cuda
