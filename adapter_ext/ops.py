"""The ops: :func:`linear_adapter` and :func:`route`, differentiable and compilable.

The native kernels are ``torch.ops.adapter_ext.*`` (schemas in ``csrc/schemas.h``). Eager code
reaches them through a ``torch.autograd.Function`` below autograd, torch.func through another,
torch.compile through the formula registered with ``torch.library``: all share one backward, but in
eager mode the others take two to three times as long for a small call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from adapter_ext import _library, reference  # noqa: F401  (_library loads the ops)
from adapter_ext.types import AdapterWeights, Routing

__all__ = ["linear_adapter", "route"]

_Key = TypeVar("_Key")

_native = torch.ops.adapter_ext
_inference = _native.linear_adapter.default
_forward = _native.linear_adapter_forward.default
_backward = _native.linear_adapter_backward.default
_route = _native.route.default
_vjp: Any = torch.func.vjp

# The values of the enumerations in csrc/common/problem.h.
_ACTIVATIONS = {
    "identity": 0,
    "hardtanh": 1,
    "relu": 2,
    "selu": 3,
    "swish": 4,
    "silu": 4,
    "gelu": 5,
    "gelu_tanh": 6,
}
_NORM_POSITIONS = {"pre": 0, "post": 1}
_DEPTH_MODES = {"call": 0, "sample": 1}
_OPERAND_TYPES = {torch.bfloat16: 2, torch.float16: 3}
_NOT_ROUNDED = -1  # but bfloat16 operands of x and weights may stay in bfloat16
_FLOAT32 = 1
_TF32 = 4  # float32 on CUDA


class _Options(NamedTuple):
    """The options of the native ops: order and defaults of their schemas."""

    activation: int = 4
    norm_position: int = 0
    eps: float = 1e-5
    residual: bool = True
    compute_type: int = _NOT_ROUNDED
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    depth_mode: int = 0
    l2_lambda: Tensor | None = None
    seed: Tensor | None = None


_DEFAULT_OPTIONS = tuple(_Options())[:5]
_PLAIN = {Tensor, torch.nn.Parameter}


def route(ids: Tensor, num_adapters: int) -> Routing:
    """Sorts the samples of a batch by adapter, once for all layers that share the routing.

    Args:
        ids: int64 of any shape, each in [-1, num_adapters): the adapter of each sample, -1 = none.
            ``[B]`` routes the samples of ``x`` ``[B, ..., D]``, ``[B, T]`` the rows of
            ``[B, T, D]``.
        num_adapters: number of adapters A.

    Returns:
        The routing, on the device of ``ids``, made without a host synchronisation on CUDA.

    Raises:
        TypeError: ``ids`` is no tensor, or ``num_adapters`` no integer.
        RuntimeError: ``ids`` is not int64, or holds a value out of range; or ``num_adapters`` is
            out of range.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"route: ids: expected an int64 tensor, got {type(ids).__name__}")
    if isinstance(num_adapters, bool) or not isinstance(
        num_adapters, (int, torch.SymInt, Integral)
    ):
        raise TypeError(
            "route: num_adapters: expected an integer, got "
            f"{type(num_adapters).__name__} {num_adapters!r}"
        )
    order, offsets = _route(ids, num_adapters)
    return Routing(ids, order, offsets)


