"""The command line: ``python -m adapter_ext {demo,doctor}``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adapter_ext import demo, doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: of the command line; None means those of this process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m adapter_ext")
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
    options = parser.parse_args(arguments)

    if options.command == "doctor":
        facts = doctor.report()
        width = max(map(len, facts))
        print("\n".join(f"{title:<{width}}  {fact}" for title, fact in facts.items()))
        return 0
    try:
        demo.run(options.out, demo.Settings(seed=options.seed))
    except (demo.DemoError, ImportError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
