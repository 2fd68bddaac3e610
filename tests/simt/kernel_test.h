// What the kernels in broken/ share. Each computes out [64] from in [64].
#pragma once

#include <exception>

#include "cuda/device.cuh"

struct Params {
  const float* in;
  float* out;
};

// Defines run_KERNEL, which returns whether the launch went well.
#define SIMT_RUN(kernel, blocks, threads, shared)                                              \
  SIMT_DEFINE_RUN(kernel, adapter_ext::cuda::launch(#kernel, &kernel, blocks, threads, shared, \
                                                    nullptr, params))

// The same after another kernel, before whose end it may begin.
#define SIMT_RUN_AFTER(first, kernel, blocks, threads, shared)                                     \
  SIMT_DEFINE_RUN(                                                                                 \
      kernel, adapter_ext::cuda::launch(#first, &first, blocks, threads, shared, nullptr, params), \
      adapter_ext::cuda::launch(#kernel, &kernel, blocks, threads, shared, nullptr, params,        \
                                adapter_ext::cuda::Begins::kEarly))

#define SIMT_DEFINE_RUN(kernel, ...)                                                   \
  extern "C" __attribute__((visibility("default"))) bool run_##kernel(const float* in, \
                                                                      float* out) {    \
    try {                                                                              \
      const Params params{in, out};                                                    \
      __VA_ARGS__;                                                                     \
      return true;                                                                     \
    } catch (const std::exception&) {                                                  \
      return false;                                                                    \
    }                                                                                  \
  }
