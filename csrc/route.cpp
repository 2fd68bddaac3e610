#include "route.h"

#include <numeric>

namespace adapter_ext {

std::tuple<Tensor, Tensor> route_cpu(const Tensor& ids, int64_t num_adapters) {
  const auto [flat, order, offsets] = check_route(ids, num_adapters);
  const int64_t count = flat.numel();
  const int64_t* id = static_cast<const int64_t*>(flat.data_ptr());

  // A counting sort, stable; samples without an adapter come last.
  std::vector<int64_t> next(static_cast<size_t>(num_adapters + 2), 0);
  for (int64_t i = 0; i < count; ++i) {
    if (id[i] < -1 || id[i] >= num_adapters) {
      fail({"route", "ids"}, "expected values in [-1, ", num_adapters, "), got ", id[i],
           " at position ", i);
    }
    ++next[static_cast<size_t>((id[i] < 0 ? num_adapters : id[i]) + 1)];
  }
  std::partial_sum(next.begin(), next.end(), next.begin());
  std::copy(next.begin(), next.end() - 1, static_cast<int64_t*>(offsets.data_ptr()));
  int64_t* sorted = static_cast<int64_t*>(order.data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    sorted[next[static_cast<size_t>(id[i] < 0 ? num_adapters : id[i])]++] = i;
  }
  return {order, offsets};
}

}  // namespace adapter_ext
