"""``python -m benchmarks cuda-traffic``: what the CUDA kernels ask of memory, without a GPU.

The kernels run in the PTX simulator beside the checkout, which counts the sectors that each launch
moves. The table is that of docs/cuda.md, where its columns are explained: ``--write`` puts new
lines there, ``--check`` counts some lines again and fails where one has become worse.

The layer is that of ``benchmarks cpu``. A forward keeps what the backward needs; decode is
inference on few rows.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

import adapter_ext
from adapter_ext.ops import raw_forward_arguments
from benchmarks import measure, peers
from benchmarks.cases import DTYPES, Case

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- traffic: begin -->\n", "<!-- traffic: end -->\n"

SECTOR_BYTES = 32
ROWS = 8448  # tiles of 64 rows for each of the simulated device's 132 multiprocessors
TOLERANCE = 1.05  # a count may be so many times worse than the table says
SIMULATOR = {
    "PTXSIM_L2_MB": "12",
    # Races are looked for by the tests; without that the simulator is several times as fast.
    "PTXSIM_RACE": "0",
    "PTXSIM_SHRACE": "0",
    "PTXSIM_UNINIT": "0",
}

COLUMNS = ("DRAM / ideal", "L2 / ideal", "load efficiency", "store efficiency", "shared / ideal")
HEADER = ("case", "kernels", *COLUMNS)
Counts = Mapping[str, float]
"""The numbers in a line of the table, by column."""
Launch = Mapping[str, Any]
"""What the simulator says of a launch, "Counters" in its README."""


def cases() -> list[Case]:
    """The lines of the table."""
    widths, bottlenecks = (512, 1024, 2048, 4096), (16, 64)
    grids = [
        (("forward", "backward"), DTYPES, widths, bottlenecks, (ROWS,), (1, 8, 64)),
        # Too few rows for tiles of 64, and too few for the form of one kernel.
        (("forward",), DTYPES, (2048, 4096), (64,), (4096, 2048), (8,)),
        # Longer ranges of rows, whose sums cost less.
        (("backward",), DTYPES, (512, 1024), (64,), (65536,), (8,)),
        (("decode",), DTYPES, widths, bottlenecks, (64,), (1, 64)),
    ]
    return [Case(*values) for grid in grids for values in itertools.product(*grid)]


def is_checked(case: Case) -> bool:
    """Whether ``--check`` counts a case again: the small ones of each form."""
    if case.mode == "decode":
        return case.hidden_size == 4096
    if case.rows != ROWS:
        return case.hidden_size == 2048
    return case.hidden_size == 512 and case.adapters > 1


def load_kernels() -> Any:
    """The ops of ``torch.ops.adapter_ext`` for CPU tensors, by the kernels in the simulator."""
    sys.path.append(str(ROOT / "tests"))
    build = importlib.import_module("simt.build")
    in_turns = build.link([build.FOLDER / "in_turns.cpp"], "ptxsim")
    ctypes.CDLL(str(in_turns), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(build.library("ptxsim")))  # type: ignore[no-untyped-call]
    return torch.ops.adapter_ext_simt


def run(ops: Any, case: Case) -> list[Launch]:
    """Runs a case, and returns its launches."""
    problem = peers.make_problem(
        case.rows, case.hidden_size, case.bottleneck, case.adapters, DTYPES[case.dtype]
    )
    routing = adapter_ext.route(problem.ids, case.adapters)
    arguments = raw_forward_arguments(problem.x, problem.weights, routing, eps=peers.EPS)
    x, weights, order, offsets, *options = arguments
    with tempfile.NamedTemporaryFile("r") as file, torch.no_grad():
        os.environ.update(SIMULATOR, PTXSIM_STATS=file.name)
        if case.mode == "decode":
            ops.linear_adapter(*arguments)
        elif case.mode == "forward":
            ops.linear_adapter_forward(*arguments)
        else:
            saved = torch.ones(case.rows * (case.bottleneck + 2))  # any values will do
            needed = [1] * (1 + len(weights))
            ops.linear_adapter_backward(
                problem.dy, None, x, weights, order, offsets, saved, needed, *options
            )
        return [json.loads(line) for line in file]


def ideal_bytes(case: Case, launches: Iterable[Launch]) -> int:
    """What a case has to move, in bytes.

    Forward: x read and y written, x read once more where the products are made by two kernels.
    Backward: x read, dy read twice, dx written. Beside these passes, each once: the weights of the
    adapters that have rows, their gradients, and h, mean and rstd, kept or read.
    """
    itemsize = DTYPES[case.dtype].itemsize
    if case.mode == "backward":
        passes = 4
    else:
        passes = 2 if any("::forward_kernel<" in launch["kernel"] for launch in launches) else 3
    used = min(case.adapters, case.rows)
    weights = used * 2 * case.hidden_size * (1 + case.bottleneck) * itemsize
    kept = case.rows * (case.bottleneck + 2) * 4 if case.mode != "decode" else 0
    return (
        passes * case.rows * case.hidden_size * itemsize
        + weights * (2 if case.mode == "backward" else 1)
        + kept
    )


def count(case: Case, launches: Sequence[Launch]) -> Counts:
    """A line of the table, from the launches of its case."""

    def total(*counters: str) -> int:
        return sum(launch[counter] for launch in launches for counter in counters)

    ideal = ideal_bytes(case, launches)
    loads, stores = total("global_load_sectors"), total("global_store_sectors")
    values = (
        total("l2_miss_read_sectors", "l2_miss_write_sectors") * SECTOR_BYTES / ideal,
        (loads + stores) * SECTOR_BYTES / ideal,
        total("global_load_ideal_sectors") / loads,
        total("global_store_ideal_sectors") / stores,
        total("shared_wavefronts") / total("shared_ideal_wavefronts"),
    )
    return dict(zip(COLUMNS, values, strict=True))


def kernel_name(launch: Launch) -> str:
    """The name of a launch's kernel, with the rows of its tiles where it has several."""
    match = re.search(r"(\w+)(?:<.*>)?\(", launch["kernel"])
    if match is None:
        raise ValueError(f"expected the signature of a kernel, got {launch['kernel']!r}")
    rows = re.search(r"Shape<(\d+),", launch["kernel"])
    return match[1].removesuffix("_kernel") + (f" {rows[1]}" if rows else "")


