"""The ops and modules under torch.func, torch.vmap, forward-mode AD, checkpointing and the like.

What a transform can't do must be an error that names the op, and never another number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from layer_testing import Block, D, config, formula, make_block, rand, randomize
from op_testing import Call, Case, map_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapter_ext
from adapter_ext import AdapterWeights, linear_adapter, reference, route

CASES = {
    "one-adapter": Case(bottlenecks=(3,), routing="none", dtype=torch.float64),
    "routed-lists": Case(dtype=torch.float64, shape=(4, 2, 7)),
    "stacked-post": Case(
        bottlenecks=(2, 2),
        stacked=True,
        dtype=torch.float64,
        shape=(3, 7),
        options={"norm_position": "post", "activation": "gelu"},
    ),
    "training": Case(
        dtype=torch.float64,
        shape=(4, 2, 7),
        options={"training": True, "dropout": 0.3, "stochastic_depth": 0.3, "l2_lambda": "tensor"},
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

Function = Callable[..., tuple[Tensor, Tensor]]


def inputs_of(call: Call) -> list[Tensor]:
    return [t.detach() for t in call.inputs().values()]


def of_tensors(call: Call, function: Function) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of all differentiable inputs, in the order of :func:`inputs_of`."""

    def run(x: Tensor, *flat: Tensor) -> tuple[Tensor, Tensor]:
        remaining = iter(flat)
        weights = map_weights(lambda _: next(remaining), call.weights)
        return function(x, weights, call.routing, **call.options)

    return run


def loss_of(call: Call, function: Function) -> Callable[..., Tensor]:
    run = of_tensors(call, function)

    def loss(*inputs: Tensor) -> Tensor:
        y, aux = run(*inputs)
        return (y * call.dy).sum() + y.square().sum() + (aux * call.daux).sum()

    return loss


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def both(transform: Callable[[Function], Any]) -> None:
    """The transform of the op equals that of the reference, and is not trivial."""
    actual, expected = transform(linear_adapter), transform(reference.linear_adapter)
    close(actual, expected)
    assert any(bool(t.any()) for t in torch.utils._pytree.tree_leaves(expected))


# --- torch.func -----------------------------------------------------------------------------------


@every_case
def test_func_grad(case: Case) -> None:
    call = case.build()
    inputs = inputs_of(call)
    every = tuple(range(len(inputs)))
    both(lambda f: torch.func.grad(loss_of(call, f), argnums=every)(*inputs))

    def squared_norm(f: Function) -> Callable[..., Tensor]:
        gradient = torch.func.grad(loss_of(call, f), argnums=every)
        return lambda *inputs: sum(g.square().sum() for g in gradient(*inputs))  # type: ignore[return-value]

    both(lambda f: torch.func.grad(squared_norm(f), argnums=every)(*inputs))


@every_case
def test_func_vjp_and_jacrev(case: Case) -> None:
    call = case.build()
    inputs = inputs_of(call)
    cotangents = (call.dy, call.daux)
    both(lambda f: torch.func.vjp(of_tensors(call, f), *inputs)[1](cotangents))
    # The reference's own jacobian, one row at a time: it is not vmapped.
    jacobians = torch.func.jacrev(of_tensors(call, linear_adapter), argnums=(0, 1))(*inputs)
    expected = torch.func.jacrev(
        of_tensors(call, reference.linear_adapter), argnums=(0, 1), chunk_size=1
    )(*inputs)
    close(jacobians, expected)


@every_case
def test_forward_mode(case: Case) -> None:
    """Forward mode, which runs through the reference, agrees with the op's own backward."""
    call = case.build()
    inputs = inputs_of(call)
    tangents = [rand(*t.shape, seed=i) for i, t in enumerate(inputs)]
    run = of_tensors(call, linear_adapter)
    _, products = torch.func.jvp(run, tuple(inputs), tuple(tangents))
    cotangents = (call.dy, call.daux)
    gradients = torch.func.vjp(run, *inputs)[1](cotangents)
    close(
        sum((c * p).sum() for c, p in zip(cotangents, products, strict=True)),
        sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True)),
    )
    for grad_mode in (torch.enable_grad, torch.no_grad):  # no_grad leaves forward mode on
        with grad_mode(), fwad.dual_level():
            outputs = run(*map(fwad.make_dual, inputs, tangents))
            close(tuple(fwad.unpack_dual(o).tangent for o in outputs), products)


