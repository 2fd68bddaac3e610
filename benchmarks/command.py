"""What the benchmarks' command lines have in common: arguments and the output."""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from benchmarks import measure, results, tables
from benchmarks.results import Document, Result


def positive(text: str) -> int:
    """A number of something, from the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def output(text: str) -> pathlib.Path:
    """A file to write to, from the command line; that it can't be is not said at the end."""
    path = pathlib.Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        present = path.exists()
        path.open("a").close()
        if not present:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"expected a file to write, got {text!r}: {error}"
        ) from None
    return path


def read(parser: argparse.ArgumentParser, paths: Sequence[pathlib.Path]) -> list[Document]:
    """Reads the files of results that a command line names."""
    try:
        return [results.read(path) for path in paths]
    except (OSError, ValueError) as error:
        parser.error(str(error))


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds the option for a file of results."""
    parser.add_argument("--json", type=output, metavar="FILE", help="write results there too")


def add_timing(parser: argparse.ArgumentParser, seconds: float) -> None:
    """Adds the options that say how to time."""
    parser.add_argument("--seconds", type=float, default=seconds, help="for each function and case")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: PyTorch's")
    parser.add_argument(
        "--clock",
        choices=list(measure.CLOCKS),
        default="wall",
        help="process: the time that the process was running, with --threads 1 only; for machines "
        "with other work",
    )


def set_timing(parser: argparse.ArgumentParser, options: argparse.Namespace) -> measure.Sampler:
    """Sets the number of threads, and gives the sampler that was asked for."""
    if options.clock == "process" and options.threads != 1:
        parser.error("--clock process: with several threads it adds up theirs; use --threads 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    return measure.CLOCKS[options.clock]


def typed(name: str, arguments: Sequence[str] | None) -> str:
    """A command as it was typed, but for where its results go."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--json" in words:
        position = words.index("--json")
        del words[position : position + 2]
    return shlex.join(["python", "-m", "benchmarks", name, *words])


def finish(
    name: str,
    arguments: Sequence[str] | None,
    measured: list[Result],
    best: dict[str, float],
    path: pathlib.Path | None,
    **notes: Any,
) -> Document:
    """Prints the tables of a run, and writes its document where a path is given.

    Args:
        name: of the subcommand.
        arguments: what followed it.
        measured: the results.
        best: the ceilings.
        path: of the file, if there is to be one.
        notes: of the document.
    """
    document = Document(typed(name, arguments), measure.machine(), best, measured, notes)
    print(tables.machine(document))
    for table in document.tables():
        own = document.table(table)
        parts = [tables.render(document, table)]
        if all(result.floor for result in own):
            parts.append(tables.summary(own))
        if left_out := tables.skipped(own):
            parts.append(left_out)
        print(f"\n{table}", *parts, sep="\n\n", flush=True)
    if path:
        document.write(path)
        print(f"\nwritten: {path}", file=sys.stderr)
    return document


def fail(failures: Sequence[str]) -> NoReturn:
    """Ends a run in which something failed."""
    print("\nFAILED:", *(" ".join(failure.split())[:500] for failure in failures), sep="\n  ")
    raise SystemExit(1)
