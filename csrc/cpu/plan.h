// What one call of linear_adapter has to compute: which rows, for which adapters.
#pragma once

#include <cstdint>
#include <vector>

#include "common/philox.h"
#include "common/problem.h"

namespace adapter_ext::cpu {

// Runs body(task, context) for each task in [0, tasks), on as many threads as there are.
struct Parallel {
  int64_t threads;
  void (*run)(int64_t tasks, void (*body)(int64_t task, void* context), void* context);

  template <class Body>
  void operator()(int64_t tasks, Body&& body) const {
    if (tasks == 1) return body(int64_t{0});  // a parallel region costs more than a small task
    using Plain = std::remove_reference_t<Body>;
    run(
        tasks, [](int64_t task, void* context) { (*static_cast<Plain*>(context))(task); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

// Samples in the order in which they are worked on; null `list`: first, first + 1, ...
struct Samples {
  const int64_t* list;
  int64_t first;
  int64_t count;

  int64_t operator[](int64_t i) const { return list ? list[i] : first + i; }
};

// Active rows of one adapter.
struct Segment {
  int64_t adapter;
  int64_t adapter_samples;  // B_a, dropped ones included
  int64_t adapter_rows;     // all active ones
  Samples samples;
  int64_t first_row;       // of the samples' rows
  int64_t rows;            // from the first on
  int64_t first_position;  // of its rows among those of the range

  bool is_first() const { return first_row == 0; }
  bool is_last() const { return first_row + rows == adapter_rows; }

  // At most `most` of its rows, from one on.
  Segment part(int64_t first, int64_t most) const {
    Segment part = *this;
    part.first_row += first;
    part.rows = rows - first < most ? rows - first : most;
    return part;
  }
};

// Rows that are worked on together, by adapter.
struct Range {
  std::vector<Segment> segments;
  int64_t rows = 0;

  void add(Segment segment) {
    segment.first_position = rows;
    rows += segment.rows;
    segments.push_back(segment);
  }
  void clear() {
    segments.clear();
    rows = 0;
  }
};

struct Plan {
  Range active;
  std::vector<Samples> untouched;  // no adapter, or dropped by stochastic depth
  Chance depth;

  Plan();
  ~Plan();
  Plan(const Plan&) = delete;  // segments point into kept_
  Plan& operator=(const Plan&) = delete;

  void build(const LinearAdapterProblem& problem);

  // The row of x for the i-th row of a segment.
  static int64_t row(const Segment& segment, int64_t rows_per_sample, int64_t i) {
    i += segment.first_row;
    if (rows_per_sample == 1) return segment.samples[i];
    return segment.samples[i / rows_per_sample] * rows_per_sample + i % rows_per_sample;
  }

 private:
  std::vector<int64_t> kept_;
  std::vector<int64_t> dropped_;
};

}  // namespace adapter_ext::cpu
