"""How times are taken, and what is noted about the machine they were taken on."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from adapter_ext import _C

_T = TypeVar("_T")

MIN_SAMPLE_SECONDS = 2e-3


def interleaved_medians(
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 0.3,
    min_samples: int = 3,
    max_samples: int = 1000,
) -> dict[str, float]:
    """Times functions in turn, so that a change of the machine's speed meets all of them alike.

    Each sample repeats its function for at least ``MIN_SAMPLE_SECONDS``.

    Args:
        functions: what to time, by name.
        seconds: how long to go on, for each function.
        min_samples: samples of each function, however long they take.
        max_samples: enough samples of each function.

    Returns:
        The median time of one call in seconds, by name.
    """
    loops = {name: _calibrate(function) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    for count in range(max_samples):
        if count >= min_samples and time.perf_counter() > end:
            break
        for name, function in functions.items():
            samples[name].append(_sample(function, loops[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def _sample(function: Callable[[], object], loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        function()
    return (time.perf_counter() - start) / loops


def _calibrate(function: Callable[[], object]) -> int:
    """Finds how many calls make a sample, and warms up by that."""
    loops = 1
    while (per_call := _sample(function, loops)) * loops < MIN_SAMPLE_SECONDS:
        loops = max(2 * loops, min(10 * loops, int(MIN_SAMPLE_SECONDS / per_call) + 1))
    return loops


def machine() -> dict[str, Any]:
    """What a reader needs to know about where numbers come from."""
    return {
        "cpu": _cpu_model(),
        "cpu_capability": _C.cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "adapter_ext": _C.version,
        "compiler": _C.compiler,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
