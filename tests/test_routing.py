"""Routing: every sample its own adapter."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from layer_testing import Block, D, config, formula, make_block, rand, randomize
from torch import nn
from torch.utils.checkpoint import checkpoint

import adapter_ext
from adapter_ext import (
    AbstractAdapterStrategy,
    AccessMixin,
    AdapterModuleUtil,
    LinearAdapter,
    ResidualAddAdapterStrategy,
    ResidualAddAdapterStrategyConfig,
    ReturnResultAdapterStrategy,
    ReturnResultAdapterStrategyConfig,
    adapter_index,
    ops,
    route_adapters,
)

NAMES = ("a", "a1", "module", "1", "x1")
BATCH = ["a1", None, "x1", "a1", "1", "module", None]


class Shift(nn.Module, AdapterModuleUtil):
    """An adapter that the op does not know."""

    def __init__(self, width=D):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(width))
        self.setup_adapter_strategy(None)

    def forward(self, x):
        return torch.tanh(x + self.bias)


SHIFT = f"{__name__}.Shift"


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()  # the tests' recompilations of one forward would add up


@pytest.fixture
def block():
    return make_block(*NAMES)


@pytest.fixture
def op_calls(monkeypatch):
    calls = []

    def spy_on(name):
        op = getattr(ops, name)

        def spy(*args, **kwargs):
            calls.append(name)
            return op(*args, **kwargs)

        monkeypatch.setattr(ops, name, spy)

    spy_on("linear_adapter")
    spy_on("route")
    return calls


def expected(block, x, names):
    """Each sample by its own adapter's formula."""
    hidden = block.linear(x)
    rows = []
    for row, name in zip(hidden, names, strict=True):
        adapter = None if name is None else block.get_adapter_module(name)
        if adapter is None:
            rows.append(row)
            continue
        out = adapter(row) if isinstance(adapter, Shift) else formula(adapter, row)
        residual = isinstance(adapter.adapter_strategy, ResidualAddAdapterStrategy)
        rows.append(row + out if residual else out)
    return torch.stack(rows)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# --- Results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_names(shape, block, op_calls):
    x = rand(len(BATCH), *shape, D)
    with block.route_adapters(BATCH):
        y = block(x)
    close(y, expected(block, x, BATCH))
    assert op_calls == ["route", "linear_adapter"]
    assert torch.equal(y[1], block.linear(x)[1])


