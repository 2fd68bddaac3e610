"""A transformer encoder with adapters, whole: tokens/s in training and in serving.

The base is frozen. After each of its layers there is a bottleneck adapter, of which every sequence
in the batch may use its own: *ours* by adapter_ext's modules and ``route_adapters``; *eager* the
same modules of PyTorch's operators in a loop over the adapters, each on the sequences that are its;
*none* no adapters at all, which is the most that any implementation could reach: in training the
frozen base forward and backward, down to where the first adapter would be, without an optimizer.

A training step is forward, loss, backward and an update of all adapters by AdamW; serving is the
forward in inference. All are timed in turn; results and gradients of ours are checked against
eager's beforehand.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapter_ext import AdapterModuleMixin, LinearAdapterConfig, route_adapters
from benchmarks import command, measure
from benchmarks.cases import DTYPES, TOLERANCES
from benchmarks.results import Result, Spread, ratios

ADAPTERS = (1, 8, 64)
HEADS = 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The encoder and its batch.

    Attributes:
        layers: of the encoder, each with one adapter.
        hidden_size: D; the inner width of a layer is four times as large.
        bottleneck: r.
        sequences: in a batch.
        tokens: of a sequence.
    """

    layers: int = 12
    hidden_size: int = 256
    bottleneck: int = 64
    sequences: int = 64
    tokens: int = 32


class Layer(nn.TransformerEncoderLayer, AdapterModuleMixin):
    """A layer of PyTorch's with an adapter after it."""

    def forward(self, src: Tensor, *masks: Any, **more_masks: Any) -> Tensor:
        """The layer, then its adapters."""
        y: Tensor = self.forward_enabled_adapters(super().forward(src, *masks, **more_masks))
        return y

    def sequential(self, name: str) -> nn.Sequential:
        """The layers of an adapter: norm, down, activation, up."""
        module: Any = self.get_adapter_module(name)
        layers: nn.Sequential = module.module
        return layers


