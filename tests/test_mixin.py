"""AdapterModuleMixin: items 3 to 5, 9 to 15 and 20 as far as one module goes, and NeMo's bugs."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from layer_testing import Block, D, config, formula, make_block, rand, randomize
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ReadonlyConfigError
from torch import nn

from adapter_ext import (
    AccessMixin,
    AdapterModuleMixin,
    AdapterModuleUtil,
    LinearAdapter,
    ResidualAddAdapterStrategy,
    ResidualAddAdapterStrategyConfig,
    ReturnResultAdapterStrategy,
)
from adapter_ext.mixin import named_hosts

NEMO_LINEAR = "nemo.collections.common.parts.adapter_modules.LinearAdapter"


class Custom(nn.Module, AdapterModuleUtil):
    """An adapter of the user's own, with a batch norm."""

    def __init__(self, width=D, adapter_strategy=None):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.setup_adapter_strategy(adapter_strategy)

    def forward(self, x):
        return self.norm(x)


class Sub(LinearAdapter):
    pass


class NoStrategy(nn.Module):
    def forward(self, x):
        return x


class Broken(nn.Module):
    def __init__(self):
        raise RuntimeError("broken on purpose")


def path(cls):
    return f"{__name__}.{cls.__qualname__}"


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()  # the tests' recompilations of one forward would add up


@pytest.fixture
def block():
    return make_block("a", "a1", "module", "1", "x1")


def chain(block, x, names):
    x = block.linear(x)
    for name in names:
        x = x + formula(block.adapter_layer[name], x)
    return x


# --- Adding ---------------------------------------------------------------------------------------


def test_item4_keys():
    assert AdapterModuleMixin.adapter_global_cfg_key == "global_cfg"
    assert AdapterModuleMixin.adapter_metadata_cfg_key == "adapter_meta_cfg"


@pytest.mark.parametrize("form", ["dataclass", "dict", "DictConfig", "nemo"])
def test_item5_forms_of_config(form):
    cfg = config(adapter_strategy=ResidualAddAdapterStrategyConfig(stochastic_depth=0.25))
    if form != "dataclass":
        cfg = OmegaConf.to_container(OmegaConf.structured(cfg))
    if form == "nemo":
        cfg["_target_"] = NEMO_LINEAR
    if form == "DictConfig":
        cfg = OmegaConf.create(cfg)
    block = Block()
    block.add_adapter("a", cfg)
    assert type(block.adapter_layer["a"]) is LinearAdapter
    assert block.adapter_layer["a"].adapter_strategy.stochastic_depth == 0.25
    assert isinstance(block.adapter_cfg, DictConfig)
    assert block.adapter_cfg.a.enabled is True
    assert block.adapter_cfg.a.dim == 3
    assert block.adapter_cfg.a.adapter_strategy.stochastic_depth == 0.25


def test_item5_enabled_is_kept():
    block = Block()
    block.add_adapter("a", {**vars(config()), "enabled": False})
    assert block.get_enabled_adapters() == []
    assert block.get_adapter_cfg("a").enabled is False
    with pytest.raises(ValueError, match="enabled of adapter 'b' must be a bool, got 'maybe'"):
        block.add_adapter("b", {**vars(config()), "enabled": "maybe"})


def test_item5_interpolations_are_resolved():
    root = OmegaConf.create({"d": D, "adapter": {**vars(config()), "in_features": "${d}"}})
    block = Block()
    block.add_adapter("a", root.adapter)
    assert block.adapter_cfg.a.in_features == D


def test_item9_errors_and_attributes(block):
    assert block.adapter_name == "x1"
    assert list(block.adapter_layer) == ["a", "a1", "module", "1", "x1"]
    with pytest.raises(ValueError, match=r"'a' exists already; there are \['a', 'a1'"):
        block.add_adapter("a", config())
    with pytest.raises(ValueError, match="'global_cfg', which is reserved"):
        block.add_adapter("global_cfg", config())
    with pytest.raises(ValueError, match="no _target_"):
        block.add_adapter("b", {"dim": 3})
    with pytest.raises(TypeError, match="got Linear"):
        block.add_adapter("b", nn.Linear(2, 2))


