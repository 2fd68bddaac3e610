// The backward of linear_adapter, in two kernels: over tiles of rows, for the bottleneck's gradient
// dh and what the norm needs of the rows; then over blocks of columns times ranges of rows, for dx
// and the weights' gradients. Ranges of one adapter are added by a third kernel, in their order.
//
// As in adapter_ext/reference.py: h = down n, z = act(h), o = up z; a leading d is a gradient. The
// norm's row sums need no pass over D: mean(dx̂) = (dh·c1)/D and mean(dx̂ ⊙ x̂) = (dh·(h - c0))/D
// with c1 = down γ, c0 = down β. With M = dhᵀ x̂ and v = Σ dh: d_down = γ ⊙ M + v ⊗ β,
// dγ = Σ_j down ⊙ M, dβ = downᵀ v.
#pragma once

#include "cuda/instances.h"
#include "cuda/rows.cuh"

namespace adapter_ext::cuda {

// The second kernel works on as many rows at a time as 128 bytes have operands, and elements of x,
// and sums over them tiles of 64 x 64.
template <class X, class P>
using ColumnTile =
    Shape<std::min(kStep<P>, 128 / static_cast<int>(sizeof(X))), LargeTile::kThreads>;

// Buffers of the second kernel beside those of a row tile, in bytes.
struct ColumnLayout {
  SharedLayout rows;
  int row_mean, row_product;  // first kernel, [rows]: sums or means for the norm's gradient
  // Of each stage: x and dy as they are, dh, and in `rows.activated` z, [rows, 64]; `row_sums`.
  int x_part, gradient_part, hidden_gradient;
  int row_sums;             // [rows, 4], as in memory
  int x, gradient;          // x̂ or x, and do or du: [kRows, 64]
  int down[2];              // [kStep, 64]
  int hidden_sum;           // [threads]: Σ dh
  int range;                // a RowRange
  int norm_weight;          // pre: [64]
  int norm_sums;            // pre: see WeightGradients
  int vector_sums;          // post: see VectorSums
  int total;                // a tile of sums [64, 64], in the place of the operands
  int stages, stage_bytes;  // 2: the next tile of rows is on its way while one is worked on
  bool one_piece;           // the bottleneck is no longer than a step: its piece of `down` stays
};

struct BackwardParams {
  LinearAdapterBackward problem;
  RowRanges ranges;
  Chance depth, dropout;
  Divisor sample_rows;
  int64_t padded;  // the bottleneck, in whole steps of 16
  int64_t column_blocks;
  void* hidden_gradients;  // dh: operands [rows, padded], by position
  void* activated;         // z: likewise
  void* row_sums;          // [rows, 4], by position: mean, rstd, and two of ColumnLayout
  void* vectors;           // [adapters, 2, largest_bottleneck]: c1, c0
  void* partials;          // [2 (rows / range + 1), column blocks, partial_size]
  ColumnLayout layout;
  // First kernel, in bytes: up [kStep, 64] and dy as it is, of kStages steps (see kPartStages); du,
  // [rows, kStep]; the product's sums, in their place.
  static constexpr int kStages = 3;
  int gradient_part[kStages], up[kStages], gradient[2], hidden_sums;
  bool whole;  // rows are whole blocks of columns, and begin at multiples of 16 bytes
  bool plain;  // and du is dy as it is, so that it is multiplied where it is brought
  Adapters adapters;

  // M [padded, 64], duᵀz [64, padded], v [padded], two rows of column sums.
  ADAPTER_EXT_HOST_DEVICE int64_t partial_size() const {
    return 2 * padded * kBlock + padded + 2 * kBlock;
  }
};
static_assert(sizeof(BackwardParams) <= 4096);

// Whether some adapter's gradients need the second product again.
ADAPTER_EXT_HOST_DEVICE bool wants_out(const LinearAdapterBackward& b) {
  return b.norm_position == NormPosition::kPost || (b.l2_lambda && b.grad_aux);
}

// Stages of dy in the first kernel: where it is never multiplied as it is, a stage is free once its
// operands are made.
template <class X, class P>
inline constexpr int kPartStages =
    sizeof(X) == sizeof(typename P::Operand) ? BackwardParams::kStages : 2;

// What one adapter's gradients ask for.
struct Wanted {
  const LinearAdapterBackward& problem;
  const AdapterGradients& gradients;

  __device__ __forceinline__ bool x() const { return problem.grad_x != nullptr; }
  __device__ __forceinline__ bool up() const { return gradients.up != nullptr; }
  __device__ __forceinline__ bool norm() const {
    return gradients.norm_weight || gradients.norm_bias;
  }
  __device__ __forceinline__ bool down() const {
    return gradients.down || (problem.norm_position == NormPosition::kPre && norm());
  }
};

// do = scale · mask ⊙ (dy + κ d) with d = scale · mask ⊙ o the adapter's contribution and
// κ = 2 λ g / B the gradient of its auxiliary loss. Masks are 0 or one number, which κ is
// multiplied with beforehand.
template <class X, class P, class S>
class OutputGradient {
  using Tile = RowTile<X, P, S>;
  using C = typename P::Sum;

 public:
  template <int n>
  struct Values {
    C d[n];           // do
    C normalized[n];  // post: û
    C weight[n];      // post: γ
  };

  __device__ __forceinline__ OutputGradient(const BackwardParams& params, int adapter)
      : b_(params.problem), dropout_(b_, params.dropout), depth_(params.depth) {
    if (b_.l2_lambda && b_.grad_aux) {
      const int64_t rows =
          first_position(b_.routing, adapter + 1) - first_position(b_.routing, adapter);
      pull_ = C(2) * static_cast<const C*>(b_.l2_lambda)[adapter] *
              static_cast<const C*>(b_.grad_aux)[adapter] /
              static_cast<C>(params.sample_rows.divide(rows)) * static_cast<C>(depth_.kept_scale) *
              static_cast<C>(params.dropout.kept_scale);
    }
  }

  // Some columns of a row, from theirs of dy and of the second product. Zero where there is
  // nothing.
  template <int n>
  __device__ __forceinline__ void get(const Tile& tile, int i, int64_t column, const X* upstream,
                                      const C* out, Values<n>& values) const {
    const int64_t left = tile.active()[i] ? tile.width - column : 0;
    if (left <= 0) {
#pragma unroll
      for (int e = 0; e < n; ++e) values.d[e] = values.normalized[e] = values.weight[e] = C(0);
      return;
    }
    load_aligned(values.d, upstream);
    if (wants_out(b_)) {
      C o[n];
      load_sums(o, out);
      if (!tile.pre) {
        C bias[n];
        tile.load_norm(values.weight, bias, column);
        const C mean = tile.mean()[i], rstd = tile.rstd()[i];
#pragma unroll
        for (int e = 0; e < n; ++e) {
          values.normalized[e] = e < left ? (o[e] - mean) * rstd : C(0);
          o[e] = values.normalized[e] * values.weight[e] + bias[e];
        }
      }
#pragma unroll
      for (int e = 0; e < n; ++e) values.d[e] += pull_ * o[e];
    }
    dropout_.apply(values.d, tile.row()[i], column);
    const C scale = static_cast<C>(depth_.kept_scale);
#pragma unroll
    for (int e = 0; e < n; ++e) values.d[e] *= scale;
  }

  // du of the post norm, from do and the row's means of do ⊙ γ and of do ⊙ γ ⊙ û.
  template <int n>
  static __device__ __forceinline__ void through_norm(Values<n>& values, C rstd, C row_mean,
                                                      C row_product) {
#pragma unroll
    for (int e = 0; e < n; ++e) {
      values.d[e] =
          rstd * (values.d[e] * values.weight[e] - row_mean - values.normalized[e] * row_product);
    }
  }

