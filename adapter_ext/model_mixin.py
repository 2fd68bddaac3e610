"""The mixin that gives a whole model adapters: configuration, dispatch to modules, files."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, read_write
from torch import Tensor, nn

from adapter_ext import files
from adapter_ext.mixin import AdapterModuleMixin, extensible, hosts_of, named_hosts
from adapter_ext.names import check_adapter_name
from adapter_ext.registry import (
    AdapterRegistryInfo,
    get_registered_adapter,
    targets_of_a_file,
    to_plain_config,
)

_logger = logging.getLogger(__name__)

# A subclass's override of these leaves the model as it was where it fails, too.
_TRANSACTIONS = (
    "add_adapter",
    "load_adapters",
    "remove_adapter",
    "rename_adapter",
    "set_enabled_adapters",
)


class MissingAdapterError(KeyError):
    """A file holds no adapter of that name."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would quote it


class AdapterModelPTMixin(AdapterModuleMixin):
    """Gives a :class:`adapter_ext.ModelPT` adapters in its submodules.

    ::

        class Recognizer(ModelPT, AdapterModelPTMixin):
            def __init__(self, cfg, trainer=None):
                super().__init__(cfg, trainer)
                self.encoder = Encoder(self.cfg)  # has blocks that are AdapterModuleMixins
                self.decoder = Decoder(self.cfg)
                self.setup_adapters()

            adapter_module_names = ["", "encoder", "decoder"]
            default_adapter_module_name = "encoder"


        model.add_adapter("fr", LinearAdapterConfig(in_features=512, dim=64))
        model.add_adapter("encoder+decoder:de", LinearAdapterConfig(in_features=512, dim=32))

    A name stands for one adapter in the whole model, ``"fr"`` or with its place ``"encoder:fr"``.
    The place is one of :attr:`adapter_module_names`, or several of them joined by ``+``. An adapter
    without one goes to :attr:`default_adapter_module_name`; if that is None, to all named modules
    but those that ``cfg.adapters.global_cfg.{module}_adapter`` sets to False; if none are named, to
    the whole model. Within a module it goes to the outermost modules that are AdapterModuleMixins,
    also within another such model, unless that has adapters itself.

    Models written for NeMo override ``add_adapter``, ``set_enabled_adapters``,
    ``get_enabled_adapters`` and ``is_adapter_available``, call ``super()`` and then their modules.
    That works: an override of ``add_adapter`` takes over from the dispatch above, and one that
    hands the adapter to no module gets a warning.

    Whatever fails, of adding, loading, removing, renaming and enabling, leaves the model and its
    configuration as they were.

    The configuration is ``cfg.adapters``, shared with all modules: ``adapters.<name>`` is the
    adapter's, ``adapters.global_cfg`` holds settings of all, and in there
    ``adapter_meta_cfg.modules`` the place of each.
    """

    cfg: DictConfig

    _restoring_adapters = False
    _in_transaction = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _TRANSACTIONS:
            # Of the class, or of another base than this one and its own subclasses.
            found = getattr(cls, name)
            if found is not getattr(AdapterModelPTMixin, name) and not _is_a_transaction(found):
                setattr(cls, name, _in_a_transaction(found))

    # --- Where adapters can be --------------------------------------------------------------------

    @property
    def adapter_module_names(self) -> list[str]:
        """The places for adapters: paths of submodules, and ``""``, the default; override it."""
        return [""]

    @property
    def default_adapter_module_name(self) -> str | None:
        """The place that ``""`` means; None means all of them."""
        return None

    def resolve_adapter_module_name_(self, name: str) -> tuple[str, str]:
        """Splits a name into place and adapter, see :class:`adapter_ext.AdapterModuleMixin`.

        Raises:
            TypeError: if name is no str.
            ValueError: if the place is none of :attr:`adapter_module_names`.
        """
        module_name, adapter_name = super().resolve_adapter_module_name_(name)
        places, given = self.adapter_module_names, module_name.split("+")
        unknown = {place for place in given if places != [""] and place not in places}
        if len(given) > 1 and "" in given:  # the default alone has no name
            unknown.add("")
        if unknown:
            raise ValueError(
                f"{min(unknown)!r} in {name!r} is no place for adapters; there are {places}"
            )
        return module_name, adapter_name

    def check_valid_model_with_adapter_support_(self) -> None:
        """Override to check that the model's modules can have adapters."""

    def _hosts_at(self, module_name: str) -> list[AdapterModuleMixin]:
        """The modules that get an adapter of this place."""
        if module_name:
            places = module_name.split("+")
        elif self.default_adapter_module_name:
            places = [self.default_adapter_module_name]
        else:
            named = [place for place in self.adapter_module_names if place]
            settings = self.adapter_cfg.get(self.adapter_global_cfg_key) or {}
            places = [p for p in named if settings.get(f"{p}_adapter", True)] if named else [""]
        hosts: dict[AdapterModuleMixin, None] = {}
        for place in places:
            found = _outermost_hosts(self._submodule(place))
            if not found:
                raise ValueError(
                    f"no module of {place!r} is an AdapterModuleMixin; replace_adapter_compatible_"
                    f"modules swaps registered classes for the versions that are"
                )
            hosts.update(dict.fromkeys(found))
        if not hosts:
            raise ValueError(
                f"global_cfg leaves no place for adapters; there are {self.adapter_module_names}"
            )
        return list(hosts)

    def _submodule(self, place: str) -> nn.Module:
        try:
            return self._host().get_submodule(place)
        except AttributeError as error:
            raise ValueError(f"{type(self).__name__} has no module {place!r}") from error

    # --- Configuration ----------------------------------------------------------------------------

    @property
    def adapter_cfg(self) -> DictConfig:
        """``cfg.adapters``; an empty configuration if there is none."""
        adapters = self.cfg.get("adapters")
        return OmegaConf.create({}) if adapters is None else cast(DictConfig, adapters)

    @adapter_cfg.setter
    def adapter_cfg(self, cfg: DictConfig | None) -> None:
        # Part of update_adapter_cfg: the model has no adapters of its own.
        if cfg is not None and self.cfg.get("adapters") is not cfg:
            with extensible(self.cfg):
                self.cfg.adapters = cfg

    def update_adapter_cfg(self, cfg: DictConfig) -> None:
        """Shares a configuration of adapters with all modules, which read again what is enabled.

        Args:
            cfg: ``model.cfg.adapters``; the modules refer to it, they get no copy.

        Raises:
            ValueError: if a module has adapters that were added to it alone, or by another model.
        """
        # A model within this one has no adapters of its own, and its configuration is another one.
        hosts = [h for h in hosts_of(self._host()) if not isinstance(h, AdapterModelPTMixin)]
        names = {name for host in hosts for name in host._adapters()}
        # Read once for all modules: configurations are slow to read.
        enabled = {k: cfg[k].get("enabled", True) for k in cfg.keys() if k in names}  # noqa: SIM118
        guid = getattr(self, "model_guid", None)
        for host in hosts:
            host._check_sharing(enabled, guid)
        for host in hosts:
            host._share_adapter_cfg(cfg, enabled, guid)

    def setup_adapters(self) -> None:
        """Adds the adapters that ``cfg.adapters`` names; call it once, last in the constructor.

        Raises:
            ValueError: if one can't be added.
        """
        if not self.adapter_cfg:
            return
        places = self._metadata()
        self._restoring_adapters = True
        try:
            with self._transaction():
                for name in self._known_adapters():
                    cfg = OmegaConf.create(to_plain_config(self.adapter_cfg[name]))
                    place = places.get(name)
                    self.add_adapter(f"{place}:{name}" if place else name, cfg)
        finally:
            del self._restoring_adapters

    def _known_adapters(self) -> list[str]:
        return [str(key) for key in self.adapter_cfg if key != self.adapter_global_cfg_key]

    def _require(self, name: str) -> str:
        """The bare name of an adapter that there is, of a plain or a qualified one."""
        module_name, adapter_name = (
            self.resolve_adapter_module_name_(name) if ":" in name else ("", name)
        )
        if adapter_name not in self._known_adapters():
            raise ValueError(
                f"there is no adapter named {adapter_name!r}; there are {self._known_adapters()}"
            )
        for place in module_name.split("+") if module_name else ():
            if not any(adapter_name in h._adapters() for h in hosts_of(self._submodule(place))):
                raise ValueError(f"adapter {adapter_name!r} is not in {place!r}")
        return adapter_name

    def _require_configured(self) -> None:
        """Checks that a file of this model would have the configurations of all adapters."""
        known = self._known_adapters()
        for path, host in named_hosts(self._host()):
            unknown = [name for name in host._adapters() if name not in known]
            if unknown:
                raise ValueError(
                    f"module {path!r} has adapters {unknown}, which the configuration of this "
                    f"{type(self).__name__} has not: nothing could read its file; were they added "
                    f"to that module alone or to another model, or was cfg assigned afterwards?"
                )

    # --- Adding, enabling, removing ---------------------------------------------------------------

    # Without further arguments: the model could not be restored from its configuration.
    def add_adapter(self, name: str, cfg: Any) -> None:  # type: ignore[override]
        """Adds an adapter to the modules of its place; it gets their device and type.

        Args:
            name: its name, with or without a place, see the class.
            cfg: dict, DictConfig or dataclass, see :meth:`AdapterModuleMixin.add_adapter`; copied.

        Raises:
            TypeError: if cfg is of another type, or the adapter refuses its arguments.
            ValueError: if the name is taken, reserved or malformed, the place is unknown or has no
                module that can have adapters, or one does not accept this one.
            omegaconf.errors.OmegaConfBaseException: if a value of cfg is missing (``"???"``), or
                an interpolation leads nowhere.
        """
        with self._transaction():
            plain = to_plain_config(cfg)
            plain.setdefault("enabled", True)
            module_name, adapter_name = self.resolve_adapter_module_name_(name)
            check_adapter_name(
                adapter_name, () if self._restoring_adapters else self._known_adapters()
            )
            with extensible(self.cfg):
                if self.cfg.get("adapters") is None:
                    self.cfg.adapters = {}
                config = _prepare_default_adapter_config(
                    global_key=self.adapter_global_cfg_key,
                    meta_key=self.adapter_metadata_cfg_key,
                    cfg=self.cfg.adapters,
                )
                settings = config[self.adapter_global_cfg_key][self.adapter_metadata_cfg_key]
                settings["modules"][adapter_name] = module_name
                config[adapter_name] = plain
            self.update_adapter_cfg(config)
            self.check_valid_model_with_adapter_support_()
            if self._is_stock("add_adapter"):
                for host in self._hosts_at(module_name):
                    host.add_adapter(adapter_name, plain)

    def is_adapter_available(self) -> bool:
        """Whether there is any adapter, enabled or not."""
        return any(host._adapters() for host in hosts_of(self._host()))

    def set_enabled_adapters(self, name: str | None = None, enabled: bool = True) -> None:
        """Enables or disables an adapter, in all modules that have it.

        Args:
            name: its name, with or without a place; None means all adapters.
            enabled: whether it is to run.

        Raises:
            ValueError: if there are no adapters, or none of that name or in that place.
        """
        with self._transaction():
            self.check_valid_model_with_adapter_support_()
            if not self.is_adapter_available():
                raise ValueError("there are no adapters: add one with add_adapter first")
            names = self._known_adapters() if name is None else [self._require(name)]
            with extensible(self.adapter_cfg):
                for key in names:
                    self.adapter_cfg[key]["enabled"] = bool(enabled)
            self.update_adapter_cfg(self.adapter_cfg)

    def get_enabled_adapters(self) -> list[str]:
        """The names of the enabled adapters, sorted; ``[]`` to an override, which adds its own."""
        self.check_valid_model_with_adapter_support_()
        if not self._is_stock("get_enabled_adapters"):
            return []
        hosts = hosts_of(self._host())
        return sorted(
            {name for host in hosts for name in AdapterModuleMixin.get_enabled_adapters(host)}
        )

    def get_adapter_module(self, name: str) -> nn.Module | None:
        """The adapter of a name, in the place that it gives; None if there is none.

        Raises:
            ValueError: if several modules have it: ask one of them; or the place is unknown.
        """
        given = name
        place, name = self.resolve_adapter_module_name_(name)
        places = place.split("+") if place and ":" in given else [""]
        hosts = {host for p in places for host in hosts_of(self._submodule(p))}
        found = {
            path: host._adapters()[name]
            for path, host in named_hosts(self._host())
            if host in hosts and name in host._adapters()
        }
        if len(found) > 1:
            raise ValueError(f"several modules have an adapter named {name!r}: {list(found)}")
        return next(iter(found.values()), None)

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter from the model.

        Args:
            name: its name, with or without a place.

        Raises:
            ValueError: if there is none of that name or in that place.
        """
        with self._transaction():
            name = self._require(name)
            for host in hosts_of(self._host()):
                if name in host._adapters():
                    host._remove_module(name)
            self._change_config(lambda known: None if known == name else known)

    def rename_adapter(self, old: str, new: str) -> None:
        """Renames an adapter; it keeps its place among the others.

        Args:
            old: its name, with or without a place.
            new: its new name, without a place.

        Raises:
            ValueError: if there is none of the old name, or the new one is taken, reserved or
                malformed.
        """
        with self._transaction():
            old = self._require(old)
            known = [name for name in self._known_adapters() if name != old or new == old]
            check_adapter_name(new, known)
            for host in hosts_of(self._host()):
                if old in host._adapters():
                    host._rename_module(old, new)
            self._change_config(lambda known: new if known == old else known)

    def _change_config(self, new_name: Callable[[str], str | None]) -> None:
        """Renames adapters in the configuration, None removes."""
        config = self.adapter_cfg
        settings = config[self.adapter_global_cfg_key][self.adapter_metadata_cfg_key]
        refill(settings["modules"], _renamed(settings["modules"], new_name))
        refill(
            config,
            _renamed(config, lambda k: k if k == self.adapter_global_cfg_key else new_name(k)),
        )
        self.update_adapter_cfg(config)
        frozen = self.__dict__.get("_required_grad")  # what freeze() noted, by parameter name
        if frozen is not None:
            moved = ((_moved(key, new_name), required) for key, required in frozen.items())
            self.__dict__["_required_grad"] = {
                k: required for k, required in moved if k is not None
            }

    # --- Files ------------------------------------------------------------------------------------

    def save_adapters(self, filepath: str | os.PathLike[str], name: str | None = None) -> None:
        """Writes adapters to a file, without the rest of the model, atomically.

        Args:
            filepath: the file; ``.safetensors`` is recommended, ``.pt`` is NeMo's format.
            name: the adapter, with or without a place; None means all.

        Raises:
            AttributeError: if there are no adapters.
            ValueError: if there is none of that name or in that place, the suffix is another, or
                a module has adapters that the configuration has not.
        """
        if not self.is_adapter_available():
            raise AttributeError("there are no adapters to save: add one with add_adapter first")
        self._require_configured()
        known = self._known_adapters()
        saved: dict[str, files.SavedAdapter] = {}
        places = self._metadata()
        for key in known if name is None else [self._require(name)]:
            hosts = [(p, h) for p, h in named_hosts(self._host()) if key in h._adapters()]
            if not hosts:
                raise ValueError(f"adapter {key!r} is in the configuration, but in no module")
            saved[key] = files.SavedAdapter(
                name=key,
                module=places.get(key) or "",
                config=to_plain_config(self.adapter_cfg[key]),
                paths=[path for path, _ in hosts],
                states=[host._adapters()[key].state_dict() for _, host in hosts],
            )
        settings = to_plain_config(self.adapter_cfg.get(self.adapter_global_cfg_key) or {})
        settings.pop(self.adapter_metadata_cfg_key, None)
        files.write_adapters(filepath, files.AdapterFile(saved, settings))

    def load_adapters(
        self,
        filepath: str | os.PathLike[str],
        name: str | None = None,
        map_location: Any = None,
        strict: bool = True,
        classes: Iterable[type] = (),
    ) -> None:
        """Adds adapters from a file that :meth:`save_adapters`, or NeMo's, wrote.

        The file runs no code: its adapters and their strategies are of registered classes (see
        :func:`adapter_ext.register_target`) or of the given ones.

        Args:
            filepath: the file, ``.safetensors`` or ``.pt``.
            name: the adapter, as the file has it: alone, or with the place that it was added with;
                None means all in the file.
            map_location: the device to read to, None for the CPU; the adapters end up on the device
                and in the type of the modules that they are added to.
            strict: whether the file must hold exactly an adapter's parameters. What it holds must
                have their shapes in any case.
            classes: the classes that the file may name besides the registered ones.

        Raises:
            FileNotFoundError: if there is no such file.
            KeyError: if it holds no adapter of that name.
            ValueError: if the model has an adapter of a name already.
            adapter_ext.FileError: a ValueError, if the file's content is not as it should be, or
                does not fit this model.
        """
        content = files.read_adapters(filepath, map_location=map_location)
        where = os.fspath(filepath)
        with self._transaction(), targets_of_a_file(classes):
            for saved in chosen(content, name, where):
                if saved.name in self._known_adapters():
                    raise ValueError(
                        f"{where}: the model has an adapter named {saved.name!r} already; remove "
                        f"or rename it first"
                    )
                try:
                    self.add_adapter(saved.qualified, OmegaConf.create(saved.config))
                    load_states(self._host(), saved, strict)
                except (TypeError, ValueError, RuntimeError, AttributeError) as error:
                    raise files.FileError(
                        f"{where}: adapter {saved.qualified!r} does not fit this model: {error}"
                    ) from error

    # --- Modules that have a version with adapters ------------------------------------------------

    def replace_adapter_compatible_modules(
        self, update_config: bool = True, verbose: bool = True
    ) -> None:
        """Turns modules of registered classes into the versions of these that support adapters.

        All submodules, however deep, of exactly a class that :func:`adapter_ext.register_adapter`
        knows. A module is changed in place: its class is swapped, no constructor runs.

        Args:
            update_config: change the classes that ``cfg`` names (``target``, ``_target_``), too.
            verbose: log each change.
        """
        for module in self._host().modules():
            update_module_class_with_adapter_class(
                module, self.cfg, update_config=update_config, verbose=verbose
            )

    # --- Helpers ----------------------------------------------------------------------------------

    def _is_stock(self, method: str) -> bool:
        return getattr(type(self), method) is getattr(AdapterModelPTMixin, method)

    def _warn_without_module(self, name: str) -> None:
        name = self.resolve_adapter_module_name_(name)[1]
        if not any(name in host._adapters() for host in hosts_of(self._host())):
            warnings.warn(
                f"adapter {name!r} is in the configuration, but in no module: an override of "
                f"add_adapter hands it to modules itself, after super().add_adapter",
                stacklevel=3,
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Within the outermost of these contexts, an error undoes all changes to adapters."""
        if self._in_transaction:
            yield
            return
        hosts = hosts_of(self._host())
        states = [(host, host._adapter_state()) for host in hosts]
        config = self.cfg.get("adapters")
        content = None if config is None else OmegaConf.to_container(config, resolve=False)
        object.__setattr__(self, "_in_transaction", True)
        try:
            yield
        except BaseException:
            for host, state in states:
                host._restore_adapter_state(state)
            if config is not None:
                with read_write(config):
                    refill(config, cast("dict[str, Any]", content))
            else:
                with read_write(self.cfg), extensible(self.cfg):
                    self.cfg.pop("adapters", None)
            raise
        finally:
            object.__delattr__(self, "_in_transaction")


