"""Loads the native libraries; importing this module registers ``torch.ops.adapter_ext``."""

from __future__ import annotations

from pathlib import Path

import torch

_ROOT = Path(__file__).parent
CPU_LIBRARY = _ROOT / "libadapter_ext_cpu.so"


def _load() -> None:
    try:
        torch.ops.load_library(str(CPU_LIBRARY))
        from adapter_ext import _C

        _C.cpu_capability()
    except (OSError, ImportError, RuntimeError) as error:
        try:
            built = (_ROOT / "built_with.txt").read_text().strip()
        except OSError:
            built = "no record of a finished build"
        cause = error.__cause__ or error
        raise ImportError(
            f"adapter_ext: its native library does not load: {cause}\n"
            f"  library: {CPU_LIBRARY} ({'there' if CPU_LIBRARY.exists() else 'missing'})\n"
            f"  built: {built}\n"
            f"  running: torch {torch.__version__} (needs 2.10 or later)\n"
            "  what to do: reinstall it in this environment with `pip install --force-reinstall "
            "--no-deps adapter_ext` (or `pip install .` in its source folder)"
        ) from error


_load()
