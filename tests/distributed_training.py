"""A program for torchrun: trains the model of training_testing.py in several processes.

::

    torchrun --standalone --nproc-per-node N distributed_training.py FOLDER RUN...

A RUN is words joined by commas: ``ddp`` or ``fsdp``; ``names`` or ``indices``; ``compiled``;
``all``: one process has samples of all trained adapters, the other of some; ``apart``: each adapter
is sharded by itself; ``counts``: see :func:`counts_of_two_batches`;
``save`` stops after two steps and writes a checkpoint, ``resume`` goes on from it. Every process
gets a part of each batch. The first one writes what became of the adapters to FOLDER/RUN.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training_testing import (
    NAMES,
    OPTIONS,
    STEPS,
    STEPS_OF_ALL,
    Model,
    adapters_of,
    batch,
    ids_of,
    losses_of,
)

from adapter_ext import route_adapters
from adapter_ext.optim import AdamW, mean_per_adapter


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def run(words: list[str], folder: Path) -> dict[str, Any]:
    """Weights and optimizer states of each adapter."""
    torch._dynamo.reset()
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = Model()
    trained, steps = (NAMES[:3], STEPS_OF_ALL) if "all" in words else (NAMES, STEPS)
    for name in set(NAMES) - set(trained):
        for adapter in adapters_of(model, name):
            adapter.requires_grad_(False)
    wrapped: nn.Module = model
    if "ddp" in words:
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        for host in (model[0], model[2]):
            for adapter in host.adapter_layer.values() if "apart" in words else ():
                fully_shard(adapter)
            fully_shard(host)
        fully_shard(model)
        # The frozen base and the adapters alike.
        assert all(isinstance(p, DTensor) for p in model.parameters())
    optimizer = AdamW(wrapped, lr=1e-2, adapters={name: OPTIONS[name] for name in trained})
    checkpoint = folder / "checkpoint"
    if "resume" in words:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=checkpoint)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=states["model"],
            optim_state_dict=states["optimizer"],
        )
    forward = wrapped
    if "compiled" in words:
        forward = torch.compile(wrapped, backend="aot_eager")
    for step in range(2 if "resume" in words else 0, 2 if "save" in words else len(steps)):
        names = steps[step]
        x, target = batch(step, names)
        mine = torch.arange(len(names)).tensor_split(processes)[rank]
        my_names = [names[i] for i in mine.tolist()]
        routes = ids_of(model, my_names) if "indices" in words else my_names
        optimizer.zero_grad()
        with route_adapters(wrapped, routes):
            losses = losses_of(forward(x[mine]), target[mine])
        mean_per_adapter(losses, routes, process_group=dist.group.WORLD).backward()
        optimizer.step()
        with torch.no_grad(), route_adapters(wrapped, routes):
            forward(x[mine])
    if "save" in words:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(states, checkpoint_id=checkpoint)
    result = {
        name: (
            [whole(p) for a in adapters_of(model, name) for p in a.parameters()],
            [
                {key: whole(value) for key, value in values.items()}
                for values in optimizer.adapter_state_dict(name)["state"].values()
            ],
        )
        for name in trained
    }
    # Whichever process had an adapter's samples, all have the same of it.
    everywhere: list[dict[str, Any]] = [{}] * processes
    dist.all_gather_object(everywhere, result)
    for others in everywhere:
        torch.testing.assert_close(others, result, rtol=0, atol=0)
    return result


def counts_of_two_batches(*, sync: bool) -> list[list[float]]:
    """Samples of the first two adapters in both hosts, each alone in one of two batches of a step.

    Args:
        sync: whether gradients of the first batch are reduced at once.
    """
    model = Model()
    for host in (model[0], model[2]):
        fully_shard(host)
    fully_shard(model)
    for name in NAMES[:2]:
        model.set_requires_gradient_sync(sync or name == NAMES[1])
        names = [name] * 3
        x, target = batch(0, names)
        with route_adapters(model, ids_of(model, names)):
            losses = losses_of(model(x), target)
        losses.sum().backward()
    return [host._sample_counter.total.grad[:2].tolist() for host in (model[0], model[2])]


def main() -> None:
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    for words in sys.argv[2:]:
        if words == "counts":
            result: Any = [counts_of_two_batches(sync=sync) for sync in (True, False)]
        else:
            result = run(words.split(","), folder)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{words}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
