"""The definition of every op in plain PyTorch: slow, differentiable, the same on every device.

Each backend is tested against these functions; the backward of a backward runs through them.

Notation: rows of ``x`` have the hidden size D, adapter ``a`` has the bottleneck ``r``; ``row`` is a
row's index in ``x.reshape(-1, D)``; a sample is what one routing id governs: one row or several.

Sources. The layer: "Parameter-Efficient Transfer Learning for NLP" (Houlsby et al., 2019) in the
form of NVIDIA NeMo's ``LinearAdapter``. Stochastic depth: "Deep Networks with Stochastic Depth"
(Huang et al., 2016) as NeMo applies it to adapters. Random numbers: Philox4x32-10 of "Parallel
Random Numbers: As Easy as 1, 2, 3" (Salmon et al., 2011).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from adapter_ext.types import AdapterWeights, Routing


def swish(h: Tensor) -> Tensor:
    """As ``F.silu``, h · sigmoid(h), whose backward has no forward-mode derivative."""
    return h * torch.sigmoid(h)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda h: h,
    "hardtanh": F.hardtanh,
    "relu": F.relu,
    "selu": F.selu,
    "swish": swish,
    "silu": swish,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
}
"""Activation functions by name; ``gelu`` is the exact one (erf)."""

_WORD = 0xFFFFFFFF
_DROPOUT_STREAM = 0
_DEPTH_STREAM = 1


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10.

    Args:
        seed: int64 tensor of one element; its low and high 32 bits are the key.
        counter: four int64 tensors of one broadcastable shape, each in [0, 2^32).

    Returns:
        Four int64 tensors of that shape, each uniform in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)  # type: ignore[no-untyped-call]
    k0, k1 = seed.reshape(()) & _WORD, (seed.reshape(()) >> 32) & _WORD
    for _ in range(10):
        # The products wrap modulo 2^64, of which all bits are wanted.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _drop_threshold(probability: float) -> int:
    """A uniform 32-bit word below this threshold means "dropped"."""
    return round(probability * 2.0**32)


def dropout_scale(seed: Tensor, rows: Tensor, hidden_size: int, p: float) -> Tensor:
    """The dropout mask divided by the keep probability.

    The element in column ``c`` of a row is kept where word ``c % 4`` of
    ``philox(counter=(row, row >> 32, c // 4, 0))`` is at least ``p * 2^32``.

    Args:
        seed: int64 tensor of one element.
        rows: int64 ``[N]``, row indices.
        hidden_size: number of columns D.
        p: probability of dropping, in [0, 1].

    Returns:
        float64 ``[N, D]`` of zeros and ``1 / (1 - p)``.
    """
    blocks = torch.arange((hidden_size + 3) // 4, device=rows.device)
    row = rows.unsqueeze(-1)
    stream = torch.full_like(row, _DROPOUT_STREAM)
    words = torch.stack(philox(seed, (row & _WORD, row >> 32, blocks, stream)), dim=-1)
    keep = words.flatten(-2)[:, :hidden_size] >= _drop_threshold(p)
    return keep.double() / (1.0 - p) if p < 1.0 else torch.zeros_like(keep, dtype=torch.float64)


def depth_scale(seed: Tensor, units: Tensor, p: float) -> Tensor:
    """The stochastic depth draw of each unit, divided by the keep probability.

    A unit (an adapter, or a sample) is kept where word 0 of
    ``philox(counter=(unit, unit >> 32, 0, 1))`` is at least ``p * 2^32``.

    Args:
        seed: int64 tensor of one element.
        units: int64 ``[N]``.
        p: probability of dropping, in [0, 1].

    Returns:
        float64 ``[N]`` of zeros and ``1 / (1 - p)``.
    """
    zero = torch.zeros_like(units)
    word = philox(seed, (units & _WORD, units >> 32, zero, zero + _DEPTH_STREAM))[0]
    keep = word >= _drop_threshold(p)
    return keep.double() / (1.0 - p) if p < 1.0 else torch.zeros_like(keep, dtype=torch.float64)


def route(ids: Tensor, num_adapters: int) -> Routing:
    """Sorts samples by adapter; see :func:`adapter_ext.route`."""
    flat = ids.reshape(-1)
    order = torch.argsort(torch.where(flat < 0, num_adapters, flat), stable=True)
    counts = torch.bincount(flat[flat >= 0], minlength=num_adapters)
    return Routing(ids, order, F.pad(counts.cumsum(0), (1, 0)))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension; third derivatives of PyTorch's own are wrong.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``.
        bias: ``[D]``.
        eps: added to the variance.
    """
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred * torch.rsqrt(variance + eps) * weight + bias


def linear_adapter(
    x: Tensor,
    weights: AdapterWeights,
    routing: Routing | None = None,
    *,
    activation: str = "swish",
    norm_position: str = "pre",
    eps: float = 1e-5,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    stochastic_depth_mode: str = "call",
    l2_lambda: float | Tensor = 0.0,
    residual: bool = True,
    training: bool = False,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`adapter_ext.linear_adapter`, to which arguments and result belong.

    For a row x of adapter a::

        pre:  o = up · act(down · LN(x))        post:  o = LN(up · act(down · x))
        d = s · m ⊙ o                           y = x + d  (o ⊙ m without the residual)
        aux[a] = l2_lambda[a] / B_a · Σ over rows of a of ||d||²

    with m the dropout mask over keep probability, s the stochastic depth draw over its keep
    probability, B_a the number of samples of a. Operands of the two products are rounded to
    ``compute_dtype`` where it is given; everything else is in float32, or float64 for float64 x.
    """
    hidden_size = x.shape[-1]
    rows = x.reshape(-1, hidden_size)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    num_adapters = weights.num_adapters
    if routing is None:
        samples = x.shape[0] if x.ndim > 1 else 1
        ids = torch.zeros(samples, dtype=torch.int64, device=x.device)
    else:
        ids = routing.ids.reshape(-1)
        samples = ids.numel()
    rows_per_sample = rows.shape[0] // samples if samples else 0
    lambdas = torch.as_tensor(l2_lambda, dtype=accumulate, device=x.device).expand(num_adapters)

    def operand(t: Tensor) -> Tensor:
        return t if compute_dtype is None else t.to(compute_dtype).to(accumulate)

    y = rows
    aux = []
    for a in range(num_adapters):
        sample = (ids == a).nonzero().squeeze(1)
        row = (
            sample.unsqueeze(1) * rows_per_sample + torch.arange(rows_per_sample, device=x.device)
        ).flatten()
        norm_weight, norm_bias, down, up = (field[a].to(accumulate) for field in weights)
        own = rows[row].to(accumulate)
        n = layer_norm(own, norm_weight, norm_bias, eps)
        h = operand(n if norm_position == "pre" else own) @ operand(down).T
        o = operand(ACTIVATIONS[activation](h)) @ operand(up).T
        if norm_position == "post":
            o = layer_norm(o, norm_weight, norm_bias, eps)
        if training and dropout > 0.0:
            assert seed is not None
            o = o * dropout_scale(seed, row, hidden_size, dropout).to(accumulate)
        if training and stochastic_depth > 0.0:
            assert seed is not None
            per_call = stochastic_depth_mode == "call"
            units = torch.full_like(row, a) if per_call else row // rows_per_sample
            o = o * depth_scale(seed, units, stochastic_depth).to(accumulate).unsqueeze(1)
        result = own + o if residual else o
        y = y.index_copy(0, row, result.to(x.dtype))
        penalty = lambdas[a] * o.square().sum() / max(sample.numel(), 1)
        aux.append(penalty if training else penalty.new_zeros(()))
    total = torch.stack(aux) if aux else lambdas.new_zeros(0)
    return y.reshape(x.shape), total
