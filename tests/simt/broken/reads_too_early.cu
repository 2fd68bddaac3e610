// out is twice in: the second kernel adds to what the first wrote.
#include "kernel_test.h"

__global__ void writes_before(const __grid_constant__ Params params) {
  adapter_ext::cuda::let_next_begin();
  params.out[threadIdx.x] = params.in[threadIdx.x];
}

__global__ void reads_too_early(const __grid_constant__ Params params) {
  const unsigned i = threadIdx.x;
  const float own = params.in[i];
#if defined(BROKEN)
  const float before = params.out[i];
  adapter_ext::cuda::wait_for_previous();
#else
  adapter_ext::cuda::wait_for_previous();
  const float before = params.out[i];
#endif
  params.out[i] = before + own;
}
SIMT_RUN_AFTER(writes_before, reads_too_early, 1, 64, 0)
