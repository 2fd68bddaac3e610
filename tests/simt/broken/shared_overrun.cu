// out is in, by way of shared memory that may be one element too small.
#include "kernel_test.h"

__global__ void shared_overrun(const __grid_constant__ Params params) {
  float* shared = reinterpret_cast<float*>(adapter_ext::cuda::shared_memory());
  const unsigned i = threadIdx.x;
  shared[i] = params.in[i];
  __syncthreads();
  params.out[i] = shared[i];
}
#if defined(BROKEN)
SIMT_RUN(shared_overrun, 1, 64, 63 * sizeof(float))
#else
SIMT_RUN(shared_overrun, 1, 64, 64 * sizeof(float))
#endif
