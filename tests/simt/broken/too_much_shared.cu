// out is in, with as much shared memory as there is or more.
#include "kernel_test.h"

__global__ void too_much_shared(const __grid_constant__ Params params) {
  params.out[threadIdx.x] = params.in[threadIdx.x];
}
#if defined(BROKEN)
SIMT_RUN(too_much_shared, 1, 64, adapter_ext::cuda::device_limits().shared_memory + 1)
#else
SIMT_RUN(too_much_shared, 1, 64, adapter_ext::cuda::device_limits().shared_memory)
#endif
