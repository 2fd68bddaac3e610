"""NeMo's mistakes around adapters, none of which is to be repeated: one or more tests for each."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
import types
import weakref
from typing import ClassVar

import pytest
import torch
import torch._dynamo.testing
from layer_testing import formula, randomize
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
    AccessMixin,
    AdapterModuleMixin,
    AdapterModuleUtil,
    LinearAdapter,
    ResidualAddAdapterStrategy,
    access,
    get_registered_adapter,
    ops,
    register_adapter,
    set_access_cfg,
)

SUFFIXES = (".safetensors", ".pt")


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def block():
    block = BlockWithAdapters()
    for name in NAMES:
        block.add_adapter(name, adapter_config())
    randomize(block)
    return block.eval()


@pytest.fixture(autouse=True)
def _default_access():
    yield
    access._enabled.clear()
    access._options.clear()


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def train_with_losses(model, l2_lambda=0.25):
    """Makes a model train its adapters, with auxiliary losses."""
    for host in hosts(model).values():
        for adapter in host.adapter_layer.values():
            adapter.adapter_strategy = ResidualAddAdapterStrategy(l2_lambda=l2_lambda)
    model.freeze()
    model.train()
    model.unfreeze_enabled_adapters()
    return model


def wanted_losses(model, x, l2_lambda=0.25):
    """The auxiliary losses by the formula, summed over layers."""
    _, deltas = plainly(model, x)
    return {
        name: sum(l2_lambda * d.square().sum(1).mean() for d in each)
        for name, each in deltas.items()
    }


def check_losses(model, x):
    want = wanted_losses(model, x)
    model.reset_adapter_losses()
    model(x)
    got = model.adapter_losses()
    assert set(got) == set(want)
    for name, loss in want.items():
        torch.testing.assert_close(got[name], loss, rtol=1e-4, atol=1e-6)


# --- The auxiliary loss ---------------------------------------------------------------------------


def test_b01_the_aux_loss_reaches_the_model_that_trains(kind):
    model = train_with_losses(make_model(kind, "a1", "encoder+decoder:a10"))
    other = train_with_losses(make_model(kind, "a1"))
    x = inputs(7)
    check_losses(model, x)
    assert AccessMixin.is_access_enabled(model.model_guid)
    assert not AccessMixin.is_access_enabled(other.model_guid)
    # The loss alone moves the weights, and towards smaller deltas.
    before = sum(model.adapter_losses().values())
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.01 * parameter.grad
    assert sum(wanted_losses(model, x).values()) < before.detach()


def test_b02_nothing_piles_up_over_steps(kind):
    model = train_with_losses(make_model(kind, "a1", "decoder:a10"))
    alive = []
    for _ in range(4):
        gc.collect()
        assert [ref() for ref in alive] == [None] * len(alive)
        model(inputs())
        registry = AccessMixin.get_module_registry(model)
        tensors = [t for r in registry.values() for ts in r.values() for t in ts]
        assert len(tensors) == 5
        alive = [weakref.ref(t) for t in tensors]
        del tensors, registry
        # A loop of NeMo's resets under this very condition.
        assert AccessMixin.is_access_enabled(model.model_guid)
        AccessMixin.reset_registry(model)
        assert not AccessMixin.is_access_enabled(model.model_guid)


class Leaf(nn.Module, AccessMixin):
    pass


@pytest.mark.parametrize("key", [None, "k", "absent"])
def test_b03_resetting_by_key(key):
    net = nn.Sequential(Leaf(), nn.Sequential(nn.Linear(1, 1), Leaf()))
    leaves = (net[0], net[1][1])
    for leaf in leaves:
        leaf.register_accessible_tensor("k", torch.ones(1))
        leaf.register_accessible_tensor("kk", torch.ones(1))
    for _ in range(2):
        AccessMixin.reset_registry(net, key)  # on a module that has no registry
        left = {None: [], "k": ["kk"], "absent": ["k", "kk"]}[key]
        assert [list(leaf._registry) for leaf in leaves] == [left, left]
    leaves[0].reset_registry(key)


def test_b04_models_share_neither_losses_nor_flags_nor_options(kind):
    one, two = (train_with_losses(make_model(kind, "a1")) for _ in range(2))
    assert one.model_guid != two.model_guid
    set_access_cfg(OmegaConf.create({"compute_adapter_loss": False}), one.model_guid)
    x = inputs()
    one(x)
    two(x)
    assert one.adapter_losses() == {}
    assert list(two.adapter_losses()) == ["a1"]
    set_access_cfg(OmegaConf.create({}), one.model_guid)
    one(x)
    two.reset_adapter_losses()
    assert two.adapter_losses() == {}
    assert list(one.adapter_losses()) == ["a1"]


def test_b04_options_are_copied_reading_has_no_effect_and_losses_keep_their_graph(kind):
    model = train_with_losses(make_model(kind, "a1"))
    given = OmegaConf.create({"detach": True})
    set_access_cfg(given)
    adapter = model.encoder.blocks[0].adapter_layer["a1"]
    AccessMixin.update_access_cfg({"convert_to_cpu": True})
    assert given == {"detach": True}
    given.detach = False
    assert dict(adapter.access_cfg) == {"detach": True, "convert_to_cpu": True}
    with pytest.raises(TypeError):
        adapter.access_cfg["detach"] = False
    assert list(access._options) == [None]
    model(inputs())
    assert all(loss.requires_grad for loss in model.adapter_losses().values())


def test_b04_threads_with_a_model_each(kind):
    models = [train_with_losses(make_model(kind, "a1", seed=seed)) for seed in range(4)]
    errors = []

    def work(model):
        try:
            for seed in range(15):
                check_losses(model, inputs(seed=seed))
        except BaseException as error:  # reported by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_b05_overlapping_names(kind, suffix, tmp_path):
    model = make_model(kind, *NAMES)
    for name in NAMES:
        path = tmp_path / f"{name}{suffix}"
        model.save_adapters(path, name)
        other = make_model(kind)
        other.load_adapters(path, name)
        assert [key for key in other.cfg.adapters if key != "global_cfg"] == [name]
        assert_same_tensors(adapter_state(other, name), adapter_state(model, name))
        assert len(adapter_state(other, name)) == 4 * len(ENCODER_BLOCKS)
        assert not set(NAMES) - {name} & set(other.encoder.blocks[0].adapter_layer)
    other = make_model(kind)
    for name in NAMES:
        other.load_adapters(tmp_path / f"{name}{suffix}")
    assert torch.equal(other(inputs()), model(inputs()))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_b06_a_file_with_some_of_the_adapters_loads_without_a_name(kind, suffix, tmp_path):
    model = make_model(kind, "a1", "decoder:a10", "x1")
    model.save_adapters(tmp_path / f"f{suffix}", "decoder:a10")
    other = make_model(kind)
    other.load_adapters(tmp_path / f"f{suffix}")
    assert list(other.cfg.adapters) == ["global_cfg", "a10"]
    assert other.cfg.adapters.global_cfg.adapter_meta_cfg.modules == {"a10": "decoder"}
    assert_same_tensors(adapter_state(other, "a10"), adapter_state(model, "a10"))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["a", "a11", "encoder:a10", "nowhere:a1", "global_cfg"])
def test_b07_unknown_names(kind, suffix, name, tmp_path):
    model, path = make_model(kind, "a1", "decoder:a10"), tmp_path / f"f{suffix}"
    with pytest.raises(ValueError, match=name.split(":")[0]), unchanged(model):
        model.save_adapters(path, name)
    assert list(tmp_path.iterdir()) == []
    model.save_adapters(path)
    other = make_model(kind)
    with pytest.raises(KeyError, match=r"a1.*decoder:a10"), unchanged(other):
        other.load_adapters(path, name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_b08_weights_go_to_the_module_they_were_of(suffix, tmp_path):
    model = make_model(StockModel, "a1")
    model.save_adapters(tmp_path / f"f{suffix}")

    class Reordered(StockModel):
        def __init__(self, cfg, trainer=None):
            super().__init__(cfg, trainer)
            children = self.encoder.blocks._modules
            for key in ("1", "0"):  # modules() now starts with another block
                children[key] = children.pop(key)

    other = make_model(Reordered)
    assert list(other.encoder.blocks._modules) == ["2", "1", "0"]
    other.load_adapters(tmp_path / f"f{suffix}")
    want = adapter_state(model, "a1")
    got = adapter_state(other, "a1")
    assert list(got) != list(want)
    assert_same_tensors(dict(sorted(got.items())), dict(sorted(want.items())))

    class Elsewhere(StockModel):
        """As many blocks, of the same shapes, of other names."""

        def __init__(self, cfg, trainer=None):
            super().__init__(cfg, trainer)
            self.encoder.layers = self.encoder.blocks
            del self.encoder.blocks

        def forward(self, x):
            for block in (*self.encoder.layers, *self.decoder.blocks):
                x = block(x)
            return x

    other = make_model(Elsewhere)
    with pytest.raises(ValueError, match=r"encoder\.blocks\.0"), unchanged(other):
        other.load_adapters(tmp_path / f"f{suffix}")


class Bomb:
    """Goes off where a file is unpickled without care."""

    fuse: ClassVar[list[str]] = []

    def __reduce__(self):
        return (Bomb.fuse.append, ("bang",))


def _go_off(self, *args):
    Bomb.fuse.append("bang")


class Trap(nn.Module, AdapterModuleUtil):
    """An adapter that a file must not get made unless the user allows it."""

    __init__ = _go_off


def rewritten(path, change):
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def test_b09_files_run_no_code(kind, tmp_path):
    path = tmp_path / "f.pt"
    model = make_model(kind, "a1")
    other = make_model(kind)

    def refuses(change):
        model.save_adapters(path)
        rewritten(path, change)
        Bomb.fuse.clear()
        with pytest.raises(adapter_ext.FileError), unchanged(other):
            other.load_adapters(path)
        assert Bomb.fuse == []

    def target(value):
        def change(content):
            content["__cfg__"].a1["_target_"] = value

        return change

    def strategy(content):
        content["__cfg__"].a1.adapter_strategy = {"_target_": f"{__name__}.Trap"}

    refuses(lambda content: content.update(a1=[Bomb()]))
    refuses(lambda content: content.update(extra=Bomb()))
    refuses(target("os.system"))
    refuses(target(f"{__name__}.Trap"))
    refuses(target("torch.nn.Linear"))
    refuses(strategy)
    # Whole-file pickles, and a plain one.
    with open(path, "wb") as file:
        pickle.dump(Bomb(), file)
    Bomb.fuse.clear()
    with pytest.raises(adapter_ext.FileError):
        other.load_adapters(path)
    assert Bomb.fuse == []


def test_b09_a_models_file_runs_no_code_either(kind, tmp_path):
    path = tmp_path / "model.nemo"
    model = make_model(kind, "a1")
    model.cfg.adapters.a1["_target_"] = f"{__name__}.Trap"
    model.save_to(path)
    Bomb.fuse.clear()
    with pytest.raises(ValueError, match="Trap"):
        kind.restore_from(path)
    assert Bomb.fuse == []


class OwnAdapter(LinearAdapter):
    pass


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_b09_own_classes_are_named_by_the_user(kind, suffix, tmp_path):
    model = make_model(kind)
    target = f"{__name__}.OwnAdapter"
    model.add_adapter("a1", {**vars(adapter_config()), "_target_": target})
    randomize(model)
    model.save_adapters(tmp_path / f"f{suffix}")
    other = make_model(kind)
    with pytest.raises(adapter_ext.FileError, match="OwnAdapter"), unchanged(other):
        other.load_adapters(tmp_path / f"f{suffix}")
    other.load_adapters(tmp_path / f"f{suffix}", classes=[OwnAdapter])
    assert type(other.encoder.blocks[0].adapter_layer["a1"]) is OwnAdapter
    assert_same_tensors(adapter_state(other, "a1"), adapter_state(model, "a1"))


def test_b10_looking_up_a_class_imports_nothing(monkeypatch, tmp_path):
    (tmp_path / "b10_side_effect.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert get_registered_adapter("b10_side_effect.Class") is None
    block = BlockWithAdapters()
    block.set_accepted_adapter_types([LinearAdapter])
    for target in ("os.system", "os", "builtins.eval", "", "a b.c", "no_such_module.Class"):
        with pytest.raises(ValueError, match=r"_target_|class"):
            block.add_adapter("a1", {"_target_": target})
        with pytest.raises(ValueError, match=r"class|Module|_target_"):
            block.set_accepted_adapter_types([target])
    assert block.get_accepted_adapter_types() == {LinearAdapter}
    model = make_model(StockModel, "a1")
    model.save_adapters(tmp_path / "f.pt")
    rewritten(tmp_path / "f.pt", lambda c: c["__cfg__"].a1.update(_target_="b10_side_effect.C"))
    other = make_model(StockModel)
    other.encoder.blocks[0].set_accepted_adapter_types([LinearAdapter])  # it looks at the type
    with pytest.raises(ValueError, match="b10_side_effect"), unchanged(other):
        other.load_adapters(tmp_path / "f.pt")


# --- Nothing changes where something fails --------------------------------------------------------


def failing_calls():
    """Calls that fail, by name; each is made on a model with a1, decoder:a10."""
    bad = {**vars(adapter_config()), "dim": 0}
    return {
        "taken": lambda m: m.add_adapter("a1", adapter_config()),
        "taken elsewhere": lambda m: m.add_adapter("decoder:a1", adapter_config()),
        "reserved": lambda m: m.add_adapter("global_cfg", adapter_config()),
        "reserved in a module": lambda m: m.add_adapter("decoder:global_cfg", adapter_config()),
        "bad config": lambda m: m.add_adapter("x1", bad),
        "no config": lambda m: m.add_adapter("x1", None),
        "no target": lambda m: m.add_adapter("x1", {"dim": 3}),
        "bad place": lambda m: m.add_adapter("joint:x1", adapter_config()),
        "bad second place": lambda m: m.add_adapter("encoder+joint:x1", adapter_config()),
        "not accepted by the second": lambda m: m.add_adapter("encoder+decoder:x1", other_type()),
        "remove unknown": lambda m: m.remove_adapter("a"),
        "remove elsewhere": lambda m: m.remove_adapter("encoder:a10"),
        "rename unknown": lambda m: m.rename_adapter("a", "x1"),
        "rename to a taken name": lambda m: m.rename_adapter("a1", "a10"),
        "rename to a reserved name": lambda m: m.rename_adapter("a1", "global_cfg"),
        "rename to a malformed name": lambda m: m.rename_adapter("a1", "b.c"),
        "enable unknown": lambda m: m.set_enabled_adapters("a", enabled=False),
        "enable settings": lambda m: m.set_enabled_adapters("global_cfg", enabled=False),
    }


def other_type():
    return {**vars(adapter_config()), "_target_": f"{__name__}.OwnAdapter"}


@pytest.mark.parametrize("call", failing_calls())
def test_b11_what_fails_changes_nothing(kind, call):
    model = make_model(kind, "a1", "decoder:a10")
    model.set_enabled_adapters("a1", enabled=False)
    model.encoder.train()
    model.decoder.blocks[1].requires_grad_(False)

    class Exactly(LinearAdapter):
        pass

    model.decoder.blocks[1].set_accepted_adapter_types([Exactly])
    with pytest.raises((ValueError, TypeError)), unchanged(model):
        failing_calls()[call](model)
    model.decoder.blocks[1].set_accepted_adapter_types([])
    add(model, "encoder+decoder:x1")
    close(model.eval()(inputs()), plainly(model, inputs())[0])


def test_b11_the_first_adapter_fails(kind):
    model = make_model(kind)
    with pytest.raises(ValueError, match="dim"), unchanged(model):
        model.add_adapter("a1", adapter_config(dim=0))
    assert "adapters" not in model.cfg


class RaisingBlock(BlockWithAdapters):
    """A block that fails when it has been given an adapter already."""

    armed = True

    def add_adapter(self, name, cfg, **kwargs):
        super().add_adapter(name, cfg, **kwargs)
        if self.armed:
            raise RuntimeError("on purpose")


class RaisingModel(OverridingModel):
    """An override that fails behind super() and its modules' calls."""

    def add_adapter(self, name, cfg):
        super().add_adapter(name, cfg)
        if name.endswith("x1"):
            raise RuntimeError("on purpose")


