"""The same layer from PyTorch's own operators: what adapter_ext is measured against.

Everything that can be made once a batch (which rows an adapter has) is made outside of the timed
functions, as :func:`adapter_ext.route` is for the fused op.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import adapter_ext
from adapter_ext import AdapterWeights

EPS = 1e-5


@dataclasses.dataclass
class Problem:
    """One batch: rows, the adapters' weights, and which row uses which adapter.

    Attributes:
        x: ``[T, D]``.
        dy: upstream gradient, ``[T, D]``.
        weights: lists of A tensors.
        stacked: the same weights, one tensor ``[A, ...]`` a field.
        ids: the adapter of each row, int64 ``[T]``.
    """

    x: Tensor
    dy: Tensor
    weights: AdapterWeights
    stacked: tuple[Tensor, Tensor, Tensor, Tensor]
    ids: Tensor

    def float(self) -> Problem:
        """The same values in float32."""

        def convert(tensor: Tensor) -> Tensor:
            return tensor.detach().float().requires_grad_()

        norm_weight, norm_bias, down, up = (convert(field) for field in self.stacked)
        return Problem(
            x=convert(self.x),
            dy=self.dy.float(),
            weights=AdapterWeights(*([convert(w) for w in field] for field in self.weights)),
            stacked=(norm_weight, norm_bias, down, up),
            ids=self.ids,
        )

    def inputs(self, *, stacked: bool = False) -> list[Tensor]:
        """All tensors that get a gradient: x, then each field of the weights."""
        if stacked:
            return [self.x, *self.stacked]
        return [self.x, *(tensor for field in self.weights for tensor in field)]


Forward = Callable[[], Tensor]


def make_problem(
    rows: int,
    hidden_size: int,
    bottleneck: int,
    adapters: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Problem:
    """A random batch whose rows are spread evenly over the adapters, in random order."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        normal = torch.randn(shape, generator=generator, device=device)
        return (normal * scale + shift).to(dtype)

    order = torch.randperm(rows, generator=generator, device=device)

    stacked = (
        randn(adapters, hidden_size, scale=0.1, shift=1.0),
        randn(adapters, hidden_size, scale=0.1),
        randn(adapters, bottleneck, hidden_size, scale=hidden_size**-0.5),
        randn(adapters, hidden_size, bottleneck, scale=bottleneck**-0.5),
    )
    problem = Problem(
        x=randn(rows, hidden_size),
        dy=randn(rows, hidden_size),
        weights=AdapterWeights(*([w.clone() for w in field.unbind()] for field in stacked)),
        stacked=stacked,
        ids=order % adapters,
    )
    for tensor in (*problem.inputs(), *problem.stacked):
        tensor.requires_grad_()
    return problem


def ours(problem: Problem) -> Forward:
    """adapter_ext's fused op."""
    x, weights = problem.x, problem.weights
    routing = adapter_ext.route(problem.ids, weights.num_adapters)
    return lambda: adapter_ext.linear_adapter(x, weights, routing, eps=EPS)[0]


def unrouted(problem: Problem) -> Forward:
    """adapter_ext's fused op for the one adapter that there is, without a routing."""
    x, weights = problem.x, problem.weights
    return lambda: adapter_ext.linear_adapter(x, weights, eps=EPS)[0]


def layer(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """One adapter on all rows: NeMo's LinearAdapter with a residual."""
    n = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)
    return x + F.linear(F.silu(F.linear(n, down)), up)


def _sorted_rows(ids: Tensor, adapters: int) -> tuple[Tensor, list[int], Tensor]:
    """The rows sorted by adapter, how many each has, and where each row went."""
    order = ids.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=ids.device)
    return order, ids.bincount(minlength=adapters).tolist(), inverse


def loop(
    problem: Problem, transform: Callable[..., Callable[..., Tensor]] | None = None
) -> Forward:
    """A loop over the adapters: gather rows in order of their adapter, run each, scatter back.

    Args:
        problem: the batch.
        transform: applied to the function of tensors, such as ``torch.compile``.
    """
    x, weights = problem.x, problem.weights
    if weights.num_adapters == 1:  # nothing to gather
        arguments = tuple(field[0] for field in weights)
        single = transform(layer) if transform else layer
        return lambda: single(x, *arguments)
    order, counts, inverse = _sorted_rows(problem.ids, weights.num_adapters)

    def function(x: Tensor, weights: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
        parts = x.index_select(0, order).split(counts)
        results = [layer(part, *own) for part, own in zip(parts, weights, strict=True)]
        return torch.cat(results).index_select(0, inverse)

    tuples = list(zip(*weights, strict=True))
    transformed = transform(function) if transform else function
    return lambda: transformed(x, tuples)


def compiled(problem: Problem) -> Forward:
    """The loop under ``torch.compile``, for exactly these shapes."""
    torch._dynamo.reset()
    return loop(problem, lambda function: torch.compile(function, dynamic=False, fullgraph=True))


def bmm(problem: Problem) -> Forward:
    """Batched products: the rows of each adapter padded to the longest, weights stacked before."""
    x, (norm_weight, norm_bias, down, up) = problem.x, problem.stacked
    adapters = len(down)
    order, counts, inverse = _sorted_rows(problem.ids, adapters)
    longest = max(counts)
    lengths = torch.tensor(counts, device=x.device)
    first = lengths.cumsum(0) - lengths
    sorted_ids = problem.ids[order]
    position = torch.arange(order.numel(), device=x.device)
    slot = sorted_ids * longest + position - first[sorted_ids]
    padded = torch.zeros(adapters * longest, dtype=torch.int64, device=x.device)
    padded[slot] = order
    back = slot[inverse]

    def forward() -> Tensor:
        rows = x.index_select(0, padded).view(adapters, longest, -1)
        n = F.layer_norm(rows, x.shape[-1:], eps=EPS)
        n = torch.addcmul(norm_bias.unsqueeze(1), n, norm_weight.unsqueeze(1))
        z = F.silu(torch.bmm(n, down.mT))
        return torch.baddbmm(rows, z, up.mT).flatten(0, 1).index_select(0, back)

    return forward


MAKERS: dict[str, Callable[[Problem], Forward]] = {
    "ours": ours,
    "eager": loop,
    "compile": compiled,
    "bmm": bmm,
}
"""What makes an implementation's forward, by the name it has in tables."""
