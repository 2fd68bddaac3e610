"""Training many adapters at once: each must become what it becomes when trained alone."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter

import pytest
import torch
from layer_testing import Block, D, config, formula, make_block, rand, randomize
from torch import nn
from training_testing import (
    NAMES,
    OPTIONS,
    STEPS,
    Model,
    adapters_of,
    batch,
    ids_of,
    losses_of,
    plain_losses,
    state_of,
    train_alone,
)

from adapter_ext import optim, route_adapters
from adapter_ext.optim import AdamW, mean_per_adapter


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture
def model():
    return Model()


WAYS = ("names", "indices", "compiled names", "compiled indices", "compiled with its routing")


class Routed(nn.Module):
    """Enters the routing in its forward, with indices among its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        with route_adapters(self.model, ids):
            return self.model(x)


def routed(model, way):
    """A function of input and names that routes and runs the model in this way."""
    run = model
    if "compiled" in way:
        run = Routed(model) if "with its routing" in way else model
        run = torch.compile(run, backend="aot_eager", fullgraph=True)

    def call(x, names):
        if "with its routing" in way:
            return run(x, ids_of(model, names))
        with route_adapters(model, ids_of(model, names) if "indices" in way else names):
            return run(x)

    return call


def train_together(model, way, steps=STEPS, optimizer=None):
    optimizer = optimizer or AdamW(model, lr=1e-2, adapters=OPTIONS)
    run = routed(model, way)
    for step, names in enumerate(steps):
        x, target = batch(step, names)
        optimizer.zero_grad()
        losses = losses_of(run(x, names), target)
        mean_per_adapter(losses, names if way == "names" else ids_of(model, names)).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("way", WAYS)
