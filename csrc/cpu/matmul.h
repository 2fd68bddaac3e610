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

// A left operand: element (row, k) is data[row * row_stride + k * k_stride], and one of the strides
// is 1. Operands are passed by reference: a copy on the stack is read by wider loads than it was
// stored by, which wait until all stores before are done, those of the tile before to slow memory
// among them.
template <class C>
struct LeftOperand {
  const C* data;
  int64_t row_stride;
  int64_t k_stride;

  // The part that starts at a row and at a k.
  ADAPTER_EXT_HOST_DEVICE LeftOperand from(int64_t row, int64_t k) const {
    return {data + row * row_stride + k * k_stride, row_stride, k_stride};
  }
};

// A right operand in panels of kPanel columns: element (k, column) of panel p is
// data[p * panel_stride + k * k_stride + column].
template <class C>
struct RightOperand {
  const C* data;
  int64_t panel_stride;
  int64_t k_stride;
};

// How a product takes its steps over k: one element of each operand in a step, multiplied and
// added. A step's operands fill a lane of a Vector<C>.
template <class C>
struct MultiplyAdd {
  static constexpr int kElements = 1;   // of k, in a step
  static constexpr int kStepGroup = 1;  // operands have whole groups of steps, the last with zeros
  struct Setup {};                      // lives where a thread multiplies

  ADAPTER_EXT_HOST_DEVICE static Vector<C> add(Vector<C> sum, Vector<C> left, Vector<C> right) {
    return sum + left * right;
  }
  ADAPTER_EXT_HOST_DEVICE static Vector<C> splat(const C* step) { return cpu::splat<C>(*step); }
  // A step of a right operand, vectors of columns; the next step is `k_stride` on.
  template <int vectors>
  ADAPTER_EXT_HOST_DEVICE static void load_right(const C* from, int64_t, Vector<C> (&to)[vectors]) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) to[v] = cpu::load<C>(from + v * kLanes<C>);
  }
  ADAPTER_EXT_HOST_DEVICE static Vector<C> round(Vector<C> values) { return values; }
  // From the first vector of such a step to the second.
  ADAPTER_EXT_HOST_DEVICE static int64_t next_right(int64_t) { return kLanes<C>; }
  // Elements i and on of a left operand's row.
  template <class Extent>
  ADAPTER_EXT_HOST_DEVICE static void store(C* row, int64_t i, Vector<C> values, Extent extent) {
    cpu::store<C>(row + i, values, extent);
  }
  // Makes a step of a right operand of its elements, a row each.
  ADAPTER_EXT_HOST_DEVICE static void store_step(C* to, const Vector<C> (&elements)[1]) {
    cpu::store<C>(to, elements[0]);
  }
  // Steps k, k + 1, ... of a row of `count` elements.
  template <class W, class Extent>
  ADAPTER_EXT_HOST_DEVICE static Vector<C> load(const W* row, int64_t k, int64_t, Extent extent) {
    return cpu::load<C>(row + k, extent);
  }
};

#if defined(__AVX512BF16__)
// Two bfloat16 elements of each operand in a step, kept in the bits of a float. The instruction
// takes subnormal numbers as zero. The last element of an odd count is paired with zero.
struct PairDot : MultiplyAdd<float> {
  static constexpr int kElements = 2;
  using V = Vector<float>;