@pytest.mark.parametrize("names", [(), ("a1", "decoder:a10")])
def test_b11_the_last_of_several_modules_fails(kind, names):
    model = make_model(kind, *names)
    model.decoder.blocks[1].__class__ = RaisingBlock
    with pytest.raises(RuntimeError, match="on purpose"), unchanged(model):
        model.add_adapter("encoder+decoder:x1", adapter_config())


@pytest.mark.parametrize("names", [(), ("a1", "decoder:a10")])
def test_b11_an_override_that_raises_after_super(names):
    model = make_model(RaisingModel, *names)
    with pytest.raises(RuntimeError, match="on purpose"), unchanged(model):
        model.add_adapter("encoder+decoder:x1", adapter_config())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_b11_loading_is_all_or_nothing(kind, suffix, tmp_path):
    model = make_model(kind, "a1", "decoder:a10", "x1")
    path = tmp_path / f"f{suffix}"
    model.save_adapters(path)
    taken = make_model(kind, "x1")  # the file's last
    with pytest.raises(ValueError, match="x1"), unchanged(taken):
        taken.load_adapters(path)
    narrow = make_model(kind)
    narrow.decoder.blocks[1].set_accepted_adapter_types([OwnAdapter])
    with pytest.raises(ValueError, match="a10"), unchanged(narrow):
        narrow.load_adapters(path)
    truncated = tmp_path / f"t{suffix}"
    truncated.write_bytes(path.read_bytes()[:-100])
    other = make_model(kind)
    with pytest.raises(adapter_ext.FileError), unchanged(other):
        other.load_adapters(truncated)


