"""The benchmarks, but for the times: cases, floors, tables, and what happens without a GPU."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from simt.build import REPOSITORY

sys.path.append(str(REPOSITORY))  # benchmarks/ is not installed

from benchmarks import cases, ceilings, cuda, measure, peers
from benchmarks.cases import FORWARD, MODES, REPLAY, TRAINING, Case

SMALL = Case(FORWARD, "fp32", 16, 4, 8, 3)
LIMITS = ceilings.Ceilings(bytes_per_second=1e9, flops_per_second=math.inf)

no_gpu = pytest.mark.skipif(cuda.missing() is None, reason="there is a GPU")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("rows", [2, 50])
def test_floor(rows: int, dtype: str, mode: str) -> None:
    """Every byte of the tensors that a call must touch, once in the forward and in the backward."""
    case = Case(mode, dtype, hidden_size=24, bottleneck=5, rows=rows, adapters=4)
    problem = peers.make_problem(rows, 24, 5, 4, cases.DTYPES[dtype])
    used = problem.ids.unique().tolist()
    weights = sum(field[a].nbytes for field in problem.weights for a in used)
    expected = problem.x.nbytes + weights + peers.loop(problem)().nbytes
    if mode == TRAINING:
        dx = problem.x
        expected += problem.x.nbytes + problem.dy.nbytes + weights + dx.nbytes + weights
    assert case.floor(LIMITS) == pytest.approx(expected / 1e9)


def test_floor_of_operations() -> None:
    """Two products of T x D x r in the forward, twice as many in the backward."""
    limits = ceilings.Ceilings(bytes_per_second=math.inf, flops_per_second=1e9)
    products = 2 * (2 * SMALL.rows * SMALL.hidden_size * SMALL.bottleneck)
    assert SMALL.floor(limits) == pytest.approx(products / 1e9)
    training = Case(TRAINING, "fp32", 16, 4, 8, 3)
    assert training.floor(limits) == pytest.approx(3 * products / 1e9)


def test_cases_of_cuda() -> None:
    chosen = cuda.main_cases()
    assert len(set(chosen)) == len(chosen)
    by_mode = {mode: [case for case in chosen if case.mode == mode] for mode in MODES}
    for mode in (FORWARD, TRAINING):
        bf16 = [case for case in by_mode[mode] if case.dtype == "bf16"]
        assert len(bf16) == 2 * 2 * 3 * 3
        assert Case(mode, "bf16", 4096, 64, 16384, 64) in bf16
        assert Case(mode, "fp32", 1024, 64, 64, 64) in by_mode[mode]
    assert Case(REPLAY, "bf16", 1024, 16, 64, 64) in by_mode[REPLAY]
    assert {case.rows for case in by_mode[REPLAY]} == {64}
    assert set(cuda.compiled_cases()) < set(chosen)


def test_tables() -> None:
    results: list[dict[str, Any]] = [
        {
            "name": f"case {i}",
            "mode": FORWARD,
            "dtype": "fp32",
            "floor": 0.001,
            "seconds": {"ours": ours, "eager": 0.008},
        }
        for i, ours in enumerate([0.002, 0.00005])
    ]
    del results[1]["seconds"]["eager"]
    assert cases.table(results, ["eager"]) == (
        "| case | ours ms | ours/floor | eager/ours |\n"
        "| :-- | --: | --: | --: |\n"
        "| case 0 | 2.000 | 2.00 | 4.00 |\n"
        "| case 1 | 0.0500 | 0.05 |  |"
    )
    assert cases.summary(results, ["eager"]) == (
        "| summary | ratio | least | median | cases |\n"
        "| :-- | --: | --: | --: | --: |\n"
        "| forward fp32 | eager/ours | 4.00 | 4.00 | 1 |"
    )


def swept(chosen: list[Case], wanted: list[str], deadline: float = math.inf) -> cuda.Sweep:
    return cuda.sweep(
        chosen, wanted, deadline=deadline, case_seconds=5.0, limits=LIMITS, seconds=0.0
    )


@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("adapters", [1, 3])
def test_a_case_is_checked_and_measured(adapters: int, dtype: str, mode: str) -> None:
    case = Case(mode, dtype, 16, 4, 8, adapters)
    done = swept([case], ["eager", "bmm"])
    assert not done.failures
    assert not done.dropped
    (result,) = done.results
    assert result["name"] == str(case) == f"{mode} {dtype} D=16 r=4 T=8 A={adapters}"
    assert result["floor"] == case.floor(LIMITS)
    assert list(result["seconds"]) == ["ours", "eager", "bmm"]


def test_a_wrong_result_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other cases are measured even so."""

    def wrong(problem: peers.Problem) -> peers.Forward:
        right = peers.ours(problem)
        return lambda: right() * (1.01 if len(problem.x) == 8 else 1.0)

    monkeypatch.setitem(peers.MAKERS, "ours", wrong)
    other = Case(FORWARD, "fp32", 16, 4, 9, 3)
    done = swept([SMALL, other], ["eager"])
    (failure,) = done.failures
    assert failure.startswith(f"{SMALL}: RuntimeError: {SMALL}: y of ours differs from eager")
    assert [result["name"] for result in done.results] == [str(other)]