def test_item9_keyword_arguments_reach_the_adapter():
    block = Block()
    strategy = ReturnResultAdapterStrategy()
    block.add_adapter("a", config(), dim=9, adapter_strategy=strategy)
    assert block.adapter_layer["a"].dim == 9
    assert block.adapter_layer["a"].adapter_strategy is strategy


def test_item7_state_dict_names(block):
    names = [n for n in block.state_dict() if n.startswith("adapter_layer.module.")]
    assert names == [
        f"adapter_layer.module.module.{n}" for n in ("0.weight", "0.bias", "1.weight", "3.weight")
    ]


@pytest.mark.parametrize("name", ["", "a.b", "a+b", "m:", "m:a.b", "global_cfg", "m:global_cfg"])
def test_b27_malformed_names(name):
    block = Block()
    with pytest.raises(ValueError, match=r"non-empty|can't have|reserved"):
        block.add_adapter(name, config())
    assert not hasattr(block, "adapter_layer")
    assert not hasattr(block, "adapter_cfg")


@pytest.mark.parametrize("name", ["keys", "forward", "training", "_modules"])
def test_b27_names_that_module_dict_refuses(name):
    with pytest.raises(ValueError, match="reserved"):
        Block().add_adapter(name, config())
    with pytest.raises(TypeError, match="must be a str, got int"):
        Block().add_adapter(3, config())


def test_b16_the_callers_config_is_left_alone():
    given = {**vars(config()), "enabled": False}
    for cfg in (given, OmegaConf.create({**given, "adapter_strategy": None})):
        before = copy.deepcopy(cfg)
        block = Block()
        block.add_adapter("a", cfg)
        block.set_enabled_adapters("a", True)
        assert cfg == before