  ADAPTER_EXT_HOST_DEVICE static V add(V sum, V left, V right) {
    return bit_cast<V>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(left),
                                        bit_cast<__m512bh>(right)));
  }
  ADAPTER_EXT_HOST_DEVICE static V splat(const float* step) {
    int32_t bits;  // a float's arithmetic could change them
    std::memcpy(&bits, step, sizeof(bits));
    return bit_cast<V>(_mm512_set1_epi32(bits));
  }
  template <class Extent>
  ADAPTER_EXT_HOST_DEVICE static V load(const BFloat16* row, int64_t k, int64_t count, Extent) {
    constexpr int most = kElements * kLanes<float>;
    const int64_t left = count - kElements * k;
    const __mmask32 mask = left >= most ? ~__mmask32{0} : left > 0 ? (__mmask32{1} << left) - 1 : 0;
    return bit_cast<V>(_mm512_maskz_loadu_epi16(mask, row + kElements * k));
  }
  // What the product takes the values for.
  ADAPTER_EXT_HOST_DEVICE static V round(V values) {
    const __m256bh narrow = _mm512_cvtneps_pbh(bit_cast<__m512>(values));
    return bit_cast<V>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bit_cast<__m256i>(narrow)), 16));
  }
  template <class Extent>
  ADAPTER_EXT_HOST_DEVICE static void store(float* row, int64_t i, V values, Extent extent) {
    const __m256i narrow = bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(values)));
    BFloat16* to = reinterpret_cast<BFloat16*>(row) + i;
    if constexpr (std::is_same_v<Extent, FullVector>) {
      std::memcpy(to, &narrow, sizeof(narrow));
    } else {
      const auto mask = static_cast<__mmask16>((1u << extent.count) - 1);
      _mm256_mask_storeu_epi16(to, mask, narrow);
    }
  }
  ADAPTER_EXT_HOST_DEVICE static void store_step(float* to, const V (&elements)[2]) {
    const __m512bh halves =
        _mm512_cvtne2ps_pbh(bit_cast<__m512>(elements[1]), bit_cast<__m512>(elements[0]));
    cpu::store<float>(to, pair_halves(bit_cast<__m512i>(halves)));
  }
  // Only the first or the second elements of a step.
  ADAPTER_EXT_HOST_DEVICE static void store_half_step(float* to, V elements, bool second) {
    const __m256i narrow = bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(elements)));
    const __m512i wide = _mm512_cvtepu16_epi32(narrow);
    if (second) {
      _mm512_mask_storeu_epi16(to, 0xAAAAAAAAu, _mm512_slli_epi32(wide, 16));
    } else {
      _mm512_mask_storeu_epi16(to, 0x55555555u, wide);
    }
  }
  // A step of elements that are bfloat16 already, a vector of columns; null: zero.
  template <class Extent>
  ADAPTER_EXT_HOST_DEVICE static V load_step(const BFloat16* even, const BFloat16* odd,
                                             Extent extent) {
    const auto load_row = [&](const BFloat16* row) {
      if constexpr (std::is_same_v<Extent, FullVector>) {
        return row ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row))
                   : _mm256_setzero_si256();
      } else {
        const auto mask = static_cast<__mmask16>(row ? (1u << extent.count) - 1 : 0u);
        return _mm256_maskz_loadu_epi16(mask, row);
      }
    };
    return pair_halves(
        _mm512_inserti64x4(_mm512_castsi256_si512(load_row(even)), load_row(odd), 1));
  }
  // The low half's elements each beside the high half's.
  ADAPTER_EXT_HOST_DEVICE static V pair_halves(__m512i halves) {
    alignas(64) static constexpr uint16_t order[] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return bit_cast<V>(_mm512_permutexvar_epi16(_mm512_load_si512(order), halves));
  }
};

// The same, with a right operand of rows of bfloat16 as they are stored, two of them in a step.
struct StoredPairDot : PairDot {
  // For weights [k, columns] with rows `stride` apart. Its strides, as others', are in floats.
  ADAPTER_EXT_HOST_DEVICE static RightOperand<float> right(const BFloat16* weights,
                                                           int64_t stride) {
    return {reinterpret_cast<const float*>(weights), kPanel<float> / kElements, stride};
  }
  // To the line of the second row.
  ADAPTER_EXT_HOST_DEVICE static int64_t next_right(int64_t k_stride) {
    return k_stride / kElements;
  }
  template <int vectors>
  ADAPTER_EXT_HOST_DEVICE static void load_right(const float* from, int64_t k_stride,
                                                 V (&to)[vectors]) {
    const BFloat16* even = reinterpret_cast<const BFloat16*>(from);
    const BFloat16* odd = even + k_stride;
    if constexpr (vectors == 1) {
      to[0] = load_step(even, odd, FullVector{});
    } else {
      static_assert(vectors == 2);
      alignas(64) static constexpr uint16_t low[] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                     37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                     11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
      alignas(64) static constexpr uint16_t high[] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21,
                                                      53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58,
                                                      27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
      const __m512i first = _mm512_loadu_si512(even), second = _mm512_loadu_si512(odd);
      to[0] = bit_cast<V>(_mm512_permutex2var_epi16(first, _mm512_load_si512(low), second));
      to[1] = bit_cast<V>(_mm512_permutex2var_epi16(first, _mm512_load_si512(high), second));
    }
  }
};
#endif

#if defined(__AMX_BF16__)
// The same pairs, multiplied by tile registers of 16 rows by 16 steps: rows of left operands and of
// results are computed by sixteens, and there is memory for them.
struct TileDot : PairDot {
  static constexpr int kTile = 16;
  static constexpr int kStepGroup = kTile;

