"""The tables that are made of results, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.measure import markdown_table
from benchmarks.results import Document, Result

SUMMARY, TARGETS, SPEEDUPS = " summary", " targets", " speedups"
"""End the names of a table's summary and of what it says of the targets."""

MANY_ROWS = 2048
TIME_TARGETS = {
    ("forward", True): 1.4,
    ("forward", False): 2.0,
    ("forward+backward", True): 1.6,
    ("forward+backward", False): 2.5,
}
"""Our time over the floor at most, by mode and whether there are so many rows."""

BEST = "best peer"
MANY_ADAPTERS = 64
BEST_TARGET, EAGER_TARGET = 2, 3
MANY_ADAPTERS_TARGETS = {"fp32": 5, "bf16": 10}
"""Medians of peers' times over ours: the best one's, eager's, eager's with so many adapters."""


def render(document: Document, name: str) -> str:
    """A table of a document, by its name, or the one line about its machine.

    Raises:
        ValueError: the document has no such table.
    """
    if name == "machine":
        return machine(document)
    about = {SUMMARY: summary, TARGETS: targets, SPEEDUPS: speedups}
    ending = next((ending for ending in about if name.endswith(ending)), "")
    results = document.table(name.removesuffix(ending))
    if not results:
        raise ValueError(f"expected one of the tables {', '.join(document.tables())}, got {name!r}")
    return about.get(ending, RENDERERS.get(name, times))(results)


def machine(document: Document) -> str:
    """The command, the machine, when it was used, and how busy it was, in one line."""
    facts, limits = document.machine, document.ceilings
    processor = facts.get("gpu") or f"{facts['cpu']} ({facts['cpu_capability']})"
    gpu = (
        f", sm {facts['capability']}, {facts['multiprocessors']} multiprocessors, driver "
        f"{facts.get('driver_version', 'unknown')}, {facts.get('clocks.sm', '?')} of "
        f"{facts.get('clocks.max.sm', '?')} MHz, CUDA {facts['cuda']}"
        if "gpu" in facts
        else ""
    )
    ceilings = [
        *([f"copy {limits['bytes_per_second'] / 1e9:.1f} GB/s"] if limits else []),
        *(
            [f"fp32 multiply-adds {limits['flops_per_second'] / 1e9:.0f} GFLOP/s"]
            if "flops_per_second" in limits
            else []
        ),
    ]
    threads = facts["threads"]
    facts_in_words = [
        f"{processor}{gpu}",
        f"{threads} thread{'s' if threads > 1 else ''}",
        f"torch {facts['torch']}",
        f"adapter_ext {facts['adapter_ext']}",
        f"allocator {facts['allocator']}",
        *ceilings,
        f"load {facts['load']}",
        facts["date"],
    ]
    return f"`{document.command}`: {', '.join(facts_in_words)}"


def peers_of(results: Sequence[Result]) -> list[str]:
    """The peers that were measured in any of the results."""
    return list(dict.fromkeys(peer for result in results for peer in result.ratios))


def milliseconds(seconds: float) -> str:
    """A time as tables have it."""
    return f"{seconds * 1e3:.{3 if seconds >= 1e-4 else 4}f}"


def times(results: Sequence[Result]) -> str:
    """Our time, over the floor where there is one, and each peer's over ours."""
    peers = peers_of(results)
    has_floor = any(result.floor for result in results)

    def row(result: Result) -> list[str]:
        ours = result.seconds["ours"].median
        floor = [f"{ours / result.floor:.2f}" if result.floor else ""] if has_floor else []
        ratios = [f"{result.ratios[p].median:.2f}" if p in result.ratios else "" for p in peers]
        return [result.name, milliseconds(ours), *floor, *ratios]

    floor = ["ours/floor"] if has_floor else []
    header = ["case", "ours ms", *floor, *(f"{peer}/ours" for peer in peers)]
    return markdown_table(header, map(row, results))


def summary(results: Sequence[Result]) -> str:
    """For each mode and type: our time over the floor, and each peer's over ours."""
    rows = []
    for kind in dict.fromkeys((result.case["mode"], result.case["dtype"]) for result in results):
        own = [result for result in results if (result.case["mode"], result.case["dtype"]) == kind]
        floors = [r.seconds["ours"].median / r.floor for r in own if r.floor]
        if floors:
            rows.append([" ".join(kind), "ours/floor", *_range(floors)])
        for peer in peers_of(own):
            ratios = [r.ratios[peer].median for r in own if peer in r.ratios]
            rows.append([" ".join(kind), f"{peer}/ours", *_range(ratios)])
        best = [min(ratio.median for ratio in r.ratios.values()) for r in own if r.ratios]
        if best:
            rows.append([" ".join(kind), f"{BEST}/ours", *_range(best)])
    return markdown_table(["summary", "ratio", "least", "median", "most", "cases"], rows)


def targets(results: Sequence[Result]) -> str:
    """What is aimed at, by mode and type: the median, the worst, and how many cases meet it."""
    rows = []
    for mode, dtype in dict.fromkeys((r.case["mode"], r.case["dtype"]) for r in results):
        own = [r for r in results if (r.case["mode"], r.case["dtype"]) == (mode, dtype)]
        for many, words in ((True, f"T at least {MANY_ROWS}"), (False, f"T below {MANY_ROWS}")):
            limit = TIME_TARGETS[mode, many]
            floors = [
                r.seconds["ours"].median / r.floor
                for r in own
                if r.floor and (r.case["rows"] >= MANY_ROWS) == many
            ]
            if floors:
                met = sum(ratio <= limit for ratio in floors)
                target = f"ours/floor at most {limit}, {words}"
                rows.append([f"{mode} {dtype}", target, floors, max(floors), met])
        for peer in peers_of(own):
            ratios = [r.ratios[peer].median for r in own if peer in r.ratios]
            met = sum(ratio > 1 for ratio in ratios)
            rows.append([f"{mode} {dtype}", f"{peer}/ours above 1", ratios, min(ratios), met])
    header = ["cases", "target", "median", "worst", "met"]
    return markdown_table(
        header,
        (
            [
                kind,
                target,
                f"{statistics.median(all_):.2f}",
                f"{worst:.2f}",
                f"{met} of {len(all_)}",
            ]
            for kind, target, all_, worst, met in rows
        ),
    )


