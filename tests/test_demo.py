"""The demo, smaller than it is: what it claims holds, and it fails loudly where that does not."""

from __future__ import annotations

import sys

import pytest
import safetensors.torch
import torch

from adapter_ext import demo
from adapter_ext.__main__ import main
from adapter_ext.files import read_adapters

for package in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"the demo needs {package}: pip install '.[demo]'")

SMALL = demo.Settings(
    width=64, blocks=2, base_epochs=8, adapter_epochs=4, rows=32, served=(16,), repeats=3
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def result(out):
    return demo.run(out, SMALL)


def test_every_adapter_beats_the_base(result):
    assert [domain.name for domain in result.domains] == demo.NAMES
    for domain in result.domains:
        assert 0 <= domain.base < domain.together <= 1, domain


def test_trained_alone_is_the_same_to_rounding(result):
    for domain in result.domains:
        assert domain.difference <= demo.TOLERANCE, domain
        assert domain.alone == pytest.approx(domain.together, abs=1 / 599 + 1e-9), domain


def test_served_at_once_is_the_loop_to_rounding(result):
    (timing,) = result.timings
    assert timing.samples == 16
    assert min(timing.base, timing.routed, timing.loop) > 0
    assert timing.difference <= demo.TOLERANCE


def test_files_hold_the_state_dict_names(result, out):
    assert [file.name for file in result.files] == [f"{n}.safetensors" for n in demo.NAMES]
    assert result.files[3].parent == out / "adapters"
    assert read_adapters(result.files[3]).adapters.keys() == {"inverted"}
    tensors = safetensors.torch.load_file(result.files[3])
    assert tensors.keys() == {
        f"blocks.{block}.adapter_layer.inverted.module.{weight}"
        for block in range(SMALL.blocks)
        for weight in ("0.weight", "0.bias", "1.weight", "3.weight")
    }
    assert all(float(t.abs().max()) > 0 for t in tensors.values())


def test_figure(result, out):
    assert result.figure == out / "accuracy.png"
    assert result.figure.read_bytes().startswith(b"\x89PNG")


def test_it_leaves_the_threads_as_they_were(monkeypatch, set_num_threads, tmp_path):
    def fail(out, settings):
        assert torch.get_num_threads() == 1
        raise demo.DemoError

    monkeypatch.setattr(demo, "_run", fail)
    set_num_threads(2)
    with pytest.raises(demo.DemoError):
        demo.run(tmp_path)
    assert torch.get_num_threads() == 2


def row(**changes):
    return demo.DomainResult("noisy", 0.5, 0.9, 0.9, 1e-6)._replace(**changes)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (row(base=0.9), "no better"),
        (row(alone=0.45), "no better"),
        (row(alone=0.88), "another when it is trained alone"),
        (row(difference=2e-3), "another when it is trained alone"),
        (row(difference=float("nan")), "another when it is trained alone"),
    ],
)
def test_what_does_not_hold_is_an_error(wrong, words):
    demo._check_domains([row(), row(alone=0.91)], 100)
    with pytest.raises(demo.DemoError, match=f"noisy.*{words}"):
        demo._check_domains([row(), wrong], 100)


def test_other_weights_in_the_files_are_noticed(result):
    base = demo.Network({"width": SMALL.width, "blocks": SMALL.blocks})
    network = demo._with_adapters(base, demo.NAMES, SMALL)
    _, digits = demo._load_digits(SMALL.seed)
    with pytest.raises(demo.DemoError, match="other outputs"):
        demo._check_files(base, network, result.files, digits)


def test_failure_is_an_exit_status(monkeypatch, capsys, tmp_path):
    def fail(out, settings):
        assert (out, settings.seed) == (tmp_path, 7)
        raise demo.DemoError("it does not hold")

    monkeypatch.setattr(demo, "run", fail)
    assert main(["demo", "--out", str(tmp_path), "--seed", "7"]) == 1
    assert capsys.readouterr().err == "demo: it does not hold\n"


def test_missing_package_names_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "needs sklearn" in (error := capsys.readouterr().err)
    assert "pip install '.[demo]'" in error


def test_a_folder_that_cant_be_made_is_an_error_before_any_training(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "_run", None)
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("demo: ")
    assert str(tmp_path / "file") in error
    assert len(error.splitlines()) == 1
