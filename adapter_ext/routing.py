"""Routing: every sample of a batch uses its own adapter, all in one call of the op."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from adapter_ext import ops, sample_counts
from adapter_ext.fused import autocast_dtype
from adapter_ext.grouping import Group, group
from adapter_ext.mixin import (
    AdapterModuleMixin,
    enter_traced_routes,
    hosts_of,
    leave_traced_routes,
    set_routes,
)
from adapter_ext.model_mixin import AdapterModelPTMixin
from adapter_ext.strategies import (
    AbstractAdapterStrategy,
    register_adapter_loss,
)
from adapter_ext.types import Routing

# Entering and leaving a context changes several modules' routes, which threads may share.
_lock = threading.Lock()


def adapter_index(module: nn.Module) -> dict[str, int]:
    """Numbers the adapters of a module and its submodules, for :func:`route_adapters`.

    Args:
        module: any module.

    Returns:
        Index by name, in the order of the indices. An adapter that several submodules have by the
        same name has one index. What adapters have themselves is not looked for.
    """
    return _index(hosts_of(module))


@contextmanager
def route_adapters(module: nn.Module, names: Sequence[str | None] | Tensor) -> Iterator[None]:
    """Within this context, every sample uses the adapter that is named for it, and that alone.

    ::

        with route_adapters(model, ["fr", "de", None, "fr"]):
            y = model(x)  # x: [4, ...]

    The routes hold for all adapter-capable submodules of ``module``, in the thread that entered the
    context (a compiled module can't tell threads apart; route it from one at a time). Where a
    submodule has no adapter of a sample's name, the sample passes unchanged. An inner context
    overrides an outer one. A sample's adapters need not be alike: those that differ in activation,
    norm position, dropout or strategy settings take one call of the op each kind. Adapters that the
    op can't compute (see :meth:`adapter_ext.LinearAdapter.fused_call`) are called on their own
    samples one after the other, which is slow and waits for the device.

    Recomputation by ``torch.utils.checkpoint`` needs the routes again: pass it
    ``context_fn=checkpoint_context(model)`` (:func:`adapter_ext.checkpoint_context`).

    With names, adapters that no sample uses get no gradient (None): optimizers of PyTorch leave
    them alone. With indices every enabled adapter that the op computes gets one, zero for those
    without samples, so that the same code, compiled or not, does for any indices; for that, all
    adapters go through the op in training, where gradients are enabled, and in compiled code, which
    takes long with thousands of them. In a process group of ``torch.distributed``, where gradients
    are summed over processes, names give one to all enabled adapters that are trained, too.
    :func:`adapter_ext.optim.drop_idle_gradients` tells those zeros from others.

    Args:
        module: any module that has adapters, or submodules with adapters.
        names: an adapter's name or None (no adapter) for each sample; or indices by
            :func:`adapter_index`, -1 for none, as an int64 tensor ``[B]`` (samples) or ``[B, T]``
            (rows of inputs ``[B, T, D]``). With indices, torch.compile does not recompile when they
            change. Entering the context waits for the device once, to check them; where the
            context is entered by code that is compiled or exported, that code checks them whenever
            it runs, without waiting.

    Raises:
        TypeError: if names is of another type.
        ValueError: on entering, if a name or index is unknown, or that of a disabled adapter; in
            forward, if the input does not have as many samples.
        RuntimeError: in forward, if the indices were written to in place; from compiled or exported
            code that enters the context, if an index is unknown, or that of a disabled adapter.
    """
    hosts = hosts_of(module)
    if isinstance(names, Tensor):
        routes = _from_indices(names, module, hosts)
    else:
        routes = _from_names(names, module, hosts)
    if torch.compiler.is_compiling():
        outer = enter_traced_routes(frozenset(hosts), routes)
        try:
            yield
        finally:
            leave_traced_routes(outer)
        return
    if routes.any_may_be_idle and torch.is_grad_enabled():
        for host in hosts:
            sample_counts.prepare(host)
        routes.restarting.update(host for host in hosts if sample_counts.may_restart(host))
    with routed_hosts(dict.fromkeys(hosts, routes)):
        yield


@contextmanager
def routed_hosts(routes: Mapping[AdapterModuleMixin, Routes | None]) -> Iterator[None]:
    """Within this context, the routes of hosts, None for none, hold for them in this thread."""
    this = threading.get_ident()
    entries = {host: (this, own) for host, own in routes.items()}
    with _lock:
        set_routes({host: (*host._adapter_routes, entry) for host, entry in entries.items()})
    try:
        yield
    finally:
        with _lock:
            set_routes(
                {
                    host: tuple(e for e in host._adapter_routes if e is not entry)
                    for host, entry in entries.items()
                }
            )


def _index(hosts: list[AdapterModuleMixin]) -> dict[str, int]:
    names: dict[str, None] = {}
    for host in hosts:
        names.update(dict.fromkeys(host._adapters()))
    return {name: index for index, name in enumerate(names)}


def _from_names(
    names: Sequence[str | None], module: nn.Module, hosts: list[AdapterModuleMixin]
) -> Routes:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            f"names must be a sequence of names, one a sample, or an int64 tensor of indices; "
            f"got {names if isinstance(names, str) else type(names).__name__!r}"
        )
    own = {n: _without_place(module, n) for n in dict.fromkeys(names) if n is not None}
    used = {name: i for i, name in enumerate(dict.fromkeys(own.values()))}
    unknown = set(used)
    present = {}
    for host in hosts:
        present[host] = here = used.keys() & host._adapters().keys()
        unknown -= here
        disabled = here - host._enabled_adapters.keys()
        if disabled:
            raise _disabled_error(min(disabled), module, host)
    if unknown:
        name = next(name for name in used if name in unknown)
        raise ValueError(f"there is no adapter named {name!r}; there are {list(_index(hosts))}")
    shared = _shared_by_processes(hosts)
    has_others = not shared.keys() <= used.keys()
    if shared:  # in one order in all processes, which may have to gather parameters of each
        wanted = used.keys() | shared.keys()
        used = {name: i for i, name in enumerate(n for n in _index(hosts) if n in wanted)}
    places: dict[str | None, int] = {None: -1}
    places.update((name, used[own[name]]) for name in own)
    ids = torch.tensor([places[name] for name in names], dtype=torch.int64)
    return Routes(
        tuple(used),
        ids,
        # Samples are counted here also where all adapters have some: they may have none elsewhere.
        any_may_be_idle=bool(shared),
        shared=has_others,
        present=present,
    )


def _without_place(module: nn.Module, name: str) -> str:
    """The adapter's own name; that a model has it in the place is checked there."""
    if isinstance(module, AdapterModelPTMixin) and isinstance(name, str) and ":" in name:
        return module._require(name)
    return name


def _from_indices(ids: Tensor, module: nn.Module, hosts: list[AdapterModuleMixin]) -> Routes:
    if ids.dtype is not torch.int64 or ids.ndim not in (1, 2):
        raise TypeError(
            f"indices of adapters must be an int64 tensor [B] or [B, T], "
            f"got {ids.dtype} {list(ids.shape)}"
        )
    index = _index(hosts)
    disabled = {
        name: host
        for host in hosts
        for name in host._adapters().keys() - host._enabled_adapters.keys()
    }
    used = None
    if torch.compiler.is_compiling() or _is_capturing(ids.device):
        _assert_usable(ids, index, disabled)
    else:
        present = ids.unique().tolist()  # type: ignore[no-untyped-call]
        if present and (present[0] < -1 or present[-1] >= len(index)):
            raise ValueError(
                f"indices of adapters must be in [-1, {len(index)}), got {present[0]} to "
                f"{present[-1]}; there are {index}"
            )
        for name, host in disabled.items():
            if index[name] in present:
                raise _disabled_error(name, module, host)
        used = [i for i in present if i >= 0]
    names = tuple(None if name in disabled else name for name in index)
    present = {}
    if used is not None:
        some = dict.fromkeys(names[i] for i in used)
        present = {host: some.keys() & host._adapters().keys() for host in hosts}
    shared = bool(_shared_by_processes(hosts))
    return Routes(names, ids, any_may_be_idle=True, shared=shared, used=used, present=present)


def _shared_by_processes(hosts: list[AdapterModuleMixin]) -> dict[str, None]:
    """Adapters that must run here, as another process may route samples to them.

    Returns:
        The adapters that are trained, or sharded, and nowhere disabled; none without
        torch.distributed. One process is no exception: DistributedDataParallel waits for all
        gradients there, too.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return {}
    trains = torch.is_grad_enabled()
    needed: dict[str, None] = {}
    disabled: set[str] = set()
    for host in hosts:
        for name, adapter in host._adapters().items():
            if name not in host._enabled_adapters:
                disabled.add(name)
            elif any(
                (trains and p.requires_grad) or sample_counts.is_sharded(p)
                for p in adapter.parameters()
            ):
                needed[name] = None
    return {name: None for name in needed if name not in disabled}


def _assert_usable(ids: Tensor, index: dict[str, int], disabled: Iterable[str]) -> None:
    """Checks ids in code that is compiled or exported, which can't read them: when it runs."""
    count = len(index)
    usable = (ids >= -1) & (ids < count)
    message = f"indices of adapters must be in [-1, {count}); there are {index}"
    for name in disabled:
        usable = usable & (ids != index[name])
        message += f"; adapter {name!r} is disabled"
    torch._assert_async(usable.all(), message)


def _disabled_error(name: str, module: nn.Module, host: AdapterModuleMixin) -> ValueError:
    path = next(path for path, m in module.named_modules() if m is host)
    where = f" in submodule {path!r}" if path else ""
    return ValueError(f"adapter {name!r} is disabled{where}; set_enabled_adapters enables it")


class Routes:
    """Which adapter each sample of a batch uses.

    Args:
        names: names by index; None: no sample has that index.
        ids: int64 ``[B]`` or ``[B, T]``, indices into names, -1 for none.
        any_may_be_idle: whether some of the names may have no samples, here or in another process.
        shared: whether other processes may have samples of the names that have none here.
        used: the indices among ids; None: not known, or all of them.
        present: the adapters that a module has, of those with samples.
    """

    def __init__(
        self,
        names: tuple[str | None, ...],
        ids: Tensor,
        *,
        any_may_be_idle: bool,
        shared: bool,
        used: list[int] | None = None,
        present: Mapping[AdapterModuleMixin, Set[str | None]] | None = None,
    ) -> None:
        self._names = names
        self.ids = ids
        self._version = _version(ids)
        self.any_may_be_idle = any_may_be_idle
        self._shared = shared
        self._used = used
        self._present = present or {}
        # Modules that had no gradients as these routes were made: if there are none, either, as
        # they are called, samples are counted anew.
        self.restarting: set[AdapterModuleMixin] = set()
        # Of checkpoints, which compiled code has no part in. A mark tells which routes these are
        # where they are not to be kept. `for_backward`: whether a backward may compute by them, as
        # they were made in one, or kept for it by checkpoint_context.
        self.mark: object = None
        self.for_backward = False
        if not torch.compiler.is_compiling():
            self.mark = object()
            self.for_backward = torch._C._current_graph_task_id() != -1
        # What layers share: made once a batch. Empty forever in compiled code, which would
        # recompile as it fills, and which merges equal calls itself.
        self._cache: dict[Any, Any] = {}

    def forward(self, host: AdapterModuleMixin, x: Tensor) -> Tensor:
        """Runs every sample's adapter, of those that a module has.

        Args:
            host: the module.
            x: ``[B, ..., D]``, or ``[B, T, ..., D]`` if the ids are ``[B, T]``.

        Raises:
            AttributeError: if an adapter has no ``adapter_strategy``.
            TypeError: if x is no tensor.
            ValueError: if x does not fit the ids, or an adapter has been disabled, removed or
                renamed meanwhile.
            RuntimeError: if the ids were written to meanwhile.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"routing needs a tensor as input, got {type(x).__name__}")
        shape = self.ids.shape
        if x.ndim <= len(shape) or x.shape[: len(shape)] != shape:
            raise ValueError(
                f"adapters are routed for samples of shape {list(shape)}, so the input must be "
                f"{[*shape, '...', 'D']}; got {list(x.shape)}"
            )
        # Some layers would use the new ones, which nobody has checked, others what the old gave.
        version = _version(self.ids)
        if version != self._version and None not in (version, self._version):
            raise RuntimeError(
                "the indices of adapters were changed in place within route_adapters: enter it anew"
            )
        given = x
        groups, alone = group(host, self._chosen(host))
        # A call leaves the samples of other groups as they are, so the calls can be chained.
        for alike in groups:
            x = self._forward_group(host, x, alike)
        for name, strategy in alone.items():
            x = self._forward_alone(host, x, name, strategy)
        counter = host._sample_counter
        if (
            self.any_may_be_idle
            and counter is not None
            and x is not given  # nothing ran, and the count would be in the place of the input
            and (x.requires_grad or _is_transformed())
            and torch.is_grad_enabled()
            and forward_ad._current_level < 0
            and not torch.compiler.is_exporting()
        ):
            offsets = self._routing(counter.names, x.device).offsets
            restart = not torch.compiler.is_compiling() and host in self.restarting
            if restart:
                self.restarting.discard(host)
            x = sample_counts.count(host, counter, x, offsets.diff(), restart=restart)
        return x

    def _chosen(self, host: AdapterModuleMixin) -> dict[str, nn.Module]:
        """The adapters of a module that the op is to see, by name.

        Those without samples are there for their gradients. In training they count for the draws
        as well; compiled code is for any indices, and must not look at these.
        """
        wants_all = (
            self._shared
            or host.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        )
        names: Iterable[str | None] = self._names
        if not wants_all and self._used is not None:
            names = [self._names[i] for i in self._used]
        adapters = host._adapters()
        chosen = {name: adapters[name] for name in names if name in adapters}
        if not torch.compiler.is_compiling():  # which would guard on what other routes don't share
            gone = self._present.get(host, set()) - chosen.keys()
            if gone:
                raise ValueError(
                    f"adapter {min(map(str, gone))!r} was removed or renamed within "
                    f"route_adapters: enter it anew"
                )
        disabled = chosen.keys() - host._enabled_adapters.keys()
        if disabled:
            raise _disabled_error(min(disabled), host._host(), host)
        return chosen

    def _forward_group(self, host: AdapterModuleMixin, x: Tensor, group: Group) -> Tensor:
        settings = group.form.settings
        y, aux = ops.linear_adapter(
            x,
            group.weights,
            self._routing(tuple(group.names), x.device),
            activation=settings.activation,
            norm_position=settings.norm_position,
            eps=settings.eps,
            dropout=settings.dropout,
            stochastic_depth=group.stochastic_depth,
            l2_lambda=self._l2_lambda(tuple(group.l2_lambdas), x),
            residual=group.form.residual,
            # Everything that differs in training is 0 where it is not active.
            training=bool(settings.dropout or group.stochastic_depth or any(group.l2_lambdas)),
            compute_dtype=autocast_dtype(x),
        )
        for a, (adapter, weight) in enumerate(zip(group.adapters, group.l2_lambdas, strict=True)):
            if weight:
                register_adapter_loss(aux[a], adapter, host)
        return y

    def _forward_alone(
        self,
        host: AdapterModuleMixin,
        x: Tensor,
        name: str,
        strategy: AbstractAdapterStrategy,
    ) -> Tensor:
        adapter = host._adapters()[name]
        own = (self._ids_on(x.device).flatten() == self._names.index(name)).nonzero().squeeze(1)
        if not (torch.compiler.is_compiling() or self._shared) and own.numel() == 0:
            return x
        samples = x.flatten(0, self.ids.ndim - 1)
        mine = samples.index_select(0, own)
        y = cast(
            Tensor,
            host.forward_single_enabled_adapter_(
                mine, adapter, adapter_name=name, adapter_strategy=strategy
            ),
        )
        if y.shape != mine.shape:
            raise ValueError(
                f"adapter {name!r} must keep the shape of its input under routing: "
                f"{list(mine.shape)} became {list(y.shape)}"
            )
        with torch.autocast(x.device.type, enabled=False):  # the types are the same
            return samples.index_copy(0, own, y.to(x.dtype)).reshape(x.shape)

    def _routing(self, names: tuple[str, ...], device: torch.device) -> Routing:
        def make() -> Routing:
            ids = self._ids_on(device)
            if names != self._names:
                place = {name: i for i, name in enumerate(names)}
                # The last entry is that of index -1.
                table = [-1 if n is None else place.get(n, -1) for n in self._names] + [-1]
                ids = _constant(table, torch.int64, device)[ids]
            return ops.route(ids, len(names))

        return cast(Routing, self._once(names, device, make))

    def _ids_on(self, device: torch.device) -> Tensor:
        if self.ids.device == device:
            return self.ids
        return cast(Tensor, self._once("ids", device, lambda: self.ids.to(device)))

    def _l2_lambda(self, values: tuple[float, ...], x: Tensor) -> float | Tensor:
        if len(set(values)) == 1:
            return values[0]
        dtype, device = torch.promote_types(x.dtype, torch.float32), x.device
        return cast(
            Tensor,
            self._once((values, dtype), device, lambda: _constant(values, dtype, device)),
        )

    def _once(self, key: Any, device: torch.device, make: Callable[[], Any]) -> Any:
        # What torch.func made belongs to one of its levels, and a CUDA graph has to make for itself
        # what it reads: when it is replayed, these routes are gone, or the indices are others.
        if torch.compiler.is_compiling() or _is_transformed() or _is_capturing(device):
            return make()
        # Tensors that were made in inference mode can't be used in training later, and those that
        # one stream makes may not be there yet in another.
        stream = None
        if _runs_cuda(device):
            stream = torch.cuda.current_stream(device).cuda_stream
        key = (key, device, stream, torch.is_inference_mode_enabled())
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


def _is_transformed() -> bool:
    """Whether a transform of torch.func is at work, which hides that gradients are required."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, which can't read values or copy from the host."""
    return _runs_cuda(device) and torch.cuda.is_current_stream_capturing()


def _runs_cuda(device: torch.device) -> bool:
    # Tensors without data can be on a GPU that is not there.
    return device.type == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def _version(ids: Tensor) -> int | None:
    """Counts what was written to a tensor; None where that is not known."""
    return None if torch.compiler.is_compiling() or ids.is_inference() else ids._version


def _constant(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    if not (torch.compiler.is_compiling() or _is_capturing(device)):
        return torch.tensor(values, dtype=dtype, device=device)
    # A copy from the host can't be part of CUDA graphs, which compiled code may become. So it is
    # made where it is used, out of runs of equal or consecutive values, which are few.
    runs: list[Tensor] = []
    start = 0
    while start < len(values):
        first, end = values[start], start + 1
        step = int(end < len(values) and values[end] == first + 1)
        while end < len(values) and values[end] == values[end - 1] + step:
            end += 1
        if step:
            runs.append(torch.arange(first, first + (end - start), dtype=dtype, device=device))
        else:
            runs.append(torch.full((end - start,), first, dtype=dtype, device=device))
        start = end
    return torch.cat(runs)
