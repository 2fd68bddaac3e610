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

  // What a kernel is told of the call, as far as kernels of both directions share it.
  template <class Params>
  Params params() const {
    Params params{};
    params.problem = problem;
    params.depth = problem.stochastic_depth;
    params.dropout = problem.dropout;
    params.sample_rows = std::max<int64_t>(problem.routing.rows_per_sample, 1);
    params.adapters = adapters;
    return params;
  }
};
using ForwardCall = Call<LinearAdapterForward>;
using BackwardCall = Call<LinearAdapterBackward>;

// The largest tiles whose sums have room in registers. A forward's has a multiprocessor to itself
// where its rows of x fill shared memory, and so twice the threads.
template <class X>
using LargestTile = std::conditional_t<sizeof(X) < 8, LargeTile, SmallTile>;
template <class X>
using LargestForwardTile = std::conditional_t<sizeof(X) < 8, Shape<64, 512>, SmallTile>;

// Whether adapters have rows for tiles of 64, on average.
inline bool fills_large_tiles(const LinearAdapterProblem& problem) {
  return problem.rows / std::max<int64_t>(problem.routing.adapters, 1) >= 48;
}

}  // namespace adapter_ext::cuda
