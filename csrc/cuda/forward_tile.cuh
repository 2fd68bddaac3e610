// What the kernels of the forward do with a tile of rows, step by step.
//
// Where shared memory has no room for all columns of x, the first ones are read three times: by the
// norm from the first to the last, by the first product from the last to the first, and for y from
// the first again. So what was read last is read next, while the cache still has it.
#pragma once

#include "cuda/rows.cuh"

namespace adapter_ext::cuda {

// How sums over the columns of x are taken, by all kernels alike, so that a row's bits do not
// depend on which of them made it: along k in a chunk of columns, chunk by chunk in a part of the
// columns, and part by part; chunks and parts from the last to the first. Large tiles make the
// parts at the same time (PartProducts), decode makes chunks by different blocks.
struct ColumnOrder {
  static constexpr int kParts = 4;

  int chunk;  // columns of a chunk, a multiple of kBlock, at most 256
  int chunks;
  int first_chunk[kParts + 1];   // of each part, and the end
  int first_column[kParts + 1];  // likewise

  static ColumnOrder make(int64_t width) {
    ColumnOrder order;
    const int64_t wanted = kParts * ((width + 1023) / 1024);
    order.chunk = static_cast<int>(round_up((width + wanted - 1) / wanted, kBlock));
    order.chunks = static_cast<int>((width + order.chunk - 1) / order.chunk);
    for (int part = 0; part <= kParts; ++part) {
      order.first_chunk[part] = static_cast<int>(part * int64_t{order.chunks} / kParts);
      order.first_column[part] =
          static_cast<int>(std::min(int64_t{order.first_chunk[part]} * order.chunk, width));
    }
    return order;
  }
  __device__ __forceinline__ bool begins_part(int at) const {
    bool begins = false;
#pragma unroll
    for (int part = 0; part < kParts; ++part) begins |= at == first_chunk[part];
    return begins;
  }
};

// Buffers of weights in decode, where weights are nearly all that is read.
inline constexpr int kDownStages = 4;

struct ForwardParams {
  LinearAdapterForward problem;
  SharedLayout layout;
  ColumnOrder order;
  RowRanges ranges;
  Chance depth, dropout;
  Divisor sample_rows;
  int64_t splits;   // blocks that share a tile
  bool statistics;  // up kernel: only the post norm's moments
  void* activated;  // operands of the second product, by position, where shared memory has no room
  void* partials;   // [chunks, rows, largest_bottleneck]: the first product's sums
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
    // Without a branch, so that several of them overlap.
    const bool any = other.count > C(0);
    const C total = count + other.count, delta = other.mean - mean;
    const C share = quotient(other.count, any ? total : C(1));
    mean += any ? delta * share : C(0);
    squares += any ? other.squares + delta * delta * (count * share) : C(0);
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
};

// Adds up four moments over the lanes of a warp. Lanes 8 k to 8 k + 7 get the total of the k-th:
// they exchange two of them for two others, then one for one. A lower lane's part comes first, so
// that the total does not depend on k.
template <class C>
__device__ __forceinline__ Moments<C> add_lanes(const Moments<C> (&moments)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // Field by field, in registers.
  const auto choose = [](bool first, const Moments<C>& a, const Moments<C>& b) {
    return Moments<C>{first ? a.mean : b.mean, first ? a.squares : b.squares,
                      first ? a.count : b.count};
  };
  const auto exchange = [&](const Moments<C>& kept, const Moments<C>& given, int distance) {
    const Moments<C> received{__shfl_xor_sync(0xffffffffu, given.mean, distance),
                              __shfl_xor_sync(0xffffffffu, given.squares, distance),
                              __shfl_xor_sync(0xffffffffu, given.count, distance)};
    const bool upper = lane & distance;
    Moments<C> sum = choose(upper, received, kept);
    sum.add(choose(upper, kept, received));
    return sum;
  };
  const bool second_pair = lane & 16, second = lane & 8;
  Moments<C> pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pair[i] = exchange(choose(second_pair, moments[2 + i], moments[i]),
                       choose(second_pair, moments[i], moments[2 + i]), 16);
  }
  Moments<C> sum = exchange(choose(second, pair[1], pair[0]), choose(second, pair[0], pair[1]), 8);
#pragma unroll
  for (int distance = 4; distance > 0; distance /= 2) sum = exchange(sum, sum, distance);
  return sum;
}

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
  // is large; elements of 16 bits are not taken from it, as sums of a few have no error to speak
  // of. ready(step) is called before a lane reads its vector of a step, 32 vectors of a row, from
  // shared memory.
  template <bool whole_rows, class Ready>
  __device__ __forceinline__ void normalize(Ready&& ready) const {
    constexpr int n = kVector<X>, some = 4;
    constexpr bool kShifts = sizeof(X) > 2;
    static_assert(S::kRows % some == 0);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int columns = static_cast<int>(width);
    const bool whole = whole_rows || columns % n == 0;
    for (int begin = warp * some; begin < count; begin += S::kWarps * some) {
      const auto row_of = [&](int k) { return min(begin + k, count - 1); };
      if (resident_from() == 0) ready(0);
      __syncwarp();  // what a row begins with was brought by one lane
      Moments<C> moments[some] = {};
      C shift[some] = {};
#pragma unroll
      for (int k = 0; k < some && kShifts; ++k) {
        const X* from = resident_from() == 0
                            ? shared_at<X>(layout.x) + row_of(k) * layout.x_pitch
                            : static_cast<const X*>(f.x) + row()[row_of(k)] * width;
        shift[k] = static_cast<C>(*from);
      }
      C steps = 0;
      int c = lane * n;
      const auto take = [&]<bool resident>(int end) {
        const X* from[some];
#pragma unroll
        for (int k = 0; k < some; ++k) {
          from[k] = resident ? shared_at<X>(layout.x) + row_of(k) * layout.x_pitch - resident_from()
                             : static_cast<const X*>(f.x) + row()[row_of(k)] * width;
        }
#pragma unroll(resident ? 1 : 2)  // more reads under way
        for (; c < end; c += 32 * n, steps += 1) {
          if (resident) ready(c / (32 * n));
          const C share = quotient(C(1), steps + C(1));
          C values[some][n];
#pragma unroll
          for (int k = 0; k < some; ++k) {
            load(values[k], from[k] + c, whole_rows ? n : columns - c, whole_rows || x_aligned);
          }
#pragma unroll
          for (int k = 0; k < some; ++k) {
#pragma unroll
            for (int e = 0; e < n && kShifts; ++e) values[k][e] -= shift[k];
            if (whole) {
              moments[k].add_whole(values[k], share, steps);
            } else {
              moments[k].add(values[k], columns - c);
            }
          }
        }
      };
      if (resident_from() > 0) {
        take.template operator()<false>(resident_from());
        ready(columns);
        __syncwarp();
      }
      take.template operator()<true>(columns);
#pragma unroll
      for (int k = 0; k < some; ++k) {
        if (whole) moments[k].count = steps * n;
      }
      Moments<C> of_row = add_lanes(moments);
      const int k = lane / 8;
      if (lane % 8 == 0 && begin + k < count) {
        of_row.mean += k < 2 ? (k == 0 ? shift[0] : shift[1]) : (k == 2 ? shift[2] : shift[3]);
        mean()[begin + k] = of_row.mean;
        rstd()[begin + k] = rstd_of(of_row);
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
  __device__ __forceinline__ void bring_stage(int step) const {
    constexpr int n = kVector<X>, across = kStep<P> / n, down = S::kThreads / across;
    X* const to = stage(step);
    const int column = step * kStep<P>;
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
    const int chunk_steps = params.order.chunk / kStep<P>;
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
        if (whole && staged(step)) bring_stage(step);
      }
      copy_async_commit();
    };
    int chunk = static_cast<int>(end_chunk) - 1;
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
      if (step == chunk * chunk_steps) {
        function(chunk--, sums);
        sums.clear();
      }
    }
  }

  // Keeps some elements of h for the backward (where `save` says so), and their activations for the
  // second product.
  __device__ __forceinline__ void keep_hidden(int i, int j, C (&h)[kVector<C>], bool save) const {
    constexpr int n = kVector<C>;
    const int there = static_cast<int>(view.bottleneck) - j;
    if (save && f.hidden && i < count && j < f.largest_bottleneck) {
      const bool is_active = active()[i];
      C kept[n];
#pragma unroll
      for (int e = 0; e < n; ++e) kept[e] = is_active && e < there ? h[e] : C(0);
      const int stride = static_cast<int>(f.largest_bottleneck);
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
    if (begin >= f.largest_bottleneck) return;
    for (int i = 0; i < count; ++i) {
      C* to = static_cast<C*>(f.hidden) + row()[i] * f.largest_bottleneck;
      for (int64_t j = begin + threadIdx.x; j < f.largest_bottleneck; j += S::kThreads)
        to[j] = C(0);
    }
  }

  __device__ __forceinline__ void keep_statistics() const {
    const int i = thread_index();
    if (!f.mean || i >= count) return;
    static_cast<C*>(f.mean)[row()[i]] = active()[i] ? mean()[i] : C(0);
    static_cast<C*>(f.rstd)[row()[i]] = active()[i] ? rstd()[i] : C(0);
  }

  __device__ __forceinline__ int64_t activated_stride() const {
    return round_up(f.largest_bottleneck, kBlock);
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

}  // namespace adapter_ext::cuda