def test_indices(block, op_calls):
    assert block.adapter_index == {"a": 0, "a1": 1, "module": 2, "1": 3, "x1": 4}
    ids = torch.tensor([-1 if n is None else block.adapter_index[n] for n in BATCH])
    x = rand(len(BATCH), 3, D)
    with block.route_adapters(ids):
        close(block(x), expected(block, x, BATCH))
    assert op_calls == ["route", "linear_adapter"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_indices_take_adapters_without_samples_along_only_for_gradients(
    training, gradients, block, monkeypatch
):
    passed = []
    op = ops.linear_adapter
    monkeypatch.setattr(
        ops, "linear_adapter", lambda x, w, *a, **k: passed.append(len(w.down)) or op(x, w, *a, **k)
    )
    names = ["x1", None, "a1", "x1"]
    ids = torch.tensor([-1 if n is None else block.adapter_index[n] for n in names])
    x = rand(4, D)
    block.train(training)
    with block.route_adapters(ids), torch.set_grad_enabled(gradients):
        close(block(x), expected(block, x, names))
    assert passed == [len(NAMES) if training or gradients else 2]


def test_routes_by_index_made_without_gradients_serve_training_too(block):
    x = rand(2, D)
    with block.route_adapters(torch.tensor([4, 1])):
        with torch.no_grad():
            block.eval()(x)
        block.train()(x).sum().backward()
    for name in NAMES:
        grad = block.adapter_layer[name].module[1].weight.grad
        assert grad.any() == (name in ("x1", "a1"))


def test_depth_is_drawn_by_index_with_and_without_gradients():
    strategy = ResidualAddAdapterStrategyConfig(stochastic_depth=0.5)
    block = make_block(*NAMES, adapter_strategy=strategy).train()
    x = rand(3, D)
    with block.route_adapters(torch.tensor([4, 1, 2])):
        for seed in range(8):
            torch.manual_seed(seed)
            y = block(x)
            torch.manual_seed(seed)
            with torch.no_grad():
                assert torch.equal(block(x), y)


def test_indices_of_rows(block):
    ids = torch.tensor([[0, -1, 4], [4, 2, 2]])
    names = [None if i < 0 else NAMES[i] for i in ids.flatten().tolist()]
    x = rand(2, 3, D)
    with block.route_adapters(ids):
        close(block(x), expected(block, x.reshape(6, D), names).reshape(2, 3, D))


def test_nobody_uses_an_adapter(block):
    x = rand(2, D)
    for nobody in ([None, None], torch.tensor([-1, -1])):
        with block.route_adapters(nobody):
            assert torch.equal(block(x), block.linear(x))
    with block.route_adapters([]):
        assert block(rand(0, D)).shape == (0, D)
    with block.route_adapters(torch.zeros(0, dtype=torch.int64)):
        assert block(rand(0, 2, D)).shape == (0, 2, D)


def test_outside_the_context_the_enabled_chain_runs(block):
    x = rand(2, D)
    before = block(x)
    with block.route_adapters(["a", "a"]):
        assert not torch.allclose(block(x), before)
    assert torch.equal(block(x), before)


@pytest.mark.parametrize("indices", [False, True])
def test_unlike_adapters_are_grouped(indices, op_calls):
    block = Block().double()
    for name, cfg in {
        "a": {},
        "b": {"dim": 8},
        "c": {"activation": "relu"},
        "d": {"activation": "relu", "norm_position": "post", "dim": 1},
        "e": {"adapter_strategy": ReturnResultAdapterStrategyConfig()},
        "f": {"activation": "relu", "dim": 2},
        "g": {"activation": "silu"},
        "h": {"adapter_strategy": ResidualAddAdapterStrategyConfig(0.5, 0.25)},
    }.items():
        block.add_adapter(name, config(**cfg))
    block.add_adapter("s", {"_target_": SHIFT})
    randomize(block)
    block.eval()
    names = [*"hgfedcba", None, *"ssbda"]
    ids = torch.tensor([block.adapter_index.get(n, -1) for n in names])
    x = rand(len(names), 2, D)
    with block.route_adapters(ids if indices else names):
        close(block(x), expected(block, x, names))
    # {a, b, g, h} (depth and loss are off in evaluation), {c, f}, {d}, {e}
    assert op_calls.count("linear_adapter") == 4
    # With indices, one more to count the samples of each in the backward.
    assert op_calls.count("route") == 4 + indices


def test_dropout_follows_each_adapter(op_calls):
    block = make_block("a", "b", "c", dropout=1.0).double()
    block.adapter_layer["b"].train()
    x = rand(3, D)
    with block.route_adapters(["a", "b", "c"]):
        y = block(x)
    close(y, expected(block, x, ["a", None, "c"]))
    assert op_calls.count("linear_adapter") == 2


def test_stochastic_depth_draws_for_each_adapter():
    block = make_block(*"abcdefgh").train()
    for adapter in block.adapter_layer.values():
        adapter.adapter_strategy.stochastic_depth = 0.5
    x = rand(8, D)
    hidden = block.linear(x)
    names = list("abcdefgh")
    full = expected(block, x, names) - hidden
    with block.route_adapters(names):
        delta = block(x) - hidden
    kept = delta.abs().sum(1) > 0
    assert 0 < kept.sum() < 8
    close(delta[kept], 2 * full[kept])


def test_slow_path_of_hosts_and_strategies_that_override():
    seen = []

    class Host(Block):
        def forward_single_enabled_adapter_(self, input, adapter_module, **kwargs):
            seen.append((kwargs["adapter_name"], input.shape))
            return super().forward_single_enabled_adapter_(input, adapter_module, **kwargs)

    class Minus(ResidualAddAdapterStrategy):
        def forward(self, input, adapter, *, module):
            return input - adapter(input)

    block = Host().double()
    for name in "ab":
        block.add_adapter(name, config())
    randomize(block)
    block.adapter_layer["b"].adapter_strategy = Minus()
    x = rand(5, 2, D)
    names = ["b", "a", None, "b", "b"]
    want = expected(block, x, names)
    hidden = block.linear(x)
    minus = torch.tensor([n == "b" for n in names])
    want[minus] = 2 * hidden[minus] - want[minus]
    with block.route_adapters(names):
        close(block(x), want)
    assert seen == [("b", (3, 2, D)), ("a", (1, 2, D))]
    seen.clear()
    with block.route_adapters(torch.tensor([[1, -1]] * 5)):
        close(block(x)[:, 1], hidden[:, 1])
    assert seen == [("b", (5, D))]


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_run_under_routing(register, block):
    shapes = []
    adapter = block.adapter_layer["a1"]
    getattr(adapter, register)(lambda m, args, *_: shapes.append(args[0].shape))
    x = rand(len(BATCH), D)
    with block.route_adapters(BATCH):
        close(block(x), expected(block, x, BATCH))
    assert shapes[0] == (2, D)


@pytest.mark.parametrize("kind", ["patched", "swapped layer", "eps"])
def test_changed_adapters_run_under_routing(kind, block):
    adapter = block.adapter_layer["a1"]
    x = rand(2, D)
    hidden = block.linear(x)
    if kind == "eps":
        adapter.module[0].eps = 0.25
        want = hidden[0] + adapter.module(hidden[0])
    elif kind == "patched":
        adapter.adapter_strategy.compute_output = lambda input, *_, **__: input
        want = 2 * hidden[0]
    else:
        adapter.module[2] = nn.Tanh()
        want = hidden[0] + adapter.module(hidden[0])
    with block.route_adapters(["a1", "a"]):
        y = block(x)
    close(y[0], want)
    close(y[1], hidden[1] + formula(block.adapter_layer["a"], hidden[1]))


def change_hook(adapter):
    return adapter.module[1].register_forward_hook(lambda m, a, out: out * 0).remove


def change_activation(adapter):
    before, adapter.module[2] = adapter.module[2], nn.ReLU()
    return lambda: adapter.module.__setitem__(2, before)


def change_eps(adapter):
    adapter.module[0].eps = 0.25
    return lambda: setattr(adapter.module[0], "eps", 1e-5)


def change_parameter(adapter):
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    adapter.load_state_dict({k: v * 2 for k, v in before.items()}, assign=True)
    return lambda: adapter.load_state_dict(before, assign=True)


def change_strategy(adapter):
    before, adapter.adapter_strategy = adapter.adapter_strategy, ReturnResultAdapterStrategy()
    return lambda: setattr(adapter, "adapter_strategy", before)


def change_strategy_method(adapter):
    adapter.adapter_strategy.compute_output = lambda input, *_, **__: input
    return lambda: delattr(adapter.adapter_strategy, "compute_output")


def change_forward(adapter):
    adapter.module[3].forward = lambda x: torch.ones(*x.shape[:-1], D, dtype=x.dtype)
    return lambda: delattr(adapter.module[3], "forward")


def change_own_hook(adapter):
    return adapter.register_forward_hook(lambda m, a, out: out * 0).remove


def change_own_hook_table(adapter):
    before = adapter._forward_hooks
    adapter._forward_hooks = type(before)({-1: lambda m, a, out: out * 0})
    return lambda: setattr(adapter, "_forward_hooks", before)


def change_own_forward(adapter):
    adapter.forward = torch.sin
    return lambda: delattr(adapter, "forward")


def change_class(adapter):
    adapter.__class__ = Doubling
    return lambda: setattr(adapter, "__class__", LinearAdapter)


def change_call(adapter):
    class Called(LinearAdapter):
        def __call__(self, x):
            return 2 * super().__call__(x)

    adapter.__class__ = Called
    return lambda: setattr(adapter, "__class__", LinearAdapter)


def change_layers(adapter):
    adapter.module.append(nn.Tanh())
    return lambda: adapter.module.pop(-1)


def change_container(adapter):
    before, adapter.module = adapter.module, nn.Sequential(nn.Tanh())
    return lambda: setattr(adapter, "module", before)


def change_bias(adapter):
    adapter.module[3].bias = nn.Parameter(rand(D))
    return lambda: setattr(adapter.module[3], "bias", None)


def change_dropout(adapter):
    adapter.dropout = nn.Dropout(1.0).train()
    return lambda: setattr(adapter, "dropout", None)


def change_strategy_class(adapter):
    adapter.adapter_strategy.__class__ = Negative
    return lambda: setattr(adapter.adapter_strategy, "__class__", ResidualAddAdapterStrategy)


class Doubling(LinearAdapter):
    def forward(self, x):
        return 2 * super().forward(x)


class Negative(ResidualAddAdapterStrategy):
    def compute_output(self, input, adapter, *, module):
        return -adapter(input)


@pytest.mark.parametrize(
    "change",
    [
        change_own_hook,
        change_own_hook_table,
        change_own_forward,
        change_class,
        change_call,
        change_layers,
        change_container,
        change_bias,
        change_dropout,
        change_strategy_class,
        change_hook,
        change_activation,
        change_eps,
        change_parameter,
        change_strategy,
        change_strategy_method,
        change_forward,
    ],
)
def test_changes_within_a_context_are_honoured_at_once(change, block):
    adapter = block.adapter_layer["a1"]
    x = rand(3, D)
    names = ["a1", "a", "a1"]
    with block.route_adapters(names):
        before = block(x)
        undo = change(adapter)
        changed = block(x)
        hidden = block.linear(x)
        want = adapter.adapter_strategy(hidden, adapter, module=block)
        undo()
        close(block(x), before)
    close(changed[::2], want[::2])
    close(changed[1], before[1])
    assert not torch.allclose(changed[0], before[0])


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (LinearAdapter, "forward"),
        (ResidualAddAdapterStrategy, "forward"),
        (ResidualAddAdapterStrategy, "compute_output"),
        (AbstractAdapterStrategy, "__call__"),
    ],
)
def test_methods_patched_on_classes_within_a_context_run(owner, method, block, monkeypatch):
    x = rand(2, D)
    with block.route_adapters(["a1", "a"]):
        before = block(x)
        calls = []
        stock = getattr(owner, method)
        patched = lambda *args, **kwargs: calls.append(1) or stock(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(owner, method, patched)
        close(block(x), before)
        assert len(calls) == 2
        monkeypatch.undo()
        close(block(x), before)
        assert len(calls) == 2


def test_dropout_is_looked_at_in_every_call(block):
    adapter = block.adapter_layer["a1"]
    adapter.dropout = nn.Dropout(0.0).eval()
    x = rand(1, D)
    with block.route_adapters(["a1"]):
        full = block(x)
        adapter.dropout.p = 1.0
        close(block(x), full)  # it does not train
        adapter.dropout.train()
        close(block(x), block.linear(x))
        adapter.dropout.p = 0.0
        close(block(x), full)


def test_depth_and_losses_are_looked_at_in_every_call(block):
    block.train()
    strategy = block.adapter_layer["a1"].adapter_strategy
    x = rand(1, D)
    with block.route_adapters(["a1"]):
        full = block(x)
        strategy.stochastic_depth = 1.0
        close(block(x), block.linear(x))
        strategy.stochastic_depth = 0.0
        assert not block.adapter_losses()
        strategy.l2_lambda = 0.5
        close(block(x), full)
        loss = 0.5 * (full - block.linear(x)).square().sum()
        torch.testing.assert_close(block.adapter_losses()["a1"], loss)


def test_shallow_copies_have_their_own_forward(block):
    x = rand(1, D)
    with block.route_adapters(["a1"]):
        block(x)
        other = copy.copy(block.adapter_layer["a1"])
        block.adapter_layer["a1"] = other
        other.forward = torch.sin
        close(block(x), block.linear(x) + block.linear(x).sin())


def test_replicas_have_their_own_weights(block):
    # As DataParallel makes them: what lies in a module's dictionary is shared.
    adapter = block.adapter_layer["a1"]
    x = rand(1, D)
    with block.route_adapters(["a1"]):
        full = block(x)
        replica = adapter._replicate_for_data_parallel()
        replica.module = copy.deepcopy(adapter.module)
        replica.module[3].weight.data *= 3
        block.adapter_layer._modules["a1"] = replica
        close(block(x) - block.linear(x), 3 * (full - block.linear(x)))


def test_removed_adapters_are_freed_at_once(block):
    x = rand(2, D)
    for context in (block.route_adapters(["a1", "a"]), block.route_adapters(torch.tensor([0, 1]))):
        with context:
            block(x)
    kept = weakref.ref(block.adapter_layer["a1"])
    gc.disable()
    try:
        del block.adapter_layer["a1"]
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("layer", [nn.GELU(), nn.Hardtanh()])
def test_settings_of_the_activation_are_read_in_every_call(layer, block):
    adapter = block.adapter_layer["a1"]
    adapter.module[2] = layer
    x = rand(1, D)
    hidden = block.linear(x)
    with block.route_adapters(["a1"]):
        before = block(x)
        if isinstance(layer, nn.GELU):
            layer.approximate = "tanh"
        else:
            layer.max_val = 0.25
        close(block(x), hidden + adapter.module(hidden))
        assert not torch.equal(block(x), before)


def test_hooks_on_copies_run_under_routing(block):
    other = copy.deepcopy(block)
    x = rand(1, D)
    other.adapter_layer["a1"].module[3].forward = lambda x: torch.ones(1, D, dtype=x.dtype)
    with other.route_adapters(["a1"]):
        close(other(x), other.linear(x) + 1)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        with other.route_adapters(["a"]):
            other(x)
    finally:
        handle.remove()
    assert other.adapter_layer["a"].module[0] in seen


def test_shape_changing_adapter():
    block = Block().double()
    block.add_adapter("s", {"_target_": SHIFT})
    block.adapter_layer["s"].adapter_strategy = ReturnResultAdapterStrategy()
    block.adapter_layer["s"].forward = lambda x: x[..., :2]
    with (
        block.route_adapters(["s", None]),
        pytest.raises(ValueError, match=r"keep the shape.*\[1, 13\] became \[1, 2\]"),
    ):
        block(rand(2, D))


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [False, True])
def test_joint_training_is_training_alone(indices, block):
    x = rand(len(BATCH), 2, D)
    ids = torch.tensor([block.adapter_index.get(n, -1) for n in BATCH])
    weight = rand(len(BATCH), 2, D, seed=3)
    with block.route_adapters(ids if indices else BATCH):
        (block(x) * weight).sum().backward()
    got = {n: p.grad for n, p in block.adapter_layer.named_parameters()}
    block.zero_grad()
    hidden = block.linear(x)
    for i, name in enumerate(BATCH):
        if name is not None:
            row = hidden[i]
            ((row + block.adapter_layer[name].module(row)) * weight[i]).sum().backward(
                retain_graph=True
            )
    for name, p in block.adapter_layer.named_parameters():
        if name.startswith("a."):  # in nobody's rows
            assert got[name] is None or not got[name].any()
        else:
            close(got[name], p.grad)