  // Tile registers 0 to 3 are sums, 4 and 5 left operands, 6 and 7 right ones.
  class Setup {
   public:
    Setup() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
      } configuration;
      _tile_loadconfig(order_memory(&configuration));
    }
    ~Setup() { _tile_release(); }
    Setup(const Setup&) = delete;
    Setup& operator=(const Setup&) = delete;
  };

  // Keeps the compiler from moving stores over the intrinsics, which do not say what they read.
  template <class T>
  ADAPTER_EXT_HOST_DEVICE static T* order_memory(T* pointer) {
    __asm__ volatile("" : "+r"(pointer) : : "memory");
    return pointer;
  }
};
#endif

#if defined(__AMX_BF16__)
using BFloat16Product = TileDot;
#elif defined(__AVX512BF16__)
using BFloat16Product = PairDot;
#endif

// Steps over so many elements of k, in whole groups.
template <class Product>
ADAPTER_EXT_HOST_DEVICE int64_t steps(int64_t elements) {
  constexpr int64_t group = Product::kElements * Product::kStepGroup;
  return (elements + group - 1) / group * Product::kStepGroup;
}

// Zeros behind the `count` elements of a left operand's row, to whole groups of steps.
template <class C, class Product>
ADAPTER_EXT_HOST_DEVICE void pad_row(C* row, int64_t count) {
  if constexpr (Product::kElements > 1) {
    const int64_t end = steps<Product>(count) * Product::kElements;
    std::memset(reinterpret_cast<BFloat16*>(row) + count, 0,
                static_cast<size_t>(end - count) * sizeof(BFloat16));
  }
}

// What a product does with its result: stores it, adds it to what is there, or stores it past the
// caches, for which `out` is aligned to vectors.
enum class Into { kNew, kSum, kStream };

// What is needed next, in pieces. Products ask memory for a cache line of it with every few steps,
// so that it works while they compute.
class Ahead {
 public:
  struct Piece {
    const void* from;
    int64_t bytes;
  };

  // The pieces stay where they are.
  void set(const Piece* pieces, int64_t count) {
    pieces_ = pieces;
    count_ = count;
    next_piece();
  }

  ADAPTER_EXT_HOST_DEVICE void next_line() {
    __builtin_prefetch(line_, 0, 2);
    line_ += step_;
    if (line_ == end_) next_piece();
  }

 private:
  static constexpr int64_t kLine = 64;

  ADAPTER_EXT_HOST_DEVICE void next_piece() {
    while (count_ > 0 && pieces_->bytes == 0) {
      ++pieces_;
      --count_;
    }
    if (count_ == 0) {  // stays where it is
      step_ = 0;
      end_ = nullptr;
      return;
    }
    --count_;
    line_ = static_cast<const char*>(pieces_->from);
    end_ = line_ + (pieces_->bytes + kLine - 1) / kLine * kLine;
    ++pieces_;
    step_ = kLine;
  }

  const char* line_ = reinterpret_cast<const char*>(this);
  const char* end_ = nullptr;
  const Piece* pieces_ = nullptr;
  int64_t count_ = 0, step_ = 0;
};

// Keeps the compiler from computing addresses together, for which it has no registers.
template <class T>
ADAPTER_EXT_HOST_DEVICE T* opaque(T* pointer) {
  __asm__("" : "+r"(pointer));
  return pointer;
}

// Rows of a panel, which the next tile reads or writes. They may lie so far apart that the hardware
// does not see where the next one is, and are asked for one at a time, since the buffers for lines
// on their way are few.
struct RowsAhead {
  const char* row;
  int64_t stride;  // bytes
  int64_t count;
  int64_t next;  // bytes from a vector of a row to the next

  template <class C>
  static RowsAhead of(const C* row, int64_t stride, int64_t count, int64_t next = kLanes<C>) {
    constexpr int64_t size = sizeof(C);
    return {reinterpret_cast<const char*>(row), stride * size, count, next * size};
  }
};

