"""Adapter modules."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapter_ext import ops
from adapter_ext.access import AccessMixin
from adapter_ext.fused import (
    HOOK_TABLES,
    FusedCall,
    LinearLayer,
    autocast_dtype,
    autocast_output,
    hook_tables,
)
from adapter_ext.registry import instantiate, register_target
from adapter_ext.snapshot import Snapshot
from adapter_ext.strategies import (
    METHODS,
    AbstractAdapterStrategy,
    ResidualAddAdapterStrategyConfig,
)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "hardtanh": nn.Hardtanh,
    "relu": nn.ReLU,
    "selu": nn.SELU,
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}
"""Activation layers by name; ``gelu`` is the exact one (erf)."""


class UnknownActivationError(KeyError, ValueError):
    """No activation of that name: a KeyError to NeMo's callers, a ValueError to everyone else."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would quote it


class AdapterModuleUtil(AccessMixin):
    """What every adapter module has: a strategy, and a choice of what is trained."""

    adapter_strategy: AbstractAdapterStrategy

    def setup_adapter_strategy(self, adapter_strategy: Any) -> None:
        """Sets ``adapter_strategy``, which may also be replaced at any time by assignment.

        Args:
            adapter_strategy: a strategy, a configuration of one (dict, DictConfig or dataclass
                with ``_target_``), or None for :meth:`get_default_strategy_config`.

        Raises:
            TypeError: if it is none of these.
            ValueError: if the configuration's ``_target_`` is not acceptable.
        """
        if adapter_strategy is None:
            adapter_strategy = self.get_default_strategy_config()
        if not isinstance(adapter_strategy, AbstractAdapterStrategy):
            adapter_strategy = instantiate(adapter_strategy)
        if not isinstance(adapter_strategy, AbstractAdapterStrategy):
            raise TypeError(
                f"adapter_strategy must be an AbstractAdapterStrategy or a configuration of one, "
                f"got {type(adapter_strategy).__name__}"
            )
        self.adapter_strategy = adapter_strategy

    def get_default_strategy_config(self) -> Any:
        """The configuration, a dataclass, of the strategy that is used when none is given."""
        return ResidualAddAdapterStrategyConfig()

    def adapter_unfreeze(self: Any) -> None:
        """Makes all parameters require grad; override to train only some."""
        for parameter in self.parameters():
            parameter.requires_grad_(True)