def test_aux_loss_is_each_adapters_own(block):
    block.train()
    lambdas = {"a": 0.0, "a1": 0.25, "module": 0.5, "1": 0.0, "x1": 1.0}
    for name, value in lambdas.items():
        block.adapter_layer[name].adapter_strategy.l2_lambda = value
    x = rand(len(BATCH), 3, D)
    block.model_guid = "g"
    with block.route_adapters(BATCH):
        delta = block(x) - block.linear(x)
    assert AccessMixin.is_access_enabled("g")
    registry = AccessMixin.get_module_registry(block)
    assert set(registry) == {f"adapter_layer.{n}" for n in ("a1", "module", "x1")}
    for name in ("a1", "module", "x1"):
        rows = torch.tensor([n == name for n in BATCH])
        want = lambdas[name] * delta[rows].square().sum() / rows.sum()
        [loss] = registry[f"adapter_layer.{name}"]["adapter_loss"]
        close(loss, want)
    AccessMixin.reset_registry(block)
    block.adapter_layer["x1"].requires_grad_(False)
    with block.route_adapters(torch.tensor([0, 4])):
        block(rand(2, D))
    registry = AccessMixin.get_module_registry(block)
    assert set(registry) == {"adapter_layer.a1", "adapter_layer.module"}
    assert registry["adapter_layer.a1"]["adapter_loss"][0] == 0
    AccessMixin.reset_registry(block)


