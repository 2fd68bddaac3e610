"""NeuralModule and ModelPT: freezing, configuration, saving and restoring."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from model_testing import (
    ENCODER_BLOCKS,
    KINDS,
    Block,
    BlockWithAdapters,
    StockModel,
    add,
    assert_same_tensors,
    inputs,
    make_model,
    model_config,
    where,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

import adapter_ext
from adapter_ext import (
    AccessMixin,
    FileError,
    LinearAdapter,
    ModelPT,
    NeuralModule,
    ResidualAddAdapterStrategyConfig,
)


class Net(NeuralModule):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 1)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def required_grad(module):
    return {name: p.requires_grad for name, p in module.named_parameters()}


# --- NeuralModule ---------------------------------------------------------------------------------


def test_freeze_and_unfreeze():
    net = Net()
    assert net.num_weights == 20 + 10 + 6
    net.freeze()
    assert net.num_weights == 0
    assert not any(m.training for m in net.modules())
    net.unfreeze()
    assert all(required_grad(net).values())
    assert all(m.training for m in net.modules())
    assert net.input_types is None
    assert net.output_types is None


@pytest.mark.parametrize("times", [1, 2])
def test_partial_unfreeze_keeps_what_was_frozen_before(times):
    net = Net()
    net.first.requires_grad_(False)
    before = required_grad(net)
    for _ in range(times):
        net.freeze()
    net.unfreeze(partial=True)
    assert required_grad(net) == before
    with pytest.raises(ValueError, match=r"needs a freeze\(\)"):
        net.unfreeze(partial=True)
    net.unfreeze()
    assert all(required_grad(net).values())


def test_parameters_that_came_after_freeze_are_unfrozen():
    net = Net()
    net.last.requires_grad_(False)
    net.freeze()
    net.extra = nn.Linear(1, 1).requires_grad_(False)
    net.unfreeze(partial=True)
    assert [n for n, r in required_grad(net).items() if not r] == ["last.weight", "last.bias"]


def test_as_frozen_restores_everything_after_an_error_too():
    net = Net()
    net.norm.eval()
    net.last.bias.requires_grad_(False)
    before = required_grad(net), {n: m.training for n, m in net.named_modules()}
    seen = []

    def fail_within():
        with net.as_frozen():
            seen.extend([net.num_weights, net.training])
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert seen == [0, False]
    assert (required_grad(net), {n: m.training for n, m in net.named_modules()}) == before
    with pytest.raises(ValueError, match=r"needs a freeze\(\)"):
        net.unfreeze(partial=True)  # it is not frozen any more
    net.freeze()
    with net.as_frozen():
        pass
    net.unfreeze(partial=True)
    assert required_grad(net) == before[0]


# --- ModelPT --------------------------------------------------------------------------------------


@dataclass
class Config:
    width: int = 3
    twice: int = 6


class Plain(ModelPT):
    def __init__(self, cfg, trainer=None):
        super().__init__(cfg, trainer)
        self.layer = nn.Linear(self.cfg.width, self.cfg.twice)


@pytest.mark.parametrize(
    "cfg",
    [
        {"width": 3, "twice": 6},
        OmegaConf.create({"width": 3, "twice": 6}),
        Config(),
        OmegaConf.structured(Config),
    ],
    ids=["dict", "DictConfig", "dataclass", "structured"],
)
def test_configuration_is_a_copy(cfg):
    model = Plain(cfg)
    assert isinstance(model.cfg, DictConfig)
    model.cfg.more = 1  # keys may be added, whatever it was made from
    assert "more" not in (cfg if isinstance(cfg, (dict, DictConfig)) else vars(cfg))
    other = Plain(model.cfg)
    assert other.cfg == model.cfg
    assert other.cfg is not model.cfg
    assert other.model_guid != model.model_guid


def test_configuration_of_another_type():
    with pytest.raises(TypeError, match="must be a dict, DictConfig or dataclass, got list"):
        Plain([1])


def test_trainer_and_from_config_dict():
    trainer = object()
    model = Plain.from_config_dict({"model": {"width": 2, "twice": 4}}, trainer=trainer)
    assert model.trainer is trainer
    assert model.layer.weight.shape == (4, 2)
    model.set_trainer(None)
    assert model.trainer is None
    assert Plain.from_config_dict(Config()).layer.weight.shape == (6, 3)
    assert Plain.list_available_models() == []


def test_references_that_lead_out_of_the_models_part():
    """They failed where they were read first, far from where the part was taken."""
    whole = {
        "rate": 16000,
        "model": {"width": 2, "twice": "${.again}", "again": 4, "sampling": {"rate": "${rate}"}},
    }
    part = OmegaConf.create(whole).model
    for model in (Plain.from_config_dict(whole), Plain(part)):
        assert model.layer.weight.shape == (4, 2)
        assert model.cfg.sampling.rate == 16000
    with pytest.raises(OmegaConfBaseException, match="nothing"):
        Plain.from_config_dict({"model": {"width": 2, "twice": 4, "a": "${nothing}"}})


def test_data_set_configurations():
    model = Plain(Config())
    model.setup_training_data({"batch": 4})
    model.setup_validation_data({"batch": 8})
    model.setup_test_data(None)
    assert model.cfg.train_ds == {"batch": 4}
    assert model.cfg.validation_ds == {"batch": 8}
    assert "test_ds" not in model.cfg
    with pytest.raises(ValueError, match="dataset_name"):
        model._update_dataset_config("other", {})


def test_save_and_restore(tmp_path):
    model = Plain({"width": 3, "twice": "${width}", "name": "x"})
    model.save_to(tmp_path / "model.nemo")
    again = Plain.restore_from(str(tmp_path / "model.nemo"), trainer="t")
    assert type(again) is Plain
    assert again.trainer == "t"
    assert not again.training
    assert again.cfg == model.cfg
    assert OmegaConf.to_container(again.cfg, resolve=False)["twice"] == "${width}"
    assert_same_tensors(again.state_dict(), model.state_dict())
    cfg = Plain.restore_from(tmp_path / "model.nemo", return_config=True)
    assert cfg == ModelPT.restore_from(tmp_path / "model.nemo", return_config=True) == model.cfg


def test_restore_with_another_configuration(tmp_path):
    Plain(Config()).save_to(tmp_path / "model.nemo")
    override = OmegaConf.create({"width": 3, "twice": 6, "new": True})
    OmegaConf.save(override, tmp_path / "override.yaml")
    for given in (override, tmp_path / "override.yaml", str(tmp_path / "override.yaml")):
        model = Plain.restore_from(tmp_path / "model.nemo", override_config_path=given)
        assert model.cfg.new is True
    smaller = {"width": 2, "twice": 6}
    with pytest.raises(FileError, match=r"(?s)model\.nemo: not the weights of this model.*size"):
        Plain.restore_from(tmp_path / "model.nemo", override_config_path=smaller)


def test_restore_without_strict(tmp_path):
    class More(Plain):
        def __init__(self, cfg, trainer=None):
            super().__init__(cfg, trainer)
            self.more = nn.Linear(1, 1)

    model = Plain(Config())
    model.save_to(tmp_path / "model.nemo")
    with pytest.raises(FileError, match=r"more\.weight"):
        More.restore_from(tmp_path / "model.nemo")
    more = More.restore_from(tmp_path / "model.nemo", strict=False)
    assert torch.equal(more.layer.weight, model.layer.weight)


def test_restore_to_a_device(tmp_path):
    Plain(Config()).save_to(tmp_path / "model.nemo")
    model = Plain.restore_from(tmp_path / "model.nemo", map_location="meta")
    assert model.layer.weight.device.type == "meta"


def test_a_file_can_not_name_the_model(tmp_path):
    model = Plain({"width": 3, "twice": 6, "target": "os.system"})
    model.save_to(tmp_path / "model.nemo")
    with pytest.raises(TypeError, match="model's own class"):
        ModelPT.restore_from(tmp_path / "model.nemo")
    with pytest.raises(FileNotFoundError):
        Plain.restore_from(tmp_path / "none.nemo")


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_restored_with_their_adapters(kind, tmp_path):
    model = make_model(kind, "a1", "encoder+decoder:a10", "decoder:x1", seed=4)
    model.set_enabled_adapters("a1", False)
    model.save_to(tmp_path / "model.nemo")
    again = kind.restore_from(tmp_path / "model.nemo")
    assert again.cfg == model.cfg
    assert again.get_enabled_adapters() == model.get_enabled_adapters() == ["a10", "x1"]
    assert again.list_adapters() == model.list_adapters()
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert torch.equal(again(inputs()), model(inputs()))
    add(again, "b")
    assert where(again, "b") == ENCODER_BLOCKS


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_b4_a_copy_has_a_guid_of_its_own(make_copy):
    model = make_model(StockModel, "a1")
    other = make_copy(model)
    assert other.model_guid != model.model_guid
    assert other.encoder.blocks[0].model_guid == other.model_guid
    assert model.encoder.blocks[0].model_guid == model.model_guid
    other.set_enabled_adapters("a1", False)
    assert (model.get_enabled_adapters(), other.get_enabled_adapters()) == (["a1"], [])


class OwnAdapter(LinearAdapter):
    pass


@pytest.mark.parametrize(
    "target", ["torch.nn.Linear", "os.system", f"{OwnAdapter.__module__}.OwnAdapter"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_an_archive_are_of_registered_classes(kind, target, tmp_path, monkeypatch):
    model = make_model(kind, "a")
    model.cfg.adapters.a["_target_"] = target
    model.save_to(tmp_path / "model.nemo")
    with pytest.raises(ValueError, match=f"'{target}' of a file is not registered"):
        kind.restore_from(tmp_path / "model.nemo")
    if target.endswith("OwnAdapter"):
        targets = dict(adapter_ext.registry._targets)
        monkeypatch.setattr(adapter_ext.registry, "_targets", targets)
        adapter_ext.register_target(OwnAdapter)
        again = kind.restore_from(tmp_path / "model.nemo")
        assert type(again.encoder.blocks[0].adapter_layer["a"]) is OwnAdapter


@pytest.mark.parametrize("kind", KINDS)
def test_the_constructor_takes_adapters_from_the_configuration(kind):
    cfg = model_config()
    cfg.adapters = {"a": {"_target_": "adapter_ext.LinearAdapter", "in_features": 11, "dim": 2}}
    model = kind(cfg)
    assert where(model, "a") == ENCODER_BLOCKS
    assert model.cfg.adapters.a.enabled is True
    assert "enabled" not in cfg.adapters.a
    cfg.adapters.a.dim = 0
    with pytest.raises(ValueError, match="dim must be at least 1"):
        kind(cfg)


def test_replaced_classes_are_in_the_saved_configuration(tmp_path):
    model = StockModel(model_config(Block))
    model.replace_adapter_compatible_modules(verbose=False)
    add(model, "a")
    model.save_to(tmp_path / "model.nemo")
    again = StockModel.restore_from(tmp_path / "model.nemo")
    assert type(again.encoder.blocks[0]) is BlockWithAdapters
    assert_same_tensors(again.state_dict(), model.state_dict())


def test_a_shallow_copy_leaves_the_original_its_guid():
    """Its hosts got another guid, under which nobody asked for their losses."""
    model = make_model(StockModel)
    add(model, "a", adapter_strategy=ResidualAddAdapterStrategyConfig(l2_lambda=0.1))
    guid = model.model_guid
    assert copy.copy(model).encoder is model.encoder
    assert model.model_guid == guid
    model.train()(inputs())
    assert AccessMixin.is_access_enabled(guid)
    AccessMixin.reset_registry(model)


def test_as_frozen_keeps_what_was_noted_by_freeze():
    """unfreeze() within it forgot that."""
    module = Net()
    frozen = next(module.parameters()).requires_grad_(False)
    module.freeze()
    with module.as_frozen():
        module.unfreeze()
    module.unfreeze(partial=True)
    assert [p for p in module.parameters() if not p.requires_grad] == [frozen]
