"""What code written for NeMo's adapters relies on: an index, one or more tests for each item.

Many items are tested in more depth elsewhere; here stands at least one test of each, on whole
models where models matter. NeMo's mistakes, which are not kept, are in test_nemo_bugs.py.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch
from layer_testing import ACTIVATIONS, formula, randomize
from model_testing import (
    DECODER_BLOCKS,
    ENCODER_BLOCKS,
    KINDS,
    NAMES,
    WIDTH,
    Block,
    BlockWithAdapters,
    OverridingModel,
    StockModel,
    adapter_config,
    adapter_state,
    add,
    assert_same_tensors,
    hosts,
    inputs,
    make_model,
    model_config,
    plainly,
    unchanged,
    where,
)
from omegaconf import DictConfig, OmegaConf
from torch import nn

import adapter_ext
from adapter_ext import (
    AbstractAdapterStrategy,
    AccessMixin,
    AdapterModelPTMixin,
    AdapterModuleMixin,
    AdapterModuleUtil,
    LinearAdapter,
    LinearAdapterConfig,
    ResidualAddAdapterStrategy,
    ResidualAddAdapterStrategyConfig,
    ReturnResultAdapterStrategy,
    ReturnResultAdapterStrategyConfig,
    access,
    get_registered_adapter,
    register_adapter,
    set_access_cfg,
)

NEMO_LINEAR = "nemo.collections.common.parts.adapter_modules.LinearAdapter"
SUFFIXES = (".safetensors", ".pt")


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def block():
    block = BlockWithAdapters()
    for i, name in enumerate(NAMES):
        block.add_adapter(name, adapter_config(dim=2 + i))
    randomize(block)
    return block.eval()


@pytest.fixture(autouse=True)
def _default_access():
    yield
    access._enabled.clear()
    access._options.clear()


def chain(block, x, names):
    x = Block.forward(block, x)
    for name in names:
        x = x + formula(block.adapter_layer[name], x)
    return x


def close(got, want):
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


# --- Names and registry ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "AbstractAdapterStrategy",
        "AccessMixin",
        "AdapterConfig",
        "AdapterModelPTMixin",
        "AdapterModuleMixin",
        "AdapterModuleUtil",
        "AdapterRegistryInfo",
        "LinearAdapter",
        "LinearAdapterConfig",
        "ModelPT",
        "NeuralModule",
        "ResidualAddAdapterStrategy",
        "ResidualAddAdapterStrategyConfig",
        "ReturnResultAdapterStrategy",
        "ReturnResultAdapterStrategyConfig",
        "_prepare_default_adapter_config",
        "get_registered_adapter",
        "register_adapter",
        "set_access_cfg",
        "update_module_class_with_adapter_class",
    ],
)
def test_item_01_public_names(name):
    assert callable(getattr(adapter_ext, name))
    if not name.startswith("_"):
        assert name in adapter_ext.__all__


def test_item_01_registry_info_and_default_config():
    info = get_registered_adapter(Block)
    assert [f.name for f in dataclasses.fields(info)] == [
        "base_class",
        "adapter_class",
        "base_class_path",
        "adapter_class_path",
    ]
    config = adapter_ext._prepare_default_adapter_config(global_key="g", meta_key="m")
    assert config == {"g": {"m": {"modules": {}}}}
    given = OmegaConf.create({"a": {"dim": 3}, "g": {"flag": False}})
    OmegaConf.set_struct(given, True)
    config = adapter_ext._prepare_default_adapter_config(global_key="g", meta_key="m", cfg=given)
    assert config is given
    assert config == {"a": {"dim": 3}, "g": {"flag": False, "m": {"modules": {}}}}


def test_item_02_registering():
    class Base(nn.Module):
        pass

    class WithAdapters(Base, AdapterModuleMixin):
        pass

    with pytest.raises(ValueError, match="must be a subclass"):
        register_adapter(Base, BlockWithAdapters)
    assert get_registered_adapter(Base) is None
    register_adapter(Base, WithAdapters)
    with pytest.raises(ValueError, match="already registered"):
        register_adapter(Base, WithAdapters)
    assert Base._meta_adapter_class is WithAdapters
    assert WithAdapters._meta_base_class is Base
    info = get_registered_adapter(Base)
    assert (info.base_class, info.adapter_class) == (Base, WithAdapters)
    for key in (WithAdapters, info.base_class_path, info.adapter_class_path):
        assert get_registered_adapter(key) is info
    assert get_registered_adapter("no.such.Class") is None


@pytest.mark.parametrize("update_config", [True, False])
def test_item_03_replacing_modules_in_place(kind, update_config):
    model = kind(model_config(Block))
    randomize(model)
    model.eval()
    x, before = inputs(), list(model.modules())
    want = model(x)
    with pytest.raises((AttributeError, ValueError)):
        model.add_adapter("encoder:a1", adapter_config())
    model.replace_adapter_compatible_modules(update_config=update_config, verbose=False)
    assert list(model.modules()) == before  # the very same objects
    assert {type(b) for b in model.encoder.blocks} == {BlockWithAdapters}
    name = "BlockWithAdapters" if update_config else "Block"
    assert model.cfg.encoder.block["_target_"] == f"model_testing.{name}"
    assert model.cfg.decoder.block["_target_"] == f"model_testing.{name}"
    assert torch.equal(model(x), want)
    add(model, "encoder:a1")
    close(model(x), plainly(model, x)[0])
    assert not torch.equal(model(x), want)


# --- Configuration --------------------------------------------------------------------------------


def test_item_04_keys():
    for cls in (AdapterModuleMixin, AdapterModelPTMixin):
        assert cls.adapter_global_cfg_key == "global_cfg"
        assert cls.adapter_metadata_cfg_key == "adapter_meta_cfg"


def test_item_04_layout_of_a_models_config(kind):
    model = make_model(kind, "a1", "encoder:a10", "decoder:module", "encoder+decoder:1")
    adapters = model.cfg.adapters
    assert list(adapters) == ["global_cfg", "a1", "a10", "module", "1"]
    assert adapters.global_cfg.adapter_meta_cfg.modules == {
        "a1": "",
        "a10": "encoder",
        "module": "decoder",
        "1": "encoder+decoder",
    }
    assert adapters["1"]._target_ == LinearAdapterConfig._target_
    assert adapters["1"].dim == 3
    assert adapters["1"].enabled is True


@pytest.mark.parametrize("form", ["dict", "DictConfig", "dataclass"])
def test_item_05_forms_of_config(form):
    strategy = ResidualAddAdapterStrategyConfig(stochastic_depth=0.25)
    given = adapter_config(dim=5, adapter_strategy=strategy)
    if form != "dataclass":
        given = OmegaConf.structured(given)
        given = given if form == "DictConfig" else OmegaConf.to_container(given)
        given["_target_"] = NEMO_LINEAR
    for host in (BlockWithAdapters(), make_model(StockModel), make_model(OverridingModel)):
        host.add_adapter("a1", given)
        adapter = next(m for m in host.modules() if isinstance(m, LinearAdapter))
        assert adapter.adapter_strategy.stochastic_depth == 0.25
        assert host.adapter_cfg.a1.dim == 5
        assert host.adapter_cfg.a1.enabled is True


def test_item_05_enabled_and_target(kind):
    model = make_model(kind)
    model.add_adapter("a1", {**vars(adapter_config()), "enabled": False})
    assert model.get_enabled_adapters() == []
    assert model.cfg.adapters.a1.enabled is False
    for host in (model, BlockWithAdapters()):
        with pytest.raises(ValueError, match="_target_"):
            host.add_adapter("a10", {"in_features": WIDTH, "dim": 3})


def test_item_06_config_classes_have_their_classes_arguments():
    for cls, config in (
        (LinearAdapter, LinearAdapterConfig),
        (ResidualAddAdapterStrategy, ResidualAddAdapterStrategyConfig),
        (ReturnResultAdapterStrategy, ReturnResultAdapterStrategyConfig),
    ):
        fields = [f.name for f in dataclasses.fields(config)]
        assert fields == [*inspect.signature(cls).parameters, "_target_"]
    defaults = {n: p.default for n, p in inspect.signature(LinearAdapter).parameters.items()}
    assert defaults == {
        "in_features": inspect.Parameter.empty,
        "dim": inspect.Parameter.empty,
        "activation": "swish",
        "norm_position": "pre",
        "dropout": 0.0,
        "adapter_strategy": None,
    }
    strategy = ResidualAddAdapterStrategy()
    assert (strategy.stochastic_depth, strategy.l2_lambda) == (0.0, 0.0)
    assert type(LinearAdapter(3, 2).adapter_strategy) is ResidualAddAdapterStrategy


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_item_06_activations(activation):
    adapter = LinearAdapter(WIDTH, 3, activation=activation)
    randomize(adapter)
    close(adapter(inputs()), formula(adapter, inputs()))
    with pytest.raises(KeyError):
        LinearAdapter(WIDTH, 3, activation=activation + "x")


def test_item_07_parameter_names_and_shapes():
    pre, post = LinearAdapter(7, 3), LinearAdapter(7, 3, norm_position="post")
    assert {k: tuple(v.shape) for k, v in pre.state_dict().items()} == {
        "module.0.weight": (7,),
        "module.0.bias": (7,),
        "module.1.weight": (3, 7),
        "module.3.weight": (7, 3),
    }
    assert {k: tuple(v.shape) for k, v in post.state_dict().items()} == {
        "module.0.weight": (3, 7),
        "module.2.weight": (7, 3),
        "module.3.weight": (7,),
        "module.3.bias": (7,),
    }
    assert not pre.module[-1].weight.any()
    assert pre.module[1].weight.all()
    assert not post.module[-1].weight.any()
    assert not post.module[-1].bias.any()
    assert post.module[2].weight.all()
    assert pre.module[0].eps == post.module[-1].eps == 1e-5


def test_item_07_prefix_of_the_host(kind):
    model = make_model(kind, "module")
    assert [n for n in model.state_dict() if "adapter" in n] == [
        f"encoder.blocks.{i}.adapter_layer.module.module.{n}"
        for i in range(3)
        for n in ("0.weight", "0.bias", "1.weight", "3.weight")
    ]


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_item_08_dropout_is_of_the_output(norm_position):
    adapter = LinearAdapter(WIDTH, 5, norm_position=norm_position, dropout=0.5)
    assert LinearAdapter(WIDTH, 5).dropout is None
    assert type(adapter.dropout) is nn.Dropout
    randomize(adapter)
    x = inputs(400)
    want = formula(adapter, x)
    close(adapter.eval()(x), want)
    got = adapter.train()(x)
    kept = got != 0
    # Whatever is not zero is the output itself, scaled: there is no dropout further inside.
    close(got[kept], 2 * want[kept])
    assert 0.46 <= kept.float().mean() <= 0.54


# --- Modules --------------------------------------------------------------------------------------


def test_item_09_adding_to_a_module():
    block = BlockWithAdapters()
    assert not hasattr(block, "adapter_layer")
    block.add_adapter("a1", adapter_config(), dim=9)
    assert type(block.adapter_layer) is nn.ModuleDict
    assert block.adapter_layer["a1"].dim == 9
    assert block.adapter_name == "a1"
    assert list(block.adapter_cfg) == ["a1"]
    block.set_accepted_adapter_types([nn.Linear])
    with pytest.raises(ValueError, match="accepts"):  # the first check of all
        block.add_adapter("a1", adapter_config())
    block.set_accepted_adapter_types([])
    with pytest.raises(ValueError, match="exists already"):
        block.add_adapter("a1", adapter_config())
    with pytest.raises(ValueError, match="reserved"):
        block.add_adapter("global_cfg", adapter_config())


def test_item_10_resolving_names():
    block = BlockWithAdapters()
    assert block.resolve_adapter_module_name_("m:n") == ("m", "n")
    assert block.resolve_adapter_module_name_("m:n:k") == ("m", "n:k")
    assert block.resolve_adapter_module_name_("n") == ("", "n")


def test_item_10_resolving_names_of_a_model(kind):
    model = make_model(kind, "a1", "decoder:a10", "encoder+decoder:x1")
    resolve = model.resolve_adapter_module_name_
    assert resolve("a1") == ("", "a1")
    assert resolve("a10") == ("decoder", "a10")
    assert resolve("x1") == ("encoder+decoder", "x1")
    assert resolve("decoder+encoder:1") == ("decoder+encoder", "1")
    block = model.decoder.blocks[0]
    assert block.resolve_adapter_module_name_("a10") == ("decoder", "a10")
    for name in ("joint:a1", "encoder+joint:a1"):
        with pytest.raises(ValueError, match="joint"):
            resolve(name)
        with pytest.raises(ValueError, match="joint"), unchanged(model):
            model.add_adapter(name, adapter_config())


def test_item_11_enabling_in_a_module(block):
    x = inputs()
    assert BlockWithAdapters().get_enabled_adapters() == []
    with pytest.raises(ValueError, match="no adapters"):
        BlockWithAdapters().set_enabled_adapters(enabled=False)
    block.set_enabled_adapters(enabled=False)
    assert block.get_enabled_adapters() == []
    assert torch.equal(block(x), Block.forward(block, x))
    block.set_enabled_adapters("somewhere:x1")
    block.set_enabled_adapters("a10", True)
    assert block.get_enabled_adapters() == ["a10", "x1"]  # the order in which they were added
    close(block(x), chain(block, x, ["a10", "x1"]))
    block.set_enabled_adapters()
    assert block.get_enabled_adapters() == list(NAMES)
    with pytest.raises(ValueError, match="global_cfg"):
        block.set_enabled_adapters("global_cfg")


def test_item_11_enabling_in_a_model(kind):
    model, x = make_model(kind), inputs()
    with pytest.raises(ValueError, match="no adapters"):
        model.set_enabled_adapters(enabled=False)
    names = ("x1", "a10", "decoder:module", "encoder+decoder:a1")
    for name in names:
        add(model, name)
    assert model.get_enabled_adapters() == ["a1", "a10", "module", "x1"]
    close(model(x), plainly(model, x)[0])
    model.set_enabled_adapters(enabled=False)
    assert model.get_enabled_adapters() == []
    assert torch.equal(model(x), plainly(make_model(kind), x)[0])
    outputs = []
    for name in ("module", "decoder:module"):  # plain and qualified names mean the same
        model.set_enabled_adapters(name)
        assert model.get_enabled_adapters() == ["module"]
        assert model.cfg.adapters.module.enabled is True
        outputs.append(model(x))
        model.set_enabled_adapters(name, enabled=False)
        assert model.get_enabled_adapters() == []
    assert torch.equal(*outputs)
    model.set_enabled_adapters("a1")
    assert [where(model, "a1"), model.get_enabled_adapters()] == [
        ENCODER_BLOCKS + DECODER_BLOCKS,
        ["a1"],
    ]
    close(model(x), plainly(model, x)[0])
    assert set(plainly(model, x)[1]) == {"a1"}
    with pytest.raises(ValueError, match="global_cfg"):
        model.set_enabled_adapters("global_cfg")


def test_item_12_available_and_lookup(kind, block):
    model = make_model(kind)
    for host in (BlockWithAdapters(), model):
        assert host.is_adapter_available() is False
        assert host.get_adapter_module("a1") is None
        assert host.get_adapter_cfg("a1") is None
        host.add_adapter("a1", adapter_config())
        host.set_enabled_adapters(enabled=False)
        assert host.is_adapter_available() is True
        assert host.get_adapter_cfg("a1").dim == 3
        assert host.get_adapter_cfg("a10") is None
    assert block.get_adapter_module("a1") is block.adapter_layer["a1"]
    assert block.get_adapter_module("m:a10") is block.adapter_layer["a10"]
    assert block.get_adapter_module("a") is None


class Lazy(BlockWithAdapters):
    """Says what it accepts when it is asked for the first time."""

    def get_accepted_adapter_types(self):
        if not super().get_accepted_adapter_types():
            self.set_accepted_adapter_types([NEMO_LINEAR])
        return super().get_accepted_adapter_types()


class SubAdapter(LinearAdapter):
    pass


def test_item_13_accepted_types():
    block = BlockWithAdapters()
    assert block.get_accepted_adapter_types() == set()
    block.set_accepted_adapter_types([NEMO_LINEAR, nn.Conv1d])
    assert block.get_accepted_adapter_types() == {LinearAdapter, nn.Conv1d}
    sub = {**vars(adapter_config()), "_target_": f"{__name__}.SubAdapter"}
    block.add_adapter("a1", sub)
    assert type(block.adapter_layer["a1"]) is SubAdapter
    block.set_accepted_adapter_types([f"{__name__}.SubAdapter"])
    block.add_adapter("a10", sub)
    with pytest.raises(ValueError, match="SubAdapter"):
        block.add_adapter("x1", adapter_config())
    with pytest.raises(ValueError, match=r"nn\.Module"):
        block.set_accepted_adapter_types([str])


def test_item_13_accepted_types_may_be_filled_lazily():
    block = Lazy()
    assert not hasattr(block, "_accepted_adapter_types")
    with pytest.raises(ValueError, match="accepts"):
        block.add_adapter("a1", {"_target_": "torch.nn.Linear", "in_features": 2})
    assert block._accepted_adapter_types == {LinearAdapter}
    block.add_adapter("a1", adapter_config())


# --- Running --------------------------------------------------------------------------------------


def test_item_14_chain(block):
    x = inputs()
    close(block(x), chain(block, x, NAMES))
    assert (block(x) - chain(block, x, NAMES[::-1])).abs().max() > 1e-2  # the order matters
    del block.adapter_layer["1"].adapter_strategy
    with pytest.raises(AttributeError, match="adapter_strategy"):
        block(x)


class Times(AbstractAdapterStrategy):
    """A strategy that shows what it was given."""

    def __init__(self, factor):
        self.factor = factor
        self.modules = []

    def forward(self, input, adapter, *, module):
        self.modules.append(module)
        return self.factor * adapter(input)


def test_item_14_strategies_can_be_replaced_at_any_time(block):
    assert not issubclass(AbstractAdapterStrategy, nn.Module)
    x = inputs()
    block(x)
    strategy = block.adapter_layer["a10"].adapter_strategy = Times(3)
    want = chain(block, x, ["a1"])
    want = 3 * formula(block.adapter_layer["a10"], want)
    for name in NAMES[2:]:
        want = want + formula(block.adapter_layer[name], want)
    close(block(x), want)
    assert strategy.modules == [block]


def test_item_14_the_hook_of_one_adapter_can_be_overridden():
    calls = []

    class Hooked(BlockWithAdapters):
        def forward_single_enabled_adapter_(
            self, input, adapter_module, *, adapter_name, adapter_strategy
        ):
            calls.append((adapter_name, adapter_module, adapter_strategy))
            return -adapter_strategy(input, adapter_module, module=self)

    block = Hooked().eval()
    block.add_adapter("a1", adapter_config())
    randomize(block)
    x, adapter = inputs(), block.adapter_layer["a1"]
    close(block(x), -chain(block, x, ["a1"]))
    assert calls == [("a1", adapter, adapter.adapter_strategy)]


def test_item_15_residual_add(block):
    x, adapter = inputs(), block.adapter_layer["a10"]
    close(adapter.adapter_strategy(x, adapter, module=block), x + formula(adapter, x))


def test_item_15_return_result_takes_what_the_adapter_takes(block):
    class Weighted(nn.Module):
        def forward(self, x, factor=1.0):
            return x * factor

    strategy, x = ReturnResultAdapterStrategy(), inputs()
    for given, factor in ((x, 1), ([x, 2], 2), ((x, 3), 3), ({"factor": 5, "x": x}, 5)):
        assert torch.equal(strategy(given, Weighted(), module=block), x * factor)


def set_strategy(model, **kwargs):
    for host in hosts(model).values():
        for adapter in host.adapter_layer.values():
            adapter.adapter_strategy = ResidualAddAdapterStrategy(**kwargs)


def test_item_16_stochastic_depth_is_one_scaled_draw_a_call(block):
    x, adapter = inputs(), block.adapter_layer["x1"]
    delta = formula(adapter, x)
    strategy = ResidualAddAdapterStrategy(stochastic_depth=0.6)
    close(strategy(x, adapter, module=block) - x, delta)  # the host is in evaluation mode
    block.train()
    kept = 0
    with torch.inference_mode():
        for _ in range(300):
            got = strategy(x, adapter, module=block) - x
            if got.any():
                close(got, delta / 0.4)
                kept += 1
    assert 90 <= kept <= 150  # 120, and 3.5 standard deviations
    strategy.stochastic_depth = 1.0
    assert torch.equal(strategy(x, adapter, module=block), x)
    strategy.stochastic_depth = 1.5
    with pytest.raises(ValueError, match="stochastic_depth"):
        strategy(x, adapter, module=block)


def check_losses_and_output(model):
    """Real numbers of the auxiliary losses, and the output, of a model in training."""
    set_strategy(model, l2_lambda=0.25)
    model.freeze()
    model.train()
    model.unfreeze_enabled_adapters()
    x = inputs(7)
    y, deltas = plainly(model, x)
    close(model(x), y)
    found = AccessMixin.get_module_registry(model)
    want = {
        f"{path}.adapter_layer.{name}": host.adapter_layer[name]
        for path, host in hosts(model).items()
        for name in host.get_enabled_adapters()
    }
    assert sorted(found) == sorted(want)
    totals = {}
    for path, tensors in found.items():
        [loss] = tensors["adapter_loss"]
        name = path.split(".")[-1]
        totals[name] = totals.get(name, 0) + loss.detach()
    assert set(totals) == set(deltas)
    for name, total in totals.items():
        each = [0.25 * d.reshape(7, -1).square().sum(1).mean() for d in deltas[name]]
        torch.testing.assert_close(total, sum(each).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("no_grad", [False, True])
def test_item_17_aux_loss_of_a_model(kind, no_grad):
    model = make_model(kind, "a1", "encoder:a10", "encoder+decoder:module")
    with torch.set_grad_enabled(not no_grad):
        check_losses_and_output(model)
    assert AccessMixin.is_access_enabled()


def test_item_17_a_loop_as_nemos_finds_and_resets_the_losses(kind):
    model = make_model(kind, "a1", "decoder:a10")
    set_strategy(model, l2_lambda=0.25)
    model.train()
    for _ in range(3):
        assert not AccessMixin.is_access_enabled(model.model_guid)
        model(inputs())
        assert AccessMixin.is_access_enabled(model.model_guid)
        registry = AccessMixin.get_module_registry(model)
        losses = [loss for tensors in registry.values() for loss in tensors["adapter_loss"]]
        assert len(losses) == 5
        sum(losses).backward()
        AccessMixin.reset_registry(model)
    up = model.encoder.blocks[0].adapter_layer["a1"].module[3].weight
    assert up.grad.abs().sum() > 0


def test_item_17_conditions_of_the_loss(block):
    x, adapter = inputs(), block.adapter_layer["a1"]
    strategy = ResidualAddAdapterStrategy(l2_lambda=0.25)

    def losses(given=adapter):
        strategy(x, given, module=block)
        found = AccessMixin.get_module_registry(block)
        AccessMixin.reset_registry(block)
        return len(found)

    assert losses() == 0
    block.train()
    assert losses() == 1
    adapter.requires_grad_(False)
    assert losses() == 0
    adapter.requires_grad_(True)
    set_access_cfg(OmegaConf.create({"compute_adapter_loss": False}))
    assert losses() == 0
    set_access_cfg(OmegaConf.create({"compute_adapter_loss": True}))
    strategy.l2_lambda = 0.0
    assert losses() == 0
    strategy.l2_lambda = 0.25
    with pytest.raises(ValueError, match="AccessMixin"):
        losses(nn.Linear(WIDTH, WIDTH))


class Leaf(nn.Module, AccessMixin):
    pass


def test_item_18_access_mixin():
    net = nn.Sequential(Leaf(), nn.Sequential(nn.Linear(1, 1), Leaf()), Leaf())
    tensor = torch.ones(2, requires_grad=True) * 3
    net[0].register_accessible_tensor("k", tensor)
    net[0].register_accessible_tensor("k", tensor)
    net[1][1].register_accessible_tensor("j", tensor)
    registry = AccessMixin.get_module_registry(net)
    assert {path: {k: len(v) for k, v in r.items()} for path, r in registry.items()} == {
        "0": {"k": 2},
        "1.1": {"j": 1},
    }
    AccessMixin.set_access_enabled(True)
    AccessMixin.set_access_enabled(True, guid="g")
    AccessMixin.reset_registry(net)  # on a module that is no AccessMixin
    assert AccessMixin.get_module_registry(net) == {}
    assert not AccessMixin.is_access_enabled()
    assert AccessMixin.is_access_enabled("g")
    with pytest.raises(TypeError, match="DictConfig"):
        set_access_cfg({"detach": True})
    set_access_cfg(OmegaConf.create({"detach": True, "convert_to_cpu": True}), "g")
    net[0].model_guid = "g"
    net[0].register_accessible_tensor("k", tensor)
    net[2].register_accessible_tensor("k", tensor)
    assert not net[0]._registry["k"][0].requires_grad
    assert net[2]._registry["k"][0].requires_grad


class Channels(nn.Module, AdapterModuleMixin):
    """A host of ``[B, C, T]``, and with a width of its own, whatever the configuration says."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(3, width, 1)

    def add_adapter(self, name, cfg, **kwargs):
        super().add_adapter(name, {**vars(cfg), "in_features": self.conv.out_channels}, **kwargs)

    def forward(self, x):
        x = self.conv(x)
        return self.forward_enabled_adapters(x.transpose(1, 2)).transpose(1, 2)


