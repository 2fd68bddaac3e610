"""The mixin that lets any ``nn.Module`` have adapters."""

from __future__ import annotations

import itertools
import threading
from abc import ABC
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adapter_ext.access import ADAPTER_LOSS, AccessMixin, without
from adapter_ext.listing import AdapterInfo, AdapterTable
from adapter_ext.names import GLOBAL_CONFIG, METADATA, check_adapter_name
from adapter_ext.registry import (
    class_path,
    import_class,
    instantiate,
    resolve_target,
    to_plain_config,
)
from adapter_ext.strategies import AbstractAdapterStrategy

if TYPE_CHECKING:
    from adapter_ext.routing import Routes
    from adapter_ext.sample_counts import Counter

_RouteStack: TypeAlias = "tuple[tuple[int, Routes | None], ...]"

_OF_A_MODEL = (
    "adapter {!r} was added to a whole model: call this on the model, which may have it in other "
    "modules as well"
)
_TO_A_MODEL = (
    "adapter {!r}: this {} belongs to a model, whose configuration has no adapter of that name; "
    "add it to the model: else the model could not be restored from its files"
)

# What of a module changes as adapters are added, besides adapter_layer.
_STATE = (
    *("_adapter_cfg", "_enabled_adapters", "_sample_counter", "_shares_adapter_cfg"),
    *("adapter_name", "model_guid"),
)


