"""The data that ops exchange: adapter weights and the routing of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class AdapterWeights(NamedTuple):
    """The weights of A linear adapters, in the order of their indices.

    Each field is either a sequence of A tensors, one an adapter, whose bottleneck ``r`` may differ
    from adapter to adapter, or one stacked tensor with a leading dimension A.

    Attributes:
        norm_weight: LayerNorm weight, ``[D]`` each or ``[A, D]``.
        norm_bias: LayerNorm bias, ``[D]`` each or ``[A, D]``.
        down: down projection, ``[r, D]`` each or ``[A, r, D]``.
        up: up projection, ``[D, r]`` each or ``[A, D, r]``.
    """

    norm_weight: Tensor | Sequence[Tensor]
    norm_bias: Tensor | Sequence[Tensor]
    down: Tensor | Sequence[Tensor]
    up: Tensor | Sequence[Tensor]

    @property
    def num_adapters(self) -> int:
        """The number of adapters A."""
        return len(self.down)


class Routing(NamedTuple):
    """Which adapter each sample of a batch uses; made once a batch by :func:`adapter_ext.route`.

    Attributes:
        ids: int64, any shape: the adapter of each sample, -1 = none. ``ids`` fits an ``x`` whose
            leading dimensions it equals: ``[B]`` routes the samples of an ``x`` ``[B, T, D]``,
            ``[B, T]`` routes its rows.
        order: int64 ``[ids.numel()]``: positions in ``ids.flatten()``, sorted by adapter, those of
            one adapter in ascending order, those without an adapter last.
        offsets: int64 ``[A + 1]``: the samples of adapter ``a`` are
            ``order[offsets[a]:offsets[a + 1]]``; those without one ``order[offsets[A]:]``.
    """

    ids: Tensor
    order: Tensor
    offsets: Tensor
