// What the forward and the backward of linear_adapter share on the CPU: a row block's view of the
// problem, weight packing by type, dropout masks, the split of the rows over threads.
#pragma once

#include <algorithm>

#include "common/activation.h"
#include "common/philox.h"
#include "common/problem.h"
#include "cpu/matmul.h"
#include "cpu/memory.h"
#include "cpu/plan.h"

namespace adapter_ext::cpu {
inline namespace ADAPTER_EXT_CPU_LEVEL {

// Columns worked on at a time, a multiple of the 4 columns that share a Philox counter.
inline constexpr int64_t kColumnBlock = kBlockK;
// Rows are padded so that the same column of successive rows does not fall into one cache set.
template <class C>
inline constexpr int64_t kRowPadding = 64 / static_cast<int64_t>(sizeof(C));

inline constexpr int64_t kMostBlockRows = 96;

// The distance of rows of the bottleneck's activations in scratch.
template <class C>
ADAPTER_EXT_HOST_DEVICE int64_t scratch_stride(const LinearAdapterProblem& problem) {
  return padded<C>(std::max<int64_t>(problem.largest_bottleneck, 1)) + kRowPadding<C>;
}

// Rows of a block: as many as keep x, and scratch of its size, in a second-level cache, but not so
// few that reading the weights takes longer than the products with them; those of small bottlenecks
// stay in that cache, those of large ones come from far away. Tiles are so fast that they want all
// rows there can be.
template <class C, class Product>
ADAPTER_EXT_HOST_DEVICE int64_t block_rows(const LinearAdapterProblem& problem) {
  if (Product::kStepGroup > 1) return kMostBlockRows;
  const int64_t row_bytes = problem.hidden_size * static_cast<int64_t>(sizeof(C));
  const int64_t fitting = (192 << 10) / row_bytes / kTileRows * kTileRows;
  const int64_t r = problem.largest_bottleneck;
  return std::clamp<int64_t>(fitting, r > 128 ? 96 : r > 32 ? 48 : 24, kMostBlockRows);
}

// How a segment's rows are cut: into blocks of equal size, so that none is a lone last row. Rows
// that fit one block for each of the tasks that share the segment make one, since the weights are
// then read once.
struct Blocks {
  int64_t count;
  int64_t rows_in_task;  // of this segment, for one task

  Blocks(const Range& range, const Segment& segment, int64_t rows_in_block, int64_t tasks) {
    const bool few_segments = static_cast<int64_t>(range.segments.size()) < tasks;
    const int64_t shares = few_segments && segment.rows >= tasks * kTileRows ? tasks : 1;
    rows_in_task = (segment.rows + shares - 1) / shares;
    const int64_t in_share =
        rows_in_task <= kMostBlockRows ? 1 : (rows_in_task + rows_in_block - 1) / rows_in_block;
    count = shares * in_share;
  }
};

inline AdapterView adapter_view(const AdapterTable& table, int64_t a) {
  if (table.list) return table.list[a];
  const auto at = [a](const void* base, int64_t step) {
    return static_cast<const void*>(static_cast<const char*>(base) + a * step);
  };
  AdapterView view = table.first;
  view.norm_weight = at(view.norm_weight, table.norm_weight_step);
  view.norm_bias = at(view.norm_bias, table.norm_bias_step);
  view.down = at(view.down, table.down_step);
  view.up = at(view.up, table.up_step);
  return view;
}

// Calls function(typed pointer) for weights, whose type is x's or float.
template <class X, class Function>
ADAPTER_EXT_HOST_DEVICE void with_weights(DataType type, const void* weights, Function&& function) {
  if (type == DataType::kFloat32) {
    function(static_cast<const float*>(weights));
  } else {
    function(static_cast<const X*>(weights));
  }
}

// Rounds values in place to the 16-bit type of a product's operands.
template <class C>
static void round_operand(const LinearAdapterProblem& problem, C* values, int64_t count) {
  if (!rounds_operands(problem)) return;
  for_each_vector<C>(count, [&](int64_t i, auto extent) {
    const auto wide = load<C>(values + i, extent);
    const auto narrow = [&]<class Narrow>(Narrow* part) {
      if constexpr (std::is_same_v<C, double>) {
        for (int lane = 0; lane < kLanes<C>; ++lane) {
          float once[kLanes<float>] = {static_cast<float>(wide[lane])};
          store<float>(part, load<float>(once));
          store<float>(once, load<float>(part));
          if (i + lane < count) values[i + lane] = once[0];
        }
      } else {
        store<C>(part, wide);
        store<C>(values + i, load<C>(part), extent);
      }
    };
    if (problem.operand_type == DataType::kBFloat16) {
      BFloat16 part[kLanes<float>];
      narrow(part);
    } else {
      Float16 part[kLanes<float>];
      narrow(part);
    }
  });
}

// Whether results go to memory past the caches, which would read each line before it is written: if
// there are more than a second-level cache holds.
template <class X>
static bool streams(const void* results, int64_t rows, int64_t columns) {
  constexpr int64_t many_bytes = 4 << 20;
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(X));
  return rows * row_bytes >= many_bytes && row_bytes % kVectorBytes == 0 &&
         reinterpret_cast<uintptr_t>(results) % kVectorBytes == 0;
}

// The norm's vectors of one adapter, in the accumulate type.
template <class X>
static void unpack_vector(DataType type, const void* from, int64_t count, Accumulate<X>* to) {
  using C = Accumulate<X>;
  with_weights<X>(type, from, [&](const auto* source) {
    for_each_vector<C>(count, [&](int64_t i, auto extent) {
      store<C>(to + i, load<C>(source + i, extent), extent);
    });
  });
}

// A weight matrix as the right operand of products. For many rows it is packed whole. For those of
// one block, and for a single row, it is read as it is stored where that can be; else it is packed
// piece by piece as the product needs it.
//
// `Product` says how steps over k are taken; left operands are its steps. One that takes several
// elements in a step wants weights of x's type.
template <class X, class Product = MultiplyAdd<Accumulate<X>>>
class WeightOperand {
  using C = Accumulate<X>;
  static constexpr bool kPairs = Product::kElements > 1;

