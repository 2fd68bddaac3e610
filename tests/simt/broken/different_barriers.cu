// out is in; warps wait in different places of the code.
#include "kernel_test.h"

__global__ void different_barriers(const __grid_constant__ Params params) {
  const unsigned i = threadIdx.x;
#if defined(BROKEN)
  if (i < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
#else
  __syncthreads();
#endif
  params.out[i] = params.in[i];
}
SIMT_RUN(different_barriers, 1, 64, 0)
