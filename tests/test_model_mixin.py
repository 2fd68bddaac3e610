"""AdapterModelPTMixin beyond NeMo's API: undoing failures, renaming, losses, tables, files."""

from __future__ import annotations

import gc
import sys
from contextlib import contextmanager

import pytest
import torch
from layer_testing import randomize
from model_testing import (
    DECODER_BLOCKS,
    ENCODER_BLOCKS,
    KINDS,
    NAMES,
    WIDTH,
    Block,
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
    snapshot,
    unchanged,
    where,
)
from omegaconf import OmegaConf
from omegaconf.errors import ReadonlyConfigError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import adapter_ext
from adapter_ext import (
    AbstractAdapterStrategy,
    AccessMixin,
    AdapterModelPTMixin,
    AdapterModuleMixin,
    FileError,
    LinearAdapter,
    LinearAdapterConfig,
    ResidualAddAdapterStrategyConfig,
    files,
    register_target,
    route_adapters,
)
from adapter_ext.model_mixin import AdapterModelPTMixin as Mixin

PACKAGE = adapter_ext.__path__[0]
SUFFIXES = (".safetensors", ".pt")


# --- Every step can fail --------------------------------------------------------------------------


class InjectedError(Exception):
    pass


@contextmanager
def failing_at_call(number):
    """The number-th call of one of the package's Python functions raises instead."""
    calls = 0

    def profile(frame, event, argument):
        nonlocal calls
        code = frame.f_code
        # _transaction is what undoes, and is entered again as its context ends; so are generators.
        if (
            event == "call"
            and code.co_filename.startswith(PACKAGE)
            and code.co_name not in ("_transaction", "<genexpr>")
        ):
            calls += 1
            if calls == number:
                sys.setprofile(None)
                raise InjectedError

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def other_model(kind, path, suffix, *names):
    model = make_model(kind, *names, seed=5)
    model.save_adapters(path / f"other{suffix}")
    return path / f"other{suffix}"


OPERATIONS = {
    "add": lambda model, path: model.add_adapter("a", adapter_config(dim=2)),
    "add to both": lambda model, path: model.add_adapter("encoder+decoder:a", adapter_config()),
    "enable": lambda model, path: model.set_enabled_adapters("a10", False),
    "rename": lambda model, path: model.rename_adapter("a1", "first"),
    "remove": lambda model, path: model.remove_adapter("a1"),
    "load": lambda model, path: model.load_adapters(path / "other.safetensors"),
    "load .pt": lambda model, path: model.load_adapters(path / "other.pt"),
}


def goes_through(model, operation, path, number):
    """Whether an operation has fewer steps than number; if not, nothing may have changed."""
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    try:
        with failing_at_call(number):
            operation(model, path)
    except (InjectedError, FileError):
        assert snapshot(model) == before
        assert_same_tensors(model.state_dict(), state)
        return False
    assert snapshot(model) != before
    return True


