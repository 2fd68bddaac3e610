"""The traffic table: what its lines are made of, and what counts as worse. Nothing is simulated."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind the installed package

from benchmarks import cuda_traffic  # noqa: E402
from benchmarks.cpu import Case  # noqa: E402

COUNTS = dict(zip(cuda_traffic.COLUMNS, (1.0, 2.0, 0.9, 0.8, 1.5), strict=True))
KERNEL = (
    "void adapter_ext::cuda::forward_kernel<float, adapter_ext::cuda::Tf32, "
    "adapter_ext::cuda::Shape<64, 256> >(Params)"
)
OTHERS = (
    "void adapter_ext::cuda::forward_down_kernel<float, adapter_ext::cuda::Tf32>(Params)",
    "adapter_ext::cuda::list_kernel(adapter_ext::cuda::ListParams)",
)
CASE = Case("forward", "bf16", hidden_size=512, bottleneck=16, rows=1000, adapters=2)
PASS = 1000 * 512 * 2
WEIGHTS = 2 * (2 * 512 + 2 * 16 * 512) * 2
KEPT = 1000 * (16 + 2) * 4


def _launch(kernel: str, shared_bytes: int = 64 * 512 * 2) -> cuda_traffic.Launch:
    return {
        "kernel": kernel,
        "dynamic_smem": shared_bytes,
        "global_load_sectors": 400,
        "global_load_ideal_sectors": 300,
        "global_store_sectors": 200,
        "global_store_ideal_sectors": 100,
        "l2_miss_read_sectors": 7000,
        "l2_miss_write_sectors": 5000,
        "shared_wavefronts": 30,
        "shared_ideal_wavefronts": 20,
    }


def _factor(column: str, worse: float) -> float:
    return 1 / worse if column.endswith("efficiency") else worse


@pytest.mark.parametrize("column", cuda_traffic.COLUMNS)
def test_regression(column):
    def found(worse: float) -> list[str]:
        counts = {**COUNTS, column: COUNTS[column] * _factor(column, worse)}
        return cuda_traffic.regressions({"case": COUNTS}, {"case": counts})

    assert found(0.5) == []
    assert found(1.04) == []
    (message,) = found(1.06)
    assert message.startswith(f"case: {column} is ")


def test_missing_case():
    assert cuda_traffic.regressions({"case": COUNTS}, {"other": COUNTS}) == [
        "other: not in the table"
    ]


def test_page_has_what_is_checked():
    _, lines, _ = cuda_traffic.parse_page(cuda_traffic.PAGE.read_text())
    checked = [case for case in cuda_traffic.cases() if cuda_traffic.is_checked(case)]
    assert {case.mode for case in checked} == {"forward", "backward", "decode"}
    assert {str(case) for case in checked} <= lines.keys()
    for cells in lines.values():
        assert all(value > 0 for value in cuda_traffic.counts_in(cells).values())


def test_page_is_whole_and_on_target():
    _, lines, _ = cuda_traffic.parse_page(cuda_traffic.PAGE.read_text())
    cases = {str(case): case for case in cuda_traffic.cases()}
    assert lines.keys() == cases.keys()
    counts = {name: cuda_traffic.counts_in(cells) for name, cells in lines.items()}
    assert [
        word for name in counts for word in cuda_traffic.missed(cases[name], counts[name])
    ] == []


def test_exemptions_are_needed():
    """Each has a line that misses the target."""
    _, lines, _ = cuda_traffic.parse_page(cuda_traffic.PAGE.read_text())
    for exemption in cuda_traffic.EXEMPTIONS:
        column = exemption.column
        assert any(
            cuda_traffic.is_worse(
                column,
                cuda_traffic.counts_in(lines[str(case)])[column],
                cuda_traffic.targets(case)[column],
            )
            for case in cuda_traffic.cases()
            if exemption.applies(case)
        ), exemption.reason


def test_x_is_twice_the_cache():
    cases = [case for case in cuda_traffic.cases() if case.mode != "decode"]
    large = [case for case in cases if case.rows > 512]
    assert len(large) == 2 * 2 * 4 * 2 * 3
    for case in large:
        row = case.hidden_size * cuda_traffic.DTYPES[case.dtype].itemsize
        assert case.rows * row >= 2 * cuda_traffic.EIGHTH.cache * 2**20
        assert case.rows >= 64 * cuda_traffic.EIGHTH.multiprocessors


@pytest.mark.parametrize("column", cuda_traffic.TARGETS)
def test_missed_target(column):
    met = {**COUNTS, **cuda_traffic.TARGETS}
    assert cuda_traffic.missed(CASE, met) == []
    worse = {**met, column: met[column] * _factor(column, 1.01)}
    (message,) = cuda_traffic.missed(CASE, worse)
    assert message.startswith(f"{CASE}: {column} is ")


def test_exemption(monkeypatch):
    exemption = cuda_traffic.Exemption("", cuda_traffic.DRAM, 1.3, lambda case: case.adapters == 2)
    monkeypatch.setattr(cuda_traffic, "EXEMPTIONS", (exemption,))
    counts = {**COUNTS, **cuda_traffic.TARGETS, cuda_traffic.DRAM: 1.25}
    assert cuda_traffic.missed(CASE, counts) == []
    assert cuda_traffic.missed(CASE, {**counts, cuda_traffic.DRAM: 1.31})
    assert cuda_traffic.missed(dataclasses.replace(CASE, adapters=3), counts)


def test_page():
    cells = cuda_traffic.line(CASE, [_launch(KERNEL), _launch(KERNEL)], COUNTS)
    text = cuda_traffic.measure.markdown_table(cuda_traffic.HEADER, [cells])
    page = f"# Title\n{cuda_traffic.BEGIN}{text}\n{cuda_traffic.END}# More\n"
    before, lines, after = cuda_traffic.parse_page(page)
    assert f"{before}{text}\n{after}" == page
    assert lines == {str(CASE): cells}
    assert cells[1:3] == ["forward 64", "2"]
    assert cuda_traffic.counts_in(cells) == COUNTS
    with pytest.raises(ValueError, match="columns"):
        cuda_traffic.parse_page(page.replace("L2", "L3"))
    with pytest.raises(ValueError, match="table"):
        cuda_traffic.parse_page(page.replace("end", "END"))


def test_kernel_names():
    names = [cuda_traffic.kernel_name(_launch(kernel)) for kernel in (KERNEL, *OTHERS)]
    assert names == ["forward 64", "forward_down", "list"]


@pytest.mark.parametrize(
    ("mode", "kernels", "ideal"),
    [
        ("forward", [KERNEL], 2 * PASS + WEIGHTS + KEPT),
        ("forward", OTHERS, 3 * PASS + WEIGHTS + KEPT),
        ("decode", OTHERS, 3 * PASS + WEIGHTS),
        ("backward", OTHERS, 4 * PASS + 2 * WEIGHTS + KEPT),
    ],
)
def test_ideal(mode, kernels, ideal):
    case = dataclasses.replace(CASE, mode=mode)
    assert cuda_traffic.ideal_bytes(case, map(_launch, kernels)) == ideal


def test_ideal_without_room_for_the_rows():
    launches = [_launch(KERNEL, shared_bytes=64 * 512 * 2 - 1)]
    assert cuda_traffic.ideal_bytes(CASE, launches) == 3 * PASS + WEIGHTS + KEPT


def test_counts():
    counts = cuda_traffic.count(CASE, [_launch(KERNEL), _launch(OTHERS[1])])
    ideal = 2 * PASS + WEIGHTS + KEPT
    assert list(counts.values()) == pytest.approx(
        [2 * 12000 * 32 / ideal, 2 * 600 * 32 / ideal, 3 / 4, 1 / 2, 3 / 2]
    )
