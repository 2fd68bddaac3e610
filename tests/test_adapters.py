"""LinearAdapter and its configuration: items 6 to 8, B22, and what makes it leave the fused op."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle

import numpy as np
import pytest
import torch
from layer_testing import ACTIVATIONS, D, formula, rand, randomize
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from adapter_ext import (
    AdapterConfig,
    AdapterModuleUtil,
    LinearAdapter,
    LinearAdapterConfig,
    ResidualAddAdapterStrategy,
    ResidualAddAdapterStrategyConfig,
    ReturnResultAdapterStrategy,
    ReturnResultAdapterStrategyConfig,
    fused,
)

POSITIONS = ["pre", "post"]


def make(**kwargs) -> LinearAdapter:
    adapter = LinearAdapter(**{"in_features": D, "dim": 5, **kwargs}).double()
    randomize(adapter)
    return adapter.eval()


def test_item6_config_fields_are_the_arguments():
    fields = {f.name: f for f in dataclasses.fields(LinearAdapterConfig)}
    arguments = dict(inspect.signature(LinearAdapter).parameters)
    assert set(fields) - {"_target_"} == set(arguments)
    for name in ("activation", "norm_position", "dropout"):
        assert fields[name].default == arguments[name].default
    assert (fields["activation"].default, fields["norm_position"].default) == ("swish", "pre")
    for strategy, cfg in [
        (ResidualAddAdapterStrategy, ResidualAddAdapterStrategyConfig),
        (ReturnResultAdapterStrategy, ReturnResultAdapterStrategyConfig),
    ]:
        names = {f.name for f in dataclasses.fields(cfg)} - {"_target_"}
        assert names == set(inspect.signature(strategy).parameters)
    assert issubclass(LinearAdapterConfig, AdapterConfig)


@pytest.mark.parametrize("norm_position", POSITIONS)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_item6_forward_is_the_formula(activation, norm_position, op_calls):
    adapter = make(activation=activation, norm_position=norm_position)
    x = rand(3, 4, D)
    torch.testing.assert_close(adapter(x), formula(adapter, x), rtol=1e-10, atol=1e-10)
    assert len(op_calls) == 1


@pytest.mark.parametrize("norm_position", POSITIONS)
def test_item6_layers_by_hand_give_the_same(norm_position):
    adapter = make(norm_position=norm_position, dim=1)
    x = rand(2, D)
    torch.testing.assert_close(adapter(x), adapter.module(x), rtol=1e-10, atol=1e-10)


def test_item7_parameter_names_and_zero_init():
    pre = LinearAdapter(D, 5)
    assert {k: tuple(v.shape) for k, v in pre.state_dict().items()} == {
        "module.0.weight": (D,),
        "module.0.bias": (D,),
        "module.1.weight": (5, D),
        "module.3.weight": (D, 5),
    }
    assert not pre.module[-1].weight.any()
    assert pre.module[1].weight.any()
    post = LinearAdapter(D, 5, norm_position="post")
    assert {k: tuple(v.shape) for k, v in post.state_dict().items()} == {
        "module.0.weight": (5, D),
        "module.2.weight": (D, 5),
        "module.3.weight": (D,),
        "module.3.bias": (D,),
    }
    assert not post.module[-1].weight.any()
    assert not post.module[-1].bias.any()
    assert pre.module[0].eps == 1e-5


def test_item8_dropout_is_on_the_output(op_calls):
    adapter = make(dropout=0.5, norm_position="post")
    assert isinstance(adapter.dropout, nn.Dropout)
    assert make().dropout is None
    x = rand(40, D)
    torch.testing.assert_close(adapter(x), formula(adapter, x))
    adapter.train()
    y, full = adapter(x), formula(adapter, x)
    kept = y != 0
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(y[kept], 2 * full[kept])
    assert op_calls[-1]["dropout"] == 0.5
    adapter.dropout.eval()
    torch.testing.assert_close(adapter(x), full)


def test_item8_dropout_may_be_replaced(op_calls):
    adapter = make(dropout=0.5).train()
    adapter.dropout = None
    x = rand(4, D)
    torch.testing.assert_close(adapter(x), formula(adapter, x))
    adapter.dropout = nn.Dropout(1.0)
    assert not adapter(x).any()
    assert len(op_calls) == 2
    adapter.dropout = nn.AlphaDropout(0.5)
    assert adapter.fused_call() is None
    other = make()
    other.dropout = lambda out: out + 1
    torch.testing.assert_close(other(x), formula(other, x) + 1)


def test_b22_bad_arguments():
    with pytest.raises(ValueError, match="norm_position must be 'pre' or 'post', got 'mid'"):
        LinearAdapter(D, 5, norm_position="mid")
    for kind in (KeyError, ValueError):
        with pytest.raises(kind, match=r"activation must be one of identity.*got 'mish'"):
            LinearAdapter(D, 5, activation="mish")
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        LinearAdapter(D, 0)
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="dropout must be a probability"):
            LinearAdapter(D, 5, dropout=p)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("in_features", value, "an integer") for value in ("8", 8.0, None, True)),
        *(("dim", value, "an integer") for value in (2.5, [5], False)),
        *(("activation", value, "a str") for value in ([], 3, None)),
        *(("norm_position", value, "a str") for value in ([], None)),
        *(("dropout", value, "a number") for value in (None, "0.1", True)),
    ],
)
def test_b22_a_wrong_type_names_the_argument(name, value, expected):
    """Those were errors of comparisons, of dicts and of layers; a bool was a number."""
    with pytest.raises(TypeError) as caught:
        LinearAdapter(**{"in_features": D, "dim": 5, name: value})
    assert str(caught.value) == f"{name} must be {expected}, got {value!r}"


def test_b22_numbers_may_be_numpys():
    adapter = LinearAdapter(np.int64(D), np.int32(5), dropout=np.float32(0.5))
    assert (type(adapter.in_features), type(adapter.dim)) == (int, int)
    assert adapter(torch.randn(2, D)).shape == (2, D)
    assert LinearAdapter(D, 5, dropout=1).dropout.p == 1


def test_b22_zero_init_ignores_what_memory_held(monkeypatch):
    def garbage(layer):
        nn.init.constant_(layer.weight, float("nan"))

    monkeypatch.setattr(nn.Linear, "reset_parameters", garbage)
    assert not LinearAdapter(D, 5).module[-1].weight.any()
    with torch.device("meta"):
        assert LinearAdapter(D, 5).module[-1].weight.is_meta


def test_item6_setup_adapter_strategy():
    adapter = make()
    assert type(adapter.adapter_strategy) is ResidualAddAdapterStrategy
    for given in (
        {"_target_": "adapter_ext.ReturnResultAdapterStrategy"},
        ReturnResultAdapterStrategyConfig(),
        ReturnResultAdapterStrategy(),
    ):
        adapter.setup_adapter_strategy(given)
        assert type(adapter.adapter_strategy) is ReturnResultAdapterStrategy
        adapter.setup_adapter_strategy(None)
        assert type(adapter.adapter_strategy) is ResidualAddAdapterStrategy
    with pytest.raises(TypeError, match="adapter_strategy must be"):
        adapter.setup_adapter_strategy({"_target_": "torch.nn.Identity"})
    with pytest.raises(TypeError, match="got int"):
        adapter.setup_adapter_strategy(3)
    assert isinstance(adapter, AdapterModuleUtil)


def test_adapter_unfreeze():
    adapter = make().requires_grad_(False)
    adapter.adapter_unfreeze()
    assert all(p.requires_grad for p in adapter.parameters())


# --- Whatever the op does not know must be honoured -----------------------------------------------


def hook_on(name, register):
    def change(adapter):
        called = []
        module = adapter.get_submodule(name)
        getattr(module, register)(lambda *_: called.append(1) or None)
        return called

    return change


HOOKED = ["module", "module.0", "module.1", "module.2", "module.3", "dropout"]


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("name", HOOKED)
def test_hooks_on_layers_run(name, register, op_calls):
    adapter = make(dropout=0.5)
    x = rand(3, D)
    expected = adapter(x)
    handle_log = hook_on(name, register)(adapter)
    torch.testing.assert_close(adapter(x), expected)
    assert handle_log == [1]
    assert len(op_calls) == 1


@pytest.mark.parametrize("name", HOOKED)
def test_backward_hooks_on_layers_run(name):
    adapter = make(dropout=0.5)
    called = hook_on(name, "register_full_backward_hook")(adapter)
    adapter(rand(3, D).requires_grad_()).sum().backward()
    assert called == [1]


def test_hooks_may_come_and_go(op_calls):
    adapter = make()
    x = rand(3, D)
    handle = adapter.module[1].register_forward_hook(lambda m, a, out: out * 0)
    assert not adapter(x).any()
    handle.remove()
    torch.testing.assert_close(adapter(x), formula(adapter, x))
    assert len(op_calls) == 1


def test_global_hooks_run():
    adapter = make()
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(type(m)))
    try:
        adapter(rand(3, D))
    finally:
        handle.remove()
    assert called.count(nn.Linear) == 2


def parametrization(adapter):
    parametrizations.weight_norm(adapter.module[1])
    parametrize.register_parametrization(adapter.module[3], "weight", nn.Softplus())


CHANGES = {
    "another activation": lambda a: a.module.__setitem__(2, nn.ELU()),
    "a known activation with other settings": lambda a: a.module.__setitem__(2, nn.Hardtanh(-2, 2)),
    "a known activation of another minimum": lambda a: a.module.__setitem__(2, nn.Hardtanh(0, 1)),
    "a known activation of another maximum": lambda a: a.module.__setitem__(2, nn.Hardtanh(-1, 2)),
    "a Linear with bias": lambda a: a.module.__setitem__(1, nn.Linear(D, 5).double()),
    "a bias": lambda a: setattr(a.module[3], "bias", nn.Parameter(rand(D))),
    "a parametrization": parametrization,
    "pruning": lambda a: prune.l1_unstructured(a.module[3], "weight", 0.5),
    "no norm weights": lambda a: a.module.__setitem__(
        0, nn.LayerNorm(D, elementwise_affine=False).double()
    ),
    "a layer more": lambda a: a.module.append(nn.Tanh()),
    "another container": lambda a: setattr(a, "module", nn.Sequential(nn.Tanh())),
    "a patched forward": lambda a: setattr(a.module[1], "forward", lambda x: x[..., :5] * 2),
    "a patched container": lambda a: setattr(a.module, "forward", lambda x: x * 2),
    "another class": lambda a: setattr(a.module[1], "__class__", Doubling),
}


class Doubling(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_run(change, op_calls):
    adapter = make()
    x = rand(3, D)
    before = adapter(x)
    CHANGES[change](adapter)
    after = adapter(x)
    torch.testing.assert_close(after, adapter.module(x))
    assert not torch.allclose(after, before)
    assert len(op_calls) == 1
    assert adapter.fused_call() is None


def test_a_norm_over_more_than_the_last_dimension_runs(op_calls):
    """The op would have normalised each row by itself."""
    adapter = make()
    adapter.module[0] = nn.LayerNorm((1, D)).double()
    x = rand(3, 1, D)
    torch.testing.assert_close(adapter(x), adapter.module(x))
    adapter.module[0] = nn.LayerNorm((4, D)).double()
    randomize(adapter)
    x = rand(3, 4, D)
    torch.testing.assert_close(adapter(x), adapter.module(x))
    assert adapter.fused_call() is None
    assert op_calls == []


def test_layers_replaced_by_others_that_the_op_knows_stay_fused(op_calls):
    adapter = make()
    adapter.module[2] = nn.GELU(approximate="tanh")
    adapter.module[1] = nn.Linear(D, 8, bias=False).double()
    adapter.module[3] = nn.Linear(8, D, bias=False).double()
    adapter.module[0].eps = 0.25
    x = rand(3, D)
    torch.testing.assert_close(adapter(x), adapter.module(x))
    assert [(c["activation"], c["eps"]) for c in op_calls] == [("gelu_tanh", 0.25)]
    assert not adapter.fused_call().weights.down[0].isnan().any()


def test_replaced_parameters_are_used():
    adapter = make()
    x = rand(3, D)
    adapter.load_state_dict({k: v * 2 for k, v in adapter.state_dict().items()}, assign=True)
    torch.testing.assert_close(adapter(x), formula(adapter, x))
    adapter.module[1].weight = nn.Parameter(rand(5, D))
    torch.testing.assert_close(adapter(x), formula(adapter, x))
    adapter.float()
    torch.testing.assert_close(adapter(x.float()), formula(adapter, x.float()))
    swapped = {k: v.double() * 3 for k, v in adapter.state_dict().items()}
    y = torch.func.functional_call(adapter, swapped, x)
    adapter.load_state_dict(swapped, assign=True)
    torch.testing.assert_close(y, formula(adapter, x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_are_independent(clone, op_calls):
    adapter = make()
    other = clone(adapter)
    x = rand(3, D)
    expected = formula(adapter, x)
    randomize(other, seed=5)
    other.module[1].register_forward_hook(lambda m, a, out: out * 0)
    torch.testing.assert_close(adapter(x), expected)
    assert len(op_calls) == 1
    assert not torch.allclose(other(x), expected)
    assert len(op_calls) == 1


def test_gradients():
    for position in POSITIONS:
        adapter = make(norm_position=position)
        x = rand(3, 2, D).requires_grad_()
        inputs = [x, *adapter.parameters()]
        g = rand(3, 2, D, seed=2)
        got = torch.autograd.grad(adapter(x), inputs, g)
        want = torch.autograd.grad(adapter.module(x), inputs, g)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_operands(dtype, op_calls):
    adapter = make().float()
    x = rand(3, D, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y = adapter(x)
        eager = adapter.module(x)
    assert y.dtype is eager.dtype is dtype
    torch.testing.assert_close(y, eager, rtol=0.05, atol=0.05)
    assert not torch.equal(y, adapter(x).to(dtype))
    assert [c["compute_dtype"] for c in op_calls] == [dtype, None]
    with torch.autocast("cpu", dtype=dtype):
        assert fused.autocast_dtype(x.double()) is None