def test_together_is_as_alone(way, model):
    untouched = state_of(model, "1")
    alone = {name: train_alone(model, name) for name in NAMES}
    optimizer = train_together(model, way)
    for name, (weights, its_optimizer) in alone.items():
        torch.testing.assert_close(state_of(model, name), weights, rtol=1e-10, atol=1e-10)
        states = [its_optimizer.state[p] for p in its_optimizer.param_groups[0]["params"]]
        own = optimizer.adapter_state_dict(name)["state"].values()
        torch.testing.assert_close(list(own), [s for s in states if s], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state_of(model, "1"), untouched, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_without_samples_is_untouched_bit_for_bit(way, model):
    """Also after it has been trained, when its moments would move it."""
    optimizer = train_together(model, way, [["a", "a1", "module"]] * 2)
    before = state_of(model, "a"), copy.deepcopy(optimizer.adapter_state_dict("a"))
    others = state_of(model, "a1")
    train_together(model, way, [["a1", None, "module"]] * 2, optimizer)
    after = state_of(model, "a"), optimizer.adapter_state_dict("a")
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not any(torch.equal(p, q) for p, q in zip(state_of(model, "a1"), others, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_same_bits_as_alone_where_only_adapters_compute(way):
    """In float32: weight gradients, too, do not depend on the samples of other adapters."""

    def train(steps):
        host = make_block(*NAMES, dtype=torch.float32).train()
        host.linear = nn.Identity()
        optimizer = AdamW(host, lr=1e-2)
        run = routed(host, way)
        for samples in steps:
            names = [name for _, name in samples]
            x = torch.stack([rand(2, D, seed=i, dtype=torch.float32) for i, _ in samples])
            optimizer.zero_grad()
            losses = (run(x, names) * x.cos()).sum(dim=(1, 2))
            mean_per_adapter(losses, names).backward()
            optimizer.step()
        return host

    steps = [[(10 * s + i, name) for i, name in enumerate(names)] for s, names in enumerate(STEPS)]
    together = train(steps)
    for name in ("a", "a1", "module"):
        own = [[pair for pair in samples if pair[1] == name] for samples in steps]
        alone = train([samples for samples in own if samples])
        for got, want in zip(
            together.adapter_layer[name].parameters(),
            alone.adapter_layer[name].parameters(),
            strict=True,
        ):
            assert torch.equal(got, want), name


@pytest.mark.parametrize("way", WAYS)
def test_a_dropped_adapter_with_samples_is_stepped(way, model):
    """Stochastic depth drops it: its gradient is zero, but it was trained, as it would be alone."""
    for adapter in adapters_of(model, "a"):
        adapter.adapter_strategy.stochastic_depth = 1.0
    before = state_of(model, "a")
    optimizer = AdamW(model, lr=0.1, weight_decay=0.5)
    train_together(model, way, [["a", "a1"]], optimizer)
    torch.testing.assert_close(state_of(model, "a"), [0.95 * p for p in before])
    state = optimizer.adapter_state_dict("a")["state"]
    assert len(state) == 8
    assert all(values["step"] == 1 for values in state.values())


@pytest.mark.parametrize("way", WAYS)
def test_gradient_accumulation(way, model):
    alone = {name: train_alone(model, name, accumulate=2) for name in NAMES}
    optimizer = AdamW(model, lr=1e-2, adapters=OPTIONS)
    run = routed(model, way)
    for first in (0, 2):
        optimizer.zero_grad()
        all_names = STEPS[first] + STEPS[first + 1]
        for step in (first, first + 1):
            x, target = batch(step, STEPS[step])
            losses = losses_of(run(x, STEPS[step]), target)
            if way == "names":
                loss = mean_per_adapter(losses, STEPS[step], counts=Counter(all_names))
            else:
                counts = Counter(ids_of(model, all_names).tolist())
                loss = mean_per_adapter(losses, ids_of(model, STEPS[step]), counts=counts)
            loss.backward()
        optimizer.step()
    for name, (weights, _) in alone.items():
        torch.testing.assert_close(state_of(model, name), weights, rtol=1e-10, atol=1e-10)


def test_only_samples_of_a_backward_count(model):
    """Neither a forward without one nor a step that was skipped makes an adapter trained."""
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = AdamW(model, lr=1e-2)
    train_together(model, "compiled indices", [["a", "a1", "module"]], optimizer)
    before = state_of(model, "a"), copy.deepcopy(optimizer.adapter_state_dict("a"))
    x, target = batch(0, ["a", "a1"])
    with route_adapters(model, ids_of(model, ["a", "a1"])):
        losses_of(run(x), target)  # no backward
        losses_of(run(x), target).sum().backward()
    with pytest.raises(ValueError, match="set_to_none"):
        optimizer.zero_grad(set_to_none=False)
    optimizer.zero_grad()  # skipped, as a GradScaler does
    with route_adapters(model, ids_of(model, ["module", "a1"])):
        losses = losses_of(run(x), target)
    optimizer.zero_grad()  # between forward and backward, as many do
    losses.sum().backward()
    optimizer.step()
    after = state_of(model, "a"), optimizer.adapter_state_dict("a")
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(
        values["step"] == 2 for values in optimizer.adapter_state_dict("module")["state"].values()
    )


def test_without_routing_the_enabled_adapters_are_stepped(model):
    optimizer = AdamW(model, lr=1e-2)
    for host in (model[0], model[2]):
        host.set_enabled_adapters("a1", enabled=False)
    before = {name: state_of(model, name) for name in NAMES}
    model(rand(3, D)).square().sum().backward()
    optimizer.step()
    moved = {n: not torch.equal(state_of(model, n)[2], before[n][2]) for n in NAMES}
    assert moved == {"a": True, "a1": False, "module": True, "1": True}


def test_other_optimizers_drop_idle_gradients(model):
    """SGD with momentum, by the function alone."""
    optimizer = torch.optim.SGD(
        optim.adapter_groups(model, {"a": {"lr": 0.5}, "a1": {}}), lr=0.1, momentum=0.9
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    seen = []
    for names in (["a", "a1"], ["a1", "a1"]):
        x, target = batch(0, names)
        optimizer.zero_grad()
        with route_adapters(model, ids_of(model, names)):
            losses_of(run(x), target).sum().backward()
        assert all(p.grad is not None for p in adapters_of(model, "a")[0].parameters())
        optim.drop_idle_gradients(model)
        optimizer.step()
        seen.append((state_of(model, "a"), state_of(model, "a1")))
    assert all(torch.equal(p, q) for p, q in zip(seen[0][0], seen[1][0], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(seen[0][1], seen[1][1], strict=True))


# --- The optimizer among PyTorch's ----------------------------------------------------------------


@pytest.mark.parametrize("others", ["names", "chain", "names first"])
def test_what_ran_uncounted_in_a_step_is_not_idle(others, model):
    """Only passes with indices count samples: gradients from others were dropped."""

    def by_indices():
        with route_adapters(model, ids_of(model, ["module"] * 2)):
            return model(rand(2, 3, D, seed=1)).square().mean()

    def uncounted():
        if others == "chain":
            for host in (model[0], model[2]):
                for name in ("a", "module", "1"):
                    host.set_enabled_adapters(name, enabled=False)
            y = model(rand(2, 3, D, seed=2))
            for host in (model[0], model[2]):
                host.set_enabled_adapters()
            return y.square().mean()
        with route_adapters(model, ["a1", "a1"]):
            return model(rand(2, 3, D, seed=2)).square().mean()

    passes = [uncounted, by_indices] if others == "names first" else [by_indices, uncounted]
    for run in passes:
        run().backward()
    gradients = [p.grad.clone() for a in adapters_of(model, "a1") for p in a.parameters()]
    assert any(g.count_nonzero() for g in gradients)
    optim.drop_idle_gradients(model)
    kept = [p.grad for a in adapters_of(model, "a1") for p in a.parameters()]
    torch.testing.assert_close(kept, gradients, rtol=0, atol=0)
    assert all(p.grad is not None for a in adapters_of(model, "module") for p in a.parameters())
    assert all(p.grad is None for a in adapters_of(model, "1") for p in a.parameters())


def test_groups(model):
    for adapter in adapters_of(model, "module"):
        adapter.requires_grad_(False)
    adapters_of(model, "a")[1].module[0].requires_grad_(False)
    head = nn.Linear(D, 2)
    optimizer = AdamW(model, lr=1e-2, max_norm=2.0, adapters={"a": {"lr": 0.5}, "1": {}})
    optimizer.add_param_group({"params": list(head.parameters())})
    groups = optimizer.param_groups
    assert [g.get("adapter") for g in groups] == ["a", "1", None]
    assert [g["lr"] for g in groups] == [0.5, 1e-2, 1e-2]
    assert [g.get("max_norm") for g in groups] == [2.0, 2.0, None]
    assert [len(g["params"]) for g in groups] == [6, 8, 2]
    assert [g["adapter"] for g in AdamW(model).param_groups] == ["a", "a1", "1"]
    with pytest.raises(ValueError, match=r"no adapter named 'x'; there are .*'a1'"):
        AdamW(model, adapters=["a", "x"])
    with pytest.raises(ValueError, match="'module' requires grad"):
        AdamW(model, adapters=["module"])
    with pytest.raises(ValueError, match="no adapters"):
        AdamW(head)


@pytest.mark.parametrize(("adapters", "got"), [("a1", "a1"), (iter(["a"]), "list_iterator")])
def test_a_name_by_itself_is_no_sequence_of_names(adapters, got, model):
    """Its letters were looked up; an iterator was used up by the checks, and no group remained."""
    with pytest.raises(TypeError, match=f"adapters must be a sequence of names, .*got '{got}'"):
        AdamW(model, adapters=adapters)
    if isinstance(adapters, str):
        with pytest.raises(TypeError, match=r"names must be a sequence of names .*got 'a1'"):
            mean_per_adapter(torch.ones(2), adapters)


# By option of a group: the exception, and what it says.
WRONG_OPTIONS = {
    "lr": [(-1e-2, ValueError, "lr must be at least 0, got -0.01")],
    "weight_decay": [(-1.0, ValueError, "weight_decay must be at least 0, got -1.0")],
    "eps": [
        (-1e-8, ValueError, "eps must be at least 0, got -1e-08"),
        (None, TypeError, "eps must be a number, got None"),
    ],
    "betas": [
        ((0.9, 1.0), ValueError, r"betas\[1\] must be below 1, got 1.0"),
        ((-0.1, 0.9), ValueError, r"betas\[0\] must be at least 0, got -0.1"),
        ((0.9,), ValueError, "betas must be two numbers, got"),
        (0.9, TypeError, "betas must be two numbers, got 0.9"),
    ],
    "max_norm": [
        (-1, ValueError, "max_norm must be at least 0, got -1"),
        (float("nan"), ValueError, "max_norm must be at least 0, got nan"),
        ("a", TypeError, "max_norm must be a number, got 'a'"),
        (True, TypeError, "max_norm must be a number, got True"),
        (torch.ones(2), ValueError, "max_norm must be one number, got"),
    ],
    "weight_decya": [(0.0, ValueError, "there is no option 'weight_decya'; there are lr, betas, ")],
}


@pytest.mark.parametrize(
    ("key", "value", "kind", "error"),
    [(key, *case) for key, cases in WRONG_OPTIONS.items() for case in cases],
)
def test_wrong_options_were_taken_without_a_word(key, value, kind, error, model):
    """With a negative learning rate or max_norm, training ascended."""
    if key != "weight_decya":  # which is torch's TypeError here
        with pytest.raises(kind, match=f"AdamW: {error}"):
            AdamW(model, **{key: value})
    with pytest.raises(kind, match=f"adapter 'a1': {error}"):
        AdamW(model, adapters={"a": {}, "a1": {key: value}})
    optimizer = train_together(model, "names", STEPS[:1], AdamW(model, adapters=["a", "a1"]))
    given = {"a": {"lr": 0.5}, "a1": {key: value}}
    error_of_match = f"adapter 'a1': {error}"
    assert unchanged_by(optimizer, error_of_match, lambda: optimizer.match_model(given), kind)
    group = {"params": [nn.Parameter(torch.ones(2))], key: value}
    error_of_add = f"the parameter group: {error}"
    assert unchanged_by(optimizer, error_of_add, lambda: optimizer.add_param_group(group), kind)


def test_options_of_an_adapter_are_no_parameters(model):
    """Such a group was of those parameters, or of that adapter."""
    for key in ("params", "adapter"):
        with pytest.raises(ValueError, match=f"options of adapter 'a' can't have '{key}'"):
            AdamW(model, adapters={"a": {key: []}})
    with pytest.raises(TypeError, match="options of adapter 'a' must be a mapping, got float"):
        AdamW(model, adapters={"a": 1e-3})


def test_what_a_scheduler_notes_in_a_group_is_no_unknown_option(model):
    optimizer = AdamW(model, adapters=["a", "a1"])
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    optimizer.match_model(["a", "a1", "module"])
    assert [group.get("max_lr") for group in optimizer.param_groups] == [0.1, 0.1, None]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "initial_lr": 0.5})


@pytest.mark.parametrize("option", ["foreach", "differentiable"])
def test_what_excludes_fused_was_refused_though_nobody_asked_for_fused(option, model):
    """Of a group alone, foreach was not used, and differentiable failed in the first step."""
    assert [g["fused"] for g in AdamW(model).param_groups] == [True] * 4
    optimizer = AdamW(model, **{option: True})
    assert [(g["fused"], g[option]) for g in optimizer.param_groups] == [(False, True)] * 4
    optimizer = AdamW(model, adapters={"a": {option: True}, "a1": {}})
    assert [g["fused"] for g in optimizer.param_groups] == [False, True]
    before = state_of(model, "a")
    train_together(model, "names", [["a", "a1"]], optimizer)
    assert not torch.equal(state_of(model, "a")[0], before[0])
    optimizer.match_model({"a": {}, "a1": {option: True}})
    assert [g["fused"] for g in optimizer.param_groups] == [False, False]
    with pytest.raises(RuntimeError, match="`fused`"):  # torch's own
        AdamW(model, fused=True, **{option: True})
    both = {option: True, "fused": True}
    with pytest.raises(ValueError, match="adapter 'a': fused excludes foreach and differentiable"):
        AdamW(model, adapters={"a": both})


def test_a_max_norm_of_zero_leaves_the_weight_decay_alone(model):
    """It is a norm as others are, not None."""
    want = [0.95 * p for p in state_of(model, "a")]
    free = state_of(model, "a1")
    optimizer = AdamW(model, lr=0.1, weight_decay=0.5, max_norm=0.0, adapters=["a", "a1"])
    optimizer.param_groups[1]["max_norm"] = None
    train_together(model, "names", [["a", "a1"]], optimizer)
    torch.testing.assert_close(state_of(model, "a"), want, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(state_of(model, "a1")[0], 0.95 * free[0])


def test_closure_hooks_and_scheduler(model):
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # makes torch wrap its own step
    optimizer = AdamW(model, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    hooks = []
    optimizer.register_step_pre_hook(lambda *_: hooks.append("before"))
    optimizer.register_step_post_hook(lambda *_: hooks.append("after"))
    x, target = batch(0, ["a", "a1"])
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = state_of(model, "module")

    def closure():
        optimizer.zero_grad()
        with route_adapters(model, ids_of(model, ["a", "a1"])):
            loss = losses_of(run(x), target).sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert hooks == ["before", "after"] * 3
    assert losses == sorted(losses, reverse=True)
    assert all(g["lr"] == 1e-2 * 0.5**3 for g in optimizer.param_groups)
    torch.testing.assert_close(state_of(model, "module"), before, rtol=0, atol=0)


def test_grad_scaler(model):
    """Gradients are clipped after they are unscaled, and a step with infinities is skipped."""
    x, target = batch(0, ["a1", "a1"])

    def step(optimizer, scaler, model, factor=1.0):
        optimizer.zero_grad()
        with route_adapters(model, ["a1", "a1"]):
            loss = losses_of(model(x), target).sum() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    other = copy.deepcopy(model)
    step(AdamW(other, max_norm=0.01), torch.amp.GradScaler("cpu", enabled=False), other)
    scaled = AdamW(model, max_norm=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = state_of(model, "a1")
    step(scaled, scaler, model, torch.inf)
    torch.testing.assert_close(state_of(model, "a1"), before, rtol=0, atol=0)
    step(scaled, scaler, model)
    torch.testing.assert_close(state_of(model, "a1"), state_of(other, "a1"))
    assert not torch.equal(state_of(model, "a1")[0], before[0])


def test_whole_state_dict(model):
    other = copy.deepcopy(model)
    optimizer = train_together(model, "names", STEPS[:2])
    state = copy.deepcopy(optimizer.state_dict())
    middle = copy.deepcopy(model.state_dict())
    train_together(model, "names", STEPS[2:], optimizer)
    other.load_state_dict(middle)
    resumed = AdamW(other, lr=123.0)
    resumed.load_state_dict(state)
    train_together(other, "names", STEPS[2:], resumed)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_whole_state_has_every_moment_of_adapters_that_were_never_stepped(model):
    """Also the one that amsgrad alone has: what resumes asks for it."""
    state = AdamW(model, adapters={"a": {"amsgrad": True}, "a1": {}}).state_dict()
    moments = {"step", "exp_avg", "exp_avg_sq"}
    for group, keys in zip(
        state["param_groups"], (moments | {"max_exp_avg_sq"}, moments), strict=True
    ):
        assert len(group["params"]) == 8
        assert all(state["state"][number].keys() == keys for number in group["params"])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deep", "pickle"]
)
def test_a_copy_steps_the_copied_model(copied, model):
    """It lost the model and could not step; what had no samples must stay in it as well."""
    optimizer = train_together(model, "compiled indices", STEPS[:2])
    torch._dynamo.reset()
    other, its_optimizer = copied((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    train_together(other, "compiled indices", STEPS[2:], its_optimizer)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    train_together(model, "compiled indices", STEPS[2:], optimizer)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert not torch.equal(state_of(other, "a1")[2], before["0.adapter_layer.a1.module.1.weight"])
    its_optimizer.match_model()
    assert [g.get("max_norm") for g in its_optimizer.param_groups] == [None, 0.05, None, None]


# --- Adapters that come and go --------------------------------------------------------------------


def test_a_state_dict_finds_adapters_by_name(model):
    """It was read by position: moments and options of one went to another of the same shapes."""
    optimizer = train_together(model, "names")
    head = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [head], "lr": 0.5})
    saved = copy.deepcopy(optimizer.state_dict())
    order = ("module", "1", "a1", "a")
    fresh = AdamW(Model(), adapters=order)
    fresh.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    fresh.load_state_dict(saved)
    assert [group.get("adapter") for group in fresh.param_groups] == [*order, None]
    assert fresh.param_groups[-1]["lr"] == 0.5
    for name in NAMES:
        got, want = fresh.adapter_state_dict(name), optimizer.adapter_state_dict(name)
        assert got["options"] == want["options"]
        if want["state"]:
            torch.testing.assert_close(got["state"], want["state"], rtol=0, atol=0)

    before = copy.deepcopy(fresh.state_dict()["state"])
    for group in saved["param_groups"]:
        if group.get("adapter") == "a1":
            group["adapter"] = "b"
    with pytest.raises(ValueError, match=r"must be of the adapters \['module', .*, got .*'b'"):
        fresh.load_state_dict(saved)
    torch.testing.assert_close(fresh.state_dict()["state"], before, rtol=0, atol=0)
    assert [group.get("adapter") for group in fresh.param_groups] == [*order, None]


def test_a_new_scheduler_begins_with_the_rate_that_was_given(model):
    """What a scheduler had noted of an adapter stayed beside its new learning rate."""
    optimizer = AdamW(model, lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5)
    saved = AdamW(model, lr=3e-3).adapter_state_dict("module")
    optimizer.match_model({"a": {"lr": 1e-3}, "a1": {}, "module": {}})
    optimizer.load_adapter_state_dict("module", saved)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2, 3e-3]


def test_a_new_adapter_of_an_old_name_starts_from_nothing(model):
    optimizer = train_together(model, "names")
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    for host in (model[0], model[2]):
        host.remove_adapter("a")
        host.add_adapter("a", config(dim=3))
    before = copy.deepcopy(optimizer.adapter_state_dict("module"))
    optimizer.match_model({"a": {"lr": 0.25}, "a1": {}, "module": {}, "1": {}})
    assert optimizer.adapter_state_dict("a")["state"] == {}
    assert optimizer.adapter_state_dict("a")["options"]["lr"] == 0.25
    assert sorted(str(g.get("adapter")) for g in optimizer.param_groups) == sorted([*NAMES, "None"])
    torch.testing.assert_close(optimizer.adapter_state_dict("module"), before, rtol=0, atol=0)
    present = {p for g in optimizer.param_groups for p in g["params"]}
    assert set(optimizer.state) <= present
    assert present >= set(model.parameters()) - {
        p for i in (0, 2) for p in model[i].linear.parameters()
    }
    for host in (model[0], model[2]):
        randomize(host.adapter_layer["a"])
    want = copy.deepcopy(model)
    parameters = [p for a in adapters_of(want, "a") for p in a.parameters()]
    alone = torch.optim.AdamW(parameters, fused=True, lr=0.25, weight_decay=1e-2)
    x, target = batch(0, ["a", "a"])
    plain_losses(want, "a", x, target).mean().backward()
    alone.step()
    train_together(model, "names", [["a", "a"]], optimizer)
    torch.testing.assert_close(state_of(model, "a"), state_of(want, "a"))


def test_renamed_removed_and_unfrozen(model):
    for adapter in adapters_of(model, "module"):
        adapter.module[3].requires_grad_(False)
    optimizer = AdamW(model, lr=1e-2, adapters={**OPTIONS, "module": {"lr": 0.5}})
    train_together(model, "names", STEPS, optimizer)
    before = copy.deepcopy(optimizer.adapter_state_dict("a1"))
    for host in (model[0], model[2]):
        host.rename_adapter("a1", "z")
        host.remove_adapter("a")
    for adapter in adapters_of(model, "module"):
        adapter.module[3].requires_grad_(True)
    optimizer.match_model()
    assert [g["adapter"] for g in optimizer.param_groups] == ["z", "module", "1"]
    torch.testing.assert_close(optimizer.adapter_state_dict("z"), before, rtol=0, atol=0)
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert len(optimizer.param_groups[1]["params"]) == 8
    assert len(optimizer.adapter_state_dict("module")["state"]) == 6
    with pytest.raises(ValueError, match=r"'a' is not trained here; .*'z', 'module', '1'"):
        optimizer.adapter_state_dict("a")
    groups = list(optimizer.param_groups)
    with pytest.raises(ValueError, match="no adapter named 'q'"):
        optimizer.match_model(["z", "q"])
    assert optimizer.param_groups == groups


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torch.compile(m, backend="aot_eager")])
def test_one_adapter_is_saved_and_goes_on_elsewhere(wrap, model):
    """Its weights and optimizer state, under another name, among other adapters."""
    optimizer = train_together(model, "names", STEPS[:2], AdamW(wrap(model), adapters=OPTIONS))
    file = io.BytesIO()
    saved = [adapter.state_dict() for adapter in adapters_of(model, "a1")]
    torch.save((saved, optimizer.adapter_state_dict("a1")), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)

    def renamed(names):
        return ["b" if name == "a1" else None for name in names]

    other = Model()
    for host, own in zip((other[0], other[2]), weights, strict=True):
        host.add_adapter("b", config(dim=4))
        host.adapter_layer["b"].load_state_dict(own)
    elsewhere = AdamW(other, lr=123.0)
    elsewhere.load_adapter_state_dict("b", state)
    assert elsewhere.adapter_state_dict("a")["options"]["lr"] == 123.0
    train_together(model, "names", [["a", "a1", "a1"], ["a1"]], optimizer)
    train_together(other, "names", [renamed(n) for n in (["a", "a1", "a1"], ["a1"])], elsewhere)
    torch.testing.assert_close(state_of(other, "b"), state_of(model, "a1"), rtol=1e-10, atol=1e-10)


def test_state_of_another_shape_is_refused(model):
    optimizer = train_together(model, "names")
    state = optimizer.adapter_state_dict("a1")
    before = copy.deepcopy(optimizer.adapter_state_dict("a"))
    with pytest.raises(ValueError, match=r"'0:module.1.weight' of adapter 'a' must have shape"):
        optimizer.load_adapter_state_dict("a", state)
    state["state"]["5:x"] = next(iter(state["state"].values()))
    with pytest.raises(ValueError, match="the state is of '5:x'"):
        optimizer.load_adapter_state_dict("a1", state)
    torch.testing.assert_close(optimizer.adapter_state_dict("a"), before, rtol=0, atol=0)


def unchanged_by(optimizer, error, call, kind=ValueError):
    """Whether a call raises this and leaves options, state and order of the groups."""
    before = copy.deepcopy(optimizer.state_dict()["state"])
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    with pytest.raises(kind, match=error):
        call()
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)
    return optimizer.param_groups == groups


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dim", [1, 800])
def test_a_whole_state_of_another_bottleneck_is_refused(dim, fused, model):
    """PyTorch's fused step read and wrote past the end of the smaller moments, and crashed."""
    saved = train_together(model, "names").state_dict()
    other = Model()
    other[2].remove_adapter("module")
    other[2].add_adapter("module", config(dim=dim))
    names = [*(name for name in NAMES if name != "module"), "module"]
    optimizer = AdamW(other, lr=0.5, fused=fused, adapters=names)
    shape = list(adapters_of(model, "module")[1].module[1].weight.shape)
    error = (
        rf"'exp_avg' of 2\.adapter_layer\.module\.module\.1\.weight must have shape "
        rf"\[{dim}, {D}\], got \[{shape[0]}, {D}\]"
    )
    assert unchanged_by(optimizer, error, lambda: optimizer.load_state_dict(saved))


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_each_tensor_of_a_state_must_have_its_shape(key, model):
    """Of one adapter's state only exp_avg was looked at, of a whole one nothing."""
    optimizer = train_together(model, "names")
    state = copy.deepcopy(optimizer.adapter_state_dict("module"))
    state["state"]["2:module.1.weight"][key] = torch.ones(2)
    error = f"'{key}' of '2:module.1.weight' of adapter 'module' must have shape"
    assert unchanged_by(
        optimizer, error, lambda: optimizer.load_adapter_state_dict("module", state)
    )
    head = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [head], "amsgrad": True})
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][state["param_groups"][-1]["params"][0]][key] = torch.ones(2)
    error = rf"'{key}' of param_groups\[4\]\['params'\]\[0\] must have shape"
    assert unchanged_by(optimizer, error, lambda: optimizer.load_state_dict(state))


