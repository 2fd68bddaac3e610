from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

# Before torch is there: threads that wait for work must not spin where other processes need the
# cores, which are other tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

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

WORKERS = 2


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in some processes, unless -n says otherwise; a file in one of them.

    Files and tests that are named run in this process: workers take seconds to start.
    """
    option = config.option
    if not config.pluginmanager.has_plugin("xdist") or hasattr(config, "workerinput"):
        return
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    if option.numprocesses is None and not named and not option.tx and not option.usepdb:
        option.numprocesses = WORKERS
    if option.numprocesses and option.dist == "no":
        option.dist = "loadfile"


def pytest_collection_finish() -> None:
    """Keeps Python from looking for garbage in all that was imported, and stays."""
    gc.collect()
    gc.freeze()


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
