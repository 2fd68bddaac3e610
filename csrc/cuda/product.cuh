// Products of tiles in shared memory by one block: sum [rows, 64] += a [rows, k] b [k, 64].
//
// Tensor cores leave the sums in the layout of mma.m16n8: a warp has 16 rows and some tiles of 8
// columns; of a tile, lane 4 g + t has columns 2 t and 2 t + 1 of row g in elements 0 and 1, of row
// g + 8 in elements 2 and 3. Multiply-adds leave them in the same, or for more sums a lane in two
// such tiles below each other, but by other lanes: see WarpTile. An element's sum is taken in the
// order of k, whatever the tile it falls in.
#pragma once

#include "cuda/types.cuh"

namespace adapter_ext::cuda {

// How operands are made and multiplied. `Operand` is their type in shared memory.
template <class T>
struct TensorCore {  // of 16-bit operands
  using Operand = T;
  using Sum = float;
  static __device__ __forceinline__ T round(float value, DataType) { return static_cast<T>(value); }
};
struct Tf32 {  // rounded when fragments are read, so that tiles can be copied as they are
  using Operand = float;
  using Sum = float;
  static __device__ __forceinline__ float round(float value, DataType) { return value; }
};
template <class C>
struct MultiplyAdd {
  using Operand = C;
  using Sum = C;
  static __device__ __forceinline__ C round(C value, DataType type) {
    if (type == DataType::kBFloat16) {
      return static_cast<C>(static_cast<float>(__nv_bfloat16(static_cast<float>(value))));
    }
    if (type == DataType::kFloat16) {
      return static_cast<C>(static_cast<float>(__half(static_cast<float>(value))));
    }
    return value;
  }
};

// Elements of k in 128 bytes, which is how wide tiles are along k.
template <class P>
inline constexpr int kStep = 128 / static_cast<int>(sizeof(typename P::Operand));

// Elements from a row of a tile to the next. Those of the first kind are read along rows by
// fragments of eight rows, those of the second along columns; both without bank conflicts.
template <class P>
inline constexpr int kStepPitch = kStep<P> + 16 / static_cast<int>(sizeof(typename P::Operand));
template <class P>
inline constexpr int kBlockPitch =
    kBlock + (sizeof(typename P::Operand) == 4 ? 8 : 16 / sizeof(typename P::Operand));

// Which part of [rows, 64] this warp has.
//
// Multiply-adds take as long to read operands from shared memory as to multiply them, so a lane has
// as many rows as columns where there are enough sums for that. Of 16 bytes a lane, shared memory
// gives a warp half as much at a time unless lanes i and i ^ 1, or all i and i ^ 2, read the same:
// the former do of left operands, which depend on g, the latter of right ones, which depend on t.
template <class P, class S>
struct WarpTile {
  static constexpr bool kMultipliesAndAdds = std::is_same_v<P, MultiplyAdd<typename P::Sum>>;
  static constexpr int kRowTiles =
      kMultipliesAndAdds && S::kRows >= 32 && S::kRows / 16 * 4 / S::kWarps >= 2 ? 2 : 1;
  static constexpr int kDown = S::kRows / 16 / kRowTiles, kAcross = S::kWarps / kDown;
  static constexpr int kColumns = kBlock / kAcross, kColumnTiles = kColumns / 8;
  static_assert(kDown * kRowTiles * 16 == S::kRows && kDown * kAcross == S::kWarps);
  static_assert(kColumnTiles > 0);

