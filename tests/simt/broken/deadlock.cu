// out is the sum of in over a warp.
#include "kernel_test.h"

__global__ void deadlock(const __grid_constant__ Params params) {
  const unsigned i = threadIdx.x;
  float sum = params.in[i];
#if defined(BROKEN)
  if (i == 7) __syncthreads();
#endif
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  params.out[i] = sum;
}
SIMT_RUN(deadlock, 1, 64, 0)