def line(case: Case, launches: Sequence[Launch], counts: Counts) -> list[str]:
    """The cells of a line of the table."""
    kernels = dict.fromkeys(map(kernel_name, launches))
    return [str(case), ", ".join(kernels), *(f"{counts[column]:.3f}" for column in COLUMNS)]


def counts_in(cells: Sequence[str]) -> Counts:
    """What a line of the table says."""
    return dict(zip(COLUMNS, map(float, cells[2:]), strict=True))


def parse_page(page: str) -> tuple[str, dict[str, list[str]], str]:
    """What a page has before its table, the lines of the table by case, and what is behind it.

    Raises:
        ValueError: the table is not there, or has other columns.
    """
    before, begin, rest = page.partition(BEGIN)
    text, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"expected a table between {BEGIN!r} and {END!r}")
    lines = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines()]
    if lines and tuple(lines[0]) != HEADER:
        raise ValueError(f"expected the columns {HEADER}, got {lines[0]}")
    return before + begin, {cells[0]: cells for cells in lines[2:]}, end + after


def regressions(documented: Mapping[str, Counts], counted: Mapping[str, Counts]) -> list[str]:
    """What has become worse than the table says by more than the tolerance, in words."""
    found = []
    for case, counts in counted.items():
        if case not in documented:
            found.append(f"{case}: not in the table")
            continue
        for column in COLUMNS:
            then, now = documented[case][column], counts[column]
            worse = then / now if column.endswith("efficiency") else now / then
            if worse > TOLERANCE:
                found.append(f"{case}: {column} is {now:.3f}, the table says {then:.3f}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Counts, prints the table, and writes or compares it where that is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cuda-traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help=f"to {PAGE.relative_to(ROOT)}")
    action.add_argument("--check", action="store_true", help="some lines against those there")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases with this in their names")
    options = parser.parse_args(arguments)
    wanted = [case for case in cases() if is_checked(case) or not options.check]
    ops = load_kernels()
    counted, lines = {}, {}
    for case in measure.progress([case for case in wanted if options.only in str(case)], "cases"):
        launches = run(ops, case)
        counted[str(case)] = count(case, launches)
        lines[str(case)] = line(case, launches, counted[str(case)])
    print(measure.markdown_table(HEADER, lines.values()))
    before, documented, after = parse_page(PAGE.read_text())
    if options.write:
        documented.update(lines)
        all_lines = [documented[str(case)] for case in cases() if str(case) in documented]
        PAGE.write_text(f"{before}{measure.markdown_table(HEADER, all_lines)}\n{after}")
    if options.check:
        found = regressions({name: counts_in(row) for name, row in documented.items()}, counted)
        if found:
            raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
