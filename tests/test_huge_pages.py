"""Huge pages are asked for large results of the CPU kernels."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch
from op_testing import make_weights

import adapter_ext

MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
MEBIBYTE = 1 << 20

pytestmark = pytest.mark.skipif(
    not MODE.exists() or "[never]" in MODE.read_text(), reason="the system has no huge pages"
)


def is_advised(tensor: torch.Tensor) -> bool:
    """Whether the system was asked for huge pages for the middle of a tensor's memory.

    It need not have any: on a busy machine memory is in pieces.
    """
    middle = tensor.data_ptr() + tensor.numel() * tensor.itemsize // 2
    inside = False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(text, 16) for text in bounds.groups())
            inside = begin <= middle < end
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the tensor's memory is not mapped")


def test_huge_pages_are_asked_for_large_results() -> None:
    """Above 32 MiB, so that the C library gives new memory to each."""
    x = torch.randn(9000, 1024, requires_grad=True)
    weights = make_weights([3], 1024)
    size = x.numel() * x.itemsize
    assert size > 32 * MEBIBYTE
    y, _ = adapter_ext.linear_adapter(x, weights)
    assert is_advised(y)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert is_advised(dx)


def test_none_are_asked_for_small_results() -> None:
    """The C library may have kept their memory."""
    x = torch.randn(1000, 1024)
    y, _ = adapter_ext.linear_adapter(x, make_weights([3], 1024))
    assert not is_advised(y)
