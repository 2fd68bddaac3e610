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

template <class X, class P, class S>
class ForwardTile : public RowTile<X, P, S> {
  using Base = RowTile<X, P, S>;

 public:
  using Base::active;
  using Base::count;
  using Base::first;
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

  // A row of x from a column on, up to the end of a block of columns: in shared memory once it is
  // there.
  __device__ __forceinline__ const X* x(int i, int64_t column) const {
    const int64_t resident = column - (width - layout.x_columns);
    if (resident >= 0) return shared_at<X>(layout.x) + i * layout.x_columns + resident;
    return static_cast<const X*>(f.x) + row()[i] * width + column;
  }

  // Brings the columns of x that have room to shared memory. Call after a barrier, and have one
  // before they are read.
  __device__ __forceinline__ void load_x() const {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    for (int i = warp; i < count; i += S::kWarps) {
      const X* from = static_cast<const X*>(f.x) + (row()[i] + 1) * width - layout.x_columns;
      X* to = shared_at<X>(layout.x) + i * layout.x_columns;
      if (x_aligned) {
        for (int c = lane * kVector<X>; c < layout.x_columns; c += 32 * kVector<X>) {
          copy_async(to + c, from + c, 16);
        }
      } else {
        for (int c = lane; c < layout.x_columns; c += 32) to[c] = from[c];
      }
    }
    copy_async_commit();
    copy_async_wait<0>();
  }

  // The pre norm's mean and 1 / sqrt(variance + eps), in one pass over the rows, some of them at a
  // time for more reads under way. Deviations from a row's first element are small where its mean
  // is large.
  __device__ __forceinline__ void normalize() const {
    constexpr int n = kVector<X>, some = 4;
    static_assert(S::kRows % (some * S::kWarps) == 0);
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    for (int begin = warp * some; begin < count; begin += S::kWarps * some) {
      Moments<C> moments[some] = {};
      C shift[some] = {};
#pragma unroll
      for (int k = 0; k < some; ++k) {
        if (begin + k < count) shift[k] = static_cast<C>(x(begin + k, 0)[0]);
      }
      for (int64_t c = lane * n; c < width; c += 32 * n) {
        C values[some][n] = {};
#pragma unroll
        for (int k = 0; k < some; ++k) {
          if (begin + k < count) load(values[k], x(begin + k, c), width - c, x_aligned);
        }
#pragma unroll
        for (int k = 0; k < some; ++k) {
#pragma unroll
          for (int e = 0; e < n; ++e) values[k][e] -= shift[k];
          moments[k].add(values[k], width - c);
        }
      }
#pragma unroll
      for (int k = 0; k < some; ++k) {
        moments[k].add_lanes();
        if (begin + k < count && lane == 0) {
          mean()[begin + k] = moments[k].mean + shift[k];
          rstd()[begin + k] = rstd_of(moments[k]);
        }
      }
    }
  }

  // What the first product reads: some columns of LN(x), or of x.
  template <int n>
  __device__ __forceinline__ void operand(int i, int64_t column, C (&values)[n]) const {
    const int64_t left = i < count ? width - column : 0;
    if (left <= 0) {
#pragma unroll
      for (int e = 0; e < n; ++e) values[e] = C(0);
      return;
    }
    load(values, x(i, column), left, x_aligned);
    if (!pre) return;
    C weight[n], bias[n];  // zero behind the last column
    this->load_norm(weight, bias, column);
    const C row_mean = mean()[i], row_rstd = rstd()[i];
#pragma unroll
    for (int e = 0; e < n; ++e) values[e] = (values[e] - row_mean) * row_rstd * weight[e] + bias[e];
  }

  // The first product for one block of the bottleneck: calls function(chunk, sums) for some chunks
  // of columns of x, from the last to the first. Barriers come before the first access to the
  // buffers.
  template <class Function>
  __device__ __forceinline__ void down(int64_t block, int64_t first_chunk, int64_t end_chunk,
                                       Function&& function) const {
    constexpr int chunk_steps = kChunk / kStep<P>;
    const WeightMatrix matrix = this->Base::down();
    const int64_t all = (width + kStep<P> - 1) / kStep<P>, begin = first_chunk * chunk_steps;
    const int64_t end = end_chunk * chunk_steps < all ? end_chunk * chunk_steps : all;
    const int64_t left_columns = view.bottleneck - block * kBlock;
    const int columns = left_columns < kBlock ? static_cast<int>(left_columns) : kBlock;
    const auto fill = [&](int64_t step) {
      matrix.template fill<X, P, S, kBlock, kStep<P>>(shared_at<T>(layout.weights[step & 1]),
                                                      kStepPitch<P>, block * kBlock,
                                                      step * kStep<P>, this->rounding);
      copy_async_commit();
    };
    Sums sums;
    sums.clear();
    __syncthreads();
    fill(end - 1);
    for (int64_t step = end - 1; step >= begin; --step) {
      T* left = shared_at<T>(layout.left[step & 1]);
      fill_tile<P, S, S::kRows, kStep<P>>(
          left, kStepPitch<P>, this->rounding,
          [&](int i, int at, auto& values) { operand(i, step * kStep<P> + at, values); });
      copy_async_wait<0>();
      __syncthreads();
      if (step > begin) fill(step - 1);
      sums.template multiply<true, true>(left, kStepPitch<P>,
                                         shared_at<T>(layout.weights[step & 1]), kStepPitch<P>,
                                         kStep<P>, columns);
      if (step % chunk_steps == 0) {
        function(step / chunk_steps, sums);
        sums.clear();
      }
    }
  }