def linear_adapter(
    x: Tensor,
    weights: AdapterWeights,
    routing: Routing | None = None,
    *,
    activation: str = "swish",
    norm_position: str = "pre",
    eps: float = 1e-5,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    stochastic_depth_mode: str = "call",
    l2_lambda: float | Tensor = 0.0,
    residual: bool = True,
    training: bool = False,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Bottleneck adapters with a layer norm, a batch of which every row may use its own.

    ::

        pre:  o = up · act(down · LN(x))        post:  o = LN(up · act(down · x))
        d = s · m ⊙ o                           y = x + d  (y = m ⊙ o without the residual)
        aux[a] = l2_lambda[a] / B_a · Σ over the rows of a of ||d||²

    with m the dropout mask over its keep probability, s the stochastic depth draw over its keep
    probability, B_a the number of samples of adapter a. Differentiable any number of times in ``x``
    and all weights, under ``torch.func`` and ``torch.vmap`` as well, and in forward mode (through
    :mod:`adapter_ext.reference`, which is the definition, and names its sources).

    The same inputs give the same bits on any number of threads, and a row of y does not depend on
    the other rows of the batch. Sums are in float32, or in float64 for float64 ``x``.

    Args:
        x: ``[..., D]``, float64, float32, bfloat16 or float16. Copied where not contiguous.
        weights: the weights of A adapters, of the dtype of ``x`` or float32. In lists, those whose
            last dimension has another stride than 1 are copied; a stack must have stride 1.
        routing: which adapter each sample uses, from :func:`route`; a sample without one passes
            through untouched. None: all rows use the one adapter there is, and a sample is an
            ``x[i]``.
        activation: identity, hardtanh, relu, selu, swish (silu), gelu (exact) or gelu_tanh.
        norm_position: "pre" or "post".
        eps: added to the norm's variance.
        dropout: probability of dropping an element of o; in training only.
        stochastic_depth: probability of dropping the adapter; in training only.
        stochastic_depth_mode: "call" draws once for an adapter and call (as NeMo does), "sample"
            once a sample.
        l2_lambda: weight of the auxiliary loss, one for all or ``[A]``, at least 0 (the values of
            a tensor are not checked); in training only.
        residual: False returns m ⊙ o itself.
        training: whether dropout, stochastic depth and the auxiliary loss are on.
        seed: int64, one element, on the device of ``x``: what masks and draws are a function of.
            None takes one from torch's generator, and so follows ``torch.manual_seed``.
        compute_dtype: bfloat16 or float16 rounds the operands of both products to it (what
            autocast does); float32 does not. None does not either, except that with ``x`` and
            weights of bfloat16, on machines that multiply in bfloat16, the forward rounds them to
            bfloat16, as PyTorch's layers do; and on CUDA products of 16-bit ``x`` and weights
            round to it, and float32 ones to TF32 where ``torch.backends.cuda.matmul`` allows it.
            With 16-bit ``x`` and ``compute_dtype`` None or of its type, the CPU keeps weights of
            float32 as they are.

    Returns:
        y, of the shape and dtype of ``x``, contiguous; and aux ``[A]``, float32 (float64 for
        float64 ``x``), zero where an adapter has no samples.

    Raises:
        ValueError: an option is out of its range.
        TypeError: an option is of the wrong Python type.
        RuntimeError: a tensor has the wrong shape, dtype, device or layout.
    """
    arguments = _arguments(
        x,
        weights,
        routing,
        activation,
        norm_position,
        eps,
        dropout,
        stochastic_depth,
        stochastic_depth_mode,
        l2_lambda,
        residual,
        training,
        seed,
        compute_dtype,
    )
    if forward_ad._current_level >= 0:  # no way to the native ops has forward-mode formulas
        _check_tensors(*arguments)
        y, aux = _by_reference(*arguments)
    elif not torch.is_grad_enabled():
        y, aux = _inference(*arguments)
    elif torch.compiler.is_compiling():
        y, aux, _ = _forward(*arguments)
    elif torch._C._are_functorch_transforms_active():
        x, flat, *rest = arguments
        y, aux, _ = _TransformableLinearAdapter.apply(rest, x, *flat)  # type: ignore[no-untyped-call]
    else:
        x, flat, *rest = arguments
        y, aux = _LinearAdapter.apply(rest, x, *flat)  # type: ignore[no-untyped-call]
    return y, aux


def raw_forward_arguments(
    x: Tensor, weights: AdapterWeights, routing: Routing | None = None, **options: Any
) -> tuple[Any, ...]:
    """The positional arguments of the native ops linear_adapter and linear_adapter_forward.

    Args:
        x: as in :func:`linear_adapter`.
        weights: likewise.
        routing: likewise.
        options: the keyword arguments of :func:`linear_adapter`.

    Returns:
        The arguments, without those at the end that have their default value.
    """
    defaults = linear_adapter.__kwdefaults__ or {}
    return _arguments(x, weights, routing, *{**defaults, **options}.values())


def _flatten(weights: AdapterWeights) -> list[Tensor]:
    """The weights as the native ops take them, in one list; a stack is a list of one tensor."""
    try:
        norm_weight, norm_bias, down, up = weights
    except (TypeError, ValueError):
        raise TypeError(
            f"linear_adapter: weights: expected AdapterWeights, got {type(weights).__name__}"
        ) from None
    if isinstance(down, Tensor):
        fields = [norm_weight, norm_bias, down, up]
        stacks = [field for field in fields if isinstance(field, Tensor)]
        if len(stacks) != 4:
            raise TypeError("linear_adapter: weights: expected four tensors or four sequences")
        for name, stack, dims in zip(AdapterWeights._fields, stacks, (2, 2, 3, 3), strict=True):
            if stack.ndim != dims:
                raise RuntimeError(
                    f"linear_adapter: {name}: expected a stack of {dims} dimensions, the first of "
                    f"them A, or a list of tensors; got shape {tuple(stack.shape)}"
                )
        return stacks
    try:
        counts = [len(field) for field in weights]
    except TypeError:
        raise TypeError(
            "linear_adapter: weights: expected four tensors or four sequences"
        ) from None
    if len({*counts}) == 1:
        flat = [*norm_weight, *norm_bias, *down, *up]
        if not torch.compiler.is_compiling() and not {*map(type, flat)} <= _PLAIN:
            for i, weight in enumerate(flat):
                if not isinstance(weight, Tensor):
                    name = AdapterWeights._fields[i // counts[0]]
                    raise TypeError(
                        f"linear_adapter: {name}[{i % counts[0]}]: expected a tensor, got "
                        f"{type(weight).__name__}"
                    )
        return flat
    raise RuntimeError(
        "linear_adapter: weights: expected as many tensors of each kind, got "
        + ", ".join(f"{n} {name}" for n, name in zip(counts, AdapterWeights._fields, strict=True))
    )


def _arguments(
    x: Tensor,
    weights: AdapterWeights,
    routing: Routing | None,
    activation: str,
    norm_position: str,
    eps: float,
    dropout: float,
    stochastic_depth: float,
    stochastic_depth_mode: str,
    l2_lambda: float | Tensor,
    residual: bool,
    training: bool,
    seed: Tensor | None,
    compute_dtype: torch.dtype | None,
) -> tuple[Any, ...]:
    """Checks options, and gives the arguments that both native ops share."""
    if not isinstance(x, Tensor):
        raise TypeError(f"linear_adapter: x: expected a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise RuntimeError(f"linear_adapter: x: expected a strided tensor, got {x.layout}")
    try:
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"linear_adapter: dropout: expected a value in [0, 1], got {dropout}")
        if not 0.0 <= stochastic_depth <= 1.0:
            raise ValueError(
                "linear_adapter: stochastic_depth: expected a value in [0, 1], got "
                f"{stochastic_depth}"
            )
        if not 0.0 < eps < math.inf:
            raise ValueError(f"linear_adapter: eps: expected a finite value above 0, got {eps}")
        if not isinstance(l2_lambda, Tensor) and not 0.0 <= l2_lambda < math.inf:
            raise ValueError(
                f"linear_adapter: l2_lambda: expected a finite value >= 0, got {l2_lambda}"
            )
    except (TypeError, RuntimeError):  # the latter of tensors that are no one number
        numbers = (dropout, stochastic_depth, eps, l2_lambda)
        raise TypeError(
            "linear_adapter: dropout, stochastic_depth, eps and l2_lambda: expected numbers "
            "(l2_lambda: or a tensor), got "
            + ", ".join(f"{type(v).__name__} {v!r}" for v in numbers)
        ) from None
    if not isinstance(residual, bool) or not isinstance(training, bool):
        raise TypeError(
            "linear_adapter: residual and training: expected bool, got "
            f"{type(residual).__name__} {residual!r} and {type(training).__name__} {training!r}"
        )
    has_l2 = isinstance(l2_lambda, Tensor) or l2_lambda != 0.0
    if not residual and (stochastic_depth > 0.0 or has_l2):
        raise ValueError(
            "linear_adapter: stochastic_depth and l2_lambda are about the residual: expected 0 for "
            f"both with residual=False, got {stochastic_depth} and {l2_lambda}"
        )
    flat = _flatten(weights)
    if not training:
        dropout = stochastic_depth = 0.0
        has_l2 = False
    elif has_l2:
        l2_lambda = _l2_lambdas(l2_lambda, x, flat)
    draws = dropout > 0.0 or stochastic_depth > 0.0
    if seed is not None and not (isinstance(seed, Tensor) and seed.dtype == torch.int64):
        if isinstance(seed, Tensor):
            raise RuntimeError(f"linear_adapter: seed: expected dtype int64, got {seed.dtype}")
        raise TypeError(
            f"linear_adapter: seed: expected an int64 tensor, got {type(seed).__name__} {seed}"
        )
    if not draws:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    if routing is None:
        order = offsets = None
    else:
        if not isinstance(routing, Routing):
            raise TypeError(
                "linear_adapter: routing: expected what route() returns, got "
                f"{type(routing).__name__}"
            )
        ids, order, offsets = routing
        if not (
            isinstance(ids, Tensor) and isinstance(order, Tensor) and isinstance(offsets, Tensor)
        ):
            raise TypeError(
                "linear_adapter: routing: expected three tensors, as route() returns them, got "
                + ", ".join(type(part).__name__ for part in routing)
            )
        if order.numel() != ids.numel():
            raise RuntimeError(
                "linear_adapter: routing.order: expected as many elements as routing.ids, "
                f"{ids.numel()}, got {order.numel()}"
            )
        if ids.ndim >= max(x.ndim, 1) or x.shape[: ids.ndim] != ids.shape:
            raise RuntimeError(
                "linear_adapter: routing: expected ids of the leading dimensions of x, "
                f"{tuple(x.shape)}, got ids of shape {tuple(ids.shape)}"
            )
    operand_type = _NOT_ROUNDED
    if compute_dtype is not None or x.is_cuda:
        operand_type = _operand_type(x, flat, compute_dtype)
    options: tuple[Any, ...] = (
        _code("activation", activation, _ACTIVATIONS),
        _code("norm_position", norm_position, _NORM_POSITIONS),
        eps,
        residual,
        operand_type,
    )
    mode = _code("stochastic_depth_mode", stochastic_depth_mode, _DEPTH_MODES)
    if draws or has_l2:
        options += (dropout, stochastic_depth, mode, l2_lambda if has_l2 else None, seed)
    elif options == _DEFAULT_OPTIONS:
        options = ()
    return (x, flat, order, offsets, *options)


def _code(argument: str, name: str, codes: dict[str, int]) -> int:
    code = codes.get(name) if isinstance(name, str) else None
    if code is None:
        error = ValueError if isinstance(name, str) else TypeError
        raise error(f"linear_adapter: {argument}: expected one of {', '.join(codes)}, got {name!r}")
    return code


def _operand_type(x: Tensor, flat: list[Tensor], compute_dtype: torch.dtype | None) -> int:
    if compute_dtype is not None and not isinstance(compute_dtype, torch.dtype):
        raise TypeError(
            "linear_adapter: compute_dtype: expected None or a torch.dtype, got "
            f"{type(compute_dtype).__name__} {compute_dtype!r}"
        )
    if compute_dtype in _OPERAND_TYPES and flat and flat[2].dtype != x.dtype:
        return _OPERAND_TYPES[compute_dtype]  # of 16-bit x, too: CUDA rounds weights of float32
    if compute_dtype is None or compute_dtype == x.dtype:
        return _TF32 if x.is_cuda and x.dtype == torch.float32 and _allows_tf32() else _NOT_ROUNDED
    if compute_dtype == torch.float32 and x.dtype.itemsize == 2:
        return _FLOAT32
    if compute_dtype not in _OPERAND_TYPES:
        raise ValueError(
            "linear_adapter: compute_dtype: expected None, the dtype of x, torch.bfloat16 or "
            f"torch.float16, got {compute_dtype} with x of {x.dtype}"
        )
    return _OPERAND_TYPES[compute_dtype]


def _allows_tf32() -> bool:
    """Whether torch's settings let products of float32 on CUDA round their operands to TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# torch.compile cannot trace this, but compiles again where the setting has changed. The mark is
# what torch.compiler.assume_constant_result sets, which would import the whole compiler.
_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _num_adapters(flat: list[Tensor]) -> int:
    return flat[2].shape[0] if _is_stack(flat) else len(flat) // 4


def _is_stack(flat: list[Tensor]) -> bool:
    return len(flat) == 4 and flat[2].ndim == 3


def _l2_lambdas(l2_lambda: float | Tensor, x: Tensor, flat: list[Tensor]) -> Tensor:
    count, dtype = _num_adapters(flat), _accumulate_dtype(x)
    if not isinstance(l2_lambda, Tensor):
        if l2_lambda > torch.finfo(dtype).max:
            raise ValueError(
                f"linear_adapter: l2_lambda: expected a finite {dtype} value, got {l2_lambda}"
            )
        return torch.full((count,), l2_lambda, dtype=dtype, device=x.device)
    if not l2_lambda.is_floating_point():
        raise RuntimeError(
            f"linear_adapter: l2_lambda: expected a floating-point dtype, got {l2_lambda.dtype}"
        )
    if l2_lambda.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "linear_adapter: l2_lambda: expected a tensor without requires_grad, as it gets no "
            "gradient, got one with it"
        )
    return l2_lambda.to(dtype).expand(count) if l2_lambda.ndim == 0 else l2_lambda.to(dtype)


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("adapter_ext::route")  # type: ignore[untyped-decorator]
def _route_fake(ids: Tensor, num_adapters: int) -> tuple[Tensor, Tensor]:
    if ids.dtype != torch.int64:
        raise RuntimeError(f"route: ids: expected dtype int64, got {ids.dtype}")
    return ids.new_empty(ids.numel()), ids.new_empty(num_adapters + 1)


