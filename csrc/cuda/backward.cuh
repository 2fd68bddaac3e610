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

// Rows that the second kernel works on at a time: 128 bytes of operands along k.
template <class P>
inline constexpr int kRows = kStep<P>;

// Buffers of the second kernel beside those of a row tile, in bytes.
struct ColumnLayout {
  SharedLayout rows;
  int row_mean, row_product;  // [kRows]: mean(dx̂), mean(dx̂ ⊙ x̂); post: the same of û
  int hidden_gradient;        // [kRows, 64]
  int x, gradient;            // x̂ or x, and do or du: [kRows, 64]
  int down[2];                // [kStep, 64]
  int hidden_sum;             // [64]: Σ dh
  int total;                  // a tile of sums [64, 64], in the place of the operands
  bool one_piece;             // the bottleneck is no longer than a step: its piece of `down` stays
};

struct BackwardParams {
  LinearAdapterBackward problem;
  Parts parts;
  int64_t padded;  // the bottleneck in whole blocks
  int64_t column_blocks;
  void* hidden_gradients;  // dh: operands [rows, padded], by position
  void* activated;         // z: likewise
  void* row_sums;          // [rows, 2], by position: see ColumnLayout
  void* vectors;           // [adapters, 2, hidden_stride]: c1, c0
  void* partials;          // [2 (rows / range + 1), column blocks, partial_size]
  ColumnLayout layout;
  int gradient[2], up[2];  // first kernel: du [rows, kStep] and up [kStep, 64], in bytes
  Adapters adapters;

  // M and duᵀz for all blocks of the bottleneck, v, two rows of column sums.
  ADAPTER_EXT_HOST_DEVICE int64_t partial_size() const {
    return 2 * padded * kBlock + padded + 2 * kBlock;
  }
};
static_assert(sizeof(BackwardParams) <= 4096);

// What one adapter's gradients ask for.
struct Wanted {
  bool x, down, up, norm;

  __device__ __forceinline__ Wanted(const LinearAdapterBackward& b, const AdapterGradients& g)
      : x(b.grad_x != nullptr),
        down(g.down || (b.norm_position == NormPosition::kPre && (g.norm_weight || g.norm_bias))),
        up(g.up != nullptr),
        norm(g.norm_weight || g.norm_bias) {}
};

// do = scale · mask ⊙ (dy + κ d) with d = scale · mask ⊙ o the adapter's contribution and
// κ = 2 λ g / B the gradient of its auxiliary loss.
template <class X, class P, int rows>
class OutputGradient {
  using Tile = RowTile<X, P, rows>;
  using C = typename P::Sum;

 public:
  template <int n>
  struct Values {
    C d[n];           // do
    C normalized[n];  // post: û
    C weight[n];      // post: γ
  };

  __device__ __forceinline__ OutputGradient(const LinearAdapterBackward& b, const Segment& segment,
                                            const Depth& depth)
      : b_(b),
        dropout_(b),
        scale_(static_cast<C>(depth.kept_scale)),
        aligned_(is_aligned(b.grad_y, b.hidden_size * static_cast<int64_t>(sizeof(X)))) {
    if (b.l2_lambda && b.grad_aux) {
      const double samples =
          static_cast<double>((segment.end - segment.begin) / b.routing.rows_per_sample);
      kappa_ = static_cast<C>(
          2.0 * static_cast<double>(static_cast<const C*>(b.l2_lambda)[segment.adapter]) *
          static_cast<double>(static_cast<const C*>(b.grad_aux)[segment.adapter]) / samples);
    }
  }

  // Whether it needs the second product, up z.
  __device__ __forceinline__ bool wants_out() const {
    return b_.norm_position == NormPosition::kPost || kappa_ != C(0);
  }

