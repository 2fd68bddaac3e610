"""The main job on real data: eight adapters trained in one batch, then served in one batch.

A small network learns scikit-learn's handwritten digits and is frozen. Eight other domains (the
same digits rotated, inverted, blurred, ...) get an adapter each. All adapters train together, every
sample of a batch with its own; then each trains once more alone, which must give the same adapter.
What the demo claims it checks: :class:`DemoError` if anything does not hold.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter_ext import doctor
from adapter_ext.adapters import LinearAdapterConfig
from adapter_ext.mixin import AdapterModuleMixin
from adapter_ext.model import ModelPT, NeuralModule
from adapter_ext.model_mixin import AdapterModelPTMixin
from adapter_ext.routing import route_adapters

DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "rotated": lambda images: images.rot90(dims=(1, 2)),
    "mirrored": lambda images: images.flip(2),
    "shifted": lambda images: F.pad(images, (2, -2)),
    "inverted": lambda images: 1.0 - images,
    "faded": lambda images: 0.25 * images + 0.5,
    "noisy": lambda images: (images + 0.35 * torch.randn_like(images)).clamp(0.0, 1.0),
    "blurred": lambda images: F.avg_pool2d(images, 3, stride=1, padding=1),
    "occluded": lambda images: images.index_fill(1, torch.arange(3, 6), 0.0),
}
"""What makes each domain of images ``[N, 8, 8]`` in [0, 1]."""

NAMES = list(DOMAINS)
CHANCE = 0.1
TOLERANCE = 1e-3
"""By how much results that differ in the order of sums alone may differ."""


class DemoError(RuntimeError):
    """Something that the demo is to show does not hold."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo.

    Attributes:
        seed: of everything random.
        width: hidden width of the network.
        blocks: number of its blocks.
        bottleneck: of every adapter.
        base_epochs: epochs of the base network.
        adapter_epochs: epochs of the adapters.
        rows: samples of one domain in a batch.
        learning_rate: of AdamW.
        served: sizes of the batches that are timed.
        repeats: how often each is timed.
    """

    seed: int = 0
    width: int = 128
    blocks: int = 3
    bottleneck: int = 16
    base_epochs: int = 15
    adapter_epochs: int = 12
    rows: int = 32
    learning_rate: float = 3e-3
    served: tuple[int, ...] = (8, 64, 512)
    repeats: int = 50


class DomainResult(NamedTuple):
    """What came out for one domain; accuracies on held-out digits, in [0, 1].

    Attributes:
        name: of the domain and its adapter.
        base: accuracy of the base network alone.
        together: accuracy with the adapter that was trained together with all others.
        alone: accuracy with the adapter that was trained alone.
        difference: largest absolute difference of a weight of these two adapters.
    """

    name: str
    base: float
    together: float
    alone: float
    difference: float


class Timing(NamedTuple):
    """Medians, in seconds, of running the network on a mixed batch.

    Attributes:
        samples: in the batch.
        base: without adapters.
        routed: with every sample's adapter, routed.
        loop: the same by a loop over the adapters in plain PyTorch.
        difference: largest absolute difference of a logit of these two; no time.
    """

    samples: int
    base: float
    routed: float
    loop: float
    difference: float


class Result(NamedTuple):
    """What the demo found.

    Attributes:
        domains: one each.
        timings: one for each size of batch.
        files: the adapter files, one a domain.
        figure: the PNG.
    """

    domains: list[DomainResult]
    timings: list[Timing]
    files: list[Path]
    figure: Path


class Digits(NamedTuple):
    """Handwritten digits.

    Attributes:
        plain: ``[N, 64]``, the images as they are.
        shifted: ``[domains, N, 64]``, the same images in each domain.
        labels: int64 ``[N]``.
    """

    plain: Tensor
    shifted: Tensor
    labels: Tensor


class Block(NeuralModule, AdapterModuleMixin):
    """A residual block, followed by its adapters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def base(self, x: Tensor) -> Tensor:
        """The block without adapters."""
        y: Tensor = x + self.layers(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """The block with its adapters."""
        y: Tensor = self.forward_enabled_adapters(self.base(x))
        return y


class Network(ModelPT, AdapterModelPTMixin):
    """Classifies digits ``[..., 64]``; ``cfg`` has the ``width`` and the number of ``blocks``."""

    def __init__(self, cfg: Any, trainer: Any = None) -> None:
        super().__init__(cfg, trainer)
        width = self.cfg.width
        self.stem = nn.Linear(64, width)
        self.adapted = [Block(width) for _ in range(self.cfg.blocks)]
        self.blocks = nn.Sequential(*self.adapted)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))
        self.setup_adapters()

    def forward(self, pixels: Tensor) -> Tensor:
        """The logits, ``[..., 10]``."""
        logits: Tensor = self.head(self.blocks(self.stem(pixels)))
        return logits