class AdapterModuleMixin(ABC):
    """Gives an ``nn.Module`` adapters: added by configuration, enabled, disabled, run in a chain.

    ::

        class Block(nn.Module, AdapterModuleMixin):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(512, 512)

            def forward(self, x):
                return self.forward_enabled_adapters(self.linear(x))


        block.add_adapter("fr", LinearAdapterConfig(in_features=512, dim=64))

    Whether an adapter is enabled is read from ``adapter_cfg`` when it is added, enabled or
    disabled, and when ``adapter_cfg`` is assigned; running the module reads no configuration. So
    after editing ``adapter_cfg`` in place, assign it again.

    Attributes:
        adapter_layer: ``nn.ModuleDict`` of the adapters by name; absent until the first is added.
        adapter_cfg: DictConfig of the adapters' configurations by name, each with ``enabled``;
            absent until the first is added.
        adapter_name: the name of the adapter that was added last.
    """

    adapter_global_cfg_key = GLOBAL_CONFIG
    adapter_metadata_cfg_key = METADATA

    adapter_layer: nn.ModuleDict
    adapter_name: str
    training: bool

    _modules: dict[str, nn.Module | None]
    model_guid: str
    _accepted_adapter_types: set[type]
    _adapter_cfg: DictConfig | None
    _shares_adapter_cfg = False  # with a whole model, which looks after it
    # The names, in the order in which they run.
    _enabled_adapters: dict[str, None] = {}  # noqa: RUF012  (replaced, never changed in place)
    # The routes in force, the innermost last, each with the thread that set it. Plain attributes:
    # torch.compile refuses ContextVar, and reads a thread-local once and for all.
    _adapter_routes: _RouteStack = ()
    # The last changes of the routes in force, outside of backward passes: thread, the number of its
    # next autograd node, and the mark of the routes from there on, None for none.
    _route_history: deque[tuple[int, int, object]] | None = None
    _sample_counter: Counter | None = None

    # --- Adding -----------------------------------------------------------------------------------

    def add_adapter(self, name: str, cfg: Any, **kwargs: Any) -> None:
        """Adds an adapter; it gets this module's device, floating-point type and training mode.

        Args:
            name: its name here; of ``"module:name"`` the part behind the first colon.
            cfg: dict, DictConfig or dataclass with ``_target_``, the adapter's arguments, and
                ``enabled`` (True unless given). It is copied.
            **kwargs: further arguments of the adapter, which are not kept in ``adapter_cfg``.

        Raises:
            TypeError: if cfg is of another type, or the adapter refuses its arguments.
            ValueError: if the name is taken, reserved or malformed, the adapter's type is unknown
                or not accepted here, ``enabled`` is no bool, or this module belongs to a model that
                was given adapters, but not this one. Nothing has changed then.
            omegaconf.errors.OmegaConfBaseException: if a value of cfg is missing (``"???"``), or
                an interpolation leads nowhere.
        """
        plain = to_plain_config(cfg)
        if self.get_accepted_adapter_types():
            self.check_supported_adapter_type_(OmegaConf.create(plain))
        _, name = self.resolve_adapter_module_name_(name)
        check_adapter_name(name, self._adapters())
        if self._shares_adapter_cfg and name not in cast(DictConfig, self.adapter_cfg):
            raise ValueError(_TO_A_MODEL.format(name, type(self).__name__))
        enabled = plain.pop("enabled", True)
        if not isinstance(enabled, bool):
            raise ValueError(f"enabled of adapter {name!r} must be a bool, got {enabled!r}")
        adapter = instantiate(plain, **kwargs)
        if not isinstance(adapter, nn.Module):
            raise ValueError(
                f"adapter {name!r} must be a torch.nn.Module, got {type(adapter).__name__}"
            )
        self._match_host(adapter)

        config = getattr(self, "adapter_cfg", None)
        if config is None:
            config = OmegaConf.create({})
        with extensible(config):
            config[name] = {**plain, "enabled": enabled}
        if "adapter_layer" not in self._modules:
            self.adapter_layer = nn.ModuleDict()
        self._set_adapters({**self._adapters(), name: adapter})
        self.adapter_name = name
        self._adapter_cfg = config
        self._enable({name: enabled})

    def _match_host(self, adapter: nn.Module) -> None:
        like = floating_tensor(self._host())
        if like is not None:
            adapter.to(device=like.device, dtype=like.dtype)
        adapter.train(self.training)

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter of this module.

        Args:
            name: its name, plain or ``"module:name"``.

        Raises:
            ValueError: if there is none of that name, or this module belongs to a model that was
                given the adapter (remove it from the model).
        """
        name, config = self._own_adapter(name)
        with extensible(config):
            del config[name]
        self._remove_module(name)
        self._enable({name: False})

    def rename_adapter(self, old: str, new: str) -> None:
        """Renames an adapter of this module; it keeps its place among the others.

        Args:
            old: its name, plain or ``"module:name"``.
            new: its new name.

        Raises:
            ValueError: if there is none of the old name, the new one is taken, reserved or
                malformed, or this module belongs to a model that was given the adapter.
        """
        old, config = self._own_adapter(old)
        check_adapter_name(new, [known for known in self._adapters() if known != old or new == old])
        self._rename_module(old, new)
        self.adapter_cfg = OmegaConf.create(
            {new if key == old else str(key): config._get_node(key) for key in config}
        )

    def _own_adapter(self, name: str) -> tuple[str, DictConfig]:
        _, name = self.resolve_adapter_module_name_(name)
        if name not in self._adapters():
            raise ValueError(
                f"there is no adapter named {name!r}; there are {list(self._adapters())}"
            )
        if self._shares_adapter_cfg:
            raise ValueError(_OF_A_MODEL.format(name))
        return name, cast(DictConfig, self.adapter_cfg)

    def _remove_module(self, name: str) -> None:
        self._set_adapters({key: a for key, a in self._adapters().items() if key != name})

    def _rename_module(self, old: str, new: str) -> None:
        from adapter_ext import sample_counts

        self._set_adapters({new if key == old else key: a for key, a in self._adapters().items()})
        sample_counts.rename(self, old, new)

    def _set_adapters(self, adapters: dict[str, nn.Module]) -> None:
        # At once, by another dict: another thread may be running those that stay, or list them.
        self.adapter_layer.__dict__["_modules"] = adapters

    def set_accepted_adapter_types(self, adapter_types: list[type | str]) -> None:
        """Restricts what may be added here to some classes and their subclasses.

        Args:
            adapter_types: classes derived from ``nn.Module``, or dotted paths of such.

        Raises:
            ValueError: if one is none of these.
        """
        types = set()
        for given in adapter_types:
            found = import_class(given) if isinstance(given, str) else given
            if not isinstance(found, type) or not issubclass(found, nn.Module):
                raise ValueError(f"an adapter type must derive from torch.nn.Module, got {given!r}")
            types.add(found)
        self._accepted_adapter_types = types

    def get_accepted_adapter_types(self) -> set[type]:
        """The classes that may be added here; empty means all."""
        return getattr(self, "_accepted_adapter_types", set())

    def check_supported_adapter_type_(
        self, adapter_cfg: DictConfig, supported_adapter_types: Iterable[type] | None = None
    ) -> None:
        """Checks that the type of an adapter is accepted.

        Args:
            adapter_cfg: the adapter's configuration.
            supported_adapter_types: the accepted types; None means this module's.

        Raises:
            ValueError: if it is not accepted, or ``_target_`` is missing or not acceptable.
        """
        if supported_adapter_types is None:
            supported_adapter_types = self.get_accepted_adapter_types()
        accepted = tuple(supported_adapter_types)
        found = resolve_target(adapter_cfg.get("_target_", ""))
        if accepted and not issubclass(found, accepted):
            names = ", ".join(sorted(map(class_path, accepted)))
            raise ValueError(
                f"{type(self).__name__} accepts adapters of type {names}; got {class_path(found)}"
            )

    # --- Names and lookup -------------------------------------------------------------------------

    def resolve_adapter_module_name_(self, name: str) -> tuple[str, str]:
        """Splits a name into the name of a module and that of an adapter.

        Args:
            name: ``"module:adapter"``, split at the first colon, or ``"adapter"`` alone, whose
                module is looked up in ``adapter_cfg``'s metadata.

        Returns:
            ``(module, adapter)``; module is ``""`` if none is known.

        Raises:
            TypeError: if name is no str.
        """
        if not isinstance(name, str):
            raise TypeError(f"an adapter's name must be a str, got {type(name).__name__}")
        if ":" in name:
            module_name, _, adapter_name = name.partition(":")
            return module_name, adapter_name
        return self._metadata().get(name) or "", name

    def _metadata(self) -> dict[str, str]:
        """The modules of adapters, by name, as they were given; those of some are not noted."""
        config = getattr(self, "adapter_cfg", None) or {}
        settings = config.get(self.adapter_global_cfg_key) or {}
        metadata = settings.get(self.adapter_metadata_cfg_key) or {}
        return dict(metadata.get("modules") or {})

    def is_adapter_available(self) -> bool:
        """Whether there is any adapter, enabled or not."""
        return bool(self._adapters())

    def get_adapter_module(self, name: str) -> nn.Module | None:
        """The adapter of a name, plain or ``"module:name"``; None if there is none."""
        return self._adapters().get(self.resolve_adapter_module_name_(name)[1])

    def get_adapter_cfg(self, name: str) -> DictConfig | None:
        """The configuration of the adapter of a name; None if there is none."""
        config = getattr(self, "adapter_cfg", None)
        return None if config is None else config.get(self.resolve_adapter_module_name_(name)[1])

    @property
    def adapter_index(self) -> dict[str, int]:
        """Index by name of the adapters here and in submodules, for :meth:`route_adapters`."""
        from adapter_ext.routing import adapter_index

        return adapter_index(self._host())

    def list_adapters(self) -> AdapterTable:
        """The adapters here and in submodules, a row each; print it as a table."""
        return list_adapters(self._host())

    # --- Enabling ---------------------------------------------------------------------------------

    @property
    def adapter_cfg(self) -> DictConfig | None:
        """See the class; assigning it reads again which adapters are enabled."""
        if "_adapter_cfg" not in self.__dict__:
            raise AttributeError("no adapter was added")
        return self._adapter_cfg

    @adapter_cfg.setter
    def adapter_cfg(self, cfg: DictConfig | None) -> None:
        self._adapter_cfg = cfg
        self._resolve_enabled()

    def _resolve_enabled(self) -> None:
        config = getattr(self, "adapter_cfg", None)
        names = [] if config is None else [key for key in config if key in self._adapters()]
        self._enable({name: config[name].get("enabled", True) for name in names})  # type: ignore[index]

    def _enable(self, changes: Mapping[str, bool]) -> None:
        """Takes over which adapters are enabled, but does not read what is said of all others.

        Configurations are slow to read: adding each of a thousand adapters would take seconds.
        """
        from adapter_ext import sample_counts

        sample_counts.prepare(self)
        config = getattr(self, "adapter_cfg", None)
        enabled = {**dict.fromkeys(self._enabled_adapters, True), **changes}
        adapters = self._adapters()
        self._enabled_adapters = {
            name: None
            for name in ([] if config is None else config.keys())  # in the order of these
            if name in adapters and enabled.get(name, False)
        }

    def set_enabled_adapters(self, name: str | None = None, enabled: bool = True) -> None:
        """Enables or disables an adapter.

        Args:
            name: its name, plain or ``"module:name"``; None means all adapters.
            enabled: whether it is to run.

        Raises:
            ValueError: if there are no adapters, or none of that name, or this module belongs to a
                model that was given the adapter (enable it there).
        """
        config = getattr(self, "adapter_cfg", None)
        if config is None or not self.is_adapter_available():
            raise ValueError("there are no adapters: add one with add_adapter first")
        known = [str(key) for key in config if key != self.adapter_global_cfg_key]
        if name is None:
            names = [key for key in known if key in self._adapters()]
        else:
            _, name = self.resolve_adapter_module_name_(name)
            # The configuration may be shared with other modules and name their adapters as well.
            if name not in known:
                raise ValueError(f"there is no adapter named {name!r}; there are {known}")
            names = [name]
        if self._shares_adapter_cfg:
            changed = [key for key in names if config[key].get("enabled", True) != bool(enabled)]
            if changed:
                # The model's other modules would go on as before, against their configuration.
                raise ValueError(_OF_A_MODEL.format(changed[0]))
        earlier: dict[str, Any] = {}
        with extensible(config):
            try:
                for key in names:
                    before = config[key].get("enabled", True)
                    config[key]["enabled"] = bool(enabled)
                    earlier[key] = before
            except BaseException:  # one is read-only, for instance
                for key, before in earlier.items():
                    config[key]["enabled"] = before
                raise
        self._enable(dict.fromkeys(names, bool(enabled)))

    def get_enabled_adapters(self) -> list[str]:
        """The names of the enabled adapters, in the order in which they run."""
        adapters = self._adapters()
        return [name for name in self._enabled_adapters if name in adapters]

    def unfreeze_enabled_adapters(self, freeze_batchnorm: bool = True) -> None:
        """Prepares the enabled adapters, here and in submodules, for training.

        They are put into training mode and their parameters made to require grad (by their
        ``adapter_unfreeze``, where they have it). Freeze everything else beforehand.

        Args:
            freeze_batchnorm: freeze the batch norms that belong to no adapter: their parameters
                require no grad, and they go on using their running statistics, even after
                ``train()`` (each call of one puts it back into evaluation mode), so that they
                neither change nor compute something else than without adapters. Set a norm's
                ``track_running_stats`` to True to undo it.
        """
        unfreeze_adapters(self._host(), freeze_batchnorm)

    # --- Running ----------------------------------------------------------------------------------

    def forward_enabled_adapters(self, input: Any) -> Any:
        """Runs the enabled adapters one after the other, or under routing each sample's own.

        Args:
            input: what the first adapter gets: a tensor ``[..., D]``, or what its strategy takes.

        Returns:
            The last adapter's result; input itself if none is enabled.

        Raises:
            AttributeError: if an adapter has no ``adapter_strategy``.
            RuntimeError: in a backward pass, if this had other routes when it was computed first.
            ValueError: under routing, if input does not fit the routes.
        """
        routes = routes_in_force(self) if self._adapter_routes or _traced_routes else None
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            self._check_recomputation()
        if routes is not None:
            return routes.forward(self, input)
        for name in self._enabled_adapters:
            adapter = self._modules["adapter_layer"]._modules.get(name)  # type: ignore[union-attr]
            if adapter is None:
                continue  # it was deleted from adapter_layer
            input = self.forward_single_enabled_adapter_(
                input, adapter, adapter_name=name, adapter_strategy=strategy_of(adapter, name)
            )
        return input

    def forward_single_enabled_adapter_(
        self,
        input: Any,
        adapter_module: nn.Module,
        *,
        adapter_name: str,
        adapter_strategy: AbstractAdapterStrategy,
    ) -> Any:
        """Runs one adapter; override for what a strategy can't do.

        Args:
            input: the previous adapter's result.
            adapter_module: the adapter.
            adapter_name: its name.
            adapter_strategy: its strategy.
        """
        return adapter_strategy(input, adapter_module, module=self)

    def route_adapters(self, names: Sequence[str | None] | Tensor) -> AbstractContextManager[None]:
        """Gives every sample its own adapter; see :func:`adapter_ext.route_adapters`."""
        from adapter_ext.routing import route_adapters

        return route_adapters(self._host(), names)

    # --- Auxiliary losses -------------------------------------------------------------------------

    def adapter_losses(self) -> dict[str, Tensor]:
        """The auxiliary losses that adapters, here and in submodules, left since the last reset.

        Add them to the loss in each training step, then reset them, which also frees their graphs::

            loss = task_loss + sum(model.adapter_losses().values())
            model.reset_adapter_losses()

        Returns:
            A scalar by adapter name, summed over layers; only of adapters that left one.
        """
        return adapter_losses(self._host())

    def reset_adapter_losses(self) -> None:
        """Forgets the auxiliary losses of the adapters here and in submodules."""
        reset_adapter_losses(self._host())

    # --- Helpers ----------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Nobody has routed a copy.
        return without(super().__reduce_ex__(protocol), "_adapter_routes", "_route_history")

    def _check_recomputation(self) -> None:
        """Checks that what a backward pass computes again has the routes that it had.

        The node that wants it was made as it was computed first, and nodes are numbered: by its
        number the history tells which routes were in force.
        """
        node = torch._C._current_autograd_node()
        if self._route_history is None or node is None:
            return
        history = tuple(self._route_history)  # other threads may add to it
        own = _of_this_thread(self._adapter_routes)
        if own and (own[-1] is None or own[-1].for_backward):
            return
        mark = _mark(own)
        threads = {thread for thread, _, _ in history}
        this = threading.get_ident()
        # On a GPU this is a thread of autograd's, which routes nothing.
        for thread in {this} if this in threads else threads:
            if _mark_at(history, thread, node._sequence_nr()) is not mark:
                raise RuntimeError(
                    f"a routed {type(self).__name__} is now computed again, for the backward, "
                    f"without the routes; give torch.utils.checkpoint (use_reentrant=False) "
                    f"context_fn=adapter_ext.checkpoint_context(model)"
                )

    def _host(self) -> nn.Module:
        return cast(nn.Module, self)

    def _share_adapter_cfg(
        self, cfg: DictConfig, enabled: Mapping[str, bool], model_guid: str | None
    ) -> None:
        """Makes the configuration of a whole model this module's; it says what is enabled."""
        self._shares_adapter_cfg = True
        self._adapter_cfg = cfg
        self._enable(enabled)
        if model_guid is not None:
            # Auxiliary losses are registered under the name by which the model asks for them.
            self.model_guid = model_guid

    def _check_sharing(self, names: Iterable[str], model_guid: str | None) -> None:
        """Checks that a model with adapters of these names may have this module's looked after."""
        adapters, kind = list(self._adapters()), type(self).__name__
        if not self._shares_adapter_cfg:
            own = [name for name in adapters if name not in names]
            if own:
                raise ValueError(
                    f"a {kind} of this model has adapters {own} that were added to it alone; add "
                    f"them to the model"
                )
        elif adapters and getattr(self, "model_guid", None) != model_guid:
            raise ValueError(
                f"a {kind} of this model has adapters {adapters} that another model was given, "
                f"which would lose their configuration; one of both models can have adapters"
            )

    def _adapter_state(self) -> tuple[nn.ModuleDict | None, dict[str, Any], dict[str, Any]]:
        """What :meth:`_restore_adapter_state` needs to undo changes of this module's adapters."""
        layer = cast("nn.ModuleDict | None", self._modules.get("adapter_layer"))
        kept = {key: self.__dict__[key] for key in _STATE if key in self.__dict__}
        return layer, dict(self._adapters()), kept

    def _restore_adapter_state(
        self, state: tuple[nn.ModuleDict | None, dict[str, Any], dict[str, Any]]
    ) -> None:
        layer, adapters, kept = state
        if layer is None:
            self._modules.pop("adapter_layer", None)
        else:
            self._modules["adapter_layer"] = layer
            self._set_adapters(adapters)
        self.__dict__.update(kept)
        for key in _STATE:
            if key not in kept:
                self.__dict__.pop(key, None)

    def _adapters(self) -> dict[str, nn.Module]:
        layer = self._modules.get("adapter_layer")
        return {} if layer is None else cast("dict[str, nn.Module]", layer._modules)


