// out is in, copied by vectors; the last of them may begin at an odd element.
#include "kernel_test.h"

__global__ void misaligned(const __grid_constant__ Params params) {
  const unsigned i = threadIdx.x;
#if defined(BROKEN)
  const unsigned first = i < 15 ? 4 * i : 59;
#else
  const unsigned first = 4 * i;
#endif
  const float4 value = *reinterpret_cast<const float4*>(params.in + first);
  *reinterpret_cast<float4*>(params.out + first) = value;
}
SIMT_RUN(misaligned, 1, 16, 0)
