"""What the tests of models share: one model in two versions, adapters with weights, snapshots."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from layer_testing import formula, randomize
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from adapter_ext import (
    AdapterModelPTMixin,
    AdapterModuleMixin,
    LinearAdapterConfig,
    ModelPT,
    NeuralModule,
    register_adapter,
)

WIDTH = 11  # odd on purpose
ENCODER_DEPTH, DECODER_DEPTH = 3, 2
NAMES = ("a1", "a10", "module", "x1", "1")  # each is part of another, or of a parameter's name

logger = logging.getLogger(__name__)


class Block(NeuralModule):
    """A layer without adapters, whose class has a version with adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(x)))


class BlockWithAdapters(Block, AdapterModuleMixin):
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_enabled_adapters(super().forward(x))


register_adapter(Block, BlockWithAdapters)


class Stack(NeuralModule):
    """Blocks in a row; it has no adapter API itself."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        classes = {f"{c.__module__}.{c.__qualname__}": c for c in (Block, BlockWithAdapters)}
        self.blocks = nn.ModuleList(classes[cfg.block["_target_"]]() for _ in range(cfg.depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class StackWithAdapters(Stack, AdapterModuleMixin):
    """A stack that has NeMo's API and hands every call on to its blocks, as NeMo's encoders do."""

    def add_adapter(self, name: str, cfg: Any, **kwargs: Any) -> None:
        for block in self.blocks:
            block.add_adapter(name, cfg, **kwargs)

    def is_adapter_available(self) -> bool:
        return any(block.is_adapter_available() for block in self.blocks)

    def set_enabled_adapters(self, name: str | None = None, enabled: bool = True) -> None:
        for block in self.blocks:
            block.set_enabled_adapters(name, enabled)

    def get_enabled_adapters(self) -> list[str]:
        return sorted({name for block in self.blocks for name in block.get_enabled_adapters()})


class StockModel(ModelPT, AdapterModelPTMixin):
    """The mixin does everything; the class only says which parts can have adapters."""

    part_class: type[Stack] = Stack

    def __init__(self, cfg: Any, trainer: Any = None) -> None:
        super().__init__(cfg, trainer)
        self.encoder = self.part_class(self.cfg.encoder)
        self.decoder = self.part_class(self.cfg.decoder)
        self.setup_adapters()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    @property
    def adapter_module_names(self) -> list[str]:
        return ["", "encoder", "decoder"]

    @property
    def default_adapter_module_name(self) -> str | None:
        return "encoder"


class OverridingModel(StockModel):
    """Written as models for NeMo are: it overrides the mixin's methods and dispatches by itself.

    ``encoder_adapter`` (True unless given) and ``decoder_adapter`` (False) of ``global_cfg`` say
    where an adapter without a module name goes.
    """

    part_class = StackWithAdapters

    def setup_adapters(self) -> None:
        if self._capable("encoder") or self._capable("decoder"):
            super().setup_adapters()

    def add_adapter(self, name: str, cfg: Any) -> None:
        super().add_adapter(name, cfg)
        for part in self._targets(self.resolve_adapter_module_name_(name)[0]):
            getattr(self, part).add_adapter(name, cfg)

    def set_enabled_adapters(self, name: str | None = None, enabled: bool = True) -> None:
        super().set_enabled_adapters(name, enabled)
        module = None if name is None else self.resolve_adapter_module_name_(name)[0]
        parts = ["encoder", "decoder"] if module is None else self._targets(module)
        for part in parts:
            if self._capable(part) and getattr(self, part).is_adapter_available():
                getattr(self, part).set_enabled_adapters(name, enabled)

    def get_enabled_adapters(self) -> list[str]:
        names = set(super().get_enabled_adapters())
        for part in ("encoder", "decoder"):
            if self._capable(part):
                names.update(getattr(self, part).get_enabled_adapters())
        return sorted(names)

    def is_adapter_available(self) -> bool:
        parts = [getattr(self, p) for p in ("encoder", "decoder") if self._capable(p)]
        return super().is_adapter_available() or any(p.is_adapter_available() for p in parts)

    def check_valid_model_with_adapter_support_(self) -> None:
        for part in self._targets(""):
            if not self._capable(part):
                logger.warning("the %s does not support adapters", part)

    def resolve_adapter_module_name_(self, name: str) -> tuple[str, str]:
        module_name, adapter_name = super().resolve_adapter_module_name_(name)
        for part in module_name.split("+"):
            if part not in self.adapter_module_names:
                raise ValueError(f"{part!r} of {name!r} is none of {self.adapter_module_names}")
        return module_name, adapter_name

    def _targets(self, module_name: str) -> list[str]:
        if module_name:
            return module_name.split("+")
        settings = self.cfg.get("adapters", {}).get(self.adapter_global_cfg_key, {})
        flags = {"encoder": True, "decoder": False}
        return [p for p, default in flags.items() if settings.get(f"{p}_adapter", default)]

    def _capable(self, part: str) -> bool:
        return isinstance(getattr(self, part, None), AdapterModuleMixin)


KINDS = (StockModel, OverridingModel)


def model_config(block: type[Block] = BlockWithAdapters, **flags: bool) -> DictConfig:
    """A model's configuration; flags are those of ``global_cfg``, such as decoder_adapter."""
    target = {"_target_": f"{block.__module__}.{block.__qualname__}"}
    cfg: dict[str, Any] = {
        "encoder": {"depth": ENCODER_DEPTH, "block": target},
        "decoder": {"depth": DECODER_DEPTH, "block": target},
    }
    if flags:
        cfg["adapters"] = {"global_cfg": flags}
    return OmegaConf.create(cfg)