 private:
  const LinearAdapterBackward& b_;
  const Dropout dropout_;
  const Chance& depth_;
  C pull_ = 0;  // κ, times the scale of what is kept
};

// Reads mean and rstd of a tile's rows, zero for those that are not there; others may see them
// after a barrier.
template <class X, class P, class S>
__device__ __forceinline__ void load_statistics(const RowTile<X, P, S>& tile,
                                                const LinearAdapterBackward& b) {
  using C = typename P::Sum;
  const int i = thread_index();
  if (i >= S::kRows) return;
  tile.mean()[i] = i < tile.count ? static_cast<const C*>(b.mean)[tile.row()[i]] : C(0);
  tile.rstd()[i] = i < tile.count ? static_cast<const C*>(b.rstd)[tile.row()[i]] : C(0);
}

// c1 = down γ and c0 = down β, a warp for each element.
template <class X, class C>
__global__ __launch_bounds__(kThreads) void vectors_kernel(
    const __grid_constant__ BackwardParams params) {
  const LinearAdapterBackward& b = params.problem;
  const unsigned groups = static_cast<unsigned>((b.largest_bottleneck + kWarps - 1) / kWarps);
  const int64_t a = blockIdx.x / groups;
  const int64_t j = blockIdx.x % groups * kWarps + threadIdx.x / 32;
  const AdapterView view = params.adapters.view(a);
  if (j >= view.bottleneck || first_position(b.routing, a) == first_position(b.routing, a + 1)) {
    return;
  }
  constexpr int n = kVector<X>;
  const int width = static_cast<int>(b.hidden_size), lane = thread_index() % 32;
  C weight_sum = 0, bias_sum = 0;
  const auto sum = [&]<class Weight, bool whole>() {
    const Weight* const row = static_cast<const Weight*>(view.down) + j * view.down_stride;
    const Weight* const norm_weight = static_cast<const Weight*>(view.norm_weight);
    const Weight* const norm_bias = static_cast<const Weight*>(view.norm_bias);
#pragma unroll 4
    for (int c = lane * n; c < width; c += 32 * n) {
      C down[n], weight[n], bias[n];
      const int left = whole ? n : width - c;
      load(down, row + c, left, whole);
      load(weight, norm_weight + c, left, whole);
      load(bias, norm_bias + c, left, whole);
#pragma unroll
      for (int e = 0; e < n; ++e) {
        weight_sum += down[e] * weight[e];
        bias_sum += down[e] * bias[e];
      }
    }
  };
  const auto sum_of = [&]<class Weight>() {
    const int64_t row_bytes = view.down_stride * static_cast<int64_t>(sizeof(Weight));
    if (width % n == 0 && is_aligned(view.down, row_bytes) && is_aligned(view.norm_weight) &&
        is_aligned(view.norm_bias)) {
      sum.template operator()<Weight, true>();
    } else {
      sum.template operator()<Weight, false>();
    }
  };
  if (b.weight_type == DataType::kFloat32) {
    sum_of.template operator()<float>();
  } else {
    sum_of.template operator()<X>();
  }
  weight_sum = sum_over_lanes<32>(weight_sum);
  bias_sum = sum_over_lanes<32>(bias_sum);
  if (lane == 0) {
    C* to = static_cast<C*>(params.vectors) + 2 * a * b.largest_bottleneck + j;
    to[0] = weight_sum;
    to[b.largest_bottleneck] = bias_sum;
  }
}

// First kernel: z and dh of a tile of rows, and the norm's row sums.
template <class X, class P, class S>
__global__
__launch_bounds__(S::kThreads, (kResident<S, typename P::Sum>)) void backward_rows_kernel(
    const __grid_constant__ BackwardParams params) {
  constexpr int rows = S::kRows;
  using Tile = RowTile<X, P, S>;
  using Own = Elements<X, S>;
  using Part = Elements<X, S, kStep<P>>;
  using T = typename P::Operand;
  using C = typename P::Sum;
  using Gradient = OutputGradient<X, P, S>;
  const LinearAdapterBackward& b = params.problem;
  const SharedLayout& layout = params.layout.rows;
  const Depth depth{b, params.depth, params.sample_rows};
  const Segment segment = params.ranges.find(b.routing, blockIdx.x);
  const int64_t first = segment.begin + segment.range * rows;
  if (first >= segment.end) return;
  const int count = segment.end - first < rows ? static_cast<int>(segment.end - first) : rows;
  const int64_t width = b.hidden_size;
  if (segment.adapter >= b.routing.adapters || !depth.keeps_adapter(segment.adapter)) {
    if (!b.grad_x) return;
    const int64_t bytes = width * static_cast<int64_t>(sizeof(X));
    const bool aligned = is_aligned(b.grad_x, bytes) && is_aligned(b.grad_y, bytes);
    for (int i = thread_index() / 32; i < count; i += S::kWarps) {
      const int64_t at = row_at(b.routing, params.sample_rows, first + i) * width;
      copy_row(static_cast<X*>(b.grad_x) + at, static_cast<const X*>(b.grad_y) + at, width,
               aligned);
    }
    return;
  }
  const Tile tile(b, layout, segment, first, count,
                  params.adapters.share(segment.adapter, layout.adapter).view);
  tile.find_rows(depth);
  __syncthreads();
  const int r = static_cast<int>(tile.view.bottleneck);
  load_statistics(tile, b);

  // Elementwise work on [rows, bottleneck] goes by blocks of 64 columns, of which a thread has some
  // vectors.
  constexpr int n = kVector<C>, across = kBlock / n, down = S::kThreads / across;
  constexpr int vectors = rows / down;
  static_assert(vectors * down == rows);
  const auto own_row = [] { return thread_index() / across; };
  const auto own_column = [] { return thread_index() % across * n; };
  const int padded = static_cast<int>(params.padded);
  const auto load_hidden = [&](int i, int j, C(&h)[n]) {
    const int stride = static_cast<int>(b.largest_bottleneck);
    load(h, static_cast<const C*>(b.hidden) + tile.row()[i] * stride + j, i < count ? r - j : 0,
         stride % n == 0);
  };
  const auto store_vector = [&](T* to, int i, int j, const C(&values)[n]) {
    T part[n];
#pragma unroll
    for (int e = 0; e < n; ++e) part[e] = P::round(values[e], tile.rounding);
    if (i < count && j < padded) store_aligned<Space::kGlobal>(to + i * padded + j, part);
  };

  // z.
  T* const activated = static_cast<T*>(params.activated) + first * padded;
  for (int block = 0; block * kBlock < r; ++block) {
    const int j = block * kBlock + own_column();
    C z[vectors * n];  // all on their way together
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      C h[n];
      load_hidden(own_row() + v * down, j, h);
#pragma unroll
      for (int e = 0; e < n; ++e) z[v * n + e] = h[e];
    }
    activate_all(b.activation, z);
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      const int i = own_row() + v * down;
      C own[n];
#pragma unroll
      for (int e = 0; e < n; ++e) own[e] = i < count && j + e < r ? z[v * n + e] : C(0);
      store_vector(activated, i, j, own);
      if (!layout.activated_resident) continue;
      T part[n];
#pragma unroll
      for (int e = 0; e < n; ++e) part[e] = P::round(own[e], tile.rounding);
      store_aligned<Space::kShared>(shared_at<T>(layout.activated) + i * layout.activated_pitch + j,
                                    part);
    }
  }

  const X* grad_y = static_cast<const X*>(b.grad_y);
  const bool aligned = is_aligned(grad_y, width * static_cast<int64_t>(sizeof(X)));
  C* row_sums = static_cast<C*>(params.row_sums) + 4 * first;
  const auto store_row_sums = [&](int i, C mean, C product) {
    const C sums[4] = {tile.mean()[i], tile.rstd()[i], mean, product};
    store_aligned<Space::kGlobal>(row_sums + 4 * i, sums);
  };
  C* row_mean = shared_at<C>(params.layout.row_mean);
  C* row_product = shared_at<C>(params.layout.row_product);
  if (tile.pre && own_column() == 0) {  // this thread adds to them, and nobody else reads them
    for (int i = own_row(); i < rows; i += down) row_mean[i] = row_product[i] = C(0);
  }
  if (!tile.pre) {
    const Gradient output_gradient(params, tile.adapter);
    UpProduct<X, P, S> up(tile, activated, padded);
    C mean_sum[Own::kCount] = {}, product_sum[Own::kCount] = {};
    up.start(0, params.column_blocks);
    for (int64_t block = 0; block < params.column_blocks; ++block) {
      X* part = shared_at<X>(params.gradient_part[0]);
      bring<Own>(part, kPartPitch<X, kBlock>, grad_y, tile.row(), count, block * kBlock, width,
                 aligned);
      copy_async_commit();
      Product<P, S> product;
      up.next(product);
      product.template store<Space::kShared>(tile.sums(), kSumPitch<C>);
      copy_async_wait<0>();
      __syncthreads();
      const Own own;
#pragma unroll
      for (int v = 0; v < Own::kCount; ++v) {
        typename Gradient::template Values<kVector<X>> values;
        output_gradient.get(tile, own.row(v), block * kBlock + own.column(),
                            part + own.at(v, kPartPitch<X, kBlock>),
                            tile.sums() + own.row(v) * kSumPitch<C> + own.column(), values);
#pragma unroll
        for (int e = 0; e < kVector<X>; ++e) {
          const C d = values.d[e] * values.weight[e];
          mean_sum[v] += d;
          product_sum[v] += d * values.normalized[e];
        }
      }
    }
    const Own own;
#pragma unroll
    for (int v = 0; v < Own::kCount; ++v) {
      const C mean = sum_over_lanes<Own::kLanes>(mean_sum[v]) / static_cast<C>(width);
      const C product = sum_over_lanes<Own::kLanes>(product_sum[v]) / static_cast<C>(width);
      const int i = own.row(v);
      if (own.column() != 0) continue;
      row_mean[i] = mean;
      row_product[i] = product;
      if (i < count) store_row_sums(i, mean, product);
    }
  }

  // dh, block by block of the bottleneck; the pre norm's sums over it.
  const int steps = static_cast<int>((width + kStep<P> - 1) / kStep<P>);
  constexpr int part_pitch = kPartPitch<X, kStep<P>>;
  const auto part_at = [&](int step) {
    return shared_at<X>(params.gradient_part[step % kPartStages<X, P>]);
  };
  const auto up_at = [&](int step) {
    return shared_at<T>(params.up[step % BackwardParams::kStages]);
  };
  for (int block = 0; block * kBlock < r; ++block) {
    const int columns = min(r - block * kBlock, kBlock);
    Product<P, S> hidden_gradient;
    hidden_gradient.clear();
    __syncthreads();
    using Weights = WeightTile<X, P, S, kStep<P>, kBlock>;
    const auto multiply = [&](const T* gradient, int step) {
      hidden_gradient.template multiply<true, false>(gradient, kStepPitch<P>, up_at(step),
                                                     kBlockPitch<P>, kStep<P>, columns);
    };
    // Two steps are on their way while one is multiplied.
    const auto run = [&](auto&& bring_step, auto&& make_operands) {
      bring_step(0);
      copy_async_commit();
      if (steps > 1) bring_step(1);
      copy_async_commit();
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        copy_async_wait<1>();
        const T* gradient = make_operands(step);
        __syncthreads();
        if (step + 2 < steps) bring_step(step + 2);
        copy_async_commit();
        multiply(gradient, step);
      }
    };
    if constexpr (std::is_same_v<X, T>) {
      if (params.plain) {
        Weights up_piece(tile.up(), 0, block * kBlock);
        const X* from[Part::kCount];
        const Part part;
        bool there[Part::kCount];
#pragma unroll
        for (int v = 0; v < Part::kCount; ++v) {
          there[v] = part.any() && part.row(v) < count;
          from[v] = grad_y + (there[v] ? tile.row()[part.row(v)] * width + part.column() : 0);
        }
        run(
            [&](int step) {
              up_piece.fill(up_at(step), kBlockPitch<P>, tile.rounding);
              up_piece.move(kStep<P>, 0);
              X* to = part_at(step);
#pragma unroll
              for (int v = 0; v < Part::kCount; ++v) {
                if (part.any()) {
                  copy_async(to + part.at(v, part_pitch), from[v], there[v] ? 16 : 0);
                }
                if (there[v]) from[v] += kStep<P>;
              }
            },
            [&](int step) { return part_at(step); });
      }
    }
    if (!params.plain) {
      const Gradient output_gradient(params, tile.adapter);
      UpProduct<X, P, S> up(tile, activated, padded);
      if (wants_out(b)) up.start(0, params.column_blocks);
      run(
          [&](int step) {
            Weights(tile.up(), step * kStep<P>, block * kBlock)
                .fill(up_at(step), kBlockPitch<P>, tile.rounding);
            bring<Part>(part_at(step), part_pitch, grad_y, tile.row(), count, step * kStep<P>,
                        width, aligned);
          },
          [&](int step) {
            const int column = step * kStep<P>;
            if (wants_out(b) && column % kBlock == 0) {
              Product<P, S> out;
              up.next(out);
              out.template store<Space::kShared>(tile.sums(), kSumPitch<C>);
              __syncthreads();
            }
            T* gradient = shared_at<T>(params.gradient[step & 1]);
            const Part part;
#pragma unroll
            for (int v = 0; v < Part::kCount && part.any(); ++v) {
              const int i = part.row(v);
              typename Gradient::template Values<kVector<X>> values;
              output_gradient.get(
                  tile, i, column + part.column(), part_at(step) + part.at(v, part_pitch),
                  tile.sums() + i * kSumPitch<C> + column % kBlock + part.column(), values);
              if (!tile.pre) {
                Gradient::through_norm(values, tile.rstd()[i], row_mean[i], row_product[i]);
              }
              const bool is_active = tile.active()[i];
#pragma unroll
              for (int e = 0; e < kVector<X>; ++e) values.d[e] = is_active ? values.d[e] : C(0);
              store_operands<P>(gradient + i * kStepPitch<P> + part.column(), values.d,
                                tile.rounding);
            }
            return static_cast<const T*>(gradient);
          });
    }
    copy_async_wait<0>();
    C* const sums = shared_at<C>(params.hidden_sums);
    __syncthreads();  // they have the place of operands
    hidden_gradient.template store<Space::kShared>(sums, kSumPitch<C>);
    __syncthreads();
    const int j = block * kBlock + own_column();
    const bool whole = b.largest_bottleneck % n == 0;
