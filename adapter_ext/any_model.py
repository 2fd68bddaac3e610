"""The adapters of any model as a whole: a name stands for one adapter in all its hosts.

A host is a module that can have adapters. Each keeps the configurations of its own adapters, so
nothing here needs more than the model itself: copies and parts of it do as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, read_write
from torch import nn

from adapter_ext import files
from adapter_ext.adapters import LinearAdapterConfig
from adapter_ext.mixin import (
    AdapterModuleMixin,
    floating_tensor,
    hosts_of,
    named_hosts,
    routes_in_force,
    unfreeze_adapters,
    unwrapped,
)
from adapter_ext.model_mixin import AdapterModelPTMixin, chosen, load_states, refill
from adapter_ext.names import check_adapter_name
from adapter_ext.registry import targets_of_a_file, to_plain_config
from adapter_ext.routing import routed_hosts

if TYPE_CHECKING:
    from adapter_ext.routing import Routes


def add_adapter(model: nn.Module, name: str, cfg: Any) -> None:
    """Adds an adapter to all hosts of a model: to all modules that can have adapters.

    Args:
        model: any module with hosts, see :func:`adapter_ext.inject`. Of a part of a model the
            hosts in there get the adapter.
        name: the adapter's name, the same in all hosts.
        cfg: dict, DictConfig or dataclass, see :meth:`AdapterModuleMixin.add_adapter`; copied.
            Without ``_target_`` it is that of a :class:`adapter_ext.LinearAdapter`; without
            ``in_features`` each host that :func:`adapter_ext.inject` made takes its own width.

    Raises:
        TypeError: if model or cfg is of another type, or the adapter refuses its arguments.
        ValueError: if there are no hosts, they belong to a model that has their configuration
            (call its ``add_adapter``), the name is taken, reserved or malformed, or a host does
            not accept the adapter. The model is as it was then.
    """
    model = unwrapped(model)
    hosts = _own_hosts(model)
    check_adapter_name(name, _names(hosts))
    plain = to_plain_config(cfg)
    plain.setdefault("_target_", LinearAdapterConfig._target_)
    with transaction(hosts):
        _add(model, hosts, name, plain)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Removes an adapter from all hosts of a model.

    Args:
        model: any module with hosts.
        name: the adapter's name.

    Raises:
        TypeError: if model is no ``nn.Module``.
        ValueError: if there is no adapter of that name, there are no hosts, or they belong to a
            model that has their configuration.
    """
    hosts = _having(_own_hosts(model), name)
    with transaction(hosts, removed=name):
        for host in hosts.values():
            host.remove_adapter(name)


def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """Renames an adapter in all hosts of a model; it keeps its place among the others.

    Args:
        model: any module with hosts.
        old: its name.
        new: its new name.

    Raises:
        TypeError: if model is no ``nn.Module``.
        ValueError: if there is no adapter of the old name, the new one is taken, reserved or
            malformed, there are no hosts, or they belong to a model that has their configuration.
    """
    hosts = _own_hosts(model)
    having = _having(hosts, old)
    check_adapter_name(new, [name for name in _names(hosts) if name != old or new == old])
    with transaction(having):
        for host in having.values():
            host.rename_adapter(old, new)


def unfreeze_enabled_adapters(model: nn.Module, freeze_batchnorm: bool = True) -> None:
    """Prepares the enabled adapters of a model for training; freeze everything else beforehand.

    See :meth:`AdapterModuleMixin.unfreeze_enabled_adapters`.

    Args:
        model: any module with hosts.
        freeze_batchnorm: freeze the batch norms that belong to no adapter.

    Raises:
        TypeError: if model is no ``nn.Module``.
        ValueError: if there are no hosts, or they belong to a model that has their configuration.
    """
    _own_hosts(model)
    unfreeze_adapters(model, freeze_batchnorm)


