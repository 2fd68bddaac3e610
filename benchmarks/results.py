"""What a benchmark writes: one JSON format for all of them.

A document says by which command, on which machine and under which load it was measured. Every
result in it belongs to a table and has a name that is its own there: by both, results of two
documents are compared.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

FORMAT = 1
FOLDER = pathlib.Path(__file__).resolve().parent / "results"
"""Where the results are that the documentation shows."""

FEW_SAMPLES = 8
UNCERTAINTY = 0.01
"""How likely :func:`settled` may be to say so of two functions that take equally long."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """What some samples lie around.

    Attributes:
        median: of the samples.
        lower: their first quartile; of fewer than ``FEW_SAMPLES``, the least.
        upper: their third quartile, or the greatest.
        samples: how many there are.
    """

    median: float
    lower: float
    upper: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of at least one sample."""
        if len(samples) < FEW_SAMPLES:
            lower, upper = min(samples), max(samples)
        else:
            lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(statistics.median(samples), lower, upper, len(samples))

    def inverse(self) -> Spread:
        """The spread of the samples' reciprocals."""
        return Spread(1 / self.median, 1 / self.upper, 1 / self.lower, self.samples)


@dataclasses.dataclass
class Result:
    """One measured case.

    Attributes:
        table: the table that it is a line of.
        name: the case, by a name that no other in the table has.
        case: what the name stands for, by field.
        seconds: of one call, by implementation: ``ours`` and the peers.
        ratios: by peer, its seconds over ours in the same round.
        floor: the least time that the case can take, in seconds, by limits timed in its rounds.
        limits: those limits.
        tokens: that one call processes.
        memory: the peak of one call in bytes, by implementation, beyond what was there before.
        required: the bytes of it that no implementation can do without.
        skipped: by peer, why it was not measured.
    """

    table: str
    name: str
    case: dict[str, Any]
    seconds: dict[str, Spread] = dataclasses.field(default_factory=dict)
    ratios: dict[str, Spread] = dataclasses.field(default_factory=dict)
    floor: float | None = None
    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens: int | None = None
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    required: int | None = None
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Document:
    """What one run measured.

    Attributes:
        command: what to type for another such run.
        machine: as :func:`benchmarks.measure.machine` describes it, at the end of the run.
        ceilings: the machine's limits, each the best of several repetitions at the begin.
        results: in the order in which they were measured.
        notes: what else there is to say, by subject.
    """

    command: str
    machine: dict[str, Any]
    ceilings: dict[str, float]
    results: list[Result]
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def table(self, name: str) -> list[Result]:
        """The results that are lines of a table."""
        return [result for result in self.results if result.table == name]

    def tables(self) -> list[str]:
        """The names of the tables."""
        return list(dict.fromkeys(result.table for result in self.results))

    def write(self, path: pathlib.Path) -> None:
        """Writes the document."""
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"format": FORMAT, **dataclasses.asdict(self)}
        document["results"] = [_without_empty(result) for result in document["results"]]
        path.write_text(_dumps(document))


def read(path: pathlib.Path) -> Document:
    """Reads a document.

    Raises:
        ValueError: the file is none, one of another format, or lacks something of this one.
    """
    try:
        document = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text at all
        raise ValueError(f"{path}: expected results as JSON: {error}") from error
    found = document.pop("format", None) if isinstance(document, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: expected results of format {FORMAT}, got format {found}")
    try:
        results = [_result(result) for result in document.pop("results")]
        return Document(results=results, **document)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected results of format {FORMAT}: {error!r}") from error


def ratios(
    samples: Mapping[str, Sequence[float]], reference: str = "ours"
) -> Iterator[tuple[str, Spread]]:
    """Of each but the reference, the samples over those of the reference in the same round."""
    for name, times in samples.items():
        if name != reference:
            pairs = zip(times, samples[reference], strict=True)
            yield name, Spread.of([time / other for time, other in pairs])


def settled(samples: Mapping[str, Sequence[float]], reference: str = "ours") -> bool:
    """Whether it is clear of each but the reference if it takes longer or less long in the median.

    By a sign test of the ratios in each round, which supposes nothing about how times are
    distributed: of two functions that take equally long, either is as likely to win a round.
    """
    for name, times in samples.items():
        if name == reference:
            continue
        rounds = len(times)
        longer = sum(time > other for time, other in zip(times, samples[reference], strict=True))
        fewer = min(longer, rounds - longer)
        one_side = sum(math.comb(rounds, wins) for wins in range(fewer + 1)) / 2**rounds
        if 2 * one_side > UNCERTAINTY:
            return False
    return True


def _result(fields: dict[str, Any]) -> Result:
    for name in ("seconds", "ratios"):
        fields[name] = {key: Spread(*value) for key, value in fields.get(name, {}).items()}
    return Result(**fields)


def _without_empty(fields: dict[str, Any]) -> dict[str, Any]:
    for name in ("seconds", "ratios"):
        fields[name] = {key: _short(value) for key, value in fields[name].items()}
    return {key: value for key, value in fields.items() if value not in (None, {})}


def _short(spread: Mapping[str, float]) -> list[float]:
    """The values in order, to five digits: many more than a time is good for."""
    return [
        float(f"{value:.5g}") if isinstance(value, float) else value for value in spread.values()
    ]


def _dumps(document: dict[str, Any]) -> str:
    """JSON with a result a line, so that a change of one is a change of a line."""
    results = ",\n".join("  " + json.dumps(result) for result in document.pop("results"))
    text = json.dumps(document, indent=1).removesuffix("\n}")
    return f'{text},\n "results": [\n{results}\n ]\n}}\n'
