"""torch.export, and packages of AOTInductor: one program for every batch and every routing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compile_testing import (
    NAMES,
    D,
    Routed,
    assert_no_host_reads,
    chain,
    make_model,
    op_names,
    random_ids,
    routed,
)
from layer_testing import Block, config, make_block, rand
from torch import Tensor, nn
from torch.export import Dim

import adapter_ext
from adapter_ext import ResidualAddAdapterStrategyConfig

every_mode = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
# Dynamo says that the routes' context sets a variable, which it also resets.
pytestmark = pytest.mark.filterwarnings("ignore:.*side effects happened in the model.forward")

BATCH, TIME = Dim("batch"), Dim("time")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def export_routed(model: nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(
            Routed(model),
            (rand(5, 2, D), random_ids(5, seed=1)),
            dynamic_shapes=({0: BATCH, 1: TIME}, {0: BATCH}),
            strict=strict,
        )


@every_mode
def test_chain(strict: bool) -> None:
    model = make_model()
    model[0].set_enabled_adapters("b", False)
    with torch.no_grad():
        program = torch.export.export(
            model, (rand(3, 2, D),), dynamic_shapes=({0: BATCH, 1: TIME},), strict=strict
        )
    assert program.state_dict.keys() == model.state_dict().keys()
    assert_no_host_reads([program.graph])
    for shape in ((3, 2, D), (1, 7, D), (6, 1, D)):
        x = rand(*shape)
        close(program.module()(x), chain(model, x))


@every_mode
def test_routed(strict: bool) -> None:
    model = make_model()
    program = export_routed(model, strict)
    names = {name.removeprefix("model.") for name in program.state_dict}
    assert names == model.state_dict().keys()
    assert_no_host_reads([program.graph])
    run = program.module()
    for seed, (batch, time) in enumerate([(5, 2), (1, 3), (9, 1), (0, 2)]):
        x, ids = rand(batch, time, D, seed=seed), random_ids(batch, seed)
        close(run(x, ids), routed(model, x, ids))
    # Nothing of the routes stays behind.
    x = rand(2, 2, D)
    close(model(x), chain(model, x))


@every_mode
def test_routed_by_row(strict: bool) -> None:
    model = make_model()
    x, ids = rand(3, 4, D), random_ids(12, seed=2).view(3, 4)
    with torch.no_grad():
        program = torch.export.export(
            Routed(model),
            (x, ids),
            dynamic_shapes=({0: BATCH, 1: TIME}, {0: BATCH, 1: TIME}),
            strict=strict,
        )
    for shape in ((3, 4), (2, 7)):
        x, ids = rand(*shape, D), random_ids(shape[0] * shape[1], seed=3).view(shape)
        expected = routed(model, x.flatten(0, 1), ids.flatten()).view_as(x)
        close(program.module()(x, ids), expected)


@every_mode
def test_bad_indices_are_errors_when_the_program_runs(strict: bool) -> None:
    """Exporting can't read them; so the program checks them each time."""
    model = make_model()
    run = export_routed(model, strict).module()
    for bad in (len(NAMES), -2, 10**12):
        with pytest.raises(RuntimeError, match=r"indices of adapters must be in \[-1, 4\)"):
            run(rand(2, 2, D), torch.tensor([0, bad]))
    with pytest.raises(Exception, match=r"samples of shape|Guard failed|batch|size"):
        run(rand(3, 2, D), torch.tensor([0, 1]))


@every_mode
def test_disabled_adapters_never_run(strict: bool) -> None:
    """Nor do their samples pass unchanged in silence: not even where no other adapter is."""
    model = nn.Sequential(make_block("a"), make_block("b", seed=2))
    model[1].set_enabled_adapters("b", False)
    run = export_routed(model, strict).module()
    x = rand(3, 2, D)
    expected = model[1].linear(routed(model[:1], x, torch.tensor([0, -1, 0])))
    close(run(x, torch.tensor([0, -1, 0])), expected)
    with pytest.raises(RuntimeError, match="adapter 'b' is disabled"):
        run(x, torch.tensor([0, 1, 0]))


def test_routes_entered_outside_are_constants() -> None:
    """As everything else that a program reads and is not an input."""
    model = make_model()
    x, ids = rand(4, 2, D), random_ids(4, seed=5)
    with torch.no_grad(), adapter_ext.route_adapters(model, ids):
        program = torch.export.export(model, (x,))
    close(program.module()(x + 1.0), routed(model, x + 1.0, ids))