@pytest.mark.parametrize("density", [4, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_whatever_step_fails_the_model_is_as_it_was(kind, operation, density, tmp_path):
    for suffix in SUFFIXES:
        other_model(kind, tmp_path, suffix, "decoder:b", "encoder+decoder:c")
    model = make_model(kind, "a1", "encoder+decoder:a10", "decoder:x1")
    number = 1
    while not goes_through(model, operation, tmp_path, number):
        number += 1 + number // density  # there are hundreds of steps, thousands with a file
    assert number > 10
    x = inputs()
    torch.testing.assert_close(model(x), plainly(model, x)[0], rtol=1e-4, atol=1e-4)


def test_an_override_that_fails_at_its_second_module(monkeypatch):
    model = make_model(OverridingModel, "encoder+decoder:a1")

    def fail(name, cfg):
        raise OSError("out of memory")

    monkeypatch.setattr(model.decoder, "add_adapter", fail)
    with unchanged(model), pytest.raises(OSError, match="out of memory"):
        model.add_adapter("encoder+decoder:b", adapter_config())


# --- Names and places -----------------------------------------------------------------------------


class Everywhere(StockModel):
    """No names, no default: adapters go wherever they can."""

    @property
    def adapter_module_names(self):
        return [""]

    default_adapter_module_name = None


class Named(StockModel):
    """Names, no default."""

    default_adapter_module_name = None


def test_where_an_adapter_without_a_place_goes():
    assert where(make_model(StockModel, "a"), "a") == ENCODER_BLOCKS
    assert where(make_model(Everywhere, "a"), "a") == ENCODER_BLOCKS + DECODER_BLOCKS
    assert where(make_model(Named, "a"), "a") == ENCODER_BLOCKS + DECODER_BLOCKS
    assert where(make_model(Named, "a", encoder_adapter=False), "a") == DECODER_BLOCKS
    assert where(make_model(Everywhere, "decoder:a"), "a") == DECODER_BLOCKS
    assert where(make_model(Everywhere, "decoder.blocks.1:a"), "a") == DECODER_BLOCKS[1:]


@pytest.mark.parametrize(
    ("kind", "flags", "name", "words"),
    [
        (Everywhere, {}, "head:a", "has no module 'head'"),
        (Everywhere, {}, "encoder.blocks.0.linear:a", "is an AdapterModuleMixin"),
        (StockModel, {}, "encoder+head:a", "'head' in 'encoder.head:a' is no place for adapters"),
        (Named, {"encoder_adapter": False, "decoder_adapter": False}, "a", "leaves no place"),
    ],
)
def test_places_that_can_not_be(kind, flags, name, words):
    model = make_model(kind, **flags)
    with unchanged(model), pytest.raises(ValueError, match=words):
        model.add_adapter(name, adapter_config())


def test_the_default_place_may_have_no_module_for_adapters():
    model = StockModel(model_config(Block))
    with unchanged(model), pytest.raises(ValueError, match="replace_adapter_compatible_modules"):
        model.add_adapter("a", adapter_config())
    model.replace_adapter_compatible_modules(verbose=False)
    model.add_adapter("a", adapter_config())
    assert where(model, "a") == ENCODER_BLOCKS


def test_a_module_with_adapters_of_its_own_is_not_taken_over():
    model = make_model(StockModel)
    model.encoder.blocks[1].add_adapter("own", adapter_config())
    with unchanged(model), pytest.raises(ValueError, match=r"\['own'\] that were added to it"):
        model.add_adapter("a", adapter_config())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "call",
    [
        lambda block: block.remove_adapter("a"),
        lambda block: block.rename_adapter("a", "b"),
        lambda block: block.set_enabled_adapters("a", False),
        lambda block: block.set_enabled_adapters(enabled=False),
    ],
)
def test_a_module_leaves_adapters_of_its_model_alone(kind, call):
    model = make_model(kind, "encoder+decoder:a")
    with unchanged(model), pytest.raises(ValueError, match="call this on the model"):
        call(model.encoder.blocks[0])


def test_an_override_that_hands_on_nothing_gets_a_warning():
    class Forgetful(StockModel):
        def add_adapter(self, name, cfg):
            super().add_adapter(name, cfg)

    model = Forgetful(model_config())
    with pytest.warns(UserWarning, match="adapter 'a' is in the configuration, but in no module"):
        model.add_adapter("a", adapter_config())


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_that_is_read_only(kind):
    model = make_model(kind, "a1")
    OmegaConf.set_readonly(model.cfg, True)
    for call in (
        lambda: model.add_adapter("b", adapter_config()),
        lambda: model.rename_adapter("a1", "b"),
        lambda: model.remove_adapter("a1"),
        lambda: model.set_enabled_adapters("a1", False),
    ):
        with unchanged(model), pytest.raises(ReadonlyConfigError):
            call()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.remove_adapter("nope"), r"no adapter named 'nope'; there are \['a1', 'a10'\]"),
        (lambda m: m.remove_adapter("decoder:a1"), "'a1' is not in 'decoder'"),
        (lambda m: m.set_enabled_adapters("decoder:a1"), "'a1' is not in 'decoder'"),
        (lambda m: m.rename_adapter("nope", "b"), "no adapter named 'nope'"),
        (lambda m: m.rename_adapter("a1", "a10"), "'a10' exists already"),
        (lambda m: m.rename_adapter("a1", "a1"), "'a1' exists already"),
        (lambda m: m.rename_adapter("a1", "encoder:b"), "can't have"),
        (lambda m: m.rename_adapter("a1", "global_cfg"), "reserved"),
        (lambda m: m.save_adapters("x.pt", "a"), "no adapter named 'a'"),
    ],
)
def test_names_that_are_not_there(kind, call, words):
    model = make_model(kind, "a1", "encoder+decoder:a10")
    with unchanged(model), pytest.raises(ValueError, match=words):
        call(model)


