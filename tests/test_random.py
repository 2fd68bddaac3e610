"""Statistics of the random draws, seen through the op.

With post norm, norm weight 0 and norm bias 1 an adapter's output is exactly one, so that y of
x = 0 is the product of the dropout mask and the stochastic depth draw, each over its keep
probability.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from op_testing import Case, make_weights, replace
from torch import Tensor

import adapter_ext
from adapter_ext import AdapterWeights

HIDDEN_SIZE = 64


def constant_adapters(num_adapters: int) -> AdapterWeights:
    weights = make_weights([2] * num_adapters, HIDDEN_SIZE)
    ones = [torch.ones(HIDDEN_SIZE) for _ in range(num_adapters)]
    zeros = [torch.zeros(HIDDEN_SIZE) for _ in range(num_adapters)]
    return replace(weights, norm_weight=zeros, norm_bias=ones)


def draws(
    ids: Tensor,
    num_adapters: int,
    *,
    rows_per_sample: int = 1,
    seed: int | None = None,
    **options: float | str,
) -> Tensor:
    """The factors [samples, rows_per_sample, D] that one call draws."""
    x = torch.zeros(ids.shape[0], rows_per_sample, HIDDEN_SIZE)
    y, _ = adapter_ext.linear_adapter(
        x,
        constant_adapters(num_adapters),
        adapter_ext.route(ids, num_adapters),
        norm_position="post",
        training=True,
        seed=None if seed is None else torch.tensor(seed),
        **options,
    )
    return y


def dropout_mask(rows: int, p: float, seed: int = 7, num_adapters: int = 4) -> Tensor:
    """Which elements [rows, D] dropout keeps, rows spread over adapters."""
    ids = torch.arange(rows) % num_adapters
    return draws(ids, num_adapters, dropout=p, seed=seed)[:, 0] > 0


def depth_draws(num_adapters: int, calls: int, p: float) -> Tensor:
    """Which adapters [calls, A] each call keeps."""
    ids = torch.arange(num_adapters)
    return torch.stack(
        [
            draws(ids, num_adapters, stochastic_depth=p, seed=1000 + call)[:, 0, 0] > 0
            for call in range(calls)
        ]
    )


def deviation(kept: Tensor, keep: float) -> Tensor:
    """How far the number kept (along dim 0) is from the expected, in standard deviations."""
    n = kept.shape[0]
    return (kept.double().sum(0) - n * keep) / math.sqrt(n * keep * (1.0 - keep))


def assert_independent(kept: Tensor, keep: float) -> None:
    """Columns of a [N, K] boolean table are fair and pairwise independent.

    With N draws each standardised product sum is nearly normal: none of them may be beyond six
    standard deviations, and their squares (a chi-square statistic) must add up to their number.
    """
    n, columns = kept.shape
    standardised = (kept.double() - keep) / math.sqrt(keep * (1.0 - keep))
    products = standardised.T @ standardised / math.sqrt(n)
    first, second = torch.triu_indices(columns, columns, offset=1)
    statistics = torch.cat([deviation(kept, keep), products[first, second]])
    assert statistics.abs().max() < 6.0
    degrees = statistics.numel()
    chi_square = float(statistics.square().sum())
    assert abs(chi_square - degrees) < 6.0 * math.sqrt(2.0 * degrees)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_dropout_keep_rate(p: float) -> None:
    kept = dropout_mask(4000, p).flatten()
    assert abs(float(deviation(kept, 1.0 - p))) < 5.0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_scale(p: float) -> None:
    values = draws(torch.zeros(50, dtype=torch.int64), 1, dropout=p, seed=3).unique()
    assert values[0] == 0.0
    torch.testing.assert_close(values[1:], torch.tensor([1.0 / (1.0 - p)]))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_columns_are_independent(p: float) -> None:
    assert_independent(dropout_mask(5000, p), 1.0 - p)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_rows_are_independent(p: float) -> None:
    """Neighbouring rows, whose adapters differ; 64 columns of 100 seeds each."""
    masks = [dropout_mask(24, p, seed=seed) for seed in range(100)]
    assert_independent(torch.cat([mask.T for mask in masks]), 1.0 - p)


def test_dropout_of_calls_is_independent() -> None:
    masks = [dropout_mask(100, 0.3, seed=seed).flatten() for seed in range(20)]
    assert_independent(torch.stack(masks, dim=1), 0.7)


def test_dropout_does_not_depend_on_the_adapter() -> None:
    """A mask belongs to the row, whichever adapter the row uses."""
    assert torch.equal(dropout_mask(60, 0.5, num_adapters=1), dropout_mask(60, 0.5, num_adapters=7))


def test_dropout_belongs_to_the_row_index() -> None:
    """More rows after a row, or a split of the rows into samples, do not change its mask."""
    many = dropout_mask(60, 0.5)
    assert torch.equal(dropout_mask(24, 0.5), many[:24])
    ids = torch.zeros(6, dtype=torch.int64)
    samples = draws(ids, 1, rows_per_sample=4, dropout=0.5, seed=7) > 0
    assert torch.equal(samples.flatten(0, 1), many[:24])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_depth_per_call(p: float) -> None:
    """One draw an adapter and call: fair, independent of the other adapters and calls."""
    kept = depth_draws(num_adapters=8, calls=1200, p=p)
    assert_independent(kept, 1.0 - p)
    assert_independent(kept.reshape(-1, 16), 1.0 - p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_depth_per_sample(p: float) -> None:
    ids = torch.arange(8000) % 3
    options = {"stochastic_depth": p, "stochastic_depth_mode": "sample", "seed": 5}
    kept = draws(ids, 3, **options)[:, 0, 0] > 0
    assert_independent(kept.reshape(-1, 16), 1.0 - p)


@pytest.mark.parametrize("mode", ["call", "sample"])
def test_depth_is_one_draw_for_its_unit(mode: str) -> None:
    ids = torch.arange(40) % 8
    options = {"stochastic_depth": 0.5, "stochastic_depth_mode": mode, "seed": 11}
    factors = draws(ids, 8, rows_per_sample=3, **options)
    assert factors.unique().tolist() == [0.0, 2.0]
    units = ids if mode == "call" else torch.arange(40)
    for unit in units.unique():
        assert factors[units == unit].unique().numel() == 1


def test_depth_and_dropout_are_independent() -> None:
    """The draw of sample i and the mask of row i come from different streams."""
    ids = torch.zeros(8000, dtype=torch.int64)
    depth = draws(ids, 1, stochastic_depth=0.5, stochastic_depth_mode="sample", seed=7)[:, 0, :1]
    masks = draws(ids, 1, dropout=0.5, seed=7)[:, 0, :8]
    assert_independent(torch.cat([depth, masks], dim=1) > 0, 0.5)


def test_both_multiply() -> None:
    ids = torch.arange(200) % 4
    depth = {"stochastic_depth": 0.5, "stochastic_depth_mode": "sample"}
    product = draws(ids, 4, dropout=0.25, seed=7, **depth)
    expected = draws(ids, 4, dropout=0.25, seed=7) * draws(ids, 4, seed=7, **depth)
    torch.testing.assert_close(product, expected)


RANDOM_OPTIONS = {
    "dropout": {"dropout": 0.5},
    "depth-call": {"stochastic_depth": 0.5},
    "depth-sample": {"stochastic_depth": 0.5, "stochastic_depth_mode": "sample"},
}
every_random_option = pytest.mark.parametrize(
    "options", RANDOM_OPTIONS.values(), ids=RANDOM_OPTIONS.keys()
)


@every_random_option
def test_follows_manual_seed(options: dict[str, float | str]) -> None:
    ids = torch.arange(64)
    torch.manual_seed(1)
    first, second = draws(ids, 64, **options), draws(ids, 64, **options)
    torch.manual_seed(1)
    again = draws(ids, 64, **options)
    torch.manual_seed(2)
    other = draws(ids, 64, **options)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_nothing_is_drawn_where_nothing_is_random() -> None:
    """Torch's generator does not move in eval, nor in training without random options."""
    torch.manual_seed(1)
    expected = torch.rand(8)
    torch.manual_seed(1)
    for options in ({}, {"training": True}, {"dropout": 0.5, "stochastic_depth": 0.5}):
        Case(options={**options, "seed": None}).build().forward()
    assert torch.equal(torch.rand(8), expected)


