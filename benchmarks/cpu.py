"""``python -m benchmarks cpu``: the fused op on the CPU against peers and the machine's limits.

Ours, the peers, a copy and a loop of multiply-adds are timed in turn. Ratios are medians of those
in each round; the floor of a case is max(bytes / copy bandwidth, flops / FMA rate), with both
limits as its rounds met them. A batch that stays in the caches can be faster than its floor. The
result of each function is checked against eager PyTorch's beside its timing.

Tables: *grid*, shapes against PyTorch's operators; *adapters*, how time depends on the number of
adapters and on the spread of rows over them; *decode*, few rows and up to 4096 stacked adapters, of
which at most one a row is used; *packages*, whole samples against packages for adapters.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

from benchmarks import cases, ceilings, command, measure, packages, peers
from benchmarks.cases import DTYPES, FORWARD, TRAINING, Case

MODES = (FORWARD, TRAINING)
FULL = {
    "hidden_size": [512, 1024, 4096],
    "bottleneck": [16, 64, 256],
    "rows": [64, 2048, 8192],
    "adapters": [1, 8, 64],
}
QUICK = {"hidden_size": [1024], "bottleneck": [64], "rows": [64, 2048], "adapters": [1, 8, 64]}
TABLES = ("grid", "adapters", "decode", "packages")
# Peers of each table; of the others that the command line names, only those that are in it.
TABLE_PEERS = {
    "grid": tuple(peers.PEERS),
    "adapters": tuple(peers.PEERS),
    "decode": tuple(peers.PEERS),
    "packages": ("eager", *packages.PACKAGES),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; None for a size of the grid means the default grid."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a subset, in some minutes")
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    for name, values in FULL.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(
            option,
            nargs="+",
            type=command.positive,
            metavar="N",
            help=f"of the grid, default: {values}",
        )
    parser.add_argument(
        "--stacked", action="store_true", help="the grid with one tensor for all adapters' weights"
    )
    parser.add_argument(
        "--peers",
        type=lambda text: text.split(","),
        help=f"of {','.join(cases.PEERS)}; default: all, without compile in a quick run",
    )
    parser.add_argument("--no-compile", action="store_true", help="the peers without torch.compile")
    command.add_timing(parser, seconds=0.15)
    parser.add_argument(
        "--settle",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="for each function at most, while it is not clear of each peer if it is faster",
    )
    parser.add_argument(
        "--allocator",
        choices=measure.ALLOCATORS,
        default="default",
        help="of the C library; raised: it keeps freed memory, so that large results cost no page "
        "faults (starts the program again with MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_)",
    )
    command.add_output(parser)
    parsed = parser.parse_args(arguments)
    if parsed.peers is None:
        parsed.peers = [peer for peer in cases.PEERS if not (parsed.quick and peer == "compile")]
    if unknown := set(parsed.peers) - set(cases.PEERS):
        parser.error(f"--peers: expected some of {','.join(cases.PEERS)}, got {','.join(unknown)}")
    if parsed.no_compile:
        parsed.peers = [peer for peer in parsed.peers if peer != "compile"]
    parsed.sampler = command.set_timing(parser, parsed)
    return parsed


def chosen_cases(options: argparse.Namespace) -> list[tuple[str, Case]]:
    """Each case with its table."""
    grid = QUICK if options.quick else FULL
    sizes = {name: getattr(options, name) or values for name, values in grid.items()}
    every_row = [2048] if options.quick else [2048, 8192]
    chosen = []
    for mode, dtype in itertools.product(options.mode, options.dtype):
        tables = {
            "grid": [
                Case(mode, dtype, *values, stacked=options.stacked)
                for values in itertools.product(*sizes.values())
            ],
            "adapters": [
                Case(mode, dtype, 1024, 64, rows, adapters, spread)
                for rows in every_row
                for adapters, spread in [(1, "even"), *itertools.product([8, 64], peers.SPREADS)]
            ],
            "decode": [
                Case(mode, dtype, 1024, 64, 64, adapters, stacked=True)
                for adapters in (64, 512, 4096)
                if mode == FORWARD
            ],
            "packages": [
                Case(mode, dtype, 1024, 64, rows, adapters, sample_rows=rows // 64)
                for rows in (64, 2048)
                for adapters in (1, 8, 64)
            ],
        }
        chosen += [(name, case) for name in options.table for case in tables[name]]
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the cases and prints their tables."""
    options = parse_arguments(arguments)
    measure.use_allocator(options.allocator)
    probes = ceilings.Probes()
    best = probes.best(options.sampler).measured()
    chosen = chosen_cases(options)
    results, failures = [], []
    for table in options.table:
        done = cases.sweep(
            [case for name, case in chosen if name == table],
            [peer for peer in options.peers if peer in TABLE_PEERS[table]],
            description=table,
            probes=probes,
            seconds=options.seconds,
            settle=options.settle,
            table=table,
            sampler=options.sampler,
        )
        results += done.results
        failures += done.failures
        if done.interrupted:
            failures.append(f"{table}: interrupted before {done.dropped[0]}")
            break
    command.finish("cpu", arguments, results, best, options.json, failures=failures)
    if failures:
        command.fail(failures)


if __name__ == "__main__":
    main(sys.argv[1:])