def test_names_that_differ_by_case_alone():
    model = make_model(StockModel, "fr")
    module = model.encoder.blocks[0]
    with unchanged(model), pytest.raises(ValueError, match="'fr' and 'FR' differ by case only"):
        model.add_adapter("decoder:FR", adapter_config())
    with unchanged(model), pytest.raises(ValueError, match="'fr' and 'Fr' differ by case only"):
        AdapterModuleMixin.add_adapter(module, "Fr", adapter_config())
    model.rename_adapter("fr", "FR")
    assert where(model, "FR") == ENCODER_BLOCKS


# --- Removing and renaming ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_remove_is_exact(kind, name):
    model = make_model(kind, *(f"encoder+decoder:{n}" for n in NAMES))
    want = make_model(kind, *(f"encoder+decoder:{n}" for n in NAMES if n != name))
    model.remove_adapter(name)
    assert model.cfg == want.cfg
    assert_same_tensors(model.state_dict(), want.state_dict())
    assert torch.equal(model(inputs()), want(inputs()))
    add(model, f"encoder+decoder:{name}")  # the name is free again


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_rename_is_exact_and_keeps_the_order(kind, name, tmp_path):
    model = make_model(kind, *(f"encoder+decoder:{n}" for n in NAMES))
    x = inputs()
    want, state = model(x), adapter_state(model, name)
    model.rename_adapter(f"encoder:{name}", "a100")
    assert torch.equal(model(x), want)  # the order in which adapters run is the same
    names = ["a100" if n == name else n for n in NAMES]
    assert [n for n in model.cfg.adapters if n != "global_cfg"] == names
    assert list(model.encoder.blocks[0].adapter_layer) == names
    renamed = adapter_state(model, "a100")
    assert all(map(torch.equal, renamed.values(), state.values()))
    model.save_adapters(tmp_path / "a.safetensors", "a100")
    fresh = make_model(kind)
    fresh.load_adapters(tmp_path / "a.safetensors")
    assert_same_tensors(adapter_state(fresh, "a100"), renamed)


def test_remove_and_rename_in_a_single_module():
    module = make_model(StockModel).encoder.blocks[0]
    for name in NAMES:
        module.add_adapter(name, adapter_config())
    module.set_enabled_adapters("x1", False)
    module.rename_adapter("x1", "x")
    module.remove_adapter("m:a1")
    assert list(module.adapter_layer) == list(module.adapter_cfg) == ["a10", "module", "x", "1"]
    assert module.get_enabled_adapters() == ["a10", "module", "1"]
    with pytest.raises(ValueError, match=r"no adapter named 'a1'; there are \['a10', "):
        module.remove_adapter("a1")
    with pytest.raises(ValueError, match="'x' exists already"):
        module.rename_adapter("a10", "x")


# --- The table ------------------------------------------------------------------------------------


def test_list_adapters():
    model = make_model(StockModel, "a1")
    add(model, "decoder:relu", activation="relu", dim=2)
    model.set_enabled_adapters("a1", False)
    for parameter in model.decoder.blocks[1].adapter_layer["relu"].module[0].parameters():
        parameter.requires_grad_(False)
    table = model.list_adapters()
    of_a1, of_relu = 2 * WIDTH + 2 * 3 * WIDTH, 2 * WIDTH + 2 * 2 * WIDTH
    assert table == [
        *(("a1", path, 3, "swish", False, of_a1, of_a1) for path in ENCODER_BLOCKS),
        ("relu", DECODER_BLOCKS[0], 2, "relu", True, of_relu, of_relu),
        ("relu", DECODER_BLOCKS[1], 2, "relu", True, of_relu, of_relu - 2 * WIDTH),
    ]
    header, first, *_ = str(table).splitlines()
    assert header.split() == list(adapter_ext.AdapterInfo._fields)
    assert first.split() == ["a1", ENCODER_BLOCKS[0], "3", "swish", "no", str(of_a1), str(of_a1)]
    assert [len(line.split()) for line in str(table).splitlines()] == [7] * 6


# --- Auxiliary losses -----------------------------------------------------------------------------


