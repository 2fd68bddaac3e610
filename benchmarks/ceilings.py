"""What the machine can do at best: its copy bandwidth and its rate of multiply-adds.

Both are the best of several repetitions: what else runs on the machine only lowers them.
"""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from adapter_ext import _C
from benchmarks import measure

_COPY_BYTES = 512 * 2**20  # far larger than any cache
_REPETITIONS = 10


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The machine's limits.

    Attributes:
        bytes_per_second: read and written by a copy; the bytes of both count.
        flops_per_second: float32 multiply-adds in registers alone, two operations each, on as many
            threads as PyTorch uses.
    """

    bytes_per_second: float
    flops_per_second: float

    def floor(self, num_bytes: float, flops: float) -> float:
        """The least time in seconds in which these bytes can move and these operations run."""
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


def cpu() -> Ceilings:
    """Measures both limits, with ``torch.get_num_threads()`` threads; takes about a second."""
    bandwidth = copy_bandwidth(measure.wall_clock, "cpu", _COPY_BYTES)
    return Ceilings(bandwidth, _fma_rate(torch.get_num_threads()))


def copy_bandwidth(sampler: measure.Sampler, device: str, num_bytes: int) -> float:
    """Bytes per second, read and written, of a copy of so many bytes on a device."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.zeros_like(source)
    sample = sampler(lambda: target.copy_(source))
    return 2 * num_bytes / min(sample() for _ in range(_REPETITIONS))


def _fma_rate(threads: int) -> float:
    iterations = 1000
    with ThreadPoolExecutor(threads) as pool:

        def rate() -> tuple[float, float]:
            start = time.perf_counter()
            flops = sum(pool.map(_C.fma_loop, [iterations] * threads))
            seconds = time.perf_counter() - start
            return flops / seconds, seconds

        while rate()[1] < 0.05:
            iterations *= 2
        return max(rate()[0] for _ in range(_REPETITIONS))