def test_cases_without_time_left_are_named() -> None:
    done = swept([SMALL], ["eager"], deadline=time.monotonic() + 4.0)
    assert done.dropped == [str(SMALL)]
    assert not done.results


def test_header() -> None:
    gpu = {"gpu": "GPU", "capability": "9.0", "multiprocessors": 132, "cuda": "13.0"}
    line = cuda.header({**measure.machine(), **gpu}, ceilings.Ceilings(3e12, math.inf))
    assert line.startswith("GPU (sm 9.0, 132 multiprocessors, driver unknown, ? of ? MHz), torch")
    assert "CUDA 13.0" in line
    assert "copy 3000 GB/s" in line


def test_op_tests_are_there() -> None:
    assert all((REPOSITORY / file).is_file() for file in cuda.OP_TESTS)


def test_op_tests_are_counted() -> None:
    good, empty, absent = cuda.run_op_tests(
        ["tests/test_route.py", "tests/op_testing.py", "tests/none.py"],
        seconds=300.0,
        backend="native",
    )
    assert good.failure is None
    assert good.passed > 10
    assert good.failed == good.skipped == 0
    assert empty.failure == "no test ran"
    assert absent.failure == "pytest exits with 4"
    assert "tests/none.py" in absent.output
    assert str(absent) == (
        "tests/none.py: pytest exits with 4 (0 passed, 0 failed, 0 skipped)\n"
        "  ERROR: file or directory not found: tests/none.py"
    )


def test_op_tests_without_time_left() -> None:
    (result,) = cuda.run_op_tests(["tests/test_route.py"], seconds=0.0, backend="native")
    assert result.failure == "not finished in 0 s"


@no_gpu
def test_op_tests_without_a_gpu() -> None:
    (result,) = cuda.run_op_tests(["tests/test_route.py"], seconds=300.0)
    assert result.failure == "pytest exits with 4"
    assert "--backend cuda: CUDA devices: " in result.output


@no_gpu
def test_without_a_gpu() -> None:
    """One line that says what is missing."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda", "--check"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line == f"benchmarks.cuda: needs a GPU and the CUDA kernels: {cuda.missing()}"


@pytest.mark.parametrize(
    ("torch_cuda", "available", "compiler", "words"),
    [
        (None, False, "nvcc 13.0", ["is a CPU build"]),
        ("13.0", False, "nvcc 13.0", ["for CUDA 13.0, sees no GPU"]),
        ("13.0", True, "", ["not built (`ADAPTER_EXT_CUDA=1 pip install .`"]),
        (None, False, "", ["is a CPU build", "not built"]),
        ("13.0", True, "nvcc 13.0", None),
    ],
)
def test_what_is_missing(
    torch_cuda: str | None,
    available: bool,
    compiler: str,
    words: list[str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(cuda._C, "cuda_compiler", compiler)
    reason = cuda.missing()
    if words is None:
        assert reason is None
    else:
        assert reason is not None
        assert all(word in reason for word in words)
