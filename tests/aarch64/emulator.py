"""Runs the CPU kernels, compiled for AArch64, under QEMU: the ops of the backend ``aarch64``."""

from __future__ import annotations

import functools
import math
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter_ext import ops

FOLDER = Path(__file__).resolve().parent
BUILD = FOLDER.parent.parent / "build" / "aarch64"
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"

# The values of DataType in csrc/common/problem.h.
DATA_TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def missing() -> str | None:
    """What is not there and would be needed, if anything."""
    for tool in (COMPILER, EMULATOR, "cmake", "ninja"):
        if shutil.which(tool) is None:
            return f"{tool} is missing"
    return None


def build() -> Path:
    """The program, with the compiler options that CMake has for other processors than x86."""
    configure = ["cmake", "-G", "Ninja", f"-S{FOLDER}", f"-B{BUILD}"]
    configure += ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    configure += [f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"]
    for command in (configure, ["cmake", "--build", str(BUILD)]):
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{process.stdout}{process.stderr}")
    return BUILD / "program"


@functools.cache
def emulated_ops() -> dict[str, Any]:
    """What stands for the native ops in ``adapter_ext.ops``, by its name there."""
    program = Program()
    library = torch.library.Library("adapter_ext_aarch64", "DEF")
    names = {"_inference": "linear_adapter"}
    names |= {"_forward": "linear_adapter_forward", "_backward": "linear_adapter_backward"}
    for name in names.values():
        schema = str(getattr(torch.ops.adapter_ext, name).default._schema)
        library.define(schema.removeprefix("adapter_ext::"))
        library.impl(name, getattr(program, name), "CPU")
    program.library = library  # which takes its ops along when it goes
    emulated: Any = torch.ops.adapter_ext_aarch64
    return {ours: getattr(emulated, name).default for ours, name in names.items()}


class Program:
    """The program under the emulator, and the native ops as it computes them."""

    def __init__(self) -> None:
        command = [EMULATOR, str(build())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._to: Any = self._process.stdin
        self._from: Any = self._process.stdout

    def linear_adapter(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        y, aux, _ = self.linear_adapter_forward(*arguments, save=False)
        return y, aux

    def linear_adapter_forward(
        self,
        x: Tensor,
        weights: list[Tensor],
        order: Tensor | None = None,
        offsets: Tensor | None = None,
        *options: Any,
        save: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, aux, saved = ops._forward_fake(x, weights, order, offsets)
        parts = _parts(saved, x) if save else [None] * 3
        self._run(False, weights, order, offsets, ops._Options(*options), [x], [y, aux, *parts])
        return y, aux, saved

    def linear_adapter_backward(
        self,
        grad_y: Tensor,
        grad_aux: Tensor | None,
        x: Tensor,
        weights: list[Tensor],
        order: Tensor | None,
        offsets: Tensor | None,
        saved: Tensor,
        needed: list[int],
        *options: Any,
    ) -> list[Tensor]:
        inputs = [x, grad_y, grad_aux, *_parts(saved, x)]
        results = [
            t.new_empty(t.shape) if flag else None
            for t, flag in zip([x, *weights], needed, strict=True)
        ]
        self._run(True, weights, order, offsets, ops._Options(*options), inputs, results)
        return [result for result in results if result is not None]

    def _run(
        self,
        backward: bool,
        weights: list[Tensor],
        order: Tensor | None,
        offsets: Tensor | None,
        options: ops._Options,
        inputs: Sequence[Tensor | None],
        results: Sequence[Tensor | None],
    ) -> None:
        """Sends what program.cpp reads, and receives the results."""
        x = inputs[0]
        assert x is not None
        down = weights[len(weights) // 2 : len(weights) * 3 // 4]
        stacked = len(down) == 1 and down[0].ndim == 3
        bottlenecks = [w.shape[-2] for w in down]
        rows = math.prod(x.shape[:-1])
        data_type = DATA_TYPES[x.dtype]
        weight_type = DATA_TYPES[down[0].dtype] if down else data_type
        operand_type = options.compute_type
        if operand_type == ops._NOT_ROUNDED:
            operand_type = data_type if weight_type == data_type else ops._FLOAT32
        one_adapter_samples = x.shape[0] if x.ndim > 1 else 1
        samples = one_adapter_samples if order is None else order.numel()
        call = struct.pack(
            "15q3d",
            backward,
            torch.get_num_threads(),
            data_type,
            weight_type,
            operand_type,
            options.activation,
            options.norm_position,
            options.depth_mode,
            options.residual,
            rows,
            x.shape[-1],
            max(bottlenecks, default=0),
            samples,
            down[0].shape[0] if stacked else len(down),
            stacked,
            options.eps,
            options.dropout,
            options.stochastic_depth,
        )
        sizes = torch.tensor(bottlenecks, dtype=torch.int64)
        message = [call]
        for t in (order, offsets, options.l2_lambda, options.seed, sizes, *weights, *inputs):
            dense = None if t is None else t.clone(memory_format=torch.contiguous_format)
            message += [_size(t), b"" if dense is None else _bytes(dense)]
        message += map(_size, results)
        self._to.write(b"".join(message))
        self._to.flush()
        for result in results:
            if result is not None and self._from.readinto(_bytes(result)) != result.nbytes:
                raise RuntimeError(f"the program ended with status {self._process.wait()}")


def _parts(saved: Tensor, x: Tensor) -> list[Tensor]:
    """The bottleneck activations, means and deviations that the forward saves in one tensor."""
    rows = math.prod(x.shape[:-1])
    return list(saved.split([saved.numel() - 2 * rows, rows, rows]))


def _size(tensor: Tensor | None) -> bytes:
    """How many bytes the tensor has, as the program reads it."""
    return struct.pack("q", -1 if tensor is None else tensor.nbytes)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a dense tensor."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
