"""Archives of whole models (.nemo)."""

from __future__ import annotations

import gzip
import io
import math
import os
import random
import signal
import subprocess
import sys
import tarfile

import pytest
import torch
from omegaconf import OmegaConf
from test_files import Subclass, Upgraded, Versioned, memory_growth, noted, torch_file, touch

from adapter_ext import ModelPT
from adapter_ext.archive import read_archive, write_archive
from adapter_ext.files import FileError

CONFIG = {
    "target": "x.Model",
    "width": 4,
    "encoder": {"width": "${width}", "name": "${.width} and ${encoder.layers[0]}"},
    "layers": [1, 2.5e-5, None, True, "yes", "1e-5", "2020-01-01", "é", "", "???", "a: b\n- c"],
    "sizes": {1: "one"},
    "bound": math.inf,
}


def state():
    shared = torch.randn(3)
    return {
        "encoder.weight": torch.nn.Parameter(torch.randn(4, 3)),
        "encoder.t": torch.randn(4, 3).t(),
        "mask": torch.tensor([True, False]),
        "count": torch.tensor(3),
        "window": torch.randn(2, dtype=torch.complex64),
        "bias": torch.full((2,), float("-inf")).bfloat16(),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
        "a": shared,
        "b": shared,
    }


def assert_same_state(left, right):
    assert list(left) == list(right)
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype
        assert torch.equal(tensor, right[key]), key


def test_round_trip(tmp_path):
    written = state()
    write_archive(tmp_path / "x.nemo", CONFIG, written)
    config, read = read_archive(tmp_path / "x.nemo")
    assert config == CONFIG
    assert_same_state(written, read)
    assert not any(tensor.requires_grad for tensor in read.values())
    assert list(tmp_path.iterdir()) == [tmp_path / "x.nemo"]


