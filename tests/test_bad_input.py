"""What a user can get wrong: each gives an error that names the argument, expected and got."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from op_testing import make_weights, replace
from torch import Tensor
from torch.autograd import forward_ad

import adapter_ext
from adapter_ext import AdapterWeights

D = 16
A = 3


def weights(**fields: Any) -> AdapterWeights:
    """Valid ragged lists (r = 5, 1, 8), with some fields replaced."""
    return replace(make_weights([5, 1, 8], D), **fields)


def stacked(**fields: Any) -> AdapterWeights:
    """Valid stacked weights (r = 4), with some fields replaced."""
    return replace(make_weights([4] * A, D, stacked=True), **fields)


def with_one(name: str, tensor: Tensor) -> AdapterWeights:
    """Valid lists but for adapter 1's tensor of this name."""
    lists = weights()
    field = list(getattr(lists, name))
    field[1] = tensor
    return replace(lists, **{name: field})


def routing(*shape: int, num_adapters: int = A) -> adapter_ext.Routing:
    return adapter_ext.route(torch.zeros(shape, dtype=torch.int64), num_adapters)


def call(**arguments: Any) -> None:
    """linear_adapter on a valid x [4, 2, 16], but for these arguments."""
    valid = {"x": torch.randn(4, 2, D), "weights": weights(), "routing": routing(4)}
    adapter_ext.linear_adapter(**{**valid, **arguments})


def test_the_unchanged_call_is_valid() -> None:
    call()
    call(weights=stacked())
    call(**OPTIONS)


# What options need before a wrong one among them counts.
OPTIONS: dict[str, Any] = {"training": True, "seed": torch.tensor(1)}


@dataclasses.dataclass
class Bad:
    """Arguments that replace valid ones, the exception's type, and words of its message."""

    name: str
    arguments: dict[str, Any]
    exception: type[Exception] | tuple[type[Exception], ...]
    words: list[str]


