"""``python -m benchmarks report``: the tables and pictures of the documentation, made again.

Between the lines ``<!-- benchmarks: begin FILE TABLE -->`` and ``<!-- benchmarks: end -->`` of a
page stands a table of a file in benchmarks/results, or of several that a pattern names
(``grid/*.json``); ``machine`` is the line about a file's machine, ``TABLE summary``,
``TABLE targets`` and ``TABLE speedups`` say what a table amounts to. The pictures are those of
``benchmarks plot`` for the files in the folder ``DRAWN``.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
from collections.abc import Sequence

from benchmarks import plot, results, tables

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
DRAWN = results.FOLDER / "quick"
BLOCK = re.compile(
    r"(<!-- benchmarks: begin (?P<file>\S+) (?P<table>[^>]+) -->\n).*?(<!-- benchmarks: end -->)",
    re.DOTALL,
)


def pages() -> list[pathlib.Path]:
    """The pages that may have tables."""
    return [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def files(pattern: str) -> list[pathlib.Path]:
    """The files of results that a marker names.

    Raises:
        ValueError: there are none.
    """
    if not (found := sorted(results.FOLDER.glob(pattern))):
        raise ValueError(f"expected files in {results.FOLDER}, got none for {pattern!r}")
    return found


def render(page: str) -> str:
    """A page with the tables that its results give."""

    def block(match: re.Match[str]) -> str:
        documents = [results.read(file) for file in files(match["file"])]
        if match["table"] == "machine":
            table = "\n\n".join(tables.machine(document) for document in documents)
        else:
            everything = [result for document in documents for result in document.results]
            merged = dataclasses.replace(documents[0], results=everything)
            table = tables.render(merged, match["table"])
        return f"{match[1]}{table}\n{match[4]}"

    return BLOCK.sub(block, page)


def drawn_files() -> list[pathlib.Path]:
    """The files whose results are drawn."""
    return sorted(DRAWN.glob("*.json"))


def outdated() -> list[pathlib.Path]:
    """The pages whose tables are not those that the results give."""
    return [page for page in pages() if render(page.read_text()) != page.read_text()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the tables and draws the pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="fail where a table is not up to date")
    options = parser.parse_args(arguments)
    if options.check:
        if pages_of := outdated():
            names = ", ".join(str(page.relative_to(ROOT)) for page in pages_of)
            raise SystemExit(f"not what benchmarks/results says, run benchmarks report: {names}")
        return
    for page in pages():
        text = page.read_text()
        if (rendered := render(text)) != text:
            page.write_text(rendered)
            print(f"written: {page.relative_to(ROOT)}")
    for path in plot.draw([results.read(file) for file in drawn_files()], DOCS):
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
