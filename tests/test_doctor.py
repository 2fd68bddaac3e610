"""``python -m adapter_ext doctor``: the facts for a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch

from adapter_ext import _C, doctor
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
