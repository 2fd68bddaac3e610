"""The cases of one layer: what runs in each, that it is right, and how long it takes.

The layer is NeMo's (pre norm, swish, residual), each row by its own of A adapters. The result of
each function that is timed is checked against eager PyTorch's in float32.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import ceilings, measure, packages, peers
from benchmarks.results import Result, Spread, ratios, settled

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORWARD = "forward"
TRAINING = "forward+backward"
REPLAY = "replay"  # the forward, by a CUDA graph
MODES = (FORWARD, TRAINING, REPLAY)
PEERS = {**peers.PEERS, **packages.PACKAGES}
IMPLEMENTATIONS = {"ours": peers.Peer(peers.ours), **PEERS}
# Largest difference to eager PyTorch in float32, relative to the largest magnitude in the tensor;
# the peers, which round after every operator, may differ by PEERS_ALLOWANCE times as much.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
PEERS_ALLOWANCE = 10.0

Step = Callable[[], list[Tensor]]
"""What is timed: it returns y, and in training the gradient of every input."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        mode: what is timed, of ``MODES``.
        dtype: of everything, of ``DTYPES``.
        hidden_size: D.
        bottleneck: r.
        rows: T.
        adapters: A.
        spread: of the samples over the adapters, of ``peers.SPREADS``.
        sample_rows: rows of a sample, which has one adapter.
        stacked: whether our op gets one tensor for all adapters instead of one for each.
    """

    mode: str
    dtype: str
    hidden_size: int
    bottleneck: int
    rows: int
    adapters: int
    spread: str = "even"
    sample_rows: int = 1
    stacked: bool = False

    def __str__(self) -> str:
        options = [
            *([self.spread] if self.spread != "even" else []),
            *([f"samples of {self.sample_rows}"] if self.sample_rows > 1 else []),
            *(["stacked"] if self.stacked else []),
        ]
        sizes = f"D={self.hidden_size} r={self.bottleneck} T={self.rows} A={self.adapters}"
        return " ".join([self.mode, self.dtype, sizes, *options])

    def used_adapters(self) -> int:
        """How many adapters have rows."""
        samples = self.rows // self.sample_rows
        counts = peers.spread_counts(self.spread, samples, self.adapters)
        return sum(count > 0 for count in counts)

    def weight_bytes(self) -> int:
        """The bytes of one adapter's weights."""
        return 2 * self.hidden_size * (1 + self.bottleneck) * DTYPES[self.dtype].itemsize

    def work(self) -> list[tuple[int, int]]:
        """What cannot be avoided in the forward, and in training in the backward.

        Returns:
            For each, the bytes read and written, and the operations of the products.
        """
        activations = self.rows * self.hidden_size * DTYPES[self.dtype].itemsize
        used = self.used_adapters()
        weights = used * self.weight_bytes()
        flops = 4 * self.rows * self.hidden_size * self.bottleneck
        forward = (2 * activations + weights, flops)  # reads x and the weights, writes y
        if self.mode != TRAINING:
            return [forward]
        # The backward reads x, dy and the weights, and writes dx and the weights' gradients: of a
        # stack, those of all adapters.
        gradients = self.adapters * self.weight_bytes() if self.stacked else weights
        return [forward, (3 * activations + weights + gradients, 2 * flops)]

    def floor(self, limits: ceilings.Ceilings) -> float:
        """The least time the case can take, in seconds."""
        return sum(limits.floor(num_bytes, flops) for num_bytes, flops in self.work())

    def problem(self, device: str = "cpu") -> peers.Problem:
        """A random batch of this case."""
        return peers.make_problem(
            self.rows,
            self.hidden_size,
            self.bottleneck,
            self.adapters,
            DTYPES[self.dtype],
            device,
            spread=self.spread,
            sample_rows=self.sample_rows,
            stacked=self.stacked,
        )


def make(case: Case, name: str, problem: peers.Problem) -> peers.Implementation:
    """Prepares an implementation.

    Raises:
        UnavailableError: it is not there, or not for such a case.
    """
    if case.mode == TRAINING and not IMPLEMENTATIONS[name].trains:
        raise peers.UnavailableError("no backward")
    return IMPLEMENTATIONS[name].make(problem)


