"""Accuracy where it is hard: activations over all of their range, and norms of difficult rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from op_testing import ACTIVATIONS, make_weights, map_weights
from torch import Tensor

import adapter_ext
from adapter_ext import AdapterWeights, reference, route

# What the activations are off by at most, in float32: so many units in the last place of the
# result, or this absolute error where that is more, near zeros and in tails.
BOUNDS = {
    "identity": (0.0, 0.0),
    "hardtanh": (0.0, 0.0),
    "relu": (0.0, 0.0),
    "selu": (4.0, 0.0),
    "swish": (4.0, 1e-43),
    "silu": (4.0, 1e-43),
    "gelu": (8.0, 1e-9),
    "gelu_tanh": (4.0, 6e-8),
}
DERIVATIVE_BOUNDS = {**BOUNDS, "swish": (4.0, 1e-7), "silu": (4.0, 1e-7)}
DERIVATIVE_BOUNDS |= {"gelu": (8.0, 4e-7), "gelu_tanh": (4.0, 4e-7)}
GROUP = 16  # values that one adapter computes


def through_the_op(activation: str, values: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """The activation of the values, and its derivative, as the native op computes them.

    The norm makes every row ones; the first product makes the values of it, the second leaves
    their activations.
    """
    adapters = values.numel() // group
    down = values.new_zeros(adapters, group, group)
    down[:, :, 0] = values.view(adapters, group)
    down.requires_grad_()
    zeros = values.new_zeros(adapters, group)
    identity = torch.eye(group, dtype=values.dtype).expand(adapters, group, group).contiguous()
    y, _ = adapter_ext.linear_adapter(
        torch.ones_like(zeros),
        AdapterWeights(zeros, torch.ones_like(zeros), down, identity),
        route(torch.arange(adapters), adapters),
        activation=activation,
        residual=False,
    )
    (grad,) = torch.autograd.grad(y.sum(), down)
    return y.detach().flatten(), grad[:, :, 0].flatten()


def exact(activation: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64, by forms that do not cancel."""
    h = values.double().requires_grad_()
    if activation == "gelu":
        result = 0.5 * h * torch.special.erfc(-h * math.sqrt(0.5))
    elif activation == "gelu_tanh":
        result = h * torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (h + 0.044715 * h**3))
    else:
        result = reference.ACTIVATIONS[activation](h)
    (derivative,) = torch.autograd.grad(result.sum(), h)
    return result.detach(), derivative


def excess(got: Tensor, want: Tensor, bound: tuple[float, float]) -> tuple[float, int]:
    """The largest error in units of what is allowed, and where it is."""
    ulps, absolute = bound
    nearest = want.abs().float()
    ulp = (torch.nextafter(nearest, nearest.new_tensor(math.inf)) - nearest).double()
    error = (got.double() - want).abs()
    ratio = torch.where(error == 0.0, 0.0, error / torch.clamp(ulps * ulp, min=absolute))
    at = int(ratio.nan_to_num(nan=math.inf).argmax())
    return float(ratio[at]), at


