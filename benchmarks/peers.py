"""The same layer from PyTorch's own operators: what adapter_ext is measured against.

Everything that can be made once a batch (which rows an adapter has) is made outside of the timed
functions, as :func:`adapter_ext.route` is for the fused op. Adapters without rows cost no peer
anything.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import adapter_ext
from adapter_ext import AdapterWeights

EPS = 1e-5
SPREADS = ("even", "zipf", "one")
"""How rows are spread over adapters: evenly, by Zipf's law, or 90% of them for one adapter."""


class UnavailableError(Exception):
    """A peer cannot do what is asked for, or is not installed: the message says why."""


def spread_counts(spread: str, samples: int, adapters: int) -> list[int]:
    """How many samples each adapter has; with more adapters than samples, many have none."""
    if spread == "even":
        shares = [1.0] * adapters
    elif spread == "zipf":
        shares = [1 / rank for rank in range(1, adapters + 1)]
    elif spread == "one":
        shares = [0.9] + [0.1 / (adapters - 1)] * (adapters - 1) if adapters > 1 else [1.0]
    else:
        raise ValueError(f"spread: expected one of {', '.join(SPREADS)}, got {spread!r}")
    sums = list(itertools.accumulate(shares))
    ends = [round(samples * total / sums[-1]) for total in sums]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


@dataclasses.dataclass
class Problem:
    """One batch: rows, the adapters' weights, and which row uses which adapter.

    Attributes:
        x: ``[T, D]``.
        dy: upstream gradient, ``[T, D]``.
        weights: lists of A tensors.
        stacked: the same weights, one tensor ``[A, ...]`` a field.
        ids: the adapter of each row, int64 ``[T]``.
        sample_rows: so many successive rows are a sample, and have the same adapter.
        use_stacked: whether our op gets the weights stacked.
    """

    x: Tensor
    dy: Tensor
    weights: AdapterWeights
    stacked: tuple[Tensor, Tensor, Tensor, Tensor]
    ids: Tensor
    sample_rows: int = 1
    use_stacked: bool = False

    def float(self) -> Problem:
        """The same values in float32."""

        def convert(tensor: Tensor) -> Tensor:
            return tensor.detach().float().requires_grad_()

        norm_weight, norm_bias, down, up = (convert(field) for field in self.stacked)
        return dataclasses.replace(
            self,
            x=convert(self.x),
            dy=self.dy.float(),
            weights=AdapterWeights(*([convert(w) for w in field] for field in self.weights)),
            stacked=(norm_weight, norm_bias, down, up),
        )


Forward = Callable[[], Tensor]
Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""One adapter on rows x, with its norm_weight, norm_bias, down and up."""


@dataclasses.dataclass
class Implementation:
    """A forward that is ready to be timed.

    Attributes:
        forward: gives y.
        inputs: what gets a gradient: x, and of some fields of the weights A tensors or a stack.
        order: which rows of the problem those of its x and y are, where not the same.
    """

    forward: Forward
    inputs: dict[str, Tensor | list[Tensor]]
    order: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors of ``inputs``."""
        values = self.inputs.values()
        return [t for value in values for t in ([value] if isinstance(value, Tensor) else value)]


def on_lists(problem: Problem, forward: Forward) -> Implementation:
    """A forward of x and the lists of weights."""
    return Implementation(forward, {"x": problem.x, **problem.weights._asdict()})


def on_stacks(problem: Problem, forward: Forward) -> Implementation:
    """A forward of x and the stacked weights."""
    fields = zip(AdapterWeights._fields, problem.stacked, strict=True)
    return Implementation(forward, {"x": problem.x, **dict(fields)})