@pytest.mark.parametrize(
    "cfg",
    [
        {"_target_": path(Broken)},
        {"_target_": "adapter_ext.LinearAdapter", "dim": 3},
        {"_target_": "adapter_ext.ReturnResultAdapterStrategy"},
        {"_target_": "os.system"},
        {**vars(config()), "norm_position": "mid"},
        {**vars(config()), "enabled": 3},
        {**vars(config()), "adapter_strategy": {"_target_": "os.system"}},
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_b16_a_failing_add_changes_nothing(cfg, first):
    block = Block()
    if not first:
        block.add_adapter("a", config())
    state = dict(vars(block))
    modules = list(block.named_modules())
    written = None if first else OmegaConf.to_yaml(block.adapter_cfg)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        block.add_adapter("b", cfg)
    assert vars(block) == state
    assert list(block.named_modules()) == modules
    if not first:
        assert OmegaConf.to_yaml(block.adapter_cfg) == written
    block.add_adapter("b", config())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_b23_new_adapters_follow_the_host(dtype):
    block = Block().to(dtype).eval()
    block.add_adapter("a", config())
    assert {p.dtype for p in block.adapter_layer.parameters()} == {dtype}
    assert not block.adapter_layer["a"].training
    meta = Block().to("meta")
    meta.add_adapter("a", config())
    assert meta.adapter_layer["a"].module[0].weight.is_meta


# --- Names ----------------------------------------------------------------------------------------


def test_item10_resolving_names():
    block = Block()
    for name, parts in {
        "m:n": ("m", "n"),
        "m:n:o": ("m", "n:o"),
        "n": ("", "n"),
        ":n": ("", "n"),
        "m+k:n": ("m+k", "n"),
    }.items():
        assert block.resolve_adapter_module_name_(name) == parts
    block.add_adapter("encoder:x", config())
    assert list(block.adapter_layer) == ["x"]
    assert block.get_adapter_module("other:x") is block.adapter_layer["x"]
    metadata = {"adapter_meta_cfg": {"modules": {"x": "encoder", "y": ""}}}
    block.adapter_cfg = OmegaConf.create({"global_cfg": metadata, **block.adapter_cfg})
    assert block.resolve_adapter_module_name_("x") == ("encoder", "x")
    assert block.resolve_adapter_module_name_("y") == ("", "y")
    assert block.resolve_adapter_module_name_("m:x") == ("m", "x")
    assert block.get_enabled_adapters() == ["x"]


def test_item12_lookup():
    block = Block()
    assert not block.is_adapter_available()
    assert block.get_adapter_module("a") is None
    assert block.get_adapter_cfg("a") is None
    assert not hasattr(block, "adapter_cfg")
    assert block.get_enabled_adapters() == []
    block.add_adapter("a", config())
    block.set_enabled_adapters(enabled=False)
    assert block.is_adapter_available()
    assert block.get_adapter_module("a") is block.adapter_layer["a"]
    assert block.get_adapter_cfg("a") == block.adapter_cfg["a"]
    assert block.get_adapter_module("a1") is None


# --- Enabling -------------------------------------------------------------------------------------


def test_item11_enabling(block):
    assert block.get_enabled_adapters() == ["a", "a1", "module", "1", "x1"]
    block.set_enabled_adapters(enabled=False)
    assert block.get_enabled_adapters() == []
    block.set_enabled_adapters("x1")
    block.set_enabled_adapters("m:a", enabled=True)
    assert block.get_enabled_adapters() == ["a", "x1"]
    assert [n for n in block.adapter_cfg if block.adapter_cfg[n].enabled] == ["a", "x1"]
    block.set_enabled_adapters("a", False)
    assert block.get_enabled_adapters() == ["x1"]


def test_item11_b24_errors(block):
    with pytest.raises(ValueError, match="add_adapter first"):
        Block().set_enabled_adapters("a")
    with pytest.raises(ValueError, match="no adapter named 'global_cfg'"):
        block.set_enabled_adapters("global_cfg")
    with pytest.raises(ValueError, match=r"no adapter named 'b'; there are \['a', 'a1'"):
        block.set_enabled_adapters("b")


def test_item11_disabled_adapters_do_not_run(block):
    x = rand(3, D)
    everything = block(x)
    torch.testing.assert_close(everything, chain(block, x, ["a", "a1", "module", "1", "x1"]))
    block.set_enabled_adapters("1", False)
    torch.testing.assert_close(block(x), chain(block, x, ["a", "a1", "module", "x1"]))
    block.set_enabled_adapters(enabled=False)
    assert torch.equal(block(x), block.linear(x))


def test_item11_order_is_that_of_the_config(block):
    config = block.adapter_cfg
    block.adapter_cfg = OmegaConf.create({n: config[n] for n in ["x1", "a", "1"]})
    assert block.get_enabled_adapters() == ["x1", "a", "1"]
    x = rand(3, D)
    torch.testing.assert_close(block(x), chain(block, x, ["x1", "a", "1"]))
    block.adapter_cfg = None
    assert block.get_enabled_adapters() == []
    assert torch.equal(block(x), block.linear(x))


def test_shared_config_may_name_other_modules_adapters():
    one, two = make_block("a"), make_block("b")
    shared = OmegaConf.create({**one.adapter_cfg, **two.adapter_cfg})
    one.adapter_cfg = two.adapter_cfg = shared
    for block in (one, two):
        block.set_enabled_adapters("a", False)
    assert one.get_enabled_adapters() == []
    assert two.get_enabled_adapters() == ["b"]
    assert two.adapter_cfg is one.adapter_cfg


# --- Accepted types -------------------------------------------------------------------------------


def test_item13_accepted_types():
    block = Block()
    assert block.get_accepted_adapter_types() == set()
    block.set_accepted_adapter_types([NEMO_LINEAR, path(NoStrategy)])
    assert block.get_accepted_adapter_types() == {LinearAdapter, NoStrategy}
    block.add_adapter("a", config())
    block.add_adapter("sub", {**vars(config()), "_target_": path(Sub)})
    with pytest.raises(ValueError, match=r"Block accepts .*LinearAdapter.*; got .*Custom"):
        block.add_adapter("c", {"_target_": path(Custom)})
    block.set_accepted_adapter_types([])
    block.add_adapter("c", {"_target_": path(Custom)})
    for bad in (int, "os.system", 3, "adapter_ext.ReturnResultAdapterStrategy"):
        with pytest.raises(ValueError, match=r"torch\.nn\.Module"):
            block.set_accepted_adapter_types([LinearAdapter, bad])
    assert block.get_accepted_adapter_types() == set()


def test_item13_accepted_types_may_be_filled_lazily():
    class Lazy(Block):
        def get_accepted_adapter_types(self):
            types = super().get_accepted_adapter_types()
            if not types:
                self.set_accepted_adapter_types([LinearAdapter])
            return self._accepted_adapter_types

    block = Lazy()
    with pytest.raises(ValueError, match="accepts"):
        block.add_adapter("c", {"_target_": path(Custom)})
    block.add_adapter("a", config())


def test_item13_check_supported_type():
    block = Block()
    cfg = OmegaConf.create({"_target_": path(Custom)})
    block.check_supported_adapter_type_(cfg)
    block.check_supported_adapter_type_(cfg, [nn.Module])
    with pytest.raises(ValueError, match="accepts"):
        block.check_supported_adapter_type_(cfg, [LinearAdapter])


# --- Running --------------------------------------------------------------------------------------


def test_item14_chain_is_fused(block, op_calls):
    x = rand(2, 3, D)
    torch.testing.assert_close(
        block(x), chain(block, x, ["a", "a1", "module", "1", "x1"]), rtol=1e-9, atol=1e-9
    )
    assert len(op_calls) == 5


def test_item14_b15_adapter_without_strategy():
    block = Block()
    block.add_adapter("bare", {"_target_": path(NoStrategy)})
    message = r"adapter 'bare' \(NoStrategy\) has no adapter_strategy"
    with pytest.raises(AttributeError, match=message):
        block(rand(2, D, dtype=torch.float32))
    with block.route_adapters(["bare", None]), pytest.raises(AttributeError, match=message):
        block(rand(2, D, dtype=torch.float32))


def test_item14_hosts_hook_runs(op_calls):
    seen = []

    class Host(Block):
        def forward_single_enabled_adapter_(
            self, input, adapter_module, *, adapter_name, adapter_strategy
        ):
            seen.append((adapter_name, adapter_module, adapter_strategy))
            return 2 * super().forward_single_enabled_adapter_(
                input,
                adapter_module,
                adapter_name=adapter_name,
                adapter_strategy=adapter_strategy,
            )

    block = Host().double()
    block.add_adapter("a", config())
    randomize(block)
    x = rand(3, D)
    torch.testing.assert_close(block(x), 2 * chain(block, x, ["a"]))
    adapter = block.adapter_layer["a"]
    assert seen == [("a", adapter, adapter.adapter_strategy)]
    assert len(op_calls) == 1
    block.forward_single_enabled_adapter_ = lambda x, *_, **__: x * 0
    assert not block(x).any()


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.add_adapter("b", config()),
        lambda block: block.remove_adapter("a"),
        lambda block: block.set_enabled_adapters("a", enabled=False),
    ],
)
def test_a_read_only_configuration_keeps_the_adapters_as_they_are(change):
    block = make_block("a", "a1")
    OmegaConf.set_readonly(block.adapter_cfg, True)
    with pytest.raises(ReadonlyConfigError):
        change(block)
    assert list(block.adapter_layer) == list(block.adapter_cfg) == ["a", "a1"]
    assert block.get_enabled_adapters() == ["a", "a1"]
    assert block.adapter_name == "a1"


