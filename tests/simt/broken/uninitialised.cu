// out is in, by way of shared memory of which the last quarter is written by others.
#include "kernel_test.h"

__global__ void uninitialised(const __grid_constant__ Params params) {
  float* shared = reinterpret_cast<float*>(adapter_ext::cuda::shared_memory());
  const unsigned i = threadIdx.x;
  if (i < 48) shared[i] = params.in[i];
#if !defined(BROKEN)
  if (i < 16) shared[48 + i] = params.in[48 + i];
#endif
  __syncthreads();
  params.out[i] = shared[i];
}
SIMT_RUN(uninitialised, 1, 64, 64 * sizeof(float))