def test_a_parameter_of_two_groups_changes_no_group(model):
    """The groups had been reordered, and some of them dropped, when PyTorch refused it."""
    optimizer = AdamW(model, adapters=["a"])
    optimizer.add_param_group({"params": list(adapters_of(model, "a1")[0].parameters())})
    error = "adapter 'a1' has a parameter that another group has too"
    assert unchanged_by(optimizer, error, optimizer.match_model)
    adapters_of(model, "1")[0].module[0].bias = adapters_of(model, "module")[0].module[0].bias
    error = "adapter '1' has a parameter that another group has too"
    assert unchanged_by(optimizer, error, lambda: optimizer.match_model(["a", "module", "1"]))


# --- The loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_mean_per_adapter(shape):
    ids = torch.randint(-1, 3, shape, generator=torch.Generator().manual_seed(3))
    losses = rand(*shape).requires_grad_()
    want = sum(losses[ids == i].mean() for i in ids.unique().tolist())
    got = mean_per_adapter(losses, ids)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, losses), torch.autograd.grad(want, losses))
    counts = {i: 10 + i for i in range(-1, 3)}
    torch.testing.assert_close(
        mean_per_adapter(losses, ids, counts=counts),
        sum(losses[ids == i].sum() / counts[i] for i in range(-1, 3)),
    )
    assert mean_per_adapter(losses[:0], ids[:0]) == 0


