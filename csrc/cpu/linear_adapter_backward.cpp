// The backward of linear_adapter on the CPU, in two passes over a range of rows at a time: over
// blocks of rows, for what the rows need of the bottleneck's gradient, then over tiles of columns,
// for the gradients of x and of the weights. A weight's gradient is summed by one thread at a time
// in the order of the adapter's rows.
//
// As in adapter_ext/reference.py: h = down n, z = act(h), o = up z; a leading d is a gradient. The
// norm's row sums need no pass over D: mean(dx̂) = (dh·c1)/D and mean(dx̂ ⊙ x̂) = (dh·(h - c0))/D
// with c1 = down γ, c0 = down β. With dn = dh down: dγ = Σ dn ⊙ x̂, dβ = Σ dn.

#include <algorithm>
#include <cstring>
#include <memory>
#include <span>

#include "cpu/kernels.h"
#include "cpu/linear_adapter_rows.h"

namespace adapter_ext::cpu {
inline namespace ADAPTER_EXT_CPU_LEVEL {
namespace {

// A matrix with a row for each active row, which the first pass makes for the second. It is a left
// operand, and so is its transpose for the sums over rows. Where a step has one element, both are
// the same memory. Where it has two, the transpose is one of pairs of rows: [pairs, columns], whose
// elements are steps; tiles want those of a column together, [columns, pairs].
template <class C, class Product>
class RowMatrix {
 public:
  static constexpr bool kPairs = Product::kElements > 1;
  static constexpr bool kTiles = Product::kStepGroup > 1;
  // Rows summed at a time: a multiple of every register tile and group of steps. Products of pairs
  // are so fast that their sums would be loaded and stored too often with few.
  static constexpr int64_t kRows = kPairs ? 192 : 96;

  // For ranges of at most so many rows and segments.
  RowMatrix(const Range& range, int64_t rows, int64_t segments, int64_t columns, Scratch& scratch)
      : range_(range), stride_(stride(columns)), columns_(padded_columns(columns)) {
    rows_ = scratch.take<C>(rows_size(rows, columns));
    transposed_ = scratch.take<C>(transposed_size(rows, segments, columns));
  }
  static int64_t bytes(int64_t rows, int64_t segments, int64_t columns) {
    return Scratch::bytes<C>(rows_size(rows, columns)) +
           Scratch::bytes<C>(transposed_size(rows, segments, columns));
  }

  // A left operand's row.
  C* row(const Segment& segment, int64_t i) {
    return rows_ + (segment.first_position + i) * stride_;
  }
  const C* row(const Segment& segment, int64_t i) const {
    return rows_ + (segment.first_position + i) * stride_;
  }
  LeftOperand<C> rows(const Segment& segment, int64_t first) const {
    return {row(segment, first), stride_, 1};
  }

  // The kRows rows from the first on, as k of a right operand.
  RightOperand<C> right(const Segment& segment, int64_t first) const {
    static_assert(!kTiles);
    if constexpr (!kPairs) {
      return {row(segment, first), kPanel<C>, stride_};
    } else {
      return {block(segment, first), kPanel<C>, columns_};
    }
  }

  // The transpose of the kRows rows from the first on.
  LeftOperand<C> transposed(const Segment& segment, int64_t first) const {
    if constexpr (!kPairs) {
      return {row(segment, first), 1, stride_};
    } else if constexpr (!kTiles) {
      return {block(segment, first), 1, columns_};
    } else {
      return {block(segment, first), block_steps(segment, first), 1};
    }
  }

  // What a product with the rows from the first on reads: two pieces.
  void pieces(const Segment& segment, int64_t first, Ahead::Piece* to) const {
    const int64_t count = std::min(kRows, segment.rows - first), size = sizeof(C);
    to[0] = {row(segment, first), count * stride_ * size};
    to[1] = {};
    if constexpr (kPairs) {
      to[1] = {block(segment, first), columns_ * block_steps(segment, first) * size};
    }
  }

  // Sets the transpose of some rows, where it is a matrix of its own.
  void set_transposed(const Segment& segment, int64_t first, int64_t count, int64_t columns,
                      const C* from, int64_t from_stride) {
    if constexpr (kTiles) {
      set_tiles(segment, first, count, columns, from, from_stride);
    } else if constexpr (kPairs) {
      set_pairs(segment, first, count, columns, from, from_stride);
    }
  }

 private:
  static constexpr int64_t kMostTileRows = 16;

  // Another task may set the other row of a pair.
  void set_pairs(const Segment& segment, int64_t first, int64_t count, int64_t columns,
                 const C* from, int64_t from_stride) {
    const int64_t end = first + count;
    int64_t in_pair;
    for (int64_t i = first; i < end; i += in_pair, from += in_pair * from_stride) {
      in_pair = i % 2 == 0 && i + 1 < end ? 2 : 1;
      C* to = block(segment, i);
      const bool alone = i % 2 == 0 && i + 1 == segment.rows;
      for_each_vector<C>(columns, [&](int64_t j, auto) {
        const Vector<C> own = load<C>(from + j);
        if (in_pair == 2) {
          Product::store_step(to + j, {own, load<C>(from + from_stride + j)});
        } else if (alone) {
          Product::store_step(to + j, {own, Vector<C>{}});
        } else {
          Product::store_half_step(to + j, own, i % 2 == 1);
        }
      });
    }
  }

  void set_tiles(const Segment& segment, int64_t first, int64_t count, int64_t columns,
                 const C* from, int64_t from_stride) {
    constexpr int lanes = kLanes<C>;
    int64_t part;
    for (int64_t i = first; i < first + count; i += part) {
      const int64_t in_block = i % kRows;
      part = std::min({int64_t{lanes}, first + count - i, kRows - in_block});
      for (int64_t j = 0; j < columns; j += lanes) {
        Vector<C> square[lanes] = {};
        for (int64_t lane = 0; lane < part; ++lane) {
          square[lane] = load<C>(from + (i - first + lane) * from_stride + j);
        }
        transpose<C>(square);
        const int64_t wanted = std::min<int64_t>(lanes, columns - j);
        for (int64_t lane = 0; lane < wanted; ++lane) {
          C* to = block(segment, i - in_block) + (j + lane) * block_steps(segment, i - in_block);
          Product::store(to, in_block, square[lane], PartialVector{part});
        }
      }
    }
    if (first + count == segment.rows) {
      const int64_t start = (segment.rows - 1) / kRows * kRows;
      for (int64_t j = 0; j < columns; ++j) {
        pad_row<C, Product>(block(segment, start) + j * block_steps(segment, start),
                            segment.rows - start);
      }
    }
  }

  static int64_t stride(int64_t columns) { return steps<Product>(columns) + kRowPadding<C>; }
  static int64_t padded_columns(int64_t columns) {
    if (!kTiles) return padded<C>(columns) + kRowPadding<C>;
    return (columns + kMostTileRows - 1) / kMostTileRows * kMostTileRows;
  }
  static int64_t rows_size(int64_t rows, int64_t columns) {
    return (rows + kMostTileRows) * stride(columns);
  }
  static int64_t transposed_size(int64_t rows, int64_t segments, int64_t columns) {
    return kPairs ? first_step(rows, segments) * padded_columns(columns) : 0;
  }

  // Where the steps of the transpose of a segment begin: those before have whole groups of them.
  static int64_t first_step(int64_t position, int64_t segments) {
    return position / Product::kElements + segments * Product::kStepGroup;
  }
  C* block(const Segment& segment, int64_t first) const {
    const int64_t index = &segment - range_.segments.data();
    return transposed_ +
           (first_step(segment.first_position, index) + first / Product::kElements) * columns_;
  }
  static int64_t block_steps(const Segment& segment, int64_t first) {
    return steps<Product>(std::min(kRows, segment.rows - first));
  }

  const Range& range_;
  const int64_t stride_, columns_;
  C *rows_, *transposed_;
};

// A segment's columns are cut into tiles, as wide as their sums over rows stay in a second-level
// cache, so that rows are read in long pieces. All tasks have tiles to do.
template <class C>
struct Tiles {
  int64_t count;
  int64_t columns;

  Tiles(const LinearAdapterBackward& problem, int64_t tasks) {
    constexpr int64_t sum_bytes = 512 << 10, least_columns = 64;  // a multiple of every panel
    const int64_t column_bytes = 2 * padded<C>(problem.largest_bottleneck) * int64_t{sizeof(C)};
    const int64_t fitting = std::max(sum_bytes / column_bytes, least_columns);
    const auto pieces = [&](int64_t size) { return (problem.hidden_size + size - 1) / size; };
    const int64_t wanted = (pieces(fitting) + tasks - 1) / tasks * tasks;
    columns = (pieces(wanted) + least_columns - 1) / least_columns * least_columns;
    count = pieces(columns);
  }

  // Elements that the sums of a tile take: of down's gradient and of up's, of the norm's.
  int64_t sum_stride() const { return columns + kRowPadding<C>; }
  int64_t sum_size(int64_t bottleneck) const {
    return 2 * (padded<C>(bottleneck) + 1) * sum_stride();
  }
};

// The active rows are worked on in ranges, so that what the passes leave for each other takes
// little memory. Ranges are of whole segments, or of a part of one that has too many rows, cut
// where its sums over rows are. Where all sums of a segment stay in the cache, ranges are so short
// that the second pass finds in it what the first has read.
template <class C, class Product>
struct Ranges {
  int64_t most_rows;  // of whole segments
  int64_t part_rows;  // of a segment with more
  bool carry;         // there is more than one tile of sums to keep from range to range

  Ranges(const LinearAdapterBackward& problem, const Tiles<C>& tiles, bool one_task) {
    using Matrix = RowMatrix<C, Product>;
    carry = !one_task || tiles.count > 1;
    part_rows = Matrix::kRows;
    if (carry) {
      constexpr int64_t kept_bytes = 1 << 20, least_rows = 1024;  // entering the passes takes time
      const int64_t row_bytes = 2 * padded<C>(problem.largest_bottleneck) * int64_t{sizeof(C)};
      const int64_t wanted = std::max(kept_bytes / row_bytes, least_rows);
      part_rows *= (wanted + part_rows - 1) / part_rows;
    }
    // The sums of all tiles take as much memory as so many rows.
    most_rows = part_rows + (carry ? problem.hidden_size : 0);
  }

  // Calls body(range) for ranges of these segments.
  template <class Body>
  void for_each(std::span<const Segment> segments, Range& range, Body&& body) const {
    const auto finish = [&] {
      if (range.rows > 0) body();
      range.clear();
    };
    range.clear();
    for (const Segment& segment : segments) {
      if (range.rows + segment.rows > most_rows) finish();
      if (segment.rows <= most_rows) {
        range.add(segment);
        continue;
      }
      for (int64_t first = 0; first < segment.rows; first += part_rows) {
        range.add(segment.part(first, part_rows));
        finish();
      }
    }
    finish();
  }
};

// What the passes over a range leave for each other and for the next range.
template <class C, class Product>
class RowResults {
  using Matrix = RowMatrix<C, Product>;

 public:
  Range range;
  Segment next;            // the rows after the range, to be asked for beforehand; or none
  Matrix hidden_gradient;  // dh
  Matrix activated;        // z
  C* sums;                 // [rows, 2]: pre: mean(dx̂), mean(dx̂ ⊙ x̂); post: the same of û
  C* carried;              // of each tile: the sums of a segment that goes on; or null

  // For ranges of at most so many rows and segments.
  RowResults(const LinearAdapterBackward& p, int64_t rows, int64_t segments, int64_t carried_size)
      : RowResults(rows, segments, p.largest_bottleneck, carried_size,
                   Scratch(2, 2 * Matrix::bytes(rows, segments, p.largest_bottleneck) +
                                  Scratch::bytes<C>(2 * rows) + Scratch::bytes<C>(carried_size))) {}

 private:
  RowResults(int64_t rows, int64_t segments, int64_t columns, int64_t carried_size,
             Scratch&& scratch)
      : next{},
        hidden_gradient(range, rows, segments, columns, scratch),
        activated(range, rows, segments, columns, scratch),
        sums(scratch.take<C>(2 * rows)),
        carried(carried_size > 0 ? scratch.take<C>(carried_size) : nullptr) {}
};

// What one adapter's gradients ask for.
struct Wanted {
  bool hidden_gradient, normalized_gradient, down_sum, up_sum, norm;

  Wanted(const LinearAdapterBackward& p, int64_t adapter, bool pre) {
    const AdapterGradients& g = p.gradients[adapter];
    norm = g.norm_weight || g.norm_bias;
    down_sum = g.down != nullptr;
    up_sum = g.up != nullptr;
    normalized_gradient = p.grad_x || (pre && norm);
    hidden_gradient = normalized_gradient || down_sum;
  }
  bool anything() const { return hidden_gradient || up_sum || norm; }
};

// do = scale · mask ⊙ (dy + κ d) with d = scale · mask ⊙ o the adapter's contribution and
// κ = 2 λ g / B the gradient of its auxiliary loss.
template <class C>
struct OutputGradient {
  Vector<C> scale;
  Vector<C> kappa;

  OutputGradient(const LinearAdapterBackward& p, const Plan& plan, const Segment& segment)
      : scale(splat<C>(static_cast<C>(plan.depth.kept_scale))),
        kappa(splat<C>(static_cast<C>(penalty_slope(p, segment)))) {}

  static double penalty_slope(const LinearAdapterBackward& p, const Segment& segment) {
    if (!p.l2_lambda || !p.grad_aux) return 0.0;
    return 2.0 * static_cast<const C*>(p.l2_lambda)[segment.adapter] *
           static_cast<const C*>(p.grad_aux)[segment.adapter] /
           static_cast<double>(segment.adapter_samples);
  }
  // do of dy, scale · mask, and the output o.
  Vector<C> get(Vector<C> grad_y, Vector<C> masked_scale, Vector<C> o) const {
    return (grad_y + kappa * masked_scale * o) * masked_scale;
  }
  bool penalized() const { return kappa[0] != C(0); }
  // Whether do is dy.
  bool stored(const Dropout& dropout) const {
    return !penalized() && !dropout.active() && scale[0] == C(1);
  }
};

// What the first pass reads of some rows.
template <class X>
int64_t first_pass_pieces(const LinearAdapterBackward& p, const Segment& segment, int64_t first,
                          int64_t count, Ahead::Piece* to) {
  using C = Accumulate<X>;
  const int64_t r = p.largest_bottleneck, width = p.hidden_size;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = Plan::row(segment, p.routing.rows_per_sample, first + i);
    to[2 * i] = {static_cast<const C*>(p.hidden) + row * r, r * int64_t{sizeof(C)}};
    to[2 * i + 1] = {static_cast<const X*>(p.grad_y) + row * width, width * int64_t{sizeof(X)}};
  }
  return 2 * count;
}

inline constexpr int64_t kPartColumns = 256;  // that the second pass works on at a time

// What the second pass reads first of x.
template <class X>
int64_t second_pass_pieces(const LinearAdapterBackward& p, const Segment& segment,
                           Ahead::Piece* to) {
  const int64_t count = std::min(segment.rows, kMostBlockRows);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = Plan::row(segment, p.routing.rows_per_sample, i);
    to[i] = {static_cast<const X*>(p.x) + row * p.hidden_size,
             std::min(kPartColumns, p.hidden_size) * int64_t{sizeof(X)}};
  }
  return count;
}

template <class X, class Product>
class RowPass {
  using C = Accumulate<X>;
  using Weights = WeightOperand<X, Product>;
  static constexpr bool kPairs = Product::kElements > 1;

