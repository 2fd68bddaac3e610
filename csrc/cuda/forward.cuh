// The forward of linear_adapter. A tile of rows goes through the whole layer in one kernel; where
// tiles are too few to keep the device busy (decode), the first product is split along D and the
// second along its columns, in kernels of their own. An element's value does not depend on which
// kernels made it: sums over D are taken in the same order (ColumnOrder).
#pragma once

#include "cuda/forward_parts.cuh"
#include "cuda/instances.h"

namespace adapter_ext::cuda {

// What the kernels do for rows that no adapter changes: y = x, and zeros for the backward.
template <class X, class C, class S>
__device__ void forward_untouched(const ForwardParams& params, int64_t first, int count) {
  const LinearAdapterForward& f = params.problem;
  const int64_t width = f.hidden_size, bytes = width * static_cast<int64_t>(sizeof(X));
  const bool aligned = is_aligned(f.x, bytes) && is_aligned(f.y, bytes);
  const int lane = thread_index() % 32;
  for (int i = thread_index() / 32; i < count; i += S::kWarps) {
    const int64_t row = row_at(f.routing, params.sample_rows, first + i);
    copy_row(static_cast<X*>(f.y) + row * width, static_cast<const X*>(f.x) + row * width, width,
             aligned);
    if (!f.hidden) continue;
    for (int64_t j = lane; j < f.largest_bottleneck; j += 32) {
      static_cast<C*>(f.hidden)[row * f.largest_bottleneck + j] = C(0);
    }
    if (lane == 0) static_cast<C*>(f.mean)[row] = static_cast<C*>(f.rstd)[row] = C(0);
  }
}

// The rows of a block; false where it has none, or where no adapter changes them.
template <class X, class C, class S>
__device__ __forceinline__ bool forward_work(const ForwardParams& params, const Depth& depth,
                                             int64_t block, bool first_of_tile, Segment& segment,
                                             int64_t& first, int& count) {
  const LinearAdapterForward& f = params.problem;
  if (!f.l2_lambda && block == 0 && first_of_tile) {
    for (int64_t a = threadIdx.x; a < f.routing.adapters; a += S::kThreads) {
      static_cast<C*>(f.aux)[a] = C(0);
    }
  }
  segment = params.ranges.find(f.routing, block);
  first = segment.begin + segment.range * params.ranges.size.value;
  const int64_t left = segment.end - first;
  if (left <= 0) return false;
  count = static_cast<int>(left < params.ranges.size.value ? left : params.ranges.size.value);
  if (segment.adapter < f.routing.adapters && depth.keeps_adapter(segment.adapter)) return true;
  if (first_of_tile) forward_untouched<X, C, S>(params, first, count);
  return false;
}

// The whole layer for a tile of rows.
template <class X, class P, class S>
__global__ __launch_bounds__(S::kThreads, (kResident<S, typename P::Sum>)) void forward_kernel(
    const __grid_constant__ ForwardParams params) {
  using Tile = ForwardTile<X, P, S>;
  using C = typename P::Sum;
  const Depth depth{params.problem, params.depth, params.sample_rows};
  Segment segment;
  int64_t first;
  int count;
  if (!forward_work<X, C, S>(params, depth, blockIdx.x, true, segment, first, count)) return;
  const Tile tile(params, segment, first, count);
  tile.find_rows(depth);
  __syncthreads();
  tile.bring_x();
  if (tile.pre) tile.bring_norm(0, tile.width);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const auto run = [&]<bool whole>() {
    if (tile.pre) tile.template normalize<whole>([](int) {});
    for (int block = 0; block * kBlock < tile.view.bottleneck; ++block) {
      typename Tile::Sums hidden, part;
      hidden.clear();
      part.clear();
      tile.template down<whole, 2>(
          block, 0, params.order.chunks, [] {},
          [&](int chunk, const auto& sums) {
            part.add(sums);
            if (!params.order.begins_part(chunk)) return;
            hidden.add(part);
            part.clear();
          });
      tile.keep_hidden(block, hidden);
    }
    tile.clear_hidden();
    auto up = tile.up_product();
    if (!tile.pre) {
      Moments<C> all[Tile::Own::kCount] = {};
      tile.moments(up, 0, tile.column_blocks,
                   [&](int v, int, int64_t, const Moments<C>& some) { all[v].add(some); });
      const typename Tile::Own own;
      for (int v = 0; v < Tile::Own::kCount; ++v) {
        if (own.column() == 0) {
          tile.mean()[own.row(v)] = all[v].mean;
          tile.rstd()[own.row(v)] = tile.rstd_of(all[v]);
        }
      }
      __syncthreads();
    }
    tile.keep_statistics();
    tile.template finish<whole>(up, 0, tile.column_blocks);
  };
  if (tile.whole(params.problem.x, params.problem.y)) {
    run.template operator()<true>();
  } else {
    run.template operator()<false>();
  }
}

// The same by parts of the columns. Where shared memory has room for one large tile alone, it has
// for two small ones at most.
template <class S>
inline constexpr int kPartsResident =
    kOneLargeTile && S::kRows == SmallTile::kRows ? 2 : kResident<S, float>;
template <class X, class P, class S>
__global__ __launch_bounds__(S::kThreads, (kPartsResident<S>)) void forward_parts_kernel(
    const __grid_constant__ ForwardParams params) {
  using Tile = ForwardTile<X, P, S>;
  const Depth depth{params.problem, params.depth, params.sample_rows};
  Segment segment;
  int64_t first;
  int count;
  if (!forward_work<X, typename P::Sum, S>(params, depth, blockIdx.x, true, segment, first,
                                           count)) {
    return;
  }
  const Tile tile(params, segment, first, count);
  tile.find_rows(depth);
  __syncthreads();
  const PartProducts<X, P, S> products(tile);
  products.bring_rows();
  products.down();
  tile.clear_hidden();
  tile.keep_statistics();
  products.finish();
}

// Where part `index` of some begins, of `count` things. There are fewer than 2^31 of them.
__device__ __forceinline__ int64_t part_of(int64_t count, int64_t index, unsigned parts) {
  const unsigned all = static_cast<unsigned>(count), i = static_cast<unsigned>(index);
  return all / parts * i + all % parts * i / parts;
}

// Decode, first kernel: the first product's sums over some chunks of columns.
template <class X, class P>
__global__
__launch_bounds__(kThreads, (kResident<SmallTile, typename P::Sum>)) void forward_down_kernel(
    const __grid_constant__ ForwardParams params) {
  using Tile = ForwardTile<X, P, SmallTile>;
  using C = typename P::Sum;
  let_next_begin();
  const unsigned splits = static_cast<unsigned>(params.splits);
  const int64_t split = blockIdx.x % splits;
  const Depth depth{params.problem, params.depth, params.sample_rows};
  Segment segment;
  int64_t first;
  int count;
  if (!forward_work<X, C, SmallTile>(params, depth, blockIdx.x / splits, split == 0, segment, first,
                                     count)) {
    return;
  }
  const Tile tile(params, segment, first, count);
  tile.find_rows(depth);
  __syncthreads();
  const int64_t begin = part_of(params.order.chunks, split, splits);
  const int64_t end = part_of(params.order.chunks, split + 1, splits);
  const bool whole = tile.whole(params.problem.x, params.problem.y);
  const int stride = static_cast<int>(round_up(tile.f.largest_bottleneck, kVector<C>));
  for (int block = 0; block * kBlock < tile.view.bottleneck; ++block) {
    const auto keep = [&](int64_t chunk, auto& sums) {
      C* to = static_cast<C*>(params.partials) + (chunk * tile.f.rows + first) * stride;
      sums.for_each_pair([&](int i, int column, C first_sum, C second_sum) {
        const int j = block * kBlock + column;
        if (i < count && j < stride)
          store_pair<Space::kGlobal>(to + i * stride + j, first_sum, second_sum);
      });
    };
    const auto run = [&]<bool is_whole>() {
      const auto before = [&] {
        if (!tile.pre || block > 0) return;
        const int64_t first_column = begin * params.order.chunk;
        tile.bring_norm(first_column, min(end * params.order.chunk, tile.width) - first_column);
        copy_async_commit();
        tile.template normalize<is_whole>([](int) {});
        copy_async_wait<0>();
        __syncthreads();
        if (split == 0) tile.keep_statistics();
      };
      tile.template down<is_whole, kDownStages>(block, begin, end, before, keep);
    };
    if (whole) {
      run.template operator()<true>();
    } else {
      run.template operator()<false>();
    }
  }
}

// Decode, second kernel: the second product and what follows, for some blocks of columns.
template <class X, class P>
__global__
__launch_bounds__(kThreads, (kResident<SmallTile, typename P::Sum>)) void forward_up_kernel(
    const __grid_constant__ ForwardParams params) {
  using Tile = ForwardTile<X, P, SmallTile>;
  using C = typename P::Sum;
  const LinearAdapterForward& f = params.problem;
  const unsigned splits = static_cast<unsigned>(params.splits);
  const int64_t split = blockIdx.x % splits;
  const Depth depth{f, params.depth, params.sample_rows};
  const Segment segment = params.ranges.find(f.routing, blockIdx.x / splits);
  const int64_t first = segment.begin + segment.range * params.ranges.size.value;
  if (segment.adapter >= f.routing.adapters || first >= segment.end ||
      !depth.keeps_adapter(segment.adapter)) {
    return wait_for_previous();
  }
  const int64_t left = segment.end - first;
  const int count = left < 16 ? static_cast<int>(left) : 16;
  const Tile tile(params, segment, first, count);
  tile.find_rows(depth);
  __syncthreads();
  const int64_t begin = part_of(tile.column_blocks, split, splits);
  const int64_t end = part_of(tile.column_blocks, split + 1, splits);
  auto up = tile.up_product();
  // Weights are on their way while the kernel before ends and while h is summed.
  if (tile.pre) up.start(begin, end - begin);
  let_next_begin();
  wait_for_previous();
  const int chunks = params.order.chunks;
  constexpr int n = kVector<C>;
  const int stride = static_cast<int>(round_up(f.largest_bottleneck, n));
  const int across = static_cast<int>(round_up(tile.view.bottleneck, kBlock)) / n;
  const int64_t chunk_step = f.rows * stride;
#pragma unroll 1
  for (int vector = static_cast<int>(threadIdx.x); vector < 16 * across; vector += kThreads) {
    const int i = vector / across, j = vector % across * n;
    C sum[n] = {}, part[n] = {};
    if (i < count && j < stride) {
      const C* from = static_cast<const C*>(params.partials) + (chunks - 1) * chunk_step +
                      (first + i) * stride + j;
#pragma unroll 4
      for (int chunk = chunks - 1; chunk >= 0; --chunk, from -= chunk_step) {
        C of_chunk[n];
        load_aligned(of_chunk, from);
        const bool begins_part = params.order.begins_part(chunk);
#pragma unroll
        for (int e = 0; e < n; ++e) {
          part[e] += of_chunk[e];
          if (!begins_part) continue;
          sum[e] += part[e];
          part[e] = C(0);
        }
      }
    }
    tile.keep_hidden(i, j, sum, split == 0 && !params.statistics);
  }
  if (split == 0 && !params.statistics) tile.clear_hidden();
  C* moments = static_cast<C*>(params.moments) + 2 * first * tile.column_blocks;
  if (params.statistics) {
    const typename Tile::Own own;
    tile.moments(up, begin, end - begin, [&](int, int i, int64_t block, const Moments<C>& some) {
      if (i < count && own.column() == 0) {
        moments[2 * (i * tile.column_blocks + block)] = some.mean;
        moments[2 * (i * tile.column_blocks + block) + 1] = some.squares;
      }
    });
    return;
  }
  if (!tile.pre) {
    const int i = thread_index();
    if (i < count) {
      Moments<C> all = {};
      for (int64_t block = 0; block < tile.column_blocks; ++block) {
        const int64_t columns = tile.width - block * kBlock;
        const C* from = moments + 2 * (i * tile.column_blocks + block);
        all.add({from[0], from[1], static_cast<C>(columns < kBlock ? columns : kBlock)});
      }
      tile.mean()[i] = all.mean;
      tile.rstd()[i] = tile.rstd_of(all);
    }
    __syncthreads();
    if (split == 0) tile.keep_statistics();
  }
  if (tile.whole(f.x, f.y)) {
    tile.template finish<true>(up, begin, end - begin, tile.pre);
  } else {
    tile.template finish<false>(up, begin, end - begin, tile.pre);
  }
}

// aux[a] = λ / B Σ ||d||² over the adapter's rows, in an order that depends on their number alone.
template <class C>
__global__ __launch_bounds__(kThreads) void aux_kernel(
    const __grid_constant__ ForwardParams params) {
  const LinearAdapterForward& f = params.problem;
  const int64_t a = blockIdx.x;
  const int thread = thread_index();
  const int64_t begin = first_position(f.routing, a), end = first_position(f.routing, a + 1);
  double sum = 0;
  if (Depth{f, params.depth, params.sample_rows}.keeps_adapter(a)) {
    for (int64_t position = begin + thread; position < end; position += kThreads) {
      C penalty = 0;
      const C* from = static_cast<const C*>(params.penalties) + position * params.penalty_blocks;
      for (int64_t block = 0; block < params.penalty_blocks; ++block) penalty += from[block];
      sum += static_cast<double>(penalty);
    }
  }
  sum = sum_over_lanes<32>(sum);
  double* of_warp = reinterpret_cast<double*>(shared_memory());
  if (thread % 32 == 0) of_warp[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) {
    for (int warp = 1; warp < kWarps; ++warp) sum += of_warp[warp];
    const double samples = static_cast<double>(params.sample_rows.divide(end - begin));
    const double lambda = static_cast<double>(static_cast<const C*>(f.l2_lambda)[a]);
    static_cast<C*>(f.aux)[a] = samples > 0 ? static_cast<C>(lambda * sum / samples) : C(0);
  }
}

static_assert(sizeof(ForwardParams) <= 4096);

// Whether forward_parts_kernel can do what is asked for, and its shared memory. `resident`: with
// all columns of x in it, or not at all.
template <class X, class P, class S>
bool parts_layout(const LinearAdapterForward& f, int64_t limit, bool resident,
                  SharedLayout& layout) {
  if constexpr (kByParts<X, P, S>) {
    if (f.norm_position != NormPosition::kPre || f.l2_lambda || !PartProducts<X, P, S>::takes(f)) {
      return false;
    }
    SharedLayout products = shared_layout<X, P, S>(f, limit, kPartTiles);
    take_norm<X>(products, f, f.hidden_size, limit);
    layout = products;
    take_x<X>(layout, S::kRows, f.hidden_size, limit);
    if (layout.x_columns < f.hidden_size) {
      if (resident) return false;
      layout = products;
      take_stages<X, P>(layout, S::kRows, ColumnOrder::kParts);
      take_x<X>(layout, S::kRows, f.hidden_size, limit);
    }
    return layout.norm_columns && layout.bytes <= limit;
  }
  return false;
}

template <class X, class P, class S>
void forward_parts(const ForwardCall& call, ForwardParams& params) {
  if constexpr (kByParts<X, P, S>) {
    params.ranges = RowRanges::make(call.problem, S::kRows, false);
    launch("linear_adapter", &forward_parts_kernel<X, P, S>, params.ranges.blocks, S::kThreads,
           params.layout.bytes, call.stream, params);
  }
}

template <class X, class P, class S>
void forward_whole(const ForwardCall& call, ForwardParams& params) {
  const LinearAdapterForward& f = call.problem;
  // Two blocks of a multiprocessor, so that one computes while the other waits. Large tiles that do
  // not fit then have one to themselves, with more of x, which otherwise is read again from memory.
  const int64_t reserved = 1024;  // by CUDA, for each block
  const int64_t whole = call.limits.shared_memory, half = (whole - reserved) / 2;
  SharedLayout& layout = params.layout;
  layout = shared_layout<X, P, S>(f, half);
  const bool fits = layout.activated_resident;
  if (!fits) layout = shared_layout<X, P, S>(f, whole);
  const int64_t limit = fits && S::kRows < LargeTile::kRows ? half : whole;
  if (f.norm_position == NormPosition::kPre) take_norm<X>(layout, f, f.hidden_size, half);
  const SharedLayout products = layout;
  if (fits) take_x<X>(layout, S::kRows, f.hidden_size, half);
  if (!fits || layout.x_columns < f.hidden_size) {
    layout = products;
    if (kStages<X, P> && fits) take_stages<X, P>(layout, S::kRows, 1);
    take_x<X>(layout, S::kRows, f.hidden_size, limit);
  }
  params.ranges = RowRanges::make(f, S::kRows, false);
  launch("linear_adapter", &forward_kernel<X, P, S>, params.ranges.blocks, S::kThreads,
         layout.bytes, call.stream, params);
}

// Which kernels run. Small and large: tiles of 16 and of 64 rows, by one kernel; split: of 16, by
// two.
enum class Tiling { kSplit, kSmall, kSmallParts, kLarge, kLargeParts };

// One tile takes a kernel nearly as long as one for each multiprocessor: until there are so many,
// tiles are small. Of very few tiles the columns are shared out, too. Where exactly which is faster
// was measured on an H200.
template <class X, class P>
Tiling choose_tiling(const LinearAdapterForward& f, const Limits& limits, SharedLayout& layout) {
  const int64_t tiles = f.rows / 16, processors = limits.multiprocessors;
  const int64_t memory = limits.shared_memory;
  const bool fills_large = fills_large_tiles(f);
  if (fills_large && tiles > processors &&
      parts_layout<X, P, LargestForwardTile<X>>(f, memory, false, layout)) {
    return Tiling::kLargeParts;
  }
  if (tiles >= processors / (f.hidden_size <= 2048 ? 16 : 6) &&
      parts_layout<X, P, SmallTile>(f, memory, true, layout)) {
    return Tiling::kSmallParts;
  }
  // Weights that are not copied as they are take small tiles longer.
  const bool copies = sizeof(typename P::Operand) == size_of(f.weight_type);
  if (fills_large && tiles > (copies ? 2 * processors : processors * 7 / 8)) return Tiling::kLarge;
  layout = shared_layout<X, P, SmallTile>(f, memory, kDownStages);
  const bool few = tiles + std::min(f.routing.adapters, f.rows) < processors * 9 / 8;
  return few && layout.activated_resident ? Tiling::kSplit : Tiling::kSmall;
}

template <class X, class P>
void Forward<X, P>::run(const ForwardCall& call) {
  using T = typename P::Operand;
  using C = typename P::Sum;
  const LinearAdapterForward& f = call.problem;
  auto params = call.params<ForwardParams>();
  const int64_t processors = call.limits.multiprocessors;
  const int64_t tiles = f.rows / 16 + std::min(f.routing.adapters, f.rows);
  const Tiling tiling = choose_tiling<X, P>(f, call.limits, params.layout);
  const bool split = tiling == Tiling::kSplit;
  params.order = ColumnOrder::make(f.hidden_size);
  const int64_t chunks = params.order.chunks;
  const int64_t column_blocks = (f.hidden_size + kBlock - 1) / kBlock;
  params.penalty_blocks = split ? column_blocks : 1;
  Carver workspace(call.workspace);
  const int64_t operands = f.rows * round_up(f.largest_bottleneck, kBlock);
  params.activated = workspace.take<T>(operands);
  if (split) {
    params.partials =
        workspace.take<C>(chunks * f.rows * round_up(f.largest_bottleneck, kVector<C>));
  }
  if (split) params.moments = workspace.take<C>(2 * f.rows * column_blocks);
  if (f.l2_lambda) params.penalties = workspace.take<C>(f.rows * params.penalty_blocks);
  if (call.bytes) {
    *call.bytes = workspace.bytes();
    return;
  }
  if (split) {
    params.ranges = RowRanges::make(f, 16, false);
    const auto launch_split = [&](const char* name, auto kernel, Begins begins) {
      launch(name, kernel, params.ranges.blocks * params.splits, kThreads, params.layout.bytes,
             call.stream, params, begins);
    };
    const int64_t wanted =
        4 * processors / std::max<int64_t>(std::min(tiles, params.ranges.blocks), 1);
    params.splits = std::clamp<int64_t>(wanted, 1, chunks);
    if (f.norm_position == NormPosition::kPre) {
      take_norm<X>(params.layout, f,
                   (chunks + params.splits - 1) / params.splits * params.order.chunk,
                   call.limits.shared_memory);
    }
    launch_split("linear_adapter's first product", &forward_down_kernel<X, P>, Begins::kInTurn);
    // Each of them reads all sums of the first product, so that more than one for a multiprocessor
    // pay only where a tile has few rows.
    const int64_t tile_rows = (f.rows + tiles - 1) / std::max<int64_t>(tiles, 1);
    const int64_t most = std::max<int64_t>(wanted / 4, 128 / std::max<int64_t>(tile_rows, 1));
    params.splits = std::clamp<int64_t>(std::min(wanted, most), 1, column_blocks);
    if (f.norm_position == NormPosition::kPost) {
      params.statistics = true;
      launch_split("linear_adapter's statistics", &forward_up_kernel<X, P>, Begins::kEarly);
      params.statistics = false;
    }
    launch_split("linear_adapter's second product", &forward_up_kernel<X, P>, Begins::kEarly);
  } else if (tiling == Tiling::kLargeParts) {
    forward_parts<X, P, LargestForwardTile<X>>(call, params);
  } else if (tiling == Tiling::kSmallParts) {
    forward_parts<X, P, SmallTile>(call, params);
  } else if (tiling == Tiling::kLarge) {
    forward_whole<X, P, LargestForwardTile<X>>(call, params);
  } else {
    forward_whole<X, P, SmallTile>(call, params);
  }
  if (f.l2_lambda && f.routing.adapters > 0) {
    launch("linear_adapter's auxiliary loss", &aux_kernel<C>, f.routing.adapters, kThreads,
           kWarps * 8, call.stream, params);
  }
}

}  // namespace adapter_ext::cuda