@every_case
@pytest.mark.parametrize("create_graph", [False, True])
def test_tangents_go_through_the_backward(case: Case, create_graph: bool) -> None:
    """Those of an upstream gradient were dropped; the gradient is linear in it."""
    call = case.build()
    inputs = list(call.inputs().values())
    y, aux = linear_adapter(call.x, call.weights, call.routing, **call.options)
    upstream, tangents = [[torch.randn_like(r) for r in (y, aux)] for _ in range(2)]
    want = torch.autograd.grad(
        (y, aux), inputs, tangents, retain_graph=True, materialize_grads=True
    )
    with fwad.dual_level():
        duals = [fwad.make_dual(*pair) for pair in zip(upstream, tangents, strict=True)]
        gradients = torch.autograd.grad(
            (y, aux), inputs, duals, create_graph=create_graph, materialize_grads=True
        )
        for gradient, tangent in zip(gradients, want, strict=True):
            got = fwad.unpack_dual(gradient).tangent
            torch.testing.assert_close(torch.zeros_like(tangent) if got is None else got, tangent)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_mode_keeps_weights_of_float32(dtype: torch.dtype) -> None:
    """It rounded them to the type of x, as the op on the CPU does not."""
    call = Case(shape=(4, 2, 7)).build()
    x = call.x.to(dtype)
    options = {"training": True, "l2_lambda": 1.0, "compute_dtype": dtype}
    want = linear_adapter(x, call.weights, call.routing, **options)[1]  # in float32
    with fwad.dual_level():
        got = linear_adapter(x, call.weights, call.routing, **options)[1]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    rounded = map_weights(lambda w: w.to(dtype).float(), call.weights)
    other = linear_adapter(x, rounded, call.routing, **options)[1]
    assert (other - want).abs().max() > 1e-4 * want.abs().max()


def test_saved_values_are_those_of_the_forward() -> None:
    """The backward took those of the seed, the routing and the losses' weights from now."""
    call = CASES["training"].build()
    inputs = list(call.inputs().values())
    seed, l2_lambda = call.options["seed"], call.options["l2_lambda"]
    changed = (seed, l2_lambda, *call.routing[1:])

    def gradients(change: Callable[[Tensor], Any]) -> tuple[Tensor, ...]:
        results = linear_adapter(call.x, call.weights, call.routing, **call.options)
        for tensor in changed:
            change(tensor)
        return torch.autograd.grad([r.sum() for r in results], inputs, materialize_grads=True)

    want = gradients(lambda tensor: None)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        got = gradients(lambda tensor: tensor.zero_())
    for result, expected in zip(got, want, strict=True):
        assert torch.equal(result, expected)


def test_jacfwd_and_hessian() -> None:
    call = CASES["routed-lists"].build()
    x, *rest = inputs_of(call)
    run, loss = of_tensors(call, linear_adapter), loss_of(call, linear_adapter)
    close(
        torch.func.jacfwd(lambda x: run(x, *rest)[0])(x),
        torch.func.jacrev(lambda x: run(x, *rest)[0])(x),
    )
    hessian = torch.func.hessian(lambda x: loss(x, *rest))(x)
    close(hessian, torch.autograd.functional.hessian(lambda x: loss(x, *rest), x))