 public:
  RowPass(const LinearAdapterBackward& problem, const Plan& plan, RowResults<C, Product>& results)
      : p_(problem),
        plan_(plan),
        results_(results),
        dropout_(problem),
        pre_(problem.norm_position == NormPosition::kPre),
        width_(problem.hidden_size),
        block_rows_(block_rows<C, Product>(problem)),
        // The post norm's backward needs a whole row before it can start.
        block_columns_(pre_ ? kColumnBlock : width_),
        stride_(padded<C>(block_columns_) + kRowPadding<C>),
        gradient_stride_(pre_ ? steps<Product>(block_columns_) + kRowPadding<C> : stride_),
        hidden_stride_(scratch_stride<C>(problem)) {
    const int64_t r = std::max<int64_t>(p_.largest_bottleneck, 1);
    const int64_t up_size = Weights::size(width_, r);
    const int64_t up_transposed_size = Weights::size(r, width_);
    Scratch scratch(0, Scratch::bytes<C>(up_size) + Scratch::bytes<C>(up_transposed_size) +
                           2 * Scratch::bytes<C>(width_) + 2 * Scratch::bytes<C>(r) +
                           Scratch::bytes<C>(kMostBlockRows * gradient_stride_) +
                           Scratch::bytes<C>(kMostBlockRows * stride_) +
                           2 * Scratch::bytes<C>(kMostBlockRows * hidden_stride_) +
                           Scratch::bytes<C>(kColumnBlock));
    packed_up_ = scratch.take<C>(up_size);
    packed_up_transposed_ = scratch.take<C>(up_transposed_size);
    norm_weight_ = scratch.take<C>(width_);
    norm_bias_ = scratch.take<C>(width_);
    down_weight_ = scratch.take<C>(r);
    down_bias_ = scratch.take<C>(r);
    gradient_ = scratch.take<C>(kMostBlockRows * gradient_stride_);
    out_ = scratch.take<C>(kMostBlockRows * stride_);
    activated_ = scratch.take<C>(kMostBlockRows * hidden_stride_);
    hidden_gradient_ = scratch.take<C>(kMostBlockRows * hidden_stride_);
    mask_ = scratch.take<C>(kColumnBlock);
  }