def test_routes_made_in_inference_mode_serve_training_too(block):
    x = rand(len(BATCH), D)
    with block.route_adapters(BATCH):
        with torch.inference_mode():
            block(x)
        block(x).sum().backward()
    assert block.adapter_layer["a1"].module[1].weight.grad is not None


def test_autocast():
    block = make_block("a", "b").float()
    x = rand(3, D, dtype=torch.float32)
    with block.route_adapters(["a", "b", None]):
        plain = block(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block.forward_enabled_adapters(block.linear(x).float())
    assert y.dtype is torch.float32
    torch.testing.assert_close(y, plain, rtol=0.1, atol=0.1)
    assert not torch.equal(y, plain)


@pytest.mark.parametrize("where", ["samples", "rows"])
def test_indices_written_to_within_the_context_are_an_error(where, block):
    """Layers that had made their routing used the old ones, others the new ones, unchecked."""
    ids = torch.tensor([0, 1] if where == "samples" else [[0, 1, 0], [1, 1, -1]])
    x = rand(*ids.shape, D)
    with block.route_adapters(ids):
        before = block(x)
        ids.copy_(ids.flip(0))
        with pytest.raises(RuntimeError, match="changed in place within route_adapters"):
            block(x)
    with block.route_adapters(ids):
        assert not torch.equal(block(x), before)
    with torch.inference_mode():
        ids = torch.zeros(ids.shape, dtype=torch.int64)  # one that counts no writes
        with block.route_adapters(ids):
            block(x)


def test_checkpointing_with_the_routes_given_again(block):
    x = rand(len(BATCH), D).requires_grad_()
    with block.route_adapters(BATCH):
        block(x).sum().backward()
    want, x.grad = x.grad, None
    with block.route_adapters(BATCH):
        y = checkpoint(
            block,
            x,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), block.route_adapters(BATCH)),
        )
    y.sum().backward()
    close(x.grad, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_without_the_routes_is_an_error(reentrant, block):
    """All enabled adapters ran in it, one after the other."""
    x = rand(len(BATCH), D).requires_grad_()
    with block.route_adapters(BATCH):
        y = checkpoint(block, x, use_reentrant=reentrant)
    with pytest.raises(
        RuntimeError, match="a routed Block is now computed again, for the backward"
    ):
        y.sum().backward()
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()  # nor before


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("kind", ["fused", "python"])
def test_recomputation_registers_no_loss_again(routed, kind):
    """Losses of a backward's recomputation were still there in the next step."""

    class Overridden(ResidualAddAdapterStrategy):
        def compute_output(self, input, adapter, *, module):
            return super().compute_output(input, adapter, module=module)

    strategies = {"fused": ResidualAddAdapterStrategy, "python": Overridden}
    blocks = []
    for seed in (1, 2):
        block = make_block("a", "x1", seed=seed)
        for adapter in block.adapter_layer.values():
            adapter.adapter_strategy = strategies[kind](l2_lambda=0.3)
        blocks.append(block)
    model = nn.Sequential(*blocks).train()
    x = rand(4, D)
    context = partial(route_adapters, model, ["a", "x1", "a", "x1"]) if routed else nullcontext

    def step(run):
        model.zero_grad()
        with context():
            y = run(x)
        losses = adapter_ext.adapter_losses(model)
        adapter_ext.reset_adapter_losses(model)
        (y.square().mean() + sum(losses.values())).backward()
        assert adapter_ext.adapter_losses(model) == {}
        return losses, [p.grad for p in model.parameters()]

    recomputed = partial(
        checkpoint,
        model,
        use_reentrant=False,
        context_fn=adapter_ext.checkpoint_context(model),
    )
    for _ in range(2):
        close(step(recomputed), step(model))


@pytest.mark.parametrize("change", ["remove", "rename"])
@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_that_goes_within_its_context_is_an_error(training, indices, change, block):
    """Its samples passed unchanged."""
    block.train(training)
    x = rand(2, D)
    routes = [adapter_index(block)[n] for n in ("a1", "x1")] if indices else ["a1", "x1"]
    with (
        torch.set_grad_enabled(training),
        block.route_adapters(torch.tensor(routes) if indices else routes),
    ):
        want = block(x)
        block.remove_adapter("a")
        close(block(x), want)
        if change == "remove":
            block.remove_adapter("a1")
        else:
            block.rename_adapter("a1", "other")
        with pytest.raises(ValueError, match="'a1' was removed or renamed within route_adapters"):
            block(x)


def test_threads_serve_while_another_adapter_changes(block):
    """Renaming it, or a failure to add one, emptied the table of adapters for a moment.

    Adding and removing changed it while others went through it.
    """
    x, names = rand(2, D), ["a1", "x1"]
    block.eval()
    with block.route_adapters(names):
        want = block(x)
    stop = threading.Event()
    wrong = []

    def serve():
        while not stop.is_set():
            with torch.inference_mode(), block.route_adapters(names):
                if not torch.allclose(block(x), want):
                    wrong.append(1)
            block.list_adapters()
            block.adapter_losses()
            block.state_dict()

    def guarded():
        try:
            serve()
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        for _ in range(300):
            block.rename_adapter("a", "z")
            block.rename_adapter("z", "a")
            block.add_adapter("b", config())
            block.remove_adapter("b")
            with pytest.raises(ValueError, match="activation"):
                adapter_ext.add_adapter(block, "bad", config(activation="none"))
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize("routed", [False, True])
def test_weights_that_are_transposed(routed, block):
    """Parameters may be laid out in any way; the op refused those whose rows are not."""
    x = rand(2, D)
    names = ["a1", "x1"] if routed else NAMES
    parameters = [p for name in names for p in block.adapter_layer[name].parameters()]
    with block.route_adapters(names) if routed else nullcontext():
        want = torch.autograd.grad(block(x).square().sum(), parameters)
        for parameter in parameters:
            parameter.data = torch.stack([parameter, parameter + 1.0], dim=-1)[..., 0].detach()
            assert parameter.stride(-1) == 2
        got = torch.autograd.grad(block(x).square().sum(), parameters)
    close(got, want)


@pytest.mark.parametrize("indices", [False, True])
def test_a_result_is_not_the_input_in_disguise(indices):
    """Where no adapter ran, counting samples returned the input's memory as another tensor."""

    class Host(nn.Module, adapter_ext.AdapterModuleMixin):
        def forward(self, x):
            return self.forward_enabled_adapters(x)

    model = nn.ModuleDict({"empty": Host(), "block": make_block("a"), "alone": Host()})
    model["alone"].add_adapter("s", {"_target_": SHIFT})
    names = torch.tensor([adapter_index(model)["a"]]) if indices else ["a"]
    for host in (model["empty"], model["alone"]):
        w = rand(1, D).requires_grad_()
        z = w * 1
        with route_adapters(model, names):
            y = host(z)
        y.mul_(3.0)
        (grad,) = torch.autograd.grad((y + z).sum(), w)
        close(grad, torch.full_like(w, 6.0))


@pytest.mark.parametrize(
    "types", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)], ids=str
)
def test_adapters_that_are_called_under_another_autocast(types):
    """Autocast refused to copy their results, of x's type, into x."""
    own, operands = types
    block = make_block(dtype=own)
    block.linear = nn.Identity()
    block.add_adapter("s", {"_target_": SHIFT})
    block.to(own)
    x = rand(3, D, dtype=own)
    with torch.autocast("cpu", dtype=operands):
        want = block(x)
        with block.route_adapters(["s", None, "s"]):
            got = block(x)
    assert got.dtype == own
    assert torch.equal(got[::2], want[::2])
    assert torch.equal(got[1], x[1])