class Shift(nn.Module, adapter_ext.AdapterModuleUtil):
    """An adapter that the op does not know, called on its own samples."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(D, dtype=torch.float64))
        self.setup_adapter_strategy(None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.bias)


def test_adapters_that_the_op_does_not_know() -> None:
    model = nn.Sequential(make_block("a"))
    model[0].add_adapter("s", {"_target_": f"{__name__}.Shift"})
    run = export_routed(model).module()
    x = rand(4, 3, D)
    for ids in ([0, 1, -1, 1], [0, 0, -1, 0], [1, 1, 1, 1]):
        hidden = model[0].linear(x)
        expected = hidden.clone()
        for i, index in enumerate(ids):
            if index >= 0:
                adapter = model[0].adapter_layer["as"[index]]
                expected[i] += adapter(hidden[i])
        close(run(x, torch.tensor(ids)), expected)


def test_inference_only_where_gradients_are_off() -> None:
    """Under no_grad the program keeps nothing for a backward; else it can be trained."""
    model = make_model()
    inference = op_names([export_routed(model).graph])
    assert "adapter_ext::linear_adapter" in inference
    assert "adapter_ext::linear_adapter_forward" not in inference
    x, ids = rand(5, 2, D), random_ids(5, seed=1)
    trainable = torch.export.export(Routed(model), (x, ids)).module()
    assert "adapter_ext::linear_adapter_forward" in op_names([trainable.graph])
    trainable(x, ids).square().sum().backward()
    routed(model, x, ids).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in trainable.named_parameters():
        want = expected[name.removeprefix("model.")]
        close(parameter.grad, torch.zeros_like(parameter) if want is None else want)


class WithLosses(nn.Module):
    """An exported program has no attributes: auxiliary losses must be among its results."""

    def __init__(self, model: Block) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.model(x)
        losses = self.model.adapter_losses()
        self.model.reset_adapter_losses()
        return y, losses


def test_auxiliary_losses() -> None:
    block = make_block()
    strategy = ResidualAddAdapterStrategyConfig(l2_lambda=0.25)
    for name in ("a", "b"):
        block.add_adapter(name, config(dim=3, adapter_strategy=strategy))
    torch.nn.init.normal_(block.adapter_layer["a"].module[3].weight)
    wrapped = WithLosses(block).train()
    program = torch.export.export(wrapped, (rand(3, 2, D),), dynamic_shapes=({0: BATCH},))
    x = rand(6, 2, D)
    (y, losses), (expected_y, expected) = program.module()(x), wrapped(x)
    close(y, expected_y)
    assert losses.keys() == expected.keys() == {"a", "b"}
    assert losses["a"] > 0.0
    for name, loss in losses.items():
        close(loss, expected[name])
    assert block.adapter_losses() == {}  # no tensor without data was left behind


def test_meta_device() -> None:
    """Shapes alone; and what is made while the program runs is made on its device."""
    model = make_model().to("meta")
    x, ids = torch.empty(5, 2, D, device="meta").double(), torch.empty(5, device="meta").long()
    assert model(x).shape == x.shape
    program = torch.export.export(Routed(model), (x, ids))
    assert_no_host_reads([program.graph])
    devices = {n.kwargs["device"] for n in program.graph.nodes if "device" in n.kwargs}
    assert devices == {torch.device("meta")}


# --- In another process ---------------------------------------------------------------------------

LOAD = """
import sys

import torch

import adapter_ext  # for its ops

folder, kind = sys.argv[1:]
with torch.no_grad():
    if kind == "program":
        run = torch.export.load(f"{folder}/program.pt2").module()
    else:
        run = torch._inductor.aoti_load_package(f"{folder}/package.pt2")
    for i in range(3):
        x, ids, expected = torch.load(f"{folder}/{i}.pt")
        torch.testing.assert_close(run(x, ids), expected, rtol=1e-9, atol=1e-9)
    try:
        run(x, ids + 10)
    except RuntimeError as error:
        print(error)
print("loaded", sorted(name for name in sys.modules if name.endswith("_testing")))
"""


def run_elsewhere(folder: Path, kind: str, model: nn.Module) -> None:
    for i, batch in enumerate((5, 1, 12)):
        x, ids = rand(batch, i + 1, D, seed=i), random_ids(batch, seed=i)
        torch.save((x, ids, routed(model, x, ids).detach()), folder / f"{i}.pt")
    command: list[Any] = [sys.executable, "-c", LOAD, str(folder), kind]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert "[-1, 4)" in done.stdout + done.stderr


@every_mode
def test_saved_and_loaded(strict: bool, tmp_path: Path) -> None:
    model = make_model()
    torch.export.save(export_routed(model, strict), tmp_path / "program.pt2")
    run_elsewhere(tmp_path, "program", model)


def test_aot_inductor_package(tmp_path: Path) -> None:
    """Compiled ahead of time; the package calls the ops through their schemas."""
    model = make_model()
    package = torch._inductor.aoti_compile_and_package(
        export_routed(model), package_path=str(tmp_path / "package.pt2")
    )
    assert Path(package).exists()
    run_elsewhere(tmp_path, "package", model)
