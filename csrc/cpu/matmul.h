// Blocked matrix products on row blocks that stay in cache, and the packing of their right operand.
//
// Every element of a product is one chain of multiply-adds over k within a block of kBlockK, the
// blocks' sums added in order. This order depends on k alone, not on the tile that an element falls
// in: a row's result has the same bits whatever rows it is computed with.
#pragma once

#include <algorithm>

#include "cpu/vector.h"

namespace adapter_ext::cpu {
inline namespace ADAPTER_EXT_CPU_LEVEL {

// Register tile: kTileRows rows by kPanelVectors vectors; one panel of the right operand is
// kBlockK x panel width and stays in the first-level cache.
#if defined(__AVX512F__)
inline constexpr int kTileRows = 12;
#else
inline constexpr int kTileRows = 6;
#endif
inline constexpr int kPanelVectors = 2;
inline constexpr int64_t kBlockK = 256;
template <class C>
inline constexpr int64_t kPanel = kPanelVectors * kLanes<C>;

template <class C>
ADAPTER_EXT_HOST_DEVICE int64_t panels(int64_t columns) {
  return (columns + kPanel<C> - 1) / kPanel<C>;
}
template <class C>
ADAPTER_EXT_HOST_DEVICE int64_t padded(int64_t columns) {
  return panels<C>(columns) * kPanel<C>;
}

// A left operand: element (row, k) is data[row * row_stride + k * k_stride].
template <class C>
struct LeftOperand {
  const C* data;
  int64_t row_stride;
  int64_t k_stride;
};

// A right operand in panels of kPanel columns: element (k, column) of panel p is
// data[p * panel_stride + k * k_stride + column].
template <class C>
struct RightOperand {
  const C* data;
  int64_t panel_stride;
  int64_t k_stride;
};

template <class C, int rows, int vectors>
static void tile(int64_t k_count, const C* a, int64_t a_row, int64_t a_k, const C* b, int64_t b_k,
                 C* out, int64_t out_row, bool accumulate) {
  using V = Vector<C>;
  V sum[rows][vectors] = {};
  for (int64_t k = 0; k < k_count; ++k) {
    V right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) right[v] = load<C>(b + k * b_k + v * kLanes<C>);
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row) {
      const V left = splat<C>(a[row * a_row + k * a_k]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[row][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      C* to = out + row * out_row + v * kLanes<C>;
      store<C>(to, accumulate ? load<C>(to) + sum[row][v] : sum[row][v]);
    }
  }
}

template <class C, int vectors, int rows = kTileRows>
ADAPTER_EXT_HOST_DEVICE void tile_of_rows(int64_t row_count, int64_t k_count, const C* a,
                                          int64_t a_row, int64_t a_k, const C* b, int64_t b_k,
                                          C* out, int64_t out_row, bool accumulate) {
  if constexpr (rows > 0) {
    if (row_count == rows) {
      tile<C, rows, vectors>(k_count, a, a_row, a_k, b, b_k, out, out_row, accumulate);
    } else {
      tile_of_rows<C, vectors, rows - 1>(row_count, k_count, a, a_row, a_k, b, b_k, out, out_row,
                                         accumulate);
    }
  }
}

// out [rows, columns] (+)= left [rows, k] right [k, columns]. The rows of `out` are out_row elements
// apart and padded to whole panels; the padding gets the product with the padding of `right`.
template <class C>
static void multiply(int64_t rows, int64_t columns, int64_t k_count, LeftOperand<C> left,
                     RightOperand<C> right, C* out, int64_t out_row, bool accumulate) {
  if (k_count == 0 && !accumulate) {
    for (int64_t row = 0; row < rows; ++row) {
      std::fill(out + row * out_row, out + row * out_row + padded<C>(columns), C(0));
    }
  }
  for (int64_t k = 0; k < k_count; k += kBlockK) {
    const int64_t block = std::min(kBlockK, k_count - k);
    for (int64_t column = 0, panel = 0; column < columns; column += kPanel<C>, ++panel) {
      const C* b = right.data + panel * right.panel_stride + k * right.k_stride;
      const bool narrow = columns - column <= kLanes<C>;
      for (int64_t row = 0; row < rows; row += kTileRows) {
        const int64_t count = std::min<int64_t>(kTileRows, rows - row);
        const C* a = left.data + row * left.row_stride + k * left.k_stride;
        C* to = out + row * out_row + column;
        const auto run = narrow ? tile_of_rows<C, 1> : tile_of_rows<C, kPanelVectors>;
        run(count, block, a, left.row_stride, left.k_stride, b, right.k_stride, to, out_row,
            accumulate || k > 0);
      }
    }
  }
}

// ---- Packing of a weight matrix, stored as W, into a right operand of panels [k][kPanel].

template <class C, class W>
static void pack_same_order(const W* from, int64_t stride, int64_t k_count, int64_t columns, C* to) {
  for (int64_t column = 0; column < columns; column += kPanel<C>) {
    const int64_t count = std::min(kPanel<C>, columns - column);
    for (int64_t k = 0; k < k_count; ++k, to += kPanel<C>) {
      const W* source = from + k * stride + column;
      for (int v = 0; v < kPanelVectors; ++v) {
        const int64_t left = count - v * kLanes<C>;
        const W* part = source + v * kLanes<C>;
        store<C>(to + v * kLanes<C>, left >= kLanes<C> ? load<C>(part)
                                     : left > 0        ? load<C>(part, PartialVector{left})
                                                       : Vector<C>{});
      }
    }
  }
}

// Interleaves the halves of a and b: (a0 b0 a1 b1 ...) of the low or of the high halves.
template <class C, bool high, int... lane>
ADAPTER_EXT_HOST_DEVICE Vector<C> interleave(Vector<C> a, Vector<C> b,
                                             std::integer_sequence<int, lane...>) {
  constexpr int start = high ? kLanes<C> / 2 : 0;
  return __builtin_shufflevector(a, b, ((lane % 2) * kLanes<C> + start + lane / 2)...);
}

// Transposes a square of kLanes x kLanes in registers.
template <class C>
ADAPTER_EXT_HOST_DEVICE void transpose(Vector<C> (&v)[kLanes<C>]) {
  constexpr int lanes = kLanes<C>;
  using Lanes = std::make_integer_sequence<int, lanes>;
#pragma GCC unroll 8
  for (int stage = 1; stage < lanes; stage *= 2) {
    Vector<C> next[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleave<C, false>(v[i], v[i + lanes / 2], Lanes{});
      next[2 * i + 1] = interleave<C, true>(v[i], v[i + lanes / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = next[i];
  }
}

// Packs the transpose: from [columns, k], rows `stride` apart.
template <class C, class W>
static void pack_transposed(const W* from, int64_t stride, int64_t k_count, int64_t columns, C* to) {
  constexpr int lanes = kLanes<C>;
  for (int64_t column = 0; column < columns; column += kPanel<C>, to += k_count * kPanel<C>) {
    for (int64_t part = 0; part < kPanel<C>; part += lanes) {
      const int64_t valid = std::min<int64_t>(lanes, columns - column - part);
      if (valid <= 0) {
        for (int64_t k = 0; k < k_count; ++k) store<C>(to + k * kPanel<C> + part, Vector<C>{});
        continue;
      }
      const W* source = from + (column + part) * stride;
      for_each_vector<C>(k_count, [&](int64_t k, auto extent) {
        Vector<C> square[lanes] = {};
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if (i < valid) square[i] = load<C>(source + i * stride + k, extent);
        }
        transpose<C>(square);
        const int64_t count = std::min<int64_t>(lanes, k_count - k);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if (i < count) store<C>(to + (k + i) * kPanel<C> + part, square[i]);
        }
      });
    }
  }
}

}  // namespace ADAPTER_EXT_CPU_LEVEL
}  // namespace adapter_ext::cpu
