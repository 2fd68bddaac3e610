"""Builds programs and libraries that run the CUDA kernels on a CPU.

The latest objects and libraries are kept in ``build/simt``, under a hash of what they are made of.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch

Flavour = Literal["plain", "race", "sanitize", "ptxsim", "ptxsim-90"]

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent.parent
SIMULATOR = REPOSITORY.parent / "shared" / "ptxsim"
PTX_FLAVOURS: tuple[Flavour, ...] = ("ptxsim", "ptxsim-90")
CACHE = REPOSITORY / "build" / "simt"
JOBS = 2
VERSIONS = 3  # of a file, are kept

RUNTIME = tuple(FOLDER / name for name in ("runtime.cpp", "fiber.cpp", "source_lines.cpp"))

_COMMON = (
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    # For the lines in error messages; addr2line of binutils 2.40 mistakes files in DWARF 5.
    "-g1",
    "-gdwarf-4",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
)
_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# Copies must be calls, for the race detector to see them.
_RACE = ("-fsanitize=thread", "-fno-builtin-memcpy", "-fno-builtin-memset")

_TORCH = Path(torch.__file__).parent
_TORCH_FLAGS = (f"-isystem{_TORCH / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000")
_TORCH_LINK = (
    str(_TORCH / "lib" / "libtorch_cpu.so"),
    "-Wl,--no-undefined",
    "-Wl,--allow-shlib-undefined",
)


def missing(flavour: Flavour) -> str | None:
    """What is not there and would be needed, if anything."""
    if shutil.which("g++") is None:
        return "g++ is missing"
    if flavour in PTX_FLAVOURS:
        if shutil.which("nvcc") is None:
            return "nvcc is missing"
        if not SIMULATOR.exists():
            return f"{SIMULATOR} is missing"
        if torch.version.cuda is not None:
            return "a CUDA build of torch brings the runtime that the simulator stands in for"
    return None


@functools.cache
def library(flavour: Flavour) -> Path:
    """A library that registers ``torch.ops.adapter_ext_simt``, run by a simulator of CUDA."""
    kernels = sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu"))
    entry_points = [FOLDER / "ptxsim.cpp"] if flavour in PTX_FLAVOURS else []  # else of the runtime
    return link([*kernels, *entry_points, FOLDER / "library.cpp"], flavour)


def link(
    sources: Sequence[Path],
    flavour: Flavour,
    *,
    defines: Sequence[str] = (),
    program: bool = False,
) -> Path:
    """A library, or a program, of some sources and the simulator.

    Args:
        sources: ``.cu`` files are kernels and launchers. ``library.cpp`` brings torch's.
        flavour: how kernels are run.
        defines: macros for all sources.
        program: whether the sources have a ``main``.

    Returns:
        The file.
    """
    reason = missing(flavour)
    if reason:
        raise RuntimeError(reason)
    flags = tuple(f"-D{name}" for name in defines)
    commands = [_compile_command(source, flavour, flags) for source in sources]
    if flavour not in PTX_FLAVOURS:
        runtime = [*RUNTIME, FOLDER / "race.cpp"] if flavour == "race" else RUNTIME
        commands += [_compile_command(source, flavour, ()) for source in runtime]
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(_made, commands))
    command = ["g++", *map(str, objects), "-rdynamic" if program else "-shared", "-ldl"]
    if flavour == "sanitize":
        command += _SANITIZE
    if flavour in PTX_FLAVOURS:
        folder = simulator()
        command += [f"-L{folder}", "-lcudart_sim", f"-Wl,-rpath={folder}"]
    if any(source.name == "library.cpp" for source in sources):
        command += _TORCH_LINK
    suffix = "" if program else ".so"
    return _made((tuple(command), f"{'-'.join([sources[-1].stem, flavour, *defines])}{suffix}"))


Command = tuple[tuple[str, ...], str]
"""A command, which is completed by -o and a file, and the name of the file."""


def _compile_command(source: Path, flavour: Flavour, flags: Sequence[str]) -> Command:
    includes = [f"-I{REPOSITORY / 'csrc'}", f"-I{FOLDER}"]
    is_kernel = source.suffix == ".cu"
    # nvcc makes other code for bfloat16 from 90 on; there it also lets kernels begin early, for all
    # types by the same source.
    if flavour == "ptxsim-90" and "bfloat16" not in source.stem:
        flavour = "ptxsim"
    if flavour in PTX_FLAVOURS and is_kernel:
        command = ["nvcc", "-std=c++20", "-O2", "-lineinfo", "-Xcompiler=-fPIC", "-cudart", "none"]
        compute = "compute_90" if flavour == "ptxsim-90" else "compute_80"
        command += ["-gencode", f"arch={compute},code={compute}", "--no-compress", *includes]
    else:
        command = ["g++", *_COMMON, *includes]
        # What takes least time for building and running together.
        command += ["-O2" if not is_kernel else "-O0" if flavour == "sanitize" else "-O1"]
        if flavour == "sanitize":
            command += _SANITIZE
        if flavour == "race" and is_kernel:
            command += _RACE
        if flavour == "race":
            command += ["-DSIMT_RACE"]
        if source.name == "library.cpp":
            command += _TORCH_FLAGS
        if is_kernel:
            command += ["-x", "c++"]
    name = "-".join([source.stem, flavour, *(flag.removeprefix("-D") for flag in flags)])
    return (*command, *flags, "-c", str(source)), f"{name}.o"


def _made(command: Command) -> Path:
    """The file that a command makes, made now or before."""
    arguments, name = command
    key = hashlib.sha256()
    for argument in arguments:
        key.update(argument.encode() + b"\0")
        if Path(argument).suffix in {".cu", ".cpp"}:
            key.update(Path(argument).read_bytes())
            for included in sorted(Path(argument).with_suffix("").glob("*.cu")):  # broken/
                key.update(included.read_bytes())
    key.update(_headers() + _compiler(arguments[0]))
    file = CACHE / name / key.hexdigest()[:16] / name
    with _alone(name):
        if file.exists():
            return file
        file.parent.mkdir(parents=True, exist_ok=True)
        _remove_old(CACHE / name)
        temporary = file.with_name(f"{os.getpid()}.{name}")
        run = subprocess.run(
            [*arguments, "-o", str(temporary)],
            capture_output=True,
            text=True,
            env=_environment(),
        )
        if run.returncode != 0:
            raise RuntimeError(f"{' '.join(arguments)}\n{run.stdout}{run.stderr}")
        temporary.replace(file)
    return file


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """One thread of one process at a time: tests that run at once need the same files."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_old(folder: Path) -> None:
    """Removes all but the latest versions of a file."""
    versions = sorted(folder.iterdir(), key=lambda version: version.stat().st_mtime)
    for version in versions[:-VERSIONS]:
        shutil.rmtree(version, ignore_errors=True)


def _environment() -> dict[str, str]:
    """The environment without the sanitizers that tests may run under."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def _headers() -> bytes:
    """A hash of all headers that a source may include."""
    key = hashlib.sha256()
    csrc = REPOSITORY / "csrc"
    for folder in (csrc, csrc / "common", csrc / "cuda", FOLDER):
        for pattern in ("*.h", "*.cuh"):
            for header in sorted(folder.glob(pattern)):
                key.update(header.read_bytes())
    return key.digest()


@functools.cache
def _compiler(name: str) -> bytes:
    return subprocess.run(
        [name, "--version"], capture_output=True, check=True, env=_environment()
    ).stdout


@functools.cache
def simulator() -> Path:
    """The folder of the PTX simulator's library."""
    key = hashlib.sha256()
    for source in sorted(SIMULATOR.glob("*.*")):
        key.update(source.read_bytes())
    folder = CACHE / f"ptxsim-{key.hexdigest()[:16]}"
    with _alone("ptxsim"):
        if not (folder / "libcudart_sim.so").exists():
            subprocess.run(
                ["make", f"-j{JOBS}", f"OUT={folder}"],
                cwd=SIMULATOR,
                check=True,
                capture_output=True,
                env=_environment(),
            )
    return folder