 public:
  // Elements of the memory that products with the matrix take.
  static int64_t size(int64_t k_count, int64_t columns) {
    return std::max(packed_size(k_count, columns), kRowsSize);
  }

  // `weights` is [k, columns], or [columns, k] where transposed, its rows `stride` apart. `rows`
  // are those that this task will multiply with it, in blocks; `memory` has room for size().
  void prepare(const LinearAdapterProblem& problem, const void* weights, int64_t stride,
               int64_t k_count, int64_t columns, bool transposed, int64_t rows, C* memory) {
    problem_ = &problem;
    weights_ = weights;
    stride_ = stride;
    k_count_ = k_count;
    columns_ = columns;
    transposed_ = transposed;
    memory_ = memory;
    const bool stored = rows == 1 && !rounds_operands(problem) && (transposed || !kPairs);
    mode_ = stored ? kStored : rows <= kMostBlockRows ? kPieces : kWhole;
    if (mode_ == kWhole) pack(0, k_count, 0, columns);
  }

  // out [rows, columns] (+)= left [rows, k_count] times the part of the matrix that starts at row
  // first_k and column first_column (multiples of kBlockK and of the panel width).
  void multiply(int64_t rows, int64_t first_k, int64_t k_count, int64_t first_column,
                int64_t columns, const LeftOperand<C>& left, C* out, int64_t out_row,
                bool accumulate, Ahead& ahead) const {
    const Into into = accumulate ? Into::kSum : Into::kNew;
    if (mode_ == kWhole) {
      const int64_t panel_stride = steps<Product>(k_count_) * kPanel<C>;
      const C* part =
          memory_ + first_column / kPanel<C> * panel_stride + steps<Product>(first_k) * kPanel<C>;
      return cpu::multiply<C, Product>(rows, columns, steps<Product>(k_count), left,
                                       {part, panel_stride, kPanel<C>}, out, out_row, into, ahead);
    }
    if (mode_ == kStored) {
      with_stored(first_k, first_column, [&](const auto* part) {
        if constexpr (!kPairs) {
          if (!transposed_) {
            return multiply_row_same_order<C>(columns, k_count, left.data, part, stride_, out,
                                              accumulate);
          }
        }
#if defined(__AMX_BF16__)
        if constexpr (kPairs) {
          return multiply_row_tiles(columns, k_count, left.data, part, stride_, out, accumulate);
        }
#endif
        multiply_row_transposed<C, Product>(columns, k_count, left.data, part, stride_, out,
                                            accumulate);
      });
      return;
    }
    // Whether it takes less to transpose the rows and the result than to pack the weights. The rows
    // fill vectors then.
    const bool transposes_rows =
        transposed_ && rows >= kPanel<C> && rows * (k_count + columns) < k_count * columns;
    int64_t column = 0;
    if ((transposes_rows || !transposed_) && !rounds_operands(*problem_)) {
      with_stored(first_k, first_column, [&]<class W>(const W* part) {
        if constexpr (std::is_same_v<W, C>) {
          if (transposes_rows) {
            column = columns;
            return multiply_rows_transposed(rows, columns, k_count, left, part, out, out_row,
                                            accumulate, ahead);
          }
          column = columns / kLanes<C> * kLanes<C>;
          cpu::multiply<C, Product>(rows, column, k_count, left, {part, kPanel<C>, stride_}, out,
                                    out_row, into, ahead);
        }
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<Product, PairDot>) {
          if (transposed_ || k_count % Product::kElements != 0) return;
          column = columns / kPanel<C> * kPanel<C>;
          cpu::multiply<C, StoredPairDot>(rows, column, steps<Product>(k_count), left,
                                          StoredPairDot::right(part, stride_), out, out_row, into,
                                          ahead);
        }
#endif
      });
    }
    // Pieces follow the rows of the matrix as it is stored, which is how memory likes to be read.
    const int64_t width = transposed_ ? kPanel<C> : columns - column;
    for (; column < columns; column += width) {
      const int64_t part = std::min(width, columns - column);
      for (int64_t k = 0; k < k_count; k += kBlockK) {
        const int64_t block = std::min(kBlockK, k_count - k);
        pack(first_k + k, block, first_column + column, part);
        cpu::multiply<C, Product>(rows, part, steps<Product>(block),
                                  left.from(0, steps<Product>(k)),
                                  {memory_, steps<Product>(block) * kPanel<C>, kPanel<C>},
                                  out + column, out_row, k > 0 ? Into::kSum : into, ahead);
      }
    }
  }

