// out is in, with an assertion of what in is.
#include "kernel_test.h"

__global__ void failed_assertion(const __grid_constant__ Params params) {
  const unsigned i = threadIdx.x;
#if defined(BROKEN)
  assert(params.in[i] < 40.0f);
#else
  assert(params.in[i] < 64.0f);
#endif
  params.out[i] = params.in[i];
}
SIMT_RUN(failed_assertion, 1, 64, 0)
