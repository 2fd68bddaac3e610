"""Large results of the CPU kernels are in huge pages, as long as those come quickly."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from op_testing import make_weights

import adapter_ext

MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
MEBIBYTE = 1 << 20
HUGE_PAGE = 2 * MEBIBYTE

pytestmark = pytest.mark.skipif(
    not MODE.exists() or "[never]" in MODE.read_text(), reason="the system has no huge pages"
)

SLOW_HUGE_PAGES = """
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>
int madvise(void* address, size_t bytes, int advice) {
  const int populate_write = 23;
  if (advice == populate_write && bytes == 2 << 20) usleep(40000);
  return (int)syscall(SYS_madvise, address, bytes, advice);
}
"""


def flags(tensor: torch.Tensor, offset: int) -> list[str]:
    """What the system was told of the memory so many bytes after a tensor's first huge page.

    "hg": huge pages, "nh": none. It need not have any: on a busy machine memory is in pieces.
    """
    address = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE + offset
    inside = False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(text, 16) for text in bounds.groups())
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("the tensor's memory is not mapped")


def run_alone(function: str, **environment: str) -> None:
    """Runs a function of this file in a process of its own.

    Others have freed memory, of which the C library gives some even to large results.
    """
    subprocess.run(
        [sys.executable, "-c", f"import test_huge_pages as t; t.{function}()"],
        cwd=pathlib.Path(__file__).parent,
        env={**os.environ, **environment},
        check=True,
        timeout=120,
    )


def large_results() -> None:
    """Above 32 MiB, so that the C library gives new memory to each."""
    x = torch.randn(9000, 1024, requires_grad=True)
    weights = make_weights([3], 1024)
    size = x.numel() * x.itemsize
    assert size > 32 * MEBIBYTE
    y, _ = adapter_ext.linear_adapter(x, weights)
    assert "hg" in flags(y, 0)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert "hg" in flags(dx, 0)


def test_huge_pages_are_asked_for_large_results() -> None:
    run_alone("large_results")


def test_none_are_asked_for_small_results() -> None:
    """The C library may have kept their memory."""
    x = torch.randn(1000, 1024)
    y, _ = adapter_ext.linear_adapter(x, make_weights([3], 1024))
    assert "hg" not in flags(y, 0)


def results_by_slow_pages() -> None:
    """In a process in which each huge page takes 40 ms."""
    torch.set_num_threads(1)
    x = torch.randn(9000, 1024)
    weights = make_weights([3], 1024)
    y, _ = adapter_ext.linear_adapter(x, weights)
    assert "hg" in flags(y, 0)
    for offset in (HUGE_PAGE, 16 * MEBIBYTE, 30 * MEBIBYTE):
        assert "nh" in flags(y, offset)
    for first in range(0, 9000, 1000):
        rows = slice(first, first + 1000)
        assert torch.equal(y[rows], adapter_ext.linear_adapter(x[rows], weights)[0])


@pytest.mark.skipif(shutil.which("cc") is None, reason="a C compiler is missing")
def test_small_pages_are_taken_where_huge_ones_are_slow(tmp_path: pathlib.Path) -> None:
    """Bug: a hypervisor that takes back free memory made each of them wait 3 ms."""
    source, library = tmp_path / "slow.c", tmp_path / "slow.so"
    source.write_text(SLOW_HUGE_PAGES)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    run_alone("results_by_slow_pages", LD_PRELOAD=str(library))
