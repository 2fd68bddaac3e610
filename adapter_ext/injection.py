"""Adapters in models that know nothing of them: chosen submodules get another class, and back."""

from __future__ import annotations

import copy
import copyreg
import dataclasses
import difflib
import functools
import inspect
import re
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from adapter_ext.any_model import add_adapter, transaction
from adapter_ext.mixin import AdapterModuleMixin, hosts_of, named_hosts, routes_in_force
from adapter_ext.registry import resolve_target, to_plain_config

Target = str | type | Callable[[str, nn.Module], bool]


class _Injection(NamedTuple):
    """What an injected module knows of itself.

    Attributes:
        path: in the model that was given to :func:`inject`.
        width: of the hidden state, None if it can't be told from the module.
        batch_dim: which dimension of the hidden state counts the samples.
    """

    path: str
    width: int | None
    batch_dim: int


# --- The modules ----------------------------------------------------------------------------------


class InjectedModule(AdapterModuleMixin):
    """What :func:`inject` adds to the class of a module.

    The hidden state that the module returns goes through its enabled adapters. All methods of
    :class:`adapter_ext.AdapterModuleMixin` are there.
    """

    _injection: _Injection
    _base_class: type[nn.Module]

    def add_adapter(self, name: str, cfg: Any, **kwargs: Any) -> None:
        """Adds an adapter, see :meth:`adapter_ext.AdapterModuleMixin.add_adapter`.

        An adapter whose class takes ``in_features`` need not be given it where the width can be
        told from this module; it is not written into ``adapter_cfg`` then.

        Raises:
            TypeError: as there.
            ValueError: as there; or if in_features is needed and not known.
        """
        plain = to_plain_config(cfg)
        if "in_features" not in plain and "in_features" not in kwargs and "_target_" in plain:
            parameters = inspect.signature(resolve_target(plain["_target_"])).parameters
            wanted = parameters.get("in_features")
            if wanted is not None and self._injection.width is not None:
                kwargs["in_features"] = self._injection.width
            elif wanted is not None and wanted.default is wanted.empty:
                raise ValueError(
                    f"the width of what {self._described()} returns is not known: the "
                    f"configuration of adapter {name!r} must have in_features"
                )
        super().add_adapter(name, plain, **kwargs)

    def _described(self) -> str:
        return f"module {self._injection.path!r} ({self._base_class.__name__})"

    def _through_adapters(self, result: Any) -> Any:
        """The result of the module's own forward, its hidden state replaced."""
        if "adapter_layer" not in self._modules:
            return result
        if not self._enabled_adapters and routes_in_force(self) is None:
            return result
        if torch.compiler.is_compiling():
            return _with_hidden_state(self, result, self._adapt)
        try:
            return _with_hidden_state(self, result, self._adapt)
        except (RuntimeError, TypeError, ValueError) as error:
            if type(error) in (RuntimeError, TypeError, ValueError):
                raise type(error)(f"{self._described()}: {error}{self._hint(result)}") from error
            raise

    def _adapt(self, x: Tensor) -> Tensor:
        if x.is_nested:
            return self._adapt_nested(x)
        if self._injection.batch_dim == 0:
            return cast(Tensor, self.forward_enabled_adapters(x))
        if x.ndim < 3:
            if routes_in_force(self) is not None:
                raise ValueError(
                    f"with the batch in dimension 1, a routed hidden state must be "
                    f"[T, B, ..., D], got {list(x.shape)}"
                )
            return cast(Tensor, self.forward_enabled_adapters(x))
        # Adapters, routes and auxiliary losses take the samples first.
        return cast(Tensor, self.forward_enabled_adapters(x.transpose(0, 1))).transpose(0, 1)

    def _adapt_nested(self, x: Tensor) -> Tensor:
        # nn.TransformerEncoder packs a padded batch so, in evaluation mode without gradients.
        if x.layout is not torch.strided or x.ndim != 3:
            raise TypeError(f"a nested hidden state must be strided [B, *, D], got {x.layout}")
        samples = x.unbind()
        y = self.forward_enabled_adapters(x.to_padded_tensor(0.0))
        if y.requires_grad:
            raise TypeError(
                "a nested hidden state can't be adapted where gradients are wanted; make the "
                "nn.TransformerEncoder with enable_nested_tensor=False"
            )
        return torch.nested.as_nested_tensor(
            [padded[: len(sample)] for padded, sample in zip(y, samples, strict=True)]
        )

    def _hint(self, result: Any) -> str:
        """What may be wrong where a batch is a multiple of what was routed."""
        routes = routes_in_force(self)
        first = _first(result)
        if routes is None or first is None or first[1].is_nested:
            return ""
        if first[1].ndim <= self._injection.batch_dim:
            return ""
        size, routed = first[1].shape[self._injection.batch_dim], routes.ids.shape[0]
        if not 0 < routed < size or size % routed:
            return ""
        return (
            f" (generate() with num_beams or num_return_sequences repeats every sample: name each "
            f"{size // routed} times in a row)"
        )

    def _reduced(self, reduced: Any) -> Any:
        """What pickle and copy need, from what they need for the class's own objects."""
        make, arguments, *rest = reduced
        if make is not copyreg.__newobj__ or arguments[0] is not type(self):  # type: ignore[attr-defined]
            raise TypeError(
                f"{self._described()} can't be pickled or copied with adapters, as its class says "
                f"itself how; eject the model first"
            )
        if rest and isinstance(rest[0], dict):
            # Nobody has counted a copy's samples.
            rest[0] = {k: v for k, v in rest[0].items() if k != "_sample_counter"}
        return _new, (self._base_class, *arguments[1:]), *rest