def test_b12_one_name_for_two_modules_is_refused_in_separate_calls(kind, tmp_path):
    model = make_model(kind, "encoder:a1")
    with pytest.raises(ValueError, match="exists already"), unchanged(model):
        model.add_adapter("decoder:a1", adapter_config())
    # In one call it means both, and both survive.
    add(model, "encoder+decoder:x1")
    model.save_to(tmp_path / "model.nemo")
    model.save_adapters(tmp_path / "f.safetensors", "x1")
    other = make_model(kind)
    other.load_adapters(tmp_path / "f.safetensors")
    for again in (kind.restore_from(tmp_path / "model.nemo"), other):
        assert where(again, "x1") == ENCODER_BLOCKS + DECODER_BLOCKS
        assert_same_tensors(adapter_state(again, "x1"), adapter_state(model, "x1"))


def test_b13_places_that_cant_have_adapters_are_no_silent_loss():
    class Joint(StockModel):
        @property
        def adapter_module_names(self):
            return ["", "encoder", "joint", "linear"]

        def __init__(self, cfg, trainer=None):
            super().__init__(cfg, trainer)
            self.linear = nn.Linear(2, 2)

    model = make_model(Joint)
    for name in ("joint:a1", "linear:a1", "encoder+linear:a1", "encoder+joint:a1"):
        with pytest.raises(ValueError, match=r"joint|linear"), unchanged(model):
            model.add_adapter(name, adapter_config())
    add(model, "encoder:a1")
    cfg = OmegaConf.create(OmegaConf.to_container(model.cfg))
    cfg.encoder.block["_target_"] = "model_testing.Block"
    with pytest.raises(ValueError, match="AdapterModuleMixin"):
        Joint(cfg)  # its configuration has an adapter for the encoder