TENSORS = [
    # x
    Bad("x-int", {"x": torch.ones(4, 2, D, dtype=torch.int64)}, RuntimeError, ["x", "int64|Long"]),
    Bad("x-complex", {"x": torch.ones(4, 2, D, dtype=torch.complex64)}, RuntimeError, ["x"]),
    Bad("x-0d", {"x": torch.tensor(1.0)}, RuntimeError, ["x", "dim"]),
    Bad("x-sparse", {"x": torch.ones(4, 2, D).to_sparse()}, RuntimeError, ["x", "[Ss]parse"]),
    Bad("x-meta", {"x": torch.ones(4, 2, D, device="meta")}, RuntimeError, ["meta", "cpu"]),
    Bad("x-narrow", {"x": torch.randn(4, 2, D - 1)}, RuntimeError, ["16", "15"]),
    Bad("x-no-columns", {"x": torch.randn(4, 2, 0)}, RuntimeError, ["x|norm_weight"]),
    # Weights in lists
    *(
        Bad(f"{name}-D", {"weights": with_one(name, bad)}, RuntimeError, [rf"{name}\[1\]", *words])
        for name, bad, words in [
            ("norm_weight", torch.ones(D + 1), ["16", "17"]),
            ("norm_bias", torch.ones(D + 1), ["16", "17"]),
            ("down", torch.ones(1, D + 1), ["16", "17"]),
            ("up", torch.ones(D + 1, 1), ["16", "17"]),
        ]
    ),
    *(
        Bad(f"{name}-dims", {"weights": with_one(name, bad)}, RuntimeError, [rf"{name}\[1\]"])
        for name, bad in [
            ("norm_weight", torch.ones(1, D)),
            ("norm_bias", torch.tensor(1.0)),
            ("down", torch.ones(D)),
            ("up", torch.ones(1, D, 1)),
        ]
    ),
    *(
        Bad(
            f"{name}-dtype",
            {"weights": with_one(name, tensor.double())},
            RuntimeError,
            [rf"{name}\[1\]", "float64|Double", "float32|Float"],
        )
        for name, tensor in zip(
            AdapterWeights._fields, (field[1] for field in weights()), strict=True
        )
    ),
    *(
        Bad(
            f"{name}-device",
            {"weights": with_one(name, tensor.to("meta"))},
            RuntimeError,
            [rf"{name}\[1\]", "cpu", "meta"],
        )
        for name, tensor in zip(
            AdapterWeights._fields, (field[1] for field in weights()), strict=True
        )
    ),
    Bad(
        "r-mismatch",
        {"weights": with_one("up", torch.ones(D, 2))},
        RuntimeError,
        [r"up\[1\]", r"\b1\b", r"\b2\b"],
    ),
    Bad(
        "r-zero",
        {"weights": replace(with_one("down", torch.ones(0, D)), up=[
            weights().up[0], torch.ones(D, 0), weights().up[2]
        ])},
        RuntimeError,
        [r"down\[1\]", r"\b0\b"],
    ),
    *(
        Bad(
            f"{name}-missing-one",
            {"weights": weights(**{name: list(getattr(weights(), name))[:2]})},
            RuntimeError,
            [name, r"\b2\b", r"\b3\b"],
        )
        for name in ("norm_weight", "norm_bias", "up")
    ),
    Bad(
        "list-half-precision",
        {
            "x": torch.randn(4, 2, D).half(),
            "weights": with_one("down", torch.ones(1, D).bfloat16()),
        },
        RuntimeError,
        [r"down\[1\]", "bfloat16|BFloat16"],
    ),
    # As many tensors in all as there should be, so that a flattened list hides the mistake.
    Bad(
        "one-too-few-and-one-too-many",
        {"weights": weights(norm_weight=[torch.ones(D)] * 2, norm_bias=[torch.ones(D)] * 4)},
        RuntimeError,
        ["norm_weight|norm_bias", r"\b3\b", r"\b[24]\b"],
    ),
    # Stacked weights
    Bad(
        "one-adapter-not-in-a-list",
        {"weights": AdapterWeights(*(field[0] for field in weights())), "routing": None},
        RuntimeError,
        ["norm_weight", r"\bA\b|dim|shape|stack"],
    ),
    *(
        Bad(
            f"stacked-{name}",
            {"weights": stacked(**{name: torch.ones(shape)})},
            RuntimeError,
            [name, *words],
        )
        for name, shape, words in [
            ("norm_weight", (A, D + 1), ["16", "17"]),
            ("norm_bias", (A, D - 1), ["16", "15"]),
            ("down", (A, 4, D + 1), ["16", "17"]),
            ("up", (A, D + 1, 4), ["16", "17"]),
            ("up", (A, D, 3), [r"\b4\b", r"\b3\b"]),
            ("norm_bias", (A + 1, D), [r"\b3\b", r"\b4\b"]),
            ("down", (4, D), ["dim|shape"]),
        ]
    ),
    *(
        Bad(
            f"stacked-{name}-non-contiguous",
            {"weights": stacked(**{name: getattr(stacked(), name).mT.contiguous().mT})},
            RuntimeError,
            [name, "contiguous|stride"],
        )
        for name in AdapterWeights._fields
    ),
    # Routing
    Bad("routing-of-more-adapters", {"routing": routing(4, num_adapters=5)}, RuntimeError,
        ["routing", r"\b3\b", r"\b5\b"]),
    Bad("routing-of-fewer-adapters", {"routing": routing(4, num_adapters=2)}, RuntimeError,
        ["routing", r"\b3\b", r"\b2\b"]),
    Bad("routing-of-fewer-samples", {"routing": routing(3)}, RuntimeError, ["routing", "4", "3"]),
    Bad("routing-of-wrong-rows", {"routing": routing(4, 3)}, RuntimeError, ["routing", "2", "3"]),
    Bad("routing-transposed", {"routing": routing(2, 4)}, RuntimeError, ["routing", "2", "4"]),
    Bad("routing-of-elements", {"routing": routing(4, 2, D)}, RuntimeError, ["routing", "16"]),
    Bad("routing-missing", {"routing": None}, RuntimeError, ["routing", r"\b3\b"]),
    *(
        Bad(f"routing-without-{part}", {"routing": routing(4)._replace(**{part: value})},
            TypeError, ["routing", "three tensors", type(value).__name__])
        for part, value in (("ids", [0, 1, 2, 0]), ("order", None), ("offsets", None))
    ),
    Bad("routing-missing-no-adapters", {"routing": None, "weights": AdapterWeights([], [], [], [])},
        RuntimeError, ["routing", r"\b0\b"]),
    Bad(
        "routing-device",
        {"routing": adapter_ext.Routing(*(t.to("meta") for t in routing(4)))},
        RuntimeError,
        ["routing", "cpu", "meta"],
    ),
]  # fmt: skip

