"""How an adapter's output is merged with its input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapter_ext import ops
from adapter_ext.access import AccessMixin, access_options
from adapter_ext.fused import FusedCall, autocast_dtype, autocast_output

if TYPE_CHECKING:
    from adapter_ext.mixin import AdapterModuleMixin

METHODS = ("forward", "compute_output", "apply_stochastic_depth", "compute_auxiliary_losses")
"""What a strategy may have of its own, instead of the method of its class."""


class AbstractAdapterStrategy(ABC):
    """Decides what becomes of an adapter's output. Not an ``nn.Module``: it has no weights."""

    @abstractmethod
    def forward(self, input: Any, adapter: nn.Module, *, module: AdapterModuleMixin) -> Any:
        """Runs the adapter and merges its output with its input.

        Args:
            input: the host's output, or the previous adapter's.
            adapter: the adapter to run.
            module: the host, through whose ``adapter_layer`` all its adapters can be reached.

        Returns:
            What the next adapter, or the host's caller, gets.
        """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls :meth:`forward`."""
        return self.forward(*args, **kwargs)


class ReturnResultAdapterStrategy(AbstractAdapterStrategy):
    """The adapter's output is the result."""

    def forward(
        self,
        input: Tensor | list[Any] | tuple[Any, ...] | dict[str, Any],
        adapter: nn.Module,
        *,
        module: AdapterModuleMixin,
    ) -> Any:
        """Returns :meth:`compute_output`; arguments as there."""
        return self.compute_output(input, adapter, module=module)

    def compute_output(
        self,
        input: Tensor | list[Any] | tuple[Any, ...] | dict[str, Any],
        adapter: nn.Module,
        *,
        module: AdapterModuleMixin,
    ) -> Any:
        """Runs the adapter.

        Args:
            input: a list or tuple becomes the adapter's positional arguments, a dict its keyword
                arguments, anything else its one argument.
            adapter: the adapter to run.
            module: the host.
        """
        if isinstance(input, (list, tuple)):
            return adapter(*input)
        if isinstance(input, dict):
            return adapter(**input)
        return adapter(input)


@dataclass
class ReturnResultAdapterStrategyConfig:
    """Configuration of :class:`ReturnResultAdapterStrategy`."""

    _target_: str = f"{__name__}.ReturnResultAdapterStrategy"


