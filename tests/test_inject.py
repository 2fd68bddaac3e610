"""inject and eject on modules of torch, and the functions on the adapters of any model.

The reference is the model that was never injected, in float64, whose forward hooks add what the
plain formula of each sample's adapter gives.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
from collections import OrderedDict, UserDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from layer_testing import Block, config, formula, make_block, rand
from model_testing import Block as PlainBlock
from model_testing import StockModel, adapter_config, assert_same_tensors, model_config
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ReadonlyConfigError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapter_ext as ax
from adapter_ext import AdapterModuleMixin, FileError, inject, route_adapters

D = 10  # of encoders; an even number of heads, or they would never take torch's fast path
B, T = 4, 5
LAYERS = ["layers.0", "layers.1", "layers.2"]
NAMES = ["a", "a1", None, "a"]

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def make_encoder(
    batch_first: bool = True, dtype: torch.dtype = torch.float64, **kwargs: Any
) -> nn.TransformerEncoder:
    """A frozen encoder without dropout, in evaluation mode."""
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(D, 2, 18, dropout=0.0, batch_first=batch_first)
    nested = kwargs.pop("enable_nested_tensor", batch_first)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=nested, **kwargs)
    for p in encoder.parameters():  # its layers are copies of one
        nn.init.normal_(p, std=0.3)
    return encoder.requires_grad_(False).to(dtype).eval()


def add_random(model: nn.Module, *names: str, **cfg: Any) -> None:
    """Adds adapters, each of another bottleneck and with weights of its own in every host."""
    for name in names:
        ax.add_adapter(model, name, {"dim": 2 + len(name), **cfg})
    generator = torch.Generator().manual_seed(len(names))
    for key, p in model.named_parameters():
        if any(f"adapter_layer.{name}." in key for name in names):
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)


def injected(targets: Any = "layers.*", *, of: nn.Module | None = None, **kwargs: Any) -> nn.Module:
    model = make_encoder() if of is None else of
    inject(model, targets=targets, **kwargs)
    add_random(model, "a", "a1")
    return model


@contextmanager
def plain_adapters(base: nn.Module, model: nn.Module, names: list[str | None], dim: int = 0):
    """Within, base adds by the formula what the adapters of model add for these samples."""

    def hook(adapters: nn.ModuleDict) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: Any, x: Any) -> Any:
            first = x[0] if isinstance(x, tuple) else x
            samples = [
                s if name is None else s + formula(adapters[name], s)
                for s, name in zip(first.unbind(dim), names, strict=True)
            ]
            first = torch.stack(samples, dim)
            return (first, *x[1:]) if isinstance(x, tuple) else first

        return add

    handles = [
        base.get_submodule(path).register_forward_hook(hook(module.adapter_layer))
        for path, module in model.named_modules()
        if isinstance(module, AdapterModuleMixin) and "adapter_layer" in module._modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def state_of(model: nn.Module) -> dict[str, Any]:
    """All about a model that inject and eject must not change but by design."""
    return {
        path: (type(m), {**vars(m), "_modules": dict(m._modules)}, dict(m._forward_hooks))
        for path, m in model.named_modules(remove_duplicate=False)
    }


@contextmanager
def unchanged(model: nn.Module):
    before = state_of(model)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    yield
    assert state_of(model) == before
    assert_same_tensors(model.state_dict(), tensors)


# --- Choosing modules -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        ("layers.1", ["layers.1"]),
        ("layers.*", LAYERS),  # and nothing within the layers
        ("*.?", LAYERS),
        ("**.norm1", [f"{p}.norm1" for p in LAYERS]),
        ("**.layers.0", ["layers.0"]),  # also nothing
        ("layers.1**norm?", ["layers.1.norm1", "layers.1.norm2"]),
        ("", [""]),
        (nn.TransformerEncoderLayer, LAYERS),
        (lambda path, module: path.endswith("2") and hasattr(module, "norm1"), ["layers.2"]),
        (["layers.2", "layers.0"], ["layers.0", "layers.2"]),  # in the model's order
        (["layers.*", nn.TransformerEncoderLayer], LAYERS),
        ((path for path in LAYERS[1:]), LAYERS[1:]),
        (["", "layers.0", "layers.0.linear2"], ["", "layers.0", "layers.0.linear2"]),
    ],
)
def test_targets(targets, paths):
    encoder = make_encoder()
    assert inject(encoder, targets=targets) == paths
    hosts = [p for p, m in encoder.named_modules() if isinstance(m, AdapterModuleMixin)]
    assert hosts == paths


@pytest.mark.parametrize(
    ("targets", "error", "match"),
    [
        (
            "layers.7",
            ValueError,
            "no module is named 'layers.7'; there are 'layers.[012]', .* more",
        ),
        ("layer.*", ValueError, r"no module is named 'layer.\*'; there are 'layers.0'"),
        (["layers.*", "norm7"], ValueError, "named 'norm7'; there are 'layers.0.norm"),
        (nn.Conv1d, ValueError, "no module is a Conv1d; there are 'TransformerEncoder'"),
        (lambda path, module: False, ValueError, "the predicate .* holds for none of the 32"),
        ([], ValueError, "targets is empty"),
        (3, TypeError, "a target must be .* got int"),
        (["layers.0", None], TypeError, "got NoneType"),
        (nn.Linear(2, 2), TypeError, "got Linear"),
        ("layers", ValueError, r"module 'layers' \(ModuleList\) .* has no forward"),
        ("**.out_proj", ValueError, "nn.MultiheadAttention never calls it"),
    ],
)
def test_wrong_targets(targets, error, match):
    encoder = make_encoder()
    with unchanged(encoder), pytest.raises(error, match=match):
        inject(encoder, targets=targets)


def test_wrong_arguments():
    encoder = make_encoder()
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        inject([encoder], targets="layers.*")
    with unchanged(encoder), pytest.raises(TypeError, match="by name, got str"):
        inject(encoder, "a", targets="layers.*")
    with unchanged(encoder), pytest.raises(ValueError, match=r"batch_dim must be .* got 2"):
        inject(encoder, targets="layers.*", batch_dim=2)


def test_a_shared_module_counts_once():
    shared = nn.Linear(3, 3).double()
    model = nn.Sequential(shared, nn.Tanh(), shared)
    base = copy.deepcopy(model)
    assert inject(model, targets=["0", "2"]) == ["0"]
    add_random(model, "a")
    adapter = model[2].adapter_layer["a"]
    assert [row.where for row in ax.list_adapters(model)] == ["0"]
    x = rand(2, 3)
    expected = base[0](x)
    expected = torch.tanh(expected + formula(adapter, expected))
    expected = base[0](expected)
    torch.testing.assert_close(model(x), expected + formula(adapter, expected))
    ax.eject(model)
    assert type(model[2]) is nn.Linear


def test_adapters_are_no_targets():
    model = injected("layers.*.linear2")
    # Adapters have linear layers, too; the third kind derives from nn.Linear and is never called.
    linear = inject(model, targets=lambda path, m: type(m) is nn.Linear)
    assert linear == [f"{path}.linear1" for path in LAYERS]


def test_what_can_have_adapters_stays_as_it_is():
    model = nn.Sequential(Block(3), nn.Linear(3, 3))
    assert inject(model, targets="*") == ["1"]
    assert type(model[0]) is Block
    kind = type(model[1])
    assert inject(model, targets="*") == []
    assert type(model[1]) is kind


# --- The class ------------------------------------------------------------------------------------


def test_the_class():
    encoder, base = make_encoder(), make_encoder()
    inject(encoder, targets="layers.*")
    kind = type(encoder.layers[0])
    assert all(type(layer) is kind for layer in encoder.layers)
    assert isinstance(encoder.layers[0], nn.TransformerEncoderLayer)
    assert isinstance(encoder.layers[0], AdapterModuleMixin)
    assert kind.__name__ == "TransformerEncoderLayerWithAdapters"
    assert kind.__module__ == nn.TransformerEncoderLayer.__module__
    assert inspect.signature(kind.forward) == inspect.signature(nn.TransformerEncoderLayer.forward)
    assert_same_tensors(encoder.state_dict(), base.state_dict())
    encoder.load_state_dict(base.state_dict())
    x = rand(B, T, D)
    assert torch.equal(encoder(x), base(x))


def test_two_classes_of_one_name():
    def make():
        class Same(nn.Module):
            def forward(self, x):
                return x

        return Same()

    model = nn.Sequential(make(), make())
    inject(model, targets="*")
    assert type(model[0]) is not type(model[1])
    assert type(model[0]).__bases__[0] is not type(model[1]).__bases__[0]


class WithName(nn.Module):
    def __init__(self, name):
        super().__init__()
        setattr(self, name, nn.Linear(2, 2))

    def forward(self, x):
        return x


class OwnMethod(nn.Module):
    def add_adapter(self):
        return "mine"

    def forward(self, x):
        return x


class Slots(nn.Module):
    __slots__ = ("slot",)

    def forward(self, x):
        return x


class Meta(type):
    pass


class OtherMeta(nn.Module, metaclass=Meta):
    def forward(self, x):
        return x


class Picky(nn.Module):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("no subclasses, please")

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("module", "error", "match"),
    [
        (WithName("adapter_layer"), ValueError, "it has 'adapter_layer' itself"),
        (WithName("_host"), ValueError, "it has '_host' itself"),
        (OwnMethod(), ValueError, "it has 'add_adapter' itself"),
        (OtherMeta(), TypeError, "metaclass conflict"),
        (Picky(), TypeError, "no subclasses, please"),
        (torch.fx.symbolic_trace(nn.Linear(2, 2)), TypeError, "its code is generated"),
    ],
)
def test_modules_that_cannot_have_adapters(module, error, match):
    model = nn.Sequential(OrderedDict(first=nn.Linear(2, 2), second=module))
    with unchanged(model), pytest.raises(error, match=f"module 'second' .*{match}"):
        inject(model, targets="*")


def test_a_class_of_another_memory_layout():
    model = nn.Sequential(nn.Linear(2, 2), Slots())
    # Whether Python can do it or not, it is all or nothing.
    try:
        inject(model, targets="*")
    except TypeError:
        assert type(model[0]) is nn.Linear
    else:
        ax.eject(model)
    assert type(model[1]) is Slots


def test_a_forward_of_the_object():
    model = nn.Sequential(nn.Linear(3, 3).double())
    base, layer = copy.deepcopy(model), model[0]

    def replacement(x):
        return 2 * original(x)

    original = layer.forward
    layer.forward = replacement  # as hooks of accelerate do
    with unchanged(model), pytest.raises(ValueError, match="forward was replaced in the object"):
        inject(model, targets="0")
    layer.forward = original  # they leave the bound method behind
    injected("0", of=model)

    original = layer.forward
    layer.forward = replacement
    x = rand(B, 3)
    with plain_adapters(base, model, NAMES):
        expected = 2 * base(x)
    with route_adapters(model, NAMES):
        torch.testing.assert_close(model(x), expected)
    with unchanged(model), pytest.raises(ValueError, match="was given a forward of its own"):
        ax.eject(model)
    layer.forward = original
    ax.eject(model)
    assert "forward" not in vars(layer)
    assert torch.equal(model(x), base(x))


def test_a_method_patched_on_the_class(monkeypatch):
    model = injected("0", of=nn.Sequential(nn.Linear(3, 3).double()))
    x = rand(B, 3)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: torch.ones_like(x))
    y = torch.ones_like(x)
    with route_adapters(model, [None] * B):
        assert torch.equal(model(x), y)


def test_hooks_see_what_the_adapters_made():
    model = nn.Sequential(nn.Linear(3, 3))
    seen = []
    model[0].register_forward_hook(lambda module, args, y: seen.append(y))
    injected("0", of=model)
    y = model(rand(B, 3, dtype=torch.float32))
    assert seen[0] is y
    base = copy.deepcopy(model)
    ax.eject(base)
    assert not torch.equal(y, base(rand(B, 3, dtype=torch.float32)))


# --- What modules return --------------------------------------------------------------------------


class Pair(NamedTuple):
    hidden: Tensor
    other: str


@dataclass
class Output:
    loss: Any
    hidden: Any
    other: str = "other"


class Returns(nn.Module):
    """A module that returns x in one form or another, the same object each time."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.form = form
        self.made: Any = None

    def forward(self, x: Tensor) -> Any:
        self.made = self.form(x) if self.made is None else self.made
        return self.made


FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda x: x, lambda y: y),
    "tuple": (lambda x: (x, "other"), lambda y: y[0]),
    "named tuple": (lambda x: Pair(x, "other"), lambda y: y.hidden),
    "dataclass": (lambda x: Output(x, None), lambda y: y.loss),
    "dataclass, first None": (lambda x: Output(None, x), lambda y: y.hidden),
    "dict": (lambda x: {"hidden": x, "other": "other"}, lambda y: y["hidden"]),
    "ordered dict": (lambda x: OrderedDict(hidden=x, other=1), lambda y: y["hidden"]),
    "like a dict": (lambda x: UserDict(hidden=x, other=1), lambda y: y["hidden"]),
}


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_results(form, routed):
    make, get = FORMS[form]
    model = nn.Sequential(Returns(make))
    inject(model, targets="0")
    add_random(model, "a", "a1", in_features=D)
    for adapter in model[0].adapter_layer.values():
        adapter.double()
    x = rand(B, T, D)
    adapters = model[0].adapter_layer
    if routed:
        expected = torch.stack(
            [s if n is None else s + formula(adapters[n], s) for s, n in zip(x, NAMES, strict=True)]
        )
    else:
        expected = x + formula(adapters["a"], x)
        expected = expected + formula(adapters["a1"], expected)
    with route_adapters(model, NAMES) if routed else nullcontext():
        y = model(x)
    torch.testing.assert_close(get(y), expected)
    # All else is what it was, and the module's own object too, which it may return again.
    made = model[0].made
    assert type(y) is type(made)
    assert get(made) is x
    if isinstance(y, tuple):
        assert y[1:] == made[1:]
    elif isinstance(y, Output):
        assert y.other == made.other
    elif not isinstance(y, Tensor):
        assert list(y) == list(made)
        assert list(y.values())[1] == list(made.values())[1]


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (lambda x: None, "NoneType"),
        (lambda x: [x], "list"),
        (lambda x: (), "tuple"),
        (lambda x: ("text", x), "a tuple whose first item is of type str"),
        (lambda x: {}, "dict"),
        (lambda x: Output(None, None, None), "Output"),
        (lambda x: x.shape, "Size"),
    ],
)
def test_other_results_are_errors(form, found):
    model = nn.Sequential(OrderedDict(odd=Returns(form)))
    inject(model, targets="odd")
    x = rand(B, D)
    assert model(x) is model.odd.made  # nothing to be done: it can return what it likes
    ax.add_adapter(model, "a", {"dim": 2, "in_features": D})
    with pytest.raises(TypeError, match=rf"module 'odd' \(Returns\): .*got .*{found}"):
        model(x)
    ax.set_enabled_adapters(model, "a", enabled=False)
    assert model(x) is model.odd.made


