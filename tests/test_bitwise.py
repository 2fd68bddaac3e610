"""Same inputs, same bits: over repeats, thread counts, and whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_testing import Call, Case, Results, assert_results_close, make_weights, replace
from torch import Tensor

import adapter_ext
from adapter_ext import AdapterWeights, reference

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
TRAINING = {
    "eval": {},
    "training": {"training": True, "dropout": 0.1, "stochastic_depth": 0.3, "l2_lambda": 0.3},
}

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_norm_position = pytest.mark.parametrize("norm_position", ["pre", "post"])
every_hidden_size = pytest.mark.parametrize("hidden_size", [50, 512, 1000])
every_bottleneck = pytest.mark.parametrize("bottleneck", [7, 16, 64])


def assert_same_bits(actual: Results, expected: Results) -> None:
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name


def results_of_any_threads(call: Call, set_num_threads: Callable[[int], None]) -> Results:
    """The results of a call, which 1, 2 and 3 threads have to the bit."""
    set_num_threads(1)
    expected = call.results()
    for threads in (2, 3):
        set_num_threads(threads)
        assert_same_bits(call.results(), expected)
    return expected


@every_dtype
@every_norm_position
@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize("routing", ["none", "row", "sample", "one"])
@pytest.mark.parametrize("rows", [1, 3, 40], ids="rows={}".format)
def test_threads_and_repeats(
    rows: int,
    routing: str,
    training: str,
    norm_position: str,
    dtype: torch.dtype,
    set_num_threads: Callable[[int], None],
) -> None:
    call = Case(
        shape=(rows, 13, 200),
        bottlenecks=(16,) if routing == "none" else (16, 7, 33),
        routing=routing,
        dtype=dtype,
        options={"norm_position": norm_position, **TRAINING[training]},
    ).build()
    set_num_threads(2)
    expected = call.results()
    assert_same_bits(call.results(), expected)
    for threads in (1, 2):
        set_num_threads(threads)
        assert_same_bits(call.results(), expected)


@every_dtype
@pytest.mark.parametrize("rows", [1, 40], ids="rows={}".format)
def test_threads_that_share_the_columns(
    rows: int, dtype: torch.dtype, set_num_threads: Callable[[int], None]
) -> None:
    """Few rows of one large adapter, where threads share the columns and not the rows."""
    call = Case(shape=(rows, 2050), bottlenecks=(130,), routing="none", dtype=dtype).build()
    results_of_any_threads(call, set_num_threads)


def rows_alone_and_together(
    x: Tensor, dy: Tensor, ids: Tensor, weights: AdapterWeights, norm_position: str
) -> tuple[Tensor, Tensor]:
    """y and dx of a batch."""
    x = x.detach().requires_grad_()
    routing = adapter_ext.route(ids, weights.num_adapters)
    y, _ = adapter_ext.linear_adapter(x, weights, routing, norm_position=norm_position)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


@every_dtype
@every_norm_position
def test_batch_invariance_of_large_results(norm_position: str, dtype: torch.dtype) -> None:
    """Above 4 MiB the CPU stores results past its caches."""
    count = (5 << 20) // (1024 * dtype.itemsize)
    weights = make_weights([7, 16], 1024, dtype=dtype)
    x, dy = torch.randn(2, count, 1024).to(dtype)
    ids = torch.arange(count) % 2
    y, dx = rows_alone_and_together(x, dy, ids, weights, norm_position)
    for start in range(0, count, count // 4):
        rows = slice(start, start + 50)
        y_part, dx_part = rows_alone_and_together(
            x[rows], dy[rows], ids[rows], weights, norm_position
        )
        assert torch.equal(y[rows], y_part)
        assert torch.equal(dx[rows], dx_part)


@every_dtype
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("hidden_size", [512, 500])
def test_gradients_of_many_adapters_are_those_of_each_alone(
    hidden_size: int, stacked: bool, dtype: torch.dtype
) -> None:
    """Above 4 MiB in all the CPU stores the gradients of weights past its caches."""
    bottleneck = 112
    count = (5 << 20) // (bottleneck * hidden_size * dtype.itemsize)
    weights = make_weights([bottleneck] * count, hidden_size, dtype=dtype)
    weights = AdapterWeights(*([w.detach().requires_grad_() for w in f] for f in weights))
    together = weights
    if stacked:
        together = AdapterWeights(
            *(torch.stack([*f]).detach().requires_grad_() for f in weights),
        )
    ids = torch.arange(count).repeat_interleave(torch.arange(count) % 4)
    ids = ids[torch.randperm(ids.numel())]
    x, dy = torch.randn(2, ids.numel(), hidden_size).to(dtype)

    def gradients(rows: Tensor, ids: Tensor, weights: AdapterWeights) -> list[Tensor]:
        flat = [t for f in weights for t in ([f] if isinstance(f, Tensor) else f)]
        routing = adapter_ext.route(ids, weights.num_adapters)
        y, _ = adapter_ext.linear_adapter(x[rows], weights, routing)
        return list(torch.autograd.grad(y, flat, dy[rows]))

    everything = gradients(torch.arange(ids.numel()), ids, together)
    for a in range(count):
        rows = (ids == a).nonzero().squeeze(1)
        own = AdapterWeights(*([field[a]] for field in weights))
        alone = gradients(rows, torch.zeros(len(rows), dtype=torch.int64), own)
        got = [g[a] for g in everything] if stacked else everything[a::count]
        for name, gradient, expected in zip(AdapterWeights._fields, got, alone, strict=True):
            assert torch.equal(gradient, expected), f"{name} of adapter {a}"


@every_dtype
@every_norm_position
@pytest.mark.parametrize("order", ["mixed", "sorted"])
@pytest.mark.parametrize("sizes", [(50, 7), (600, 120)], ids=["50-7", "600-120"])
def test_batch_invariance_of_many_rows(
    sizes: tuple[int, int],
    order: str,
    norm_position: str,
    dtype: torch.dtype,
    set_num_threads: Callable[[int], None],
) -> None:
    """The CPU's backward goes over ranges of rows, which differ by the number of threads."""
    hidden_size, bottleneck = sizes
    case = Case(
        shape=(2600, hidden_size),
        bottlenecks=(bottleneck, bottleneck, 5),
        dtype=dtype,
        options={"norm_position": norm_position, **TRAINING["training"], "stochastic_depth": 0.0},
    )
    call = case.build()
    ids = torch.tensor([0] * 10 + [1, 1, -1]).repeat(200)
    call.routing = adapter_ext.route(ids if order == "mixed" else ids.sort().values, 3)
    results = results_of_any_threads(call, set_num_threads)
    assert_results_close(results, call.upcast().results(reference.linear_adapter), dtype)


