"""What of a LinearAdapter the op needs, read off its layers at every call.

An adapter's layers can be swapped, parametrised or hooked at any time. :class:`LinearLayer` holds
what was found when the layers were last looked at, and says at each call, for a fraction of a
microsecond, whether that still is all there is to them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

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


class FusedCall(NamedTuple):
    """How the op computes one adapter in its present state.

    Attributes:
        weights: the adapter's weights, lists of one.
        activation: the op's name of its activation.
        norm_position: ``"pre"`` or ``"post"``.
        eps: of the norm.
        dropout: probability, 0 where dropout is not active.
    """

    weights: AdapterWeights
    activation: str
    norm_position: str
    eps: float
    dropout: float


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type in which autocast wants products of x, None without autocast."""
    device = "cpu" if x.is_cpu else x.device.type  # the latter alone costs 0.4 us
    # Autocast leaves float64 alone.
    if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def hook_tables(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The dictionaries, filled in place, of the hooks that calling a module runs."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def activation_name(layer: Any) -> str | None:
    """The op's name of an activation layer, None if the op does not have it."""
    kind = type(layer)
    if kind is nn.GELU:
        return "gelu" if layer.approximate == "none" else "gelu_tanh"
    if kind is nn.Hardtanh:
        return "hardtanh" if (layer.min_val, layer.max_val) == (-1.0, 1.0) else None
    return {nn.SiLU: "swish", nn.ReLU: "relu", nn.SELU: "selu", nn.Identity: "identity"}.get(kind)


class LinearLayer:
    """A LinearAdapter's layers as the op sees them: norm, down, activation, up.

    Attributes:
        sequence: the ``nn.Sequential`` that was looked at.
    """

    __slots__ = (
        "_activation",
        "_activation_layer",
        "_activation_type",
        "_down",
        "_hooks",
        "_layers",
        "_members",
        "_norm",
        "_norm_position",
        "_up",
        "sequence",
    )

    def __init__(
        self,
        sequence: nn.Sequential,
        norm: nn.LayerNorm,
        down: nn.Linear,
        activation: nn.Module,
        up: nn.Linear,
        name: str,
    ) -> None:
        self.sequence = sequence
        self._layers = list(sequence)
        self._norm, self._down, self._up = norm, down, up
        self._activation_layer, self._activation_type = activation, type(activation)
        self._activation = name
        self._norm_position = "pre" if self._layers[0] is norm else "post"
        # Dictionaries, and no parameters: those may be replaced at any time.
        modules = (sequence, *self._layers)
        self._members = tuple(m.__dict__ for m in modules)
        self._hooks = (*(h for m in modules for h in hook_tables(m)), *_GLOBAL_HOOKS)

    @classmethod
    def of(cls, sequence: nn.Module | None) -> LinearLayer | None:
        """Looks at an adapter's layers; None if the op can't stand for them."""
        if type(sequence) is not nn.Sequential or len(sequence) != 4:
            return None
        norm: Any
        kinds = [type(layer) for layer in sequence]
        if kinds[0] is nn.LayerNorm and kinds[1] is kinds[3] is nn.Linear:
            norm, down, activation, up = sequence
        elif kinds[3] is nn.LayerNorm and kinds[0] is kinds[2] is nn.Linear:
            down, activation, up, norm = sequence
        else:
            return None
        name = activation_name(activation)
        if name is None or len(norm.normalized_shape) != 1:
            return None
        return cls(sequence, norm, cast(nn.Linear, down), activation, cast(nn.Linear, up), name)

    def call(self, dropout: float) -> FusedCall | None:
        """How the op computes the layers now; None if something on them must be honoured.

        Args:
            dropout: probability of the active dropout behind the layers, 0 for none.
        """
        norm, down, up = self._norm, self._down, self._up
        if (
            list(self.sequence._modules.values()) != self._layers
            or any(self._hooks)
            or norm.__class__ is not nn.LayerNorm
            or down.__class__ is not nn.Linear
            or up.__class__ is not nn.Linear
            or self._activation_layer.__class__ is not self._activation_type
        ):
            return None
        for members in self._members:
            if "forward" in members:
                return None
        norm_parameters, down_parameters, up_parameters = (
            norm._parameters,
            down._parameters,
            up._parameters,
        )
        norm_weight = norm_parameters.get("weight")
        norm_bias = norm_parameters.get("bias")
        down_weight = down_parameters.get("weight")
        up_weight = up_parameters.get("weight")
        if (
            # A pruned weight is no parameter; norms may come without.
            norm_weight is None
            or norm_bias is None
            or down_weight is None
            or up_weight is None
            or down_parameters.get("bias") is not None
            or up_parameters.get("bias") is not None
        ):
            return None
        return FusedCall(
            AdapterWeights([norm_weight], [norm_bias], [down_weight], [up_weight]),
            self._activation,
            self._norm_position,
            norm.eps,
            dropout,
        )
