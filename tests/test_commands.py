"""``python -m adapter_ext inspect`` and ``convert``."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from test_files import adapter, assert_same, config, content

from adapter_ext import files
from adapter_ext.__main__ import main

DISABLED = files.SavedAdapter(
    "de", "", config(activation="a\x1b[2J\n", enabled=False), None, [{"w": torch.ones(3).half()}]
)


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".pt", ".pt, NeMo's"), (".safetensors", ".safetensors, format version 1")]
)
def test_inspect(suffix, kind, tmp_path, capsys):
    path = tmp_path / f"x{suffix}"
    files.write_adapters(path, content(adapter(), DISABLED))
    assert main(["inspect", str(path)]) == 0
    title, head, first, second = capsys.readouterr().out.splitlines()
    assert title.startswith(f"{path}: {kind}")
    assert head.split()[:4] == ["adapter", "module", "hosts", "paths"]
    assert " ".join(first.split()) == "fr encoder 2 known 2 - yes 18 float32 72"
    assert " ".join(second.split()) == r"de - 1 unknown 2 'a\x1b[2J\n' no 3 float16 6"


def test_inspect_makes_nothing(tmp_path):
    """It imports nothing that a file names, and can show what does not exist here."""
    path = tmp_path / "x.pt"
    odd = files.SavedAdapter("x", "a+b", {"_target_": "antigravity.X"}, None, [{}])
    files.write_adapters(path, content(odd))
    shown = subprocess.run(
        [sys.executable, "-m", "adapter_ext", "inspect", str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    assert " ".join(shown.splitlines()[2].split()) == "x a+b 1 unknown - - yes 0 - 0"


def test_convert(tmp_path):
    paths = [tmp_path / name for name in ("1.pt", "2.safetensors", "3.pt")]
    files.write_adapters(paths[0], content(adapter(), DISABLED, check=True))
    for source, target in itertools.pairwise(paths):
        assert main(["convert", str(source), str(target)]) == 0
        assert_same(files.read_adapters(source), files.read_adapters(target))


def test_convert_replaces_only_what_it_is_told_to(tmp_path, capsys):
    source, target, link = (tmp_path / name for name in ("1.pt", "2.safetensors", "3.safetensors"))
    files.write_adapters(source, content())
    target.write_bytes(b"precious")
    assert main(["convert", str(source), str(target)]) == 1
    assert "--force" in capsys.readouterr().err
    assert target.read_bytes() == b"precious"
    assert main(["convert", "--force", str(source), str(target)]) == 0
    link.symlink_to(source)
    for same in (source, link):
        assert main(["convert", "--force", str(source), str(same)]) == 1
        assert "is the file to convert" in capsys.readouterr().err
    files.read_adapters(source)


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_errors_are_messages(command, tmp_path, capsys):
    damaged, other, none = tmp_path / "x.pt", tmp_path / "x.bin", tmp_path / "none.pt"
    damaged.write_bytes(b"PK\x03\x04")
    other.write_bytes(b"x")
    out = [str(tmp_path / "out.pt")] if command == "convert" else []
    for path, words in [(damaged, "corrupted"), (other, "safetensors or"), (none, "No such file")]:
        assert main([command, str(path), *out]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith(f"{command}: ")
        assert words in shown.err
        assert len(shown.err.splitlines()) == 1
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("value", ["x" * 41, "\x1b" * 41])
def test_a_long_value_of_a_file_is_cut(value, tmp_path, capsys):
    """A table of one adapter is no page of text."""
    path = tmp_path / "x.pt"
    saved = files.SavedAdapter("de", "", config(activation=value), None, [{"w": torch.ones(3)}])
    files.write_adapters(path, content(saved))
    assert main(["inspect", str(path)]) == 0
    _, _, line = capsys.readouterr().out.splitlines()
    shown = value if value.isprintable() else repr(value)
    assert line.split()[5] == shown[:40]
