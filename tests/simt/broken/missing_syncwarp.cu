// out is in, reversed within each warp, in place in shared memory.
#include "kernel_test.h"

__global__ void missing_syncwarp(const __grid_constant__ Params params) {
  float* shared = reinterpret_cast<float*>(adapter_ext::cuda::shared_memory());
  const unsigned i = threadIdx.x, mirrored = i / 32 * 32 + 31 - i % 32;
  shared[i] = params.in[i];
  __syncwarp();
  const float value = shared[mirrored];
#if !defined(BROKEN)
  __syncwarp();
#endif
  shared[i] = value;
  __syncwarp();
  params.out[i] = shared[i];
}
SIMT_RUN(missing_syncwarp, 1, 64, 64 * sizeof(float))