def test_item_19_hosts_of_other_layouts_and_widths():
    host = Channels(5)
    host.add_adapter("a1", adapter_config(in_features=99))
    assert host.adapter_layer["a1"].in_features == host.adapter_cfg.a1.in_features == 5
    randomize(host)
    x = torch.randn(2, 3, 7)
    hidden = host.conv(x).transpose(1, 2)
    close(host(x), (hidden + formula(host.adapter_layer["a1"], hidden)).transpose(1, 2))


class Attention(nn.Module, AdapterModuleUtil):
    def __init__(self, adapter_strategy=None):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.setup_adapter_strategy(adapter_strategy)

    def forward(self, x, att_mask):
        return x + self.scale * att_mask


class Located(nn.Module, AdapterModuleMixin):
    """A host that runs some adapters at one place and some at another, as NeMo's Conformer does."""

    def forward_single_enabled_adapter_(
        self, input, adapter_module, *, adapter_name, adapter_strategy
    ):
        place = "post" if isinstance(adapter_module, LinearAdapter) else "mha"
        if input["loc"] != place:
            return input
        if place == "post":
            output = adapter_strategy(input["x"], adapter_module, module=self)
        else:
            given = {k: input[k] for k in ("x", "att_mask")}
            output = adapter_strategy(given, adapter_module, module=self)
        return {**input, "x": output}

    def forward(self, x, mask):
        for place in ("mha", "post"):
            packed = {"x": x, "loc": place, "att_mask": mask}
            x = self.forward_enabled_adapters(packed)["x"]
        return x