class EagerAdapters(nn.Module):
    """NeMo's adapters from PyTorch's operators, each on its own sequences."""

    def __init__(self, layer: Layer, names: Sequence[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for name in names:
            own = copy.deepcopy(layer.sequential(name))
            self.layers.append(own)

    def forward(self, x: Tensor, order: Tensor, counts: list[int], inverse: Tensor) -> Tensor:
        """Gathers the sequences of each adapter, runs it, and scatters them back."""
        if len(self.layers) == 1:
            return x + self.layers[0](x)  # type: ignore[no-any-return]
        parts = torch.split(x.index_select(0, order), counts)
        results = [part + own(part) for own, part in zip(self.layers, parts, strict=True)]
        return torch.cat(results).index_select(0, inverse)


def frozen_base(sizes: Sizes) -> list[Layer]:
    """The encoder without adapters."""
    torch.manual_seed(0)
    width = sizes.hidden_size
    layers = [
        Layer(width, HEADS, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
        for _ in range(sizes.layers)
    ]
    return [layer.requires_grad_(False) for layer in layers]


Run = Callable[[Tensor], Tensor]


def implementations(
    sizes: Sizes, adapters: int, dtype: torch.dtype
) -> dict[str, tuple[Run, list[nn.Parameter]]]:
    """By name, the encoder as a function of the batch, and what is trained in it."""
    base = [layer.to(dtype) for layer in frozen_base(sizes)]
    layers = [layer.to(dtype) for layer in frozen_base(sizes)]
    names = [f"adapter{a}" for a in range(adapters)]
    config = LinearAdapterConfig(in_features=sizes.hidden_size, dim=sizes.bottleneck)
    for layer in layers:
        for name in names:
            layer.add_adapter(name, config)
            up: Any = layer.sequential(name)[3]
            nn.init.normal_(up.weight, std=0.02)  # a new adapter's is zero
    model = nn.Sequential(*layers)
    eager = [EagerAdapters(layer, names) for layer in layers]
    ids = torch.arange(sizes.sequences)[torch.randperm(sizes.sequences)] % adapters
    order = ids.argsort(stable=True)
    inverse = order.argsort()
    counts = ids.bincount(minlength=adapters).tolist()
    of_sequences = [names[a] for a in ids.tolist()]

    def run_ours(x: Tensor) -> Tensor:
        with route_adapters(model, of_sequences):
            y: Tensor = model(x)
        return y

    def run_eager(x: Tensor) -> Tensor:
        for layer, own in zip(base, eager, strict=True):
            x = own(layer(x), order, counts, inverse)
        return x

    def run_base(x: Tensor) -> Tensor:
        x = base[0](x)
        if torch.is_grad_enabled():
            x.requires_grad_()  # as it does where the first adapter is trained
        for layer in base[1:]:
            x = layer(x)
        return x

    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "ours": (run_ours, trained),
        "eager": (run_eager, [p for own in eager for p in own.parameters()]),
        "none": (run_base, []),
    }


def training_step(run: Run, parameters: list[nn.Parameter], x: Tensor) -> Callable[[], None]:
    """A step of training towards zero."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None

    def step() -> None:
        if optimizer is not None:
            optimizer.zero_grad()
        run(x).square().mean().backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.step()

    return step


def serving_step(run: Run, x: Tensor) -> Callable[[], None]:
    """A forward in inference."""

    def step() -> None:
        with torch.inference_mode():
            run(x)

    return step


def check(runs: dict[str, tuple[Run, list[nn.Parameter]]], x: Tensor, tolerance: float) -> None:
    """Compares ours with eager: result and gradients.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    outcomes = []
    for name in ("ours", "eager"):
        run, parameters = runs[name]
        y = run(x)
        gradients = torch.autograd.grad(y.square().mean(), parameters)
        # In both, adapter by adapter in each layer; norm, down, up in each adapter.
        outcomes.append([y.detach(), torch.cat([g.flatten() for g in gradients])])
    for ours, eager in zip(*outcomes, strict=True):
        error = float((ours - eager).abs().max() / eager.abs().max())
        if not error <= tolerance:
            raise RuntimeError(
                f"ours differs from eager by {error:.2g}; {tolerance:.2g} is allowed"
            )


def measure_encoder(
    mode: str,
    sizes: Sizes,
    adapters: int,
    dtype: str,
    *,
    seconds: float,
    sampler: measure.Sampler = measure.wall_clock,
) -> Result:
    """Checks and times one number of adapters.

    Args:
        mode: ``training`` or ``serving``.
        sizes: the encoder.
        adapters: in the batch.
        dtype: of ``cases.DTYPES``.
        seconds: how long to time each implementation.
        sampler: how.
    """
    runs = implementations(sizes, adapters, DTYPES[dtype])
    x = torch.randn(sizes.sequences, sizes.tokens, sizes.hidden_size).to(DTYPES[dtype])
    # Rounding adds up over the layers.
    check(runs, x, sizes.layers * TOLERANCES[dtype])
    steps = {
        name: training_step(run, trained, x) if mode == "training" else serving_step(run, x)
        for name, (run, trained) in runs.items()
    }
    times = measure.interleaved(steps, seconds=seconds, sampler=sampler)
    words = f"{sizes.layers} layers D={sizes.hidden_size} r={sizes.bottleneck}"
    return Result(
        table=mode,
        name=f"{dtype} {words} {sizes.sequences}x{sizes.tokens} tokens A={adapters}",
        case={"mode": mode, "dtype": dtype, "adapters": adapters, **dataclasses.asdict(sizes)},
        seconds={name: Spread.of(samples) for name, samples in times.items()},
        ratios=dict(ratios(times)),
        tokens=sizes.sequences * sizes.tokens,
    )


def run(mode: str, arguments: Sequence[str] | None) -> None:
    """The command line of ``training`` and ``serving``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {mode}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--adapters", nargs="+", type=command.positive, metavar="N", default=list(ADAPTERS)
    )
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    for field in dataclasses.fields(Sizes):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(
            option, type=command.positive, default=field.default, help=f"{field.default}"
        )
    command.add_timing(parser, seconds=5.0)
    command.add_output(parser)
    options = parser.parse_args(arguments)
    if most := [a for a in options.adapters if a > options.sequences]:
        parser.error(
            f"--adapters: expected at most one a sequence, {options.sequences}, got {most}"
        )
    sampler = command.set_timing(parser, options)
    sizes = Sizes(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Sizes)})
    chosen = [(dtype, adapters) for dtype in options.dtype for adapters in options.adapters]
    results = [
        measure_encoder(mode, sizes, adapters, dtype, seconds=options.seconds, sampler=sampler)
        for dtype, adapters in measure.progress(chosen, f"{mode} cases")
    ]
    command.finish(mode, arguments, results, {}, options.json)