#pragma unroll 1
    for (int i = own_row(); i < rows; i += down) {
      const bool is_active = i < count && tile.active()[i];
      C h[n], dh[n];
      load_hidden(i, j, h);
      load_aligned(dh, sums + i * kSumPitch<C> + own_column());
      gradients_before_activation(b.activation, h, dh);
#pragma unroll
      for (int e = 0; e < n; ++e) dh[e] = is_active && j + e < r ? dh[e] : C(0);
      store_vector(static_cast<T*>(params.hidden_gradients) + first * padded, i, j, dh);
      if (!tile.pre) continue;
      // Over a row's elements in one order, whatever the tile.
      const C* from =
          static_cast<const C*>(params.vectors) + 2 * segment.adapter * b.largest_bottleneck;
      C weight_vector[n], bias_vector[n];  // down γ and down β
      load(weight_vector, from + j, r - j, whole);
      load(bias_vector, from + b.largest_bottleneck + j, r - j, whole);
      C mean_part = 0, product_part = 0;
#pragma unroll
      for (int e = 0; e < n; ++e) {
        mean_part += dh[e] * weight_vector[e];
        product_part += dh[e] * (h[e] - bias_vector[e]);
      }
      mean_part = sum_over_lanes<across>(mean_part);
      product_part = sum_over_lanes<across>(product_part);
      if (own_column() == 0) {
        row_mean[i] += mean_part;
        row_product[i] += product_part;
      }
    }
  }
  if (!tile.pre || own_column() != 0) return;
  for (int i = own_row(); i < count; i += down) {
    store_row_sums(i, row_mean[i] / static_cast<C>(width), row_product[i] / static_cast<C>(width));
  }
}

// Writes one adapter's gradients for a block of columns, from sums over all its rows.
template <class X, class P>
class WeightGradients {
  using C = typename P::Sum;
  using Own = Elements<X, LargeTile>;
  static constexpr int kThreads = LargeTile::kThreads;

 public:
  // Sums of the norm's gradients, one of each for every thread, lie at an offset of shared memory.
  static constexpr int kNormSums = 2 * kThreads;
  __device__ __forceinline__ WeightGradients(const LinearAdapterBackward& b, const Adapter& adapter,
                                             int64_t column_block, int norm_sums)
      : b_(b),
        view_(adapter.view),
        gradients_(adapter.gradients),
        column_(column_block * kBlock),
        norm_sums_(norm_sums) {}
  __device__ __forceinline__ void clear_norm() const {
    norm_sums()[thread_index()] = norm_sums()[kThreads + thread_index()] = C(0);
  }

