"""The pytest option ``--backend``: op tests on the CUDA kernels, run by a GPU or by a simulator."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import Any

import op_testing
import pytest
import torch
from simt import build

from adapter_ext import _library, doctor, ops

FLAVOURS: dict[str, build.Flavour] = {
    "simt": "plain",
    "simt-race": "race",
    "simt-sanitize": "sanitize",
    "ptxsim": "ptxsim",
}
MULTIPROCESSORS = 4  # so few that small problems fill them
SHARED_BYTES = 99 * 1024  # of the GPUs with the least, among those with tensor cores for bfloat16
BLOCK_ORDERS = {"ascending": 0, "reverse": 1, "random": 2}


class Simulator:
    """What a loaded library of kernels says of its launches."""

    def __init__(
        self,
        backend: str,
        seed: int,
        block_order: str,
        multiprocessors: int = MULTIPROCESSORS,
    ) -> None:
        flavour = FLAVOURS[backend]
        library = build.library(flavour)
        if flavour == "ptxsim":
            os.environ["PTXSIM_RACE"] = "1"
            os.environ["PTXSIM_SEED"] = str(seed)
            os.environ["PTXSIM_BLOCK_ORDER"] = block_order
            self.library = ctypes.CDLL(str(build.simulator() / "libcudart_sim.so"))
            names = ("ptxsim_error_count", "ptxsim_last_error", "ptxsim_clear_errors")
        else:
            self.library = ctypes.CDLL(str(library))
            self.library.simt_configure(
                ctypes.c_uint64(seed), BLOCK_ORDERS[block_order], multiprocessors, SHARED_BYTES
            )
            names = ("simt_error_count", "simt_last_error", "simt_clear")
        self._count, self._last, self.clear = (getattr(self.library, name) for name in names)
        self._count.restype = ctypes.c_uint64
        self._last.restype = ctypes.c_char_p
        torch.ops.load_library(str(library))

    def errors(self) -> str | None:
        """The latest error since they were cleared, and how many there were."""
        count = self._count()
        return f"{count} errors, the latest: {self._last().decode()}" if count else None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("adapter_ext")
    group.addoption(
        "--backend",
        choices=["native", "cuda", *FLAVOURS],
        default="native",
        help="what runs the ops: the CPU kernels, the CUDA kernels on a GPU, or those on CPU "
        "tensors in a simulator (simt-race finds races, simt-sanitize needs LD_PRELOAD of libasan)",
    )
    group.addoption("--simt-seed", type=int, default=0, help="0: warps and lanes in order")
    group.addoption("--simt-block-order", choices=list(BLOCK_ORDERS), default="ascending")


def pytest_configure(config: pytest.Config) -> None:
    backend = config.getoption("--backend")
    if backend == "native":
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
    simulated: Any = torch.ops.adapter_ext_simt
    ops._inference = simulated.linear_adapter.default
    ops._forward = simulated.linear_adapter_forward.default
    ops._backward = simulated.linear_adapter_backward.default
    ops._route = simulated.route.default


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
