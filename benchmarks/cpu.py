"""``python -m benchmarks.cpu``: the fused op on the CPU against PyTorch and the machine's limits.

The layer is NeMo's (pre norm, swish, residual) with one list of weights an adapter, rows spread
evenly over the adapters in random order. Times are medians, ours and the peers' taken in turn in
one run; the result of each is checked against eager PyTorch's beside its timing.

The floor of a case is max(bytes / copy bandwidth, flops / FMA rate), with both ceilings measured in
the same run. A batch that stays in the caches can be faster than its floor.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adapter_ext import AdapterWeights
from benchmarks import ceilings, measure, peers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("forward", "forward+backward")
PEERS = ("eager", "compile", "bmm")
FULL = {
    "hidden_size": [512, 1024, 4096],
    "bottleneck": [16, 64, 256],
    "rows": [64, 2048, 8192],
    "adapters": [1, 8, 64],
}
QUICK = {"hidden_size": [1024], "bottleneck": [64], "rows": [64, 2048], "adapters": [1, 8, 64]}
# Compiling a loop over more adapters takes minutes a case.
MAX_COMPILED_ADAPTERS = 8
# Largest difference to eager PyTorch in float32, relative to the largest magnitude in the tensor;
# the peers, which round after every operator, may differ by PEERS_ALLOWANCE times as much.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
PEERS_ALLOWANCE = 10.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    mode: str
    dtype: str
    hidden_size: int
    bottleneck: int
    rows: int
    adapters: int

    def __str__(self) -> str:
        return (
            f"{self.mode} {self.dtype} D={self.hidden_size} r={self.bottleneck} "
            f"T={self.rows} A={self.adapters}"
        )

    def floor(self, limits: ceilings.Ceilings) -> float:
        """The least time the case can take, in seconds."""
        itemsize = DTYPES[self.dtype].itemsize
        activations = self.rows * self.hidden_size * itemsize
        used = min(self.adapters, self.rows)
        weights = used * 2 * self.hidden_size * (1 + self.bottleneck) * itemsize
        flops = 4 * self.rows * self.hidden_size * self.bottleneck
        forward = limits.floor(2 * activations + weights, flops)
        if self.mode == "forward":
            return forward
        # The backward reads x, dy and the weights, and writes dx and the weights' gradients.
        return forward + limits.floor(3 * activations + 2 * weights, 2 * flops)


def run_case(case: Case, wanted: Sequence[str], seconds: float) -> dict[str, float]:
    """Checks and times one case.

    Args:
        case: what to run.
        wanted: names of the peers.
        seconds: how long to time each function.

    Returns:
        Median seconds a call, by name: ``ours`` and each peer that runs this case.

    Raises:
        RuntimeError: a result differs from eager PyTorch's in float32 by more than rounding.
    """
    problem = peers.make_problem(
        case.rows, case.hidden_size, case.bottleneck, case.adapters, DTYPES[case.dtype]
    )
    implementations = {"ours": peers.ours(problem)}
    if "eager" in wanted:
        implementations["eager"] = peers.loop(problem)
    if "compile" in wanted and case.adapters <= MAX_COMPILED_ADAPTERS:
        implementations["compile"] = peers.compiled(problem)
    if "bmm" in wanted:
        implementations["bmm"] = peers.bmm(problem)
    exact = problem.float()
    expected = _results(case.mode, peers.loop(exact), exact)
    steps = {}
    for name, forward in implementations.items():
        stacked = name == "bmm"
        results = _results(case.mode, forward, problem, stacked=stacked)
        _check(case, name, results, expected)
        steps[name] = step(case.mode, forward, problem, stacked=stacked)
    return measure.interleaved_medians(steps, seconds=seconds)


def step(
    mode: str, forward: peers.Forward, problem: peers.Problem, *, stacked: bool = False
) -> Callable[[], object]:
    """What is timed: one forward, or one forward and backward to every input."""
    if mode == "forward":

        def inference() -> Tensor:
            with torch.no_grad():
                return forward()

        return inference
    inputs = problem.inputs(stacked=stacked)
    return lambda: torch.autograd.grad(forward(), inputs, problem.dy)


def _results(
    mode: str, forward: peers.Forward, problem: peers.Problem, *, stacked: bool = False
) -> list[Tensor]:
    """y, and in a backward the gradients of x and of each field of the weights, stacked."""
    if mode == "forward":
        with torch.no_grad():
            return [forward()]
    y = forward()
    dx, *grads = torch.autograd.grad(y, problem.inputs(stacked=stacked), problem.dy)
    if not stacked:
        count = len(grads) // 4
        grads = [torch.stack(grads[i * count : (i + 1) * count]) for i in range(4)]
    return [y.detach(), dx, *grads]


def _check(case: Case, name: str, results: list[Tensor], expected: list[Tensor]) -> None:
    allowed = TOLERANCES[case.dtype] * (1.0 if name == "ours" else PEERS_ALLOWANCE)
    names = ("y", "dx", *AdapterWeights._fields)
    for tensor_name, result, reference in zip(names, results, expected, strict=False):
        error = float((result.float() - reference).abs().max() / reference.abs().max())
        if not error <= allowed:
            raise RuntimeError(
                f"{case}: {tensor_name} of {name} differs from eager PyTorch in float32 by "
                f"{error:.2g} of its largest magnitude; {allowed:.2g} is allowed"
            )


def table(results: Sequence[dict[str, Any]], wanted: Sequence[str]) -> str:
    """The results as a Markdown table."""

    def row(result: dict[str, Any]) -> list[str]:
        seconds = result["seconds"]
        ratios = [
            f"{seconds[peer] / seconds['ours']:.2f}" if peer in seconds else "" for peer in wanted
        ]
        ours = seconds["ours"]
        return [result["name"], f"{ours * 1e3:.3f}", f"{ours / result['floor']:.2f}", *ratios]

    header = ["case", "ours ms", "ours/floor", *(f"{peer}/ours" for peer in wanted)]
    return measure.markdown_table(header, map(row, results))


def summary(results: Sequence[dict[str, Any]], wanted: Sequence[str]) -> str:
    """For each mode, type and peer: how much faster than it ours is at least and in the median."""
    rows = []
    for mode, dtype, peer in itertools.product(MODES, DTYPES, wanted):
        ratios = [
            result["seconds"][peer] / result["seconds"]["ours"]
            for result in results
            if result["mode"] == mode and result["dtype"] == dtype and peer in result["seconds"]
        ]
        if ratios:
            rows.append(
                [
                    f"{mode} {dtype}",
                    f"{peer}/ours",
                    f"{min(ratios):.2f}",
                    f"{statistics.median(ratios):.2f}",
                    str(len(ratios)),
                ]
            )
    return measure.markdown_table(["summary", "ratio", "least", "median", "cases"], rows)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; None in a filter means the default grid."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a subset, in under 90 s")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    for name, values in FULL.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, nargs="+", type=int, metavar="N", help=f"default: {values}")
    parser.add_argument(
        "--peers",
        type=lambda text: text.split(","),
        help=f"of {','.join(PEERS)}; default: all, without compile in a quick run",
    )
    parser.add_argument("--no-compile", action="store_true", help="the peers without torch.compile")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--seconds", type=float, default=0.15, help="for each function and case")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write results there too")
    parsed = parser.parse_args(arguments)
    if parsed.peers is None:
        parsed.peers = [peer for peer in PEERS if not (parsed.quick and peer == "compile")]
    if unknown := set(parsed.peers) - set(PEERS):
        parser.error(f"--peers: expected some of {','.join(PEERS)}, got {','.join(unknown)}")
    if parsed.no_compile:
        parsed.peers = [peer for peer in parsed.peers if peer != "compile"]
    return parsed


def main() -> None:
    """Runs the grid and prints its table."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    grid = QUICK if options.quick else FULL
    sizes = [getattr(options, name) or values for name, values in grid.items()]
    cases = [Case(*values) for values in itertools.product(options.mode, options.dtype, *sizes)]
    limits = ceilings.measure()
    machine = measure.machine()
    results = []
    for case in measure.progress(cases, "cases"):
        seconds = run_case(case, options.peers, options.seconds)
        floor = case.floor(limits)
        results.append(
            {"name": str(case), **dataclasses.asdict(case), "floor": floor, "seconds": seconds}
        )
    print(
        f"{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads, torch "
        f"{machine['torch']}, adapter_ext {machine['adapter_ext']}; copy "
        f"{limits.bytes_per_second / 1e9:.1f} GB/s, fp32 multiply-adds "
        f"{limits.flops_per_second / 1e9:.0f} GFLOP/s; {machine['date']}\n"
    )
    print(table(results, options.peers), summary(results, options.peers), sep="\n\n")
    if options.json:
        document = {
            "machine": machine,
            "ceilings": dataclasses.asdict(limits),
            "results": results,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
        print(f"\nwritten: {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