  // Some blocks of the range.
  void run(int64_t task, int64_t tasks) {
    for_each_block(results_.range, block_rows_, weight_rows(p_), task, tasks,
                   [&](const Block& block, const Block& next) {
                     const Segment& segment = *block.segment;
                     const Blocks blocks(results_.range, segment, block_rows_, tasks);
                     run_block(block, next, tasks == 1 ? segment.adapter_rows : blocks.rows_in_task,
                               tasks == 1);
                   });
  }

  // A task's share of the bottleneck of a segment: dz of all rows, c1 and c0; then a share of the
  // rows, for what those are needed for. The tasks share so many elements.
  static int64_t shared_elements(const LinearAdapterBackward& problem) {
    return (kMostBlockRows + 2) * scratch_stride<C>(problem);
  }
  void run_gradient(const Segment& segment, int64_t task, int64_t tasks, C* shared) {
    if (!Wanted(p_, segment.adapter, pre_).anything()) return;
    prepare_adapter(segment);
    if (!wants_hidden_) return;
    prepare_weights(segment.rows);
    use(shared);
    const auto [first, columns] = share<C>(view_.bottleneck, task, tasks);
    sum_down(first, columns);
    Ahead nothing;
    project_gradient(segment, 0, segment.rows, first, columns, nothing);
  }
  void run_rows(const Segment& segment, int64_t task, int64_t tasks, C* shared) {
    if (!Wanted(p_, segment.adapter, pre_).anything()) return;
    prepare_adapter(segment);
    const int64_t first = segment.rows * task / tasks;
    const int64_t count = segment.rows * (task + 1) / tasks - first;
    activate_rows(segment, first, count);
    if (!wants_hidden_) return;
    use(shared);
    hidden_gradient_ += first * hidden_stride_;
    finish_hidden(segment, first, count);
  }

 private:
  int64_t row(const Segment& segment, int64_t i) const {
    return Plan::row(segment, p_.routing.rows_per_sample, i);
  }

  // Makes and reads dz, c1 and c0 there.
  void use(C* shared) {
    hidden_gradient_ = shared;
    down_weight_ = shared + kMostBlockRows * hidden_stride_;
    down_bias_ = down_weight_ + hidden_stride_;
  }

  void prepare_adapter(const Segment& segment) {
    view_ = adapter_view(p_.adapters, segment.adapter);
    wants_hidden_ = Wanted(p_, segment.adapter, pre_).hidden_gradient;
    const OutputGradient<C> of_output(p_, plan_, segment);
    wants_out_ = !pre_ || of_output.penalized();
    stored_ = pre_ && of_output.stored(dropout_);
  }

  // For products with so many rows.
  void prepare_weights(int64_t rows) {
    const int64_t r = view_.bottleneck;
    unpack_vector<X>(p_.weight_type, view_.norm_weight, width_, norm_weight_);
    unpack_vector<X>(p_.weight_type, view_.norm_bias, width_, norm_bias_);
    if (wants_hidden_) {
      up_.prepare(p_, view_.up, view_.up_stride, width_, r, false, rows, packed_up_);
    }
    if (wants_out_) {
      up_transposed_.prepare(p_, view_.up, view_.up_stride, r, width_, true, rows,
                             packed_up_transposed_);
    }
  }

  // c1 and c0 for some rows of down.
  void sum_down(int64_t first, int64_t count) {
    if (!pre_) return;
    const auto sum = [&](const auto* down) {
      constexpr int together = 4;  // sums that do not wait for each other
      const int64_t end = first + count;
      int64_t j = first;
      for (; j + together <= end; j += together) sum_rows<together>(down, j);
      for (; j < end; ++j) sum_rows<1>(down, j);
    };
    if constexpr (kPairs) {
      sum(static_cast<const X*>(view_.down));
    } else {
      with_weights<X>(p_.weight_type, view_.down, sum);
    }
  }

  template <int rows, class W>
  void sum_rows(const W* down, int64_t first) {
    Vector<C> weight_sum[rows] = {}, bias_sum[rows] = {};
    const auto add = [&](const auto* norm_weight, const auto* norm_bias) {
      for_each_vector<C>(steps<Product>(width_), [&](int64_t k, auto extent) {
        const Vector<C> weight = Product::load(norm_weight, k, width_, extent);
        const Vector<C> bias = Product::load(norm_bias, k, width_, extent);
#pragma GCC unroll 4
        for (int i = 0; i < rows; ++i) {
          const W* row = down + (first + i) * view_.down_stride;
          const Vector<C> w = Product::load(row, k, width_, extent);
          weight_sum[i] = Product::add(weight_sum[i], w, weight);
          bias_sum[i] = Product::add(bias_sum[i], w, bias);
        }
      });
    };
    if constexpr (kPairs) {
      add(static_cast<const X*>(view_.norm_weight), static_cast<const X*>(view_.norm_bias));
    } else {
      add(norm_weight_, norm_bias_);
    }
    for (int i = 0; i < rows; ++i) {
      down_weight_[first + i] = horizontal_sum<C>(weight_sum[i]);
      down_bias_[first + i] = horizontal_sum<C>(bias_sum[i]);
    }
  }

  void run_block(const Block& block, const Block& next, int64_t rows_in_task, bool alone) {
    const Segment& segment = *block.segment;
    const int64_t first = block.first, count = block.count;
    if (!Wanted(p_, segment.adapter, pre_).anything()) return;
    if (prepared_ != segment.adapter) {
      prepare_adapter(segment);
      prepare_weights(rows_in_task);
      if (wants_hidden_) sum_down(0, view_.bottleneck);
    }
    prepared_ = segment.adapter;
    Ahead ahead;
    if (next.count > 0) {
      ahead.set(next_, first_pass_pieces<X>(p_, *next.segment, next.first, next.count, next_));
    } else if (alone) {
      ahead.set(next_, second_pass_pieces<X>(p_, results_.range.segments[0], next_));
    }
    activate_rows(segment, first, count);
    project_gradient(segment, first, count, 0, view_.bottleneck, ahead);
    if (wants_hidden_) finish_hidden(segment, first, count);
  }

