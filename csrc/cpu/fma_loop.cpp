// The multiply-add rate of one core, without memory.

#include "cpu/kernels.h"
#include "cpu/matmul.h"

namespace adapter_ext::cpu {
inline namespace ADAPTER_EXT_CPU_LEVEL {

namespace {

// Makes the compiler believe that the value was read and changed, so that it can't fold the loop.
inline __attribute__((always_inline)) void hide(Vector<float>& value) {
#if defined(__aarch64__)
  __asm__ volatile("" : "+w"(value));
#else
  __asm__ volatile("" : "+v"(value));
#endif
}

}  // namespace

double fma_loop(int64_t iterations) {
  constexpr int chains = kTileRows * kPanelVectors;  // as many as the kernels' register tile
  Vector<float> factor = splat<float>(0.999f), term = splat<float>(0.5f);
  hide(factor);
  hide(term);
  Vector<float> sum[chains];
#pragma GCC unroll 32
  for (int i = 0; i < chains; ++i) sum[i] = splat<float>(static_cast<float>(i));
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
#pragma GCC unroll 32
    for (int i = 0; i < chains; ++i) sum[i] = sum[i] * factor + term;
  }
#pragma GCC unroll 32
  for (int i = 0; i < chains; ++i) hide(sum[i]);
  return 2.0 * static_cast<double>(iterations) * chains * kLanes<float>;
}

}  // namespace ADAPTER_EXT_CPU_LEVEL
}  // namespace adapter_ext::cpu
