"""Adapter files: round trips, NeMo's layout, atomic writing, damaged and hostile files."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pickle
import random
import signal
import stat
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Dict, List, Optional, Union  # noqa: UP035

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf, open_dict

from adapter_ext import (
    AdapterModuleMixin,
    AdapterModuleUtil,
    LinearAdapterConfig,
    files,
    instantiate,
    load_adapters,
    register_target,
    save_adapters,
    torch_file,
)
from adapter_ext.files import (
    AdapterFile,
    FileError,
    SavedAdapter,
    atomic_write,
    read_adapters,
    write_adapters,
)
from adapter_ext.names import check_adapter_name
from adapter_ext.registry import targets_of_a_file

SUFFIXES = [".pt", ".safetensors"]
NEMO_TARGET = "nemo.collections.common.parts.adapter_modules.LinearAdapter"


def config(**others):
    return {"_target_": NEMO_TARGET, "in_features": 3, "dim": 2, "enabled": True, **others}


def adapter(name="fr", module="encoder", paths=("encoder.0", "encoder.1"), **others):
    states = [{"module.0.weight": torch.randn(2, 3), "module.1.bias": torch.ones(3)} for _ in paths]
    return SavedAdapter(name, module, config(), list(paths), states, **others)


def content(*adapters, **global_config):
    return AdapterFile({a.name: a for a in adapters or (adapter(),)}, global_config)


def assert_same(left: AdapterFile, right: AdapterFile) -> None:
    assert left.global_config == right.global_config
    assert list(left.adapters) == list(right.adapters)
    for a, b in zip(left.adapters.values(), right.adapters.values(), strict=True):
        assert replace(a, states=[]) == replace(b, states=[])
        assert [state.keys() for state in a.states] == [state.keys() for state in b.states]
        for one, other in zip(a.states, b.states, strict=True):
            for key, tensor in one.items():
                assert tensor.dtype == other[key].dtype
                assert tensor.shape == other[key].shape
                assert torch.equal(tensor, other[key])
                assert other[key].is_contiguous()


# --- Round trips ----------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda text: "${" not in text and text != "???"
)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(texts.filter(lambda key: key != "_target_"), inner, max_size=3)
    ),
    max_leaves=8,
)
identifiers = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True)
dotted = st.lists(identifiers, min_size=1, max_size=3).map(".".join)


def is_name(name: str) -> bool:
    try:
        check_adapter_name(name)
    except ValueError:
        return False
    return True


names = st.text(min_size=1, max_size=5).filter(is_name)


DTYPES = sorted(
    (d for d in torch_file._DTYPES if d is not torch.bool and not d.is_complex), key=str
)


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    tensor = torch.arange(max(1, torch.Size(shape).numel())).to(dtype)[: torch.Size(shape).numel()]
    return (tensor / 3).to(dtype).reshape(shape)


@st.composite
def contents(draw):
    chosen = draw(st.lists(names, max_size=3, unique_by=str.casefold))
    adapters = []
    for name in chosen:
        count = draw(st.integers(1, 3))
        paths = st.lists(st.just("") | dotted, min_size=count, max_size=count, unique=True)
        adapters.append(
            SavedAdapter(
                name=name,
                module="+".join(draw(st.lists(dotted, max_size=2))),
                config={
                    **draw(st.dictionaries(texts, plain, max_size=3)),
                    "_target_": draw(dotted.filter(lambda path: "adapter_ext" not in path)),
                    "enabled": draw(st.booleans()),
                },
                paths=draw(st.none() | paths),
                states=draw(
                    st.lists(
                        st.dictionaries(dotted, tensors(), max_size=3),
                        min_size=count,
                        max_size=count,
                    )
                ),
            )
        )
    settings_of_all = draw(st.dictionaries(texts, plain, max_size=2))
    settings_of_all.pop("adapter_meta_cfg", None)
    settings_of_all.pop("_target_", None)
    return AdapterFile({a.name: a for a in adapters}, settings_of_all)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@settings(max_examples=60)
@given(given_content=contents())
def test_round_trips(folder, given_content):
    previous = given_content
    for number, suffix in enumerate([".pt", ".safetensors", ".pt"]):
        path = folder / f"{number}{suffix}"
        write_adapters(path, previous)
        previous = read_adapters(path)
        assert_same(given_content, previous)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("module", ["layers.0", "0", "encoder.blocks.11+decoder-2"])
def test_modules_in_containers_have_numbers(module, suffix, tmp_path):
    """An adapter at such a place could be added and trained, and was then refused."""
    written = content(replace(adapter(paths=["layers.0"]), module=module))
    write_adapters(tmp_path / f"x{suffix}", written)
    assert read_adapters(tmp_path / f"x{suffix}").adapters["fr"].module == module


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_as_many_tensors_as_are_written_are_read(suffix, tmp_path):
    """A .pt file of more than some 30,000 tensors was written, and could not be read."""
    states = [{f"{i}.weight": torch.tensor([float(i)]) for i in range(20_000)} for _ in range(2)]
    saved = replace(adapter(paths=["a", "b"]), states=states)
    write_adapters(tmp_path / f"x{suffix}", content(saved))
    read = read_adapters(tmp_path / f"x{suffix}").adapters["fr"].states
    assert [state.keys() for state in read] == [state.keys() for state in states]
    assert all(state[f"{i}.weight"] == i for state in read for i in range(20_000))


def test_what_could_not_be_read_replaces_nothing(tmp_path, monkeypatch):
    """Whatever the reader refuses is found before the old file is gone."""
    path = tmp_path / "x.pt"
    write_adapters(path, content(adapter()))
    before = path.read_bytes()
    monkeypatch.setattr("adapter_ext.torch_file._MAX_INSTRUCTIONS", 100)
    with pytest.raises(FileError, match=r"x\.pt can't be written: its pickle has more than 100"):
        write_adapters(path, content(adapter()))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


class Versioned(torch.nn.Module):
    """Of the default version, 1."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))


