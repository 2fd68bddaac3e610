"""What a bug report needs to say about the build, the libraries and the machine."""

from __future__ import annotations

import contextlib
import os
import platform

import torch

from adapter_ext import _C, _library


def report() -> dict[str, str]:
    """The facts, by their titles."""
    level = _C.cpu_capability()
    forced = os.environ.get("ADAPTER_EXT_CPU_CAPABILITY")
    loaded = str(_library.CPU_LIBRARY) in torch.ops.loaded_libraries
    return {
        "adapter_ext": _C.version,
        "build type": _C.build_type,
        "compiler": _C.compiler,
        "torch built against": _C.torch_version,
        "torch running": torch.__version__,
        "torch's CUDA": torch.version.cuda or "none: a CPU build of torch",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "machine": f"{platform.platform()}, {platform.machine()}",
        "CPU": cpu_model(),
        "CPU levels compiled": ", ".join(_C.compiled_cpu_capabilities()),
        "CPU level in use": f"{level}, forced by ADAPTER_EXT_CPU_CAPABILITY" if forced else level,
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} CPUs",
        "CPU library": f"{_library.CPU_LIBRARY}, {'loaded' if loaded else 'not loaded'}",
        "CUDA library": cuda_library(),
        "CUDA devices": cuda_devices(),
    }


def cuda_library() -> str:
    """Whether there are CUDA kernels, for which architectures, and whether torch can use them."""
    if not _C.cuda_compiler:
        return "not built (`ADAPTER_EXT_CUDA=1 pip install .` builds it, with nvcc if need be)"
    built = f"built by {_C.cuda_compiler} for sm {', '.join(_C.cuda_archs)}"
    if _library.CUDA_LIBRARY is None:
        return f"{built}, not loaded: torch is a CPU build"
    return f"{built}, {_library.CUDA_LIBRARY}, loaded"


def cuda_devices() -> str:
    """The GPUs that torch sees."""
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{d.name} (sm {d.major}{d.minor})" for d in devices) or "none"


def cpu_model() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):  # which not all processors' have
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