def _new(base: type[nn.Module], *arguments: Any) -> Any:
    cls = _class_with_adapters(base)
    return cls.__new__(cls, *arguments)


# By the base class; a class is forgotten when no module has it.
_classes: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()


def _class_with_adapters(base: type[nn.Module]) -> type:
    known = _classes.get(base)
    if known is not None:
        return known

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._through_adapters(super(cls, self).forward(*args, **kwargs))

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        return self._reduced(super(cls, self).__reduce_ex__(protocol))

    members = {
        "__module__": base.__module__,
        "__qualname__": f"{base.__qualname__}WithAdapters",
        "__doc__": base.__doc__,
        # In the body, where an __init_subclass__ finds it: transformers wraps it there, for
        # gradient checkpointing.
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "_base_class": base,
    }
    # base comes first, as the memory layout must stay its own: _checked_class sees to it that it
    # has none of the mixin's names.
    cls: Any = types.new_class(
        f"{base.__name__}WithAdapters",
        (base, InjectedModule),
        exec_body=lambda ns: ns.update(members),
    )
    return _classes.setdefault(base, cls)


# --- What modules return --------------------------------------------------------------------------


def _first(result: Any) -> tuple[Any, Tensor] | None:
    """The key and the value of the first item of what a module returns, None if it is no tensor.

    The key is None for a tensor and a tuple, a field's name for a dataclass.
    """
    key: Any = None
    value: Any = result
    if isinstance(result, tuple):
        value = result[0] if result else None
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        # Those of transformers leave out what is None.
        names = (field.name for field in dataclasses.fields(result))
        key = next((name for name in names if getattr(result, name) is not None), None)
        value = None if key is None else getattr(result, key)
    elif isinstance(result, Mapping):
        key = next(iter(result), None)
        value = None if key is None else result[key]
    return (key, value) if isinstance(value, Tensor) else None


def _with_hidden_state(
    module: InjectedModule, result: Any, change: Callable[[Tensor], Tensor]
) -> Any:
    """A copy of what a module returned, with its first item changed."""
    first = _first(result)
    if first is not None:
        key, hidden = first
        if isinstance(result, Tensor):
            return change(hidden)
        if type(result) is tuple:
            return (change(hidden), *result[1:])
        if isinstance(result, tuple) and hasattr(result, "_make"):
            return result._make((change(hidden), *result[1:]))
        if dataclasses.is_dataclass(result):
            return dataclasses.replace(cast(Any, result), **{key: change(hidden)})
        if isinstance(result, MutableMapping):
            changed = copy.copy(result)
            changed[key] = change(hidden)
            return changed
    raise TypeError(
        f"adapters need a module that returns a tensor, or a tuple, dataclass or dict whose first "
        f"item is one; got {_type_of(result)}"
    )