  // d_down from M [64, 64] and v [64] of a block of the bottleneck, both in shared memory; adds to
  // the norm's gradients.
  __device__ __forceinline__ void down(const C* sums, const C* hidden_sum, int64_t block) const {
    const Own own;
    const int64_t first = block * kBlock;
    const bool aligned = is_aligned(gradients_.down, row_bytes(width()));
    const int64_t left = width() - column_ - own.column();
    if (gradients_.down && left > 0) {
      C weight[kVector<X>] = {}, bias[kVector<X>] = {};
      if (pre()) {
        load_weights<X>(weight, view_.norm_weight, is_float(), column_ + own.column(), left,
                        is_aligned(view_.norm_weight));
        load_weights<X>(bias, view_.norm_bias, is_float(), column_ + own.column(), left,
                        is_aligned(view_.norm_bias));
      }
#pragma unroll 1
      for (int v = 0; v < Own::kCount; ++v) {
        const int j = own.row(v);
        if (first + j >= view_.bottleneck) break;
        C values[kVector<X>];
        load_sums(values, sums + j * kSumPitch<C> + own.column());
        if (pre()) {
#pragma unroll
          for (int e = 0; e < kVector<X>; ++e) {
            values[e] = values[e] * weight[e] + hidden_sum[j] * bias[e];
          }
        }
        store_weights(gradients_.down, (first + j) * width() + column_ + own.column(), values, left,
                      aligned);
      }
    }
    const int c = thread_index() % kBlock;
    if (!pre() || !(gradients_.norm_weight || gradients_.norm_bias) || column_ + c >= width()) {
      return;
    }
    if (is_float()) {
      add_norm<float>(sums, hidden_sum, first, c);
    } else {
      add_norm<X>(sums, hidden_sum, first, c);
    }
  }

  // d_up from duᵀz [64, 64] of a block of the bottleneck, in shared memory.
  __device__ __forceinline__ void up(const C* sums, int64_t block) const {
    if (!gradients_.up) return;
    const Own own;
    const int64_t r = view_.bottleneck, j = block * kBlock + own.column();
    const bool aligned = is_aligned(gradients_.up, row_bytes(r));
    if (j >= r) return;
#pragma unroll 1
    for (int v = 0; v < Own::kCount; ++v) {
      const int c = own.row(v);
      if (column_ + c >= width()) break;
      C values[kVector<X>];
      load_sums(values, sums + c * kSumPitch<C> + own.column());
      store_weights(gradients_.up, (column_ + c) * r + j, values, r - j, aligned);
    }
  }

  // The norm's gradients, after a barrier.
  __device__ __forceinline__ void norm() const {
    const int thread = thread_index();
    if (thread >= kBlock) return;
    C weight = 0, bias = 0;
    for (int i = thread; i < kThreads; i += kBlock) {
      weight += norm_sums()[i];
      bias += norm_sums()[kThreads + i];
    }
    norm(thread, weight, bias);
  }
  __device__ __forceinline__ void norm(int c, C weight, C bias) const {
    if (column_ + c >= width()) return;
    store_weight(gradients_.norm_weight, column_ + c, weight);
    store_weight(gradients_.norm_bias, column_ + c, bias);
  }

  // Of an adapter without rows.
  __device__ __forceinline__ void clear() const {
    const int64_t columns = width() - column_ < kBlock ? width() - column_ : kBlock;
    const int64_t r = view_.bottleneck;
    for (int64_t i = threadIdx.x; i < r * columns; i += kThreads) {
      store_weight(gradients_.up, column_ * r + i, C(0));
    }
    const int c = thread_index() % kBlock;
    for (int64_t j = threadIdx.x / kBlock; j < r && c < columns; j += kThreads / kBlock) {
      store_weight(gradients_.down, j * width() + column_ + c, C(0));
    }
    if (threadIdx.x < kBlock) norm(thread_index(), C(0), C(0));
  }

 private:
  // Adds this thread's elements of a column c to the norm's gradients.
  template <class Weight>
  __device__ __forceinline__ void add_norm(const C* sums, const C* hidden_sum, int64_t first,
                                           int c) const {
    constexpr int step = kThreads / kBlock, some = 8;  // that are on their way together
    const int own = thread_index() / kBlock;
    const int there = static_cast<int>(view_.bottleneck - first);
    const Weight* from =
        static_cast<const Weight*>(view_.down) + (first + own) * view_.down_stride + column_ + c;
    C weight_sum = norm_sums()[thread_index()], bias_sum = norm_sums()[kThreads + thread_index()];
#pragma unroll 1
    for (int begin = own; begin < kBlock; begin += some * step) {
      Weight down[some];
#pragma unroll
      for (int i = 0; i < some; ++i) {
        down[i] = begin + i * step < there ? from[i * step * view_.down_stride] : Weight(0.0f);
      }
      from += some * step * view_.down_stride;
#pragma unroll
      for (int i = 0; i < some; ++i) {
        const int j = begin + i * step;
        if (j >= there) break;
        const C weight = static_cast<C>(down[i]);
        weight_sum += weight * sums[j * kSumPitch<C> + c];
        bias_sum += weight * hidden_sum[j];
      }
    }
    norm_sums()[thread_index()] = weight_sum;
    norm_sums()[kThreads + thread_index()] = bias_sum;
  }

  __device__ __forceinline__ int64_t row_bytes(int64_t columns) const {
    return columns * (is_float() ? 4 : static_cast<int64_t>(sizeof(X)));
  }

  __device__ __forceinline__ void store_weight(void* to, int64_t index, C value) const {
    if (!to) return;
    if (is_float()) {
      static_cast<float*>(to)[index] = static_cast<float>(value);
    } else {
      static_cast<X*>(to)[index] = static_cast<X>(value);
    }
  }

  __device__ __forceinline__ void store_weights(void* to, int64_t index,
                                                const C (&values)[kVector<X>], int64_t count,
                                                bool aligned) const {
    if (!is_float() || std::is_same_v<X, float>) {
      return store(static_cast<X*>(to) + index, values, count, aligned);
    }
#pragma unroll
    for (int first = 0; first < kVector<X>; first += 4) {
      C part[4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        part[e] = first + e < kVector<X> ? values[(first + e) % kVector<X>] : C(0);
      store(static_cast<float*>(to) + index + first, part,
            count - first < kVector<X> - first ? count - first : kVector<X> - first, aligned);
    }
  }

  __device__ __forceinline__ C* norm_sums() const { return shared_at<C>(norm_sums_); }
  __device__ __forceinline__ bool pre() const { return b_.norm_position == NormPosition::kPre; }
  __device__ __forceinline__ bool is_float() const { return b_.weight_type == DataType::kFloat32; }
  __device__ __forceinline__ int64_t width() const { return b_.hidden_size; }

  const LinearAdapterBackward& b_;
  const AdapterView& view_;
  const AdapterGradients& gradients_;
  const int64_t column_;
  const int norm_sums_;
};

// Where the sums over a range of an adapter's rows wait for the third kernel. Ranges of one adapter
// begin `range` rows apart, as do first ranges of adapters that have several; so only a last and a
// first one can fall in the same slot.
template <class C>
__device__ __forceinline__ C* partial(const BackwardParams& params, const Segment& segment,
                                      int64_t part, int64_t column_block) {
  const int64_t slot = 2 * (params.ranges.size.divide(segment.begin) + part) + (part == 0);
  return static_cast<C*>(params.partials) +
         (slot * params.column_blocks + column_block) * params.partial_size();
}

// The post norm's column sums, Σ do ⊙ û and Σ do, of each warp in shared memory.
template <class X, class C, int warps>
struct VectorSums {
  static constexpr int kSize = warps * 2 * kBlock;
  static constexpr int kLanes = kBlock / kVector<X>;  // that share a row

  const int offset;  // of [warps, 2, 64]

