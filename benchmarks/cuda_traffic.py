"""``python -m benchmarks cuda-traffic``: what the CUDA kernels ask of memory, without a GPU.

The kernels run in the PTX simulator beside the checkout, which counts the sectors that each launch
moves. The table is that of docs/cuda.md, where its columns are explained: ``--write`` puts new
lines there, ``--check`` counts some lines again and fails where one has become worse, or where a
line misses a target without being among ``EXEMPTIONS``.

The layer is that of ``benchmarks cpu``. A forward keeps what the backward needs; decode is
inference on few rows.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib
import itertools
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
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
TOLERANCE = 1.05  # a count may be so many times worse than the table says
SIMULATOR = {
    "PTXSIM_STRICT": "0",
    # Races are looked for by the tests; without that the simulator is several times as fast.
    "PTXSIM_RACE": "0",
    "PTXSIM_SHRACE": "0",
    "PTXSIM_UNINIT": "0",
}

COLUMNS = (DRAM, _, LOADS, STORES, SHARED) = (
    "DRAM / ideal",
    "L2 / ideal",
    "load efficiency",
    "store efficiency",
    "shared / ideal",
)
HEADER = ("case", "kernels", "passes", *COLUMNS)
Counts = Mapping[str, float]
"""The numbers in a line of the table, by column."""
Launch = Mapping[str, Any]
"""What the simulator says of a launch, "Counters" in its README."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What is simulated.

    Attributes:
        multiprocessors: how many.
        cache: of the second level, in MiB.
    """

    multiprocessors: int
    cache: int


# Decode is of few rows, whatever the device. All other calls are as large as they would be on an
# H100, by the same measure.
H100 = Device(132, 50)
EIGHTH = Device(16, 6)


def device(case: Case) -> Device:
    """What a case runs on."""
    return H100 if case.mode == "decode" else EIGHTH


def many_rows(dtype: str, hidden_size: int) -> int:
    """Rows enough for x to be twice the cache, and for a tile of 64 on each multiprocessor."""
    of_cache = 2 * EIGHTH.cache * 2**20 // (hidden_size * DTYPES[dtype].itemsize)
    return max(of_cache, 64 * EIGHTH.multiprocessors)


def cases() -> list[Case]:
    """The lines of the table."""
    widths, bottlenecks = (512, 1024, 2048, 4096), (16, 64)
    large = [
        Case(mode, dtype, width, bottleneck, many_rows(dtype, width), adapters)
        for mode, dtype, width, bottleneck, adapters in itertools.product(
            ("forward", "backward"), DTYPES, widths, bottlenecks, (1, 8, 64)
        )
    ]
    grids = [
        # Too few rows for tiles of 64, and in float32 too few for the form of one kernel.
        (("forward",), DTYPES, (2048, 4096), (64,), (256, 128), (8,)),
        (("decode",), DTYPES, widths, bottlenecks, (64,), (1, 64)),
    ]
    return large + [Case(*values) for grid in grids for values in itertools.product(*grid)]


def is_checked(case: Case) -> bool:
    """Whether ``--check`` counts a case again: some of each form."""
    if case.mode == "decode":
        return case.hidden_size == 512
    if case.rows <= 256:
        return case.hidden_size == 2048
    some = {(512, 1), (1024, 64), (2048, 8), (4096, 1)}
    return case.bottleneck == 64 and (case.hidden_size, case.adapters) in some


TARGETS: Mapping[str, float] = {DRAM: 1.1, LOADS: 0.95, STORES: 0.95, SHARED: 1.1}
DECODE_TARGETS = {**TARGETS, DRAM: 1.2}


@dataclasses.dataclass(frozen=True)
class Exemption:
    """Lines that are known to miss a target.

    Attributes:
        reason: why, as docs/cuda.md says at length.
        column: of the table.
        limit: what holds instead.
        applies: to which lines.
    """

    reason: str
    column: str
    limit: float
    applies: Callable[[Case], bool]


EXEMPTIONS = (
    Exemption(
        "the backward reads `down` twice: for the row sums of the norm, and for dx",
        DRAM,
        1.21,
        lambda case: case.mode == "backward" and case.adapters == 64,
    ),
    Exemption(
        "z and dh, written and read by the backward, and sums of ranges",
        DRAM,
        1.175,
        lambda case: case.mode == "backward" and case.bottleneck * 16 >= case.hidden_size,
    ),
    Exemption(
        "of rows of 16 KiB most columns are read again, when the cache has lost some of them",
        DRAM,
        1.18,
        lambda case: (
            (case.mode, case.dtype, case.hidden_size) == ("forward", "fp32", 4096)
            and case.rows > 256
        ),
    ),
    Exemption(
        "of rows of 8 KiB most columns are read again: buffers for four parts have their room",
        DRAM,
        1.14,
        lambda case: (
            (case.mode, case.dtype, case.hidden_size) == ("forward", "bf16", 4096)
            and case.rows > 256
        ),
    ),
    Exemption(
        "sums of 128 columns, so that rows of 512 have four parts",
        DRAM,
        1.41,
        lambda case: (
            case.mode == "decode"
            and case.dtype == "bf16"
            and case.bottleneck == 64
            and case.adapters == 1
            and case.hidden_size == 512
        ),
    ),
    Exemption(
        "a lane's rows of sums follow each other, so that lanes meet in the banks when they store",
        SHARED,
        1.11,
        lambda case: (
            (case.mode, case.dtype, case.adapters) == ("backward", "fp32", 64)
            and case.hidden_size == 4096
            and case.bottleneck == 16
        ),
    ),
)


def targets(case: Case) -> Mapping[str, float]:
    """What the numbers in a line should not be worse than."""
    return DECODE_TARGETS if case.mode == "decode" else TARGETS


def limit(case: Case, column: str) -> float | None:
    """What a number may not be worse than, if there is anything."""
    for exemption in EXEMPTIONS:
        if exemption.column == column and exemption.applies(case):
            return exemption.limit
    return targets(case).get(column)


def is_worse(column: str, number: float, limit: float) -> bool:
    """Whether a number of the table is worse than another."""
    return number < limit if column.endswith("efficiency") else number > limit


def missed(case: Case, counts: Counts) -> list[str]:
    """The targets that a line misses, in words."""
    found = []
    for column in COLUMNS:
        number, most = counts[column], limit(case, column)
        if most is not None and is_worse(column, number, most):
            found.append(f"{case}: {column} is {number:.3f}, the target is {most}")
    return found


class Kernels:
    """The kernels in the simulator, as ops for CPU tensors.

    Attributes:
        ops: those of ``torch.ops.adapter_ext``.
    """

    def __init__(self) -> None:
        sys.path.append(str(ROOT / "tests"))
        build = importlib.import_module("simt.build")
        if reason := build.missing("ptxsim"):
            sys.exit(f"benchmarks cuda-traffic: needs the CUDA simulator: {reason}")
        in_turns = build.link([build.FOLDER / "in_turns.cpp"], "ptxsim")
        self._in_turns = ctypes.CDLL(str(in_turns), mode=ctypes.RTLD_GLOBAL)
        library = str(build.library("ptxsim"))
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        self._library = ctypes.CDLL(library)
        self.ops: Any = torch.ops.adapter_ext_simt

    def simulate(self, device: Device, statistics: str) -> None:
        """Says what launches run on, and the file that counts go to."""
        self._library.simt_configure(ctypes.c_uint64(0), 0, device.multiprocessors, 0)
        # As many blocks as a multiprocessor may hold run in turns.
        self._in_turns.in_turns_most_blocks(4 * device.multiprocessors)
        os.environ.update(SIMULATOR, PTXSIM_STATS=statistics, PTXSIM_L2_MB=str(device.cache))


def run(kernels: Kernels, case: Case) -> list[Launch]:
    """Runs a case, and returns its launches."""
    problem = peers.make_problem(
        case.rows, case.hidden_size, case.bottleneck, case.adapters, DTYPES[case.dtype]
    )
    routing = adapter_ext.route(problem.ids, case.adapters)
    arguments = raw_forward_arguments(problem.x, problem.weights, routing, eps=peers.EPS)
    x, weights, order, offsets, *options = arguments
    with tempfile.NamedTemporaryFile("r") as file, torch.no_grad():
        kernels.simulate(device(case), file.name)
        ops = kernels.ops
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


def tile_rows(launch: Launch) -> int | None:
    """The rows of a launch's tiles, where its kernel has several."""
    rows = re.search(r"Shape<(\d+),", launch["kernel"])
    return int(rows[1]) if rows else None


