"""What setup.py finds out before it builds."""

from __future__ import annotations

import pathlib
import runpy
import sys
from typing import Any

import pytest
from simt.build import REPOSITORY

setuptools = pytest.importorskip("setuptools")


def of_setup(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function or class of setup.py, which builds nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return runpy.run_path(str(REPOSITORY / "setup.py"))[name]


def program(path: pathlib.Path, text: str = "exit 0") -> pathlib.Path:
    """Writes a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("release", ["12.9", "11.8"])
def test_an_old_nvcc_is_refused(
    release: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its compiler would fail later, at a file that tells nobody what is wrong."""
    nvcc = program(
        tmp_path / "bin" / "nvcc",
        f'echo "#$ TOP={tmp_path}"\necho "Cuda compilation tools, release {release}, '
        f'V{release}.41"',
    )
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("ADAPTER_EXT_CUDA", raising=False)
    options = of_setup("cuda_options", monkeypatch)
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


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_cuda_home_without_nvcc_hides_no_other(
    variable: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it is looked for on PATH, and in the wheel."""
    find_nvcc = of_setup("find_nvcc", monkeypatch)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages")])
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert find_nvcc() is None
    for folder in ("packages/nvidia/cu13/bin", "path", "home/bin"):  # the last one found is best
        nvcc = program(tmp_path / folder / "nvcc")
        assert find_nvcc() == str(nvcc)


def test_a_second_build_installs_nothing_of_the_first(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a removed module, or the CUDA library of a build that had one."""
    build = of_setup("PackageBuild", monkeypatch)(setuptools.Distribution({"packages": []}))
    build.build_lib = str(tmp_path / "lib")
    build.ensure_finalized()
    build.run()
    stale = tmp_path / "lib" / "adapter_ext" / "libadapter_ext_cuda.so"
    objects = tmp_path / "temp" / "cmake" / "kernel.o"
    for file in (stale, objects):
        file.parent.mkdir(parents=True)
        file.touch()
    build.run()
    assert not stale.parent.exists()
    assert objects.exists()


def test_a_missing_build_tool_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_tools = of_setup("check_tools", monkeypatch)
    for tool in ("cmake", "ninja"):
        program(tmp_path / tool)
    for name in ("torch", "pybind11"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    check_tools()
    (tmp_path / "cmake").unlink()
    (tmp_path / "pybind11" / "__init__.py").unlink()
    (tmp_path / "pybind11").rmdir()
    sys.path_importer_cache.pop(str(tmp_path), None)
    with pytest.raises(SystemExit, match=r"needs pybind11, cmake, .* pip install pybind11 cmake$"):
        check_tools()


def test_a_missing_compiler_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CMake has said so in many lines, and Python has nothing to add to them."""
    cmake = of_setup("cmake", monkeypatch)
    program(tmp_path / "cmake", "exit $1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    cmake("configuring", "0")
    with pytest.raises(SystemExit, match=r"a C\+\+ compiler, expected c\+\+ or g\+\+ or clang"):
        cmake("configuring", "1")
    monkeypatch.setenv("CXX", "icpx -O3")
    with pytest.raises(SystemExit, match=r"a C\+\+ compiler, expected icpx on PATH"):
        cmake("configuring", "1")
    program(tmp_path / "icpx")
    with pytest.raises(SystemExit, match="cmake, compiling: exits with 3; it says above why"):
        cmake("compiling", "3")


def test_what_nvcc_says_is_shown(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for a C++ compiler of its own."""
    program(tmp_path / "bin" / "nvcc", "echo nvcc fatal: >&2; echo no compiler >&2; exit 1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("ADAPTER_EXT_CUDA", raising=False)
    cuda_options = of_setup("cuda_options", monkeypatch)
    with pytest.raises(SystemExit, match="exits with 1: nvcc fatal: no compiler; ADAPTER_EXT_CUDA"):
        cuda_options()