def test_enabled_again_an_adapter_runs_in_its_place():
    block = make_block("a", "a1", "b")
    block.set_enabled_adapters("a", enabled=False)
    block.set_enabled_adapters("a", enabled=True)
    assert block.get_enabled_adapters() == ["a", "a1", "b"]


def test_paths_of_hosts_lead_past_adapters():
    block = make_block("a")
    inner = Block()
    block.adapter_layer["a"].inner = inner
    model = nn.ModuleDict({"first": block, "second": nn.ModuleList([inner, block])})
    assert named_hosts(model) == [("first", block), ("second.0", inner)]


def test_item14_strategy_may_be_replaced_by_assignment(block):
    block.set_enabled_adapters(enabled=False)
    block.set_enabled_adapters("a")
    adapter = block.adapter_layer["a"]
    x = rand(3, D)
    hidden = block.linear(x)
    adapter.adapter_strategy = ReturnResultAdapterStrategy()
    torch.testing.assert_close(block(x), formula(adapter, hidden))
    hosts = []

    class Mine(ResidualAddAdapterStrategy):
        def forward(self, input, adapter, *, module):
            hosts.append(module)
            return input - adapter(input)

    adapter.adapter_strategy = Mine()
    torch.testing.assert_close(block(x), hidden - formula(adapter, hidden))
    assert hosts == [block]
    adapter.adapter_strategy = ResidualAddAdapterStrategy()
    torch.testing.assert_close(block(x), chain(block, x, ["a"]))


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_on_the_adapter_run(register, block):
    called = []
    adapter = block.adapter_layer["a1"]
    handle = getattr(adapter, register)(lambda *_: called.append(1) or None)
    x = rand(3, D)
    block(x).sum().backward()
    assert called == [1]
    handle.remove()
    block(x).sum().backward()
    assert called == [1]


