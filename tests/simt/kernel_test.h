// What the kernels in broken/ share. Each computes out [64] from in [64].
#pragma once

#include <exception>

#include "cuda/device.cuh"

struct Params {
  const float* in;
  float* out;
};

// Defines run_KERNEL, which returns whether the launch went well.
#define SIMT_RUN(kernel, blocks, threads, shared)                                      \
  extern "C" __attribute__((visibility("default"))) bool run_##kernel(const float* in, \
                                                                      float* out) {    \
    try {                                                                              \
      adapter_ext::cuda::launch(#kernel, &kernel, blocks, threads, shared, nullptr,    \
                                Params{in, out});                                      \
      return true;                                                                     \
    } catch (const std::exception&) {                                                  \
      return false;                                                                    \
    }                                                                                  \
  }
