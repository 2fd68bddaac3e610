"""Gradients by finite differences, of first and second order, and which of them are computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_testing import (
    ACTIVATIONS,
    Call,
    Case,
    Recorder,
    Results,
    assert_results_close,
    make_weights,
    map_weights,
)
from torch import Tensor

import adapter_ext
from adapter_ext import AdapterWeights, ops, reference

OPTIONS: dict[str, dict[str, Any]] = {
    "eval": {},
    "all-call": {
        "training": True,
        "dropout": 0.2,
        "stochastic_depth": 0.4,
        "l2_lambda": "tensor",
    },
    "all-sample": {
        "training": True,
        "dropout": 0.2,
        "stochastic_depth": 0.4,
        "stochastic_depth_mode": "sample",
        "l2_lambda": 0.3,
    },
    "plain-result": {"training": True, "dropout": 0.2, "residual": False},
}

every_norm_position = pytest.mark.parametrize("norm_position", ["pre", "post"])
every_option_group = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
lists_and_stacked = pytest.mark.parametrize("stacked", [False, True], ids=["lists", "stacked"])


@pytest.fixture(autouse=True)
def _one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Thousands of calls of no size: where cores are busy, waking a second thread costs most."""
    set_num_threads(1)


def small_call(
    shape: tuple[int, ...] = (4, 2, 5),
    bottlenecks: tuple[int, ...] = (2, 3),
    **fields: Any,
) -> Call:
    call = Case(shape, bottlenecks, dtype=torch.float64, **fields).build()
    if call.options.get("training"):
        call.options["seed"] = torch.tensor(4)  # drops one of the samples, no adapter
    assert not torch.equal(call.forward()[0], call.x)  # there is something to differentiate
    return call


def as_function(call: Call) -> tuple[Any, list[Tensor]]:
    """linear_adapter as a function of all its differentiable inputs, and those."""

    def function(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        remaining = iter(tensors)
        weights = map_weights(lambda _: next(remaining), call.weights)
        return adapter_ext.linear_adapter(x, weights, call.routing, **call.options)

    return function, list(call.inputs().values())


@every_norm_position
@every_option_group
@pytest.mark.parametrize("routing", ["untouched", "sample", "none"])
@lists_and_stacked
def test_gradcheck(
    stacked: bool, routing: str, options: dict[str, Any], norm_position: str
) -> None:
    bottlenecks = (3, 3) if stacked else (2, 3)
    call = small_call(
        bottlenecks=bottlenecks[:1] if routing == "none" else bottlenecks,
        stacked=stacked,
        routing=routing,
        options={"norm_position": norm_position, **options},
    )
    assert torch.autograd.gradcheck(*as_function(call))


@every_norm_position
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_activations(activation: str, norm_position: str) -> None:
    options = {"activation": activation, "norm_position": norm_position, **OPTIONS["all-call"]}
    assert torch.autograd.gradcheck(*as_function(small_call(options=options)))


@every_norm_position
@every_option_group
@lists_and_stacked
def test_gradgradcheck(stacked: bool, options: dict[str, Any], norm_position: str) -> None:
    call = small_call(
        shape=(3, 2, 4),
        bottlenecks=(2, 2) if stacked else (1, 2),
        stacked=stacked,
        routing="untouched",
        options={"norm_position": norm_position, **options},
    )
    assert torch.autograd.gradgradcheck(*as_function(call), fast_mode=True)


@every_norm_position
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradgradcheck_activations(activation: str, norm_position: str) -> None:
    options = {"activation": activation, "norm_position": norm_position}
    call = small_call(shape=(2, 2, 4), bottlenecks=(1, 2), options=options)
    assert torch.autograd.gradgradcheck(*as_function(call), fast_mode=True)


def test_second_order_in_float32() -> None:
    """A gradient penalty, as a training loop would write it, agrees with the reference."""
    call = Case(shape=(4, 3, 8), options=OPTIONS["all-call"]).build()

    def penalty_gradients(call: Call, function: Any) -> Results:
        y, aux = call.forward(function)
        inputs = call.inputs()
        (dx,) = torch.autograd.grad((y, aux), call.x, (call.dy, call.daux), create_graph=True)
        grads = torch.autograd.grad(dx.square().sum(), list(inputs.values()), allow_unused=True)
        return {
            name: torch.zeros_like(t) if g is None else g
            for (name, t), g in zip(inputs.items(), grads, strict=True)
        }

    assert_results_close(
        penalty_gradients(call, adapter_ext.linear_adapter),
        penalty_gradients(call.upcast(), reference.linear_adapter),
        torch.float32,
    )


WANTED = {
    "x": ["x"],
    "up-of-one": ["up[1]"],
    "down-of-one": ["down[0]"],
    "norm-of-one": ["norm_weight[2]", "norm_bias[2]"],
    "one-adapter": ["norm_weight[1]", "norm_bias[1]", "down[1]", "up[1]"],
    "frozen-x": [f"{field}[{a}]" for field in AdapterWeights._fields for a in range(3)],
    "x-and-one-down": ["x", "down[2]"],
}
every_request = pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED.keys())


