"""``python -m benchmarks``: what adapter_ext is measured with."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "cpu": ("cpu", "the layer on the CPU, against peers and the machine's limits"),
    "cuda": ("cuda", "the same on a GPU"),
    "training": ("training", "a transformer encoder, tokens/s in training"),
    "serving": ("serving", "the same in inference"),
    "memory": ("memory", "peak memory of forward and backward"),
    "overhead": ("overhead", "the cost of a call with almost no work"),
    "compare": ("compare", "two files of results: what became faster or slower"),
    "plot": ("plot", "draws files of results"),
    "report": ("report", "makes the tables and pictures of the documentation again"),
    "cuda-inspect": ("cuda_inspect", "what nvcc made of the CUDA kernels"),
    "cuda-traffic": ("cuda_traffic", "what the CUDA kernels ask of memory, in a simulator"),
}
"""By subcommand: the module whose ``main`` takes the arguments, and what it is for."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a subcommand."""
    lines = [f"  {name:14}{what}" for name, (_, what) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Subcommands, each with a --help of its own:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    rest = parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the subcommand")
    rest.required = False  # there may be none, which argparse's message denies
    options = parser.parse_args(arguments)
    module, _ = COMMANDS[options.command]
    importlib.import_module(f"benchmarks.{module}").main(options.arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
