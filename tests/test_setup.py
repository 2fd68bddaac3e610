"""What setup.py finds out before it builds."""

from __future__ import annotations

import pathlib
import runpy

import pytest
from simt.build import REPOSITORY

setuptools = pytest.importorskip("setuptools")


@pytest.mark.parametrize("release", ["12.9", "11.8"])
def test_an_old_nvcc_is_refused(
    release: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its compiler would fail later, at a file that tells nobody what is wrong."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        f'#!/bin/sh\necho "#$ TOP={tmp_path}"\necho "Cuda compilation tools, release {release}, '
        f'V{release}.41"\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("ADAPTER_EXT_CUDA", raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    options = runpy.run_path(str(REPOSITORY / "setup.py"))["cuda_options"]
    with pytest.raises(SystemExit, match=rf"13 or later, got {release}; ADAPTER_EXT_CUDA=0"):
        options()
    monkeypatch.setenv("ADAPTER_EXT_CUDA", "0")
    assert options() == [
        "-DADAPTER_EXT_NVCC=",
        "-DADAPTER_EXT_NVCC_VERSION=",
        "-DADAPTER_EXT_CUDA_ARCHS=",
    ]
    nvcc.write_text(nvcc.read_text().replace(release, "13.0"))
    monkeypatch.setenv("ADAPTER_EXT_CUDA", "1")
    assert f"-DADAPTER_EXT_NVCC={nvcc}" in options()