def is_resident(case: Case, launch: Launch) -> bool:
    """Whether a launch is of the whole layer, with room for the rows of x in shared memory."""
    if not re.search(r"::forward(_parts)?_kernel<", launch["kernel"]):
        return False
    rows_bytes = (tile_rows(launch) or 0) * case.hidden_size * DTYPES[case.dtype].itemsize
    return bool(launch["dynamic_smem"] >= rows_bytes)


def ideal_passes(case: Case, launches: Iterable[Launch]) -> int:
    """How often rows have to be read or written.

    Forward: x read and y written, x read once more where the products are made by two kernels, or
    by one that has no room for its rows. Backward: x read, dy read twice, dx written.
    """
    if case.mode == "backward":
        return 4
    return 2 if any(is_resident(case, launch) for launch in launches) else 3


def ideal_bytes(case: Case, launches: Iterable[Launch]) -> int:
    """What a case has to move, in bytes.

    Beside the passes, each once: the weights of the adapters that have rows, their gradients, and
    h, mean and rstd, kept or read.
    """
    itemsize = DTYPES[case.dtype].itemsize
    used = min(case.adapters, case.rows)
    weights = used * 2 * case.hidden_size * (1 + case.bottleneck) * itemsize
    kept = case.rows * (case.bottleneck + 2) * 4 if case.mode != "decode" else 0
    return (
        ideal_passes(case, launches) * case.rows * case.hidden_size * itemsize
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
    rows = tile_rows(launch)
    return match[1].removesuffix("_kernel") + (f" {rows}" if rows else "")


def line(case: Case, launches: Sequence[Launch], counts: Counts) -> list[str]:
    """The cells of a line of the table."""
    kernels = dict.fromkeys(map(kernel_name, launches))
    passes = str(ideal_passes(case, launches))
    return [str(case), ", ".join(kernels), passes, *(f"{counts[name]:.3f}" for name in COLUMNS)]


def counts_in(cells: Sequence[str]) -> Counts:
    """What a line of the table says."""
    return dict(zip(COLUMNS, map(float, cells[3:]), strict=True))


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
    of_action = [case for case in cases() if is_checked(case) or not options.check]
    wanted = [case for case in of_action if options.only in str(case)]
    if not wanted:
        parser.error(
            f"--only: expected a part of some case's name, as '{of_action[0]}', "
            f"got {options.only!r}, which is in none"
        )
    kernels = Kernels()
    counted, lines = {}, {}
    for case in measure.progress(wanted, "cases"):
        launches = run(kernels, case)
        counted[str(case)] = count(case, launches)
        lines[str(case)] = line(case, launches, counted[str(case)])
    print(measure.markdown_table(HEADER, lines.values()))
    before, documented, after = parse_page(PAGE.read_text())
    if options.write:
        documented.update(lines)
        all_lines = [documented[str(case)] for case in cases() if str(case) in documented]
        PAGE.write_text(f"{before}{measure.markdown_table(HEADER, all_lines)}\n{after}")
    if options.check:
        in_table = {name: counts_in(row) for name, row in documented.items()}
        found = regressions(in_table, counted)
        for case in cases():
            found += missed(case, in_table.get(str(case)) or counted[str(case)])
        if found:
            raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
