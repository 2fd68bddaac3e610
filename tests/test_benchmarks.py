"""The benchmarks, but for the times: cases, peers, results, comparisons, pictures, pages."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simt import build
from simt.build import REPOSITORY

sys.path.append(str(REPOSITORY))  # benchmarks/ is not installed

import benchmarks.__main__
from benchmarks import (
    cases,
    ceilings,
    command,
    compare,
    cpu,
    cuda,
    cuda_traffic,
    encoder,
    measure,
    memory,
    packages,
    peers,
    plot,
    report,
    results,
    tables,
)
from benchmarks.cases import FORWARD, MODES, REPLAY, TRAINING, Case
from benchmarks.results import Document, Result, Spread

SMALL = Case(FORWARD, "fp32", 16, 4, 8, 3)
OTHER = dataclasses.replace(SMALL, rows=9)
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
    expected = problem.x.nbytes + weights + peers.loop(problem).forward().nbytes
    if mode == TRAINING:
        dx = problem.x
        expected += problem.x.nbytes + problem.dy.nbytes + weights + dx.nbytes + weights
    assert case.floor(LIMITS) == pytest.approx(expected / 1e9)


@pytest.mark.parametrize("spread", peers.SPREADS)
@pytest.mark.parametrize(("samples", "adapters"), [(1, 1), (64, 1), (64, 8), (7, 3), (64, 4096)])
def test_spread(spread: str, samples: int, adapters: int) -> None:
    counts = peers.spread_counts(spread, samples, adapters)
    assert len(counts) == adapters
    assert sum(counts) == samples
    assert min(counts) >= 0
    if spread == "even":
        assert max(counts) - min(counts) <= 1
    if spread == "zipf" and (samples, adapters) == (64, 8):
        assert counts == [24, 11, 8, 6, 5, 4, 3, 3]
    if spread == "one" and adapters > 1 and samples == 64:
        assert counts[0] == 58


def test_an_unknown_spread() -> None:
    with pytest.raises(ValueError, match="expected one of even, zipf, one, got 'odd'"):
        peers.spread_counts("odd", 8, 2)


def test_samples_have_one_adapter() -> None:
    problem = Case(FORWARD, "fp32", 16, 4, 12, 2, sample_rows=3).problem()
    assert problem.ids.view(4, 3).unique(dim=1).shape == (4, 1)
    assert problem.ids.bincount().tolist() == [6, 6]


def test_stacked_weights_are_not_copied() -> None:
    problem = Case(FORWARD, "fp32", 16, 4, 2, 5, stacked=True).problem()
    assert problem.weights.down[1].data_ptr() == problem.stacked[2][1].data_ptr()
    assert problem.float().stacked[2].data_ptr() == problem.stacked[2].data_ptr()
    assert problem.ids.unique().numel() == 2


def test_names_of_cases() -> None:
    assert str(SMALL) == "forward fp32 D=16 r=4 T=8 A=3"
    case = Case(FORWARD, "fp32", 16, 4, 8, 3, "zipf", sample_rows=4, stacked=True)
    assert str(case) == f"{SMALL} zipf samples of 4 stacked"


def test_floor_of_a_stack() -> None:
    """Its gradient is that of all adapters, of which the forward reads those with rows."""
    case = Case(TRAINING, "fp32", 16, 4, 2, 5, stacked=True)
    weights, rows = 4 * 2 * 16 * 5, 4 * 2 * 16
    assert case.floor(LIMITS) == pytest.approx((5 * rows + (2 + 2 + 5) * weights) / 1e9)


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
        bf16 = [case for case in by_mode[mode] if case.dtype == "bf16" and not case.stacked]
        assert len(bf16) == 2 * 2 * 3 * 3
        assert Case(mode, "bf16", 4096, 64, 16384, 64) in bf16
        assert Case(mode, "fp32", 1024, 64, 64, 64) in by_mode[mode]
    assert Case(REPLAY, "bf16", 1024, 16, 64, 64) in by_mode[REPLAY]
    assert Case(TRAINING, "bf16", 1024, 64, 2048, 8, stacked=True) in by_mode[TRAINING]
    assert {case.rows for case in by_mode[REPLAY]} == {64}
    assert set(cuda.compiled_cases()) < set(chosen)


def spread(median: float, noise: float = 0.01, samples: int = 20) -> Spread:
    return Spread(median, median * (1 - noise), median * (1 + noise), samples)


def made_up(case: Case, ours: float, table: str = "grid", **others: float) -> Result:
    return Result(
        table,
        str(case),
        dataclasses.asdict(case),
        seconds={"ours": spread(ours), **{name: spread(value) for name, value in others.items()}},
        ratios={name: spread(value / ours) for name, value in others.items()},
        floor=0.001,
        limits=LIMITS.measured(),
    )


def document(*measured: Result, **machine: object) -> Document:
    facts = {**measure.machine(), **machine}
    return Document("python -m benchmarks cpu", facts, LIMITS.measured(), list(measured))


def test_targets() -> None:
    many = dataclasses.replace(SMALL, rows=2048)
    results = [
        made_up(SMALL, 0.0015, eager=0.003),
        made_up(many, 0.0012, eager=0.003),
        made_up(many, 0.003, eager=0.0015),
    ]
    assert tables.render(document(*results), "grid targets").splitlines()[2:] == [
        "| forward fp32 | ours/floor at most 1.4, T at least 2048 | 2.10 | 3.00 | 1 of 2 |",
        "| forward fp32 | ours/floor at most 2.0, T below 2048 | 1.50 | 1.50 | 1 of 1 |",
        "| forward fp32 | eager/ours above 1 | 2.00 | 0.50 | 2 of 3 |",
    ]


def test_speedups() -> None:
    """The floor of a made-up result is a millisecond."""
    many = dataclasses.replace(SMALL, rows=2048, adapters=64)
    results = [
        made_up(SMALL, 0.002, eager=0.008, bmm=0.006),
        made_up(SMALL, 0.002, eager=0.004, bmm=0.006),
        made_up(many, 0.002, eager=0.014, bmm=0.028),
    ]
    assert tables.render(document(*results), "grid speedups").splitlines()[2:] == [
        "| forward fp32 | best peer/ours at least 2 | 3.00 | 3.00 | 6.00 |",
        "| forward fp32 | eager/ours at least 3 | 4.00 | 4.00 | 8.00 |",
        "| forward fp32 | eager/ours at least 5, A = 64 | 7.00 | 10.00 | 14.00 |",
    ]


def test_tables() -> None:
    first, second = made_up(SMALL, 0.002, eager=0.008), made_up(SMALL, 0.00005)
    second.name = "other"
    assert tables.render(document(first, second), "grid") == (
        "| case | ours ms | ours/floor | eager/ours |\n"
        "| :-- | --: | --: | --: |\n"
        "| forward fp32 D=16 r=4 T=8 A=3 | 2.000 | 2.00 | 4.00 |\n"
        "| other | 0.0500 | 0.05 |  |"
    )
    assert tables.render(document(first, second), "grid summary") == (
        "| summary | ratio | least | median | most | cases |\n"
        "| :-- | --: | --: | --: | --: | --: |\n"
        "| forward fp32 | ours/floor | 0.05 | 1.02 | 2.00 | 2 |\n"
        "| forward fp32 | eager/ours | 4.00 | 4.00 | 4.00 | 1 |\n"
        "| forward fp32 | best peer/ours | 4.00 | 4.00 | 4.00 | 1 |"
    )
    with pytest.raises(ValueError, match="expected one of the tables grid, got 'memory'"):
        tables.render(document(first), "memory")


def test_table_by_number_of_adapters() -> None:
    chosen = [
        made_up(Case(FORWARD, "fp32", 16, 4, 8, *values), ours, "adapters", eager=0.01)
        for values, ours in [((1,), 0.001), ((64,), 0.0015), ((64, "zipf"), 0.002)]
    ]
    lines = tables.render(document(*chosen), "adapters").splitlines()
    assert lines[0] == "| case | ours ms | ours/fewest A | ours/floor | eager/ours |"
    assert [line.split(" | ")[2] for line in lines[2:]] == ["1.00", "1.50", "2.00"]


def test_table_of_tokens_and_memory() -> None:
    served = made_up(SMALL, 0.5, "serving", eager=1.0, none=0.4)
    served.tokens = 2000
    case = dataclasses.replace(SMALL, mode=TRAINING)
    used = Result("memory", str(case), {}, memory={"ours": 2_200_000, "bmm": 3_000_000})
    used.required = 2_000_000
    used.skipped["grouped"] = "not there"
    measured = document(served, used)
    assert tables.render(measured, "serving").splitlines()[2] == (
        f"| {SMALL} | 4000 | 2000 | 5000 | 2.00 | 0.80 |"
    )
    assert tables.render(measured, "memory").splitlines()[2] == f"| {case} | 2.0 | 1.10 | 1.50 |"
    assert tables.skipped([used, used]) == "not run: grouped: not there (2 cases)"


@pytest.fixture(scope="module")
def probes() -> ceilings.Probes:
    return ceilings.Probes(copy_bytes=2**20)


def test_probes(probes: ceilings.Probes) -> None:
    assert list(probes.functions) == ["copy", "fma"]
    limits = probes.limits({"copy": 0.5, "fma": 0.25})
    assert limits.bytes_per_second == 2 * 2**20 / 0.5
    assert limits.flops_per_second == probes.flops / 0.25
    assert list(probes.functions) == ["copy", "fma"]
    copy_alone = ceilings.Probes(copy_bytes=2**20, multiply=False)
    assert copy_alone.limits({"copy": 0.5}).measured() == {"bytes_per_second": 2 * 2**20 / 0.5}


def swept(
    chosen: list[Case], wanted: list[str], probes: ceilings.Probes, deadline: float = math.inf
) -> cases.Sweep:
    return cases.sweep(
        chosen, wanted, deadline=deadline, case_seconds=5.0, probes=probes, seconds=0.0
    )


@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("adapters", [1, 3])
def test_a_case_is_checked_and_measured(
    adapters: int, dtype: str, mode: str, probes: ceilings.Probes
) -> None:
    case = Case(mode, dtype, 16, 8, 8, adapters)
    wanted = [peer for peer in peers.PEERS if peer != "compile"]
    done = swept([case], wanted, probes)
    assert not done.failures
    assert not done.dropped
    (result,) = done.results
    assert result.name == str(case) == f"{mode} {dtype} D=16 r=8 T=8 A={adapters}"
    assert result.floor == case.floor(ceilings.Ceilings(**result.limits))
    measured = [name for name in ("ours", *wanted) if name not in result.skipped]
    assert list(result.seconds) == [*measured, "copy", "fma"]
    assert list(result.ratios) == measured[1:]
    assert set(result.skipped) <= {"folded", "grouped", "onednn"}
    if mode == TRAINING:
        assert result.skipped["folded"] == "no backward"


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
def test_adapters_without_rows(mode: str, stacked: bool, probes: ceilings.Probes) -> None:
    case = Case(mode, "fp32", 16, 4, 8, 16, "zipf", stacked=stacked)
    assert case.used_adapters() < 8
    done = swept([case], ["eager", "index", "bmm", "folded", "grouped", "onednn"], probes)
    assert not done.failures
    assert {"ours", "eager", "bmm"} <= set(done.results[0].seconds)


@pytest.mark.parametrize(
    ("package", "mode"), [("peft", FORWARD), ("adapters", FORWARD), ("adapters", TRAINING)]
)
def test_packages(package: str, mode: str, probes: ceilings.Probes) -> None:
    pytest.importorskip(package)
    done = swept([Case(mode, "fp32", 16, 4, 24, 3, sample_rows=4)], [package], probes)
    assert not done.failures
    assert list(done.results[0].ratios) == [package]


@pytest.mark.parametrize("package", packages.PACKAGES)
def test_a_missing_package_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch, probes: ceilings.Probes
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (result,) = swept([SMALL], [package], probes).results
    assert result.skipped[package].startswith(f"{package}: import of {package} halted")
    assert result.skipped[package].endswith("pip install '.[peers]'")


def test_compiled_for_more_adapters_than_it_recompiles_for(probes: ceilings.Probes) -> None:
    (result,) = swept([dataclasses.replace(SMALL, adapters=9)], ["compile"], probes).results
    assert not result.skipped
    assert set(result.ratios) == {"compile"}


def test_a_wrong_result_is_reported(
    monkeypatch: pytest.MonkeyPatch, probes: ceilings.Probes
) -> None:
    """The other cases are measured even so."""

    def wrong(problem: peers.Problem) -> peers.Implementation:
        right = peers.ours(problem)
        forward = right.forward
        right.forward = lambda: forward() * (1.01 if len(problem.x) == 8 else 1.0)
        return right

    monkeypatch.setitem(cases.IMPLEMENTATIONS, "ours", peers.Peer(wrong))
    done = swept([SMALL, OTHER], ["eager"], probes)
    (failure,) = done.failures
    assert failure.startswith(f"{SMALL}: RuntimeError: {SMALL}: y of ours differs from eager")
    assert [result.name for result in done.results] == [str(OTHER)]


def test_cases_without_time_left_are_named(probes: ceilings.Probes) -> None:
    done = swept([SMALL], ["eager"], probes, deadline=time.monotonic() + 4.0)
    assert done.dropped == [str(SMALL)]
    assert not done.results


def test_an_interrupt_leaves_what_was_measured(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = cases.measure_case

    def interrupted(case: Case, *arguments: Any, **options: Any) -> Result:
        if case.rows == 4:
            raise KeyboardInterrupt
        return measured(case, *arguments, **options)

    monkeypatch.setattr(cases, "measure_case", interrupted)
    path = tmp_path / "results.json"
    sizes = "--hidden-size 16 --bottleneck 4 --adapters 1 --rows 8 4 2"
    options = f"{sizes} --mode forward --dtype fp32 --peers eager --seconds 0 --json {path}"
    with pytest.raises(SystemExit, match="1"):
        cpu.main(["--table", "grid", "decode", *options.split()])
    assert [r.name for r in benchmarks.results.read(path).results] == [
        "forward fp32 D=16 r=4 T=8 A=1"
    ]
    printed = capsys.readouterr().out
    assert "grid: interrupted before forward fp32 D=16 r=4 T=4 A=1" in printed


def test_machine_in_one_line() -> None:
    gpu = {"gpu": "GPU", "capability": "9.0", "multiprocessors": 132, "cuda": "13.0"}
    line = tables.render(document(**gpu), "machine")
    command_and_gpu = "`python -m benchmarks cpu`: GPU, sm 9.0, 132 multiprocessors"
    assert line.startswith(f"{command_and_gpu}, driver unknown, ? of ? MHz, CUDA 13.0")
    assert "copy 1.0 GB/s" in line
    assert "multiply-adds" not in line
    on_cpu = tables.render(document(cpu="CPU", load=3.5), "machine")
    assert on_cpu.startswith("`python -m benchmarks cpu`: CPU (")
    assert "allocator default" in on_cpu
    assert "load 3.5" in on_cpu


def test_spread_of_samples() -> None:
    many = [float(i) for i in range(1, 102)]
    random.Random(0).shuffle(many)
    assert Spread.of(many) == Spread(51.0, 26.0, 76.0, 101)
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert Spread(4.0, 2.0, 8.0, 9).inverse() == Spread(0.25, 0.125, 0.5, 9)


def test_ratios_are_of_the_same_round() -> None:
    samples = {"ours": [1.0, 10.0, 2.0], "eager": [3.0, 30.0, 6.0]}  # the machine was slow once
    assert dict(results.ratios(samples)) == {"eager": Spread(3.0, 3.0, 3.0, 3)}


def test_json_round_trip(tmp_path: pathlib.Path) -> None:
    used = Result("memory", "case", {"rows": 1}, memory={"ours": 5}, required=4)
    used.skipped["grouped"] = "not there"
    written = document(made_up(SMALL, 0.002, eager=0.008), used)
    written.notes["tests"] = [1]
    path = tmp_path / "new" / "results.json"
    written.write(path)
    assert results.read(path) == written
    assert json.loads(path.read_text())["format"] == results.FORMAT
    assert path.read_text().count('"table"') == 2  # a line a result
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected results of format 1, got format None"):
        results.read(path)


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        ({"ours": 0.0011, "eager": 0.005}, "slower"),
        ({"ours": 0.0009, "eager": 0.005}, "faster"),
        ({"ours": 0.0010, "eager": 0.005}, ""),
        ({"ours": 0.0030, "eager": 0.015}, ""),  # the machine is slower
        ({"ours": 0.00102, "eager": 0.005}, ""),  # within the noise, and below the least
    ],
)
def test_compare(now: dict[str, float], verdict: str) -> None:
    old = document(made_up(SMALL, 0.001, eager=0.005))
    (change,) = compare.changes(old, document(made_up(SMALL, now.pop("ours"), **now)))
    assert change.quantity == "ours s per eager"
    assert change.verdict == verdict


def test_compare_with_noise() -> None:
    """A change is one if the middle halves of the samples have nothing in common."""
    old, new = made_up(SMALL, 0.001), made_up(SMALL, 0.0012)
    (change,) = compare.changes(document(old), document(new))
    assert (change.quantity, change.verdict) == ("ours s", "slower")
    new.seconds["ours"] = spread(0.0012, noise=0.3)
    (change,) = compare.changes(document(old), document(new))
    assert change.verdict == ""
    assert change.ratio.lower < 1 < change.ratio.median == pytest.approx(1.2)


def test_compare_with_noise_between_the_runs() -> None:
    """What the peers moved by, which are the same code in both runs, is noise."""
    old = made_up(SMALL, 0.001, eager=0.005, bmm=0.002)
    new = made_up(SMALL, 0.0012, eager=0.005, bmm=0.0025)
    assert compare.noise(document(old), document(new)) == pytest.approx(0.25)
    assert compare.noise(document(new), document(old)) == pytest.approx(0.25)
    assert compare.noise(document(old), document(new), per="none") == pytest.approx(0.25)
    assert compare.noise(document(old), document(new), function="bmm") == 0.0
    (change,) = compare.changes(document(old), document(new))
    assert change.verdict == ""
    new.ratios["bmm"] = spread(0.002 / 0.0012)
    (change,) = compare.changes(document(old), document(new))
    assert change.verdict == "slower"


def test_compare_peers_and_bytes() -> None:
    old, new = made_up(SMALL, 0.001, eager=0.005), made_up(SMALL, 0.001, eager=0.01)
    (change,) = compare.changes(document(old), document(new), function="eager", per="ours")
    assert change.verdict == "slower"
    before = Result("memory", "case", {}, memory={"ours": 100})
    after = dataclasses.replace(before, memory={"ours": 110})
    (change,) = compare.changes(document(before), document(after))
    assert (change.quantity, change.verdict) == ("ours bytes", "larger")


def test_compare_prints(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    document(made_up(SMALL, 0.001, eager=0.005), made_up(OTHER, 1.0), load=1.0).write(old)
    document(made_up(SMALL, 0.002, eager=0.005), load=2.0).write(new)
    compare.main([str(old), str(new)])
    printed = capsys.readouterr().out
    assert "- load: 1.0 before, 2.0 now" in printed
    assert f"| {SMALL} | grid | ours s per eager | 2.00 | 1.96 to 2.04 | slower |" in printed
    assert "1 of 1 moved beyond the noise: 0 faster, 1 slower" in printed
    assert "1 cases only before, 0 only now" in printed
    with pytest.raises(SystemExit) as failure:
        compare.main([str(old), str(new), "--check"])
    assert failure.value.code == 1


def test_plots(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    grid = [
        made_up(Case(mode, dtype, 16, 4, rows, adapters), 0.002, eager=0.004, bmm=0.003)
        for mode in (FORWARD, TRAINING)
        for dtype in cases.DTYPES
        for rows in (8, 16)
        for adapters in (1, 8)
    ]
    counted = [
        made_up(Case(FORWARD, "fp32", 16, 4, 8, *values), 0.002, "adapters")
        for values in [(1,), (8,), (8, "zipf"), (8, "one")]
    ]
    decode = [
        made_up(Case(FORWARD, "fp32", 16, 4, 8, a, stacked=True), 0.002, "decode", bmm=0.003)
        for a in (8, 64)
    ]
    used = Result("memory", "case", dataclasses.asdict(SMALL), memory={"ours": 5}, required=4)
    everything = document(*grid, *counted, *decode, used)
    written = plot.draw([everything], tmp_path)
    assert [path.name for path in written] == [
        f"benchmarks_{name}.{form}"
        for name in ("floor", "peers", "adapters", "memory")
        for form in ("png", "svg")
    ]
    assert all(path.stat().st_size > 4000 for path in written)
    assert not plot.draw([document()], tmp_path)


def test_pages_show_the_results() -> None:
    """Run `python -m benchmarks report` after changing benchmarks/results or a marker."""
    assert not report.outdated()
    assert all(results.read(path).results for path in results.FOLDER.rglob("*.json"))
    shown = {
        path
        for page in report.pages()
        for match in report.BLOCK.finditer(page.read_text())
        for path in report.files(match["file"])
    }
    assert shown == set(results.FOLDER.rglob("*.json"))


def test_page(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    document(made_up(SMALL, 0.002, eager=0.008)).write(tmp_path / "a" / "b.json")
    begin, end = "<!-- benchmarks: begin a/b.json grid -->\n", "<!-- benchmarks: end -->\n"
    page = report.render(f"before\n{begin}old\n{end}after\n{begin}{end}")
    assert page.startswith(f"before\n{begin}| case | ours ms")
    assert page.count("4.00") == 2
    assert report.render(page) == page


def test_page_of_several_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    document(made_up(SMALL, 0.002, eager=0.008)).write(tmp_path / "a" / "b.json")
    document(made_up(SMALL, 0.004, eager=0.008)).write(tmp_path / "a" / "c.json")
    begin, end = "<!-- benchmarks: begin a/*.json {} -->\n", "<!-- benchmarks: end -->\n"
    page = report.render(
        "".join(begin.format(t) + end for t in ("grid", "grid summary", "machine"))
    )
    assert "| 2.000 | 2.00 | 4.00 |" in page
    assert "| 4.000 | 4.00 | 2.00 |" in page
    assert "| forward fp32 | eager/ours | 2.00 | 3.00 | 4.00 | 2 |" in page
    assert page.count("`python -m benchmarks cpu`") == 2
    with pytest.raises(ValueError, match="expected files in"):
        report.render(f"{begin.format('grid')}{end}".replace("a/", "d/"))


def test_cases_of_cpu() -> None:
    quick = cpu.chosen_cases(cpu.parse_arguments(["--quick"]))
    full = cpu.chosen_cases(cpu.parse_arguments([]))
    for chosen in (quick, full):
        assert len(set(chosen)) == len(chosen)
        assert {table for table, _ in chosen} == set(cpu.TABLES)
    assert sum(table == "grid" for table, _ in full) == 4 * 81
    assert set(quick) < set(full)
    decode = [case for table, case in quick if table == "decode"]
    assert {case.used_adapters() for case in decode} == {64}
    assert max(case.adapters for case in decode) == 4096
    few = cpu.chosen_cases(
        cpu.parse_arguments(["--table", "grid", "--rows", "5", "--mode", FORWARD])
    )
    assert {case.rows for _, case in few} == {5}
    assert not any(case.stacked for _, case in few)
    stacked = cpu.chosen_cases(cpu.parse_arguments(["--table", "grid", "--stacked"]))
    assert len(stacked) == 4 * 81
    assert all(case.stacked for _, case in stacked)


def test_command_line_of_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert "compile" not in cpu.parse_arguments(["--quick"]).peers
    assert "compile" in cpu.parse_arguments([]).peers
    assert cpu.parse_arguments(["--peers", "eager,bmm"]).peers == ["eager", "bmm"]
    for arguments, message in [
        (["--peers", "eager,none"], "expected some of eager,index"),
        (["--clock", "process"], "use --threads 1"),
    ]:
        with pytest.raises(SystemExit):
            cpu.parse_arguments(arguments)
        assert message in capsys.readouterr().err


def test_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    for module, _ in benchmarks.__main__.COMMANDS.values():
        assert callable(importlib.import_module(f"benchmarks.{module}").main)
    with pytest.raises(SystemExit) as done:
        benchmarks.__main__.main(["cpu", "--help"])
    assert done.value.code == 0
    assert "python -m benchmarks cpu" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        benchmarks.__main__.main(["nothing"])
    assert "invalid choice" in capsys.readouterr().err


def test_no_subcommand_is_an_error_about_it_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmarks.__main__.main([])
    assert capsys.readouterr().err.endswith("are required: COMMAND\n")


@pytest.mark.parametrize("name", ["compare", "plot"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"no JSON", "expected results as JSON"),
        (b"\xff", "expected results as JSON"),
        (b"[]", "expected results of format 1"),
        (b'{"format": 1}', "expected results of format 1: KeyError('results')"),
        (b'{"format": 1, "results": [{}]}', "expected results of format 1: TypeError("),
    ],
)
def test_files_that_cant_be_read_are_usage_errors(
    name: str,
    content: bytes | None,
    words: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        benchmarks.__main__.main([name, str(path), str(path)])
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"python -m benchmarks {name}: error: ")
    assert words in message
    assert str(path) in message


@pytest.mark.parametrize("name", ["cpu", "cuda", "training", "serving", "memory", "overhead"])
def test_where_nothing_can_be_written_is_said_at_once(
    name: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "results.json", tmp_path):
        with pytest.raises(SystemExit, match="2"):
            benchmarks.__main__.main([name, "--json", str(path)])
        message = capsys.readouterr().err.splitlines()[-1]
        assert f"argument --json: expected a file to write, got '{path}'" in message


def test_plots_to_no_folder_are_a_usage_error(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "results.json"
    document(made_up(SMALL, 0.002, eager=0.004)).write(path)
    with pytest.raises(SystemExit, match="2"):
        plot.main([str(path), "--out", str(path)])
    assert "--out: expected a folder to write to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "cpu --threads -1",
        "cpu --threads 0",
        "cpu --rows x",
        "training --adapters 0",
        "serving --layers -2",
        "memory --rows 0",
        "overhead --rows 0",
    ],
)
def test_numbers_below_one_are_usage_errors(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, option, value = words.split()
    with pytest.raises(SystemExit, match="2"):
        benchmarks.__main__.main(words.split())
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: expected an integer of at least 1, got '{value}'" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--match", "fp64"], "got 'fp64', which is in none"),
        (["--match", "A=8$", "--no-compile"], None),
        (["--match", "("], "expected a regular expression, got '('"),
        ([], None),
    ],
)
def test_a_match_of_no_case_is_a_usage_error(
    arguments: list[str], words: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that times nothing would pass."""
    if words is None:
        assert cuda.parse_arguments(arguments).match == (arguments or ["", ""])[1]
        return
    with pytest.raises(SystemExit, match="2"):
        cuda.parse_arguments(arguments)
    assert words in capsys.readouterr().err


