// Even lanes of out have the sum of in over two lanes, odd ones in.
#include "kernel_test.h"

__global__ void outside_mask(const __grid_constant__ Params params) {
  const unsigned i = threadIdx.x;
  float value = params.in[i];
#if defined(BROKEN)
  value += __shfl_down_sync(0x55555555u, value, 1);
#else
  const float next = __shfl_down_sync(0xffffffffu, value, 1);
  if (i % 2 == 0) value += next;
#endif
  params.out[i] = value;
}
SIMT_RUN(outside_mask, 1, 64, 0)