def update_module_class_with_adapter_class(
    module: nn.Module, cfg: DictConfig, update_config: bool = True, verbose: bool = True
) -> None:
    """Turns a module into the version of its class that supports adapters, if there is one.

    Args:
        module: changed in place.
        cfg: a configuration, changed in place.
        update_config: change the class's path wherever cfg names it as ``target`` or ``_target_``.
        verbose: log the change.
    """
    info = get_registered_adapter(type(module))
    if info is None or type(module) is not info.base_class:
        return
    module.__class__ = info.adapter_class
    if verbose:
        _logger.info("%s became %s", info.base_class_path, info.adapter_class_path)
    if update_config:
        with extensible(cfg):
            _replace_targets(cfg, info)


def _replace_targets(cfg: DictConfig, info: AdapterRegistryInfo) -> None:
    # The paths that NeMo writes have no qualified names.
    old = {info.base_class_path, f"{info.base_class.__module__}.{info.base_class.__name__}"}
    for key in cfg:
        node = cfg._get_node(key)
        if isinstance(node, DictConfig):
            if not node._is_none() and not node._is_missing() and not node._is_interpolation():
                _replace_targets(node, info)
        elif node is not None and key in ("target", "_target_") and node._value() in old:
            cfg[key] = info.adapter_class_path