def test_captures_of_cuda_graphs_make_what_they_read(block, op_calls, monkeypatch):
    """They had the routing of the calls before, which is gone when the graph is replayed."""
    from adapter_ext import routing

    block.adapter_layer["a1"].module[0].eps = 1e-3  # takes another call of the op
    x = rand(len(BATCH), D)
    ids = torch.tensor([adapter_index(block).get(name, -1) for name in BATCH])
    with block.route_adapters(ids):
        want = block(x)
        op_calls.clear()
        block(x)
        assert "route" not in op_calls
        monkeypatch.setattr(routing, "_is_capturing", lambda device: True)
        tables = []
        monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: tables.append(args))
        close(block(x), want)
        assert op_calls.count("route") == 3  # of two groups, and to count samples
        assert not tables  # a copy from the host
        with monkeypatch.context() as reading:
            reading.setattr(torch.Tensor, "tolist", None)
            with block.route_adapters(ids.clone()):
                close(block(x), want)


# --- Models ---------------------------------------------------------------------------------------


@pytest.fixture
def model():
    """Blocks with overlapping sets of adapters, in different orders."""
    blocks = [make_block("a", "a1", "x1", seed=1), make_block("x1", "a", seed=2)]
    return nn.Sequential(*blocks, nn.Tanh(), make_block("1", seed=3), make_block(seed=4))


