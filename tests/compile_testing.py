"""What the tests of compiled and exported models share: a model, and what it has to compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from layer_testing import Block, D, config, formula, randomize
from torch import Tensor, nn

import adapter_ext
from adapter_ext import ReturnResultAdapterStrategy, ReturnResultAdapterStrategyConfig

# What code that CUDA graphs can record must not contain: reads of device values, and copies.
HOST_READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero")
COPIES = ("_to_copy", "device_put", "lift_fresh_copy", "to", "copy", "copy_")


def make_model(**settings: Any) -> nn.Sequential:
    """Hosts with other adapters each, of three kinds: ragged, post norm, result instead of sum."""
    model = nn.Sequential(Block(), nn.Tanh(), Block(), nn.Tanh(), Block()).double()
    first, second, third = model[0], model[2], model[4]
    first.add_adapter("a", config(dim=3, **settings))
    first.add_adapter("b", config(dim=5, **settings))
    first.add_adapter("c", config(dim=2, activation="gelu", norm_position="post", **settings))
    second.add_adapter("b", config(dim=4, **settings))
    second.add_adapter("d", config(dim=1, **settings))
    third.add_adapter("a", config(dim=2, adapter_strategy=ReturnResultAdapterStrategyConfig()))
    third.add_adapter("d", config(dim=3, **settings))
    randomize(model)
    return model.eval()


NAMES = ("a", "b", "c", "d")  # by index


def chain(model: nn.Module, x: Tensor) -> Tensor:
    """The model's enabled adapters one after the other, by the plain formula."""
    for layer in model.children():
        if isinstance(layer, Block):
            x = layer.linear(x)
            for name in layer.get_enabled_adapters():
                x = run(layer, name, x)
        else:
            x = layer(x)
    return x


def routed(model: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    """Each sample through its own adapters, by the plain formula."""
    results = []
    for sample, index in zip(x, ids.tolist(), strict=True):
        for layer in model.children():
            sample = layer.linear(sample) if isinstance(layer, Block) else layer(sample)
            name = None if index < 0 else NAMES[index]
            if isinstance(layer, Block) and name in layer.adapter_layer:
                sample = run(layer, name, sample)
        results.append(sample)
    return torch.stack(results) if results else x


def run(host: Block, name: str, x: Tensor) -> Tensor:
    adapter: Any = host.adapter_layer[name]
    output = formula(adapter, x)
    is_result = isinstance(adapter.adapter_strategy, ReturnResultAdapterStrategy)
    return output if is_result else x + output


class Routed(nn.Module):
    """What users write to have the routing among the inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        with adapter_ext.route_adapters(self.model, ids):
            return self.model(x)


def random_ids(samples: int, seed: int) -> Tensor:
    return torch.randint(-1, len(NAMES), (samples,), generator=torch.Generator().manual_seed(seed))


def op_names(graphs: Sequence[torch.fx.Graph]) -> list[str]:
    """The names of the ops that graphs call."""
    targets = (node.target for graph in graphs for node in graph.nodes)
    return [t._schema.name for t in targets if isinstance(t, torch._ops.OpOverload)]


def assert_no_host_reads(graphs: Sequence[torch.fx.Graph]) -> None:
    names = op_names(graphs)
    assert any(name.startswith("adapter_ext::linear_adapter") for name in names)
    forbidden = {f"aten::{name}" for name in (*HOST_READS, *COPIES)}
    assert not forbidden.intersection(names)


__all__ = ["D", "Routed", "chain", "make_model", "random_ids", "routed"]