class ResidualAddAdapterStrategy(AbstractAdapterStrategy):
    """Adds the adapter's output to its input, with stochastic depth and an auxiliary L2 loss.

    Both are active while the host is in training mode. A stock :class:`adapter_ext.LinearAdapter`
    is computed by the fused op, everything included; the methods below run whenever one of them is
    overridden or the adapter is not a stock one.

    Args:
        stochastic_depth: probability p of dropping the adapter's output, one draw a call;
            what is kept is divided by 1 - p ("Deep Networks with Stochastic Depth", Huang et al.,
            2016).
        l2_lambda: weight of the auxiliary loss, see :meth:`compute_auxiliary_losses`.

    Raises:
        ValueError: if stochastic_depth is not in [0, 1].
    """

    def __init__(self, stochastic_depth: float = 0.0, l2_lambda: float = 0.0) -> None:
        super().__init__()
        _check_probability(stochastic_depth)
        self.stochastic_depth = stochastic_depth
        self.l2_lambda = l2_lambda

    def forward(self, input: Tensor, adapter: nn.Module, *, module: AdapterModuleMixin) -> Tensor:
        """Computes input + adapter(input).

        Args:
            input: ``[..., D]``.
            adapter: the adapter to run.
            module: the host.

        Returns:
            Tensor of input's shape, of the type of the sum.

        Raises:
            ValueError: in training, if ``stochastic_depth`` is not in [0, 1], or if an auxiliary
                loss is due and the adapter is no :class:`adapter_ext.AccessMixin`.
        """
        if isinstance(input, Tensor) and _hooks_are_stock(self):
            fused: FusedCall | None = getattr(adapter, "fused_call", _not_fused)()
            if fused is not None:
                return self._forward_fused(input, adapter, fused, module)
        output = self.compute_output(input, adapter, module=module)
        if module.training and self.stochastic_depth != 0.0:
            output = self.apply_stochastic_depth(output, input, adapter, module=module)
        result = input + output
        self.compute_auxiliary_losses(result, input, adapter, module=module)
        return result

    def _forward_fused(
        self, x: Tensor, adapter: nn.Module, fused: FusedCall, module: AdapterModuleMixin
    ) -> Tensor:
        depth = l2_lambda = 0.0
        if module.training:
            depth = self.stochastic_depth
            l2_lambda = self.loss_weight(adapter, module)
        operands = autocast_dtype(x)
        if operands is not None:  # the type of the sum
            output = autocast_output(x, operands, fused.settings.norm_position)
            x = x.to(torch.promote_types(x.dtype, output))
        y, aux = ops.linear_adapter(
            x,
            fused.weights,
            activation=fused.settings.activation,
            norm_position=fused.settings.norm_position,
            eps=fused.settings.eps,
            dropout=fused.settings.dropout,
            stochastic_depth=depth,
            l2_lambda=l2_lambda,
            # Everything that differs in training is 0 where it is not active.
            training=bool(fused.settings.dropout or depth or l2_lambda),
            compute_dtype=operands,
        )
        if l2_lambda:
            register_adapter_loss(aux[0], adapter, module)
        return y

    def compute_output(
        self, input: Tensor, adapter: nn.Module, *, module: AdapterModuleMixin
    ) -> Tensor:
        """Runs the adapter; arguments as in :meth:`forward`."""
        output: Tensor = adapter(input)
        return output

    def apply_stochastic_depth(
        self, output: Tensor, input: Tensor, adapter: nn.Module, *, module: AdapterModuleMixin
    ) -> Tensor:
        """Drops the adapter's output with probability p, or divides it by 1 - p.

        Args:
            output: the adapter's output, of any shape; the one draw is for the whole of it.
            input: the adapter's input.
            adapter: the adapter.
            module: the host.

        Raises:
            ValueError: if ``stochastic_depth`` is not in [0, 1].
        """
        p = self.stochastic_depth
        _check_probability(p)
        # The scale in float32 at least, whatever the output is in.
        dtype = torch.promote_types(output.dtype, torch.float32)
        draw = torch.empty([1] * output.ndim, dtype=dtype, device=output.device)
        draw.bernoulli_(1.0 - p)
        return (output * (draw / (1.0 - p) if p < 1.0 else draw)).to(output.dtype)

    def compute_auxiliary_losses(
        self, output: Tensor, input: Tensor, adapter: nn.Module, *, module: AdapterModuleMixin
    ) -> None:
        """Registers ``l2_lambda`` times the mean over samples of ||output - input||².

        The loss goes to the adapter's registry under ``"adapter_loss"``, in training only, if
        ``l2_lambda`` is positive, a parameter of the adapter requires grad, and the access option
        ``compute_adapter_loss`` is not False. It is summed in float32 at least.

        Args:
            output: ``[B, ...]``, the result of :meth:`forward`.
            input: ``[B, ...]``, the adapter's input.
            adapter: the adapter.
            module: the host.

        Raises:
            ValueError: if a loss is due and the adapter is no :class:`adapter_ext.AccessMixin`.
        """
        l2_lambda = self.loss_weight(adapter, module)
        if l2_lambda:
            dtype = torch.promote_types(input.dtype, torch.float32)
            delta = output.to(dtype) - input.to(dtype)
            samples = delta.shape[0] if delta.ndim > 1 else 1
            loss = l2_lambda * delta.square().sum() / max(samples, 1)
            register_adapter_loss(loss, adapter, module)

    def loss_weight(self, adapter: nn.Module, module: AdapterModuleMixin) -> float:
        """``l2_lambda`` where an auxiliary loss is due, else 0.

        Args:
            adapter: the adapter.
            module: the host.

        Raises:
            ValueError: if a loss is due and the adapter is no :class:`adapter_ext.AccessMixin`.
        """
        if not module.training or not self.l2_lambda > 0.0:
            return 0.0
        if not isinstance(adapter, AccessMixin):
            raise ValueError(
                f"l2_lambda > 0 needs an adapter that is an AccessMixin and can register the loss; "
                f"got {type(adapter).__name__}"
            )
        if not any(p.requires_grad for p in adapter.parameters()):
            return 0.0
        if not access_options(_guid(adapter, module)).get("compute_adapter_loss", True):
            return 0.0
        return self.l2_lambda