  // Some columns of dz = do up, and what it takes.
  void project_gradient(const Segment& segment, int64_t first, int64_t count, int64_t first_hidden,
                        int64_t hidden_columns, Ahead& ahead) {
    for (int64_t column = 0; column < width_; column += block_columns_) {
      const int64_t columns = std::min(block_columns_, width_ - column);
      if (wants_out_) {
        up_transposed_.multiply(count, 0, view_.bottleneck, column, columns,
                                results_.activated.rows(segment, first), out_, stride_, false,
                                ahead);
      }
      LeftOperand<C> gradient = {gradient_, gradient_stride_, 1};
      if (const C* stored = stored_gradient(segment, first, count, column, columns)) {
        gradient = {stored, width_ / Product::kElements, 1};
      } else if (wants_hidden_ || !pre_) {
        for (int64_t i = 0; i < count; ++i) {
          gradient_row(segment, first + i, column, columns, gradient_ + i * gradient_stride_,
                       out_ + i * stride_);
        }
      }
      if (wants_hidden_) {
        up_.multiply(count, column, columns, first_hidden, hidden_columns, gradient,
                     hidden_gradient_ + first_hidden, hidden_stride_, column > 0, ahead);
      }
    }
  }

  void activate_rows(const Segment& segment, int64_t first, int64_t count) {
    const int64_t r = view_.bottleneck;
    dispatch_activation(p_.activation, [&]<Activation activation>() {
      for (int64_t i = 0; i < count; ++i) {
        const C* h =
            static_cast<const C*>(p_.hidden) + row(segment, first + i) * p_.largest_bottleneck;
        C* z = results_.activated.row(segment, first + i);
        for_each_vector<C>(r, [&](int64_t j, auto extent) {
          const auto v = activate<activation, VectorMath<C>>(load<C>(h + j, extent));
          Product::store(z, j, v, extent);
          if constexpr (kPairs) store<C>(activated_ + i * hidden_stride_ + j, v);
        });
        pad_row<C, Product>(z, r);
        if constexpr (!kPairs) round_operand(p_, z, r);
      }
    });
    results_.activated.set_transposed(segment, first, count, r, activated_, hidden_stride_);
  }

  // Some columns of do where that is a left operand as it is stored, else null.
  const C* stored_gradient(const Segment& segment, int64_t first, int64_t count, int64_t column,
                           int64_t columns) const {
    if (!stored_ || segment.samples.list) return nullptr;
    const X* from = static_cast<const X*>(p_.grad_y) + row(segment, first) * width_ + column;
    if constexpr (std::is_same_v<X, C>) {
      return from;
    } else if constexpr (kPairs) {
      // Steps are whole, and in whole groups; tiles have all their rows.
      if (width_ % Product::kElements == 0 &&
          columns == Product::kElements * steps<Product>(columns) &&
          count % Product::kStepGroup == 0 && reinterpret_cast<uintptr_t>(from) % sizeof(C) == 0) {
        return reinterpret_cast<const C*>(from);
      }
    }
    return nullptr;
  }

  // A left operand's row of do for some columns (pre), or of du (post).
  void gradient_row(const Segment& segment, int64_t i, int64_t column, int64_t columns, C* gradient,
                    C* out) {
    const int64_t at = row(segment, i);
    const X* grad_y = static_cast<const X*>(p_.grad_y) + at * width_ + column;
    if constexpr (kPairs) {
      if (stored_) {
        std::memcpy(gradient, grad_y, static_cast<size_t>(columns) * sizeof(X));
        return pad_row<C, Product>(gradient, columns);
      }
    }
    const OutputGradient<C> of_output(p_, plan_, segment);
    const C mean = pre_ ? C(0) : static_cast<const C*>(p_.mean)[at];
    const C rstd = pre_ ? C(0) : static_cast<const C*>(p_.rstd)[at];
    Vector<C> sum = {}, product_sum = {};
    for (int64_t start = 0; start < columns; start += kColumnBlock) {
      const int64_t part = std::min(kColumnBlock, columns - start);
      const bool masked = dropout_.active();
      if (masked) dropout_.fill(at, column + start, part, mask_);
      for_each_vector<C>(part, [&](int64_t offset, auto extent) {
        const int64_t c = start + offset;
        Vector<C> scale = of_output.scale;
        if (masked) scale *= load<C>(mask_ + offset, extent);
        Vector<C> d = load<C>(grad_y + c, extent);
        if (pre_) {
          d = wants_out_ ? of_output.get(d, scale, load<C>(out + c, extent)) : d * scale;
          return Product::store(gradient, c, d, extent);
        } else {
          const Vector<C> weight = load<C>(norm_weight_ + c, extent);
          const Vector<C> normalized = (load<C>(out + c, extent) - splat<C>(mean)) * splat<C>(rstd);
          const Vector<C> o = normalized * weight + load<C>(norm_bias_ + c, extent);
          d = of_output.get(d, scale, o) * weight;
          sum += d;
          product_sum += d * normalized;
          store<C>(out + c, normalized, extent);
          store<C>(gradient + c, d, extent);
        }
      });
    }
    if (pre_) return pad_row<C, Product>(gradient, columns);
    const C mean_gradient = horizontal_sum<C>(sum) / static_cast<C>(width_);
    const C mean_product = horizontal_sum<C>(product_sum) / static_cast<C>(width_);
    C* sums = results_.sums + 2 * (segment.first_position + i);
    sums[0] = mean_gradient;
    sums[1] = mean_product;
    for_each_vector<C>(columns, [&](int64_t c, auto extent) {
      const Vector<C> d = load<C>(gradient + c, extent);
      const Vector<C> du = splat<C>(rstd) * (d - splat<C>(mean_gradient) -
                                             load<C>(out + c, extent) * splat<C>(mean_product));
      Product::store(gradient, c, du, extent);
    });
    pad_row<C, Product>(gradient, columns);
  }

  // dh = dz ⊙ act'(h), and the norm's sums.
  void finish_hidden(const Segment& segment, int64_t first, int64_t count) {
    const int64_t r = view_.bottleneck;
    dispatch_activation(p_.activation, [&]<Activation activation>() {
      for (int64_t i = 0; i < count; ++i) {
        const C* h =
            static_cast<const C*>(p_.hidden) + row(segment, first + i) * p_.largest_bottleneck;
        const int64_t position = segment.first_position + first + i;
        Vector<C> sum = {}, product_sum = {};
        C* dz = hidden_gradient_ + i * hidden_stride_;
        C* dh = results_.hidden_gradient.row(segment, first + i);
        for_each_vector<C>(r, [&](int64_t j, auto extent) {
          const Vector<C> own = load<C>(h + j, extent);
          const Vector<C> v = Product::round(
              activation_gradient<activation, VectorMath<C>>(own, load<C>(dz + j, extent)));
          if (pre_) {
            sum += v * load<C>(down_weight_ + j, extent);
            product_sum += v * (own - load<C>(down_bias_ + j, extent));
          }
          Product::store(dh, j, v, extent);
          if constexpr (kPairs) store<C>(dz + j, v);
        });
        pad_row<C, Product>(dh, r);
        if (pre_) {
          results_.sums[2 * position] = horizontal_sum<C>(sum) / static_cast<C>(width_);
          results_.sums[2 * position + 1] = horizontal_sum<C>(product_sum) / static_cast<C>(width_);
        }
      }
    });
    results_.hidden_gradient.set_transposed(segment, first, count, r, hidden_gradient_,
                                            hidden_stride_);
  }