class Upgraded(Versioned):
    """Version 2 of the module above, in which ten times the weight does the same."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if (local_metadata.get("version") or 0) < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 10
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


class UpgradedAdapter(torch.nn.Module, AdapterModuleUtil):
    def __init__(self, adapter_strategy=None):
        super().__init__()
        self.inner = torch.nn.Sequential(Upgraded())
        self.setup_adapter_strategy(adapter_strategy)

    def forward(self, x):
        return self.inner[0].weight * x


class Host(torch.nn.Module, AdapterModuleMixin):
    pass


@pytest.mark.parametrize("map_location", [None, "cpu"])
@pytest.mark.parametrize("converted", SUFFIXES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_adapter_of_the_newest_version_is_not_upgraded(
    suffix, converted, map_location, tmp_path
):
    """Adapter files lost the versions of modules, so that weights changed with each loading."""
    register_target(UpgradedAdapter, "test_files.UpgradedAdapter")
    model = torch.nn.Sequential(Host(), Host())
    for host in model:
        host.add_adapter("fr", {"_target_": "test_files.UpgradedAdapter"})
    save_adapters(model, tmp_path / f"x{suffix}")
    read = read_adapters(tmp_path / f"x{suffix}", map_location=map_location)
    write_adapters(tmp_path / f"y{converted}", read)
    restored = torch.nn.Sequential(Host(), Host())
    load_adapters(restored, tmp_path / f"y{converted}")
    expected = model[0].adapter_layer["fr"].state_dict()._metadata
    for host, state in zip(restored, read.adapters["fr"].states, strict=True):
        assert host.adapter_layer["fr"].inner[0].weight.tolist() == [1, 1, 1]
        assert state._metadata == expected


def test_versions_in_a_pt_file_are_named_as_torch_names_them(tmp_path):
    """By paths that begin as the keys do; those of other adapters are not this one's."""
    layers = torch.nn.ModuleDict({"fr": torch.nn.Sequential(Upgraded()), "de": Upgraded()})
    state = layers["fr"].state_dict()
    write_adapters(tmp_path / "x.pt", content(replace(adapter(paths=[""]), states=[state])))
    written = torch.load(tmp_path / "x.pt", weights_only=False)["encoder:fr"][0]
    assert written._metadata == {"fr": {"version": 1}, "fr.0": {"version": 2}}
    state = layers.state_dict()
    del state["de.weight"]
    torch.save(saved(fr=[state]), tmp_path / "x.pt")
    read = read_adapters(tmp_path / "x.pt").adapters["fr"].states[0]
    assert read._metadata == {"": {"version": 1}, "0": {"version": 2}}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_malformed_versions_are_named(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    for metadata, words in [
        ([], "_metadata must be a dict, got list"),
        ({"a": 2}, "module path, got int for 'a'"),
        ({"a": {"version": 1.5}}, "version of module 'a' must be an int or a str, got float"),
    ]:
        malformed = replace(adapter(paths=["e"]), states=[noted(metadata)])
        where = "adapter 'fr', module 'e'"
        with pytest.raises(FileError, match=f"can't be written: {where}: .*{words}"):
            write_adapters(path, content(malformed))
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_without_versions(suffix, tmp_path):
    """Those that were written before versions were, and NeMo's."""
    old = torch_file(saved()) if suffix == ".pt" else safetensors_file()
    (tmp_path / f"x{suffix}").write_bytes(old)
    for _ in range(2):
        read = read_adapters(tmp_path / f"x{suffix}")
        assert not hasattr(read.adapters["fr"].states[0], "_metadata")
        write_adapters(tmp_path / f"x{suffix}", read)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".PT", ".SafeTensors"])
def test_what_is_written_is_its_own(suffix, tmp_path):
    """Views, transposes, parameters and shared tensors are written as what they are."""
    weight = torch.nn.Parameter(torch.randn(4, 4))
    state = {"a": weight, "b": weight.t()[1:3], "c": weight, "d": weight[::2, 1]}
    saved = replace(adapter(paths=[""]), states=[state])
    write_adapters(tmp_path / f"x{suffix}", content(saved))
    read = read_adapters(tmp_path / f"x{suffix}").adapters["fr"].states[0]
    for key, tensor in state.items():
        assert torch.equal(read[key], tensor)
        assert not read[key].requires_grad
    assert (tmp_path / f"x{suffix}").stat().st_size < 8000


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parameters_that_look_like_others(suffix, tmp_path):
    """Names that are parts of each other, of layers and of parameters."""
    adapters = [
        replace(adapter(name, "", [""]), states=[{key: torch.full((2,), value)}])
        for name, key, value in [
            ("a1", "a1.weight", 1.0),
            ("a10", "a1.weight", 2.0),
            ("module", "module.module.0", 3.0),
            ("weight", "adapter_layer.a1.weight", 4.0),
            ("1", "a1", 5.0),
        ]
    ]
    write_adapters(tmp_path / f"x{suffix}", content(*adapters))
    assert_same(content(*adapters), read_adapters(tmp_path / f"x{suffix}"))


def test_keys_are_those_of_the_model(tmp_path):
    write_adapters(tmp_path / "x.safetensors", content(adapter(paths=["", "encoder.0"])))
    assert sorted(safetensors.torch.load_file(tmp_path / "x.safetensors")) == [
        "adapter_layer.fr.module.0.weight",
        "adapter_layer.fr.module.1.bias",
        "encoder.0.adapter_layer.fr.module.0.weight",
        "encoder.0.adapter_layer.fr.module.1.bias",
    ]


def test_map_location(tmp_path):
    write_adapters(tmp_path / "x.pt", content())
    read = read_adapters(tmp_path / "x.pt", map_location="meta")
    assert read.adapters["fr"].states[0]["module.0.weight"].is_meta


def test_other_suffix(tmp_path):
    for call in (lambda p: write_adapters(p, content()), read_adapters):
        with pytest.raises(ValueError, match=r"\.safetensors or \.pt"):
            call(tmp_path / "x.bin")
    assert not list(tmp_path.iterdir())


def test_missing_file_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_adapters(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError):
        write_adapters(tmp_path / "none" / "x.pt", content())
    (tmp_path / "y.pt").mkdir()
    with pytest.raises(IsADirectoryError):
        read_adapters(tmp_path / "y.pt")