def test_item_19_dicts_go_through_the_chain():
    host = Located()
    host.add_adapter("a1", adapter_config())
    host.add_adapter("x1", {"_target_": f"{__name__}.Attention"})
    host.adapter_layer["x1"].adapter_strategy = ReturnResultAdapterStrategy()
    randomize(host.adapter_layer["a1"])
    x, mask = inputs(), inputs(seed=2)
    hidden = x + 3 * mask
    close(host(x, mask), hidden + formula(host.adapter_layer["a1"], hidden))


# --- Freezing -------------------------------------------------------------------------------------


def test_item_20_unfreezing_enabled_adapters(kind):
    model = make_model(kind, "a1", "encoder+decoder:a10", "module")
    model.set_enabled_adapters("a1", enabled=False)
    model.train()
    model.freeze()
    assert model.num_weights == 0
    assert not model.training
    model.train()
    model.unfreeze_enabled_adapters()
    for name, parameter in model.named_parameters():
        enabled = ".adapter_layer.a10." in name or ".adapter_layer.module." in name
        assert parameter.requires_grad is enabled, name
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert len(norms) == 5
    for norm in norms:
        assert not norm.training
        assert norm.track_running_stats is False
    # Widths 11, bottleneck 3: 2 · 11 of the norm and 2 · 3 · 11, in 5 and in 3 blocks.
    assert model.num_weights == 88 * (5 + 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = inputs()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}