def hosts_of(module: nn.Module) -> list[AdapterModuleMixin]:
    """The hosts among a module and its submodules, in the order of ``modules()``.

    Not those within adapters, which get but a part of the batch; adapters may also be many.
    """
    hosts: list[AdapterModuleMixin] = []
    seen: set[nn.Module] = set()
    pending: list[nn.Module | None] = [module]
    while pending:
        current = pending.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        children = current._modules
        if isinstance(current, AdapterModuleMixin):
            hosts.append(current)
            children = {k: child for k, child in children.items() if k != "adapter_layer"}
        if children:
            pending.extend(reversed(children.values()))
    return hosts


def named_hosts(module: nn.Module) -> list[tuple[str, AdapterModuleMixin]]:
    """:func:`hosts_of` with their paths."""
    hosts: list[tuple[str, AdapterModuleMixin]] = []
    seen: set[nn.Module] = set()
    pending: list[tuple[str, nn.Module | None]] = [("", module)]
    while pending:
        path, current = pending.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        is_host = isinstance(current, AdapterModuleMixin)
        if is_host:
            hosts.append((path, cast(AdapterModuleMixin, current)))
        pending += [
            (f"{path}.{name}" if path else name, child)
            for name, child in reversed(current._modules.items())
            if not (is_host and name == "adapter_layer")
        ]
    return hosts


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within what DistributedDataParallel and torch.compile put around it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def list_adapters(model: nn.Module) -> AdapterTable:
    """The adapters of a module and its submodules, a row each; print it as a table.

    Args:
        model: any module. What adapters have themselves is not looked for.
    """
    return AdapterTable(
        AdapterInfo(
            name=name,
            where=path,
            bottleneck=getattr(adapter, "dim", None),
            activation=getattr(adapter, "activation", None),
            enabled=name in host._enabled_adapters,
            parameters=sum(p.numel() for p in adapter.parameters()),
            trainable=sum(p.numel() for p in adapter.parameters() if p.requires_grad),
        )
        for path, host in named_hosts(model)
        for name, adapter in host._adapters().items()
    )