def test_b13_a_default_place_that_is_not_there():
    class Wrong(StockModel):
        default_adapter_module_name = "joint"

    model = make_model(Wrong)
    with pytest.raises(ValueError, match="joint"), unchanged(model):
        model.add_adapter("a1", adapter_config())
    blocked = make_model(
        type("NoDefault", (StockModel,), {"default_adapter_module_name": None}),
        encoder_adapter=False,
        decoder_adapter=False,
    )
    with pytest.raises(ValueError, match="no place"), unchanged(blocked):
        blocked.add_adapter("a1", adapter_config())


def test_b14_after_an_error_a_model_is_in_no_special_state(kind):
    model = make_model(kind)
    block = model.decoder.blocks[1]
    block.__class__ = RaisingBlock
    model.cfg = make_model(kind, "decoder:a1").cfg
    with pytest.raises(RuntimeError, match="on purpose"), unchanged(model):
        model.setup_adapters()
    with pytest.raises(ValueError, match="exists already"):  # it does not believe to be restoring
        model.add_adapter("a1", adapter_config())
    block.armed = False
    model.setup_adapters()
    assert where(model, "a1") == DECODER_BLOCKS
    block.armed = True
    config = model.cfg.adapters
    with pytest.raises(RuntimeError, match="on purpose"), unchanged(model):
        model.add_adapter("decoder:x1", adapter_config())
    assert model.cfg.adapters is config  # what refers to it still does
    assert all(host.adapter_cfg is config for host in hosts(model).values())
    block.armed = False
    add(model, "decoder:x1")
    close(model(inputs()), plainly(model, inputs())[0])


