"""``python -m benchmarks cuda``: the fused op on a GPU against PyTorch and the copy bandwidth.

``--check`` runs the op tests on the GPU first. Then times are medians, ours and the peers' taken in
turn in one run, each call between two events and with a cold second-level cache; the result of each
is checked against eager PyTorch's beside its timing. *replay* is the forward as a CUDA graph, which
costs the host one launch.

The floor of a case is its bytes over the bandwidth of a large copy, timed in its rounds. All of it
takes less than ``--budget`` seconds: cases for which no time is left are named and left out.
Exits with 1 where a test or a check fails, or where there is no GPU or no CUDA library.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from typing import Any

import torch

from adapter_ext import _C, doctor
from benchmarks import cases, ceilings, command, measure, tables
from benchmarks.cases import FORWARD, REPLAY, TRAINING, Case
from benchmarks.results import Document

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# Not tests/test_bad_input.py: ids out of range fail an assertion on the GPU, after which the
# process can use it no more; all else there is checked by code that the CPU's op has too.
OP_TESTS = (
    "tests/test_linear_adapter.py",
    "tests/test_linear_adapter_gradients.py",
    "tests/test_route.py",
    "tests/test_bitwise.py",
    "tests/test_random.py",
    "tests/test_opcheck.py",
    "tests/test_cuda_kernels.py",
)

COPY_BYTES = 2 * 2**30  # far larger than any cache
PEERS = ("eager", "bmm")
COMPILED_PEERS = ("eager", "compile")
# Seconds that must be left for a case to begin.
CASE_SECONDS = 5.0
COMPILED_CASE_SECONDS = 60.0
# Seconds that the op tests leave to the timing.
TIMING_SECONDS = 90.0


def main_cases() -> list[Case]:
    """The cases against eager PyTorch and its padded form, the most important first."""
    sizes = list(itertools.product([1024, 4096], [16, 64], [64, 2048, 16384], [1, 8, 64]))
    decode = [size for size in sizes if size[2] == 64]
    float32 = [size for size in sizes if size[:2] == (1024, 64)]
    return [
        *(Case(FORWARD, "bf16", *size) for size in sizes),
        *(Case(REPLAY, "bf16", *size) for size in decode),
        *(Case(TRAINING, "bf16", *size) for size in sizes),
        *(Case(mode, "fp32", *size) for mode in (FORWARD, TRAINING) for size in float32),
        # Gradients of four tensors, as the padded form has them, in place of four an adapter.
        *(
            Case(TRAINING, "bf16", *size, stacked=True)
            for size in sizes
            if size[:2] == (1024, 64) and size[3] > 1
        ),
    ]


def compiled_cases() -> list[Case]:
    """The cases against ``torch.compile``: few, since it takes tens of seconds to compile one."""
    return [
        Case(mode, "bf16", 1024, 64, 2048, adapters)
        for mode, adapters in itertools.product((FORWARD, TRAINING), (1, 8))
    ]


def missing() -> str | None:
    """What is not there and would be needed, if anything."""
    reasons = []
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__} is a CPU build")
    elif not torch.cuda.is_available():
        reasons.append(f"torch {torch.__version__}, for CUDA {torch.version.cuda}, sees no GPU")
    if not _C.cuda_compiler:
        reasons.append(f"the CUDA library: {doctor.cuda_library()}")
    return "; ".join(reasons) or None


@dataclasses.dataclass(frozen=True)
class OpTests:
    """What became of one file of tests.

    Attributes:
        file: relative to the repository.
        passed: number of tests; likewise failed (errors too) and skipped.
        failure: what is wrong, if anything.
        output: what pytest printed.
    """

    file: str
    passed: int
    failed: int
    skipped: int
    failure: str | None
    output: str

    def __str__(self) -> str:
        """The counts, and pytest's lines about what did not pass."""
        what = self.failure or "passed"
        lines = [
            f"{self.file}: {what} ({self.passed} passed, {self.failed} failed, "
            f"{self.skipped} skipped)",
            *re.findall("^(?:SKIPPED|FAILED|ERROR|!).*", self.output, re.MULTILINE),
        ]
        return "\n  ".join(lines)