def test_errors_name_the_module():
    model = injected("layers.*", of=make_encoder())
    with (
        pytest.raises(ValueError, match=r"module 'layers.0' \(TransformerEncoderLayer\): .*\[2\]"),
        route_adapters(model, ["a", "a1"]),
    ):
        model(rand(3, T, D))


# --- Results on nn.TransformerEncoder -------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "targets",
    ["layers.*", "", ["layers.0", "layers.2.norm2"], "layers.*.self_attn", "layers.1.linear2"],
)
def test_encoder(targets, batch_first, training):
    # As many steps as samples: a mix-up of the two would not show by the shape.
    shape = (B, B, D)
    base, x = make_encoder(batch_first), rand(*shape)
    model = injected(targets, of=copy.deepcopy(base))
    base.train(training)
    model.train(training)
    with plain_adapters(base, model, NAMES, dim=0 if batch_first else 1):
        expected = base(x)
    with route_adapters(model, NAMES):
        torch.testing.assert_close(model(x), expected)
        # In evaluation mode without gradients, the fast path for layers as a whole.
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(base(x), expected)


def test_the_fast_path_is_kept_for_whole_layers(monkeypatch):
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *a: (calls.append(1), fast(*a))[1]
    )
    x = rand(B, T, D)
    with torch.no_grad():
        injected("layers.*")(x)
        assert len(calls) == 3
        # It would skip what is within a layer.
        injected("layers.1.norm1")(x)
        assert len(calls) == 3 + 2


