// The backward of linear_adapter on the CPU, in two passes: over blocks of rows, for what the rows
// need of the bottleneck's gradient, then over tiles of columns, for the gradients of x and of the
// weights. A weight's gradient is summed by one thread in the order of the adapter's rows.
//
// As in adapter_ext/reference.py: h = down n, z = act(h), o = up z; a leading d is a gradient. The
// norm's row sums need no pass over D: mean(dx̂) = (dh·c1)/D and mean(dx̂ ⊙ x̂) = (dh·(h - c0))/D
// with c1 = down γ, c0 = down β. With dn = dh down: dγ = Σ dn ⊙ x̂, dβ = Σ dn, and
// d_down = γ ⊙ (dhᵀ x̂) + (Σ dh) ⊗ β.

#include <cstring>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/linear_adapter_rows.h"

namespace adapter_ext::cpu {
inline namespace ADAPTER_EXT_CPU_LEVEL {
namespace {

// What the first pass leaves for the second, by active row. The two matrices are kept as the second
// pass multiplies with them: each block of kRows rows of a segment as a right operand in panels.
template <class C>
struct RowResults {
  static constexpr int64_t kRows = 120;  // a multiple of every register tile

  int64_t stride;      // elements of a row, whole panels
  C* hidden_gradient;  // dh
  C* activated;        // z
  C* sums;             // [active rows, 2]: pre: mean(dx̂), mean(dx̂ ⊙ x̂); post: the same of û

  struct Row {
    C* data;
    int64_t panel_stride;

    // Calls transform as transform_row does, for the row `from`, and stores what it returns.
    template <class Transform>
    void set(const C* from, int64_t count, Transform&& transform) const {
      for (int64_t first = 0, at = 0; first < count; first += kPanel<C>, at += panel_stride) {
        transform_row<C>(from + first, std::min(kPanel<C>, count - first), data + at,
                         [&](int64_t j, auto value, auto extent) {
                           return transform(first + j, value, extent);
                         });
      }
    }
  };

  // The i-th active row of a segment.
  Row row(C* matrix, const Segment& segment, int64_t i) const {
    const int64_t first = i / kRows * kRows;
    return {matrix + (segment.first_position + first) * stride + (i - first) * kPanel<C>,
            std::min(kRows, segment.rows - first) * kPanel<C>};
  }
};

// What one adapter's gradients ask for.
struct Wanted {
  bool hidden_gradient, input_gradient, down_sum, up_sum, norm;

  Wanted(const LinearAdapterBackward& p, int64_t adapter, bool pre) {
    const AdapterGradients& g = p.gradients[adapter];
    norm = g.norm_weight || g.norm_bias;
    down_sum = g.down != nullptr;
    up_sum = g.up != nullptr;
    input_gradient = p.grad_x || (pre && norm);
    hidden_gradient = input_gradient || down_sum;
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
      : scale(splat<C>(static_cast<C>(plan.depth_scale))),
        kappa(splat<C>(static_cast<C>(penalty_slope(p, segment)))) {}

  static double penalty_slope(const LinearAdapterBackward& p, const Segment& segment) {
    if (!p.l2_lambda || !p.grad_aux) return 0.0;
    return 2.0 * static_cast<const C*>(p.l2_lambda)[segment.adapter] *
           static_cast<const C*>(p.grad_aux)[segment.adapter] /
           static_cast<double>(segment.adapter_samples);
  }
  bool penalized() const { return kappa[0] != C(0); }
};

template <class X>
class RowPass {
  using C = Accumulate<X>;

 public:
  RowPass(const LinearAdapterBackward& problem, const Plan& plan, const RowResults<C>& results)
      : p_(problem),
        plan_(plan),
        results_(results),
        dropout_(problem),
        pre_(problem.norm_position == NormPosition::kPre),
        width_(problem.hidden_size),
        block_rows_(block_rows<C>(problem.hidden_size)),
        // The post norm's backward needs a whole row before it can start.
        block_columns_(pre_ ? kColumnBlock : width_),
        stride_(padded<C>(block_columns_) + kRowPadding<C>),
        hidden_stride_(padded<C>(std::max<int64_t>(problem.hidden_stride, 1)) + kRowPadding<C>) {
    const int64_t r = std::max<int64_t>(p_.hidden_stride, 1);
    const int64_t up_size = WeightOperand<X>::size(width_, r);
    const int64_t up_transposed_size = WeightOperand<X>::size(r, width_);
    const int64_t tile = kMostBlockRows * stride_;
    Scratch scratch(0, Scratch::bytes<C>(up_size) + Scratch::bytes<C>(up_transposed_size) +
                           2 * Scratch::bytes<C>(width_) + 2 * Scratch::bytes<C>(r) +
                           2 * Scratch::bytes<C>(tile) +
                           2 * Scratch::bytes<C>(kMostBlockRows * hidden_stride_) +
                           Scratch::bytes<C>(kColumnBlock));
    packed_up_ = scratch.take<C>(up_size);
    packed_up_transposed_ = scratch.take<C>(up_transposed_size);
    norm_weight_ = scratch.take<C>(width_);
    norm_bias_ = scratch.take<C>(width_);
    down_weight_ = scratch.take<C>(r);
    down_bias_ = scratch.take<C>(r);
    gradient_ = scratch.take<C>(tile);
    out_ = scratch.take<C>(tile);
    activated_ = scratch.take<C>(kMostBlockRows * hidden_stride_);
    hidden_gradient_ = scratch.take<C>(kMostBlockRows * hidden_stride_);
    mask_ = scratch.take<C>(kColumnBlock);
  }

  // Some blocks of all segments.
  void run(int64_t task, int64_t tasks) {
    for_each_block(plan_, block_rows_, task, tasks,
                   [&](const Segment& segment, int64_t first, int64_t count) {
                     block(segment, Blocks(plan_, segment, block_rows_, tasks), first, count);
                   });
  }

  // All rows of one segment.
  void run(const Segment& segment) {
    const Blocks blocks(plan_, segment, block_rows_, 1);
    for (int64_t i = 0; i < blocks.count; ++i) {
      const int64_t first = i * segment.rows / blocks.count;
      block(segment, blocks, first, (i + 1) * segment.rows / blocks.count - first);
    }
  }

 private:
  int64_t row(const Segment& segment, int64_t i) const {
    return Plan::row(segment, p_.routing.rows_per_sample, i);
  }

  void prepare_adapter(const Segment& segment, int64_t rows) {
    view_ = adapter_view(p_.adapters, segment.adapter);
    const int64_t r = view_.bottleneck;
    unpack_vector<X>(p_.weight_type, view_.norm_weight, width_, norm_weight_);
    unpack_vector<X>(p_.weight_type, view_.norm_bias, width_, norm_bias_);
    wants_hidden_ = Wanted(p_, segment.adapter, pre_).hidden_gradient;
    wants_out_ = !pre_ || OutputGradient<C>(p_, plan_, segment).penalized();
    if (wants_hidden_) {
      up_.prepare(p_, view_.up, view_.up_stride, width_, r, false, rows, packed_up_);
    }
    if (wants_out_) {
      up_transposed_.prepare(p_, view_.up, view_.up_stride, r, width_, true, rows,
                             packed_up_transposed_);
    }
    if (pre_ && wants_hidden_) {
      with_weights<X>(p_.weight_type, view_.down, [&](const auto* down) {
        for (int64_t j = 0; j < r; ++j) {
          Vector<C> weight_sum = {}, bias_sum = {};
          for_each_vector<C>(width_, [&](int64_t c, auto extent) {
            const Vector<C> w = load<C>(down + j * view_.down_stride + c, extent);
            weight_sum += w * load<C>(norm_weight_ + c, extent);
            bias_sum += w * load<C>(norm_bias_ + c, extent);
          });
          down_weight_[j] = horizontal_sum<C>(weight_sum);
          down_bias_[j] = horizontal_sum<C>(bias_sum);
        }
      });
    }
  }

  void block(const Segment& segment, const Blocks& blocks, int64_t first, int64_t count) {
    if (!Wanted(p_, segment.adapter, pre_).anything()) return;
    if (prepared_ != &segment) prepare_adapter(segment, blocks.rows_in_task);
    prepared_ = &segment;
    activate_rows(segment, first, count);
    for (int64_t column = 0; column < width_; column += block_columns_) {
      const int64_t columns = std::min(block_columns_, width_ - column);
      if (wants_out_) {
        up_transposed_.multiply(count, 0, view_.bottleneck, column, columns,
                                {activated_, hidden_stride_, 1}, out_, stride_, false);
      }
      LeftOperand<C> gradient = {gradient_, stride_, 1};
      if (const C* stored = stored_gradient(segment, first)) {
        gradient = {stored + column, width_, 1};
      } else {
        for (int64_t i = 0; i < count; ++i) {
          gradient_row(segment, first + i, column, columns, gradient_ + i * stride_,
                       out_ + i * stride_);
        }
      }
      if (wants_hidden_) {
        up_.multiply(count, column, columns, 0, view_.bottleneck, gradient, hidden_gradient_,
                     hidden_stride_, column > 0);
      }
    }
    if (wants_hidden_) finish_hidden(segment, first, count);
  }

  void activate_rows(const Segment& segment, int64_t first, int64_t count) {
    const int64_t r = view_.bottleneck;
    dispatch_activation(p_.activation, [&]<Activation activation>() {
      for (int64_t i = 0; i < count; ++i) {
        const C* h = static_cast<const C*>(p_.hidden) + row(segment, first + i) * p_.hidden_stride;
        C* z = activated_ + (wants_out_ ? i * hidden_stride_ : 0);
        transform_row<C>(
            h, r, z, [](int64_t, auto v, auto) { return activate<activation, VectorMath<C>>(v); });
        round_operand(p_, z, r);
        results_.row(results_.activated, segment, first + i).set(z, r, [](int64_t, auto v, auto) {
          return v;
        });
      }
    });
  }

  // do of the rows from the first on where it is dy as it is stored, else null.
  const C* stored_gradient(const Segment& segment, int64_t first) const {
    if constexpr (std::is_same_v<X, C>) {
      const bool changed = !pre_ || wants_out_ || dropout_.active() || plan_.depth_scale != 1.0;
      if (!changed && !segment.samples.list) {
        return static_cast<const C*>(p_.grad_y) + row(segment, first) * width_;
      }
    }
    return nullptr;
  }

  // do of some columns (pre), or du of a whole row (post).
  void gradient_row(const Segment& segment, int64_t i, int64_t column, int64_t columns, C* gradient,
                    C* out) {
    const int64_t at = row(segment, i);
    const X* grad_y = static_cast<const X*>(p_.grad_y) + at * width_ + column;
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
          if (wants_out_) d += of_output.kappa * scale * load<C>(out + c, extent);
          d *= scale;
        } else {
          const Vector<C> weight = load<C>(norm_weight_ + c, extent);
          const Vector<C> normalized = (load<C>(out + c, extent) - splat<C>(mean)) * splat<C>(rstd);
          const Vector<C> o = normalized * weight + load<C>(norm_bias_ + c, extent);
          d = (d + of_output.kappa * scale * o) * scale * weight;
          sum += d;
          product_sum += d * normalized;
          store<C>(out + c, normalized, extent);
        }
        store<C>(gradient + c, d, extent);
      });
    }
    if (pre_) return;
    const C mean_gradient = horizontal_sum<C>(sum) / static_cast<C>(width_);
    const C mean_product = horizontal_sum<C>(product_sum) / static_cast<C>(width_);
    C* sums = results_.sums + 2 * (segment.first_position + i);
    sums[0] = mean_gradient;
    sums[1] = mean_product;
    transform_row<C>(gradient, columns, gradient, [&](int64_t c, auto d, auto extent) {
      return splat<C>(rstd) *
             (d - splat<C>(mean_gradient) - load<C>(out + c, extent) * splat<C>(mean_product));
    });
  }

