"""The CUDA library and the ops on CUDA tensors, as far as no GPU is needed.

The tensors are fake: they have a shape, a dtype and a CUDA device, but no data. PyTorch's autograd
engine asks for the device even so: here the backward is called as the op that it is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_testing import Case, map_weights
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import adapter_ext
from adapter_ext import _C, AdapterWeights, Routing, _library, doctor

native = torch.ops.adapter_ext
OPS = ("route", "linear_adapter", "linear_adapter_forward", "linear_adapter_backward")
TF32 = 4
COMPUTE_TYPE = 8  # the position of compute_type in the arguments of the native forward ops

cpu_torch = torch.version.cuda is None
needs_cuda_torch = pytest.mark.skipif(cpu_torch, reason="torch is a CPU build")
needs_library = pytest.mark.skipif(not _C.cuda_compiler, reason="the CUDA library was not built")


def has_cuda_kernel(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"adapter_ext::{op}", "CUDA")


@needs_cuda_torch
@needs_library
def test_cuda_torch_loads_the_library() -> None:
    assert str(_library.CUDA_LIBRARY) in torch.ops.loaded_libraries
    assert all(has_cuda_kernel(op) for op in OPS)
    fact = doctor.report()["CUDA library"]
    assert fact.endswith(f"{_library.CUDA_LIBRARY}, loaded")


@pytest.mark.skipif(not cpu_torch, reason="torch is a CUDA build")
@needs_library
def test_cpu_torch_does_not_load_the_library() -> None:
    assert _library.CPU_LIBRARY.with_name("libadapter_ext_cuda.so").exists()
    assert _library.CUDA_LIBRARY is None
    assert not any(has_cuda_kernel(op) for op in OPS)
    assert doctor.report()["CUDA library"].endswith("not loaded: torch is a CPU build")


@dataclasses.dataclass
class FakeCall:
    """A call whose tensors are fake."""

    mode: FakeTensorMode
    x: Tensor
    weights: AdapterWeights
    routing: Routing | None
    options: dict[str, Any]
    grad_y: Tensor
    grad_aux: Tensor

    @classmethod
    def of(cls, case: Case, device: str = "cuda:0") -> FakeCall:
        """A case's call, on CUDA."""
        call = case.build()
        mode = FakeTensorMode()

        def fake(tensor: Tensor) -> Tensor:
            return torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )

        with mode:
            return cls(
                mode,
                fake(call.x),
                map_weights(fake, call.weights),
                None if call.routing is None else Routing(*map(fake, call.routing)),
                {k: fake(v) if isinstance(v, Tensor) else v for k, v in call.options.items()},
                fake(call.dy),
                fake(call.daux),
            )

    def forward(
        self, function: Callable[..., tuple[Tensor, Tensor]] = adapter_ext.linear_adapter
    ) -> tuple[Tensor, Tensor]:
        with self.mode:
            return function(self.x, self.weights, self.routing, **self.options)

    def raw_arguments(self) -> tuple[Any, ...]:
        with self.mode:
            return adapter_ext.ops.raw_forward_arguments(
                self.x, self.weights, self.routing, **self.options
            )