@pytest.mark.parametrize("indices", [False, True])
def test_routing_reaches_all_submodules(indices, model):
    names = ["x1", "a1", None, "1", "a", "x1"]
    index = adapter_index(model)
    assert index == {"a": 0, "a1": 1, "x1": 2, "1": 3}
    ids = torch.tensor([index.get(n, -1) for n in names])
    x = want = rand(len(names), 2, D)
    for layer in model:
        want = expected(layer, want, names) if isinstance(layer, Block) else layer(want)
    with adapter_ext.route_adapters(model, ids if indices else names):
        close(model(x), want)


def test_hosts_within_adapters_are_not_routed(block):
    outer = Block().double()
    outer.add_adapter("s", {"_target_": SHIFT})
    outer.adapter_layer["s"].inner = block
    model = nn.ModuleList([outer, outer.linear, outer])
    assert adapter_index(model) == {"s": 0}
    x = rand(3, D)
    with adapter_ext.route_adapters(model, ["s", None, "s"]):
        close(outer(x), expected(outer, x, ["s", None, "s"]))
        assert len(block._adapter_routes) == 0
        assert len(outer._adapter_routes) == 1


def test_shared_hosts_are_numbered_where_they_first_occur():
    one, two = make_block("a", "b"), make_block("c")
    tree = nn.ModuleList([nn.Sequential(nn.Sequential(two), one), two, one])
    names = [n for m in tree.modules() if isinstance(m, Block) for n in m.adapter_layer]
    assert list(adapter_index(tree)) == names == ["c", "a", "b"]


