"""How the nemo_* files beside this one were made, with NeMo 3.0.0: ``python make_nemo_files.py``.

test_nemo_files.py reads them into the same model, built on adapter_ext.
"""

from __future__ import annotations

import torch
from nemo.collections.common.parts.adapter_modules import LinearAdapterConfig
from nemo.core import ModelPT, NeuralModule
from nemo.core.classes.mixins.adapter_mixins import AdapterModelPTMixin, AdapterModuleMixin
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

STRATEGIES = "nemo.core.classes.mixins.adapter_mixin_strategies"


class Block(NeuralModule, AdapterModuleMixin):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(11, 11)

    def forward(self, x):
        return self.forward_enabled_adapters(self.linear(x))


class Stack(NeuralModule, AdapterModuleMixin):
    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        for b in self.blocks:
            x = b(x)
        return x

    def add_adapter(self, name, cfg):
        for b in self.blocks:
            b.add_adapter(name, cfg)

    def is_adapter_available(self):
        return any(b.is_adapter_available() for b in self.blocks)

    def set_enabled_adapters(self, name=None, enabled=True):
        for b in self.blocks:
            b.set_enabled_adapters(name, enabled)

    def get_enabled_adapters(self):
        return sorted({n for b in self.blocks for n in b.get_enabled_adapters()})


class Model(ModelPT, AdapterModelPTMixin):
    def __init__(self, cfg, trainer=None):
        super().__init__(cfg, trainer)
        self.encoder = Stack(3)
        self.decoder = Stack(2)
        self.setup_adapters()

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def setup_training_data(self, c):
        pass

    def setup_validation_data(self, c):
        pass

    @classmethod
    def list_available_models(cls):
        return []

    @property
    def adapter_module_names(self):
        return ["", "encoder", "decoder"]

    @property
    def default_adapter_module_name(self):
        return "encoder"

    def add_adapter(self, name, cfg):
        super().add_adapter(name, cfg)
        m, _ = self.resolve_adapter_module_name_(name)
        for p in (m or "encoder").split("+"):
            getattr(self, p).add_adapter(name, cfg)

    def is_adapter_available(self):
        return self.encoder.is_adapter_available() or self.decoder.is_adapter_available()

    def set_enabled_adapters(self, name=None, enabled=True):
        super().set_enabled_adapters(name, enabled)
        for p in (self.encoder, self.decoder):
            if p.is_adapter_available():
                p.set_enabled_adapters(name, enabled)

    def get_enabled_adapters(self):
        return sorted(
            set(self.encoder.get_enabled_adapters() + self.decoder.get_enabled_adapters())
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    model = Model(OmegaConf.create({"any": "thing"}))
    model.add_adapter("fr", cfg=OmegaConf.structured(LinearAdapterConfig(in_features=11, dim=3)))
    model.add_adapter(
        "decoder:de",
        cfg=OmegaConf.create(
            {
                "_target_": "nemo.collections.common.parts.adapter_modules.LinearAdapter",
                "in_features": 11,
                "dim": 2,
                "activation": "relu",
                "norm_position": "post",
                "dropout": 0.1,
                "adapter_strategy": {
                    "_target_": f"{STRATEGIES}.ResidualAddAdapterStrategy",
                    "stochastic_depth": 0.25,
                    "l2_lambda": 0.5,
                },
            }
        ),
    )
    model.set_enabled_adapters("de", False)
    for p in model.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape))
    model.save_adapters("nemo_adapters.pt")
    model.save_adapters("nemo_fr.pt", name="fr")
    model.save_to("nemo_model.nemo")
    model.set_enabled_adapters("de", True)
    model.eval()
    x = torch.randn(4, 11)
    save_file(
        {
            "x": x,
            "y": model(x).detach(),
            **{k: v.contiguous() for k, v in model.state_dict().items()},
        },
        "nemo_expected.safetensors",
    )