def make_model(kind: type[StockModel], *names: str, seed: int = 0, **flags: bool) -> StockModel:
    """A model in evaluation mode with random weights and adapters; the same for the same seed."""
    model = kind(model_config(**flags))
    randomize(model, seed)
    for name in names:
        add(model, name)
    return model.eval()


def adapter_config(**kwargs: Any) -> LinearAdapterConfig:
    return LinearAdapterConfig(**{"in_features": WIDTH, "dim": 3, **kwargs})


def add(model: StockModel, name: str, seed: int = 0, **kwargs: Any) -> None:
    """Adds an adapter with weights that depend on its name, its place and the seed."""
    before = set(model.modules())
    model.add_adapter(name, adapter_config(**kwargs))
    for path, module in model.named_modules():
        if module not in before and path.split(".")[-2:-1] == ["adapter_layer"]:
            randomize(module, seed + zlib.crc32(path.encode()))


def hosts(model: nn.Module) -> dict[str, BlockWithAdapters]:
    """The blocks that have an adapter, by their paths."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BlockWithAdapters) and "adapter_layer" in module._modules
    }


def where(model: nn.Module, name: str) -> list[str]:
    """The paths of the blocks that have an adapter of this very name."""
    return [path for path, host in hosts(model).items() if name in host.adapter_layer]


ENCODER_BLOCKS = [f"encoder.blocks.{i}" for i in range(ENCODER_DEPTH)]
DECODER_BLOCKS = [f"decoder.blocks.{i}" for i in range(DECODER_DEPTH)]


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The weights of an adapter everywhere in a model, by their names in its state dict."""
    prefixes = tuple(f"{path}.adapter_layer.{name}." for path in where(model, name))
    return {k: v for k, v in model.state_dict().items() if prefixes and k.startswith(prefixes)}


def assert_same_tensors(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for key, value in want.items():
        assert got[key].dtype is value.dtype
        assert torch.equal(got[key], value), key


def inputs(batch: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed))


def plainly(model: StockModel, x: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """A model's output by the plain formulas, and what each enabled adapter added, block by block.

    Norms must be in evaluation mode, dropout and stochastic depth zero.
    """
    deltas: dict[str, list[Tensor]] = {}
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        x = Block.forward(block, x)
        for name in block.get_enabled_adapters():
            delta = formula(block.adapter_layer[name], x)
            deltas.setdefault(name, []).append(delta)
            x = x + delta
    return x, deltas


def write_config(cfg: Any) -> str | None:
    return None if cfg is None else OmegaConf.to_yaml(cfg)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and its adapters that a failing call must not change."""
    return {
        "modules": dict(model.named_modules()),
        "classes": {path: type(m) for path, m in model.named_modules()},
        "training": {path: m.training for path, m in model.named_modules()},
        "attributes": {path: sorted(vars(m)) for path, m in model.named_modules()},
        "required grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "config": write_config(model.cfg),
        "adapter configs": {
            path: write_config(getattr(m, "adapter_cfg", None))
            for path, m in model.named_modules()
            if isinstance(m, AdapterModuleMixin)
        },
        "enabled": {
            path: m.get_enabled_adapters()
            for path, m in model.named_modules()
            if isinstance(m, AdapterModuleMixin)
        },
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Asserts that what runs within, and fails or not, leaves the model as it was."""
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    try:
        yield
    finally:
        after = snapshot(model)
        for key, value in before.items():
            assert after[key] == value, key
        assert_same_tensors(model.state_dict(), state)
