"""TEMPORARY: forwards to the reference until the native ops land (same signatures)."""
from __future__ import annotations

import torch
from torch import Tensor

from adapter_ext import reference
from adapter_ext.types import AdapterWeights, Routing


def route(ids: Tensor, num_adapters: int) -> Routing:
    return reference.route(ids, num_adapters)


def linear_adapter(
    x: Tensor, weights: AdapterWeights, routing: Routing | None = None, *,
    activation: str = "swish", norm_position: str = "pre", eps: float = 1e-5,
    dropout: float = 0.0, stochastic_depth: float = 0.0, stochastic_depth_mode: str = "call",
    l2_lambda: float | Tensor = 0.0, residual: bool = True, training: bool = False,
    seed: Tensor | None = None, compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    if seed is None and training and (dropout > 0 or stochastic_depth > 0):
        seed = torch.empty((), dtype=torch.int64, device=x.device).random_()
    return reference.linear_adapter(
        x, weights, routing, activation=activation, norm_position=norm_position, eps=eps,
        dropout=dropout, stochastic_depth=stochastic_depth,
        stochastic_depth_mode=stochastic_depth_mode, l2_lambda=l2_lambda, residual=residual,
        training=training, seed=seed, compute_dtype=compute_dtype)
