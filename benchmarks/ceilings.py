"""What the machine can do at best: its copy bandwidth and its rate of multiply-adds.

Both are probed beside what is measured: what else runs on the machine lowers them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from adapter_ext import _C
from benchmarks import measure

_COPY_BYTES = 256 * 2**20
# Of multiply-adds in registers: some 20 milliseconds, in which the threads of what ran before stop
# looking for work. So the call after one of these, which is timed, has the processors.
_LOOPS = 4_000_000
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

    def measured(self) -> dict[str, float]:
        """The limits that there are, by name."""
        limits = dataclasses.asdict(self)
        return {name: value for name, value in limits.items() if value < math.inf}


class Probes:
    """Functions that reach the limits, to be timed in turn with what is measured.

    A machine that is shared, or that changes its clocks, is not equally fast all the time: limits
    that were timed in the rounds of a case are those that the case met.

    Args:
        device: where.
        copy_bytes: what is copied; the default is far larger than any cache of a CPU.
        multiply: whether the rate of multiply-adds is a limit too; on the CPU only.
    """

    def __init__(
        self, device: str = "cpu", copy_bytes: int = _COPY_BYTES, *, multiply: bool = True
    ) -> None:
        source = torch.ones(copy_bytes // 4, device=device)
        target = torch.zeros_like(source)
        self.copy_bytes = 2 * source.nbytes
        self.functions: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
        self.flops = 0.0
        if multiply:
            threads = torch.get_num_threads()
            pool = ThreadPoolExecutor(threads)
            loops = [_LOOPS] * threads

            def fma() -> float:
                return sum(pool.map(_C.fma_loop, loops))

            self.flops = fma()
            self.functions["fma"] = fma

    def limits(self, seconds: Mapping[str, float]) -> Ceilings:
        """The limits that follow from the seconds which each function took."""
        rate = self.flops / seconds["fma"] if "fma" in self.functions else math.inf
        return Ceilings(self.copy_bytes / seconds["copy"], rate)

    def best(self, sampler: measure.Sampler = measure.wall_clock) -> Ceilings:
        """The limits by the best of several repetitions; takes about a second."""
        samples = {name: sampler(function) for name, function in self.functions.items()}
        return self.limits(
            {name: min(take() for _ in range(_REPETITIONS)) for name, take in samples.items()}
        )