def run(out: Path, settings: Settings | None = None) -> Result:
    """Runs the demo and prints what it finds.

    Args:
        out: folder for the figure and the adapter files; made if it is not there.
        settings: None for the default.

    Raises:
        DemoError: if something does not hold that the demo is to show.
        ImportError: if a package of the ``demo`` extra is missing.
        OSError: if a file can't be written.
    """
    for package in ("sklearn", "matplotlib", "tqdm"):
        _extra(package)
    # Before it trains for a minute what could not be kept.
    (out / "adapters").mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    # Layers this small gain little from more threads, and lose much where the machine is busy.
    torch.set_num_threads(1)
    try:
        return _run(out, settings or Settings())
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, settings: Settings) -> Result:
    started = time.perf_counter()
    facts = doctor.report()
    print(f"adapter_ext {facts['adapter_ext']}, torch {facts['torch running']}, ", end="")
    print(f"{facts['CPU']} ({facts['CPU level in use']}), 1 thread")

    train, test = _load_digits(settings.seed)
    base = _train_base(train, settings)
    together = _with_adapters(base, NAMES, settings)
    domains = _train_adapters(base, together, train, test, settings)
    plain = float(_accuracy(base, test.plain, test.labels))
    size, digits = _count(base), len(test.labels)
    each = (_count(together) - size) // len(NAMES)
    print(f"\nBase network: {size:,} weights, {plain:.1%} on {digits} held-out digits.")
    print(f"Frozen, with {len(NAMES)} adapters of {each:,} weights each, one a domain.\n")
    _print_domains(domains)
    figure = out / "accuracy.png"
    _plot(domains, figure)
    _check_domains(domains, digits)
    print("\nEvery adapter beats the base, and is the same to rounding, trained together or alone.")

    files = _write_adapters(together, out / "adapters")
    _check_files(base, together, files, test)
    print("Adapter files, read back into a fresh network, give the same outputs, bit for bit.")

    timings = _time_serving(base, together, test, settings)
    print()
    _print_timings(timings)
    print(f"\nFigure:   {figure}\nAdapters: {out / 'adapters'}/*.safetensors")
    print(f"Took {time.perf_counter() - started:.0f} s")
    return Result(domains, timings, files, figure)


# --- Data -----------------------------------------------------------------------------------------


