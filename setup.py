"""Builds adapter_ext: one CMake/Ninja build, driven by setuptools.

All else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


# Machine code for 80 runs on 86, 87 and 89 as well, that for 100 on 103, that for 120 on 121.
CUDA_ARCHS = "80;90;100;120"


def cuda_wheels() -> list[str]:
    """What an environment without nvcc needs, where ADAPTER_EXT_CUDA=1 asks for it.

    Of the release that torch has brought, if any: pip refuses another one.
    """
    release = "13.0"
    with contextlib.suppress(metadata.PackageNotFoundError):
        found = re.match(r"13\.\d+", metadata.version("nvidia-cuda-runtime"))
        release = found[0] if found else release
    names = ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
    return [f"nvidia-{name}=={release}.*" for name in names]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH, of PATH, or of the wheel nvidia-cuda-nvcc."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        # It may be a toolkit's folder without its compiler, for what runs and does not build.
        if home and (nvcc := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return nvcc
    if nvcc := shutil.which("nvcc"):
        return nvcc
    wheels = [Path(entry) / "nvidia" / "cu13" / "bin" for entry in sys.path]
    return shutil.which("nvcc", path=os.pathsep.join(map(str, wheels)))


def find_runtime(toolkit: Path, release: str) -> Path:
    """The folder with headers and static library of nvcc's release of the CUDA runtime.

    Where torch has brought the wheel already, pip's build environment for the others gets the
    newest runtime instead, which nvcc asks for without a version.
    """
    major, minor = map(int, release.split("."))
    version = re.compile(rf"#define CUDART_VERSION\s+{1000 * major + 10 * minor}\b")
    for folder in (toolkit, *(Path(entry) / "nvidia" / f"cu{major}" for entry in sys.path)):
        header = folder / "include" / "cuda_runtime_api.h"
        if header.exists() and version.search(header.read_text(errors="replace")):
            return folder
    return toolkit


def cuda_options() -> list[str]:
    """CMake's options for the CUDA library; empty where it is not to be built."""
    wanted = os.environ.get("ADAPTER_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"ADAPTER_EXT_CUDA: expected 0, 1 or nothing, got {wanted!r}")
    # Said in so many words, since an editable build remembers what it was told before.
    none = ["-DADAPTER_EXT_NVCC=", "-DADAPTER_EXT_NVCC_VERSION=", "-DADAPTER_EXT_CUDA_ARCHS="]
    if wanted == "0":
        return none
    nvcc = find_nvcc()
    if nvcc is None:
        if wanted == "1":
            raise SystemExit(
                "ADAPTER_EXT_CUDA=1: expected nvcc on PATH, in CUDA_HOME or in a wheel. "
                f"Without build isolation: pip install {' '.join(cuda_wheels())}"
            )
        return none

    def output(*arguments: str) -> str:
        process = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
        if process.returncode:
            raise SystemExit(
                f"{nvcc}: exits with {process.returncode}: {' '.join(process.stderr.split())}; "
                "ADAPTER_EXT_CUDA=0 builds without CUDA"
            )
        return process.stdout + process.stderr

    # nvcc on PATH may be a script in another place than the toolkit.
    top = re.search(
        r"^#\$ TOP=(.*)$", output("--dryrun", "-E", "-x", "cu", os.devnull), re.MULTILINE
    )
    version = re.search(r"release ([\d.]+), V([\d.]+)", output("--version"))
    if top is None or version is None or int(version[1].split(".")[0]) < 13:
        raise SystemExit(
            f"{nvcc}: expected nvcc of a CUDA toolkit of version 13 or later, got "
            f"{version[1] if version else 'something else'}; ADAPTER_EXT_CUDA=0 builds without CUDA"
        )
    archs = os.environ.get("ADAPTER_EXT_CUDA_ARCHS", CUDA_ARCHS)
    return [
        f"-DADAPTER_EXT_NVCC={nvcc}",
        f"-DADAPTER_EXT_NVCC_VERSION=nvcc {version[2]}",
        f"-DADAPTER_EXT_CUDA_ROOT={find_runtime(Path(top[1]).resolve(), version[1])}",
        f"-DADAPTER_EXT_CUDA_ARCHS={archs}",
    ]


def kept_for(build: Path) -> str:
    """What the objects of an earlier build depend on and Ninja does not see."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    facts = [str(build), *compiler]
    facts += [os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS", "CMAKE_ARGS")]
    if shutil.which(compiler[0]):
        version = [*compiler, "--version"]
        facts += [subprocess.run(version, capture_output=True, text=True, check=False).stdout]
    return "\n".join(facts)


def check_tools() -> None:
    """Says what is missing of what builds the libraries."""
    missing = [name for name in ("torch", "pybind11") if importlib.util.find_spec(name) is None]
    missing += [name for name in ("cmake", "ninja") if shutil.which(name) is None]
    if missing:
        raise SystemExit(
            f"adapter_ext: its build needs {', '.join(missing)}, not found here. "
            f"Without build isolation: pip install {' '.join(missing)}"
        )


def cmake(step: str, *arguments: str) -> None:
    """Runs a step of the build, which says itself what is wrong."""
    status = subprocess.run(["cmake", *arguments], check=False).returncode
    if status == 0:
        return
    # Only now, since CMake knows more places to look in for a compiler.
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        raise SystemExit(
            f"adapter_ext: its build needs a C++ compiler, expected {' or '.join(compilers)} on "
            "PATH, got none; CXX names another one"
        )
    raise SystemExit(f"adapter_ext: cmake, {step}: exits with {status}; it says above why")


class PackageBuild(build_py):
    """Copies the package's Python files."""

    def run(self) -> None:
        # What an earlier build left there would be installed too: modules that are no more, and a
        # CUDA library by a build without one. Objects are kept elsewhere, in build_temp.
        package = Path(self.build_lib) / "adapter_ext"
        if package.exists():
            shutil.rmtree(package)
        super().run()


class CMakeBuild(build_ext):
    """Builds all native libraries into the package's folder."""

    def run(self) -> None:
        check_tools()
        # Only here: pip reads metadata in environments that have neither.
        import pybind11
        import torch

        if self.inplace:  # an editable build keeps its objects, so that a change compiles one file
            package, build = ROOT / "adapter_ext", ROOT / "build" / "editable"
        else:
            package = Path(self.build_lib).resolve() / "adapter_ext"
            build = Path(self.build_temp).resolve() / "cmake"
            # CPU kernels take most of the time, and depend on nothing in the environment, which pip
            # makes anew: their objects are kept for a compiler that would make the same ones.
            stamp, facts = build / "kept_for.txt", kept_for(build)
            if not stamp.exists() or stamp.read_text() != facts:
                shutil.rmtree(build, ignore_errors=True)
                build.mkdir(parents=True)
                stamp.write_text(facts)
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "-G",
            "Ninja",
            f"-S{ROOT}",
            f"-B{build}",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DADAPTER_EXT_VERSION={self.distribution.get_version()}",
            f"-DADAPTER_EXT_TORCH_DIR={Path(torch.__file__).parent}",
            f"-DADAPTER_EXT_TORCH_VERSION={torch.__version__}",
            *cuda_options(),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = self.parallel or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count() or 1
        cmake("configuring", *configure)
        cmake("compiling", "--build", str(build), f"-j{jobs}")
        cmake("installing", "--install", str(build))
        # For the error message of a library that does not load.
        facts = f"adapter_ext {self.distribution.get_version()} against torch {torch.__version__}\n"
        (package / "built_with.txt").write_text(facts)


setup(
    ext_modules=[Extension("adapter_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": PackageBuild},
    # pip installs these for an isolated build; setuptools calls it so.
    setup_requires=cuda_wheels()
    if os.environ.get("ADAPTER_EXT_CUDA") == "1" and find_nvcc() is None
    else [],
)
