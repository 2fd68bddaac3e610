"""The strategies: items 15 to 17, and B20, B21; fused or not, the numbers are the same."""

from __future__ import annotations

import pytest
import torch
from layer_testing import D, formula, make_block, rand, randomize
from omegaconf import OmegaConf
from torch import nn

from adapter_ext import (
    AbstractAdapterStrategy,
    AccessMixin,
    LinearAdapter,
    ResidualAddAdapterStrategy,
    ReturnResultAdapterStrategy,
    access,
    set_access_cfg,
)


class Unfused(LinearAdapter):
    """The same adapter with a forward of its own: everything goes by the Python methods."""

    def forward(self, x):
        x = self.module(x)
        return x if self.dropout is None else self.dropout(x)


@pytest.fixture(params=[LinearAdapter, Unfused])
def adapter(request):
    adapter = request.param(D, 5, norm_position="post").double()
    randomize(adapter)
    return adapter.eval()


@pytest.fixture
def host():
    return make_block().eval()


@pytest.fixture(autouse=True)
def _defaults():
    yield
    access._options.clear()


def losses(adapter):
    found = adapter._registry.get("adapter_loss", [])
    AccessMixin.reset_registry(adapter)
    return found


def test_item15_residual_add(adapter, host, op_calls):
    x = rand(3, 2, D)
    y = ResidualAddAdapterStrategy()(x, adapter, module=host)
    torch.testing.assert_close(y, x + formula(adapter, x), rtol=1e-10, atol=1e-10)
    assert len(op_calls) == (type(adapter) is LinearAdapter)
    if op_calls:
        assert op_calls[0].get("residual", True)


def test_item15_return_result(adapter, host):
    x = rand(3, 2, D)
    strategy = ReturnResultAdapterStrategy()
    for given in (x, [x], (x,), {"x": x}):
        y = strategy(given, adapter, module=host)
        torch.testing.assert_close(y, formula(adapter, x), rtol=1e-10, atol=1e-10)


def test_item15_strategies_are_no_modules():
    assert not issubclass(AbstractAdapterStrategy, nn.Module)
    with pytest.raises(TypeError):
        AbstractAdapterStrategy()


def test_item16_stochastic_depth_zero_and_one(adapter, host):
    x = rand(3, D)
    host.train()
    assert torch.equal(ResidualAddAdapterStrategy(1.0)(x, adapter, module=host), x)
    with torch.inference_mode():
        assert torch.equal(ResidualAddAdapterStrategy(1.0)(x, adapter, module=host), x)
    full = x + formula(adapter, x)
    host.eval()
    torch.testing.assert_close(ResidualAddAdapterStrategy(1.0)(x, adapter, module=host), full)


def test_item16_one_draw_a_call_scaled_by_keep(adapter, host):
    x = rand(6, D)
    delta = formula(adapter, x)
    host.train()
    strategy = ResidualAddAdapterStrategy(stochastic_depth=0.75)
    kept = 0
    for _ in range(400):
        got = strategy(x, adapter, module=host) - x
        if got.any():
            torch.testing.assert_close(got, delta * 4)
            kept += 1
    assert 70 <= kept <= 130  # 3.5 standard deviations around 100


def test_item16_scale_is_not_rounded_to_the_activations_type(host):
    host.train()
    strategy = ResidualAddAdapterStrategy(stochastic_depth=0.3)
    x = torch.ones(4, 8, dtype=torch.bfloat16)
    for _ in range(20):
        y = strategy.apply_stochastic_depth(x * 11, x, nn.Identity(), module=host)
        assert y.dtype is torch.bfloat16
        if y.any():
            # 1 / 0.7 is 1.4297 in bfloat16, which gives 15.75.
            assert torch.equal(y, torch.full_like(x, 11 / 0.7))
            return
    raise AssertionError("20 draws of probability 0.7 kept nothing")