def adapter_losses(model: nn.Module) -> dict[str, Tensor]:
    """The auxiliary losses of the adapters of any module and its submodules.

    See :meth:`AdapterModuleMixin.adapter_losses`.

    Args:
        model: any module.

    Returns:
        A scalar by adapter name, summed over layers; only of adapters that left one.
    """
    losses: dict[str, Tensor] = {}
    seen: set[nn.Module] = set()  # hosts may share an adapter, which has the losses of all
    for host in hosts_of(model):
        for name, adapter in host._adapters().items():
            if adapter in seen:
                continue
            seen.add(adapter)
            for tensors in AccessMixin.get_module_registry(adapter).values():
                for loss in tensors.get(ADAPTER_LOSS, ()):
                    losses[name] = losses[name] + loss if name in losses else loss
    return losses


def reset_adapter_losses(model: nn.Module) -> None:
    """Forgets the auxiliary losses of the adapters of any module and its submodules."""
    AccessMixin.reset_registry(model, ADAPTER_LOSS)


def unfreeze_adapters(model: nn.Module, freeze_batchnorm: bool) -> None:
    """See :meth:`AdapterModuleMixin.unfreeze_enabled_adapters`."""
    hosts = hosts_of(model)
    if freeze_batchnorm:
        of_adapters = {m for host in hosts for a in host._adapters().values() for m in a.modules()}
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module not in of_adapters:
                _freeze_batchnorm(module)
    for host in hosts:
        for name, adapter in host._adapters().items():
            if name not in host._enabled_adapters:
                continue
            adapter.train()
            getattr(adapter, "adapter_unfreeze", adapter.requires_grad_)()
            for module in adapter.modules():
                if isinstance(module, _BatchNorm):
                    module.track_running_stats = True