def measure_case(
    case: Case,
    wanted: Sequence[str],
    *,
    probes: ceilings.Probes,
    seconds: float,
    settle: float = 0.0,
    table: str = "grid",
    sampler: measure.Sampler = measure.wall_clock,
    device: str = "cpu",
) -> Result:
    """Checks and times one case, the machine's limits in turn with it.

    Args:
        case: what to run.
        wanted: names of the peers.
        probes: of the limits that the floor follows from.
        seconds: how long to time each function.
        settle: how long at most, while it is not clear of each peer if it is faster.
        table: which the result belongs to.
        sampler: how to time.
        device: where.

    Returns:
        The result; peers that cannot run the case are in its ``skipped``.

    Raises:
        RuntimeError: a result differs from eager PyTorch's in float32 by more than rounding.
    """
    problem = case.problem(device)
    steps, skipped = {}, {}
    expected: dict[peers.Layer, dict[str, Tensor]] = {}
    for name in ("ours", *wanted):
        try:
            implementation = make(case, name, problem)
        except peers.UnavailableError as error:
            skipped[name] = str(error)
            continue
        layer = IMPLEMENTATIONS[name].layer
        if layer not in expected:
            expected[layer] = _reference(case, problem, layer)
        steps[name] = step(case.mode, implementation, problem.dy)
        _check(case, name, _named(steps[name](), implementation), expected[layer], implementation)
    expected.clear()
    times = measure.interleaved(
        {**steps, **probes.functions},
        sampler=sampler,
        seconds=seconds,
        settle=settle,
        settled=lambda samples: settled({name: samples[name] for name in steps}),
    )
    spreads = {name: Spread.of(samples) for name, samples in times.items()}
    limits = probes.limits({name: spreads[name].median for name in probes.functions})
    return Result(
        table=table,
        name=str(case),
        case=dataclasses.asdict(case),
        seconds=spreads,
        ratios={name: spread for name, spread in ratios(times) if name in steps},
        floor=case.floor(limits),
        limits=limits.measured(),
        skipped=skipped,
    )


@dataclasses.dataclass
class Sweep:
    """What became of some cases.

    Attributes:
        results: of the cases that were measured.
        failures: what went wrong, beginning with the case's name.
        dropped: names of the cases that no time was left for, or that an interrupt came before.
        interrupted: whether one came.
    """

    results: list[Result] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    dropped: list[str] = dataclasses.field(default_factory=list)
    interrupted: bool = False


def sweep(
    chosen: Sequence[Case],
    wanted: Sequence[str],
    *,
    description: str = "cases",
    deadline: float = math.inf,
    case_seconds: float = 0.0,
    **options: Any,
) -> Sweep:
    """Measures cases; one that fails does not keep the others from being measured.

    An interrupt (control-C) ends it: those that were measured are not lost.

    Args:
        chosen: the cases.
        wanted: names of the peers.
        description: of the progress display.
        deadline: on the clock of ``time.monotonic``.
        case_seconds: no case begins with less time left.
        options: of :func:`measure_case`.
    """
    done = Sweep()
    for case in measure.progress(chosen, description):
        if done.interrupted or time.monotonic() + case_seconds > deadline:
            done.dropped.append(str(case))
            continue
        try:
            done.results.append(measure_case(case, wanted, **options))
        except KeyboardInterrupt:
            done.interrupted = True
            done.dropped.append(str(case))
        except Exception as error:
            done.failures.append(f"{case}: {type(error).__name__}: {error}")
    return done


def step(mode: str, implementation: peers.Implementation, dy: Tensor) -> Step:
    """What is timed: one forward, one replay of it, or one forward and backward to every input."""
    forward = implementation.forward
    if mode == TRAINING:
        inputs = implementation.tensors()
        upstream = dy if implementation.order is None else dy[implementation.order]

        def training() -> list[Tensor]:
            y = forward()
            return [y, *torch.autograd.grad(y, inputs, upstream, allow_unused=True)]

        return training

    def inference() -> list[Tensor]:
        with torch.no_grad():
            return [forward()]

    return measure.replayed(inference) if mode == REPLAY else inference


def _reference(case: Case, problem: peers.Problem, layer: peers.Layer) -> dict[str, Tensor]:
    """What eager PyTorch gives in float32."""
    exact = problem.float()
    implementation = peers.loop(exact, layer=layer)
    mode = TRAINING if case.mode == TRAINING else FORWARD
    return _named(step(mode, implementation, exact.dy)(), implementation)


def _named(results: list[Tensor], implementation: peers.Implementation) -> dict[str, Tensor]:
    """y, and after a backward the gradients of x and of each field of the weights, stacked."""
    named = {"y": results[0].detach()}
    gradients = iter(results[1:])
    if len(results) > 1:
        for name, inputs in implementation.inputs.items():
            if isinstance(inputs, Tensor):
                named[f"d {name}"] = next(gradients)
            else:
                own = [(next(gradients), value) for value in inputs]
                named[f"d {name}"] = torch.stack(
                    [torch.zeros_like(value) if grad is None else grad for grad, value in own]
                )
    return named


def _check(
    case: Case,
    name: str,
    results: dict[str, Tensor],
    expected: dict[str, Tensor],
    implementation: peers.Implementation,
) -> None:
    allowed = TOLERANCES[case.dtype] * (1.0 if name == "ours" else PEERS_ALLOWANCE)
    for tensor_name, result in results.items():
        reference = expected[tensor_name]
        if implementation.order is not None and tensor_name in ("y", "d x"):
            reference = reference[implementation.order]
        difference = (result.float() - reference).abs().max()
        error = float(difference / reference.abs().max())
        if not error <= allowed:
            raise RuntimeError(
                f"{case}: {tensor_name} of {name} differs from eager PyTorch in float32 by "
                f"{error:.2g} of its largest magnitude; {allowed:.2g} is allowed"
            )
