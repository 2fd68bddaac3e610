"""Autocast and loss scaling: what NeMo's layers do, run by PyTorch's operators, to rounding."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from layer_testing import Block, config, randomize
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import adapter_ext
from adapter_ext import LinearAdapter, ResidualAddAdapterStrategy, ReturnResultAdapterStrategy
from adapter_ext.fused import autocast_output

WIDTH = 35
HALVES = (torch.bfloat16, torch.float16)

every_half = pytest.mark.parametrize("half", HALVES, ids=["bf16", "fp16"])
every_position = pytest.mark.parametrize("position", ["pre", "post"])


def make(position: str = "pre", **cfg: Any) -> LinearAdapter:
    """A trained-looking adapter in float32: outputs and gradients of order one."""
    adapter = LinearAdapter(WIDTH, 9, activation="gelu", norm_position=position, **cfg)
    randomize(adapter)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.0 / parameter.shape[1] ** 0.5)
    return adapter


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def step(adapter: LinearAdapter, x: Tensor, residual: bool, ours: bool, **autocast: Any) -> Any:
    """y, and the gradients of x and the weights for one upstream gradient."""
    adapter, x = copy.deepcopy(adapter), x.detach().clone().requires_grad_()
    strategy = ResidualAddAdapterStrategy() if residual else ReturnResultAdapterStrategy()
    with torch.autocast("cpu", **autocast) if autocast else nullcontext():
        if ours:
            y = strategy(x, adapter, module=Block(WIDTH))
        else:
            y = x + adapter.module(x) if residual else adapter.module(x)
    y.backward(rand(*y.shape, seed=3).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in adapter.parameters())]


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).abs().max() / exact.abs().max())


@every_half
@every_position
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "result"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=["x-fp32", "x-bf16", "x-fp16"])
def test_like_the_layers(
    dtype: torch.dtype, residual: bool, position: str, half: torch.dtype
) -> None:
    """The types of PyTorch's layers, and errors that are at most twice theirs."""
    adapter, x = make(position), rand(6, 5, WIDTH, dtype=dtype)
    ours = step(adapter, x, residual, ours=True, dtype=half)
    layers = step(adapter, x, residual, ours=False, dtype=half)
    exact = step(copy.deepcopy(adapter).double(), x.double(), residual, ours=False)
    # Types are rounded to at the least here; x of 16 bits is exact, but its gradient is not.
    rounding = max(torch.finfo(t).eps for t in (half, dtype))
    for got, like, want in zip(ours, layers, exact, strict=True):
        assert got.dtype is like.dtype
        assert error(got, want) <= 2.0 * error(like, want) + rounding
        assert error(got, want) < 8.0 * rounding
    if dtype is not half:  # autocast did something; the CPU adds no rounding to what x has
        plain = step(adapter, x, residual, ours=True)
        assert not torch.equal(ours[0].float(), plain[0].to(ours[0].dtype).float())


def test_float64_is_left_alone() -> None:
    adapter, x = make().double(), rand(4, WIDTH, dtype=torch.float64)
    plain = step(adapter, x, True, ours=True)
    inside = step(adapter, x, True, ours=True, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(inside, plain, strict=True))


@every_half
def test_rules_of_cuda(half: torch.dtype) -> None:
    """Where autocast's norm is in float32, so is the result of an adapter that ends with it."""
    with FakeTensorMode():
        on_cuda, on_cpu = torch.empty(2, device="cuda"), torch.empty(2)
    assert autocast_output(on_cuda, half, "post") is torch.float32
    assert autocast_output(on_cuda, half, "pre") is half
    assert autocast_output(on_cpu, half, "post") is half


def test_on_and_off() -> None:
    """Autocast is read at each call: what was computed with it does not stay."""
    block = make_host()
    x = rand(4, WIDTH)
    plain = block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = block.forward_enabled_adapters(x)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(block(x), plain)
        assert torch.equal(block.forward_enabled_adapters(x), rounded)
    assert torch.equal(block(x), plain)
    assert not torch.equal(block.forward_enabled_adapters(x), rounded)


def make_host(**cfg: Any) -> Block:
    block = Block(WIDTH)
    for name in ("a", "b"):
        block.add_adapter(name, config(in_features=WIDTH, dim=9, **cfg))
    randomize(block)
    return block.train()


@every_half
@every_position
def test_routed(position: str, half: torch.dtype) -> None:
    """Each sample as in the chain, in the type of x: samples without an adapter pass unchanged."""
    block = make_host(norm_position=position)
    x = rand(4, 3, WIDTH)
    with torch.autocast("cpu", dtype=half):
        with block.route_adapters(["a", "b", None, "b"]):
            routed = block.forward_enabled_adapters(x)
        alone = []
        for name, sample in zip(["a", "b", None, "b"], x, strict=True):
            block.set_enabled_adapters(enabled=False)
            if name:
                block.set_enabled_adapters(name)
            alone.append(block.forward_enabled_adapters(sample[None]))
            block.set_enabled_adapters()
    assert routed.dtype is torch.float32
    assert torch.equal(routed, torch.cat(alone))


