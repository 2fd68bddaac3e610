"""What the tests of the Python layer share: hosts, non-zero adapters, plain formulas in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter_ext import AdapterModuleMixin, LinearAdapter, LinearAdapterConfig

D = 13  # odd on purpose

ACTIVATIONS = {
    "identity": lambda h: h,
    "hardtanh": F.hardtanh,
    "relu": F.relu,
    "selu": F.selu,
    "swish": F.silu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
}


class Block(nn.Module, AdapterModuleMixin):
    """A host without weights of its own in the way: its output is its adapters'."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_enabled_adapters(self.linear(x))


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Gives all parameters random values: adapters are zero when made, which hides every bug."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)


def make_block(*names: str, dtype: torch.dtype = torch.float64, seed: int = 0, **cfg) -> Block:
    """A block in eval mode with random adapters, each with a bottleneck of its own."""
    block = Block().to(dtype)
    for i, name in enumerate(names):
        block.add_adapter(name, config(dim=3 + i, **cfg))
    randomize(block, seed)
    return block.eval()


def config(**kwargs) -> LinearAdapterConfig:
    return LinearAdapterConfig(**{"in_features": D, "dim": 3, **kwargs})


def formula(adapter: LinearAdapter, x: Tensor) -> Tensor:
    """The adapter's output by the plain formula, without dropout; in x's type."""
    sd = {k: v.to(x.dtype) for k, v in adapter.state_dict().items()}
    act = ACTIVATIONS[adapter.activation]
    if adapter.norm_position == "pre":
        n = F.layer_norm(x, x.shape[-1:], sd["module.0.weight"], sd["module.0.bias"], 1e-5)
        return act(n @ sd["module.1.weight"].T) @ sd["module.3.weight"].T
    o = act(x @ sd["module.0.weight"].T) @ sd["module.2.weight"].T
    return F.layer_norm(o, x.shape[-1:], sd["module.3.weight"], sd["module.3.bias"], 1e-5)


def rand(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