# --- Modules --------------------------------------------------------------------------------------


def test_b15_a_missing_strategy_is_named(block):
    del block.adapter_layer["a10"].adapter_strategy
    with pytest.raises(AttributeError, match=r"adapter 'a10' \(LinearAdapter\)"):
        block(inputs())


@pytest.mark.parametrize("dim", [0, 3])
def test_b16_the_callers_config_is_left_alone(kind, dim):
    given = {**vars(adapter_config(dim=dim)), "enabled": False}
    given["adapter_strategy"] = None
    for cfg in (given, OmegaConf.create(given), types.MappingProxyType(given)):
        before = copy.deepcopy(dict(cfg))
        for host in (BlockWithAdapters(), make_model(kind)):
            if dim:
                host.add_adapter("a1", cfg)
                host.set_enabled_adapters("a1")
                assert host.adapter_cfg.a1.enabled is True
            else:
                with pytest.raises(ValueError, match="dim"):
                    host.add_adapter("a1", cfg)
                assert not hasattr(host, "adapter_name")
            assert dict(cfg) == before


def test_b16_adapter_name_is_of_the_last_that_was_added(block):
    with pytest.raises(ValueError, match="exists already"):
        block.add_adapter("a10", adapter_config())
    assert block.adapter_name == NAMES[-1]


class Norms(nn.Module, AdapterModuleMixin):
    def __init__(self):
        super().__init__()
        self.plain = nn.BatchNorm1d(WIDTH, affine=False)
        self.sync = nn.SyncBatchNorm(WIDTH)
        self.deep = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm3d(1))


class NormAdapter(nn.Module, AdapterModuleUtil):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.setup_adapter_strategy(None)

    def forward(self, x):
        return self.norm(x)


def test_b17_every_batch_norm_is_frozen_except_those_of_adapters(caplog):
    host = Norms()
    for name in ("a1", "a10"):
        host.add_adapter(name, {"_target_": f"{__name__}.NormAdapter"})
    host.set_enabled_adapters("a10", enabled=False)
    for parameter in host.parameters():
        parameter.requires_grad_(False)
    host.train()
    with caplog.at_level(logging.INFO):
        host.unfreeze_enabled_adapters()
    assert caplog.messages == []
    for norm in (host.plain, host.sync, *host.deep):
        assert not norm.training
        assert norm.track_running_stats is False
    assert [p.requires_grad for p in host.sync.parameters()] == [False, False]
    disabled = host.adapter_layer["a10"].norm
    assert disabled.track_running_stats
    assert disabled.training
    assert not disabled.weight.requires_grad
    assert host.adapter_layer["a1"].norm.weight.requires_grad


def test_b17_training_and_evaluation_of_the_frozen_base_are_the_same(kind):
    model = make_model(kind, "a1")
    x = inputs()
    with torch.no_grad():
        for block in (*model.encoder.blocks, *model.decoder.blocks):
            block.norm.running_mean.uniform_(-1, 1)
            block.norm.running_var.uniform_(0.5, 2)
    want = model(x)
    model.freeze()
    model.unfreeze_enabled_adapters()
    model.train()  # afterwards, as trainers do
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(model(x), want)
    assert torch.equal(model.eval()(x), want)
    assert_same_tensors(model.state_dict(), state)


@pytest.mark.parametrize("training", [False, True])
def test_b18_running_reads_no_configuration(kind, training, monkeypatch):
    model = make_model(kind, "a1", "encoder+decoder:module", *(f"n{i}" for i in range(8)))
    model.set_enabled_adapters("a1", enabled=False)
    x = inputs()
    if training:
        train_with_losses(model)
    want = model(x)

    def forbidden(*args, **kwargs):
        raise AssertionError("the configuration was read")

    for method in ("__getattr__", "__getitem__", "__iter__", "__contains__", "get", "_get_node"):
        monkeypatch.setattr(DictConfig, method, forbidden)
    with pytest.raises(AssertionError, match="was read"):
        model.cfg.get("adapters")
    assert torch.equal(model(x), want)


