"""Maps nemo.* module names to adapter_ext, so that code and tests written for NeMo run on it.

NeMo itself is not needed, and not used where it is installed. To run NeMo's own tests of adapters,
unchanged, from a checkout of NeMo (they need hydra-core, and write temporary files to the current
directory)::

    python tests/nemo_names.py CHECKOUT/tests/core/mixins/adapters/test_adapter_mixin.py ...

What is mapped is what those tests and most code with adapters import: adapter_ext's names, and
stand-ins for the few helpers of NeMo that have nothing to do with adapters.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import logging
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from torch import nn

import adapter_ext

MODULES_WITH_ADAPTER_NAMES = (
    "nemo.core",
    "nemo.core.classes",
    "nemo.core.classes.mixins",
    "nemo.core.classes.mixins.access_mixins",
    "nemo.core.classes.mixins.adapter_mixin_strategies",
    "nemo.core.classes.mixins.adapter_mixins",
    "nemo.core.adapter_mixins",
    "nemo.collections.common.parts.adapter_modules",
)


class LogMode(enum.Enum):
    """How often a message that is logged again and again appears."""

    EACH = "each"
    ONCE = "once"


class Logger:
    """nemo.utils.logging: a logger whose messages may be asked to appear only once."""

    DEBUG, INFO, WARNING, ERROR, CRITICAL = 10, 20, 30, 40, 50

    def __init__(self) -> None:
        self._logger = logging.getLogger("nemo_logger")
        self._logger.propagate = False
        self._seen: set[tuple[int, str]] = set()

    def set_verbosity(self, level: int) -> None:
        self._logger.setLevel(level)

    def get_verbosity(self) -> int:
        return self._logger.getEffectiveLevel()

    def debug(self, message: str, *args: object, mode: LogMode = LogMode.EACH) -> None:
        self._log(self.DEBUG, message, args, mode)

    def info(self, message: str, *args: object, mode: LogMode = LogMode.EACH) -> None:
        self._log(self.INFO, message, args, mode)

    def warning(self, message: str, *args: object, mode: LogMode = LogMode.EACH) -> None:
        self._log(self.WARNING, message, args, mode)

    def error(self, message: str, *args: object, mode: LogMode = LogMode.EACH) -> None:
        self._log(self.ERROR, message, args, mode)

    def _log(self, level: int, message: str, args: tuple[object, ...], mode: LogMode) -> None:
        if mode is LogMode.ONCE:
            if (level, message) in self._seen:
                return
            self._seen.add((level, message))
        self._logger.log(level, message, *args)


def assert_dataclass_signature_match(
    cls: type,
    datacls: type,
    ignore_args: Iterable[str] = (),
    remap_args: Mapping[str, str] | None = None,
) -> tuple[bool, set[str] | None, set[str] | None]:
    """Compares the arguments of a class with the fields of its configuration.

    Returns:
        Whether they are the same; the arguments that are no fields, and the fields that are no
        arguments, each None if there are none.
    """
    remap = remap_args or {}
    ignored = set(ignore_args)
    arguments = {remap.get(a, a) for a in inspect.signature(cls).parameters} - ignored
    fields = {remap.get(f.name, f.name) for f in dataclasses.fields(datacls)} - ignored
    return arguments == fields, arguments - fields or None, fields - arguments or None


def safe_instantiate(config: Any, *args: Any, **kwargs: Any) -> Any:
    """Makes the module that a configuration describes; imports nothing.

    Unlike adapter_ext.instantiate it serves a model's constructor, which may make any module of the
    program that runs, whether its configuration is the user's or a file's.
    """
    arguments = dict(config)
    module_name, _, class_name = arguments.pop("_target_").rpartition(".")
    cls = getattr(sys.modules.get(module_name), class_name, None)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ValueError(f"{module_name}.{class_name} is no torch.nn.Module of this program")
    return cls(*args, **{**arguments, **kwargs})


def nemo_modules() -> dict[str, ModuleType]:
    """New modules by name, parents included."""
    modules: dict[str, ModuleType] = {}

    def module(name: str) -> ModuleType:
        if name not in modules:
            modules[name] = made = ModuleType(name, "Stand-in, see nemo_names.")
            # Packages without files: importing anything else of NeMo fails by the usual error.
            made.__path__ = []
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(module(parent), child, made)
        return modules[name]

    names = {name: getattr(adapter_ext, name) for name in adapter_ext.__all__}
    for name in MODULES_WITH_ADAPTER_NAMES:
        vars(module(name)).update(names)
    # Private in NeMo too, and yet used by models.
    mixins = vars(module("nemo.core.classes.mixins.adapter_mixins"))
    mixins["_prepare_default_adapter_config"] = adapter_ext._prepare_default_adapter_config
    vars(module("nemo.core.classes.common"))["safe_instantiate"] = safe_instantiate
    utils = vars(module("nemo.utils"))
    utils["logging"] = Logger()
    utils["logging_mode"] = LogMode
    config_utils = vars(module("nemo.utils.config_utils"))
    config_utils["assert_dataclass_signature_match"] = assert_dataclass_signature_match
    return modules


def install() -> None:
    """Puts the modules where ``import`` finds them first."""
    sys.modules.update(nemo_modules())


if __name__ == "__main__":
    import pytest

    install()
    # NeMo's conftest.py imports the rest of NeMo, and downloads test data.
    sys.exit(pytest.main(["--noconftest", "-p", "no:cacheprovider", *sys.argv[1:]]))