@every_case
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_vmap(case: Case, grad_mode: Any) -> None:
    """Over x, a weight, or all of them, along any dimension."""
    call = case.build()
    inputs = inputs_of(call)
    run = of_tensors(call, linear_adapter)
    mapped = [torch.stack([t, 2 * t, t + 1], dim=-1) for t in inputs]
    every = range(len(inputs))
    for chosen in ([0], [1], [2], [*every]):
        in_dims = tuple(-1 if i in chosen else None for i in every)
        arguments = [mapped[i] if i in chosen else inputs[i] for i in every]
        with grad_mode():
            actual = torch.vmap(run, in_dims=in_dims)(*arguments)
        one_by_one = [
            of_tensors(call, reference.linear_adapter)(
                *(a.select(-1, k) if i in chosen else a for i, a in enumerate(arguments))
            )
            for k in range(3)
        ]
        close(actual, tuple(torch.stack(results) for results in zip(*one_by_one, strict=True)))


@every_case
def test_per_sample_gradients(case: Case) -> None:
    """vmap over grad, the recipe for a gradient of each sample."""
    call = case.build()
    x, *weights = inputs_of(call)
    xs = torch.stack([x, x + 1.0, x * 2.0])
    every = tuple(range(1, len(weights) + 1))
    gradient = torch.func.grad(loss_of(call, linear_adapter), argnums=every)
    actual = torch.vmap(gradient, in_dims=(0, *(None for _ in weights)))(xs, *weights)
    expected = torch.func.grad(loss_of(call, reference.linear_adapter), argnums=every)
    each = [expected(x, *weights) for x in xs]
    close(actual, tuple(torch.stack(gradients) for gradients in zip(*each, strict=True)))


def test_vmap_over_ids() -> None:
    weights = Case(dtype=torch.float64, shape=(1, 7)).build().weights
    x, ids = rand(3, 5, 7), torch.tensor([[0, 1, 2, -1, 0], [2, 2, 2, 2, 2], [-1, 0, 1, 0, 1]])

    def loss(x: Tensor, ids: Tensor, route: Any, function: Function) -> Tensor:
        return function(x, weights, route(ids, 3))[0].square().sum()

    got = torch.vmap(torch.func.grad(lambda x, i: loss(x, i, route, linear_adapter)))(x, ids)
    want = [
        torch.func.grad(lambda x, i: loss(x, i, reference.route, reference.linear_adapter))(*pair)
        for pair in zip(x, ids, strict=True)
    ]
    close(got, torch.stack(want))


def test_vmap_over_nothing_is_a_clear_error() -> None:
    weights = CASES["one-adapter"].build().weights
    with pytest.raises(RuntimeError, match=r"adapter_ext\.linear_adapter.* size 0"):
        torch.vmap(lambda x: linear_adapter(x, weights)[0])(rand(0, 4, 16))


def test_routes_with_mapped_indices_are_an_error() -> None:
    block = make_block("a", "b")

    def run(x: Tensor, ids: Tensor) -> Tensor:
        with block.route_adapters(ids):
            return block(x)

    x, ids = rand(3, 4, D), torch.tensor([0, 1, -1, 1])
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(run)(x, ids.expand(3, 4))
    close(torch.vmap(run, in_dims=(0, None))(x, ids), torch.stack([run(row, ids) for row in x]))


def test_vmap_draws_masks_as_its_randomness_says() -> None:
    call = Case(dtype=torch.float64, shape=(6, 7)).build()

    def masked(x: Tensor) -> Tensor:
        return linear_adapter(x, call.weights, call.routing, training=True, dropout=0.5)[0]

    xs = call.x.detach().expand(4, -1, -1)
    same = torch.vmap(masked, randomness="same")(xs)
    assert all(torch.equal(y, same[0]) for y in same)
    different = torch.vmap(masked, randomness="different")(xs)
    assert not any(torch.equal(y, different[0]) for y in different[1:])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(masked)(xs)


def test_batched_gradients_are_a_clear_error() -> None:
    """``is_grads_batched`` uses PyTorch's old vmap, for which ops can't have rules."""
    call = CASES["one-adapter"].build()
    y, _ = call.forward()
    with pytest.raises(RuntimeError, match=r"not implemented for adapter_ext::linear_adapter_back"):
        torch.autograd.grad(y, call.x, torch.stack([call.dy, call.dy]), is_grads_batched=True)