  // Keeps two elements of h for the backward (where `save` says so), and their activations for the
  // second product.
  __device__ __forceinline__ void keep_hidden(int i, int64_t j, C first_h, C second_h,
                                              bool save) const {
    const int64_t r = view.bottleneck;
    if (save && f.hidden && i < count) {
      C* to = static_cast<C*>(f.hidden) + row()[i] * f.hidden_stride + j;
      const C first_kept = active()[i] && j < r ? first_h : C(0);
      const C second_kept = active()[i] && j + 1 < r ? second_h : C(0);
      if (f.hidden_stride % 2 == 0) {
        if (j < f.hidden_stride) store_pair<Space::kGlobal>(to, first_kept, second_kept);
      } else {
        if (j < f.hidden_stride) to[0] = first_kept;
        if (j + 1 < f.hidden_stride) to[1] = second_kept;
      }
    }
    const auto operand_of = [&](bool there, C h) {
      return there ? P::round(value_of(f.activation, h), this->rounding) : static_cast<T>(C(0));
    };
    const T first_z = operand_of(j < r, first_h), second_z = operand_of(j + 1 < r, second_h);
    if (layout.activated_resident) {
      store_pair<Space::kShared>(shared_at<T>(layout.activated) + i * layout.activated_pitch + j,
                                 first_z, second_z);
    } else if (i < count) {
      store_pair<Space::kGlobal>(activated_in_memory() + i * activated_stride() + j, first_z,
                                 second_z);
    }
  }