// A tile of a product, whose left operand is contiguous along k, or along the rows. Asks for two
// sorts of rows ahead, then for other pieces; for its own results at once where those of the next
// tile are not among them.
template <class C, class Product, bool along_k, int rows, int vectors, class Out>
static void tile(int64_t k_count, const LeftOperand<C>& left, const C* b, int64_t b_k, Out* out,
                 int64_t out_row, Into into, const RowsAhead (&rows_ahead)[2],
                 Ahead& pieces_ahead) {
  using V = Vector<C>;
  bool first_rows = rows_ahead[0].count > 0;
  RowsAhead next_rows = rows_ahead[first_rows ? 0 : 1];
  Ahead ahead = pieces_ahead;
  V sum[rows][vectors] = {};
  Out* to = out;
  if (!first_rows && into != Into::kStream) {
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row, to += out_row) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) __builtin_prefetch(to + v * kLanes<C>, 1);
    }
  }
  // Along k, a pointer for every third row: with one for all, the rows' offsets take more registers
  // than there are.
  constexpr int group = along_k ? 3 : rows;
  const int64_t row_stride = along_k ? left.row_stride : 1, k_stride = along_k ? 1 : left.k_stride;
  const C* a[(rows + group - 1) / group];
  const C* from = left.data;
  for (const C*& first : a) {
    first = from;
    from = opaque(from + group * row_stride);
  }
  const auto step = [&](int64_t a_offset) {
    V right[vectors];
    Product::load_right(b, b_k, right);
    b += b_k;
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row) {
      const V value = Product::splat(a[row / group] + row % group * row_stride + a_offset);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        sum[row][v] = Product::add(sum[row][v], value, right[v]);
      }
    }
  };
  const auto ask_ahead = [&] {
    if (next_rows.count == 0) return ahead.next_line();
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      __builtin_prefetch(next_rows.row + v * next_rows.next, 0, 2);
    }
    next_rows.row += next_rows.stride;
    if (--next_rows.count == 0 && first_rows) {
      next_rows = rows_ahead[1];
      first_rows = false;
    }
  };
  const auto advance = [&](int64_t steps) {
#pragma GCC unroll 4
    for (const C*& first : a) first += steps * k_stride;
  };
  // Two steps at a time: counting and advancing take execution units from the arithmetic.
  int64_t k = 0;
  for (; k + 2 <= k_count; k += 2) {
    ask_ahead();
    step(0);
    step(k_stride);
    advance(2);
  }
  if (k < k_count) step(0);
  pieces_ahead = ahead;
  to = opaque(out);
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row, to += out_row) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      Out* at = to + v * kLanes<C>;
      if (into == Into::kStream) {
        stream<C>(at, sum[row][v]);
      } else if constexpr (!std::is_same_v<Out, C>) {
        store<C>(at, sum[row][v]);
      } else {
        store<C>(at, into == Into::kSum ? load<C>(at) + sum[row][v] : sum[row][v]);
      }
    }
  }
}

template <class C, class Product, bool along_k, int vectors, class Out, int rows = kTileRows>
ADAPTER_EXT_HOST_DEVICE void tile_of_rows(int64_t row_count, int64_t k_count,
                                          const LeftOperand<C>& left, const C* b, int64_t b_k,
                                          Out* out, int64_t out_row, Into into,
                                          const RowsAhead (&rows_ahead)[2], Ahead& ahead) {
  if constexpr (rows > 0) {
    if (row_count == rows) {
      tile<C, Product, along_k, rows, vectors>(k_count, left, b, b_k, out, out_row, into,
                                               rows_ahead, ahead);
    } else {
      tile_of_rows<C, Product, along_k, vectors, Out, rows - 1>(
          row_count, k_count, left, b, b_k, out, out_row, into, rows_ahead, ahead);
    }
  }
}