  // Some columns of a row; `out` are theirs of the second product. Zero where there is nothing.
  template <int n>
  __device__ __forceinline__ void get(const Tile& tile, int i, int64_t column, const C* out,
                                      Values<n>& values) const {
    const int64_t left = tile.active[i] ? tile.width - column : 0;
    if (left <= 0) {
#pragma unroll
      for (int e = 0; e < n; ++e) values.d[e] = values.normalized[e] = values.weight[e] = C(0);
      return;
    }
    load(values.d, static_cast<const X*>(b_.grad_y) + tile.row[i] * tile.width + column, left,
         aligned_);
    C scale[n];
#pragma unroll
    for (int e = 0; e < n; ++e) scale[e] = scale_;
    dropout_.apply(scale, tile.row[i], column);
    if (wants_out()) {
      C o[n];
      load_aligned(o, out);
      if (!tile.pre) {
        C bias[n];
        tile.load_norm(values.weight, bias, column);
#pragma unroll
        for (int e = 0; e < n; ++e) {
          values.normalized[e] = e < left ? (o[e] - tile.mean[i]) * tile.rstd[i] : C(0);
          o[e] = values.normalized[e] * values.weight[e] + bias[e];
        }
      }
#pragma unroll
      for (int e = 0; e < n; ++e) values.d[e] += kappa_ * scale[e] * o[e];
    }
#pragma unroll
    for (int e = 0; e < n; ++e) values.d[e] *= scale[e];
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
  const C scale_;
  const bool aligned_;
  C kappa_ = 0;
};

// Reads mean and rstd of a tile's rows, zero for those that are not there; others may see them
// after a barrier.
template <class X, class P, int rows>
__device__ __forceinline__ void load_statistics(const RowTile<X, P, rows>& tile,
                                                const LinearAdapterBackward& b) {
  using C = typename P::Sum;
  const int i = static_cast<int>(threadIdx.x);
  if (i >= rows) return;
  tile.mean[i] = i < tile.count ? static_cast<const C*>(b.mean)[tile.row[i]] : C(0);
  tile.rstd[i] = i < tile.count ? static_cast<const C*>(b.rstd)[tile.row[i]] : C(0);
}

// c1 = down γ and c0 = down β, a warp for each element.
template <class X, class C>
__global__ __launch_bounds__(kThreads) void vectors_kernel(
    const __grid_constant__ BackwardParams params) {
  const LinearAdapterBackward& b = params.problem;
  const int64_t groups = (b.hidden_stride + kWarps - 1) / kWarps;
  const int64_t a = blockIdx.x / groups;
  const int64_t j = blockIdx.x % groups * kWarps + threadIdx.x / 32;
  const AdapterView view = params.adapters.at(a).view;
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

// First kernel: z and dh of a tile of rows, and the norm's row sums.
template <class X, class P, int rows>
__global__ __launch_bounds__(kThreads) void backward_rows_kernel(
    const __grid_constant__ BackwardParams params) {
  using Tile = RowTile<X, P, rows>;
  using Own = Elements<X, rows>;
  using T = typename P::Operand;
  using C = typename P::Sum;
  using Gradient = OutputGradient<X, P, rows>;
  const LinearAdapterBackward& b = params.problem;
  const SharedLayout& layout = params.layout.rows;
  const Depth depth(b);
  const Segment segment = params.parts.find(b.routing, blockIdx.x);
  const int64_t first = segment.begin + segment.part * rows;
  if (first >= segment.end) return;
  const int count = segment.end - first < rows ? static_cast<int>(segment.end - first) : rows;
  const int64_t width = b.hidden_size;
  if (segment.adapter >= b.routing.adapters || !depth.keeps_adapter(b, segment.adapter)) {
    if (!b.grad_x) return;
    const int64_t bytes = width * static_cast<int64_t>(sizeof(X));
    const bool aligned = is_aligned(b.grad_x, bytes) && is_aligned(b.grad_y, bytes);
    for (int i = static_cast<int>(threadIdx.x) / 32; i < count; i += kWarps) {
      const int64_t at = row_at(b.routing, first + i) * width;
      copy_row(static_cast<X*>(b.grad_x) + at, static_cast<const X*>(b.grad_y) + at, width,
               aligned);
    }
    return;
  }
  const Tile tile(b, layout, segment, first, count, params.adapters.at(segment.adapter).view);
  const int64_t r = tile.view.bottleneck;
  tile.find_rows(depth);
  __syncthreads();
  load_statistics(tile, b);

  // z.
  const C* hidden = static_cast<const C*>(b.hidden);
  const int64_t used = round_up(r, kBlock);
  T* activated = static_cast<T*>(params.activated) + first * params.padded;
  for (int64_t pair = threadIdx.x; pair < rows * used / 2; pair += kThreads) {
    const int i = static_cast<int>(pair / (used / 2));
    const int64_t j = pair % (used / 2) * 2;
    T z[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool there = i < count && j + e < r;
      z[e] = there ? P::round(value_of(b.activation, hidden[tile.row[i] * b.hidden_stride + j + e]),
                              tile.rounding)
                   : static_cast<T>(C(0));
    }
    if (i < count) store_pair(activated + i * params.padded + j, z[0], z[1]);
    if (layout.activated_resident) {
      store_pair(Tile::template at<T>(layout.activated) + i * layout.activated_pitch + j, z[0],
                 z[1]);
    }
  }

  const Gradient output_gradient(b, segment, depth);
  UpProduct<X, P, rows> up(tile, activated, params.padded);
  const C* sums = tile.sums;
  C* row_sums = static_cast<C*>(params.row_sums) + 2 * first;
  C* row_mean = Tile::template at<C>(params.layout.row_mean);
  C* row_product = Tile::template at<C>(params.layout.row_product);
  if (!tile.pre) {
    C mean_sum[Own::kCount] = {}, product_sum[Own::kCount] = {};
    up.start(0, params.column_blocks);
    for (int64_t block = 0; block < params.column_blocks; ++block) {
      Product<P, rows> product;
      up.next(product);
      product.store(tile.sums, kSumPitch<C>);
      __syncthreads();
#pragma unroll
      for (int v = 0; v < Own::kCount; ++v) {
        typename Gradient::template Values<kVector<X>> values;
        output_gradient.get(tile, Own::row(v), block * kBlock + Own::column(),
                            sums + Own::row(v) * kSumPitch<C> + Own::column(), values);
#pragma unroll
        for (int e = 0; e < kVector<X>; ++e) {
          const C d = values.d[e] * values.weight[e];
          mean_sum[v] += d;
          product_sum[v] += d * values.normalized[e];
        }
      }
    }
#pragma unroll
    for (int v = 0; v < Own::kCount; ++v) {
      const C mean = sum_over_lanes<Own::kLanes>(mean_sum[v]) / static_cast<C>(width);
      const C product = sum_over_lanes<Own::kLanes>(product_sum[v]) / static_cast<C>(width);
      const int i = Own::row(v);
      if (Own::column() != 0) continue;
      row_mean[i] = mean;
      row_product[i] = product;
      if (i < count) store_pair(row_sums + 2 * i, mean, product);
    }
  }

  // dh, block by block of the bottleneck; the pre norm's sums over it.
  const bool wants_out = output_gradient.wants_out();
  const WeightMatrix up_matrix = tile.up();
  const WarpTile<rows> warp;
  const C* vectors = static_cast<const C*>(params.vectors) + 2 * segment.adapter * b.hidden_stride;
  T* hidden_gradients = static_cast<T*>(params.hidden_gradients) + first * params.padded;
  C mean_sum[2] = {}, product_sum[2] = {};  // of the warp's rows g and g + 8
  const int64_t steps = (width + kStep<P> - 1) / kStep<P>;
  for (int64_t block = 0; block * kBlock < r; ++block) {
    const int columns = r - block * kBlock < kBlock ? static_cast<int>(r - block * kBlock) : kBlock;
    Product<P, rows> hidden_gradient;
    hidden_gradient.clear();
    if (wants_out) up.start(0, params.column_blocks);
    __syncthreads();
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t column = step * kStep<P>;
      if (wants_out && column % kBlock == 0) {
        Product<P, rows> product;
        up.next(product);
        product.store(tile.sums, kSumPitch<C>);
        __syncthreads();
      }
      T* gradient = Tile::template at<T>(params.gradient[step & 1]);
      T* piece = Tile::template at<T>(params.up[step & 1]);
      up_matrix.template fill<X, P, kStep<P>, kBlock>(piece, kBlockPitch<P>, column, block * kBlock,
                                                      tile.rounding);
      copy_async_commit();
      fill_tile<P, rows, kStep<P>>(
          gradient, kStepPitch<P>, tile.rounding, [&](int i, int at, auto& result) {
            typename Gradient::template Values<kVector<T>> values;
            output_gradient.get(tile, i, column + at,
                                sums + i * kSumPitch<C> + column % kBlock + at, values);
            if (!tile.pre) {
              Gradient::through_norm(values, tile.rstd[i], row_mean[i], row_product[i]);
            }
#pragma unroll
            for (int e = 0; e < kVector<T>; ++e) {
              result[e] = tile.active[i] ? values.d[e] : C(0);
            }
          });
      copy_async_wait<0>();
      __syncthreads();
      hidden_gradient.template multiply<true, false>(gradient, kStepPitch<P>, piece, kBlockPitch<P>,
                                                     kStep<P>, columns);
    }
    hidden_gradient.for_each_pair([&](int i, int column, C first_dz, C second_dz) {
      const int64_t j = block * kBlock + column;
      C dh[2] = {first_dz, second_dz};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (tile.active[i] && j + e < r) {
          const C h = hidden[tile.row[i] * b.hidden_stride + j + e];
          dh[e] *= derivative_of(b.activation, h);
          if (tile.pre) {
            const int half = i - warp.first_row - warp.g == 0 ? 0 : 1;
            mean_sum[half] += dh[e] * vectors[j + e];
            product_sum[half] += dh[e] * (h - vectors[b.hidden_stride + j + e]);
          }
        } else {
          dh[e] = C(0);
        }
      }
      if (i < count) {
        store_pair(hidden_gradients + i * params.padded + j, P::round(dh[0], tile.rounding),
                   P::round(dh[1], tile.rounding));
      }
    });
  }
  if (!tile.pre) return;
  // Over the lanes of a row, then over the warps that share it, in their order.
  constexpr int across = WarpTile<rows>::kAcross;
  C* of_warps = Tile::template at<C>(params.gradient[0]);  // [across, rows, 2]
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const C mean = sum_over_lanes<4>(mean_sum[half]);
    const C product = sum_over_lanes<4>(product_sum[half]);
    if (warp.t != 0) continue;
    const int part = warp.first_column / WarpTile<rows>::kColumns;
    store_pair(of_warps + 2 * (part * rows + warp.first_row + warp.g + 8 * half), mean, product);
  }
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x);
  if (i >= count) return;
  C mean = 0, product = 0;
  for (int part = 0; part < across; ++part) {
    mean += of_warps[2 * (part * rows + i)];
    product += of_warps[2 * (part * rows + i) + 1];
  }
  store_pair(row_sums + 2 * i, mean / static_cast<C>(width), product / static_cast<C>(width));
}

