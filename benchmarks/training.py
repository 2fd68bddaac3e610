"""``python -m benchmarks training``: see :mod:`benchmarks.encoder`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import encoder


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    encoder.run("training", arguments)


if __name__ == "__main__":
    main()
