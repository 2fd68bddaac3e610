"""Training in several processes, started by torchrun, against each adapter trained alone in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_testing import NAMES, STEPS_OF_ALL, Model, state_of, train_alone

PROGRAM = Path(__file__).with_name("distributed_training.py")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)


def torchrun(processes: int, folder: Path, *runs: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), str(PROGRAM), str(folder), *runs),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # a deadlock is a failure
    )
    assert done.returncode == 0, done.stderr[-8000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes, then four, and one alone, made."""
    folder = tmp_path_factory.mktemp("distributed")
    torchrun(
        *(2, folder, "ddp,names,2", "ddp,indices,compiled,2", "fsdp,indices,2", "fsdp,names,save"),
        *("ddp,names,all", "fsdp,names,all", "fsdp,names,apart", "fsdp,indices,apart", "counts"),
    )
    torchrun(4, folder, "ddp,names,4", "ddp,indices,4", "fsdp,names,resume")
    torchrun(1, folder, "ddp,names,1", "ddp,indices,1")  # waits for all gradients as well
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: train_alone(Model(), name) for name in NAMES}


@pytest.mark.parametrize(
    "run",
    [
        *("ddp,names,1", "ddp,indices,1", "ddp,names,2", "ddp,names,4", "ddp,indices,4"),
        "ddp,indices,compiled,2",
        *("fsdp,indices,2", "fsdp,names,resume", "fsdp,names,apart", "fsdp,indices,apart"),
    ],
)
def test_each_adapter_is_as_alone(run: str, folder: Path, alone: dict[str, Any]) -> None:
    """Weights, moments and step counts, of adapters that only one process had, or none.

    ``resume`` went on in four processes from a checkpoint of two.
    """
    results = torch.load(folder / f"{run}.pt")
    for name, (weights, optimizer) in alone.items():
        got_weights, got_states = results[name]
        torch.testing.assert_close(got_weights, weights, rtol=1e-10, atol=1e-10)
        states = [s for p in optimizer.param_groups[0]["params"] if (s := optimizer.state.get(p))]
        if not states:  # one that has come from a checkpoint has a state of zeros
            assert all(value.count_nonzero() == 0 for s in got_states for value in s.values())
        else:
            torch.testing.assert_close(got_states, states, rtol=1e-9, atol=1e-9)
    untouched = state_of(Model(), "1")
    torch.testing.assert_close(results["1"][0], untouched, rtol=0, atol=0)


def test_samples_of_all_batches_of_a_step_count(folder: Path) -> None:
    """With gradients in shards those of the first were forgotten, as they are not seen there."""
    for hosts in torch.load(folder / "counts.pt"):
        assert hosts == [[3.0, 3.0], [3.0, 3.0]]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_process_with_samples_of_all_adapters_counts_them(wrapper: str, folder: Path) -> None:
    """It did not, so adapters without samples in the other process were left out of the step."""
    results = torch.load(folder / f"{wrapper},names,all.pt")
    for name, (weights, states) in results.items():
        expected, optimizer = train_alone(Model(), name, STEPS_OF_ALL)
        torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-10)
        expected_states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
        torch.testing.assert_close(states, expected_states, rtol=1e-9, atol=1e-9)
    assert len(results) == len(NAMES) - 1