def _load_digits(seed: int) -> tuple[Digits, Digits]:
    """The digits to train on, two thirds of all, and those to test with."""
    torch.manual_seed(seed)
    data = _extra("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16.0
    labels = torch.tensor(data.target, dtype=torch.int64)
    plain = images.flatten(1)
    shifted = torch.stack([shift(images).flatten(1) for shift in DOMAINS.values()])
    split = torch.randperm(len(labels)).tensor_split([len(labels) * 2 // 3])
    train, test = (Digits(plain[rows], shifted[:, rows], labels[rows]) for rows in split)
    return train, test


def _schedule(samples: int, epochs: int, rows: int, seed: int) -> Tensor:
    """The samples of each step, ``[steps, rows]``."""
    generator = torch.Generator().manual_seed(seed)
    steps = samples // rows
    orders = [torch.randperm(samples, generator=generator)[: steps * rows] for _ in range(epochs)]
    return torch.cat(orders).view(epochs * steps, rows)


# --- Training -------------------------------------------------------------------------------------


def _train_base(digits: Digits, settings: Settings) -> Network:
    torch.manual_seed(settings.seed)
    network = Network({"width": settings.width, "blocks": settings.blocks})
    schedule = _schedule(len(digits.labels), settings.base_epochs, settings.rows, settings.seed)
    with _bar("Training the base", len(schedule)) as bar:
        _train(network, digits.plain, digits.labels, schedule, settings, bar)
    return network


def _frozen(base: Network) -> Network:
    """A frozen copy of the base."""
    network = Network(base.cfg)
    network.load_state_dict(base.state_dict())
    network.freeze()
    return network


def _with_adapters(base: Network, names: Iterable[str], settings: Settings) -> Network:
    """A copy of the base, frozen, with new adapters; an adapter's weights depend on its name."""
    network = _frozen(base)
    for name in names:
        torch.manual_seed(settings.seed + NAMES.index(name))
        network.add_adapter(name, LinearAdapterConfig(settings.width, settings.bottleneck))
    network.train()
    network.unfreeze_enabled_adapters()
    return network


def _train(
    network: Network,
    pixels: Tensor,
    labels: Tensor,
    schedule: Tensor,
    settings: Settings,
    bar: Any,
) -> None:
    """Trains what requires grad; the loss is the sum over adapters of the mean over own samples."""
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, fused=True)
    for samples in schedule:
        losses = F.cross_entropy(network(pixels[samples]), labels[samples], reduction="sum")
        optimizer.zero_grad()
        (losses / settings.rows).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        bar.update()


def _train_adapters(
    base: Network, together: Network, train: Digits, test: Digits, settings: Settings
) -> list[DomainResult]:
    """Trains all adapters in mixed batches; then each alone, on its own rows of those batches."""
    domains, samples = train.shifted.shape[:2]
    pixels, labels = train.shifted.flatten(0, 1), train.labels.repeat(domains)
    schedules = [
        d * samples + _schedule(samples, settings.adapter_epochs, settings.rows, settings.seed + d)
        for d in range(domains)
    ]
    # Neighbours in a batch are of different domains: sample i is of domain i modulo 8.
    mixed = torch.stack(schedules, dim=2).flatten(1)
    with (
        _bar(f"Training {domains} adapters together", len(mixed)) as bar,
        route_adapters(together, NAMES * settings.rows),
    ):
        _train(together, pixels, labels, mixed, settings, bar)
    with route_adapters(together, NAMES):
        of_together = _accuracy(together, test.shifted, test.labels)
    of_base = _accuracy(base, test.shifted, test.labels)

    results = []
    trained = together.state_dict()
    with _bar("Training each alone", len(mixed) * domains) as bar:
        for d, name in enumerate(NAMES):
            alone = _with_adapters(base, [name], settings)
            # No routing: its one adapter is enabled and runs for all samples.
            _train(alone, pixels, labels, schedules[d], settings, bar)
            difference = max(
                float((weight - trained[key]).abs().max())
                for key, weight in alone.state_dict().items()
            )
            results.append(
                DomainResult(
                    name,
                    float(of_base[d]),
                    float(of_together[d]),
                    float(_accuracy(alone, test.shifted[d], test.labels)),
                    difference,
                )
            )
    return results


@torch.inference_mode()
def _accuracy(network: Network, pixels: Tensor, labels: Tensor) -> Tensor:
    """The share of digits ``[..., N, 64]`` that the network gets right, ``[...]``."""
    correct: Tensor = network(pixels).argmax(-1) == labels
    return correct.double().mean(-1)


def _check_domains(domains: Iterable[DomainResult], digits: int) -> None:
    for name, base, together, alone, difference in domains:
        if not min(together, alone) > base:
            raise DemoError(
                f"the adapter of {name!r} is no better than the base: {together:.1%} trained "
                f"together, {alone:.1%} alone, {base:.1%} without it"
            )
        if not difference <= TOLERANCE or round(abs(together - alone) * digits) > 1:
            raise DemoError(
                f"the adapter of {name!r} is another when it is trained alone: weights differ by "
                f"up to {difference:.1e}, accuracies are {together:.1%} and {alone:.1%}"
            )


# --- Files ----------------------------------------------------------------------------------------


def _write_adapters(network: Network, folder: Path) -> list[Path]:
    files = [folder / f"{name}.safetensors" for name in NAMES]
    for name, file in zip(NAMES, files, strict=True):
        network.save_adapters(file, name)
    return files


def _check_files(base: Network, network: Network, files: Iterable[Path], digits: Digits) -> None:
    """Reads the files into a copy of the base, whose outputs must be the same, bit for bit."""
    fresh = _frozen(base)
    for file in files:
        fresh.load_adapters(file)
    outputs = []
    for model in (network, fresh):
        with torch.inference_mode(), route_adapters(model, NAMES):
            outputs.append(model(digits.shifted))
    if not torch.equal(*outputs):
        raise DemoError("adapters that were written and read back give other outputs")


# --- Serving --------------------------------------------------------------------------------------


@torch.inference_mode()
def _time_serving(
    base: Network, network: Network, digits: Digits, settings: Settings
) -> list[Timing]:
    """Times batches whose samples are of random domains, the three ways in turn."""
    loop = _PlainLoop(network)

    def routed(pixels: Tensor, ids: Tensor) -> Tensor:
        with route_adapters(network, ids):
            logits: Tensor = network(pixels)
        return logits

    ways: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (lambda x, _: base(x), routed, loop)
    domains, samples = digits.shifted.shape[:2]
    torch.manual_seed(settings.seed)
    timings = []
    with _bar("Timing mixed batches", len(settings.served) * settings.repeats) as bar:
        for size in settings.served:
            ids = torch.randint(domains, (size,))
            pixels = digits.shifted[ids, torch.randint(samples, (size,))]
            _, got, expected = (way(pixels, ids) for way in ways)
            difference = float((got - expected).abs().max())
            if not difference <= TOLERANCE:  # NaN as well
                raise DemoError(f"the op's logits and plain PyTorch's differ by {difference:.1e}")
            seconds: list[list[float]] = [[] for _ in ways]
            for _ in range(settings.repeats):
                for way, taken in zip(ways, seconds, strict=True):
                    start = time.perf_counter()
                    way(pixels, ids)
                    taken.append(time.perf_counter() - start)
                bar.update()
            of_base, of_routed, of_loop = map(statistics.median, seconds)
            timings.append(Timing(size, of_base, of_routed, of_loop, difference))
    return timings


class _PlainLoop:
    """The network with its adapters as one writes it in plain PyTorch, adapter by adapter."""

    def __init__(self, network: Network) -> None:
        self.network = network
        # Looked up once: that is not what is timed.
        self.adapters = [
            [_plain_weights(adapter) for adapter in block.adapter_layer.values()]
            for block in network.adapted
        ]

    def __call__(self, pixels: Tensor, ids: Tensor) -> Tensor:
        own = [(ids == a).nonzero().squeeze(1) for a in range(len(NAMES))]
        x = self.network.stem(pixels)
        for block, adapters in zip(self.network.adapted, self.adapters, strict=True):
            x = block.base(x)
            for rows, (scale, shift, down, up) in zip(own, adapters, strict=True):
                mine = x.index_select(0, rows)
                normed = F.layer_norm(mine, x.shape[-1:], scale, shift)
                x.index_copy_(0, rows, mine + F.linear(F.silu(F.linear(normed, down)), up))
        logits: Tensor = self.network.head(x)
        return logits


def _plain_weights(adapter: nn.Module) -> list[Tensor]:
    names = ("module.0.weight", "module.0.bias", "module.1.weight", "module.3.weight")
    return [adapter.get_parameter(name) for name in names]


# --- Output ---------------------------------------------------------------------------------------


def _print_domains(domains: Iterable[DomainResult]) -> None:
    print("Accuracy on held-out digits, in %")
    print("                   adapter trained    largest difference")
    print("domain      base   together   alone    of their weights")
    for name, base, together, alone, difference in domains:
        print(
            f"{name:<10} {100 * base:5.1f}   {100 * together:8.1f}   {100 * alone:5.1f}"
            f"   {difference:18.1e}"
        )


def _print_timings(timings: Iterable[Timing]) -> None:
    print("A mixed batch through the whole network, inference, median milliseconds")
    print("           base   every sample's   loop over adapters   loop /   largest difference")
    print("samples   alone      own, routed     in plain PyTorch   routed           of a logit")
    for samples, base, routed, loop, difference in timings:
        print(
            f"{samples:7}   {1e3 * base:5.2f}   {1e3 * routed:14.2f}   {1e3 * loop:18.2f}"
            f"   {loop / routed:5.2f}x   {difference:18.1e}"
        )


def _plot(domains: list[DomainResult], file: Path) -> None:
    figure = _extra("matplotlib.figure").Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.add_subplot()
    bars = [
        ("base alone", [d.base for d in domains], "#b8bec6"),
        ("adapter, all trained together", [d.together for d in domains], "#1f5fa8"),
        ("adapter, trained alone", [d.alone for d in domains], "#8fbbe8"),
    ]
    for i, (label, accuracies, color) in enumerate(bars):
        places = [d + 0.27 * (i - 1) for d in range(len(domains))]
        drawn = axes.bar(places, [100 * a for a in accuracies], 0.25, label=label, color=color)
        texts = axes.bar_label(drawn, fmt="%.0f", fontsize=8, padding=2)
        for text in texts:  # legible on the line of chance
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.axhline(100 * CHANCE, color="#c0392b", linestyle="--", linewidth=1, zorder=0)
    axes.text(len(domains) - 0.37, 100 * CHANCE, "chance", color="#c0392b", fontsize=8, va="center")
    axes.set_xlim(-0.6, len(domains) - 0.4)
    axes.set_xticks(range(len(domains)), [d.name for d in domains])
    axes.set_ylim(0, 105)
    axes.set_ylabel("accuracy on held-out digits, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Eight shifted domains of handwritten digits, one frozen network")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=150)


# --- Helpers --------------------------------------------------------------------------------------


def _extra(module: str) -> Any:
    """Imports what only the demo needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the demo needs {error.name}, which is not installed: pip install '.[demo]'"
        ) from error


def _bar(title: str, steps: int) -> Any:
    return _extra("tqdm").tqdm(total=steps, desc=f"{title:<28}", unit="step", ncols=90)


def _count(network: Network) -> int:
    return sum(p.numel() for p in network.parameters())