def test_layers_share_the_routing(op_calls):
    model = nn.Sequential(*(make_block("a", "b", seed=i) for i in range(5)))
    x = rand(3, D)
    for names in (["a", "b", None], torch.tensor([0, 1, -1])):
        op_calls.clear()
        with adapter_ext.route_adapters(model, names):
            model(x)
            model(x)
        assert op_calls.count("route") == 1
        assert op_calls.count("linear_adapter") == 10


def test_nested_contexts(block):
    x = rand(2, D)
    one, two = ["a", "x1"], ["1", None]
    with block.route_adapters(one):
        with block.route_adapters(two):
            close(block(x), expected(block, x, two))
        close(block(x), expected(block, x, one))


def test_inner_context_on_a_submodule_leaves_the_others_routed(model):
    x = rand(2, D)
    with adapter_ext.route_adapters(model, ["a", "a"]):
        with model[1].route_adapters(["x1", None]):
            close(model[0](x), expected(model[0], x, ["a", "a"]))
            close(model[1](x), expected(model[1], x, ["x1", None]))
        close(model[1](x), expected(model[1], x, ["a", "a"]))


def test_exceptions_restore(block):
    x = rand(2, D)
    before = block(x)
    with pytest.raises(RuntimeError, match="mine"), block.route_adapters(["a", "a"]):
        raise RuntimeError("mine")
    with pytest.raises(ValueError, match="nobody"), block.route_adapters(["nobody", "a"]):
        pass
    assert torch.equal(block(x), before)
    assert block._adapter_routes == ()