def with_losses(kind):
    model = make_model(kind)
    for name, l2_lambda in (("a1", 0.25), ("encoder+decoder:a10", 0.5), ("decoder:x1", 0.0)):
        add(model, name, adapter_strategy=ResidualAddAdapterStrategyConfig(l2_lambda=l2_lambda))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_summed_over_layers(kind):
    model, x = with_losses(kind), inputs()
    y, deltas = plainly(model, x)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    losses = model.adapter_losses()
    assert losses.keys() == {"a1", "a10"}
    for name, l2_lambda in (("a1", 0.25), ("a10", 0.5)):
        want = sum(l2_lambda * d.square().sum() / len(x) for d in deltas[name])
        torch.testing.assert_close(losses[name], want, rtol=1e-4, atol=1e-6)
    down = model.encoder.blocks[0].adapter_layer["a1"].module[1].weight
    (gradient,) = torch.autograd.grad(sum(losses.values()), down)
    assert gradient.abs().max() > 0
    model.reset_adapter_losses()
    assert model.adapter_losses() == {}


@pytest.mark.parametrize("loop", ["ours", "NeMo's"])
def test_b2_memory_does_not_grow_over_200_steps(loop):
    model, x = with_losses(StockModel), inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step():
        loss = model(x).square().mean()
        if loop == "ours":
            extra = model.adapter_losses()
            assert extra.keys() == {"a1", "a10"}
            loss = loss + sum(extra.values())
            model.reset_adapter_losses()
        else:
            assert AccessMixin.is_access_enabled(model.model_guid)
            registry = AccessMixin.get_module_registry(model)
            assert len(registry) == 2 * len(ENCODER_BLOCKS) + len(DECODER_BLOCKS)
            loss = loss + sum(sum(r["adapter_loss"]) for r in registry.values())
            AccessMixin.reset_registry(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def tensors():
        while gc.collect():
            pass  # what is freed may free more
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    for _ in range(3):
        step()
    before = tensors()
    for _ in range(200):
        step()
    assert tensors() == before


# --- Device and type ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_new_and_loaded_adapters_follow_the_host(suffix, tmp_path):
    source = other_model(StockModel, tmp_path, suffix, "a")
    model = make_model(StockModel).to(torch.bfloat16)
    model.load_adapters(source)
    add(model, "decoder:b")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    want = adapter_state(make_model(StockModel, "a", seed=5), "a")
    for key, value in adapter_state(model, "a").items():
        assert torch.equal(value, want[key].bfloat16())
    on_meta = make_model(StockModel).to("meta")
    add(on_meta, "b")
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}


# --- Routing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_routing_reaches_all_modules(kind):
    model = make_model(kind, "encoder+decoder:a1", "decoder:a10", "encoder:x1")
    rows = [None, "a10", "a1", "x1", "a1"]
    x = inputs(len(rows))
    with route_adapters(model, rows):
        y = model(x)
    for row, name in enumerate(rows):
        model.set_enabled_adapters(enabled=False)
        if name:
            model.set_enabled_adapters(name, True)
        torch.testing.assert_close(
            y[row], plainly(model, x[row : row + 1])[0][0], rtol=1e-4, atol=1e-4
        )


# --- Files that fit, and files that do not --------------------------------------------------------


class Scale(AbstractAdapterStrategy):
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def forward(self, input, adapter, *, module):
        return input + self.factor * adapter(input)


class OwnAdapter(LinearAdapter):
    pass


