"""What the op tests share: descriptions of calls, their results, and how results are compared.

Tensors are made on torch's default device, from numbers drawn on the CPU: the same ones everywhere.
The reference runs on the CPU.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import adapter_ext
from adapter_ext import _C, AdapterWeights, Routing, reference

# dtype → (rtol, atol). An element may differ from the float64 reference by rtol of its own
# magnitude plus atol of the largest magnitude in its tensor, or of one, which is the magnitude of x
# and of the upstream gradients.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 3e-3),
    torch.bfloat16: (1e-2, 2e-2),
}

# Tensor cores round all operands of 16-bit products to 16 bits, gradients too, and so do the CPU
# levels that multiply in bfloat16; others do not. Behind a post norm of one bottleneck element
# gradients are small differences of them: up to 3.6 times the tolerance was seen there.
TENSOR_CORE_FACTOR = 4.0

ACTIVATIONS = tuple(reference.ACTIVATIONS)
# Where their derivatives jump. A product of rounded operands may land on the other side.
KINKS = {"relu": (0.0,), "selu": (0.0,), "hardtanh": (-1.0, 1.0)}
KINK_MARGIN = 0.03

# Whether the CUDA kernels run the ops; --backend and tests of the CUDA kernels set it.
tensor_cores = False
# Whether the CPU kernels multiply in bfloat16; those of other processors (tests/aarch64) do not.
cpu_rounds_bfloat16 = _C.cpu_capability().endswith("_bf16")

Results = dict[str, Tensor]


def on_default_device(tensor: Tensor) -> Tensor:
    """The tensor where torch makes new ones."""
    return tensor.to(torch.get_default_device())


def make_weights(
    bottlenecks: Sequence[int],
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    stacked: bool = False,
    generator: torch.Generator | None = None,
) -> AdapterWeights:
    """Random weights, scaled so that activations stay of order one; none of them is zero."""

    def randn(*shape: int) -> Tensor:
        return on_default_device(
            torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
        )

    lists = AdapterWeights(
        norm_weight=[1.0 + 0.3 * randn(hidden_size) for _ in bottlenecks],
        norm_bias=[0.5 * randn(hidden_size) for _ in bottlenecks],
        down=[randn(r, hidden_size) / hidden_size**0.5 for r in bottlenecks],
        up=[randn(hidden_size, r) / r**0.5 for r in bottlenecks],
    )
    weights = map_weights(lambda w: w.to(dtype), lists)
    return stack(weights, hidden_size, dtype) if stacked else weights


def map_weights(function: Callable[[Tensor], Tensor], weights: AdapterWeights) -> AdapterWeights:
    """The weights with every tensor replaced by the function of it."""
    return AdapterWeights(
        *(
            function(field) if isinstance(field, Tensor) else [function(w) for w in field]
            for field in weights
        )
    )


def replace(weights: AdapterWeights, **fields: Tensor | Sequence[Tensor]) -> AdapterWeights:
    """The weights with some fields replaced."""
    return AdapterWeights(**{**weights._asdict(), **fields})


def stack(weights: AdapterWeights, hidden_size: int, dtype: torch.dtype) -> AdapterWeights:
    """The same weights, each field one tensor [A, ...]."""
    if weights.num_adapters:
        return AdapterWeights(*(torch.stack(list(field)) for field in weights))
    shapes = ((hidden_size,), (hidden_size,), (1, hidden_size), (hidden_size, 1))
    return AdapterWeights(*(torch.empty(0, *shape, dtype=dtype) for shape in shapes))


def named_tensors(weights: AdapterWeights) -> dict[str, Tensor]:
    """Every weight tensor by name: ``down`` where stacked, ``down[2]`` in a list."""
    named = {}
    for name, field in zip(weights._fields, weights, strict=True):
        if isinstance(field, Tensor):
            named[name] = field
        else:
            named.update({f"{name}[{a}]": w for a, w in enumerate(field)})
    return named


ROUTINGS = ("none", "sample", "row", "untouched", "all_untouched", "unused", "one")


def make_ids(
    kind: str, leading: Sequence[int], num_adapters: int, generator: torch.Generator
) -> Tensor | None:
    """Routing ids of a kind for an x of these leading dimensions."""

    def random(low: int, high: int, shape: Sequence[int]) -> Tensor:
        ids = torch.randint(low, high, tuple(shape), generator=generator, device="cpu")
        return on_default_device(ids)

    rows = tuple(leading)
    match kind:
        case "none":
            return None
        case "sample":  # every sample (first dimension) its own adapter
            return random(0, num_adapters, rows[:1])
        case "row":
            return random(0, num_adapters, rows)
        case "untouched":  # some rows without an adapter
            return random(-1, num_adapters, rows)
        case "all_untouched":
            return torch.full(rows, -1)
        case "unused":  # adapter 0 has no row
            return random(1, num_adapters, rows)
        case "one":  # the last adapter has all rows
            return torch.full(rows, num_adapters - 1)
    raise ValueError(kind)


def make_layout(x: Tensor, layout: str) -> Tensor:
    """A tensor of x's shape in the given layout; its values are x's unless expanded."""
    match layout:
        case "contiguous":
            return x.contiguous()
        case "transposed":  # the last dimension is not contiguous
            return x.mT.contiguous().mT
        case "sliced":  # rows further apart than D, storage offset
            wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
            wide[..., 2:-1] = x
            return wide[..., 2:-1]
        case "strided":  # every other element
            wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
            wide[..., ::2] = x
            return wide[..., ::2]
        case "permuted":  # dense, but rows are not in order of memory
            return x.transpose(0, -2).contiguous().transpose(0, -2)
        case "expanded":  # one row, seen many times
            return x.reshape(-1, x.shape[-1])[0].expand(x.shape)
    raise ValueError(layout)


LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "permuted", "expanded")


def rows_near_kinks(
    x: Tensor, weights: AdapterWeights, ids: Tensor | None, options: Mapping[str, Any]
) -> Tensor:
    """Indices of the rows in which an input of the activation is almost at one of its kinks."""
    kinks = KINKS.get(options.get("activation", "swish"), ())
    hidden_size = x.shape[-1]
    rows = x.double().reshape(-1, hidden_size)
    near = torch.zeros(rows.shape[0], dtype=torch.bool, device=x.device)
    if kinks and x.numel():
        ids = ids if ids is not None else torch.zeros(1, dtype=torch.int64, device=x.device)
        row_ids = ids.flatten().repeat_interleave(rows.shape[0] // ids.numel())
        for a in range(weights.num_adapters):
            norm_weight, norm_bias, down = (field[a].double() for field in weights[:3])
            if options.get("norm_position", "pre") == "pre":
                n = F.layer_norm(rows, (hidden_size,), norm_weight, norm_bias, options["eps"])
            else:
                n = rows
            distances = torch.stack([(n @ down.T - kink).abs() for kink in kinks])
            near |= (row_ids == a) & (distances < KINK_MARGIN).any(dim=0).any(dim=-1)
    return near.nonzero().squeeze(1)


@dataclasses.dataclass
class Call:
    """Arguments of linear_adapter and the upstream gradients of its results."""

    x: Tensor
    weights: AdapterWeights
    routing: Routing | None
    options: dict[str, Any]
    dy: Tensor
    daux: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """Everything that can have a gradient, by name."""
        return {"x": self.x, **named_tensors(self.weights)}

    def requires_grad_(self, names: Sequence[str] | None = None) -> Call:
        """Requires gradients of the named inputs, or of all."""
        for name, tensor in self.inputs().items():
            tensor.requires_grad_(names is None or name in names)
        return self

    def forward(
        self, function: Callable[..., tuple[Tensor, Tensor]] = adapter_ext.linear_adapter
    ) -> tuple[Tensor, Tensor]:
        return function(self.x, self.weights, self.routing, **self.options)

    def results(
        self,
        function: Callable[..., tuple[Tensor, Tensor]] = adapter_ext.linear_adapter,
        **grad_options: bool,
    ) -> Results:
        """y, aux and the gradient of every input that requires one."""
        y, aux = self.forward(function)
        wanted = {name: t for name, t in self.inputs().items() if t.requires_grad}
        # Outside training the reference's aux is a constant.
        upstream = [(out, d) for out, d in ((y, self.dy), (aux, self.daux)) if out.requires_grad]
        outputs, gradients = zip(*upstream, strict=True)
        grads = torch.autograd.grad(outputs, list(wanted.values()), gradients, **grad_options)
        named = {f"grad of {name}": g for name, g in zip(wanted, grads, strict=True)}
        return {"y": y.detach(), "aux": aux.detach(), **named}

    def upcast(self) -> Call:
        """The same call on the same values in float64, on the CPU."""

        def double(t: Tensor) -> Tensor:
            return t.detach().cpu().double().requires_grad_(t.requires_grad)

        def on_cpu(option: Any) -> Any:
            return option.cpu() if isinstance(option, Tensor) else option

        return dataclasses.replace(
            self,
            x=double(self.x),
            weights=map_weights(double, self.weights),
            routing=None if self.routing is None else Routing(*map(on_cpu, self.routing)),
            options={name: on_cpu(option) for name, option in self.options.items()},
            dy=double(self.dy),
            daux=double(self.daux),
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """A call by description: shapes, types and options. Its data follow from the description."""

    shape: tuple[int, ...] = (4, 3, 16)
    bottlenecks: tuple[int, ...] = (5, 1, 8)
    stacked: bool = False
    routing: str = "row"
    layout: str = "contiguous"
    upstream: str = "contiguous"
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != (field.default_factory() if field.name == "options" else field.default):  # type: ignore[misc]
                parts.append(f"{field.name}={value}")
        return ",".join(parts).replace("torch.", "").replace(" ", "") or "default"

    def build(self) -> Call:
        generator = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))

        def randn(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            normal = torch.randn(
                tuple(shape), dtype=torch.float64, generator=generator, device="cpu"
            )
            return on_default_device(normal.to(dtype))

        *leading, hidden_size = self.shape
        weights = make_weights(
            self.bottlenecks,
            hidden_size,
            dtype=self.weight_dtype or self.dtype,
            stacked=self.stacked,
            generator=generator,
        )
        ids = make_ids(self.routing, leading, len(self.bottlenecks), generator)
        # A mean of x that is not near zero shows where the norm's cancellations are careless.
        x = randn(self.shape, self.dtype) + 1.0
        options = dict(self.options)
        if options.get("l2_lambda") == "tensor":
            options["l2_lambda"] = torch.linspace(0.0, 0.5, len(self.bottlenecks))
        # LayerNorm of one column, or (post) of multiples of one fixed vector, depends on its input
        # through eps alone: with a small one, gradients are differences of nearly equal numbers.
        options.setdefault("eps", 0.05)
        for _ in range(100):  # a norm of one column is a constant, wherever it is
            near = rows_near_kinks(x, weights, ids, options)
            if not near.numel():
                break
            x.view(-1, hidden_size)[near] = randn((near.numel(), hidden_size), self.dtype) + 1.0
        if options.get("training"):
            seed = torch.randint(2**63 - 1, (), generator=generator, device="cpu")
            options.setdefault("seed", on_default_device(seed))
        call = Call(
            x=make_layout(x, self.layout),
            weights=weights,
            routing=None if ids is None else adapter_ext.route(ids, len(self.bottlenecks)),
            options=options,
            dy=make_layout(randn(self.shape, self.dtype), self.upstream),
            daux=randn([len(self.bottlenecks)], torch.promote_types(self.dtype, torch.float32)),
        )
        return call.requires_grad_()


def tolerance(*dtypes: torch.dtype | None) -> tuple[float, float]:
    """The tolerance of a result of the first type: that of the least precise of these types."""
    rtol, atol = max(TOLERANCES[dtype] for dtype in dtypes if dtype is not None)
    if tensor_cores:
        rounded = rtol > TOLERANCES[torch.float32][0]
    else:
        rounded = cpu_rounds_bfloat16 and dtypes[0] == torch.bfloat16
    return rtol, (TENSOR_CORE_FACTOR if rounded else 1.0) * atol


def excess(actual: Tensor, expected: Tensor, rtol: float, atol: float) -> float:
    """The largest error in units of what is allowed; infinite where it is NaN."""
    actual = actual.to(expected)  # its device and dtype
    if expected.numel() == 0:
        return 0.0
    magnitude = expected.abs()
    allowed = rtol * magnitude + atol * magnitude.max().clamp(min=1.0)
    error = (actual - expected).abs()
    ratio = torch.where(error == 0.0, 0.0, error / allowed)
    return float(ratio.nan_to_num(nan=torch.inf).max())


def assert_results_close(actual: Results, expected: Results, *dtypes: torch.dtype | None) -> None:
    """Each result has the reference's shape and, within the tolerance, its values."""
    assert actual.keys() == expected.keys()
    wrong = []
    for name, value in actual.items():
        assert value.shape == expected[name].shape, name
        error = excess(value, expected[name], *tolerance(value.dtype, *dtypes))
        if error > 1.0:
            wrong.append(f"{name}: error {error:.3g} times what is allowed")
    assert not wrong, "; ".join(wrong)


def check(case: Case) -> None:
    """The op agrees with the reference in float64: y, aux, and every gradient."""
    call = case.build()
    actual = call.results()
    assert actual["y"].dtype == case.dtype
    for name, tensor in call.inputs().items():
        assert actual[f"grad of {name}"].dtype == tensor.dtype, name
    # The reference never reads a bank of no adapters; the op has a (empty) gradient for it.
    expected = call.upcast().results(reference.linear_adapter, materialize_grads=True)
    assert_results_close(actual, expected, case.dtype, case.options.get("compute_dtype"))


class Recorder(TorchDispatchMode):
    """Records arguments, keyword arguments and result of one op whenever it runs."""

    def __init__(self, op: torch._ops.OpOverload) -> None:
        super().__init__()
        self.op = op
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is self.op:
            self.calls.append((args, kwargs, result))
        return result
