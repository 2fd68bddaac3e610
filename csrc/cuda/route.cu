// The op route: a stable counting sort of ids, in three kernels. Blocks count the ids of their
// spans, one block turns the counts into first places (adapter by adapter, within one span by
// span), blocks write their samples to them.
#include "cuda/launch.h"

namespace adapter_ext::cuda {
namespace {

constexpr int64_t kMostSpans = 256;
constexpr int kScanThreads = 1024;

struct RouteParams {
  const int64_t* ids;  // [samples]
  int64_t samples;
  int64_t adapters;
  int64_t* order;    // [samples]
  int64_t* offsets;  // [adapters + 1]
  int64_t* places;   // [adapters + 1, spans]: counts, then first places; the last: without adapter
  int64_t span, spans;
};

RouteParams make_params(int64_t samples, int64_t adapters) {
  RouteParams params{};
  params.samples = samples;
  params.adapters = adapters;
  params.span = std::max<int64_t>(1024, round_up((samples + kMostSpans - 1) / kMostSpans, 32));
  params.spans = std::max<int64_t>((samples + params.span - 1) / params.span, 1);
  return params;
}

__device__ __forceinline__ int64_t bin_of(const RouteParams& params, int64_t i) {
  const int64_t id = params.ids[i];
  assert(id >= -1 && id < params.adapters);  // route: ids: expected values in [-1, adapters)
  return id < 0 ? params.adapters : id;
}

// One warp a span. Lanes of the same adapter find each other, and the first counts for all: what a
// bin holds is then touched by one lane at a time.
template <class Function>
__device__ void for_each_group(const RouteParams& params, Function&& function) {
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t begin = blockIdx.x * params.span;
  const int64_t end = begin + params.span < params.samples ? begin + params.span : params.samples;
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t i = first + lane;
    const int64_t bin = i < end ? bin_of(params, i) : -1;
    const unsigned same = __match_any_sync(0xffffffffu, static_cast<unsigned long long>(bin));
    const int rank = __popc(same & ((1u << lane) - 1));
    function(i, bin, rank, __popc(same));
    __syncwarp();
  }
}

__global__ __launch_bounds__(32) void count_kernel(const __grid_constant__ RouteParams params) {
  int64_t* counts = params.places + blockIdx.x;
  for (int64_t bin = threadIdx.x; bin <= params.adapters; bin += 32) {
    counts[bin * params.spans] = 0;
  }
  __syncwarp();
  for_each_group(params, [&](int64_t, int64_t bin, int rank, int size) {
    if (bin >= 0 && rank == 0) counts[bin * params.spans] += size;
  });
}

// The exclusive sum of all counts, by one block: each thread of a stretch of its own, whose sums
// are then summed over the threads.
__global__ __launch_bounds__(kScanThreads) void scan_kernel(
    const __grid_constant__ RouteParams params) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t all = (params.adapters + 1) * params.spans;
  int64_t* of_warp = reinterpret_cast<int64_t*>(shared_memory());
  int64_t before = 0;
  for (int64_t first = 0; first < all; first += kScanThreads) {
    const int64_t i = first + thread;
    const int64_t own = i < all ? params.places[i] : 0;
    int64_t sum = own;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (lane == 31) of_warp[warp] = sum;
    __syncthreads();
    int64_t total = 0, warps_before = 0;
    for (int other = 0; other < kScanThreads / 32; ++other) {
      if (other < warp) warps_before += of_warp[other];
      total += of_warp[other];
    }
    __syncthreads();
    const int64_t place = before + warps_before + sum - own;
    if (i < all) {
      params.places[i] = place;
      if (i % params.spans == 0) params.offsets[i / params.spans] = place;
    }
    before += total;
  }
}

__global__ __launch_bounds__(32) void scatter_kernel(const __grid_constant__ RouteParams params) {
  int64_t* places = params.places + blockIdx.x;
  for_each_group(params, [&](int64_t i, int64_t bin, int rank, int size) {
    int64_t place = 0;
    if (bin >= 0) {
      place = places[bin * params.spans];
      params.order[place + rank] = i;
    }
    __syncwarp();
    if (bin >= 0 && rank == 0) places[bin * params.spans] = place + size;
  });
}

}  // namespace

int64_t route_workspace_bytes(int64_t samples, int64_t adapters) {
  Carver carver;
  carver.take<int64_t>((adapters + 1) * make_params(samples, adapters).spans);
  return carver.bytes();
}

void route(const int64_t* ids, int64_t samples, int64_t adapters, int64_t* order, int64_t* offsets,
           void* workspace, Stream stream) {
  RouteParams params = make_params(samples, adapters);
  params.ids = ids;
  params.order = order;
  params.offsets = offsets;
  params.places = static_cast<int64_t*>(workspace);
  launch("route: count", &count_kernel, params.spans, 32, 0, stream, params);
  launch("route: scan", &scan_kernel, 1, kScanThreads, kScanThreads / 32 * 8, stream, params);
  launch("route: scatter", &scatter_kernel, params.spans, 32, 0, stream, params);
}

}  // namespace adapter_ext::cuda