VALUES = [
    Bad("weights-None", {"weights": None}, TypeError, ["weights", "AdapterWeights", "NoneType"]),
    Bad("weights-5", {"weights": (*weights(), [])}, TypeError, ["weights", "AdapterWeights"]),
    Bad("weights-generators", {"weights": AdapterWeights(*(iter(w) for w in weights()))},
        TypeError, ["weights", "four sequences"]),
    Bad("l2-str", {**OPTIONS, "l2_lambda": "0.1"}, TypeError, ["l2_lambda", "str"]),
    # Another device's kernels, which make no result, were called.
    Bad("l2-device", {**OPTIONS, "l2_lambda": torch.ones(A, device="meta")}, RuntimeError,
        ["l2_lambda", "cpu", "meta"]),
    Bad("l2-grad", {**OPTIONS, "l2_lambda": torch.ones(A, requires_grad=True)}, ValueError,
        ["l2_lambda", "requires_grad"]),
    Bad("seed-device", {**OPTIONS, "dropout": 0.5, "seed": OPTIONS["seed"].to("meta")},
        RuntimeError, ["seed", "cpu", "meta"]),
    *(
        Bad(f"{name}={p}", {**OPTIONS, name: p}, ValueError, [name, r"\[0, 1\]", str(p)])
        for name in ("dropout", "stochastic_depth")
        for p in (-0.1, 1.5, math.nan, math.inf)
    ),
    # Wrong in every mode, not only where it would be used.
    Bad("dropout-in-eval", {"dropout": 1.5}, ValueError, ["dropout", "1.5"]),
    Bad("depth-in-eval", {"stochastic_depth": -1.0}, ValueError, ["stochastic_depth", "-1"]),
    Bad("l2-in-eval", {"l2_lambda": -1}, ValueError, ["l2_lambda", "-1"]),
    Bad("l2-nan-in-eval", {"l2_lambda": math.nan}, ValueError, ["l2_lambda", "nan"]),
    Bad("l2-str-in-eval", {"l2_lambda": "a"}, TypeError, ["l2_lambda", "str 'a'"]),
    Bad("l2-None-in-eval", {"l2_lambda": None}, TypeError, ["l2_lambda", "NoneType"]),
    Bad("dropout-str", {"dropout": "0.5"}, TypeError, ["dropout", "str"]),
    *(
        Bad(f"eps={eps}", {"eps": eps}, ValueError, ["eps", str(eps)])
        for eps in (0.0, -1e-5, math.nan)
    ),
    Bad(
        "activation",
        {"activation": "tanhh"},
        ValueError,
        ["activation", "tanhh", "swish", "gelu"],
    ),
    Bad(
        "norm_position",
        {"norm_position": "mid"},
        ValueError,
        ["norm_position", "mid", "pre", "post"],
    ),
    Bad(
        "stochastic_depth_mode",
        {"stochastic_depth_mode": "row"},
        ValueError,
        ["stochastic_depth_mode", "row", "call", "sample"],
    ),
    Bad(
        "depth-without-residual",
        {**OPTIONS, "residual": False, "stochastic_depth": 0.1},
        ValueError,
        ["residual", "stochastic_depth"],
    ),
    Bad(
        "l2-without-residual",
        {**OPTIONS, "residual": False, "l2_lambda": 0.1},
        ValueError,
        ["residual", "l2_lambda"],
    ),
    *(
        Bad(f"l2={value}", {**OPTIONS, "l2_lambda": value}, ValueError, ["l2_lambda", str(value)])
        for value in (-0.1, math.nan)
    ),
    Bad(
        "l2-shape",
        {**OPTIONS, "l2_lambda": torch.ones(2)},
        (ValueError, RuntimeError),
        ["l2_lambda", r"\b2\b", r"\b3\b"],
    ),
    Bad("seed-nan", {**OPTIONS, "dropout": 0.1, "seed": math.nan}, TypeError, ["seed", "float"]),
    Bad(
        "seed-float-tensor",
        {**OPTIONS, "dropout": 0.1, "seed": torch.tensor(1.0)},
        RuntimeError,
        ["seed", "int64", "float32"],
    ),
    Bad(
        "seed-two-elements",
        {**OPTIONS, "dropout": 0.1, "seed": torch.tensor([1, 2])},
        (ValueError, RuntimeError),
        ["seed", r"\b2\b"],
    ),
    Bad("compute-dtype-int", {"compute_dtype": torch.int8}, ValueError, ["compute_dtype", "int8"]),
    Bad(
        "compute-dtype-str",
        {"compute_dtype": "bf16"},
        TypeError,
        ["compute_dtype", "torch.dtype", "str 'bf16'"],
    ),
    Bad("compute-dtype-list", {"compute_dtype": []}, TypeError, ["compute_dtype", "list"]),
    *(
        Bad(f"{name}-int", {name: 3}, TypeError, [name, "expected one of", "got 3"])
        for name in ("activation", "norm_position", "stochastic_depth_mode")
    ),
    # The first was the dispatcher's error, the second was taken for True.
    Bad("residual-str", {"residual": "no"}, TypeError, ["residual", "bool", "str 'no'"]),
    Bad("training-str", {"training": "no"}, TypeError, ["training", "bool", "str 'no'"]),
    *(
        Bad(f"routing-is-ids-{n}", {"routing": torch.zeros(n, dtype=torch.int64)}, TypeError,
            ["routing", "Tensor"])
        for n in (3, 4)  # three would unpack as ids, order and offsets
    ),
    Bad("x-is-list", {"x": [1.0] * D}, TypeError, ["x", "list"]),
]  # fmt: skip