def finite_values() -> Tensor:
    """Floats of every magnitude, subnormal ones included, more of them where results are large."""
    bits = torch.arange(0, 0x7F7FFFFF, 13411).to(torch.int32)
    magnitudes = torch.cat([bits.view(torch.float32), torch.linspace(0.0, 110.0, 100_000)])
    values = torch.cat([magnitudes, -magnitudes])
    return values[: values.numel() // GROUP * GROUP]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_all_magnitudes(activation: str) -> None:
    values = finite_values()
    # SELU of the largest is infinite.
    values = values.clamp(max=3.2e38) if activation == "selu" else values
    got, derivative = through_the_op(activation, values)
    want, want_derivative = exact(activation, values)
    error, at = excess(got, want, BOUNDS[activation])
    assert error <= 1.0, f"{activation}({values[at]:.9g}) is {got[at]:.9g}, not {want[at]:.9g}"
    error, at = excess(derivative, want_derivative, DERIVATIVE_BOUNDS[activation])
    assert error <= 1.0, (
        f"{activation}'({values[at]:.9g}) is {derivative[at]:.9g}, not {want_derivative[at]:.9g}"
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_of_what_is_not_finite(activation: str, dtype: torch.dtype) -> None:
    """Limits; but NaN, as PyTorch's have it, where they are -inf times 0."""
    upper = {"hardtanh": 1.0}.get(activation, math.inf)
    lower = {"identity": -math.inf, "hardtanh": -1.0, "relu": 0.0, "selu": -1.7580993408473766}
    want = [upper, lower.get(activation, math.nan), math.nan]
    values = torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)
    got, _ = through_the_op(activation, values, group=1)
    torch.testing.assert_close(got, values.new_tensor(want), equal_nan=True, rtol=1e-6, atol=0)


# --- The norm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_size", [7, 333])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_keeps_to_itself(
    bad: float, hidden_size: int, dtype: torch.dtype, norm_position: str
) -> None:
    """NaN or infinity in one row is in its results, and in no other row's."""
    generator = torch.Generator().manual_seed(0)
    weights = make_weights((5, 3), hidden_size, dtype=dtype, generator=generator)
    x = torch.randn(20, hidden_size, generator=generator).to(dtype)
    routing = route(torch.arange(20) % 2, 2)
    options = {"norm_position": norm_position, "eps": 0.05}
    dy = torch.randn(20, hidden_size, generator=generator).to(dtype)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y, _ = adapter_ext.linear_adapter(x, weights, routing, **options)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    want = run(x)
    x[7, hidden_size // 2] = bad
    got = run(x)
    others = torch.arange(20) != 7
    for result, expected in zip(got, want, strict=True):
        assert torch.equal(result[others], expected[others])
        assert not result[7].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, -3.0, 1e4])
def test_constant_rows(value: float, dtype: torch.dtype) -> None:
    """Their variance is zero: the norm gives its bias, whatever the value."""
    weights = make_weights((6,), 50, dtype=dtype, generator=torch.Generator().manual_seed(1))
    x = torch.full((3, 50), value, dtype=dtype)
    y, _ = adapter_ext.linear_adapter(x, weights, residual=False)
    norm_bias, down, up = (field[0].double() for field in weights[1:])
    want = F.silu(norm_bias @ down.T) @ up.T
    rtol = 2e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), want.expand(3, 50), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("hidden_size", [8, 50, 512, 4097])
def test_a_mean_that_is_much_larger_than_the_deviation(hidden_size: int) -> None:
    """Mean 1e4, deviation 1e-2, float32: no worse than the rounding of the mean makes it.

    Each element of the normalised row may be off by half a unit in the last place of the mean, over
    the deviation; sums of squares, or of x before the mean is taken off, would lose all digits.
    """
    generator = torch.Generator().manual_seed(2)
    x = (1e4 + 1e-2 * torch.randn(6, hidden_size, dtype=torch.float64, generator=generator)).float()
    weights = make_weights((5,), hidden_size, generator=generator)
    options = {"activation": "identity", "residual": False, "eps": 1e-12}
    y, _ = adapter_ext.linear_adapter(x, weights, **options)
    exact_weights = map_weights(lambda w: w.double(), weights)
    want, _ = reference.linear_adapter(x.double(), exact_weights, **options)
    deviation = x.double().std(dim=1, correction=0)
    norm_weight, _, down, up = (field[0].double() for field in exact_weights)
    half_ulp = 0.5 * 2.0**-10  # of numbers between 2^13 and 2^14
    change = (up @ (down @ norm_weight)).abs().max()  # of y, where all of the row shifts by one
    allowed = 1.1 * half_ulp / deviation * change + 1e-2 * want.abs().amax(dim=1)
    assert bool(((y - want).abs().amax(dim=1) <= allowed).all())
    # Without the mean's rounding, as the mean is zero: all digits are right.
    y, _ = adapter_ext.linear_adapter(x - 1e4, weights, **options)
    want, _ = reference.linear_adapter(x.double() - 1e4, exact_weights, **options)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