@pytest.mark.parametrize("p", [-0.5, 1.5, float("nan")])
def test_item16_b20_probability_is_checked_when_given_and_when_used(p, adapter, host):
    with pytest.raises(ValueError, match="stochastic_depth must be a probability"):
        ResidualAddAdapterStrategy(stochastic_depth=p)
    strategy = ResidualAddAdapterStrategy()
    strategy.stochastic_depth = p
    strategy(rand(3, D), adapter, module=host)  # not applied in evaluation
    host.train()
    with pytest.raises(ValueError, match=r"stochastic_depth.*\[0, 1\]"):
        strategy(rand(3, D), adapter, module=host)


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("shape", [(5,), (5, 7), (5, 2, 3)])
def test_item17_aux_loss(shape, no_grad, adapter, host):
    x = rand(*shape, D)
    host.train()
    with torch.set_grad_enabled(not no_grad):
        ResidualAddAdapterStrategy(l2_lambda=0.3)(x, adapter, module=host)
    assert AccessMixin.is_access_enabled()
    [loss] = losses(adapter)
    assert not AccessMixin.is_access_enabled()
    want = 0.3 * formula(adapter, x).reshape(5, -1).square().sum(1).mean()
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-9)
    assert loss.requires_grad is not no_grad


def test_item17_an_input_of_one_dimension_is_one_sample(adapter, host):
    x = rand(D)
    host.train()
    ResidualAddAdapterStrategy(l2_lambda=0.3)(x, adapter, module=host)
    [loss] = losses(adapter)
    want = 0.3 * formula(adapter, x).square().sum()
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-9)


def test_item17_aux_loss_trains(adapter, host):
    x = rand(4, D)
    host.train()
    ResidualAddAdapterStrategy(l2_lambda=0.3)(x, adapter, module=host)
    [loss] = losses(adapter)
    parameters = list(adapter.parameters())
    want = 0.3 * adapter.module(x).square().sum() / 4
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(want, parameters),
        rtol=1e-8,
        atol=1e-8,
    )


def test_item17_conditions(adapter, host):
    x = rand(4, D)
    strategy = ResidualAddAdapterStrategy(l2_lambda=0.3)

    def count():
        strategy(x, adapter, module=host)
        return len(losses(adapter))

    assert count() == 0  # the host is in evaluation mode
    host.train()
    assert count() == 1
    adapter.requires_grad_(False)
    assert count() == 0
    adapter.module[-1].bias.requires_grad_(True)  # B21: not the first parameter's alone
    assert count() == 1
    set_access_cfg(OmegaConf.create({"compute_adapter_loss": False}))
    assert count() == 0
    host.model_guid = "g"
    set_access_cfg(OmegaConf.create({"compute_adapter_loss": True}), "g")
    assert count() == 1
    strategy.l2_lambda = 0.0
    assert count() == 0


def test_item17_needs_an_access_mixin(host):
    host.train()
    strategy = ResidualAddAdapterStrategy(l2_lambda=0.3)
    with pytest.raises(ValueError, match=r"AccessMixin.*got Linear"):
        strategy(rand(3, D), nn.Linear(D, D).double(), module=host)


def test_item17_with_stochastic_depth_the_loss_is_of_what_was_added(adapter, host):
    x = rand(4, D)
    host.train()
    strategy = ResidualAddAdapterStrategy(stochastic_depth=0.5, l2_lambda=0.3)
    seen = set()
    for _ in range(30):
        delta = strategy(x, adapter, module=host) - x
        [loss] = losses(adapter)
        want = 0.3 * delta.square().sum() / 4
        torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-9)
        seen.add(bool(delta.any()))
    assert seen == {True, False}


def test_b21_parameterless_adapters_and_low_precision(host):
    class Halve(nn.Module, AccessMixin):
        def forward(self, x):
            return -0.5 * x

    host.train()
    adapter = Halve()
    x = rand(3, D)
    y = ResidualAddAdapterStrategy(l2_lambda=0.3)(x, adapter, module=host)
    torch.testing.assert_close(y, 0.5 * x)
    assert losses(adapter) == []
    # In float16 the sum would overflow.
    wide = LinearAdapter(D, 5).half()
    randomize(wide)
    x = (rand(2, 999, D) * 50).half()
    for given in (wide, Unfused(D, 5).half()):
        given.load_state_dict(wide.state_dict())
        ResidualAddAdapterStrategy(l2_lambda=10.0)(x, given, module=host)
        [loss] = losses(given)
        assert loss.dtype is torch.float32
        want = 10.0 * formula(wide.double(), x.double()).square().sum().item() / 2
        assert loss.item() > 65504
        assert loss.item() == pytest.approx(want, rel=0.02)
        wide.half()


