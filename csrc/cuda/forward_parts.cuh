// Both products of a forward for large tiles of 16-bit elements, with rows of whole blocks of
// columns (RowTile::whole): no operand is made in shared memory.
//
// The parts of the columns (ColumnOrder) are worked on at the same time, a block of 64 columns of
// each in a round: its columns of x where they are not in shared memory, and its weights, which are
// on their way during the round before. A warp of the first product has 16 rows and one part; it
// makes LN(x) in registers from what it reads of x. A warp of the second product has 32 rows and
// half a block of a part; it reads its operands, act(h), once.
//
// Which rows and columns a lane has of mma's tiles is free, as long as the operands are read
// accordingly. In the second product a lane has 8 neighbouring columns, 16 bytes of x and y, and
// rows that are four apart where lanes read at the same time, so that they meet in no bank.
#pragma once

#include "cuda/forward_tile.cuh"

namespace adapter_ext::cuda {

template <class X, class P, class S>
inline constexpr bool kByParts = std::is_same_v<P, TensorCore<X>> && S::kRows == kBlock &&
                                 S::kWarps == S::kRows / 16 * ColumnOrder::kParts;

template <class X, class P, class S>
class PartProducts {
  using Tile = ForwardTile<X, P, S>;
  using T = typename P::Operand;
  static constexpr int kParts = ColumnOrder::kParts, kPitch = kStepPitch<P>;
  static constexpr int kSteps = kBlock / 16;  // of mma along a block
  static_assert(kStep<P> == kBlock && kPartTiles == 2 * kParts);

 public:
  __device__ __forceinline__ explicit PartProducts(const Tile& tile)
      : tile_(tile), order_(tile.params.order), rounds_(rounds_of(tile.params.order)) {}

  // Starts bringing what the first round of the first product reads, for a block of the bottleneck.
  __device__ __forceinline__ void start_down(int block) const { bring_down(block, 0); }

  // The first product for one block of the bottleneck, whose first round was started, and what
  // keep_hidden does with it.
  __device__ __forceinline__ void down(int block) const {
    const Warp warp;
    const int lane = warp.lane, t = lane % 4, part = warp.index / kDown;
    const int first_row = warp.index % kDown * 16, last_row = tile_.count - 1;
    const int left = static_cast<int>(tile_.view.bottleneck) - block * kBlock;
    const int begin = order_.first_column[part], end = order_.first_column[part + 1];
    float row_mean[2], row_rstd[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // rows that are not there repeat the last one
      const int row = min(first_row + 8 * half + lane / 4, last_row);
      row_mean[half] = tile_.pre ? tile_.mean()[row] : 0.0f;
      row_rstd[half] = tile_.pre ? tile_.rstd()[row] : 0.0f;
    }
    const int x_row = min(first_row + lane % 16, last_row);
    const int right_at = (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
    int chunk_begin = (order_.first_chunk[part + 1] - 1) * order_.chunk;
    float sums[8][4] = {}, total[8][4] = {};
    for (int round = 0; round < rounds_; ++round) {
      copy_async_wait<0>();
      __syncthreads();
      if (round + 1 < rounds_) bring_down(block, round + 1);
      const int column = end - (round + 1) * kBlock;
      if (column < begin) continue;
      const X* const from = x_at(round, part, x_row, column) + lane / 16 * 8;
      const T* const right_from = weights(round, part) + right_at;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t operands[4];
        load_matrices<false>(operands, from + 16 * k);
        if (tile_.pre) {
#pragma unroll
          for (int eight = 0; eight < 2; ++eight) {
            float weight[2], bias[2];
            norm_at(weight, bias, column + 16 * k + 8 * eight + 2 * t);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              uint32_t& pair = operands[2 * eight + half];
              float values[2];
              unpack<X>(values[0], values[1], pair);
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                values[e] = (values[e] - row_mean[half]) * row_rstd[half] * weight[e] + bias[e];
              }
              pair = pair_bits<T>(values[0], values[1]);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          if (8 * i >= left) break;
          uint32_t pair[4];
          load_matrices<false>(pair, right_from + 8 * i * kPitch + 16 * k);
          const uint32_t right[2][2] = {{pair[0], pair[1]}, {pair[2], pair[3]}};
          multiply_add(sums[i], operands, right[0], T{});
          multiply_add(sums[i + 1], operands, right[1], T{});
        }
      }
      if (column == chunk_begin) {
        chunk_begin -= order_.chunk;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            total[i][e] += sums[i][e];
            sums[i][e] = 0.0f;
          }
        }
      }
    }
    keep(block, part, first_row, total);
  }

  // Whether finish() makes y.
  __device__ __forceinline__ bool finishes() const {
    return tile_.pre && !tile_.params.penalties && tile_.view.bottleneck <= kBlock;
  }
  // y = x + d, d = scale · mask ⊙ o.
  __device__ __forceinline__ void finish() const {
    const ForwardParams& params = tile_.params;
    const LinearAdapterForward& f = tile_.f;
    const Dropout dropout(f, params.dropout);
    const float scale = static_cast<float>(params.depth.kept_scale);
    const Warp warp;
    const int lane = warp.lane, g = lane / 4, t = lane % 4, part = warp.index / kDown;
    const int first_row = warp.index % 2 * 32, first_column = warp.index / 2 % 2 * 32;
    const int begin = order_.first_column[part], end = order_.first_column[part + 1];
    const int depth = step_depth<P>(tile_.view.bottleneck, 0);
    bring_up(0);
    uint32_t left[2][kSteps][4];
    const T* const left_from =
        shared_at<T>(tile_.layout.activated) +
        (first_row + lane / 8 % 2 * 8 + row_of(lane % 8)) * tile_.layout.activated_pitch +
        lane / 16 * 8;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (16 * k >= depth) break;
        load_matrices<false>(left[m][k],
                             left_from + 16 * m * tile_.layout.activated_pitch + 16 * k);
      }
    }
    const int right_at = (first_column + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
    for (int round = 0; round < rounds_; ++round) {
      copy_async_wait<0>();
      __syncthreads();
      if (round + 1 < rounds_) bring_up(round + 1);
      const int column = begin + round * kBlock;
      if (column >= end) continue;
      float sums[2][4][4] = {};
      const T* const right_from = weights(round, part) + right_at;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (16 * k >= depth) break;
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          uint32_t pair[4];
          load_matrices<false>(pair, right_from + 8 * i * kPitch + 16 * k);
          const uint32_t right[2][2] = {{pair[0], pair[1]}, {pair[2], pair[3]}};
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            multiply_add(sums[m][i], left[m][k], right[0], T{});
            multiply_add(sums[m][i + 1], left[m][k], right[1], T{});
          }
        }
      }
      const int at = first_column + 8 * t;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = first_row + 16 * m + 8 * half + row_of(g);
          if (i >= tile_.count) continue;
          const int64_t row = tile_.row()[i];
          float d[8];
