"""Whether modules are still as they were when they were last looked at.

An adapter's layers can be swapped, parametrised or hooked at any time. A :class:`Snapshot` holds
what was found in them, and :func:`read_parameters` finds out whether that is still all there is to
them, for a fraction of a microsecond an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

import adapter_ext._library  # noqa: F401  (says what is wrong where _C does not load)
from adapter_ext import _C

_Dict: TypeAlias = Mapping[str, Any]


class Snapshot(NamedTuple):
    """What was found in a module and in what belongs to it.

    It does not refer to the module itself, which may keep it. Dictionaries are those that PyTorch
    fills in place.

    Attributes:
        kind: the module's type.
        own_keys: keys of its ``__dict__``, and for each
        own_values: the object that it had, None for none.
        empty: dictionaries in which there was nothing.
        objects: objects, and for each
        types: its type.
        dicts: dictionaries, and for each
        keys: a key, and
        values: the object that it had, None for none.
        children: the children of containers, by name, and for each
        layers: the layers that these were, in their order.
        parameters: dictionaries of parameters, which may be replaced at any time, and for each
        names: the name of one.
    """

    kind: type
    own_keys: tuple[str, ...]
    own_values: tuple[object, ...]
    empty: tuple[Mapping[Any, Any], ...]
    objects: tuple[object, ...]
    types: tuple[type, ...]
    dicts: tuple[_Dict, ...]
    keys: tuple[str, ...]
    values: tuple[object, ...]
    children: tuple[_Dict, ...]
    layers: tuple[tuple[nn.Module | None, ...], ...]
    parameters: tuple[_Dict, ...]
    names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        module: nn.Module,
        *,
        own: Sequence[str] = (),
        empty: Sequence[Mapping[Any, Any]] = (),
        objects: Sequence[object] = (),
        entries: Sequence[tuple[_Dict, str]] = (),
        containers: Sequence[nn.Module] = (),
        parameters: Sequence[tuple[_Dict, str]] = (),
        within: Snapshot | None = None,
    ) -> Snapshot:
        """Looks at a module.

        Args:
            module: the module.
            own: keys of its ``__dict__`` whose values matter.
            empty: see above; not looked at.
            objects: objects whose types matter.
            entries: dictionaries and keys of them whose values matter.
            containers: modules whose children matter.
            parameters: dictionaries and names of parameters.
            within: what was found in a part of the module.
        """
        found = cls(
            kind=type(module),
            own_keys=tuple(own),
            own_values=tuple(module.__dict__.get(key) for key in own),
            empty=tuple(empty),
            objects=tuple(objects),
            types=tuple(map(type, objects)),
            dicts=tuple(d for d, _ in entries),
            keys=tuple(key for _, key in entries),
            values=tuple(d.get(key) for d, key in entries),
            children=tuple(module._modules for module in containers),
            layers=tuple(tuple(module._modules.values()) for module in containers),
            parameters=tuple(d for d, _ in parameters),
            names=tuple(name for _, name in parameters),
        )
        if within is None:
            return found
        both: Any = zip(found[3:], within[3:], strict=True)
        return cls._make([*found[:3], *(a + b for a, b in both)])

    def holds(self, module: nn.Module) -> bool:
        """Whether everything is as it was."""
        own = module.__dict__
        return (
            type(module) is self.kind
            and all(
                own.get(key) is value
                for key, value in zip(self.own_keys, self.own_values, strict=True)
            )
            and not any(self.empty)
            and [*map(type, self.objects)] == [*self.types]
            and all(
                d.get(key) is value
                for d, key, value in zip(self.dicts, self.keys, self.values, strict=True)
            )
            and all(
                tuple(children.values()) == layers
                for children, layers in zip(self.children, self.layers, strict=True)
            )
        )


def read_parameters(modules: list[nn.Module], snapshots: list[Snapshot]) -> list[Tensor] | None:
    """The parameters that snapshots name, as they are now.

    Args:
        modules: any number of modules.
        snapshots: what was found in each.

    Returns:
        The parameters, module by module; None if one of them is not there, or if something is no
        longer as it was found.
    """
    if not torch.compiler.is_compiling():
        return _C.read_parameters(modules, snapshots)
    result = []
    for module, snapshot in zip(modules, snapshots, strict=True):
        if not snapshot.holds(module):
            return None
        for parameters, name in zip(snapshot.parameters, snapshot.names, strict=True):
            parameter = parameters.get(name)
            if parameter is None:
                return None
            result.append(parameter)
    return result