@pytest.mark.parametrize("targets", ["layers.*", "layers.*.self_attn", "layers.*.linear2"])
def test_a_padded_batch(targets):
    """Without gradients the encoder packs it into a nested tensor."""
    base, x = make_encoder(), rand(B, T, D)
    model = injected(targets, of=copy.deepcopy(base))
    padding = torch.arange(T) >= torch.tensor([T, 3, 4, 1])[:, None]
    with plain_adapters(base.train(), model, NAMES):  # in training mode it packs nothing
        expected = base(x, src_key_padding_mask=padding)
    with torch.no_grad(), route_adapters(model, NAMES):
        y = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(y[~padding], expected[~padding])
    if targets == "layers.*":
        with route_adapters(model, NAMES), pytest.raises(TypeError, match="enable_nested_tensor="):
            model(x, src_key_padding_mask=padding)
    with route_adapters(model.train(), NAMES):
        y = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(y[~padding], expected[~padding])


def test_enabled_adapters_run_in_a_chain():
    base, x = make_encoder(batch_first=False), rand(T, B, D)
    model = injected(of=copy.deepcopy(base))
    expected = x
    for i, layer in enumerate(base.layers):
        expected = layer(expected)
        for name in ("a", "a1"):
            expected = expected + formula(model.layers[i].adapter_layer[name], expected)
    torch.testing.assert_close(model(x), expected)
    ax.set_enabled_adapters(model, enabled=False)
    assert torch.equal(model(x), base(x))


def test_rows_of_a_batch_that_is_second():
    """Indices are [B, T], samples first, whatever the layout of the hidden state is."""
    base, x = make_encoder(batch_first=False), rand(T, B, D)
    model = injected("layers.1", of=copy.deepcopy(base))
    rows = torch.randint(-1, 2, (B, T), generator=torch.Generator().manual_seed(0))
    names = list(ax.adapter_index(model))

    def hook(module, args, y):
        y = y.clone()
        for b in range(B):
            for t in range(T):
                if rows[b, t] >= 0:
                    adapter = model.layers[1].adapter_layer[names[rows[b, t]]]
                    y[t, b] += formula(adapter, y[t, b])
        return y

    base.layers[1].register_forward_hook(hook)
    with route_adapters(model, rows):
        torch.testing.assert_close(model(x), base(x))


def test_the_dimension_of_the_batch():
    class Swapped(nn.Linear):
        """Takes and returns [T, B, D]."""

    base = nn.Sequential(Swapped(D, D).double())
    model = injected("0", of=copy.deepcopy(base), batch_dim=1)
    x = rand(T, B, D)
    with plain_adapters(base, model, NAMES, dim=1), route_adapters(model, NAMES):
        torch.testing.assert_close(model(x), base(x))
        with pytest.raises(ValueError, match=r"must be \[T, B, ..., D\], got \[4, 10\]"):
            model(x[0])
    model(x[0])  # without routes any rows will do

    # Explicit beats what is known of torch's layers.
    first = injected(of=make_encoder(batch_first=False), batch_dim=0)
    with pytest.raises(ValueError, match="routed"), route_adapters(first, NAMES):
        first(x)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers(kind, batch_first):
    """A tuple, whose first item has another width than the input."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"rnn": kind(3, 4, bidirectional=True, batch_first=batch_first)}).double()
    model = injected("rnn", of=copy.deepcopy(base))
    assert model.rnn.adapter_layer["a"].in_features == 8
    x = rand(B, B, 3)
    with plain_adapters(base, model, NAMES, dim=0 if batch_first else 1):
        expected, state = base.rnn(x)
    with route_adapters(model, NAMES):
        y, new_state = model.rnn(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(new_state, state)


@pytest.mark.parametrize("batch_first", [True, False])
def test_gradients_of_a_mixed_batch(batch_first):
    """Those of separate batches, one for each adapter."""
    model, x = injected(of=make_encoder(batch_first)), rand(B, B, D)
    dim = 0 if batch_first else 1

    def gradients():
        found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    with route_adapters(model, NAMES):
        y = model(x)
    y.square().sum().backward()
    mixed = gradients()
    separate: dict[str, Tensor] = {}
    for name in ("a", "a1"):
        own = [i for i, n in enumerate(NAMES) if n == name]
        with route_adapters(model, [name] * len(own)):
            y = model(x.index_select(dim, torch.tensor(own)))
        y.square().sum().backward()
        separate.update(gradients())
    assert len(mixed) == 2 * 3 * 4  # adapters, layers, weights
    assert mixed.keys() == separate.keys()
    for key, value in mixed.items():
        assert value.abs().max() > 1e-3
        torch.testing.assert_close(value, separate[key])


def test_training_of_two_adapters():
    """With the optimizer for many adapters; an adapter without samples stays as it is."""
    model = injected()
    optimizer = ax.optim.AdamW(model, lr=1e-2)
    idle = {k: p.clone() for k, p in model.named_parameters() if ".a1." in k}
    x, losses = rand(B, T, D), []
    for _ in range(8):
        optimizer.zero_grad()
        with route_adapters(model, ["a", None, "a", "a"]):
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[key], value) for key, value in idle.items())


# --- Widths ---------------------------------------------------------------------------------------


class Configured(nn.Module):
    """As models of transformers: their configuration says the width of their blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"hidden_size": 7})()
        self.block = nn.Sequential(nn.Tanh())