def test_item_20_batch_norms(kind):
    class Normed(nn.Module, AdapterModuleUtil):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)
            self.setup_adapter_strategy(None)

        def forward(self, x):
            return self.norm(x)

    block = BlockWithAdapters()
    block.add_adapter("a1", adapter_config())
    block.adapter_layer["x1"] = Normed()
    block.adapter_cfg = OmegaConf.create({"a1": block.adapter_cfg.a1, "x1": {"enabled": True}})
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    block.eval()
    block.adapter_layer["x1"].norm.track_running_stats = False
    block.unfreeze_enabled_adapters(freeze_batchnorm=False)
    assert block.norm.track_running_stats is True
    assert block.adapter_layer["x1"].training
    assert block.adapter_layer["x1"].norm.track_running_stats is True
    assert block.adapter_layer["x1"].norm.weight.requires_grad
    assert block.norm.weight.requires_grad is False
    block.norm.weight.requires_grad_(True)
    block.unfreeze_enabled_adapters()
    assert block.norm.track_running_stats is False
    assert block.norm.weight.requires_grad is False
    assert block.adapter_layer["x1"].norm.track_running_stats is True


# --- Models ---------------------------------------------------------------------------------------


def test_item_21_setup_adds_what_the_config_names(kind, tmp_path):
    model = make_model(kind, "a1", "decoder:a10", "encoder+decoder:module")
    model.set_enabled_adapters("a10", enabled=False)
    again = kind(model.cfg)
    assert {n: where(again, n) for n in NAMES[:3]} == {
        "a1": ENCODER_BLOCKS,
        "a10": DECODER_BLOCKS,
        "module": ENCODER_BLOCKS + DECODER_BLOCKS,
    }
    assert again.get_enabled_adapters() == ["a1", "module"]
    assert again.cfg == model.cfg
    assert again.cfg is not model.cfg
    assert not getattr(again, "_restoring_adapters", False)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(inputs()), model(inputs()))