  // Of many threads each has few sums, and registers for what is made of its index.
  int thread = S::kThreads > LargeTile::kThreads ? static_cast<int>(threadIdx.x) : thread_index();
  int warp = thread / 32, lane = thread % 32;
  int first_row = warp % kDown * 16 * kRowTiles, first_column = warp / kDown * kColumns;
  int g = kMultipliesAndAdds ? (lane >> 1 & 1) | (lane >> 2 & 6) : lane / 4;
  int t = kMultipliesAndAdds ? (lane & 1) | (lane >> 1 & 2) : lane % 4;
  static constexpr int kDistance = kMultipliesAndAdds ? 4 : 2;  // to the lane whose t differs by 2
};

// Turns the sums of a tile of 8 columns into elements of x's type, and has them written:
// change(half, column, two neighbours) may change them; write(half, column, words) gets whole words
// that lie next to each other in their row. `half`: of the lane's rows g and g + 8, which one.
template <class X, class C, class Change, class Write>
__device__ __forceinline__ void write_tile(const C (&sum)[4], int column, int t, Change&& change,
                                           Write&& write) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    C values[2] = {sum[2 * half], sum[2 * half + 1]};
    change(half, column + 2 * t, values);
    const X elements[2] = {static_cast<X>(values[0]), static_cast<X>(values[1])};
    uint32_t words[sizeof(X) / 2];
    memcpy(words, elements, sizeof(elements));
    write(half, column + 2 * t, words);
  }
}
// The same of two tiles side by side, and elements of 16 bits. Four lanes have two neighbours each
// in the same row of both tiles, half a sector of memory; they exchange them for four neighbours
// each, which together are a sector. `distance`: from a lane to the one whose t differs by 2.
template <class X, int distance = 2, class C, class Change, class Write>
__device__ __forceinline__ void write_tiles(const C (&first)[4], const C (&second)[4], int column,
                                            int t, Change&& change, Write&& write) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    C values[2] = {first[2 * half], first[2 * half + 1]};
    C others[2] = {second[2 * half], second[2 * half + 1]};
    change(half, column + 2 * t, values);
    change(half, column + 8 + 2 * t, others);
    const bool second_tile = t & 2, second_half = t & 1;
    const uint32_t pair[2] = {pair_bits<X>(values[0], values[1]),
                              pair_bits<X>(others[0], others[1])};
    const uint32_t own = second_tile ? pair[1] : pair[0];
    const uint32_t theirs = __shfl_xor_sync(0xffffffffu, second_tile ? pair[0] : pair[1], distance);
    const bool keeps_own = second_tile == second_half;
    const uint32_t kept = keeps_own ? own : theirs;
    const uint32_t received = __shfl_xor_sync(0xffffffffu, keeps_own ? theirs : own, 1);
    const uint32_t words[2] = {second_half ? received : kept, second_half ? kept : received};
    write(half, column + 8 * second_tile + 4 * second_half, words);
  }
}

// `adjacent`: a lane's rows follow each other, for operands that are stored along the rows; else
// they are 8 apart.
template <class P, class S, bool adjacent = false>
struct Product {
  using T = typename P::Operand;
  using C = typename P::Sum;
  using Warp = WarpTile<P, S>;
  static constexpr int kRowTiles = Warp::kRowTiles, kColumnTiles = Warp::kColumnTiles;
  static constexpr int kTiles = kRowTiles * kColumnTiles;
  static_assert(!adjacent || Warp::kMultipliesAndAdds);

  C sum[kTiles][4];  // of each row tile, its column tiles

