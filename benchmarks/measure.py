"""How times are taken, and what is noted about the machine they were taken on."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from adapter_ext import _C, doctor

_T = TypeVar("_T")

MIN_SAMPLE_SECONDS = 2e-3

ALLOCATORS = ("default", "raised")
# Variables of glibc that make its allocator keep what it has.
RAISED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}

Sampler = Callable[[Callable[[], object]], Callable[[], float]]
"""Warms a function up; what it returns takes one sample: the seconds of one call."""


def by_clock(clock: Callable[[], float], function: Callable[[], object]) -> Callable[[], float]:
    """The sampler for the CPU: each sample is the mean of at least ``MIN_SAMPLE_SECONDS``."""

    def sample(loops: int) -> float:
        # What was timed before has put other things into the caches, and its threads may still look
        # for work: whoever is timed after that would pay for it.
        function()
        start = clock()
        for _ in range(loops):
            function()
        return (clock() - start) / loops

    loops = 1
    while (per_call := sample(loops)) * loops < MIN_SAMPLE_SECONDS:
        loops = max(2 * loops, min(10 * loops, int(MIN_SAMPLE_SECONDS / per_call) + 1))
    return lambda: sample(loops)


wall_clock: Sampler = functools.partial(by_clock, time.perf_counter)
CLOCKS: dict[str, Sampler] = {
    "wall": wall_clock,
    "process": functools.partial(by_clock, time.process_time),
}
"""Samplers by name: seconds that went by, or that this process was running on a processor."""


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    sampler: Sampler = wall_clock,
    seconds: float = 0.3,
    settle: float = 0.0,
    settled: Callable[[Mapping[str, Sequence[float]]], bool] = lambda samples: True,
    min_samples: int = 3,
    max_samples: int = 1000,
) -> dict[str, list[float]]:
    """Times functions in turn, so that a change of the machine's speed meets all of them alike.

    Args:
        functions: what to time, by name.
        sampler: how to time it.
        seconds: how long to go on, for each function.
        settle: how long to go on at most while ``settled`` says no, for each function.
        settled: whether the samples so far, by name, answer what is asked.
        min_samples: samples of each function, however long they take.
        max_samples: enough samples of each function.

    Returns:
        By name, the seconds of one call in each round.
    """
    take = {name: sampler(function) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    # In another order each round: what was timed before leaves its mark on caches and threads.
    order, shuffle = list(functions), random.Random(0).shuffle
    for count in range(max_samples):
        spent = (time.perf_counter() - start) / len(functions)
        if count >= min_samples and spent > seconds and (spent > settle or settled(samples)):
            break
        shuffle(order)
        for name in order:
            samples[name].append(take[name]())
    return samples


class ColdEvents:
    """The sampler for a GPU: one call between two events, with nothing in the second-level cache.

    The cache is filled by reading a buffer of twice its size: after writing one, the call would
    wait for that to be written back. Reading it gives the host some tens of microseconds to queue
    the call; a call that takes the host longer is timed with the gaps between its kernels.
    """

    WARM_UPS = 3

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties().L2_cache_size
        self._buffer = torch.zeros(2 * size // 4, dtype=torch.int32, device="cuda")

    def __call__(self, function: Callable[[], object]) -> Callable[[], float]:
        """Warms the function up."""
        start, end = _event(), _event()
        for _ in range(self.WARM_UPS):
            function()

        def sample() -> float:
            self._buffer.amax()
            start.record()
            function()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3  # from milliseconds

        return sample


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def replayed(function: Callable[[], _T]) -> Callable[[], _T]:
    """The function's kernels as a CUDA graph; each call replays it and gives the same tensors."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # what is done once, such as loading kernels, cannot be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> _T:
        graph.replay()
        return result

    replay.function = function  # type: ignore[attr-defined]  # what the kernels read stays alive
    return replay


def use_allocator(setting: str) -> None:
    """Starts this program again where the C library's allocator is not as asked for.

    By default it gives large blocks back to the system and asks for fresh ones, which cost a page
    fault every 4 KiB; ``raised`` lets it keep what it has.

    Args:
        setting: ``default`` or ``raised``.
    """
    wanted = RAISED if setting == "raised" else {}
    if _allocator_variables() != wanted:
        others = {name: value for name, value in os.environ.items() if name not in RAISED}
        os.execve(sys.executable, sys.orig_argv, {**others, **wanted})


def _allocator_variables() -> dict[str, str]:
    return {name: os.environ[name] for name in RAISED if name in os.environ}


def machine() -> dict[str, Any]:
    """What a reader needs to know about the machine that numbers come from, but for its GPU."""
    return {
        "cpu": doctor.cpu_model(),
        "cpu_capability": _C.cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "adapter_ext": _C.version,
        "compiler": _C.compiler,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "allocator": "raised" if _allocator_variables() == RAISED else "default",
        "load": round(os.getloadavg()[2], 1),  # processes that ran or waited, over 15 minutes
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def gpu() -> dict[str, Any]:
    """The same of the GPU; sizes in bytes, clocks in MHz, power in W."""
    properties = torch.cuda.get_device_properties()
    facts: dict[str, Any] = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2_cache": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cuda_compiler": _C.cuda_compiler,
        "cuda_archs": _C.cuda_archs,
    }
    # What torch does not know.
    names = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit"]
    command = ["nvidia-smi", f"--id=GPU-{properties.uuid}", f"--query-gpu={','.join(names)}"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        line = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True,
            check=True,
            text=True,
            timeout=20.0,
        ).stdout
        facts.update(zip(names, (value.strip() for value in line.split(",")), strict=False))
    return facts


def progress(items: Sequence[_T], description: str) -> Iterable[_T]:
    """The items, with a progress display on stderr: tqdm's where it is installed."""
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        return _plain_progress(items, description)
    bar: Iterable[_T] = tqdm(items, desc=description, file=sys.stderr)
    return bar


def _plain_progress(items: Sequence[_T], description: str) -> Iterator[_T]:
    for count, item in enumerate(items, start=1):
        print(f"\r{description}: {count}/{len(items)}", end="", file=sys.stderr, flush=True)
        yield item
    print(file=sys.stderr)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, the first column left-aligned, the others right."""
    rule = [":--", *("--:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
