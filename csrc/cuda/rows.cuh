// What a block does with a tile of rows of one adapter, forward and backward: which rows they are,
// the second product, and elementwise work on its result.
#pragma once

#include "cuda/product.cuh"
#include "cuda/work.cuh"

namespace adapter_ext::cuda {

// Offsets of a block's buffers in its shared memory, in bytes. Made by the host, so that it knows
// their size.
struct SharedLayout {
  int adapter;                  // an Adapter
  int row, mean, rstd, active;  // [rows]
  int x;                        // [rows, x_pitch] of x's type
  int left[2];                  // operands of the first product, [rows, kStep]
  int weights[2];               // [64, kStep], and behind them more: see `stages` below
  int activated;                // operands of the second product: [rows, bottleneck], or (where
                                // that does not fit: not `activated_resident`) none
  int sums;                     // results [rows, 64]
  int norm;                     // the pre norm's weight and bias, [2, norm_columns], as they are
  bool activated_resident;
  int x_columns;  // the last ones, as many as shared memory has room for
  int x_pitch;
  int x_stage[2];  // [rows, kStagePitch] a step: others, on their way before they are used
  bool x_staged;
  int norm_columns;     // 0: there is no room
  int activated_pitch;  // in elements
  int bytes;
};

// Hands out a block's shared memory, from a size on.
class SharedRoom {
 public:
  explicit SharedRoom(int64_t bytes = 0) : bytes_(bytes) {}
  template <class T>
  int take(int64_t count) {
    const int64_t at = bytes_;
    bytes_ = round_up(bytes_ + count * static_cast<int64_t>(sizeof(T)), 128);
    return static_cast<int>(at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_;
};

// What every kernel with a tile of rows needs; `tiles`: of how many it knows the rows.
template <class C>
void take_rows(SharedLayout& layout, SharedRoom& room, int64_t rows, int64_t tiles = 1) {
  layout.adapter = room.take<Adapter>(1);
  layout.row = room.take<int64_t>(tiles * rows);
  layout.mean = room.take<C>(rows);
  layout.rstd = room.take<C>(rows);
  layout.active = room.take<int>(tiles * rows);
}

// Bytes of a buffer for weights.
template <class P>
inline constexpr int kWeightBytes =
    kBlock * kStepPitch<P> * static_cast<int>(sizeof(typename P::Operand));

// Buffers for weights that large tiles of 16-bit elements have (PartProducts), which are as large
// as those for left operands, and have room for these and for sums.
inline constexpr int64_t kPartTiles = 8;

// Buffers of both products, within the limit; `stages` of them for weights: 2, or what decode and
// PartProducts need.
template <class X, class P, class S>
SharedLayout shared_layout(const LinearAdapterProblem& p, int64_t limit, int64_t stages = 2) {
  using T = typename P::Operand;
  using C = typename P::Sum;
  constexpr int64_t rows = S::kRows, sums = rows * kSumPitch<C>;
  SharedLayout layout{};
  SharedRoom room;
  take_rows<C>(layout, room, rows);
  static_assert(kWeightBytes<P> % 128 == 0);
  layout.weights[0] = room.take<char>(stages * kWeightBytes<P>);
  layout.weights[1] = layout.weights[0] + kWeightBytes<P>;
  const int64_t padded = round_up(std::max<int64_t>(p.largest_bottleneck, 1), kBlock);
  const int64_t pitch = padded + 16 / static_cast<int64_t>(sizeof(T));
  // The first product is over when the second begins, which then has its memory.
  SharedRoom lefts(stages == kPartTiles ? layout.weights[0] + 2 * kWeightBytes<P> : room.bytes());
  SharedRoom results = lefts;
  for (int& left : layout.left) left = lefts.take<T>(rows * kStepPitch<P>);
  layout.sums = results.take<C>(sums);
  room = SharedRoom(std::max(room.bytes(), lefts.bytes()));
  SharedRoom resident(std::max(room.bytes(), results.bytes()));
  layout.activated = resident.take<T>(rows * pitch);
  layout.activated_resident = resident.bytes() <= limit;
  if (layout.activated_resident) {
    room = resident;
    layout.activated_pitch = static_cast<int>(pitch);
  } else {
    layout.sums = room.take<C>(sums);
    layout.activated_pitch = kStepPitch<P>;
  }
  layout.bytes = static_cast<int>(room.bytes());
  return layout;
}

// Elements from a row to the next of a tile of x as it is, which is then read like one of operands.
template <class X, int columns>
inline constexpr int kPartPitch =
    columns + (columns == kBlock && sizeof(X) == 4 ? 8 : 16 / static_cast<int>(sizeof(X)));

// Elements from a row to the next of a stage of x.
template <class X, class P>
inline constexpr int kStagePitch = kPartPitch<X, kStep<P>>;

// Adds stages for the columns of x that are not resident, of some steps of the product each.
template <class X, class P>
void take_stages(SharedLayout& layout, int64_t rows, int64_t steps) {
  SharedRoom room(layout.bytes);
  for (int& stage : layout.x_stage) stage = room.take<X>(steps * rows * kStagePitch<X, P>);
  layout.x_staged = true;
  layout.bytes = static_cast<int>(room.bytes());
}

// Adds the norm's weight and bias for some columns, if there is room.
template <class X>
void take_norm(SharedLayout& layout, const LinearAdapterProblem& p, int64_t columns,
               int64_t limit) {
  SharedRoom room(layout.bytes);
  const bool is_float = p.weight_type == DataType::kFloat32;
  const int64_t wanted = round_up(columns, kVector<char>);
  const int64_t bytes = 2 * wanted * (is_float ? 4 : static_cast<int64_t>(sizeof(X)));
  layout.norm = room.take<char>(bytes);
  if (room.bytes() > limit) return;
  layout.norm_columns = static_cast<int>(wanted);
  layout.bytes = static_cast<int>(room.bytes());
}

// Adds the rows of x, or their columns behind as many whole blocks as there is no room for.
template <class X>
void take_x(SharedLayout& layout, int64_t rows, int64_t columns, int64_t limit) {
  SharedRoom room(layout.bytes);
  // Without bank conflicts where eight rows are read at a time. In whole vectors.
  constexpr int64_t padding = kPartPitch<X, kBlock> - kBlock, vector = kVector<X>;
  const int64_t fit =
      (limit - layout.bytes) / (rows * static_cast<int64_t>(sizeof(X))) - padding - vector;
  const int64_t left_out = round_up(std::max<int64_t>(columns - fit, 0), 2 * kBlock);
  layout.x_columns = static_cast<int>(std::max<int64_t>(columns - left_out, 0));
  layout.x_pitch = static_cast<int>(round_up(layout.x_columns, vector) + padding);
  layout.x = room.take<X>(layout.x_columns ? rows * layout.x_pitch : 0);
  layout.bytes = static_cast<int>(room.bytes());
}

// What the product's operands are rounded to, beyond what their type does.
inline constexpr DataType kNotRounded = DataType::kFloat64;
ADAPTER_EXT_HOST_DEVICE DataType operand_rounding(const LinearAdapterProblem& p) {
  return rounds_operands(p) ? p.operand_type : kNotRounded;
}

// One thread's share of elementwise work on a [rows, columns] tile of x: some vectors of 16 bytes.
template <class X, class S, int columns = kBlock>
struct Elements {
  static constexpr int kColumns = kVector<X>;        // of a vector
  static constexpr int kLanes = columns / kColumns;  // that share a row
  static constexpr int kAll = S::kRows * kLanes;
  static constexpr int kCount = (kAll + S::kThreads - 1) / S::kThreads;
  static_assert(kAll % S::kThreads == 0 || kCount == 1);

  const int thread = thread_index();

  __device__ __forceinline__ bool any() const { return kAll >= S::kThreads || thread < kAll; }
  __device__ __forceinline__ int row(int i) const { return (thread + i * S::kThreads) / kLanes; }
  __device__ __forceinline__ int column() const { return thread % kLanes * kColumns; }
  // Where a vector lies in a tile [rows, columns].
  __device__ __forceinline__ int at(int i, int pitch) const { return row(i) * pitch + column(); }
};

// Starts bringing this thread's vectors of a tile to shared memory, where only this thread reads
// them: of rows of a [*, width] matrix, from a column on, zero outside of it. The caller commits
// and waits.
template <class Own, class X>
__device__ __forceinline__ void bring(X* tile, int pitch, const X* matrix, const int64_t* row,
                                      int count, int column, int64_t width, bool aligned) {
  const Own own;
  if (!own.any()) return;
  const int first = column + own.column(), left = static_cast<int>(width) - first;
#pragma unroll
  for (int v = 0; v < Own::kCount; ++v) {
    const int i = own.row(v);
    const bool there = i < count && left > 0;
    const X* from = there ? matrix + row[i] * width + first : matrix;
    X* to = tile + own.at(v, pitch);
    if (aligned) {
      copy_async(to, from, there ? 16 : 0);
    } else {
#pragma unroll
      for (int e = 0; e < kVector<X>; ++e) {
        to[e] = there && e < left ? from[e] : static_cast<X>(0.0f);
      }
    }
  }
}

template <class X>
__device__ __forceinline__ void copy_row(X* to, const X* from, int64_t count, bool aligned) {
  const int lane = thread_index() % 32;
  for (int64_t i = lane * kVector<X>; i < count; i += 32 * kVector<X>) {
    X values[kVector<X>];
    load(values, from + i, count - i, aligned);
    store(to + i, values, count - i, aligned);
  }
}

template <class X, class P, class S>
class RowTile {
 public:
  using T = typename P::Operand;
  using C = typename P::Sum;
  using Sums = Product<P, S>;
  using Own = Elements<X, S>;

  const LinearAdapterProblem& p;
  const SharedLayout& layout;
  const int64_t width, first;  // columns of x; the position of the first row
  const int count;             // rows that are there
  const int adapter;
  const AdapterView& view;
  const DataType rounding;
  const bool float_weights, pre;
  const int buffer;  // of two, for the rows

  __device__ __forceinline__ RowTile(const LinearAdapterProblem& problem,
                                     const SharedLayout& shared, const Segment& segment,
                                     int64_t first_position, int row_count,
                                     const AdapterView& adapter_view, int row_buffer = 0)
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
        buffer(row_buffer) {}

  __device__ __forceinline__ int64_t* row() const {
    return shared_at<int64_t>(layout.row) + buffer * S::kRows;
  }
  // 0 for rows that are not there, or that stochastic depth drops.
  __device__ __forceinline__ int* active() const {
    return shared_at<int>(layout.active) + buffer * S::kRows;
  }
  __device__ __forceinline__ C* mean() const { return shared_at<C>(layout.mean); }
  __device__ __forceinline__ C* rstd() const { return shared_at<C>(layout.rstd); }
  __device__ __forceinline__ C* sums() const { return shared_at<C>(layout.sums); }

  // Finds the rows; others may read `row` and `active` after a barrier.
  __device__ __forceinline__ void find_rows(const Depth& depth) const {
    const int i = thread_index();
    if (i >= S::kRows) return;
    const int64_t found = i < count ? row_at(p.routing, depth.sample_rows, first + i) : 0;
    row()[i] = found;
    active()[i] = i < count && depth.keeps_row(found);
  }

  __device__ __forceinline__ WeightMatrix up() const {
    return WeightMatrix::make<X, P>(view.up, view.up_stride, width, view.bottleneck, float_weights,
                                    rounding != kNotRounded);
  }
  __device__ __forceinline__ WeightMatrix down() const {
    return WeightMatrix::make<X, P>(view.down, view.down_stride, view.bottleneck, width,
                                    float_weights, rounding != kNotRounded);
  }
  // Whether there are only whole blocks of columns, and rows and weights begin at multiples of 16
  // bytes and are copied as they are: then nothing needs to be checked for each vector.
  __device__ __forceinline__ bool whole(const void* first_rows, const void* second_rows) const {
    return width % kBlock == 0 && is_aligned(first_rows) && is_aligned(second_rows) &&
           down().copied && up().copied && is_aligned(view.norm_weight) &&
           is_aligned(view.norm_bias);
  }

  __device__ __forceinline__ int up_steps() const {
    return static_cast<int>((view.bottleneck + kStep<P> - 1) / kStep<P>);
  }

  // Some columns of the norm's weight and bias.
  template <bool whole = false, int n>
  __device__ __forceinline__ void load_norm(C (&weight)[n], C (&bias)[n], int64_t column) const {
    const int left = whole ? n : static_cast<int>(width - column);
    load_weights<X>(weight, view.norm_weight, float_weights, column, left,
                    whole || is_aligned(view.norm_weight));
    load_weights<X>(bias, view.norm_bias, float_weights, column, left,
                    whole || is_aligned(view.norm_bias));
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
template <class X, class P, class S>
class UpProduct {
  using Tile = RowTile<X, P, S>;
  using T = typename P::Operand;
  using Weights = WeightTile<X, P, S, kBlock, kStep<P>>;

 public:
  // `activated` [rows, bottleneck] is in shared memory, or, where it does not fit, in memory from a
  // pointer on, its rows `stride` apart, with zeros up to whole steps of 16 elements.
  __device__ __forceinline__ UpProduct(const Tile& tile, const T* in_memory, int64_t stride)
      : tile_(tile),
        in_memory_(in_memory),
        in_memory_stride_(stride),
        steps_(tile.up_steps()),
        weights_(tile.up(), 0, 0) {}

  // Prepares for some blocks of columns, one after the other. `whole`: see RowTile::whole.
  template <bool whole = false>
  __device__ __forceinline__ void start(int64_t first_block, int64_t blocks) {
    __syncthreads();  // the buffers may still be in use
    weights_ = Weights(tile_.up(), first_block * kBlock, 0);
    step_ = buffer_ = 0;
    left_ = static_cast<int>(blocks) * steps_;
    if (left_ > 0) fill<whole>();
  }

  // The sums of the next block. There is a barrier in it before anything else is done.
  template <bool whole = false>
  __device__ __forceinline__ void next(Product<P, S>& product) {
    product.clear();
    for (int step = 0; step < steps_; ++step) {
      const T* left = shared_at<T>(tile_.layout.activated) + step * kStep<P>;
      const T* const weights = shared_at<T>(tile_.layout.weights[buffer_]);
      if (!tile_.layout.activated_resident) {
        T* piece = shared_at<T>(tile_.layout.left[buffer_]);
        fill_tile<P, S, S::kRows, kStep<P>>(
            piece, kStepPitch<P>, kNotRounded, [&](int row, int column, auto& values) {
              const int64_t j = step * kStep<P> + column;
              load(values, in_memory_ + row * in_memory_stride_ + j,
                   row < tile_.count && j < in_memory_stride_ ? kVector<T> : 0, true);
            });
        left = piece;
      }
      copy_async_wait<0>();
      __syncthreads();
      buffer_ ^= 1;
      if (--left_ > 0) {
        if (++step_ == steps_) {
          step_ = 0;
          weights_.move(kBlock, -(steps_ - 1) * kStep<P>);
        } else {
          weights_.move(0, kStep<P>);
        }
        fill<whole>();
      }
      product.template multiply<true, true>(left, tile_.layout.activated_pitch, weights,
                                            kStepPitch<P>,
                                            step_depth<P>(tile_.view.bottleneck, step));
    }
  }

 private:
  template <bool whole>
  __device__ __forceinline__ void fill() const {
    weights_.template fill<whole>(shared_at<T>(tile_.layout.weights[buffer_]), kStepPitch<P>,
                                  tile_.rounding);
    copy_async_commit();
  }

  const Tile& tile_;
  const T* in_memory_;
  int64_t in_memory_stride_;
  const int steps_;
  Weights weights_;  // the piece that is filled next
  int step_ = 0, left_ = 0, buffer_ = 0;
};

}  // namespace adapter_ext::cuda
