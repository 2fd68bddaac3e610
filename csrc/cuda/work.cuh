// Which work a block has: adapters in launch parameters, tiles of rows found in the routing, and
// what stochastic depth and dropout say about rows.
#pragma once

#include <algorithm>
#include <cstddef>

#include "common/philox.h"
#include "cuda/types.cuh"

namespace adapter_ext::cuda {

// The next multiple.
ADAPTER_EXT_HOST_DEVICE constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Divides by a number that the host knows: nvcc's own 64-bit division is a call of a hundred
// instructions. For dividends from 0 to 2^52.
struct Divisor {
  int64_t value;
  double reciprocal;

  Divisor(int64_t divisor = 1) : value(divisor), reciprocal(1.0 / static_cast<double>(divisor)) {}

  // The quotient, and the remainder.
  __device__ __forceinline__ int64_t divide(int64_t dividend, int64_t& remainder) const {
    int64_t quotient = static_cast<int64_t>(static_cast<double>(dividend) * reciprocal);
    remainder = dividend - quotient * value;  // rounding makes the quotient one too large or small
    if (remainder < 0) {
      --quotient;
      remainder += value;
    } else if (remainder >= value) {
      ++quotient;
      remainder -= value;
    }
    return quotient;
  }
  __device__ __forceinline__ int64_t divide(int64_t dividend) const {
    int64_t remainder;
    return divide(dividend, remainder);
  }
};

// The adapters' weights, and in the backward their gradients. Up to kInline adapters travel with
// the launch parameters; longer lists lie in device memory, stacks are described by their first.
// In whole sectors of 32 bytes, so that none is read for a neighbour.
struct alignas(32) Adapter {
  AdapterView view;
  AdapterGradients gradients;
};
struct Adapters {
  static constexpr int kInline = 32;  // in 4 KiB, since every launch copies its parameters

  const Adapter* list;  // in device memory, or null
  bool stacked;
  Adapter adapter[kInline];
  int64_t norm_weight_step, norm_bias_step, down_step, up_step;  // in bytes, of stacks
  int64_t gradient_vector_step, gradient_matrix_step;

  // An adapter, in shared memory: in registers it would take the room of sums. Threads may read it
  // after a barrier.
  __device__ __forceinline__ const Adapter& share(int64_t a, int offset) const {
    Adapter* shared = shared_at<Adapter>(offset);
    if (stacked) {
      if (threadIdx.x == 0) *shared = of_stack(a);
    } else if (const int word = static_cast<int>(threadIdx.x); word < kWords) {
      const auto copy = [&](const Adapter& from) {
        reinterpret_cast<uint64_t*>(shared)[word] = reinterpret_cast<const uint64_t*>(&from)[word];
      };
      if (list) {
        copy(list[a]);
      } else {
        copy(adapter[a]);
      }
    }
    return *shared;
  }

  __device__ __forceinline__ AdapterView view(int64_t a) const {
    if (stacked) return of_stack(a).view;
    if (list) return list[a].view;
    return adapter[a].view;
  }

 private:
  static constexpr int kWords = sizeof(Adapter) / 8;

  __device__ __forceinline__ Adapter of_stack(int64_t a) const {
    Adapter result = adapter[0];
    const auto move = [a]<class Void>(Void*& pointer, int64_t step) {
      using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
      if (pointer) pointer = static_cast<Byte*>(pointer) + a * step;
    };
    move(result.view.norm_weight, norm_weight_step);
    move(result.view.norm_bias, norm_bias_step);
    move(result.view.down, down_step);
    move(result.view.up, up_step);
    move(result.gradients.norm_weight, gradient_vector_step);
    move(result.gradients.norm_bias, gradient_vector_step);
    move(result.gradients.down, gradient_matrix_step);
    move(result.gradients.up, gradient_matrix_step);
    return result;
  }
};

// Where the rows of an adapter begin, in the order of the routing; adapters + 1 is behind the rows
// without an adapter, which come last.
__device__ __forceinline__ int64_t first_position(const RoutingView& routing, int64_t a) {
  const int64_t samples = a > routing.adapters ? routing.samples
                          : routing.offsets    ? routing.offsets[a]
                                               : (a == 0 ? 0 : routing.samples);
  return samples * routing.rows_per_sample;
}

// The row of x at a position, where samples are of some rows.
__device__ __forceinline__ int64_t row_at(const RoutingView& routing, const Divisor& sample_rows,
                                          int64_t position) {
  if (!routing.order) return position;
  int64_t row;
  const int64_t sample = routing.order[sample_rows.divide(position, row)];
  require(sample >= 0 && sample < routing.samples);  // a routing made by hand may be wrong
  return sample * routing.rows_per_sample + row;
}

// A range of an adapter's rows. Adapter `adapters` stands for the rows without one.
struct Segment {
  int adapter;
  int64_t begin, end;  // positions of all rows of the adapter
  int64_t range;       // which range of them; it may be one that is not there
};

// How blocks are dealt out to ranges of `size` rows of every adapter, without the host knowing the
// offsets. Few adapters: one whose rows begin at o takes the blocks from floor(o / size) + its
// index on, which leaves each at least one and always enough. More adapters than rows: there is a
// block for every row, and those at which a range begins have work.
struct RowRanges {
  Divisor size;
  int64_t blocks;
  bool by_row;