// Writes one adapter's gradients for a block of columns, from sums over all its rows.
template <class X, class P>
class WeightGradients {
  using C = typename P::Sum;
  using Own = Elements<X, kBlock>;

 public:
  __device__ __forceinline__ WeightGradients(const LinearAdapterBackward& b, const Adapter& adapter,
                                             int64_t column_block)
      : b_(b),
        view_(adapter.view),
        gradients_(adapter.gradients),
        column_(column_block * kBlock),
        width_(b.hidden_size),
        is_float_(b.weight_type == DataType::kFloat32),
        pre_(b.norm_position == NormPosition::kPre) {}

  // d_down from M [64, 64] and v [64] of a block of the bottleneck, both in shared memory; adds to
  // the norm's gradients.
  __device__ __forceinline__ void down(const C* sums, const C* hidden_sum, int64_t block) {
    const int64_t first = block * kBlock;
    const bool aligned = is_aligned(gradients_.down, row_bytes(width_));
    const int64_t left = width_ - column_ - Own::column();
    if (gradients_.down && left > 0) {
      C weight[kVector<X>], bias[kVector<X>];
      if (pre_) {
        load_weights<X>(weight, view_.norm_weight, is_float_, column_ + Own::column(), left,
                        is_aligned(view_.norm_weight));
        load_weights<X>(bias, view_.norm_bias, is_float_, column_ + Own::column(), left,
                        is_aligned(view_.norm_bias));
      }
#pragma unroll 1
      for (int v = 0; v < Own::kCount; ++v) {
        const int j = Own::row(v);
        if (first + j >= view_.bottleneck) break;
        C values[kVector<X>];
        load_aligned(values, sums + j * kSumPitch<C> + Own::column());
        if (pre_) {
#pragma unroll
          for (int e = 0; e < kVector<X>; ++e) {
            values[e] = values[e] * weight[e] + hidden_sum[j] * bias[e];
          }
        }
        store_weights(gradients_.down, (first + j) * width_ + column_ + Own::column(), values, left,
                      aligned);
      }
    }
    if (!pre_ || !(gradients_.norm_weight || gradients_.norm_bias)) return;
    const int c = static_cast<int>(threadIdx.x) % kBlock;
    if (column_ + c >= width_) return;
    for (int j = static_cast<int>(threadIdx.x) / kBlock; j < kBlock; j += kThreads / kBlock) {
      if (first + j >= view_.bottleneck) break;
      const int64_t at = (first + j) * view_.down_stride + column_ + c;
      const C weight = load_weight<C, X>(view_.down, is_float_, at);
      norm_weight_ += weight * sums[j * kSumPitch<C> + c];
      norm_bias_ += weight * hidden_sum[j];
    }
  }