def test_traffic_without_cases_or_simulator_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "missing", lambda flavour: f"{flavour} is missing")
    with pytest.raises(SystemExit, match="needs the CUDA simulator: ptxsim is missing"):
        cuda_traffic.main([])
    with pytest.raises(SystemExit, match="2"):
        cuda_traffic.main(["--only", "fp64"])
    assert "got 'fp64', which is in none" in capsys.readouterr().err


def test_what_was_typed() -> None:
    words = ["--quick", "--json", "a file.json", "--threads", "1"]
    assert command.typed("cpu", words) == "python -m benchmarks cpu --quick --threads 1"


def test_functions_are_timed_in_another_order_each_round_after_a_call_of_their_own() -> None:
    """What is timed right after the copy would pay for the caches that it has filled."""
    calls: list[str] = []
    times = iter(range(10**6))
    sampler = functools.partial(measure.by_clock, lambda: float(next(times)))
    names = ("ours", "eager", "copy")
    functions = {name: functools.partial(calls.append, name) for name in names}
    samples = measure.interleaved(functions, sampler=sampler, seconds=0.0, min_samples=20)
    assert all(len(taken) == 20 for taken in samples.values())
    timed = calls[2 * len(names) :]  # the first ones found how many calls take long enough
    assert timed[::2] == timed[1::2]  # one that is not timed, and one that is
    rounds = {tuple(timed[::2][i : i + 3]) for i in range(0, 60, 3)}
    assert len(rounds) > 1
    assert all(sorted(order) == sorted(names) for order in rounds)