def _prepare_default_adapter_config(
    *, global_key: str, meta_key: str, cfg: DictConfig | None = None
) -> DictConfig:
    """Completes a configuration of adapters with the part that says where they are.

    Args:
        global_key: the key of the settings of all adapters.
        meta_key: the key in there of the metadata.
        cfg: changed in place; None makes a new one.
    """
    if cfg is None:
        cfg = OmegaConf.create({})
    with extensible(cfg):
        if cfg.get(global_key) is None:
            cfg[global_key] = {}
        if cfg[global_key].get(meta_key) is None:
            cfg[global_key][meta_key] = {}
        if cfg[global_key][meta_key].get("modules") is None:
            cfg[global_key][meta_key]["modules"] = {}
    return cfg


def _in_a_transaction(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: AdapterModelPTMixin, *args: Any, **kwargs: Any) -> Any:
        outermost = not self._in_transaction
        with self._transaction():
            result = function(self, *args, **kwargs)
            if (outermost or self._restoring_adapters) and function.__name__ == "add_adapter":
                self._warn_without_module(args[0] if args else kwargs["name"])
            return result

    wrapper._is_a_transaction = True  # type: ignore[attr-defined]
    return wrapper


def _is_a_transaction(function: Callable[..., Any]) -> bool:
    return getattr(function, "_is_a_transaction", False)