  // Of the lane's rows, the one at a place.
  static __device__ __forceinline__ int row_of(const Warp& warp, int place) {
    return warp.first_row + (adjacent ? 2 * kRowTiles * warp.g + place : warp.g + 8 * place);
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[i][e] = C(0);
    }
  }

  __device__ __forceinline__ void add(const Product& other) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[i][e] += other.sum[i][e];
    }
  }

  // `a` is stored [rows, k] (a_along_k) or [k, rows], `b` [64, k] (b_along_k) or [k, 64]; `depth`,
  // a multiple of 16, is the extent of k. Sums of columns from `columns` on are left as they are.
  template <bool a_along_k, bool b_along_k>
  __device__ __forceinline__ void multiply(const T* a, int a_pitch, const T* b, int b_pitch,
                                           int depth, int columns = kBlock) {
    // All of it is the common case, and needs no checks.
    if (depth == kStep<P> && columns >= kBlock) {
      multiply<a_along_k, b_along_k, kStep<P>>(a, a_pitch, b, b_pitch, kStep<P>, kBlock);
    } else {
      multiply<a_along_k, b_along_k, 0>(a, a_pitch, b, b_pitch, depth, columns);
    }
  }

 private:
  // `whole`: the extent of k where it and the columns are known to be whole, or 0.
  template <bool a_along_k, bool b_along_k, int whole>
  __device__ __forceinline__ void multiply(const T* a, int a_pitch, const T* b, int b_pitch,
                                           int depth, int columns) {
    const Warp warp;
    const auto skips = [&](int tile) {
      return whole == 0 && warp.first_column + 8 * tile >= columns;
    };
    if constexpr (std::is_same_v<P, Tf32>) {
#pragma unroll 2
      for (int k = 0; k < depth; k += 8) {
        uint32_t fragment[4];
        read_tf32<a_along_k>(fragment, warp, a, a_pitch, warp.first_row, k);
#pragma unroll
        for (int i = 0; i < kTiles; i += 2) {
          static_assert(kTiles % 2 == 0);
          const int column = warp.first_column + 8 * i;
          if (skips(i)) break;
          uint32_t pair[4];
          read_tf32<b_along_k>(pair, warp, b, b_pitch, column, k);
          const uint32_t first[2] = {pair[0], pair[2]}, second[2] = {pair[1], pair[3]};
          multiply_add_tf32(sum[i], fragment, first);
          multiply_add_tf32(sum[i + 1], fragment, second);
        }
      }
    } else if constexpr (std::is_same_v<P, MultiplyAdd<C>>) {
      constexpr int n = kVector<C>, rows = 2 * kRowTiles;
      // Two steps where there are registers for the operands of both.
      [[maybe_unused]] constexpr int together =
          whole > 0 && S::kThreads > LargeTile::kThreads ? 2 : 1;
#pragma unroll(together)
      for (int k = 0; k < depth; k += n) {
        C left[rows][n];
        if constexpr (adjacent && !a_along_k) {
#pragma unroll
          for (int step = 0; step < n; ++step) {
            C of_step[rows];
            load_aligned(of_step, a + (k + step) * a_pitch + row_of(warp, 0));
#pragma unroll
            for (int i = 0; i < rows; ++i) left[i][step] = of_step[i];
          }
        } else {
#pragma unroll
          for (int i = 0; i < rows; ++i) {
            const int row = row_of(warp, i);
            if constexpr (a_along_k) {
              load_aligned(left[i], a + row * a_pitch + k);
            } else {
#pragma unroll
              for (int step = 0; step < n; ++step) left[i][step] = a[(k + step) * a_pitch + row];
            }
          }
        }
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
          if (skips(tile)) break;
          const int column = warp.first_column + 8 * tile + 2 * warp.t;
          C right[n][2];
          if constexpr (b_along_k) {
            C of_columns[2][n];
            load_aligned(of_columns[0], b + column * b_pitch + k);
            load_aligned(of_columns[1], b + (column + 1) * b_pitch + k);
#pragma unroll
            for (int step = 0; step < n; ++step) {
              right[step][0] = of_columns[0][step];
              right[step][1] = of_columns[1][step];
            }
          } else {
#pragma unroll
            for (int step = 0; step < n; ++step) {
              load_aligned(right[step], b + (k + step) * b_pitch + column);
            }
          }
#pragma unroll
          for (int step = 0; step < n; ++step) {
#pragma unroll
            for (int i = 0; i < 2 * rows; ++i) {
              sum[i / 4 * kColumnTiles + tile][i % 4] += left[i / 2][step] * right[step][i % 2];
            }
          }
        }
      }
    } else {
      // A lane's row of the four 8 x 8 matrices that load_matrices reads.
      const int matrix = warp.lane / 8, line = warp.lane % 8;
      const int a_k = a_along_k ? 1 : a_pitch, b_k = b_along_k ? 1 : b_pitch;
      const T* const a_from =
          a_along_k ? a + (warp.first_row + matrix % 2 * 8 + line) * a_pitch + matrix / 2 * 8
                    : a + (matrix / 2 * 8 + line) * a_pitch + warp.first_row + matrix % 2 * 8;
      const T* const b_from =
          b_along_k ? b + (warp.first_column + matrix / 2 * 8 + line) * b_pitch + matrix % 2 * 8
                    : b + (matrix % 2 * 8 + line) * b_pitch + warp.first_column + matrix / 2 * 8;
      const auto step = [&](int k) {
        uint32_t fragment[4];
        load_matrices<!a_along_k>(fragment, a_from + k * a_k);
#pragma unroll
        for (int i = 0; i < kTiles; i += 2) {
          static_assert(kTiles % 2 == 0);
          if (skips(i)) break;
          uint32_t pair[4];
          load_matrices<!b_along_k>(pair, b_from + 8 * i * (b_along_k ? b_pitch : 1) + k * b_k);
          const uint32_t first[2] = {pair[0], pair[1]}, second[2] = {pair[2], pair[3]};
          multiply_add(sum[i], fragment, first, T{});
          multiply_add(sum[i + 1], fragment, second, T{});
        }
      };
      if constexpr (whole > 0) {
#pragma unroll
        for (int k = 0; k < whole; k += 16) step(k);
      } else {
        for (int k = 0; k < depth; k += 16) step(k);
      }
    }
  }

 public:
  // The part [16, 8 of k] of a tile, as mma's left fragment has it; its even and its odd elements
  // are two right fragments. Where tiles are stored along k, a row of the matrices that
  // load_matrices reads is four floats.
  template <bool along_k>
  static __device__ __forceinline__ void read_tf32(uint32_t (&to)[4], const Warp& warp,
                                                   const float* tile, int pitch, int index, int k) {
    if constexpr (along_k) {
      const int matrix = warp.lane / 8, line = warp.lane % 8;
      load_matrices<false>(to, tile + (index + matrix % 2 * 8 + line) * pitch + k + matrix / 2 * 4);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        to[e] =
            __float_as_uint(tile[(k + e / 2 * 4 + warp.t) * pitch + index + e % 2 * 8 + warp.g]);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = __float_as_uint(round_tf32(__uint_as_float(to[e])));
  }

  // Calls function(row, column, two sums in neighbouring columns).
  template <class Function>
  __device__ __forceinline__ void for_each_pair(Function&& function) {
    const Warp warp;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        function(row_of(warp, i / kColumnTiles * 2 + half),
                 warp.first_column + i % kColumnTiles * 8 + 2 * warp.t, sum[i][2 * half],
                 sum[i][2 * half + 1]);
      }
    }
  }

  // Turns the sums into elements of x's type, and has them written: see write_tile.
  template <class X, class Change, class Write>
  __device__ __forceinline__ void write_rows(Change&& change, Write&& write) {
    static_assert(kRowTiles == 1);
    const Warp warp;
#pragma unroll
    for (int i = 0; i < kTiles; i += sizeof(X) == 2 ? 2 : 1) {
      const int column = warp.first_column + 8 * i;
      if constexpr (sizeof(X) == 2) {
        static_assert(kTiles % 2 == 0);
        write_tiles<X, Warp::kDistance>(sum[i], sum[i + 1], column, warp.t, change, write);
      } else {
        write_tile<X>(sum[i], column, warp.t, change, write);
      }
    }
  }

  // Writes the sums to a tile.
  template <Space space>
  __device__ __forceinline__ void store(C* tile, int pitch) {
    for_each_pair([&](int row, int column, C first, C second) {
      store_pair<space>(tile + row * pitch + column, first, second);
    });
  }
};

