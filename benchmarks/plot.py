"""``python -m benchmarks plot FILE...``: draws results, as PNG and SVG.

- *floor*: our time over the floor, by shape;
- *peers*: each peer's time over ours, all cases of the grid;
- *adapters*: time against the number of adapters;
- *memory*: peak memory over what no implementation can do without.

A picture for which the files have no results is left out.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import command, peers, tables
from benchmarks.results import Document, Result

PREFIX = "benchmarks_"
FORMATS = ("png", "svg")
BLUE, ORANGE, GREEN, PINK, SKY, GREY = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#777777",
)
COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, GREY, "#000000")
MARKERS = "osD^v"


def _pyplot() -> Any:
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        sys.exit("benchmarks plot: needs matplotlib: pip install '.[benchmarks]'")
    matplotlib.use("agg")
    # The same results give the same file.
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "adapter_ext",
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 9,
        }
    )
    return importlib.import_module("matplotlib.pyplot")


def _log(axes: Any, letter: str) -> None:
    """Makes the axis x or y logarithmic, with plain numbers."""
    ticker = importlib.import_module("matplotlib.ticker")
    getattr(axes, f"set_{letter}scale")("log")
    axis = getattr(axes, f"{letter}axis")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _kinds(chosen: Sequence[Result]) -> list[tuple[str, str]]:
    """The modes and types of results."""
    return list(dict.fromkeys((r.case["mode"], r.case["dtype"]) for r in chosen))


def _of_kind(chosen: Sequence[Result], kind: tuple[str, str]) -> list[Result]:
    return [r for r in chosen if (r.case["mode"], r.case["dtype"]) == kind]


def _shape(result: Result) -> str:
    return "D={hidden_size} r={bottleneck} T={rows}".format(**result.case)


def draw_floor(plt: Any, grid: Sequence[Result]) -> Any:
    """Our time over the floor, a panel for each mode and type, a line for each shape."""
    kinds = _kinds(grid)
    shapes = list(dict.fromkeys(_shape(r) for r in grid))
    counts = sorted({r.case["adapters"] for r in grid})
    figure, axes = plt.subplots(
        1,
        len(kinds),
        figsize=(3.0 * len(kinds) + 1, 0.22 * len(shapes) + 1.6),
        sharey=True,
        sharex=True,
        squeeze=False,
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        for count, color, marker in zip(counts, COLORS, MARKERS, strict=False):
            own = [r for r in _of_kind(grid, kind) if r.case["adapters"] == count and r.floor]
            axis.plot(
                [r.seconds["ours"].median / (r.floor or 1) for r in own],
                [shapes.index(_shape(r)) for r in own],
                marker,
                color=color,
                alpha=0.8,
                label=f"A={count}",
            )
        axis.axvline(1, color=GREY, linewidth=1)
        _log(axis, "x")
        axis.set_title(" ".join(kind))
        axis.set_xlabel("our time / floor")
    axes[0][0].set_yticks(range(len(shapes)), shapes)
    axes[0][0].set_ylim(len(shapes) - 0.5, -0.5)
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_peers(plt: Any, grid: Sequence[Result]) -> Any:
    """Each peer's time over ours: all cases as points, the median as a bar."""
    kinds, names = _kinds(grid), tables.peers_of(grid)
    figure, axis = plt.subplots(figsize=(7, 0.5 * len(names) + 1.8))
    height = 0.8 / len(kinds)
    for k, (kind, color) in enumerate(zip(kinds, COLORS, strict=False)):
        for n, name in enumerate(names):
            own = sorted(r.ratios[name].median for r in _of_kind(grid, kind) if name in r.ratios)
            y = n - 0.4 + (k + 0.5) * height
            axis.plot(own, [y] * len(own), "o", markersize=4, color=color, alpha=0.5)
            if own:
                middle = (own[len(own) // 2] + own[(len(own) - 1) // 2]) / 2
                ends = [y - 0.4 * height, y + 0.4 * height]
                axis.plot([middle] * 2, ends, color=color, linewidth=3)
        axis.plot([], [], "o", color=color, label=" ".join(kind))
    axis.axvline(1, color=GREY, linewidth=1)
    _log(axis, "x")
    axis.set_xlabel("peer's time / our time (right of 1: ours is faster; bars are medians)")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_adapters(plt: Any, chosen: Sequence[Result], decode: Sequence[Result]) -> Any:
    """Our time by number of adapters and spread of rows; and of decode, with the peers'."""
    modes = list(dict.fromkeys(r.case["mode"] for r in chosen))
    panels = len(modes) + bool(decode)
    figure, axes = plt.subplots(1, panels, figsize=(4 * panels, 3.6), squeeze=False)
    rows = max((r.case["rows"] for r in chosen), default=0)
    for axis, mode in zip(axes[0], modes, strict=False):
        own = [r for r in chosen if r.case["mode"] == mode and r.case["rows"] == rows]
        for dtype, style in zip(dict.fromkeys(r.case["dtype"] for r in own), "-:", strict=False):
            alike = [r for r in own if r.case["dtype"] == dtype]
            one = min(alike, key=lambda r: int(r.case["adapters"]))
            first = one.seconds["ours"].median
            for spread, color, marker in zip(peers.SPREADS, COLORS, MARKERS, strict=False):
                line = [one, *(r for r in alike if r.case["spread"] == spread and r is not one)]
                axis.plot(
                    [r.case["adapters"] for r in line],
                    [r.seconds["ours"].median / first for r in line],
                    style + marker,
                    color=color,
                    label=f"{dtype}, {spread}",
                )
        axis.set_title(f"{mode}, T={rows}")
        axis.set_ylabel("our time / that of one adapter")
    if decode:
        axis = axes[0][-1]
        dtype = decode[0].case["dtype"]
        line = [r for r in decode if r.case["dtype"] == dtype]
        for name, color, marker in zip(
            ("ours", *tables.peers_of(line)), COLORS, MARKERS * 2, strict=False
        ):
            own = [r for r in line if name in r.seconds]
            axis.plot(
                [r.case["adapters"] for r in own],
                [r.seconds[name].median * 1e3 for r in own],
                f"-{marker}",
                color=color,
                label=name,
            )
        _log(axis, "y")
        axis.set_title(f"decode, {dtype}, T={decode[0].case['rows']}, stacked weights")
        axis.set_ylabel("ms")
    for axis in axes[0]:
        counts = sorted({int(x) for line in axis.lines for x in line.get_xdata()})
        axis.set_xscale("log")
        axis.set_xticks(counts, counts)
        axis.minorticks_off()
        axis.set_xlabel("adapters A")
        axis.legend(fontsize=7)
    if decode:
        axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_memory(plt: Any, chosen: Sequence[Result]) -> Any:
    """Peak memory over what is required: a group of bars for each case."""
    names = list(dict.fromkeys(name for r in chosen for name in r.memory))
    figure, axis = plt.subplots(figsize=(7, 0.075 * len(chosen) * len(names) + 1.6))
    height = 0.85 / len(names)
    for n, (name, color) in enumerate(zip(names, COLORS, strict=False)):
        own = [(i, r) for i, r in enumerate(chosen) if name in r.memory]
        axis.barh(
            [i - 0.425 + (n + 0.5) * height for i, _ in own],
            [r.memory[name] / (r.required or 1) for _, r in own],
            height,
            color=color,
            label=name,
        )
    axis.axvline(1, color="black", linewidth=1)
    labels = ["{dtype} T={rows} A={adapters}".format(**r.case) for r in chosen]
    axis.set_yticks(range(len(chosen)), labels)
    axis.set_ylim(len(chosen) - 0.5, -0.5)
    axis.set_xlabel("peak memory of forward and backward / required")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw(documents: Sequence[Document], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws what there are results for.

    Args:
        documents: of one machine; of cases that several have, those of the first are drawn.
        folder: where to.

    Returns:
        The files that were written.
    """
    plt = _pyplot()
    merged: dict[tuple[str, str], Result] = {}
    sources: dict[str, Document] = {}
    for document in documents:
        for result in document.results:
            merged.setdefault((result.table, result.name), result)
            sources.setdefault(result.table, document)

    def of(table: str) -> list[Result]:
        return [result for result in merged.values() if result.table == table]

    grid, counted, decode, memory = (of(t) for t in ("grid", "adapters", "decode", "memory"))
    figures: dict[str, tuple[str, Callable[[], Any]]] = {}
    if grid:
        figures["floor"] = "grid", lambda: draw_floor(plt, grid)
        figures["peers"] = "grid", lambda: draw_peers(plt, grid)
    if counted or decode:
        figures["adapters"] = (
            "adapters" if counted else "decode",
            lambda: draw_adapters(plt, counted, decode),
        )
    if memory:
        figures["memory"] = "memory", lambda: draw_memory(plt, memory)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (table, make) in figures.items():
        figure = make()
        machine = sources[table].machine
        where = machine.get("gpu") or f"{machine['cpu']}, {machine['cpu_capability']}"
        caption = f"{where}, threads: {machine['threads']}, {machine['date'][:10]}"
        figure.text(0.01, 0.005, caption, fontsize=7, color=GREY)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        for form in FORMATS:
            path = folder / f"{PREFIX}{name}.{form}"
            metadata = {"Date": None} if form == "svg" else None
            figure.savefig(path, dpi=110, metadata=metadata, bbox_inches="tight")
            written.append(path)
        plt.close(figure)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(), metavar="FOLDER")
    options = parser.parse_args(arguments)
    documents = command.read(parser, options.files)
    try:
        written = draw(documents, options.out)
    except OSError as error:
        parser.error(f"--out: expected a folder to write to, got '{options.out}': {error}")
    if not written:
        raise SystemExit("benchmarks plot: no results to draw in these files")
    print(*(f"written: {path}" for path in written), sep="\n")


if __name__ == "__main__":
    main()
