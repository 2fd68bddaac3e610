// What a block does with a tile of rows of one adapter, forward and backward: which rows they are,
// the second product, and elementwise work on its result.
#pragma once

#include "cuda/product.cuh"
#include "cuda/work.cuh"

namespace adapter_ext::cuda {

// Offsets of a block's buffers in its shared memory, in bytes. Made by the host, so that it knows
// their size.
struct SharedLayout {
  int row, mean, rstd, active;  // [rows]
  int x;                        // [rows, D] of x's type, where `x_resident`
  int left[2];                  // operands of the first product, [rows, kStep]
  int weights[2];               // [64, kStep]
  int activated;                // operands of the second product: [rows, bottleneck], or (where
                                // that does not fit: not `activated_resident`) none
  int sums;                     // results [rows, 64]
  bool x_resident, activated_resident;
  int activated_pitch;  // in elements
  int bytes;
};

template <class X, class P, int rows>
SharedLayout shared_layout(const LinearAdapterProblem& p, int64_t limit, bool want_x) {
  using T = typename P::Operand;
  using C = typename P::Sum;
  SharedLayout layout{};
  int64_t bytes = 0;
  const auto take = [&](int64_t size) {
    const int64_t at = bytes;
    bytes = round_up(bytes + size, 128);
    return static_cast<int>(at);
  };
  layout.row = take(rows * 8);
  layout.mean = take(rows * sizeof(C));
  layout.rstd = take(rows * sizeof(C));
  layout.active = take(rows * 4);
  layout.weights[0] = take(kBlock * kStepPitch<P> * sizeof(T));
  layout.weights[1] = take(kBlock * kStepPitch<P> * sizeof(T));
  const int64_t left = rows * kStepPitch<P> * sizeof(T), sums = rows * kSumPitch<C> * sizeof(C);
  const int64_t padded = round_up(std::max<int64_t>(p.hidden_stride, 1), kBlock);
  const int64_t pitch = padded + 16 / static_cast<int64_t>(sizeof(T));
  const int64_t activated = rows * pitch * static_cast<int64_t>(sizeof(T));
  // The first product is over when the second begins, which then has its memory.
  const int64_t shared = std::max(round_up(left, 128) * 2, sums);
  layout.activated_resident = bytes + shared + activated + 256 <= limit;
  layout.left[0] = take(left);
  layout.left[1] = take(left);
  if (layout.activated_resident) {
    layout.sums = layout.left[0];
    bytes = std::max(bytes, layout.sums + round_up(sums, 128));
    layout.activated = take(activated);
    layout.activated_pitch = static_cast<int>(pitch);
  } else {
    layout.sums = take(sums);
    layout.activated_pitch = kStepPitch<P>;
  }
  const int64_t x = rows * p.hidden_size * static_cast<int64_t>(sizeof(X));
  layout.x_resident = want_x && bytes + x <= limit;
  if (layout.x_resident) layout.x = take(x);
  layout.bytes = static_cast<int>(bytes);
  return layout;
}

// What the product's operands are rounded to, beyond what their type does: kFloat64 for nothing.
ADAPTER_EXT_HOST_DEVICE DataType operand_rounding(const LinearAdapterProblem& p) {
  const bool rounds = p.operand_type != p.data_type && (p.operand_type == DataType::kBFloat16 ||
                                                        p.operand_type == DataType::kFloat16);
  return rounds ? p.operand_type : DataType::kFloat64;
}

// One thread's share of elementwise work on a [rows, 64] tile of x: some vectors of 16 bytes.
template <class X, int rows>
struct Elements {
  static constexpr int kColumns = kVector<X>;       // of a vector
  static constexpr int kLanes = kBlock / kColumns;  // that share a row
  static constexpr int kCount = rows * kLanes / kThreads;
  static_assert(kCount * kThreads == rows * kLanes);

  static __device__ __forceinline__ int row(int i) {
    return (static_cast<int>(threadIdx.x) + i * kThreads) / kLanes;
  }
  static __device__ __forceinline__ int column() {
    return static_cast<int>(threadIdx.x) % kLanes * kColumns;
  }
};

template <class X>
__device__ __forceinline__ void copy_row(X* to, const X* from, int64_t count, bool aligned) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t i = lane * kVector<X>; i < count; i += 32 * kVector<X>) {
    X values[kVector<X>];
    load(values, from + i, count - i, aligned);
    store(to + i, values, count - i, aligned);
  }
}

template <class X, class P, int rows>
class RowTile {
 public:
  using T = typename P::Operand;
  using C = typename P::Sum;
  using Sums = Product<P, rows>;
  using Own = Elements<X, rows>;

  const LinearAdapterProblem& p;
  const SharedLayout& layout;
  const int64_t width, first;  // columns of x; the position of the first row
  const int count;             // rows that are there
  const int64_t adapter;
  const AdapterView view;
  const DataType rounding;
  const bool float_weights, pre;
  int64_t* const row;
  C* const mean;
  C* const rstd;
  int* const active;  // 0 for rows that are not there, or that stochastic depth drops
  C* const sums;

