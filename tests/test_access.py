"""The tensor registry (item 18) and the bugs of NeMo's that it must not have (B1 to B4)."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from layer_testing import D, make_block, rand
from omegaconf import OmegaConf
from torch import nn

from adapter_ext import (
    AccessMixin,
    ResidualAddAdapterStrategy,
    ResidualAddAdapterStrategyConfig,
    access,
    adapter_losses,
    set_access_cfg,
)


class Leaf(nn.Module, AccessMixin):
    pass


@pytest.fixture(autouse=True)
def _defaults():
    yield
    access._enabled.clear()
    access._options.clear()


@pytest.fixture
def block():
    block = make_block("a", "a1").train()
    for adapter in block.adapter_layer.values():
        adapter.adapter_strategy = ResidualAddAdapterStrategy(l2_lambda=0.1)
    return block


def test_item18_registry_lists_tensors_by_module_path():
    net = nn.ModuleDict({"x": Leaf(), "plain": nn.Linear(2, 2), "empty": Leaf()})
    one, two = torch.ones(1), torch.zeros(2)
    net["x"].register_accessible_tensor("k", one)
    net["x"].register_accessible_tensor("k", two)
    assert AccessMixin.get_module_registry(net) == {"x": {"k": [one, two]}}


def test_item18_set_access_cfg_wants_a_dictconfig():
    with pytest.raises(TypeError, match="DictConfig, got dict"):
        set_access_cfg({"detach": True})


def test_item18_detach():
    set_access_cfg(OmegaConf.create({"detach": True, "convert_to_cpu": True}))
    leaf = Leaf()
    leaf.register_accessible_tensor("k", torch.ones(1, requires_grad=True) * 2)
    assert not leaf._registry["k"][0].requires_grad
    assert leaf.access_cfg["convert_to_cpu"] is True


def test_item18_reset_works_on_any_module_and_clears_children():
    net = nn.Sequential(Leaf(), nn.Sequential(Leaf()))
    for leaf in (net[0], net[1][0]):
        leaf.register_accessible_tensor("k", torch.ones(1))
        leaf.register_accessible_tensor("other", torch.ones(1))
    AccessMixin.set_access_enabled(True)
    AccessMixin.reset_registry(net, "k")
    assert {frozenset(r) for r in AccessMixin.get_module_registry(net).values()} == {
        frozenset({"other"})
    }
    assert not AccessMixin.is_access_enabled()
    AccessMixin.reset_registry(net)
    assert AccessMixin.get_module_registry(net) == {}


def test_b1_aux_loss_enables_the_guid_of_the_model(block):
    block.model_guid = "guid-1"
    assert not AccessMixin.is_access_enabled("guid-1")
    block(rand(3, D))
    assert AccessMixin.is_access_enabled("guid-1")
    assert AccessMixin.is_access_enabled()
    assert not AccessMixin.is_access_enabled("guid-2")
    AccessMixin.reset_registry(block)
    assert not AccessMixin.is_access_enabled("guid-1")
    assert not AccessMixin.is_access_enabled()


def test_b2_registry_does_not_grow_over_steps(block):
    block.model_guid = "guid-1"
    for _ in range(4):
        block(rand(3, D))
        assert AccessMixin.is_access_enabled(block.model_guid)
        registry = AccessMixin.get_module_registry(block)
        assert {k: len(v["adapter_loss"]) for k, v in registry.items()} == {
            "adapter_layer.a": 1,
            "adapter_layer.a1": 1,
        }
        AccessMixin.reset_registry(block)


@pytest.mark.parametrize("key", [None, "k", "unknown"])
def test_b3_reset_with_and_without_key_never_raises(key):
    net = nn.Sequential(Leaf(), Leaf(), nn.Linear(1, 1))
    for leaf in net[:2]:
        leaf.register_accessible_tensor("k", torch.ones(1))
    AccessMixin.reset_registry(net, key)
    assert bool(AccessMixin.get_module_registry(net)) == (key == "unknown")
    net[0].reset_registry(key)  # bound, and with nothing left to reset
    AccessMixin.reset_registry(nn.Linear(1, 1), key)


def test_b4_models_do_not_share_flags_or_options(block):
    other = copy.deepcopy(block)
    block(rand(3, D))
    other(rand(3, D))
    AccessMixin.reset_registry(block)
    assert AccessMixin.is_access_enabled(), "the other model's losses are still unread"
    assert set(AccessMixin.get_module_registry(other)) == {"adapter_layer.a", "adapter_layer.a1"}
    assert AccessMixin.get_module_registry(block) == {}
    AccessMixin.reset_registry(other)
    assert not AccessMixin.is_access_enabled()


def test_b4_nothing_is_kept_of_a_dead_model():
    block = make_block("a", adapter_strategy=ResidualAddAdapterStrategyConfig(l2_lambda=0.1))
    block.train().model_guid = "guid-dead"
    block(rand(3, D))
    assert AccessMixin.is_access_enabled("guid-dead")
    adapter = weakref.ref(block.adapter_layer["a"])
    del block
    gc.collect()
    assert adapter() is None
    assert not AccessMixin.is_access_enabled("guid-dead")


def test_b4_reading_options_changes_nothing_and_callers_dicts_are_copied():
    leaf = Leaf()
    assert dict(leaf.access_cfg) == {}
    assert access._options == {}
    mine = {"detach": True}
    AccessMixin.update_access_cfg(mine, guid="g")
    AccessMixin.update_access_cfg({"compute_adapter_loss": False}, guid="g")
    assert mine == {"detach": True}
    leaf.model_guid = "g"
    assert dict(leaf.access_cfg) == {"detach": True, "compute_adapter_loss": False}
    assert dict(Leaf().access_cfg) == {}
    with pytest.raises(TypeError):
        leaf.access_cfg["detach"] = False
    set_access_cfg(OmegaConf.create({}), "g")
    assert access._options == {}


def test_b4_detach_keeps_the_gradient_of_the_loss(block):
    set_access_cfg(OmegaConf.create({"detach": True}))
    block(rand(3, D))
    loss = AccessMixin.get_module_registry(block)["adapter_layer.a"]["adapter_loss"][0]
    assert loss.requires_grad


def test_enabling_by_guid():
    AccessMixin.set_access_enabled(True, guid="g")
    assert AccessMixin.is_access_enabled("g")
    assert not AccessMixin.is_access_enabled()
    AccessMixin.set_access_enabled(False, guid="g")
    assert not AccessMixin.is_access_enabled("g")


def test_switching_off_by_hand_holds_until_the_next_loss(block):
    block(rand(3, D))
    AccessMixin.set_access_enabled(False)
    assert not AccessMixin.is_access_enabled()
    block(rand(3, D))
    assert AccessMixin.is_access_enabled()
    AccessMixin.reset_registry(block)


def test_copies_and_unpickled_modules_are_known(block):
    copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block))]
    for one in copies:
        one(rand(3, D))
        assert AccessMixin.is_access_enabled()
        AccessMixin.reset_registry(one)
        assert not AccessMixin.is_access_enabled()


def test_propagate_model_guid():
    class Model(nn.Module, AccessMixin):
        def __init__(self):
            super().__init__()
            self.leaf = Leaf()

    model = Model()
    model.model_guid = "g"
    model.propagate_model_guid()
    assert model.leaf.model_guid == "g"


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_a_copy_has_no_losses_of_the_original(block, make_copy):
    """Copying a module whose losses nobody had reset was an error: graphs can't be copied."""
    block(rand(3, D))
    assert block.adapter_losses()
    copied = make_copy(block)
    assert not copied.adapter_losses()
    assert block.adapter_losses()
    copied(rand(3, D))
    assert copied.adapter_losses()


def test_losses_of_a_shared_adapter_count_once(block):
    """It has those of all its hosts, and they were added for each host."""
    other = make_block("a").train()
    other.adapter_layer["a"] = block.adapter_layer["a"]
    block.set_enabled_adapters("a1", False)
    model = nn.Sequential(block, other)
    model(rand(3, D))
    (tensors,) = AccessMixin.get_module_registry(block.adapter_layer["a"]).values()
    first, second = tensors["adapter_loss"]
    torch.testing.assert_close(adapter_losses(model), {"a": first + second})