@pytest.mark.parametrize(
    ("module", "width"),
    [
        (nn.Linear(3, 4), 4),
        (nn.LayerNorm((2, 5)), 5),
        (nn.RMSNorm(6), 6),
        (nn.Embedding(3, 4), 4),
        (nn.MultiheadAttention(4, 2), 4),
        (nn.TransformerEncoderLayer(6, 2, 3), 6),
        (nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 3), 1), 4),
        (nn.Transformer(4, 2, 1, 1, 3), 4),
        (nn.LSTM(2, 5, proj_size=3, bidirectional=True), 6),
        (Configured(), 7),
        (nn.Tanh(), None),
        (nn.Sequential(nn.Linear(2, 3), nn.Tanh()), None),
    ],
)
def test_widths(module, width):
    model = nn.ModuleDict({"m": module})
    inject(model, targets="m.block" if isinstance(module, Configured) else "m")
    host = next(m for m in model.modules() if isinstance(m, AdapterModuleMixin))
    if width is None:
        with (
            unchanged(model),
            pytest.raises(ValueError, match=r"module 'm'.*must have in_features"),
        ):
            ax.add_adapter(model, "a", {"dim": 2})
        width = 9
        ax.add_adapter(model, "a", {"dim": 2, "in_features": width})
    else:
        ax.add_adapter(model, "a", {"dim": 2})
        assert "in_features" not in host.adapter_cfg.a
    assert host.adapter_layer["a"].in_features == width


def test_a_wrong_width_is_an_error():
    model = nn.Sequential(nn.Linear(3, 4))
    inject(model, {"a": {"dim": 2, "in_features": 3}}, targets="0")
    with pytest.raises(RuntimeError, match=r"module '0' \(Linear\): .*expected shape"):
        model(torch.zeros(2, 3))


def test_a_host_without_parameters_gets_the_models_type():
    model = nn.Sequential(nn.Linear(4, 4).double(), nn.Tanh())
    inject(model, {"a": {"dim": 2, "in_features": 4}}, targets="1")
    assert model[1].adapter_layer["a"].module[1].weight.dtype is torch.float64
    model(rand(2, 4))


# --- Adapters of a whole model --------------------------------------------------------------------


def test_injecting_with_adapters():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    cfg = {"a": {"dim": 2}, "b": {"dim": 1, "activation": "relu", "enabled": False}}
    inject(model, cfg, targets="*")
    table = [(row.name, row.where, row.bottleneck, row.enabled) for row in ax.list_adapters(model)]
    assert table == [
        ("a", "0", 2, True),
        ("b", "0", 1, False),
        ("a", "1", 2, True),
        ("b", "1", 1, False),
    ]
    assert cfg == {"a": {"dim": 2}, "b": {"dim": 1, "activation": "relu", "enabled": False}}


def test_a_model_without_modules_is_said_to_have_none():
    with pytest.raises(ValueError, match=r"no module is named 'x'; there are none within Linear$"):
        inject(nn.Linear(2, 2), targets="x")


def test_injecting_with_a_wrong_adapter_changes_nothing():
    model = nn.Sequential(Block(), nn.Linear(3, 4))
    model[0].add_adapter("old", config())
    before = copy.deepcopy(model[0].adapter_cfg)
    with unchanged(model), pytest.raises(ValueError, match="norm_position must be"):
        inject(
            model,
            {"a": {"dim": 2, "in_features": 4}, "b": {**vars(config()), "norm_position": "no"}},
            targets="*",
        )
    assert model[0].adapter_cfg == before