ALL_OPTIONS = {"training": True, "dropout": 0.2, "stochastic_depth": 0.4, "l2_lambda": "tensor"}
CASES = {
    "lists": Case(),
    "stacked": Case(bottlenecks=(4, 4, 4), stacked=True),
    "one-adapter": Case(bottlenecks=(5,), routing="none"),
    "all-options": Case(options=ALL_OPTIONS),
    "own-seed": Case(options={**ALL_OPTIONS, "l2_lambda": 0.1, "seed": None}),
    "bfloat16": Case(dtype=torch.bfloat16, weight_dtype=torch.float32),
    "float64": Case(dtype=torch.float64),
    "no-rows": Case(shape=(0, 16)),
    "transposed": Case(layout="transposed"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def description(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, str(tensor.device), tensor.is_contiguous()


@needs_cuda_torch
def test_route() -> None:
    with FakeTensorMode():
        ids = torch.empty(4, 3, dtype=torch.int64, device="cuda:1")
        _, order, offsets = adapter_ext.route(ids, 5)
    assert description(order) == ((12,), torch.int64, "cuda:1", True)
    assert description(offsets) == ((6,), torch.int64, "cuda:1", True)


@needs_cuda_torch
@every_case
@pytest.mark.parametrize("grad", [True, False])
def test_results(case: Case, grad: bool) -> None:
    call = FakeCall.of(case)
    call.x.requires_grad_(grad)
    y, aux = call.forward()
    assert y.requires_grad == grad
    accumulate_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert description(y) == (case.shape, case.dtype, "cuda:0", True)
    assert description(aux) == ((len(case.bottlenecks),), accumulate_dtype, "cuda:0", True)


@needs_cuda_torch
@every_case
def test_gradients(case: Case) -> None:
    call = FakeCall.of(case)
    x, weights, order, offsets, *options = call.raw_arguments()
    with call.mode:
        _, _, saved = native.linear_adapter_forward(x, weights, order, offsets, *options)
        for needed in ([1] * (1 + len(weights)), [0, 1, *[0] * (len(weights) - 1)]):
            gradients = native.linear_adapter_backward(
                call.grad_y,
                call.grad_aux,
                x,
                weights,
                order,
                offsets,
                saved,
                needed,
                *options,
            )
            wanted = [t for t, flag in zip([x, *weights], needed, strict=True) if flag]
            expected = [(tuple(t.shape), t.dtype, "cuda:0", True) for t in wanted]
            assert [description(gradient) for gradient in gradients] == expected


@needs_cuda_torch
@pytest.mark.parametrize("argument", ["x", "norm_bias[1]", "routing.order", "routing.offsets"])
def test_tensor_on_another_device(argument: str) -> None:
    call = FakeCall.of(Case())

    def elsewhere(tensor: Tensor) -> Tensor:
        with call.mode:
            return torch.empty_like(tensor, device="cpu" if argument == "x" else "cuda:1")

    assert call.routing is not None
    if argument == "x":
        call.x = elsewhere(call.x)
    elif argument == "norm_bias[1]":
        first, second, third = call.weights.norm_bias
        call.weights = call.weights._replace(norm_bias=[first, elsewhere(second), third])
    else:
        name = argument.removeprefix("routing.")
        moved = elsewhere(getattr(call.routing, name))
        call.routing = call.routing._replace(**{name: moved})
    named, x, other = argument, "cuda:0", "cuda:1"
    if argument == "x":  # it is the weights that are elsewhere
        named, x, other = "norm_weight[0]", "cpu", "cuda:0"
    message = f"{named}: expected a tensor on the device of x, {x}, got one on {other}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call.forward()


def test_tf32_is_for_cuda_alone() -> None:
    call = Case().build()
    arguments = list(
        adapter_ext.ops.raw_forward_arguments(call.x, call.weights, call.routing, eps=0.1)
    )
    arguments[COMPUTE_TYPE] = TF32
    with pytest.raises(RuntimeError, match=r"compute_type: expected TF32 .* on a CUDA device"):
        native.linear_adapter(*arguments)
    arguments[COMPUTE_TYPE] = TF32 + 1
    with pytest.raises(RuntimeError, match=r"compute_type: expected a code in \[-1, 4\], got 5"):
        native.linear_adapter(*arguments)


SETTINGS: dict[str, tuple[Callable[[Any], None], bool]] = {
    "default": (lambda settings: None, False),
    "tf32": (lambda settings: setattr(settings, "fp32_precision", "tf32"), True),
    "ieee": (lambda settings: setattr(settings, "fp32_precision", "ieee"), False),
    "allow_tf32": (lambda settings: setattr(settings, "allow_tf32", True), True),
    "high": (lambda settings: torch.set_float32_matmul_precision("high"), True),
    "highest": (lambda settings: torch.set_float32_matmul_precision("highest"), False),
}


def compute_type(call: FakeCall) -> int:
    """What the op passes for it, -1 by default."""
    arguments = call.raw_arguments()
    return int(arguments[COMPUTE_TYPE]) if len(arguments) > COMPUTE_TYPE else -1


@needs_cuda_torch
@pytest.mark.parametrize(("change", "allowed"), SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_tf32_follows_torch(
    matmul_settings: Any,
    change: Callable[[Any], None],
    allowed: bool,
    dtype: torch.dtype | None,
) -> None:
    change(matmul_settings)
    call = FakeCall.of(Case(options={"compute_dtype": dtype}))
    assert compute_type(call) == (TF32 if allowed else -1)


@needs_cuda_torch
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(options={"compute_dtype": torch.bfloat16}), 2),
        (Case(dtype=torch.bfloat16), -1),
        (Case(dtype=torch.bfloat16, options={"compute_dtype": torch.float32}), 1),
        (Case(dtype=torch.float64), -1),
    ],
    ids=str,
)
def test_tf32_is_for_float32_alone(matmul_settings: Any, case: Case, expected: int) -> None:
    matmul_settings.fp32_precision = "tf32"
    assert compute_type(FakeCall.of(case)) == expected


def test_tf32_does_not_concern_the_cpu(matmul_settings: Any) -> None:
    matmul_settings.fp32_precision = "tf32"
    call = Case().build()
    arguments = adapter_ext.ops.raw_forward_arguments(call.x, call.weights, call.routing, eps=0.1)
    assert arguments[COMPUTE_TYPE] == -1


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@needs_cuda_torch
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", [CASES["all-options"], CASES["stacked"]], ids=str)
def test_compile(case: Case, grad: bool) -> None:
    """The forward in one graph without breaks."""
    compiled = torch.compile(adapter_ext.linear_adapter, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        y, aux = FakeCall.of(case).forward(compiled)
    assert description(y) == (case.shape, torch.float32, "cuda:0", True)
    assert description(aux) == ((3,), torch.float32, "cuda:0", True)


@needs_cuda_torch
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_code_follows_the_setting_of_tf32(matmul_settings: Any) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(adapter_ext.linear_adapter, fullgraph=True, backend=backend)
    call = FakeCall.of(CASES["all-options"])
    for precision, expected in (("ieee", -1), ("tf32", TF32)):
        matmul_settings.fp32_precision = precision
        call.forward(compiled)
        op = native.linear_adapter_forward.default
        calls = [node for node in graphs[-1].graph.nodes if node.target is op]
        assert [node.args[COMPUTE_TYPE] for node in calls] == [expected]
