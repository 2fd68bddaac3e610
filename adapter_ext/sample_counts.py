"""How many samples of each adapter took part in the backward passes of a step.

An adapter that is run without samples has gradients of zero. So has one whose samples were all
dropped, by stochastic depth for instance, and an optimizer must step that one. What tells them
apart is counted in the backward itself, as the gradient of a tensor that each host keeps: so it is
right whatever was compiled, recomputed, or run without a backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from adapter_ext.mixin import AdapterModuleMixin, hosts_of


class Counter(NamedTuple):
    """What a host keeps.

    Attributes:
        names: its adapters.
        total: a leaf ``[A]``, whose gradient is the number of samples of each.
    """

    names: tuple[str, ...]
    total: Tensor


class _Count(torch.autograd.Function):
    """The identity, in whose backward the counts become the gradient of the total."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, total: Tensor, counts: Tensor) -> Tensor:
        return y.detach()  # the same memory, but no view, about which fully_shard would warn

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (counts,) = ctx.saved_tensors
        return grad, torch.zeros_like(counts, dtype=torch.float32) + counts, None


def prepare(host: AdapterModuleMixin) -> None:
    """Gives a host a counter for its present adapters where they are, unless it has that.

    Not in code that is being compiled: that finds what was there before.
    """
    adapters = host._adapters()
    names = tuple(adapters)
    device = next((p.device for a in adapters.values() for p in a.parameters()), None)
    counter = host._sample_counter
    if counter is None or counter.names != names or counter.total.device != device:
        # A parameter, though of no module, as torch.compile knows that their shapes do not change.
        total = nn.Parameter(torch.zeros(len(names), device=device))
        if counter is not None and counter.total.grad is not None and names:
            counts = dict(zip(counter.names, counter.total.grad, strict=True))
            none = torch.zeros_like(total[0])
            total.grad = torch.stack([counts.get(name, none).to(total.device) for name in names])
        object.__setattr__(host, "_sample_counter", Counter(names, total))


def rename(host: AdapterModuleMixin, old: str, new: str) -> None:
    """Counts what was counted for an adapter under its new name."""
    if host._sample_counter is not None:
        names, total = host._sample_counter
        names = tuple(new if name == old else name for name in names)
        object.__setattr__(host, "_sample_counter", Counter(names, total))


def may_restart(host: AdapterModuleMixin) -> bool:
    """Whether samples were counted of which there is no gradient, so that a step left them out."""
    counter = host._sample_counter
    if counter is None or counter.total.grad is None:
        return False
    parameters = (p for adapter in host._adapters().values() for p in adapter.parameters())
    return all(p.grad is None for p in parameters)


def is_sharded(parameter: Tensor) -> bool:
    """Whether processes have a part of a parameter each (it is a DTensor)."""
    return hasattr(parameter, "to_local")


def count(
    host: AdapterModuleMixin, counter: Counter, y: Tensor, counts: Tensor, *, restart: bool
) -> Tensor:
    """Lets the backward through a host's result count samples.

    Args:
        host: it.
        counter: the host's.
        y: its result.
        counts: int64 ``[A]``, samples of each of the counter's adapters.
        restart: start the count anew where it :func:`may_restart`.

    Returns:
        y.
    """
    # fully_shard has the gradients of earlier batches at parameters that are there while the module
    # runs, or at those that are there while it does not: hence the caller asked this before, too.
    if restart and may_restart(host):
        counter.total.grad = None
    return cast(Tensor, _Count.apply(y, counter.total, counts))  # type: ignore[no-untyped-call]


def forget(module: nn.Module) -> None:
    """Starts the count of samples anew in all hosts of a module."""
    for host in hosts_of(module):
        _take(host)


def take_idle(
    module: nn.Module, process_group: torch.distributed.ProcessGroup | None
) -> list[tuple[AdapterModuleMixin, str]]:
    """The adapters that ran without a sample since this was last called; waits for the device.

    Args:
        module: any module; its submodules are the hosts.
        process_group: the processes whose samples count, all of which must call this; None means
            the default group, where there is one.

    Returns:
        Host and name of each.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    taken = [(host, _take(host)) for host in hosts_of(module) if host._adapters()]
    if not distributed:
        taken = [(host, counts) for host, counts in taken if counts is not None]
    if not taken:
        return []
    device = next(p.device for p in module.parameters())
    columns = []  # for each adapter, whether it was counted, and its number of samples
    for host, counts in taken:
        if counts is None:
            columns.append(torch.zeros(2, len(host._adapters()), device=device))
        else:
            columns.append(torch.stack([torch.ones_like(counts), counts]).to(device))
    flags = torch.cat(columns, dim=1)
    if distributed:
        torch.distributed.all_reduce(flags, group=process_group)
    counted, has_samples = (flags > 0.0).tolist()
    pairs = [(host, name) for host, _ in taken for name in host._adapters()]
    idle = [pair for pair, c, s in zip(pairs, counted, has_samples, strict=True) if c and not s]
    if not idle:
        return []
    # Those that also ran by name or in a chain, where nothing is counted, have gradients.
    flags = torch.stack([_has_gradient(host._adapters()[name], device) for host, name in idle])
    if distributed:
        torch.distributed.all_reduce(flags, group=process_group)
    return [pair for pair, some in zip(idle, (flags > 0.0).tolist(), strict=True) if not some]


def _has_gradient(adapter: nn.Module, device: torch.device) -> Tensor:
    """1 where a gradient of an adapter, or this process's part of it, is not zero; else 0."""
    gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
    local = [cast(Any, g).to_local() if is_sharded(g) else g for g in gradients]
    if not local:
        return torch.zeros((), device=device)
    sums = [s.to(device, torch.float32) for s in torch._foreach_norm(local, 1)]
    return (torch.stack(sums) != 0.0).any().float()


def _take(host: AdapterModuleMixin) -> Tensor | None:
    counter = host._sample_counter
    if counter is None:
        return None
    counts, counter.total.grad = counter.total.grad, None
    return counts if counter.names == tuple(host._adapters()) else None