  // dh = dz ⊙ act'(h), and the norm's sums.
  void finish_hidden(const Segment& segment, int64_t first, int64_t count) {
    const int64_t r = view_.bottleneck;
    dispatch_activation(p_.activation, [&]<Activation activation>() {
      for (int64_t i = 0; i < count; ++i) {
        const C* h = static_cast<const C*>(p_.hidden) + row(segment, first + i) * p_.hidden_stride;
        const int64_t position = segment.first_position + first + i;
        Vector<C> sum = {}, product_sum = {};
        results_.row(results_.hidden_gradient, segment, first + i)
            .set(hidden_gradient_ + i * hidden_stride_, r, [&](int64_t j, auto dz, auto extent) {
              const Vector<C> own = load<C>(h + j, extent);
              const Vector<C> dh = dz * activation_derivative<activation, VectorMath<C>>(own);
              if (pre_) {
                sum += dh * load<C>(down_weight_ + j, extent);
                product_sum += dh * (own - load<C>(down_bias_ + j, extent));
              }
              return dh;
            });
        if (pre_) {
          results_.sums[2 * position] = horizontal_sum<C>(sum) / static_cast<C>(width_);
          results_.sums[2 * position + 1] = horizontal_sum<C>(product_sum) / static_cast<C>(width_);
        }
      }
    });
  }