def _type_of(result: Any) -> str:
    name = type(result).__name__
    if isinstance(result, tuple) and result:
        return f"a {name} whose first item is of type {type(result[0]).__name__}"
    return name


# --- Injecting and ejecting -----------------------------------------------------------------------


def inject(
    model: nn.Module,
    cfg: Any = None,
    *,
    targets: Target | Iterable[Target],
    batch_dim: int | None = None,
) -> list[str]:
    """Lets chosen submodules of any model have adapters.

    ::

        inject(model, targets="encoder.layers.*")
        add_adapter(model, "fr", {"dim": 8})
        with route_adapters(model, ["fr", None, "fr"]):
            y = model(x)

    The class of a chosen module becomes a subclass, made at run time, of its own class and of
    :class:`adapter_ext.AdapterModuleMixin`; the hidden state that it returns goes through its
    adapters. That is the tensor it returns, or the first item of the tuple, dataclass
    (``ModelOutput`` of transformers) or dict: ``[B, ..., D]``, or ``[T, B, ..., D]`` where
    batch_dim is 1, of float64, float32, bfloat16 or float16. Parameters and the names in the state
    dict stay what they are. Without adapters the model computes what it did.

    Args:
        model: any module; changed in place.
        cfg: configurations of adapters by name, to be added with :func:`add_adapter`.
        targets: which modules: a path (``"encoder.layers.0"``, ``""`` for the model itself), a
            pattern of one (``*`` and ``?`` match within a part of it, ``**`` across parts), a
            class, a predicate ``(path, module) -> bool``, or several of these. A module that is
            reached by several paths counts once; what adapters consist of is never chosen; a module
            that can have adapters already stays as it is.
        batch_dim: the dimension, 0 or 1, of the hidden states that counts the samples. None means
            1 for torch's attention, transformer and recurrent layers with ``batch_first=False``,
            and all within them, 0 for all others.

    Returns:
        The paths of the modules whose class was changed.

    Raises:
        TypeError: if an argument is of another type, or a class can't be derived from.
        ValueError: if a target matches nothing, or a chosen module is never called, uses names of
            AdapterModuleMixin's, or has a ``forward`` of its own besides its class's; or if an
            adapter can't be added. The model is as it was then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if batch_dim not in (None, 0, 1):
        raise ValueError(f"batch_dim must be None, 0 or 1, got {batch_dim!r}")
    if cfg is not None and not isinstance(cfg, Mapping):
        raise TypeError(f"cfg must be configurations of adapters by name, got {type(cfg).__name__}")
    chosen = {
        found.module: (found, _checked_class(found))
        for found in _matches(model, targets)
        if not isinstance(found.module, AdapterModuleMixin)
    }
    changed: list[Any] = []
    try:
        for module, (found, cls) in chosen.items():
            try:
                module.__class__ = cls
            except TypeError as error:
                raise TypeError(f"{found} can't be given adapters: {error}") from error
            changed.append(module)
            dim = found.batch_dim() if batch_dim is None else batch_dim
            cast(Any, module)._injection = _Injection(found.path, found.width(), dim)
            if found.is_bypassed():
                module.register_forward_hook(_off_the_fast_path)
        with transaction(dict(named_hosts(model))):
            for name, adapter in (cfg or {}).items():
                add_adapter(model, name, adapter)
    except BaseException:
        for module in changed:
            _restore(module)
        raise
    for module in changed:
        module.__dict__.pop("forward", None)  # bound to the class that it had
    return [found.path for found, _ in chosen.values()]


def eject(model: nn.Module) -> None:
    """Undoes :func:`inject`: removes the adapters and gives the modules their own classes back.

    Args:
        model: the model or a part of it; modules whose own class can have adapters keep theirs.

    Raises:
        TypeError: if model is no ``nn.Module``.
        ValueError: if there is nothing to eject, or a module is routed at the moment, has got yet
            another class, or a ``forward`` that calls the present one, or has adapters of a model
            that has their configuration. The model is as it was then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = [host for host in hosts_of(model) if isinstance(host, InjectedModule)]
    if not modules:
        raise ValueError("no module was given adapters by inject")
    for module in modules:
        where = module._described()
        if module._adapter_routes:
            raise ValueError(f"{where} is routed: leave route_adapters first")
        if type(module) is not _classes.get(module._base_class):
            raise ValueError(f"the class of {where} was changed once more, to {type(module)}")
        if _has_own_forward(module._host()):
            raise ValueError(f"{where} was given a forward of its own: take it off first")
        if module._shares_adapter_cfg and module._adapters():
            raise ValueError(
                f"{where} has adapters {list(module._adapters())} of a whole model: remove them "
                f"from the model first"
            )
    for module in modules:
        _restore(module)
        module.__dict__.pop("forward", None)  # bound to the class that it had


