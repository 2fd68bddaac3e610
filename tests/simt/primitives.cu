// One instruction, or exchange between lanes, for each function; test_simt_checks.py has
// references.
#include <exception>

#include "cuda/device.cuh"

namespace {

struct Params {
  const void* in;
  const void* other;
  void* out;
  int argument, width;
  unsigned mask;
};

template <class T>
__device__ const T* own(const void* from, int count) {
  return static_cast<const T*>(from) + threadIdx.x * count;
}
template <class T>
__device__ T* own(void* to, int count) {
  return static_cast<T*>(to) + threadIdx.x * count;
}

// Fragments of all lanes: a [32, 4] and b [32, 2] in `in`, sums [32, 4] in `out`.
template <class T>
__global__ void multiply_kernel(const __grid_constant__ Params params) {
  uint32_t a[4], b[2];
  float sum[4];
  for (int i = 0; i < 4; ++i) a[i] = own<uint32_t>(params.in, 4)[i];
  for (int i = 0; i < 2; ++i) b[i] = own<uint32_t>(params.other, 2)[i];
  for (int i = 0; i < 4; ++i) sum[i] = own<float>(params.out, 4)[i];
  if constexpr (std::is_same_v<T, float>) {
    adapter_ext::cuda::multiply_add_tf32(sum, a, b);
  } else {
    adapter_ext::cuda::multiply_add(sum, a, b, T{});
  }
  for (int i = 0; i < 4; ++i) own<float>(params.out, 4)[i] = sum[i];
}

// `in` is 64 rows of 8 elements of 16 bits, `other` the rows [32] that lanes name.
template <bool transposed>
__global__ void load_matrices_kernel(const __grid_constant__ Params params) {
  uint16_t* shared = reinterpret_cast<uint16_t*>(adapter_ext::cuda::shared_memory());
  for (int i = 0; i < 16; ++i) {
    shared[threadIdx.x * 16 + i] = own<uint16_t>(params.in, 16)[i];
  }
  __syncwarp();
  uint32_t to[4];
  adapter_ext::cuda::load_matrices<transposed>(to, shared + 8 * *own<int>(params.other, 1));
  for (int i = 0; i < 4; ++i) own<uint32_t>(params.out, 4)[i] = to[i];
}

enum Exchange { kIndexed, kXor, kDown, kUp };

template <class T, Exchange exchange>
__global__ void shuffle_kernel(const __grid_constant__ Params params) {
  if (!(params.mask >> threadIdx.x & 1)) return;
  const T value = *own<T>(params.in, 1);
  T& out = *own<T>(params.out, 1);
  const int n = params.argument, width = params.width;
  if constexpr (exchange == kIndexed) out = __shfl_sync(params.mask, value, n, width);
  if constexpr (exchange == kXor) out = __shfl_xor_sync(params.mask, value, n, width);
  if constexpr (exchange == kDown) out = __shfl_down_sync(params.mask, value, n, width);
  if constexpr (exchange == kUp) out = __shfl_up_sync(params.mask, value, n, width);
}

// Four results for each lane: match_any, ballot, any, all.
template <class T>
__global__ void vote_kernel(const __grid_constant__ Params params) {
  if (!(params.mask >> threadIdx.x & 1)) return;
  const T value = *own<T>(params.in, 1);
  unsigned* out = own<unsigned>(params.out, 4);
  const bool large = value > static_cast<T>(params.argument);
  out[0] = __match_any_sync(params.mask, value);
  out[1] = __ballot_sync(params.mask, large);
  out[2] = __any_sync(params.mask, large);
  out[3] = __all_sync(params.mask, large);
}

// `in` is floats [argument]; `out` gets the bits of a type.
template <class T>
__global__ void round_kernel(const __grid_constant__ Params params) {
  for (int i = static_cast<int>(threadIdx.x); i < params.argument; i += 32) {
    static_cast<T*>(params.out)[i] = T(static_cast<const float*>(params.in)[i]);
  }
}
template <class T>
__global__ void widen_kernel(const __grid_constant__ Params params) {
  for (int i = static_cast<int>(threadIdx.x); i < params.argument; i += 32) {
    static_cast<float*>(params.out)[i] = static_cast<float>(static_cast<const T*>(params.in)[i]);
  }
}
__global__ void round_tf32_kernel(const __grid_constant__ Params params) {
  for (int i = static_cast<int>(threadIdx.x); i < params.argument; i += 32) {
    static_cast<float*>(params.out)[i] =
        adapter_ext::cuda::round_tf32(static_cast<const float*>(params.in)[i]);
  }
}

// out [6]: the sum, maximum and minimum of in [64], by two blocks; whether a block has a value
// above `argument`, as all its threads know.
__global__ void atomics_kernel(const __grid_constant__ Params params) {
  int* out = static_cast<int*>(params.out);
  const int value = static_cast<const int*>(params.in)[blockIdx.x * 32 + threadIdx.x];
  atomicAdd(&out[0], value);
  atomicMax(&out[1], value);
  atomicMin(&out[2], value);
  if (__syncthreads_or(value > params.argument)) atomicAdd(&out[3 + blockIdx.x], 1);
}

using Kernel = void (*)(Params);
constexpr Kernel kKernels[] = {
    &multiply_kernel<__nv_bfloat16>,
    &multiply_kernel<__half>,
    &multiply_kernel<float>,
    &load_matrices_kernel<false>,
    &load_matrices_kernel<true>,
    &round_kernel<__nv_bfloat16>,
    &round_kernel<__half>,
    &round_tf32_kernel,
    &widen_kernel<__nv_bfloat16>,
    &widen_kernel<__half>,
    &atomics_kernel,
    &vote_kernel<unsigned>,
    &vote_kernel<unsigned long long>,
};
constexpr const char* kNames[] = {
    "multiply_bfloat16", "multiply_float16", "multiply_tf32", "load_matrices",  "load_transposed",
    "round_bfloat16",    "round_float16",    "round_tf32",    "widen_bfloat16", "widen_float16",
    "atomics",           "vote_uint32",      "vote_uint64",
};
static_assert(std::size(kKernels) == std::size(kNames));

template <class T>
constexpr Kernel kShuffles[] = {&shuffle_kernel<T, kIndexed>, &shuffle_kernel<T, kXor>,
                                &shuffle_kernel<T, kDown>, &shuffle_kernel<T, kUp>};

Kernel find(const std::string& name, int exchange) {
  if (name == "int32") return kShuffles<int>[exchange];
  if (name == "uint32") return kShuffles<unsigned>[exchange];
  if (name == "float32") return kShuffles<float>[exchange];
  if (name == "float64") return kShuffles<double>[exchange];
  if (name == "int64") return kShuffles<int64_t>[exchange];
  if (name == "uint64") return kShuffles<unsigned long long>[exchange];
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (name == kNames[i]) return kKernels[i];
  }
  throw std::runtime_error(name);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) bool run_primitive(const char* name, int exchange,
                                                                     const void* in,
                                                                     const void* other, void* out,
                                                                     int argument, int width,
                                                                     unsigned mask) {
  try {
    const int blocks = std::string(name) == "atomics" ? 2 : 1;
    adapter_ext::cuda::launch(name, find(name, exchange), blocks, 32, 1024, nullptr,
                              Params{in, other, out, argument, width, mask});
    return true;
  } catch (const std::exception&) {
    return false;
  }
}