def test_threads_have_their_own_routes(block):
    x = rand(2, D)
    plain = block(x)
    batches = [["a", None], ["x1", "1"], ["module", "a1"], None]
    wants = [plain if b is None else expected(block, x, b) for b in batches]
    barrier = threading.Barrier(len(batches))
    wrong = []

    def serve(names, want):
        for _ in range(20):
            with nullcontext() if names is None else block.route_adapters(names):
                barrier.wait()  # all contexts are open at once
                if not torch.allclose(block(x), want):
                    wrong.append(names)
                barrier.wait()

    threads = [threading.Thread(target=serve, args=a) for a in zip(batches, wants, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert block._adapter_routes == ()


# --- Errors ---------------------------------------------------------------------------------------


def enter(block, names):
    with block.route_adapters(names):
        pass


def test_unknown_names(block, model):
    with pytest.raises(ValueError, match=r"no adapter named 'fr'; there are \['a', 'a1', 'module'"):
        enter(block, ["a", "fr"])
    with (
        pytest.raises(ValueError, match="no adapter named 'module'"),
        adapter_ext.route_adapters(model, ["module"]),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"no adapter named 'a'; there are \[\]"),
        adapter_ext.route_adapters(nn.Linear(2, 2), ["a"]),
    ):
        pass


def test_disabled_adapters(block, model):
    block.set_enabled_adapters("a1", False)
    for names in (["a", "a1"], torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="adapter 'a1' is disabled; set_enabled_adapters"):
            enter(block, names)
    x = rand(3, D)
    with block.route_adapters(torch.tensor([0, -1, 4])):
        close(block(x), expected(block, x, ["a", None, "x1"]))
    model[1].set_enabled_adapters("a", False)
    with (
        pytest.raises(ValueError, match="adapter 'a' is disabled in submodule '1'"),
        adapter_ext.route_adapters(model, ["a"]),
    ):
        pass


def test_disabling_within_the_context(block):
    with block.route_adapters(["a", "a1"]):
        block.set_enabled_adapters("a1", False)
        with pytest.raises(ValueError, match="'a1' is disabled"):
            block(rand(2, D))


def test_indices_out_of_range(block):
    for bad in (5, -2, 10**12):
        with pytest.raises(ValueError, match=r"indices of adapters must be in \[-1, 5\), got "):
            enter(block, torch.tensor([0, bad]))


@pytest.mark.parametrize(
    "names", ["fr", 3, {"a"}, torch.zeros(2), torch.tensor(0), torch.zeros(1, 1, 1).long()]
)
def test_wrong_types(names, block):
    with pytest.raises(TypeError, match=r"sequence of names|int64 tensor \[B\] or \[B, T\], got"):
        enter(block, names)
    with pytest.raises(ValueError, match="no adapter named 0"):
        enter(block, [0, 1])


@pytest.mark.parametrize("shape", [(3, D), (1, D), (D,), (3, 2, D)])
def test_wrong_number_of_samples(shape, block):
    message = rf"samples of shape \[2\], so the input must be \[2, '...', 'D'\]; got \[{shape[0]}"
    with block.route_adapters(["a", None]), pytest.raises(ValueError, match=message):
        block(rand(*shape))
    with block.route_adapters(torch.zeros(2, 4).long()), pytest.raises(ValueError, match="samples"):
        block(rand(2, 3, D))


def test_inputs_that_are_no_tensors(block):
    with block.route_adapters(["a"]), pytest.raises(TypeError, match="tensor as input, got dict"):
        block.forward_enabled_adapters({"x": rand(1, D)})


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_compiled_indices_do_not_recompile(training, model):
    model.train(training)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    index = list(adapter_index(model))
    for seed in range(4):
        ids = torch.randint(-1, 4, (5,), generator=torch.Generator().manual_seed(seed))
        names = [None if i < 0 else index[i] for i in ids.tolist()]
        x = want = rand(5, 2, D, seed=seed)
        for layer in model:
            want = expected(layer, want, names) if isinstance(layer, Block) else layer(want)
        with adapter_ext.route_adapters(model, ids):
            for _ in range(2):
                close(compiled(x), want)
    assert counter.frame_count == 1


def test_compiled_names(block):
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = rand(3, D)
    for names in (["a", "x1", None], ["1", None, "1"], ["a", "x1", "x1"]):
        with block.route_adapters(names):
            close(compiled(x), expected(block, x, names))
    torch.testing.assert_close(compiled(x), block(x))


def test_compiled_training_with_losses(block):
    block.train()
    for i, adapter in enumerate(block.adapter_layer.values()):
        adapter.adapter_strategy.l2_lambda = 0.1 * i
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = rand(5, D)
    grads = []
    for run in (block, compiled, compiled):
        block.zero_grad()
        with block.route_adapters(torch.arange(5)):
            y = run(x)
        losses = [
            t for r in AccessMixin.get_module_registry(block).values() for t in r["adapter_loss"]
        ]
        assert len(losses) == 4
        (y.square().sum() + sum(losses)).backward()
        AccessMixin.reset_registry(block)
        grads.append([p.grad.clone() for p in block.parameters()])
    for got in grads[1:]:
        torch.testing.assert_close(got, grads[0])


def test_compiled_module_routed_by_two_threads_is_refused(block):
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    x = rand(2, D)
    entered, leave = threading.Event(), threading.Event()

    def other():
        with block.route_adapters(["a", "a"]):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    try:
        with block.route_adapters(["1", "1"]), pytest.raises(Exception, match="one thread"):
            compiled(x)
    finally:
        leave.set()
        thread.join()


def test_linear_adapter_called_by_itself_is_not_routed(block):
    adapter: LinearAdapter = block.adapter_layer["a"]
    x = rand(3, D)
    with block.route_adapters(["a"]):
        close(adapter(x), formula(adapter, x))


def test_a_norm_in_another_type_than_the_products():
    """A float32 norm beside bfloat16 products was an error."""
    block = make_block("a", "b", dtype=torch.bfloat16)
    block.adapter_layer["a"].module[0].float()
    x = rand(2, 3, D, dtype=torch.bfloat16)
    with block.route_adapters(["a", "b"]):
        y = block(x)
    for i, name in enumerate("ab"):
        with block.route_adapters([name]):
            assert torch.equal(block(x[i : i + 1])[0], y[i])
        row = block.linear(x[i])
        expected = row + block.adapter_layer[name].module(row)
        torch.testing.assert_close(y[i], expected, atol=0.03, rtol=0.03)


def test_different_l2_weights_in_float64():
    """They went by float32."""
    block = make_block()
    for name, weight in (("a", 0.1), ("b", 0.2)):
        strategy = ResidualAddAdapterStrategyConfig(l2_lambda=weight)
        block.add_adapter(name, config(adapter_strategy=strategy))
    randomize(block)
    block.train()
    x = rand(2, 3, D)
    losses = []
    for names in (["a", "b"], ["a"], ["b"]):
        with block.route_adapters(names):
            block(x if len(names) == 2 else x["ab".index(names[0])][None])
        losses.append(block.adapter_losses())
        block.reset_adapter_losses()
    torch.testing.assert_close(losses[0], {**losses[1], **losses[2]}, rtol=1e-13, atol=0.0)


def test_counts_of_a_step_that_was_left_out():
    """Adapters with samples only in it were stepped in the next one, with gradients of zero."""
    block = make_block("a", "b")
    optimizer = adapter_ext.optim.AdamW(block, lr=0.1)
    before = copy.deepcopy(block.adapter_layer["b"])
    for ids in ([1, 1], [0, 0]):
        block.zero_grad()
        with block.route_adapters(torch.tensor(ids)):
            block(rand(2, D)).sum().backward()
    optimizer.step()
    for old, new in zip(before.parameters(), block.adapter_layer["b"].parameters(), strict=True):
        assert torch.equal(old, new)
