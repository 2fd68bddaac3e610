// The forward of linear_adapter. A tile of rows goes through the whole layer in one kernel; where
// tiles are too few to keep the device busy (decode), the first product is split along D and the
// second along its columns, in kernels of their own. An element's value does not depend on which
// kernels made it: sums over D are taken by chunks, in the same order.
//
// Where shared memory has no room for all columns of x, the first ones are read three times: by the
// norm from the first to the last, by the first product from the last to the first, and for y from
// the first again. So what was read last is read next, while the cache still has it.
#pragma once

#include "cuda/instances.h"
#include "cuda/rows.cuh"

namespace adapter_ext::cuda {

inline constexpr int kChunk = 256;  // columns of x whose products are summed first
// Buffers of weights in decode, where weights are nearly all that is read.
inline constexpr int kDownStages = 4;

struct ForwardParams {
  LinearAdapterForward problem;
  SharedLayout layout;
  Parts parts;
  Chance depth, dropout;
  Divisor sample_rows;
  int64_t splits;   // blocks that share a tile
  bool statistics;  // up kernel: only the post norm's moments
  void* activated;  // operands of the second product, by position, where shared memory has no room
  void* partials;   // [chunks, rows, hidden_stride]: the first product's sums
  void* moments;    // [rows, column blocks, 2]: the post norm's mean and sum of squares
  void* penalties;  // [rows, penalty_blocks]: ||d||² of each, by position
  int64_t penalty_blocks;
  Adapters adapters;
};

// Mean and sum of squared deviations of `count` values.
template <class C>
struct Moments {
  C mean, squares, count;

  // Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
  // variances" (1979).
  __device__ __forceinline__ void add(const Moments& other) {
    if (other.count == C(0)) return;
    const C total = count + other.count, delta = other.mean - mean;
    const C share = quotient(other.count, total);
    mean += delta * share;
    squares += other.squares + delta * delta * (count * share);
    count = total;
  }
  // Adds n values, of which some are there.
  template <int n>
  __device__ __forceinline__ void add(const C (&values)[n], int64_t there) {
    if (there <= 0) return;
    Moments other{C(0), C(0), static_cast<C>(there < n ? there : n)};
#pragma unroll
    for (int e = 0; e < n; ++e) other.mean += e < there ? values[e] : C(0);
    other.mean = there < n ? quotient(other.mean, other.count) : other.mean * (C(1) / n);
#pragma unroll
    for (int e = 0; e < n; ++e) {
      const C deviation = values[e] - other.mean;
      other.squares += e < there ? deviation * deviation : C(0);
    }
    add(other);
  }
  // Adds n values that are all there to those of `steps` additions of as many; `share` is
  // 1 / (steps + 1).
  template <int n>
  __device__ __forceinline__ void add_whole(const C (&values)[n], C share, C steps) {
    C sum = 0, sum_of_squares = 0;
#pragma unroll
    for (int e = 0; e < n; ++e) sum += values[e];
    const C average = sum * (C(1) / n);
#pragma unroll
    for (int e = 0; e < n; ++e) {
      const C deviation = values[e] - average;
      sum_of_squares += deviation * deviation;
    }
    const C delta = average - mean;
    mean += delta * share;
    squares += sum_of_squares + delta * delta * (n * steps * share);
  }
  // Adds those of the lanes of a warp, the same in all of them.
  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      add({__shfl_xor_sync(0xffffffffu, mean, distance),
           __shfl_xor_sync(0xffffffffu, squares, distance),
           __shfl_xor_sync(0xffffffffu, count, distance)});
    }
  }
};

// Whether columns of x that are not resident are brought in stages, by the threads that use them.
template <class X, class P>
inline constexpr bool kStages = sizeof(X) == sizeof(typename P::Operand);

template <class X, class P, class S>
class ForwardTile : public RowTile<X, P, S> {
  using Base = RowTile<X, P, S>;

 public:
  using Base::active;
  using Base::count;
  using Base::first;
  using Base::float_weights;
  using Base::layout;
  using Base::mean;
  using Base::pre;
  using Base::row;
  using Base::rstd;
  using Base::view;
  using Base::width;
  using typename Base::C;
  using typename Base::Own;
  using typename Base::Sums;
  using typename Base::T;

  const ForwardParams& params;
  const LinearAdapterForward& f;
  const bool x_aligned, y_aligned;
  const int64_t column_blocks;

  __device__ __forceinline__ ForwardTile(const ForwardParams& parameters, const Segment& segment,
                                         int64_t first_position, int row_count)
      : Base(parameters.problem, parameters.layout, segment, first_position, row_count,
             parameters.adapters.share(segment.adapter, parameters.layout.adapter).view),
        params(parameters),
        f(parameters.problem),
        x_aligned(is_aligned(f.x, width * static_cast<int64_t>(sizeof(X)))),
        y_aligned(is_aligned(f.y, width * static_cast<int64_t>(sizeof(X)))),
        column_blocks((width + kBlock - 1) / kBlock) {}

  // The first column of x that is in shared memory, a multiple of kBlock.
  __device__ __forceinline__ int resident_from() const {
    return static_cast<int>(width) - layout.x_columns;
  }
  // n elements of a row of x: behind the last column there are zeros. Columns of one block are all
  // resident, or none of them.
  template <bool whole, int n>
  __device__ __forceinline__ void load_x(C (&to)[n], int i, int column, bool resident) const {
    const int left = whole ? n : static_cast<int>(width) - column;
    if (resident) {
      const X* from = shared_at<X>(layout.x) + i * layout.x_pitch + column - resident_from();
      load(to, from, left, whole || x_aligned);
    } else {
      load(to, static_cast<const X*>(f.x) + row()[i] * width + column, left, whole || x_aligned);
    }
  }

