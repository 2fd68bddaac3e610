// out is in; the upper half is written by the second kernel, which needs nothing of the first.
#include "kernel_test.h"

__global__ void writes_lower_half(const __grid_constant__ Params params) {
  adapter_ext::cuda::let_next_begin();
  if (threadIdx.x < 32) params.out[threadIdx.x] = params.in[threadIdx.x];
}

__global__ void never_waits(const __grid_constant__ Params params) {
  const unsigned i = threadIdx.x;
#if defined(BROKEN)
  if (i < 32) return;
#else
  if (i < 32) return adapter_ext::cuda::wait_for_previous();
#endif
  params.out[i] = params.in[i];
  adapter_ext::cuda::wait_for_previous();
}
SIMT_RUN_AFTER(writes_lower_half, never_waits, 1, 64, 0)
