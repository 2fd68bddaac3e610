"""Names of classes: which a configuration may instantiate, and which modules have adapter versions.

A configuration names a class by a dotted path in ``_target_``. Classes that are registered here are
found by name, without importing anything; NeMo's own paths are aliases of ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
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


def nemo_path(path: str) -> str:
    """NeMo's own path of a class, for files that NeMo is to read; path itself if it has none."""
    cls = _targets.get(path)
    paths = (alias for alias, of in _targets.items() if of is cls and alias.startswith("nemo."))
    return path if cls is None else next(paths, path)


# The further classes that a file's configurations may name; None outside of targets_of_a_file.
_classes_for_file: ContextVar[Mapping[str, type] | None] = ContextVar(
    "_classes_for_file", default=None
)


@contextmanager
def targets_of_a_file(classes: Iterable[type] = ()) -> Iterator[None]:
    """Within this context, configurations come from a file: what they name is not imported.

    Args:
        classes: what they may name besides the registered classes.

    Raises:
        ValueError: if one is no ``nn.Module`` or :class:`adapter_ext.AbstractAdapterStrategy`.
    """
    named = {class_path(cls): _check_kind(cls, repr(cls)) for cls in classes}
    token = _classes_for_file.set(named)
    try:
        yield
    finally:
        _classes_for_file.reset(token)


def resolve_target(path: str) -> type:
    """Finds the class that a configuration's ``_target_`` names.

    Args:
        path: dotted path of a registered class; outside of :func:`targets_of_a_file`, where
            configurations are of the user's own code, that of any ``nn.Module`` or
            :class:`adapter_ext.AbstractAdapterStrategy` subclass (importing a module runs it).

    Raises:
        ValueError: if path is not of this form, names nothing, or names anything else.
    """
    if not isinstance(path, str):
        raise ValueError(f"_target_ must be a dotted path, got {path!r}")
    classes = _classes_for_file.get()
    known = {**_targets, **(classes or {})}
    if path in known:
        return known[path]
    if classes is not None:
        raise ValueError(
            f"_target_ {path!r} of a file is not registered; registered are "
            f"{', '.join(sorted(known))}; adapter_ext.register_target adds a class of yours"
        )
    return import_class(path)


def import_class(path: str) -> type:
    """The class of a dotted path that the user's own code gave.

    Raises:
        ValueError: if it names no ``nn.Module`` or :class:`adapter_ext.AbstractAdapterStrategy`.
    """
    if path in _targets:
        return _targets[path]
    if not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"a class must be named by its dotted path, got {path!r}")
    return _check_kind(_import(path), path)


def instantiate(cfg: Any, **kwargs: Any) -> Any:
    """Makes the object that a configuration describes.

    Args:
        cfg: a dict, DictConfig or dataclass with ``_target_``, and the class's arguments. Arguments
            that are such configurations themselves (``adapter_strategy``) are instantiated too.
        **kwargs: arguments that go before those of cfg, passed as they are.

    Raises:
        TypeError: if cfg is of another type, or the class refuses the arguments.
        ValueError: if ``_target_`` is missing or not acceptable.
    """
    arguments = to_plain_config(cfg)
    if "_target_" not in arguments:
        raise ValueError(f"the configuration has no _target_; it has {sorted(arguments)}")
    cls = resolve_target(arguments.pop("_target_"))
    for key, value in arguments.items():
        if isinstance(value, dict) and "_target_" in value and key not in kwargs:
            arguments[key] = instantiate(value)
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


def _check_kind(found: object, name: str) -> type:
    if not isinstance(found, type) or not issubclass(found, (nn.Module, AbstractAdapterStrategy)):
        raise ValueError(
            f"{name} must be a class derived from torch.nn.Module or AbstractAdapterStrategy, "
            f"got {found!r}"
        )
    return found


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
        ValueError: if base_class has one already, or adapter_class is no subclass of it, or no
            :class:`adapter_ext.AdapterModuleMixin`.
    """
    # Only here: that module imports this one.
    from adapter_ext.mixin import AdapterModuleMixin

    info = AdapterRegistryInfo(base_class, adapter_class)
    if info.base_class_path in _adapters:
        known = _adapters[info.base_class_path].adapter_class_path
        raise ValueError(f"{info.base_class_path} is already registered, with {known}")
    if not issubclass(adapter_class, base_class):
        raise ValueError(
            f"the adapter class must be a subclass of its base class: "
            f"{info.adapter_class_path} is none of {info.base_class_path}"
        )
    if not issubclass(adapter_class, AdapterModuleMixin):
        raise ValueError(
            f"the adapter class must be a subclass of AdapterModuleMixin too: "
            f"{info.adapter_class_path} is none"
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