@pytest.mark.parametrize("place", ["none/x.pt", "file/x.pt", "folder.pt"])
def test_an_error_names_the_file_that_could_not_be_written(place, tmp_path, monkeypatch):
    """It named a hidden temporary file, of which nobody had heard."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(OSError) as expected:  # noqa: PT011 - of each kind its own
        open(place, "wb").close()
    with pytest.raises(type(expected.value)) as raised:
        write_adapters(place, content())
    assert (raised.value.errno, raised.value.filename) == (expected.value.errno, place)
    assert str(raised.value) == str(expected.value)
    assert sorted(os.listdir()) == ["file", "folder.pt"]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(FileError, match="no regular file"):
        read_adapters(tmp_path / "x.pt")


# --- NeMo's layout --------------------------------------------------------------------------------


def nemo_file(**more):
    """What NeMo's save_adapters passes to torch.save; the model's configuration comes along."""
    model = OmegaConf.create(
        {
            "train_ds": {"manifest": "???", "home": "${oc.env:HOME}"},
            "adapters": {
                "global_cfg": {
                    "check_encoder_adapter": True,
                    "adapter_meta_cfg": {"modules": {"a1": "encoder", "a10": ""}},
                },
            },
        }
    )
    with open_dict(model):
        model.adapters.a1 = OmegaConf.structured(LinearAdapterConfig(in_features=3, dim=2))
        model.adapters.a10 = OmegaConf.create(config())
    with open_dict(model.adapters.a1):
        model.adapters.a1.enabled = True
    weights = [torch.randn(2), torch.randn(2)]
    return {
        "encoder:a1": [{"a1.module.0.weight": w, "a1.module.0.bias": -w} for w in weights],
        "__cfg__": model.adapters,
        **more,
    }


def test_nemo_file(tmp_path):
    saved = nemo_file(a10=[{"a10.module.0.weight": torch.ones(2)}])
    torch.save(saved, tmp_path / "x.pt")
    read = read_adapters(tmp_path / "x.pt")
    assert [a.qualified for a in read.adapters.values()] == ["encoder:a1", "a10"]
    assert read.global_config == {"check_encoder_adapter": True}
    a1 = read.adapters["a1"]
    assert a1.paths is None
    assert a1.config == {
        "in_features": 3,
        "dim": 2,
        "activation": "swish",
        "norm_position": "pre",
        "dropout": 0.0,
        "adapter_strategy": {
            "stochastic_depth": 0.0,
            "l2_lambda": 0.0,
            "_target_": "adapter_ext.strategies.ResidualAddAdapterStrategy",
        },
        "_target_": "adapter_ext.adapters.LinearAdapter",
        "enabled": True,
    }
    for state, written in zip(a1.states, saved["encoder:a1"], strict=True):
        assert state.keys() == {"module.0.weight", "module.0.bias"}
        assert torch.equal(state["module.0.weight"], written["a1.module.0.weight"])


@dataclass
class ConfigOfAUser:
    in_features: int = 3
    optional: Optional[int] = None  # noqa: UP045 - what OmegaConf pickles differs
    by_name: Dict[str, int] = field(default_factory=dict)  # noqa: UP006
    sizes: List[List[int]] = field(default_factory=lambda: [[1], [2, 3]])  # noqa: UP006
    number: Union[int, str] = "x"  # noqa: UP007
    _target_: str = "x.Y"


def test_structured_configurations(tmp_path, monkeypatch):
    """Typed values are read; of dataclasses only NeMo's and ours may be named."""
    path = tmp_path / "x.pt"
    structured = saved(__cfg__=OmegaConf.create({"fr": OmegaConf.structured(ConfigOfAUser)}))
    with monkeypatch.context() as renamed:
        renamed.setattr(ConfigOfAUser, "__module__", "nemo.x")
        for module in ("nemo", "nemo.x"):
            renamed.setitem(sys.modules, module, ModuleType(module))
        sys.modules["nemo.x"].ConfigOfAUser = ConfigOfAUser
        torch.save(structured, path)
    assert read_adapters(path).adapters["fr"].config == {
        "in_features": 3,
        "optional": None,
        "by_name": {},
        "sizes": [[1], [2, 3]],
        "number": "x",
        "_target_": "x.Y",
        "enabled": True,
    }
    torch.save(structured, path)
    with pytest.raises(FileError, match=r"ConfigOfAUser.*plain values"):
        read_adapters(path)


def test_nemo_saves_names_with_the_name_in_them(tmp_path):
    saved = nemo_file()
    saved["encoder:a1"][0]["a10.module.0.weight"] = torch.ones(2)
    torch.save(saved, tmp_path / "x.pt")
    read = read_adapters(tmp_path / "x.pt")
    assert list(read.adapters) == ["a1"]
    assert read.adapters["a1"].states[0].keys() == {"module.0.weight", "module.0.bias"}


def test_nemo_reads_it(tmp_path):
    """NeMo unpickles everything, and finds the adapters by qualified name, the classes by path."""
    ours = replace(
        adapter(),
        config={
            "_target_": "adapter_ext.LinearAdapter",
            "adapter_strategy": {
                "_target_": "adapter_ext.strategies.ReturnResultAdapterStrategy",
            },
            "others": [{"_target_": "adapter_ext.ResidualAddAdapterStrategy"}, "adapter_ext.x"],
        },
    )
    write_adapters(tmp_path / "x.pt", content(ours, adapter("de", ""), check=1))
    read = torch.load(tmp_path / "x.pt", weights_only=False)
    assert list(read) == ["encoder:fr", "de", "__cfg__", "__module_paths__"]
    assert list(read["encoder:fr"][1]) == ["fr.module.0.weight", "fr.module.1.bias"]
    strategies = "nemo.core.classes.mixins.adapter_mixin_strategies"
    assert OmegaConf.to_container(read["__cfg__"]) == {
        "fr": {
            "_target_": NEMO_TARGET,
            "adapter_strategy": {"_target_": f"{strategies}.ReturnResultAdapterStrategy"},
            "others": [{"_target_": f"{strategies}.ResidualAddAdapterStrategy"}, "adapter_ext.x"],
            "enabled": True,
        },
        "de": config(),
        "global_cfg": {
            "check": 1,
            "adapter_meta_cfg": {"modules": {"fr": "encoder", "de": ""}},
        },
    }


# --- Atomic writing -------------------------------------------------------------------------------

