from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

from adapter_ext import ops

pytest_plugins = ["simt.plugin"]  # the option --backend

hypothesis.settings.register_profile(
    "adapter_ext",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("adapter_ext")


@pytest.fixture(autouse=True)
def _manual_seed() -> None:
    torch.manual_seed(20251122)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled yet, and nothing of this test's stays in memory."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone at the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def matmul_settings() -> Iterator[Any]:
    """The settings for products on CUDA, undone at the end of the test."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield settings
    torch.set_float32_matmul_precision("highest")  # of the older settings
    settings.fp32_precision = before


@pytest.fixture
def op_calls(monkeypatch):
    """The keyword arguments of the calls of the op."""
    calls = []
    op = ops.linear_adapter

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return op(*args, **kwargs)

    monkeypatch.setattr(ops, "linear_adapter", spy)
    return calls