@every_random_option
def test_explicit_seed(
    options: dict[str, float | str], set_num_threads: Callable[[int], None]
) -> None:
    """The seed alone decides: not torch's generator, and not the number of threads."""
    ids = torch.arange(300) % 7
    results = []
    for threads, global_seed in itertools.product([1, 2], [1, 2]):
        set_num_threads(threads)
        torch.manual_seed(global_seed)
        results.append(draws(ids, 7, seed=123, **options))
    assert all(torch.equal(result, results[0]) for result in results[1:])
    assert not torch.equal(draws(ids, 7, seed=124, **options), results[0])


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_any_int64_is_a_seed(seed: int) -> None:
    """All 64 bits count: seeds that differ in the high word alone give other masks."""
    mask = dropout_mask(10, 0.5, seed=seed)
    assert 0.3 < mask.double().mean() < 0.7
    assert not torch.equal(mask, dropout_mask(10, 0.5, seed=seed ^ (1 << 40)))


@pytest.mark.parametrize(
    "options",
    [{"dropout": 1.0}, {"stochastic_depth": 1.0}, {"dropout": 1.0, "stochastic_depth": 1.0}],
    ids=["dropout", "depth", "both"],
)
@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_probability_one(dtype: torch.dtype, norm_position: str, options: dict[str, float]) -> None:
    """All is dropped: y is x to the bit, the gradient of x is dy, those of the weights are zero."""
    options = {"norm_position": norm_position, "training": True, "l2_lambda": 0.3, **options}
    call = Case(dtype=dtype, options=options).build()
    results = call.results()
    assert torch.equal(results.pop("y"), call.x)
    assert torch.equal(results.pop("grad of x"), call.dy)
    for name, result in results.items():
        assert torch.equal(result, torch.zeros_like(result)), name