def tar_of(*members, mode="w"):
    """A tar of (name, bytes) or of (TarInfo, bytes)."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name, value in members:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            if isinstance(name, str):
                member.size = len(value)
            archive.addfile(member, io.BytesIO(value))
    return data.getvalue()


YAML = OmegaConf.to_yaml(OmegaConf.create(CONFIG)).encode()
WEIGHTS = torch_file({"weight": torch.ones(2)})
# A header, and a text that is filled up to whole blocks.
CONFIG_MEMBER = tar_of(("model_config.yaml", YAML))[: 512 + -(-len(YAML) // 512) * 512]
HONEST = [("model_config.yaml", YAML), ("model_weights.ckpt", WEIGHTS)]


def directory(name):
    member = tarfile.TarInfo(name)
    member.type = tarfile.DIRTYPE
    return member, b""


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_nemo_archives(mode, prefix, tmp_path):
    """A folder, other files, either order, compressed or not."""
    members = [(f"{prefix}{name}", value) for name, value in reversed(HONEST)]
    others = [directory("."), directory("./tokenizer"), ("./tokenizer/vocab.txt", b"a")]
    (tmp_path / "x.nemo").write_bytes(tar_of(*others, *members, mode=mode))
    config, read = read_archive(tmp_path / "x.nemo")
    assert config == CONFIG
    assert_same_state({"weight": torch.ones(2)}, read)


def test_views_are_written_as_their_values(tmp_path):
    """Such archives were written, and refused when they were read."""
    views = {
        "expanded": torch.arange(2.0)[:, None].expand(2, 3),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
    }
    write_archive(tmp_path / "x.nemo", {}, views)
    _, read = read_archive(tmp_path / "x.nemo")
    assert_same_state(views, read)


def test_what_could_not_be_read_replaces_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.nemo"
    write_archive(path, {}, state())
    before = path.read_bytes()
    monkeypatch.setattr("adapter_ext.torch_file._MAX_INSTRUCTIONS", 100)
    with pytest.raises(FileError, match=r"x\.nemo can't be written: its pickle has more than 100"):
        write_archive(path, {}, state())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.nemo"]


class VersionedModel(ModelPT):
    def __init__(self, cfg, trainer=None):
        super().__init__(cfg, trainer)
        self.inner = Upgraded()


def test_a_state_of_the_newest_version_is_not_upgraded(tmp_path):
    """Archives lost the versions of modules, which then took each state for an old one."""
    model = VersionedModel({})
    model.save_to(tmp_path / "x.nemo")
    assert VersionedModel.restore_from(tmp_path / "x.nemo").inner.weight.tolist() == [1, 1, 1]
    _, read = read_archive(tmp_path / "x.nemo")
    assert read._metadata == model.state_dict()._metadata
    with tarfile.open(tmp_path / "x.nemo") as archive:
        weights = io.BytesIO(archive.extractfile("./model_weights.ckpt").read())
    assert torch.load(weights, weights_only=True)._metadata == model.state_dict()._metadata


def test_a_state_of_an_old_or_unknown_version_is_upgraded(tmp_path):
    old, unknown = Versioned().state_dict(prefix="inner."), {"inner.weight": torch.ones(3)}
    for state in (old, unknown):
        write_archive(tmp_path / "x.nemo", {}, state)
        assert VersionedModel.restore_from(tmp_path / "x.nemo").inner.weight.tolist() == [10] * 3
    assert not hasattr(read_archive(tmp_path / "x.nemo")[1], "_metadata")


def test_of_a_state_dicts_notes_the_versions_alone_are_kept(tmp_path):
    """With assign_to_params_buffers a file would put its tensors in place of the parameters."""
    notes = {"version": 2, "assign_to_params_buffers": True, "other": [1]}
    state = noted({"": notes, "a": {}, "b": {"version": "2.1"}})
    kept = {"": {"version": 2}, "a": {"version": None}, "b": {"version": "2.1"}}
    write_archive(tmp_path / "ours.nemo", {}, state)
    (tmp_path / "theirs.nemo").write_bytes(with_weights(state))
    for name in ("ours", "theirs"):
        assert read_archive(tmp_path / f"{name}.nemo")[1]._metadata == kept


MALFORMED = [
    ([], "_metadata must be a dict, got list"),
    ({1: {"version": 1}}, "module path, got dict for 1"),
    ({"a": 2}, "module path, got int for 'a'"),
    ({"a": {"version": 1.5}}, "version of module 'a' must be an int or a str, got float"),
    ({"a": {"version": True}}, "version of module 'a' must be an int or a str, got bool"),
    ({"a": {"version": torch.ones(1)}}, "version of module 'a'.*got Tensor"),
]


@pytest.mark.parametrize(("metadata", "words"), MALFORMED)
def test_malformed_versions_are_named(metadata, words, tmp_path):
    state = noted(metadata)
    path = tmp_path / "x.nemo"
    with pytest.raises(FileError, match=rf"x\.nemo can't be written: .*{words}"):
        write_archive(path, {}, state)
    assert not list(tmp_path.iterdir())
    path.write_bytes(with_weights(state))
    with pytest.raises(FileError, match=rf"x\.nemo: .*{words}"):
        read_archive(path)


def test_a_configuration_of_a_thousand_adapters(tmp_path):
    # OmegaConf 2.4 reads no YAML of more than 10,000 values, unless told to.
    adapters = {f"a{i}": {f"key{j}": j for j in range(10)} for i in range(1000)}
    path = tmp_path / "many.nemo"
    write_archive(path, {"adapters": adapters}, {"w": torch.ones(1)})
    config, _ = read_archive(path)
    assert config == {"adapters": adapters}


def test_ordinary_tools_read_it(tmp_path):
    written = state()
    write_archive(tmp_path / "x.nemo", CONFIG, written)
    with tarfile.open(tmp_path / "x.nemo") as archive:
        archive.extractall(tmp_path, filter="data")
    loaded = OmegaConf.load(tmp_path / "model_config.yaml")
    assert OmegaConf.to_container(loaded, resolve=False) == CONFIG
    assert_same_state(written, torch.load(tmp_path / "model_weights.ckpt", weights_only=True))


@pytest.mark.parametrize(
    ("config", "weights", "words"),
    [
        ({"a": "${oc.env:HOME}"}, {}, "references"),
        ({"a": object()}, {}, "object"),
        ({1: 2}, {}, "str"),
        ({}, {"a": 1}, "'a'"),
        ({}, {1: torch.ones(1)}, "1"),
        ({}, {"a": torch.ones(2).to_sparse()}, "dense"),
        ({}, {"a": torch.ones(2, device="meta")}, "dense"),
        ({}, {"a": torch.ones(2).to(torch.float8_e4m3fn)}, "float8"),
        ({}, {"a": Subclass(torch.ones(2))}, "Subclass.*plain tensor"),
    ],
)
def test_is_not_written(config, weights, words, tmp_path):
    with pytest.raises(FileError, match=f"can't be written.*{words}"):
        write_archive(tmp_path / "x.nemo", config, weights)
    assert not list(tmp_path.iterdir())


WRITE_UNTIL_KILLED = """
import os, sys, time
import torch
from adapter_ext.archive import write_archive

