"""A ModelPT that is a LightningModule as well, trained by ``lightning.Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_testing import NAMES, OPTIONS, STEPS, Model, batch, losses_of, state_of, train_alone

from adapter_ext import ModelPT, route_adapters
from adapter_ext.optim import AdamW, mean_per_adapter

lightning = pytest.importorskip("lightning", reason="needs pip install 'adapter_ext[lightning]'")


class Tagger(ModelPT, lightning.LightningModule):
    def __init__(self, cfg: Any, trainer: Any = None) -> None:
        super().__init__(cfg, trainer)
        self.net = Model()

    def training_step(self, sample: Any, number: int) -> torch.Tensor:
        x, target, names = sample
        with route_adapters(self, names):
            losses = losses_of(self.net(x), target)
        return mean_per_adapter(losses, names)

    def configure_optimizers(self) -> AdamW:
        return AdamW(self, lr=1e-2, adapters=OPTIONS)


def trainer(folder: Path, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def loader(steps: range) -> torch.utils.data.DataLoader:
    data = [(*batch(step, STEPS[step]), STEPS[step]) for step in steps]
    return torch.utils.data.DataLoader(data, batch_size=None)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_training_and_resuming(tmp_path: Path) -> None:
    """Lightning computes gradients within the optimizer's step; its checkpoints hold the state."""
    model = Tagger({"width": 3})
    first = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    first.fit(model, loader(range(2)))
    assert model.trainer is first
    first.save_checkpoint(tmp_path / "middle.ckpt")
    resumed = Tagger({"width": 3})
    second = trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    second.fit(resumed, loader(range(2, 4)), ckpt_path=tmp_path / "middle.ckpt", weights_only=False)
    for name in NAMES:
        weights, _ = train_alone(Model(), name)
        torch.testing.assert_close(state_of(resumed.net, name), weights, rtol=1e-10, atol=1e-10)
    assert resumed.cfg.width == 3
    resumed.save_to(str(tmp_path / "model.nemo"))