  const LinearAdapterBackward& p_;
  const Plan& plan_;
  const RowResults<C>& results_;
  const Dropout dropout_;
  const bool pre_;
  const int64_t width_, block_rows_, block_columns_, stride_, hidden_stride_;
  const Segment* prepared_ = nullptr;
  AdapterView view_;
  bool wants_hidden_, wants_out_;
  WeightOperand<X> up_, up_transposed_;
  C *packed_up_, *packed_up_transposed_, *norm_weight_, *norm_bias_, *down_weight_, *down_bias_,
      *gradient_, *out_, *activated_, *hidden_gradient_, *mask_;
};

template <class X>
class ColumnPass {
  using C = Accumulate<X>;

  static constexpr int64_t kColumns = 64;  // a multiple of every panel width
  static constexpr int64_t kMostColumns = 4 * kColumns;
  static constexpr int64_t kRows = RowResults<C>::kRows;

 public:
  // The width of tiles. A tile's sums over rows stay in a second-level cache; as far as that
  // allows, wide tiles go through memory in longer pieces. With few rows there is little to keep.
  struct Tiles {
    int64_t hidden_size;
    int64_t columns;  // of a segment with many rows

    Tiles(const LinearAdapterBackward& problem, const Plan& plan, int64_t tasks)
        : hidden_size(problem.hidden_size), columns(kColumns) {
      const int64_t wide = hidden_size / (2 * kColumns);
      const bool enough = wide * static_cast<int64_t>(plan.segments.size()) >= tasks;
      if (problem.hidden_stride <= kMostColumns && enough) columns = 2 * kColumns;
    }
    int64_t width(const Segment& segment) const {
      return segment.rows <= kRows / 4 ? kMostColumns : columns;
    }
    int64_t count(const Segment& segment) const {
      return (hidden_size + width(segment) - 1) / width(segment);
    }
  };

