"""Large results of the CPU kernels are in huge pages, where the system has them."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch
from op_testing import make_weights

import adapter_ext

MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
MEBIBYTE = 1 << 20


def huge_pages() -> int:
    """The bytes of this process's memory that are in huge pages."""
    facts = pathlib.Path("/proc/self/smaps_rollup").read_text()
    (kibibytes,) = re.findall(r"^AnonHugePages: +(\d+) kB$", facts, flags=re.MULTILINE)
    return int(kibibytes) << 10


@pytest.mark.skipif(
    not MODE.exists() or "[never]" in MODE.read_text(), reason="the system has no huge pages"
)
def test_large_results_are_in_huge_pages() -> None:
    """Above 32 MiB, so that the C library gives new memory to each."""
    x = torch.randn(9000, 1024, requires_grad=True)
    weights = make_weights([3], 1024)
    size = x.numel() * x.itemsize
    assert size > 32 * MEBIBYTE
    before = huge_pages()
    y, _ = adapter_ext.linear_adapter(x, weights)
    assert huge_pages() - before >= size - 4 * MEBIBYTE, "y"
    before = huge_pages()
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert huge_pages() - before >= size - 4 * MEBIBYTE, "dx"
    assert dx.shape == x.shape
