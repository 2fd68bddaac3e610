"""The CPU kernels compiled for another processor: AArch64, where vectors are NEON's, under QEMU.

All op tests run on them with ``pytest --backend aarch64``; here is a table that reaches every type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import op_testing
import pytest
import torch
from aarch64 import emulator
from op_testing import ACTIVATIONS, Case, check

from adapter_ext import ops

pytestmark = pytest.mark.slow  # compiles for half a minute

TRAINING: dict[str, Any] = {
    "training": True,
    "dropout": 0.3,
    "stochastic_depth": 0.4,
    "l2_lambda": "tensor",
}
# Widths and bottlenecks in whole vectors and not; few rows, which threads share by columns.
SHAPES: dict[str, dict[str, Any]] = {
    "few": {"shape": (5, 70), "bottlenecks": (3, 9)},
    "one": {"shape": (1, 1030), "bottlenecks": (130,), "routing": "none"},
    "many": {"shape": (300, 33), "bottlenecks": (7, 64, 1)},
    "stacked": {"shape": (2, 70, 64), "bottlenecks": (16, 16), "stacked": True},
}

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
every_norm_position = pytest.mark.parametrize("norm_position", ["pre", "post"])


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = emulator.missing()
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(op_testing, "cpu_rounds_bfloat16", False)
    for name, op in emulator.emulated_ops().items():
        monkeypatch.setattr(ops, name, op)


@every_dtype
@every_norm_position
@pytest.mark.parametrize("shape", SHAPES)
def test_dtypes(shape: str, norm_position: str, dtype: torch.dtype) -> None:
    options = {**TRAINING, "norm_position": norm_position}
    check(Case(**SHAPES[shape], dtype=dtype, options=options))


@every_norm_position
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_activations(dtype: torch.dtype, activation: str, norm_position: str) -> None:
    options = {"activation": activation, "norm_position": norm_position}
    check(Case(shape=(20, 33), routing="untouched", dtype=dtype, options=options))


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compute_dtype(compute_dtype: torch.dtype) -> None:
    check(Case(shape=(5, 7, 65), bottlenecks=(16, 7), options={"compute_dtype": compute_dtype}))


@every_dtype
@every_norm_position
def test_threads(
    norm_position: str, dtype: torch.dtype, set_num_threads: Callable[[int], None]
) -> None:
    """The same bits, however the rows are divided."""
    options = {**TRAINING, "norm_position": norm_position}
    call = Case(shape=(40, 3, 50), bottlenecks=(7, 16), dtype=dtype, options=options).build()
    set_num_threads(1)
    expected = call.results()
    set_num_threads(3)
    for name, result in call.results().items():
        assert torch.equal(result, expected[name]), name