@torch.library.register_fake("adapter_ext::linear_adapter")  # type: ignore[untyped-decorator]
def _inference_fake(
    x: Tensor,
    weights: list[Tensor],
    order: Tensor | None = None,
    offsets: Tensor | None = None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    own = _Options(*options)
    others = {"routing.order": order, "routing.offsets": offsets}
    _check_devices(x, weights, {**others, "l2_lambda": own.l2_lambda, "seed": own.seed})
    return x.new_empty(x.shape), x.new_empty(_num_adapters(weights), dtype=_accumulate_dtype(x))


@torch.library.register_fake("adapter_ext::linear_adapter_forward")  # type: ignore[untyped-decorator]
def _forward_fake(
    x: Tensor,
    weights: list[Tensor],
    order: Tensor | None = None,
    offsets: Tensor | None = None,
    *options: Any,
) -> tuple[Tensor, ...]:
    rows = math.prod(x.shape[:-1])
    bottleneck = max((down.shape[-2] for down in _split(weights)[2]), default=0)
    return (
        *_inference_fake(x, weights, order, offsets, *options),
        x.new_empty(rows * (bottleneck + 2), dtype=_accumulate_dtype(x)),
    )


def _check_tensors(
    x: Tensor,
    flat: list[Tensor],
    order: Tensor | None = None,
    offsets: Tensor | None = None,
    *rest: Any,
) -> None:
    """What the native ops check themselves, where the reference takes their place."""
    options = _Options(*rest)
    others = {"routing.order": order, "routing.offsets": offsets}
    _check_devices(x, flat, {**others, "l2_lambda": options.l2_lambda, "seed": options.seed})

    def check(name: str, tensor: Tensor, shape: list[int], *dtypes: torch.dtype) -> None:
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise RuntimeError(
                f"linear_adapter: {name}: expected dtype {expected}, got {tensor.dtype}"
            )
        if list(tensor.shape) != shape:
            raise RuntimeError(
                f"linear_adapter: {name}: expected shape {shape}, got {list(tensor.shape)}"
            )

    check("x", x, [*x.shape], torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise RuntimeError(
            f"linear_adapter: x: expected shape [..., D] with D >= 1, got {list(x.shape)}"
        )
    adapters, width, stack = _num_adapters(flat), x.shape[-1], _is_stack(flat)
    norm_weights, norm_biases, downs, ups = _split(flat)
    every = [adapters] if stack else []
    for i, down in enumerate(downs):
        at = "" if stack else f"[{i}]"
        dtypes = [downs[0].dtype] if downs[0].dtype == torch.float32 else [x.dtype]
        bottleneck = down.shape[-2] if down.ndim == 2 + stack else 0
        if bottleneck < 1:
            raise RuntimeError(
                f"linear_adapter: down{at}: expected {2 + stack} dimensions and a bottleneck >= 1, "
                f"got shape {list(down.shape)}"
            )
        check(f"down{at}", down, [*every, bottleneck, width], *dtypes)
        check(f"up{at}", ups[i], [*every, width, bottleneck], *dtypes)
        check(f"norm_weight{at}", norm_weights[i], [*every, width], *dtypes)
        check(f"norm_bias{at}", norm_biases[i], [*every, width], *dtypes)
    samples = x.shape[0] if x.ndim > 1 else 1
    if order is not None and offsets is not None:
        check("routing.order", order, [order.numel()], torch.int64)
        check("routing.offsets", offsets, [*offsets.shape], torch.int64)
        samples = order.numel()
    if adapters != (1 if offsets is None else offsets.numel() - 1):
        made = "none" if offsets is None else f"one made for {offsets.numel() - 1}"
        raise RuntimeError(
            f"linear_adapter: routing: expected one made for {adapters} adapters (the weights'), "
            f"got {made}"
        )
    rows = math.prod(x.shape[:-1])
    if rows % samples if samples else rows:
        raise RuntimeError(
            f"linear_adapter: routing: expected ids for the leading dimensions of x, "
            f"{list(x.shape)}, got {samples} ids"
        )
    if options.seed is not None and options.seed.numel() != 1:
        raise RuntimeError(
            f"linear_adapter: seed: expected one element, got shape {list(options.seed.shape)}"
        )
    if options.l2_lambda is not None:
        check("l2_lambda", options.l2_lambda, [adapters], _accumulate_dtype(x))


def _check_devices(x: Tensor, weights: list[Tensor], others: dict[str, Tensor | None]) -> None:
    """What the native ops check themselves, where another device's fake kernel was called."""
    count = len(weights) // 4
    named = {f"{AdapterWeights._fields[i // count]}[{i % count}]": w for i, w in enumerate(weights)}
    for name, tensor in {**named, **others}.items():
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(
                f"linear_adapter: {name}: expected a tensor on the device of x, {x.device}, got "
                f"one on {tensor.device}"
            )


@torch.library.register_fake("adapter_ext::linear_adapter_backward")  # type: ignore[untyped-decorator]
def _backward_fake(
    grad_y: Tensor,
    grad_aux: Tensor | None,
    x: Tensor,
    weights: list[Tensor],
    order: Tensor | None,
    offsets: Tensor | None,
    saved: Tensor,
    needed: list[int],
    *options: Any,
) -> list[Tensor]:
    own = _Options(*options)
    others = {"routing.order": order, "routing.offsets": offsets, "saved": saved}
    others |= {"grad_y": grad_y, "grad_aux": grad_aux}
    _check_devices(x, weights, {**others, "l2_lambda": own.l2_lambda, "seed": own.seed})
    return [t.new_empty(t.shape) for t, flag in zip([x, *weights], needed, strict=True) if flag]


def _one_by_one(op: torch._ops.OpOverload) -> Any:
    """The op under torch.vmap: called for each element of the mapped dimension."""

    def element(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, (list, tuple)) and dim is not None:
            return [element(v, d, i) for v, d in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, i).contiguous()

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if not info.batch_size:
            raise RuntimeError(f"{op}: torch.vmap over a dimension of size 0 is not supported")
        results = [
            op(*(element(value, dim, i) for value, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = [torch.stack(tensors) for tensors in zip(*results, strict=True)]
        return type(results[0])(stacked), type(results[0])([0] * len(stacked))

    return rule


for _op in (_route, _inference, _forward, _backward):
    torch.library.register_vmap(f"adapter_ext::{_op._opname}", _one_by_one(_op))


class _Call(NamedTuple):
    """What the backward needs of a call of the forward."""

    x: Tensor
    weights: list[Tensor]  # flat
    rest: list[Any]  # order, offsets and as many options as were passed
    saved: Tensor


def _gradients(
    call: _Call, grad_y: Tensor | None, grad_aux: Tensor | None, needed: Sequence[bool]
) -> Sequence[Tensor | None]:
    """The gradients of x and the weights, None where not needed."""
    if grad_y is None:
        grad_y = torch.zeros_like(call.x)
    x, weights, rest, saved = call
    flags = [int(flag) for flag in needed]
    if forward_ad._current_level >= 0:  # so it is for the native backward
        results = _reference_gradients(flags, rest, grad_y, grad_aux, x, *weights)
    elif torch.is_grad_enabled():  # the backward itself is to be differentiated
        results = _Gradients.apply(flags, rest, saved, grad_y, grad_aux, x, *weights)  # type: ignore[no-untyped-call]
    else:
        order, offsets, *options = rest
        results = _backward(grad_y, grad_aux, x, weights, order, offsets, saved, flags, *options)
    if len(results) == len(flags):
        return cast("Sequence[Tensor]", results)
    remaining = iter(results)
    return [next(remaining) if flag else None for flag in flags]


def _split(flat: list[Tensor]) -> list[list[Tensor]]:
    """norm_weight, norm_bias, down and up of a flat list."""
    count = len(flat) // 4
    return [flat[i * count : (i + 1) * count] for i in range(4)]


def _by_reference(
    x: Tensor,
    weights: list[Tensor],
    order: Tensor | None = None,
    offsets: Tensor | None = None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """The native ops' arguments, computed by the reference."""
    stacked = _is_stack(weights)
    options = _Options(*rest)
    compute_dtype = None
    if options.compute_type in _OPERAND_TYPES.values():
        compute_dtype = _key_of(options.compute_type, _OPERAND_TYPES)
        if compute_dtype == x.dtype and not x.is_cuda:
            compute_dtype = None  # the CPU does not round weights of float32 to the type of x
    with torch.autocast(x.device.type, enabled=False):
        return reference.linear_adapter(
            x,
            AdapterWeights(*(field[0] if stacked else field for field in _split(weights))),
            _routing_from(order, offsets),
            activation=_key_of(options.activation, _ACTIVATIONS),
            norm_position=_key_of(options.norm_position, _NORM_POSITIONS),
            eps=options.eps,
            dropout=options.dropout,
            stochastic_depth=options.stochastic_depth,
            stochastic_depth_mode=_key_of(options.depth_mode, _DEPTH_MODES),
            l2_lambda=0.0 if options.l2_lambda is None else options.l2_lambda,
            residual=options.residual,
            training=True,
            seed=options.seed,
            compute_dtype=compute_dtype,
        )


def _reference_gradients(
    flags: list[int],
    rest: list[Any],
    grad_y: Tensor,
    grad_aux: Tensor | None,
    x: Tensor,
    *weights: Tensor,
) -> tuple[Tensor, ...]:
    """What the native backward computes, by the reference."""
    if grad_aux is None:
        grad_aux = x.new_zeros(_num_adapters([*weights]), dtype=_accumulate_dtype(x))
    # Autocast around a backward would round products that the forward did not round.
    with torch.autocast(x.device.type, enabled=False):
        _, backward = _vjp(lambda x, *w: _by_reference(x, list(w), *rest), x, *weights)
        every = backward((grad_y, grad_aux))
    return tuple(gradient for gradient, flag in zip(every, flags, strict=True) if flag)


def _key_of(code: int, codes: Mapping[_Key, int]) -> _Key:
    return next(key for key, value in codes.items() if value == code)


def _routing_from(order: Tensor | None, offsets: Tensor | None) -> Routing | None:
    if order is None or offsets is None:
        return None
    adapters = torch.arange(offsets.numel() - 1, device=order.device)
    ids = torch.full_like(order, -1)
    routed = adapters.repeat_interleave(offsets.diff())
    ids[order[: routed.numel()]] = routed
    return Routing(ids, order, offsets)


class _LinearAdapter(torch.autograd.Function):
    """Eager mode's way to the native ops."""

    @staticmethod
    def forward(ctx: Any, rest: list[Any], x: Tensor, *weights: Tensor) -> Any:
        if True not in ctx.needs_input_grad:
            return _inference(x, list(weights), *rest)
        with torch._C._AutoDispatchBelowAutograd():
            y, aux, saved = _forward(x, list(weights), *rest)
        _save(ctx, _Call(x, list(weights), rest, saved))
        return y, aux

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_aux: Tensor | None) -> Any:
        return None, *_gradients(_saved(ctx), grad_y, grad_aux, ctx.needs_input_grad[1:])


class _TransformableLinearAdapter(torch.autograd.Function):
    """The same for torch.func and torch.vmap; a ``setup_context`` costs each call 20 us."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rest: list[Any], x: Tensor, *weights: Tensor) -> Any:
        return _forward(x, list(weights), *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rest, x, *weights = inputs
        ctx.mark_non_differentiable(output[2])
        _save(ctx, _Call(x, weights, rest, output[2]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, *_gradients(_saved(ctx), grads[0], grads[1], ctx.needs_input_grad[1:])


def _save(ctx: Any, call: _Call) -> None:
    x, weights, rest, saved = call
    ctx.tensor_positions = [i for i, value in enumerate(rest) if isinstance(value, Tensor)]
    ctx.rest = [None if isinstance(value, Tensor) else value for value in rest]
    ctx.save_for_backward(x, saved, *weights, *(rest[i] for i in ctx.tensor_positions))
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> _Call:
    x, saved, *tensors = ctx.saved_tensors
    rest = list(ctx.rest)
    for i in reversed(ctx.tensor_positions):
        rest[i] = tensors.pop()
    return _Call(x, tensors, rest, saved)


class _Gradients(torch.autograd.Function):
    """The native backward; its own gradients are those of the reference's, of any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        flags: list[int],
        rest: list[Any],
        saved: Tensor,
        grad_y: Tensor,
        grad_aux: Tensor | None,
        x: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        order, offsets, *options = rest
        return tuple(
            _backward(grad_y, grad_aux, x, list(weights), order, offsets, saved, flags, *options)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.flags, rest, saved, grad_y, grad_aux, x, *weights = inputs
        _save(ctx, _Call(x, weights, [grad_y, grad_aux, *rest], saved))
        ctx.set_materialize_grads(True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weights, (grad_y, given_aux, *rest), _ = _saved(ctx)
        grad_aux = given_aux
        if given_aux is None:
            grad_aux = x.new_zeros(_num_adapters(weights), dtype=_accumulate_dtype(x))
        gradients = functools.partial(_reference_gradients, ctx.flags, rest)
        with torch.autocast(x.device.type, enabled=False):
            _, backward = _vjp(gradients, grad_y, grad_aux, x, *weights)
            of_y, of_aux, *others = backward(grads)
        return None, None, None, of_y, None if given_aux is None else of_aux, *others


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, *rest = inputs
    _save(ctx, _Call(x, weights, rest, output[2]))


def _registered_backward(ctx: Any, *grads: Tensor | None) -> Any:
    needs_x, needs_weights, *others = ctx.needs_input_grad
    grad_x, *rest = _gradients(_saved(ctx), grads[0], grads[1], [needs_x, *needs_weights])
    return (grad_x, rest, *(None for _ in others))


torch.library.register_autograd(
    "adapter_ext::linear_adapter_forward", _registered_backward, setup_context=_setup_context
)