 private:
  enum Mode { kStored, kPieces, kWhole };

  static int64_t packed_size(int64_t k_count, int64_t columns) {
    return steps<Product>(k_count) * padded<C>(columns);
  }

  // Columns whose sums multiply_rows_transposed() has at a time, a multiple of every register tile.
  static constexpr int64_t kSumColumns = 96;
  // What it takes: a block of the rows and the sums.
  static constexpr int64_t kRowsSize =
      (kBlockK + kSumColumns) * (kMostBlockRows + kPanel<C> + kRowPadding<C>);

  // Calls function(typed pointer) for the stored weights from an element on.
  template <class Function>
  void with_stored(int64_t k, int64_t column, Function&& function) const {
    const int64_t offset = transposed_ ? column * stride_ + k : k * stride_ + column;
    if constexpr (kPairs) {
      function(static_cast<const X*>(weights_) + offset);
    } else {
      with_weights<X>(problem_->weight_type, weights_,
                      [&](const auto* from) { function(from + offset); });
    }
  }

  // multiply() for weights that are stored transposed: outᵀ = weights leftᵀ, which takes them as
  // they are. Asks for those of the next columns, whose rows are too short for the hardware to see
  // where they go on, or, with the last, for what `ahead` says.
  void multiply_rows_transposed(int64_t rows, int64_t columns, int64_t k_count,
                                const LeftOperand<C>& left, const C* weights, C* out,
                                int64_t out_row, bool accumulate, Ahead& ahead) const {
    C* const sums = memory_ + kBlockK * padded<C>(kMostBlockRows);
    const int64_t sums_row = padded<C>(rows) + kRowPadding<C>;
    Ahead::Piece next[kSumColumns];
    for (int64_t k = 0; k < k_count; k += kBlockK) {
      const int64_t block = std::min(kBlockK, k_count - k);
      pack_transposed<C, Product>(left.data + k, left.row_stride, block, rows, 0, memory_);
      for (int64_t column = 0; column < columns; column += kSumColumns) {
        const int64_t part = std::min(kSumColumns, columns - column);
        const bool same_k = column + part < columns;
        const int64_t next_column = same_k ? column + part : 0, next_k = same_k ? k : k + block;
        const int64_t next_block = std::min(kBlockK, k_count - next_k);
        const int64_t count = next_block > 0 ? std::min(kSumColumns, columns - next_column) : 0;
        for (int64_t i = 0; i < count; ++i) {
          next[i] = {weights + (next_column + i) * stride_ + next_k,
                     next_block * int64_t{sizeof(C)}};
        }
        Ahead weights_ahead;
        weights_ahead.set(next, count);
        cpu::multiply<C, Product>(part, rows, block, {weights + column * stride_ + k, stride_, 1},
                                  {memory_, block * kPanel<C>, kPanel<C>}, sums, sums_row,
                                  Into::kNew, count > 0 ? weights_ahead : ahead);
        add_transposed<C>(rows, part, sums, sums_row, out + column, out_row, accumulate || k > 0);
      }
    }
  }