# The names that a module gets: its own class must not have them, and they leave with them.
_NAMES = frozenset(
    name
    for cls in (AdapterModuleMixin, InjectedModule)
    for name in (*vars(cls), *cls.__annotations__)
    if not name.startswith("__") and name not in ("_abc_impl", "_modules", "training")
)


def _restore(module: Any) -> None:
    module._modules.pop("adapter_layer", None)
    for key in [k for k, hook in module._forward_hooks.items() if hook is _off_the_fast_path]:
        del module._forward_hooks[key]
    for name in _NAMES:
        module.__dict__.pop(name, None)
    module.__class__ = module._base_class


def _has_own_forward(module: nn.Module) -> bool:
    own = module.__dict__.get("forward")
    # Programs that replace it for a while put back the bound method, which is none of its own.
    return own is not None and not (
        isinstance(own, types.MethodType)
        and own.__self__ is module
        and own.__func__ is type(module).forward
    )


def _off_the_fast_path(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that does nothing: fused paths of torch's layers skip modules that have none."""


def _checked_class(found: _Found) -> type:
    """The class that a chosen module is to get."""
    module = found.module
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        raise TypeError(f"{found} can't be given adapters: its code is generated")
    if type(module).forward is nn.Module.forward:
        raise ValueError(f"{found} can't be given adapters: it has no forward")
    if found.parents and isinstance(found.parents[-1], nn.MultiheadAttention):
        raise ValueError(
            f"{found} can't be given adapters: nn.MultiheadAttention never calls it; choose the "
            f"attention itself"
        )
    taken = sorted(name for name in _NAMES if hasattr(module, name))
    if taken:
        raise ValueError(
            f"{found} can't be given adapters: it has {taken[0]!r} itself, which means something "
            f"else here; choose its submodules"
        )
    if _has_own_forward(module):
        raise ValueError(
            f"{found} can't be given adapters: its forward was replaced in the object (by hooks of "
            f"accelerate, for example), which would skip them; do that after inject"
        )
    try:
        return _class_with_adapters(type(module))
    except TypeError as error:
        raise TypeError(f"{found} can't be given adapters: {error}") from error


# --- Choosing modules -----------------------------------------------------------------------------


class _Found(NamedTuple):
    """A module of a model, with the modules that it is in, the outermost first."""

    path: str
    module: nn.Module
    parents: tuple[nn.Module, ...]

    def __str__(self) -> str:
        return f"module {self.path!r} ({type(self.module).__name__})"

    def width(self) -> int | None:
        """The width of the hidden state that the module returns, None if that is not known."""
        width = _width_of(self.module)
        if width is not None or not self.module._modules:
            return width
        # A block in a model that has a configuration.
        for module in reversed((*self.parents, self.module)):
            width = getattr(getattr(module, "config", None), "hidden_size", None)
            if isinstance(width, int):
                return width
        return None

    def batch_dim(self) -> int:
        """The dimension of the samples."""
        for module in reversed((*self.parents, self.module)):
            batch_first = _batch_first_of(module)
            if batch_first is not None:
                return 0 if batch_first else 1
        return 0

    def is_bypassed(self) -> bool:
        """Whether a fused kernel may compute the module with those around it."""
        return any(isinstance(parent, nn.TransformerEncoderLayer) for parent in self.parents)


def _width_of(module: Any) -> int | None:
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return int(module.normalized_shape[-1])
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return _width_of(module.self_attn)
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        return _width_of(module.layers[0]) if len(module.layers) else None
    if isinstance(module, nn.RNNBase):
        return (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    for name in ("out_features", "embed_dim", "embedding_dim", "d_model", "hidden_size"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            return width
    return None


def _batch_first_of(module: Any) -> bool | None:
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.Transformer)):
        return bool(module.batch_first)
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return _batch_first_of(module.self_attn)
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)) and len(module.layers):
        return _batch_first_of(module.layers[0])
    return None