def fsync(descriptor):
    print("written", flush=True)
    time.sleep(600)

os.fsync = fsync
write_archive(sys.argv[1], {}, {"weight": torch.zeros(1000)})
"""


def test_killed_while_saving(tmp_path):
    path = tmp_path / "x.nemo"
    written = state()
    write_archive(path, CONFIG, written)
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_UNTIL_KILLED, path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert_same_state(written, read_archive(path)[1])


def test_failing_while_saving(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.nemo"
    written = state()
    write_archive(path, CONFIG, written)
    for module, function in [(os, "replace"), (os, "fsync"), (torch, "save")]:
        with monkeypatch.context() as patched:
            patched.setattr(module, function, fail)
            with pytest.raises(OSError, match="No space left"):
                write_archive(path, {}, {})
        assert_same_state(written, read_archive(path)[1])
        assert list(tmp_path.iterdir()) == [path]


def test_missing_file_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_archive(tmp_path / "x.nemo")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_truncated_archives(mode, tmp_path):
    data = tar_of(*HONEST, mode=mode)
    path = tmp_path / "x.nemo"
    # A tar ends in blocks of zeros, which nobody needs.
    end = len(data) - (len(data.rstrip(b"\0")) < len(data)) * 9000
    for size in range(0, end, max(1, end // 40)):
        path.write_bytes(data[:size])
        with pytest.raises(FileError, match=r"x\.nemo"):
            read_archive(path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_corrupted_archives(mode, tmp_path):
    """The weights have checksums; the text of the configuration has one in a gzipped tar only."""
    data = tar_of(*HONEST, mode=mode)
    path = tmp_path / "x.nemo"
    choose = random.Random(1)
    for position in choose.choices(range(len(data)), k=300):
        corrupted = bytearray(data)
        corrupted[position] ^= choose.randrange(1, 256)
        path.write_bytes(corrupted)
        try:
            _, read = read_archive(path)
        except FileError:
            continue
        assert_same_state({"weight": torch.ones(2)}, read)


# --- Hostile archives -----------------------------------------------------------------------------


def with_yaml(text):
    return tar_of(("model_config.yaml", text.encode()), HONEST[1])


def with_weights(value):
    return tar_of(HONEST[0], ("model_weights.ckpt", torch_file(value)))


def special(name, kind, **attributes):
    member = tarfile.TarInfo(name)
    member.type = kind
    for key, value in attributes.items():
        setattr(member, key, value)
    return member, b""


def claiming(size, name="model_weights.ckpt", kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.type = kind
    member.size = size
    header = member.tobuf(tarfile.GNU_FORMAT)
    return CONFIG_MEMBER + header + bytes(1024)


def laughs():
    lines = ["a0: &a0 [lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    return "\n".join(lines)


def gzip_bomb():
    member = tarfile.TarInfo("model_weights.ckpt")
    member.size = 2**31
    data = io.BytesIO()
    with gzip.open(data, "wb", compresslevel=1) as file:
        file.write(CONFIG_MEMBER)
        file.write(member.tobuf())
        for _ in range(300):
            file.write(bytes(2**20))
    return data.getvalue()


HOSTILE = {
    "name: absolute": (lambda m: tar_of(*HONEST, (m, b"x")), "outside"),
    "name: parent": (lambda m: tar_of(*HONEST, ("../marker", b"x")), "outside"),
    "name: parent inside": (lambda m: tar_of(*HONEST, ("a/../../marker", b"x")), "outside"),
    "name: parent of the weights": (
        lambda m: tar_of(HONEST[0], ("../model_weights.ckpt", WEIGHTS)),
        "outside",
    ),
    "name: backslashes": (lambda m: tar_of(*HONEST, ("..\\marker", b"x")), "outside"),
    "name: a drive": (lambda m: tar_of(*HONEST, ("C:/marker", b"x")), "outside"),
    "name: an absolute folder": (lambda m: tar_of(*HONEST, directory("/etc")), "outside"),
    "twice: the configuration": (lambda m: tar_of(*HONEST, HONEST[0]), "twice"),
    "twice: the weights": (
        lambda m: tar_of(*HONEST, ("./model_weights.ckpt", WEIGHTS)),
        "twice",
    ),
    "type: a symbolic link": (
        lambda m: tar_of(
            HONEST[0], special("model_weights.ckpt", tarfile.SYMTYPE, linkname="/etc/passwd")
        ),
        "no regular file",
    ),
    "type: a hard link": (
        lambda m: tar_of(*HONEST, special("other", tarfile.LNKTYPE, linkname="model_weights.ckpt")),
        "no regular file",
    ),
    "type: a device": (
        lambda m: tar_of(*HONEST, special("zero", tarfile.CHRTYPE, devmajor=1, devminor=5)),
        "no regular file",
    ),
    "type: a pipe": (lambda m: tar_of(*HONEST, special("p", tarfile.FIFOTYPE)), "no regular file"),
    "size: 2**40 bytes": (lambda m: claiming(2**40), "claims|corrupted"),
    "size: negative": (lambda m: claiming(-1024), "impossible|corrupted"),
    "size: a name of 2**40 bytes": (
        lambda m: claiming(2**40, "x", tarfile.GNUTYPE_LONGNAME),
        "corrupted|claims|no model_weights",
    ),
    "size: a header of 2**40 bytes": (
        lambda m: claiming(2**40, "x", tarfile.XHDTYPE),
        "corrupted|claims|no model",
    ),
    "size: sparse": (lambda m: claiming(2**40, "x", tarfile.GNUTYPE_SPARSE), "no regular file"),
    "size: gzip bomb": (lambda m: gzip_bomb(), "claims|expands"),
    "size: many members": (
        lambda m: tar_of(*HONEST, *((f"{n}", b"") for n in range(10_001))),
        "members",
    ),
    "kind: empty": (lambda m: b"", "empty"),
    "kind: text": (lambda m: b"hello" * 1000, "corrupted"),
    "kind: a tar of something else": (lambda m: tar_of(("x", b"x")), "no model_config"),
    "kind: no weights": (lambda m: tar_of(HONEST[0]), "no model_weights"),
    "kind: only gzip": (lambda m: gzip.compress(b"x" * 1000), "corrupted"),
    "kind: weights that are text": (
        lambda m: tar_of(HONEST[0], ("model_weights.ckpt", b"x")),
        "torch.save",
    ),
    "yaml: billion laughs": (lambda m: with_yaml(laughs()), "aliases"),
    "yaml: an anchor": (lambda m: with_yaml("a: &x 1"), "anchors"),
    "yaml: itself": (lambda m: with_yaml("a: &x [*x]"), "anchors"),
    "yaml: a tag": (
        lambda m: with_yaml(f"a: !!python/object/apply:os.system ['touch {m}']"),
        "tag",
    ),
    "yaml: a path": (
        lambda m: with_yaml("a: !!python/object/apply:pathlib.PosixPath [/etc]"),
        "tag",
    ),
    "yaml: a module": (lambda m: with_yaml("a: !!python/module:antigravity"), "tag"),
    "yaml: environment": (lambda m: with_yaml("a: ${oc.env:HOME}"), "references"),
    "yaml: a resolver": (lambda m: with_yaml("a: [{b: 'x ${eval:1+1} y'}]"), "references"),
    "yaml: a resolver in a key": (lambda m: with_yaml("${oc.env:HOME}: 1"), "references"),
    "yaml: a nested resolver": (lambda m: with_yaml("a: oc.env\nb: ${${a}:HOME}"), "references"),
    "yaml: a hidden resolver": (lambda m: with_yaml("b: '$${a}{oc.env:HOME}'"), "references"),
    "yaml: an escaped resolver": (lambda m: with_yaml(r'b: "\x24{oc.env:HOME}"'), "references"),
    "yaml: deep": (lambda m: with_yaml("a: " + "[" * 5000 + "]" * 5000), "deep"),
    "yaml: deeper": (
        lambda m: with_yaml("a:\n" + "\n".join(" " * n + "a:" for n in range(200))),
        "deep",
    ),
    "yaml: wide": (lambda m: with_yaml("a: [" + "1," * 150_000 + "]"), "values"),
    "yaml: too big": (lambda m: with_yaml("a: " + "x" * 17 * 2**20), "bytes"),
    "yaml: duplicate keys": (lambda m: with_yaml("a: 1\na: 2"), "duplicate"),
    "yaml: a list": (lambda m: with_yaml("[1]"), "mapping"),
    "yaml: a word": (lambda m: with_yaml("hello"), "mapping"),
    "yaml: nothing": (lambda m: with_yaml(""), "is empty"),
    "yaml: two documents": (lambda m: with_yaml("a: 1\n---\nb: 1"), "corrupted"),
    "yaml: a key that is no str": (lambda m: with_yaml("1: 2"), "str"),
    "yaml: binary": (
        lambda m: tar_of(("model_config.yaml", b"a: \xff"), HONEST[1]),
        "corrupted",
    ),
    "weights: a gadget": (lambda m: with_weights(touch(m)), "system"),
    "weights: a gadget's value": (lambda m: with_weights({"w": touch(m)}), "system"),
    "weights: a gadget's key": (lambda m: with_weights({touch(m): 1}), "system"),
    "weights: a gadget's notes": (
        lambda m: with_weights(noted(touch(m))),
        "system",
    ),
    "weights: a gadget for a version": (
        lambda m: with_weights(noted({"": {"version": touch(m)}})),
        "system",
    ),
    "weights: no tensor": (lambda m: with_weights({"w": 1}), "'w'"),
    "weights: nested": (lambda m: with_weights({"w": {"a": torch.ones(1)}}), "'w'"),
    "weights: a list": (lambda m: with_weights([torch.ones(1)]), "list"),
    "weights: a configuration": (
        lambda m: with_weights({"w": OmegaConf.create({"a": "${oc.env:HOME}"})}),
        "'w'",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    build, words = HOSTILE[case]
    marker = tmp_path / "marker"
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "x.nemo").write_bytes(build(str(marker)))
    with pytest.raises(FileError, match=rf"(?s)x\.nemo.*({words})"):
        read_archive(folder / "x.nemo")
    assert not marker.exists()
    assert os.listdir(folder) == ["x.nemo"]
    assert "antigravity" not in sys.modules


def weights_that_expand(megabytes, times):
    """A gzipped archive of so many megabytes, which expands to so many times as much."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "noise": torch.randint(256, (megabytes * 2**20,), dtype=torch.uint8, generator=generator),
        "zeros": torch.zeros((times - 1) * megabytes * 2**20, dtype=torch.uint8),
    }
    return tar_of(HONEST[0], ("model_weights.ckpt", torch_file(weights)), mode="w:gz")