  ColumnPass(const LinearAdapterBackward& problem, const Plan& plan, const RowResults<C>& results,
             const Tiles& tiles)
      : p_(problem),
        plan_(plan),
        results_(results),
        tiles_(tiles),
        dropout_(problem),
        pre_(problem.norm_position == NormPosition::kPre),
        width_(problem.hidden_size),
        hidden_stride_(padded<C>(std::max<int64_t>(problem.hidden_stride, 1)) + kRowPadding<C>) {
    const int64_t r = std::max<int64_t>(p_.hidden_stride, 1);
    Scratch scratch(1, 2 * Scratch::bytes<C>(r * kMostColumns) +
                           2 * Scratch::bytes<C>(kMostColumns * hidden_stride_) +
                           Scratch::bytes<C>(hidden_stride_) +
                           4 * Scratch::bytes<C>(kRows * 2 * kColumns) +
                           5 * Scratch::bytes<C>(kMostColumns));
    packed_down_ = scratch.take<C>(r * kMostColumns);
    packed_up_ = scratch.take<C>(r * kMostColumns);
    down_sum_ = scratch.take<C>(kMostColumns * hidden_stride_);
    up_sum_ = scratch.take<C>(kMostColumns * hidden_stride_);
    hidden_sum_ = scratch.take<C>(hidden_stride_);
    x_ = scratch.take<C>(kRows * 2 * kColumns);
    out_ = scratch.take<C>(kRows * 2 * kColumns);
    gradient_ = scratch.take<C>(kRows * 2 * kColumns);
    product_ = scratch.take<C>(kRows * 2 * kColumns);
    norm_weight_ = scratch.take<C>(kMostColumns);
    norm_bias_ = scratch.take<C>(kMostColumns);
    norm_weight_sum_ = scratch.take<C>(kMostColumns);
    norm_bias_sum_ = scratch.take<C>(kMostColumns);
    mask_ = scratch.take<C>(kMostColumns);
  }

