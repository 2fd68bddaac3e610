// The op route: samples sorted by adapter.
#pragma once

#include <tuple>

#include "tensor_checks.h"

namespace adapter_ext {

struct RouteTensors {
  Tensor ids;             // contiguous
  Tensor order, offsets;  // not initialised
};

// Checks all but the ids' values, and allocates the results.
inline RouteTensors check_route(const Tensor& ids, int64_t num_adapters) {
  if (num_adapters < 0 || num_adapters > INT32_MAX) {
    fail({"route", "num_adapters"}, "expected a number in [0, 2^31), got ", num_adapters);
  }
  check_type({"route", "ids"}, ids, {ScalarType::Long});
  return {as_contiguous(ids), empty(ids, {ids.numel()}, ScalarType::Long),
          empty(ids, {num_adapters + 1}, ScalarType::Long)};
}

// ids: int64, any shape, each in [-1, num_adapters). Returns `order` int64 [ids.numel()] and
// `offsets` int64 [num_adapters + 1] as RoutingView has them.
std::tuple<Tensor, Tensor> route_cpu(const Tensor& ids, int64_t num_adapters);

}  // namespace adapter_ext