  // Brings the norm's weight and bias for some columns to shared memory, where it has room.
  __device__ __forceinline__ void bring_norm(int64_t first_column, int64_t columns) const {
    if (!layout.norm_columns) return;
    const int size = float_weights ? 4 : static_cast<int>(sizeof(X));
    const int bytes = static_cast<int>(columns) * size;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const char* from = static_cast<const char*>(which == 0 ? view.norm_weight : view.norm_bias) +
                         first_column * size;
      char* to = shared_at<char>(layout.norm) + which * layout.norm_columns * size;
      const int vectors = is_aligned(from) ? bytes / 16 : 0;  // the rest goes by pairs of bytes
      for (int i = thread_index(); i < vectors; i += S::kThreads) {
        copy_async(to + 16 * i, from + 16 * i, 16);
      }
      for (int at = 16 * vectors + 2 * thread_index(); at < bytes; at += 2 * S::kThreads) {
        *reinterpret_cast<uint16_t*>(to + at) = *reinterpret_cast<const uint16_t*>(from + at);
      }
    }
  }
  // Some columns of the norm's weight and bias; `first_column`: of those that were brought.
  template <bool whole, int n>
  __device__ __forceinline__ void norm_at(C (&weight)[n], C (&bias)[n], int column,
                                          int first_column) const {
    if (!layout.norm_columns) return this->template load_norm<whole>(weight, bias, column);
    const char* brought = shared_at<char>(layout.norm);
    const int left = whole ? n : static_cast<int>(width) - column, at = column - first_column;
    if constexpr (whole && std::is_same_v<P, TensorCore<X>>) {  // weights are copied: of x's type
      const X* from = reinterpret_cast<const X*>(brought) + at;
      load_aligned(weight, from);
      load_aligned(bias, from + layout.norm_columns);
    } else {
      load_weights<X>(weight, brought, float_weights, at, left, true);
      load_weights<X>(bias, brought, float_weights, layout.norm_columns + at, left, true);
    }
  }

  // Brings the columns of x that have room to shared memory. Call after a barrier, and have one
  // before they are read.
  __device__ __forceinline__ void bring_x() const {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    for (int i = warp; i < count; i += S::kWarps) {
      const X* from = static_cast<const X*>(f.x) + (row()[i] + 1) * width - layout.x_columns;
      X* to = shared_at<X>(layout.x) + i * layout.x_pitch;
      if (x_aligned) {
        for (int c = lane * kVector<X>; c < layout.x_columns; c += 32 * kVector<X>) {
          copy_async(to + c, from + c, 16);
        }
      } else {
        for (int c = lane; c < layout.x_columns; c += 32) to[c] = from[c];
      }
    }
  }

  // The pre norm's mean and 1 / sqrt(variance + eps), in one pass over the rows, some of them at a
  // time for more reads under way. Deviations from a row's first element are small where its mean
  // is large.
  template <bool whole_rows>
  __device__ __forceinline__ void normalize() const {
    constexpr int n = kVector<X>, some = 4;
    static_assert(S::kRows % some == 0);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int columns = static_cast<int>(width);
    const bool whole = whole_rows || columns % n == 0;
    for (int begin = warp * some; begin < count; begin += S::kWarps * some) {
      Moments<C> moments[some] = {};
      C shift[some] = {};
#pragma unroll
      for (int k = 0; k < some; ++k) {
        if (begin + k >= count) continue;
        const X* from = resident_from() == 0
                            ? shared_at<X>(layout.x) + (begin + k) * layout.x_pitch
                            : static_cast<const X*>(f.x) + row()[begin + k] * width;
        shift[k] = static_cast<C>(*from);
      }
      C steps = 0;
      for (int c = lane * n; c < columns; c += 32 * n, steps += 1) {
        const bool resident = c >= resident_from();
        const C share = quotient(C(1), steps + C(1));
        C values[some][n];
#pragma unroll
        for (int k = 0; k < some; ++k) {
          if (begin + k < count) {
            load_x<whole_rows>(values[k], begin + k, c, resident);
          } else {
#pragma unroll
            for (int e = 0; e < n; ++e) values[k][e] = C(0);
          }
        }
#pragma unroll
        for (int k = 0; k < some; ++k) {
#pragma unroll
          for (int e = 0; e < n; ++e) values[k][e] -= shift[k];
          if (whole) {
            moments[k].add_whole(values[k], share, steps);
          } else {
            moments[k].add(values[k], columns - c);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < some; ++k) {
        if (whole) moments[k].count = steps * n;
        moments[k].add_lanes();
        if (begin + k < count && lane == 0) {
          mean()[begin + k] = moments[k].mean + shift[k];
          rstd()[begin + k] = rstd_of(moments[k]);
        }
      }
    }
  }

  // Steps of the first product whose columns of x come in stages.
  __device__ __forceinline__ bool staged(int step) const {
    return kStages<X, P> && layout.x_staged && step * kStep<P> < resident_from();
  }
  __device__ __forceinline__ X* stage(int step) const {
    return shared_at<X>(layout.x_stage[step & 1]);
  }
  // Starts bringing columns of x to a stage, vectors of a row by neighbouring threads.
  template <int columns>
  __device__ __forceinline__ void bring_stage(X* to, int column) const {
    constexpr int n = kVector<X>, across = columns / n, down = S::kThreads / across;
    const int thread = static_cast<int>(threadIdx.x), own = thread / across,
              at = thread % across * n;
#pragma unroll
    for (int i = own; i < S::kRows; i += down) {
      const bool there = i < count && column + at < width;
      const X* from = static_cast<const X*>(f.x);
      copy_async(to + i * kStagePitch<X, P> + at,
                 there ? from + row()[i] * width + column + at : from, there ? 16 : 0);
    }
  }

  // What the first product reads of a step: some columns of LN(x), or of x. A thread's vectors are
  // of the same columns. `first_column`: of the norm's that were brought.
  template <bool whole>
  __device__ __forceinline__ void fill_left(T* tile, int step, int first_column) const {
    constexpr int n = kVector<T>, across = kStep<P> / n, down = S::kThreads / across;
    constexpr int passes = S::kRows / down;
    static_assert(passes * down == S::kRows);
    const int thread = static_cast<int>(threadIdx.x), own = thread / across,
              at = thread % across * n;
    const int column = step * kStep<P> + at;
    const bool resident = step * kStep<P> >= resident_from(), inside = whole || column < width;
    C values[passes][n];
#pragma unroll
    for (int i = 0; i < passes; ++i) {
      if (inside && own + i * down < count) {
        if (whole && staged(step)) {
          load_aligned(values[i], stage(step) + (own + i * down) * kStagePitch<X, P> + at);
        } else {
          load_x<whole>(values[i], own + i * down, column, resident);
        }
      } else {
#pragma unroll
        for (int e = 0; e < n; ++e) values[i][e] = C(0);
      }
    }
    if (pre && inside) {
      C weight[n], bias[n];  // zero behind the last column
      norm_at<whole>(weight, bias, column, first_column);
#pragma unroll
      for (int i = 0; i < passes; ++i) {
        const bool there = own + i * down < count;
        const C row_mean = there ? mean()[own + i * down] : C(0);
        const C row_rstd = there ? rstd()[own + i * down] : C(0);
#pragma unroll
        for (int e = 0; e < n; ++e) {
          values[i][e] = (values[i][e] - row_mean) * row_rstd * weight[e] + bias[e];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < passes; ++i) {
      store_operands<P>(tile + (own + i * down) * kStepPitch<P> + at, values[i], this->rounding);
    }
  }

  // The first product for one block of the bottleneck: calls function(chunk, sums) for some chunks
  // of columns of x, from the last to the first. Barriers come before the first access to the
  // buffers.
  // Weights of some stages are on their way at a time, the first of them before before() is called.
  template <bool whole, int stages, class Before, class Function>
  __device__ __forceinline__ void down(int64_t block, int64_t first_chunk, int64_t end_chunk,
                                       Before&& before, Function&& function) const {
    constexpr int chunk_steps = kChunk / kStep<P>;
    const int all = static_cast<int>((width + kStep<P> - 1) / kStep<P>);
    const int begin = static_cast<int>(first_chunk) * chunk_steps;
    const int end = min(static_cast<int>(end_chunk) * chunk_steps, all);
    const int left_columns = static_cast<int>(view.bottleneck - block * kBlock);
    const int columns = min(left_columns, kBlock);
    WeightTile<X, P, S, kBlock, kStep<P>> weights(this->Base::down(), block * kBlock,
                                                  (end - 1) * kStep<P>);
    const auto buffer = [&](int step) {
      return shared_at<T>(layout.weights[0] + step % stages * kWeightBytes<P>);
    };
    const auto fill = [&](int step) {
      if (step >= begin) {
        weights.template fill<whole>(buffer(step), kStepPitch<P>, this->rounding);
        weights.move(0, -kStep<P>);
        if (whole && staged(step)) bring_stage<kStep<P>>(stage(step), step * kStep<P>);
      }
      copy_async_commit();
    };
    Sums sums;
    sums.clear();
    __syncthreads();
    for (int i = 1; i < stages; ++i) fill(end - i);
    before();
    for (int step = end - 1; step >= begin; --step) {
      T* left = shared_at<T>(layout.left[step & 1]);
      if (whole && staged(step)) copy_async_wait<stages - 2>();  // what this thread brought
      fill_left<whole>(left, step, begin * kStep<P>);
      copy_async_wait<stages - 2>();
      __syncthreads();
      fill(step - (stages - 1));
      sums.template multiply<true, true>(left, kStepPitch<P>, buffer(step), kStepPitch<P>, kStep<P>,
                                         columns);
      if (step % chunk_steps == 0) {
        function(step / chunk_steps, sums);
        sums.clear();
      }
    }
  }

  // Keeps some elements of h for the backward (where `save` says so), and their activations for the
  // second product.
  __device__ __forceinline__ void keep_hidden(int i, int j, C (&h)[kVector<C>], bool save) const {
    constexpr int n = kVector<C>;
    const int there = static_cast<int>(view.bottleneck) - j;
    if (save && f.hidden && i < count && j < f.hidden_stride) {
      const bool is_active = active()[i];
      C kept[n];
#pragma unroll
      for (int e = 0; e < n; ++e) kept[e] = is_active && e < there ? h[e] : C(0);
      const int stride = static_cast<int>(f.hidden_stride);
      store(static_cast<C*>(f.hidden) + row()[i] * stride + j, kept, stride - j, stride % n == 0);
    }
    activate_all(f.activation, h);
    T z[n];
#pragma unroll
    for (int e = 0; e < n; ++e) {
      z[e] = e < there ? P::round(h[e], this->rounding) : static_cast<T>(C(0));
    }
    if (layout.activated_resident) {
      store_aligned<Space::kShared>(shared_at<T>(layout.activated) + i * layout.activated_pitch + j,
                                    z);
    } else if (i < count) {
      store_aligned<Space::kGlobal>(activated_in_memory() + i * activated_stride() + j, z);
    }
  }
  // The same of a block of the bottleneck, from the first product's sums.
  __device__ __forceinline__ void keep_hidden(int block, Sums& hidden) const {
    constexpr int n = kVector<C>, across = kBlock / n;
    __syncthreads();  // the sums may have the place of operands
    hidden.template store<Space::kShared>(this->sums(), kSumPitch<C>);
    __syncthreads();
#pragma unroll 1
    for (int vector = static_cast<int>(threadIdx.x); vector < S::kRows * across;
         vector += S::kThreads) {
      const int i = vector / across, j = vector % across * n;
      C h[n];
      load_aligned(h, this->sums() + i * kSumPitch<C> + j);
      keep_hidden(i, block * kBlock + j, h, true);
    }
  }

  // What lies behind an adapter's own blocks in the saved h.
  __device__ __forceinline__ void clear_hidden() const {
    if (!f.hidden) return;
    const int64_t begin = round_up(view.bottleneck, kBlock);
    if (begin >= f.hidden_stride) return;
    for (int i = 0; i < count; ++i) {
      C* to = static_cast<C*>(f.hidden) + row()[i] * f.hidden_stride;
      for (int64_t j = begin + threadIdx.x; j < f.hidden_stride; j += S::kThreads) to[j] = C(0);
    }
  }

  __device__ __forceinline__ void keep_statistics() const {
    const int i = thread_index();
    if (!f.mean || i >= count) return;
    static_cast<C*>(f.mean)[row()[i]] = active()[i] ? mean()[i] : C(0);
    static_cast<C*>(f.rstd)[row()[i]] = active()[i] ? rstd()[i] : C(0);
  }

  __device__ __forceinline__ int64_t activated_stride() const {
    return round_up(f.hidden_stride, kBlock);
  }
  __device__ __forceinline__ T* activated_in_memory() const {
    return static_cast<T*>(params.activated) + first * activated_stride();
  }
  __device__ __forceinline__ UpProduct<X, P, S> up_product() const {
    return {*this, activated_in_memory(), activated_stride()};
  }

  // The post norm's moments over some blocks of columns: calls function(vector index, row, block,
  // moments) in all threads that share a row.
  template <class Function>
  __device__ __forceinline__ void moments(UpProduct<X, P, S>& up, int64_t first_block,
                                          int64_t blocks, Function&& function) const {
    up.start(first_block, blocks);
    for (int64_t block = first_block; block < first_block + blocks; ++block) {
      Sums product;
      up.next(product);
      product.template store<Space::kShared>(this->sums(), kSumPitch<C>);
      __syncthreads();
      const Own own;
      const int64_t columns = width - block * kBlock < kBlock ? width - block * kBlock : kBlock;
#pragma unroll
      for (int v = 0; v < Own::kCount; ++v) {
        C values[kVector<X>];
        load_sums(values, this->sums() + own.row(v) * kSumPitch<C> + own.column());
        C sum = 0, squares = 0;
#pragma unroll
        for (int e = 0; e < kVector<X>; ++e) {
          if (own.column() + e < columns) sum += values[e];
        }
        const C average = sum_over_lanes<Own::kLanes>(sum) / static_cast<C>(columns);
#pragma unroll
        for (int e = 0; e < kVector<X>; ++e) {
          const C deviation = values[e] - average;
          if (own.column() + e < columns) squares += deviation * deviation;
        }
        function(
            v, own.row(v), block,
            Moments<C>{average, sum_over_lanes<Own::kLanes>(squares), static_cast<C>(columns)});
      }
    }
  }

  __device__ __forceinline__ C rstd_of(const Moments<C>& moments) const {
    return C(1) / sqrt(moments.squares / static_cast<C>(width) + static_cast<C>(f.eps));
  }

  // y = x + o where that is all. Operands of the second product
  // are read once, to registers, and 128 columns are made at a time; sums are those of UpProduct.
  static constexpr bool kHasDirect =
      std::is_same_v<P, TensorCore<X>> && S::kRows == 64 && S::kThreads == 512;
  __device__ __forceinline__ bool direct() const {
    return kHasDirect && f.residual && !params.penalties && params.dropout.threshold == 0 &&
           params.depth.threshold == 0 && (resident_from() == 0 || layout.x_staged) &&
           layout.activated_resident && view.bottleneck <= kStep<P>;
  }
  __device__ __forceinline__ void finish_direct() const {
    constexpr int columns = 2 * kBlock, steps = kStep<P> / 16;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int g = lane / 4, t = lane % 4, matrix = lane / 8, line = lane % 8;
    const int first_row = warp % 2 * 32, first_column = warp / 2 * 16;
    const int depth = step_depth<P>(view.bottleneck, 0);
    // Their place is free: two buffers [128, kStep], the weights' and the left operands'.
    WeightTile<X, P, S, columns, kStep<P>> weights(this->Base::up(), 0, 0);
    const auto buffer = [&](int pass) {
      return shared_at<T>(pass & 1 ? layout.left[0] : layout.weights[0]);
    };
    const auto bring = [&](int pass) {
      weights.template fill<true>(buffer(pass), kStepPitch<P>, this->rounding);
      weights.move(columns, 0);
      if (pass * columns < resident_from()) bring_stage<columns>(stage(pass), pass * columns);
      copy_async_commit();
    };
    __syncthreads();
    bring(0);
    uint32_t left[2][steps][4];
    const T* const left_from = shared_at<T>(layout.activated) +
                               (first_row + matrix % 2 * 8 + line) * layout.activated_pitch +
                               matrix / 2 * 8;
    X* to[2][2];
    bool there[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int k = 0; k < steps; ++k) {
        if (16 * k < depth) {
          load_matrices<false>(left[m][k], left_from + 16 * m * layout.activated_pitch + 16 * k);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = first_row + 16 * m + 8 * half + g;
        there[m][half] = i < count;
        to[m][half] = static_cast<X*>(f.y) + row()[i] * width;
      }
    }
    const int all = static_cast<int>(width),
              right_at = (first_column + matrix / 2 * 8 + line) * kStepPitch<P> + matrix % 2 * 8;
    for (int pass = 0; pass * columns < all; ++pass) {
      copy_async_wait<0>();
      __syncthreads();
      if ((pass + 1) * columns < all) bring(pass + 1);
      const int column = pass * columns + first_column;
      if (column >= all) continue;
      const bool resident = pass * columns >= resident_from();
      const int pitch = resident ? layout.x_pitch : kStagePitch<X, P>;
      const X* const from =
          (resident ? shared_at<X>(layout.x) + pass * columns - resident_from() : stage(pass)) +
          (first_row + g) * pitch;
      C sums[2][2][4] = {};
      const T* const right_from = buffer(pass) + right_at;
#pragma unroll
      for (int k = 0; k < steps; ++k) {
        if (16 * k >= depth) break;
        uint32_t pair[4];
        load_matrices<false>(pair, right_from + 16 * k);
        const uint32_t right[2][2] = {{pair[0], pair[1]}, {pair[2], pair[3]}};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add(sums[m][0], left[m][k], right[0], T{});
          multiply_add(sums[m][1], left[m][k], right[1], T{});
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        write_tiles<X>(
            sums[m][0], sums[m][1], first_column, t,
            [&](int half, int at, C(&d)[2]) {
              if (!there[m][half]) return;
              C x_pair[2];
              load_pair(x_pair, from + (16 * m + 8 * half) * pitch + at);
              d[0] += x_pair[0];
              d[1] += x_pair[1];
            },
            [&](int half, int at, const auto& words) {
              if (there[m][half]) {
                store_words<Space::kGlobal>(to[m][half] + pass * columns + at, words);
              }
            });
      }
    }
  }

  // y = x + d, d = scale · mask ⊙ o, and ||d||², for some blocks of columns.
  template <bool whole>
  __device__ __forceinline__ void finish(UpProduct<X, P, S>& up, int64_t first_block,
                                         int64_t blocks, bool started = false) const {
    const Dropout dropout(f, params.dropout);
    const C scale = static_cast<C>(params.depth.kept_scale);
    const Own own;
    const int own_column = own.column();
    C penalty[Own::kCount] = {};
    X* to[Own::kCount];  // the rows of y
    bool active_row[Own::kCount];
#pragma unroll
    for (int v = 0; v < Own::kCount; ++v) {
      const int i = own.row(v);
      to[v] = static_cast<X*>(f.y) + row()[i] * width + own_column;
      active_row[v] = active()[i];
    }
    if (!started) up.template start<whole>(first_block, blocks);
    for (int block = static_cast<int>(first_block); block < first_block + blocks; ++block) {
      const int column = block * kBlock + own_column;
      const int left = whole ? kVector<X> : static_cast<int>(width) - column;
      const bool resident = block * kBlock >= resident_from();
      C from[Own::kCount][kVector<X>];
      const auto load_from = [&] {
#pragma unroll
        for (int v = 0; v < Own::kCount; ++v) {
          if (own.row(v) < count && left > 0) {
            load_x<whole>(from[v], own.row(v), column, resident);
          }
        }
      };
      if (!resident) load_from();  // on its way during the product
      Sums product;
      up.template next<whole>(product);
      product.template store<Space::kShared>(this->sums(), kSumPitch<C>);
      __syncthreads();
      if (resident) load_from();
#pragma unroll
      for (int v = 0; v < Own::kCount; ++v) {
        const int i = own.row(v);
        const bool there = i < count && left > 0;
        C d[kVector<X>];
        if (there) {
          load_sums(d, this->sums() + i * kSumPitch<C> + own_column);
          if (!pre) {
            C weight[kVector<X>], bias[kVector<X>];
            this->template load_norm<whole>(weight, bias, column);
            const C row_mean = mean()[i], row_rstd = rstd()[i];
#pragma unroll
            for (int e = 0; e < kVector<X>; ++e) {
              d[e] = (d[e] - row_mean) * row_rstd * weight[e] + bias[e];
            }
          }
          dropout.apply(d, row()[i], column);
#pragma unroll
          for (int e = 0; e < kVector<X>; ++e) d[e] = active_row[v] ? d[e] * scale : C(0);
        }
        if (params.penalties) {
          C squares = 0;
#pragma unroll
          for (int e = 0; e < kVector<X>; ++e) squares += there && e < left ? d[e] * d[e] : C(0);
          squares = sum_over_lanes<Own::kLanes>(squares);
          penalty[v] += squares;
          if (there && params.penalty_blocks > 1 && own_column == 0) {
            static_cast<C*>(params.penalties)[(first + i) * params.penalty_blocks + block] =
                squares;
          }
        }
        if (there) {
          if (f.residual) {
#pragma unroll
            for (int e = 0; e < kVector<X>; ++e) d[e] += from[v][e];
          }
          store(to[v] + block * kBlock, d, left, whole || y_aligned);
        }
      }
    }
    if (params.penalties && params.penalty_blocks == 1) {
#pragma unroll
      for (int v = 0; v < Own::kCount; ++v) {
        if (own.row(v) < count && own.column() == 0) {
          static_cast<C*>(params.penalties)[first + own.row(v)] = penalty[v];
        }
      }
    }
  }
};

// What the kernels do for rows that no adapter changes: y = x, and zeros for the backward.
template <class X, class C, class S>
__device__ void forward_untouched(const ForwardParams& params, int64_t first, int count) {
  const LinearAdapterForward& f = params.problem;
  const int64_t width = f.hidden_size, bytes = width * static_cast<int64_t>(sizeof(X));
  const bool aligned = is_aligned(f.x, bytes) && is_aligned(f.y, bytes);
  const int lane = thread_index() % 32;
  for (int i = thread_index() / 32; i < count; i += S::kWarps) {
    const int64_t row = row_at(f.routing, params.sample_rows, first + i);
    copy_row(static_cast<X*>(f.y) + row * width, static_cast<const X*>(f.x) + row * width, width,
             aligned);
    if (!f.hidden) continue;
    for (int64_t j = lane; j < f.hidden_stride; j += 32) {
      static_cast<C*>(f.hidden)[row * f.hidden_stride + j] = C(0);
    }
    if (lane == 0) static_cast<C*>(f.mean)[row] = static_cast<C*>(f.rstd)[row] = C(0);
  }
}

// The rows of a block; false where it has none, or where no adapter changes them.
template <class X, class C, class S>
__device__ __forceinline__ bool forward_work(const ForwardParams& params, const Depth& depth,
                                             int64_t block, bool first_of_tile, Segment& segment,
                                             int64_t& first, int& count) {
  const LinearAdapterForward& f = params.problem;
  if (!f.l2_lambda && block == 0 && first_of_tile) {
    for (int64_t a = threadIdx.x; a < f.routing.adapters; a += S::kThreads) {
      static_cast<C*>(f.aux)[a] = C(0);
    }
  }
  segment = params.parts.find(f.routing, block);
  first = segment.begin + segment.part * params.parts.size.value;
  const int64_t left = segment.end - first;
  if (left <= 0) return false;
  count = static_cast<int>(left < params.parts.size.value ? left : params.parts.size.value);
  if (segment.adapter < f.routing.adapters && depth.keeps_adapter(segment.adapter)) return true;
  if (first_of_tile) forward_untouched<X, C, S>(params, first, count);
  return false;
}

// The whole layer for a tile of rows.
template <class X, class P, class S>
__global__ __launch_bounds__(S::kThreads, (kResident<S, typename P::Sum>)) void forward_kernel(
    const __grid_constant__ ForwardParams params) {
  using Tile = ForwardTile<X, P, S>;
  using C = typename P::Sum;
  const Depth depth{params.problem, params.depth, params.sample_rows};
  Segment segment;
  int64_t first;
  int count;
  if (!forward_work<X, C, S>(params, depth, blockIdx.x, true, segment, first, count)) return;
  const Tile tile(params, segment, first, count);
  tile.find_rows(depth);
  __syncthreads();
  tile.bring_x();
  if (tile.pre) tile.bring_norm(0, tile.width);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const int64_t chunks = (tile.width + kChunk - 1) / kChunk;
  const auto run = [&]<bool whole>() {
    if (tile.pre) tile.template normalize<whole>();
    for (int block = 0; block * kBlock < tile.view.bottleneck; ++block) {
      typename Tile::Sums hidden;
      hidden.clear();
      tile.template down<whole, 2>(
          block, 0, chunks, [] {}, [&](int64_t, const auto& sums) { hidden.add(sums); });
      tile.keep_hidden(block, hidden);
    }
    tile.clear_hidden();
    auto up = tile.up_product();
    if (!tile.pre) {
      Moments<C> all[Tile::Own::kCount] = {};
      tile.moments(up, 0, tile.column_blocks,
                   [&](int v, int, int64_t, const Moments<C>& some) { all[v].add(some); });
      const typename Tile::Own own;
      for (int v = 0; v < Tile::Own::kCount; ++v) {
        if (own.column() == 0) {
          tile.mean()[own.row(v)] = all[v].mean;
          tile.rstd()[own.row(v)] = tile.rstd_of(all[v]);
        }
      }
      __syncthreads();
    }
    tile.keep_statistics();
    if constexpr (whole && Tile::kHasDirect) {
      if (tile.pre && tile.direct()) return tile.finish_direct();
    }
    tile.template finish<whole>(up, 0, tile.column_blocks);
  };
  if (tile.whole(params.problem.x, params.problem.y)) {
    run.template operator()<true>();
  } else {
    run.template operator()<false>();
  }
}

// Where part `index` of some begins, of `count` things. There are fewer than 2^31 of them.
__device__ __forceinline__ int64_t part_of(int64_t count, int64_t index, unsigned parts) {
  const unsigned all = static_cast<unsigned>(count), i = static_cast<unsigned>(index);
  return all / parts * i + all % parts * i / parts;
}

// Decode, first kernel: the first product's sums over some chunks of columns.
template <class X, class P>
__global__
__launch_bounds__(kThreads, (kResident<SmallTile, typename P::Sum>)) void forward_down_kernel(
    const __grid_constant__ ForwardParams params) {
  using Tile = ForwardTile<X, P, SmallTile>;
  using C = typename P::Sum;
  const unsigned splits = static_cast<unsigned>(params.splits);
  const int64_t split = blockIdx.x % splits;
  const Depth depth{params.problem, params.depth, params.sample_rows};
  Segment segment;
  int64_t first;
  int count;
  if (!forward_work<X, C, SmallTile>(params, depth, blockIdx.x / splits, split == 0, segment, first,
                                     count)) {
    return;
  }
  const Tile tile(params, segment, first, count);
  tile.find_rows(depth);
  __syncthreads();
  const int64_t chunks = (tile.width + kChunk - 1) / kChunk;
  const int64_t begin = part_of(chunks, split, splits), end = part_of(chunks, split + 1, splits);
  const bool whole = tile.whole(params.problem.x, params.problem.y);
  const int stride = static_cast<int>(round_up(tile.f.hidden_stride, kVector<C>));
  for (int block = 0; block * kBlock < tile.view.bottleneck; ++block) {
    const auto keep = [&](int64_t chunk, auto& sums) {
      C* to = static_cast<C*>(params.partials) + (chunk * tile.f.rows + first) * stride;
      sums.for_each_pair([&](int i, int column, C first_sum, C second_sum) {
        const int j = block * kBlock + column;
        if (i < count && j < stride)
          store_pair<Space::kGlobal>(to + i * stride + j, first_sum, second_sum);
      });
    };
    const auto run = [&]<bool is_whole>() {
      const auto before = [&] {
        if (!tile.pre || block > 0) return;
        tile.bring_norm(begin * kChunk, min(end * kChunk, tile.width) - begin * kChunk);
        copy_async_commit();
        tile.template normalize<is_whole>();
        copy_async_wait<0>();
        __syncthreads();
        if (split == 0) tile.keep_statistics();
      };
      tile.template down<is_whole, kDownStages>(block, begin, end, before, keep);
    };
    if (whole) {
      run.template operator()<true>();
    } else {
      run.template operator()<false>();
    }
  }
}

// Decode, second kernel: the second product and what follows, for some blocks of columns.
template <class X, class P>
__global__
__launch_bounds__(kThreads, (kResident<SmallTile, typename P::Sum>)) void forward_up_kernel(
    const __grid_constant__ ForwardParams params) {
  using Tile = ForwardTile<X, P, SmallTile>;
  using C = typename P::Sum;
  const LinearAdapterForward& f = params.problem;
  const unsigned splits = static_cast<unsigned>(params.splits);
  const int64_t split = blockIdx.x % splits;
  const Depth depth{f, params.depth, params.sample_rows};
  const Segment segment = params.parts.find(f.routing, blockIdx.x / splits);
  const int64_t first = segment.begin + segment.part * params.parts.size.value;
  if (segment.adapter >= f.routing.adapters || first >= segment.end ||
      !depth.keeps_adapter(segment.adapter)) {
    return;
  }
  const int64_t left = segment.end - first;
  const int count = left < 16 ? static_cast<int>(left) : 16;
  const Tile tile(params, segment, first, count);
  tile.find_rows(depth);
  __syncthreads();
  const int64_t begin = part_of(tile.column_blocks, split, splits);
  const int64_t end = part_of(tile.column_blocks, split + 1, splits);
  auto up = tile.up_product();
  if (tile.pre) up.start(begin, end - begin);  // weights are on their way while h is summed
  const int64_t chunks = (tile.width + kChunk - 1) / kChunk;
  constexpr int n = kVector<C>;
  const int stride = static_cast<int>(round_up(f.hidden_stride, n));
  const int across = static_cast<int>(round_up(tile.view.bottleneck, kBlock)) / n;
  const int64_t chunk_step = f.rows * stride;
#pragma unroll 1
  for (int vector = static_cast<int>(threadIdx.x); vector < 16 * across; vector += kThreads) {
    const int i = vector / across, j = vector % across * n;
    C sum[n] = {};
    if (i < count && j < stride) {
      const C* from = static_cast<const C*>(params.partials) + (chunks - 1) * chunk_step +
                      (first + i) * stride + j;
#pragma unroll 4
      for (int chunk = 0; chunk < chunks; ++chunk, from -= chunk_step) {
        C part[n];
        load_aligned(part, from);
#pragma unroll
        for (int e = 0; e < n; ++e) sum[e] += part[e];
      }
    }
    tile.keep_hidden(i, j, sum, split == 0 && !params.statistics);
  }
  if (split == 0 && !params.statistics) tile.clear_hidden();
  C* moments = static_cast<C*>(params.moments) + 2 * first * tile.column_blocks;
  if (params.statistics) {
    const typename Tile::Own own;
    tile.moments(up, begin, end - begin, [&](int, int i, int64_t block, const Moments<C>& some) {
      if (i < count && own.column() == 0) {
        moments[2 * (i * tile.column_blocks + block)] = some.mean;
        moments[2 * (i * tile.column_blocks + block) + 1] = some.squares;
      }
    });
    return;
  }
  if (!tile.pre) {
    const int i = thread_index();
    if (i < count) {
      Moments<C> all = {};
      for (int64_t block = 0; block < tile.column_blocks; ++block) {
        const int64_t columns = tile.width - block * kBlock;
        const C* from = moments + 2 * (i * tile.column_blocks + block);
        all.add({from[0], from[1], static_cast<C>(columns < kBlock ? columns : kBlock)});
      }
      tile.mean()[i] = all.mean;
      tile.rstd()[i] = tile.rstd_of(all);
    }
    __syncthreads();
    if (split == 0) tile.keep_statistics();
  }
  if (tile.whole(f.x, f.y)) {
    tile.template finish<true>(up, begin, end - begin, tile.pre);
  } else {
    tile.template finish<false>(up, begin, end - begin, tile.pre);
  }
}

// aux[a] = λ / B Σ ||d||² over the adapter's rows, in an order that depends on their number alone.
template <class C>
__global__ __launch_bounds__(kThreads) void aux_kernel(
    const __grid_constant__ ForwardParams params) {
  const LinearAdapterForward& f = params.problem;
  const int64_t a = blockIdx.x;
  const int thread = thread_index();
  const int64_t begin = first_position(f.routing, a), end = first_position(f.routing, a + 1);
  double sum = 0;
  if (Depth{f, params.depth, params.sample_rows}.keeps_adapter(a)) {
    for (int64_t position = begin + thread; position < end; position += kThreads) {
      C penalty = 0;
      const C* from = static_cast<const C*>(params.penalties) + position * params.penalty_blocks;
      for (int64_t block = 0; block < params.penalty_blocks; ++block) penalty += from[block];
      sum += static_cast<double>(penalty);
    }
  }
  sum = sum_over_lanes<32>(sum);
  double* of_warp = reinterpret_cast<double*>(shared_memory());
  if (thread % 32 == 0) of_warp[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) {
    for (int warp = 1; warp < kWarps; ++warp) sum += of_warp[warp];
    const double samples = static_cast<double>(params.sample_rows.divide(end - begin));
    const double lambda = static_cast<double>(static_cast<const C*>(f.l2_lambda)[a]);
    static_cast<C*>(f.aux)[a] = samples > 0 ? static_cast<C>(lambda * sum / samples) : C(0);
  }
}

static_assert(sizeof(ForwardParams) <= 4096);

template <class X, class P, class S>
void forward_whole(const ForwardCall& call, ForwardParams& params) {
  const LinearAdapterForward& f = call.problem;
  // Two blocks of a multiprocessor, so that one computes while the other waits. Large tiles that do
  // not fit then have one to themselves, with more of x, which otherwise is read again from memory.
  const int64_t reserved = 1024;  // by CUDA, for each block
  const int64_t whole = call.limits.shared_memory, half = (whole - reserved) / 2;
  SharedLayout& layout = params.layout;
  layout = shared_layout<X, P, S>(f, half);
  const bool fits = layout.activated_resident;
  if (!fits) layout = shared_layout<X, P, S>(f, whole);
  const int64_t limit = fits && S::kRows < LargeTile::kRows ? half : whole;
  if (f.norm_position == NormPosition::kPre) take_norm<X>(layout, f, f.hidden_size, half);
  const SharedLayout products = layout;
  if (fits) take_x<X>(layout, S::kRows, f.hidden_size, half);
  if (!fits || layout.x_columns < f.hidden_size) {
    layout = products;
    if (kStages<X, P> && fits) take_stages<X, P>(layout, S::kRows);
    take_x<X>(layout, S::kRows, f.hidden_size, limit);
  }
  params.parts = Parts::make(f, S::kRows, false);
  launch("linear_adapter", &forward_kernel<X, P, S>, params.parts.blocks, S::kThreads, layout.bytes,
         call.stream, params);
}

template <class X, class P>
void Forward<X, P>::run(const ForwardCall& call) {
  using T = typename P::Operand;
  using C = typename P::Sum;
  const LinearAdapterForward& f = call.problem;
  auto params = call.params<ForwardParams>();
  const int64_t processors = call.limits.multiprocessors;
  const int64_t tiles = f.rows / 16 + std::min(f.routing.adapters, f.rows);
  const SharedLayout split_layout =
      shared_layout<X, P, SmallTile>(f, call.limits.shared_memory, kDownStages);
  const bool split = tiles < 2 * processors && split_layout.activated_resident;
  const int64_t chunks = (f.hidden_size + kChunk - 1) / kChunk;
  const int64_t column_blocks = (f.hidden_size + kBlock - 1) / kBlock;
  params.penalty_blocks = split ? column_blocks : 1;
  Carver workspace(call.workspace);
  const int64_t operands = f.rows * round_up(f.hidden_stride, kBlock);
  params.activated = workspace.take<T>(operands);
  if (split) {
    params.partials = workspace.take<C>(chunks * f.rows * round_up(f.hidden_stride, kVector<C>));
  }
  if (split) params.moments = workspace.take<C>(2 * f.rows * column_blocks);
  C* penalties = workspace.take<C>(f.rows * params.penalty_blocks);
  if (f.l2_lambda) params.penalties = penalties;
  if (call.bytes) {
    *call.bytes = workspace.bytes();
    return;
  }
  if (split) {
    params.layout = split_layout;
    params.parts = Parts::make(f, 16, false);
    const auto launch_split = [&](const char* name, auto kernel) {
      launch(name, kernel, params.parts.blocks * params.splits, kThreads, params.layout.bytes,
             call.stream, params);
    };
    const int64_t wanted =
        4 * processors / std::max<int64_t>(std::min(tiles, params.parts.blocks), 1);
    params.splits = std::clamp<int64_t>(wanted, 1, chunks);
    if (f.norm_position == NormPosition::kPre) {
      take_norm<X>(params.layout, f, (chunks + params.splits - 1) / params.splits * kChunk,
                   call.limits.shared_memory);
    }
    launch_split("linear_adapter's first product", &forward_down_kernel<X, P>);
    // Each of them reads all sums of the first product, so that more than one for a multiprocessor
    // pay only where a tile has few rows.
    const int64_t tile_rows = (f.rows + tiles - 1) / std::max<int64_t>(tiles, 1);
    const int64_t most = std::max<int64_t>(wanted / 4, 128 / std::max<int64_t>(tile_rows, 1));
    params.splits = std::clamp<int64_t>(std::min(wanted, most), 1, column_blocks);
    if (f.norm_position == NormPosition::kPost) {
      params.statistics = true;
      launch_split("linear_adapter's statistics", &forward_up_kernel<X, P>);
      params.statistics = false;
    }
    launch_split("linear_adapter's second product", &forward_up_kernel<X, P>);
  } else if (large_tiles(f, processors)) {
    forward_whole<X, P, LargestForwardTile<X>>(call, params);
  } else {
    forward_whole<X, P, SmallTile>(call, params);
  }
  if (f.l2_lambda && f.routing.adapters > 0) {
    launch("linear_adapter's auxiliary loss", &aux_kernel<C>, f.routing.adapters, kThreads,
           kWarps * 8, call.stream, params);
  }
}

}  // namespace adapter_ext::cuda
