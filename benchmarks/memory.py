"""``python -m benchmarks memory``: the peak memory of one forward and backward.

What is counted is memory beyond what was there before the call: all that it takes, of PyTorch's
allocator or not, at its peak. What no implementation can do without: h, mean and rstd kept for the
backward, the gradient of x, the gradients of the weights. y goes to the next layer and is dropped
before the backward.

How: the resident memory of a process that does nothing else, from the kernel's own high-water mark
(VmHWM, which is reset before the call), with the C library set to give freed blocks back at once.
PyTorch's profiler would count to the byte, but only PyTorch's tensors: not the scratch space of our
kernels or of MKL and oneDNN. The mark is exact to some tenths of a megabyte. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import itertools
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import cases, command, measure, peers
from benchmarks.cases import DTYPES, TRAINING, Case
from benchmarks.results import Result

PEERS = ("eager", "index", "compile", "bmm", "grouped", "adapters")
# glibc's: blocks from 64 KiB on are mappings of their own, which freeing unmaps.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0"}
STATUS = pathlib.Path("/proc/self/status")


def required(case: Case) -> int:
    """The bytes that forward and backward cannot do without, beyond x, dy, y and the weights."""
    saved = case.rows * (case.bottleneck + 2) * torch.float32.itemsize
    dx = case.rows * case.hidden_size * DTYPES[case.dtype].itemsize
    return saved + dx + case.adapters * case.weight_bytes()


def peak(function: Callable[[], object]) -> int:
    """The bytes that a call needs at its peak, beyond those in use before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    function()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS}: no {field}")


def forward_and_backward(implementation: peers.Implementation, dy: torch.Tensor) -> None:
    """One of each; y is dropped in between."""
    y = implementation.forward()
    edge = torch.autograd.graph.get_gradient_edge(y)
    del y
    gradients = torch.autograd.grad([edge], implementation.tensors(), dy, allow_unused=True)
    del gradients


def peak_of(case: Case, name: str) -> int | str:
    """The peak of one implementation in this process, or why there is none."""
    try:
        # A smaller one first: code that is loaded, threads that start.
        small = dataclasses.replace(case, rows=2 * case.adapters * case.sample_rows)
        for size in (small, case):
            problem = size.problem()
            implementation = cases.make(size, name, problem)
            dy = problem.dy
            if name == "compile":
                forward_and_backward(implementation, dy)  # compiles
            result = peak(lambda: forward_and_backward(implementation, dy))  # noqa: B023
    except peers.UnavailableError as error:
        return str(error)
    return result


def measure_memory(case: Case, names: Sequence[str]) -> Result:
    """Measures ours and peers, each in a process of its own."""
    result = Result("memory", str(case), dataclasses.asdict(case), required=required(case))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory"])
    for name in ("ours", *names):
        with context.Pool(1) as pool:
            outcome = pool.apply(peak_of, (case, name))
        if isinstance(outcome, str):
            result.skipped[name] = outcome
        else:
            result.memory[name] = outcome
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the cases and prints their table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    number: dict[str, Any] = {"type": command.positive, "metavar": "N"}
    parser.add_argument("--hidden-size", nargs="+", **number, default=[1024])
    parser.add_argument("--bottleneck", nargs="+", **number, default=[64])
    parser.add_argument("--rows", nargs="+", **number, default=[2048, 8192])
    parser.add_argument("--adapters", nargs="+", **number, default=[1, 8, 64])
    parser.add_argument(
        "--peers",
        type=lambda text: text.split(","),
        default=[peer for peer in PEERS if peer != "compile"],
        help=f"of {','.join(PEERS)}; default: all but compile",
    )
    command.add_output(parser)
    options = parser.parse_args(arguments)
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"--peers: expected some of {','.join(PEERS)}, got {','.join(unknown)}")
    if not STATUS.exists():
        sys.exit("benchmarks memory: needs Linux")
    os.environ.update(GIVE_BACK)  # of the processes that are started
    grid = itertools.product(
        options.dtype, options.hidden_size, options.bottleneck, options.rows, options.adapters
    )
    chosen = [Case(TRAINING, *sizes) for sizes in grid]
    results = [measure_memory(case, options.peers) for case in measure.progress(chosen, "cases")]
    command.finish("memory", arguments, results, {}, options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
