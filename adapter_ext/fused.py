"""What of a LinearAdapter the op needs, read off its layers at every call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from adapter_ext.snapshot import Snapshot, read_parameters
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

    tensors: tuple[Tensor, ...]
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


HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module has the hooks that calling it runs."""


def hook_tables(*modules: nn.Module) -> list[dict[int, Any]]:
    """The dictionaries, filled in place, of the hooks that calling modules runs."""
    return [getattr(module, table) for module in modules for table in HOOK_TABLES]


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
        snapshot: of it and its layers; its parameters are those of :class:`AdapterWeights`.
    """

    __slots__ = ("_settings", "sequence", "snapshot")

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
        layers = list(sequence)
        self.snapshot = Snapshot.of(
            sequence,
            empty=(*hook_tables(sequence, *layers), *_GLOBAL_HOOKS),
            objects=(sequence, *layers),
            entries=[
                *((module.__dict__, "forward") for module in (sequence, *layers)),
                *((m.__dict__, name) for m in layers for name in _ATTRIBUTES.get(type(m), ())),
                *((linear._parameters, "bias") for linear in (down, up)),
            ],
            containers=[sequence],
            parameters=[
                (norm._parameters, "weight"),
                # Norms may come without, and a pruned weight is no parameter.
                (norm._parameters, "bias"),
                (down._parameters, "weight"),
                (up._parameters, "weight"),
            ],
        )

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
        if down.bias is not None or up.bias is not None:
            return None
        if any("forward" in module.__dict__ for module in (sequence, *sequence)):
            return None
        return cls(sequence, norm, down, up, Settings(name, norm_position, norm.eps, 0.0))

    def call(self, dropout: float) -> FusedCall | None:
        """How the op computes the layers now; None if something on them must be honoured.

        Args:
            dropout: probability of the active dropout behind the layers, 0 for none.
        """
        tensors = read_parameters([self.sequence], [self.snapshot])
        # The op has the same type for all weights, PyTorch's layers have not.
        if tensors is None or len({tensor.dtype for tensor in tensors}) > 1:
            return None
        settings = self._settings._replace(dropout=dropout) if dropout else self._settings
        return FusedCall(tuple(tensors), settings)
