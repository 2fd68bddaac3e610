"""Which adapters of a module go through the op together, and which one by one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapter_ext.adapters import LinearAdapter
from adapter_ext.fused import Settings
from adapter_ext.mixin import AdapterModuleMixin, strategy_of
from adapter_ext.snapshot import read_parameters
from adapter_ext.strategies import (
    AbstractAdapterStrategy,
    ResidualAddAdapterStrategy,
    is_stock,
    is_stock_class,
)
from adapter_ext.types import AdapterWeights


class Form(NamedTuple):
    """How the op computes an adapter, and the classes that this was read off.

    Attributes:
        settings: of the adapter.
        residual: whether its output is added to its input.
        adapter_class: the adapter's class.
        strategy_class: its strategy's.
    """

    settings: Settings
    residual: bool
    adapter_class: type[LinearAdapter]
    strategy_class: type[AbstractAdapterStrategy]

    def is_stock(self) -> bool:
        """Whether no method that matters is patched on the classes."""
        return is_stock_class(self.strategy_class) and self.adapter_class._has_stock_class()


class Group(NamedTuple):
    """The adapters of one call of the op.

    Attributes:
        form: of all of them.
        stochastic_depth: of all of them, 0 where it is not active.
        names: their names.
        adapters: the adapters.
        weights: their weights, in lists.
        l2_lambdas: the weights of their auxiliary losses, 0 where none is due.
    """

    form: Form
    stochastic_depth: float
    names: list[str]
    adapters: list[nn.Module]
    weights: AdapterWeights
    l2_lambdas: list[float]


class _Member:
    """What was found in an adapter that the op can compute; it is kept there.

    Attributes:
        form: the adapter's form.
        strategy: its strategy.
        snapshot: of all that was looked at; None in code that is compiled, which keeps nothing.
    """

    __slots__ = ("form", "snapshot", "strategy")

    def __init__(self, form: Form, strategy: AbstractAdapterStrategy, snapshot: Any) -> None:
        self.form = form
        self.strategy = strategy
        self.snapshot = snapshot

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of an adapter is looked at itself


@functools.lru_cache(maxsize=256)
def _interned(form: Form) -> Form:
    """One object for equal ones, so that comparing them takes no time."""
    return form


def group(
    host: AdapterModuleMixin, adapters: dict[str, nn.Module]
) -> tuple[list[Group], dict[str, AbstractAdapterStrategy]]:
    """Sorts the adapters that a batch uses.

    Args:
        host: the module that has them.
        adapters: the adapters by name, any number.

    Returns:
        Those that the op computes, in groups; and the strategies, by name, of those that must be
        called.

    Raises:
        AttributeError: if an adapter has no ``adapter_strategy``.
        ValueError: if an auxiliary loss is due and the adapter is no AccessMixin.
    """
    if not (
        type(host).forward_single_enabled_adapter_ is _STOCK_FORWARD_SINGLE
        and "forward_single_enabled_adapter_" not in host.__dict__
    ):
        return [], {name: strategy_of(adapter, name) for name, adapter in adapters.items()}
    if not torch.compiler.is_compiling():
        # All at once, which takes a fraction of the time of one by one.
        known: list[Any] = [adapter.__dict__.get("_member") for adapter in adapters.values()]
        weights = None if None in known else _read([*adapters.values()], known)
        if weights is not None:
            return _split(host, adapters, known, weights), {}
    fused: dict[str, nn.Module] = {}
    members: list[_Member] = []
    tensors: list[Tensor] = []
    alone: dict[str, AbstractAdapterStrategy] = {}
    for name, adapter in adapters.items():
        strategy = strategy_of(adapter, name)
        found = _find(adapter, strategy)
        if found is None:
            alone[name] = strategy
        else:
            fused[name] = adapter
            members.append(found[0])
            tensors += found[1]
    return _split(host, fused, members, tensors), alone


def _read(adapters: list[nn.Module], members: list[_Member]) -> list[Tensor] | None:
    """The weights of adapters, four each; None if something has changed."""
    form = None
    for member in members:
        if member.form is not form:
            form = member.form
            if not form.is_stock():
                return None
    return read_parameters(adapters, [member.snapshot for member in members])


def _find(
    adapter: nn.Module, strategy: AbstractAdapterStrategy
) -> tuple[_Member, Sequence[Tensor]] | None:
    """What the op needs of an adapter; None if it must be called."""
    compiling = torch.compiler.is_compiling()
    member = None if compiling else adapter.__dict__.get("_member")
    tensors = None if member is None else _read([adapter], [member])
    if member is not None and tensors is not None:
        return member, tensors
    if not isinstance(adapter, LinearAdapter) or not is_stock(strategy):
        return None
    call = adapter.fused_call()
    if call is None:
        return None
    residual = isinstance(strategy, ResidualAddAdapterStrategy)
    form = Form(call.settings, residual, type(adapter), type(strategy))
    if compiling:
        return _Member(form, strategy, None), call.tensors
    member = _Member(_interned(form), strategy, adapter._snapshot())
    if adapter.__dict__.get("adapter_strategy") is strategy:  # else it may change unnoticed
        adapter.__dict__["_member"] = member
    return member, call.tensors


def _split(
    host: AdapterModuleMixin,
    adapters: dict[str, nn.Module],
    members: list[_Member],
    tensors: list[Tensor],
) -> list[Group]:
    """Groups adapters that are alike; ``tensors`` has four of each."""
    depths = l2_lambdas = [0.0] * len(members)
    if host.training:
        depths, l2_lambdas = [], []
        for adapter, member in zip(adapters.values(), members, strict=True):
            strategy = member.strategy
            depth = l2_lambda = 0.0
            if isinstance(strategy, ResidualAddAdapterStrategy):
                depth = strategy.stochastic_depth
                l2_lambda = strategy.loss_weight(adapter, host)
            depths.append(depth)
            l2_lambdas.append(l2_lambda)
    names = list(adapters)
    weights = AdapterWeights(tensors[::4], tensors[1::4], tensors[2::4], tensors[3::4])
    places: dict[tuple[Form, float, torch.dtype], list[int]] = {}
    last: tuple[Form, float, torch.dtype] | None = None
    own: list[int] = []
    for i, (member, depth, down) in enumerate(zip(members, depths, weights.down, strict=True)):
        alike = (member.form, depth, down.dtype)
        if alike != last:  # most are like the one before
            last, own = alike, places.setdefault(alike, [])
        own.append(i)
    if len(places) == 1 and last is not None:
        return [Group(*last[:2], names, [*adapters.values()], weights, l2_lambdas)]
    return [
        Group(
            form,
            depth,
            [names[i] for i in own],
            [adapters[names[i]] for i in own],
            AdapterWeights(*([field[i] for i in own] for field in weights)),
            [l2_lambdas[i] for i in own],
        )
        for (form, depth, _), own in places.items()
    ]


_STOCK_FORWARD_SINGLE = AdapterModuleMixin.forward_single_enabled_adapter_