# --- functional_call ------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, ["a", None, "b", "a"]], ids=["chain", "routed"])
def test_functional_call_uses_the_parameters_given(names: Any) -> None:
    block, other = make_block("a", "b"), make_block("a", "b", seed=5)
    x = rand(4, 3, D)
    parameters = {k: p.detach() for k, p in other.named_parameters()}

    def run(parameters: dict[str, Tensor]) -> Tensor:
        with nullcontext() if names is None else block.route_adapters(names):
            return torch.func.functional_call(block, parameters, (x,))

    with nullcontext() if names is None else other.route_adapters(names):
        y = other(x)
    assert torch.equal(run(parameters), y)
    assert not torch.allclose(run({}), y)  # the block's own again
    gradients = torch.func.grad(lambda p: run(p).square().sum())(parameters)
    y.square().sum().backward()
    for name, parameter in other.named_parameters():
        close(gradients[name], parameter.grad)
    assert all(p.grad is None for p in block.parameters())


# --- Double backward ------------------------------------------------------------------------------


@every_case
def test_gradient_penalty(case: Case) -> None:
    """Training on the norm of an input's gradient: the reference's gradients, of every weight."""
    call = case.build()

    def penalty(function: Function) -> tuple[Tensor, ...]:
        inputs = list(call.inputs().values())
        y, aux = call.forward(function)
        loss = (y * call.dy).sum() + (aux * call.daux).sum()
        (of_x,) = torch.autograd.grad(loss, call.x, create_graph=True)
        excess = (of_x.flatten(1).norm(dim=1) - 1.0).square().sum()
        return torch.autograd.grad(loss + 10.0 * excess, inputs, materialize_grads=True)

    both(penalty)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("activation", ["swish", "gelu"])
def test_third_order(activation: str, norm_position: str) -> None:
    """PyTorch's own layer norm fails this check."""
    options = {"activation": activation, "norm_position": norm_position, "eps": 0.5}
    call = Case(
        bottlenecks=(2,), routing="none", shape=(2, 3), dtype=torch.float64, options=options
    ).build()

    def squared_gradient(x: Tensor) -> Tensor:
        y, _ = linear_adapter(x, call.weights, call.routing, **call.options)
        (of_x,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return of_x.square().sum()

    assert torch.autograd.gradgradcheck(squared_gradient, (call.x,), rtol=1e-4)


def test_first_order_gradients_are_the_same_with_a_graph() -> None:
    """``create_graph`` costs no precision: the native backward runs all the same."""
    call = Case(options={"training": True, "dropout": 0.2, "l2_lambda": 0.3}).build()
    plain = call.results()
    for name, result in call.results(create_graph=True).items():
        assert torch.equal(result, plain[name]), name


@pytest.mark.parametrize("enabled", [False, True])
def test_double_backward_is_not_rounded_by_autocast(enabled: bool) -> None:
    """Autocast around a backward must not round what the forward did not."""
    call = Case(shape=(5, 16)).build()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        y, _ = linear_adapter(call.x, call.weights, call.routing, **call.options)
        (of_x,) = torch.autograd.grad(y, call.x, call.dy, create_graph=True)
        actual = torch.autograd.grad(of_x, [call.x, *call.weights.down], call.dy)
    exact = call.upcast()
    y, _ = exact.forward(reference.linear_adapter)
    (of_x,) = torch.autograd.grad(y, exact.x, exact.dy, create_graph=True)
    expected = torch.autograd.grad(of_x, [exact.x, *exact.weights.down], exact.dy)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


# --- Activation checkpointing ---------------------------------------------------------------------


def make_model(**cfg: Any) -> nn.Sequential:
    """Hosts whose adapters draw masks and, one adapter and call, whether they run at all."""
    strategy = adapter_ext.ResidualAddAdapterStrategyConfig(stochastic_depth=0.4)
    blocks = [Block().double() for _ in range(2)]
    for i, block in enumerate(blocks):
        block.add_adapter("a", config(dim=3 + i, dropout=0.3, adapter_strategy=strategy))
        block.add_adapter("b", config(dim=2, dropout=0.3, adapter_strategy=strategy))
    model = nn.Sequential(blocks[0], nn.Tanh(), blocks[1])
    randomize(model)
    return model.train()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("names", [None, ["a", "b", None, "a", "b"]], ids=["chain", "routed"])
def test_checkpointing_replays_the_masks(names: Any, use_reentrant: bool) -> None:
    model = make_model()
    x = rand(5, 2, D).requires_grad_()
    inputs = [x, *model.parameters()]
    upstream = rand(5, 2, D, seed=9)

    def routes() -> Any:
        return nullcontext() if names is None else adapter_ext.route_adapters(model, names)

    def results(checkpointed: bool, seed: int) -> list[Tensor]:
        for tensor in inputs:
            tensor.grad = None
        torch.manual_seed(seed)
        if not checkpointed:
            with routes():
                y = model(x)
        elif use_reentrant:
            # It has no context_fn, and runs the function again as it is.
            def routed(x: Tensor) -> Tensor:
                with routes():
                    return model(x)

            y = checkpoint(routed, x, use_reentrant=True)
        else:
            with routes():
                y = checkpoint(
                    model, x, use_reentrant=False, context_fn=lambda: (nullcontext(), routes())
                )
        torch.rand(3)  # the loss may draw as well
        y.backward(upstream)
        return [y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in inputs)]

    kept = 0
    for seed in range(4):
        plain, replayed = results(False, seed), results(True, seed)
        for got, want in zip(replayed, plain, strict=True):
            assert torch.equal(got, want)
        kept += int(plain[2].any())
    assert kept  # not all of them dropped
    assert not torch.equal(results(False, 0)[0], results(False, 1)[0])


