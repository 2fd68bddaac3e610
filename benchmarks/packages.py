"""The same place in a model by packages for adapters: what people would use instead.

They are measured at the layer that they provide, on whole samples. The extra ``[peers]`` installs
them.

- ``peft``: Hugging Face PEFT's LoRA with ``adapter_names``, ``y = x + up · down · x``: no norm
  and no activation, so less work than ours. It adds to a linear layer; here, to a
  copy of the input in its place. PEFT mixes adapters in inference only.
- ``adapters``: adapter-hub's bottleneck layer under ``BatchSplit``, configured as ours is, but with
  biases in both products. The samples are sorted by adapter beforehand, which it asks for.
"""

from __future__ import annotations

import importlib
import types
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import EPS, Implementation, Peer, Problem, Sorted, UnavailableError


def lora(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """What PEFT computes for one adapter, by a scale of 1."""
    return x + F.linear(F.linear(x, down), up)


def _import(package: str, *modules: str) -> list[Any]:
    try:
        return [importlib.import_module(module) for module in (package, *modules)]
    except ImportError as error:
        raise UnavailableError(f"{package}: {error}; pip install '.[peers]'") from error


class _Copy(nn.Linear):
    """Stands for the linear layer that LoRA adds to."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def peft(problem: Problem) -> Implementation:
    """PEFT's mixed-batch LoRA."""
    (package,) = _import("peft")
    x = problem.x.detach()
    hidden_size = x.shape[-1]
    bottleneck, adapters = len(problem.weights.down[0]), problem.weights.num_adapters
    model = nn.Sequential(_Copy(hidden_size, hidden_size, bias=False, device="meta"))
    names = [f"adapter {a}" for a in range(adapters)]
    config = package.LoraConfig(r=bottleneck, lora_alpha=bottleneck, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is an adapter already
        for name in names:
            package.inject_adapter_in_model(config, model, name)
    layer: Any = model[0].eval()
    for name, down, up in zip(names, problem.weights.down, problem.weights.up, strict=True):
        layer.lora_A[name].weight = nn.Parameter(down.detach(), requires_grad=False)
        layer.lora_B[name].weight = nn.Parameter(up.detach(), requires_grad=False)
    samples = x.view(-1, problem.sample_rows, hidden_size)
    of_samples = [names[a] for a in problem.ids[:: problem.sample_rows].tolist()]

    def forward() -> Tensor:
        y: Tensor = layer(samples, adapter_names=of_samples)
        return y.view_as(x)

    return Implementation(forward, {})


def adapters(problem: Problem) -> Implementation:
    """adapter-hub's bottleneck adapters under BatchSplit."""
    package, bottleneck_module = _import("adapters", "adapters.methods.bottleneck")
    hidden_size = problem.x.shape[-1]
    bottleneck = len(problem.weights.down[0])
    config = package.BnConfig(
        mh_adapter=False,
        output_adapter=True,
        reduction_factor=hidden_size / bottleneck,
        non_linearity="swish",
        ln_before=True,
        original_ln_before=False,
        original_ln_after=False,
        residual_before_ln=True,
        adapter_residual_before_ln=False,
    )
    settings = package.ModelAdaptersConfig()
    layer = bottleneck_module.BottleneckLayer("output_adapter")
    layer.init_adapters(types.SimpleNamespace(hidden_size=hidden_size), settings)
    norm_weights, norm_biases, downs, ups = [], [], [], []
    fields = problem.weights
    for a, own in enumerate(zip(*fields, strict=True)):
        settings.add(str(a), config)
        layer.add_adapter(str(a), 0)
        adapter = layer.adapters[str(a)].to(problem.x.dtype)
        norm, down, _ = adapter.adapter_down
        up = adapter.adapter_up
        with torch.no_grad():
            targets = (norm.weight, norm.bias, down.weight, up.weight)
            for target, value in zip(targets, own, strict=True):
                target.copy_(value)
            down.bias.zero_()
            up.bias.zero_()
        if norm.eps != EPS:
            raise UnavailableError(f"adapters: expected an eps of {EPS}, got {norm.eps}")
        norm_weights.append(norm.weight)
        norm_biases.append(norm.bias)
        downs.append(down.weight)
        ups.append(up.weight)
    rows = Sorted.of(problem)
    x = problem.x.detach()[rows.order].requires_grad_()
    inputs: dict[str, Tensor | list[Tensor]] = {
        "x": x,
        "norm_weight": norm_weights,
        "norm_bias": norm_biases,
        "down": downs,
        "up": ups,
    }
    sizes = [count // problem.sample_rows for count in rows.counts]
    if len(sizes) == 1:
        settings.active_setup = package.Stack(str(rows.used[0]))
    else:
        settings.active_setup = package.BatchSplit(*map(str, rows.used), batch_sizes=sizes)

    def forward() -> Tensor:
        samples = x.view(-1, problem.sample_rows, hidden_size)
        y: Tensor = layer(samples, samples, None)
        return y.view_as(x)

    return Implementation(forward, inputs, rows.order)


PACKAGES = {"peft": Peer(peft, layer=lora, trains=False), "adapters": Peer(adapters)}
"""The implementations by packages, by the names that they have in tables."""