def path_of(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("where_named", ["adapter", "strategy"])
def test_classes_of_the_users(suffix, where_named, tmp_path, monkeypatch):
    cfg = adapter_config()
    if where_named == "adapter":
        cfg._target_ = path_of(OwnAdapter)
        needed = OwnAdapter
    else:
        cfg.adapter_strategy = {"_target_": path_of(Scale), "factor": 0.5}
        needed = Scale
    source = make_model(StockModel)
    source.add_adapter("a", cfg)
    for host in source.encoder.blocks:
        randomize(host.adapter_layer["a"], 3)
    file = tmp_path / f"a{suffix}"
    source.save_adapters(file)
    model = make_model(StockModel)
    with unchanged(model), pytest.raises(FileError, match=r"adapter 'a'.*register_target"):
        model.load_adapters(file)
    model.load_adapters(file, classes=[needed])
    assert torch.equal(model(inputs()), source(inputs()))
    model.remove_adapter("a")
    monkeypatch.setattr(adapter_ext.registry, "_targets", dict(adapter_ext.registry._targets))
    register_target(needed)
    model.load_adapters(file)
    assert torch.equal(model(inputs()), source(inputs()))
    with pytest.raises(ValueError, match="must be a class derived from"):
        model.load_adapters(file, classes=[print])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "target", ["os.system", "torch.load", "torch.nn.Linear", "builtins.eval", "no.such.Class"]
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_a_file_names_is_not_imported(suffix, target, nested, tmp_path, monkeypatch):
    source = make_model(StockModel, "a")
    place = source.cfg.adapters.a.adapter_strategy if nested else source.cfg.adapters.a
    place["_target_"] = target
    source.save_adapters(tmp_path / f"a{suffix}")
    model = make_model(StockModel)
    monkeypatch.setattr("importlib.import_module", pytest.fail)
    with unchanged(model), pytest.raises(FileError, match=f"'a'.*'{target}'.*not registered"):
        model.load_adapters(tmp_path / f"a{suffix}")


def changed(source, target, change):
    """Copies an adapter file with something changed."""
    content = files.read_adapters(source)
    files.write_adapters(target, change(content.adapters["a"], content))
    return target


def with_states(change):
    def of_file(saved, content):
        for state in saved.states:
            change(state)
        return content

    return of_file


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            with_states(lambda state: state.update({"module.1.weight": torch.ones(4, WIDTH)})),
            rf"module 'encoder.blocks.0': module.1.weight must have shape \[3, {WIDTH}\], "
            rf"got \[4, {WIDTH}\]",
        ),
        (
            with_states(lambda state: state.pop("module.0.bias")),
            r"module 'encoder.blocks.0': missing are \['module.0.bias'\]",
        ),
        (
            with_states(lambda state: state.update(extra=torch.ones(1))),
            r"module 'encoder.blocks.0': .*unexpected are \['extra'\]",
        ),
        (
            with_states(lambda state: state.update({"module.0.bias": torch.ones(WIDTH).long()})),
            "module.0.bias must be of type torch.float32, got torch.int64",
        ),
        (lambda saved, content: saved.config.update(dim=0) or content, "dim must be at least 1"),
        (lambda saved, content: saved.config.update(nonsense=1) or content, "nonsense"),
    ],
    ids=["shape", "missing", "unexpected", "type", "argument", "unknown argument"],
)
def test_content_that_does_not_fit(suffix, change, words, tmp_path):
    source = other_model(StockModel, tmp_path, suffix, "a")
    model = make_model(StockModel, "a1")
    file = changed(source, tmp_path / f"changed{suffix}", change)
    with unchanged(model), pytest.raises(FileError, match=f"changed{suffix}: adapter 'a'.*{words}"):
        model.load_adapters(file)


def with_nan(file):
    """Fills one weight of a file with NaN, which files.write_adapters would refuse to."""
    if file.suffix == ".pt":
        saved = torch.load(file, weights_only=False)
        saved["a"][1]["a.module.1.weight"].fill_(torch.nan)
        torch.save(saved, file)
    else:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        tensors["encoder.blocks.1.adapter_layer.a.module.1.weight"].fill_(torch.nan)
        del metadata["sha256"]  # files of other programs have none
        save_file(tensors, file, metadata)


def with_byte_flipped(file):
    content = bytearray(file.read_bytes())
    weight = files.read_adapters(file).adapters["a"].states[1]["module.1.weight"]
    content[content.index(weight.numpy().tobytes()) + 6] ^= 0x10  # it stays a finite number
    file.write_bytes(content)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("break_file", "words"),
    [
        (lambda file: file.write_bytes(b""), "it is empty"),
        (lambda file: file.write_text("a poem"), ""),
        (lambda file: file.write_bytes(file.read_bytes()[:-50]), ""),
        (with_byte_flipped, ""),
        (with_nan, r"adapter 'a'.*encoder\.blocks\.1.*module\.1\.weight"),
        (lambda file: file.write_bytes((file.parent / f"b{file.suffix}").read_bytes()), ""),
    ],
    ids=["empty", "text", "truncated", "corrupted", "NaN", "the other kind"],
)
def test_broken_files_leave_the_model_as_it_was(suffix, break_file, words, tmp_path):
    file = other_model(StockModel, tmp_path, suffix, "a")
    for own, other in (SUFFIXES, SUFFIXES[::-1]):  # each under the other's suffix
        make_model(StockModel, "a").save_adapters(tmp_path / f"c{own}")
        (tmp_path / f"c{own}").rename(tmp_path / f"b{other}")
    break_file(file)
    model = make_model(StockModel, "a1")
    with unchanged(model), pytest.raises(FileError, match=rf"other\{suffix}.*{words}"):
        model.load_adapters(file)


