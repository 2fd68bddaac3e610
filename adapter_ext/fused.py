"""What of a LinearAdapter the op needs, read off its layers at every call.

An adapter's layers can be swapped, parametrised or hooked at any time. :class:`LinearLayer` holds
what was found when the layers were last looked at, and says at each call, for a fraction of a
microsecond, whether that still is all there is to them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from adapter_ext.types import AdapterWeights

# Dictionaries that PyTorch fills in place, never replaces.
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


class Settings(NamedTuple):
    """How the op computes an adapter, besides its weights.

    Attributes:
        activation: the op's name of its activation.
        norm_position: ``"pre"`` or ``"post"``.
        eps: of the norm.
        dropout: probability, 0 where dropout is not active.
    """

    activation: str
    norm_position: str
    eps: float
    dropout: float


class FusedCall(NamedTuple):
    """How the op computes one adapter in its present state.

    Attributes:
        tensors: the adapter's weights, in the order of :class:`AdapterWeights`.
        settings: all else.
    """

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    settings: Settings

    @property
    def weights(self) -> AdapterWeights:
        """The weights as the op takes them, in lists of one."""
        norm_weight, norm_bias, down, up = self.tensors
        return AdapterWeights([norm_weight], [norm_bias], [down], [up])


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type in which autocast wants products of x, None without autocast."""
    device = "cpu" if x.is_cpu else x.device.type  # the latter alone costs 0.4 us
    # Autocast leaves float64 alone, and does not know tensors without data.
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def autocast_output(x: Tensor, operands: torch.dtype, norm_position: str) -> torch.dtype:
    """The type of what an adapter's layers return under autocast, without the residual.

    Args:
        x: the adapter's input.
        operands: its :func:`autocast_dtype`.
        norm_position: ``"pre"`` or ``"post"``.
    """
    # The last layer is a product, or a norm, which autocast computes in float32 but for the CPU's.
    return torch.float32 if norm_position == "post" and not x.is_cpu else operands


def hook_tables(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The dictionaries, filled in place, of the hooks that calling a module runs."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


# The attributes, besides parameters, on which the results of layers depend.
_ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.LayerNorm: ("eps",),
    nn.GELU: ("approximate",),
    nn.Hardtanh: ("min_val", "max_val"),
}

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.SiLU: "swish",
    nn.ReLU: "relu",
    nn.SELU: "selu",
    nn.Identity: "identity",
}


def activation_name(layer: Any) -> str | None:
    """The op's name of an activation layer, None if the op does not have it."""
    kind = type(layer)
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(layer.approximate)
    if kind is nn.Hardtanh:
        return "hardtanh" if (layer.min_val, layer.max_val) == (-1.0, 1.0) else None
    return _ACTIVATIONS.get(kind)


class LinearLayer:
    """A LinearAdapter's layers as the op sees them: norm, down, activation, up.

    Attributes:
        sequence: the ``nn.Sequential`` that was looked at.
    """

    __slots__ = (
        "_attributes",
        "_children",
        "_hooks",
        "_layers",
        "_members",
        "_modules",
        "_parameters",
        "_settings",
        "_types",
        "sequence",
    )

    def __init__(
        self,
        sequence: nn.Sequential,
        norm: nn.LayerNorm,
        down: nn.Linear,
        up: nn.Linear,
        settings: Settings,
    ) -> None:
        self.sequence = sequence
        self._settings = settings
        self._layers = list(sequence)
        self._modules = [sequence, *self._layers]
        self._types = [type(m) for m in self._modules]
        # Dictionaries, because an attribute of a module costs 0.1 us; and no parameters: those may
        # be replaced at any time.
        self._children = sequence._modules
        self._members = [m.__dict__ for m in self._modules]
        self._attributes = [
            (m.__dict__, name, m.__dict__.get(name))
            for m in self._layers
            for name in _ATTRIBUTES.get(type(m), ())
        ]
        self._parameters = (norm._parameters, down._parameters, up._parameters)
        self._hooks = (*(h for m in self._modules for h in hook_tables(m)), *_GLOBAL_HOOKS)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of an adapter looks at its own layers

    @classmethod
    def of(cls, sequence: nn.Module | None) -> LinearLayer | None:
        """Looks at an adapter's layers; None if the op can't stand for them."""
        if type(sequence) is not nn.Sequential or len(sequence) != 4:
            return None
        norm: Any
        down: Any
        up: Any
        kinds = [type(layer) for layer in sequence]
        if kinds[0] is nn.LayerNorm and kinds[1] is kinds[3] is nn.Linear:
            norm, down, activation, up = sequence
            norm_position = "pre"
        elif kinds[3] is nn.LayerNorm and kinds[0] is kinds[2] is nn.Linear:
            down, activation, up, norm = sequence
            norm_position = "post"
        else:
            return None
        name = activation_name(activation)
        if name is None or len(norm.normalized_shape) != 1:
            return None
        return cls(sequence, norm, down, up, Settings(name, norm_position, norm.eps, 0.0))

    def call(self, dropout: float) -> FusedCall | None:
        """How the op computes the layers now; None if something on them must be honoured.

        Args:
            dropout: probability of the active dropout behind the layers, 0 for none.
        """
        if (
            any(self._hooks)
            or [*self._children.values()] != self._layers
            or [*map(type, self._modules)] != self._types
        ):
            return None
        for members in self._members:
            if "forward" in members:
                return None
        for members, name, value in self._attributes:
            if members.get(name) is not value:
                return None
        norm, down, up = self._parameters
        norm_weight, norm_bias = norm.get("weight"), norm.get("bias")
        down_weight, up_weight = down.get("weight"), up.get("weight")
        if (
            # A pruned weight is no parameter; norms may come without.
            norm_weight is None
            or norm_bias is None
            or down_weight is None
            or up_weight is None
            or down.get("bias") is not None
            or up.get("bias") is not None
        ):
            return None
        settings = self._settings._replace(dropout=dropout) if dropout else self._settings
        return FusedCall((norm_weight, norm_bias, down_weight, up_weight), settings)