#pragma unroll
          for (int e = 0; e < 8; ++e) d[e] = sums[m][e / 2][2 * half + e % 2];
          dropout.apply(d, row, column + at);
          if (params.depth.threshold > 0) {
            const bool active = tile_.active()[i];
#pragma unroll
            for (int e = 0; e < 8; ++e) d[e] = active ? d[e] * scale : 0.0f;
          }
          if (f.residual) {
            float from[8];
            load_aligned(from, x_at(round, part, i, column) + at);
#pragma unroll
            for (int e = 0; e < 8; ++e) d[e] += from[e];
          }
          store_aligned<Space::kGlobal>(static_cast<X*>(f.y) + row * tile_.width + column + at, d);
        }
      }
    }
  }

 private:
  static constexpr int kDown = S::kRows / 16;  // warps beside each other in the first product
  struct Warp {
    int thread = thread_index(), index = thread / 32, lane = thread % 32;
  };

  static __device__ __forceinline__ int rounds_of(const ColumnOrder& order) {
    int columns = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      columns = max(columns, order.first_column[part + 1] - order.first_column[part]);
    }
    return columns / kBlock;
  }
  // Which of 8 rows of a tile lanes 4 g to 4 g + 3 have, in the second product.
  static __device__ __forceinline__ int row_of(int g) { return g / 2 + g % 2 * 4; }

  // The buffers of a round.
  __device__ __forceinline__ T* weights(int round, int part) const {
    return shared_at<T>(tile_.layout.weights[0] + ((round & 1) * kParts + part) * kWeightBytes<P>);
  }
  __device__ __forceinline__ X* stage(int round, int part) const {
    return shared_at<X>(tile_.layout.x_stage[round & 1] + part * kWeightBytes<P>);
  }
  // Where a row of x has a block of columns.
  __device__ __forceinline__ const X* x_at(int round, int part, int row, int column) const {
    const int resident = column - tile_.resident_from();
    return resident >= 0 ? shared_at<X>(tile_.layout.x) + row * tile_.layout.x_pitch + resident
                         : stage(round, part) + row * kPitch;
  }
  __device__ __forceinline__ void norm_at(float (&weight)[2], float (&bias)[2], int column) const {
    const X* from = shared_at<X>(tile_.layout.norm) + column;
    load_pair(weight, from);
    load_pair(bias, from + tile_.layout.norm_columns);
  }

  // Starts copies of a round to its buffers. The warps of a part bring what it needs, 16 rows of a
  // block at a time.
  __device__ __forceinline__ void bring_down(int block, int round) const {
    const Vector own;
    const int column = order_.first_column[own.part + 1] - (round + 1) * kBlock;
    if (column >= order_.first_column[own.part]) {
      const AdapterView& view = tile_.view;
      const int rows = static_cast<int>(view.bottleneck) - block * kBlock;
      const X* const from = static_cast<const X*>(view.down) + column + own.column +
                            (block * kBlock + own.row) * view.down_stride;
      T* const to = weights(round, own.part) + own.row * kPitch + own.column;
#pragma unroll
      for (int i = 0; i < kBlock; i += kRowsAtATime) {
        const bool there = own.row + i < rows;
        copy_async(to + i * kPitch, there ? from + i * view.down_stride : view.down,
                   there ? 16 : 0);
      }
      bring_x(own, round, column);
    }
    copy_async_commit();
  }
  __device__ __forceinline__ void bring_up(int round) const {
    const Vector own;
    const int column = order_.first_column[own.part] + round * kBlock;
    if (column < order_.first_column[own.part + 1]) {
      const AdapterView& view = tile_.view;
      const int left = static_cast<int>(view.bottleneck) - own.column;
      const int bytes = left <= 0 ? 0 : min(left, kVector<X>) * static_cast<int>(sizeof(X));
      const X* const from = static_cast<const X*>(view.up) + (bytes ? own.column : 0) +
                            (column + own.row) * view.up_stride;
      // Rows are stored so that a lane's columns are neighbours: of 32 of them, 8 u + 2 i + e is in
      // tile i, 2 u + e.
      T* const to = weights(round, own.part) + own.column +
                    (own.row / 8 * 2 + own.row % 8 / 2 * 8 + own.row % 2) * kPitch;
#pragma unroll
      for (int i = 0; i < kBlock; i += kRowsAtATime) {
        copy_async(to + (i / 32 * 32 + i % 32 / 8 * 2) * kPitch, from + i * view.up_stride, bytes);
      }
      if (tile_.f.residual) bring_x(own, round, column);
    }
    copy_async_commit();
  }
  static constexpr int kRowsAtATime =
      16;          // rows of a block that the warps of a part bring at a time
  struct Vector {  // of a block [64, 64], this thread's first
    int thread = thread_index(), part = thread / (32 * kDown), index = thread % (32 * kDown);
    int row = index / (kBlock / kVector<X>);
    int column = index % (kBlock / kVector<X>)*kVector<X>;
    static_assert(32 * kDown == kRowsAtATime * kBlock / kVector<X>);
  };
  __device__ __forceinline__ void bring_x(const Vector& own, int round, int column) const {
    if (column >= tile_.resident_from()) return;
    X* const to = stage(round, own.part) + own.row * kPitch + own.column;
    const X* const x = static_cast<const X*>(tile_.f.x) + column + own.column;
#pragma unroll
    for (int i = 0; i < kBlock; i += kRowsAtATime) {
      if (own.row + i >= tile_.count) break;
      copy_async(to + i * kPitch, x + tile_.row()[own.row + i] * tile_.width, 16);
    }
  }

  // Adds the parts, and keeps h.
  __device__ __forceinline__ void keep(int block, int part, int first_row,
                                       const float (&total)[8][4]) const {
    const int lane = Warp().lane;
    constexpr int pitch = kSumPitch<float>, of_part = S::kRows * pitch, n = kVector<float>;
    static_assert(kParts * of_part * sizeof(float) <= kPartTiles * kWeightBytes<P>);
    float* const of_parts = shared_at<float>(tile_.layout.weights[0]);
    __syncthreads();  // they have the place of the rounds' buffers
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store_pair<Space::kShared>(of_parts + part * of_part +
                                       (first_row + 8 * half + lane / 4) * pitch + 8 * i +
                                       lane % 4 * 2,
                                   total[i][2 * half], total[i][2 * half + 1]);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int vector = static_cast<int>(threadIdx.x); vector < S::kRows * kBlock / n;
         vector += S::kThreads) {
      const int i = vector / (kBlock / n), j = vector % (kBlock / n) * n;
      float h[n] = {};
#pragma unroll
      for (int of = kParts - 1; of >= 0; --of) {
        float some[n];
        load_aligned(some, of_parts + of * of_part + i * pitch + j);
#pragma unroll
        for (int e = 0; e < n; ++e) h[e] += some[e];
      }
      tile_.keep_hidden(i, block * kBlock + j, h, true);
    }
    __syncthreads();  // the buffers are free, and act(h) is there
  }

  const Tile& tile_;
  const ColumnOrder& order_;
  const int rounds_;
};

}  // namespace adapter_ext::cuda