#if defined(__AMX_BF16__)
// Row tiles by column tiles of a product.
template <int row_tiles, int column_tiles>
static void tiles(int64_t k_count, const LeftOperand<float>& left, const float* b, int64_t b_k,
                  float* out, int64_t out_row, bool accumulate, Ahead& pieces_ahead) {
  constexpr int tile = TileDot::kTile;
  constexpr int kAheadSteps = 4;  // for two tiles that are multiplied
  Ahead ahead = pieces_ahead;
  const int64_t left_bytes = left.row_stride * 4, right_bytes = b_k * 4, out_bytes = out_row * 4;
  float* const right_out = out + tile;
  float* const low_out = out + tile * out_row;
  float* const low_right_out = low_out + tile;
  if (accumulate) {
    _tile_loadd(0, out, out_bytes);
    if constexpr (column_tiles == 2) _tile_loadd(1, right_out, out_bytes);
    if constexpr (row_tiles == 2) _tile_loadd(2, low_out, out_bytes);
    if constexpr (row_tiles == 2 && column_tiles == 2) _tile_loadd(3, low_right_out, out_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const float* a = left.data;
  const float* low_a = a + tile * left.row_stride;
  for (int64_t k = 0; k < k_count; k += tile, a += tile, low_a += tile, b += tile * b_k) {
    _tile_loadd(4, a, left_bytes);
    _tile_loadd(6, b, right_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (column_tiles == 2) {
      _tile_loadd(7, b + tile, right_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (row_tiles == 2) {
      _tile_loadd(5, low_a, left_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (column_tiles == 2) _tile_dpbf16ps(3, 5, 7);
    }
    for (int i = 0; i < kAheadSteps * row_tiles * column_tiles; ++i) ahead.next_line();
  }
  pieces_ahead = ahead;
  _tile_stored(0, out, out_bytes);
  if constexpr (column_tiles == 2) _tile_stored(1, right_out, out_bytes);
  if constexpr (row_tiles == 2) _tile_stored(2, low_out, out_bytes);
  if constexpr (row_tiles == 2 && column_tiles == 2) _tile_stored(3, low_right_out, out_bytes);
}

// multiply() below, with tile registers; k is contiguous in the left operand.
static void multiply_tiles(int64_t rows, int64_t columns, int64_t k_count, LeftOperand<float> left,
                           const RightOperand<float>& right, float* out, int64_t out_row,
                           bool accumulate, Ahead& ahead) {
  constexpr int tile = TileDot::kTile;
  left.data = TileDot::order_memory(left.data);
  for (int64_t column = 0; column < columns; column += kPanel<float>) {
    const float* b = right.data + column / kPanel<float> * right.panel_stride;
    const bool narrow = columns - column <= tile;
    for (int64_t row = 0; row < rows; row += 2 * tile) {
      const auto run = rows - row <= tile ? (narrow ? tiles<1, 1> : tiles<1, 2>)
                                          : (narrow ? tiles<2, 1> : tiles<2, 2>);
      run(k_count, left.from(row, 0), b, right.k_stride, out + row * out_row + column, out_row,
          accumulate, ahead);
    }
  }
}
#endif

// out [rows, columns] (+)= left [rows, k] right [k, columns], k in steps of the product. The rows
// of `out` are out_row elements apart and padded to whole panels; the padding gets the product with
// the padding of `right`. An `out` of another type than C is rounded to: it is new, and k one
// block.
template <class C, class Product = MultiplyAdd<C>, class Out = C>
static void multiply(int64_t rows, int64_t columns, int64_t k_count, const LeftOperand<C>& left,
                     const RightOperand<C>& right, Out* out, int64_t out_row, Into into,
                     Ahead& ahead) {
  if constexpr (Product::kStepGroup > 1) {
    return multiply_tiles(rows, columns, k_count, left, right, out, out_row, into == Into::kSum,
                          ahead);
  }
  if (k_count == 0 && into != Into::kSum) {
    for (int64_t row = 0; row < rows; ++row) {
      std::fill(out + row * out_row, out + row * out_row + padded<C>(columns), Out{});
    }
  }
  // Tiles of equal size: a small last one would take almost as long as a whole one.
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t even = rows / std::max<int64_t>(row_tiles, 1), larger = rows - even * row_tiles;
  const auto tile_rows = [&](int64_t i) { return even + (i < larger ? 1 : 0); };
  constexpr int64_t block_steps = kBlockK / Product::kElements;
  for (int64_t k = 0; k < k_count; k += block_steps) {
    const int64_t block = std::min(block_steps, k_count - k);
    for (int64_t column = 0, panel = 0; column < columns; column += kPanel<C>, ++panel) {
      const C* b = right.data + panel * right.panel_stride + k * right.k_stride;
      const bool narrow = columns - column <= kLanes<C>;
      const bool last_panel = columns - column <= kPanel<C>;
      const bool apart = !last_panel && right.k_stride > kPanel<C>;
      for (int64_t row = 0, i = 0, count; row < rows; row += count, ++i) {
        count = tile_rows(i);
        Out* to = out + row * out_row + column;
        // The next tile's results, if there are steps enough, and a share of the next panel.
        RowsAhead rows_ahead[2] = {};
        const bool asks = into != Into::kStream && block >= 2 * kTileRows;
        if (asks && row + count < rows) {
          rows_ahead[0] = RowsAhead::of(to + count * out_row, out_row, tile_rows(i + 1));
        } else if (asks && !last_panel) {
          rows_ahead[0] = RowsAhead::of(out + column + kPanel<C>, out_row, tile_rows(0));
        }
        if (apart) {
          const int64_t first = block * i / row_tiles, end = block * (i + 1) / row_tiles;
          rows_ahead[1] =
              RowsAhead::of(b + right.panel_stride + first * right.k_stride, right.k_stride,
                            end - first, Product::next_right(right.k_stride));
        }
        const auto run = left.k_stride == 1
                             ? (narrow ? tile_of_rows<C, Product, true, 1, Out>
                                       : tile_of_rows<C, Product, true, kPanelVectors, Out>)
                             : (narrow ? tile_of_rows<C, Product, false, 1, Out>
                                       : tile_of_rows<C, Product, false, kPanelVectors, Out>);
        run(count, block, left.from(row, k), b, right.k_stride, to, out_row,
            k > 0 ? Into::kSum : into, rows_ahead, ahead);
      }
    }
  }
}

// ---- Packing of a weight matrix, stored as W, into a right operand of panels [k][kPanel].

// Packs [elements of k, columns], rows `stride` apart, to steps of the product.
template <class C, class Product = MultiplyAdd<C>, class W>
static void pack_same_order(const W* from, int64_t stride, int64_t elements, int64_t columns,
                            C* to) {
  constexpr int in_step = Product::kElements;
  const int64_t k_count = steps<Product>(elements), panel_size = k_count * kPanel<C>;
  for (int64_t k = 0; k < k_count; ++k) {
    const int64_t present = std::min<int64_t>(in_step, elements - k * in_step);
    const auto pack = [&](int64_t column, auto extent) {
      const W* source = from + k * in_step * stride + column;
      C* to_step = to + column / kPanel<C> * panel_size + k * kPanel<C> + column % kPanel<C>;
      if constexpr (in_step == 1) {
        store<C>(to_step, load<C>(source, extent));
      } else {
        store<C>(to_step, Product::load_step(present > 0 ? source : nullptr,
                                             present > 1 ? source + stride : nullptr, extent));
      }
    };
    for_each_vector<C>(columns, pack);
    const int64_t end = (columns + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
    if (end < padded<C>(columns)) pack(end, PartialVector{0});
  }
}

// Interleaves blocks of `block` lanes of the low or the high halves of a and b, within each group
// of `span` lanes: (a0 b0 a1 b1 ...).
template <class C, bool high, int block, int span, int... lane>
ADAPTER_EXT_HOST_DEVICE Vector<C> interleave(Vector<C> a, Vector<C> b,
                                             std::integer_sequence<int, lane...>) {
  constexpr auto source = [](int l) {
    const int group = l / span * span, index = (l - group) / block;
    return (index % 2) * kLanes<C> + group + (high ? span / 2 : 0) + index / 2 * block + l % block;
  };
  return __builtin_shufflevector(a, b, source(lane)...);
}

// Transposes kLanes x kLanes in registers: squares within 128 bits by interleaving lanes, which is
// one instruction each, then the 128-bit blocks across.
template <class C>
ADAPTER_EXT_HOST_DEVICE void transpose(Vector<C> (&v)[kLanes<C>]) {
  constexpr int lanes = kLanes<C>, quad = 16 / static_cast<int>(sizeof(C)), groups = lanes / quad;
  using Lanes = std::make_integer_sequence<int, lanes>;
  Vector<C> next[lanes];
#pragma GCC unroll 4
  for (int stage = 1; stage < quad; stage *= 2) {
#pragma GCC unroll 16
    for (int group = 0; group < lanes; group += quad) {
#pragma GCC unroll 4
      for (int i = 0; i < quad / 2; ++i) {
        const Vector<C> a = v[group + i], b = v[group + i + quad / 2];
        next[group + 2 * i] = interleave<C, false, 1, quad>(a, b, Lanes{});
        next[group + 2 * i + 1] = interleave<C, true, 1, quad>(a, b, Lanes{});
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = next[i];
  }
#pragma GCC unroll 4
  for (int stage = 1; stage < groups; stage *= 2) {
#pragma GCC unroll 4
    for (int column = 0; column < quad; ++column) {
#pragma GCC unroll 4
      for (int i = 0; i < groups / 2; ++i) {
        const Vector<C> a = v[i * quad + column], b = v[(i + groups / 2) * quad + column];
        next[2 * i * quad + column] = interleave<C, false, quad, lanes>(a, b, Lanes{});
        next[(2 * i + 1) * quad + column] = interleave<C, true, quad, lanes>(a, b, Lanes{});
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = next[i];
  }
}

// Packs the transpose: from [columns, elements of k], rows `stride` apart, to steps of the product.
// Asks for the next panel beforehand, since a row's part of one is too short for the hardware to
// see where it goes on; so many columns follow those that are packed.
template <class C, class Product = MultiplyAdd<C>, class W>
static void pack_transposed(const W* from, int64_t stride, int64_t elements, int64_t columns,
                            int64_t following, C* to) {
  constexpr int lanes = kLanes<C>;
  const int64_t k_count = steps<Product>(elements);
  for (int64_t column = 0; column < columns; column += kPanel<C>, to += k_count * kPanel<C>) {
    for (int64_t part = 0; part < kPanel<C>; part += lanes) {
      const int64_t valid = std::min<int64_t>(lanes, columns - column - part);
      if (valid <= 0) {
        for (int64_t k = 0; k < k_count; ++k) store<C>(to + k * kPanel<C> + part, Vector<C>{});
        continue;
      }
      const W* source = from + (column + part) * stride;
      const bool prefetch = column + 2 * kPanel<C> <= columns + following;
      for_each_vector<C>(k_count, [&](int64_t k, auto extent) {
        if (prefetch) {
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) {
            const W* next = source + (kPanel<C> + i) * stride + k * Product::kElements;
            __builtin_prefetch(next, 0, 2);
          }
        }
        Vector<C> square[lanes] = {};
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if (i < valid) square[i] = Product::load(source + i * stride, k, elements, extent);
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

// to [rows, columns] (+)= the transpose of from [columns, rows]. The rows of `to` are padded to
// whole vectors.
template <class C>
static void add_transposed(int64_t rows, int64_t columns, const C* from, int64_t from_stride, C* to,
                           int64_t to_stride, bool accumulate) {
  constexpr int lanes = kLanes<C>;
  for (int64_t column = 0; column < columns; column += lanes) {
    const int64_t valid = std::min<int64_t>(lanes, columns - column);
    for (int64_t row = 0; row < rows; row += lanes) {
      Vector<C> square[lanes] = {};
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (i < valid) square[i] = load<C>(from + (column + i) * from_stride + row);
      }
      transpose<C>(square);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (row + i >= rows) break;
        C* at = to + (row + i) * to_stride + column;
        store<C>(at, accumulate ? load<C>(at) + square[i] : square[i]);
      }
    }
  }
}

// ---- Products of one row straight from the stored weights: packing them would cost more than the
// product. They go through memory in its order. The order of additions is that of multiply().

// out [columns] (+)= left [k] Wᵀ, W [columns, elements of k].
template <class C, class Product = MultiplyAdd<C>, class W>
static void multiply_row_transposed(int64_t columns, int64_t elements, const C* left,
                                    const W* weights, int64_t stride, C* out, bool accumulate) {
  constexpr int lanes = kLanes<C>;
  constexpr int64_t line = 64 / sizeof(W) / Product::kElements;  // steps
  constexpr int64_t block_steps = kBlockK / Product::kElements;
  const int64_t k_count = steps<Product>(elements);
  // As many rows at once as a vector has lanes: each is consumed a cache line at a time, since rows
  // a power of two apart share a cache set, and asked for beforehand, since they are more streams
  // than the hardware prefetches.
  constexpr int64_t ahead = 2 * lanes;
  const auto some_columns = [&](int64_t column, auto column_extent) {
    const bool prefetch = column + ahead + lanes <= columns;
    for (int64_t block = 0; block < k_count; block += block_steps) {
      const int64_t end = std::min(block + block_steps, k_count);
      Vector<C> sum = {};
      const auto add_square = [&](int64_t k, auto extent) {
        const W* source = weights + column * stride;
        if (prefetch && k % line == 0) {
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) {
            const W* next = source + (i + ahead) * stride + k * Product::kElements;
            __builtin_prefetch(next, 0, 2);  // rows that share a set of a first-level cache
          }
        }
        Vector<C> square[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if constexpr (std::is_same_v<decltype(column_extent), PartialVector>) {
            square[i] = i < column_extent.count
                            ? Product::load(source + i * stride, k, elements, extent)
                            : Vector<C>{};
          } else {
            square[i] = Product::load(source + i * stride, k, elements, extent);
          }
        }
        transpose<C>(square);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if constexpr (std::is_same_v<decltype(extent), PartialVector>) {
            if (i >= extent.count) break;
          }
          sum = Product::add(sum, Product::splat(left + k + i), square[i]);
        }
      };
      int64_t k = block;
      for (; k + line <= end; k += line) {
        for (int64_t part = 0; part < line; part += lanes) add_square(k + part, FullVector{});
      }
      for_each_vector<C>(end - k,
                         [&](int64_t offset, auto extent) { add_square(k + offset, extent); });
      C* to = out + column;
      store<C>(to, accumulate || block > 0 ? load<C>(to) + sum : sum);
    }
  };
  for_each_vector<C>(columns, some_columns);
}

#if defined(__AMX_BF16__)
// out [columns] (+)= left [elements] Wᵀ, W [columns, elements]: W is the left operand, and its
// product with the row the first column of the result.
static void multiply_row_tiles(int64_t columns, int64_t elements, const float* left,
                               const BFloat16* weights, int64_t stride, float* out,
                               bool accumulate) {
  constexpr int tile = TileDot::kTile;
  constexpr int64_t depth = TileDot::kElements * tile;
  alignas(64) float sums[tile][tile] = {};
  alignas(64) BFloat16 edge[tile][depth];
  left = TileDot::order_memory(left);
  for (int64_t column = 0; column < columns; column += tile) {
    const int64_t rows = std::min<int64_t>(tile, columns - column);
    const bool prefetch = column + 3 * tile <= columns;
    _tile_zero(0);
    if (accumulate) {
      for (int64_t i = 0; i < rows; ++i) sums[i][0] = out[column + i];
      _tile_loadd(0, TileDot::order_memory(&sums[0][0]), sizeof(sums[0]));
    }
    for (int64_t k = 0; k < elements; k += depth) {
      const int64_t count = std::min(depth, elements - k);
      const BFloat16* from = weights + column * stride + k;
      if (rows == tile && count == depth) {
        for (int i = 0; prefetch && i < tile; ++i) {
          __builtin_prefetch(from + (i + 2 * tile) * stride);
        }
        _tile_loadd(4, from, stride * static_cast<int64_t>(sizeof(BFloat16)));
      } else {
        std::memset(edge, 0, sizeof(edge));
        for (int64_t i = 0; i < rows; ++i) {
          std::copy(from + i * stride, from + i * stride + count, edge[i]);
        }
        _tile_loadd(4, TileDot::order_memory(&edge[0][0]), sizeof(edge[0]));
      }
      // Steps one after the other: what is behind a tile's first column does not matter.
      _tile_loadd(6, left + k / TileDot::kElements, sizeof(float));
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, &sums[0][0], sizeof(sums[0]));
    for (int64_t i = 0; i < rows; ++i) out[column + i] = sums[i][0];
  }
}
#endif

// out [columns] (+)= left [k] W, W [k, columns].
template <class C, class W>
static void multiply_row_same_order(int64_t columns, int64_t k_count, const C* left,
                                    const W* weights, int64_t stride, C* out, bool accumulate) {
  constexpr int64_t kPart = 1024;  // columns whose sums stay in the first-level cache
  constexpr int kRows = 8;         // rows of W at a time
  constexpr int kAhead = 16;       // rows, each too short for the hardware to see where the next is
  C block_sum[kPart];
  for (int64_t column = 0; column < columns; column += kPart) {
    const int64_t part = std::min(kPart, columns - column);
    for (int64_t block = 0; block < k_count; block += kBlockK) {
      const int64_t end = std::min(block + kBlockK, k_count);
      const bool add = accumulate || block > 0;
      C* sum = add ? block_sum : out + column;
      const auto add_rows = [&]<int rows>(int64_t k) {
        const bool prefetch = k + rows + kAhead <= k_count;
        for_each_vector<C>(part, [&](int64_t c, auto extent) {
          const W* from = weights + k * stride + column + c;
          Vector<C> v = k == block ? Vector<C>{} : load<C>(sum + c);
#pragma GCC unroll 8
          for (int i = 0; i < rows; ++i) {
            v += splat<C>(left[k + i]) * load<C>(from + i * stride, extent);
          }
          if (prefetch) {
#pragma GCC unroll 8
            for (int i = 0; i < rows; ++i) __builtin_prefetch(from + (i + kAhead) * stride, 0, 2);
          }
          store<C>(sum + c, v);
        });
      };
      int64_t k = block;
      for (; k + kRows <= end; k += kRows) add_rows.template operator()<kRows>(k);
      for (; k < end; ++k) add_rows.template operator()<1>(k);
      for (int64_t c = 0; add && c < part; c += kLanes<C>) {
        store<C>(out + column + c, load<C>(out + column + c) + load<C>(sum + c));
      }
    }
  }
}

}  // namespace ADAPTER_EXT_CPU_LEVEL
}  // namespace adapter_ext::cpu
