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
  int row_mean, row_product;  // [rows]: mean(dx̂), mean(dx̂ ⊙ x̂); post: the same of û
  int x_part, gradient_part;  // of x and dy as they are, [rows, 64]: see bring()
  int hidden_gradient;        // [rows, 64]
  int x, gradient;            // x̂ or x, and do or du: [kRows, 64]
  int down[2];                // [kStep, 64]
  int hidden_sum;             // [threads]: Σ dh
  int range;                  // a RowRange
  int vector_sums;            // post: see VectorSums
  int total;                  // a tile of sums [64, 64], in the place of the operands
  bool one_piece;             // the bottleneck is no longer than a step: its piece of `down` stays
};

struct BackwardParams {
  LinearAdapterBackward problem;
  Parts parts;
  Chance depth, dropout;
  Divisor sample_rows;
  int64_t padded;  // the bottleneck, in whole steps of 16
  int64_t column_blocks;
  void* hidden_gradients;  // dh: operands [rows, padded], by position
  void* activated;         // z: likewise
  void* row_sums;          // [rows, 4], by position: mean, rstd, and two of ColumnLayout
  void* vectors;           // [adapters, 2, hidden_stride]: c1, c0
  void* partials;          // [2 (rows / range + 1), column blocks, partial_size]
  ColumnLayout layout;
  // First kernel, in bytes: dy as it is and du, [rows, kStep], and up [kStep, 64].
  int gradient_part[2], gradient[2], up[2];
  Adapters adapters;