def test_a_forward_hook_may_change_the_result(block):
    block.adapter_layer["a1"].register_forward_hook(lambda m, args, out: out * 0)
    x = rand(3, D)
    torch.testing.assert_close(block(x), chain(block, x, ["a", "module", "1", "x1"]))


def test_overridden_and_patched_forward_run(block, op_calls):
    class Minus(LinearAdapter):
        def forward(self, x):
            return -super().forward(x)

    block.set_enabled_adapters(enabled=False)
    block.set_enabled_adapters("a")
    x = rand(3, D)
    hidden = block.linear(x)
    adapter = block.adapter_layer["a"]
    adapter.forward = lambda x: x * 3
    torch.testing.assert_close(block(x), hidden * 4)
    del adapter.forward
    with mock.patch.object(LinearAdapter, "forward", lambda self, x: x * 5):
        torch.testing.assert_close(block(x), hidden * 6)
    assert op_calls == []
    adapter.__class__ = Minus
    torch.testing.assert_close(block(x), hidden - formula(adapter, hidden))
    adapter.__class__ = Sub  # overrides nothing
    op_calls.clear()
    torch.testing.assert_close(block(x), hidden + formula(adapter, hidden))
    assert "residual" not in op_calls[0]


def test_adapters_replaced_or_deleted_behind_the_back(block):
    x = rand(3, D)
    del block.adapter_layer["1"]
    assert block.get_enabled_adapters() == ["a", "a1", "module", "x1"]
    randomize(block.adapter_layer["a"], seed=9)
    block.adapter_layer["a1"] = copy.deepcopy(block.adapter_layer["a"])
    torch.testing.assert_close(block(x), chain(block, x, ["a", "a1", "module", "x1"]))


def test_item17_aux_losses_of_a_chain(block):
    block.train()
    for adapter in block.adapter_layer.values():
        adapter.adapter_strategy.l2_lambda = 0.5
    x = rand(4, 3, D)
    block(x)
    registry = AccessMixin.get_module_registry(block)
    assert list(registry) == [f"adapter_layer.{n}" for n in ["a", "a1", "module", "1", "x1"]]
    hidden = block.linear(x)
    delta = formula(block.adapter_layer["a"], hidden)
    [loss] = registry["adapter_layer.a"]["adapter_loss"]
    torch.testing.assert_close(loss, 0.5 * delta.square().sum() / 4, rtol=1e-9, atol=1e-9)
    AccessMixin.reset_registry(block)