def test_item_21_setup_is_needed_only_where_adapters_can_be():
    cfg = OverridingModel(model_config()).cfg
    cfg.adapters = {"global_cfg": {}, "a1": OmegaConf.structured(adapter_config())}

    class Without(OverridingModel):
        part_class = StockModel.part_class  # stacks that have no adapter API

    model = Without(cfg)
    assert model.is_adapter_available() is False


def test_item_22_stock_dispatch():
    model = make_model(StockModel, "a1", "decoder:a10", "encoder+decoder:x1", "encoder:1")
    assert where(model, "a1") == where(model, "1") == ENCODER_BLOCKS
    assert where(model, "a10") == DECODER_BLOCKS
    assert where(model, "x1") == ENCODER_BLOCKS + DECODER_BLOCKS
    x = inputs()
    close(model(x), plainly(model, x)[0])


def test_item_22_defaults_of_the_mixin():
    class Bare(adapter_ext.ModelPT, AdapterModelPTMixin):
        pass

    bare = Bare({})
    assert bare.adapter_module_names == [""]
    assert bare.default_adapter_module_name is None
    with pytest.raises(ValueError, match="AdapterModuleMixin"), unchanged(bare):
        bare.add_adapter("a1", adapter_config())


@pytest.mark.parametrize("flags", [{}, {"encoder_adapter": False}, {"decoder_adapter": False}])
def test_item_22_no_default_means_all_that_flags_allow(flags):
    class NoDefault(StockModel):
        default_adapter_module_name = None

    model = make_model(NoDefault, "a1", "decoder:a10", **flags)
    want = ENCODER_BLOCKS * flags.get("encoder_adapter", True)
    assert where(model, "a1") == want + DECODER_BLOCKS * flags.get("decoder_adapter", True)
    assert where(model, "a10") == DECODER_BLOCKS


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("decoder", [True, False])
def test_item_22_an_override_dispatches_by_its_own_flags(encoder, decoder):
    model = make_model(OverridingModel, "a1", encoder_adapter=encoder, decoder_adapter=decoder)
    assert where(model, "a1") == ENCODER_BLOCKS * encoder + DECODER_BLOCKS * decoder
    assert model.is_adapter_available() is (encoder or decoder)
    assert list(model.cfg.adapters) == ["global_cfg", "a1"]
    x = inputs()
    close(model(x), plainly(model, x)[0])


