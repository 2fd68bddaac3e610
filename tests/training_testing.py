"""What the tests of training share: a model, its batches, and one adapter trained alone.

What is expected is computed by plain formulas, autograd and torch.optim on one adapter at a time.
"""

from __future__ import annotations

import copy

import torch
from layer_testing import Block, D, make_block, rand
from torch import nn

import adapter_ext

NAMES = ("a", "a1", "module", "1")
# Names of the samples of each step: some adapters have none in some steps, "1" has none at all.
STEPS: list[list[str | None]] = [
    ["a", "module", None, "a", "module"],
    ["a1", "a1", "a", None, "a1"],
    ["module", "module", "module"],
    ["a", "a1", "module", "a1"],
]
# The first four samples are of all trained adapters, where "1" is frozen; the others are not.
STEPS_OF_ALL: list[list[str | None]] = [["a", "a1", "module", "a", "a1", "a1", "a"]] * 3
OPTIONS = {
    "a": {"lr": 0.02, "weight_decay": 0.3},
    "a1": {"max_norm": 0.05},
    "module": {"betas": (0.5, 0.7), "amsgrad": True},
    "1": {"weight_decay": 0.5},
}


class Model(nn.Sequential):
    """Two hosts with something between them; its results are far from linear in the adapters."""

    def __init__(self) -> None:
        super().__init__(make_block(*NAMES), nn.Tanh(), make_block(*NAMES, seed=7))
        self[0].linear.requires_grad_(False)
        self[2].linear.requires_grad_(False)
        self.train()


def adapters_of(model, name):
    return [model[i].adapter_layer[name] for i in (0, 2)]


def state_of(model, name):
    return [p.detach().clone() for a in adapters_of(model, name) for p in a.parameters()]


def batch(step, names):
    """Input and target of each sample."""
    return rand(len(names), 2, D, seed=100 + step), rand(len(names), 2, D, seed=200 + step)


def losses_of(y, target):
    return (y - target).square().mean(dim=(1, 2))


def plain_losses(model, name, x, target):
    """The losses of samples that all use one adapter, by plain formulas."""
    for layer in model:
        if isinstance(layer, Block):
            x = layer.linear(x)
            if name is not None:
                adapter = layer.adapter_layer[name]
                sd = dict(adapter.named_parameters())
                n = nn.functional.layer_norm(
                    x, (D,), sd["module.0.weight"], sd["module.0.bias"], 1e-5
                )
                h = nn.functional.silu(n @ sd["module.1.weight"].T)
                x = x + h @ sd["module.3.weight"].T
        else:
            x = layer(x)
    return losses_of(x, target)


def train_alone(model, name, steps=STEPS, accumulate=1, **defaults):
    """One adapter, on its own samples, with PyTorch's AdamW; returns its weights and optimizer."""
    model = copy.deepcopy(model)
    options = {"lr": 1e-2, **defaults, **OPTIONS[name]}
    max_norm = options.pop("max_norm", None)
    parameters = [p for a in adapters_of(model, name) for p in a.parameters()]
    optimizer = torch.optim.AdamW(parameters, fused=True, **options)
    for first in range(0, len(steps), accumulate):
        optimizer.zero_grad()
        total = []
        for step in range(first, first + accumulate):
            names = steps[step]
            own = torch.tensor([n == name for n in names])
            x, target = batch(step, names)
            total.append(plain_losses(model, name, x[own], target[own]))
        losses = torch.cat(total)
        if losses.numel() == 0:
            continue
        losses.mean().backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
    return state_of(model, name), optimizer


def ids_of(model, names):
    index = adapter_ext.adapter_index(model)
    return torch.tensor([-1 if n is None else index[n] for n in names], dtype=torch.int64)