def test_b18_models_compile_without_a_break(kind):
    torch._dynamo.reset()
    model = make_model(kind, "a1", "encoder+decoder:module")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(inputs()), plainly(model, inputs())[0])
    model.set_enabled_adapters("module", enabled=False)
    close(compiled(inputs()), plainly(model, inputs())[0])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_b19_the_order_of_the_chain_survives(kind, suffix, tmp_path):
    names = ("x1", "a10", "1", "a1")  # not sorted
    model = make_model(kind, *names)
    x = inputs()
    model.save_adapters(tmp_path / f"f{suffix}")
    model.save_to(tmp_path / "model.nemo")
    other = make_model(kind)
    other.load_adapters(tmp_path / f"f{suffix}")
    again = kind.restore_from(tmp_path / "model.nemo")
    for each in (model, other, again):
        assert each.encoder.blocks[0].get_enabled_adapters() == list(names)
        assert torch.equal(each(x), model(x))
    for name in names:
        model.set_enabled_adapters(name, enabled=False)
    for name in reversed(names):
        model.set_enabled_adapters(name)
    assert model.encoder.blocks[2].get_enabled_adapters() == list(names)
    model.rename_adapter("a10", "zz")
    assert model.encoder.blocks[2].get_enabled_adapters() == ["x1", "zz", "1", "a1"]
    assert torch.equal(model(x), other(x))


# --- Adapters and strategies ----------------------------------------------------------------------


def test_b20_who_decides_about_what(block):
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="stochastic_depth"):
            ResidualAddAdapterStrategy(stochastic_depth=p)
    adapter, x = LinearAdapter(WIDTH, 3, dropout=1.0), inputs()
    randomize(adapter)
    full = x + formula(adapter, x)
    strategy = ResidualAddAdapterStrategy()
    for host_trains in (False, True):
        block.train(host_trains)
        strategy.stochastic_depth = 0.0
        # Dropout goes by the adapter's mode, whatever the host's.
        close(strategy(x, adapter.eval(), module=block), full)
        close(strategy(x, adapter.train(), module=block), x)
        # Stochastic depth goes by the host's mode, whatever the adapter's.
        strategy.stochastic_depth = 1.0
        close(strategy(x, adapter.eval(), module=block), x if host_trains else full)


class Halve(nn.Module, AdapterModuleUtil):
    """An adapter without parameters."""

    def __init__(self):
        super().__init__()
        self.setup_adapter_strategy(ResidualAddAdapterStrategy(l2_lambda=0.5))

    def forward(self, x):
        return -0.5 * x


def test_b21_adapters_without_parameters_and_partly_frozen_ones(block):
    host = BlockWithAdapters()
    host.add_adapter("a1", {"_target_": f"{__name__}.Halve"})
    host.train()
    x = inputs()
    host.norm.eval()
    close(host(x), 0.5 * Block.forward(host, x))
    assert host.adapter_losses() == {}
    block.train()
    adapter = block.adapter_layer["a1"]
    adapter.adapter_strategy = ResidualAddAdapterStrategy(l2_lambda=0.5)
    next(adapter.parameters()).requires_grad_(False)
    block(x)
    assert list(block.adapter_losses()) == ["a1"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_b21_the_aux_loss_is_of_the_delta_before_rounding(dtype, block):
    adapter = LinearAdapter(WIDTH, 3)
    randomize(adapter)
    adapter = adapter.to(dtype)
    host = block.train()
    # Big inputs and small deltas: the difference of the rounded output and the input is noise.
    adapter.module[3].weight.data *= 0.01
    x = (inputs(64) * 30).to(dtype)
    strategy = ResidualAddAdapterStrategy(l2_lambda=3.0)
    y = strategy(x, adapter, module=host)
    [loss] = AccessMixin.get_module_registry(adapter)[""]["adapter_loss"]
    delta = formula(adapter.double(), x.double())
    want = 3.0 * delta.square().sum(1).mean()
    rounded = 3.0 * (y.double() - x.double()).square().sum(1).mean()
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=0.02)
    assert abs(rounded - want) / want > 0.05  # or the test would show nothing


def test_b22_linear_adapter_arguments():
    with pytest.raises(ValueError, match="norm_position"):
        LinearAdapter(WIDTH, 3, norm_position="mid")
    with pytest.raises(KeyError, match="swish"):
        LinearAdapter(WIDTH, 3, activation="tanh")
    with pytest.raises(ValueError, match="activation"):
        LinearAdapter(WIDTH, 3, activation="tanh")
    for name, value in {"in_features": "8", "dim": 2.5, "activation": [], "dropout": None}.items():
        with pytest.raises(TypeError, match=f"{name} must be"):
            LinearAdapter(**{"in_features": WIDTH, "dim": 3, name: value})
    for name in ("hardtanh", "relu", "selu", "swish", "silu"):
        assert not LinearAdapter(WIDTH, 3, activation=name).module[2].inplace
    with torch.device("meta"):
        assert LinearAdapter(WIDTH, 3).module[3].weight.is_meta


