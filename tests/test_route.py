from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import adapter_ext
from adapter_ext import reference


def check(ids: torch.Tensor, num_adapters: int) -> None:
    routing = adapter_ext.route(ids, num_adapters)
    expected = reference.route(ids.contiguous(), num_adapters)
    assert torch.equal(routing.ids, ids)
    for name in ("order", "offsets"):
        actual = getattr(routing, name)
        assert actual.dtype == torch.int64, name
        assert torch.equal(actual, getattr(expected, name)), name


def test_example() -> None:
    routing = adapter_ext.route(torch.tensor([2, -1, 0, 2, 0]), 4)
    assert routing.order.tolist() == [2, 4, 0, 3, 1]
    assert routing.offsets.tolist() == [0, 2, 2, 4, 4]


@pytest.mark.parametrize("shape", [(), (1,), (9,), (4, 3), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("num_adapters", [1, 2, 100])
def test_shapes(num_adapters: int, shape: tuple[int, ...]) -> None:
    check(torch.randint(-1, num_adapters, shape), num_adapters)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("num_adapters", [0, 1, 5])
def test_no_samples(num_adapters: int, shape: tuple[int, ...]) -> None:
    check(torch.empty(shape, dtype=torch.int64), num_adapters)


@pytest.mark.parametrize("num_adapters", [0, 3])
def test_no_sample_has_an_adapter(num_adapters: int) -> None:
    check(torch.full((7,), -1), num_adapters)


def test_non_contiguous() -> None:
    ids = torch.randint(-1, 5, (6, 8))
    check(ids.T, 5)
    check(ids[:, ::2], 5)
    check(ids[0].expand(3, 8), 5)


def test_more_adapters_than_samples() -> None:
    check(torch.tensor([99_999, 0, 99_999]), 100_000)


def test_is_stable_for_many_samples() -> None:
    check(torch.randint(-1, 3, (100_000,)), 3)


@hypothesis.given(st.lists(st.integers(-1, 9), max_size=200), st.integers(10, 12))
def test_random_ids(ids: list[int], num_adapters: int) -> None:
    check(torch.tensor(ids, dtype=torch.int64), num_adapters)
