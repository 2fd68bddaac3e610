"""A registry of tensors that modules leave for others to collect: auxiliary losses, most of all.

A module keeps what it registered on itself, so two models, or two threads with a model each, never
see each other's tensors. What is shared by design, because callers name it by a model's guid
alone, is small: which guids were switched on by hand, and each guid's options.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

ADAPTER_LOSS = "adapter_loss"
"""The key under which adapters register their auxiliary losses."""

_enabled: set[str | None] = set()
_options: dict[str | None, dict[str, Any]] = {}
_modules: weakref.WeakSet[AccessMixin] = weakref.WeakSet()
_lock = threading.Lock()


def set_access_cfg(cfg: DictConfig, guid: str | None = None) -> None:
    """Sets the registry's options for one model, or for all models that have none of their own.

    Args:
        cfg: the options, copied: ``detach`` and ``convert_to_cpu`` (of every registered tensor),
            ``compute_adapter_loss`` (False: strategies compute no auxiliary loss). An empty one
            forgets what was set.
        guid: the model's ``model_guid``; None means the default.

    Raises:
        TypeError: if cfg is no DictConfig.
    """
    if not isinstance(cfg, DictConfig):
        raise TypeError(f"cfg must be an omegaconf.DictConfig, got {type(cfg).__name__}")
    options = _plain(cfg)
    if options:
        _options[guid] = options
    else:
        _options.pop(guid, None)


def access_options(guid: str | None) -> Mapping[str, Any]:
    """The options for a model's guid, or the default ones where it has none; read only."""
    options = _options.get(guid)
    return options if options is not None else _options.get(None, {})


def _plain(cfg: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    if isinstance(cfg, DictConfig):
        return {str(k): v for k, v in OmegaConf.to_container(cfg, resolve=True).items()}  # type: ignore[union-attr]
    return dict(cfg)


def without(reduced: Any, *attributes: str) -> Any:
    """What ``__reduce_ex__`` returns, less some attributes, which a copy is not to have."""
    if isinstance(reduced, tuple) and len(reduced) > 2 and isinstance(reduced[2], dict):
        state = {key: value for key, value in reduced[2].items() if key not in attributes}
        return (*reduced[:2], state, *reduced[3:])
    return reduced


class AccessMixin(ABC):
    """Lets a module leave tensors for a training loop to collect.

    A loop reads them once a step, then empties the registry (which also frees the graphs that the
    tensors hold)::

        if AccessMixin.is_access_enabled(getattr(model, "model_guid", None)):
            for tensors in AccessMixin.get_module_registry(model).values():
                loss = loss + sum(tensors.get("adapter_loss", []))
            AccessMixin.reset_registry(model)
    """

    _registry: dict[str, list[Tensor]]
    # The guids for which this module's unread tensors make access "enabled".
    _access_guids: tuple[str | None, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Makes the instance known to :meth:`is_access_enabled`."""
        # Here, not in __init__, so that copies and unpickled modules are known as well.
        self = super().__new__(cls)
        object.__setattr__(self, "_registry", {})
        object.__setattr__(self, "_access_guids", ())
        with _lock:
            _modules.add(self)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The tensors belong to a step of the original: graphs can't be copied.
        return without(super().__reduce_ex__(protocol), "_registry", "_access_guids")

    def register_accessible_tensor(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor to this module's registry.

        Args:
            name: the key of the list it goes to.
            tensor: any tensor. ``detach`` does not apply to ``"adapter_loss"``: a loss without its
                graph would silently train nothing.
        """
        self._register(name, tensor, getattr(self, "model_guid", None))

    @classmethod
    def get_module_registry(cls, module: nn.Module) -> dict[str, dict[str, list[Tensor]]]:
        """The registries of a module and its submodules that are not empty, by module path."""
        return {
            path: m._registry
            for path, m in module.named_modules()
            if isinstance(m, AccessMixin) and m._registry
        }

    def reset_registry(self: Any, registry_key: str | None = None) -> None:
        """Empties the registries of a module and its submodules, and switches its access off.

        Args:
            self: any ``nn.Module``, an AccessMixin or not: ``AccessMixin.reset_registry(model)``.
            registry_key: empty this key alone; None means all keys.
        """
        for module in self.modules():
            if isinstance(module, AccessMixin):
                if registry_key is None:
                    module._registry.clear()
                else:
                    module._registry.pop(registry_key, None)
                module._access_guids = ()
        _enabled.discard(getattr(self, "model_guid", None))

    @property
    def access_cfg(self) -> Mapping[str, Any]:
        """The options that hold for this module; read only."""
        return MappingProxyType(dict(access_options(getattr(self, "model_guid", None))))

    @classmethod
    def update_access_cfg(
        cls, cfg: Mapping[str, Any] | DictConfig, guid: str | None = None
    ) -> None:
        """Changes some of the options, see :func:`set_access_cfg`; cfg itself is not kept."""
        _options[guid] = {**_options.get(guid, {}), **_plain(cfg)}

    @classmethod
    def is_access_enabled(cls, guid: str | None = None) -> bool:
        """Whether a model's modules register tensors, or hold some that nobody has reset yet.

        Args:
            guid: the model's ``model_guid``; None asks for the default, under which every model's
                auxiliary losses show.
        """
        if guid in _enabled:
            return True
        with _lock:
            modules = list(_modules)
        return any(guid in module._access_guids for module in modules)

    @classmethod
    def set_access_enabled(cls, access_enabled: bool, guid: str | None = None) -> None:
        """Switches access on or off for a model's guid, None for the default."""
        if access_enabled:
            _enabled.add(guid)
            return
        _enabled.discard(guid)
        with _lock:
            modules = list(_modules)
        for module in modules:
            if guid in module._access_guids:
                module._access_guids = tuple(g for g in module._access_guids if g != guid)

    def propagate_model_guid(self: Any) -> None:
        """Gives this module's ``model_guid`` to all its submodules that are AccessMixins."""
        for module in self.modules():
            if isinstance(module, AccessMixin):
                module.model_guid = self.model_guid  # type: ignore[attr-defined]

    def register_adapter_loss(self, loss: Tensor, guid: str | None) -> None:
        """Registers an auxiliary loss and lets both the default guid and the model's know of it.

        Args:
            loss: scalar.
            guid: the ``model_guid`` of the host, None where it has none.
        """
        self._register(ADAPTER_LOSS, loss, guid)
        # Kept on the module, not in a global: an adapter's forward writes to itself alone, and the
        # reset of one model leaves the losses of another visible.
        self._access_guids = (None, guid)

    def _register(self, name: str, tensor: Tensor, guid: str | None) -> None:
        options = access_options(guid)
        if options.get("detach", False) and name != ADAPTER_LOSS:
            tensor = tensor.detach()
        if options.get("convert_to_cpu", False):
            tensor = tensor.cpu()
        if name not in self._registry:
            self._registry[name] = []
        self._registry[name].append(tensor)