def test_b22_zeros_whatever_was_in_memory(monkeypatch):
    def garbage(self):
        with torch.no_grad():
            self.weight.fill_(float("nan"))

    monkeypatch.setattr(nn.Linear, "reset_parameters", garbage)
    monkeypatch.setattr(nn.LayerNorm, "reset_parameters", lambda self: None)
    assert not LinearAdapter(WIDTH, 3).module[3].weight.any()
    post = LinearAdapter(WIDTH, 3, norm_position="post").module[3]
    assert not post.weight.any()
    assert not post.bias.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_b23_adapters_are_where_and_of_what_type_their_hosts_are(kind, dtype, suffix, tmp_path):
    make_model(kind, "a1").save_adapters(tmp_path / f"f{suffix}")
    model = make_model(kind).to(dtype)
    model.load_adapters(tmp_path / f"f{suffix}")
    add(model, "decoder:a10")
    for state in (adapter_state(model, "a1"), adapter_state(model, "a10")):
        assert {t.dtype for t in state.values()} == {dtype}
    assert model(inputs().to(dtype)).dtype is dtype
    meta = make_model(kind).to("meta")
    meta.add_adapter("a1", adapter_config())
    assert all(t.is_meta for t in adapter_state(meta, "a1").values())


def test_b24_disabled_adapters_are_available_and_unknown_ones_named(kind):
    model = make_model(kind, "a1", "decoder:a10")
    model.set_enabled_adapters(enabled=False)
    assert model.is_adapter_available() is True
    for host in (model, model.encoder.blocks[0]):
        with pytest.raises(ValueError, match=r"no adapter named 'a'.*a1.*a10"):
            host.set_enabled_adapters("a")
    with pytest.raises(ValueError, match="encoder"):
        model.set_enabled_adapters("encoder:a10")


def test_b25_running_and_changing_adapters_logs_nothing(kind, caplog, recwarn):
    with caplog.at_level(logging.DEBUG):
        model = train_with_losses(make_model(kind, "a1", "decoder:a10"))
        model(inputs())
        model.set_enabled_adapters("a1", enabled=False)
        model(inputs())
    assert caplog.messages == []
    assert not recwarn.list


# --- The registry ---------------------------------------------------------------------------------


class Outer:
    class Layer(nn.Module):
        pass

    class WithAdapters(Layer, AdapterModuleMixin):
        pass


class Other:
    class Layer(nn.Module):
        pass

    class WithAdapters(Layer, AdapterModuleMixin):
        pass


def test_b26_nested_classes_are_told_apart():
    for cls in (Outer, Other):
        register_adapter(cls.Layer, cls.WithAdapters)
    for cls in (Outer, Other):
        info = get_registered_adapter(cls.Layer)
        assert info.adapter_class is cls.WithAdapters
        assert info.base_class_path == f"{__name__}.{cls.__name__}.Layer"
        assert get_registered_adapter(info.adapter_class_path) is info


def test_b26_subclasses_of_registered_classes_are_not_taken_for_them():
    class Special(Block):
        pass

    class SpecialWithAdapters(BlockWithAdapters):
        pass

    assert get_registered_adapter(Special) is None
    assert get_registered_adapter(SpecialWithAdapters) is None
    model = make_model(StockModel)
    model.special = Special()
    model.deep = nn.Sequential(nn.Sequential(Block()))
    model.replace_adapter_compatible_modules(verbose=False)
    assert type(model.special) is Special
    assert type(model.deep[0][0]) is BlockWithAdapters  # however deep


def test_b26_swapped_modules_work_without_a_constructor(tmp_path):
    model = StockModel(model_config(Block))
    randomize(model)
    model.eval().replace_adapter_compatible_modules(verbose=False)
    block = model.encoder.blocks[0]
    assert block.is_adapter_available() is False
    assert block.get_enabled_adapters() == []
    assert block.get_accepted_adapter_types() == set()
    assert block.adapter_losses() == {}
    add(model, "a1")
    model.save_to(tmp_path / "model.nemo")
    again = StockModel.restore_from(tmp_path / "model.nemo")
    assert type(again.encoder.blocks[0]) is BlockWithAdapters
    assert torch.equal(again(inputs()), model(inputs()))


# --- What the API lacked --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a.b", "a+b", "a:b:c", "decoder:", "encoder:a.b", "keys"])
def test_b27_malformed_names(kind, name):
    for host in (make_model(kind), BlockWithAdapters()):
        with pytest.raises(ValueError, match=r"name|place"):
            host.add_adapter(name, adapter_config())
        assert host.is_adapter_available() is False
        with pytest.raises(TypeError, match="str"):
            host.add_adapter(3, adapter_config())


def test_b27_removing(kind):
    model, x = make_model(kind, "a1", "encoder+decoder:a10", "1"), inputs()
    model.remove_adapter("encoder+decoder:a10")
    model.remove_adapter("1")
    want = make_model(kind, "a1")
    assert_same_tensors(model.state_dict(), want.state_dict())
    assert model.cfg == want.cfg
    assert torch.equal(model(x), want(x))
    model.remove_adapter("a1")
    assert model.is_adapter_available() is False
    assert torch.equal(model(x), make_model(kind)(x))
    add(model, "decoder:a1")  # the name is free again
    assert where(model, "a1") == DECODER_BLOCKS
    with pytest.raises(ValueError, match="'1'"):
        model.remove_adapter("1")