def test_a_file_of_another_version(tmp_path):
    file = other_model(StockModel, tmp_path, ".safetensors", "a")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, {**metadata, "format_version": "2"})
    model = make_model(StockModel, "a1")
    with unchanged(model), pytest.raises(FileError, match="version"):
        model.load_adapters(file)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_another_model(suffix, tmp_path):
    class Deeper(StockModel):
        pass

    cfg = model_config()
    cfg.encoder.depth += 1
    other = Deeper(cfg)
    other.add_adapter("a", adapter_config())
    other.save_adapters(tmp_path / f"a{suffix}")
    model = make_model(StockModel)
    with unchanged(model), pytest.raises(FileError, match=r"'a'.*encoder\.blocks\.3.*model put it"):
        model.load_adapters(tmp_path / f"a{suffix}")


def test_states_without_strict(tmp_path):
    source = other_model(StockModel, tmp_path, ".pt", "a")
    drop = with_states(lambda state: state.pop("module.0.bias"))
    file = changed(source, tmp_path / "less.pt", drop)
    model = make_model(StockModel)
    model.load_adapters(file, strict=False)
    want = adapter_state(make_model(StockModel, "a", seed=5), "a")
    for key, value in adapter_state(model, "a").items():
        assert torch.equal(value, torch.zeros(WIDTH) if key.endswith("0.bias") else want[key])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_adapter_of_that_name_is_not_replaced(suffix, tmp_path):
    source = other_model(StockModel, tmp_path, suffix, "a", "a1")
    model = make_model(StockModel, "decoder:a1")
    with unchanged(model), pytest.raises(ValueError, match="named 'a1' already; remove or rename"):
        model.load_adapters(source)
    model.load_adapters(source, "a")
    assert where(model, "a") == ENCODER_BLOCKS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_disabled_adapters_are_saved_as_such(suffix, tmp_path):
    source = make_model(StockModel, "a1", "a10")
    source.set_enabled_adapters("a1", False)
    source.save_adapters(tmp_path / f"a{suffix}")
    model = make_model(StockModel)
    model.load_adapters(tmp_path / f"a{suffix}")
    assert model.get_enabled_adapters() == ["a10"]
    assert model.cfg.adapters.a1.enabled is False


def test_an_adapter_that_is_in_no_module_can_not_be_saved(tmp_path):
    model = make_model(OverridingModel, "a", encoder_adapter=False)
    model.add_adapter("decoder:b", adapter_config())
    with pytest.raises(ValueError, match="'a' is in the configuration, but in no module"):
        model.save_adapters(tmp_path / "a.pt")


