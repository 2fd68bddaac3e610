"""The CUDA kernels, run by a host stand-in for CUDA (tests/simt), against the reference.

All op tests run on them with ``pytest --backend simt`` (or ``simt-race``, ``simt-sanitize``,
``ptxsim``); here is a table that reaches every kernel for every type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import op_testing
import pytest
import torch
from op_testing import ROUTINGS, Case, check
from simt import build, plugin

import adapter_ext
from adapter_ext import ops, reference

pytestmark = pytest.mark.skipif(build.missing("plain") is not None, reason="g++ is missing")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRAINING: dict[str, Any] = {
    "training": True,
    "dropout": 0.3,
    "stochastic_depth": 0.4,
    "l2_lambda": "tensor",
}
# Name → shape and bottlenecks. Widths in whole vectors and not; bottlenecks of several blocks;
# rows of several tiles and several ranges.
SHAPES: dict[str, dict[str, Any]] = {
    "few": {"shape": (5, 70), "bottlenecks": (3, 9)},
    "wide": {"shape": (6, 520), "bottlenecks": (8, 5, 8)},
    "deep": {"shape": (20, 40), "bottlenecks": (70, 130)},
    "many": {"shape": (300, 33), "bottlenecks": (7,)},
    "aligned": {"shape": (2, 70, 64), "bottlenecks": (16, 64)},
}


def _backend(request: pytest.FixtureRequest) -> str:
    backend: str = request.config.getoption("--backend")
    return "simt" if backend == "native" else backend


@pytest.fixture(params=[(4, 0), (1, 1)], ids=["busy", "idle"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ops run on the simulator. With few multiprocessors tiles are enough to fill them."""
    multiprocessors, seed = request.param
    simulator = plugin.Simulator(_backend(request), seed, "ascending", multiprocessors)
    simulated: Any = torch.ops.adapter_ext_simt
    for name, op in (
        ("_inference", simulated.linear_adapter),
        ("_forward", simulated.linear_adapter_forward),
        ("_backward", simulated.linear_adapter_backward),
        ("_route", simulated.route),
    ):
        monkeypatch.setattr(ops, name, op.default)
    monkeypatch.setattr(op_testing, "tensor_cores", True)
    yield
    errors = simulator.errors()
    simulator.clear()
    assert errors is None


@pytest.mark.usefixtures("_kernels")
class TestKernels:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("norm_position", ["pre", "post"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_training(self, dtype: torch.dtype, norm_position: str, shape: str) -> None:
        check(
            Case(**SHAPES[shape], dtype=dtype, options={"norm_position": norm_position, **TRAINING})
        )

    @pytest.mark.parametrize("norm_position", ["pre", "post"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_plain(self, dtype: torch.dtype, norm_position: str) -> None:
        check(Case(**SHAPES["aligned"], dtype=dtype, options={"norm_position": norm_position}))

    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_routing(self, routing: str) -> None:
        bottlenecks = (5,) if routing == "none" else (5, 1, 8)
        check(Case(routing=routing, bottlenecks=bottlenecks))
        check(Case(routing=routing, bottlenecks=bottlenecks, options=TRAINING))

    @pytest.mark.parametrize("activation", op_testing.ACTIVATIONS)
    def test_activation(self, activation: str) -> None:
        check(Case(dtype=torch.float64, options={"activation": activation}))

    @pytest.mark.parametrize("mode", ["call", "sample"])
    def test_stochastic_depth_mode(self, mode: str) -> None:
        check(Case(shape=(9, 4, 20), options={**TRAINING, "stochastic_depth_mode": mode}))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_float32_weights(self, dtype: torch.dtype) -> None:
        check(Case(**SHAPES["few"], dtype=dtype, weight_dtype=torch.float32))

    @pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_compute_dtype(self, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        check(Case(**SHAPES["few"], dtype=dtype, options={"compute_dtype": compute_dtype}))

    def test_stacked(self) -> None:
        check(Case(bottlenecks=(6, 6, 6), stacked=True, options=TRAINING))

    def test_more_adapters_than_launch_parameters_hold(self) -> None:
        check(Case(shape=(50, 24), bottlenecks=(3, 1, 2, 4) * 10))

    def test_return_result(self) -> None:
        check(Case(options={"residual": False}))

    @pytest.mark.parametrize("samples", [0, 1, 33, 3000])
    @pytest.mark.parametrize("num_adapters", [1, 5, 100])
    def test_route(self, num_adapters: int, samples: int) -> None:
        ids = torch.randint(-1, num_adapters, (samples,))
        routing, expected = adapter_ext.route(ids, num_adapters), reference.route(ids, num_adapters)
        assert torch.equal(routing.order, expected.order)
        assert torch.equal(routing.offsets, expected.offsets)


def test_a_row_has_the_same_bits_in_every_batch(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode kernels, whole tiles of 16 rows and of 64 agree, and so do rows in other company."""
    simulated: Any = torch.ops.adapter_ext_simt
    for dtype in DTYPES:
        for norm_position in ("pre", "post"):
            case = Case(
                shape=(70, 600),
                bottlenecks=(20,),
                dtype=dtype,
                options={"norm_position": norm_position},
            )
            call = case.build()
            outputs = []
            for multiprocessors, rows in ((100, 70), (4, 70), (1, 70), (100, 1)):
                simulator = plugin.Simulator(_backend(request), 0, "ascending", multiprocessors)
                monkeypatch.setattr(ops, "_inference", simulated.linear_adapter.default)
                with torch.no_grad():
                    some = dataclasses.replace(call, x=call.x[:rows], routing=None)
                    outputs.append(some.forward()[0])
                assert simulator.errors() is None
            for other in outputs[1:]:
                assert torch.equal(outputs[0][: len(other)], other), (dtype, norm_position)