  const LinearAdapterBackward& p_;
  const Plan& plan_;
  RowResults<C, Product>& results_;
  const Dropout dropout_;
  const bool pre_;
  const int64_t width_, block_rows_, block_columns_, stride_, gradient_stride_, hidden_stride_;
  int64_t prepared_ = -1;  // an adapter
  AdapterView view_;
  bool wants_hidden_, wants_out_;
  bool stored_;  // do is dy
  Ahead::Piece next_[2 * kMostBlockRows];
  Weights up_, up_transposed_;
  C *packed_up_, *packed_up_transposed_, *norm_weight_, *norm_bias_, *down_weight_, *down_bias_,
      *gradient_, *out_, *activated_, *hidden_gradient_, *mask_;
};

template <class X, class Product>
class ColumnPass {
  using C = Accumulate<X>;
  using Weights = WeightOperand<X, Product>;
  static constexpr bool kPairs = Product::kElements > 1;
  static constexpr bool kTiles = Product::kStepGroup > 1;

  static constexpr int64_t kRows = RowMatrix<C, Product>::kRows;

 public:
  ColumnPass(const LinearAdapterBackward& problem, const Plan& plan,
             const RowResults<C, Product>& results, const Tiles<C>& tiles, bool streams)
      : p_(problem),
        plan_(plan),
        results_(results),
        tiles_(tiles),
        dropout_(problem),
        pre_(problem.norm_position == NormPosition::kPre),
        width_(problem.hidden_size),
        sum_stride_(tiles.sum_stride()),
        streams_(streams) {
    const int64_t weights = Weights::size(p_.largest_bottleneck, tiles.columns);
    const int64_t operand = steps<Product>(kRows) * kPartStride;
    Scratch scratch(
        1, 2 * Scratch::bytes<C>(weights) +
               Scratch::bytes<C>(tiles.sum_size(problem.largest_bottleneck)) +
               2 * Scratch::bytes<C>(operand) + 2 * Scratch::bytes<C>(kRows * kPartStride) +
               2 * Scratch::bytes<C>(sum_stride_) + 2 * Scratch::bytes<C>(kPartColumns));
    packed_down_ = scratch.take<C>(weights);
    packed_up_ = scratch.take<C>(weights);
    own_sums_ = scratch.take<C>(tiles.sum_size(problem.largest_bottleneck));
    x_ = scratch.take<C>(operand);
    gradient_ = scratch.take<C>(operand);
    out_ = scratch.take<C>(kRows * kPartStride);
    product_ = scratch.take<C>(kRows * kPartStride);
    norm_weight_ = scratch.take<C>(sum_stride_);
    norm_bias_ = scratch.take<C>(sum_stride_);
    for (C*& mask : masks_) mask = scratch.take<C>(kPartColumns);
  }

  // Some tiles of the range's segments, of about equal cost for each task: of all segments those of
  // the same columns follow each other, as most of the rows may be of one segment.
  void run(int64_t task, int64_t tasks) {
    const Range& range = results_.range;
    const int64_t segments = static_cast<int64_t>(range.segments.size()), fixed = weight_rows(p_);
    const int64_t total = (range.rows + fixed * segments) * tiles_.count;
    int64_t cost = 0;
    Tile ready = {};
    const auto finish = [&] {
      if (ready.segment) column_tile(*ready.segment, ready.column);
    };
    for (int64_t column = 0; column < width_; column += tiles_.columns) {
      for (const Segment& segment : range.segments) {
        const int64_t own = segment.rows + fixed;
        if ((2 * cost + own) * tasks / (2 * total) == task) {
          following_ = {&segment, column};
          finish();
          ready = following_;
        }
        cost += own;
      }
    }
    following_ = {};
    finish();
    finish_streams();
  }

 private:
  // Rows that are finished together: the norm's sums are loaded and stored once for them.
  static constexpr int64_t kTogether = 4;
  // Rows of a part's buffers do not fall into the same cache sets.
  static constexpr int64_t kPartStride = kPartColumns + kRowPadding<C>;

  // A segment's columns from `column` on.
  struct Tile {
    const Segment* segment;
    int64_t column;
  };

  // Some columns of a tile, some rows of a segment.
  struct Part {
    const Segment& segment;
    int64_t first, count;     // rows
    int64_t column, columns;  // of the hidden size
    int64_t offset;           // of the columns in their tile
  };

  void column_tile(const Segment& segment, int64_t column) {
    const Wanted wanted(p_, segment.adapter, pre_);
    if (!wanted.anything()) return;
    view_ = adapter_view(p_.adapters, segment.adapter);
    const OutputGradient<C> of_output(p_, plan_, segment);
    const int64_t r = view_.bottleneck, columns = std::min(tiles_.columns, width_ - column);
    const bool wants_out = !pre_ || of_output.penalized();
    const bool wants_gradient = wanted.up_sum || (!pre_ && wanted.norm);
    const AdapterGradients& gradients = p_.gradients[segment.adapter];
    const int64_t matrix_size = padded<C>(p_.largest_bottleneck) * sum_stride_;
    C* own_sums = own_sums_;
    if (results_.carried && segment.rows < segment.adapter_rows) {
      own_sums =
          results_.carried + column / tiles_.columns * tiles_.sum_size(p_.largest_bottleneck);
    }
    const Sums down_sum =
        sums(segment, gradients.down, column, width_, columns, own_sums, sum_stride_);
    const Sums up_sum = sums(segment, gradients.up, column * r, r, r, own_sums + matrix_size,
                             kTiles ? sum_stride_ : padded<C>(r));
    norm_weight_sum_ = own_sums + 2 * matrix_size;
    norm_bias_sum_ = norm_weight_sum_ + sum_stride_;
    const auto shifted = [&](const void* matrix, int64_t elements) {
      return static_cast<const void*>(static_cast<const char*>(matrix) +
                                      elements * size_of(p_.weight_type));
    };
    const int64_t tile = column / tiles_.columns;
    if (prepared_adapter_ != segment.adapter || prepared_tile_ != tile) {
      prepared_adapter_ = segment.adapter;
      prepared_tile_ = tile;
      unpack_vector<X>(p_.weight_type, shifted(view_.norm_weight, column), columns, norm_weight_);
      unpack_vector<X>(p_.weight_type, shifted(view_.norm_bias, column), columns, norm_bias_);
      if (wanted.normalized_gradient) {
        down_.prepare(p_, shifted(view_.down, column), view_.down_stride, r, columns, false,
                      segment.adapter_rows, packed_down_);
      }
      if (wants_out && wants_gradient) {
        up_.prepare(p_, shifted(view_.up, column * view_.up_stride), view_.up_stride, r, columns,
                    true, segment.adapter_rows, packed_up_);
      }
    }
    if (segment.is_first()) std::fill(norm_weight_sum_, norm_bias_sum_ + sum_stride_, C(0));
    for (int64_t first = 0; first < segment.rows; first += kRows) {
      const int64_t count = std::min(kRows, segment.rows - first);
      const int64_t row_steps = steps<Product>(count);
      const bool goes_on = segment.first_row + first > 0;
      // A product over these rows, to the sums from an element on.
      const auto add = [&](int64_t sum_rows, int64_t sum_columns, const LeftOperand<C>& left,
                           const RightOperand<C>& right, const Sums& sums, int64_t element,
                           Ahead& ahead) {
        if constexpr (kRounds) {
          if (sums.rounded) {
            return multiply<C, Product>(sum_rows, sum_columns, row_steps, left, right,
                                        sums.rounded + element, sums.stride, sums.first, ahead);
          }
        }
        multiply<C, Product>(sum_rows, sum_columns, row_steps, left, right, sums.data + element,
                             sums.stride, goes_on ? Into::kSum : sums.first, ahead);
      };
      for (int64_t offset = 0; offset < columns; offset += kPartColumns) {
        const Part part = {
            segment, first, count, column + offset, std::min(kPartColumns, columns - offset),
            offset};
        Ahead ahead = after(part);
        if (wants_gradient) {
          if (wants_out) {
            up_.multiply(count, 0, r, offset, part.columns, results_.activated.rows(segment, first),
                         out_, kPartStride, false, ahead);
          }
          load_gradient(part, of_output);
        }
        if (wanted.up_sum) {
          if constexpr (kTiles) {  // d_upᵀ [r, columns] += zᵀ du
            add(r, part.columns, results_.activated.transposed(segment, first),
                {gradient_, kPanel<C>, kPartStride}, up_sum, offset, ahead);
          } else {  // d_up [columns, r] += duᵀ z
            add(part.columns, r, {gradient_, 1, kPartStride},
                results_.activated.right(segment, first), up_sum, offset * up_sum.stride, ahead);
          }
        }
        if (wanted.down_sum) {  // d_down [r, columns] += dhᵀ n
          load_x(part);
          add(r, part.columns, results_.hidden_gradient.transposed(segment, first),
              {x_, kPanel<C>, kPartStride}, down_sum, offset, ahead);
        }
        if (wanted.normalized_gradient) {
          down_.multiply(count, 0, r, offset, part.columns,
                         results_.hidden_gradient.rows(segment, first), product_, kPartStride,
                         false, ahead);
          finish_rows(part, pre_ && wanted.norm);
        }
      }
    }
    if (!segment.is_last()) return;
    if (p_.weight_type == DataType::kFloat32) {
      write<float>(gradients, down_sum, up_sum, r, column, columns);
    } else {
      write<X>(gradients, down_sum, up_sum, r, column, columns);
    }
  }