def test_item_22_an_unsupported_encoder(caplog):
    class Without(OverridingModel):
        part_class = StockModel.part_class

    model = make_model(Without)
    with pytest.raises(AttributeError), unchanged(model):
        model.add_adapter("a1", adapter_config())
    caplog.clear()
    with pytest.raises(AttributeError):
        model.add_adapter("a1", adapter_config())
    assert caplog.messages == ["the encoder does not support adapters"]


def test_item_22_a_name_exists_once(kind):
    model = make_model(kind, "a1", "decoder:a10")
    for name in ("a1", "encoder:a1", "decoder:a1", "encoder+decoder:a1", "a10", "encoder:a10"):
        with pytest.raises(ValueError, match="exists already"), unchanged(model):
            model.add_adapter(name, adapter_config())


def test_item_23_all_modules_share_one_config(kind):
    model = make_model(kind, "a1", "decoder:a10")
    configs = [b.adapter_cfg for b in (*model.encoder.blocks, *model.decoder.blocks)]
    assert all(config is model.cfg.adapters for config in configs)
    changed = OmegaConf.create(OmegaConf.to_container(model.cfg.adapters))
    changed.a1.enabled = False
    model.cfg.adapters = changed
    model.update_adapter_cfg(model.cfg.adapters)
    assert model.get_enabled_adapters() == ["a10"]
    x = inputs()
    assert set(plainly(model, x)[1]) == {"a10"}
    close(model(x), plainly(model, x)[0])
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    assert all(b.adapter_cfg is model.cfg.adapters for b in blocks)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_item_23_a_copy_of_a_model_has_a_config_of_its_own(kind, copied):
    model, x = make_model(kind, "a1", "decoder:a10"), inputs()
    want = model(x)
    other = copied(model)
    assert torch.equal(other(x), want)
    other.set_enabled_adapters("a1", enabled=False)
    assert all(host.adapter_cfg is other.cfg.adapters for host in hosts(other).values())
    assert model.cfg.adapters.a1.enabled is True
    assert torch.equal(model(x), want)
    assert set(plainly(other, x)[1]) == {"a10"}
    close(other(x), plainly(other, x)[0])


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_item_24_nothing_to_save(kind, suffix, tmp_path):
    path = tmp_path / f"f{suffix}"
    for name in (None, "a1"):
        with pytest.raises(AttributeError):
            make_model(kind).save_adapters(path, name)
    assert not path.exists()


