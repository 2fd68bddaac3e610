"""Loads the native libraries; importing this module registers ``torch.ops.adapter_ext``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import adapter_ext

_NAME = "libadapter_ext_cpu.so"
_CUDA_NAME = "libadapter_ext_cuda.so"
_LEVEL = "ADAPTER_EXT_CPU_CAPABILITY"


def _folder() -> Path:
    """The folder that holds the libraries."""
    own = Path(__file__).parent
    if (own / _NAME).exists():
        return own
    # Python was started in a source folder, which hides the installed package: take its libraries.
    for entry in sys.path:
        installed = Path(entry) / "adapter_ext"
        if (installed / _NAME).exists():
            adapter_ext.__path__.append(str(installed))
            return installed
    return own


def _load(library: Path) -> Path:
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        from adapter_ext import _C  # noqa: F401  (it loads if the library does)
    except (OSError, ImportError, RuntimeError) as error:
        built = library.with_name("built_with.txt")
        raise ImportError(
            f"adapter_ext: its native library does not load: {error.__cause__ or error}\n"
            f"  library: {library} ({'there' if library.exists() else 'missing'})\n"
            f"  built: {built.read_text().strip() if built.exists() else 'never, as it seems'}\n"
            f"  running: torch {torch.__version__} (2.10 or later is needed)\n"
            "  what to do: `pip install --force-reinstall --no-deps .` in the source folder, in "
            "the environment that runs it"
        ) from error
    return library


def _check_level() -> None:
    from adapter_ext import _C

    try:
        _C.cpu_capability()
    except RuntimeError:
        # The library loads: another build of it would not help.
        raise ImportError(
            f"{_LEVEL}: expected one of {', '.join(_C.supported_cpu_capabilities())} (the levels "
            f"that this machine has) or nothing, got {os.environ.get(_LEVEL)!r}"
        ) from None


def _version() -> str:
    from adapter_ext import _C

    return _C.version


def _load_cuda() -> Path | None:
    from adapter_ext import _C

    # It needs libraries that a CPU build of torch does not have.
    if torch.version.cuda is None or not _C.cuda_compiler:
        return None
    return _load(CPU_LIBRARY.with_name(_CUDA_NAME))


CPU_LIBRARY = _load(_folder() / _NAME)
"""The library of ops and CPU kernels."""

_check_level()

VERSION = _version()
"""Of adapter_ext, as it was built."""

CUDA_LIBRARY = _load_cuda()
"""The library of CUDA kernels, where it was built and torch is a CUDA build."""