  void pack(int64_t first_k, int64_t k_count, int64_t first_column, int64_t columns) const {
    with_stored(first_k, first_column, [&](const auto* part) {
      if (!transposed_) {
        return pack_same_order<C, Product>(part, stride_, k_count, columns, memory_);
      }
      pack_transposed<C, Product>(part, stride_, k_count, columns,
                                  columns_ - first_column - columns, memory_);
    });
    if constexpr (!kPairs) round_operand(*problem_, memory_, packed_size(k_count, columns));
  }

  const LinearAdapterProblem* problem_;
  const void* weights_;
  int64_t stride_, k_count_, columns_;
  bool transposed_;
  Mode mode_;
  C* memory_;
};

// Calls function<Product>() with the product that this problem's types have.
template <class X, class Function>
static void with_product([[maybe_unused]] const LinearAdapterProblem& problem,
                         Function&& function) {
#if defined(__AVX512BF16__)
  constexpr DataType bfloat16 = DataType::kBFloat16;
  if (problem.weight_type == bfloat16 && problem.operand_type == bfloat16) {
    return function.template operator()<BFloat16Product>();
  }
#endif
  function.template operator()<MultiplyAdd<Accumulate<X>>>();
}

// Dropout of the output: 0 or 1 / keep probability for each element.
struct Dropout {
  Chance chance;
  PhiloxKey key;

  explicit Dropout(const LinearAdapterProblem& problem)
      : chance(problem.dropout), key(chance.key(problem.seed)) {}

  bool active() const { return chance.threshold > 0; }

  // Fills scale[0 .. count) for the columns from first_column (a multiple of 4) of a row; `scale`
  // has room for a multiple of 64.
  template <class C>
  void fill(int64_t row, int64_t first_column, int64_t count, C* scale) const {
    constexpr int batch = 16;  // counters at a time, for the vectoriser
    for (int64_t start = 0; start < count; start += 4 * batch) {
      uint32_t c[4][batch];
      for (int i = 0; i < batch; ++i) {
        c[0][i] = static_cast<uint32_t>(row);
        c[1][i] = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
        c[2][i] = static_cast<uint32_t>((first_column + start) / 4 + i);
        c[3][i] = kDropoutStream;
      }
      PhiloxKey round_key = key;
      for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < batch; ++i) {
          uint32_t counter[4] = {c[0][i], c[1][i], c[2][i], c[3][i]};
          philox_round(counter, round_key);
          for (int word = 0; word < 4; ++word) c[word][i] = counter[word];
        }
        round_key.advance();
      }
      const C kept = static_cast<C>(chance.kept_scale);
      for (int i = 0; i < batch; ++i) {
        for (int word = 0; word < 4; ++word) {
          scale[start + 4 * i + word] = c[word][i] >= chance.threshold ? kept : C(0);
        }
      }
    }
  }
};