@pytest.mark.parametrize("given", ["encoder+decoder:module", "module"])
def test_item_24_layout_of_nemos_files(kind, given, tmp_path):
    model = make_model(kind, "a1", "encoder+decoder:module", "x1")
    model.save_adapters(tmp_path / "f.pt", given)
    saved = torch.load(tmp_path / "f.pt", weights_only=False)  # as NeMo reads it; our own file
    assert [k for k in saved if not k.startswith("__")] == ["encoder+decoder:module"]
    states = saved["encoder+decoder:module"]
    assert len(states) == 5  # one for each host, in the order of modules()
    for path, state in zip(ENCODER_BLOCKS + DECODER_BLOCKS, states, strict=True):
        own = model.get_submodule(path).adapter_layer["module"].state_dict()
        assert_same_tensors(state, {f"module.{key}": value for key, value in own.items()})
    assert isinstance(saved["__cfg__"], DictConfig)
    assert saved["__cfg__"].module._target_ == NEMO_LINEAR
    meta = saved["__cfg__"].global_cfg.adapter_meta_cfg
    assert meta.modules == {"module": "encoder+decoder"}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", [None, "a10", "decoder:a10"])
def test_item_25_round_trip(kind, suffix, name, tmp_path):
    model = make_model(kind, "a1", "decoder:a10", "encoder+decoder:module", "x1", "1")
    model.set_enabled_adapters("module", enabled=False)
    path = str(tmp_path / f"f{suffix}")
    model.save_adapters(path)
    other = make_model(kind)
    other.load_adapters(path, name)
    names = ["a1", "a10", "module", "x1", "1"] if name is None else ["a10"]
    assert [key for key in other.cfg.adapters if key != "global_cfg"] == names
    for key in names:
        assert where(other, key) == where(model, key)
        assert_same_tensors(adapter_state(other, key), adapter_state(model, key))
        assert other.cfg.adapters[key].dim == 3
        assert other.cfg.adapters[key].enabled is (key != "module")
    assert where(other, "a10") == DECODER_BLOCKS
    if name is None:
        assert torch.equal(other(inputs()), model(inputs()))
    else:
        close(other(inputs()), plainly(other, inputs())[0])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_item_25_several_files_one_after_the_other(kind, suffix, tmp_path):
    model = make_model(kind, "a1", "decoder:a10", "x1")
    for name in ("x1", "decoder:a10", "a1"):
        model.save_adapters(tmp_path / f"{name[-2:]}{suffix}", name)
    other = make_model(kind)
    for name in ("a1", "10", "x1"):
        other.load_adapters(tmp_path / f"{name}{suffix}")
    assert torch.equal(other(inputs()), model(inputs()))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_item_25_what_cant_be_loaded(kind, suffix, tmp_path):
    model = make_model(kind, "a1", "decoder:a10")
    path = tmp_path / f"f{suffix}"
    model.save_adapters(path)
    for name in ("a", "1", "encoder:a10", "decoder:a1"):
        with pytest.raises(KeyError, match=r"a1.*decoder:a10"), unchanged(model):
            model.load_adapters(path, name)
    with pytest.raises(ValueError, match="a1"), unchanged(model):
        model.load_adapters(path)
    shorter = model_config()
    shorter.encoder.depth = 2
    other = kind(shorter).eval()
    randomize(other)
    with pytest.raises(ValueError, match=r"encoder\.blocks"), unchanged(other):
        other.load_adapters(path)
    other.load_adapters(path, "a10", map_location="cpu")
    assert_same_tensors(adapter_state(other, "a10"), adapter_state(model, "a10"))