def test_a_near_tie_is_timed_until_it_is_settled() -> None:
    """Eager takes longer in two rounds of three: a fair coin does that for 61 rounds in 1%."""
    took = {"ours": itertools.cycle([1.0]), "eager": itertools.cycle([2.0, 0.5, 2.0])}
    functions: dict[str, Callable[[], object]] = {name: lambda: None for name in took}

    def rounds(**options: float) -> int:
        samplers = iter(took.values())
        samples = measure.interleaved(
            functions,
            sampler=lambda function: functools.partial(next, next(samplers)),
            seconds=0.0,
            settled=results.settled,
            **options,
        )
        return len(samples["ours"])

    assert rounds() == 3
    assert 55 <= rounds(settle=60.0) <= 64


def test_settled() -> None:
    ours = [1.0] * 8
    assert results.settled({"ours": ours, "eager": [1.1] * 8, "bmm": [0.9] * 8})
    assert not results.settled({"ours": ours[:7], "eager": [1.1] * 7})  # 2 / 2^7 > 1%
    assert not results.settled({"ours": ours, "eager": [1.1] * 8, "bmm": [0.9] * 7 + [1.1]})
    assert results.settled({"ours": [1.0] * 20, "eager": [1.1] * 17 + [0.5] * 3})
    assert not results.settled({"ours": [1.0] * 20, "eager": [1.1] * 16 + [0.5] * 4})