  __device__ __forceinline__ RowTile(const LinearAdapterProblem& problem,
                                     const SharedLayout& shared, const Segment& segment,
                                     int64_t first_position, int row_count,
                                     const AdapterView& adapter_view)
      : p(problem),
        layout(shared),
        width(problem.hidden_size),
        first(first_position),
        count(row_count),
        adapter(segment.adapter),
        view(adapter_view),
        rounding(operand_rounding(problem)),
        float_weights(problem.weight_type == DataType::kFloat32),
        pre(problem.norm_position == NormPosition::kPre),
        row(at<int64_t>(shared.row)),
        mean(at<C>(shared.mean)),
        rstd(at<C>(shared.rstd)),
        active(at<int>(shared.active)),
        sums(at<C>(shared.sums)) {}

  template <class Element>
  static __device__ __forceinline__ Element* at(int offset) {
    return reinterpret_cast<Element*>(shared_memory() + offset);
  }

  // Finds the rows; others may read `row` and `active` after a barrier.
  __device__ __forceinline__ void find_rows(const Depth& depth) const {
    const int i = static_cast<int>(threadIdx.x);
    if (i >= rows) return;
    row[i] = i < count ? row_at(p.routing, first + i) : 0;
    active[i] = i < count && depth.keeps_row(p, row[i]);
  }

  __device__ __forceinline__ WeightMatrix up() const {
    return WeightMatrix::make<X, P>(view.up, view.up_stride, width, view.bottleneck, float_weights,
                                    rounding != DataType::kFloat64);
  }
  __device__ __forceinline__ WeightMatrix down() const {
    return WeightMatrix::make<X, P>(view.down, view.down_stride, view.bottleneck, width,
                                    float_weights, rounding != DataType::kFloat64);
  }
  __device__ __forceinline__ int up_steps() const {
    return static_cast<int>((view.bottleneck + kStep<P> - 1) / kStep<P>);
  }

  // Some columns of the norm's weight and bias.
  template <int n>
  __device__ __forceinline__ void load_norm(C (&weight)[n], C (&bias)[n], int64_t column) const {
    load_weights<X>(weight, view.norm_weight, float_weights, column, width - column,
                    is_aligned(view.norm_weight));
    load_weights<X>(bias, view.norm_bias, float_weights, column, width - column,
                    is_aligned(view.norm_bias));
  }
};

// How much of a step along the bottleneck has elements, in whole steps of the product.
template <class P>
__device__ __forceinline__ int step_depth(int64_t bottleneck, int step) {
  const int64_t left = round_up(bottleneck - static_cast<int64_t>(step) * kStep<P>, 16);
  return left < kStep<P> ? static_cast<int>(left) : kStep<P>;
}

// The second product, act(h) upᵀ, block of columns by block of columns. The next piece of `up` is
// on its way while one is multiplied.
template <class X, class P, int rows>
class UpProduct {
  using Tile = RowTile<X, P, rows>;
  using T = typename P::Operand;

 public:
  // `activated` [rows, bottleneck in whole blocks] is in shared memory, or, where it does not fit,
  // in memory from a pointer on, its rows `activated_stride` apart.
  __device__ __forceinline__ UpProduct(const Tile& tile, const T* in_memory, int64_t stride)
      : tile_(tile),
        up_(tile.up()),
        in_memory_(in_memory),
        in_memory_stride_(stride),
        steps_(tile.up_steps()) {}

  // Prepares for some blocks of columns, one after the other.
  __device__ __forceinline__ void start(int64_t first_block, int64_t blocks) {
    __syncthreads();  // the buffers may still be in use
    first_block_ = first_block;
    step_ = 0;
    end_ = blocks * steps_;
    if (end_ > 0) fill(0);
  }

  // The sums of the next block. There is a barrier in it before anything else is done.
  __device__ __forceinline__ void next(Product<P, rows>& product) {
    product.clear();
    for (int step = 0; step < steps_; ++step, ++step_) {
      const T* left = Tile::template at<T>(tile_.layout.activated) + step * kStep<P>;
      if (!tile_.layout.activated_resident) {
        T* piece = Tile::template at<T>(tile_.layout.left[step_ & 1]);
        fill_tile<P, rows, kStep<P>>(
            piece, kStepPitch<P>, DataType::kFloat64, [&](int row, int column, auto& values) {
              load(values, in_memory_ + row * in_memory_stride_ + step * kStep<P> + column,
                   row < tile_.count ? kVector<T> : 0, true);
            });
        left = piece;
      }
      copy_async_wait<0>();
      __syncthreads();
      if (step_ + 1 < end_) fill(step_ + 1);
      product.template multiply<true, true>(
          left, tile_.layout.activated_pitch, Tile::template at<T>(tile_.layout.weights[step_ & 1]),
          kStepPitch<P>, step_depth<P>(tile_.view.bottleneck, step));
    }
  }

 private:
  __device__ __forceinline__ void fill(int64_t step) const {
    up_.template fill<X, P, kBlock, kStep<P>>(
        Tile::template at<T>(tile_.layout.weights[step & 1]), kStepPitch<P>,
        (first_block_ + step / steps_) * kBlock, step % steps_ * kStep<P>, tile_.rounding);
    copy_async_commit();
  }

  const Tile& tile_;
  const WeightMatrix up_;
  const T* in_memory_;
  int64_t in_memory_stride_;
  const int steps_;
  int64_t first_block_, step_, end_;
};

}  // namespace adapter_ext::cuda
