#include "cpu/plan.h"

#include <stdexcept>
#include <string>

namespace adapter_ext::cpu {
namespace {

// A routing may have been made by hand: rows out of range would be memory out of range.
void check(const RoutingView& routing) {
  const int64_t* offsets = routing.offsets;
  for (int64_t a = 0; a <= routing.adapters; ++a) {
    const int64_t least = a ? offsets[a - 1] : 0, most = a ? routing.samples : 0;
    if (offsets[a] < least || offsets[a] > most) {
      throw std::runtime_error(
          "linear_adapter: routing.offsets: expected values that ascend from 0 to at most the "
          "number of samples, " +
          std::to_string(routing.samples) + ", as route() makes them; got " +
          std::to_string(offsets[a]) + " at " + std::to_string(a));
    }
  }
  std::vector<bool> seen(static_cast<size_t>(routing.samples));
  for (int64_t i = 0; i < routing.samples; ++i) {
    const int64_t sample = routing.order[i];
    if (sample < 0 || sample >= routing.samples || seen[static_cast<size_t>(sample)]) {
      throw std::runtime_error("linear_adapter: routing.order: expected each of " +
                               std::to_string(routing.samples) +
                               " samples once, as route() makes it; got " + std::to_string(sample) +
                               " at " + std::to_string(i));
    }
    seen[static_cast<size_t>(sample)] = true;
  }
}

}  // namespace

Plan::Plan() = default;
Plan::~Plan() = default;

void Plan::build(const LinearAdapterProblem& problem) {
  const RoutingView& routing = problem.routing;
  if (routing.order) check(routing);
  depth = Chance(problem.stochastic_depth);
  const PhiloxKey key = depth.key(problem.seed);
  const bool drops = depth.threshold > 0;
  if (drops && problem.depth_mode == DepthMode::kSample) {
    kept_.reserve(routing.samples);  // reserved, so that pointers into them stay valid
    dropped_.reserve(routing.samples);
  }

  const auto all = [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    if (!routing.order) return Samples{nullptr, begin, count};
    const int64_t* list = routing.order + begin;
    int64_t in_row = 1;  // samples that follow each other in memory as well, as often they all do
    while (in_row < count && list[in_row] == list[0] + in_row) ++in_row;
    return in_row >= count ? Samples{nullptr, count > 0 ? list[0] : 0, count}
                           : Samples{list, 0, count};
  };
  for (int64_t a = 0; a < routing.adapters; ++a) {
    const int64_t begin = routing.order ? routing.offsets[a] : 0;
    const int64_t end = routing.order ? routing.offsets[a + 1] : routing.samples;
    if (begin == end) continue;
    Samples samples = all(begin, end);
    if (drops && problem.depth_mode == DepthMode::kCall) {
      if (!depth_keeps(a, key, depth.threshold)) {
        untouched.push_back(samples);
        continue;
      }
    } else if (drops) {
      const int64_t kept_before = static_cast<int64_t>(kept_.size());
      const int64_t dropped_before = static_cast<int64_t>(dropped_.size());
      for (int64_t i = 0; i < samples.count; ++i) {
        (depth_keeps(samples[i], key, depth.threshold) ? kept_ : dropped_).push_back(samples[i]);
      }
      const int64_t kept = static_cast<int64_t>(kept_.size()) - kept_before;
      if (kept < samples.count) {
        untouched.push_back({dropped_.data() + dropped_before, 0, samples.count - kept});
      }
      if (kept == 0) continue;
      samples = {kept_.data() + kept_before, 0, kept};
    }
    const int64_t rows = samples.count * routing.rows_per_sample;
    if (rows == 0) continue;
    active.add({a, end - begin, rows, samples, 0, rows, 0});
  }
  if (routing.order) {
    const int64_t begin = routing.offsets[routing.adapters];
    if (begin < routing.samples) untouched.push_back(all(begin, routing.samples));
  }
}

}  // namespace adapter_ext::cpu