  // Where a weight's gradient is summed: in its own memory if that is a matter of one product and
  // of whole vectors of its type, else in scratch. A product of pairs can round its result.
  struct Sums {
    C* data;
    int64_t stride;
    bool in_place;
    Into first;  // what becomes of the first rows' products
    X* rounded;  // in place of data, or null
  };
  static constexpr bool kRounds = kPairs && !kTiles;
  Sums sums(const Segment& segment, void* gradient, int64_t first, int64_t stride, int64_t columns,
            C* scratch, int64_t scratch_stride) const {
    const bool converts = (p_.weight_type == DataType::kFloat32) != std::is_same_v<C, float>;
    if (!gradient || segment.adapter_rows > kRows || (converts && !kRounds) ||
        columns % kLanes<C> != 0) {
      return {scratch, scratch_stride, false, Into::kNew, nullptr};
    }
    // Those of all adapters count, which push each other out of the caches.
    const int64_t adapters = static_cast<int64_t>(plan_.active.segments.size());
    const int64_t all_rows = adapters * view_.bottleneck * width_ / stride;
    const auto into = [&]<class Out>(const Out* to) {
      return streams<Out>(to, all_rows, stride) ? Into::kStream : Into::kNew;
    };
    if (converts) {
      X* const to = static_cast<X*>(gradient);
      return {nullptr, stride, true, into(to), to + first};
    }
    C* const to = static_cast<C*>(gradient);
    return {to + first, stride, true, into(to), nullptr};
  }

  int64_t row(const Segment& segment, int64_t i) const {
    return Plan::row(segment, p_.routing.rows_per_sample, i);
  }

  // What the part after this one reads: in the same rows, in the next, or in the following tile. A
  // part of a row is too short for the hardware to see where the next one is.
  Ahead after(const Part& part) {
    Tile tile = {&part.segment, part.column - part.offset};
    int64_t first = part.first, offset = part.offset + kPartColumns, pieces = 0;
    if (offset >= std::min(tiles_.columns, width_ - tile.column)) {
      offset = 0;
      first += kRows;
      if (first >= part.segment.rows) {
        first = 0;
        tile = following_;
        if (!tile.segment) {
          const int64_t count = std::min(results_.next.rows, kMostBlockRows);
          Ahead ahead;
          ahead.set(next_, first_pass_pieces<X>(p_, results_.next, 0, count, next_));
          return ahead;
        }
      }
      results_.activated.pieces(*tile.segment, first, next_);
      results_.hidden_gradient.pieces(*tile.segment, first, next_ + 2);
      pieces = 4;
    }
    const int64_t column = tile.column + offset;
    const Part next = {*tile.segment,
                       first,
                       std::min(kRows, tile.segment->rows - first),
                       column,
                       std::min({kPartColumns, tiles_.columns - offset, width_ - column}),
                       offset};
    for (const void* matrix : {p_.grad_y, p_.x}) {
      // The first pass has just read dy if the range has no other rows.
      if (matrix == p_.grad_y && next.segment.rows <= kRows) continue;
      for (int64_t i = 0; i < next.count; ++i) {
        next_[pieces++] = {static_cast<const X*>(matrix) + at(next, i),
                           next.columns * int64_t{sizeof(X)}};
      }
    }
    Ahead ahead;
    ahead.set(next_, pieces);
    return ahead;
  }

  // Where a row of a part starts in x and in what has its shape.
  int64_t at(const Part& part, int64_t i) const {
    return row(part.segment, part.first + i) * width_ + part.column;
  }

  // Makes a right operand, its k the rows: row(i) is a function (column, extent) → values.
  template <class Row>
  void load_right(const Part& part, C* to, Row&& row) const {
    constexpr int in_step = Product::kElements;
    const int64_t whole = part.count / in_step, all = steps<Product>(part.count);
    for (int64_t step = 0; step < all; ++step, to += kPartStride) {
      const auto store = [&](const auto&... rows) {
        for_each_vector<C>(part.columns, [&](int64_t c, auto extent) {
          Product::store_step(to + c, {rows(c, extent)...});
        });
      };
      if constexpr (in_step == 1) {
        store(row(step));
      } else if (step < whole) {
        const auto first = row(2 * step);
        store(first, row(2 * step + 1));
      } else if (2 * step < part.count) {
        store(row(2 * step), [](int64_t, auto) { return Vector<C>{}; });
      } else {
        std::fill(to, to + kPartStride, C(0));
      }
    }
  }

  // n = LN(x) (pre) or x (post).
  void load_x(const Part& part) {
    const C *weight = norm_weight_ + part.offset, *bias = norm_bias_ + part.offset;
    load_right(part, x_, [&](int64_t i) {
      const int64_t x_row = row(part.segment, part.first + i);
      const X* from = static_cast<const X*>(p_.x) + at(part, i);
      const Vector<C> mean = splat<C>(pre_ ? static_cast<const C*>(p_.mean)[x_row] : C(0));
      const Vector<C> rstd = splat<C>(pre_ ? static_cast<const C*>(p_.rstd)[x_row] : C(1));
      const bool pre = pre_;
      return [=](int64_t c, auto extent) {
        const Vector<C> v = load<C>(from + c, extent);
        if (!pre) return v;
        return (v - mean) * rstd * load<C>(weight + c, extent) + load<C>(bias + c, extent);
      };
    });
  }

