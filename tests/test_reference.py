"""The definition itself: against NeMo's modules, and Philox against published vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_testing import Case, make_weights
from torch import Tensor, nn

from adapter_ext import reference

WORD = 0xFFFFFFFF
ACTIVATION_MODULES = {
    "identity": nn.Identity(),
    "hardtanh": nn.Hardtanh(),
    "relu": nn.ReLU(),
    "selu": nn.SELU(),
    "swish": nn.SiLU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
}


def philox(counter: tuple[int, ...], key: int) -> list[int]:
    """Philox4x32-10 on Python's integers, after Salmon et al. (2011), section 3.4."""
    c, k = list(counter), [key & WORD, key >> 32]
    for _ in range(10):
        high0, low0 = divmod(c[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(c[2] * 0xCD9E8D57, 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


# Random123's kat_vectors for philox4x32 with ten rounds: counter, key, result.
KNOWN_ANSWERS = {
    "zeros": ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_known_answers(name: str) -> None:
    counter, key, expected = (
        [int(word, 16) for word in text.split()] for text in KNOWN_ANSWERS[name]
    )
    key_value = key[0] | key[1] << 32
    signed_key = key_value - 2**64 if key_value >= 2**63 else key_value
    words = reference.philox(torch.tensor(signed_key), tuple(torch.tensor(c) for c in counter))
    assert [int(word) for word in words] == expected
    assert philox(tuple(counter), key_value) == expected


@pytest.mark.parametrize("p", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345])
def test_dropout_scale(seed: int, p: float) -> None:
    rows = torch.tensor([0, 7, 2**32 + 7])
    scale = reference.dropout_scale(torch.tensor(seed), rows, 10, p)
    for i, row in enumerate(rows.tolist()):
        for column in range(10):
            word = philox((row & WORD, row >> 32, column // 4, 0), seed)[column % 4]
            expected = 1.0 / (1.0 - p) if word >= round(p * 2**32) else 0.0
            assert scale[i, column] == expected, (row, column)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_depth_scale(p: float) -> None:
    units = torch.tensor([0, 1, 2, 3, 63, 2**32 + 1])
    scale = reference.depth_scale(torch.tensor(99), units, p)
    for i, unit in enumerate(units.tolist()):
        word = philox((unit & WORD, unit >> 32, 0, 1), 99)[0]
        assert scale[i] == (1.0 / (1.0 - p) if word >= round(p * 2**32) else 0.0), unit


def nemo_module(
    weights: Any, adapter: int, activation: str, norm_position: str, eps: float
) -> nn.Sequential:
    """One adapter as NeMo's LinearAdapter builds it: norm, down, activation and up in sequence."""
    rank, hidden_size = weights.down[adapter].shape
    norm = nn.LayerNorm(hidden_size, eps=eps, dtype=torch.float64)
    down = nn.Linear(hidden_size, rank, bias=False, dtype=torch.float64)
    up = nn.Linear(rank, hidden_size, bias=False, dtype=torch.float64)
    for parameter, value in (
        (norm.weight, weights.norm_weight[adapter]),
        (norm.bias, weights.norm_bias[adapter]),
        (down.weight, weights.down[adapter]),
        (up.weight, weights.up[adapter]),
    ):
        parameter.data.copy_(value)
    middle = [down, ACTIVATION_MODULES[activation], up]
    return nn.Sequential(*([norm, *middle] if norm_position == "pre" else [*middle, norm]))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("activation", ACTIVATION_MODULES)
def test_eval_matches_nemo(activation: str, norm_position: str) -> None:
    """Each sample through the NeMo modules of its own adapter, added to its input."""
    options = {"activation": activation, "norm_position": norm_position}
    case = Case(routing="untouched", shape=(6, 3, 16), dtype=torch.float64, options=options)
    call = case.build()
    assert call.routing is not None
    y, aux = call.forward(reference.linear_adapter)
    expected = call.x.detach().clone()
    for index, adapter in enumerate(call.routing.ids.flatten().tolist()):
        if adapter >= 0:
            module = nemo_module(call.weights, adapter, eps=call.options["eps"], **options)
            row = (index // 3, index % 3)
            expected[row] += module(call.x[row])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(aux, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_training_matches_nemo(norm_position: str) -> None:
    """ResidualAddAdapterStrategy: dropout, stochastic depth, residual, auxiliary loss, one adapter.

    NeMo draws other random numbers, so its Bernoulli draws are replaced by those of the definition.
    """
    x = torch.randn(5, 4, 12, dtype=torch.float64)
    weights = make_weights([6], 12, dtype=torch.float64)
    dropout, depth, l2_lambda = 0.25, 0.4, 0.7
    seen = set()
    for value in range(8):
        seed = torch.tensor(value)
        y, aux = reference.linear_adapter(
            x,
            weights,
            norm_position=norm_position,
            dropout=dropout,
            stochastic_depth=depth,
            l2_lambda=l2_lambda,
            training=True,
            seed=seed,
        )
        module = nemo_module(weights, 0, "swish", norm_position, 1e-5)
        output = module(x)
        mask = reference.dropout_scale(seed, torch.arange(20), 12, dropout) > 0
        output = output * mask.reshape(x.shape) / (1.0 - dropout)
        keep = bool(reference.depth_scale(seed, torch.tensor([0]), depth) > 0)
        output = output * keep / (1.0 - depth)
        result = x + output
        penalty = l2_lambda * ((x - result) ** 2).reshape(x.shape[0], -1).sum(dim=-1).mean()
        torch.testing.assert_close(y, result, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(aux, penalty.reshape(1), rtol=1e-12, atol=1e-12)
        seen.add(keep)
    assert seen == {False, True}


@pytest.mark.parametrize("per", ["sample", "row"])
def test_auxiliary_loss_is_of_each_adapters_own_samples(per: str) -> None:
    """As if NeMo had run each adapter on a batch of its own samples (or rows) alone."""
    x = torch.randn(6, 4, 12, dtype=torch.float64)
    weights = make_weights([3, 5], 12, dtype=torch.float64)
    ids = torch.randint(-1, 2, x.shape[:1] if per == "sample" else x.shape[:2])
    lambdas = torch.tensor([0.3, 2.0])
    routing = reference.route(ids, 2)
    _, aux = reference.linear_adapter(x, weights, routing, l2_lambda=lambdas, training=True)
    for a in range(2):
        own = x[ids == a]
        assert own.shape[0] > 0
        delta: Tensor = nemo_module(weights, a, "swish", "pre", 1e-5)(own)
        expected = float(lambdas[a]) * delta.square().reshape(own.shape[0], -1).sum(-1).mean()
        torch.testing.assert_close(aux[a], expected, rtol=1e-6, atol=0.0)
