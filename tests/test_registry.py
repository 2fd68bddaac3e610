"""register_adapter (item 2, B26) and the registry of targets (B9, B10)."""

from __future__ import annotations

import sys

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue
from torch import nn

import adapter_ext
from adapter_ext import (
    AdapterModuleMixin,
    LinearAdapter,
    LinearAdapterConfig,
    ResidualAddAdapterStrategy,
    ResidualAddAdapterStrategyConfig,
    ReturnResultAdapterStrategy,
    ReturnResultAdapterStrategyConfig,
    get_registered_adapter,
    instantiate,
    register_adapter,
    register_target,
    registry,
)
from adapter_ext.registry import resolve_target, targets_of_a_file

NEMO = "nemo.core.classes.mixins.adapter_mixin_strategies"


class Base(nn.Module):
    class Inner(nn.Module):
        pass


class BaseAdapter(Base, AdapterModuleMixin):
    pass


class Other:
    class Inner(nn.Module):
        pass


class InnerAdapter(Base.Inner, AdapterModuleMixin):
    pass


class OtherInnerAdapter(Other.Inner, AdapterModuleMixin):
    pass


def a_function():
    raise RuntimeError("must not be called")


@pytest.fixture(autouse=True)
def _fresh_registry(monkeypatch):
    monkeypatch.setattr(registry, "_adapters", {})
    monkeypatch.setattr(registry, "_targets", dict(registry._targets))


def test_item2_register_and_get():
    assert get_registered_adapter(Base) is None
    register_adapter(Base, BaseAdapter)
    path = f"{__name__}.Base"
    for key in (Base, BaseAdapter, path, f"{__name__}.BaseAdapter"):
        info = get_registered_adapter(key)
        assert (info.base_class, info.adapter_class) == (Base, BaseAdapter)
        assert (info.base_class_path, info.adapter_class_path) == (path, path + "Adapter")
    assert Base._meta_adapter_class is BaseAdapter
    assert BaseAdapter._meta_base_class is Base
    with pytest.raises(ValueError, match="already registered"):
        register_adapter(Base, BaseAdapter)


def test_item2_adapter_class_must_be_a_subclass():
    with pytest.raises(ValueError, match="subclass"):
        register_adapter(Base, OtherInnerAdapter)
    assert get_registered_adapter(Base) is None
    assert not hasattr(OtherInnerAdapter, "_meta_base_class")


def test_adapter_class_must_be_able_to_hold_adapters():
    plain = type("Plain", (Base,), {})
    with pytest.raises(ValueError, match=r"AdapterModuleMixin too: .*Plain is none"):
        register_adapter(Base, plain)
    assert get_registered_adapter(Base) is None
    assert not hasattr(plain, "_meta_base_class")


def test_b26_nested_classes_do_not_collide():
    register_adapter(Base.Inner, InnerAdapter)
    register_adapter(Other.Inner, OtherInnerAdapter)
    assert get_registered_adapter(f"{__name__}.Other.Inner").adapter_class is OtherInnerAdapter


def test_b26_subclass_of_an_adapter_class_is_not_registered():
    register_adapter(Base, BaseAdapter)
    assert get_registered_adapter(type("Sub", (BaseAdapter,), {})) is None


def test_b10_get_registered_adapter_imports_nothing():
    assert get_registered_adapter("this.module") is None  # 'this' prints a poem when imported
    assert get_registered_adapter("no such, path") is None
    assert "this" not in sys.modules


@pytest.mark.parametrize("path", ["", "a..b", "os;system", "../x", "a b", None, 3, ".x", "this."])
def test_b10_malformed_paths_are_refused_before_any_import(path):
    with pytest.raises(ValueError, match="dotted path"):
        resolve_target(path)
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "torch.load",
        f"{__name__}.a_function",
        "builtins.eval",
        "collections.OrderedDict",
        "torch.nn.functional.relu",
        "torch.nn",
        f"{__name__}.Other",
    ],
)
def test_b10_only_module_and_strategy_classes_are_targets(path):
    with pytest.raises(ValueError, match=r"must be a class derived from torch\.nn\.Module"):
        instantiate({"_target_": path})


def test_b10_unknown_paths():
    with pytest.raises(ValueError, match="no module 'nemo_is_not_here'"):
        resolve_target("nemo_is_not_here.X")
    with pytest.raises(ValueError, match="has no 'Nothing'"):
        resolve_target("torch.nn.Nothing")