  // d_up from duᵀz [64, 64] of a block of the bottleneck, in shared memory.
  __device__ __forceinline__ void up(const C* sums, int64_t block) const {
    if (!gradients_.up) return;
    const int64_t r = view_.bottleneck, j = block * kBlock + Own::column();
    const bool aligned = is_aligned(gradients_.up, row_bytes(r));
    if (j >= r) return;
#pragma unroll 1
    for (int v = 0; v < Own::kCount; ++v) {
      const int c = Own::row(v);
      if (column_ + c >= width_) break;
      C values[kVector<X>];
      load_aligned(values, sums + c * kSumPitch<C> + Own::column());
      store_weights(gradients_.up, (column_ + c) * r + j, values, r - j, aligned);
    }
  }

  // The norm's gradients. `memory` [2, kThreads] is shared memory that nobody uses.
  __device__ __forceinline__ void norm(C* memory) const {
    const int thread = static_cast<int>(threadIdx.x);
    memory[thread] = norm_weight_;
    memory[kThreads + thread] = norm_bias_;
    __syncthreads();
    if (thread < kBlock) {
      norm(thread, memory[thread] + memory[thread + kBlock],
           memory[kThreads + thread] + memory[kThreads + thread + kBlock]);
    }
  }
  __device__ __forceinline__ void norm(int c, C weight, C bias) const {
    if (column_ + c >= width_) return;
    store_weight(gradients_.norm_weight, column_ + c, weight);
    store_weight(gradients_.norm_bias, column_ + c, bias);
  }

  // Of an adapter without rows.
  __device__ __forceinline__ void clear() const {
    const int64_t columns = width_ - column_ < kBlock ? width_ - column_ : kBlock;
    const int64_t r = view_.bottleneck;
    for (int64_t i = threadIdx.x; i < r * columns; i += kThreads) {
      store_weight(gradients_.down, i / columns * width_ + column_ + i % columns, C(0));
      store_weight(gradients_.up, column_ * r + i, C(0));
    }
    if (threadIdx.x < kBlock) norm(static_cast<int>(threadIdx.x), C(0), C(0));
  }

 private:
  __device__ __forceinline__ int64_t row_bytes(int64_t columns) const {
    return columns * (is_float_ ? 4 : static_cast<int64_t>(sizeof(X)));
  }

  __device__ __forceinline__ void store_weight(void* to, int64_t index, C value) const {
    if (!to) return;
    if (is_float_) {
      static_cast<float*>(to)[index] = static_cast<float>(value);
    } else {
      static_cast<X*>(to)[index] = static_cast<X>(value);
    }
  }