WRITE_UNTIL_KILLED = """
import os, sys, time
import torch
from adapter_ext.files import AdapterFile, SavedAdapter, write_adapters

def fsync(descriptor):
    print("written", flush=True)
    time.sleep(600)

os.fsync = fsync
state = {"weight": torch.zeros(1000)}
adapter = SavedAdapter("new", "", {"_target_": "x.Y"}, [""], [state])
write_adapters(sys.argv[1], AdapterFile({"new": adapter}, {}))
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_killed_while_saving(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    old = content()
    write_adapters(path, old)
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_UNTIL_KILLED, path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert_same(old, read_adapters(path))
    assert len(list(tmp_path.iterdir())) == 2  # the temporary file, which nobody could remove
    write_adapters(path, content(adapter("new")))
    assert list(read_adapters(path).adapters) == ["new"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failing_while_saving(suffix, function, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    path = tmp_path / f"x{suffix}"
    old = content()
    write_adapters(path, old)
    with monkeypatch.context() as patched:
        patched.setattr(os, function, fail)
        with pytest.raises(OSError, match="No space left"):
            write_adapters(path, content(adapter("new")))
    assert_same(old, read_adapters(path))
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_keeps_modes_and_links(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    before = os.umask(0o027)
    try:
        with atomic_write(link) as file:
            file.write(b"new")
            assert not target.exists()
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    target.chmod(0o604)
    with atomic_write(target) as file:
        file.write(b"newer")
    assert stat.S_IMODE(target.stat().st_mode) == 0o604
    with pytest.raises(TypeError), atomic_write(target) as file:
        file.write(b"half" + "a str")
    assert target.read_bytes() == b"newer"
    assert len(list(tmp_path.iterdir())) == 2


# --- Content that is refused when writing, and when reading ---------------------------------------


class Subclass(torch.Tensor):
    """As DTensor and quantised weights: it is more than the values that it has as a tensor."""


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def with_config(**others):
    return content(replace(adapter(), config=config(**others)))


def with_tensor(tensor):
    return content(replace(adapter(paths=["e.0"]), states=[{"module.0.weight": tensor}]))


REFUSED_CONTENT = {
    **{
        f"name {name!r}": (content(adapter(name)), "name|reserved")
        for name in [
            *("../x", "a.b", "a:b", "a+b", "", "global_cfg", "__cfg__", "__module_paths__"),
            *("keys", "training", "a\nb", "a\x1b[2J", "\ud800"),
        ]
    },
    "names that differ by case": (content(adapter("fr"), adapter("FR")), "'fr'.*'FR'.*case"),
    "names that differ": (AdapterFile({"de": adapter("fr")}, {}), "'de'.*'fr'"),
    **{
        f"module {module!r}": (content(adapter(module=module)), "'fr'.*module")
        for module in ["../x", "a:b", "a+", "+", ".a", "a.", "a\n", None, 3]
    },
    **{
        f"paths {paths!r}": (content(replace(adapter(), paths=paths)), "'fr'.*path")
        for paths in [["a"], ["a", "a"], ["a", "b.."], ["a", "/b."], ["a", None], ["\n", "a"], "ab"]
    },
    "no states": (content(replace(adapter(), paths=None, states=[])), "'fr'.*states"),
    "interpolation": (with_config(dim="${oc.env:HOME}"), "'fr'.*interpolations"),
    "resolver": (with_config(a=[{"b": "x ${eval:1+1}"}]), "'fr'.*interpolations"),
    "reference": (with_config(a="${dim}"), "'fr'.*interpolations"),
    "interpolation in a key": (with_config(a={"${oc.env:HOME}": 1}), "'fr'.*interpolations"),
    "missing value": (with_config(dim="???"), "'fr'.*missing"),
    "not a number": (with_config(dropout=float("nan")), "'fr'.*finite"),
    "infinite number": (with_config(dropout=float("inf")), "'fr'.*finite"),
    "huge number": (with_config(dim=10**30), "'fr'.*too big"),
    "object in the config": (with_config(dim=b"x"), "'fr'.*bytes"),
    "key that is no str": (with_config(a={1: 2}), "'fr'.*keys"),
    "deep config": (with_config(a=nested(40)), "'fr'.*deep"),
    "very deep config": (with_config(a=nested(500)), "'fr'.*deep"),
    "wide config": (with_config(a=[0] * 200_000), "'fr'.*values"),
    "surrogate": (with_config(a="\udc80"), "'fr'.*valid text"),
    "no _target_": (content(replace(adapter(), config={"dim": 1})), "'fr'.*_target_"),
    "_target_ with a call": (with_config(_target_="os.system('x')"), "'fr'.*_target_"),
    "_target_ that is no str": (with_config(_target_=["os", "system"]), "'fr'.*_target_"),
    "nested _target_": (with_config(adapter_strategy={"_target_": "a;b"}), "'fr'.*_target_"),
    "enabled that is no bool": (with_config(enabled="yes"), "'fr'.*enabled"),
    "metadata in the global config": (content(adapter_meta_cfg={}), "global_cfg"),
    "interpolation in the global config": (content(a="${b}"), "global_cfg.*interpolations"),
    "NaN": (with_tensor(torch.tensor([1.0, float("nan")])), r"'fr'.*'e\.0'.*weight.*finite"),
    "inf": (with_tensor(torch.tensor([float("inf")]).half()), r"'fr'.*'e\.0'.*weight.*finite"),
    "complex": (with_tensor(torch.ones(2, dtype=torch.complex64)), r"'fr'.*'e\.0'.*complex"),
    "sparse": (with_tensor(torch.ones(2).to_sparse()), r"'fr'.*'e\.0'.*dense"),
    "no tensor": (with_tensor([1.0]), r"'fr'.*'e\.0'.*list"),
    "expanded": (with_tensor(torch.ones(1).expand(2**40)), r"'fr'.*'e\.0'.*values"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_deepest_config_is_written_and_read(suffix, tmp_path):
    """The configuration is at level 0, the number in the lists at level 32."""
    path = tmp_path / f"x{suffix}"
    write_adapters(path, with_config(a=nested(31)))
    assert read_adapters(path).adapters["fr"].config["a"] == nested(31)
    with pytest.raises(FileError, match=r"'fr'.*nested more than 32 levels deep"):
        write_adapters(path, with_config(a=nested(32)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tensors_of_another_class_are_not_written(suffix, tmp_path):
    with pytest.raises(FileError, match=r"'e\.0'.*Subclass.*plain tensor"):
        write_adapters(tmp_path / f"x{suffix}", with_tensor(Subclass(torch.ones(2))))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("case", REFUSED_CONTENT)
def test_is_not_written(case, suffix, tmp_path):
    refused, words = REFUSED_CONTENT[case]
    with pytest.raises(FileError, match=f"(?s)can't be written.*({words})"):
        write_adapters(tmp_path / f"x{suffix}", refused)
    assert not list(tmp_path.iterdir())


def test_a_parameter_that_could_be_anothers(tmp_path):
    outer = replace(adapter("a", "", [""]), states=[{"b.adapter_layer.a.c": torch.ones(1)}])
    both = replace(
        outer, paths=["", "adapter_layer.a.b"], states=[*outer.states, {"c": torch.ones(1)}]
    )
    write_adapters(tmp_path / "x.pt", content(both))
    with pytest.raises(FileError, match="several"):
        write_adapters(tmp_path / "x.safetensors", content(both))


# What a program could not write in a format, or would write as something acceptable.
NOT_EXPRESSIBLE = {
    ".pt": [
        *("names that differ", "metadata in the global config", "expanded"),
        *("very deep config", "_target_ that is no str"),
    ],
    ".safetensors": [
        *("names that differ", "name 'a.b'", "name '../x'", "name '\\ud800'"),
        *("paths ['a']", "paths ['a', None]", "paths 'ab'", "no states"),
        *("not a number", "infinite number", "object in the config", "key that is no str"),
        *("complex", "sparse", "no tensor", "expanded"),
    ],
}


@pytest.mark.parametrize(
    ("case", "suffix"),
    [
        (case, suffix)
        for suffix in SUFFIXES
        for case in REFUSED_CONTENT
        # OmegaConf takes half a minute to write that one.
        if case not in NOT_EXPRESSIBLE[suffix] and (case, suffix) != ("wide config", ".pt")
    ],
)
def test_is_not_read(case, suffix, tmp_path, monkeypatch):
    """The same content, written by a program that does not check it."""
    path = tmp_path / f"x{suffix}"
    with monkeypatch.context() as careless:
        careless.setattr(files, "_checked", lambda content: content)
        careless.setattr(files, "_with_tensors", lambda content, change: content)
        careless.setattr(files, "read_torch_file", lambda file, values: None)
        write_adapters(path, REFUSED_CONTENT[case][0])
    with pytest.raises(FileError, match=r"x\.(pt|safetensors): "):
        read_adapters(path)


# --- Damaged files --------------------------------------------------------------------------------


def damaged_contents():
    return content(adapter(), adapter("de", "", [""]), check=True)


@pytest.fixture(scope="module", params=SUFFIXES)
def whole_file(request, folder):
    path = folder / f"whole{request.param}"
    write_adapters(path, damaged_contents())
    return path, path.read_bytes(), read_adapters(path)


def test_truncated_files(whole_file, tmp_path):
    path, data, _ = whole_file
    target = tmp_path / path.name
    for size in [*range(0, len(data), max(1, len(data) // 50)), 1, 7, 8, 9, len(data) - 1]:
        target.write_bytes(data[:size])
        with pytest.raises(FileError, match=path.name):
            read_adapters(target)


def test_corrupted_files(whole_file, tmp_path):
    path, data, original = whole_file
    target = tmp_path / path.name
    choose = random.Random(1)
    refused = 0
    positions = choose.choices(range(len(data)), k=600)
    for position in positions:
        corrupted = bytearray(data)
        corrupted[position] ^= choose.randrange(1, 256)
        target.write_bytes(corrupted)
        try:
            read = read_adapters(target)
        except FileError:
            refused += 1
        else:
            assert_same(original, read)
    assert refused > 300


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_wrong_kinds(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    legacy = io.BytesIO()
    torch.save({"a": torch.ones(2)}, legacy, _use_new_zipfile_serialization=False)
    state_dict = io.BytesIO()
    torch.save({"a": torch.ones(2)}, state_dict)
    script = io.BytesIO()
    with zipfile.ZipFile(script, "w") as archive:
        archive.writestr("x/constants.pkl", b"x")
    kinds = {
        "empty": b"",
        "text": b"adapters: none\n" * 10,
        "zeros": bytes(10_000),
        "legacy torch file": legacy.getvalue(),
        "state dict": state_dict.getvalue(),
        "another zip": script.getvalue(),
        "pickle": pickle.dumps({"__cfg__": {}}),
        "safetensors of a model": safetensors.torch.save({"a": torch.ones(2)}, {"format": "pt"}),
        "safetensors without metadata": safetensors.torch.save({"a": torch.ones(2)}),
    }
    for data in kinds.values():
        path.write_bytes(data)
        with pytest.raises(FileError, match=rf"x{suffix}: it (is|holds)"):
            read_adapters(path)


# --- Hostile files --------------------------------------------------------------------------------


class Gadget:
    """Unpickles to whatever a call returns: the call is made, if anything makes it."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def touch(marker):
    return Gadget(os.system, f"touch {marker}")


