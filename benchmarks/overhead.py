"""``python -m benchmarks.overhead``: the cost of a call where there is almost no work.

One row, D = 512, r = 64, one thread, against the same layer of PyTorch's own operators. What we
promise: no_grad at most 1.0 times PyTorch's time, forward and backward at most 1.2 times.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import cases, measure, peers

LIMITS = {"forward": 1.0, "forward+backward": 1.2}


def main() -> None:
    """Prints both ratios; exits with 1 where ``--check`` is given and one is above its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--dtype", choices=list(cases.DTYPES), default="fp32")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--bottleneck", type=int, default=64)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each function")
    parser.add_argument("--check", action="store_true", help="fail above the promised ratios")
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem = peers.make_problem(
        options.rows, options.hidden_size, options.bottleneck, 1, cases.DTYPES[options.dtype]
    )
    implementations = {"ours": peers.unrouted(problem), "eager": peers.loop(problem)}
    rows, above = [], False
    for mode, limit in LIMITS.items():
        steps = {name: cases.step(mode, make, problem) for name, make in implementations.items()}
        # The heap's first pages cost a page fault each, tens of microseconds on a virtual machine.
        measure.interleaved_medians(steps, seconds=options.seconds)
        seconds = measure.interleaved_medians(steps, seconds=options.seconds)
        ratio = seconds["ours"] / seconds["eager"]
        above |= ratio > limit
        times = [f"{seconds[name] * 1e6:.2f}" for name in implementations]
        rows.append([mode, *times, f"{ratio:.2f}", f"{limit:.1f}"])
    print(measure.markdown_table(["mode", "ours us", "eager us", "ours/eager", "limit"], rows))
    if options.check and above:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
