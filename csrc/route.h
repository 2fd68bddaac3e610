// The op route: samples sorted by adapter.
#pragma once

#include <tuple>

#include "tensor_checks.h"

namespace adapter_ext {

// ids: int64, any shape, each in [-1, num_adapters). Returns `order` int64 [ids.numel()] and
// `offsets` int64 [num_adapters + 1] as RoutingView has them.
std::tuple<Tensor, Tensor> route_cpu(const Tensor& ids, int64_t num_adapters);

}  // namespace adapter_ext
