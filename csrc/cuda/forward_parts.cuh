// The forward of tiles of 16-bit elements, where rows and weights have nothing but whole vectors:
// operands of the first product are made in registers, and those of the second are read once.
//
// The parts of the columns (ColumnOrder) are worked on at the same time, a block of 64 columns of
// each in a round: its columns of x where they are not in shared memory, and its weights, which are
// on their way during the round before. A warp of the first product has 16 rows and one part; it
// makes LN(x) in registers from what it reads of x. A warp of the second product has 32 rows and
// half a block of a part, or in tiles of 16 rows all of a block; it reads its operands, act(h),
// once.
//
// Which rows and columns a lane has of mma's tiles is free, as long as the operands are read
// accordingly. In the second product a lane has 8 neighbouring columns, 16 bytes of x and y, and
// rows that are four apart where lanes read at the same time, so that they meet in no bank.
#pragma once

#include "cuda/forward_tile.cuh"

namespace adapter_ext::cuda {

template <class X, class P, class S>
inline constexpr bool kByParts =
    std::is_same_v<P, TensorCore<X>> && (S::kRows == 64 || S::kRows == 16) &&
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

  // Starts bringing resident columns of x: of each row by the warp that makes its statistics, in
  // groups, so that these begin when the first group is there. Rows that are not there are read
  // too, as zeros.
  __device__ __forceinline__ void bring_rows() const {
    const Warp warp;
    const SharedLayout& layout = tile_.layout;
    const int first = warp.index * kRowsOfWarp;
    const X* from[kRowsOfWarp];
#pragma unroll
    for (int k = 0; k < kRowsOfWarp; ++k) {
      from[k] = static_cast<const X*>(tile_.f.x) + tile_.row()[first + k] * tile_.width +
                tile_.resident_from();
    }
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      const int end = min(first_step(group + 1) * kStepColumns, layout.x_columns);
#pragma unroll 1
      for (int c = first_step(group) * kStepColumns + warp.lane * kVector<X>; c < end;
           c += kStepColumns) {
#pragma unroll
        for (int k = 0; k < kRowsOfWarp; ++k) {
          copy_async(shared_at<X>(layout.x) + (first + k) * layout.x_pitch + c, from[k] + c,
                     first + k < tile_.count ? 16 : 0);
        }
      }
      copy_async_commit();
    }
  }

  // Whether rows and the weights of all adapters have nothing but whole vectors of 16 bytes.
  static bool takes(const LinearAdapterForward& f) {
    constexpr int64_t size = sizeof(X);
    if (f.weight_type != f.data_type || f.hidden_size % kBlock || !is_aligned(f.x) ||
        !is_aligned(f.y)) {
      return false;
    }
    const auto takes_one = [](const AdapterView& view) {
      return view.bottleneck <= kBlock && view.bottleneck % kVector<X> == 0 &&
             is_aligned(view.norm_weight) && is_aligned(view.norm_bias) &&
             is_aligned(view.down, view.down_stride * size) &&
             is_aligned(view.up, view.up_stride * size);
    };
    const AdapterTable& table = f.adapters;
    if (!table.list) {
      return takes_one(table.first) &&
             is_aligned(nullptr, table.norm_weight_step | table.norm_bias_step | table.down_step |
                                     table.up_step);
    }
    for (int64_t a = 0; a < f.routing.adapters; ++a) {
      if (!takes_one(table.list[a])) return false;
    }
    return true;
  }

  // The row statistics, the first product, and what keep_hidden does with it.
  __device__ __forceinline__ void down() const {
    const Warp warp;
    const int lane = warp.lane, t = lane % 4, part = warp.index / kDown;
    const int first_row = warp.index % kDown * 16;
    const int bottleneck = static_cast<int>(tile_.view.bottleneck);
    const int begin = order_.first_column[part], end = order_.first_column[part + 1];
    const Vector own(warp);
    const X* weights_from = static_cast<const X*>(tile_.view.down) + end + own.column +
                            own.row * tile_.view.down_stride;
    const auto bring = [&](int round) {
      const int column = end - (round + 1) * kBlock;
      weights_from -= kBlock;
      if (column >= begin) {
        const int64_t stride = tile_.view.down_stride;  // from shared memory: sums need registers
        T* const to = weights(round, part) + own.at;
#pragma unroll
        for (int i = 0; i < kBlock; i += kBroughtRows) {
          const bool there = own.row + i < bottleneck;
          copy_async(to + i * kPitch, there ? weights_from + i * stride : tile_.view.down,
                     there ? 16 : 0);
        }
        bring_x(own, round, part, column);
      }
      copy_async_commit();
    };
    tile_.bring_norm(0, tile_.width);
    bring(0);  // one more group, behind those of the rows
    tile_.template normalize<true>([&](int step) {
      if (step >= first_step(3)) {
        copy_async_wait<1>();
      } else if (step >= first_step(2)) {
        copy_async_wait<2>();
      } else if (step >= first_step(1)) {
        copy_async_wait<3>();
      } else {
        copy_async_wait<4>();
      }
    });
    __syncthreads();
    float row_mean[2], row_rstd[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 8 * half + lane / 4;
      const bool there = row < tile_.count;
      row_mean[half] = there ? tile_.mean()[row] : 0.0f;
      row_rstd[half] = there ? tile_.rstd()[row] : 0.0f;
    }
    const int right_at = (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
    int chunk_begin = (order_.first_chunk[part + 1] - 1) * order_.chunk;
    float sums[8][4] = {}, total[8][4] = {};
    const auto multiply = [&]<bool whole>(const X* from, const T* right_from, const X* norm) {
#pragma unroll
      for (int k = 0; k < kBlock; k += 16) {
        uint32_t operands[4];
        load_matrices<false>(operands, from + k);
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          float weight[2], bias[2];
          load_pair(weight, norm + k + 8 * eight);
          load_pair(bias, norm + tile_.layout.norm_columns + k + 8 * eight);
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
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          if (!whole && 8 * i >= bottleneck) break;
          uint32_t pair[4];
          load_matrices<false>(pair, right_from + 8 * i * kPitch + k);
          const uint32_t right[2][2] = {{pair[0], pair[1]}, {pair[2], pair[3]}};
          multiply_add(sums[i], operands, right[0], T{});
          multiply_add(sums[i + 1], operands, right[1], T{});
        }
      }
    };
    for (int round = 0; round < rounds_; ++round) {
      copy_async_wait<0>();
      __syncthreads();
      if (round + 1 < rounds_) bring(round + 1);
      const int column = end - (round + 1) * kBlock;
      if (column < begin) continue;
      const Columns x = x_at(round, part, column);
      const X* const from = x.data + (first_row + lane % 16) * x.pitch + lane / 16 * 8;
      const T* const right_from = weights(round, part) + right_at;
      const X* const norm = shared_at<X>(tile_.layout.norm) + column + 2 * t;
      if (bottleneck == kBlock) {
        multiply.template operator()<true>(from, right_from, norm);
      } else {
        multiply.template operator()<false>(from, right_from, norm);
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
    keep(part, first_row, total);
  }

  // y = x + d, d = scale · mask ⊙ o.
  __device__ __forceinline__ void finish() const {
    const ForwardParams& params = tile_.params;
    if (tile_.f.residual && params.dropout.threshold == 0 && params.depth.threshold == 0) {
      finish_as<true>();
    } else {
      finish_as<false>();
    }
  }

 private:
  static constexpr int kDown = S::kRows / 16;     // warps of a part
  static constexpr int kBroughtRows = 4 * kDown;  // of a block, that they bring at a time
  struct Warp {
    int thread = thread_index(), index = thread / 32, lane = thread % 32;
  };
  struct Vector {  // of a block [64, 64]: the first that this thread brings
    int row, column, at;
    __device__ __forceinline__ explicit Vector(const Warp& warp) {
      static_assert(kBlock / kVector<X> == 8);
      row = warp.index % kDown * 4 + warp.lane / 8;
      column = warp.lane % 8 * kVector<X>;
      at = row * kPitch + column;
    }
  };
  // How rows are brought: steps of a warp's vectors, in groups.
  static constexpr int kRowsOfWarp = 4, kGroups = 4, kStepColumns = 32 * kVector<X>;
  static_assert(kRowsOfWarp * S::kWarps == S::kRows);  // as normalize() has them
  __device__ __forceinline__ int first_step(int group) const {
    return (tile_.layout.x_columns + kStepColumns - 1) / kStepColumns * group / kGroups;
  }
  struct Columns {  // of x, from the first row on
    const X* data;
    int pitch;
  };

  // What a warp has in the second product, in tiles of 16 rows and of 32 columns.
  static constexpr int kDownTiles = S::kRows == 64 ? 2 : 1, kAcrossTiles = 2 / kDownTiles;
  template <class Function>
  static __device__ __forceinline__ void for_each_tile(Function&& function) {
#pragma unroll
    for (int down = 0; down < kDownTiles; ++down) {
#pragma unroll
      for (int across = 0; across < kAcrossTiles; ++across) function(down, across);
    }
  }

  // `plain`: d is o, and there is a residual.
  template <bool plain>
  __device__ __forceinline__ void finish_as() const {
    const ForwardParams& params = tile_.params;
    const LinearAdapterForward& f = tile_.f;
    const Dropout dropout(f, params.dropout);
    const Warp warp;
    const int lane = warp.lane, t = lane % 4, part = warp.index / kDown;
    const int first_row = kDownTiles > 1 ? warp.index % 2 * 32 : 0;
    const int first_column = kDownTiles > 1 ? warp.index / 2 % 2 * 32 : 0;
    const int own_row = first_row + row_of(lane / 4), own_column = first_column + 8 * t;
    const int begin = order_.first_column[part], end = order_.first_column[part + 1];
    const int depth = step_depth<P>(tile_.view.bottleneck, 0);
    const Vector own(warp);
    const int64_t stride = tile_.view.up_stride;
    const bool brings = own.column < tile_.view.bottleneck;
    const X* weights_from =
        static_cast<const X*>(tile_.view.up) + (begin + own.row) * stride + own.column;
    const int to_at = place_of(own.row) * kPitch + own.column;
    const auto bring = [&](int round) {
      const int column = begin + round * kBlock;
      if (column < end) {
        T* const to = weights(round, part) + to_at;
#pragma unroll
        for (int i = 0; i < kBlock; i += kBroughtRows) {
          copy_async(to + place_of(i) * kPitch, brings ? weights_from + i * stride : tile_.view.up,
                     brings ? 16 : 0);
        }
        if (plain || f.residual) bring_x(own, round, part, column);
      }
      weights_from += kBlock * stride;
      copy_async_commit();
    };
    bring(0);
    uint32_t left[kDownTiles][kSteps][4];
    const T* const left_from =
        shared_at<T>(tile_.layout.activated) +
        (first_row + lane / 8 % 2 * 8 + row_of(lane % 8)) * tile_.layout.activated_pitch +
        lane / 16 * 8;
    X* to[kDownTiles][2];
    bool there[kDownTiles][2];
#pragma unroll
    for (int m = 0; m < kDownTiles; ++m) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        load_matrices<false>(left[m][k],
                             left_from + 16 * m * tile_.layout.activated_pitch + 16 * k);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = own_row + 16 * m + 8 * half;
        there[m][half] = i < tile_.count;
        to[m][half] = static_cast<X*>(f.y) + tile_.row()[i] * tile_.width + begin + own_column;
      }
    }
    const int right_at = (first_column + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
    float sums[kDownTiles][kAcrossTiles][4][4];
    const auto multiply = [&]<bool whole>(const T* right_from) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (!whole && 16 * k >= depth) break;
#pragma unroll
        for (int across = 0; across < kAcrossTiles; ++across) {
#pragma unroll
          for (int i = 0; i < 4; i += 2) {
            uint32_t pair[4];
            load_matrices<false>(pair, right_from + (32 * across + 8 * i) * kPitch + 16 * k);
            const uint32_t right[2][2] = {{pair[0], pair[1]}, {pair[2], pair[3]}};
#pragma unroll
            for (int m = 0; m < kDownTiles; ++m) {
              multiply_add(sums[m][across][i], left[m][k], right[0], T{});
              multiply_add(sums[m][across][i + 1], left[m][k], right[1], T{});
            }
          }
        }
      }
    };
    for (int round = 0; round < rounds_; ++round) {
      copy_async_wait<0>();
      __syncthreads();
      if (round + 1 < rounds_) bring(round + 1);
      const int column = begin + round * kBlock;
      if (column >= end) continue;
      const Columns x = x_at(round, part, column);
      const X* const from = x.data + own_row * x.pitch + own_column;
      for_each_tile([&](int m, int across) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[m][across][i][e] = 0.0f;
        }
      });
      if (depth == kBlock) {
        multiply.template operator()<true>(weights(round, part) + right_at);
      } else {
        multiply.template operator()<false>(weights(round, part) + right_at);
      }
      const auto x_bits_at = [&](int m, int across, int half) {
        return *reinterpret_cast<const uint4*>(from + (16 * m + 8 * half) * x.pitch + 32 * across);
      };
      uint4 x_bits[kDownTiles][kAcrossTiles][2];
      if constexpr (plain) {
        for_each_tile([&](int m, int across) {
#pragma unroll
          for (int half = 0; half < 2; ++half) x_bits[m][across][half] = x_bits_at(m, across, half);
        });
      }
      for_each_tile([&](int m, int across) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float d[8];
#pragma unroll
          for (int e = 0; e < 8; ++e) d[e] = sums[m][across][e / 2][2 * half + e % 2];
          if constexpr (plain) {
            add_bits(d, x_bits[m][across][half]);
          } else if (there[m][half]) {
            const int i = own_row + 16 * m + 8 * half;
            dropout.apply(d, tile_.row()[i], column + own_column + 32 * across);
            const float scale = static_cast<float>(params.depth.kept_scale);
            const bool active = tile_.active()[i];
#pragma unroll
            for (int e = 0; e < 8; ++e) d[e] = active ? d[e] * scale : 0.0f;
            if (f.residual) add_bits(d, x_bits_at(m, across, half));
          }
          if (there[m][half]) {
            store_aligned<Space::kGlobal>(to[m][half] + round * kBlock + 32 * across, d);
          }
        }
      });
    }
  }

  // Adds eight elements of x.
  static __device__ __forceinline__ void add_bits(float (&to)[8], const uint4& bits) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      float pair[2];
      unpack<X>(pair[0], pair[1], words[e / 2]);
      to[e] += pair[0];
      to[e + 1] += pair[1];
    }
  }

  static __device__ __forceinline__ int rounds_of(const ColumnOrder& order) {
    int columns = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      columns = max(columns, order.first_column[part + 1] - order.first_column[part]);
    }
    return columns / kBlock;
  }
  // Where a row of `up` lies in its buffer, so that a lane's columns of y are neighbours: of 32
  // rows, 8 u + 2 i + e is in tile i, 2 u + e. That of a sum is the sum of those of a multiple of
  // kBroughtRows and of what is less.
  static __device__ __forceinline__ int place_of(int row) {
    return row / 32 * 32 + row % 32 / 8 * 2 + row % 8 / 2 * 8 + row % 2;
  }
  // Which of 8 rows of a tile lanes 4 g to 4 g + 3 have, in the second product.
  static __device__ __forceinline__ int row_of(int g) { return g / 2 + g % 2 * 4; }

  // The buffers of a round.
  __device__ __forceinline__ T* weights(int round, int part) const {
    return shared_at<T>(tile_.layout.weights[0] + ((round & 1) * kParts + part) * kWeightBytes<P>);
  }
  __device__ __forceinline__ X* stage(int round, int part) const {
    return shared_at<X>(tile_.layout.x_stage[round & 1] +
                        part * S::kRows * kStagePitch<X, P> * static_cast<int>(sizeof(X)));
  }
  // A block of columns of x.
  __device__ __forceinline__ Columns x_at(int round, int part, int column) const {
    const int resident = column - tile_.resident_from();
    if (resident < 0) return {stage(round, part), kPitch};
    return {shared_at<X>(tile_.layout.x) + resident, tile_.layout.x_pitch};
  }
  __device__ __forceinline__ void bring_x(const Vector& own, int round, int part,
                                          int column) const {
    if (column >= tile_.resident_from()) return;
    X* const to = stage(round, part) + own.at;
    const X* const x = static_cast<const X*>(tile_.f.x) + column + own.column;
#pragma unroll
    for (int i = 0; i < S::kRows; i += kBroughtRows) {
      copy_async(to + i * kPitch, x + tile_.row()[own.row + i] * tile_.width,
                 own.row + i < tile_.count ? 16 : 0);
    }
  }

  // Adds the parts, and keeps h.
  __device__ __forceinline__ void keep(int part, int first_row, const float (&total)[8][4]) const {
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
      tile_.keep_hidden(i, j, h, true);
    }
    __syncthreads();  // the buffers are free, and act(h) is there
  }

  const Tile& tile_;
  const ColumnOrder& order_;
  const int rounds_;
};

}  // namespace adapter_ext::cuda