  // Some tiles of all segments: a contiguous range, of about equal cost for each task.
  void run(int64_t task, int64_t tasks) {
    const auto tile_cost = [&](const Segment& segment) {
      constexpr int64_t fixed = 16;  // in rows, of what does not depend on their number
      return (segment.rows + fixed) * tiles_.width(segment);
    };
    int64_t total = 0, cost = 0;
    for (const Segment& segment : plan_.segments) {
      total += tiles_.count(segment) * tile_cost(segment);
    }
    for (const Segment& segment : plan_.segments) {
      for (int64_t column = 0; column < width_; column += tiles_.width(segment)) {
        if (cost * tasks / total == task) column_tile(segment, column);
        cost += tile_cost(segment);
      }
    }
  }

  // All columns of one segment.
  void run(const Segment& segment) {
    for (int64_t column = 0; column < width_; column += tiles_.width(segment)) {
      column_tile(segment, column);
    }
  }

 private:
  void column_tile(const Segment& segment, int64_t column) {
    const Wanted wanted(p_, segment.adapter, pre_);
    if (!wanted.anything()) return;
    view_ = adapter_view(p_.adapters, segment.adapter);
    const OutputGradient<C> of_output(p_, plan_, segment);
    stride_ = tiles_.width(segment);
    const int64_t r = view_.bottleneck, columns = std::min(stride_, width_ - column);
    const bool wants_out = !pre_ || of_output.penalized();
    const bool wants_x = wanted.down_sum || (pre_ && wanted.input_gradient);
    const bool wants_gradient = wanted.up_sum || (!pre_ && wanted.norm);
    const auto shifted = [&](const void* matrix, int64_t elements) {
      const int64_t size = p_.weight_type == DataType::kFloat32 ? 4 : sizeof(X);
      return static_cast<const void*>(static_cast<const char*>(matrix) + elements * size);
    };
    unpack_vector<X>(p_.weight_type, shifted(view_.norm_weight, column), columns, norm_weight_);
    unpack_vector<X>(p_.weight_type, shifted(view_.norm_bias, column), columns, norm_bias_);
    if (wanted.input_gradient) {
      down_.prepare(p_, shifted(view_.down, column), view_.down_stride, r, columns, false,
                    segment.rows, packed_down_);
    }
    if (wants_out && wants_gradient) {
      up_.prepare(p_, shifted(view_.up, column * view_.up_stride), view_.up_stride, r, columns,
                  true, segment.rows, packed_up_);
    }
    std::fill(hidden_sum_, hidden_sum_ + r, C(0));
    std::fill(norm_weight_sum_, norm_weight_sum_ + stride_, C(0));
    std::fill(norm_bias_sum_, norm_bias_sum_ + stride_, C(0));
    for (int64_t first = 0; first < segment.rows; first += kRows) {
      const int64_t count = std::min(kRows, segment.rows - first);
      const int64_t panel_stride = count * kPanel<C>;
      const C* hidden_gradient = results_.row(results_.hidden_gradient, segment, first).data;
      const C* activated = results_.row(results_.activated, segment, first).data;
      if (wants_x) load_x(segment, first, count, column, columns);
      if (wants_gradient) {
        if (wants_out) {
          up_.multiply(count, 0, r, 0, columns, {activated, kPanel<C>, 1, panel_stride}, out_,
                       stride_, false);
        }
        load_gradient(segment, first, count, column, columns, of_output);
      }
      if (wanted.up_sum) {  // d_up [columns, r] += duᵀ z
        multiply<C>(columns, r, count, {gradient_, 1, stride_},
                    {activated, panel_stride, kPanel<C>}, up_sum_, hidden_stride_, first > 0);
      }
      if (wanted.down_sum) {  // Mᵀ [columns, r] += x̂ᵀ dh
        multiply<C>(columns, r, count, {x_, 1, stride_}, {hidden_gradient, panel_stride, kPanel<C>},
                    down_sum_, hidden_stride_, first > 0);
        if (pre_) add_hidden_sum(hidden_gradient, count, r);
      }
      if (wanted.input_gradient) {
        down_.multiply(count, 0, r, 0, columns, {hidden_gradient, kPanel<C>, 1, panel_stride},
                       product_, stride_, false);
        if (pre_ && wanted.norm) add_norm_gradient(count, columns);
        if (p_.grad_x) store_grad_x(segment, first, count, column, columns);
      }
    }
    const AdapterGradients& gradients = p_.gradients[segment.adapter];
    if (p_.weight_type == DataType::kFloat32) {
      write<float>(gradients, r, column, columns);
    } else {
      write<X>(gradients, r, column, columns);
    }
  }

