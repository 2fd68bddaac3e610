"""``python -m adapter_ext doctor``: the facts for a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import subprocess
import sys
import types

import pytest
import torch

import adapter_ext
from adapter_ext import _C, _library, doctor
from adapter_ext.__main__ import main


def test_report():
    facts = doctor.report()
    assert all(isinstance(fact, str) and fact for fact in facts.values()), facts
    assert facts["adapter_ext"] == importlib.metadata.version("adapter_ext")
    assert facts["torch running"] == torch.__version__
    assert facts["torch built against"] == _C.torch_version
    assert facts["threads"].startswith(f"{torch.get_num_threads()} ")
    assert facts["CPU library"].endswith("libadapter_ext_cpu.so, loaded")
    assert facts["CPU level in use"].split(",")[0] in facts["CPU levels compiled"].split(", ")


def test_cuda_library_not_built(monkeypatch):
    monkeypatch.setattr(_C, "cuda_compiler", "")
    fact = doctor.report()["CUDA library"]
    assert fact.startswith("not built")
    assert "ADAPTER_EXT_CUDA=1 pip install ." in fact


@pytest.mark.parametrize(
    ("library", "state"),
    [(None, "not loaded: torch is a CPU build"), (pathlib.Path("/there.so"), "/there.so, loaded")],
)
def test_cuda_library_built(monkeypatch, library, state):
    monkeypatch.setattr(_C, "cuda_compiler", "nvcc 13.0.88")
    monkeypatch.setattr(_C, "cuda_archs", ["80", "90"])
    monkeypatch.setattr(_library, "CUDA_LIBRARY", library)
    assert doctor.report()["CUDA library"] == f"built by nvcc 13.0.88 for sm 80, 90, {state}"


def test_cuda_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert doctor.report()["CUDA devices"] == "none"
    gpu = types.SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert doctor.report()["CUDA devices"] == "NVIDIA H100 (sm 90), NVIDIA H100 (sm 90)"


def test_command_prints_every_fact(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = doctor.report()
    assert len(lines) == len(facts)
    for line, (title, fact) in zip(lines, facts.items(), strict=True):
        assert line.startswith(f"{title}  ")
        assert line.endswith(f"  {fact}")


def test_a_forced_level_is_said_so():
    lowest = _C.compiled_cpu_capabilities()[0]
    shown = subprocess.run(
        [sys.executable, "-m", "adapter_ext", "doctor"],
        env={**os.environ, "ADAPTER_EXT_CPU_CAPABILITY": lowest},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    assert f"{lowest}, forced by ADAPTER_EXT_CPU_CAPABILITY" in shown


@pytest.mark.parametrize("arguments", [[], ["nurse"]])
def test_unknown_command_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "doctor" in capsys.readouterr().err


LACKING = set(_C.compiled_cpu_capabilities()) - set(_C.supported_cpu_capabilities())


@pytest.mark.parametrize("level", ["avx3", *sorted(LACKING)])
def test_a_wrong_level_is_not_said_to_be_a_library_that_does_not_load(level):
    """Nor is it to be installed again; there are the levels to choose from."""
    process = subprocess.run(
        [sys.executable, "-m", "adapter_ext", "doctor"],
        env={**os.environ, "ADAPTER_EXT_CPU_CAPABILITY": level},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == (
        "ImportError: ADAPTER_EXT_CPU_CAPABILITY: expected one of "
        f"{', '.join(_C.supported_cpu_capabilities())} (the levels that this machine has) or "
        f"nothing, got {level!r}"
    )
    assert "does not load" not in process.stderr
    assert "pip install" not in process.stderr


def test_the_version_has_a_name_and_an_option(capsys):
    assert adapter_ext.__version__ == importlib.metadata.version("adapter_ext")
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"adapter_ext {adapter_ext.__version__}\n"