@pytest.mark.parametrize("save", ["save_to", "save_adapters"])
def test_a_file_that_nothing_could_read_is_not_written(save, tmp_path):
    model = make_model(StockModel, "a")
    model.encoder.blocks[0].adapter_layer["b"] = LinearAdapter(WIDTH, 1)
    with pytest.raises(ValueError, match=r"module 'encoder.blocks.0' has adapters \['b'\], which"):
        getattr(model, save)(tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_the_mixin_alone_is_enough():
    """Not one method besides the constructor and forward, which any model has."""

    class Small(adapter_ext.ModelPT, AdapterModelPTMixin):
        def __init__(self, cfg, trainer=None):
            super().__init__(cfg, trainer)
            self.blocks = make_model(StockModel).encoder.blocks
            self.setup_adapters()

    assert Small.add_adapter is Mixin.add_adapter
    model = Small({"any": "thing"})
    model.add_adapter("a", LinearAdapterConfig(WIDTH, 2))
    assert [row.where for row in model.list_adapters()] == ["blocks.0", "blocks.1", "blocks.2"]
    again = Small(model.cfg)
    assert again.list_adapters() == model.list_adapters()


class Outer(adapter_ext.ModelPT, AdapterModelPTMixin):
    """A model around another one, or beside it with the same encoder."""

    def __init__(self, cfg, **parts):
        super().__init__(cfg)
        for name, part in parts.items():
            setattr(self, name, part)
        self.own = make_model(StockModel).decoder

    default_adapter_module_name = "own"


@pytest.mark.parametrize("shared", ["model", "encoder"])
def test_a_model_leaves_the_adapters_of_another_alone(shared, tmp_path):
    """It took over their configuration, which disabled them and lost it."""
    model = make_model(StockModel, "a")
    x = inputs()
    before, config = model(x), OmegaConf.to_yaml(model.cfg)
    outer = Outer({}, part=model if shared == "model" else model.encoder)
    with pytest.raises(ValueError, match="has adapters \\['a'\\] that another model was given"):
        outer.add_adapter("b", adapter_config())
    assert "adapters" not in outer.cfg
    assert OmegaConf.to_yaml(model.cfg) == config
    assert torch.equal(model(x), before)
    model.save_to(tmp_path / "model.nemo")
    assert torch.equal(StockModel.restore_from(tmp_path / "model.nemo").eval()(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_host_of_a_model_gets_no_adapter_that_the_model_does_not_know(kind):
    """Neither archives nor files of adapters could be read again."""
    model = make_model(kind, "a")
    host = model.encoder.blocks[0]
    with pytest.raises(ValueError, match="'b': this BlockWithAdapters belongs to a model"):
        host.add_adapter("b", adapter_config())
    assert list(host.adapter_layer) == ["a"]


def test_an_override_in_a_plain_base_class_is_undone_where_it_fails():
    class Dispatch:
        def add_adapter(self, name, cfg):
            super().add_adapter(name, cfg)
            for block in self.encoder.blocks:
                block.add_adapter(name, cfg)
            raise ValueError("in the end")

    class Model(Dispatch, StockModel):
        pass

    model = make_model(Model)
    with pytest.raises(ValueError, match="in the end"):
        model.add_adapter("a", adapter_config())
    assert "adapters" not in model.cfg
    assert not hosts(model)


@pytest.mark.parametrize("cfg", [{}, {"adapters": {"global_cfg": {}}}], ids=["none", "empty"])
def test_adapters_that_a_new_configuration_lacks_are_not_saved_as_none(cfg, tmp_path):
    """A file without adapters was written."""
    model = make_model(StockModel, "a")
    model.cfg = cfg
    with pytest.raises(ValueError, match=r"has adapters \['a'\].* was cfg assigned afterwards"):
        model.save_adapters(tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


class Enclosing(adapter_ext.ModelPT, AdapterModelPTMixin):
    """A model with another one in it."""

    def __init__(self, cfg, trainer=None):
        super().__init__(cfg, trainer)
        self.inner = make_model(StockModel)
        self.head = make_model(StockModel).decoder.blocks[0]
        self.setup_adapters()

    adapter_module_names = ("", "inner", "inner.encoder", "head")
    default_adapter_module_name = "inner"

    def forward(self, x):
        return self.head(self.inner(x))


def test_adapters_of_a_model_reach_into_a_model_within_it(tmp_path):
    """The inner one took the adapter for its own, and was left with a configuration of nothing."""
    model = Enclosing({})
    model.add_adapter("a", adapter_config())
    model.add_adapter("head:b", adapter_config())
    randomize(model)
    assert where(model, "a") == [f"inner.{path}" for path in where(model.inner, "a")] != []
    assert where(model, "b") == ["head"]
    assert "adapters" not in model.inner.cfg
    model.set_enabled_adapters("a", False)
    assert model.get_enabled_adapters() == ["b"]
    model.set_enabled_adapters("a", True)
    before = snapshot(model)
    with pytest.raises(TypeError):
        model.add_adapter("head:c", {**adapter_config(), "unknown": 1})
    assert snapshot(model) == before
    assert "adapters" not in model.inner.cfg
    model.save_to(tmp_path / "whole.nemo")
    restored = Enclosing.restore_from(tmp_path / "whole.nemo")
    torch.testing.assert_close(restored(inputs()), model.eval()(inputs()))
    with pytest.raises(ValueError, match=r"has adapters .* nothing could read its file"):
        model.inner.save_to(tmp_path / "inner.nemo")
    with pytest.raises(ValueError, match="one of both models can have adapters"):
        model.inner.add_adapter("c", adapter_config())
    assert "c" not in (model.inner.cfg.get("adapters") or {})
    model.remove_adapter("a")
    model.inner.save_to(tmp_path / "inner.nemo")
    StockModel.restore_from(tmp_path / "inner.nemo")


def test_a_model_within_a_model_may_have_the_adapters():
    model = Enclosing({})
    model.inner.add_adapter("a", adapter_config())
    with pytest.raises(ValueError, match="one of both models can have adapters"):
        model.add_adapter("b", adapter_config())
    assert not model.cfg.get("adapters")
    assert model.inner.get_enabled_adapters() == ["a"]


def test_the_place_of_a_name_counts():
    """It was ignored: the adapter of another place was returned, or the place did not decide."""
    model = make_model(StockModel, "encoder+decoder:a", "encoder:b")
    assert model.get_adapter_module("decoder:b") is None
    with pytest.raises(ValueError, match="several modules have"):
        model.get_adapter_module("a")
    del model.decoder.blocks[1:]
    assert model.get_adapter_module("decoder:a") is model.decoder.blocks[0].adapter_layer["a"]
    with pytest.raises(ValueError, match="is no place for adapters"):
        model.get_adapter_module("head:a")


def test_routing_takes_names_with_their_place():
    model = make_model(StockModel, "a", "decoder:b")
    x = inputs()[:2]
    with model.route_adapters(["a", "b"]):
        expected = model(x)
    with model.route_adapters(["encoder:a", "decoder:b"]):
        assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="'b' is not in 'encoder'"):  # noqa: SIM117
        with model.route_adapters(["a", "encoder:b"]):
            pass


@pytest.mark.parametrize("method", ["remove", "rename", "disable", "add"])
def test_read_only_configurations_lose_no_adapter(method):
    """What undid the change failed itself, and left hosts without their adapters."""
    model = make_model(StockModel, "a1", "encoder+decoder:x1")
    x = inputs()
    want, known = model(x), OmegaConf.to_container(model.cfg)
    OmegaConf.set_readonly(model.cfg.adapters, True)
    with pytest.raises(ReadonlyConfigError):
        {
            "remove": lambda: model.remove_adapter("a1"),
            "rename": lambda: model.rename_adapter("x1", "other"),
            "disable": lambda: model.set_enabled_adapters("x1", False),
            "add": lambda: model.add_adapter("b", adapter_config()),
        }[method]()
    assert torch.equal(model(x), want)
    assert OmegaConf.to_container(model.cfg) == known
    assert OmegaConf.is_readonly(model.cfg.adapters)


def test_other_adapters_keep_the_flags_of_their_configurations():
    model = make_model(StockModel, "a1", "x1", "1")
    OmegaConf.set_readonly(model.cfg.adapters.a1, True)
    OmegaConf.set_struct(model.cfg.adapters.x1, True)
    model.remove_adapter("1")
    model.rename_adapter("x1", "y1")
    assert OmegaConf.is_readonly(model.cfg.adapters.a1)
    assert OmegaConf.is_struct(model.cfg.adapters.y1)


@pytest.mark.parametrize("name", ["encoder+:a", "+:a", "+encoder:a", "encoder++decoder:a"])
@pytest.mark.parametrize("kind", [StockModel, Everywhere])
def test_no_part_of_a_place_is_empty(kind, name):
    """It meant the whole model, whose file nothing could read."""
    model = kind(model_config())
    with pytest.raises(ValueError, match=r"'' in .* is no place for adapters"):
        model.add_adapter(name, adapter_config())
    assert not model.is_adapter_available()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_that_are_too_large_for_the_models_type(suffix, tmp_path):
    """They became infinite, without a word."""
    model = make_model(StockModel, "a1")
    for parameter in model.encoder.blocks[0].adapter_layer.a1.parameters():
        parameter.data.fill_(1e6)
    model.save_adapters(tmp_path / f"x{suffix}")
    other = make_model(StockModel).half()
    with pytest.raises(FileError, match=r"has values that are too large for torch\.float16"):
        other.load_adapters(tmp_path / f"x{suffix}")
    assert not other.is_adapter_available()
    other.bfloat16().load_adapters(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("again", [False, True])
def test_what_freeze_noted_follows_a_rename(again):
    """It went by the old name: what had not required grad did so afterwards."""
    model = make_model(StockModel, "a1", "x1")
    for host in hosts(model).values():
        host.adapter_layer.a1.requires_grad_(False)
    model.freeze()
    if again:
        model.remove_adapter("a1")
        model.add_adapter("a1", adapter_config())
    else:
        model.rename_adapter("a1", "b1")
    model.unfreeze(partial=True)
    for host in hosts(model).values():
        for name, adapter in host.adapter_layer.items():
            assert all(p.requires_grad == (name != "b1") for p in adapter.parameters())
