// out is in, reversed by way of shared memory.
#include "kernel_test.h"

__global__ void missing_syncthreads(const __grid_constant__ Params params) {
  float* shared = reinterpret_cast<float*>(adapter_ext::cuda::shared_memory());
  shared[threadIdx.x] = 0.0f;
  __syncthreads();
  shared[threadIdx.x] = params.in[threadIdx.x];
#if !defined(BROKEN)
  __syncthreads();
#endif
  params.out[threadIdx.x] = shared[63 - threadIdx.x];
}
SIMT_RUN(missing_syncthreads, 1, 64, 64 * sizeof(float))
