// What lets one header serve C++ and CUDA.
#pragma once

#if defined(__CUDACC__)
#define ADAPTER_EXT_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: CPU kernels are compiled once for each instruction set, and a shared out-of-line
// copy of one of these functions could hold instructions that another machine lacks.
#define ADAPTER_EXT_HOST_DEVICE inline __attribute__((always_inline))
#endif