def test_b27_renaming(kind, tmp_path):
    model, x = make_model(kind, "a1", "encoder+decoder:module", "1"), inputs()
    want = model(x)
    model.set_enabled_adapters("1", enabled=False)
    state = list(adapter_state(model, "module").values())
    model.rename_adapter("module", "weight")
    model.rename_adapter("1", "x1")
    assert list(model.cfg.adapters) == ["global_cfg", "a1", "weight", "x1"]
    assert list(model.encoder.blocks[0].adapter_layer) == ["a1", "weight", "x1"]
    modules = model.cfg.adapters.global_cfg.adapter_meta_cfg.modules
    assert modules == {"a1": "", "weight": "encoder+decoder", "x1": ""}
    renamed = list(adapter_state(model, "weight").values())
    assert all(a is b or torch.equal(a, b) for a, b in zip(renamed, state, strict=True))
    assert model.get_enabled_adapters() == ["a1", "weight"]
    model.set_enabled_adapters("x1")
    assert torch.equal(model(x), want)
    model.save_to(tmp_path / "model.nemo")
    assert torch.equal(kind.restore_from(tmp_path / "model.nemo")(x), want)
    assert where(model, "module") == where(model, "1") == []


def test_b27_listing(kind):
    model = make_model(kind, "a1", "decoder:a10")
    model.set_enabled_adapters("a10", enabled=False)
    model.freeze()
    model.unfreeze_enabled_adapters()
    rows = model.list_adapters()
    assert [(row.name, row.where) for row in rows] == [
        *(("a1", path) for path in ENCODER_BLOCKS),
        *(("a10", path) for path in DECODER_BLOCKS),
    ]
    assert {(row.bottleneck, row.activation, row.parameters) for row in rows} == {(3, "swish", 88)}
    assert [row.enabled for row in rows] == [True] * 3 + [False] * 2
    assert [row.trainable for row in rows] == [88] * 3 + [0] * 2
    lines = str(rows).splitlines()
    assert len(lines) == 1 + len(rows)
    assert lines[0].split() == list(rows[0]._fields)
    assert lines[1].split()[:2] == ["a1", "encoder.blocks.0"]


def test_b27_every_row_its_own_adapter(kind):
    model = make_model(kind, "a1", "encoder+decoder:a10")
    x, rows = inputs(4), []
    for i, name in enumerate(("a10", None, "a1", "a10")):
        for known in ("a1", "a10"):
            model.set_enabled_adapters(known, enabled=known == name)
        rows.append(plainly(model, x[i : i + 1])[0])
    model.set_enabled_adapters()
    with model.route_adapters(["a10", None, "a1", "a10"]):
        close(model(x), torch.cat(rows))


def test_b27_module_instances_are_refused_as_config_and_inputs_are_needed(block):
    with pytest.raises(TypeError, match="LinearAdapter"):
        block.add_adapter("x2", LinearAdapter(WIDTH, 3))
    with pytest.raises(TypeError, match="input"):
        block.forward_enabled_adapters()


# --- Tests that see mistakes ----------------------------------------------------------------------


def test_b28_our_checks_fail_without_the_loss_and_without_stochastic_depth(kind, monkeypatch):
    model = train_with_losses(make_model(kind, "a1", "decoder:a10"))
    check_losses(model, inputs())
    real = ops.linear_adapter

    def broken(*args, **kwargs):
        return real(*args, **{**kwargs, "l2_lambda": 0.0, "stochastic_depth": 0.0})

    monkeypatch.setattr(ops, "linear_adapter", broken)
    with pytest.raises(AssertionError):
        check_losses(model, inputs())


def test_b28_our_adapters_are_no_identity(kind):
    x, base = inputs(), make_model(kind)(inputs())
    added = (("a1",), ("a10",), ("a1", "a10"), ("a10", "a1"))
    outputs = [make_model(kind, *names)(x) for names in added]
    for i, output in enumerate(outputs):
        for other in (base, *outputs[:i]):
            assert (output - other).abs().max() > 1e-2


def test_b28_unchanged_sees_changes(kind):
    changes = (
        lambda m: m.encoder.blocks[1].train(),
        lambda m: m.set_enabled_adapters("a1", enabled=False),
        lambda m: m.cfg.adapters.pop("a1"),
        lambda m: m.decoder.blocks[0].linear.bias.data.add_(1),
        lambda m: m.encoder.requires_grad_(False),
        lambda m: add(m, "x1"),
        lambda m: setattr(m.encoder, "leftover", 1),
    )

    def change_and_fail(model, change):
        change(model)
        raise ZeroDivisionError

    for change in changes:
        model = make_model(kind, "a1")
        with pytest.raises(AssertionError), unchanged(model):
            change(model)
        model = make_model(kind, "a1")
        with pytest.raises(AssertionError), unchanged(model):
            change_and_fail(model, change)