@pytest.mark.parametrize("strict", [True, False])
def test_item_25_strict(strict, tmp_path):
    model = make_model(StockModel, "a1")
    model.save_adapters(tmp_path / "f.pt")
    content = torch.load(tmp_path / "f.pt", weights_only=False)
    for state in content["a1"]:
        del state["a1.module.0.bias"]
    torch.save(content, tmp_path / "f.pt")
    other = make_model(StockModel)
    if strict:
        with pytest.raises(ValueError, match=r"module\.0\.bias"), unchanged(other):
            other.load_adapters(tmp_path / "f.pt")
        return
    other.load_adapters(tmp_path / "f.pt", strict=False)
    for adapter in (h.adapter_layer["a1"] for h in hosts(other).values()):
        assert not adapter.module[0].bias.any()  # as a new adapter has it
        assert adapter.module[3].weight.any()


def test_item_25_files_of_nemo_know_only_the_order(tmp_path):
    model = make_model(StockModel, "a1", "decoder:a10")
    model.save_adapters(tmp_path / "f.pt")
    content = torch.load(tmp_path / "f.pt", weights_only=False)
    del content["__module_paths__"]
    torch.save(content, tmp_path / "f.pt")
    other = make_model(OverridingModel)
    other.load_adapters(tmp_path / "f.pt")
    assert torch.equal(other(inputs()), model(inputs()))
    shorter = model_config()
    shorter.decoder.depth = 3
    longer = StockModel(shorter)
    with pytest.raises(ValueError, match="2 modules"), unchanged(longer):
        longer.load_adapters(tmp_path / "f.pt", "decoder:a10")