@pytest.mark.parametrize("bad", TENSORS, ids=lambda bad: bad.name)
@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.enable_grad, forward_ad.dual_level],
    ids=["no_grad", "grad", "forward-mode"],
)
def test_tensors(bad: Bad, mode: Callable[[], AbstractContextManager[Any]]) -> None:
    """In forward mode, where the reference takes the op's place, none was an error."""
    with mode():
        if mode is forward_ad.dual_level and bad.name.endswith("non-contiguous"):
            call(**bad.arguments)  # the reference takes any strides
        else:
            assert message_of(bad).startswith("linear_adapter:")


@pytest.mark.parametrize("bad", VALUES, ids=lambda bad: bad.name)
def test_values(bad: Bad) -> None:
    message_of(bad)


def message_of(bad: Bad) -> str:
    """The message of the call's exception, which must hold all the words."""
    with pytest.raises(bad.exception) as caught:
        call(**bad.arguments)
    message = str(caught.value)
    for word in bad.words:
        assert re.search(word, message), f"{word!r} is not in {message!r}"
    return message


ROUTE = {
    "too-large": ([0, 3], 3, RuntimeError, ["ids", r"\b3\b"]),
    "far-too-large": ([0, 2**62], 3, RuntimeError, ["ids", str(2**62)]),
    "below-minus-one": ([-2, 0], 3, RuntimeError, ["ids", "-2"]),
    "no-adapters": ([0], 0, RuntimeError, ["ids", r"\b0\b"]),
    "int32": (torch.zeros(3, dtype=torch.int32), 3, RuntimeError, ["ids", "int64", "int32|Int"]),
    "float": (torch.zeros(3), 3, RuntimeError, ["ids", "int64", "float32|Float"]),
    "bool": (torch.zeros(3, dtype=torch.bool), 3, RuntimeError, ["ids", "int64", "[Bb]ool"]),
    "negative-count": ([-1], -1, RuntimeError, ["num_adapters", "-1"]),
    "huge-count": ([-1], 2**63 - 1, RuntimeError, ["num_adapters", str(2**63 - 1)]),
    "list": ((0, 1), 3, TypeError, ["ids", "tuple"]),
    # These were the dispatcher's errors, the last was taken for one adapter.
    "float-count": ([0], 2.5, TypeError, ["num_adapters", "integer", "float 2.5"]),
    "str-count": ([0], "3", TypeError, ["num_adapters", "integer", "str '3'"]),
    "None-count": ([0], None, TypeError, ["num_adapters", "integer", "NoneType"]),
    "bool-count": ([0], True, TypeError, ["num_adapters", "integer", "bool True"]),
}  # fmt: skip