def run_op_tests(
    files: Sequence[str] = OP_TESTS, *, seconds: float, backend: str = "cuda"
) -> list[OpTests]:
    """Runs files of op tests, each in a process of its own, all at once.

    So an error after which a process cannot use the GPU costs the rest of one file.

    Args:
        files: relative to the repository.
        seconds: what has not ended by then is ended.
        backend: as the tests' option of that name.

    Returns:
        What became of each.
    """
    end = time.monotonic() + seconds
    threads = max(1, (os.cpu_count() or 1) // len(files))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        processes = []
        for i, file in enumerate(files):
            with (folder / f"{i}.txt").open("w") as output:
                command = [sys.executable, "-m", "pytest", file, "-rfEs", f"--backend={backend}"]
                process = subprocess.Popen(
                    [*command, f"--junitxml={folder / f'{i}.xml'}"],
                    cwd=REPOSITORY,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            processes.append(process)
        for i, (file, process) in enumerate(zip(files, processes, strict=True)):
            try:
                failure = _failure(process.wait(max(0.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                failure = f"not finished in {seconds:.0f} s"
            passed, failed, skipped = _counts(folder / f"{i}.xml")
            if failure is None and passed == 0:
                failure = "no test ran"
            text = (folder / f"{i}.txt").read_text()
            results.append(OpTests(file, passed, failed, skipped, failure, text))
    return results


def _failure(exit_code: int) -> str | None:
    return {0: None, 1: "FAILED", 5: "no test ran"}.get(exit_code, f"pytest exits with {exit_code}")


def _counts(report: pathlib.Path) -> tuple[int, int, int]:
    """How many tests passed, failed and were skipped, by pytest's report, if it wrote one."""
    if not report.exists():
        return 0, 0, 0
    passed = failed = skipped = 0
    for suite in xml.etree.ElementTree.parse(report).iter("testsuite"):
        tests, *others = (int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped"))
        passed += tests - sum(others)
        failed += others[0] + others[1]
        skipped += others[2]
    return passed, failed, skipped


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks cuda", description=__doc__)
    parser.add_argument("--check", action="store_true", help="run the op tests on the GPU first")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds in all")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each function and case")
    parser.add_argument("--match", default="", metavar="REGEX", help="only cases with such a name")
    parser.add_argument("--no-compile", action="store_true", help="no cases with torch.compile")
    parser.add_argument(
        "--json",
        type=command.output,
        metavar="FILE",
        default=REPOSITORY / "build" / "benchmarks_cuda.json",
        help="where to write results, default: build/benchmarks_cuda.json",
    )
    options = parser.parse_args(arguments)
    try:
        pattern = re.compile(options.match)
    except re.error as error:
        parser.error(f"--match: expected a regular expression, got {options.match!r}: {error}")
    if not any(pattern.search(str(case)) for _, every, _, _ in plan(options) for case in every):
        parser.error(
            f"--match: expected a part of some case's name, as '{main_cases()[0]}', "
            f"got {options.match!r}, which is in none"
        )
    return options


Part = tuple[str, list[Case], Sequence[str], float]
"""A table, its cases, their peers, and the seconds that must be left for a case to begin."""


def plan(options: argparse.Namespace) -> list[Part]:
    """What is timed, but for ``--match``."""
    parts: list[Part] = [("grid", main_cases(), PEERS, CASE_SECONDS)]
    if not options.no_compile:
        parts.append(("compiled", compiled_cases(), COMPILED_PEERS, COMPILED_CASE_SECONDS))
    return parts


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs tests and cases, and prints what became of them."""
    options = parse_arguments(arguments)
    deadline = time.monotonic() + options.budget
    if reason := missing():
        sys.exit(f"benchmarks.cuda: needs a GPU and the CUDA kernels: {reason}")
    if options.check and (absent := [f for f in OP_TESTS if not (REPOSITORY / f).exists()]):
        sys.exit(f"benchmarks.cuda: --check: {', '.join(absent)} not in {REPOSITORY}")
    failures: list[str] = []
    notes: dict[str, Any] = {}
    if options.check:
        # Before this process uses the GPU, which may be for one process at a time.
        limit = max(0.0, options.budget - TIMING_SECONDS)
        tests = run_op_tests(seconds=limit)
        print(*tests, sep="\n", end="\n\n", flush=True)
        for result in tests:
            if result.failure:
                failures.append(f"{result.file}: {result.failure}")
                print(f"=== {result.file}", result.output[-5000:], sep="\n", flush=True)
        notes["tests"] = [dataclasses.asdict(result) for result in tests]
    sampler = measure.ColdEvents()
    probes = ceilings.Probes("cuda", COPY_BYTES, multiply=False)  # bytes alone make the floor
    machine = {**measure.machine(), **measure.gpu()}
    best = probes.best(sampler).measured()
    document = Document(command.typed("cuda", arguments), machine, best, [], notes)
    document.write(options.json)
    print(tables.machine(document), flush=True)
    for table, every, wanted, case_seconds in plan(options):
        chosen = [case for case in every if re.search(options.match, str(case))]
        if not chosen:
            continue
        done = cases.sweep(
            chosen,
            wanted,
            description=table,
            deadline=deadline,
            case_seconds=case_seconds,
            probes=probes,
            seconds=options.seconds,
            table=table,
            sampler=sampler,
            device="cuda",
        )
        if done.results:
            parts = [tables.times(done.results), tables.summary(done.results)]
            print("\n" + "\n\n".join(parts), flush=True)
        if done.dropped:
            print("\nNOT RUN, no time left:", *done.dropped, sep="\n  ", flush=True)
        failures += done.failures
        document.results += done.results
        notes[table] = {"failures": done.failures, "dropped": done.dropped}
        document.write(options.json)
        if done.interrupted:
            failures.append(f"{table}: interrupted before {done.dropped[0]}")
            break
    print(f"\nwritten: {options.json}")
    if failures:
        command.fail(failures)


if __name__ == "__main__":
    main()