def _outermost_hosts(module: nn.Module) -> list[AdapterModuleMixin]:
    if isinstance(module, AdapterModuleMixin) and not isinstance(module, AdapterModelPTMixin):
        return [module]
    found = (_outermost_hosts(child) for child in module.children())
    return [host for hosts in found for host in hosts]


def _renamed(config: DictConfig, new_name: Callable[[str], str | None]) -> dict[str, Any]:
    """The nodes, which keep their flags and interpolations, by their new names."""
    renamed = ((new_name(str(key)), config._get_node(key)) for key in config)
    return {key: node for key, node in renamed if key is not None}


def _moved(parameter: str, new_name: Callable[[str], str | None]) -> str | None:
    """The name of a parameter after adapters were renamed; None if its adapter was removed."""
    parts = parameter.split(".")
    for i in range(1, len(parts)):
        if parts[i - 1] == "adapter_layer":
            name = new_name(parts[i])
            if name is None:
                return None
            parts[i] = name
    return ".".join(parts)


def refill(config: DictConfig, content: Mapping[str, Any]) -> None:
    """Replaces the content of a configuration that others refer to."""
    with extensible(config):
        for key in list(config):
            config.pop(key)
        for key, value in content.items():
            config[key] = value


def chosen(content: files.AdapterFile, name: str | None, where: str) -> list[files.SavedAdapter]:
    """The adapters of a file that a name, with or without a place, stands for; None means all.

    Raises:
        MissingAdapterError: a KeyError, if the file, called where, has none of that name.
    """
    adapters = content.adapters
    if name is None:
        return list(adapters.values())
    for saved in adapters.values():
        if name in (saved.name, saved.qualified):
            return [saved]
    available = [saved.qualified for saved in adapters.values()]
    raise MissingAdapterError(f"{where} holds no adapter named {name!r}; it holds {available}")