def test_adding_is_all_or_nothing():
    model = injected()
    model.layers[2].set_accepted_adapter_types([nn.Bilinear])
    before = [copy.deepcopy(layer.adapter_cfg) for layer in model.layers]
    with unchanged(model), pytest.raises(ValueError, match="accepts adapters of type"):
        ax.add_adapter(model, "b", {"dim": 2})
    assert [layer.adapter_cfg for layer in model.layers] == before
    for name, match in (
        ("a", "exists already"),
        ("A", "case only"),
        ("x:y", "'x:y'"),
        ("keys", "reserved"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=match):
            ax.add_adapter(model, name, {"dim": 2})
    with unchanged(model), pytest.raises(TypeError, match="must be a dict"):
        ax.add_adapter(model, "b", 3)


def test_removing_is_all_or_nothing():
    model = injected()
    ax.add_adapter(model, "b", {"dim": 2})
    ax.set_enabled_adapters(model, "a1", enabled=False)
    OmegaConf.set_readonly(model.layers[2].adapter_cfg, True)
    before = [copy.deepcopy(layer.adapter_cfg) for layer in model.layers]
    with unchanged(model), pytest.raises(ReadonlyConfigError):
        ax.remove_adapter(model, "a")
    for layer, was in zip(model.layers, before, strict=True):
        assert layer.adapter_cfg == was
        assert list(layer.adapter_cfg) == ["a", "a1", "b"]
        assert layer.get_enabled_adapters() == ["a", "b"]


def test_the_cost_of_an_adapter_does_not_grow_with_their_number(monkeypatch):
    reads = []
    read = DictConfig._get_node
    monkeypatch.setattr(DictConfig, "_get_node", lambda *a, **k: reads.append(1) or read(*a, **k))

    def counted(function, *args):
        reads.clear()
        function(*args)
        return len(reads)

    model = injected()
    costs = []
    for i in range(30):
        name = f"new{i}"
        costs.append(
            [
                counted(ax.add_adapter, model, name, {"dim": 2}),
                counted(ax.set_enabled_adapters, model, name, False),
                counted(ax.set_enabled_adapters, model, name, True),
            ]
        )
    assert costs[0] == costs[-1]
    assert min(costs[0]) > 0
    assert counted(ax.remove_adapter, model, "new7") == counted(ax.remove_adapter, model, "a")


def test_a_part_of_a_model():
    model = injected()
    ax.add_adapter(model.layers[1], "part", {"dim": 2})
    assert [row.where for row in ax.list_adapters(model) if row.name == "part"] == ["layers.1"]
    ax.remove_adapter(model, "part")
    ax.remove_adapter(model, "a")
    assert {row.name for row in ax.list_adapters(model)} == {"a1"}
    assert all(list(layer.adapter_cfg) == ["a1"] for layer in model.layers)
    with pytest.raises(ValueError, match=r"no adapter named 'a'; there are \['a1'\]"):
        ax.remove_adapter(model, "a")


def test_enabling():
    model = injected()
    ax.set_enabled_adapters(model, "a", enabled=False)
    assert all(layer.get_enabled_adapters() == ["a1"] for layer in model.layers)
    with pytest.raises(ValueError, match="'a' is disabled"), route_adapters(model, NAMES):
        pass
    ax.set_enabled_adapters(model)
    assert all(layer.get_enabled_adapters() == ["a", "a1"] for layer in model.layers)
    with pytest.raises(ValueError, match="no adapter named 'b'"):
        ax.set_enabled_adapters(model, "b")
    for name in ("a", "a1"):
        ax.remove_adapter(model, name)
    with pytest.raises(ValueError, match="there are no adapters: add one"):
        ax.set_enabled_adapters(model)


def test_auxiliary_losses():
    model = injected()
    ax.add_adapter(
        model,
        "l2",
        {
            "dim": 2,
            "adapter_strategy": {
                "_target_": "adapter_ext.ResidualAddAdapterStrategy",
                "l2_lambda": 0.5,
            },
        },
    )
    for layer in model.layers:
        nn.init.normal_(layer.adapter_layer["l2"].module[3].weight)
    model.train()
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    base = copy.deepcopy(model)
    for layer in base.layers:
        layer._forward_hooks.clear()
    with route_adapters(model, ["l2", "a", "l2", None]):
        model(rand(B, T, D))
    expected = 0.0
    with torch.no_grad(), route_adapters(base, [None] * B):
        for layer, (x, y) in zip(base.layers, seen, strict=True):
            expected = expected + 0.5 * (y - layer(x))[[0, 2]].square().sum((1, 2)).mean()
    losses = ax.adapter_losses(model)
    assert list(losses) == ["l2"]
    torch.testing.assert_close(losses["l2"], expected, check_dtype=False)
    ax.reset_adapter_losses(model)
    assert ax.adapter_losses(model) == {}


@pytest.mark.parametrize(
    "call",
    [
        lambda m: ax.add_adapter(m, "b", {"dim": 2}),
        lambda m: ax.remove_adapter(m, "b"),
        lambda m: ax.set_enabled_adapters(m),
        lambda m: ax.save_adapters(m, "x.pt"),
        lambda m: ax.load_adapters(m, "x.pt"),
    ],
)
def test_models_without_hosts_or_with_their_own_configuration(call):
    with pytest.raises(ValueError, match="no module of this Linear can have adapters: call inject"):
        call(nn.Linear(2, 2))
    model = StockModel(model_config())
    model.add_adapter("a", adapter_config())
    with pytest.raises(ValueError, match="is of an AdapterModelPTMixin"):
        call(model)
    with pytest.raises(ValueError, match="is of an AdapterModelPTMixin"):
        call(model.encoder)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        call("model")


def test_a_model_of_nemos_kind():
    """Its own methods reach the modules that were injected."""
    model = StockModel(model_config(PlainBlock))
    with pytest.raises(ValueError, match="no module of 'encoder' is an AdapterModuleMixin"):
        model.add_adapter("encoder:a", adapter_config())
    inject(model, targets="*.blocks.*")
    model.add_adapter("encoder+decoder:a", adapter_config())
    assert {row.where for row in model.list_adapters()} == {
        *(f"encoder.blocks.{i}" for i in range(len(model.encoder.blocks))),
        *(f"decoder.blocks.{i}" for i in range(len(model.decoder.blocks))),
    }
    with unchanged(model), pytest.raises(ValueError, match=r"adapters \['a'\] of a whole model"):
        ax.eject(model)
    model.remove_adapter("a")
    ax.eject(model)
    assert type(model.encoder.blocks[0]) is PlainBlock


# --- Files ----------------------------------------------------------------------------------------

LOADING = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import test_inject as t
model = t.make_encoder()
t.inject(model, targets="layers.*")
t.ax.load_adapters(model, "one.safetensors")
x = torch.load("x.pt")
with t.route_adapters(model, ["a", None, "a", "a"]):
    torch.save(model(x), "y.pt")
"""


def test_a_file_for_another_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, x = injected(), rand(B, T, D)
    ax.save_adapters(model, "one.safetensors", "a")
    torch.save(x, "x.pt")
    command = [sys.executable, "-c", LOADING, str(__import__("pathlib").Path(__file__).parent)]
    subprocess.run(command, check=True, timeout=120)
    with route_adapters(model, ["a", None, "a", "a"]):
        assert torch.equal(torch.load("y.pt"), model(x))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files(tmp_path, suffix):
    model = injected()
    ax.add_adapter(model.layers[1], "part", {"dim": 1})
    file = tmp_path / f"adapters{suffix}"
    ax.save_adapters(model, file)
    other = make_encoder()
    inject(other, targets="layers.*")
    ax.load_adapters(other, file)
    assert_same_tensors(
        dict(sorted(other.state_dict().items())), dict(sorted(model.state_dict().items()))
    )
    assert ax.list_adapters(other)[0] == ax.list_adapters(model)[0]
    with unchanged(other), pytest.raises(ValueError, match="has an adapter named 'a' already"):
        ax.load_adapters(other, file)
    ax.remove_adapter(other, "a1")
    ax.load_adapters(other, file, "a1")
    assert_same_tensors(
        dict(sorted(other.state_dict().items())), dict(sorted(model.state_dict().items()))
    )
    with pytest.raises(KeyError, match="holds no adapter named 'b'"):
        ax.load_adapters(other, file, "b")
    with pytest.raises(ValueError, match="no adapter named 'b'"):
        ax.save_adapters(model, file, "b")


@pytest.mark.parametrize("wrapped", ["saved", "loaded"])
def test_files_of_compiled_models(tmp_path, wrapped):
    """Paths in them had the wrapper's name, which no other model has."""
    model, other = injected(), make_encoder()
    inject(other, targets="layers.*")
    compiled = {"saved": model, "loaded": other}[wrapped]
    compiled = torch.compile(compiled, backend="eager")
    file = tmp_path / "adapters.safetensors"
    ax.save_adapters(compiled if wrapped == "saved" else model, file)
    ax.load_adapters(compiled if wrapped == "loaded" else other, file)
    assert_same_tensors(
        dict(sorted(other.state_dict().items())), dict(sorted(model.state_dict().items()))
    )


def test_files_that_do_not_fit(tmp_path):
    file = tmp_path / "adapters.safetensors"
    ax.save_adapters(injected(), file)
    few = make_encoder()
    inject(few, targets=["layers.0", "layers.1"])
    with unchanged(few), pytest.raises(FileError, match=r"\['layers.2'\] are not there or can't"):
        ax.load_adapters(few, file)
    narrow = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 4, batch_first=True), 3)
    inject(narrow, targets="layers.*")
    with unchanged(narrow), pytest.raises(FileError, match=r"must have shape .*6.* got .*10"):
        ax.load_adapters(narrow, file)
    model = injected()
    model.layers[1].remove_adapter("a")
    model.layers[1].add_adapter("a", {**vars(config()), "in_features": D})
    with pytest.raises(ValueError, match="a file holds one configuration of adapter 'a'"):
        ax.save_adapters(model, file)
    ax.remove_adapter(model, "a")
    ax.remove_adapter(model, "a1")
    with pytest.raises(ValueError, match="no adapters to save"):
        ax.save_adapters(model, file)