@every_dtype
@every_norm_position
@pytest.mark.parametrize("others", [3, 40], ids="{} others".format)
def test_threads_with_two_large_adapters(
    others: int, norm_position: str, dtype: torch.dtype, set_num_threads: Callable[[int], None]
) -> None:
    """Most rows are of two adapters of many: the CPU's threads share the rows of all then."""
    case = Case(
        shape=(1000, 200),
        bottlenecks=(16, 7, *([5] * others)),
        dtype=dtype,
        options={"norm_position": norm_position, **TRAINING["training"]},
    )
    call = case.build()
    ids = torch.tensor([0] * 120 + [1] * 60 + [-1] + [2] * 19).repeat(5)
    ids[ids == 2] += torch.arange(95) % others
    call.routing = adapter_ext.route(ids[torch.randperm(1000)], 2 + others)
    results = results_of_any_threads(call, set_num_threads)
    assert_results_close(results, call.upcast().results(reference.linear_adapter), dtype)


@every_dtype
@every_norm_position
@every_hidden_size
@every_bottleneck
def test_batch_invariance(
    bottleneck: int, hidden_size: int, norm_position: str, dtype: torch.dtype
) -> None:
    """Rows have the same bits alone, in any small batch, and among 1000 others of any adapters."""
    weights = make_weights([5, bottleneck, bottleneck], hidden_size, dtype=dtype)
    x = torch.randn(1001, hidden_size).to(dtype)
    dy = torch.randn(1001, hidden_size).to(dtype)
    ids = torch.randint(-1, 3, (1001,))
    tracked = [0, 1, 500, 999, 1000]
    ids[tracked] = 1

    def run(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return rows_alone_and_together(x[rows], dy[rows], ids[rows], weights, norm_position)

    everything = torch.arange(1001)
    alone = {row: run(torch.tensor([row]), ids) for row in tracked}
    only_this_adapter = torch.ones_like(ids)
    few_rows_of_this_adapter = torch.where(torch.isin(everything, torch.tensor(tracked)), 1, 2)
    for other_ids in (ids, only_this_adapter, few_rows_of_this_adapter):
        y, dx = run(everything, other_ids)
        for row, (y_alone, dx_alone) in alone.items():
            assert torch.equal(y[row], y_alone[0]), f"y of row {row}"
            assert torch.equal(dx[row], dx_alone[0]), f"dx of row {row}"
    y_alone, dx_alone = alone[500]
    for size in range(2, 10):
        for position in (0, size - 1):
            rows = torch.cat([everything[:position], torch.tensor([500]), everything[501:]])[:size]
            y, dx = run(rows, only_this_adapter)
            assert torch.equal(y[position], y_alone[0]), f"y in a batch of {size}"
            assert torch.equal(dx[position], dx_alone[0]), f"dx in a batch of {size}"


@every_dtype
@every_norm_position
@pytest.mark.parametrize("sizes", [(600, 120), (1030, 300)], ids=["600-120", "1030-300"])
def test_batch_invariance_of_one_block(
    sizes: tuple[int, int],
    norm_position: str,
    dtype: torch.dtype,
    set_num_threads: Callable[[int], None],
) -> None:
    """The CPU takes stored weights for another operand where rows fill vectors, but one block."""
    hidden_size, bottleneck = sizes
    weights = make_weights([bottleneck], hidden_size, dtype=dtype)
    x, dy = torch.randn(2, 200, hidden_size).to(dtype)

    def run(count: int) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(count, dtype=torch.int64)
        return rows_alone_and_together(x[:count], dy[:count], ids, weights, norm_position)

    set_num_threads(1)
    y, dx = run(200)
    for threads in (1, 2):
        set_num_threads(threads)
        for count in (1, 7, 31, 32, 33, 50, 64, 96):
            y_part, dx_part = run(count)
            assert torch.equal(y[:count], y_part), f"y in a batch of {count}"
            assert torch.equal(dx[:count], dx_part), f"dx in a batch of {count}"


@every_dtype
@every_norm_position
def test_layout_invariance(norm_position: str, dtype: torch.dtype) -> None:
    """How x and dy lie in memory, and where, does not change a bit."""
    options = {"norm_position": norm_position, **TRAINING["training"]}
    call = Case(shape=(6, 9, 50), bottlenecks=(7, 16), dtype=dtype, options=options).build()
    expected = call.results()
    x = call.x.detach()
    for offset in range(4):
        wide = torch.empty(6, 9, 53, dtype=dtype)
        wide[..., offset : offset + 50] = x
        call.x = wide[..., offset : offset + 50].requires_grad_()
        assert_same_bits(call.results(), expected)
    call.x = x.mT.contiguous().mT.requires_grad_()
    call.dy = call.dy.mT.contiguous().mT
    assert_same_bits(call.results(), expected)


@every_dtype
@pytest.mark.parametrize("rows", [1, 3, 40], ids="rows={}".format)
def test_weights_of_one_row_repeated(rows: int, dtype: torch.dtype) -> None:
    """Rows of a weight may be the same memory, 0 elements apart.

    Not on the PTX simulator, which takes a copy of the last bytes of a row for one of 16.
    """
    call = Case(shape=(rows, 70), bottlenecks=(40,), routing="none", dtype=dtype).build()
    repeated = [
        weight.detach()[:1].expand_as(weight).requires_grad_()
        for weight in (call.weights.down[0], call.weights.up[0])
    ]
    assert repeated[0].stride(0) == 0
    results = []
    for down, up in (repeated, [w.detach().clone().requires_grad_() for w in repeated]):
        call.weights = replace(call.weights, down=[down], up=[up])
        results.append(call.results())
    assert_same_bits(*results)


@every_norm_position
@pytest.mark.parametrize("wanted", ["x", "up[0]", "down[1]", "norm_weight[0]", "norm_bias[1]"])
def test_gradients_do_not_depend_on_which_are_asked_for(wanted: str, norm_position: str) -> None:
    options = {"norm_position": norm_position, **TRAINING["training"]}
    case = Case(shape=(6, 9, 50), bottlenecks=(7, 16), options=options)
    expected = case.build().results()
    name = f"grad of {wanted}"
    assert torch.equal(case.build().requires_grad_([wanted]).results()[name], expected[name])
