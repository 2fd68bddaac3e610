// The forward of linear_adapter on the CPU: the whole layer on a block of rows that stays in cache.

#include <cmath>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/linear_adapter_rows.h"

namespace adapter_ext::cpu {
inline namespace ADAPTER_EXT_CPU_LEVEL {
namespace {

// Mean and 1 / sqrt(variance + eps) in two passes, which stay right where |mean| >> deviation: the
// mean of the deviations from the mean, which rounding left, corrects both.
template <class C, class X>
void moments(const X* row, int64_t count, double eps, C* mean_out, C* rstd_out) {
  constexpr int chains = 4;
  const auto each = [&](auto&& add) {
    int64_t i = 0;
    for (; i + chains * kLanes<C> <= count; i += chains * kLanes<C>) {
#pragma GCC unroll 4
      for (int chain = 0; chain < chains; ++chain) {
        add(chain, load<C>(row + i + chain * kLanes<C>), FullVector{});
      }
    }
    for_each_vector<C>(count - i, [&](int64_t offset, auto extent) {
      add(0, load<C>(row + i + offset, extent), extent);
    });
  };
  const auto average = [&](const Vector<C>(&sum)[chains]) {
    return horizontal_sum<C>((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<C>(count);
  };
  Vector<C> sum[chains] = {}, deviations[chains] = {}, squares[chains] = {};
  each([&](int chain, Vector<C> v, auto) { sum[chain] += v; });
  const C mean = average(sum);
  each([&](int chain, Vector<C> v, auto extent) {
    Vector<C> deviation = v - splat<C>(mean);
    if constexpr (std::is_same_v<decltype(extent), PartialVector>) {
      for (int64_t lane = extent.count; lane < kLanes<C>; ++lane) deviation[lane] = 0;
    }
    deviations[chain] += deviation;
    squares[chain] += deviation * deviation;
  });
  const C rest = average(deviations);
  const C variance = average(squares) - rest * rest;
  *mean_out = mean + rest;
  // Not below zero, where rounding may have put it; NaN stays NaN.
  *rstd_out = C(1) / std::sqrt((variance < C(0) ? C(0) : variance) + static_cast<C>(eps));
}

#if defined(__AVX512BF16__)
// The same for bfloat16, which dot products with ones add and whose pairs are converted together.
void moments(const BFloat16* row, int64_t count, double eps, float* mean_out, float* rstd_out) {
  constexpr int chains = 4, in_vector = 2 * kLanes<float>;
  const auto pairs = [&](int64_t i) {
    const int64_t left = count - i;
    const __mmask32 mask = left >= in_vector ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    return _mm512_maskz_loadu_epi16(mask, row + i);
  };
  const __m512bh ones = bit_cast<__m512bh>(_mm512_set1_epi16(0x3F80));
  __m512 sum[chains] = {};
  int64_t i = 0;
  for (; i + chains * in_vector <= count; i += chains * in_vector) {
#pragma GCC unroll 4
    for (int chain = 0; chain < chains; ++chain) {
      const __m512bh v = bit_cast<__m512bh>(_mm512_loadu_si512(row + i + chain * in_vector));
      sum[chain] = _mm512_dpbf16_ps(sum[chain], v, ones);
    }
  }
  for (; i < count; i += in_vector) {
    sum[0] = _mm512_dpbf16_ps(sum[0], bit_cast<__m512bh>(pairs(i)), ones);
  }
  const auto total = [&] {
    const __m512 all = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
    return horizontal_sum<float>(bit_cast<Vector<float>>(all));
  };
  const float mean = total() / static_cast<float>(count);
  const __m512 means = _mm512_set1_ps(mean);
  for (__m512& s : sum) s = _mm512_setzero_ps();
  const auto add_squares = [&](__m512i v, __mmask16 low, __mmask16 high, __m512& a, __m512& b) {
    const __m512 even = bit_cast<__m512>(_mm512_slli_epi32(v, 16));
    const __m512 odd = bit_cast<__m512>(_mm512_and_si512(v, _mm512_set1_epi32(~0xFFFF)));
    const __m512 x = _mm512_maskz_sub_ps(low, even, means),
                 y = _mm512_maskz_sub_ps(high, odd, means);
    a = _mm512_fmadd_ps(x, x, a);
    b = _mm512_fmadd_ps(y, y, b);
  };
  constexpr __mmask16 all = 0xFFFF;
  for (i = 0; i + 2 * in_vector <= count; i += 2 * in_vector) {
    add_squares(_mm512_loadu_si512(row + i), all, all, sum[0], sum[1]);
    add_squares(_mm512_loadu_si512(row + i + in_vector), all, all, sum[2], sum[3]);
  }
  for (; i < count; i += in_vector) {
    const int64_t left = std::min<int64_t>(count - i, in_vector);
    const auto first = [](int64_t lanes) { return static_cast<__mmask16>((1u << lanes) - 1); };
    add_squares(pairs(i), first((left + 1) / 2), first(left / 2), sum[0], sum[1]);
  }
  *mean_out = mean;
  *rstd_out = 1.0f / std::sqrt(total() / static_cast<float>(count) + static_cast<float>(eps));
}
#endif

template <class X, class Product = MultiplyAdd<Accumulate<X>>>
class Forward {
  using C = Accumulate<X>;

 public:
  Forward(const LinearAdapterForward& problem, const Plan& plan, C* penalties)
      : p_(problem),
        plan_(plan),
        penalties_(penalties),
        dropout_(problem),
        pre_(problem.norm_position == NormPosition::kPre),
        width_(problem.hidden_size),
        block_rows_(block_rows<C, Product>(problem)),
        left_stride_(steps<Product>(kColumnBlock) + kRowPadding<C>),
        hidden_stride_(scratch_stride<C>(problem)),
        // The post norm needs a whole row of the second product before it can start.
        out_columns_(pre_ ? kColumnBlock : width_),
        out_stride_(padded<C>(out_columns_) + kRowPadding<C>),
        streams_(streams<X>(problem.y, plan.active.rows, problem.hidden_size)) {
    const int64_t r = p_.largest_bottleneck;
    const int64_t down_size = WeightOperand<X, Product>::size(width_, r);
    const int64_t up_size = WeightOperand<X, Product>::size(r, width_);
    Scratch scratch(0, Scratch::bytes<C>(down_size) + Scratch::bytes<C>(up_size) +
                           2 * Scratch::bytes<C>(width_) + 3 * Scratch::bytes<C>(kMostBlockRows) +
                           Scratch::bytes<C>(kMostBlockRows * left_stride_) +
                           Scratch::bytes<C>(kMostBlockRows * hidden_stride_) +
                           Scratch::bytes<C>(kMostBlockRows * out_stride_) +
                           Scratch::bytes<C>(kColumnBlock) +
                           Scratch::bytes<int64_t>(kMostBlockRows));
    packed_down_ = scratch.take<C>(down_size);
    packed_up_ = scratch.take<C>(up_size);
    norm_weight_ = scratch.take<C>(width_);
    norm_bias_ = scratch.take<C>(width_);
    mean_ = scratch.take<C>(kMostBlockRows);
    rstd_ = scratch.take<C>(kMostBlockRows);
    penalty_ = scratch.take<C>(kMostBlockRows);
    left_ = scratch.take<C>(kMostBlockRows * left_stride_);
    hidden_ = scratch.take<C>(kMostBlockRows * hidden_stride_);
    out_ = scratch.take<C>(kMostBlockRows * out_stride_);
    mask_ = scratch.take<C>(kColumnBlock);
    row_ = scratch.take<int64_t>(kMostBlockRows);
  }

  // Some blocks of rows of all segments.
  void run(int64_t task, int64_t tasks) {
    const Segment* packed = nullptr;
    for_each_block(plan_.active, block_rows_, weight_rows(p_), task, tasks,
                   [&](const Block& block, const Block& next) {
                     const Segment& segment = *block.segment;
                     if (packed != &segment) {
                       const Blocks blocks(plan_.active, segment, block_rows_, tasks);
                       prepare_adapter(segment, blocks.rows_in_task);
                     }
                     packed = &segment;
                     ask_ahead(next, next.count > 0 && next.segment != &segment);
                     run_block(segment, block.first, block.count);
                   });
    finish_streams();
  }

  // A task's share of the columns of act(h), for all rows of a segment, then of those of y. The
  // tasks share act(h), of so many elements.
  static int64_t activated_elements(const LinearAdapterForward& problem) {
    return kMostBlockRows * scratch_stride<C>(problem);
  }
  void run_down(const Segment& segment, int64_t task, int64_t tasks, C* activated) {
    prepare_adapter(segment, segment.rows);
    start_rows(segment, 0, segment.rows);
    normalize_rows(segment.rows);
    const Share hidden = share<C>(view_.bottleneck, task, tasks);
    project_down(segment.rows, hidden);
    save_hidden(segment.rows, hidden);
    activate_rows(segment.rows, hidden, activated);
    if (task == 0) save_moments(segment.rows);
  }
  void run_up(const Segment& segment, int64_t task, int64_t tasks, const C* activated) {
    prepare_adapter(segment, segment.rows);
    start_rows(segment, 0, segment.rows);
    project_up(segment.rows, share<C>(width_, task, tasks), activated);
  }

 private:
  const X* x_row(int64_t row) const { return static_cast<const X*>(p_.x) + row * width_; }
  const X* x(int64_t i) const { return x_row(row_[i]); }
  X* y(int64_t i) const { return static_cast<X*>(p_.y) + row_[i] * width_; }

  void prepare_adapter(const Segment& segment, int64_t rows) {
    view_ = adapter_view(p_.adapters, segment.adapter);
    unpack_vector<X>(p_.weight_type, view_.norm_weight, width_, norm_weight_);
    unpack_vector<X>(p_.weight_type, view_.norm_bias, width_, norm_bias_);
    const int64_t r = view_.bottleneck;
    down_.prepare(p_, view_.down, view_.down_stride, width_, r, true, rows, packed_down_);
    up_.prepare(p_, view_.up, view_.up_stride, r, width_, true, rows, packed_up_);
  }

  void run_block(const Segment& segment, int64_t first, int64_t count) {
    const Share hidden = {0, view_.bottleneck};
    start_rows(segment, first, count);
    if (pre_) normalize_rows(count);
    project_down(count, hidden);
    save_hidden(count, hidden);
    activate_rows(count, hidden, hidden_);
    project_up(count, {0, width_}, hidden_);
    save_moments(count);
    if (penalties_) {
      std::copy(penalty_, penalty_ + count, penalties_ + segment.first_position + first);
    }
  }

  // Lets the products of a block ask for the next one's rows, and for its weights if they are
  // others.
  void ask_ahead(const Block& next, bool other_weights) {
    Ahead::Piece* piece = next_;
    for (int64_t i = 0; i < next.count; ++i) {
      const int64_t row = Plan::row(*next.segment, p_.routing.rows_per_sample, next.first + i);
      *piece++ = {x_row(row), width_ * int64_t{sizeof(X)}};
    }
    if (other_weights) {
      const AdapterView view = adapter_view(p_.adapters, next.segment->adapter);
      const int64_t bytes = view.bottleneck * width_ * size_of(p_.weight_type);
      if (view.down_stride == width_) *piece++ = {view.down, bytes};
      if (view.up_stride == view.bottleneck) *piece++ = {view.up, bytes};
    }
    ahead_.set(next_, piece - next_);
  }

  void start_rows(const Segment& segment, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      row_[i] = Plan::row(segment, p_.routing.rows_per_sample, first + i);
      penalty_[i] = 0;
    }
  }

  // The moments that project_down() normalizes with.
  void normalize_rows(int64_t count) {
    for (int64_t i = 0; i < count; ++i) moments(x(i), width_, p_.eps, mean_ + i, rstd_ + i);
  }

  void save_moments(int64_t count) const {
    if (!p_.mean) return;
    for (int64_t i = 0; i < count; ++i) {
      static_cast<C*>(p_.mean)[row_[i]] = mean_[i];
      static_cast<C*>(p_.rstd)[row_[i]] = rstd_[i];
    }
  }

  // Some columns of h; behind the last of them zeros.
  void save_hidden(int64_t count, const Share& hidden) const {
    if (!p_.hidden || hidden.columns == 0) return;
    const int64_t end = hidden.first + hidden.columns;
    for (int64_t i = 0; i < count; ++i) {
      const C* from = hidden_ + i * hidden_stride_;
      C* to = static_cast<C*>(p_.hidden) + row_[i] * p_.largest_bottleneck;
      std::copy(from + hidden.first, from + end, to + hidden.first);
      if (end == view_.bottleneck) std::fill(to + end, to + p_.largest_bottleneck, C(0));
    }
  }

  // Makes a left operand's row of transform(i, values, extent) of the values `from`, which may lie
  // where the row does.
  template <class From, class Transform>
  void make_operand(const From* from, int64_t count, C* to, Transform&& transform) const {
    for_each_vector<C>(count, [&](int64_t i, auto extent) {
      Product::store(to, i, transform(i, load<C>(from + i, extent), extent), extent);
    });
    pad_row<C, Product>(to, count);
    if constexpr (Product::kElements == 1) round_operand(p_, to, count);
  }

  // Some columns of h = LN(x) downᵀ, or x downᵀ.
  void project_down(int64_t count, const Share& hidden) {
    // A lone row has the whole buffer: its product reads the weights in their order in memory then.
    const int64_t block = count > 1 ? kColumnBlock : kMostBlockRows * kColumnBlock;
    for (int64_t column = 0; column < width_; column += block) {
      const int64_t columns = std::min(block, width_ - column);
      for (int64_t i = 0; i < count; ++i) {
        C* left = left_ + i * left_stride_;
        if (pre_) {
          const Vector<C> mean = splat<C>(mean_[i]), rstd = splat<C>(rstd_[i]);
          const C *weight = norm_weight_ + column, *bias = norm_bias_ + column;
          make_operand(x(i) + column, columns, left, [&](int64_t at, auto v, auto extent) {
            return (v - mean) * rstd * load<C>(weight + at, extent) + load<C>(bias + at, extent);
          });
        } else {
          make_operand(x(i) + column, columns, left, [](int64_t, auto v, auto) { return v; });
        }
      }
      down_.multiply(count, column, columns, hidden.first, hidden.columns, {left_, left_stride_, 1},
                     hidden_ + hidden.first, hidden_stride_, column > 0, ahead_);
    }
  }

  // Some columns of the left operand of the second product, act(h), which may lie where h does.
  void activate_rows(int64_t count, const Share& hidden, C* activated) const {
    if (hidden.columns == 0) return;
    const int64_t to = hidden.first / Product::kElements;
    dispatch_activation(p_.activation, [&]<Activation activation>() {
      for (int64_t i = 0; i < count; ++i) {
        make_operand(hidden_ + i * hidden_stride_ + hidden.first, hidden.columns,
                     activated + i * hidden_stride_ + to,
                     [](int64_t, auto v, auto) { return activate<activation, VectorMath<C>>(v); });
      }
    });
  }

  // Some columns of y.
  void project_up(int64_t count, const Share& out, const C* activated) {
    const int64_t end = out.first + out.columns;
    for (int64_t column = out.first; column < end; column += out_columns_) {
      const int64_t columns = std::min(out_columns_, end - column);
      up_.multiply(count, 0, view_.bottleneck, column, columns, {activated, hidden_stride_, 1},
                   out_, out_stride_, false, ahead_);
      for (int64_t i = 0; i < count; ++i) {
        if (!pre_) moments(out_ + i * out_stride_, width_, p_.eps, mean_ + i, rstd_ + i);
        for (int64_t start = 0; start < columns; start += kColumnBlock) {
          finish(i, column + start, std::min(kColumnBlock, columns - start),
                 out_ + i * out_stride_ + start);
        }
      }
    }
  }

  // y = x + d, d = scale · mask ⊙ o, for some columns of a row; adds ||d||² to its penalty.
  void finish(int64_t i, int64_t column, int64_t columns, const C* o) {
    if (dropout_.active()) dropout_.fill(row_[i], column, columns, mask_);
    const auto with_options = [&]<bool masked, bool post>() {
      const Vector<C> mean = splat<C>(mean_[i]), rstd = splat<C>(rstd_[i]);
      const Vector<C> scale = splat<C>(static_cast<C>(plan_.depth.kept_scale));
      const X* from = x(i) + column;
      X* to = y(i) + column;
      const C *weight = norm_weight_ + column, *bias = norm_bias_ + column, *mask = mask_;
      const bool residual = p_.residual, penalized = penalties_ != nullptr, streams = streams_;
      Vector<C> squares = {};
      for_each_vector<C>(columns, [&](int64_t at, auto extent) {
        Vector<C> d = load<C>(o + at, extent);
        if constexpr (post) {
          d = (d - mean) * rstd * load<C>(weight + at, extent) + load<C>(bias + at, extent);
        }
        if constexpr (masked) d *= load<C>(mask + at, extent);
        d *= scale;
        if (penalized) squares += d * d;
        const Vector<C> result = residual ? load<C>(from + at, extent) + d : d;
        if constexpr (std::is_same_v<decltype(extent), FullVector>) {
          if (streams) return stream<C>(to + at, result);
        }
        store<C>(to + at, result, extent);
      });
      if (penalized) penalty_[i] += horizontal_sum<C>(squares);
    };
    if (dropout_.active()) {
      pre_ ? with_options.template operator()<true, false>()
           : with_options.template operator()<true, true>();
    } else {
      pre_ ? with_options.template operator()<false, false>()
           : with_options.template operator()<false, true>();
    }
  }

  const LinearAdapterForward& p_;
  const Plan& plan_;
  C* penalties_;  // [active rows], ||d||² of each; null: not wanted
  const Dropout dropout_;
  const bool pre_;
  const int64_t width_, block_rows_, left_stride_, hidden_stride_, out_columns_, out_stride_;
  const bool streams_;
  Ahead ahead_;
  Ahead::Piece next_[kMostBlockRows + 2];
  AdapterView view_;
  WeightOperand<X, Product> down_, up_;
  C *packed_down_, *packed_up_, *norm_weight_, *norm_bias_, *mean_, *rstd_, *penalty_, *left_,
      *hidden_, *out_, *mask_;
  int64_t* row_;
};

template <class X, class Product>
void run_by_rows(const LinearAdapterForward& problem, const Plan& plan, const Parallel& parallel,
                 Accumulate<X>* penalties) {
  const int64_t blocks = (plan.active.rows + kTileRows - 1) / kTileRows;
  const int64_t tasks = std::min(parallel.threads, blocks);  // no task for less than a tile
  parallel(tasks, [&](int64_t task) {
    [[maybe_unused]] const typename Product::Setup setup;
    Forward<X, Product>(problem, plan, penalties).run(task, tasks);
  });
}

template <class X, class Product>
void run_by_columns(const LinearAdapterForward& problem, const Plan& plan,
                    const Parallel& parallel) {
  using C = Accumulate<X>;
  using Rows = Forward<X, Product>;
  const std::unique_ptr<C[]> activated(
      new C[static_cast<size_t>(Rows::activated_elements(problem))]);
  const int64_t tasks = parallel.threads;
  for (const Segment& segment : plan.active.segments) {
    parallel(tasks, [&](int64_t task) {
      [[maybe_unused]] const typename Product::Setup setup;
      Rows(problem, plan, nullptr).run_down(segment, task, tasks, activated.get());
    });
    parallel(tasks, [&](int64_t task) {
      [[maybe_unused]] const typename Product::Setup setup;
      Rows(problem, plan, nullptr).run_up(segment, task, tasks, activated.get());
    });
  }
}

template <class X>
void forward(const LinearAdapterForward& problem, const Parallel& parallel) {
  using C = Accumulate<X>;
  Plan plan;
  plan.build(problem);
  for_each_untouched(problem, plan, parallel, [&](int64_t row, int64_t count) {
    const int64_t width = problem.hidden_size;
    std::copy_n(static_cast<const X*>(problem.x) + row * width, count * width,
                static_cast<X*>(problem.y) + row * width);
    if (!problem.hidden) return;
    // Never read, but the same call gives the same bits in all its results.
    const auto clear = [&](void* saved, int64_t columns) {
      std::fill_n(static_cast<C*>(saved) + row * columns, count * columns, C(0));
    };
    clear(problem.hidden, problem.largest_bottleneck);
    clear(problem.mean, 1);
    clear(problem.rstd, 1);
  });
  std::unique_ptr<C[]> penalties;
  if (problem.l2_lambda) penalties.reset(new C[static_cast<size_t>(plan.active.rows)]);
  if (plan.active.rows > 0) {
    with_product<X>(problem, [&]<class Product>() {
      if (shares_columns(problem, plan, parallel.threads)) {
        run_by_columns<X, Product>(problem, plan, parallel);
      } else {
        run_by_rows<X, Product>(problem, plan, parallel, penalties.get());
      }
    });
  }
  C* aux = static_cast<C*>(problem.aux);
  std::fill(aux, aux + problem.routing.adapters, C(0));
  if (penalties) {
    for (const Segment& segment : plan.active.segments) {
      double sum = 0.0;  // in the order of the segment's rows, whatever the threads
      for (int64_t i = 0; i < segment.rows; ++i) sum += penalties[segment.first_position + i];
      const double lambda = static_cast<const C*>(problem.l2_lambda)[segment.adapter];
      aux[segment.adapter] =
          static_cast<C>(lambda * sum / static_cast<double>(segment.adapter_samples));
    }
  }
}

}  // namespace

void linear_adapter_forward(const LinearAdapterForward& problem, const Parallel& parallel) {
#if defined(__AVX512BF16__)
  if (problem.data_type != DataType::kBFloat16) {
    return avx512::linear_adapter_forward(problem, parallel);
  }
  forward<BFloat16>(problem, parallel);
#else
  switch (problem.data_type) {
    case DataType::kFloat64: return forward<double>(problem, parallel);
    case DataType::kFloat32: return forward<float>(problem, parallel);
    case DataType::kBFloat16: return forward<BFloat16>(problem, parallel);
    case DataType::kFloat16: return forward<Float16>(problem, parallel);
  }
#endif
}

}  // namespace ADAPTER_EXT_CPU_LEVEL
}  // namespace adapter_ext::cpu
