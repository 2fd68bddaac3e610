// What kernels use of the machine: built-ins, instructions behind thin wrappers, and launching.
//
// A C++ compiler takes the same names from tests/simt, which runs kernels without a GPU.
#pragma once

#include <cstdint>

namespace adapter_ext::cuda {

// Where an address lies.
enum class Space { kGlobal, kShared };

}  // namespace adapter_ext::cuda

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Assertions report what no host code sees, such as ids out of range, and stay in release builds.
#undef NDEBUG
#include <cassert>
#include <stdexcept>
#include <string>

namespace adapter_ext::cuda {

// The block's shared memory, 16-byte aligned.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char shared[];
  return shared;
}

// A number that the compiler takes for another one each time. What is made of it is made where it
// is used, rather than once before a loop, to be kept in registers that sums have to leave.
__device__ __forceinline__ int here(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Stops the kernel with an error where something does not hold. An assert says more, but is a call,
// around which a kernel's registers are saved to memory.
__device__ __forceinline__ void require(bool holds) {
  if (!holds) __trap();
}

// A quotient of positive numbers: of floats, one that may be two units in the last place away.
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }

// Starts a copy of 16 bytes to shared memory, both ends aligned; bytes from `count` on become zero,
// and are not read.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int count) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(count)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
// Waits until at most `groups` of this thread's latest groups of copies are still under way.
template <int groups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(groups) : "memory");
}

// For kernels that a launch may have begin before those launched before them are done. The former
// says that the next kernel may begin, when all blocks have; the latter waits until the kernels
// before are done and what they wrote can be read. All threads of a kernel that may begin early
// have to wait, or who comes next might not see what the kernels before have done.
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Loads four 8 x 8 matrices of 16-bit elements; lane 8 m + i names row i (16 bytes, aligned) of
// matrix m. A lane gets elements 2 (lane % 4) and the next of row lane / 4 of each, or of its
// column where `transposed`.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* shared) {
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(shared))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(shared))
                 : "memory");
  }
}

// sum [16, 8] += a [16, 16] b [16, 8] (8 and 8 for TF32), fragments as the PTX manual has them
// for mma.m16n8k16 and mma.m16n8k8.
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_add_tf32(float (&sum)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Writes two or four words to an address aligned to them. Not left to nvcc, which makes several
// narrow stores of it in large kernels.
template <Space space>
__device__ __forceinline__ void store_words(void* to, const uint32_t (&words)[4]) {
  if constexpr (space == Space::kShared) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(shared_address(to)),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  } else {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }
}
template <Space space>
__device__ __forceinline__ void store_words(void* to, const uint32_t (&words)[2]) {
  if constexpr (space == Space::kShared) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};\n" ::"r"(shared_address(to)), "r"(words[0]),
                 "r"(words[1])
                 : "memory");
  } else {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};\n" ::"l"(to), "r"(words[0]), "r"(words[1])
                 : "memory");
  }
}
template <Space space>
__device__ __forceinline__ void store_words(void* to, const uint32_t (&word)[1]) {
  *static_cast<uint32_t*>(to) = word[0];
}

// The bits of two floats rounded to 16 bits, the first lower.
__device__ __forceinline__ uint32_t round_pair(float first, float second, __nv_bfloat16) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}
__device__ __forceinline__ uint32_t round_pair(float first, float second, __half) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}
// Two 16-bit numbers as floats, the lower first.
__device__ __forceinline__ void unpack_pair(float (&to)[2], uint32_t bits, __nv_bfloat16) {
  to[0] = __uint_as_float(bits << 16);
  to[1] = __uint_as_float(bits & 0xffff0000u);
}
__device__ __forceinline__ void unpack_pair(float (&to)[2], uint32_t bits, __half) {
  to[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  to[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16)));
}
// The bits of a float rounded to TF32.
__device__ __forceinline__ float round_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

// What the launchers need to know of the current device.
struct Limits {
  int multiprocessors;
  int shared_memory;  // bytes, of a block
};

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

inline Limits device_limits() {
  int device = 0;
  Limits limits{};
  check(cudaGetDevice(&device), "the current CUDA device");
  check(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "the device's multiprocessors");
  check(cudaDeviceGetAttribute(&limits.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                               device),
        "the device's shared memory");
  return limits;
}

// Whether a kernel may begin before the ones before are done.
enum class Begins { kInTurn, kEarly };

// Runs kernel(params) in `blocks` blocks of `threads` threads, each block with `shared` bytes of
// shared memory. A kernel that begins early calls wait_for_previous(); the device has to know how,
// and the kernel's code to be made for such a device.
template <class Params>
void launch(const char* name, void (*kernel)(Params), int64_t blocks, int threads, int64_t shared,
            cudaStream_t stream, const Params& params, Begins begins = Begins::kInTurn) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string(name) + ": too many rows: they take " +
                             std::to_string(blocks) + " blocks, a launch has at most " +
                             std::to_string(INT32_MAX));
  }
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared > 48 * 1024) {
    const int most = device_limits().shared_memory;
    if (shared > most) {
      throw std::runtime_error(std::string(name) + ": needs " + std::to_string(shared) +
                               " bytes of shared memory a block, the device has " +
                               std::to_string(most));
    }
    // Not what this launch has: another thread may be about to launch it with more.
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  if (begins == Begins::kEarly) {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, function), name);
    if (attributes.ptxVersion >= 90) {
      cudaLaunchAttribute early{};
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early.val.programmaticStreamSerializationAllowed = 1;
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(static_cast<unsigned>(blocks));
      config.blockDim = dim3(static_cast<unsigned>(threads));
      config.dynamicSmemBytes = static_cast<size_t>(shared);
      config.stream = stream;
      config.attrs = &early;
      config.numAttrs = 1;
      return check(cudaLaunchKernelExC(&config, function, arguments), name);
    }
  }
  check(cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads)), arguments,
                         static_cast<size_t>(shared), stream),
        name);
}

}  // namespace adapter_ext::cuda

#else
#include "simt.h"
#endif