def test_files_of_models_of_nemos_kind(tmp_path):
    """They are the same: one written by a model loads into plain modules, and the other way."""
    model = StockModel(model_config())
    model.add_adapter("encoder:a", adapter_config())
    for p in model.encoder.parameters():
        nn.init.normal_(p)
    model.save_adapters(tmp_path / "model.safetensors")
    plain = nn.Module()  # the same paths, and no model at all
    plain.encoder = copy.deepcopy(StockModel(model_config()).encoder)
    ax.load_adapters(plain, tmp_path / "model.safetensors")
    ax.save_adapters(plain, tmp_path / "plain.safetensors")
    other = StockModel(model_config())
    other.load_adapters(tmp_path / "plain.safetensors")
    wanted = {k: v for k, v in model.state_dict().items() if "adapter_layer" in k}
    assert wanted
    assert_same_tensors({k: v for k, v in other.state_dict().items() if k in wanted}, wanted)


# --- Eject ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["layers.*", "**.linear1", ["", "layers.0.self_attn"]])
def test_eject(targets):
    model, x = make_encoder(), rand(B, T, D)
    padding = torch.arange(T) >= torch.tensor([T, 3, 4, 1])[:, None]
    with torch.no_grad():
        expected = model(x), model(x, src_key_padding_mask=padding)
    before = state_of(model)
    with unchanged(model):
        injected(targets, of=model)
        model.train()
        with route_adapters(model, NAMES):
            model(x).sum().backward()
        model.eval()
        ax.eject(model)
    assert state_of(model) == before
    with torch.no_grad():
        assert torch.equal(model(x), expected[0])
        assert torch.equal(model(x, src_key_padding_mask=padding), expected[1])
    # Nothing of it is left: all of it once more.
    injected(targets, of=model)


def test_ejecting_a_part():
    model = injected()
    ax.eject(model.layers[1])
    assert [row.where for row in ax.list_adapters(model)] == ["layers.0"] * 2 + ["layers.2"] * 2
    model = nn.Sequential(Block(), nn.Linear(3, 3))
    model[0].add_adapter("a", config())
    inject(model, targets="1")
    ax.eject(model)
    assert type(model[0]) is Block
    assert model[0].is_adapter_available()


def test_what_cannot_be_ejected():
    with pytest.raises(ValueError, match="no module was given adapters by inject"):
        ax.eject(make_encoder())
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        ax.eject(3)
    model = injected()
    with route_adapters(model, NAMES), pytest.raises(ValueError, match="leave route_adapters"):
        ax.eject(model)
    # As fully_shard does.
    layer = model.layers[2]
    kind = type(layer)
    layer.__class__ = type("FSDPLayer", (kind,), {})
    with unchanged(model), pytest.raises(ValueError, match=r"'layers.2' .* was changed once more"):
        ax.eject(model)
    layer.__class__ = kind
    ax.eject(model)


# --- Copies, pickles, compiling, recomputation ----------------------------------------------------


def copied(model: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how):
    model, x = injected(["layers.*", "layers.0.norm1"]), rand(B, T, D)
    with route_adapters(model, NAMES):
        expected = model(x)
        other = copied(model, how)
    assert type(other.layers[0]) is type(model.layers[0])
    with route_adapters(other, NAMES):
        assert torch.equal(other(x), expected)
    # It is no longer routed by the context in which it was copied, and has its own adapters.
    ax.remove_adapter(other, "a")
    assert {row.name for row in ax.list_adapters(model)} == {"a", "a1"}
    ax.eject(other)
    assert torch.equal(other(x), make_encoder()(x))
    with route_adapters(model, NAMES):
        assert torch.equal(model(x), expected)