def make_problem(
    rows: int,
    hidden_size: int,
    bottleneck: int,
    adapters: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    spread: str = "even",
    sample_rows: int = 1,
    stacked: bool = False,
) -> Problem:
    """A random batch.

    Args:
        rows: T.
        hidden_size: D.
        bottleneck: r.
        adapters: A.
        dtype: of x and the weights.
        device: where.
        spread: of the samples over the adapters, in random order.
        sample_rows: rows of a sample; divides T.
        stacked: whether the weights are stacked; the lists are views of the stacks then.
    """
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        normal = torch.randn(shape, generator=generator, device=device)
        return normal.mul_(scale).add_(shift).to(dtype)

    samples = rows // sample_rows
    order = torch.randperm(samples, generator=generator, device=device)
    counts = torch.tensor(spread_counts(spread, samples, adapters), device=device)
    ids = torch.arange(adapters, device=device).repeat_interleave(counts)[order]

    stacks = (
        randn(adapters, hidden_size, scale=0.1, shift=1.0),
        randn(adapters, hidden_size, scale=0.1),
        randn(adapters, bottleneck, hidden_size, scale=hidden_size**-0.5),
        randn(adapters, hidden_size, bottleneck, scale=bottleneck**-0.5),
    )
    lists = ([w if stacked else w.clone() for w in field.unbind()] for field in stacks)
    problem = Problem(
        x=randn(rows, hidden_size),
        dy=randn(rows, hidden_size),
        weights=AdapterWeights(*lists),
        stacked=stacks,
        ids=ids.repeat_interleave(sample_rows),
        sample_rows=sample_rows,
        use_stacked=stacked,
    )
    for tensor in (problem.x, *problem.stacked, *(t for field in problem.weights for t in field)):
        tensor.requires_grad_()
    return problem


def ours(problem: Problem) -> Implementation:
    """adapter_ext's fused op."""
    x = problem.x
    weights = AdapterWeights(*problem.stacked) if problem.use_stacked else problem.weights
    routing = adapter_ext.route(problem.ids, problem.weights.num_adapters)
    on = on_stacks if problem.use_stacked else on_lists
    return on(problem, lambda: adapter_ext.linear_adapter(x, weights, routing, eps=EPS)[0])


def unrouted(problem: Problem) -> Implementation:
    """adapter_ext's fused op for the one adapter that there is, without a routing."""
    x, weights = problem.x, problem.weights
    return on_lists(problem, lambda: adapter_ext.linear_adapter(x, weights, eps=EPS)[0])


def layer(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """One adapter on all rows: NeMo's LinearAdapter with a residual."""
    n = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)
    return x + F.linear(F.silu(F.linear(n, down)), up)


@dataclasses.dataclass
class Sorted:
    """The rows of a batch sorted by adapter.

    Attributes:
        order: the rows, sorted.
        inverse: where each row went.
        used: the adapters that have rows.
        counts: how many rows each of them has.
    """

    order: Tensor
    inverse: Tensor
    used: list[int]
    counts: list[int]

    @classmethod
    def of(cls, problem: Problem) -> Sorted:
        """Those of a problem."""
        order = problem.ids.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        counts = problem.ids.bincount().tolist()
        used = [adapter for adapter, count in enumerate(counts) if count]
        return cls(order, inverse, used, [counts[adapter] for adapter in used])