  // do (pre) or du (post), and the post norm's own gradients.
  void load_gradient(const Part& part, const OutputGradient<C>& of_output) {
    if constexpr (kPairs) {
      if (pre_ && of_output.stored(dropout_)) return load_stored_gradient(part);
    }
    const bool masked = dropout_.active();
    const bool penalized = of_output.penalized();
    const C *norm_weight = norm_weight_ + part.offset, *norm_bias = norm_bias_ + part.offset;
    C *weight_sum = norm_weight_sum_ + part.offset, *bias_sum = norm_bias_sum_ + part.offset;
    load_right(part, gradient_, [&](int64_t i) {
      const int64_t x_row = row(part.segment, part.first + i);
      const X* grad_y = static_cast<const X*>(p_.grad_y) + at(part, i);
      const C* out = out_ + i * kPartStride;
      C* mask = masks_[i % Product::kElements];
      if (masked) dropout_.fill(x_row, part.column, part.columns, mask);
      const C* sums = results_.sums + 2 * (part.segment.first_position + part.first + i);
      const Vector<C> mean = splat<C>(pre_ ? C(0) : static_cast<const C*>(p_.mean)[x_row]);
      const Vector<C> rstd = splat<C>(pre_ ? C(0) : static_cast<const C*>(p_.rstd)[x_row]);
      return [=, this](int64_t c, auto extent) -> Vector<C> {
        Vector<C> d = load<C>(grad_y + c, extent);
        Vector<C> scale = of_output.scale;
        if (masked) scale *= load<C>(mask + c, extent);
        if (pre_) {
          return penalized ? of_output.get(d, scale, load<C>(out + c, extent)) : d * scale;
        }
        const Vector<C> weight = load<C>(norm_weight + c, extent);
        const Vector<C> normalized = (load<C>(out + c, extent) - mean) * rstd;
        const Vector<C> o = normalized * weight + load<C>(norm_bias + c, extent);
        d = of_output.get(d, scale, o);
        store<C>(weight_sum + c, load<C>(weight_sum + c, extent) + d * normalized, extent);
        store<C>(bias_sum + c, load<C>(bias_sum + c, extent) + d, extent);
        return rstd * (d * weight - splat<C>(sums[0]) - normalized * splat<C>(sums[1]));
      };
    });
  }

  // do where it is dy, which needs no rounding.
  void load_stored_gradient(const Part& part) {
    const auto grad_y = [&](int64_t i) {
      if (i >= part.count) return static_cast<const X*>(nullptr);
      return static_cast<const X*>(p_.grad_y) + at(part, i);
    };
    for (int64_t step = 0; step < steps<Product>(part.count); ++step) {
      const X *even = grad_y(2 * step), *odd = grad_y(2 * step + 1);
      C* to = gradient_ + step * kPartStride;
      for_each_vector<C>(part.columns, [&](int64_t c, auto extent) {
        store<C>(to + c,
                 Product::load_step(even ? even + c : nullptr, odd ? odd + c : nullptr, extent));
      });
    }
  }

  // From dn (post: dx without the residual) the gradients of x and of the pre norm.
  void finish_rows(const Part& part, bool norm) {
    for (int64_t i = 0; i < part.count; i += kTogether) {
      finish_some(part, i, std::min(kTogether, part.count - i), norm);
    }
  }

  // All rows by the same code: another copy, for rows that are left, might be compiled to another
  // rounding.
  void finish_some(const Part& part, int64_t first, int64_t count, bool norm) {
    struct {
      const C* product;
      const X *x, *grad_y;
      X* to;
      Vector<C> mean, rstd, sum, product_sum;
    } rows[kTogether];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t x_row = row(part.segment, part.first + first + i), begin = at(part, first + i);
      const int64_t position = part.segment.first_position + part.first + first + i;
      rows[i] = {product_ + (first + i) * kPartStride,
                 static_cast<const X*>(p_.x) + begin,
                 static_cast<const X*>(p_.grad_y) + begin,
                 p_.grad_x ? static_cast<X*>(p_.grad_x) + begin : nullptr,
                 splat<C>(static_cast<const C*>(p_.mean)[x_row]),
                 splat<C>(static_cast<const C*>(p_.rstd)[x_row]),
                 splat<C>(results_.sums[2 * position]),
                 splat<C>(results_.sums[2 * position + 1])};
    }
    const C* norm_weight = norm_weight_ + part.offset;
    C *weight_sums = norm_weight_sum_ + part.offset, *bias_sums = norm_bias_sum_ + part.offset;
    const bool pre = pre_, residual = p_.residual, streams = streams_, writes = p_.grad_x;
    for_each_vector<C>(part.columns, [&](int64_t c, auto extent) {
      const Vector<C> weight = load<C>(norm_weight + c, extent);
      Vector<C> weight_sum = load<C>(weight_sums + c), bias_sum = load<C>(bias_sums + c);
#pragma GCC unroll 1
      for (int64_t i = 0; i < count; ++i) {
        const auto& own = rows[i];
        Vector<C> d = load<C>(own.product + c, extent);
        if (pre) {
          const Vector<C> normalized = (load<C>(own.x + c, extent) - own.mean) * own.rstd;
          weight_sum += d * normalized;
          bias_sum += d;
          d = own.rstd * (d * weight - own.sum - normalized * own.product_sum);
        }
        if (!writes) continue;
        if (residual) d += load<C>(own.grad_y + c, extent);
        if constexpr (std::is_same_v<decltype(extent), FullVector>) {
          if (streams) {
            stream<C>(own.to + c, d);
            continue;
          }
        }
        store<C>(own.to + c, d, extent);
      }
      if (!norm) return;
      store<C>(weight_sums + c, weight_sum);
      store<C>(bias_sums + c, bias_sum);
    });
  }

  template <class W>
  void write(const AdapterGradients& gradients, const Sums& down_sum, const Sums& up_sum, int64_t r,
             int64_t column, int64_t columns) const {
    if (gradients.down && !down_sum.in_place) {
      write_rows(down_sum.data, down_sum.stride, r, columns,
                 static_cast<W*>(gradients.down) + column, width_);
    }
    if (gradients.up && !up_sum.in_place) {
      W* up = static_cast<W*>(gradients.up) + column * r;
      if constexpr (kTiles) {
        write_transposed(up_sum, r, columns, up);
      } else {
        write_rows(up_sum.data, up_sum.stride, columns, r, up, r);
      }
    }
    const auto write_norm = [&](const C* sum, void* gradient) {
      if (gradient) write_rows(sum, 0, 1, columns, static_cast<W*>(gradient) + column, 0);
    };
    write_norm(norm_weight_sum_, gradients.norm_weight);
    write_norm(norm_bias_sum_, gradients.norm_bias);
  }

  template <class W>
  static void write_rows(const C* from, int64_t from_stride, int64_t rows, int64_t columns, W* to,
                         int64_t to_stride) {
    for (int64_t i = 0; i < rows; ++i, from += from_stride, to += to_stride) {
      for_each_vector<C>(columns, [&](int64_t c, auto extent) {
        store<C>(to + c, load<C>(from + c, extent), extent);
      });
    }
  }

  template <class W>
  static void write_transposed(const Sums& from, int64_t r, int64_t columns, W* up) {
    constexpr int lanes = kLanes<C>;
    for (int64_t c = 0; c < columns; c += lanes) {
      const int64_t rows = std::min<int64_t>(lanes, columns - c);
      for_each_vector<C>(r, [&](int64_t j, auto extent) {
        Vector<C> square[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          square[i] = load<C>(from.data + (j + i) * from.stride + c);
        }
        transpose<C>(square);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if (i < rows) store<C>(up + (c + i) * r + j, square[i], extent);
        }
      });
    }
  }

  const LinearAdapterBackward& p_;
  const Plan& plan_;
  const RowResults<C, Product>& results_;
  const Tiles<C> tiles_;
  const Dropout dropout_;
  const bool pre_;
  const int64_t width_, sum_stride_;
  const bool streams_;
  AdapterView view_;
  Weights down_, up_;
  int64_t prepared_adapter_ = -1, prepared_tile_ = -1;
  Tile following_ = {};  // this task's, after the one that it is at
  C *packed_down_, *packed_up_, *own_sums_, *x_, *out_, *gradient_, *product_, *norm_weight_,
      *norm_bias_;
  C *norm_weight_sum_ = nullptr, *norm_bias_sum_ = nullptr;  // of the tile
  C* masks_[2];
  Ahead::Piece next_[2 * kRows + 4];
};

