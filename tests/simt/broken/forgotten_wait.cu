// out is in, by way of asynchronous copies to shared memory in two groups.
#include "kernel_test.h"

__global__ void forgotten_wait(const __grid_constant__ Params params) {
  using namespace adapter_ext::cuda;
  float* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned i = threadIdx.x;
  for (int half = 0; half < 2; ++half) {
    if (i < 8) copy_async(shared + 32 * half + 4 * i, params.in + 32 * half + 4 * i, 16);
    copy_async_commit();
  }
  copy_async_wait<1>();
  __syncthreads();
  params.out[i] = shared[i];
#if !defined(BROKEN)
  copy_async_wait<0>();
#endif
  __syncthreads();
  params.out[32 + i] = shared[32 + i];
}
SIMT_RUN(forgotten_wait, 1, 32, 64 * sizeof(float))