def test_b20_dropout_follows_the_adapter_and_depth_the_host(op_calls):
    adapter = LinearAdapter(D, 5, dropout=1.0).double()
    randomize(adapter)
    host = make_block()
    strategy = ResidualAddAdapterStrategy(stochastic_depth=0.5, l2_lambda=0.1)
    for host_training in (False, True):
        for adapter_training in (False, True):
            host.train(host_training)
            adapter.train(adapter_training)
            strategy(rand(3, D), adapter, module=host)
            call = op_calls[-1]
            assert call["dropout"] == (1.0 if adapter_training else 0.0)
            assert call["stochastic_depth"] == (0.5 if host_training else 0.0)
            assert call["l2_lambda"] == (0.1 if host_training else 0.0)
            assert call["training"] == (host_training or adapter_training)
            assert len(losses(adapter)) == host_training


# --- Overrides ------------------------------------------------------------------------------------


class Output(ResidualAddAdapterStrategy):
    def compute_output(self, input, adapter, *, module):
        return 10 * super().compute_output(input, adapter, module=module)


class Depth(ResidualAddAdapterStrategy):
    def apply_stochastic_depth(self, output, input, adapter, *, module):
        return output * 7


class Aux(ResidualAddAdapterStrategy):
    def compute_auxiliary_losses(self, output, input, adapter, *, module):
        adapter.register_accessible_tensor("mine", (output - input).sum())


class Forward(ResidualAddAdapterStrategy):
    def forward(self, input, adapter, *, module):
        return super().forward(input, adapter, module=module) * 2


class Nothing(ResidualAddAdapterStrategy):
    extra = 3


@pytest.mark.parametrize(
    ("strategy", "scale", "outer"),
    [(Output(0.0), 10, 1), (Depth(0.5), 7, 1), (Aux(0.0), 1, 1), (Forward(), 1, 2)],
)
def test_overridden_methods_run(strategy, scale, outer, adapter, host):
    host.train()
    x = rand(3, D)
    y = strategy(x, adapter, module=host)
    torch.testing.assert_close(y, outer * (x + scale * formula(adapter, x)))
    if isinstance(strategy, Aux):
        [mine] = adapter._registry["mine"]
        torch.testing.assert_close(mine, formula(adapter, x).sum())


def test_overriding_nothing_stays_fused(host, op_calls):
    adapter = LinearAdapter(D, 5).double()
    Nothing()(rand(3, D), adapter, module=host)
    assert op_calls[0]["l2_lambda"] == 0.0


@pytest.mark.parametrize("where", ["instance", "class"])
@pytest.mark.parametrize(
    "method", ["compute_output", "apply_stochastic_depth", "compute_auxiliary_losses"]
)
def test_patched_methods_run(method, where, host, monkeypatch):
    adapter = LinearAdapter(D, 5).double()
    strategy = ResidualAddAdapterStrategy(stochastic_depth=0.5)
    host.train()
    called = []

    def patched(*args, **kwargs):
        called.append(method)
        return torch.zeros(3, D, dtype=torch.float64)

    strategy(rand(3, D), adapter, module=host)
    assert called == []
    target = strategy if where == "instance" else ResidualAddAdapterStrategy
    monkeypatch.setattr(target, method, patched)
    strategy(rand(3, D), adapter, module=host)
    assert called == [method]


def test_autocast_reaches_the_op(host, op_calls):
    adapter = LinearAdapter(D, 5)
    randomize(adapter)
    x = rand(3, D, dtype=torch.float32)
    plain = ResidualAddAdapterStrategy()(x, adapter, module=host)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ResidualAddAdapterStrategy()(x, adapter, module=host)
    assert y.dtype is torch.float32
    torch.testing.assert_close(y, plain, rtol=0.05, atol=0.05)
    assert not torch.equal(y, plain)
    assert [c["compute_dtype"] for c in op_calls] == [None, torch.bfloat16]


def test_every_setting_of_the_layers_reaches_the_op(host):
    adapter = LinearAdapter(D, 5, activation="gelu", norm_position="post").double()
    randomize(adapter)
    adapter.module[3].eps = 0.25
    x = rand(3, D)
    y = ResidualAddAdapterStrategy()(x, adapter, module=host)
    torch.testing.assert_close(y, x + adapter.module(x), rtol=1e-9, atol=1e-9)