@pytest.mark.parametrize("autocast", [True, False])
def test_master_weights(autocast: bool) -> None:
    """Activations in bfloat16, weights and their gradients in float32, with autocast or without.

    Without it NeMo's layers refuse the mixture.
    """
    adapter, x = make(), rand(40, WIDTH, dtype=torch.bfloat16)
    settings = {"dtype": torch.bfloat16} if autocast else {}
    y, of_x, *of_weights = step(adapter, x, True, ours=True, **settings)
    assert y.dtype is of_x.dtype is torch.bfloat16
    exact = step(copy.deepcopy(adapter).double(), x.double(), True, ours=False)
    bound = 8.0 * torch.finfo(torch.bfloat16).eps
    for got, want in zip([y, of_x, *of_weights], exact, strict=True):
        assert error(got, want) < bound
    assert all(g.dtype is torch.float32 for g in of_weights)
    if not autocast:
        with pytest.raises(RuntimeError):
            adapter.module(x)


# --- Loss scaling ---------------------------------------------------------------------------------


@every_position
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=["fp32", "bf16", "fp16"])
def test_gradients_that_are_not_finite_stay_so(
    dtype: torch.dtype, bad: float, position: str
) -> None:
    """One such element upstream, and just those gradients are not finite that the layers' are."""
    adapter = make(position).to(dtype)
    x = rand(7, WIDTH, dtype=dtype)
    upstream = rand(7, WIDTH, dtype=dtype, seed=4)
    upstream[2, 5] = bad
    results = []
    for run in (
        lambda x: x + adapter.module(x),
        lambda x: ResidualAddAdapterStrategy()(x, adapter, module=Block(WIDTH)),
        routed_by_one(adapter),
    ):
        x = x.detach().requires_grad_()
        results.append(torch.autograd.grad(run(x), [x, *adapter.parameters()], upstream))
    layers, *ours = results
    assert not layers[0].isfinite().all()
    assert layers[0][3:].isfinite().all()
    for gradients in ours:
        for got, want in zip(gradients, layers, strict=True):
            assert torch.equal(got.isfinite(), want.isfinite())


def routed_by_one(adapter: LinearAdapter) -> Any:
    weights = adapter.fused_call().weights  # type: ignore[union-attr]
    position = adapter.norm_position

    def run(x: Tensor) -> Tensor:
        routing = adapter_ext.route(torch.zeros(len(x), dtype=torch.int64), 1)
        return adapter_ext.linear_adapter(
            x, weights, routing, activation="gelu", norm_position=position
        )[0]

    return run


@every_position
def test_infinite_gradients_under_dropout(position: str) -> None:
    """As with PyTorch's dropout they spread, from an element that was dropped, too."""
    adapter = make(position, dropout=0.5).train()
    x = rand(6, WIDTH).requires_grad_()
    torch.manual_seed(0)
    output = adapter(x)
    for dropped in (True, False):
        row, column = ((output == 0.0) == dropped).nonzero()[0]
        upstream = torch.ones_like(output)
        upstream[row, column] = float("inf")
        inputs = [x, *adapter.parameters()]
        gradients = torch.autograd.grad(output, inputs, upstream, retain_graph=True)
        assert not any(g.isfinite().all() for g in gradients)


def test_infinite_gradients_of_a_dropped_adapter() -> None:
    """It is not computed: the input's gradient is infinite, those of the weights are zero."""
    adapter, x = make(), rand(6, WIDTH).requires_grad_()
    strategy = ResidualAddAdapterStrategy(stochastic_depth=1.0)
    upstream = torch.ones_like(x)
    upstream[1, 2] = float("inf")
    strategy(x, adapter, module=Block(WIDTH).train()).backward(upstream)
    assert torch.equal(x.grad, upstream)
    assert not any(p.grad.any() for p in adapter.parameters())


def test_overflow_is_infinite() -> None:
    """A gradient beyond float16's range becomes infinite and is not clamped to the range."""
    adapter = make().half()
    x = rand(40, WIDTH, dtype=torch.float16)
    upstream = torch.full_like(x, 3e4)
    y = ResidualAddAdapterStrategy()(x, adapter, module=Block(WIDTH))
    y.backward(upstream)
    of_up = adapter.module[3].weight.grad
    exact = copy.deepcopy(adapter).double()
    (exact(x.double()) * 3e4).sum().backward()
    beyond = exact.module[3].weight.grad.abs() > 1.1 * torch.finfo(torch.float16).max
    assert beyond.any()
    assert of_up[beyond].isinf().all()


def test_grad_scaler() -> None:
    """A scale that is far too large at first: steps are skipped until it fits, then it learns.

    The layers' gradients overflow sooner, as they round those in between to float16 as well.
    """
    x, target = rand(30, WIDTH), rand(30, WIDTH, seed=8)

    def train(ours: bool) -> tuple[list[float], list[float]]:
        adapter = make()
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**27, growth_interval=5)
        scales, losses = [], []
        for _ in range(20):
            before = [p.detach().clone() for p in adapter.parameters()]
            with torch.autocast("cpu", dtype=torch.float16):
                y = adapter(x) if ours else adapter.module(x)
                assert y.dtype is torch.float16
                loss = nn.functional.mse_loss(y.float(), target)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped = scaler.get_scale() < scale
            unchanged = all(map(torch.equal, before, adapter.parameters()))
            assert skipped == unchanged
            scales.append(scaler.get_scale())
            losses.append(float(loss.detach()))
        return scales, losses

    (scales, losses), (expected_scales, expected_losses) = train(True), train(False)
    assert scales[0] < 2.0**27
    assert all(a >= b for a, b in zip(scales, expected_scales, strict=True))
    assert scales[-1] <= 8.0 * expected_scales[-1]
    assert losses[-1] <= 1.01 * expected_losses[-1] < 0.9 * losses[0]
