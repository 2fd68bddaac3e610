"""Models with adapters under torch.compile: one graph, few compilations, eager mode's results.

Inductor compiles where it can change something: in the first tests. The others use ``aot_eager``,
which traces, differentiates and partitions as Inductor does, and compiles nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from compile_testing import (
    NAMES,
    D,
    Routed,
    assert_no_host_reads,
    chain,
    make_model,
    op_names,
    random_ids,
    routed,
)
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from layer_testing import Block, config, make_block, rand, randomize
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import adapter_ext
from adapter_ext import ResidualAddAdapterStrategyConfig, route_adapters


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def _no_recompilation() -> Iterator[None]:
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


class Graphs:
    """A backend that keeps the graphs, forward and backward, as Inductor would get them."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.Graph] = []
        self.backward: list[torch.fx.Graph] = []
        self.compile = aot_autograd(
            fw_compiler=lambda module, _: self._keep(module, self.forward),
            bw_compiler=lambda module, _: self._keep(module, self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )

    def _keep(self, module: torch.fx.GraphModule, graphs: list[torch.fx.Graph]) -> Any:
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        return self.compile(module, inputs)


def results(model: nn.Module, run: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Any]:
    """y, the auxiliary losses, and all gradients of a training step."""
    model.zero_grad()
    x = inputs[0].detach().clone().requires_grad_()
    torch._dynamo.maybe_mark_dynamic(x, 0)
    y = run(x, *inputs[1:])
    losses = [
        loss
        for registry in adapter_ext.AccessMixin.get_module_registry(model).values()
        for loss in registry["adapter_loss"]
    ]
    (y.square().sum() + sum(losses)).backward()
    adapter_ext.AccessMixin.reset_registry(model)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    nonzero = {name: g for name, g in gradients.items() if g.any()}
    return {"y": y.detach(), "x": x.grad, "losses": [loss.detach() for loss in losses], **nonzero}


RANDOM = {
    "dropout": 0.3,
    "adapter_strategy": ResidualAddAdapterStrategyConfig(stochastic_depth=0.3, l2_lambda=0.1),
}


# --- Inductor -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_recompilation")
def test_inductor_inference_of_a_routed_model() -> None:
    """Any batch and any routing, one compilation; on any thread."""
    model = Routed(make_model())
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for seed, (batch, time) in enumerate([(5, 2), (3, 4), (17, 2)]):
            x, ids = rand(batch, time, D, seed=seed), random_ids(batch, seed)
            close(compiled(x, ids), routed(model.model, x, ids))
        randomize(model, seed=8)
        close(compiled(x, ids), routed(model.model, x, ids))
        with pytest.raises(RuntimeError, match=r"indices of adapters must be in \[-1, 4\)"):
            compiled(x, ids + 10)


@pytest.mark.usefixtures("_no_recompilation")
@pytest.mark.parametrize("kind", ["chain", "routed"])
def test_inductor_training(kind: str) -> None:
    """With Inductor's own random numbers switched off: eager mode's masks, and so its results."""
    model = make_model(**RANDOM).train()
    run = model if kind == "chain" else Routed(model)
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    with torch._inductor.config.patch(fallback_random=True):
        for seed, (batch, time) in enumerate([(5, 2), (8, 3)]):
            inputs = [rand(batch, time, D, seed=seed)]
            if kind == "routed":
                inputs.append(random_ids(batch, seed))
            torch.manual_seed(seed)
            expected = results(model, run, *inputs)
            assert len(expected["losses"]) == 6
            torch.manual_seed(seed)
            actual = results(model, compiled, *inputs)
            assert actual.keys() == expected.keys()
            for name, value in actual.items():
                close(value, expected[name])


def test_inductor_draws_masks_of_its_own() -> None:
    """Without that setting: other masks than eager mode's, as random, and backward's the same."""
    block = Block().double()
    block.add_adapter("a", config(norm_position="post", dropout=0.5))
    adapter: Any = block.adapter_layer["a"]
    nn.init.zeros_(adapter.module[3].weight)
    nn.init.ones_(adapter.module[3].bias)  # the output is one, and y - x the mask
    block.train()

    def masks(x: Tensor) -> list[Tensor]:
        first = block.forward_enabled_adapters(x)
        return [first - x, block.forward_enabled_adapters(first) - first]

    compiled = torch.compile(masks, fullgraph=True)
    x = torch.zeros(400, D, dtype=torch.float64, requires_grad=True)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.stack(compiled(x)).detach()

    first, second = draw(1), draw(2)
    assert torch.equal(draw(1), first)
    assert not torch.equal(second, first)
    for mask in (*first, *second):
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        assert 0.45 < (mask > 0).double().mean() < 0.55
        columns = (mask > 0).double()
        assert ((columns.T @ columns / 400 - 0.25).fill_diagonal_(0.0).abs() < 0.13).all()
    different = [(a != b).double().mean() for a, b in ((first[0], first[1]), (first[0], second[0]))]
    assert all(0.45 < share < 0.55 for share in different)
    # The backward's mask is the forward's: d y / d bias counts the kept elements of a column.
    block.zero_grad()
    kept = torch.stack(compiled(x))
    kept.sum().backward()
    close(adapter.module[3].bias.grad, kept.detach().sum(dim=(0, 1)))


# --- Graphs ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_recompilation")
@pytest.mark.parametrize("kind", ["chain", "routed", "entered-outside", "names"])
def test_no_host_reads(kind: str) -> None:
    """Nothing in the graphs waits for a value or copies from the host: fit for CUDA graphs."""
    model = make_model(**RANDOM).train()
    x, ids = rand(5, 2, D), random_ids(5, seed=1)
    graphs = Graphs()
    inputs, outside = [x], nullcontext()
    run: nn.Module = model
    if kind == "routed":
        run, inputs = Routed(model), [x, ids]
    elif kind == "entered-outside":
        outside = route_adapters(model, ids)
    elif kind == "names":
        outside = route_adapters(model, ["a", None, "d", "c", "b"])
    with outside:
        results(model, torch.compile(run, fullgraph=True, backend=graphs), *inputs)
    assert len(graphs.forward) == len(graphs.backward) == 1
    assert_no_host_reads([*graphs.forward, *graphs.backward])
    forward, backward = op_names(graphs.forward), op_names(graphs.backward)
    # One seed for each adapter with random numbers, or under routing for each kind of a host's.
    assert forward.count("aten::randint") == (6 if kind == "chain" else 4)
    assert "adapter_ext::linear_adapter_backward" in backward
    assert not any("randint" in name or "forward" in name for name in backward)


# --- What recompiles, and what does not -----------------------------------------------------------


@pytest.mark.usefixtures("_no_recompilation")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_rows_batches_and_weights_do_not_recompile(inside: bool, training: bool) -> None:
    """The context entered in the compiled code, or around it."""
    model = make_model(**(RANDOM if training else {})).train(training)
    run = Routed(model) if inside else model
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")

    def call(run: Callable[..., Tensor], x: Tensor, ids: Tensor) -> Any:
        torch.manual_seed(0)
        with nullcontext() if inside else route_adapters(model, ids):
            return results(model, run, x, ids) if inside else results(model, run, x)

    for seed, batch in enumerate((5, 5, 7, 3, 20)):
        x, ids = rand(batch, 2, D, seed=seed), random_ids(batch, seed)
        torch._dynamo.maybe_mark_dynamic(ids, 0)
        if seed > 1:
            randomize(model, seed)
        actual, expected = call(compiled, x, ids), call(run, x, ids)
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            close(value, expected[name])
        if not training:
            close(actual["y"], routed(model, x, ids))


def test_each_configuration_is_compiled_once() -> None:
    """Enabling and disabling: 2^2 configurations, each visited three times."""
    model = nn.Sequential(make_block("a", "b"), make_block("a", seed=3))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = rand(4, D)
    for _ in range(3):
        for a in (True, False):
            for b in (True, False):
                model[0].set_enabled_adapters("a", a)
                model[0].set_enabled_adapters("b", b)
                close(compiled(x), chain(model, x))
    assert counter.frame_count == 4


def test_names_recompile_where_others_are_used() -> None:
    """In the order of their first use; not where the same ones go to other samples."""
    model = make_model()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = rand(4, 2, D)
    for names, compilations in (
        (["a", "b", None, "a"], 1),
        (["a", None, "b", "b"], 1),
        (["b", "a", "b", "b"], 2),
        (["a", "b", "b", "b"], 2),
        (["d", "b", "b", "b"], 3),
    ):
        with route_adapters(model, names):
            y = compiled(x)
        ids = torch.tensor([-1 if name is None else NAMES.index(name) for name in names])
        close(y, routed(model, x, ids))
        assert counter.frame_count == compilations


@pytest.mark.usefixtures("_no_recompilation")
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_any_thread_runs_the_compiled_code(inside: bool) -> None:
    model = make_model()
    compiled = torch.compile(
        Routed(model) if inside else model, fullgraph=True, backend="aot_eager"
    )
    outcomes: list[Any] = []

    def serve(seed: int) -> None:
        x, ids = rand(4, 2, D, seed=seed), random_ids(4, seed)
        try:
            with torch.no_grad(), nullcontext() if inside else route_adapters(model, ids):
                y = compiled(x, ids) if inside else compiled(x)
            outcomes.append(torch.allclose(y, routed(model, x, ids)))
        except Exception as error:
            outcomes.append(error)

    for seed in range(3):
        thread = threading.Thread(target=serve, args=(seed,))
        thread.start()
        thread.join()
    assert outcomes == [True, True, True]


def test_compiled_code_leaves_other_threads_routes_alone() -> None:
    """One thread runs eagerly under its routes while another runs, and compiles, routed code."""
    model = make_model()
    compiled = torch.compile(Routed(model), fullgraph=True, backend="aot_eager")
    x, ids, other = rand(4, 2, D), random_ids(4, seed=1), random_ids(4, seed=2)

    def serve() -> None:
        outcomes.append(torch.allclose(compiled(x, other), routed(model, x, other)))

    with torch.no_grad(), route_adapters(model, ids):
        outcomes: list[bool] = []
        for _ in range(2):
            thread = threading.Thread(target=serve)
            thread.start()
            thread.join()
            close(model(x), routed(model, x, ids))
    assert outcomes == [True, True]
    assert all(not host._adapter_routes for host in adapter_ext.mixin.hosts_of(model))
    assert adapter_ext.mixin._traced_routes == ()


# --- Strategies, contexts, errors -----------------------------------------------------------------


@pytest.mark.usefixtures("_no_recompilation")
def test_a_whole_training_step_with_its_losses() -> None:
    """Losses that are read and reset in the compiled code."""
    model = nn.Sequential(make_block("a", "b"), make_block("b", seed=4)).train()
    for i, host in enumerate(model):
        for adapter in host.adapter_layer.values():
            adapter.adapter_strategy.l2_lambda = 0.1 + i

    def loss_of(x: Tensor, ids: Tensor) -> Tensor:
        with route_adapters(model, ids):
            loss = model(x).square().mean()
        for host in model:
            loss = loss + sum(host.adapter_losses().values())
            host.reset_adapter_losses()
        return loss

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x, ids = rand(4, 2, D, seed=seed), torch.tensor([0, 1, -1, seed])
        gradients = []
        for run in (loss_of, compiled):
            model.zero_grad()
            loss = run(x, ids)
            loss.backward()
            gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
        close(gradients[1], gradients[0])


@pytest.mark.usefixtures("_no_recompilation")
def test_contexts_in_contexts() -> None:
    """An inner context in compiled code overrides an outer one, in it or around it."""
    model = make_model()
    one, two = random_ids(3, seed=1), random_ids(3, seed=2)

    def nested(x: Tensor, outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        with route_adapters(model, outer):
            with route_adapters(model, inner):
                first = model(x)
            return first, model(x)

    x = rand(3, 2, D)
    first, second = torch.compile(nested, fullgraph=True, backend="aot_eager")(x, one, two)
    close(first, routed(model, x, two))
    close(second, routed(model, x, one))
    compiled = torch.compile(Routed(model), fullgraph=True, backend="aot_eager")
    with route_adapters(model, one):
        close(compiled(x, two), routed(model, x, two))
        close(model(x), routed(model, x, one))


@pytest.mark.usefixtures("_no_recompilation")
def test_names_in_compiled_code() -> None:
    model = make_model()

    def run(x: Tensor) -> Tensor:
        with route_adapters(model, ["c", None, "a"]):
            return model(x)

    x = rand(3, 2, D)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    close(compiled(x), routed(model, x, torch.tensor([2, -1, 0])))


def test_disabled_adapters_never_run() -> None:
    """Nor do their samples pass in silence, when an adapter is disabled after compilation."""
    model = make_model()
    compiled = torch.compile(Routed(model), fullgraph=True, backend="aot_eager")
    x, ids = rand(3, 2, D), torch.tensor([0, 3, -1])
    close(compiled(x, ids), routed(model, x, ids))
    model[2].set_enabled_adapters("d", False)
    with pytest.raises(RuntimeError, match="adapter 'd' is disabled"):
        compiled(x, ids)
    ids = torch.tensor([0, 1, -1])
    close(compiled(x, ids), routed(model, x, ids))


def test_tables_of_indices() -> None:
    """Indices of every other host, in no order, become those of a host, however that is made."""
    model = nn.Sequential(Block(), Block()).double()
    for i in (3, 7, 1, 2, 0, 5, 4, 6):
        model[i % 2 if i < 6 else 1].add_adapter(f"a{i}", config(dim=1))
        model[1 if i < 3 else 0].add_adapter(f"b{i}", config(dim=1, activation="relu"))
    randomize(model)
    ids = torch.tensor([*adapter_ext.adapter_index(model).values(), -1, -1])
    x = rand(len(ids), D)
    with route_adapters(model, ids):
        expected = model(x)
    compiled = torch.compile(Routed(model), fullgraph=True, backend="aot_eager")
    close(compiled(x, ids), expected)


@pytest.mark.usefixtures("_no_recompilation")
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast(half: torch.dtype) -> None:
    """Inside or around compiled code: eager mode's bits and types."""
    model = make_model().float()

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=half):
            return model(x)

    x = rand(3, 2, D, dtype=torch.float32)
    expected = inside(x)
    assert expected.dtype is half  # the last host's adapters add, but a product comes before
    assert torch.equal(torch.compile(inside, fullgraph=True, backend="aot_eager")(x), expected)
    with torch.autocast("cpu", dtype=half):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)


def test_double_backward_is_a_clear_error() -> None:
    block = make_block("a")
    x = rand(3, D).requires_grad_()
    y = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.square().sum().backward()


@pytest.mark.usefixtures("_no_recompilation")
def test_checkpointing_in_compiled_code() -> None:
    """The masks of the recomputation are those of the forward."""
    model = make_model(**{**RANDOM, "adapter_strategy": None}).train()

    def run(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    x = rand(4, 2, D)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    outcomes = []
    for call in (model, compiled):
        torch.manual_seed(5)
        outcomes.append(results(model, call, x))
    for name, value in outcomes[1].items():
        close(value, outcomes[0][name])