// Gradients of adapters without active rows are zero.
void clear_unused(const LinearAdapterBackward& p, const Plan& plan, const Parallel& parallel) {
  std::vector<int64_t> unused;
  auto segment = plan.active.segments.begin();
  for (int64_t a = 0; a < p.routing.adapters; ++a) {
    if (segment != plan.active.segments.end() && segment->adapter == a) {
      ++segment;
    } else {
      unused.push_back(a);
    }
  }
  const int64_t count = static_cast<int64_t>(unused.size()), size = size_of(p.weight_type);
  const int64_t most = 2 * (p.largest_bottleneck + 1) * p.hidden_size * size;
  const int64_t tasks = std::min(memory_tasks(count * most, parallel), std::max<int64_t>(count, 1));
  parallel(tasks, [&](int64_t task) {
    for (int64_t i = task * count / tasks; i < (task + 1) * count / tasks; ++i) {
      const AdapterGradients& g = p.gradients[unused[static_cast<size_t>(i)]];
      const int64_t r = adapter_view(p.adapters, unused[static_cast<size_t>(i)]).bottleneck;
      const auto clear = [&](void* to, int64_t elements) {
        if (to) std::memset(to, 0, static_cast<size_t>(elements * size));
      };
      clear(g.norm_weight, p.hidden_size);
      clear(g.norm_bias, p.hidden_size);
      clear(g.down, r * p.hidden_size);
      clear(g.up, r * p.hidden_size);
    }
  });
}

// Both passes over the active rows, each task some adapters whole, so that their weights and rows
// are still in its cache for the second pass. The longest adapter has `longest` rows.
template <class X, class Product>
void run_by_adapters(const LinearAdapterBackward& problem, const Plan& plan, int64_t longest,
                     bool streamed, const Parallel& parallel) {
  using C = Accumulate<X>;
  const std::vector<Segment>& segments = plan.active.segments;
  const int64_t count = static_cast<int64_t>(segments.size()), fixed = weight_rows(problem);
  const Tiles<C> tiles(problem, 1);
  const Ranges<C, Product> ranges(problem, tiles, true);
  const bool carries = ranges.carry && longest > ranges.most_rows;
  const int64_t tasks = std::min(parallel.threads, count);
  parallel(tasks, [&](int64_t task) {
    [[maybe_unused]] const typename Product::Setup setup;
    RowResults<C, Product> results(
        problem, std::min(longest, ranges.most_rows), 1,
        carries ? tiles.count * tiles.sum_size(problem.largest_bottleneck) : 0);
    RowPass<X, Product> rows(problem, plan, results);
    ColumnPass<X, Product> columns(problem, plan, results, tiles, streamed);
    const auto is_own = [&](const Segment& segment) {
      const int64_t before = segment.first_position + fixed * (&segment - segments.data());
      const int64_t middle = 2 * before + segment.rows + fixed;
      return middle * tasks / (2 * (plan.active.rows + fixed * count)) == task;
    };
    auto segment = std::find_if(segments.begin(), segments.end(), is_own);
    while (segment != segments.end()) {
      const auto next = std::find_if(segment + 1, segments.end(), is_own);
      ranges.for_each({&*segment, 1}, results.range, [&] {
        const Segment& part = results.range.segments[0];
        if (!part.is_last()) {
          results.next = segment->part(part.first_row + part.rows, ranges.part_rows);
        } else {
          results.next = next != segments.end() ? *next : Segment{};
        }
        rows.run(0, 1);
        columns.run(0, 1);
      });
      segment = next;
    }
  });
}

// Both passes over the active rows, a range of rows at a time, which all tasks share.
template <class X, class Product>
void run_by_ranges(const LinearAdapterBackward& problem, const Plan& plan, int64_t longest,
                   bool streamed, const Parallel& parallel) {
  using C = Accumulate<X>;
  using Setup = typename Product::Setup;
  using Results = RowResults<C, Product>;
  using Rows = RowPass<X, Product>;
  using Columns = ColumnPass<X, Product>;
  const std::vector<Segment>& segments = plan.active.segments;
  const int64_t count = static_cast<int64_t>(segments.size()), threads = parallel.threads;
  const Tiles<C> tiles(problem, threads);
  const Ranges<C, Product> ranges(problem, tiles, false);
  const bool carries = longest > ranges.most_rows;
  Results results(problem, std::min(plan.active.rows, ranges.most_rows), count,
                  carries ? tiles.count * tiles.sum_size(problem.largest_bottleneck) : 0);
  const bool columns_shared = shares_columns(problem, plan, threads);
  std::unique_ptr<C[]> shared;
  if (columns_shared) shared.reset(new C[static_cast<size_t>(Rows::shared_elements(problem))]);
  ranges.for_each(segments, results.range, [&] {
    const Range& range = results.range;
    if (columns_shared) {
      for (const Segment& segment : range.segments) {
        parallel(threads, [&](int64_t task) {
          [[maybe_unused]] const Setup setup;
          Rows(problem, plan, results).run_gradient(segment, task, threads, shared.get());
        });
        parallel(threads, [&](int64_t task) {
          [[maybe_unused]] const Setup setup;
          Rows(problem, plan, results).run_rows(segment, task, threads, shared.get());
        });
      }
    } else {
      const int64_t row_tasks = std::min(threads, (range.rows + kTileRows - 1) / kTileRows);
      parallel(row_tasks, [&](int64_t task) {
        [[maybe_unused]] const Setup setup;
        Rows(problem, plan, results).run(task, row_tasks);
      });
    }
    const int64_t column_tasks =
        std::min(threads, tiles.count * static_cast<int64_t>(range.segments.size()));
    parallel(column_tasks, [&](int64_t task) {
      [[maybe_unused]] const Setup setup;
      Columns(problem, plan, results, tiles, streamed).run(task, column_tasks);
    });
  });
}

template <class X, class Product>
void run_passes(const LinearAdapterBackward& problem, const Plan& plan, const Parallel& parallel) {
  int64_t longest = 0;
  for (const Segment& segment : plan.active.segments) longest = std::max(longest, segment.rows);
  const int64_t count = static_cast<int64_t>(plan.active.segments.size());
  const bool many = count >= 2 * parallel.threads && longest * parallel.threads <= plan.active.rows;
  const bool streamed =
      problem.grad_x && streams<X>(problem.grad_x, plan.active.rows, problem.hidden_size);
  if (parallel.threads == 1 || many) {
    run_by_adapters<X, Product>(problem, plan, longest, streamed, parallel);
  } else {
    run_by_ranges<X, Product>(problem, plan, longest, streamed, parallel);
  }
}

template <class X>
void backward(const LinearAdapterBackward& problem, const Parallel& parallel) {
  Plan plan;
  plan.build(problem);
  clear_unused(problem, plan, parallel);
  if (problem.grad_x) {
    for_each_untouched(problem, plan, parallel, [&](int64_t row, int64_t count) {
      const int64_t width = problem.hidden_size;
      std::copy_n(static_cast<const X*>(problem.grad_y) + row * width, count * width,
                  static_cast<X*>(problem.grad_x) + row * width);
    });
  }
  if (plan.active.rows == 0) return;
  with_product<X>(problem,
                  [&]<class Product>() { run_passes<X, Product>(problem, plan, parallel); });
}
}  // namespace

void linear_adapter_backward(const LinearAdapterBackward& problem, const Parallel& parallel) {
#if defined(__AVX512BF16__)
  if (problem.data_type != DataType::kBFloat16) {
    return avx512::linear_adapter_backward(problem, parallel);
  }
  backward<BFloat16>(problem, parallel);
#else
  switch (problem.data_type) {
    case DataType::kFloat64: return backward<double>(problem, parallel);
    case DataType::kFloat32: return backward<float>(problem, parallel);
    case DataType::kBFloat16: return backward<BFloat16>(problem, parallel);
    case DataType::kFloat16: return backward<Float16>(problem, parallel);
  }
#endif
}

}  // namespace ADAPTER_EXT_CPU_LEVEL
}  // namespace adapter_ext::cpu