class OwnReduce(nn.Linear):
    def __reduce__(self):
        return OwnReduce, (2, 2)


def test_a_class_that_pickles_its_own_way():
    model = nn.Sequential(OwnReduce(2, 2))
    inject(model, targets="0")
    with pytest.raises(TypeError, match=r"module '0' \(OwnReduce\) can't be pickled or copied"):
        copy.deepcopy(model)
    ax.eject(model)
    copy.deepcopy(model)


def test_compiled(fresh_compiler):
    model, x = injected(["layers.*", "layers.1.self_attn"]), rand(B, T, D)
    index = ax.adapter_index(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for names in (NAMES, ["a1", None, "a", "a1"]):
        ids = torch.tensor([-1 if name is None else index[name] for name in names])
        with route_adapters(model, ids):
            expected = model(x)
            torch.testing.assert_close(compiled(x), expected)
    assert counter.frame_count == 1  # other names need no other code
    y = compiled(x)  # the chain
    torch.testing.assert_close(y, model(x))
    ax.eject(model)
    torch.testing.assert_close(compiled(x), make_encoder()(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation(reentrant):
    # In training mode: without gradients, as when it is recomputed, it would round another way.
    model, x = injected().train(), rand(B, T, D).requires_grad_()

    def gradients(forward: Callable[[], Tensor], *, within: bool = False) -> dict[str, Tensor]:
        model.zero_grad()
        with route_adapters(model, NAMES):
            loss = forward().square().sum()
            if within:
                loss.backward()
        if not within:
            loss.backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    expected = gradients(lambda: model(x))
    forgetful = lambda: checkpoint(model, x, use_reentrant=reentrant)  # noqa: E731
    with pytest.raises(RuntimeError, match="is now computed again, for the backward, without the"):
        gradients(forgetful)
    if reentrant:
        got = gradients(forgetful, within=True)
    else:
        context = ax.checkpoint_context(model)
        got = gradients(lambda: checkpoint(model, x, use_reentrant=False, context_fn=context))
        assert_same_tensors(got, expected)
        # In another thread, as on a GPU; and while other samples are routed.
        model.zero_grad()
        with route_adapters(model, NAMES):
            y = checkpoint(model, x, use_reentrant=False, context_fn=context)
        with ThreadPoolExecutor() as threads, route_adapters(model, NAMES[::-1]):
            threads.submit(y.square().sum().backward).result()
        got = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    assert_same_tensors(got, expected)
    assert all(host._adapter_routes == () for host in model.layers)


def test_recomputation_without_routes():
    model, x = injected(), rand(B, T, D).requires_grad_()
    model(x).square().sum().backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    got = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert_same_tensors(got, expected)


def test_silu_is_what_the_reference_uses():
    """The reference is not the code under test: an adapter by hand, once."""
    model, x = injected("layers.0"), rand(B, T, D)
    adapter = model.layers[0].adapter_layer["a"]
    norm, down, _, up = adapter.module
    h = F.layer_norm(x, (D,), norm.weight, norm.bias)
    expected = F.silu(h @ down.weight.T) @ up.weight.T
    torch.testing.assert_close(formula(adapter, x), expected)


@pytest.mark.parametrize("name", ["b", None])
def test_enabling_that_fails_changes_no_host(name):
    """The hosts, and adapters, before the one whose configuration is read-only were changed."""
    model = nn.Sequential(make_block("a", "b"), make_block("a", "b"))
    OmegaConf.set_readonly(model[1].adapter_cfg.b, True)
    with pytest.raises(ReadonlyConfigError):
        ax.set_enabled_adapters(model, name, False)
    for host in model:
        assert host.get_enabled_adapters() == ["a", "b"]
        assert host.adapter_cfg.a.enabled
        assert host.adapter_cfg.b.enabled


def test_renaming_in_all_hosts_or_in_none():
    model = nn.Sequential(make_block("a", "b"), make_block("b", "a"), make_block("b"))
    ax.rename_adapter(model, "a", "z")
    assert [host.get_enabled_adapters() for host in model] == [["z", "b"], ["b", "z"], ["b"]]
    assert model[0].adapter_cfg.z.dim == make_block("a").adapter_cfg.a.dim
    for new in ("b", "keys", "x.y"):
        with pytest.raises(ValueError, match="adapter"):
            ax.rename_adapter(model, "z", new)
    with pytest.raises(ValueError, match="no adapter named 'a'"):
        ax.rename_adapter(model, "a", "c")

    def failing(*_: Any) -> None:
        raise KeyboardInterrupt

    model[1].rename_adapter = failing
    with pytest.raises(KeyboardInterrupt):
        ax.rename_adapter(model, "z", "y")
    assert [list(host._adapters()) for host in model] == [["z", "b"], ["b", "z"], ["b"]]
    assert [list(host.adapter_cfg) for host in model] == [["z", "b"], ["b", "z"], ["b"]]


@pytest.mark.parametrize("freeze_batchnorm", [True, False])
def test_unfreezing_in_all_hosts(freeze_batchnorm):
    model = nn.Sequential(make_block("a", "b"), nn.BatchNorm1d(3), make_block("b"))
    ax.set_enabled_adapters(model, "a", False)
    model.requires_grad_(False)
    model[1].requires_grad_(True)
    ax.unfreeze_enabled_adapters(model, freeze_batchnorm)
    trained = {
        name.split(".")[2]
        for name, p in model.named_parameters()
        if p.requires_grad and "layer" in name
    }
    assert trained == {"b"}
    assert all(p.requires_grad != freeze_batchnorm for p in model[1].parameters())
    with pytest.raises(ValueError, match="call inject"):
        ax.unfreeze_enabled_adapters(nn.Linear(2, 2))
