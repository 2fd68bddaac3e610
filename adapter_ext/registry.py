"""Names of classes: which a configuration may instantiate, and which modules have adapter versions.

A configuration names a class by a dotted path in ``_target_``. Classes that are registered here are
found by name, without importing anything; NeMo's own paths are aliases of ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from torch import nn

from adapter_ext.strategies import (
    AbstractAdapterStrategy,
    ResidualAddAdapterStrategy,
    ReturnResultAdapterStrategy,
)

_Class = TypeVar("_Class", bound=type)

_targets: dict[str, type] = {}
_adapters: dict[str, AdapterRegistryInfo] = {}


def class_path(cls: type) -> str:
    """The dotted path of a class, with the classes that it is nested in."""
    return f"{cls.__module__}.{cls.__qualname__}"


# --- Classes that configurations may name ---------------------------------------------------------


def register_target(cls: _Class, *aliases: str) -> _Class:
    """Lets configurations, those from files included, name a class; also a class decorator.

    Args:
        cls: an ``nn.Module`` or :class:`adapter_ext.AbstractAdapterStrategy` subclass.
        *aliases: dotted paths that mean it besides its own.

    Returns:
        cls.

    Raises:
        ValueError: if cls is of another kind, or a path already means another class.
    """
    _check_kind(cls, repr(cls))
    paths = (class_path(cls), *aliases)
    for path in paths:
        if _targets.get(path, cls) is not cls:
            raise ValueError(f"{path!r} is already registered, for {_targets[path]!r}")
    _targets.update(dict.fromkeys(paths, cls))
    return cls


def resolve_target(path: str, *, allow_import: bool) -> type:
    """Finds the class that a configuration's ``_target_`` names.

    Args:
        path: dotted path: a registered one, or where allow_import says so that of any ``nn.Module``
            or :class:`adapter_ext.AbstractAdapterStrategy` subclass.
        allow_import: True only for a configuration from the user's own code: importing a module
            runs it. False for one that was read from a file.

    Raises:
        ValueError: if path is not of this form, names nothing, or names anything else.
    """
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"_target_ must be the dotted path of a class, got {path!r}")
    if path in _targets:
        return _targets[path]
    if not allow_import:
        raise ValueError(
            f"_target_ {path!r} is not registered; registered are {', '.join(sorted(_targets))}; "
            f"adapter_ext.register_target adds a class of yours"
        )
    found = _import(path)
    _check_kind(found, path)
    return cast(type, found)


def instantiate(cfg: Any, *, allow_import: bool = True, **kwargs: Any) -> Any:
    """Makes the object that a configuration describes.

    Args:
        cfg: a dict, DictConfig or dataclass with ``_target_``, and the class's arguments. Arguments
            that are such configurations themselves (``adapter_strategy``) are instantiated too.
        allow_import: as in :func:`resolve_target`.
        **kwargs: arguments that go before those of cfg, passed as they are.

    Raises:
        TypeError: if cfg is of another type, or the class refuses the arguments.
        ValueError: if ``_target_`` is missing or not acceptable.
    """
    arguments = to_plain_config(cfg)
    if "_target_" not in arguments:
        raise ValueError(f"the configuration has no _target_; it has {sorted(arguments)}")
    cls = resolve_target(arguments.pop("_target_"), allow_import=allow_import)
    for key, value in arguments.items():
        if isinstance(value, dict) and "_target_" in value and key not in kwargs:
            arguments[key] = instantiate(value, allow_import=allow_import)
    return cls(**{**arguments, **kwargs})


def to_plain_config(cfg: Any) -> dict[str, Any]:
    """A configuration as a new dict of plain Python values, interpolations resolved.

    Raises:
        TypeError: if cfg is no dict, DictConfig or dataclass.
        omegaconf.errors.MissingMandatoryValue: if a value was left out (``???``).
    """
    if is_dataclass(cfg):
        cfg = OmegaConf.structured(cfg)
    elif isinstance(cfg, Mapping) and not isinstance(cfg, DictConfig):
        cfg = OmegaConf.create(dict(cfg))
    if not isinstance(cfg, DictConfig):
        raise TypeError(
            f"a configuration must be a dict, DictConfig or dataclass, got {type(cfg).__name__}"
        )
    plain = cast("dict[Any, Any]", OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    return {str(key): value for key, value in plain.items()}


def _check_kind(found: object, name: str) -> None:
    if not isinstance(found, type) or not issubclass(found, (nn.Module, AbstractAdapterStrategy)):
        raise ValueError(
            f"{name} must be a class derived from torch.nn.Module or AbstractAdapterStrategy, "
            f"got {found!r}"
        )


def _import(path: str) -> object:
    parts = path.split(".")
    # The longest prefix that is a module; what follows are attributes (classes may be nested).
    for size in range(len(parts) - 1, 0, -1):
        module_path = ".".join(parts[:size])
        try:
            found: object = importlib.import_module(module_path)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_path}.".startswith(f"{error.name}."):
                raise  # the module is there; one that it needs is not
            continue
        for part in parts[size:]:
            if not hasattr(found, part):
                raise ValueError(f"_target_ {path!r}: {found!r} has no {part!r}")
            found = getattr(found, part)
        return found
    raise ValueError(
        f"_target_ {path!r}: no module {parts[0]!r}, and no class of that name is known"
    )


_NEMO_STRATEGIES = "nemo.core.classes.mixins.adapter_mixin_strategies"
for _strategy in (ReturnResultAdapterStrategy, ResidualAddAdapterStrategy):
    register_target(
        _strategy,
        f"adapter_ext.{_strategy.__name__}",
        f"{_NEMO_STRATEGIES}.{_strategy.__name__}",
    )


# --- Modules that have a version with adapters ----------------------------------------------------


@dataclass
class AdapterRegistryInfo:
    """A module class and the version of it that supports adapters."""

    base_class: type
    adapter_class: type
    base_class_path: str = field(init=False)
    adapter_class_path: str = field(init=False)

    def __post_init__(self) -> None:
        self.base_class_path = class_path(self.base_class)
        self.adapter_class_path = class_path(self.adapter_class)


def register_adapter(base_class: type, adapter_class: type) -> None:
    """Registers the version of a module class that supports adapters.

    Args:
        base_class: the module class.
        adapter_class: a subclass of it that is an :class:`adapter_ext.AdapterModuleMixin` too.

    Raises:
        ValueError: if base_class has one already, or adapter_class is no subclass of it.
    """
    info = AdapterRegistryInfo(base_class, adapter_class)
    if info.base_class_path in _adapters:
        known = _adapters[info.base_class_path].adapter_class_path
        raise ValueError(f"{info.base_class_path} is already registered, with {known}")
    if not issubclass(adapter_class, base_class):
        raise ValueError(
            f"the adapter class must be a subclass of its base class: "
            f"{info.adapter_class_path} is none of {info.base_class_path}"
        )
    _adapters[info.base_class_path] = info
    base_class._meta_adapter_class = adapter_class  # type: ignore[attr-defined]
    adapter_class._meta_base_class = base_class  # type: ignore[attr-defined]


def get_registered_adapter(cls: str | type) -> AdapterRegistryInfo | None:
    """Finds what :func:`register_adapter` registered; imports nothing.

    Args:
        cls: the base class or the adapter class, or the dotted path of either.

    Returns:
        None if it is not registered.
    """
    for info in _adapters.values():
        if isinstance(cls, str):
            if cls in (info.base_class_path, info.adapter_class_path):
                return info
        elif cls is info.base_class or cls is info.adapter_class:
            return info
    return None