def test_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    for name in measure.RAISED:
        monkeypatch.delenv(name, raising=False)
    measure.use_allocator("default")
    assert not started
    measure.use_allocator("raised")
    ((program, arguments, environment),) = started
    assert (program, arguments) == (sys.executable, sys.orig_argv)
    assert environment == {**os.environ, **measure.RAISED}


@pytest.mark.parametrize("mode", ["training", "serving"])
def test_encoder(mode: str) -> None:
    """Ours is checked against eager; with three adapters, each has several sequences."""
    sizes = encoder.Sizes(layers=2, hidden_size=8, bottleneck=4, sequences=8, tokens=3)
    for adapters in (1, 3):
        result = encoder.measure_encoder(mode, sizes, adapters, "fp32", seconds=0.0)
        assert list(result.seconds) == ["ours", "eager", "none"]
        assert result.tokens == 24
        assert result.name == f"fp32 2 layers D=8 r=4 8x3 tokens A={adapters}"


def test_a_wrong_encoder_is_reported() -> None:
    sizes = encoder.Sizes(layers=2, hidden_size=8, bottleneck=4, sequences=4, tokens=3)
    runs = encoder.implementations(sizes, 2, torch.float32)
    with torch.no_grad():
        runs["eager"][1][3].mul_(2.0)  # an up projection
    with pytest.raises(RuntimeError, match="ours differs from eager by"):
        encoder.check(runs, torch.randn(4, 3, 8), 1e-4)