class LinearAdapter(nn.Module, AdapterModuleUtil):
    """A bottleneck adapter: norm, down projection, activation, up projection, dropout.

    pre: ``up(act(down(LN(x))))``, post: ``LN(up(act(down(x))))``; a new adapter's output is zero.
    The layers are those of ``self.module`` (an ``nn.Sequential``), named as NeMo names them; as
    long as they are the stock ones, :func:`adapter_ext.linear_adapter` computes them in one go.

    Args:
        in_features: width D of input and output.
        dim: width r of the bottleneck.
        activation: one of :data:`ACTIVATIONS`.
        norm_position: ``"pre"`` or ``"post"``.
        dropout: probability of dropping an element of the output while the adapter trains.
        adapter_strategy: see :meth:`setup_adapter_strategy`.

    Raises:
        TypeError: if an argument is of a wrong type.
        ValueError: if an argument has a value it can't have (an unknown activation is a KeyError
            as well).
    """

    def __init__(
        self,
        in_features: int,
        dim: int,
        activation: str = "swish",
        norm_position: str = "pre",
        dropout: float = 0.0,
        adapter_strategy: Any = None,
    ) -> None:
        super().__init__()
        in_features = _width("in_features", in_features)
        dim = _width("dim", dim)
        for name, text in (("activation", activation), ("norm_position", norm_position)):
            if not isinstance(text, str):
                raise TypeError(f"{name} must be a str, got {text!r}")
        # float by itself too: to mypy it is no Real.
        if isinstance(dropout, bool) or not isinstance(dropout, float | Real):
            raise TypeError(f"dropout must be a number, got {dropout!r}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be a probability in [0, 1], got {dropout}")
        if activation not in ACTIVATIONS:
            raise UnknownActivationError(
                f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}"
            )
        norm = nn.LayerNorm(in_features)
        down = nn.Linear(in_features, dim, bias=False)
        up = nn.Linear(dim, in_features, bias=False)
        if norm_position == "pre":
            self.module = nn.Sequential(norm, down, ACTIVATIONS[activation](), up)
            nn.init.zeros_(up.weight)
        elif norm_position == "post":
            self.module = nn.Sequential(down, ACTIVATIONS[activation](), up, norm)
            nn.init.zeros_(norm.weight)
            nn.init.zeros_(norm.bias)
        else:
            raise ValueError(f"norm_position must be 'pre' or 'post', got {norm_position!r}")
        self.in_features = in_features
        self.dim = dim
        self.activation = activation
        self.norm_position = norm_position
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else None
        self.setup_adapter_strategy(adapter_strategy)
        self._layer = LinearLayer.of(self.module)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the adapter's output, without any residual.

        Args:
            x: ``[..., D]``; float64, float32, bfloat16 or float16.

        Returns:
            Tensor of x's shape and type; under autocast of the type that the layers return.
        """
        fused = self._fused_layers()
        if fused is None:
            x = self.module(x)
            return x if self.dropout is None else self.dropout(x)
        operands = autocast_dtype(x)
        y = ops.linear_adapter(
            x,
            fused.weights,
            activation=fused.settings.activation,
            norm_position=fused.settings.norm_position,
            eps=fused.settings.eps,
            dropout=fused.settings.dropout,
            residual=False,
            training=bool(fused.settings.dropout),
            compute_dtype=operands,
        )[0]
        if operands is not None:
            y = y.to(autocast_output(x, operands, fused.settings.norm_position))
        return y

    def fused_call(self) -> FusedCall | None:
        """How the op computes a call of this adapter, in its present state.

        Returns:
            None where it must be called, as its ``forward`` is overridden or replaced, or its
            ``__call__`` overridden, a hook is registered on it or on one of its layers, or a layer
            is not a stock one.
        """
        own = self.__dict__
        if (
            not self._has_stock_class()
            or "forward" in own
            or any(own[table] for table in HOOK_TABLES)
        ):
            return None
        return self._fused_layers()

    @classmethod
    def _has_stock_class(cls) -> bool:
        """Whether no method that the op stands for is overridden, or patched on the class."""
        return cls.forward is _STOCK_FORWARD and cls.__call__ is nn.Module.__call__

    def _snapshot(self) -> Snapshot:
        """What :meth:`fused_call` and a stock strategy depend on, where both are there."""
        modules, strategy = self._modules, self.adapter_strategy
        dropout = [] if modules.get("dropout") is None else [cast(nn.Module, modules["dropout"])]
        return Snapshot.of(
            self,
            own=("forward", "dropout", "adapter_strategy", "_modules", *HOOK_TABLES),
            empty=hook_tables(self, *dropout),
            objects=(strategy, *dropout),
            entries=(
                *((strategy.__dict__, method) for method in METHODS),
                *((modules, name) for name in ("module", "dropout")),
                *((d.__dict__, name) for d in dropout for name in ("forward", "p", "training")),
            ),
            within=cast(LinearLayer, self._layer).snapshot,
        )

    def _fused_layers(self) -> FusedCall | None:
        own = self.__dict__
        modules = own["_modules"]
        # An attribute while it is None, a submodule otherwise.
        dropout = modules.get("dropout") or own.get("dropout")
        p = 0.0
        if dropout is not None:
            if (
                type(dropout) is not nn.Dropout
                or any(hook_tables(dropout))
                or "forward" in dropout.__dict__
            ):
                return None
            if dropout.training:
                p = dropout.p
        layer = own["_layer"]
        sequence = modules["module"]
        call = None
        if layer is not None and layer.sequence is sequence:
            call = layer.call(p)
        if call is None:
            # The layers may have been replaced by others that the op can compute.
            layer = LinearLayer.of(sequence)
            call = None if layer is None else layer.call(p)
            if call is not None and not torch.compiler.is_compiling():
                self._layer = layer
        return call


def _width(name: str, value: int) -> int:
    try:
        width = operator.index(value)
    except TypeError:
        width = None
    if width is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if width < 1:
        raise ValueError(f"{name} must be at least 1, got {width}")
    return width


_STOCK_FORWARD = LinearAdapter.forward

register_target(
    LinearAdapter,
    "adapter_ext.LinearAdapter",
    "nemo.collections.common.parts.adapter_modules.LinearAdapter",
)


@dataclass
class AdapterConfig:
    """Base class, if one wants it, of the configurations of adapters."""


@dataclass
class LinearAdapterConfig(AdapterConfig):
    """Configuration of :class:`LinearAdapter`; the fields are its arguments."""

    in_features: int
    dim: int
    activation: str = "swish"
    norm_position: str = "pre"
    dropout: float = 0.0
    # Any: OmegaConf would refuse the configuration of another strategy.
    adapter_strategy: Any = field(default_factory=ResidualAddAdapterStrategyConfig)

    _target_: str = f"{__name__}.LinearAdapter"
