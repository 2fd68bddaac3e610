"""``python -m benchmarks overhead``: the cost of a call where there is almost no work.

One row, D = 512, r = 64, one thread, against the same layer of PyTorch's own operators, by the
process's own time. What we promise: no_grad at most 1.0 times PyTorch's time, forward and backward
at most 1.2 times.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import torch

from benchmarks import cases, command, measure, peers
from benchmarks.results import Result, Spread, ratios

LIMITS = {cases.FORWARD: 1.0, cases.TRAINING: 1.2}
SAMPLER = measure.CLOCKS["process"]  # there is one thread, and what others do is no matter


def measure_mode(case: cases.Case, seconds: float) -> Result:
    """Times one mode, without a routing."""
    problem = case.problem()
    implementations = {"ours": peers.unrouted(problem), "eager": peers.loop(problem)}
    steps = {
        name: cases.step(case.mode, implementation, problem.dy)
        for name, implementation in implementations.items()
    }
    # The heap's first pages cost a page fault each, tens of microseconds on a virtual machine.
    measure.interleaved(steps, seconds=seconds, sampler=SAMPLER)
    times = measure.interleaved(steps, seconds=seconds, sampler=SAMPLER)
    return Result(
        table="overhead",
        name=str(case),
        case={**dataclasses.asdict(case), "limit": LIMITS[case.mode]},
        seconds={name: Spread.of(samples) for name, samples in times.items()},
        ratios=dict(ratios(times)),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints both ratios; exits with 1 where ``--check`` is given and one is above its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks overhead", description=__doc__)
    parser.add_argument("--dtype", choices=list(cases.DTYPES), default="fp32")
    parser.add_argument("--hidden-size", type=command.positive, default=512)
    parser.add_argument("--bottleneck", type=command.positive, default=64)
    parser.add_argument("--rows", type=command.positive, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each function")
    parser.add_argument("--check", action="store_true", help="fail above the promised ratios")
    command.add_output(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes = (options.dtype, options.hidden_size, options.bottleneck, options.rows, 1)
    chosen = [cases.Case(mode, *sizes) for mode in LIMITS]
    results = [measure_mode(case, options.seconds) for case in measure.progress(chosen, "modes")]
    command.finish("overhead", arguments, results, {}, options.json)
    above = [r for r in results if 1 / r.ratios["eager"].median > r.case["limit"]]
    if options.check and above:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