  __device__ __forceinline__ void store_weights(void* to, int64_t index,
                                                const C (&values)[kVector<X>], int64_t count,
                                                bool aligned) const {
    if (!is_float_ || std::is_same_v<X, float>) {
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

  const LinearAdapterBackward& b_;
  const AdapterView view_;
  const AdapterGradients gradients_;
  const int64_t column_, width_;
  const bool is_float_, pre_;
  C norm_weight_ = 0, norm_bias_ = 0;
};

// Where the sums over a range of an adapter's rows wait for the third kernel. Ranges of one adapter
// begin `range` rows apart, as do first ranges of adapters that have several; so only a last and a
// first one can fall in the same slot.
template <class C>
__device__ __forceinline__ C* partial(const BackwardParams& params, const Segment& segment,
                                      int64_t part, int64_t column_block) {
  const int64_t slot =
      2 * ((segment.begin + part * params.parts.size) / params.parts.size) + (part == 0);
  return static_cast<C*>(params.partials) +
         (slot * params.column_blocks + column_block) * params.partial_size();
}

// Second kernel: dx, and sums over rows for the weights' gradients, for a block of columns and a
// range of an adapter's rows.
template <class X, class P>
__global__ __launch_bounds__(kThreads) void backward_columns_kernel(
    const __grid_constant__ BackwardParams params) {
  constexpr int rows = kRows<P>;
  using Tile = RowTile<X, P, rows>;
  using Own = Elements<X, rows>;
  using T = typename P::Operand;
  using C = typename P::Sum;
  using Gradient = OutputGradient<X, P, rows>;
  const LinearAdapterBackward& b = params.problem;
  const ColumnLayout& layout = params.layout;
  const int64_t column_block = blockIdx.x % params.column_blocks;
  const Depth depth(b);
  const Segment segment = params.parts.find(b.routing, blockIdx.x / params.column_blocks);
  if (segment.adapter >= b.routing.adapters) return;
  const Adapter adapter = params.adapters.at(segment.adapter);
  const Wanted wanted(b, adapter.gradients);
  WeightGradients<X, P> weight_gradients(b, adapter, column_block);
  const int64_t range = params.parts.size;
  const int64_t first = segment.begin + segment.part * range;
  const int64_t end = first + range < segment.end ? first + range : segment.end;
  if (first >= end || !depth.keeps_adapter(b, segment.adapter)) {
    if (segment.part == 0) weight_gradients.clear();
    return;
  }
  const bool whole = segment.end - segment.begin <= range;
  const Gradient output_gradient(b, segment, depth);
  const bool wants_out = output_gradient.wants_out();
  const bool pre = b.norm_position == NormPosition::kPre;
  const bool wants_gradient = wanted.up || (!pre && wanted.norm);
  const int64_t r = adapter.view.bottleneck, width = b.hidden_size;
  const int64_t blocks = (r + kBlock - 1) / kBlock;
  const int pieces = static_cast<int>((r + kStep<P> - 1) / kStep<P>);
  const int64_t x_bytes = width * static_cast<int64_t>(sizeof(X));
  const bool x_aligned = is_aligned(b.x, x_bytes);
  const bool gradient_aligned = is_aligned(b.grad_y, x_bytes) && is_aligned(b.grad_x, x_bytes);
  const int64_t column = column_block * kBlock + Own::column();
  const int thread = static_cast<int>(threadIdx.x);

  T* const hidden_tile = Tile::template at<T>(layout.hidden_gradient);
  T* const activated_tile = Tile::template at<T>(layout.rows.activated);
  T* const x_tile = Tile::template at<T>(layout.x);
  T* const gradient_tile = Tile::template at<T>(layout.gradient);
  C* const row_mean = Tile::template at<C>(layout.row_mean);
  C* const row_product = Tile::template at<C>(layout.row_product);
  C* const total = Tile::template at<C>(layout.total);
  C* const hidden_sum_memory = Tile::template at<C>(layout.hidden_sum);
  C weight_sum[kVector<X>] = {}, bias_sum[kVector<X>] = {};  // post: Σ do ⊙ û and Σ do

  for (int64_t block = 0; block < blocks; ++block) {
    const int bottleneck =
        r - block * kBlock < kBlock ? static_cast<int>(r - block * kBlock) : kBlock;
    Product<P, kBlock> down_sum, up_sum;  // M [bottleneck, columns], duᵀz [columns, bottleneck]
    down_sum.clear();
    up_sum.clear();
    C hidden_sum = 0;
    for (int64_t chunk = first; chunk < end; chunk += rows) {
      const int count = end - chunk < rows ? static_cast<int>(end - chunk) : rows;
      const Tile tile(b, layout.rows, segment, chunk, count, adapter.view);
      const T* hidden_gradients =
          static_cast<const T*>(params.hidden_gradients) + chunk * params.padded;
      const T* activated = static_cast<const T*>(params.activated) + chunk * params.padded;
      __syncthreads();
      tile.find_rows(depth);
      // A row is the work of one thread here, so that it can read what it just wrote.
      load_statistics(tile, b);
      if (thread < rows) {
        const C* of_row = static_cast<const C*>(params.row_sums) + 2 * (chunk + thread);
        row_mean[thread] = thread < count ? of_row[0] : C(0);
        row_product[thread] = thread < count ? of_row[1] : C(0);
      }
      const auto copy = [&](T* to, const T* from) {
        constexpr int n = kVector<T>, across = kBlock / n;
#pragma unroll
        for (int i = 0; i < rows * across / kThreads; ++i) {
          const int vector = thread + i * kThreads;
          const int row = vector / across, at = vector % across * n;
          copy_async(to + row * kBlockPitch<P> + at,
                     row < count ? from + row * params.padded + block * kBlock + at : from,
                     row < count ? 16 : 0);
        }
      };
      copy(hidden_tile, hidden_gradients);
      copy(activated_tile, activated);
      copy_async_commit();
      const bool first_chunk = chunk == first;
      const bool input_gradient = block == 0 && wanted.x;
      const WeightMatrix down = tile.down();
      const auto fill_down = [&](int piece) {
        down.template fill<X, P, kStep<P>, kBlock>(Tile::template at<T>(layout.down[piece & 1]),
                                                   kBlockPitch<P>, piece * kStep<P>,
                                                   column_block * kBlock, tile.rounding);
        copy_async_commit();
      };
      if (input_gradient && layout.one_piece && first_chunk) fill_down(0);
      __syncthreads();
      if (wants_out && wants_gradient) {
        UpProduct<X, P, rows> up(tile, activated, params.padded);
        up.start(column_block, 1);
        Product<P, rows> product;
        up.next(product);
        product.store(tile.sums, kSumPitch<C>);
        __syncthreads();
      }
      // x̂ (or x) and do (or du) as operands. Not unrolled: registers are full of sums.
#pragma unroll 1
      for (int v = 0; v < Own::kCount; ++v) {
        const int i = Own::row(v);
        if (wanted.down) {
          C values[kVector<X>];
          const int64_t left = tile.active[i] ? width - column : 0;
          load(values, static_cast<const X*>(b.x) + tile.row[i] * width + column, left, x_aligned);
          if (pre) {
#pragma unroll
            for (int e = 0; e < kVector<X>; ++e) {
              values[e] = left > 0 ? (values[e] - tile.mean[i]) * tile.rstd[i] : C(0);
            }
          }
          store_operands<P>(x_tile + i * kBlockPitch<P> + Own::column(), values, tile.rounding);
        }
        if (wants_gradient) {
          typename Gradient::template Values<kVector<X>> values;
          output_gradient.get(tile, i, column, tile.sums + i * kSumPitch<C> + Own::column(),
                              values);
          if (!pre) {
            if (block == 0) {
#pragma unroll
              for (int e = 0; e < kVector<X>; ++e) {
                weight_sum[e] += values.d[e] * values.normalized[e];
                bias_sum[e] += values.d[e];
              }
            }
            Gradient::through_norm(values, tile.rstd[i], row_mean[i], row_product[i]);
#pragma unroll
            for (int e = 0; e < kVector<X>; ++e) {
              if (!tile.active[i]) values.d[e] = C(0);
            }
          }
          store_operands<P>(gradient_tile + i * kBlockPitch<P> + Own::column(), values.d,
                            tile.rounding);
        }
      }
      copy_async_wait<0>();
      __syncthreads();
      if (wanted.down) {
        down_sum.template multiply<false, false>(hidden_tile, kBlockPitch<P>, x_tile,
                                                 kBlockPitch<P>, rows);
        if (thread < bottleneck) {
          for (int i = 0; i < count; ++i) {
            hidden_sum += static_cast<C>(hidden_tile[i * kBlockPitch<P> + thread]);
          }
        }
      }
      if (wanted.up) {
        up_sum.template multiply<false, false>(gradient_tile, kBlockPitch<P>, activated_tile,
                                               kBlockPitch<P>, rows, bottleneck);
      }
      if (!input_gradient) continue;
      // dn = dh down, and dx.
      Product<P, rows> product;
      product.clear();
      if (layout.one_piece) {
        product.template multiply<true, false>(hidden_tile, kBlockPitch<P>,
                                               Tile::template at<T>(layout.down[0]), kBlockPitch<P>,
                                               step_depth<P>(r, 0));
      } else {
        fill_down(0);
        for (int piece = 0; piece < pieces; ++piece) {
          T* left = Tile::template at<T>(layout.rows.left[piece & 1]);
          fill_tile<P, rows, kStep<P>>(
              left, kStepPitch<P>, DataType::kFloat64, [&](int i, int at, auto& values) {
                load(values, hidden_gradients + i * params.padded + piece * kStep<P> + at,
                     i < count ? kVector<T> : 0, true);
              });
          copy_async_wait<0>();
          __syncthreads();
          if (piece + 1 < pieces) fill_down(piece + 1);
          product.template multiply<true, false>(left, kStepPitch<P>,
                                                 Tile::template at<T>(layout.down[piece & 1]),
                                                 kBlockPitch<P>, step_depth<P>(r, piece));
        }
      }
      product.store(tile.sums, kSumPitch<C>);
      __syncthreads();
      const int64_t left = width - column;
      C weight[kVector<X>], bias[kVector<X>];
      if (pre && left > 0) tile.load_norm(weight, bias, column);
#pragma unroll 1
      for (int v = 0; v < Own::kCount; ++v) {
        const int i = Own::row(v);
        if (i >= count || left <= 0) continue;
        const int64_t at = tile.row[i] * width + column;
        C gradient[kVector<X>], values[kVector<X>], upstream[kVector<X>];
        load_aligned(gradient, tile.sums + i * kSumPitch<C> + Own::column());
        load(upstream, static_cast<const X*>(b.grad_y) + at, left, gradient_aligned);
        if (pre) load(values, static_cast<const X*>(b.x) + at, left, x_aligned);
#pragma unroll
        for (int e = 0; e < kVector<X>; ++e) {
          if (pre) {
            const C normalized = (values[e] - tile.mean[i]) * tile.rstd[i];
            gradient[e] = tile.rstd[i] *
                          (gradient[e] * weight[e] - row_mean[i] - normalized * row_product[i]);
          }
          if (b.residual) gradient[e] += upstream[e];
          if (!tile.active[i]) gradient[e] = upstream[e];
        }
        store(static_cast<X*>(b.grad_x) + at, gradient, left, gradient_aligned);
      }
    }
    // This block of the bottleneck is summed over the range.
    C* to = whole ? nullptr : partial<C>(params, segment, segment.part, column_block);
    if (wanted.down) {
      if (whole) {
        __syncthreads();
        down_sum.store(total, kSumPitch<C>);
        if (thread < kBlock) hidden_sum_memory[thread] = hidden_sum;
        __syncthreads();
        weight_gradients.down(total, hidden_sum_memory, block);
      } else {
        down_sum.store(to + block * kBlock * kBlock, kBlock);
        if (thread < kBlock) {
          to[2 * params.padded * kBlock + block * kBlock + thread] = hidden_sum;
        }
      }
    }
    if (wanted.up) {
      if (whole) {
        __syncthreads();
        up_sum.store(total, kSumPitch<C>);
        __syncthreads();
        weight_gradients.up(total, block);
      } else {
        up_sum.store(to + (params.padded + block * kBlock) * kBlock, kBlock);
      }
    }
  }
  if (!wanted.norm) return;
  __syncthreads();
  if (pre) {
    if (whole) weight_gradients.norm(total);
    return;
  }
  // Over the threads that share columns, in their order.
  constexpr int sharing = kThreads / Own::kLanes;
#pragma unroll
  for (int e = 0; e < kVector<X>; ++e) {
    total[thread / Own::kLanes * kBlock + Own::column() + e] = weight_sum[e];
    total[(sharing + thread / Own::kLanes) * kBlock + Own::column() + e] = bias_sum[e];
  }
  __syncthreads();
  if (thread >= kBlock) return;
  C weight = 0, bias = 0;
  for (int other = 0; other < sharing; ++other) {
    weight += total[other * kBlock + thread];
    bias += total[(sharing + other) * kBlock + thread];
  }
  if (whole) return weight_gradients.norm(thread, weight, bias);
  C* to =
      partial<C>(params, segment, segment.part, column_block) + params.partial_size() - 2 * kBlock;
  to[thread] = weight;
  to[kBlock + thread] = bias;
}

// Third kernel: the gradients of adapters with several ranges.
template <class X, class P>
__global__ __launch_bounds__(kThreads) void backward_ranges_kernel(
    const __grid_constant__ BackwardParams params) {
  using C = typename P::Sum;
  const LinearAdapterBackward& b = params.problem;
  const int64_t column_block = blockIdx.x % params.column_blocks;
  const int64_t a = blockIdx.x / params.column_blocks, range = params.parts.size;
  const Segment segment{a, first_position(b.routing, a), first_position(b.routing, a + 1), 0};
  const int64_t length = segment.end - segment.begin;
  if (length <= range || !Depth(b).keeps_adapter(b, a)) return;
  const int64_t ranges = (length + range - 1) / range;
  const Adapter adapter = params.adapters.at(a);
  const Wanted wanted(b, adapter.gradients);
  WeightGradients<X, P> weight_gradients(b, adapter, column_block);
  const int thread = static_cast<int>(threadIdx.x);
  C* const total = reinterpret_cast<C*>(shared_memory());  // [64, 64]
  C* const hidden_sum = total + kBlock * kSumPitch<C>;     // [64]
  const auto add = [&](int64_t offset) {
    C sum = 0;
    for (int64_t part = 0; part < ranges; ++part) {
      sum += partial<C>(params, segment, part, column_block)[offset];
    }
    return sum;
  };
  const auto add_tile = [&](int64_t offset) {
    for (int i = thread; i < kBlock * kBlock; i += kThreads) {
      total[i / kBlock * kSumPitch<C> + i % kBlock] = add(offset + i);
    }
  };
  for (int64_t block = 0; block * kBlock < adapter.view.bottleneck; ++block) {
    if (wanted.down) {
      __syncthreads();
      add_tile(block * kBlock * kBlock);
      if (thread < kBlock) {
        hidden_sum[thread] = add(2 * params.padded * kBlock + block * kBlock + thread);
      }
      __syncthreads();
      weight_gradients.down(total, hidden_sum, block);
    }
    if (wanted.up) {
      __syncthreads();
      add_tile((params.padded + block * kBlock) * kBlock);
      __syncthreads();
      weight_gradients.up(total, block);
    }
  }
  if (!wanted.norm) return;
  __syncthreads();
  if (b.norm_position == NormPosition::kPre) return weight_gradients.norm(total);
  if (thread >= kBlock) return;
  const int64_t sums = params.partial_size() - 2 * kBlock + thread;
  weight_gradients.norm(thread, add(sums), add(sums + kBlock));
}

template <class X, class P, int rows>
void backward_rows(const BackwardCall& call, BackwardParams& params) {
  using T = typename P::Operand;
  using C = typename P::Sum;
  const LinearAdapterBackward& b = call.problem;
  ColumnLayout& layout = params.layout;
  layout = {};
  // Room beside the buffers of the second product.
  const int64_t gradient = round_up(rows * kStepPitch<P> * static_cast<int64_t>(sizeof(T)), 128);
  const int64_t up = round_up(kStep<P> * kBlockPitch<P> * static_cast<int64_t>(sizeof(T)), 128);
  const int64_t row_sums = round_up(rows * static_cast<int64_t>(sizeof(C)), 128);
  const int64_t own = 2 * (gradient + up + row_sums);
  layout.rows = shared_layout<X, P, rows>(b, call.limits.shared_memory - own, false);
  int bytes = layout.rows.bytes;
  const auto take = [&](int64_t size) {
    bytes += static_cast<int>(size);
    return bytes - static_cast<int>(size);
  };
  layout.row_mean = take(row_sums);
  layout.row_product = take(row_sums);
  for (int i = 0; i < 2; ++i) params.gradient[i] = take(gradient);
  for (int i = 0; i < 2; ++i) params.up[i] = take(up);
  params.parts = Parts::make(b, rows, false);
  launch("linear_adapter_backward: rows", &backward_rows_kernel<X, P, rows>,
         grid("linear_adapter_backward", params.parts.blocks), kThreads, bytes, call.stream,
         params);
}

template <class X, class P>
void Backward<X, P>::run(const BackwardCall& call) {
  using T = typename P::Operand;
  using C = typename P::Sum;
  const LinearAdapterBackward& b = call.problem;
  BackwardParams params{};
  params.problem = b;
  params.adapters = call.adapters;
  params.padded = round_up(std::max<int64_t>(b.hidden_stride, 1), kBlock);
  params.column_blocks = (b.hidden_size + kBlock - 1) / kBlock;
  const int64_t processors = call.limits.multiprocessors, adapters = b.routing.adapters;
  // Ranges that give every multiprocessor some blocks, but are not so short that writing and
  // reading their sums would matter.
  const int64_t wanted = std::max<int64_t>(4 * processors / params.column_blocks, 1);
  const int64_t range = std::max<int64_t>(round_up(b.rows / wanted, 64), 256);
  Carver workspace(call.workspace);
  params.hidden_gradients = workspace.take<T>(b.rows * params.padded);
  params.activated = workspace.take<T>(b.rows * params.padded);
  params.row_sums = workspace.take<C>(2 * b.rows);
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
    launch("linear_adapter_backward: vectors", &vectors_kernel<X, C>,
           grid("linear_adapter_backward", adapters * groups), kThreads, 0, call.stream, params);
  }
  if (large_tiles<X>(b, processors)) {
    if constexpr (sizeof(X) < 8) backward_rows<X, P, 64>(call, params);
  } else {
    backward_rows<X, P, 16>(call, params);
  }
  if (adapters == 0) return;

  ColumnLayout& layout = params.layout;
  layout = {};
  constexpr int64_t rows = kRows<P>, size = sizeof(T);
  int64_t bytes = 0;
  const auto take = [&](int64_t elements, int64_t element_size) {
    const int64_t at = bytes;
    bytes = round_up(bytes + elements * element_size, 128);
    return static_cast<int>(at);
  };
  layout.rows.row = take(rows, 8);
  layout.rows.mean = take(rows, sizeof(C));
  layout.rows.rstd = take(rows, sizeof(C));
  layout.rows.active = take(rows, 4);
  layout.row_mean = take(rows, sizeof(C));
  layout.row_product = take(rows, sizeof(C));
  layout.hidden_sum = take(kBlock, sizeof(C));
  layout.rows.sums = take(rows * kSumPitch<C>, sizeof(C));
  // Operands; afterwards their place holds a tile of sums.
  layout.total = layout.hidden_gradient = take(rows * kBlockPitch<P>, size);
  layout.rows.activated = take(rows * kBlockPitch<P>, size);
  layout.rows.activated_pitch = static_cast<int>(kBlockPitch<P>);
  layout.x = take(rows * kBlockPitch<P>, size);
  layout.gradient = take(rows * kBlockPitch<P>, size);
  bytes = std::max<int64_t>(bytes, layout.total + kBlock * kSumPitch<C> * sizeof(C));
  layout.rows.activated_resident = params.padded == kBlock;
  const bool one_piece = layout.one_piece = b.hidden_stride <= kStep<P>;
  const bool wants_out = b.norm_position == NormPosition::kPost || (b.l2_lambda && b.grad_aux);
  if (!one_piece || !layout.rows.activated_resident) {
    for (int i = 0; i < 2; ++i) layout.rows.left[i] = take(rows * kStepPitch<P>, size);
    if (!layout.rows.activated_resident) layout.rows.activated_pitch = kStepPitch<P>;
  }
  // The two second operands are never in use together, but one that stays for all rows.
  if (one_piece) layout.down[0] = take(kStep<P> * kBlockPitch<P>, size);
  for (int i = 0; i < 2 && (wants_out || !one_piece); ++i) {
    layout.rows.weights[i] =
        take(std::max<int64_t>(kBlock * kStepPitch<P>, kStep<P> * kBlockPitch<P>), size);
    if (!one_piece) layout.down[i] = layout.rows.weights[i];
  }
  params.parts = Parts::make(b, range, true);
  launch("linear_adapter_backward: columns", &backward_columns_kernel<X, P>,
         grid("linear_adapter_backward", params.parts.blocks * params.column_blocks), kThreads,
         static_cast<int>(bytes), call.stream, params);
  if (b.rows > range) {
    launch("linear_adapter_backward: ranges", &backward_ranges_kernel<X, P>,
           grid("linear_adapter_backward", adapters * params.column_blocks), kThreads,
           static_cast<int>((kBlock * kSumPitch<C> + kBlock) * sizeof(C)), call.stream, params);
  }
}

}  // namespace adapter_ext::cuda
