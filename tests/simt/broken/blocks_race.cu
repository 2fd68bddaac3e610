// out is in; both blocks may write its middle.
#include "kernel_test.h"

__global__ void blocks_race(const __grid_constant__ Params params) {
#if defined(BROKEN)
  const unsigned i = blockIdx.x * 31 + threadIdx.x;
#else
  const unsigned i = blockIdx.x * 32 + threadIdx.x;
#endif
  params.out[i] = params.in[i];
}
SIMT_RUN(blocks_race, 2, 32, 0)
