"""``python -m benchmarks.cpu``: the fused op on the CPU against PyTorch and the machine's limits.

Times are medians, ours and the peers' taken in turn in one run; the result of each is checked
against eager PyTorch's beside its timing.

The floor of a case is max(bytes / copy bandwidth, flops / FMA rate), with both ceilings measured in
the same run. A batch that stays in the caches can be faster than its floor.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Sequence

import torch

from benchmarks import cases, ceilings, measure
from benchmarks.cases import DTYPES, PEERS, Case

MODES = (cases.FORWARD, cases.TRAINING)
FULL = {
    "hidden_size": [512, 1024, 4096],
    "bottleneck": [16, 64, 256],
    "rows": [64, 2048, 8192],
    "adapters": [1, 8, 64],
}
QUICK = {"hidden_size": [1024], "bottleneck": [64], "rows": [64, 2048], "adapters": [1, 8, 64]}
# Compiling a loop over more adapters takes minutes a case.
MAX_COMPILED_ADAPTERS = 8


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
    limits = ceilings.cpu()
    machine = measure.machine()
    results = []
    chosen = [Case(*values) for values in itertools.product(options.mode, options.dtype, *sizes)]
    for case in measure.progress(chosen, "cases"):
        wanted = [
            peer
            for peer in options.peers
            if peer != "compile" or case.adapters <= MAX_COMPILED_ADAPTERS
        ]
        result = cases.measure_case(case, wanted, limits=limits, seconds=options.seconds)
        results.append(result)
    print(
        f"{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads, torch "
        f"{machine['torch']}, adapter_ext {machine['adapter_ext']}; copy "
        f"{limits.bytes_per_second / 1e9:.1f} GB/s, fp32 multiply-adds "
        f"{limits.flops_per_second / 1e9:.0f} GFLOP/s; {machine['date']}\n"
    )
    print(cases.table(results, options.peers), cases.summary(results, options.peers), sep="\n\n")
    if options.json:
        cases.write_json(
            options.json,
            {"machine": machine, "ceilings": dataclasses.asdict(limits), "results": results},
        )
        print(f"\nwritten: {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