def floating_tensor(module: nn.Module) -> Tensor | None:
    """The first floating-point parameter, or else buffer, of a module; None if it has none."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((t for t in tensors if t.is_floating_point()), None)


def extensible(config: DictConfig) -> AbstractContextManager[Any]:
    """``omegaconf.open_dict`` where it does something: it goes through the whole configuration."""
    return open_dict(config) if OmegaConf.is_struct(config) else nullcontext()


def strategy_of(adapter: nn.Module, name: str) -> AbstractAdapterStrategy:
    """The strategy of an adapter.

    Raises:
        AttributeError: if it has none.
    """
    strategy = getattr(adapter, "adapter_strategy", None)
    if strategy is None:
        raise AttributeError(
            f"adapter {name!r} ({type(adapter).__name__}) has no adapter_strategy; derive its "
            f"class from AdapterModuleUtil and call setup_adapter_strategy in its __init__"
        )
    return cast(AbstractAdapterStrategy, strategy)


_TracedRoutes: TypeAlias = "tuple[tuple[frozenset[AdapterModuleMixin], Routes], ...]"

# What code that is being compiled or exported has entered, the innermost last, each with its hosts.
# Not kept on the hosts: compiled code puts back what it changed when it ends, and would undo what
# another thread does meanwhile. Outside such code this is empty, so there is nothing to undo.
_traced_routes: _TracedRoutes = ()


def enter_traced_routes(hosts: frozenset[AdapterModuleMixin], routes: Routes) -> _TracedRoutes:
    """Routes hosts in code that is being traced; returns what :func:`leave_traced_routes` takes."""
    global _traced_routes
    outer = _traced_routes
    _traced_routes = (*outer, (hosts, routes))
    return outer


def leave_traced_routes(outer: _TracedRoutes) -> None:
    """Undoes :func:`enter_traced_routes`, which returned ``outer``."""
    global _traced_routes
    _traced_routes = outer


def set_routes(stacks: Mapping[AdapterModuleMixin, _RouteStack]) -> None:
    """Changes the routes of hosts, and keeps what this changed for this thread."""
    this = threading.get_ident()
    number = None
    if not torch.is_inference_mode_enabled() and torch._C._current_graph_task_id() == -1:
        number = torch._C._autograd._get_sequence_nr()
    for host, stack in stacks.items():
        # Not by nn.Module.__setattr__, which costs more than a microsecond a host.
        own = host.__dict__
        if stack:
            own["_adapter_routes"] = stack
        else:  # as before the first context: compiled code would see a difference
            own.pop("_adapter_routes", None)
        if number is not None:
            history = own.get("_route_history")
            if history is None:
                own["_route_history"] = history = deque(maxlen=_HISTORY)
            history.append((this, number, _mark(_of_this_thread(stack))))


_HISTORY = 128


def _of_this_thread(stack: _RouteStack) -> list[Routes | None]:
    this = threading.get_ident()
    return [routes for thread, routes in stack if thread == this]


def _mark(routes: list[Routes | None]) -> object:
    innermost = routes[-1] if routes else None
    return None if innermost is None else innermost.mark


def _mark_at(history: tuple[tuple[int, int, object], ...], thread: int, number: int) -> object:
    """The mark of the routes in which a node of that number was made; no mark if not known."""
    for of, first, mark in reversed(history):
        if of == thread and first <= number:
            return mark
    return object() if len(history) == _HISTORY else None


def routes_in_force(host: AdapterModuleMixin) -> Routes | None:
    """The routes that hold for a host in this thread; None if it is not routed."""
    stack = host._adapter_routes
    if torch.compiler.is_compiling():
        for hosts, routes in reversed(_traced_routes):
            if host in hosts:
                return routes
        # The compiled code will run in any thread, and can't tell which it is.
        if any(thread != stack[-1][0] for thread, _ in stack[:-1]):
            raise RuntimeError("a compiled module can be routed by one thread at a time only")
        return stack[-1][1] if stack else None
    own = _of_this_thread(stack)
    return own[-1] if own else None


def _freeze_batchnorm(norm: _BatchNorm) -> None:
    for parameter in norm.parameters(recurse=False):
        parameter.requires_grad_(False)
    norm.track_running_stats = False
    norm.eval()
    if _stay_frozen not in norm._forward_pre_hooks.values():
        norm.register_forward_pre_hook(_stay_frozen)


def _stay_frozen(norm: nn.Module, args: Any) -> None:
    # train() of the whole model switches the norm to statistics of the batch.
    if norm.training and not norm.track_running_stats:
        norm.eval()