# --- Deterministic algorithms ---------------------------------------------------------------------


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Shift(nn.Module, adapter_ext.AdapterModuleUtil):
    """An adapter that the op does not know, called on its own samples."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(D))
        self.setup_adapter_strategy(None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.bias)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("names", [None, ["a", "b", None, "shift", "shift"]])
def test_deterministic_algorithms(names: Any) -> None:
    model = make_model()
    model[0].add_adapter("shift", {"_target_": f"{__name__}.Shift"})
    x = rand(5, 2, D)

    def step(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(3)
        with nullcontext() if names is None else adapter_ext.route_adapters(model, names):
            model(x).square().sum().backward()
        return [p.grad for p in model.parameters()]

    first, second = step(copy.deepcopy(model)), step(copy.deepcopy(model))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    call = Case().build()
    call.results()
    call.results(create_graph=True)
    assert isinstance(call.weights, AdapterWeights)


every_kind_of_names = pytest.mark.parametrize("names", [["a", "b"], torch.tensor([0, 1])], ids=type)


@every_kind_of_names
@pytest.mark.parametrize("trained", [True, False])
def test_every_transform_under_routing(names: Any, trained: bool) -> None:
    """Some failed where samples are counted, or on tensors of a transform that had ended."""
    block = make_block("a", "b").requires_grad_(trained)
    x, t = rand(2, D), rand(2, D, seed=2)

    def loss(x: Tensor) -> Tensor:
        return block(x).pow(3).sum()

    def transforms() -> list[Tensor]:
        func = torch.func
        return [
            func.hessian(loss)(x),
            func.grad(loss)(x),
            func.jvp(block, (x,), (t,))[1],
            func.linearize(block, x)[1](t),
            torch.vmap(func.grad(loss))(torch.stack([x, t])),
            func.jacrev(block)(x),
        ]

    with block.route_adapters(names):
        routed = transforms()

    def chosen(x: Tensor) -> Tensor:
        rows = [block.linear(x[i : i + 1]) for i in range(2)]
        ran = [formula(block.adapter_layer[n], row) for n, row in zip("ab", rows, strict=True)]
        return torch.cat([row + own for row, own in zip(rows, ran, strict=True)])

    block_forward, block.forward = block.forward, chosen
    close(routed, transforms())
    block.forward = block_forward


def test_vmap_counts_samples() -> None:
    """Adapters without any were stepped."""
    block = make_block("a", "b").requires_grad_(True)
    optimizer = adapter_ext.optim.AdamW(block, lr=0.1)
    before = copy.deepcopy(block.adapter_layer)
    with block.route_adapters(torch.tensor([0, 0])):
        torch.vmap(block)(rand(3, 2, D)).sum().backward()
    optimizer.step()
    for name, changes in (("a", True), ("b", False)):
        parameters = zip(
            before[name].parameters(), block.adapter_layer[name].parameters(), strict=True
        )
        assert any(not torch.equal(*pair) for pair in parameters) is changes


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_with_other_routes_is_an_error(reentrant: bool) -> None:
    """It gave other gradients without a word."""
    block = make_block("a", "b")
    x = rand(2, D).requires_grad_()
    with block.route_adapters(["a", "a"]):
        y = checkpoint(block, x, use_reentrant=reentrant)
    with (
        block.route_adapters(["b", "b"]),
        pytest.raises(RuntimeError, match="computed again, for the backward, without the routes"),
    ):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_knows_routes_of_several_batches(reentrant: bool) -> None:
    """Routes that had been in force at any time were good enough for what is computed again."""
    block = make_block("a", "b")
    x = rand(2, D).requires_grad_()
    run = partial(checkpoint, block, x, use_reentrant=reentrant)
    with block.route_adapters(["a", "a"]):
        first = run()
    with block.route_adapters(["b", "b"]):
        both = first + run()
        with pytest.raises(RuntimeError, match="computed again, for the backward, without the"):
            both.sum().backward()
    with block.route_adapters(["b", "b"]):
        with block.route_adapters(["a", "a"]):
            inner = run()
        with pytest.raises(RuntimeError, match="computed again, for the backward, without the"):
            inner.sum().backward()
    block(x)  # without routes
    with block.route_adapters(["a", "a"]):
        y = run()
    with pytest.raises(RuntimeError, match="computed again, for the backward, without the"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_in_the_context_of_each_batch(reentrant: bool) -> None:
    block = make_block("a", "b")
    x = rand(2, D).requires_grad_()
    for names in (["a", "b"], ["b", "b"], None, ["a", "b"]):
        with block.route_adapters(names) if names else nullcontext():
            (want,) = torch.autograd.grad(block(x).square().sum(), x)
            with torch.no_grad(), block.route_adapters([None, "a"]):
                block(x)  # in between, as for validation
            y = checkpoint(block, x, use_reentrant=reentrant)
            x.grad = None
            y.square().sum().backward()
        close(x.grad, want)


def test_what_was_not_routed_is_recomputed_without_routes() -> None:
    """With checkpoint_context, too, it was an error, or had the routes that were there by then."""
    block = make_block("a", "b")
    x = rand(2, D).requires_grad_()

    def run() -> Tensor:
        context = adapter_ext.checkpoint_context(block)
        return checkpoint(block, x, use_reentrant=False, context_fn=context)

    def in_turn(forward: Callable[[], Tensor]) -> Tensor:
        chain = forward()
        with block.route_adapters(["a", None]):
            routed = forward()
        with block.route_adapters(["b", "b"]):
            return torch.autograd.grad((chain * routed).sum(), x)[0]

    close(in_turn(run), in_turn(lambda: block(x)))


def test_recomputation_is_not_mistaken_after_a_call_without_gradients() -> None:
    """A call that was routed meanwhile made an error of it."""
    block = make_block("a", "b")
    x = rand(2, D).requires_grad_()
    y = checkpoint(block, x, use_reentrant=False)
    with torch.no_grad(), block.route_adapters([None, "a"]):
        block(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    close(grad, torch.autograd.grad(block(x).sum(), x)[0])