  __device__ __forceinline__ void clear() const {
    C* const sums = shared_at<C>(offset);
    for (int i = thread_index(); i < kSize; i += 32 * warps) sums[i] = C(0);
  }
  // Adds one vector of each thread, over the rows that a warp has.
  __device__ __forceinline__ void add(const C (&gradient)[kVector<X>],
                                      const C (&normalized)[kVector<X>]) const {
    const int thread = thread_index(), lane = thread % 32;
    C* const sums = shared_at<C>(offset) + thread / 32 * 2 * kBlock + lane * kVector<X>;
#pragma unroll
    for (int e = 0; e < kVector<X>; ++e) {
      C weight = gradient[e] * normalized[e], bias = gradient[e];
#pragma unroll
      for (int distance = 16; distance >= kLanes; distance /= 2) {
        weight += __shfl_xor_sync(0xffffffffu, weight, distance);
        bias += __shfl_xor_sync(0xffffffffu, bias, distance);
      }
      if (lane < kLanes) {
        sums[e] += weight;
        sums[kBlock + e] += bias;
      }
    }
  }
  // One of the sums of a column, after a barrier: over the warps, in their order.
  __device__ __forceinline__ C sum(int which, int column) const {
    C result = 0;
    for (int warp = 0; warp < warps; ++warp) {
      result += shared_at<C>(offset)[(2 * warp + which) * kBlock + column];
    }
    return result;
  }
};

// Writes the part [rows, columns] of a tile of sums to memory.
template <class S, class C>
__device__ __forceinline__ void store_tile(C* to, int64_t pitch, int64_t rows, int64_t columns,
                                           const C* tile) {
  for (int i = 4 * thread_index(); i < kBlock * kBlock; i += 4 * S::kThreads) {
    const int row = i / kBlock, column = i % kBlock;
    if (row >= rows || column >= columns) continue;
    C sums[4];
    load_aligned(sums, tile + row * kSumPitch<C> + column);
    store_aligned<Space::kGlobal>(to + row * pitch + column, sums);
  }
}

// A block's part of a segment, from a position to another, and where its sums go: null if it is all
// of the segment. In shared memory.
template <class C>
struct RowRange {
  Segment segment;
  int64_t first, end;
  C* sums;
};

// Second kernel: dx, and sums over rows for the weights' gradients, for a block of columns and a
// range of an adapter's rows.
template <class X, class P>
__global__ __launch_bounds__(
    ColumnTile<X, P>::kThreads,
    (kResident<ColumnTile<X, P>,
               typename P::Sum>)) void backward_columns_kernel(const __grid_constant__
                                                                   BackwardParams params) {
  using S = ColumnTile<X, P>;
  constexpr int rows = S::kRows, kThreads = S::kThreads, part_pitch = kPartPitch<X, kBlock>;
  using Tile = RowTile<X, P, S>;
  using Own = Elements<X, S>;
  using T = typename P::Operand;
  using C = typename P::Sum;
  using Gradient = OutputGradient<X, P, S>;
  const LinearAdapterBackward& b = params.problem;
  const ColumnLayout& layout = params.layout;
  const unsigned column_blocks = static_cast<unsigned>(params.column_blocks);
  const int column_block = static_cast<int>(blockIdx.x % column_blocks);
  const Depth depth{b, params.depth, params.sample_rows};
  const auto range = [&]() -> RowRange<C>& { return *shared_at<RowRange<C>>(layout.range); };
  {
    const Segment found = params.ranges.find(b.routing, blockIdx.x / column_blocks);
    if (found.adapter >= b.routing.adapters) return;
    params.adapters.share(found.adapter, layout.rows.adapter);
    if (thread_index() == 0) {
      const int64_t first = found.begin + found.range * params.ranges.size.value;
      const int64_t end = first + params.ranges.size.value;
      const bool whole = found.end - found.begin <= params.ranges.size.value;
      range() = {found, first, end < found.end ? end : found.end,
                 whole ? nullptr : partial<C>(params, found, found.range, column_block)};
    }
    __syncthreads();
  }
  const Segment& segment = range().segment;
  const Adapter& adapter = *shared_at<Adapter>(layout.rows.adapter);
  const Wanted wanted{b, adapter.gradients};
  const WeightGradients<X, P> weight_gradients(b, adapter, column_block, layout.norm_sums);
  if (range().first >= segment.end || !depth.keeps_adapter(segment.adapter)) {
    if (segment.range == 0) weight_gradients.clear();
    return;
  }
  const bool pre = b.norm_position == NormPosition::kPre;
  const auto wants_gradient = [&] { return wanted.up() || (!pre && wanted.norm()); };
  const int64_t width = b.hidden_size;
  const auto aligned = [&](const void* matrix) {
    return is_aligned(matrix, width * static_cast<int64_t>(sizeof(X)));
  };
  const VectorSums<X, C, S::kWarps> vector_sums{layout.vector_sums};
  if (!pre) vector_sums.clear();
  if (pre && wanted.norm()) weight_gradients.clear_norm();
  if (const int c = thread_index(); pre && c < kBlock) {
    const int64_t at = int64_t{column_block} * kBlock + c;
    shared_at<C>(layout.norm_weight)[c] =
        at < width
            ? load_weight<C, X>(adapter.view.norm_weight, b.weight_type == DataType::kFloat32, at)
            : C(0);
  }
  // Rows are found while those before them are worked on. `done`: how many those are.
  const auto tile_at = [&](int done) {
    const int64_t chunk = range().first + done, left = range().end - chunk;
    return Tile(b, layout.rows, segment, chunk,
                left < 0      ? 0
                : left < rows ? static_cast<int>(left)
                              : rows,
                adapter.view, done / rows & 1);
  };

  for (int block = 0; block * kBlock < adapter.view.bottleneck; ++block) {
    // M [bottleneck, columns], duᵀz [columns, bottleneck]: operands are stored along both.
    Product<P, LargeTile, WarpTile<P, LargeTile>::kMultipliesAndAdds> down_sum, up_sum;
    down_sum.clear();
    up_sum.clear();
    C hidden_sum = 0;
    const bool input_gradient = block == 0 && wanted.x();
    const bool wants_x = wanted.down() || (input_gradient && pre);
    const auto fill_down = [&](int piece) {
      WeightTile<X, P, S, kStep<P>, kBlock>(tile_at(0).down(), piece * kStep<P>,
                                            column_block * kBlock)
          .fill(shared_at<T>(layout.down[piece & 1]), kBlockPitch<P>, tile_at(0).rounding);
    };
    // Starts bringing what a tile needs.
    const auto bring_tile = [&](const Tile& tile, int stage) {
      const int count = tile.count, at_stage = stage * layout.stage_bytes;
      const auto copy = [&](int to, const void* matrix) {
        constexpr int n = kVector<T>, across = kBlock / n, down = kThreads / across;
        const int row = thread_index() / across, at = thread_index() % across * n;
        const T* from = static_cast<const T*>(matrix) + (tile.first + row) * params.padded +
                        block * kBlock + at;
        const bool inside = block * kBlock + at < params.padded;
#pragma unroll
        for (int i = 0; i < rows / down; ++i) {
          const bool there = inside && row + i * down < count;
          copy_async(shared_at<T>(to + at_stage) + (row + i * down) * kBlockPitch<P> + at,
                     there ? from + i * down * params.padded : matrix, there ? 16 : 0);
        }
      };
      copy(layout.hidden_gradient, params.hidden_gradients);
      copy(layout.rows.activated, params.activated);
      constexpr int n = kVector<C>;
      if (const int at = thread_index() * n; at < 4 * rows) {
        const bool there = at < 4 * count;
        const C* const from = static_cast<const C*>(params.row_sums);
        copy_async(shared_at<C>(layout.row_sums + at_stage) + at,
                   there ? from + 4 * tile.first + at : from, there ? 16 : 0);
      }
      X* const x_part = shared_at<X>(layout.x_part + at_stage);
      X* const gradient_part = shared_at<X>(layout.gradient_part + at_stage);
      const X* const x = static_cast<const X*>(b.x);
      const X* const grad_y = static_cast<const X*>(b.grad_y);
      if (params.whole) {
        const Own own;
#pragma unroll
        for (int v = 0; v < Own::kCount; ++v) {
          const bool there = own.row(v) < count;
          const int64_t at =
              there ? tile.row()[own.row(v)] * width + column_block * kBlock + own.column() : 0;
          if (wants_x) copy_async(x_part + own.at(v, part_pitch), x + at, there ? 16 : 0);
          copy_async(gradient_part + own.at(v, part_pitch), grad_y + at, there ? 16 : 0);
        }
      } else {
        const int column = static_cast<int>(column_block) * kBlock;
        if (wants_x) {
          bring<Own>(x_part, part_pitch, x, tile.row(), count, column, width, aligned(b.x));
        }
        bring<Own>(gradient_part, part_pitch, grad_y, tile.row(), count, column, width,
                   aligned(b.grad_y));
      }
    };
    __syncthreads();
    tile_at(0).find_rows(depth);
    if (input_gradient && layout.one_piece) fill_down(0);
    if (layout.stages > 1) {
      __syncthreads();
      bring_tile(tile_at(0), 0);
    }
    copy_async_commit();
    for (int done = 0; range().first + done < range().end; done += rows) {
      const Tile tile = tile_at(done);
      const int count = tile.count;
      const int stage = layout.stages > 1 ? tile.buffer : 0, at_stage = stage * layout.stage_bytes;
      const auto hidden_gradients = [&] {
        return static_cast<const T*>(params.hidden_gradients) + tile.first * params.padded;
      };
      const auto activated = [&] {
        return static_cast<const T*>(params.activated) + tile.first * params.padded;
      };
      const X* const x_part = shared_at<X>(layout.x_part + at_stage);
      const X* const gradient_part = shared_at<X>(layout.gradient_part + at_stage);
      const T* const hidden_gradient = shared_at<T>(layout.hidden_gradient + at_stage);
      const C* const row_sums = shared_at<C>(layout.row_sums + at_stage);
      __syncthreads();  // the tile before is done
      if (layout.stages == 1) {
        bring_tile(tile, 0);
        copy_async_commit();
      }
      tile_at(done + rows).find_rows(depth);
      copy_async_wait<0>();
      __syncthreads();
      if (const Tile next = tile_at(done + rows); layout.stages > 1 && next.count > 0) {
        bring_tile(next, stage ^ 1);  // on its way while this one is worked on
        copy_async_commit();
      }
      if (!pre) {
        if (const int i = thread_index(); i < rows) {
          tile.mean()[i] = i < count ? row_sums[4 * i] : C(0);
          tile.rstd()[i] = i < count ? row_sums[4 * i + 1] : C(0);
        }
        __syncthreads();
      }
      if (wants_out(b) && wants_gradient()) {
        UpProduct<X, P, S> up(tile, activated(), params.padded);
        up.start(column_block, 1);
        Product<P, S> product;
        up.next(product);
        product.template store<Space::kShared>(tile.sums(), kSumPitch<C>);
        __syncthreads();
      }
      // x̂ (or x) and do (or du) as operands. Not unrolled: registers are full of sums.
      if (wanted.down()) {
#pragma unroll 1
        for (int v = 0; v < Own::kCount; ++v) {
          const Own own;
          const int i = own.row(v);
          C values[kVector<X>];
          load_aligned(values, x_part + own.at(v, part_pitch));
          const bool there =
              tile.active()[i] && int64_t{column_block} * kBlock + own.column() < width;
          const C mean = pre && there ? row_sums[4 * i] : C(0);
          const C rstd = pre && there ? row_sums[4 * i + 1] : C(1);
#pragma unroll
          for (int e = 0; e < kVector<X>; ++e) {
            values[e] = there ? (values[e] - mean) * rstd : C(0);
          }
          store_operands<P>(shared_at<T>(layout.x) + i * kBlockPitch<P> + own.column(), values,
                            tile.rounding);
        }
      }
      if (wants_gradient() && !params.plain) {
        const Gradient output_gradient(params, segment.adapter);
#pragma unroll 1
        for (int v = 0; v < Own::kCount; ++v) {
          const Own own;
          const int i = own.row(v);
          typename Gradient::template Values<kVector<X>> values;
          output_gradient.get(tile, i, int64_t{column_block} * kBlock + own.column(),
                              gradient_part + own.at(v, part_pitch),
                              tile.sums() + i * kSumPitch<C> + own.column(), values);
          if (!pre) {
            if (block == 0) vector_sums.add(values.d, values.normalized);
            const bool is_active = tile.active()[i];
            Gradient::through_norm(values, tile.rstd()[i], is_active ? row_sums[4 * i + 2] : C(0),
                                   is_active ? row_sums[4 * i + 3] : C(0));
#pragma unroll
            for (int e = 0; e < kVector<X>; ++e) values.d[e] = is_active ? values.d[e] : C(0);
          }
          store_operands<P>(shared_at<T>(layout.gradient) + i * kBlockPitch<P> + own.column(),
                            values.d, tile.rounding);
        }
      }
      __syncthreads();
      if (wanted.down()) {
        down_sum.template multiply<false, false>(hidden_gradient, kBlockPitch<P>,
                                                 shared_at<T>(layout.x), kBlockPitch<P>, rows);
        const int thread = thread_index();
        constexpr int step = kThreads / kBlock;
        const T* of_column = hidden_gradient + thread / kBlock * kBlockPitch<P> + thread % kBlock;
#pragma unroll 4
        for (int i = 0; i < rows / step; ++i, of_column += step * kBlockPitch<P>) {
          hidden_sum += static_cast<C>(*of_column);
        }
      }
      if (wanted.up()) {
        const int64_t left = adapter.view.bottleneck - block * kBlock;
        up_sum.template multiply<false, false>(
            shared_at<T>(params.plain ? layout.gradient_part + at_stage : layout.gradient),
            kBlockPitch<P>, shared_at<T>(layout.rows.activated + at_stage), kBlockPitch<P>, rows,
            left < kBlock ? static_cast<int>(left) : kBlock);
      }
      if (!input_gradient) continue;
      // dn = dh down, and dx.
      Product<P, S> product;
      product.clear();
      if (layout.one_piece) {
        product.template multiply<true, false>(hidden_gradient, kBlockPitch<P>,
                                               shared_at<T>(layout.down[0]), kBlockPitch<P>,
                                               step_depth<P>(adapter.view.bottleneck, 0));
      } else {
        __syncthreads();  // the pieces have the place of x and du
        const int64_t r = adapter.view.bottleneck;
        const int pieces = static_cast<int>((r + kStep<P> - 1) / kStep<P>);
        fill_down(0);
        copy_async_commit();
        for (int piece = 0; piece < pieces; ++piece) {
          T* left = shared_at<T>(layout.rows.left[piece & 1]);
          fill_tile<P, S, rows, kStep<P>>(
              left, kStepPitch<P>, kNotRounded, [&](int i, int at, auto& values) {
                const int64_t j = piece * kStep<P> + at;
                load(values, hidden_gradients() + i * params.padded + j,
                     i < count && j < params.padded ? kVector<T> : 0, true);
              });
          copy_async_wait<0>();
          __syncthreads();
          if (piece + 1 < pieces) {
            fill_down(piece + 1);
            copy_async_commit();
          }
          product.template multiply<true, false>(left, kStepPitch<P>,
                                                 shared_at<T>(layout.down[piece & 1]),
                                                 kBlockPitch<P>, step_depth<P>(r, piece));
        }
      }
      // dx of some elements, from dn, dy and x. `of_row`: see row_sums.
      const auto change = [&]<bool usual>(const C(&of_row)[4], bool is_active, const auto& weight,
                                          const auto& upstream, const auto& values,
                                          auto& gradient) {
        constexpr int n = sizeof(gradient) / sizeof(C);
#pragma unroll
        for (int e = 0; e < n; ++e) {
          if (usual || pre) {
            const C normalized = (values[e] - of_row[0]) * of_row[1];
            gradient[e] =
                of_row[1] * (gradient[e] * weight[e] - of_row[2] - normalized * of_row[3]);
          }
          if (usual || b.residual) gradient[e] += upstream[e];
          if (!usual && !is_active) gradient[e] = upstream[e];
        }
      };
      if (params.whole) {  // where the sums are
        const WarpTile<P, S> warp;
        const int row = warp.first_row + warp.g;
        bool is_active[2];
        X* to[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = row + 8 * half;
          is_active[half] = tile.active()[i];
          to[half] = static_cast<X*>(b.grad_x) + tile.row()[i] * width + column_block * kBlock;
        }
        const X* const upstream_from = gradient_part + row * part_pitch;
        const X* const values_from = x_part + row * part_pitch;
        const auto write = [&]<bool usual>() {
          product.template write_rows<X>(
              [&](int half, int at, C(&gradient)[2]) {
                C upstream[2], values[2] = {}, weight[2] = {}, of_row[4] = {};
                load_pair(upstream, upstream_from + 8 * half * part_pitch + at);
                if (usual || pre) {
                  load_aligned(of_row, row_sums + 4 * (row + 8 * half));
                  load_pair(values, values_from + 8 * half * part_pitch + at);
                  load_aligned(weight, shared_at<C>(layout.norm_weight) + at);
                }
                change.template operator()<usual>(of_row, is_active[half], weight, upstream, values,
                                                  gradient);
              },
              [&](int half, int at, const auto& words) {
                if (row + 8 * half < count) store_words<Space::kGlobal>(to[half] + at, words);
              });
        };
        if (pre && b.residual && params.depth.threshold == 0) {
          write.template operator()<true>();
        } else {
          write.template operator()<false>();
        }
        continue;
      }
      __syncthreads();  // the sums may have the place of operands
      product.template store<Space::kShared>(tile.sums(), kSumPitch<C>);
      __syncthreads();
      const Own own;
      const int64_t column = int64_t{column_block} * kBlock + own.column(), left = width - column;
#pragma unroll 1
      for (int v = 0; v < Own::kCount; ++v) {
        const int i = own.row(v);
        if (i >= count || left <= 0) continue;
        C gradient[kVector<X>], upstream[kVector<X>], values[kVector<X>] = {};
        C weight[kVector<X>] = {}, of_row[4] = {};
        if (pre) {
          load_aligned(of_row, row_sums + 4 * i);
          load_aligned(weight, shared_at<C>(layout.norm_weight) + own.column());
          load_aligned(values, x_part + own.at(v, part_pitch));
        }
        load_sums(gradient, tile.sums() + i * kSumPitch<C> + own.column());
        load_aligned(upstream, gradient_part + own.at(v, part_pitch));
        change.template operator()<false>(of_row, tile.active()[i], weight, upstream, values,
                                          gradient);
        store(static_cast<X*>(b.grad_x) + tile.row()[i] * width + column, gradient,
              static_cast<int>(left), aligned(b.grad_x));
      }
    }
    // This block of the bottleneck is summed over the range.
    const auto total = [&] { return shared_at<C>(layout.total); };
    if (wanted.down()) {
      C* const hidden_sums = shared_at<C>(layout.hidden_sum);
      __syncthreads();
      down_sum.template store<Space::kShared>(total(), kSumPitch<C>);
      hidden_sums[thread_index()] = hidden_sum;
      __syncthreads();
      if (const int thread = thread_index(); thread < kBlock) {
        C sum = 0;
        for (int other = thread; other < kThreads; other += kBlock) sum += hidden_sums[other];
        hidden_sums[thread] = sum;
        const int64_t j = block * kBlock + thread;
        if (range().sums && j < params.padded) range().sums[2 * params.padded * kBlock + j] = sum;
      }
      if (!range().sums) {
        __syncthreads();
        weight_gradients.down(total(), hidden_sums, block);
      } else {
        store_tile<S>(range().sums + block * kBlock * kBlock, kBlock,
                      params.padded - block * kBlock, kBlock, total());
      }
    }
    if (wanted.up()) {
      __syncthreads();
      up_sum.template store<Space::kShared>(total(), kSumPitch<C>);
      __syncthreads();
      if (!range().sums) {
        weight_gradients.up(total(), block);
      } else {
        store_tile<S>(range().sums + params.padded * kBlock + block * kBlock, params.padded, kBlock,
                      params.padded - block * kBlock, total());
      }
    }
  }
  if (!wanted.norm()) return;
  __syncthreads();
  if (pre) {
    if (!range().sums) weight_gradients.norm();
    return;
  }
  const int thread = thread_index();
  if (thread >= kBlock) return;
  const C weight = vector_sums.sum(0, thread), bias = vector_sums.sum(1, thread);
  if (!range().sums) return weight_gradients.norm(thread, weight, bias);
  C* const sums = range().sums + params.partial_size() - 2 * kBlock;
  sums[thread] = weight;
  sums[kBlock + thread] = bias;
}

// Third kernel: the gradients of adapters with several ranges.
template <class X, class P>
__global__ __launch_bounds__(LargeTile::kThreads) void backward_ranges_kernel(
    const __grid_constant__ BackwardParams params) {
  using C = typename P::Sum;
  const LinearAdapterBackward& b = params.problem;
  const unsigned column_blocks = static_cast<unsigned>(params.column_blocks);
  const bool second = blockIdx.x % 2;  // of two blocks: the gradient of up, and the others
  const int64_t column_block = blockIdx.x / 2 % column_blocks;
  const int64_t a = blockIdx.x / 2 / column_blocks, range = params.ranges.size.value;
  const Segment segment{static_cast<int>(a), first_position(b.routing, a),
                        first_position(b.routing, a + 1), 0};
  const int64_t length = segment.end - segment.begin;
  if (length <= range || !Depth{b, params.depth, params.sample_rows}.keeps_adapter(a)) return;
  const int64_t ranges = params.ranges.size.divide(length + range - 1);
  C* const total = shared_at<C>(0);                     // [64, 64]
  C* const hidden_sum = total + kBlock * kSumPitch<C>;  // [64]
  constexpr int norm_sums = (kBlock * kSumPitch<C> + kBlock) * static_cast<int>(sizeof(C));
  constexpr int after = norm_sums + WeightGradients<X, P>::kNormSums * static_cast<int>(sizeof(C));
  const Adapter& adapter = params.adapters.share(a, after);
  __syncthreads();
  const Wanted wanted{b, adapter.gradients};
  const WeightGradients<X, P> weight_gradients(b, adapter, column_block, norm_sums);
  weight_gradients.clear_norm();
  constexpr int kThreads = LargeTile::kThreads;
  const int thread = static_cast<int>(threadIdx.x);
  // The sums of ranges lie at equal distances, but for that of the first.
  const C* const first_part = partial<C>(params, segment, 0, column_block);
  const C* const other_parts = partial<C>(params, segment, 1, column_block);
  const int64_t part_step = 2 * params.column_blocks * params.partial_size();
  const auto add = [&](int64_t offset) {
    C sum = first_part[offset];
    const C* from = other_parts + offset;
#pragma unroll 8
    for (int64_t part = 1; part < ranges; ++part, from += part_step) sum += *from;
    return sum;
  };
  const auto add_tile = [&](int64_t offset, int64_t pitch, int64_t tile_rows, int64_t columns) {
    constexpr int n = kVector<C>, across = kBlock / n, count = kBlock * across / kThreads;
    C sum[count][n];
    const C* from[count];
#pragma unroll
    for (int v = 0; v < count; ++v) {
      const int vector = thread + v * kThreads, row = vector / across, column = vector % across * n;
      const bool there = row < tile_rows && column < columns;
      from[v] = there ? first_part + offset + row * pitch + column : nullptr;
#pragma unroll
      for (int e = 0; e < n; ++e) sum[v][e] = C(0);
      if (there) load_aligned(sum[v], from[v]);
    }
#pragma unroll(sizeof(C) == 8 ? 1 : 4)
    for (int64_t part = 1; part < ranges; ++part) {
      const int64_t distance = other_parts - first_part + (part - 1) * part_step;
#pragma unroll
      for (int v = 0; v < count; ++v) {
        if (!from[v]) continue;
        C values[n];
        load_aligned(values, from[v] + distance);
#pragma unroll
        for (int e = 0; e < n; ++e) sum[v][e] += values[e];
      }
    }
#pragma unroll
    for (int v = 0; v < count; ++v) {
      const int vector = thread + v * kThreads;
      store_aligned<Space::kShared>(total + vector / across * kSumPitch<C> + vector % across * n,
                                    sum[v]);
    }
  };
  for (int64_t block = 0; block * kBlock < adapter.view.bottleneck; ++block) {
    const int64_t bottleneck = adapter.view.bottleneck - block * kBlock;
    if (!second && wanted.down()) {
      __syncthreads();
      add_tile(block * kBlock * kBlock, kBlock, bottleneck, kBlock);
      if (thread < kBlock && thread < bottleneck) {
        hidden_sum[thread] = add(2 * params.padded * kBlock + block * kBlock + thread);
      }
      __syncthreads();
      weight_gradients.down(total, hidden_sum, block);
    }
    if (second && wanted.up()) {
      __syncthreads();
      add_tile(params.padded * kBlock + block * kBlock, params.padded, kBlock, bottleneck);
      __syncthreads();
      weight_gradients.up(total, block);
    }
  }
  if (second || !wanted.norm()) return;
  __syncthreads();
  if (b.norm_position == NormPosition::kPre) return weight_gradients.norm();
  if (thread >= kBlock) return;
  const int64_t sums = params.partial_size() - 2 * kBlock + thread;
  weight_gradients.norm(thread, add(sums), add(sums + kBlock));
}

// Whether do is dy as it is, and its operands too.
template <class X, class P>
bool is_plain(const LinearAdapterBackward& b) {
  return std::is_same_v<X, typename P::Operand> && !rounds_operands(b) && !wants_out(b) &&
         b.dropout == 0.0 && b.stochastic_depth == 0.0;
}

// False where its buffers have no room.
template <class X, class P, class S>
bool backward_rows(const BackwardCall& call, BackwardParams& params) {
  constexpr int64_t rows = S::kRows;
  using T = typename P::Operand;
  using C = typename P::Sum;
  constexpr int64_t kStages = BackwardParams::kStages;
  // Post: dy is also brought in tiles of the second product's width.
  constexpr int64_t part_pitch = std::max(kPartPitch<X, kStep<P>>, kPartPitch<X, kBlock>);
  const LinearAdapterBackward& b = call.problem;
  ColumnLayout& layout = params.layout;
  layout = {};
  SharedRoom room;
  if (wants_out(b)) {
    // Room beside the buffers of the second product.
    const int64_t own = rows * (2 * kStepPitch<P> * sizeof(T) +
                                kPartStages<X, P> * part_pitch * sizeof(X) + 2 * sizeof(C)) +
                        kStages * kStep<P> * kBlockPitch<P> * sizeof(T) + 16 * 128;
    layout.rows = shared_layout<X, P, S>(b, call.limits.shared_memory - own);
    room = SharedRoom(layout.rows.bytes);
  } else {
    take_rows<C>(layout.rows, room, rows);
  }
  layout.row_mean = room.take<C>(rows);
  layout.row_product = room.take<C>(rows);
  SharedRoom sums = room;
  params.hidden_sums = sums.take<C>(rows * kSumPitch<C>);
  for (int i = 0; i < kStages; ++i) {
    if (i < kPartStages<X, P>) params.gradient_part[i] = room.take<X>(rows * part_pitch);
    params.up[i] = room.take<T>(kStep<P> * kBlockPitch<P>);
  }
  if (!params.plain) {
    for (int& gradient : params.gradient) gradient = room.take<T>(rows * kStepPitch<P>);
  }
  room = SharedRoom(std::max(room.bytes(), sums.bytes()));
  if (room.bytes() > call.limits.shared_memory) return false;
  params.ranges = RowRanges::make(b, rows, false);
  launch("linear_adapter_backward: rows", &backward_rows_kernel<X, P, S>, params.ranges.blocks,
         S::kThreads, room.bytes(), call.stream, params);
  return true;
}

template <class X, class P>
void Backward<X, P>::run(const BackwardCall& call) {
  using T = typename P::Operand;
  using C = typename P::Sum;
  const LinearAdapterBackward& b = call.problem;
  auto params = call.params<BackwardParams>();
  params.padded = round_up(std::max<int64_t>(b.largest_bottleneck, 1), 16);
  params.column_blocks = (b.hidden_size + kBlock - 1) / kBlock;
  params.whole = b.hidden_size % kBlock == 0 && is_aligned(b.x) && is_aligned(b.grad_y) &&
                 is_aligned(b.grad_x);
  params.plain = params.whole && is_plain<X, P>(b);
  const int64_t processors = call.limits.multiprocessors, adapters = b.routing.adapters;
  // Ranges that give every multiprocessor some blocks, but are not so short that writing and
  // reading their sums would matter.
  const int64_t wanted = std::max<int64_t>(2 * processors / params.column_blocks, 1);
  const int64_t range = std::clamp<int64_t>(round_up(b.rows / wanted, 64), 256, int64_t{1} << 30);
  Carver workspace(call.workspace);
  params.hidden_gradients = workspace.take<T>(b.rows * params.padded);
  params.activated = workspace.take<T>(b.rows * params.padded);
  params.row_sums = workspace.take<C>(4 * b.rows);
  params.vectors = workspace.take<C>(2 * adapters * b.largest_bottleneck);
  if (b.rows > range) {
    const int64_t slots = 2 * (b.rows / range + 1);
    params.partials = workspace.take<C>(slots * params.column_blocks * params.partial_size());
  }
  if (call.bytes) {
    *call.bytes = workspace.bytes();
    return;
  }
  if (b.norm_position == NormPosition::kPre && adapters > 0 && b.rows > 0) {
    const int64_t groups = (b.largest_bottleneck + kWarps - 1) / kWarps;
    launch("linear_adapter_backward: vectors", &vectors_kernel<X, C>, adapters * groups, kThreads,
           0, call.stream, params);
  }
  // Tiles of 64 rows read weights a quarter as often as those of 16, but are fewer. From where on
  // they are faster was measured on an H200.
  const bool multiplies_and_adds = std::is_same_v<P, MultiplyAdd<C>>;
  const bool large = b.rows / 64 >= (multiplies_and_adds ? processors : processors * 2 / 3) &&
                     fills_large_tiles(b);
  const bool done = large && backward_rows<X, P, LargestTile<X>>(call, params);
  if (!done) backward_rows<X, P, SmallTile>(call, params);
  if (adapters == 0) return;

  ColumnLayout& layout = params.layout;
  layout = {};
  using S = ColumnTile<X, P>;
  constexpr int64_t rows = S::kRows;
  SharedRoom room;
  take_rows<C>(layout.rows, room, rows, 2);
  layout.range = room.take<RowRange<C>>(1);
  if (b.norm_position == NormPosition::kPre) {
    layout.norm_weight = room.take<C>(kBlock);
    layout.norm_sums = room.take<C>(WeightGradients<X, P>::kNormSums);
  }
  if (b.norm_position == NormPosition::kPost) {
    layout.vector_sums = room.take<C>(VectorSums<X, C, S::kWarps>::kSize);
  }
  if (wants_out(b)) layout.rows.sums = room.take<C>(rows * kSumPitch<C>);
  const bool one_piece = layout.one_piece = b.largest_bottleneck <= kStep<P>;
  // The two second operands are never in use together, but `down` of one piece, which stays for all
  // rows, with one piece of `up`.
  const auto take_piece = [&] {
    return room.take<T>(std::max(kBlock * kStepPitch<P>, kStep<P> * kBlockPitch<P>));
  };
  if (wants_out(b) || !one_piece) layout.rows.weights[0] = take_piece();
  if (one_piece) {
    layout.down[0] = take_piece();
  } else {
    layout.rows.weights[1] = take_piece();
    for (int i = 0; i < 2; ++i) layout.down[i] = layout.rows.weights[i];
  }
  // What a tile of rows needs; afterwards its place holds a tile of sums, and Σ dh of each thread.
  SharedRoom total = room;
  layout.total = total.take<C>(kBlock * kSumPitch<C>);
  layout.hidden_sum = total.take<C>(S::kThreads);
  layout.x = room.take<T>(rows * kBlockPitch<P>);
  layout.gradient = room.take<T>(rows * kBlockPitch<P>);
  // Pieces of left operands, before x and du are there or when they have been multiplied.
  layout.rows.left[0] = layout.x;
  layout.rows.left[1] = layout.gradient;
  // Unless that is wanted before x and du are there, dn has their place when they have been
  // multiplied.
  static_assert(rows * kSumPitch<C> * sizeof(C) <= 2 * rows * kBlockPitch<P> * sizeof(T));
  if (!wants_out(b)) layout.rows.sums = layout.x;
  layout.rows.activated_resident = params.padded <= kBlock;
  layout.rows.activated_pitch =
      static_cast<int>(layout.rows.activated_resident ? kBlockPitch<P> : kStepPitch<P>);
  const int64_t stages_begin = room.bytes();
  layout.row_sums = room.take<C>(4 * rows);
  layout.hidden_gradient = room.take<T>(rows * kBlockPitch<P>);
  layout.rows.activated = room.take<T>(rows * kBlockPitch<P>);
  layout.x_part = room.take<X>(rows * kPartPitch<X, kBlock>);
  layout.gradient_part = room.take<X>(rows * kPartPitch<X, kBlock>);
  layout.stage_bytes = static_cast<int>(room.bytes() - stages_begin);
  // Two, if a multiprocessor still has room for two blocks, beside what CUDA reserves for each.
  const int64_t two_stages = std::max(room.bytes() + layout.stage_bytes, total.bytes());
  layout.stages = !wants_out(b) && 2 * two_stages + 1024 <= call.limits.shared_memory ? 2 : 1;
  room = SharedRoom(layout.stages > 1 ? two_stages : std::max(room.bytes(), total.bytes()));
  params.ranges = RowRanges::make(b, range, true);
  launch("linear_adapter_backward: columns", &backward_columns_kernel<X, P>,
         params.ranges.blocks * params.column_blocks, S::kThreads, room.bytes(), call.stream,
         params);
  if (b.rows > range) {
    launch("linear_adapter_backward: ranges", &backward_ranges_kernel<X, P>,
           2 * adapters * params.column_blocks, LargeTile::kThreads,
           (kBlock * kSumPitch<C> + kBlock + WeightGradients<X, P>::kNormSums) * sizeof(C) +
               sizeof(Adapter),
           call.stream, params);
  }
}

}  // namespace adapter_ext::cuda