  // M [padded, 64], duᵀz [64, padded], v [padded], two rows of column sums.
  ADAPTER_EXT_HOST_DEVICE int64_t partial_size() const {
    return 2 * padded * kBlock + padded + 2 * kBlock;
  }
};
static_assert(sizeof(BackwardParams) <= 4096);

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

  __device__ __forceinline__ OutputGradient(const BackwardParams& params, const Segment& segment)
      : b_(params.problem), dropout_(b_, params.dropout), depth_(params.depth) {
    if (b_.l2_lambda && b_.grad_aux) {
      const C samples = static_cast<C>(params.sample_rows.divide(segment.end - segment.begin));
      pull_ = C(2) * static_cast<const C*>(b_.l2_lambda)[segment.adapter] *
              static_cast<const C*>(b_.grad_aux)[segment.adapter] / samples *
              static_cast<C>(depth_.kept_scale) * static_cast<C>(params.dropout.kept_scale);
    }
  }

  // Whether it needs the second product, up z.
  __device__ __forceinline__ bool wants_out() const {
    return b_.norm_position == NormPosition::kPost || pull_ != C(0);
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
    if (wants_out()) {
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
  const unsigned groups = static_cast<unsigned>((b.hidden_stride + kWarps - 1) / kWarps);
  const int64_t a = blockIdx.x / groups;
  const int64_t j = blockIdx.x % groups * kWarps + threadIdx.x / 32;
  const AdapterView view = params.adapters.view(a);
  if (j >= view.bottleneck || first_position(b.routing, a) == first_position(b.routing, a + 1)) {
    return;
  }
  constexpr int n = kVector<X>;
  const bool is_float = b.weight_type == DataType::kFloat32;
  const int64_t size = is_float ? 4 : static_cast<int64_t>(sizeof(X)), width = b.hidden_size;
  const bool aligned = is_aligned(view.down, view.down_stride * size) &&
                       is_aligned(view.norm_weight) && is_aligned(view.norm_bias);
  C weight_sum = 0, bias_sum = 0;
  for (int64_t c = threadIdx.x % 32 * n; c < width; c += 32 * n) {
    C down[n], weight[n], bias[n];
    load_weights<X>(down, view.down, is_float, j * view.down_stride + c, width - c, aligned);
    load_weights<X>(weight, view.norm_weight, is_float, c, width - c, aligned);
    load_weights<X>(bias, view.norm_bias, is_float, c, width - c, aligned);
#pragma unroll
    for (int e = 0; e < n; ++e) {
      weight_sum += down[e] * weight[e];
      bias_sum += down[e] * bias[e];
    }
  }
  weight_sum = sum_over_lanes<32>(weight_sum);
  bias_sum = sum_over_lanes<32>(bias_sum);
  if (threadIdx.x % 32 == 0) {
    C* to = static_cast<C*>(params.vectors) + 2 * a * b.hidden_stride + j;
    to[0] = weight_sum;
    to[b.hidden_stride] = bias_sum;
  }
}

// Two neighbours of a row of h, from an even element on; what lies behind the last one is left.
template <class C>
__device__ __forceinline__ void load_pair(C (&to)[2], const C* row, int64_t j, int64_t count,
                                          int64_t stride) {
  if (stride % 2 == 0) {
    if (j < count) load_aligned(to, row + j);
  } else {
    if (j < count) to[0] = row[j];
    if (j + 1 < count) to[1] = row[j + 1];
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
  const Segment segment = params.parts.find(b.routing, blockIdx.x);
  const int64_t first = segment.begin + segment.part * rows;
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
  const int64_t r = tile.view.bottleneck;
  load_statistics(tile, b);

  // z.
  const C* hidden = static_cast<const C*>(b.hidden);
  const int64_t used = round_up(r, kBlock);
  T* activated = static_cast<T*>(params.activated) + first * params.padded;
  for (int i = thread_index() / 32; i < rows; i += S::kWarps) {
    for (int64_t j = threadIdx.x % 32 * 2; j < used; j += 64) {
      C z[2] = {};
      if (i < count) load_pair(z, hidden + tile.row()[i] * b.hidden_stride, j, r, b.hidden_stride);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        z[e] = i < count && j + e < r ? value_of(b.activation, z[e]) : C(0);
      }
      const T first_z = P::round(z[0], tile.rounding), second_z = P::round(z[1], tile.rounding);
      if (i < count && j < params.padded) {
        store_pair<Space::kGlobal>(activated + i * params.padded + j, first_z, second_z);
      }
      if (layout.activated_resident) {
        store_pair<Space::kShared>(shared_at<T>(layout.activated) + i * layout.activated_pitch + j,
                                   first_z, second_z);
      }
    }
  }

  const Gradient output_gradient(params, segment);
  UpProduct<X, P, S> up(tile, activated, params.padded);
  const X* grad_y = static_cast<const X*>(b.grad_y);
  const bool aligned = is_aligned(grad_y, width * static_cast<int64_t>(sizeof(X)));
  C* row_sums = static_cast<C*>(params.row_sums) + 4 * first;
  const auto store_row_sums = [&](int i, C mean, C product) {
    const C sums[4] = {tile.mean()[i], tile.rstd()[i], mean, product};
    store_aligned<Space::kGlobal>(row_sums + 4 * i, sums);
  };
  C* row_mean = shared_at<C>(params.layout.row_mean);
  C* row_product = shared_at<C>(params.layout.row_product);
  if (!tile.pre) {
    C mean_sum[Own::kCount] = {}, product_sum[Own::kCount] = {};
    up.start(0, params.column_blocks);
    for (int64_t block = 0; block < params.column_blocks; ++block) {
      const X* part = shared_at<X>(params.gradient_part[0]);
      bring<Own>(shared_at<X>(params.gradient_part[0]), grad_y, tile.row(), count, block * kBlock,
                 width, aligned);
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
        output_gradient.get(tile, own.row(v), block * kBlock + own.column(), part + own.at(v),
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
  const bool wants_out = output_gradient.wants_out();
  const WarpTile<S> warp;
  const C* vectors = static_cast<const C*>(params.vectors) + 2 * segment.adapter * b.hidden_stride;
  T* hidden_gradients = static_cast<T*>(params.hidden_gradients) + first * params.padded;
  C mean = 0, product = 0;  // of the thread's row
  const int64_t steps = (width + kStep<P> - 1) / kStep<P>;
  for (int64_t block = 0; block * kBlock < r; ++block) {
    const int columns = r - block * kBlock < kBlock ? static_cast<int>(r - block * kBlock) : kBlock;
    Product<P, S> hidden_gradient;
    hidden_gradient.clear();
    if (wants_out) up.start(0, params.column_blocks);
    __syncthreads();
    const auto bring_up = [&](int64_t step) {
      if (step < steps) {
        tile.up().template fill<X, P, S, kStep<P>, kBlock>(shared_at<T>(params.up[step & 1]),
                                                           kBlockPitch<P>, step * kStep<P>,
                                                           block * kBlock, tile.rounding);
      }
      copy_async_commit();
    };
    const auto bring_gradient = [&](int64_t step) {
      if (step < steps) {
        bring<Part>(shared_at<X>(params.gradient_part[step & 1]), grad_y, tile.row(), count,
                    step * kStep<P>, width, aligned);
      }
      copy_async_commit();
    };
    bring_up(0);
    bring_gradient(0);
    bring_gradient(1);
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t column = step * kStep<P>;
      if (wants_out && column % kBlock == 0) {
        Product<P, S> product;
        up.next(product);
        product.template store<Space::kShared>(tile.sums(), kSumPitch<C>);
        __syncthreads();
      }
      T* gradient = shared_at<T>(params.gradient[step & 1]);
      copy_async_wait<1>();  // all but dy of the next step
      const Part part;
#pragma unroll
      for (int v = 0; v < Part::kCount && part.any(); ++v) {
        const int i = part.row(v);
        typename Gradient::template Values<kVector<X>> values;
        output_gradient.get(tile, i, column + part.column(),
                            shared_at<X>(params.gradient_part[step & 1]) + part.at(v),
                            tile.sums() + i * kSumPitch<C> + column % kBlock + part.column(),
                            values);
        if (!tile.pre) {
          Gradient::through_norm(values, tile.rstd()[i], row_mean[i], row_product[i]);
        }
        const bool is_active = tile.active()[i];
#pragma unroll
        for (int e = 0; e < kVector<X>; ++e) values.d[e] = is_active ? values.d[e] : C(0);
        store_operands<P>(gradient + i * kStepPitch<P> + part.column(), values.d, tile.rounding);
      }
      __syncthreads();
      bring_up(step + 1);
      bring_gradient(step + 2);
      hidden_gradient.template multiply<true, false>(gradient, kStepPitch<P>,
                                                     shared_at<T>(params.up[step & 1]),
                                                     kBlockPitch<P>, kStep<P>, columns);
    }
    copy_async_wait<0>();
    constexpr int groups = Product<P, S>::kTiles / 2;         // of 16 columns
    C mean_sum[groups][2] = {}, product_sum[groups][2] = {};  // of the warp's rows g and g + 8
    hidden_gradient.for_each_pair([&](int i, int column, C& first, C& second, int pair) {
      const int64_t j = block * kBlock + column;
      C dh[2] = {first, second}, h[2] = {};
      if (tile.active()[i])
        load_pair(h, hidden + tile.row()[i] * b.hidden_stride, j, r, b.hidden_stride);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (tile.active()[i] && j + e < r) {
          dh[e] *= derivative_of(b.activation, h[e]);
          if (tile.pre) {
            mean_sum[pair / 4][pair % 2] += dh[e] * vectors[j + e];
            product_sum[pair / 4][pair % 2] += dh[e] * (h[e] - vectors[b.hidden_stride + j + e]);
          }
        } else {
          dh[e] = C(0);
        }
      }
      if constexpr (sizeof(T) == 2) {  // all together: by itself a pair is half of what is written
        first = dh[0];
        second = dh[1];
      } else if (i < count && j < params.padded) {
        store_pair<Space::kGlobal>(hidden_gradients + i * params.padded + j,
                                   P::round(dh[0], tile.rounding), P::round(dh[1], tile.rounding));
      }
    });
    if constexpr (sizeof(T) == 2) {
      hidden_gradient.store_operands(hidden_gradients + block * kBlock, params.padded, count,
                                     params.padded - block * kBlock);
    }
    if (!tile.pre) continue;
    // Over the lanes of a row, then over groups of columns: in one order, whatever the tile.
    C* of_groups = shared_at<C>(params.gradient[0]);  // [kBlock / 16, rows, 2]
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 * groups; ++i) {
      const C mean_of_group = sum_over_lanes<4>(mean_sum[i / 2][i % 2]);
      const C product_of_group = sum_over_lanes<4>(product_sum[i / 2][i % 2]);
      if (warp.t != 0) continue;
      const int group = warp.first_column / 16 + i / 2;
      const int row = warp.first_row + warp.g + i % 2 * 8;
      store_pair<Space::kShared>(of_groups + 2 * (group * rows + row), mean_of_group,
                                 product_of_group);
    }
    __syncthreads();
    if (const int i = thread_index(); i < rows) {
      for (int group = 0; group < kBlock / 16; ++group) {
        mean += of_groups[2 * (group * rows + i)];
        product += of_groups[2 * (group * rows + i) + 1];
      }
    }
  }
  if (const int i = thread_index(); tile.pre && i < count) {
    store_row_sums(i, mean / static_cast<C>(width), product / static_cast<C>(width));
  }
}

// Writes one adapter's gradients for a block of columns, from sums over all its rows.
template <class X, class P>
class WeightGradients {
  using C = typename P::Sum;
  using Own = Elements<X, LargeTile>;
  static constexpr int kThreads = LargeTile::kThreads;

 public:
  __device__ __forceinline__ WeightGradients(const LinearAdapterBackward& b, const Adapter& adapter,
                                             int64_t column_block)
      : b_(b), view_(adapter.view), gradients_(adapter.gradients), column_(column_block * kBlock) {}

  // d_down from M [64, 64] and v [64] of a block of the bottleneck, both in shared memory; adds to
  // the norm's gradients.
  __device__ __forceinline__ void down(const C* sums, const C* hidden_sum, int64_t block) {
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
    if (!pre() || !(gradients_.norm_weight || gradients_.norm_bias)) return;
    const int c = thread_index() % kBlock;
    if (column_ + c >= width()) return;
    for (int j = thread_index() / kBlock; j < kBlock; j += kThreads / kBlock) {
      if (first + j >= view_.bottleneck) break;
      const int64_t at = (first + j) * view_.down_stride + column_ + c;
      const C weight = load_weight<C, X>(view_.down, is_float(), at);
      norm_weight_ += weight * sums[j * kSumPitch<C> + c];
      norm_bias_ += weight * hidden_sum[j];
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

  // The norm's gradients. `memory` [2, kThreads] is shared memory that nobody uses.
  __device__ __forceinline__ void norm(C* memory) const {
    const int thread = thread_index();
    memory[thread] = norm_weight_;
    memory[kThreads + thread] = norm_bias_;
    __syncthreads();
    if (thread >= kBlock) return;
    C weight = 0, bias = 0;
    for (int i = thread; i < kThreads; i += kBlock) {
      weight += memory[i];
      bias += memory[kThreads + i];
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

  __device__ __forceinline__ bool pre() const { return b_.norm_position == NormPosition::kPre; }
  __device__ __forceinline__ bool is_float() const { return b_.weight_type == DataType::kFloat32; }
  __device__ __forceinline__ int64_t width() const { return b_.hidden_size; }

  const LinearAdapterBackward& b_;
  const AdapterView& view_;
  const AdapterGradients& gradients_;
  const int64_t column_;
  C norm_weight_ = 0, norm_bias_ = 0;
};

// Where the sums over a range of an adapter's rows wait for the third kernel. Ranges of one adapter
// begin `range` rows apart, as do first ranges of adapters that have several; so only a last and a
// first one can fall in the same slot.
template <class C>
__device__ __forceinline__ C* partial(const BackwardParams& params, const Segment& segment,
                                      int64_t part, int64_t column_block) {
  const int64_t slot = 2 * (params.parts.size.divide(segment.begin) + part) + (part == 0);
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
  constexpr int rows = S::kRows, kThreads = S::kThreads;
  using Tile = RowTile<X, P, S>;
  using Own = Elements<X, S>;
  using T = typename P::Operand;
  using C = typename P::Sum;
  using Gradient = OutputGradient<X, P, S>;
  const LinearAdapterBackward& b = params.problem;
  const ColumnLayout& layout = params.layout;
  const unsigned column_blocks = static_cast<unsigned>(params.column_blocks);
  const int64_t column_block = blockIdx.x % column_blocks;
  const Depth depth{b, params.depth, params.sample_rows};
  const auto range = [&]() -> RowRange<C>& { return *shared_at<RowRange<C>>(layout.range); };
  {
    const Segment found = params.parts.find(b.routing, blockIdx.x / column_blocks);
    if (found.adapter >= b.routing.adapters) return;
    params.adapters.share(found.adapter, layout.rows.adapter);
    if (thread_index() == 0) {
      const int64_t first = found.begin + found.part * params.parts.size.value;
      const int64_t end = first + params.parts.size.value;
      const bool whole = found.end - found.begin <= params.parts.size.value;
      range() = {found, first, end < found.end ? end : found.end,
                 whole ? nullptr : partial<C>(params, found, found.part, column_block)};
    }
    __syncthreads();
  }
  const Segment& segment = range().segment;
  const Adapter& adapter = *shared_at<Adapter>(layout.rows.adapter);
  const Wanted wanted{b, adapter.gradients};
  WeightGradients<X, P> weight_gradients(b, adapter, column_block);
  if (range().first >= segment.end || !depth.keeps_adapter(segment.adapter)) {
    if (segment.part == 0) weight_gradients.clear();
    return;
  }
  const Gradient output_gradient(params, segment);
  const bool pre = b.norm_position == NormPosition::kPre;
  const auto wants_gradient = [&] { return wanted.up() || (!pre && wanted.norm()); };
  const int64_t width = b.hidden_size;
  const auto aligned = [&](const void* matrix) {
    return is_aligned(matrix, width * static_cast<int64_t>(sizeof(X)));
  };
  const VectorSums<X, C, S::kWarps> vector_sums{layout.vector_sums};
  if (!pre) vector_sums.clear();
  // Rows are found while those before them are worked on. `done`: how many those are.
  const auto tile_at = [&](int64_t done) {
    const int64_t chunk = range().first + done, left = range().end - chunk;
    return Tile(b, layout.rows, segment, chunk,
                left < 0      ? 0
                : left < rows ? static_cast<int>(left)
                              : rows,
                adapter.view, static_cast<int>(done / rows & 1));
  };

  for (int64_t block = 0; block * kBlock < adapter.view.bottleneck; ++block) {
    Product<P, LargeTile> down_sum, up_sum;  // M [bottleneck, columns], duᵀz [columns, bottleneck]
    down_sum.clear();
    up_sum.clear();
    C hidden_sum = 0;
    const bool input_gradient = block == 0 && wanted.x();
    const bool wants_x = wanted.down() || (input_gradient && pre);
    __syncthreads();
    tile_at(0).find_rows(depth);
    for (int64_t done = 0; range().first + done < range().end; done += rows) {
      const Tile tile = tile_at(done);
      const int count = tile.count;
      const auto hidden_gradients = [&] {
        return static_cast<const T*>(params.hidden_gradients) + tile.first * params.padded;
      };
      const auto activated = [&] {
        return static_cast<const T*>(params.activated) + tile.first * params.padded;
      };
      __syncthreads();
      const auto copy = [&](T* to, const T* from) {
        constexpr int n = kVector<T>, across = kBlock / n;
#pragma unroll
        for (int i = 0; i < rows * across / kThreads; ++i) {
          const int vector = thread_index() + i * kThreads;
          const int row = vector / across, at = vector % across * n;
          const bool there = row < count && block * kBlock + at < params.padded;
          copy_async(to + row * kBlockPitch<P> + at,
                     there ? from + row * params.padded + block * kBlock + at : from,
                     there ? 16 : 0);
        }
      };
      copy(shared_at<T>(layout.hidden_gradient), hidden_gradients());
      copy(shared_at<T>(layout.rows.activated), activated());
      if (wants_x) {
        bring<Own>(shared_at<X>(layout.x_part), static_cast<const X*>(b.x), tile.row(), count,
                   int64_t{column_block} * kBlock, width, aligned(b.x));
      }
      bring<Own>(shared_at<X>(layout.gradient_part), static_cast<const X*>(b.grad_y), tile.row(),
                 count, int64_t{column_block} * kBlock, width, aligned(b.grad_y));
      copy_async_commit();
      const auto fill_down = [&](int piece) {
        tile.down().template fill<X, P, S, kStep<P>, kBlock>(
            shared_at<T>(layout.down[piece & 1]), kBlockPitch<P>, piece * kStep<P>,
            int64_t{column_block} * kBlock, tile.rounding);
        copy_async_commit();
      };
      if (input_gradient && layout.one_piece && done == 0) fill_down(0);
      if (const int thread = thread_index(); thread < rows) {
        C sums[4] = {};
        if (thread < count) {
          load_aligned(sums, static_cast<const C*>(params.row_sums) + 4 * (tile.first + thread));
        }
        tile.mean()[thread] = sums[0];
        tile.rstd()[thread] = sums[1];
        shared_at<C>(layout.row_mean)[thread] = sums[2];
        shared_at<C>(layout.row_product)[thread] = sums[3];
      }
      tile_at(done + rows).find_rows(depth);
      copy_async_wait<0>();
      __syncthreads();
      if (output_gradient.wants_out() && wants_gradient()) {
        UpProduct<X, P, S> up(tile, activated(), params.padded);
        up.start(column_block, 1);
        Product<P, S> product;
        up.next(product);
        product.template store<Space::kShared>(tile.sums(), kSumPitch<C>);
        __syncthreads();
      }
      // x̂ (or x) and do (or du) as operands. Not unrolled: registers are full of sums.
#pragma unroll 1
      for (int v = 0; v < Own::kCount; ++v) {
        const Own own;
        const int i = own.row(v);
        const int64_t column = int64_t{column_block} * kBlock + own.column();
        if (wanted.down()) {
          C values[kVector<X>];
          load_aligned(values, shared_at<X>(layout.x_part) + own.at(v));
          const bool there = tile.active()[i] && column < width;
          const C mean = pre ? tile.mean()[i] : C(0), rstd = pre ? tile.rstd()[i] : C(1);
#pragma unroll
          for (int e = 0; e < kVector<X>; ++e) {
            values[e] = there ? (values[e] - mean) * rstd : C(0);
          }
          store_operands<P>(shared_at<T>(layout.x) + i * kBlockPitch<P> + own.column(), values,
                            tile.rounding);
        }
        if (!wants_gradient()) continue;
        typename Gradient::template Values<kVector<X>> values;
        output_gradient.get(tile, i, column, shared_at<X>(layout.gradient_part) + own.at(v),
                            tile.sums() + i * kSumPitch<C> + own.column(), values);
        if (!pre) {
          if (block == 0) vector_sums.add(values.d, values.normalized);
          Gradient::through_norm(values, tile.rstd()[i], shared_at<C>(layout.row_mean)[i],
                                 shared_at<C>(layout.row_product)[i]);
          const bool is_active = tile.active()[i];
#pragma unroll
          for (int e = 0; e < kVector<X>; ++e) values.d[e] = is_active ? values.d[e] : C(0);
        }
        store_operands<P>(shared_at<T>(layout.gradient) + i * kBlockPitch<P> + own.column(),
                          values.d, tile.rounding);
      }
      __syncthreads();
      if (wanted.down()) {
        down_sum.template multiply<false, false>(shared_at<T>(layout.hidden_gradient),
                                                 kBlockPitch<P>, shared_at<T>(layout.x),
                                                 kBlockPitch<P>, rows);
        const int thread = thread_index();
        const T* of_column = shared_at<T>(layout.hidden_gradient) + thread % kBlock;
        for (int i = thread / kBlock; i < count; i += kThreads / kBlock) {
          hidden_sum += static_cast<C>(of_column[i * kBlockPitch<P>]);
        }
      }
      if (wanted.up()) {
        const int64_t left = adapter.view.bottleneck - block * kBlock;
        up_sum.template multiply<false, false>(
            shared_at<T>(layout.gradient), kBlockPitch<P>, shared_at<T>(layout.rows.activated),
            kBlockPitch<P>, rows, left < kBlock ? static_cast<int>(left) : kBlock);
      }
      if (!input_gradient) continue;
      // dn = dh down, and dx.
      Product<P, S> product;
      product.clear();
      if (layout.one_piece) {
        product.template multiply<true, false>(shared_at<T>(layout.hidden_gradient), kBlockPitch<P>,
                                               shared_at<T>(layout.down[0]), kBlockPitch<P>,
                                               step_depth<P>(adapter.view.bottleneck, 0));
      } else {
        __syncthreads();  // the pieces have the place of x and du
        const int64_t r = adapter.view.bottleneck;
        const int pieces = static_cast<int>((r + kStep<P> - 1) / kStep<P>);
        fill_down(0);
        for (int piece = 0; piece < pieces; ++piece) {
          T* left = shared_at<T>(layout.rows.left[piece & 1]);
          fill_tile<P, S, rows, kStep<P>>(
              left, kStepPitch<P>, DataType::kFloat64, [&](int i, int at, auto& values) {
                const int64_t j = piece * kStep<P> + at;
                load(values, hidden_gradients() + i * params.padded + j,
                     i < count && j < params.padded ? kVector<T> : 0, true);
              });
          copy_async_wait<0>();
          __syncthreads();
          if (piece + 1 < pieces) fill_down(piece + 1);
          product.template multiply<true, false>(left, kStepPitch<P>,
                                                 shared_at<T>(layout.down[piece & 1]),
                                                 kBlockPitch<P>, step_depth<P>(r, piece));
        }
      }
      __syncthreads();  // the sums may have the place of operands
      product.template store<Space::kShared>(tile.sums(), kSumPitch<C>);
      __syncthreads();
      const Own own;
      const int64_t column = int64_t{column_block} * kBlock + own.column(), left = width - column;
      C weight[kVector<X>] = {}, bias[kVector<X>] = {};
      if (pre && left > 0) tile.load_norm(weight, bias, column);
#pragma unroll 1
      for (int v = 0; v < Own::kCount; ++v) {
        const int i = own.row(v);
        if (i >= count || left <= 0) continue;
        C gradient[kVector<X>], upstream[kVector<X>];
        load_sums(gradient, tile.sums() + i * kSumPitch<C> + own.column());
        load_aligned(upstream, shared_at<X>(layout.gradient_part) + own.at(v));
        if (pre) {
          C values[kVector<X>];
          load_aligned(values, shared_at<X>(layout.x_part) + own.at(v));
          const C mean = tile.mean()[i], rstd = tile.rstd()[i];
          const C row_mean = shared_at<C>(layout.row_mean)[i];
          const C row_product = shared_at<C>(layout.row_product)[i];
#pragma unroll
          for (int e = 0; e < kVector<X>; ++e) {
            const C normalized = (values[e] - mean) * rstd;
            gradient[e] = rstd * (gradient[e] * weight[e] - row_mean - normalized * row_product);
          }
        }
        const bool is_active = tile.active()[i];
#pragma unroll
        for (int e = 0; e < kVector<X>; ++e) {
          if (b.residual) gradient[e] += upstream[e];
          if (!is_active) gradient[e] = upstream[e];
        }
        store(static_cast<X*>(b.grad_x) + tile.row()[i] * width + column, gradient, left,
              aligned(b.grad_x));
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
    if (!range().sums) weight_gradients.norm(shared_at<C>(layout.total));
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
  const int64_t column_block = blockIdx.x % column_blocks;
  const int64_t a = blockIdx.x / column_blocks, range = params.parts.size.value;
  const Segment segment{a, first_position(b.routing, a), first_position(b.routing, a + 1), 0};
  const int64_t length = segment.end - segment.begin;
  if (length <= range || !Depth{b, params.depth, params.sample_rows}.keeps_adapter(a)) return;
  const int64_t ranges = params.parts.size.divide(length + range - 1);
  C* const total = shared_at<C>(0);                     // [64, 64]
  C* const hidden_sum = total + kBlock * kSumPitch<C>;  // [64]
  const Adapter& adapter =
      params.adapters.share(a, (kBlock * kSumPitch<C> + kBlock) * static_cast<int>(sizeof(C)));
  __syncthreads();
  const Wanted wanted{b, adapter.gradients};
  WeightGradients<X, P> weight_gradients(b, adapter, column_block);
  const int thread = thread_index();
  const auto add = [&](int64_t offset) {
    C sum = 0;
    for (int64_t part = 0; part < ranges; ++part) {
      sum += partial<C>(params, segment, part, column_block)[offset];
    }
    return sum;
  };
  const auto add_tile = [&](int64_t offset, int64_t pitch, int64_t tile_rows, int64_t columns) {
    for (int i = thread; i < kBlock * kBlock; i += LargeTile::kThreads) {
      const int row = i / kBlock, column = i % kBlock;
      const bool there = row < tile_rows && column < columns;
      total[row * kSumPitch<C> + column] = there ? add(offset + row * pitch + column) : C(0);
    }
  };
  for (int64_t block = 0; block * kBlock < adapter.view.bottleneck; ++block) {
    const int64_t bottleneck = adapter.view.bottleneck - block * kBlock;
    if (wanted.down()) {
      __syncthreads();
      add_tile(block * kBlock * kBlock, kBlock, bottleneck, kBlock);
      if (thread < kBlock && thread < bottleneck) {
        hidden_sum[thread] = add(2 * params.padded * kBlock + block * kBlock + thread);
      }
      __syncthreads();
      weight_gradients.down(total, hidden_sum, block);
    }
    if (wanted.up()) {
      __syncthreads();
      add_tile(params.padded * kBlock + block * kBlock, params.padded, kBlock, bottleneck);
      __syncthreads();
      weight_gradients.up(total, block);
    }
  }
  if (!wanted.norm()) return;
  __syncthreads();
  if (b.norm_position == NormPosition::kPre) return weight_gradients.norm(total);
  if (thread >= kBlock) return;
  const int64_t sums = params.partial_size() - 2 * kBlock + thread;
  weight_gradients.norm(thread, add(sums), add(sums + kBlock));
}

// Whether some adapter's gradients need the second product again.
inline bool wants_out(const LinearAdapterBackward& b) {
  return b.norm_position == NormPosition::kPost || (b.l2_lambda && b.grad_aux);
}

// False where its buffers have no room.
template <class X, class P, class S>
bool backward_rows(const BackwardCall& call, BackwardParams& params) {
  constexpr int64_t rows = S::kRows;
  using T = typename P::Operand;
  using C = typename P::Sum;
  const LinearAdapterBackward& b = call.problem;
  ColumnLayout& layout = params.layout;
  layout = {};
  SharedRoom room;
  if (wants_out(b)) {
    // Room beside the buffers of the second product.
    const int64_t own =
        rows * (2 * kStepPitch<P> * sizeof(T) + (kBlock + kStep<P>)*sizeof(X) + 2 * sizeof(C)) +
        2 * kStep<P> * kBlockPitch<P> * sizeof(T) + 8 * 128;
    layout.rows = shared_layout<X, P, S>(b, call.limits.shared_memory - own);
    room = SharedRoom(layout.rows.bytes);
  } else {
    take_rows<C>(layout.rows, room, rows);
  }
  layout.row_mean = room.take<C>(rows);
  layout.row_product = room.take<C>(rows);
  for (int i = 0; i < 2; ++i) {
    // Post: a tile of the second product's width.
    params.gradient_part[i] = room.take<X>(rows * (i == 0 ? kBlock : kStep<P>));
    params.gradient[i] = room.take<T>(rows * kStepPitch<P>);
    params.up[i] = room.take<T>(kStep<P> * kBlockPitch<P>);
  }
  if (room.bytes() > call.limits.shared_memory) return false;
  params.parts = Parts::make(b, rows, false);
  launch("linear_adapter_backward: rows", &backward_rows_kernel<X, P, S>, params.parts.blocks,
         S::kThreads, room.bytes(), call.stream, params);
  return true;
}

template <class X, class P>
void Backward<X, P>::run(const BackwardCall& call) {
  using T = typename P::Operand;
  using C = typename P::Sum;
  const LinearAdapterBackward& b = call.problem;
  auto params = call.params<BackwardParams>();
  params.padded = round_up(std::max<int64_t>(b.hidden_stride, 1), 16);
  params.column_blocks = (b.hidden_size + kBlock - 1) / kBlock;
  const int64_t processors = call.limits.multiprocessors, adapters = b.routing.adapters;
  // Ranges that give every multiprocessor some blocks, but are not so short that writing and
  // reading their sums would matter.
  const int64_t wanted = std::max<int64_t>(2 * processors / params.column_blocks, 1);
  const int64_t range = std::max<int64_t>(round_up(b.rows / wanted, 64), 256);
  Carver workspace(call.workspace);
  params.hidden_gradients = workspace.take<T>(b.rows * params.padded);
  params.activated = workspace.take<T>(b.rows * params.padded);
  params.row_sums = workspace.take<C>(4 * b.rows);
  params.vectors = workspace.take<C>(2 * adapters * b.hidden_stride);
  if (b.rows > range) {
    const int64_t slots = 2 * (b.rows / range + 1);
    params.partials = workspace.take<C>(slots * params.column_blocks * params.partial_size());
  }
  if (call.bytes) {
    *call.bytes = workspace.bytes();
    return;
  }
  if (b.norm_position == NormPosition::kPre && adapters > 0 && b.rows > 0) {
    const int64_t groups = (b.hidden_stride + kWarps - 1) / kWarps;
    launch("linear_adapter_backward: vectors", &vectors_kernel<X, C>, adapters * groups, kThreads,
           0, call.stream, params);
  }
  const bool done = large_tiles(b, processors) && backward_rows<X, P, LargestTile<X>>(call, params);
  if (!done) backward_rows<X, P, SmallTile>(call, params);
  if (adapters == 0) return;

  ColumnLayout& layout = params.layout;
  layout = {};
  using S = ColumnTile<X, P>;
  constexpr int64_t rows = S::kRows;
  SharedRoom room;
  take_rows<C>(layout.rows, room, rows, 2);
  layout.row_mean = room.take<C>(rows);
  layout.row_product = room.take<C>(rows);
  layout.range = room.take<RowRange<C>>(1);
  if (b.norm_position == NormPosition::kPost) {
    layout.vector_sums = room.take<C>(VectorSums<X, C, S::kWarps>::kSize);
  }
  layout.x_part = room.take<X>(rows * kBlock);
  layout.gradient_part = room.take<X>(rows * kBlock);
  if (wants_out(b)) layout.rows.sums = room.take<C>(rows * kSumPitch<C>);
  // Operands; afterwards their place holds a tile of sums, and Σ dh of each thread.
  SharedRoom total = room;
  layout.total = total.take<C>(kBlock * kSumPitch<C>);
  layout.hidden_sum = total.take<C>(S::kThreads);
  layout.hidden_gradient = room.take<T>(rows * kBlockPitch<P>);
  layout.rows.activated = room.take<T>(rows * kBlockPitch<P>);
  layout.x = room.take<T>(rows * kBlockPitch<P>);
  layout.gradient = room.take<T>(rows * kBlockPitch<P>);
  // Unless that is wanted before x and du are there, dn has their place when they have been
  // multiplied.
  static_assert(rows * kSumPitch<C> * sizeof(C) <= 2 * rows * kBlockPitch<P> * sizeof(T));
  if (!wants_out(b)) layout.rows.sums = layout.x;
  room = SharedRoom(std::max(room.bytes(), total.bytes()));
  layout.rows.activated_resident = params.padded <= kBlock;
  layout.rows.activated_pitch =
      static_cast<int>(layout.rows.activated_resident ? kBlockPitch<P> : kStepPitch<P>);
  const bool one_piece = layout.one_piece = b.hidden_stride <= kStep<P>;
  // Pieces of left operands, before x and du are there or when they have been multiplied.
  layout.rows.left[0] = layout.x;
  layout.rows.left[1] = layout.gradient;
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
  params.parts = Parts::make(b, range, true);
  launch("linear_adapter_backward: columns", &backward_columns_kernel<X, P>,
         params.parts.blocks * params.column_blocks, S::kThreads, room.bytes(), call.stream,
         params);
  if (b.rows > range) {
    launch("linear_adapter_backward: ranges", &backward_ranges_kernel<X, P>,
           adapters * params.column_blocks, LargeTile::kThreads,
           (kBlock * kSumPitch<C> + kBlock) * sizeof(C) + sizeof(Adapter), call.stream, params);
  }
}

}  // namespace adapter_ext::cuda
