"""The cases that are measured: what runs in each, that it is right, and tables of the times.

The layer is NeMo's (pre norm, swish, residual) with one list of weights an adapter, rows spread
evenly over the adapters in random order. The result of each function that is timed is checked
against eager PyTorch's in float32.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adapter_ext import AdapterWeights
from benchmarks import ceilings, measure, peers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORWARD = "forward"
TRAINING = "forward+backward"
REPLAY = "replay"  # the forward, by a CUDA graph
MODES = (FORWARD, TRAINING, REPLAY)
PEERS = ("eager", "compile", "bmm")
# Largest difference to eager PyTorch in float32, relative to the largest magnitude in the tensor;
# the peers, which round after every operator, may differ by PEERS_ALLOWANCE times as much.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
PEERS_ALLOWANCE = 10.0

Step = Callable[[], list[Tensor]]
"""What is timed: it returns y, and in training the gradient of every input."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    mode: str
    dtype: str
    hidden_size: int
    bottleneck: int
    rows: int
    adapters: int

    def __str__(self) -> str:
        return (
            f"{self.mode} {self.dtype} D={self.hidden_size} r={self.bottleneck} "
            f"T={self.rows} A={self.adapters}"
        )

    def work(self) -> list[tuple[int, int]]:
        """What cannot be avoided in the forward, and in training in the backward.

        Returns:
            For each, the bytes read and written, and the operations of the products.
        """
        itemsize = DTYPES[self.dtype].itemsize
        activations = self.rows * self.hidden_size * itemsize
        used = min(self.adapters, self.rows)
        weights = used * 2 * self.hidden_size * (1 + self.bottleneck) * itemsize
        flops = 4 * self.rows * self.hidden_size * self.bottleneck
        forward = (2 * activations + weights, flops)  # reads x and the weights, writes y
        if self.mode != TRAINING:
            return [forward]
        # The backward reads x, dy and the weights, and writes dx and the weights' gradients.
        return [forward, (3 * activations + 2 * weights, 2 * flops)]

    def floor(self, limits: ceilings.Ceilings) -> float:
        """The least time the case can take, in seconds."""
        return sum(limits.floor(num_bytes, flops) for num_bytes, flops in self.work())


def measure_case(
    case: Case,
    wanted: Sequence[str],
    *,
    limits: ceilings.Ceilings,
    seconds: float,
    sampler: measure.Sampler = measure.wall_clock,
    device: str = "cpu",
) -> dict[str, Any]:
    """Checks and times one case.

    Args:
        case: what to run.
        wanted: names of the peers.
        limits: what the floor follows from.
        seconds: how long to time each function.
        sampler: how.
        device: where.

    Returns:
        The case's fields, its ``name``, its ``floor`` in seconds, and ``seconds``: by name the
        median time of one call, of ``ours`` and of each peer.

    Raises:
        RuntimeError: a result differs from eager PyTorch's in float32 by more than rounding.
    """
    sizes = (case.rows, case.hidden_size, case.bottleneck, case.adapters)
    problem = peers.make_problem(*sizes, DTYPES[case.dtype], device)
    exact = problem.float()
    reference = step(TRAINING if case.mode == TRAINING else FORWARD, peers.loop(exact), exact)
    expected = _named(reference(), stacked=False)
    steps = {}
    for name in ("ours", *wanted):
        stacked = name == "bmm"
        steps[name] = step(case.mode, peers.MAKERS[name](problem), problem, stacked=stacked)
        _check(case, name, _named(steps[name](), stacked=stacked), expected)
    return {
        "name": str(case),
        **dataclasses.asdict(case),
        "floor": case.floor(limits),
        "seconds": measure.interleaved_medians(steps, seconds=seconds, sampler=sampler),
    }


def step(
    mode: str, forward: peers.Forward, problem: peers.Problem, *, stacked: bool = False
) -> Step:
    """What is timed: one forward, one replay of it, or one forward and backward to every input."""
    if mode == TRAINING:
        inputs = problem.inputs(stacked=stacked)

        def training() -> list[Tensor]:
            y = forward()
            return [y, *torch.autograd.grad(y, inputs, problem.dy)]

        return training

    def inference() -> list[Tensor]:
        with torch.no_grad():
            return [forward()]

    return measure.replayed(inference) if mode == REPLAY else inference


def _named(results: list[Tensor], *, stacked: bool) -> dict[str, Tensor]:
    """y, and after a backward the gradients of x and of each field of the weights, stacked."""
    if len(results) == 1:
        return {"y": results[0]}
    y, dx, *grads = results
    if not stacked:
        count = len(grads) // 4
        grads = [torch.stack(grads[i * count : (i + 1) * count]) for i in range(4)]
    names = ("y", "dx", *AdapterWeights._fields)
    return dict(zip(names, (y.detach(), dx, *grads), strict=True))


def _check(case: Case, name: str, results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    allowed = TOLERANCES[case.dtype] * (1.0 if name == "ours" else PEERS_ALLOWANCE)
    for tensor_name, reference in expected.items():
        difference = (results[tensor_name].float() - reference).abs().max()
        error = float(difference / reference.abs().max())
        if not error <= allowed:
            raise RuntimeError(
                f"{case}: {tensor_name} of {name} differs from eager PyTorch in float32 by "
                f"{error:.2g} of its largest magnitude; {allowed:.2g} is allowed"
            )


def table(results: Sequence[dict[str, Any]], wanted: Sequence[str]) -> str:
    """The results as a Markdown table."""

    def row(result: dict[str, Any]) -> list[str]:
        seconds = result["seconds"]
        ratios = [
            f"{seconds[peer] / seconds['ours']:.2f}" if peer in seconds else "" for peer in wanted
        ]
        ours = seconds["ours"]
        digits = 3 if ours >= 1e-4 else 4
        floor = f"{ours / result['floor']:.2f}"
        return [result["name"], f"{ours * 1e3:.{digits}f}", floor, *ratios]

    header = ["case", "ours ms", "ours/floor", *(f"{peer}/ours" for peer in wanted)]
    return measure.markdown_table(header, map(row, results))


def summary(results: Sequence[dict[str, Any]], wanted: Sequence[str]) -> str:
    """For each mode, type and peer: how much faster than it ours is at least and in the median."""
    rows = []
    for mode, dtype, peer in itertools.product(MODES, DTYPES, wanted):
        ratios = [
            result["seconds"][peer] / result["seconds"]["ours"]
            for result in results
            if result["mode"] == mode and result["dtype"] == dtype and peer in result["seconds"]
        ]
        if ratios:
            rows.append(
                [
                    f"{mode} {dtype}",
                    f"{peer}/ours",
                    f"{min(ratios):.2f}",
                    f"{statistics.median(ratios):.2f}",
                    str(len(ratios)),
                ]
            )
    return measure.markdown_table(["summary", "ratio", "least", "median", "cases"], rows)


def write_json(path: pathlib.Path, document: dict[str, Any]) -> None:
    """Writes what was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
