"""The simulator of CUDA in tests/simt: what it computes, and which errors of kernels it reports.

The PTX simulator is given the same broken kernels.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from simt import build
from torch import Tensor

FOLDER = Path(build.__file__).parent

pytestmark = pytest.mark.skipif(
    build.missing("plain") is not None, reason=build.missing("plain") or ""
)

SEEDS = (0, 1, 2, 3)
X = torch.arange(64, dtype=torch.float32)

# The kernels of broken/: what the broken one is reported as, and what the correct one computes.
BROKEN: dict[str, tuple[str, Tensor]] = {
    "missing_syncthreads": ("race", X.flip(0)),
    "missing_syncwarp": ("race", X.view(2, 32).flip(1).flatten()),
    "forgotten_wait": ("copy under way", X),
    "divergent_barrier": ("divergent barrier", X + X.sum()),
    "different_barriers": ("divergent barrier", X),
    "deadlock": ("deadlock", X.view(2, 32).sum(1).repeat_interleave(32)),
    "outside_mask": (
        "lane outside of its mask",
        torch.where(X % 2 == 0, 2 * X + 1, X),
    ),
    "uninitialised": ("uninitialised", X),
    "failed_assertion": ("assertion", X),
    "shared_overrun": ("out of bounds", X),
    "misaligned_copy": ("misaligned address", X),
    "blocks_race": ("race between blocks", X),
    "reads_too_early": ("race between kernels", 2 * X),
    "never_waits": ("early return", X),
    "too_much_shared": ("invalid launch", X),
}
SANITIZED: dict[str, tuple[str, Tensor]] = {
    "shared_overrun": ("heap-buffer-overflow", X),
    "global_overrun": ("heap-buffer-overflow", X),
    "misaligned": ("misaligned address", X),
}


class Kernels:
    """A library of small kernels."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.simt_last_error.restype = ctypes.c_char_p
        self.library.run_primitive = getattr(self.library, "run_primitive", None)

    def configure(self, seed: int, block_order: int = 0) -> None:
        self.library.simt_clear()
        self.library.simt_configure(ctypes.c_uint64(seed), block_order, 4, 99 * 1024)

    def error(self) -> str | None:
        return self.library.simt_last_error().decode() or None

    def run(self, name: str, seed: int) -> tuple[str | None, Tensor]:
        """Runs one of broken/ on X."""
        out = torch.full_like(X, torch.nan)
        self.configure(seed, seed % 3)
        function = getattr(self.library, f"run_{name}")
        function.restype = ctypes.c_bool
        went_well = function(ctypes.c_void_p(X.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        assert self.library.simt_launch_count() in (1, 2)
        assert self.library.simt_error_count() == (0 if went_well else 1)
        return self.error(), out

    def primitive(
        self,
        name: str,
        values: Tensor,
        out: Tensor,
        *,
        other: Tensor | None = None,
        argument: int = 0,
        width: int = 32,
        mask: int = 0xFFFFFFFF,
        exchange: int = 0,
        seed: int = 1,
    ) -> Tensor:
        """Runs one of primitives.cu."""
        self.configure(seed)
        function = self.library.run_primitive
        function.restype = ctypes.c_bool
        pointers = [
            ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (values, other, out)
        ]
        assert function(name.encode(), exchange, *pointers, argument, width, ctypes.c_uint(mask)), (
            self.error()
        )
        return out


@pytest.fixture(scope="module")
def primitives() -> Kernels:
    return Kernels(build.link([FOLDER / "primitives.cu"], "plain"))


# What is built of the kernels in broken/: without and with their errors.
with_and_without_errors = pytest.fixture(
    scope="module", params=[[], ["BROKEN"]], ids=["correct", "broken"]
)


@with_and_without_errors
def checked(request: pytest.FixtureRequest) -> tuple[bool, Kernels]:
    path = build.link([FOLDER / "broken.cu"], "race", defines=request.param)
    return bool(request.param), Kernels(path)


@pytest.mark.parametrize("name", BROKEN)
def test_errors_are_reported(name: str, checked: tuple[bool, Kernels]) -> None:
    broken, kernels = checked
    kind, expected = BROKEN[name]
    for seed in SEEDS:
        error, out = kernels.run(name, seed)
        if not broken:
            assert error is None
            torch.testing.assert_close(out, expected, rtol=0, atol=0)
            continue
        assert error is not None
        assert error.startswith(f"simt: {kind}: kernel {name}, block (0, 0, 0)") or (
            kind == "race between blocks" and error.startswith(f"simt: {kind}: kernel {name}")
        )
        if kind not in ("invalid launch", "out of bounds", "early return"):
            assert re.search(r", thread \d+: ", error)
            if shutil.which("addr2line"):
                assert re.search(rf"at {name}\.cu:\d+", error), error


def test_race_names_both_threads(checked: tuple[bool, Kernels]) -> None:
    broken, kernels = checked
    if not broken:
        pytest.skip("for the broken kernel")
    error, _ = kernels.run("missing_syncthreads", 0)
    # The first warp comes first: its last lane reads what the next warp's first has yet to write.
    assert error is not None
    assert ", thread 32: writes byte 128 of shared memory, which thread 31 reads" in error


@with_and_without_errors
def program(request: pytest.FixtureRequest) -> tuple[bool, Path]:
    sources = [FOLDER / "broken.cu", FOLDER / "program.cpp"]
    path = build.link(sources, "sanitize", defines=request.param, program=True)
    return bool(request.param), path


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizers_report(name: str, program: tuple[bool, Path]) -> None:
    broken, path = program
    kind, expected = SANITIZED[name]
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    environment.pop("LD_PRELOAD", None)
    for seed in SEEDS[:2]:
        run = subprocess.run(
            [path, name, str(seed)], capture_output=True, text=True, env=environment
        )
        if broken:
            assert run.returncode != 0
            assert kind in run.stderr
            assert f"{name}.cu:" in run.stderr
        else:
            assert run.returncode == 0, run.stdout + run.stderr
            out = torch.tensor([float(line) for line in run.stdout.split()])
            torch.testing.assert_close(out, expected, rtol=0, atol=0)


@with_and_without_errors
def in_ptx(request: pytest.FixtureRequest) -> tuple[bool, ctypes.CDLL]:
    if build.missing("ptxsim") is not None:
        pytest.skip(build.missing("ptxsim"))
    sources = [FOLDER / "ptxsim.cpp", FOLDER / "broken.cu"]
    library = ctypes.CDLL(str(build.link(sources, "ptxsim", defines=request.param)))
    return bool(request.param), library


# nvcc makes one barrier of different ones that threads reach alike; there, no kernel begins early.
NOT_IN_PTX = {"different_barriers", "reads_too_early", "never_waits"}


@pytest.mark.parametrize("name", sorted({*BROKEN, *SANITIZED} - NOT_IN_PTX))
def test_ptx_simulator_reports(name: str, in_ptx: tuple[bool, ctypes.CDLL]) -> None:
    broken, library = in_ptx
    expected = (BROKEN | SANITIZED)[name][1]
    for seed in SEEDS:
        out = torch.full_like(X, torch.nan)
        for tensor in (X, out):
            library.ptxsim_register_range(
                ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), b"tensor"
            )
        library.simt_clear()
        library.simt_configure(ctypes.c_uint64(seed), seed % 3, 4, 227 * 1024)
        function = getattr(library, f"run_{name}")
        function.restype = ctypes.c_bool
        went_well = function(ctypes.c_void_p(X.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        library.ptxsim_unregister_range(ctypes.c_void_p(out.data_ptr()))
        library.simt_error_count.restype = ctypes.c_uint64
        reported = broken and name != "too_much_shared"  # that launch is refused
        assert (library.simt_error_count() > 0) == reported
        assert went_well == (not broken)
        if not broken:
            torch.testing.assert_close(out, expected, rtol=0, atol=0)


# Fragments: in which register, and half of it, a lane has which element. From the PTX manual's
# sections "Matrix fragments for mma.m16n8k16" and "for mma.m16n8k8": groupID = lane / 4 and
# threadID_in_group = lane % 4.


def a_fragments(a: Tensor) -> Tensor:
    """[16, k] → [32, 4, elements of a register]."""
    per_register = 8 * a.shape[1] // 64
    fragments = torch.empty(32, 4, per_register, dtype=a.dtype)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(4 * per_register):
            if per_register == 2:  # a0 ... a7
                row = group if i in (0, 1, 4, 5) else group + 8
                column = thread * 2 + (i & 1) + (8 if i >= 4 else 0)
            else:  # a0 ... a3
                row = group if i in (0, 2) else group + 8
                column = thread if i in (0, 1) else thread + 4
            fragments[lane, i // per_register, i % per_register] = a[row, column]
    return fragments


def b_fragments(b: Tensor) -> Tensor:
    """[k, 8] → [32, 2, elements of a register]."""
    per_register = 8 * b.shape[0] // 64
    fragments = torch.empty(32, 2, per_register, dtype=b.dtype)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(2 * per_register):
            if per_register == 2:  # b0 ... b3
                row = thread * 2 + (i & 1) + (8 if i >= 2 else 0)
            else:  # b0, b1
                row = thread + 4 * i
            fragments[lane, i // per_register, i % per_register] = b[row, group]
    return fragments


def sum_fragments(c: Tensor) -> Tensor:
    """[16, 8] → [32, 4]."""
    fragments = torch.empty(32, 4, dtype=c.dtype)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(4):
            row = group if i < 2 else group + 8
            fragments[lane, i] = c[row, thread * 2 + (i & 1)]
    return fragments


@pytest.mark.parametrize(
    ("name", "dtype", "depth"),
    [
        ("multiply_bfloat16", torch.bfloat16, 16),
        ("multiply_float16", torch.float16, 16),
        ("multiply_tf32", torch.float32, 8),
    ],
)
def test_multiply_add(primitives: Kernels, name: str, dtype: torch.dtype, depth: int) -> None:
    a, b = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype)
    c = torch.randn(16, 8)
    out = sum_fragments(c)
    primitives.primitive(name, a_fragments(a).contiguous(), out, other=b_fragments(b).contiguous())
    if dtype == torch.float32:  # the unit ignores the low 13 bits
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    expected = sum_fragments((c.double() + a.double() @ b.double()).float())
    torch.testing.assert_close(out, expected, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(primitives: Kernels, transposed: bool) -> None:
    rows = torch.arange(512, dtype=torch.int16).view(64, 8)
    named = torch.randperm(64, dtype=torch.int32)[:32]
    out = torch.zeros(32, 4, 2, dtype=torch.int16)
    name = "load_transposed" if transposed else "load_matrices"
    primitives.primitive(name, rows, out, other=named)
    # Lane l gets elements 2 (l % 4) and the next of row l / 4 of each matrix.
    matrices = rows[named.long()].view(4, 8, 8)
    if transposed:
        matrices = matrices.mT
    expected = matrices.reshape(4, 32, 2).transpose(0, 1)
    torch.testing.assert_close(out, expected)


NUMPY_TYPES = ("int32", "uint32", "float32", "float64", "int64", "uint64")


def shuffled(values: np.ndarray, exchange: int, n: int, width: int) -> np.ndarray:
    """What the CUDA programming guide says of the four shuffles, by segments of `width` lanes."""
    segments = values.reshape(-1, width)
    lanes = np.arange(width)
    sources = [lanes * 0 + n % width, lanes ^ n, lanes + n, lanes - n][exchange]
    sources = np.where((sources < 0) | (sources >= width), lanes, sources)
    return segments[:, sources].reshape(-1)


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
@pytest.mark.parametrize("exchange", range(4), ids=["indexed", "xor", "down", "up"])
def test_shuffles(primitives: Kernels, dtype: str, exchange: int) -> None:
    values = torch.from_numpy(np.random.default_rng(1).integers(0, 2**31, 32).astype(dtype))
    for width in (32, 16, 4):
        for n in (0, 1, 3, 8, 31):
            if exchange == 1 and n >= width:
                continue  # reaches into other segments
            out = torch.zeros_like(values)
            primitives.primitive(dtype, values, out, argument=n, width=width, exchange=exchange)
            np.testing.assert_array_equal(out.numpy(), shuffled(values.numpy(), exchange, n, width))


def test_shuffle_of_some_lanes(primitives: Kernels) -> None:
    values = torch.arange(32, dtype=torch.int32)
    out = torch.full_like(values, -7)
    primitives.primitive("int32", values, out, argument=1, exchange=1, mask=0x0000FF0F)
    lanes = torch.arange(32)
    taking_part = torch.tensor([bool(0x0000FF0F >> lane & 1) for lane in range(32)])
    torch.testing.assert_close(out, torch.where(taking_part, lanes ^ 1, -7).int())


@pytest.mark.parametrize("dtype", ["uint32", "uint64"])
@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x00F0F0F1])
def test_votes(primitives: Kernels, dtype: str, mask: int) -> None:
    values = np.random.default_rng(2).integers(0, 5, 32).astype(dtype)
    for limit in (-0, 2, 4):
        out = torch.zeros(32, 4, dtype=torch.uint32)
        primitives.primitive(
            f"vote_{dtype}", torch.from_numpy(values), out, argument=limit, mask=mask
        )
        members = [lane for lane in range(32) if mask >> lane & 1]
        large = [lane for lane in members if values[lane] > limit]
        for lane in range(32):
            expected = [0, 0, 0, 0]
            if lane in members:
                equal = [other for other in members if values[other] == values[lane]]
                expected = [
                    sum(1 << other for other in equal),
                    sum(1 << other for other in large),
                    int(len(large) > 0),
                    int(len(large) == len(members)),
                ]
            assert out[lane].tolist() == expected


def test_launches_from_other_threads(primitives: Kernels) -> None:
    values = torch.arange(32, dtype=torch.int32)

    def run(n: int) -> Tensor:
        out = torch.zeros_like(values)
        return primitives.primitive("int32", values, out, argument=n, exchange=1)

    with ThreadPoolExecutor(4) as pool:
        for n, out in enumerate(pool.map(run, range(32))):
            torch.testing.assert_close(out, values ^ n)


def interesting_floats() -> Tensor:
    """Values around every value of 16-bit types, halfway between two of them, and others."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    exact = torch.cat([bits.view(torch.float16).float(), bits.view(torch.bfloat16).float()])
    near = exact.view(torch.int32)[:, None] + torch.tensor(
        [-1, 0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001], dtype=torch.int32
    )
    return near.flatten().view(torch.float32).contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_types(primitives: Kernels, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    floats = interesting_floats()
    out = torch.zeros(len(floats), dtype=dtype)
    primitives.primitive(f"round_{name}", floats, out, argument=len(floats))
    expected = floats.to(dtype)
    assert torch.equal(out.isnan(), floats.isnan())
    number = ~floats.isnan()
    assert torch.equal(out[number].view(torch.int16), expected[number].view(torch.int16))

    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    wide = torch.zeros(2**16)
    primitives.primitive(f"widen_{name}", bits, wide, argument=2**16)
    torch.testing.assert_close(wide, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_round_tf32(primitives: Kernels) -> None:
    floats = interesting_floats()
    floats = floats[floats.isfinite() & (floats.abs() < 1e38) & (floats.abs() > 1e-37)]
    out = torch.zeros_like(floats)
    primitives.primitive("round_tf32", floats, out, argument=len(floats))
    # 11 significant bits: halves away from zero.
    mantissa, exponent = torch.frexp(floats.double())
    scaled = mantissa * 2**11
    rounded = torch.sign(scaled) * torch.floor(scaled.abs() + 0.5)
    expected = torch.ldexp(rounded, exponent - 11).float()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_atomics_and_barrier_with_or(primitives: Kernels) -> None:
    values = torch.randint(-1000, 1000, (64,), dtype=torch.int32)
    values[40] = 2000
    for seed in SEEDS:
        out = torch.tensor([0, -5000, 5000, 0, 0], dtype=torch.int32)
        primitives.primitive("atomics", values, out, argument=1500, seed=seed)
        assert out.tolist() == [values.sum(), values.max(), values.min(), 0, 32]
