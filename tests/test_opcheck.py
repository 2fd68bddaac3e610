"""PyTorch's own checks of the registered ops, and the ops under torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_testing import Case, Recorder
from torch import Tensor

import adapter_ext

OPTIONS: dict[str, dict[str, Any]] = {
    "eval": {},
    "post": {"norm_position": "post"},
    "plain-result": {"residual": False},
    "all-call": {
        "training": True,
        "dropout": 0.2,
        "stochastic_depth": 0.4,
        "l2_lambda": "tensor",
    },
    "all-sample-post": {
        "norm_position": "post",
        "training": True,
        "dropout": 0.2,
        "stochastic_depth": 0.4,
        "stochastic_depth_mode": "sample",
        "l2_lambda": 0.3,
    },
    "compute-dtype": {"compute_dtype": torch.bfloat16},
}
CASES = {
    **{f"lists-{name}": Case(options=options) for name, options in OPTIONS.items()},
    **{
        f"stacked-{name}": Case(bottlenecks=(4, 4, 4), stacked=True, options=options)
        for name, options in OPTIONS.items()
    },
    "one-adapter": Case(bottlenecks=(5,), routing="none"),
    "per-sample": Case(routing="sample"),
    "bfloat16": Case(dtype=torch.bfloat16, weight_dtype=torch.float32),
    "float64": Case(dtype=torch.float64),
    "no-rows": Case(shape=(0, 16)),
    "non-contiguous": Case(layout="transposed", upstream="transposed"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def opcheck(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Any = None) -> None:
    result = torch.library.opcheck(op, args, kwargs)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("shape", [(), (7,), (4, 3), (0,)], ids=str)
def test_route(shape: tuple[int, ...]) -> None:
    opcheck(torch.ops.adapter_ext.route.default, (torch.randint(-1, 3, shape), 3))


@every_case
def test_forward(case: Case) -> None:
    call = case.build()
    arguments = adapter_ext.ops.raw_forward_arguments(
        call.x, call.weights, call.routing, **call.options
    )
    opcheck(torch.ops.adapter_ext.linear_adapter_forward.default, arguments)


@every_case
def test_inference(case: Case) -> None:
    """The op without anything saved, which runs where no gradient is wanted."""
    call = case.build().requires_grad_([])
    arguments = adapter_ext.ops.raw_forward_arguments(
        call.x, call.weights, call.routing, **call.options
    )
    opcheck(torch.ops.adapter_ext.linear_adapter.default, arguments)


@every_case
def test_backward(case: Case) -> None:
    call = case.build()
    recorder = Recorder(torch.ops.adapter_ext.linear_adapter_backward.default)
    with recorder:
        call.results()
    ((args, kwargs, _),) = recorder.calls
    opcheck(recorder.op, args, kwargs)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("options", ["eval", "all-call", "all-sample-post"])
@pytest.mark.parametrize("stacked", [False, True], ids=["lists", "stacked"])
def test_compile(stacked: bool, options: str) -> None:
    """Forward and backward in one graph without breaks, equal to eager mode."""
    case = Case(bottlenecks=(4, 4, 4), stacked=stacked, options=OPTIONS[options])
    call = case.build()
    expected = call.results()
    compiled = torch.compile(adapter_ext.linear_adapter, fullgraph=True, backend="aot_eager")
    for name, result in call.results(compiled).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_with_route() -> None:
    """Other ids, and other weights of the same shapes, run the same compiled code."""
    x = torch.randn(6, 4, 16)
    compiled = torch.compile(_routed, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        ids = torch.randint(-1, 3, (6,))
        weights = Case(bottlenecks=(4, 5, 6)).build().weights
        assert torch.equal(compiled(x, ids, weights), _routed(x, ids, weights))


def _routed(x: Tensor, ids: Tensor, weights: adapter_ext.AdapterWeights) -> Tensor:
    routing = adapter_ext.route(ids, weights.num_adapters)
    return adapter_ext.linear_adapter(x * 2.0, weights, routing)[0].relu()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_follows_manual_seed() -> None:
    """Without an explicit seed, compiled code draws it from torch's generator too."""
    call = Case(options={**OPTIONS["all-call"], "seed": None}).build()
    compiled = torch.compile(adapter_ext.linear_adapter, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    first, second = call.forward(compiled)[0], call.forward(compiled)[0]
    torch.manual_seed(5)
    assert torch.equal(call.forward(compiled)[0], first)
    assert not torch.equal(first, second)
