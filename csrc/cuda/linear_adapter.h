// The CUDA kernels of linear_adapter and route: launchers. They allocate nothing and wait for
// nothing, so that they can be captured in a CUDA graph. All pointers in the problems are to device
// memory, but for lists of adapters and gradients, which are read before the launchers return.
// They throw std::runtime_error where a launch fails.
#pragma once

#include <cstdint>

#include "common/problem.h"

struct CUstream_st;

namespace adapter_ext::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// Bytes of device memory, 256-byte aligned, that a call needs beside its arguments. Its contents
// need not be initialised, and are of no use after the call.
int64_t workspace_bytes(const LinearAdapterForward& problem);
int64_t workspace_bytes(const LinearAdapterBackward& problem);
int64_t route_workspace_bytes(int64_t samples, int64_t adapters);

// On the current device.
void linear_adapter(const LinearAdapterForward& problem, void* workspace, Stream stream);
void linear_adapter(const LinearAdapterBackward& problem, void* workspace, Stream stream);

// Samples sorted by adapter, stable: ids [samples] → order [samples], offsets [adapters + 1], as
// RoutingView has them. An id outside of [-1, adapters) fails a device-side assertion.
void route(const int64_t* ids, int64_t samples, int64_t adapters, int64_t* order, int64_t* offsets,
           void* workspace, Stream stream);

}  // namespace adapter_ext::cuda
