// out is in plus the sum of in.
#include "kernel_test.h"

__global__ void divergent_barrier(const __grid_constant__ Params params) {
  float* shared = reinterpret_cast<float*>(adapter_ext::cuda::shared_memory());
  const unsigned i = threadIdx.x;
  shared[i] = params.in[i];
  __syncthreads();
#if defined(BROKEN)
  if (i < 48) __syncthreads();
  if (i >= 48) {
    params.out[i] = 0.0f;
    return;
  }
#else
  __syncthreads();
#endif
  float sum = 0.0f;
  for (int k = 0; k < 64; ++k) sum += shared[k];
  params.out[i] = params.in[i] + sum;
}
SIMT_RUN(divergent_barrier, 1, 64, 64 * sizeof(float))