@pytest.mark.parametrize(("ids", "num_adapters", "exception", "words"), ROUTE.values(), ids=ROUTE)
def test_route(ids: Any, num_adapters: int, exception: type[Exception], words: list[str]) -> None:
    with pytest.raises(exception) as caught:
        adapter_ext.route(torch.tensor(ids) if isinstance(ids, list) else ids, num_adapters)
    message = str(caught.value)
    assert message.startswith("route:")
    for word in words:
        assert re.search(word, message), f"{word!r} is not in {message!r}"


def test_a_count_of_numpys_is_a_count() -> None:
    ids = torch.tensor([1, -1])
    assert adapter_ext.route(ids, np.int64(2)).offsets.tolist() == [0, 0, 1]


def test_half_a_routing() -> None:
    """The op took it for none, and gave rows without an adapter the one there is."""
    x, one = torch.randn(4, D), AdapterWeights(*(w[:1] for w in weights()))
    arguments = list(adapter_ext.ops.raw_forward_arguments(x, one, routing(4, num_adapters=1)))
    for missing in (2, 3):
        some = [None if i == missing else value for i, value in enumerate(arguments)]
        with pytest.raises(RuntimeError, match=r"linear_adapter: routing: expected both"):
            torch.ops.adapter_ext.linear_adapter(*some)


def test_tensors_of_another_device_in_the_backward() -> None:
    x = torch.randn(4, 2, D)
    arguments = list(adapter_ext.ops.raw_forward_arguments(x, weights(), routing(4)))
    y, _, saved = torch.ops.adapter_ext.linear_adapter_forward(*arguments)
    needed = [1] * (1 + len(arguments[1]))
    with pytest.raises(RuntimeError, match=r"saved: expected a tensor on the device of x"):
        torch.ops.adapter_ext.linear_adapter_backward(y, None, *arguments, saved.to("meta"), needed)


@pytest.mark.parametrize("name", ["order", "offsets"])
def test_forged_routing_cannot_crash(name: str) -> None:
    """Routing made by hand, of the wrong sizes, is an error; never memory out of bounds."""
    forged = routing(4)._replace(**{name: torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(RuntimeError, match="linear_adapter: routing"):
        call(routing=forged)


def test_gradient_of_another_shape_in_the_backward() -> None:
    """As many elements in other rows were taken for it."""
    x = torch.randn(4, 2, D)
    arguments = list(adapter_ext.ops.raw_forward_arguments(x, weights(), routing(4)))
    y, _, saved = torch.ops.adapter_ext.linear_adapter_forward(*arguments)
    needed = [1] * (1 + len(arguments[1]))
    with pytest.raises(RuntimeError, match=r"grad_y: expected the shape of x, \[4, 2, .*\[2, 4, "):
        torch.ops.adapter_ext.linear_adapter_backward(
            y.transpose(0, 1), None, *arguments, saved, needed
        )


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("dropout", math.nan, r"dropout: expected a value in \[0, 1\], got -?nan"),
        ("dropout", -0.5, r"dropout: expected a value in \[0, 1\], got -0.5"),
        ("stochastic_depth", 2.0, r"stochastic_depth: expected a value in \[0, 1\], got 2"),
        ("eps", -1.0, "eps: expected a finite value above 0, got -1"),
        ("eps", math.inf, "eps: expected a finite value above 0, got inf"),
        ("compute_type", 0, "compute_type: expected float64 with x of float64 alone, got"),
        ("compute_type", 4, "compute_type: expected TF32 with x of float32 on a CUDA device"),
    ],
)
def test_the_native_op_checks_numbers(option: str, value: float, words: str) -> None:
    """They were read as they came, and float64 products of float32 x were rounded to float16."""
    order, offsets = routing(4)[1:]
    flat = [w for field in weights() for w in field]
    options = adapter_ext.ops._Options(seed=torch.zeros(1, dtype=torch.int64))
    arguments = (torch.randn(4, 2, D), flat, order, offsets)
    torch.ops.adapter_ext.linear_adapter(*arguments, *options)
    with pytest.raises(RuntimeError, match=f"linear_adapter: {words}"):
        torch.ops.adapter_ext.linear_adapter(*arguments, *options._replace(**{option: value}))