  // What lies behind an adapter's own blocks in the saved h.
  __device__ __forceinline__ void clear_hidden() const {
    if (!f.hidden) return;
    const int64_t begin = round_up(view.bottleneck, kBlock);
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

  // y = x + d, d = scale · mask ⊙ o, and ||d||², for some blocks of columns.
  __device__ __forceinline__ void finish(UpProduct<X, P, S>& up, int64_t first_block,
                                         int64_t blocks) const {
    const Dropout dropout(f, params.dropout);
    C penalty[Own::kCount] = {};
    up.start(first_block, blocks);
    for (int64_t block = first_block; block < first_block + blocks; ++block) {
      const Own own;
      const int64_t column = block * kBlock + own.column(), left = width - column;
      C from[Own::kCount][kVector<X>];
#pragma unroll
      for (int v = 0; v < Own::kCount; ++v) {
        load(from[v], x(own.row(v), column), own.row(v) < count ? left : 0, x_aligned);
      }
      Sums product;
      up.next(product);
      product.template store<Space::kShared>(this->sums(), kSumPitch<C>);
      __syncthreads();
      const C scale = static_cast<C>(params.depth.kept_scale);
#pragma unroll
      for (int v = 0; v < Own::kCount; ++v) {
        const int i = own.row(v);
        const bool there = i < count && left > 0;
        C squares = 0;
        if (there) {
          C d[kVector<X>];
          load_sums(d, this->sums() + i * kSumPitch<C> + own.column());
          if (!pre) {
            C weight[kVector<X>], bias[kVector<X>];
            this->load_norm(weight, bias, column);
            const C row_mean = mean()[i], row_rstd = rstd()[i];
#pragma unroll
            for (int e = 0; e < kVector<X>; ++e) {
              d[e] = (d[e] - row_mean) * row_rstd * weight[e] + bias[e];
            }
          }
          const int64_t at = row()[i];
          const bool is_active = active()[i];
          dropout.apply(d, at, column);
#pragma unroll
          for (int e = 0; e < kVector<X>; ++e) {
            d[e] = is_active ? d[e] * scale : C(0);
            if (e < left) squares += d[e] * d[e];
            if (f.residual) d[e] += from[v][e];
          }
          store(static_cast<X*>(f.y) + at * width + column, d, left, y_aligned);
        }
        if (params.penalties) {
          squares = sum_over_lanes<Own::kLanes>(squares);
          penalty[v] += squares;
          if (there && params.penalty_blocks > 1 && own.column() == 0) {
            static_cast<C*>(params.penalties)[(first + i) * params.penalty_blocks + block] =
                squares;
          }
        }
      }
    }
    if (params.penalties && params.penalty_blocks == 1) {
      const Own own;
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
  tile.load_x();
  __syncthreads();
  if (tile.pre) tile.normalize();
  const int64_t chunks = (tile.width + kChunk - 1) / kChunk;
  for (int64_t block = 0; block * kBlock < tile.view.bottleneck; ++block) {
    typename Tile::Sums hidden;
    hidden.clear();
    tile.down(block, 0, chunks, [&](int64_t, const auto& sums) { hidden.add(sums); });
    hidden.for_each_pair([&](int i, int column, C first_h, C second_h, int) {
      tile.keep_hidden(i, block * kBlock + column, first_h, second_h, true);
    });
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
  tile.finish(up, 0, tile.column_blocks);
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
  if (tile.pre) {
    tile.normalize();
    __syncthreads();
    if (split == 0) tile.keep_statistics();
  }
  const int64_t chunks = (tile.width + kChunk - 1) / kChunk;
  const int64_t begin = part_of(chunks, split, splits), end = part_of(chunks, split + 1, splits);
  const int64_t stride = round_up(tile.f.hidden_stride, 2);
  for (int64_t block = 0; block * kBlock < tile.view.bottleneck; ++block) {
    tile.down(block, begin, end, [&](int64_t chunk, auto& sums) {
      C* to = static_cast<C*>(params.partials) + (chunk * tile.f.rows + first) * stride;
      sums.for_each_pair([&](int i, int column, C first_sum, C second_sum, int) {
        const int64_t j = block * kBlock + column;
        if (i < count && j < stride)
          store_pair<Space::kGlobal>(to + i * stride + j, first_sum, second_sum);
      });
    });
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
  const int64_t chunks = (tile.width + kChunk - 1) / kChunk;
  const int64_t stride = round_up(f.hidden_stride, 2);
  const int64_t padded = round_up(tile.view.bottleneck, kBlock);
  for (int i = thread_index() / 32; i < 16; i += kWarps) {
    for (int64_t j = threadIdx.x % 32 * 2; j < padded; j += 64) {
      C sum[2] = {};
      if (i < count && j < stride) {
        const C* from = static_cast<const C*>(params.partials) +
                        ((chunks - 1) * f.rows + first + i) * stride + j;
#pragma unroll 4
        for (int64_t chunk = 0; chunk < chunks; ++chunk, from -= f.rows * stride) {
          C part[2];
          load_aligned(part, from);
          sum[0] += part[0];
          sum[1] += part[1];
        }
      }
      tile.keep_hidden(i, j, sum[0], sum[1], split == 0 && !params.statistics);
    }
  }
  if (split == 0 && !params.statistics) tile.clear_hidden();
  const int64_t begin = part_of(tile.column_blocks, split, splits);
  const int64_t end = part_of(tile.column_blocks, split + 1, splits);
  auto up = tile.up_product();
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
  tile.finish(up, begin, end - begin);
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
  const SharedLayout products = layout;
  if (fits) take_x<X>(layout, S::kRows, f.hidden_size, half);
  if (!fits || layout.x_columns < f.hidden_size) {
    layout = products;
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
  const SharedLayout split_layout = shared_layout<X, P, SmallTile>(f, call.limits.shared_memory);
  const bool split = tiles < 2 * processors && split_layout.activated_resident;
  const int64_t chunks = (f.hidden_size + kChunk - 1) / kChunk;
  const int64_t column_blocks = (f.hidden_size + kBlock - 1) / kBlock;
  params.penalty_blocks = split ? column_blocks : 1;
  Carver workspace(call.workspace);
  const int64_t operands = f.rows * round_up(f.hidden_stride, kBlock);
  params.activated = workspace.take<T>(operands);
  if (split) params.partials = workspace.take<C>(chunks * f.rows * round_up(f.hidden_stride, 2));
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
    forward_whole<X, P, LargestTile<X>>(call, params);
  } else {
    forward_whole<X, P, SmallTile>(call, params);
  }
  if (f.l2_lambda && f.routing.adapters > 0) {
    launch("linear_adapter's auxiliary loss", &aux_kernel<C>, f.routing.adapters, kThreads,
           kWarps * 8, call.stream, params);
  }
}

}  // namespace adapter_ext::cuda
