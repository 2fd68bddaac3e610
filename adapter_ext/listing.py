"""What adapters there are, as a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class AdapterInfo(NamedTuple):
    """One adapter in one module.

    Attributes:
        name: of the adapter.
        where: path of the module that has it, ``""`` for the module that was asked.
        bottleneck: its width r, None where the adapter has none.
        activation: name of its activation, None where it has none.
        enabled: whether it runs.
        parameters: elements of its parameters.
        trainable: elements of those that require grad.
    """

    name: str
    where: str
    bottleneck: int | None
    activation: str | None
    enabled: bool
    parameters: int
    trainable: int


class AdapterTable(list[AdapterInfo]):
    """A list of adapters; ``str()`` is an aligned table."""

    def __str__(self) -> str:
        return text_table(AdapterInfo._fields, self)


def text_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Aligned columns with a header; None is shown as ``-``."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
