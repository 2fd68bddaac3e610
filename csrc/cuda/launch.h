// What the launchers of all types share.
#pragma once

#include "cuda/linear_adapter.h"
#include "cuda/work.cuh"

namespace adapter_ext::cuda {

template <class ProblemType>
struct Call {
  const ProblemType& problem;
  Adapters adapters;
  Limits limits;
  void* workspace;
  int64_t* bytes;  // not null: only tells how large the workspace must be
  Stream stream;
};
using ForwardCall = Call<LinearAdapterForward>;
using BackwardCall = Call<LinearAdapterBackward>;

inline dim3 grid(const char* name, int64_t blocks) {
  if (blocks > INT32_MAX) throw std::runtime_error(std::string(name) + ": too many rows");
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace adapter_ext::cuda
