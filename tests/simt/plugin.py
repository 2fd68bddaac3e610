"""The pytest option ``--backend``: op tests on kernels that this machine's processor can't run.

They are the CUDA kernels, on a GPU or in a simulator, and the CPU kernels for AArch64, in QEMU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import op_testing
import pytest
import torch
from aarch64 import emulator
from simt import build

from adapter_ext import _library, doctor, ops

FLAVOURS: dict[str, build.Flavour] = {
    "simt": "plain",
    "simt-race": "race",
    "simt-sanitize": "sanitize",
    "ptxsim": "ptxsim",
    "ptxsim-90": "ptxsim-90",
}
MULTIPROCESSORS = 4  # so few that small problems fill them
SHARED_KIB = 99  # of the GPUs with the least, among those with tensor cores for bfloat16
BLOCK_ORDERS = {"ascending": 0, "reverse": 1, "random": 2}


class Simulator:
    """What a loaded library of kernels says of its launches."""

    def __init__(
        self,
        backend: str,
        seed: int,
        block_order: str,
        multiprocessors: int = MULTIPROCESSORS,
        shared_kib: int = SHARED_KIB,
    ) -> None:
        path = str(build.library(FLAVOURS[backend]))
        torch.ops.load_library(path)
        self._library = ctypes.CDLL(path)
        self._library.simt_error_count.restype = ctypes.c_uint64
        self._library.simt_last_error.restype = ctypes.c_char_p
        self._library.simt_configure(
            ctypes.c_uint64(seed), BLOCK_ORDERS[block_order], multiprocessors, shared_kib * 1024
        )

    def errors(self) -> str | None:
        """The latest error since they were cleared, and how many there were."""
        count = self._library.simt_error_count()
        if not count:
            return None
        return f"{count} errors, the latest: {self._library.simt_last_error().decode()}"

    def clear(self) -> None:
        """Forgets the errors."""
        self._library.simt_clear()


def simulated_ops() -> dict[str, Any]:
    """What stands for the native ops in ``adapter_ext.ops``, by its name there."""
    simulated: Any = torch.ops.adapter_ext_simt
    return {
        "_inference": simulated.linear_adapter.default,
        "_forward": simulated.linear_adapter_forward.default,
        "_backward": simulated.linear_adapter_backward.default,
        "_route": simulated.route.default,
    }


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("adapter_ext")
    group.addoption(
        "--backend",
        choices=["native", "aarch64", "cuda", *FLAVOURS],
        default="native",
        help="what runs the ops: the CPU kernels, those for AArch64 in QEMU, the CUDA kernels on a "
        "GPU, or those on CPU tensors in a simulator (simt-race finds races, simt-sanitize needs "
        "what .ci/run preloads)",
    )
    group.addoption("--simt-seed", type=int, default=0, help="0: warps and lanes in order")
    group.addoption("--simt-block-order", choices=list(BLOCK_ORDERS), default="ascending")


def pytest_configure(config: pytest.Config) -> None:
    backend = config.getoption("--backend")
    if backend == "native":
        return
    if backend == "aarch64":
        reason = emulator.missing()
        if reason:
            raise pytest.UsageError(f"--backend aarch64: {reason}")
        op_testing.cpu_rounds_bfloat16 = False
        for name, op in emulator.emulated_ops().items():
            setattr(ops, name, op)
        return
    if backend == "cuda":
        if not torch.cuda.is_available() or _library.CUDA_LIBRARY is None:
            raise pytest.UsageError(
                f"--backend cuda: CUDA devices: {doctor.cuda_devices()}; "
                f"CUDA library: {doctor.cuda_library()}"
            )
        torch.set_default_device("cuda")
        op_testing.tensor_cores = True
        return
    simulator = Simulator(
        backend, config.getoption("--simt-seed"), config.getoption("--simt-block-order")
    )
    config.stash[_SIMULATOR] = simulator
    op_testing.tensor_cores = True
    for name, op in simulated_ops().items():
        setattr(ops, name, op)


@pytest.fixture(autouse=True)
def _no_simulator_errors(request: pytest.FixtureRequest) -> Iterator[None]:
    simulator = request.config.stash.get(_SIMULATOR, None)
    yield
    if simulator is None:
        return
    errors = simulator.errors()
    simulator.clear()
    if errors:
        pytest.fail(errors, pytrace=False)


@pytest.fixture(autouse=True)
def _cuda_errors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels fail after their launch: the test that launched them is the one to blame."""
    yield
    if request.config.getoption("--backend") != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # after which nothing runs on the GPU in this process
        pytest.exit(f"{request.node.nodeid}: {error}", returncode=pytest.ExitCode.TESTS_FAILED)


_SIMULATOR = pytest.StashKey[Simulator]()