def test_b18_forward_reads_no_config(block, monkeypatch):
    x = rand(3, D)
    expected = block(x)

    def forbidden(*args, **kwargs):
        raise AssertionError("OmegaConf was used in forward")

    for name in ("__getattr__", "__getitem__", "get", "__iter__", "keys", "items", "__contains__"):
        monkeypatch.setattr(DictConfig, name, forbidden)
    assert torch.equal(block(x), expected)
    with block.route_adapters(["a", None, "x1"]):
        block(x)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(clone, block):
    other = clone(block)
    x = rand(3, D)
    expected = block(x)
    assert torch.equal(other(x), expected)
    other.set_enabled_adapters(enabled=False)
    randomize(other, seed=3)
    assert torch.equal(block(x), expected)
    assert torch.equal(other(x), other.linear(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_nobody_has_routed_a_copy(clone, block):
    """A copy that was made within a context was routed for ever."""
    x = rand(2, D)
    with block.route_adapters(["a", "x1"]):
        other = clone(block)
        routed = block(x)
    assert torch.equal(other(x), block(x))
    assert not torch.equal(other(x), routed)
    assert torch.equal(other(rand(3, D)), block(rand(3, D)))


def test_gradients_of_a_chain(block):
    x = rand(3, 2, D).requires_grad_()
    inputs = [x, *block.parameters()]
    g = rand(3, 2, D, seed=4)
    got = torch.autograd.grad(block(x), inputs, g)
    want_y = block.linear(x)
    for adapter in block.adapter_layer.values():
        want_y = want_y + adapter.module(want_y)
    want = torch.autograd.grad(want_y, inputs, g)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


# --- Freezing -------------------------------------------------------------------------------------


class Normed(Block):
    def __init__(self, **norm):
        super().__init__()
        self.norm = nn.BatchNorm1d(D, **norm)

    def forward(self, x):
        return self.forward_enabled_adapters(self.norm(self.linear(x)))


def frozen(net):
    """What train scripts do: freeze, train, unfreeze the adapters."""
    net.requires_grad_(False)
    net.train()
    net.unfreeze_enabled_adapters()
    return net


def test_item20_unfreeze():
    net = Normed().double()
    net.add_adapter("a", config())
    net.add_adapter("b", config())
    net.set_enabled_adapters("b", False)
    net.eval()
    frozen(net)
    wants = {n for n, p in net.named_parameters() if p.requires_grad}
    assert wants == {f"adapter_layer.a.{n}" for n, _ in net.adapter_layer["a"].named_parameters()}
    assert not net.norm.track_running_stats
    assert not net.norm.training
    assert net.adapter_layer["a"].training


def test_item20_without_freezing_batchnorm():
    net = Normed()
    net.add_adapter("a", config())
    net.unfreeze_enabled_adapters(freeze_batchnorm=False)
    assert net.norm.track_running_stats
    assert net.norm.weight.requires_grad


def test_item20_reaches_submodules_each_by_its_own_state():
    net = nn.ModuleList([make_block("a"), make_block("a"), Normed()])

    class Encoder(nn.Module, AdapterModuleMixin):
        def __init__(self):
            super().__init__()
            self.layers = net

    encoder = Encoder()
    net[1].set_enabled_adapters(enabled=False)
    frozen(encoder)
    owners = {n.split(".")[1] for n, p in encoder.named_parameters() if p.requires_grad}
    assert owners == {"0"}
    assert not net[2].norm.training


def test_item20_adapters_own_batchnorm_and_unfreeze_hook():
    net = Normed()
    net.add_adapter("a", {"_target_": path(Custom)})
    net.adapter_layer["a"].norm.track_running_stats = False
    frozen(net)
    assert net.adapter_layer["a"].norm.track_running_stats
    assert net.adapter_layer["a"].norm.training
    net.requires_grad_(False)
    net.adapter_layer["a"].adapter_unfreeze = lambda: None
    net.unfreeze_enabled_adapters()
    assert not any(p.requires_grad for p in net.parameters())
    plain = Block()
    plain.add_adapter("n", {"_target_": "torch.nn.Linear", "in_features": D, "out_features": D})
    frozen(plain)
    assert plain.adapter_layer["n"].weight.requires_grad


def test_b17_batchnorm_without_weights_and_sync_batchnorm():
    net = Normed(affine=False)
    net.sync = nn.SyncBatchNorm(D)
    net.add_adapter("a", config())
    frozen(net)
    assert not net.sync.training
    assert not net.sync.track_running_stats
    assert not net.sync.weight.requires_grad


def test_b17_batchnorms_of_disabled_adapters_are_left_alone():
    net = Normed()
    net.add_adapter("off", {"_target_": path(Custom), "enabled": False})
    net.unfreeze_enabled_adapters()
    assert net.adapter_layer["off"].norm.track_running_stats
    assert net.adapter_layer["off"].norm.weight.requires_grad


def test_b17_the_frozen_base_computes_the_same_in_training():
    net = Normed().double()
    net.add_adapter("a", config())
    randomize(net)
    x = rand(9, D)
    expected = net.eval()(x)
    state = copy.deepcopy(net.norm.state_dict())
    frozen(net)
    for _ in range(2):
        net.train()  # as a trainer does every epoch
        torch.testing.assert_close(net(x), expected)
        net.unfreeze_enabled_adapters()
    torch.testing.assert_close(net.norm.state_dict(), state)
    assert len(net.norm._forward_pre_hooks) == 1
    clone = pickle.loads(pickle.dumps(copy.deepcopy(net))).train()
    torch.testing.assert_close(clone(x), expected)
    net.norm.track_running_stats = True  # the documented way back
    net.train()(x)
    assert net.norm.training
    assert not torch.equal(net.norm.running_mean, state["running_mean"])


# --- torch.compile --------------------------------------------------------------------------------


def test_compiles_in_one_graph_without_recompiling(block):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for seed in range(3):
        x = rand(3, 2, D, seed=seed)
        torch.testing.assert_close(compiled(x), block(x))
        randomize(block, seed=seed)
    assert counter.frame_count == 1
    block.set_enabled_adapters("a1", False)
    torch.testing.assert_close(compiled(x), chain(block, x, ["a", "module", "1", "x1"]))


def test_compiled_training_step(block):
    block.train()
    block.adapter_layer["a"].adapter_strategy.l2_lambda = 0.5
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    grads = []
    x = rand(4, D)
    for run in (block, compiled, compiled):
        block.zero_grad()
        y = run(x)
        [loss] = AccessMixin.get_module_registry(block)["adapter_layer.a"]["adapter_loss"]
        (y.square().sum() + loss).backward()
        AccessMixin.reset_registry(block)
        grads.append([p.grad.clone() for p in block.parameters()])
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])
    assert counter.frame_count == 1


def test_compiled_hooks_and_overrides_are_honoured(block):
    block.set_enabled_adapters(enabled=False)
    block.set_enabled_adapters("a")
    compiled = torch.compile(block, backend="eager")
    x = rand(3, D)
    torch.testing.assert_close(compiled(x), chain(block, x, ["a"]))
    block.adapter_layer["a"].module[2] = nn.ReLU()
    adapter = block.adapter_layer["a"]
    hidden = block.linear(x)
    torch.testing.assert_close(compiled(x), hidden + adapter.module(hidden))
    adapter.adapter_strategy = ReturnResultAdapterStrategy()
    torch.testing.assert_close(compiled(x), adapter.module(hidden))