def saved(**others):
    """The parts of an honest .pt file, to be made worse."""
    return {
        "fr": [{"fr.weight": torch.ones(2)}],
        "__cfg__": {"fr": config(), "global_cfg": {"adapter_meta_cfg": {"modules": {"fr": ""}}}},
        "__module_paths__": {"fr": ["encoder"]},
        **others,
    }


def torch_file(value):
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def of_pickle(instructions: bytes, **entries: bytes):
    """A file in torch.save's format with this pickle."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("x/data.pkl", instructions)
        for name, value in entries.items():
            archive.writestr(f"x/data/{name[1:]}", value)
    return data.getvalue()


def omegaconf_with(marker):
    """OmegaConf objects are set up by their attributes: one of them is the gadget."""
    made = OmegaConf.create(saved()["__cfg__"], flags={"allow_objects": True})
    return made, touch(marker)


def in_attribute(name):
    def build(marker):
        made, gadget = omegaconf_with(marker)
        made.__dict__[name] = gadget
        return torch_file(saved(__cfg__=made))

    return build


def in_node_value(marker):
    made, gadget = omegaconf_with(marker)
    made.fr._get_node("dim").__dict__["_val"] = gadget
    return torch_file(saved(__cfg__=made))


def in_metadata(marker):
    made, gadget = omegaconf_with(marker)
    made._metadata.object_type = gadget
    return torch_file(saved(__cfg__=made))


class Hooked:
    """A tensor whose pickle has a gadget among the arguments of the function that rebuilds it."""

    def __init__(self, gadget, position):
        self.gadget, self.position = gadget, position

    def __reduce__(self):
        function, arguments = torch.ones(2).__reduce_ex__(2)
        arguments = list(arguments)
        arguments[self.position] = self.gadget
        return function, tuple(arguments)


DICT_CONFIG = b"comegaconf.dictconfig\nDictConfig\n"


def renamed_global(marker):
    """posix.system by name, in each instruction that can name it."""
    command = f"touch {marker}".encode()
    return b"cposix\nsystem\n(X" + struct.pack("<I", len(command)) + command + b"tR."


def storage_claiming(count):
    return of_pickle(
        b"\x80\x02}X\x02\x00\x00\x00fr(ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
        b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + pickle.dumps(count, 2)[2:-1]
        + b"tQK\x00(K\x02t(K\x01t\x89ccollections\nOrderedDict\n)RtRs.",
        _0=bytes(8),
    )


class Viewed:
    """A tensor of the given geometry over a storage of two values."""

    def __init__(self, offset, size, stride):
        self.geometry = offset, size, stride

    def __reduce__(self):
        function, arguments = torch.ones(2).__reduce_ex__(2)
        return function, (arguments[0], *self.geometry, *arguments[4:])


def with_state(tensor):
    return torch_file(saved(fr=[{"fr.weight": tensor}]))


def with_cfg(**others):
    return torch_file(saved(__cfg__={**saved()["__cfg__"], **others}))


def noted(metadata):
    state = OrderedDict({"fr.weight": torch.ones(0)})
    state._metadata = metadata
    return state


def bomb_of_lists(_):
    level = ["lol"]
    for _level in range(25):
        level = [level] * 20
    return with_cfg(fr=config(bomb=level))


def bomb_of_keys(_):
    key = ()
    for _level in range(100):
        key = (key, key)
    # Pickled by hand: to put it into a dict takes as long here as it would there.
    return of_pickle(b"\x80\x02}" + pickle.dumps(key, 2)[2:-1] + b"K\x01s.")


def cycle(_):
    made = OmegaConf.create(saved()["__cfg__"])
    made.fr.__dict__["_content"]["a"] = made.fr
    return torch_file(saved(__cfg__=made))


def zip_with(change, *, data=None):
    """An honest file's entries, written again with something changed."""

    def build(_):
        result = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(data or torch_file(saved()))) as old,
            zipfile.ZipFile(result, "w") as new,
        ):
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
            change(new, old)
        return result.getvalue()

    return build


def twice(new, old):
    name = next(name for name in old.namelist() if name.endswith("data.pkl"))
    with pytest.warns(UserWarning, match="Duplicate"):
        new.writestr(name, old.read(name))


def compressed(new, old):
    root = old.namelist()[0].partition("/")[0]
    new.writestr(f"{root}/data/9", bytes(300 * 2**20), zipfile.ZIP_DEFLATED)


def outside(name):
    return lambda new, old: new.writestr(name, b"x")


def claimed_size(_):
    """An entry that claims, in both directories of the zip, more bytes than there are."""
    data = bytearray(torch_file(saved()))
    position = data.rindex(b"PK\x01\x02")
    struct.pack_into("<II", data, position + 20, 2**31, 2**31)
    return bytes(data)


def safetensors_file(metadata=None, tensors=None, **changes):
    """An honest file with changed metadata, without a checksum."""
    entry = {"module": "", "paths": ["e"], "config": config()}
    honest = {
        "format": "adapter_ext",
        "format_version": "1",
        "adapters": json.dumps({"fr": {**entry, **changes}}),
        "global_cfg": "{}",
        **(metadata or {}),
    }
    tensors = tensors or {"e.adapter_layer.fr.weight": torch.ones(2)}
    return safetensors.torch.save(tensors, honest)


def raw_safetensors(header, values=b"", size=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if size is None else size) + header + values


def twice_in_the_header():
    data = safetensors_file()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    entry = header[header.index(b'"e.adapter') : -1]
    return raw_safetensors(header[:-1] + b"," + entry + b"}", data[8 + size :])


def tensor_in_header(**changes):
    data = safetensors_file()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["e.adapter_layer.fr.weight"].update(changes)
    return raw_safetensors(header, data[8 + size :])