  int64_t row(const Segment& segment, int64_t i) const {
    return Plan::row(segment, p_.routing.rows_per_sample, i);
  }

  // A tile's part of a row is too short for the hardware to see where the next one is.
  template <bool write = false>
  void prefetch_row(const Segment& segment, int64_t i, const void* matrix, int64_t column,
                    int64_t columns) const {
    constexpr int64_t distance = 16, line = 64 / sizeof(X);
    if (i + distance >= segment.rows) return;
    const X* from = static_cast<const X*>(matrix) + row(segment, i + distance) * width_ + column;
    for (int64_t c = 0; c < columns; c += line) __builtin_prefetch(from + c, write, 2);
  }

  // x̂ (pre) or x (post).
  void load_x(const Segment& segment, int64_t first, int64_t count, int64_t column,
              int64_t columns) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = row(segment, first + i);
      const X* from = static_cast<const X*>(p_.x) + at * width_ + column;
      C* to = x_ + i * stride_;
      prefetch_row(segment, first + i, p_.x, column, columns);
      if (pre_) {
        const Vector<C> mean = splat<C>(static_cast<const C*>(p_.mean)[at]);
        const Vector<C> rstd = splat<C>(static_cast<const C*>(p_.rstd)[at]);
        transform_row<C>(from, columns, to,
                         [&](int64_t, auto v, auto) { return (v - mean) * rstd; });
      } else {
        transform_row<C>(from, columns, to, [](int64_t, auto v, auto) { return v; });
      }
    }
  }

  // do (pre) or du (post), and the post norm's own gradients.
  void load_gradient(const Segment& segment, int64_t first, int64_t count, int64_t column,
                     int64_t columns, const OutputGradient<C>& of_output) {
    const bool masked = dropout_.active();
    const bool penalized = of_output.penalized();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = row(segment, first + i);
      const X* grad_y = static_cast<const X*>(p_.grad_y) + at * width_ + column;
      const C* out = out_ + i * stride_;
      prefetch_row(segment, first + i, p_.grad_y, column, columns);
      if (masked) dropout_.fill(at, column, columns, mask_);
      const C* sums = results_.sums + 2 * (segment.first_position + first + i);
      const Vector<C> mean = splat<C>(pre_ ? C(0) : static_cast<const C*>(p_.mean)[at]);
      const Vector<C> rstd = splat<C>(pre_ ? C(0) : static_cast<const C*>(p_.rstd)[at]);
      transform_row<C>(
          grad_y, columns, gradient_ + i * stride_,
          [&](int64_t c, auto d, auto extent) -> Vector<C> {
            Vector<C> scale = of_output.scale;
            if (masked) scale *= load<C>(mask_ + c, extent);
            if (pre_) {
              if (penalized) d += of_output.kappa * scale * load<C>(out + c, extent);
              return d * scale;
            }
            const Vector<C> weight = load<C>(norm_weight_ + c, extent);
            const Vector<C> normalized = (load<C>(out + c, extent) - mean) * rstd;
            const Vector<C> o = normalized * weight + load<C>(norm_bias_ + c, extent);
            d = (d + of_output.kappa * scale * o) * scale;
            store<C>(norm_weight_sum_ + c, load<C>(norm_weight_sum_ + c, extent) + d * normalized,
                     extent);
            store<C>(norm_bias_sum_ + c, load<C>(norm_bias_sum_ + c, extent) + d, extent);
            return rstd * (d * weight - splat<C>(sums[0]) - normalized * splat<C>(sums[1]));
          });
    }
  }

  // Σ dh over a block's rows.
  void add_hidden_sum(const C* hidden_gradient, int64_t count, int64_t r) {
    for (int64_t j = 0; j < r; j += kLanes<C>) {
      const C* from = hidden_gradient + j / kPanel<C> * count * kPanel<C> + j % kPanel<C>;
      Vector<C> sum = load<C>(hidden_sum_ + j);
      for (int64_t i = 0; i < count; ++i) sum += load<C>(from + i * kPanel<C>);
      store<C>(hidden_sum_ + j, sum);
    }
  }

  // dγ += Σ dn ⊙ x̂ and dβ += Σ dn.
  void add_norm_gradient(int64_t count, int64_t columns) {
    for_each_vector<C>(columns, [&](int64_t c, auto extent) {
      Vector<C> weight_sum = load<C>(norm_weight_sum_ + c);
      Vector<C> bias_sum = load<C>(norm_bias_sum_ + c);
      for (int64_t i = 0; i < count; ++i) {
        const Vector<C> d = load<C>(product_ + i * stride_ + c, extent);
        weight_sum += d * load<C>(x_ + i * stride_ + c, extent);
        bias_sum += d;
      }
      store<C>(norm_weight_sum_ + c, weight_sum);
      store<C>(norm_bias_sum_ + c, bias_sum);
    });
  }

  void store_grad_x(const Segment& segment, int64_t first, int64_t count, int64_t column,
                    int64_t columns) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = row(segment, first + i);
      const X* grad_y = static_cast<const X*>(p_.grad_y) + at * width_ + column;
      X* to = static_cast<X*>(p_.grad_x) + at * width_ + column;
      prefetch_row<true>(segment, first + i, p_.grad_x, column, columns);
      const C* sums = results_.sums + 2 * (segment.first_position + first + i);
      const Vector<C> rstd = splat<C>(static_cast<const C*>(p_.rstd)[at]);
      for_each_vector<C>(columns, [&](int64_t c, auto extent) {
        Vector<C> d = load<C>(product_ + i * stride_ + c, extent);
        if (pre_) {
          const Vector<C> normalized = load<C>(x_ + i * stride_ + c, extent);
          d = rstd * (d * load<C>(norm_weight_ + c, extent) - splat<C>(sums[0]) -
                      normalized * splat<C>(sums[1]));
        }
        if (p_.residual) d += load<C>(grad_y + c, extent);
        store<C>(to + c, d, extent);
      });
    }
  }

  template <class W>
  void write(const AdapterGradients& gradients, int64_t r, int64_t column, int64_t columns) {
    W* norm_weight = static_cast<W*>(gradients.norm_weight);
    W* norm_bias = static_cast<W*>(gradients.norm_bias);
    W* down = static_cast<W*>(gradients.down);
    W* up = static_cast<W*>(gradients.up);
    for (int64_t c = 0; up && c < columns; ++c) {
      W* to = up + (column + c) * r;
      const C* from = up_sum_ + c * hidden_stride_;
      for_each_vector<C>(
          r, [&](int64_t j, auto extent) { store<C>(to + j, load<C>(from + j, extent), extent); });
    }
    constexpr int lanes = kLanes<C>;
    for (int64_t j = 0; down && j < r; j += lanes) {
      const int64_t rows = std::min<int64_t>(lanes, r - j);
      for_each_vector<C>(columns, [&](int64_t c, auto extent) {
        Vector<C> square[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          square[i] = load<C>(down_sum_ + (c + i) * hidden_stride_ + j);
        }
        transpose<C>(square);
        for (int64_t i = 0; i < rows; ++i) {
          Vector<C> sum = square[i];
          if (pre_) {
            sum = sum * load<C>(norm_weight_ + c, extent) +
                  splat<C>(hidden_sum_[j + i]) * load<C>(norm_bias_ + c, extent);
          }
          store<C>(down + (j + i) * width_ + column + c, sum, extent);
        }
      });
    }
    for_each_vector<C>(columns, [&](int64_t c, auto extent) {
      if (norm_weight) store<C>(norm_weight + column + c, load<C>(norm_weight_sum_ + c), extent);
      if (norm_bias) store<C>(norm_bias + column + c, load<C>(norm_bias_sum_ + c), extent);
    });
  }

  const LinearAdapterBackward& p_;
  const Plan& plan_;
  const RowResults<C>& results_;
  const Tiles tiles_;
  const Dropout dropout_;
  const bool pre_;
  const int64_t width_, hidden_stride_;
  int64_t stride_;  // of the tile's buffers
  AdapterView view_;
  WeightOperand<X> down_, up_;
  C *packed_down_, *packed_up_, *down_sum_, *up_sum_, *hidden_sum_, *x_, *out_, *gradient_,
      *product_, *norm_weight_, *norm_bias_, *norm_weight_sum_, *norm_bias_sum_, *mask_;
};