@pytest.mark.parametrize(("dtype", "samples"), [(torch.float16, 66000), (torch.bfloat16, 257)])
@pytest.mark.parametrize("way", ["ids", "names", "counts"])
def test_a_mean_over_many_samples_in_few_bits(way, dtype, samples):
    """From 65520 on the count was infinite in float16, and the mean zero; bfloat16 rounded it."""
    losses = torch.full((samples,), 3.0, dtype=dtype, requires_grad=True)
    ids = torch.zeros(samples, dtype=torch.int64)
    names = ["a"] * samples if way == "names" else ids
    counts = {0: samples} if way == "counts" else None
    mean = mean_per_adapter(losses, names, counts=counts)
    assert mean.dtype is dtype
    assert mean == 3.0
    [grad] = torch.autograd.grad(mean, losses)
    assert torch.equal(grad, torch.full_like(grad, 1 / samples))


def test_a_mean_is_of_the_type_of_its_losses():
    ids = torch.zeros(3, dtype=torch.int64)
    for dtype in (torch.float64, torch.float32):
        losses = torch.tensor([1, 1, 2], dtype=dtype)
        assert torch.equal(mean_per_adapter(losses, ids), losses.sum() / 3)
    assert mean_per_adapter(torch.tensor([1, 0, 0]), ids).item() == pytest.approx(1 / 3)