def test_b9_of_a_file_only_registered_names_resolve():
    nested = {
        "_target_": "adapter_ext.LinearAdapter",
        "in_features": 2,
        "dim": 1,
        "adapter_strategy": {"_target_": f"{__name__}.Base"},
    }
    with targets_of_a_file():
        with pytest.raises(ValueError, match=r"not registered.*adapter_ext\.LinearAdapter"):
            resolve_target("torch.nn.Linear")
        assert resolve_target(LinearAdapterConfig._target_) is LinearAdapter
        with pytest.raises(ValueError, match="not registered"):
            instantiate(nested)
    assert resolve_target("torch.nn.Linear") is nn.Linear


def test_classes_that_are_given_with_a_file():
    class Local(nn.Module):
        pass

    path = f"{__name__}.test_classes_that_are_given_with_a_file.<locals>.Local"
    with targets_of_a_file([Local]):
        assert resolve_target(path) is Local
    with pytest.raises(ValueError, match="dotted path"):
        resolve_target(path)
    with pytest.raises(ValueError, match="must be a class"), targets_of_a_file([a_function]):
        pass


@pytest.mark.parametrize(
    ("path", "cls"),
    [
        ("nemo.collections.common.parts.adapter_modules.LinearAdapter", LinearAdapter),
        (f"{NEMO}.ResidualAddAdapterStrategy", ResidualAddAdapterStrategy),
        (f"{NEMO}.ReturnResultAdapterStrategy", ReturnResultAdapterStrategy),
        ("adapter_ext.ReturnResultAdapterStrategy", ReturnResultAdapterStrategy),
        (ReturnResultAdapterStrategyConfig._target_, ReturnResultAdapterStrategy),
        (ResidualAddAdapterStrategyConfig._target_, ResidualAddAdapterStrategy),
    ],
)
def test_aliases(path, cls):
    with targets_of_a_file():
        assert resolve_target(path) is cls


def test_importable_classes_nested_ones_included():
    assert resolve_target("torch.nn.Linear") is nn.Linear
    assert resolve_target(f"{__name__}.Base.Inner") is Base.Inner


def test_register_target():
    @register_target
    class Local(nn.Module):
        pass

    path = f"{__name__}.test_register_target.<locals>.Local"
    assert path in registry._targets
    register_target(Local, "short")
    assert resolve_target("short") is resolve_target(path) is Local
    with pytest.raises(ValueError, match="already registered"):
        register_target(Base, "short")
    with pytest.raises(ValueError, match="must be a class"):
        register_target(a_function)


@pytest.mark.parametrize("form", [dict, OmegaConf.create, None])
def test_instantiate_makes_nested_strategies(form):
    cfg = LinearAdapterConfig(
        in_features=5, dim=2, adapter_strategy=ResidualAddAdapterStrategyConfig(l2_lambda=0.5)
    )
    if form is not None:
        cfg = form(OmegaConf.to_container(OmegaConf.structured(cfg)))
    adapter = instantiate(cfg)
    assert type(adapter) is LinearAdapter
    assert type(adapter.adapter_strategy) is ResidualAddAdapterStrategy
    assert adapter.adapter_strategy.l2_lambda == 0.5


def test_instantiate_with_another_strategys_config_and_keyword_arguments():
    cfg = LinearAdapterConfig(5, 2, adapter_strategy=ReturnResultAdapterStrategyConfig())
    assert type(instantiate(cfg).adapter_strategy) is ReturnResultAdapterStrategy
    mine = ResidualAddAdapterStrategy()
    adapter = instantiate(cfg, dim=4, adapter_strategy=mine)
    assert adapter.dim == 4
    assert adapter.adapter_strategy is mine


def test_instantiate_errors():
    with pytest.raises(TypeError, match="got Linear"):
        instantiate(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no _target_"):
        instantiate({"dim": 3})
    with pytest.raises(MissingMandatoryValue):
        instantiate({"_target_": "adapter_ext.LinearAdapter", "dim": "???"})
    with pytest.raises(TypeError):
        instantiate({"_target_": "adapter_ext.LinearAdapter", "nonsense": 1})


def test_item1_public_names():
    for name in adapter_ext.__all__:
        assert hasattr(adapter_ext, name)