def loop(
    problem: Problem,
    transform: Callable[..., Callable[..., Tensor]] | None = None,
    layer: Layer = layer,
) -> Implementation:
    """A loop over the adapters: gather rows in order of their adapter, run each, scatter back.

    Args:
        problem: the batch.
        transform: applied to the function of tensors, such as ``torch.compile``.
        layer: of one adapter.
    """
    x, weights = problem.x, problem.weights
    tuples = list(zip(*weights, strict=True))
    if len(tuples) == 1:  # nothing to gather
        single = transform(layer) if transform else layer
        return on_lists(problem, lambda: single(x, *tuples[0]))
    rows = Sorted.of(problem)

    def function(x: Tensor, weights: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
        parts = torch.split(x.index_select(0, rows.order), rows.counts)
        results = [layer(part, *own) for part, own in zip(parts, weights, strict=True)]
        return torch.cat(results).index_select(0, rows.inverse)

    used = [tuples[adapter] for adapter in rows.used]
    transformed = transform(function) if transform else function
    return on_lists(problem, lambda: transformed(x, used))


def by_index(problem: Problem) -> Implementation:
    """A loop over the adapters that reads and writes the rows of each by their indices."""
    x, weights = problem.x, problem.weights
    tuples = list(zip(*weights, strict=True))
    rows = Sorted.of(problem)
    parts = list(zip(rows.used, torch.split(rows.order, rows.counts), strict=True))

    def forward() -> Tensor:
        y = torch.empty_like(x)
        for adapter, indices in parts:
            y[indices] = layer(x[indices], *tuples[adapter])
        return y

    return on_lists(problem, forward)


def compiled(problem: Problem) -> Implementation:
    """The loop under ``torch.compile``, for exactly these shapes."""
    torch._dynamo.reset()
    return loop(problem, lambda function: torch.compile(function, dynamic=False, fullgraph=True))


@dataclasses.dataclass(frozen=True)
class Padded:
    """The rows of each adapter that has some, padded to the longest adapter's.

    Attributes:
        order: the row of x for each padded one, [adapters, rows] flat.
        back: the padded row for each row of x.
        used: the adapters that have rows; None: all.
        shape: adapters that have rows, and rows of each.
    """

    order: Tensor
    back: Tensor
    used: Tensor | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, problem: Problem) -> Padded:
        """How a problem's rows are padded."""
        device = problem.x.device
        rows = Sorted.of(problem)
        longest, adapters = max(rows.counts), len(rows.used)
        lengths = torch.tensor(rows.counts, device=device)
        first = lengths.cumsum(0) - lengths
        groups = torch.arange(adapters, device=device).repeat_interleave(lengths)
        slot = groups * longest + torch.arange(len(problem.x), device=device) - first[groups]
        order = torch.zeros(adapters * longest, dtype=torch.int64, device=device)
        order[slot] = rows.order
        unused = adapters < len(problem.weights.down)
        used = torch.tensor(rows.used, device=device) if unused else None
        return cls(order, slot[rows.inverse], used, (adapters, longest))

    def gather(self, x: Tensor) -> Tensor:
        """The padded rows of x, [adapters, rows, D]."""
        return x.index_select(0, self.order).view(*self.shape, -1)

    def scatter(self, y: Tensor) -> Tensor:
        """The inverse of ``gather``."""
        return y.flatten(0, 1).index_select(0, self.back)

    def select(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """The weights that are used, picked in each call."""
        if self.used is None:
            return weights
        return [field.index_select(0, self.used) for field in weights]


def bmm(problem: Problem) -> Implementation:
    """Batched products: the rows of each adapter padded to the longest, weights stacked before."""
    x, stacked = problem.x, problem.stacked
    rows = Padded.of(problem)

    def forward() -> Tensor:
        norm_weight, norm_bias, down, up = rows.select(stacked)
        inputs = rows.gather(x)
        n = F.layer_norm(inputs, x.shape[-1:], eps=EPS)
        n = torch.addcmul(norm_bias.unsqueeze(1), n, norm_weight.unsqueeze(1))
        z = F.silu(torch.bmm(n, down.mT))
        return rows.scatter(torch.baddbmm(inputs, z, up.mT))

    return on_stacks(problem, forward)


def folded(problem: Problem) -> Implementation:
    """``bmm`` with the norm's weight and bias folded into the first product before.

    It has no backward: training would fold them anew in each step.
    """
    x = problem.x.detach()
    norm_weight, norm_bias, down, up = (field.detach() for field in problem.stacked)
    weights = (down * norm_weight.unsqueeze(1), (down @ norm_bias.unsqueeze(2)).mT, up)
    rows = Padded.of(problem)

    def forward() -> Tensor:
        down, bias, up = rows.select(weights)
        inputs = rows.gather(x)
        n = F.layer_norm(inputs, x.shape[-1:], eps=EPS)
        z = F.silu(torch.baddbmm(bias, n, down.mT))
        return rows.scatter(torch.baddbmm(inputs, z, up.mT))

    return Implementation(forward, {})


def grouped(problem: Problem) -> Implementation:
    """``torch.nn.functional.grouped_mm`` on the rows sorted by adapter, weights stacked before."""
    grouped_mm = getattr(F, "grouped_mm", None)
    if grouped_mm is None:
        raise UnavailableError(f"torch {torch.__version__} has no grouped_mm")
    x, (norm_weight, norm_bias, down, up) = problem.x, problem.stacked
    if any(size * x.itemsize % 16 for size in down.shape[1:]):
        raise UnavailableError("grouped_mm needs rows of whole 16 bytes")
    rows = Sorted.of(problem)
    sorted_ids = problem.ids[rows.order]
    counts = problem.ids.bincount(minlength=len(down))
    ends = counts.cumsum(0, dtype=torch.int32)

    def forward() -> Tensor:
        inputs = x.index_select(0, rows.order)
        n = F.layer_norm(inputs, x.shape[-1:], eps=EPS)
        own_weight, own_bias = (w.index_select(0, sorted_ids) for w in (norm_weight, norm_bias))
        n = torch.addcmul(own_bias, n, own_weight)
        z = F.silu(grouped_mm(n, down.mT, offs=ends))
        y: Tensor = inputs + grouped_mm(z, up.mT, offs=ends)
        return y.index_select(0, rows.inverse)

    return on_stacks(problem, forward)


def onednn(problem: Problem) -> Implementation:
    """The loop with oneDNN's linear: weights packed before, activation and residual fused.

    It has no backward.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise UnavailableError("torch was built without oneDNN")
    if problem.x.is_cuda:
        raise UnavailableError("oneDNN's linear runs on the CPU")
    ops = torch.ops.mkldnn
    rows = Sorted.of(problem)
    used = [tuple(field[a].detach() for field in problem.weights) for a in rows.used]
    packed = [
        (norm_weight, norm_bias, *(ops._reorder_linear_weight(w, count) for w in products))
        for (norm_weight, norm_bias, *products), count in zip(used, rows.counts, strict=True)
    ]

    def fused(
        x: Tensor, norm_weight: Tensor, norm_bias: Tensor, down: Tensor, up: Tensor
    ) -> Tensor:
        n = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)
        z = ops._linear_pointwise(n, down, None, "swish", [], "")
        y: Tensor = ops._linear_pointwise.binary(z, x, up, None, "add")
        return y

    x = problem.x.detach()
    if len(problem.weights.down) == 1:
        return Implementation(lambda: fused(x, *packed[0]), {})

    def forward() -> Tensor:
        parts = torch.split(x.index_select(0, rows.order), rows.counts)
        results = [fused(part, *own) for part, own in zip(parts, packed, strict=True)]
        return torch.cat(results).index_select(0, rows.inverse)

    return Implementation(forward, {})


@dataclasses.dataclass(frozen=True)
class Peer:
    """An entry of the table of implementations.

    Attributes:
        make: prepares it for a problem; raises ``UnavailableError`` where it cannot.
        layer: what it computes for one adapter.
        trains: whether it has a backward.
    """

    make: Callable[[Problem], Implementation]
    layer: Layer = layer
    trains: bool = True


PEERS = {
    "eager": Peer(loop),
    "index": Peer(by_index),
    "compile": Peer(compiled),
    "bmm": Peer(bmm),
    "folded": Peer(folded, trains=False),
    "grouped": Peer(grouped),
    "onednn": Peer(onednn, trains=False),
}
"""The implementations from PyTorch's operators, by the names that they have in tables."""