def test_weights_may_be_compressed_but_not_without_bound(tmp_path):
    path = tmp_path / "x.nemo"
    path.write_bytes(weights_that_expand(4, times=10))
    assert read_archive(path)[1]["zeros"].numel() == 36 * 2**20
    path.write_bytes(weights_that_expand(1, times=50))
    with pytest.raises(FileError, match=r"claims|expands"):
        read_archive(path)


def test_other_resolvers_do_not_run(tmp_path):
    """Not even those of the program that reads the file."""
    called = []
    OmegaConf.register_new_resolver("adapter_ext_test", lambda *a: called.append(a), replace=True)
    try:
        (tmp_path / "x.nemo").write_bytes(with_yaml("a: ${adapter_ext_test:1}"))
        with pytest.raises(FileError, match="references"):
            read_archive(tmp_path / "x.nemo")
    finally:
        OmegaConf.clear_resolver("adapter_ext_test")
    assert not called


def test_hostile_archives_take_little_memory(tmp_path):
    paths = []
    for number, (build, _) in enumerate(HOSTILE.values()):
        paths.append(tmp_path / f"{number}.nemo")
        paths[-1].write_bytes(build(str(tmp_path / "marker")))
    growth = memory_growth(paths)
    assert len(growth) == len(paths)
    assert sum(map(int, growth.values())) < 400, growth
