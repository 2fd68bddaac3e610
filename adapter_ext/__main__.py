"""The command line: ``python -m adapter_ext {convert,demo,doctor,inspect}``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adapter_ext import __version__, demo, doctor, files
from adapter_ext.listing import text_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: of the command line; None means those of this process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m adapter_ext")
    parser.add_argument("--version", action="version", version=f"adapter_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="print what a bug report needs")
    of_demo = commands.add_parser(
        "demo",
        help="train and serve eight adapters at once on handwritten digits",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    of_demo.add_argument(
        "--out", type=Path, default="adapter_ext_demo", help="folder for the figure and the files"
    )
    of_demo.add_argument("--seed", type=int, default=0, help="of everything random")
    of_inspect = commands.add_parser("inspect", help="list what an adapter file holds")
    of_inspect.add_argument("file", type=Path, help=" or ".join(files.SUFFIXES))
    of_convert = commands.add_parser(
        "convert", help="write an adapter file in the other format, which its suffix says"
    )
    of_convert.add_argument("source", metavar="in", type=Path)
    of_convert.add_argument("target", metavar="out", type=Path)
    of_convert.add_argument("--force", action="store_true", help="replace out if it exists")
    options = parser.parse_args(arguments)

    if options.command == "doctor":
        facts = doctor.report()
        width = max(map(len, facts))
        print("\n".join(f"{title:<{width}}  {fact}" for title, fact in facts.items()))
        return 0
    expected: tuple[type[Exception], ...] = (ValueError, OSError)
    if options.command == "demo":
        expected = (demo.DemoError, ImportError, OSError)
    try:
        if options.command == "inspect":
            inspect(options.file)
        elif options.command == "convert":
            convert(options.source, options.target, force=options.force)
        else:
            demo.run(options.out, demo.Settings(seed=options.seed))
    except expected as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def inspect(path: Path) -> None:
    """Prints what an adapter file holds; makes no module.

    Args:
        path: the file.

    Raises:
        OSError: if it can't be read.
        ValueError: if it is no adapter file, or something is wrong with it.
    """
    content = files.read_adapters(path)
    if path.suffix.lower() == ".pt":
        print(f"{path}: .pt, NeMo's layout")
    else:
        print(f"{path}: .safetensors, format version {files.FORMAT_VERSION}")
    rows = []
    for adapter in content.adapters.values():
        tensors = [tensor for state in adapter.states for tensor in state.values()]
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
        rows.append(
            (
                adapter.name,
                adapter.module or None,
                len(adapter.states),
                "unknown" if adapter.paths is None else "known",
                _shown(adapter.config.get("dim", "-")),
                _shown(adapter.config.get("activation", "-")),
                adapter.config["enabled"],
                f"{sum(tensor.numel() for tensor in tensors):,}",
                ", ".join(sorted(dtypes)) or None,
                f"{sum(tensor.nbytes for tensor in tensors):,}",
            )
        )
    titles = "adapter module hosts paths dim activation enabled parameters dtype bytes"
    print(text_table(titles.split(), rows))


def _shown(value: object) -> str:
    # The file may be anybody's: neither control characters nor pages of text.
    text = str(value)
    return (text if text.isprintable() else repr(text))[:40]


def convert(source: Path, target: Path, *, force: bool = False) -> None:
    """Writes what an adapter file holds to another one, in the format that its suffix says.

    Args:
        source: the file.
        target: the other file.
        force: replace target if it exists.

    Raises:
        OSError: if source can't be read, target can't be written, or exists.
        ValueError: if source is no adapter file, or target the same file.
    """
    if target.exists():
        if target.samefile(source):
            raise ValueError(f"{target} is the file to convert")
        if not force:
            raise FileExistsError(f"{target} exists; --force replaces it")
    files.write_adapters(target, files.read_adapters(source))


if __name__ == "__main__":
    sys.exit(main())
