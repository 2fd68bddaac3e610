// out is in, by asynchronous copies from an address that may be odd.
#include "kernel_test.h"

__global__ void misaligned_copy(const __grid_constant__ Params params) {
  using namespace adapter_ext::cuda;
  float* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned i = threadIdx.x;
#if defined(BROKEN)
  const unsigned first = i < 15 ? 4 * i : 59;
#else
  const unsigned first = 4 * i;
#endif
  copy_async(shared + 4 * i, params.in + first, 16);
  copy_async_commit();
  copy_async_wait<0>();
  for (int k = 0; k < 4; ++k) params.out[4 * i + k] = shared[4 * i + k];
}
SIMT_RUN(misaligned_copy, 1, 16, 64 * sizeof(float))