  static RowRanges make(const LinearAdapterProblem& problem, int64_t size, bool every_adapter) {
    const int64_t bound = problem.rows / size + problem.routing.adapters + 1;
    const bool by_row = !every_adapter && problem.rows < bound;
    return {size, by_row ? std::max<int64_t>(problem.rows, 1) : bound, by_row};
  }

  // The range of a block. Warps search on their own, each lane one candidate.
  __device__ __forceinline__ Segment find(const RoutingView& routing, int64_t block) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto first_block = [&](int64_t a) {
      const int64_t position = first_position(routing, a);
      return by_row ? position : size.divide(position) + a;
    };
    int64_t low = 0, count = routing.adapters + 1;
    constexpr int neighbours = 4 * 32;  // are looked at all together: they lie in few sectors
    while (count > neighbours) {
      const int64_t step = (count + 31) / 32;
      const bool before = lane * step < count && first_block(low + lane * step) <= block;
      const int top = 31 - __clz(static_cast<int>(__ballot_sync(0xffffffffu, before)));
      require(top >= 0);  // offsets made by hand that do not begin with 0
      low += top * step;
      count = count - top * step < step ? count - top * step : step;
    }
    int before = 0;
#pragma unroll
    for (int first = 0; first < neighbours; first += 32) {
      if (first >= count) break;
      const int i = first + lane;
      before += __popc(__ballot_sync(0xffffffffu, i < count && first_block(low + i) <= block));
    }
    require(before > 0);
    low += before - 1;
    const int64_t begin = first_position(routing, low), end = first_position(routing, low + 1);
    require(begin >= 0 && begin <= end && end <= routing.samples * routing.rows_per_sample);
    const int64_t index = block - first_block(low);
    const int adapter = static_cast<int>(low);
    if (!by_row) return {adapter, begin, end, index};
    int64_t row;
    const int64_t range = size.divide(index, row);
    return {adapter, begin, end, row == 0 ? range : end - begin};
  }
};

// Stochastic depth: what becomes of an adapter or of a sample.
struct Depth {
  const LinearAdapterProblem& problem;
  const Chance& chance;
  const Divisor& sample_rows;

  __device__ __forceinline__ bool keeps_adapter(int64_t a) const {
    return chance.threshold == 0 || problem.depth_mode != DepthMode::kCall || keeps(a);
  }
  __device__ __forceinline__ bool keeps_row(int64_t row) const {
    return chance.threshold == 0 || problem.depth_mode != DepthMode::kSample ||
           keeps(sample_rows.divide(row));
  }

 private:
  __device__ __forceinline__ bool keeps(int64_t unit) const {
    return depth_keeps(unit, chance.key(problem.seed), chance.threshold);
  }
};

// Dropout of the output: 0 or 1 / keep probability for each element.
struct Dropout {
  const Chance& chance;
  PhiloxKey key;

  __device__ __forceinline__ Dropout(const LinearAdapterProblem& problem, const Chance& dropout)
      : chance(dropout), key(dropout.key(problem.seed)) {}

  // Multiplies n neighbouring elements of a row by their scales; n is 2, 4 or 8, and `column` a
  // multiple of it.
  template <int n, class C>
  __device__ __forceinline__ void apply(C (&values)[n], int64_t row, int64_t column) const {
    if (chance.threshold == 0) return;
#pragma unroll
    for (int first = 0; first < n; first += 4) {
      uint32_t words[4] = {static_cast<uint32_t>(row),
                           static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32),
                           static_cast<uint32_t>((column + first) / 4), kDropoutStream};
      philox(words, key);
#pragma unroll
      for (int i = first; i < first + 4 && i < n; ++i) {
        uint32_t word = words[i - first];
        if constexpr (n == 2) word = column % 4 == 0 ? words[i] : words[i + 2];
        values[i] *= word >= chance.threshold ? static_cast<C>(chance.kept_scale) : C(0);
      }
    }
  }
};

// Hands out parts of a piece of memory of which only the size is known at first.
class Carver {
 public:
  explicit Carver(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* result = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ = round_up(bytes_ + count * static_cast<int64_t>(sizeof(T)), 256);
    return result;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace adapter_ext::cuda
