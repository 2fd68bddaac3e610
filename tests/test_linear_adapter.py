"""linear_adapter against its definition in float64: values and every gradient."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from op_testing import ACTIVATIONS, KINKS, LAYOUTS, ROUTINGS, Case, Recorder, check, excess, replace

import adapter_ext
from adapter_ext import ops, reference

SIZES = (1, 7, 16, 50, 64, 333, 4097)
NORM_POSITIONS = ("pre", "post")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

TRAINING: dict[str, dict[str, Any]] = {
    "eval": {},
    "eval-ignores": {"dropout": 0.5, "stochastic_depth": 0.5, "l2_lambda": 0.3},
    "plain": {"training": True},
    "dropout": {"training": True, "dropout": 0.3},
    "depth-call": {"training": True, "stochastic_depth": 0.4},
    "depth-sample": {
        "training": True,
        "stochastic_depth": 0.4,
        "stochastic_depth_mode": "sample",
    },
    "l2": {"training": True, "l2_lambda": 0.3},
    "l2-tensor": {"training": True, "l2_lambda": "tensor"},
    "all-call": {
        "training": True,
        "dropout": 0.1,
        "stochastic_depth": 0.3,
        "l2_lambda": "tensor",
    },
    "all-sample": {
        "training": True,
        "dropout": 0.1,
        "stochastic_depth": 0.3,
        "stochastic_depth_mode": "sample",
        "l2_lambda": 0.3,
    },
}
PLAIN_RESULT = ("eval", "plain", "dropout")  # what goes without the residual

every_norm_position = pytest.mark.parametrize("norm_position", NORM_POSITIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[-1])


@every_norm_position
@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_options(activation: str, training: str, norm_position: str) -> None:
    options = {"activation": activation, "norm_position": norm_position, **TRAINING[training]}
    check(Case(routing="untouched", shape=(6, 4, 16), options=options))


@every_norm_position
@pytest.mark.parametrize("training", PLAIN_RESULT)
@pytest.mark.parametrize("routing", ["none", "untouched"])
def test_plain_result(routing: str, training: str, norm_position: str) -> None:
    options = {"residual": False, "norm_position": norm_position, **TRAINING[training]}
    bottlenecks = (5,) if routing == "none" else (5, 1, 8)
    check(Case(routing=routing, bottlenecks=bottlenecks, options=options))


@pytest.mark.parametrize("stacked", [False, True], ids=["lists", "stacked"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("leading", [(), (9,), (4, 3), (4, 1, 3)], ids=str)
@pytest.mark.parametrize("training", ["eval", "all-call", "all-sample"])
def test_routing(training: str, leading: tuple[int, ...], routing: str, stacked: bool) -> None:
    bottlenecks = (5, 5, 5) if stacked else (5, 1, 8)
    if routing == "none":
        bottlenecks = bottlenecks[:1]
    check(
        Case(
            shape=(*leading, 16),
            bottlenecks=bottlenecks,
            stacked=stacked,
            routing=routing,
            options=TRAINING[training],
        )
    )


@every_norm_position
@pytest.mark.parametrize("ids_dims", [1, 2, 3])
def test_ids_of_any_leading_dimensions(ids_dims: int, norm_position: str) -> None:
    """ids [B], [B, 1] and [B, 1, T] for an x [B, 1, T, D] route alike where they say the same."""
    options = {"norm_position": norm_position, **TRAINING["dropout"]}
    call = Case(shape=(4, 1, 3, 16), routing="sample", options=options).build()
    assert call.routing is not None
    by_sample = call.results()
    ids = call.routing.ids.reshape(4, 1, 1).expand(4, 1, 3)[(..., *([0] * (3 - ids_dims)))]
    call.routing = adapter_ext.route(ids, 3)
    for name, result in call.results().items():
        assert torch.equal(result, by_sample[name]), name


@every_norm_position
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("upstream", ["contiguous", "transposed", "expanded"])
def test_layout_of_x(upstream: str, layout: str, norm_position: str) -> None:
    options = {"norm_position": norm_position, **TRAINING["all-call"]}
    check(Case(shape=(6, 4, 17), layout=layout, upstream=upstream, options=options))


@every_norm_position
@pytest.mark.parametrize(
    "shape", [(0, 16), (0, 3, 16), (3, 0, 16), (2, 0, 3, 16)], ids=lambda s: "x".join(map(str, s))
)
@pytest.mark.parametrize("routing", ["none", "sample", "row"])
@pytest.mark.parametrize("stacked", [False, True], ids=["lists", "stacked"])
def test_no_rows(stacked: bool, routing: str, shape: tuple[int, ...], norm_position: str) -> None:
    options = {"norm_position": norm_position, **TRAINING["all-call"]}
    bottlenecks = (5,) if routing == "none" else (5, 5)
    check(
        Case(
            shape=shape, bottlenecks=bottlenecks, stacked=stacked, routing=routing, options=options
        )
    )


@pytest.mark.parametrize("stacked", [False, True], ids=["lists", "stacked"])
@pytest.mark.parametrize("training", ["eval", "all-call"])
def test_no_adapters(training: str, stacked: bool) -> None:
    case = Case(
        bottlenecks=(), stacked=stacked, routing="all_untouched", options=TRAINING[training]
    )
    check(case)
    call = case.build()
    y, aux = call.forward()
    assert torch.equal(y, call.x)
    assert aux.shape == (0,)


@every_norm_position
@pytest.mark.parametrize(
    ("bottleneck", "hidden_size"),
    [
        pytest.param(r, d, marks=[pytest.mark.slow] if r * d > 64 * 4097 else [], id=f"r={r}-D={d}")
        for r, d in itertools.product(SIZES, SIZES)
    ],
)
def test_sizes(bottleneck: int, hidden_size: int, norm_position: str) -> None:
    check(
        Case(
            shape=(11, hidden_size),
            bottlenecks=(bottleneck, 3),
            routing="untouched",
            options={**TRAINING["all-call"], "norm_position": norm_position},
        )
    )


@every_norm_position
def test_default_eps(norm_position: str) -> None:
    case = Case(bottlenecks=(16, 12), options={"norm_position": norm_position, "eps": 1e-5})
    check(case)
    call = case.build()
    expected = call.results()
    del call.options["eps"]
    for name, result in call.results().items():
        assert torch.equal(result, expected[name]), name


@every_norm_position
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13, 31, 64, 65, 257, 1000])
def test_number_of_rows(rows: int, norm_position: str) -> None:
    options = {"norm_position": norm_position, **TRAINING["all-call"]}
    check(Case(shape=(rows, 40), bottlenecks=(6, 16), routing="row", options=options))


@every_dtype
@every_norm_position
@pytest.mark.parametrize("weights", ["same", "fp32"])
@pytest.mark.parametrize("training", ["eval", "all-call"])
@pytest.mark.parametrize("stacked", [False, True], ids=["lists", "stacked"])
def test_dtypes(
    stacked: bool, training: str, weights: str, norm_position: str, dtype: torch.dtype
) -> None:
    check(
        Case(
            shape=(5, 7, 65),
            bottlenecks=(16, 16) if stacked else (16, 7),
            stacked=stacked,
            dtype=dtype,
            weight_dtype=torch.float32 if weights == "fp32" else dtype,
            options={"norm_position": norm_position, **TRAINING[training]},
        )
    )


@every_dtype
@every_norm_position
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_dtypes(activation: str, norm_position: str, dtype: torch.dtype) -> None:
    options = {"activation": activation, "norm_position": norm_position}
    check(Case(shape=(20, 33), dtype=dtype, options=options))


@every_norm_position
@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("training", ["eval", "all-call"])
def test_compute_dtype(
    training: str, dtype: torch.dtype, compute_dtype: torch.dtype, norm_position: str
) -> None:
    options = {"norm_position": norm_position, "compute_dtype": compute_dtype}
    check(
        Case(
            shape=(5, 7, 65),
            bottlenecks=(16, 7),
            dtype=dtype,
            weight_dtype=torch.float32,
            options={**options, **TRAINING[training]},
        )
    )


def test_compute_dtype_rounds_the_operands() -> None:
    """The down projection sees its operands in bfloat16, not in float32."""
    call = Case(shape=(64, 64), bottlenecks=(64,), routing="none").build()
    exact = call.forward()[0]
    call.options["compute_dtype"] = torch.bfloat16
    rounded = call.forward()[0]
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 1e-4 < error < 1e-2


@pytest.mark.parametrize("rows", [1, 5, 200])
def test_compute_dtype_float32_keeps_the_operands(rows: int) -> None:
    """With x and weights of bfloat16 the operands (the normed rows) stay in float32."""
    call = Case(shape=(rows, 65), bottlenecks=(17,), routing="none", dtype=torch.bfloat16).build()
    call.options["compute_dtype"] = torch.float32
    with Recorder(ops._forward) as recorder:
        call.forward()
    hidden = recorder.calls[0][2][2].detach()[: rows * 17].reshape(rows, 17)
    exact = call.upcast()
    normed = torch.nn.functional.layer_norm(
        exact.x,
        [65],
        exact.weights.norm_weight[0],
        exact.weights.norm_bias[0],
        exact.options["eps"],
    )
    expected = (normed @ exact.weights.down[0].T).detach()
    assert excess(hidden, expected, 1e-5, 1e-5) < 1.0


@every_norm_position
@pytest.mark.parametrize("mean", [10.0, 1000.0])
def test_large_mean(mean: float, norm_position: str) -> None:
    """A mean much larger than the deviation costs no more digits than rounding x to float32."""
    options = {"norm_position": norm_position, "residual": False}
    call = Case(shape=(20, 64), bottlenecks=(16, 7), options=options).build()
    # Multiples of 2^-12 that float32 holds exactly.
    call.x = ((call.x.detach() * 4096).round() / 4096 + mean).requires_grad_()
    actual, expected = call.results(), call.upcast().results(reference.linear_adapter)
    allowed = 1e-5 + 2e-7 * mean
    for name, value in actual.items():
        assert excess(value, expected[name], allowed, allowed) < 1.0, name


@every_dtype
@every_norm_position
@pytest.mark.parametrize("bottleneck", [6, 40])  # 40: wide enough to be read as it is stored
def test_strided_bank(dtype: torch.dtype, bottleneck: int, norm_position: str) -> None:
    """Stacked weights may be a slice of a larger bank, as long as the last dimension is dense."""
    options = {"norm_position": norm_position, **TRAINING["all-call"]}
    call = Case(
        shape=(20, 70), bottlenecks=(bottleneck,) * 3, stacked=True, dtype=dtype, options=options
    ).build()
    expected = call.results()
    call.weights = type(call.weights)(
        *(_every_other_of_larger(field.detach()).requires_grad_() for field in call.weights)
    )
    for name, result in call.results().items():
        assert torch.equal(result, expected[name]), name


def _every_other_of_larger(bank: torch.Tensor) -> torch.Tensor:
    wide = bank.new_full((2 * bank.shape[0], *bank.shape[1:-1], bank.shape[-1] + 5), float("nan"))
    wide[::2, ..., 1:-4] = bank
    return wide[::2, ..., 1:-4]


def test_lists_and_stacked_agree() -> None:
    lists = Case(bottlenecks=(6, 6, 6), options=TRAINING["all-call"]).build()
    stacked = Case(bottlenecks=(6, 6, 6), options=TRAINING["all-call"]).build()
    stacked.weights = type(lists.weights)(
        *(torch.stack(list(field)).detach().requires_grad_() for field in lists.weights)
    )
    expected, actual = lists.results(), stacked.results()
    assert torch.equal(actual["y"], expected["y"])
    assert torch.equal(actual["aux"], expected["aux"])
    for field in stacked.weights._fields:
        for a, grad in enumerate(actual[f"grad of {field}"]):
            assert torch.equal(grad, expected[f"grad of {field}[{a}]"]), (field, a)


def test_rows_without_adapter_are_untouched() -> None:
    call = Case(shape=(40, 16), routing="untouched", dtype=torch.bfloat16).build()
    assert call.routing is not None
    none = call.routing.ids < 0
    assert none.any()
    assert torch.equal(call.forward()[0][none], call.x[none])
    call.options["residual"] = False
    assert torch.equal(call.forward()[0][none], call.x[none])
    assert not torch.equal(call.forward()[0][~none], call.x[~none])


@every_norm_position
def test_adapter_without_rows(norm_position: str) -> None:
    """Its gradients are there, and exactly zero; its auxiliary loss too."""
    options = {"norm_position": norm_position, **TRAINING["all-call"]}
    results = Case(routing="unused", options=options).build().results()
    assert results["aux"][0] == 0.0
    for field in adapter_ext.AdapterWeights._fields:
        grad = results[f"grad of {field}[0]"]
        assert torch.equal(grad, torch.zeros_like(grad)), field


def test_one_tensor_for_two_adapters() -> None:
    """Adapters may share a weight: its gradient is the sum."""
    call = Case(bottlenecks=(6, 6)).build()
    shared = call.weights.down[0]
    call.weights = replace(call.weights, down=[shared, shared])
    (grad,) = torch.autograd.grad(call.forward()[0], shared, call.dy)
    copies = [shared.detach().clone().requires_grad_() for _ in range(2)]
    call.weights = replace(call.weights, down=copies)
    grads = torch.autograd.grad(call.forward()[0], copies, call.dy)
    assert torch.equal(grad, grads[0] + grads[1])


def test_inputs_are_not_written_to() -> None:
    call = Case(routing="untouched", options=TRAINING["all-call"]).build()
    before = {name: t.detach().clone() for name, t in call.inputs().items()}
    dy = call.dy.clone()
    call.results()
    for name, t in call.inputs().items():
        assert torch.equal(t, before[name]), name
    assert torch.equal(call.dy, dy)


def test_result_is_new_memory() -> None:
    """y never aliases x, not even where no row is touched."""
    call = Case(routing="all_untouched").build()
    y = call.forward()[0]
    assert y.untyped_storage().data_ptr() != call.x.untyped_storage().data_ptr()


# The options one by one are in test_options.
CROSSED = {True: ("eval", "all-call", "all-sample"), False: ("eval", "dropout")}  # by residual


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        (weights, dtype)
        for weights, dtype in itertools.product(["lists", "stacked", "lists-fp32"], DTYPES)
        if (weights, dtype) != ("lists-fp32", torch.float32)  # the same as lists
    ],
    ids=lambda value: str(value).split(".")[-1],
)
@every_norm_position
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "silu"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_full_cross(
    routing: str, activation: str, norm_position: str, dtype: torch.dtype, weights: str
) -> None:
    bottlenecks = (5, 5, 5) if weights == "stacked" else (5, 1, 8)
    if routing == "none":
        bottlenecks = bottlenecks[:1]
    options = {"activation": activation, "norm_position": norm_position}
    for residual, crossed in CROSSED.items():
        for training in crossed:
            case = Case(
                bottlenecks=bottlenecks,
                stacked=weights == "stacked",
                routing=routing,
                dtype=dtype,
                weight_dtype=torch.float32 if weights == "lists-fp32" else dtype,
                options={**options, "residual": residual, **TRAINING[training]},
            )
            check(case)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any valid call of moderate size."""
    dtype = draw(st.sampled_from(DTYPES))
    num_adapters = draw(st.integers(1, 5))
    stacked = draw(st.booleans())
    size = st.one_of(st.integers(1, 20), st.integers(21, 140))
    ranks = st.lists(size, min_size=num_adapters, max_size=num_adapters).map(tuple)
    routing = draw(st.sampled_from(ROUTINGS if num_adapters > 1 else ROUTINGS[:-2]))
    if routing == "none":
        num_adapters = 1
    residual = draw(st.booleans())
    probability = st.sampled_from([0.0, 0.1, 0.5, 1.0])
    # Rows of so many inputs can't be kept away from kinks by more than 16 bits round.
    activations = [a for a in ACTIVATIONS if dtype.itemsize > 2 or a not in KINKS]
    options: dict[str, Any] = {
        "activation": draw(st.sampled_from(activations)),
        "norm_position": draw(st.sampled_from(NORM_POSITIONS)),
        "dropout": draw(probability),
        "residual": residual,
        "training": draw(st.booleans()),
    }
    if residual:
        options["stochastic_depth"] = draw(probability)
        options["stochastic_depth_mode"] = draw(st.sampled_from(["call", "sample"]))
        options["l2_lambda"] = draw(st.sampled_from([0.0, 0.3, "tensor"]))
    leading = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    bottlenecks = (draw(size),) * num_adapters if stacked else draw(ranks)[:num_adapters]
    return Case(
        shape=(*leading, draw(size)),
        bottlenecks=bottlenecks,
        stacked=stacked,
        routing=routing,
        layout=draw(st.sampled_from(LAYOUTS if 0 not in leading else LAYOUTS[:-1])),
        upstream=draw(st.sampled_from(LAYOUTS if 0 not in leading else LAYOUTS[:-1])),
        dtype=dtype,
        weight_dtype=draw(st.sampled_from([dtype, torch.float32])),
        options=options,
    )


@hypothesis.given(cases())
@hypothesis.settings(max_examples=150)
def test_random_cases(case: Case) -> None:
    check(case)


@pytest.mark.slow
@hypothesis.given(cases())
@hypothesis.settings(max_examples=1500)
def test_many_random_cases(case: Case) -> None:
    check(case)


def test_one_l2_weight_as_a_tensor() -> None:
    """One without dimensions is for all adapters, as a number is."""
    options = {"training": True, "l2_lambda": 0.3}
    call = Case(options=options).build()
    expected = call.forward()[1]
    call.options["l2_lambda"] = torch.tensor(0.3, device=call.x.device)
    assert torch.equal(call.forward()[1], expected)
    assert expected.all()