HOSTILE = {
    # name: (suffix, bytes of the file given the path of the marker, words of the message)
    "gadget: the file": (".pt", lambda m: torch_file(touch(m)), "system"),
    "gadget: an adapter": (".pt", lambda m: torch_file(saved(fr=touch(m))), "system"),
    "gadget: a state": (".pt", lambda m: torch_file(saved(fr=[touch(m)])), "system"),
    "gadget: a tensor": (".pt", lambda m: with_state(touch(m)), "system"),
    "gadget: another key": (".pt", lambda m: torch_file(saved(zz=touch(m))), "system"),
    "gadget: a key": (".pt", lambda m: torch_file({touch(m): 1, **saved()}), "system"),
    "gadget: the paths": (".pt", lambda m: torch_file(saved(__module_paths__=touch(m))), "system"),
    "gadget: the config": (".pt", lambda m: torch_file(saved(__cfg__=touch(m))), "system"),
    "gadget: an adapter's config": (".pt", lambda m: with_cfg(fr=touch(m)), "system"),
    "gadget: a value of the config": (".pt", lambda m: with_cfg(fr=config(a=touch(m))), "system"),
    "gadget: OmegaConf's content": (".pt", in_attribute("_content"), "system"),
    "gadget: OmegaConf's parent": (".pt", in_attribute("_parent"), "system"),
    "gadget: OmegaConf's class": (".pt", in_attribute("__class__"), "system"),
    "gadget: OmegaConf's method": (".pt", in_attribute("__setstate__"), "system"),
    "gadget: OmegaConf's value": (".pt", in_node_value, "system"),
    "gadget: OmegaConf's type": (".pt", in_metadata, "system"),
    **{
        f"gadget: argument {position} of a tensor": (
            ".pt",
            lambda m, position=position: with_state(Hooked(touch(m), position)),
            "system",
        )
        for position in range(6)
    },
    "gadget: eval": (".pt", lambda m: with_state(Gadget(eval, f"open({m!r}, 'w')")), "eval"),
    "gadget: exec": (".pt", lambda m: with_state(Gadget(exec, f"open({m!r}, 'w')")), "exec"),
    "gadget: getattr": (".pt", lambda m: with_state(Gadget(getattr, "x", "upper")), "getattr"),
    "gadget: import": (".pt", lambda m: with_state(Gadget(__import__, "antigravity")), "import"),
    "gadget: a file opened": (".pt", lambda m: with_state(Gadget(open, m, "w")), "open"),
    "gadget: a process": (
        ".pt",
        lambda m: with_state(Gadget(subprocess.Popen, ["touch", m])),
        "Popen",
    ),
    "gadget: torch.load": (".pt", lambda m: with_state(Gadget(torch.load, m)), "torch"),
    "gadget: a torch function": (
        ".pt",
        lambda m: with_state(Gadget(torch.hub.load, "x", "y")),
        "torch.hub",
    ),
    "gadget: OmegaConf's constructor": (
        ".pt",
        lambda m: torch_file(saved(__cfg__=Gadget(type(OmegaConf.create({})), {}))),
        "DictConfig",
    ),
    "gadget: OmegaConf.load": (
        ".pt",
        lambda m: torch_file(saved(__cfg__=Gadget(OmegaConf.load, m))),
        "getattr|omegaconf",
    ),
    "gadget: a module made": (
        ".pt",
        lambda m: of_pickle(b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}b."),
        "Linear",
    ),
    "omegaconf: made with arguments": (
        ".pt",
        lambda m: of_pickle(DICT_CONFIG + b"}\x85\x81."),
        "DictConfig",
    ),
    "omegaconf: without content": (
        ".pt",
        lambda m: of_pickle(b"}X\x07\x00\x00\x00__cfg__" + DICT_CONFIG + b")\x81s."),
        "DictConfig has no content",
    ),
    "omegaconf: attributes twice": (
        ".pt",
        lambda m: of_pickle(DICT_CONFIG + b")\x81}K\x01K\x01sb}b."),
        "twice",
    ),
    "omegaconf: attributes of a type": (
        ".pt",
        lambda m: of_pickle(DICT_CONFIG + b"}b."),
        "sets attributes",
    ),
    "omegaconf: attributes that are no dict": (
        ".pt",
        lambda m: of_pickle(DICT_CONFIG + b")\x81]b."),
        "dict expected",
    ),
    "omegaconf: items set": (
        ".pt",
        lambda m: of_pickle(DICT_CONFIG + b")\x81K\x01K\x02s."),
        "dict expected",
    ),
    "gadget: by name": (".pt", lambda m: of_pickle(renamed_global(m)), "system"),
    "gadget: protocol 0": (
        ".pt",
        lambda m: of_pickle(pickle.dumps(saved(fr=1, __cfg__=touch(m)), 0)),
        "MARK|DICT|instruction|system",
    ),
    "gadget: protocol 4": (
        ".pt",
        lambda m: of_pickle(pickle.dumps(saved(fr=1, __cfg__=touch(m)), 4)),
        "instruction",
    ),
    "gadget: INST": (".pt", lambda m: of_pickle(b"(S'x'\nios\nsystem\n."), "instruction"),
    "gadget: extension": (".pt", lambda m: of_pickle(b"\x82\x01."), "instruction|corrupted"),
    "pickle: empty": (".pt", lambda m: of_pickle(b""), "corrupted"),
    "pickle: no STOP": (".pt", lambda m: of_pickle(b"\x80\x02}"), "corrupted"),
    "pickle: empty stack": (".pt", lambda m: of_pickle(b"."), "incomplete"),
    "pickle: pop from nothing": (".pt", lambda m: of_pickle(b"ts."), "corrupted"),
    "pickle: huge memo": (".pt", lambda m: of_pickle(b"}r\xff\xff\xff\xff."), "no adapters"),
    "pickle: memo of nothing": (".pt", lambda m: of_pickle(b"h\x05."), "corrupted"),
    "pickle: huge string": (".pt", lambda m: of_pickle(b"X\xff\xff\xff\xffa."), "corrupted"),
    "pickle: too many": (".pt", lambda m: of_pickle(b"]" * 4_100_000 + b"."), "instructions"),
    "pickle: too big": (".pt", lambda m: of_pickle(bytes(65 * 2**20)), "limit"),
    "pickle: duplicate keys": (".pt", lambda m: of_pickle(b"}K\x01K\x01sK\x01K\x02s."), "twice"),
    "pickle: keys that share": (".pt", bomb_of_keys, "key of type tuple"),
    "pickle: a cycle": (".pt", cycle, "deep"),
    "config: billion laughs": (".pt", bomb_of_lists, "values"),
    "gadget: a state's notes": (
        ".pt",
        lambda m: torch_file(saved(fr=[noted({"fr": {"version": touch(m)}})])),
        "system",
    ),
    "versions: no dict": (".pt", lambda m: torch_file(saved(fr=[noted([])])), "got list"),
    "versions: a list": (
        ".pt",
        lambda m: torch_file(saved(fr=[noted({"fr": {"version": [2]}})])),
        "module 'fr'.*got list",
    ),
    "versions: shared": (
        ".pt",
        lambda m: torch_file(
            saved(fr=list(map(noted, [{f"{i}": {} for i in range(3000)}] * 3000)))
        ),
        "more than 600000",
    ),
    "tensors: shared": (
        ".pt",
        lambda m: torch_file(saved(fr=[{f"fr.{i}": torch.ones(0) for i in range(3000)}] * 3000)),
        "more than 600000",
    ),
    "json: a version that is none": (
        ".safetensors",
        lambda m: safetensors_file(versions=[{"": [2]}]),
        "'fr', module 'e': the version of module ''.*got list",
    ),
    "json: versions of other states": (
        ".safetensors",
        lambda m: safetensors_file(versions=[None, None]),
        "versions of adapter 'fr' are those of 2 states; it has 1",
    ),
    "json: versions that are no list": (
        ".safetensors",
        lambda m: safetensors_file(versions={"": 1}),
        "versions of adapter 'fr': a list was expected, got dict",
    ),
    "json: versions in a list": (
        ".safetensors",
        lambda m: safetensors_file(versions=[[1]]),
        "versions of adapter 'fr': a dict was expected, got list",
    ),
    "tensor: storage claims 2**40 values": (".pt", lambda m: storage_claiming(2**40), "claims"),
    "tensor: storage claims -2 values": (".pt", lambda m: storage_claiming(-2), "claims"),
    "tensor: stride 0": (".pt", lambda m: with_state(Viewed(0, (2**40,), (0,))), "claims"),
    "tensor: stride beyond": (".pt", lambda m: with_state(Viewed(0, (2,), (2**40,))), "claims"),
    "tensor: offset beyond": (".pt", lambda m: with_state(Viewed(2**40, (2,), (1,))), "claims"),
    "tensor: negative offset": (".pt", lambda m: with_state(Viewed(-1, (2,), (1,))), "malformed"),
    "tensor: negative size": (".pt", lambda m: with_state(Viewed(0, (-2,), (1,))), "malformed"),
    "tensor: size that is no number": (
        ".pt",
        lambda m: with_state(Viewed(0, ("2",), (1,))),
        "malformed",
    ),
    "tensor: strides missing": (".pt", lambda m: with_state(Viewed(0, (2,), ())), "corrupted"),
    "zip: data.pkl twice": (".pt", zip_with(twice), "twice"),
    "zip: compressed bomb": (".pt", zip_with(compressed), "compressed"),
    "zip: absolute path": (".pt", zip_with(outside("/etc/x")), "no place"),
    "zip: parent path": (".pt", zip_with(outside("archive/../../x")), "no place"),
    "zip: another folder": (".pt", zip_with(outside("other/data.pkl")), "no place"),
    "zip: claimed size": (".pt", claimed_size, "claim|corrupted"),
    "keys: qualified twice": (
        ".pt",
        lambda m: torch_file(saved(**{"encoder:fr": [{}]})),
        "two|'fr'.*'encoder'",
    ),
    "keys: another module": (
        ".pt",
        lambda m: torch_file({"a:fr": [{}], "__cfg__": saved()["__cfg__"]}),
        "'fr'.*'a'",
    ),
    "keys: not in the config": (".pt", lambda m: torch_file(saved(de=[{}])), "lacks adapter 'de'"),
    "keys: of no adapter": (
        ".pt",
        lambda m: torch_file(saved(fr=[{"module.weight": torch.ones(1)}])),
        "'fr'.*'module.weight'",
    ),
    "keys: paths of no adapter": (
        ".pt",
        lambda m: torch_file(saved(__module_paths__={"de": ["x"]})),
        "'de'",
    ),
    "json: NaN": (
        ".safetensors",
        lambda m: safetensors_file({"global_cfg": '{"a": NaN}'}),
        "NaN",
    ),
    "json: too big a number": (
        ".safetensors",
        lambda m: safetensors_file({"global_cfg": '{"a": 1e999}'}),
        "finite",
    ),
    "json: thousands of digits": (
        ".safetensors",
        lambda m: safetensors_file({"global_cfg": f'{{"a": {"9" * 10_000}}}'}),
        "corrupted|too big",
    ),
    "json: duplicate adapters": (
        ".safetensors",
        lambda m: safetensors_file({"adapters": '{"fr": {}, "fr": {}}'}),
        "'fr' is there twice",
    ),
    "json: deep": (
        ".safetensors",
        lambda m: safetensors_file({"global_cfg": "[" * 100_000 + "]" * 100_000}),
        "deep",
    ),
    "json: not even that": (".safetensors", lambda m: safetensors_file({"adapters": "}"}), "JSON"),
    "json: a list": (".safetensors", lambda m: safetensors_file({"adapters": "[]"}), "object"),
    "json: an empty adapter": (
        ".safetensors",
        lambda m: safetensors_file({"adapters": '{"fr": {}}'}),
        "'fr' lacks",
    ),
    "json: names by case": (
        ".safetensors",
        lambda m: safetensors_file(
            {
                "adapters": json.dumps(
                    {n: {"module": "", "paths": ["e"], "config": config()} for n in ("fr", "FR")}
                )
            }
        ),
        "case",
    ),
    "header: duplicate tensors": (".safetensors", lambda m: twice_in_the_header(), "twice"),
    "header: 2**63 bytes": (".safetensors", lambda m: raw_safetensors({}, size=2**63), "truncated"),
    "header: too big": (
        ".safetensors",
        lambda m: raw_safetensors(b"{" + b" " * 33 * 2**20 + b"}"),
        "limit",
    ),
    "header: no UTF-8": (".safetensors", lambda m: raw_safetensors(b'{"\xff": 1}'), "corrupted"),
    "header: deep": (
        ".safetensors",
        lambda m: raw_safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "deep",
    ),
    "header: huge shape": (
        ".safetensors",
        lambda m: tensor_in_header(shape=[2**40]),
        "corrupted",
    ),
    "header: overflowing shape": (
        ".safetensors",
        lambda m: tensor_in_header(shape=[2**33, 2**33]),
        "corrupted",
    ),
    "header: offsets beyond": (
        ".safetensors",
        lambda m: tensor_in_header(shape=[2**38], data_offsets=[0, 2**40]),
        "corrupted",
    ),
    "header: another version": (
        ".safetensors",
        lambda m: safetensors_file({"format_version": "2"}),
        "version '2'",
    ),
    "header: a wrong checksum": (
        ".safetensors",
        lambda m: safetensors_file({"sha256": "0" * 64}),
        "checksum",
    ),
    "tensors: of no adapter": (
        ".safetensors",
        lambda m: safetensors_file(tensors={"e.adapter_layer.de.weight": torch.ones(1)}),
        "'e.adapter_layer.de.weight'",
    ),
    "tensors: of no module": (
        ".safetensors",
        lambda m: safetensors_file(tensors={"f.adapter_layer.fr.weight": torch.ones(1)}),
        "none of the listed",
    ),
    "tensors: a key of many parts": (
        ".safetensors",
        lambda m: safetensors_file(tensors={"adapter_layer.fr." * 10_000 + "w": torch.ones(1)}),
        "parts",
    ),
    "tensors: more states than any": (
        ".safetensors",
        lambda m: safetensors_file(paths=None, states=2**60),
        "states",
    ),
    "tensors: NaN": (
        ".safetensors",
        lambda m: safetensors_file(
            tensors={"e.adapter_layer.fr.weight": torch.tensor([float("nan")])}
        ),
        "'fr', module 'e': parameter 'weight'.*finite",
    ),
    "tensors: float8": (
        ".safetensors",
        lambda m: safetensors_file(
            tensors={"e.adapter_layer.fr.weight": torch.ones(2).to(torch.float8_e4m3fn)}
        ),
        "float8",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case, tmp_path, monkeypatch):
    # What users are told to set for NeMo's files must not matter here.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    suffix, build, words = HOSTILE[case]
    marker = tmp_path / "marker"
    path = tmp_path / f"x{suffix}"
    path.write_bytes(build(str(marker)))
    modules = set(sys.modules)
    with pytest.raises(FileError, match=f"(?s)x{suffix}: .*({words})"):
        read_adapters(path)
    assert not marker.exists()
    assert "antigravity" not in sys.modules
    assert not {name for name in set(sys.modules) - modules if "safetensors" not in name}


def test_the_gadgets_work(tmp_path):
    """Where pickle is trusted they run code: the tests above would see it."""
    ran = 0
    for number, (case, (_, build, _)) in enumerate(HOSTILE.items()):
        if case.startswith("gadget: ") and any(w in case for w in ("tensor", "config", "content")):
            marker = tmp_path / str(number)
            path = tmp_path / "x.pt"
            path.write_bytes(build(str(marker)))
            with contextlib.suppress(Exception):  # after the gadget ran
                torch.load(path, weights_only=False)
            ran += marker.exists()
    assert ran >= 8


def test_targets_are_only_names(tmp_path):
    """Files may name any class; whether it is one to make is decided without importing it."""
    targets = ["os.system", "os", "antigravity", "subprocess.Popen", "torch.nn.Linear", "eval"]
    for suffix, target in itertools.product(SUFFIXES, targets):
        for hostile in ({"_target_": target}, {"adapter_strategy": {"_target_": target}}):
            path = tmp_path / f"x{suffix}"
            write_adapters(path, with_config(**hostile))
            read = read_adapters(path).adapters["fr"].config
            assert read == config(**hostile)
            with pytest.raises(ValueError, match=f"{target}.*not reg"), targets_of_a_file():
                instantiate(read)
    assert "antigravity" not in sys.modules


READ_AND_MEASURE = """
import resource, sys
from adapter_ext.archive import read_archive
from adapter_ext.files import FileError, read_adapters, write_adapters

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

for path in sys.argv[1:]:
    before = peak()
    try:
        (read_archive if path.endswith(".nemo") else read_adapters)(path)
    except FileError:
        print(path, peak() - before)
"""


def memory_growth(paths):
    """MiB by which each file made the peak of a process grow, smaller files first."""
    shown = subprocess.run(
        [sys.executable, "-c", READ_AND_MEASURE, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    return dict(line.rsplit(" ", 1) for line in shown.splitlines())


def test_hostile_files_take_little_memory(tmp_path):
    paths = []
    for number, (suffix, build, _) in enumerate(HOSTILE.values()):
        paths.append(tmp_path / f"{number}{suffix}")
        paths[-1].write_bytes(build(str(tmp_path / "marker")))
    growth = memory_growth(paths)
    assert len(growth) == len(paths)
    assert sum(map(int, growth.values())) < 400, growth


def shared_lists(depth):
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("target", "_target_ must be a dotted name"),
        ("module", "its configuration names"),
        ("paths", "the module paths must be a list"),
        ("path", "can't be the path of a module"),
        ("enabled", "characters"),
    ],
)
def test_values_that_are_shared_without_end(kind, words, tmp_path):
    """What a file of two kilobytes held took hours, or gigabytes, to write into an error."""
    shared = shared_lists(200)
    config = {"_target_": "a.b"}
    whole = {"fr": [{}], "__cfg__": {"fr": config}}
    if kind == "target":
        config["_target_"] = shared
    elif kind == "enabled":
        config["enabled"] = ["y" * 2**20] * 90_000
    elif kind == "module":
        whole["__cfg__"]["global_cfg"] = {"adapter_meta_cfg": {"modules": {"fr": shared}}}
    else:
        whole["__module_paths__"] = {"fr": {"a": shared} if kind == "paths" else [shared]}
    torch.save(whole, tmp_path / "x.pt")
    with pytest.raises(FileError, match=words) as caught:
        read_adapters(tmp_path / "x.pt")
    assert len(str(caught.value)) < 5000


def test_states_of_all_adapters_are_limited_together(tmp_path):
    """A file of two kilobytes could claim millions of them."""
    path = tmp_path / "x.safetensors"
    names = [f"n{i}" for i in range(20)]
    listed = {
        name: {"module": "", "paths": None, "config": {"_target_": "a.b"}, "states": 60_000}
        for name in names
    }
    metadata = {"format": "adapter_ext", "format_version": "1", "global_cfg": "{}"}
    safetensors.torch.save_file({}, path, {**metadata, "adapters": json.dumps(listed)})
    with pytest.raises(FileError, match="adapter 'n1' has 60000 states"):
        read_adapters(path)


@pytest.mark.parametrize("limit", [5_000, 50_000, 200_000])
def test_an_error_of_the_disk_is_an_os_error(limit, tmp_path):
    """torch.save replaced it by one of its own."""
    program = f"""
import resource, signal, sys, torch
from adapter_ext import archive, files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = {{str(i): torch.zeros(500) for i in range(300)}}
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
one = files.SavedAdapter("fr", "", {{"_target_": "a.b"}}, [""], [state])
writers = [
    lambda: files.write_adapters("x.pt", files.AdapterFile({{"fr": one}}, {{}})),
    lambda: files.write_adapters("x.safetensors", files.AdapterFile({{"fr": one}}, {{}})),
    lambda: archive.write_archive("x.nemo", {{}}, state),
]
for write in writers:
    try:
        write()
    except OSError as error:
        print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["OSError"] * 3
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(OSError, match="not a regular file"):
        write_adapters(tmp_path / "x.pt", content(adapter()))
    assert stat.S_ISFIFO((tmp_path / "x.pt").stat().st_mode)


class Renamed(Versioned):
    """Version 2 of the module above, whose weight was called otherwise."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if (local_metadata.get("version") or 0) < 2:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}old")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


class RenamedAdapter(UpgradedAdapter):
    def __init__(self, adapter_strategy=None):
        super().__init__(adapter_strategy)
        self.inner = torch.nn.Sequential(Renamed())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_state_of_an_older_version_with_other_keys(suffix, tmp_path):
    """Its keys were compared before the module could upgrade it."""
    register_target(RenamedAdapter, "test_files.RenamedAdapter")
    state = OrderedDict({"inner.0.old": torch.full((3,), 5.0)})
    state._metadata = OrderedDict({"": {"version": 1}, "inner.0": {"version": 1}})
    config = {"_target_": "test_files.RenamedAdapter"}
    write_adapters(
        tmp_path / f"x{suffix}",
        AdapterFile({"fr": SavedAdapter("fr", "", config, [""], [state])}, {}),
    )
    host = Host()
    load_adapters(host, tmp_path / f"x{suffix}")
    assert host.adapter_layer["fr"].inner[0].weight.tolist() == [5, 5, 5]