def load_states(model: nn.Module, saved: files.SavedAdapter, strict: bool) -> None:
    """Loads the weights of an adapter of a file into the hosts that were given it.

    Args:
        model: the model.
        saved: the adapter.
        strict: whether it must have the very parameters.

    Raises:
        ValueError: if the hosts, parameters or shapes are others.
    """
    hosts = {p: h for p, h in named_hosts(model) if saved.name in h._adapters()}
    paths = saved.paths
    if paths is None:  # NeMo's files know the order alone
        if len(saved.states) != len(hosts):
            raise ValueError(
                f"the file has its weights for {len(saved.states)} modules, the model put it "
                f"into {len(hosts)}: {list(hosts)}"
            )
        paths = list(hosts)
    if set(paths) != hosts.keys():
        raise ValueError(
            f"the file has its weights for the modules {paths}, the model put it into {list(hosts)}"
        )
    for path, state in zip(paths, saved.states, strict=True):
        adapter = hosts[path]._adapters()[saved.name]
        _check_shapes(adapter.state_dict(), state, path)
        # Modules may have other keys for the state of an older version.
        missing, unexpected = adapter.load_state_dict(state, strict=False)
        if strict and (missing or unexpected):
            raise ValueError(
                f"module {path!r}: missing are {sorted(missing)}, unexpected are "
                f"{sorted(unexpected)}"
            )
        for key, value in adapter.state_dict().items():
            if isinstance(value, Tensor) and not (value.is_meta or value.isfinite().all()):
                raise ValueError(
                    f"module {path!r}: {key} has values that are too large for {value.dtype}"
                )


def _check_shapes(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str) -> None:
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            raise ValueError(
                f"module {path!r}: {key} must have shape {list(own[key].shape)}, "
                f"got {list(state[key].shape)}"
            )
        if own[key].is_floating_point() != state[key].is_floating_point():
            raise ValueError(
                f"module {path!r}: {key} must be of type {own[key].dtype}, got {state[key].dtype}"
            )