def test_mean_per_adapter_by_name():
    names = ["a", None, "b", "a", "a1", None]
    losses = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 10.0])
    assert mean_per_adapter(losses, names) == 3.0 + 6.0 + 3.0 + 7.0
    counts = {"a": 4, None: 1, "b": 3, "a1": 7}
    assert mean_per_adapter(losses, names, counts=counts) == 1.5 + 12.0 + 1.0 + 1.0


def test_mean_per_adapter_refuses():
    with pytest.raises(ValueError, match=r"samples \[2\] that were routed, got \[2, 3\]"):
        mean_per_adapter(torch.ones(2, 3), ["a", "b"])
    with pytest.raises(ValueError, match="counts must have adapter 'b'"):
        mean_per_adapter(torch.ones(2), ["a", "b"], counts={"a": 1})
    with pytest.raises(ValueError, match="counts must have adapter 1"):
        mean_per_adapter(torch.ones(2), torch.tensor([0, 1]), counts={0: 1})


def test_formula_is_what_the_model_computes(model):
    """The reference of this file agrees with the one of the other tests."""
    x, target = batch(0, ["a", "a"])
    y = x
    for layer in model:
        if isinstance(layer, Block):
            hidden = layer.linear(y)
            y = hidden + formula(layer.adapter_layer["a"], hidden)
        else:
            y = layer(y)
    torch.testing.assert_close(losses_of(y, target), plain_losses(model, "a", x, target))