// A task's share of the columns of a matrix, in whole panels.
struct Share {
  int64_t first;
  int64_t columns;
};
template <class C>
Share share(int64_t columns, int64_t task, int64_t tasks) {
  const auto end = [&](int64_t tasks_before) {
    return std::min(columns, tasks_before * panels<C>(columns) / tasks * kPanel<C>);
  };
  return {end(task), end(task + 1) - end(task)};
}

// How many tasks it takes to write some bytes of memory: a few are written sooner than tasks begin.
inline int64_t memory_tasks(int64_t bytes, const Parallel& parallel) {
  constexpr int64_t worthwhile = 1 << 19;  // bytes of a task
  return std::clamp<int64_t>(bytes / worthwhile, 1, parallel.threads);
}

// Calls body(row, count) for the rows that no adapter runs on, some at a time.
template <class Body>
static void for_each_untouched(const LinearAdapterProblem& problem, const Plan& plan,
                               const Parallel& parallel, Body&& body) {
  const int64_t sample_rows = problem.routing.rows_per_sample;
  int64_t rows = 0;
  for (const Samples& samples : plan.untouched) rows += samples.count * sample_rows;
  const int64_t row_bytes = problem.hidden_size * size_of(problem.data_type);
  const int64_t tasks = memory_tasks(rows * row_bytes, parallel);
  parallel(tasks, [&](int64_t task) {
    const int64_t begin = task * rows / tasks, end = (task + 1) * rows / tasks;
    int64_t position = 0;
    for (const Samples& samples : plan.untouched) {
      for (int64_t i = 0; i < samples.count; ++i, position += sample_rows) {
        const int64_t first = std::max<int64_t>(begin - position, 0);
        const int64_t last = std::min(end - position, sample_rows);
        if (first < last) body(samples[i] * sample_rows + first, last - first);
      }
    }
  });
}

// Whether tasks share the columns of products with the weights rather than the rows. Where an
// adapter's rows are few, most of the time goes into reading its weights, which is then shared too;
// not so what is done with whole rows. The post norm, and the auxiliary loss, would have to wait
// for those.
inline bool shares_columns(const LinearAdapterProblem& problem, const Plan& plan, int64_t tasks) {
  constexpr int64_t worthwhile = 1 << 18;  // elements of a weight; entering tasks takes time too
  const int64_t r = problem.largest_bottleneck;
  bool few_rows = true;
  for (const Segment& segment : plan.active.segments) {
    few_rows = few_rows && segment.rows <= std::min(kMostBlockRows, r / 2);
  }
  return few_rows && static_cast<int64_t>(plan.active.segments.size()) < tasks &&
         problem.norm_position == NormPosition::kPre && !problem.l2_lambda &&
         r * problem.hidden_size >= worthwhile;
}

// What an adapter costs whatever its rows are, in rows: its weights come from memory, and some are
// packed. A row costs more than its products where the bottleneck is small.
inline int64_t weight_rows(const LinearAdapterProblem& problem) {
  return problem.largest_bottleneck > 32 ? 16 : 8;
}

// Rows of a segment that are worked on together.
struct Block {
  const Segment* segment;
  int64_t first;
  int64_t count;
};

// Splits the row blocks of all segments over tasks of about equal cost, each a contiguous range so
// that a task packs an adapter's weights once, and calls body(block, next) for those of one task,
// `next` the one that follows or empty.
template <class Body>
static void for_each_block(const Range& range, int64_t rows_in_block, int64_t weight_rows,
                           int64_t task, int64_t tasks, Body&& body) {
  const int64_t total = range.rows + weight_rows * static_cast<int64_t>(range.segments.size());
  int64_t cost = 0;
  Block ready = {};
  for (const Segment& segment : range.segments) {
    const int64_t blocks = Blocks(range, segment, rows_in_block, tasks).count;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * segment.rows / blocks;
      const int64_t count = (block + 1) * segment.rows / blocks - first;
      if ((2 * cost + count) * tasks / (2 * total) == task) {
        const Block block = {&segment, first, count};
        if (ready.count > 0) body(ready, block);
        ready = block;
      }
      cost += count;
    }
    cost += weight_rows;
  }
  if (ready.count > 0) body(ready, Block{});
}

}  // namespace ADAPTER_EXT_CPU_LEVEL
}  // namespace adapter_ext::cpu