// Elements from a row of a tile of sums to the next.
template <class C>
inline constexpr int kSumPitch = kBlock + 8;

// Reads n neighbours of a tile of sums. Eight floats a lane would meet in the banks in pairs of
// lanes, so every other four lanes begin with their second half.
template <class C, int n>
__device__ __forceinline__ void load_sums(C (&to)[n], const C* from) {
  if constexpr (n == 8 && sizeof(C) == 4) {
    const bool swapped = threadIdx.x & 4;
    C first[4], second[4];
    load_aligned(first, from + (swapped ? 4 : 0));
    load_aligned(second, from + (swapped ? 0 : 4));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      to[e] = swapped ? second[e] : first[e];
      to[e + 4] = swapped ? first[e] : second[e];
    }
  } else {
    load_aligned(to, from);
  }
}

// Rounds n values to operands, and writes them.
template <class P, int n>
__device__ __forceinline__ void store_operands(typename P::Operand* to,
                                               const typename P::Sum (&values)[n],
                                               DataType rounding) {
  using T = typename P::Operand;
  if constexpr (std::is_same_v<P, TensorCore<T>>) {
    store_aligned<Space::kShared>(to, values);
  } else {
    T operands[n];
#pragma unroll
    for (int e = 0; e < n; ++e) operands[e] = P::round(values[e], rounding);
    store_aligned<Space::kShared>(to, operands);
  }
}

