"""``python -m benchmarks compare OLD NEW``: what became faster or slower between two runs.

By default our time is taken as a share of eager PyTorch's in the same round: two runs may have met
the machine in different states, which both functions saw. ``--per none`` compares seconds.

The noise of a comparison has two sources, and a case has moved only beyond both. Within the runs:
the ratio of the two lies in a range that follows from the quartiles which each run stored (of few
samples, the extremes); it must not hold 1, so the middle halves of both runs' samples have nothing
in common. Between the runs: the peers are the same code in both, so what their times moved by is
noise; the change must be larger than that of 95% of them, and than ``--least``. Bytes are compared
by ``--least`` alone: they do not depend on the machine's state.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Sequence

from benchmarks import command, measure
from benchmarks.results import Document, Result, Spread


@dataclasses.dataclass(frozen=True)
class Change:
    """What became of one case.

    Attributes:
        table: the case's table.
        name: the case.
        quantity: what is compared; less of it is better.
        ratio: new over old; lower and upper by the spreads of both.
        verdict: faster, slower (for bytes: smaller, larger), or nothing.
    """

    table: str
    name: str
    quantity: str
    ratio: Spread
    verdict: str


def over(new: Spread, old: Spread) -> Spread:
    """The range of the ratio of two spreads."""
    samples = min(new.samples, old.samples)
    return Spread(new.median / old.median, new.lower / old.upper, new.upper / old.lower, samples)


def changes(
    old: Document, new: Document, *, function: str = "ours", per: str = "eager", least: float = 0.03
) -> list[Change]:
    """What became of the cases that both documents have.

    Args:
        old: the earlier run.
        new: the later run.
        function: the implementation that is looked at.
        per: the one whose time in the same round its time is divided by; ``none``: by nothing. A
            case without it is compared by seconds.
        least: the least relative change that counts.
    """
    before = {(result.table, result.name): result for result in old.results}
    beyond = max(least, noise(old, new, function=function, per=per))
    found = []
    for result in new.results:
        earlier = before.get((result.table, result.name))
        if earlier is None:
            continue
        key = (result.table, result.name)
        then, now = _time(earlier, function, per), _time(result, function, per)
        if then is None or now is None:
            then, now = _time(earlier, function, "none"), _time(result, function, "none")
            unit = "s"
        else:
            unit = "s" if per == "none" else f"s per {per}"
        if then is not None and now is not None:
            words = ("faster", "slower")
            found.append(
                Change(*key, f"{function} {unit}", *_judge(over(now, then), beyond, words))
            )
        if function in earlier.memory and function in result.memory:
            share = result.memory[function] / earlier.memory[function]
            judged = _judge(Spread(share, share, share, 1), least, ("smaller", "larger"))
            found.append(Change(*key, f"{function} bytes", *judged))
    return found


def noise(old: Document, new: Document, *, function: str = "ours", per: str = "eager") -> float:
    """By how much the times of what is the same code in both runs moved, but for the most 5%.

    Args:
        old: the earlier run.
        new: the later run.
        function: what may have changed, beside ours.
        per: as in :func:`changes`.

    Returns:
        A relative change; 0 where the runs share no such time.
    """
    before = {(result.table, result.name): result for result in old.results}
    moved = []
    for result in new.results:
        earlier = before.get((result.table, result.name))
        for peer in result.ratios:
            if earlier is None or peer in (function, per) or peer not in earlier.ratios:
                continue
            if per == "none":
                then, now = earlier.seconds[peer].median, result.seconds[peer].median
            elif per == "ours" or per not in result.ratios or per not in earlier.ratios:
                continue
            else:
                then = earlier.ratios[peer].median / earlier.ratios[per].median
                now = result.ratios[peer].median / result.ratios[per].median
            moved.append(max(then, now) / min(then, now) - 1)
    return sorted(moved)[math.ceil(0.95 * len(moved)) - 1] if moved else 0.0


def _time(result: Result, function: str, per: str) -> Spread | None:
    if per == "none":
        return result.seconds.get(function)
    if function == "ours":
        return result.ratios[per].inverse() if per in result.ratios else None
    if per == "ours":
        return result.ratios.get(function)
    return None  # of two peers, the ratios in each round are not stored


def _judge(ratio: Spread, least: float, words: tuple[str, str]) -> tuple[Spread, str]:
    if ratio.upper < 1 and ratio.median < 1 / (1 + least):
        return ratio, words[0]
    if ratio.lower > 1 and ratio.median > 1 + least:
        return ratio, words[1]
    return ratio, ""


def table(found: Sequence[Change]) -> str:
    """The changes as a Markdown table."""
    header = ["case", "table", "quantity", "new/old", "range", "moved"]
    rows = [
        [
            change.name,
            change.table,
            change.quantity,
            f"{change.ratio.median:.2f}",
            f"{change.ratio.lower:.2f} to {change.ratio.upper:.2f}",
            change.verdict,
        ]
        for change in found
    ]
    return measure.markdown_table(header, rows)


def differences(old: Document, new: Document) -> list[str]:
    """What else than the code differs between the runs, in words."""
    lines = []
    for name in ("cpu", "gpu", "cpu_capability", "threads", "torch", "allocator", "load"):
        then, now = old.machine.get(name), new.machine.get(name)
        if then != now:
            lines.append(f"{name}: {then} before, {now} now")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the comparison; exits with 1 where ``--check`` is given and something got worse."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    parser.add_argument("--function", default="ours", help="what is looked at, default: ours")
    parser.add_argument("--per", default="eager", help="a peer, or none; default: eager")
    parser.add_argument("--least", type=float, default=0.03, help="that counts, default: 0.03")
    parser.add_argument("--moved", action="store_true", help="print only what moved")
    parser.add_argument("--check", action="store_true", help="fail where something got worse")
    options = parser.parse_args(arguments)
    old, new = command.read(parser, [options.old, options.new])
    found = changes(old, new, function=options.function, per=options.per, least=options.least)
    if not found:
        raise SystemExit(f"benchmarks compare: {options.old} and {options.new} share no case")
    moved = [change for change in found if change.verdict]
    for line in differences(old, new):
        print(f"- {line}")
    between = noise(old, new, function=options.function, per=options.per)
    print(f"- noise between the runs, by the peers: {between:.1%}")
    shown = moved if options.moved else found
    print("\n" + table(shown))
    counts = [
        f"{sum(change.verdict == word for change in found)} {word}"
        for word in ("faster", "slower", "smaller", "larger")
    ]
    names = {(result.table, result.name) for result in new.results}
    only_old = sum((result.table, result.name) not in names for result in old.results)
    both = len({(change.table, change.name) for change in found})
    print(
        f"\n{len(moved)} of {len(found)} moved beyond the noise: {', '.join(counts)}; "
        f"{only_old} cases only before, {len(new.results) - both} only now"
    )
    if options.check and any(change.verdict in ("slower", "larger") for change in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
