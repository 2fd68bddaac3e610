// out is in, by one thread more than there are elements.
#include "kernel_test.h"

__global__ void global_overrun(const __grid_constant__ Params params) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
#if defined(BROKEN)
  if (i <= 64) params.out[i] = params.in[i];
#else
  if (i < 64) params.out[i] = params.in[i];
#endif
}
SIMT_RUN(global_overrun, 3, 32, 0)