// Fills a [rows, columns] tile of operands: source(row, column, values) gives kVector<Operand>
// values. Values are all read before any is written, so that the reads overlap.
template <class P, class S, int rows, int columns, class Source>
__device__ __forceinline__ void fill_tile(typename P::Operand* tile, int pitch, DataType rounding,
                                          Source&& source) {
  using T = typename P::Operand;
  constexpr int n = kVector<T>, across = columns / n, all = rows * across;
  constexpr int count = (all + S::kThreads - 1) / S::kThreads;
  static_assert(all % S::kThreads == 0 || count == 1);
  if (all < S::kThreads && thread_index() >= all) return;
  typename P::Sum values[count][n];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const int vector = thread_index() + i * S::kThreads;
    source(vector / across, vector % across * n, values[i]);
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const int vector = thread_index() + i * S::kThreads;
    store_operands<P>(tile + vector / across * pitch + vector % across * n, values[i], rounding);
  }
}

// A weight matrix as it is stored; fewer than 2^31 rows and columns.
struct WeightMatrix {
  const void* data;
  int64_t stride;         // from a row to the next, in elements
  int64_t rows, columns;  // what lies outside is zero
  bool is_float, aligned, copied;

  // `copied`: the tile's elements are the matrix's, so that they can be copied asynchronously.
  template <class X, class P>
  static __device__ __forceinline__ WeightMatrix make(const void* data, int64_t stride,
                                                      int64_t rows, int64_t columns, bool is_float,
                                                      bool rounded) {
    const int64_t size = is_float ? 4 : static_cast<int64_t>(sizeof(X));
    const bool aligned = is_aligned(data, stride * size);
    const bool same = std::is_same_v<typename P::Operand, float> ? is_float
                      : std::is_same_v<typename P::Operand, X>   ? !is_float
                                                                 : false;
    return {data, stride, rows, columns, is_float, aligned, aligned && same && !rounded};
  }
};

// A part [tile_rows, tile_columns] of a weight matrix that moves over it, and this thread's vectors
// of the part.
template <class X, class P, class S, int tile_rows, int tile_columns>
class WeightTile {
  using T = typename P::Operand;
  static constexpr int n = kVector<T>, kAcross = tile_columns / n;
  static constexpr int kDown = S::kThreads / kAcross, kCount = tile_rows / kDown;
  static_assert(kCount * kDown == tile_rows);

 public:
  __device__ __forceinline__ WeightTile(const WeightMatrix& matrix, int64_t row, int64_t column)
      : matrix_(matrix),
        index_((row + own_row()) * matrix.stride + column + own_column()),
        rows_left_(static_cast<int>(matrix.rows - row) - own_row()),
        columns_left_(static_cast<int>(matrix.columns - column) - own_column()) {}

  __device__ __forceinline__ void move(int rows, int columns) {
    index_ += rows * matrix_.stride + columns;
    rows_left_ -= rows;
    columns_left_ -= columns;
  }

  // Starts filling a tile in shared memory. The caller commits, waits and synchronises. `whole`: it
  // is known that elements are copied.
  template <bool whole = false>
  __device__ __forceinline__ void fill(T* tile, int pitch, DataType rounding) const {
    if (whole || matrix_.copied) {
      const T* const from = static_cast<const T*>(matrix_.data) + index_;
      T* const to = tile + own_row() * pitch + own_column();
      const int there = columns_left_ <= 0 ? 0 : columns_left_ < n ? columns_left_ : n;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int count = rows_left_ > i * kDown ? there : 0;
        copy_async(to + i * kDown * pitch, count ? from + i * kDown * matrix_.stride : matrix_.data,
                   count * static_cast<int>(sizeof(T)));
      }
    } else {
#pragma unroll 1  // registers are full of sums
      for (int i = 0; i < kCount; ++i) {
        typename P::Sum values[n];
        load_weights<X>(values, matrix_.data, matrix_.is_float, index_ + i * kDown * matrix_.stride,
                        rows_left_ > i * kDown ? columns_left_ : 0, matrix_.aligned);
        store_operands<P>(tile + (own_row() + i * kDown) * pitch + own_column(), values, rounding);
      }
    }
  }

 private:
  // The first vector's place in the part.
  static __device__ __forceinline__ int own_row() { return thread_index() / kAcross; }
  static __device__ __forceinline__ int own_column() { return thread_index() % kAcross * n; }

  WeightMatrix matrix_;
  int64_t index_;                 // of that vector, in the matrix
  int rows_left_, columns_left_;  // from that vector on
};

}  // namespace adapter_ext::cuda
