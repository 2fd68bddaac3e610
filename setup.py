"""Builds adapter_ext: one CMake/Ninja build, driven by setuptools.

All else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds all native libraries into the package's folder."""

    def run(self) -> None:
        # Only here: pip reads metadata in environments that have neither.
        import pybind11
        import torch

        if self.inplace:  # an editable build keeps its objects, so that a change compiles one file
            package, build = ROOT / "adapter_ext", ROOT / "build" / "editable"
        else:
            package = Path(self.build_lib).resolve() / "adapter_ext"
            build = Path(self.build_temp).resolve() / "cmake"
            shutil.rmtree(build, ignore_errors=True)  # it may hold paths of an environment now gone
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
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
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = self.parallel or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count() or 1
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), f"-j{jobs}"], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)
        # For the error message of a library that does not load.
        facts = f"adapter_ext {self.distribution.get_version()} against torch {torch.__version__}\n"
        (package / "built_with.txt").write_text(facts)


setup(
    ext_modules=[Extension("adapter_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