def set_enabled_adapters(model: nn.Module, name: str | None = None, enabled: bool = True) -> None:
    """Enables or disables an adapter in all hosts of a model, or in none if one fails.

    Args:
        model: any module with hosts.
        name: the adapter's name; None means all adapters.
        enabled: whether it is to run.

    Raises:
        TypeError: if model is no ``nn.Module``.
        ValueError: if there are no adapters, or none of that name, there are no hosts, or they
            belong to a model that has their configuration.
    """
    hosts = _own_hosts(model)
    if name is None:
        hosts = {path: host for path, host in hosts.items() if host.is_adapter_available()}
        if not hosts:
            raise ValueError("there are no adapters: add one with add_adapter first")
    else:
        hosts = _having(hosts, name)
    before = {host: host._enabled_adapters for host in hosts.values()}
    try:
        for host in hosts.values():
            host.set_enabled_adapters(name, enabled)
    except BaseException:  # one's configuration is read-only, for instance
        for host, known in before.items():
            for key in host._adapters():
                if (key in known) != (key in host._enabled_adapters):
                    host.set_enabled_adapters(key, key in known)
        raise


def save_adapters(
    model: nn.Module, filepath: str | os.PathLike[str], name: str | None = None
) -> None:
    """Writes adapters to a file, without the rest of the model, atomically.

    The file is one that :meth:`AdapterModelPTMixin.save_adapters` could have written.

    Args:
        model: any module with hosts. The file is the same if DistributedDataParallel or
            torch.compile is around it.
        filepath: the file; ``.safetensors`` is recommended, ``.pt`` is NeMo's format.
        name: the adapter; None means all.

    Raises:
        TypeError: if model is no ``nn.Module``.
        ValueError: if there are no adapters, or none of that name, there are no hosts or they
            belong to a model that has their configuration, an adapter is configured differently in
            several hosts, or the suffix is another.
        OSError: if the file can't be written.
    """
    hosts = _own_hosts(unwrapped(model))
    saved: dict[str, files.SavedAdapter] = {}
    for key in _names(hosts) if name is None else [name]:
        having = _having(hosts, key)
        configs = [to_plain_config(host.adapter_cfg[key]) for host in having.values()]  # type: ignore[index]
        for path, config in zip(having, configs, strict=True):
            if config != configs[0]:
                raise ValueError(
                    f"a file holds one configuration of adapter {key!r}, but it is {configs[0]} in "
                    f"{next(iter(having))!r} and {config} in {path!r}"
                )
        saved[key] = files.SavedAdapter(
            name=key,
            module="",
            config=configs[0],
            paths=list(having),
            states=[host._adapters()[key].state_dict() for host in having.values()],
        )
    if not saved:
        raise ValueError("there are no adapters to save: add one with add_adapter first")
    files.write_adapters(filepath, files.AdapterFile(saved, {}))


def load_adapters(
    model: nn.Module,
    filepath: str | os.PathLike[str],
    name: str | None = None,
    map_location: Any = None,
    strict: bool = True,
    classes: Iterable[type] = (),
) -> None:
    """Adds adapters from a file that :func:`save_adapters`, or a model's own, wrote.

    An adapter goes to the hosts whose paths the file has. (NeMo's files have none: to all, which
    must be as many.) See :meth:`AdapterModelPTMixin.load_adapters` on what a file can name.

    Args:
        model: any module with hosts.
        filepath: the file, ``.safetensors`` or ``.pt``.
        name: the adapter; None means all in the file.
        map_location: the device to read to, None for the CPU; the adapters end up on the device
            and in the type of their hosts.
        strict: whether the file must hold exactly an adapter's parameters. What it holds must
            have their shapes in any case.
        classes: the classes that the file may name besides the registered ones.

    Raises:
        FileNotFoundError: if there is no such file.
        KeyError: if it holds no adapter of that name.
        TypeError: if model is no ``nn.Module``.
        ValueError: if there are no hosts, they belong to a model that has their configuration, or
            they have an adapter of a name already.
        adapter_ext.FileError: a ValueError, if the file's content is not as it should be, or does
            not fit this model. The model is as it was then.
    """
    model = unwrapped(model)
    hosts = _own_hosts(model)
    content = files.read_adapters(filepath, map_location=map_location)
    where = os.fspath(filepath)
    with transaction(hosts), targets_of_a_file(classes):
        for saved in chosen(content, name, where):
            if saved.name in _names(hosts):
                raise ValueError(
                    f"{where}: the model has an adapter named {saved.name!r} already; remove it "
                    f"first"
                )
            try:
                paths = list(hosts) if saved.paths is None else saved.paths
                unable = [path for path in paths if path not in hosts]
                if unable:
                    raise ValueError(
                        f"it is of the modules {paths}, of which {unable} are not there or can't "
                        f"have adapters; there are {list(hosts)}"
                    )
                _add(model, {path: hosts[path] for path in paths}, saved.name, saved.config)
                load_states(model, saved, strict)
            except (TypeError, ValueError, RuntimeError, AttributeError) as error:
                raise files.FileError(
                    f"{where}: adapter {saved.name!r} does not fit this model: {error}"
                ) from error


