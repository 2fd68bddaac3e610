"""How the CUDA kernels are launched on some GPUs: by the launchers themselves, without a GPU.

The stand-in for CUDA in ``tests/simt`` writes launches down instead of running them. It needs g++
and binutils, and builds the launchers where pytest has not done so already.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import torch

import adapter_ext

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY / "tests"))  # the stand-in is not installed

from simt import build  # noqa: E402

HIDDEN_SIZE = 1024
BOTTLENECK = 64
# Rows, their width, adapters, and whether there is an auxiliary loss: decode; tiles of 16 rows, by
# parts where that can be done, and all else; tiles of 64; more adapters than launch parameters
# hold, and many more; rows that are narrow enough for forward_parts_kernel where there is little
# shared memory. What a later call launches too is as in the first one.
CALLS = (
    (64, HIDDEN_SIZE, 1, False),
    (2048, HIDDEN_SIZE, 64, False),
    (2048, HIDDEN_SIZE, 64, True),
    (16384, HIDDEN_SIZE, 8, False),
    (64, HIDDEN_SIZE, 40, True),
    (64, HIDDEN_SIZE, 100, False),
    (16384, HIDDEN_SIZE, 8, True),
    (1024, 64, 8, False),
    (16384, 64, 8, False),
)
# Types of x and of the weights, and the op's code for the operands of products.
TYPES = (
    (torch.bfloat16, torch.bfloat16, -1),
    (torch.float16, torch.float16, -1),
    (torch.bfloat16, torch.float32, -1),
    (torch.float16, torch.float32, -1),
    (torch.float32, torch.float32, -1),
    (torch.float32, torch.float32, 2),  # bfloat16
    (torch.float32, torch.float32, 3),  # float16
    (torch.float64, torch.float64, -1),
)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A GPU.

    Attributes:
        name: what it is sold as.
        multiprocessors: how many it has; all that follows is of each.
        shared_memory: KiB, all but one of which one block can have.
        threads: that can be resident.
        blocks: likewise.
        registers: of 32 bits.
    """

    name: str
    multiprocessors: int
    shared_memory: int
    threads: int = 2048
    blocks: int = 32
    registers: int = 65536


# By the architecture of the machine code that runs on it.
MACHINES = {
    80: Machine("A100", 108, 164),
    90: Machine("H100", 132, 228),
    100: Machine("B200", 148, 228),
    120: Machine("RTX 5090", 170, 100, threads=1536, blocks=24),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a launch gives each block.

    Attributes:
        threads: how many.
        shared: bytes of dynamic shared memory.
    """

    threads: int
    shared: int


def demangled(names: Iterable[str]) -> list[str]:
    """C++ names as they are written."""
    lines = "\n".join(names)
    run = subprocess.run(["c++filt"], input=lines, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


@functools.cache
def _functions(library: pathlib.Path) -> dict[int, str]:
    """By where they begin in a library, in bytes."""
    run = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True)
    symbols = [line.split() for line in run.stdout.splitlines()]
    code = [symbol for symbol in symbols if len(symbol) == 3 and symbol[1] in "tTwW"]
    names = demangled(symbol[2] for symbol in code)
    return {int(symbol[0], 16): name for symbol, name in zip(code, names, strict=True)}


def record(machine: Machine) -> dict[str, Launch]:
    """The launches of typical calls with a pre norm, D = 1024 and r = 64, in every type.

    Args:
        machine: where.

    Returns:
        By kernel, its name as C++ has it, the first launch.
    """
    library = build.library("plain")
    torch.ops.load_library(str(library))
    stand_in = ctypes.CDLL(str(library))
    stand_in.simt_recorded.restype = ctypes.c_char_p
    stand_in.simt_clear()
    block_memory = (machine.shared_memory - 1) * 1024
    stand_in.simt_configure(ctypes.c_uint64(0), 0, machine.multiprocessors, block_memory)
    stand_in.simt_record()
    try:
        for call in CALLS:
            for types in TYPES:
                _call(*call, *types)
        recorded = stand_in.simt_recorded().decode()
    finally:
        stand_in.simt_configure(ctypes.c_uint64(0), 0, 4, 99 * 1024)
        stand_in.simt_clear()
    functions = _functions(library)
    launches: dict[str, Launch] = {}
    for line in recorded.splitlines():
        offset, *sizes = map(int, line.split())
        launches.setdefault(functions[offset], Launch(*sizes))
    # TF32 is for CUDA tensors alone. Its kernels are launched as those of float32, whose operands
    # in shared memory are of the same size.
    tf32 = {
        name.replace("MultiplyAdd<float>", "Tf32").replace("Tf32 >", "Tf32>"): launch
        for name, launch in launches.items()
        if "<float, adapter_ext::cuda::MultiplyAdd" in name
    }
    return launches | tf32


def _call(
    rows: int,
    width: int,
    adapters: int,
    auxiliary: bool,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    compute_type: int,
) -> None:
    """Route, forward and backward, of which only the launches matter."""
    ops: Any = torch.ops.adapter_ext_simt
    x = torch.empty(rows, width, dtype=dtype)
    ids = torch.arange(rows) % adapters
    ops.route(ids, adapters)
    routing = adapter_ext.route(ids, adapters) if adapters > 1 else None
    order, offsets = (routing.order, routing.offsets) if routing else (None, None)
    vector = torch.empty(width, dtype=weight_dtype)
    down = torch.empty(BOTTLENECK, width, dtype=weight_dtype)
    up = torch.empty(width, BOTTLENECK, dtype=weight_dtype)
    weights = [tensor for tensor in (vector, vector, down, up) for _ in range(adapters)]
    options: dict[str, Any] = {"compute_type": compute_type}
    if auxiliary:
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        options["l2_lambda"] = torch.ones(adapters, dtype=sums)
    _, _, saved = ops.linear_adapter_forward(x, weights, order, offsets, **options)
    needed = [1] * (1 + len(weights))
    ops.linear_adapter_backward(x, None, x, weights, order, offsets, saved, needed, **options)