def test_required_memory() -> None:
    """h, mean and rstd in float32, dx, and the gradients of all weights."""
    case = Case(TRAINING, "bf16", 16, 4, 8, 3)
    problem = case.problem()
    weights = sum(w.nbytes for field in problem.weights for w in field)
    assert memory.required(case) == 8 * (4 + 2) * 4 + problem.x.nbytes + weights


@pytest.mark.skipif(not memory.STATUS.exists(), reason="needs Linux")
def test_peak_memory() -> None:
    size = 40 * 2**20
    peak = memory.peak(lambda: torch.ones(size, dtype=torch.uint8).add_(1))
    assert size <= peak + 2**19
    assert peak < size + 2**21


@pytest.mark.skipif(not memory.STATUS.exists(), reason="needs Linux")
def test_memory_of_a_case() -> None:
    case = Case(TRAINING, "fp32", 512, 16, 4096, 2)
    result = memory.measure_memory(case, ["eager"])
    assert not result.skipped
    assert list(result.memory) == ["ours", "eager"]
    assert result.required is not None
    assert 0.9 * result.required < result.memory["ours"] < result.memory["eager"]


def test_cuda_without_its_gpu(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    probes: ceilings.Probes,
) -> None:
    """All of the command but the device."""
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(measure, "ColdEvents", lambda: measure.wall_clock)
    gpu = {"gpu": "GPU", "capability": "9.0", "multiprocessors": 132, "cuda": "13.0"}
    monkeypatch.setattr(measure, "gpu", lambda: gpu)
    monkeypatch.setattr(ceilings, "Probes", lambda *_, **__: probes)
    monkeypatch.setattr(cuda, "main_cases", lambda: [SMALL, OTHER])
    measure_case = cases.measure_case

    def on_cpu(case: Case, *arguments: Any, device: str, **options: Any) -> Result:
        assert device == "cuda"
        if case == OTHER:
            raise RuntimeError("out of memory")
        return measure_case(case, *arguments, **options)

    monkeypatch.setattr(cases, "measure_case", on_cpu)
    path = tmp_path / "results.json"
    with pytest.raises(SystemExit) as failure:
        cuda.main(["--no-compile", "--seconds", "0", "--json", str(path)])
    assert failure.value.code == 1
    printed = capsys.readouterr().out
    assert f"| {SMALL} |" in printed
    assert f"FAILED:\n  {OTHER}: RuntimeError: out of memory" in printed
    written = results.read(path)
    assert [result.name for result in written.results] == [str(SMALL)]
    assert written.machine["gpu"] == "GPU"
    assert written.notes["grid"]["failures"] == [f"{OTHER}: RuntimeError: out of memory"]


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
