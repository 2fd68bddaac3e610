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

// Whether tiles are of 64 rows, which read weights a quarter as often as those of 16, but are
// fewer. Sums of float64 have no room in registers then.
template <class X>
bool large_tiles(const LinearAdapterProblem& problem, int64_t multiprocessors) {
  const int64_t adapters = std::max<int64_t>(problem.routing.adapters, 1);
  return sizeof(X) < 8 && problem.rows / 64 >= multiprocessors && problem.rows / adapters >= 48;
}

inline dim3 grid(const char* name, int64_t blocks) {
  if (blocks > INT32_MAX) throw std::runtime_error(std::string(name) + ": too many rows");
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace adapter_ext::cuda