@dataclass
class ResidualAddAdapterStrategyConfig:
    """Configuration of :class:`ResidualAddAdapterStrategy`."""

    stochastic_depth: float = 0.0
    l2_lambda: float = 0.0

    _target_: str = f"{__name__}.ResidualAddAdapterStrategy"


def register_adapter_loss(loss: Tensor, adapter: nn.Module, module: AdapterModuleMixin) -> None:
    """Registers an auxiliary loss with its adapter, an AccessMixin.

    Not within a backward pass, where torch.utils.checkpoint computes a layer again: its loss was
    registered the first time, and would be there in the next step too.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return
    adapter.register_adapter_loss(loss, _guid(adapter, module))  # type: ignore[operator]


def _guid(adapter: nn.Module, module: AdapterModuleMixin) -> str | None:
    guid: str | None = getattr(adapter, "model_guid", None) or getattr(module, "model_guid", None)
    return guid


def _check_probability(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"stochastic_depth must be a probability in [0, 1], got {p}")


def _not_fused() -> None:
    return None


# Captured now, so that a method that is patched on the class itself is noticed as well.
_CALL = AbstractAdapterStrategy.__call__
_RETURN_RESULT_FORWARD = ReturnResultAdapterStrategy.forward
_RETURN_RESULT_COMPUTE_OUTPUT = ReturnResultAdapterStrategy.compute_output
_RESIDUAL_ADD_FORWARD = ResidualAddAdapterStrategy.forward
_COMPUTE_OUTPUT = ResidualAddAdapterStrategy.compute_output
_APPLY_STOCHASTIC_DEPTH = ResidualAddAdapterStrategy.apply_stochastic_depth
_COMPUTE_AUXILIARY_LOSSES = ResidualAddAdapterStrategy.compute_auxiliary_losses


def is_stock(strategy: object) -> bool:
    """Whether the op can stand for a strategy: neither overridden nor patched anywhere."""
    own = strategy.__dict__
    return is_stock_class(type(strategy)) and not any(name in own for name in METHODS)


def is_stock_class(kind: type) -> bool:
    """Whether the op can stand for a strategy of that class on which nothing is patched."""
    if issubclass(kind, ResidualAddAdapterStrategy):
        return (
            kind.forward is _RESIDUAL_ADD_FORWARD
            and kind.__call__ is _CALL
            and _class_hooks_are_stock(kind)
        )
    return (
        issubclass(kind, ReturnResultAdapterStrategy)
        and kind.forward is _RETURN_RESULT_FORWARD
        and kind.__call__ is _CALL
        and kind.compute_output is _RETURN_RESULT_COMPUTE_OUTPUT
    )


def _hooks_are_stock(strategy: ResidualAddAdapterStrategy) -> bool:
    """Whether the methods that the stock forward calls are the stock ones."""
    own = strategy.__dict__
    return _class_hooks_are_stock(type(strategy)) and not any(name in own for name in METHODS[1:])


def _class_hooks_are_stock(kind: type[ResidualAddAdapterStrategy]) -> bool:
    return (
        kind.compute_output is _COMPUTE_OUTPUT
        and kind.apply_stochastic_depth is _APPLY_STOCHASTIC_DEPTH
        and kind.compute_auxiliary_losses is _COMPUTE_AUXILIARY_LOSSES
    )