def speedups(results: Sequence[Result]) -> str:
    """Peers' times over ours in the median: the target, what is reached, and what can be.

    Who takes no longer than the floor is faster than a peer by the peer's time over the floor; who
    takes as long as the targets for our time allow, by so much less.
    """
    rows = []
    for mode, dtype in dict.fromkeys((r.case["mode"], r.case["dtype"]) for r in results):
        own = [
            (r, r.floor)
            for r in results
            if (r.case["mode"], r.case["dtype"]) == (mode, dtype)
            and r.floor
            and "eager" in r.ratios
        ]
        many = [(r, floor) for r, floor in own if r.case["adapters"] >= MANY_ADAPTERS]
        for peer, least, words, chosen in (
            (BEST, BEST_TARGET, "", own),
            ("eager", EAGER_TARGET, "", own),
            ("eager", MANY_ADAPTERS_TARGETS[dtype], f", A = {MANY_ADAPTERS}", many),
        ):
            if not chosen:
                continue
            over_ours, over_floor, at_targets = [], [], []
            for r, floor in chosen:
                names = list(r.ratios) if peer == BEST else [peer]
                over_ours.append(min(r.ratios[name].median for name in names))
                over_floor.append(min(r.seconds[name].median for name in names) / floor)
                limit = TIME_TARGETS[mode, r.case["rows"] >= MANY_ROWS]
                at_targets.append(over_floor[-1] / limit)
            medians = [f"{statistics.median(x):.2f}" for x in (over_ours, at_targets, over_floor)]
            rows.append([f"{mode} {dtype}", f"{peer}/ours at least {least}{words}", *medians])
    return markdown_table(["cases", "target", "median", "at the targets", "at the floor"], rows)


def _range(values: Sequence[float]) -> list[str]:
    numbers = (min(values), statistics.median(values), max(values))
    return [*(f"{number:.2f}" for number in numbers), str(len(values))]


def adapters(results: Sequence[Result]) -> str:
    """The same as :func:`times`, with our time over that of one adapter, or of the fewest."""

    def others(result: Result) -> dict[str, Any]:
        return {k: v for k, v in result.case.items() if k not in ("adapters", "spread")}

    def relative(result: Result) -> str:
        alike = [other for other in results if others(other) == others(result)]
        fewest = min(alike, key=lambda other: int(other.case["adapters"]))
        return f"{result.seconds['ours'].median / fewest.seconds['ours'].median:.2f}"

    return _with_column(times(results), "ours/fewest A", list(map(relative, results)))


def _with_column(table: str, name: str, cells: Sequence[str]) -> str:
    """A table with a column more, third."""
    lines = table.splitlines()
    added = [name, "--:", *cells]
    rows = [line.split(" | ") for line in lines]
    return "\n".join(
        " | ".join([*row[:2], cell, *row[2:]]) for row, cell in zip(rows, added, strict=True)
    )


def overhead(results: Sequence[Result]) -> str:
    """The time of a small call in microseconds, and what is promised."""
    header = ["case", "ours us", "eager us", "ours/eager", "limit"]
    rows = [
        [
            result.name,
            *(f"{result.seconds[name].median * 1e6:.2f}" for name in ("ours", "eager")),
            f"{1 / result.ratios['eager'].median:.2f}",
            f"{result.case['limit']:.1f}",
        ]
        for result in results
    ]
    return markdown_table(header, rows)


def tokens(results: Sequence[Result]) -> str:
    """Tokens in a second."""
    names = list(dict.fromkeys(name for result in results for name in result.seconds))
    header = ["case", *(f"{name} tokens/s" for name in names), *(f"ours/{p}" for p in names[1:])]

    def row(result: Result) -> list[str]:
        rates = [f"{(result.tokens or 0) / result.seconds[n].median:.0f}" for n in names]
        return [result.name, *rates, *(f"{result.ratios[n].median:.2f}" for n in names[1:])]

    return markdown_table(header, map(row, results))


def memory(results: Sequence[Result]) -> str:
    """The peak beyond what was there before, over what no implementation can do without."""
    names = list(dict.fromkeys(name for result in results for name in result.memory))
    header = ["case", "required MB", *(f"{name}/required" for name in names)]

    def row(result: Result) -> list[str]:
        required = result.required or 0
        ratios = [
            f"{result.memory[name] / required:.2f}" if name in result.memory else ""
            for name in names
        ]
        return [result.name, f"{required / 1e6:.1f}", *ratios]

    return markdown_table(header, map(row, results))


def skipped(results: Sequence[Result]) -> str:
    """What was not measured, and why: a line for each peer and reason."""
    counts: dict[str, int] = {}
    for result in results:
        for peer, reason in result.skipped.items():
            line = f"{peer}: {reason}"
            counts[line] = counts.get(line, 0) + 1
    return "\n".join(f"not run: {line} ({count} cases)" for line, count in counts.items())


RENDERERS: dict[str, Callable[[Sequence[Result]], str]] = {
    "adapters": adapters,
    "decode": adapters,
    "overhead": overhead,
    "training": tokens,
    "serving": tokens,
    "memory": memory,
}
"""What writes a table that is not one of times."""