def _submodules(
    module: nn.Module, path: str = "", parents: tuple[nn.Module, ...] = ()
) -> Iterator[_Found]:
    """All modules, by every path that they have; not those within adapters."""
    yield _Found(path, module, parents)
    for name, child in module._modules.items():
        within_adapters = name == "adapter_layer" and isinstance(module, AdapterModuleMixin)
        if child is not None and not within_adapters:
            yield from _submodules(child, f"{path}.{name}" if path else name, (*parents, module))


def _matches(model: nn.Module, targets: Target | Iterable[Target]) -> list[_Found]:
    """The modules that targets name, each once, in the model's order."""
    if isinstance(targets, (str, type)) or callable(targets):
        targets = [targets]
    elif not isinstance(targets, Iterable):
        raise _target_error(targets)
    wanted = {_matcher(target): target for target in targets}
    if not wanted:
        raise ValueError("targets is empty")
    unused = dict(wanted)
    chosen: dict[nn.Module, _Found] = {}
    everything = list(_submodules(model))
    for found in everything:
        for matches, _ in wanted.items():
            if matches(found.path, found.module):
                unused.pop(matches, None)
                chosen.setdefault(found.module, found)
    for target in unused.values():
        raise ValueError(f"targets: {_nothing(target, everything)}")
    return list(chosen.values())


def _matcher(target: Target) -> Callable[[str, nn.Module], bool]:
    if isinstance(target, str):
        if not any(character in target for character in "*?"):
            return lambda path, module: path == target
        parts = {"**.": r"(?:.*\.)?", "**": ".*", "*": "[^.]*", "?": "[^.]"}
        pattern = re.compile(
            "".join(parts.get(p) or re.escape(p) for p in re.split(r"(\*\*\.|\*\*|\*|\?)", target))
        )
        return lambda path, module: path != "" and pattern.fullmatch(path) is not None
    if isinstance(target, type):
        kind = target
        return lambda path, module: isinstance(module, kind)
    if not callable(target) or isinstance(target, nn.Module):
        raise _target_error(target)
    predicate = target
    return lambda path, module: bool(predicate(path, module))


def _target_error(target: object) -> TypeError:
    return TypeError(
        f"a target must be a module's path, a pattern of one, a class, or a predicate "
        f"(path, module) -> bool; got {type(target).__name__}"
    )


def _nothing(target: Target, everything: list[_Found]) -> str:
    """Says that a target matches nothing, and what might have been meant."""
    if isinstance(target, str):
        known = list(dict.fromkeys(found.path for found in everything if found.path))
        word = target.replace("*", "0")
        what = f"no module is named {target!r}"
    elif isinstance(target, type):
        known = list(dict.fromkeys(type(found.module).__name__ for found in everything))
        word = target.__name__
        what = f"no module is a {word}"
    else:
        return f"the predicate {target!r} holds for none of the {len(everything)} modules"
    if not known:
        return f"{what}; there are none within {type(everything[0].module).__name__}"
    near = difflib.get_close_matches(word, known, n=5, cutoff=0.5)
    if not near:
        # Perhaps but a part of the path.
        ends = {name.rpartition(".")[2] for name in known}
        alike = difflib.get_close_matches(word.rpartition(".")[2], ends, n=5, cutoff=0.5)
        near = [name for name in known if name.rpartition(".")[2] in alike][:5] or known[:5]
    return f"{what}; there are {', '.join(map(repr, near))}" + (
        f" and {len(known) - len(near)} more" if len(known) > len(near) else ""
    )