// Gradients of adapters without active rows are zero.
template <class X>
void clear_unused(const LinearAdapterBackward& p, const Plan& plan) {
  const size_t size = p.weight_type == DataType::kFloat32 ? 4 : sizeof(X);
  auto segment = plan.segments.begin();
  for (int64_t a = 0; a < p.routing.adapters; ++a) {
    if (segment != plan.segments.end() && segment->adapter == a) {
      ++segment;
      continue;
    }
    const AdapterGradients& g = p.gradients[a];
    const int64_t r = adapter_view(p.adapters, a).bottleneck;
    const auto clear = [&](void* to, int64_t count) {
      if (to) std::memset(to, 0, static_cast<size_t>(count) * size);
    };
    clear(g.norm_weight, p.hidden_size);
    clear(g.norm_bias, p.hidden_size);
    clear(g.down, r * p.hidden_size);
    clear(g.up, r * p.hidden_size);
  }
}

template <class X>
void backward(const LinearAdapterBackward& problem, const Parallel& parallel) {
  using C = Accumulate<X>;
  Plan plan;
  plan.build(problem);
  clear_unused<X>(problem, plan);
  if (problem.grad_x) {
    const int64_t sample_size = problem.routing.rows_per_sample * problem.hidden_size;
    for (const Samples& samples : plan.untouched) {
      for (int64_t i = 0; i < samples.count; ++i) {
        const X* from = static_cast<const X*>(problem.grad_y) + samples[i] * sample_size;
        std::copy(from, from + sample_size,
                  static_cast<X*>(problem.grad_x) + samples[i] * sample_size);
      }
    }
  }
  if (plan.active_rows == 0) return;
  RowResults<C> results{};
  results.stride = padded<C>(std::max<int64_t>(problem.hidden_stride, 1));
  const size_t size = static_cast<size_t>(plan.active_rows * results.stride);
  const std::unique_ptr<C[]> hidden_gradient(new C[size]);
  const std::unique_ptr<C[]> activated(new C[size]);
  const std::unique_ptr<C[]> sums(new C[static_cast<size_t>(2 * plan.active_rows)]);
  results.hidden_gradient = hidden_gradient.get();
  results.activated = activated.get();
  results.sums = sums.get();

  const typename ColumnPass<X>::Tiles tiles(problem, plan, parallel.threads);
  const int64_t segments = static_cast<int64_t>(plan.segments.size());
  int64_t largest = 0;
  for (const Segment& segment : plan.segments) largest = std::max(largest, segment.rows);
  if (segments >= 2 * parallel.threads && largest * parallel.threads <= plan.active_rows) {
    // Many adapters: each task does some of them whole, so that their weights and rows are still in
    // its cache for the second pass.
    const int64_t tasks = std::min(parallel.threads, segments);
    parallel(tasks, [&](int64_t task) {
      RowPass<X> rows(problem, plan, results);
      ColumnPass<X> columns(problem, plan, results, tiles);
      for (const Segment& segment : plan.segments) {
        if (segment.first_position * tasks / plan.active_rows != task) continue;
        rows.run(segment);
        columns.run(segment);
      }
    });
    return;
  }
  const int64_t row_tasks =
      std::min(parallel.threads, (plan.active_rows + kTileRows - 1) / kTileRows);
  parallel(row_tasks,
           [&](int64_t task) { RowPass<X>(problem, plan, results).run(task, row_tasks); });
  int64_t all_tiles = 0;
  for (const Segment& segment : plan.segments) all_tiles += tiles.count(segment);
  const int64_t column_tasks = std::min(parallel.threads, all_tiles);
  parallel(column_tasks, [&](int64_t task) {
    ColumnPass<X>(problem, plan, results, tiles).run(task, column_tasks);
  });
}

}  // namespace

void linear_adapter_backward(const LinearAdapterBackward& problem, const Parallel& parallel) {
  switch (problem.data_type) {
    case DataType::kFloat64: return backward<double>(problem, parallel);
    case DataType::kFloat32: return backward<float>(problem, parallel);
    case DataType::kBFloat16: return backward<BFloat16>(problem, parallel);
    case DataType::kFloat16: return backward<Float16>(problem, parallel);
  }
}

}  // namespace ADAPTER_EXT_CPU_LEVEL
}  // namespace adapter_ext::cpu