@pytest.mark.parametrize("upstream", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_that_are_not_finite(activation: str, upstream: float) -> None:
    """Those of PyTorch: dead units of relu and hardtanh pass none, infinite ones either."""
    generator = torch.Generator().manual_seed(0)
    weights = map_weights(
        lambda w: w.requires_grad_(),
        make_weights((13,), 11, dtype=torch.float64, generator=generator),
    )
    x = torch.randn(9, 11, dtype=torch.float64, generator=generator, requires_grad=True)
    dy = torch.zeros_like(x)
    dy[4, 7] = upstream
    results = []
    for op in (reference.linear_adapter, adapter_ext.linear_adapter):
        y, _ = op(x, weights, activation=activation)
        results.append(torch.autograd.grad(y, [x, weights[2][0]], dy))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
    # A dead unit's row of the first weights is left alone.
    dead = results[0][1].isfinite().all(1)
    assert dead.any() == (activation in ("relu", "hardtanh"))


@every_request
@every_norm_position
@pytest.mark.parametrize("routing", ["row", "unused"])
def test_only_what_requires_grad(routing: str, norm_position: str, wanted: list[str]) -> None:
    """The gradients asked for are right whatever else is frozen; the rest stay None."""
    options = {"norm_position": norm_position, **OPTIONS["all-call"]}
    call = Case(routing=routing, options=options).build().requires_grad_(wanted)
    assert_results_close(
        call.results(), call.upcast().results(reference.linear_adapter), torch.float32
    )
    y, aux = call.forward()
    torch.autograd.backward((y, aux), (call.dy, call.daux))
    with_gradient = [name for name, t in call.inputs().items() if t.grad is not None]
    assert sorted(with_gradient) == sorted(wanted)


@every_request
def test_nothing_else_is_computed(wanted: list[str]) -> None:
    """The native backward returns as many gradients as inputs require one: no dead work."""
    call = Case(options=OPTIONS["all-call"]).build().requires_grad_(wanted)
    with Recorder(ops._backward) as recorder:
        call.results()
    ((_, _, gradients),) = recorder.calls
    assert len(gradients) == len(wanted)


@pytest.mark.parametrize("used", [0, 1], ids=["y", "aux"])
def test_loss_of_one_output(used: int) -> None:
    """A loss may use y or aux alone: the other's upstream gradient counts as zero."""
    call = Case(options=OPTIONS["all-call"]).build()
    upstream = (call.dy, call.daux)
    inputs = call.inputs()
    alone = torch.autograd.grad(call.forward()[used], list(inputs.values()), upstream[used])
    upstream[1 - used].zero_()
    both = call.results()
    for name, grad in zip(inputs, alone, strict=True):
        assert torch.equal(grad, both[f"grad of {name}"]), name


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"]
)
def test_no_graph_without_gradients(mode: type[torch.no_grad]) -> None:
    call = Case(options=OPTIONS["all-call"]).build()
    expected = call.results()
    with mode():
        y, aux = call.forward()
    assert y.grad_fn is None
    assert aux.grad_fn is None
    assert torch.equal(y, expected["y"])
    assert torch.equal(aux, expected["aux"])


def test_no_graph_when_all_is_frozen() -> None:
    call = Case(options=OPTIONS["all-call"]).build().requires_grad_([])
    y, aux = call.forward()
    assert not y.requires_grad
    assert not aux.requires_grad


@every_norm_position
def test_little_is_saved(norm_position: str) -> None:
    """Beyond its inputs the forward keeps no tensor of x's size, only some of T x r."""
    options = {"norm_position": norm_position, **OPTIONS["all-call"]}
    call = Case(shape=(50, 40, 256), bottlenecks=(8, 16), options=options).build()
    assert call.routing is not None
    given = {t.untyped_storage().data_ptr() for t in call.inputs().values()}
    given.update(t.untyped_storage().data_ptr() for t in call.routing)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in given:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call.forward()
    rows, largest_bottleneck = 50 * 40, 16
    assert sum(saved.values()) <= 4 * rows * (largest_bottleneck + 4)


@pytest.mark.parametrize("modified", ["x", "order", "offsets", "l2_lambda", "seed"])
def test_modified_inputs_are_noticed(modified: str) -> None:
    """Writing to one between forward and backward is autograd's error, not a wrong gradient."""
    call = Case(options=OPTIONS["all-call"]).build()
    assert call.routing is not None
    lambdas = torch.full((call.weights.num_adapters,), 0.5, dtype=call.x.dtype)
    given = {**call.routing._asdict(), **call.options, "x": call.x.detach(), "l2_lambda": lambdas}
    given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()}
    routing = adapter_ext.Routing(given["ids"], given["order"], given["offsets"])
    options = {name: given[name] for name in call.options}
    y, aux = adapter_ext.linear_adapter(given["x"], call.weights, routing, **options)
    given[modified].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad((y, aux), list(call.inputs().values())[1:], (call.dy, call.daux))


def test_backward_twice() -> None:
    call = Case(options=OPTIONS["all-call"]).build()
    y, aux = call.forward()
    inputs = list(call.inputs().values())
    upstream = (call.dy, call.daux)
    first = torch.autograd.grad((y, aux), inputs, upstream, retain_graph=True)
    second = torch.autograd.grad((y, aux), inputs, upstream)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_activation_checkpointing() -> None:
    """A recomputed forward has the same masks: torch restores its generator's state."""
    call = Case(options={**OPTIONS["all-call"], "seed": None}).build()

    def gradients(forward: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return torch.autograd.grad(forward(), list(call.inputs().values()), (call.dy, call.daux))

    def checkpointed() -> Any:
        def forward(x: Tensor) -> Any:  # x tells torch whose generator's state to keep
            return dataclasses.replace(call, x=x).forward()

        return torch.utils.checkpoint.checkpoint(forward, call.x, use_reentrant=False)

    for plain, recomputed in zip(gradients(call.forward), gradients(checkpointed), strict=True):
        assert torch.equal(plain, recomputed)
