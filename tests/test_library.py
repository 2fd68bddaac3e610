"""A native library that does not load is an ImportError that says what to do."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from adapter_ext import _C, _library


def import_copy(
    folder: pathlib.Path,
    damage: str,
    damaged: pathlib.Path = _library.CPU_LIBRARY,
) -> str:
    """Imports a damaged copy of the package in a new process; returns what it prints to stderr."""
    copy = folder / "adapter_ext"
    native = _library.CPU_LIBRARY.parent
    shutil.copytree(pathlib.Path(_library.__file__).parent, copy)
    files = [_library.CPU_LIBRARY, pathlib.Path(_C.__file__), native / "built_with.txt"]
    for file in (*files, _library.CUDA_LIBRARY):
        if file is not None:
            shutil.copy(file, copy)
    library = copy / damaged.name
    if damage == "overwritten":
        library.write_bytes(b"no library" * 500)
    elif damage == "empty":
        library.write_bytes(b"")
    elif damage == "missing":
        library.unlink()
    process = subprocess.run(
        [sys.executable, "-c", "import adapter_ext; print(adapter_ext.__file__)"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        check=False,
    )
    assert (process.returncode == 0) == (damage == "none"), process.stderr
    return process.stderr


def test_copy_loads(tmp_path: pathlib.Path) -> None:
    assert "ImportError" not in import_copy(tmp_path, "none")


@pytest.mark.parametrize("damage", ["overwritten", "empty"])
def test_damaged_library(tmp_path: pathlib.Path, damage: str) -> None:
    message = import_copy(tmp_path, damage)
    for words in ("ImportError", "does not load", "against torch", "running: torch", "pip install"):
        assert words in message


@pytest.mark.skipif(
    _library.CUDA_LIBRARY is None, reason="torch is a CPU build, or the CUDA library was not built"
)
@pytest.mark.parametrize("damage", ["overwritten", "empty", "missing"])
def test_damaged_cuda_library(tmp_path: pathlib.Path, damage: str) -> None:
    message = import_copy(tmp_path, damage, _library.CUDA_LIBRARY)
    for words in ("ImportError", "does not load", "libadapter_ext_cuda.so", "against torch"):
        assert words in message
    assert ("(missing)" in message) == (damage == "missing")