def checkpoint_context(
    model: nn.Module,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Lets activation checkpointing compute a routed model again with the routes it had.

    What ``torch.utils.checkpoint`` computes again, for the backward, it computes when
    :func:`adapter_ext.route_adapters` has been left, and, on a GPU, in another thread::

        checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_context(model))

    transformers takes it among the arguments of ``gradient_checkpointing_enable``, once for all
    steps: the routes are those in force when a layer is computed for the first time.

    Args:
        model: any module with hosts.

    Returns:
        What ``torch.utils.checkpoint.checkpoint`` takes as ``context_fn``.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        routes = {host: routes_in_force(host) for host in hosts_of(model)}
        for own in routes.values():
            if own is not None:
                own.for_backward = True
        return nullcontext(), again(routes)

    @contextmanager
    def again(routes: dict[AdapterModuleMixin, Routes | None]) -> Iterator[None]:
        # Hosts that were not routed are not, either, though they may be by now.
        hidden = {h for h, r in routes.items() if r is None and routes_in_force(h) is not None}
        with routed_hosts({h: r for h, r in routes.items() if r is not None or h in hidden}):
            yield

    return contexts


@contextmanager
def transaction(hosts: dict[str, AdapterModuleMixin], removed: str | None = None) -> Iterator[None]:
    """Within this context, an error undoes what was added to the hosts, and one removal.

    Args:
        hosts: by path.
        removed: the adapter that may be removed.
    """
    states = []
    for host in hosts.values():
        config = cast("DictConfig | None", host.__dict__.get("_adapter_cfg"))
        keys = [] if config is None else cast("list[str]", list(config.keys()))
        kept = None if config is None or removed is None else config._get_node(removed)
        states.append((host, host._adapter_state(), config, keys, kept))
    try:
        yield
    except BaseException:
        for host, state, config, keys, kept in states:
            if config is not None:
                nodes: dict[str, Any] = {
                    key: kept if key == removed else config._get_node(key) for key in keys
                }
                with read_write(config):
                    refill(config, nodes)
            host._restore_adapter_state(state)
        raise


def _own_hosts(model: nn.Module) -> dict[str, AdapterModuleMixin]:
    """The hosts of a model by path, where they keep their configurations themselves."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    hosts = dict(named_hosts(model))
    if not hosts:
        raise ValueError(
            f"no module of this {type(model).__name__} can have adapters: call inject(model, "
            f"targets=...) first"
        )
    for path, host in hosts.items():
        if isinstance(host, AdapterModelPTMixin) or host._shares_adapter_cfg:
            raise ValueError(
                f"module {path!r} ({type(host).__name__}) is of an AdapterModelPTMixin, which has "
                f"the configuration of its adapters: call that model's own methods"
            )
    return hosts


def _names(hosts: dict[str, AdapterModuleMixin]) -> list[str]:
    return list(dict.fromkeys(name for host in hosts.values() for name in host._adapters()))


def _having(hosts: dict[str, AdapterModuleMixin], name: str) -> dict[str, AdapterModuleMixin]:
    found = {path: host for path, host in hosts.items() if name in host._adapters()}
    if not found:
        raise ValueError(f"there is no adapter named {name!r}; there are {_names(hosts)}")
    return found


def _add(
    model: nn.Module, hosts: dict[str, AdapterModuleMixin], name: str, plain: dict[str, Any]
) -> None:
    like = floating_tensor(model)
    for host in hosts.values():
        alone = floating_tensor(cast(nn.Module, host)) is None
        host.add_adapter(name, plain)
        if alone and like is not None:
            host._adapters()[name].to(device=like.device, dtype=like.dtype)