def test_an_adapter_that_hosts_share_is_stepped_once(model):
    """Its parameters were in the group once a host, and so were the steps."""
    model[2].adapter_layer["a"] = model[0].adapter_layer["a"]
    shared = list(model[0].adapter_layer["a"].parameters())
    copied = [nn.Parameter(p.detach().clone()) for p in shared]
    optimizer = AdamW(model, lr=0.1, weight_decay=0.1, adapters=["a"], max_norm=0.5)
    alone = torch.optim.AdamW(copied, lr=0.1, weight_decay=0.1)
    for step in range(3):
        x, target = batch(step, ["a"] * 3)
        optimizer.zero_grad()
        with route_adapters(model, ["a"] * 3):
            losses_of(model(x), target).mean().backward()
        for parameter, other in zip(shared, copied, strict=True):
            other.grad = parameter.grad.clone()
        nn.utils.clip_grad_norm_(copied, 0.5)
        optimizer.step()
        alone.step()
    for parameter, other in zip(shared, copied, strict=True):
        torch.testing.assert_close(parameter, other)
        assert optimizer.state[parameter]["step"] == 3


@pytest.mark.parametrize("counts", [None, {"fr": 2, "encoder:fr": 1, None: 1}])
def test_a_name_with_its_place_is_the_same_adapter(counts):
    """A mean was taken for each way to write it."""
    losses = torch.tensor([3.0, 6.0, 9.0, 5.0])
    mean = mean_per_adapter(losses, ["fr", "encoder:fr", "fr", None], counts=counts)
    assert mean == 6.0 + 5.0


@pytest.mark.parametrize("change", ["add", "rename", "remove"])
def test_samples_are_known_after_adapters_changed(change, model):
    """What was counted before was forgotten, and adapters without samples were stepped."""
    optimizer = AdamW(model, lr=0.1, weight_decay=0.5)
    before = {name: state_of(model, name) for name in NAMES}
    x, target = batch(0, ["a1"] * 3)
    with route_adapters(model, ids_of(model, ["a1"] * 3)):
        losses_of(model(x), target).mean().backward()
    names = {name: name for name in NAMES}
    for host in (model[0], model[2]):
        if change == "add":
            host.add_adapter("new", config())
        elif change == "remove":
            host.remove_adapter("1")
            names.pop("1", None)
        else:
            host.rename_adapter("a1", "other")
            names["a1"] = "other"
    optimizer.step()
    for old, new in names.items():
        same = all(map(torch.equal, state_of(model, new), before[old]))
        assert same == (old != "a1")
