"""Modules that can be frozen, and models that are made from a configuration and saved with it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from adapter_ext import archive
from adapter_ext.files import FileError
from adapter_ext.model_mixin import AdapterModelPTMixin
from adapter_ext.registry import targets_of_a_file

if TYPE_CHECKING:
    from typing_extensions import Self


class NeuralModule(nn.Module):
    """An ``nn.Module`` that can be frozen and thawed."""

    @property
    def input_types(self) -> None:
        """None: inputs are not typed."""
        return None

    @property
    def output_types(self) -> None:
        """None: outputs are not typed."""
        return None

    @property
    def num_weights(self) -> int:
        """The number of elements of the parameters that require grad."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def freeze(self) -> None:
        """Makes no parameter require grad, and switches to evaluation mode."""
        # What was frozen already stays so after unfreeze(partial=True); a second freeze() in a row
        # must not forget that.
        before = self.__dict__.setdefault("_required_grad", {})
        for name, parameter in self.named_parameters():
            before.setdefault(name, parameter.requires_grad)
            parameter.requires_grad_(False)
        self.eval()

    def unfreeze(self, partial: bool = False) -> None:
        """Makes the parameters require grad again, and switches to training mode.

        Args:
            partial: only those that required it before :meth:`freeze`.

        Raises:
            ValueError: if partial, and the module is not frozen.
        """
        before: dict[str, bool] | None = self.__dict__.pop("_required_grad", None)
        if partial and before is None:
            raise ValueError("unfreeze(partial=True) needs a freeze() before it")
        for name, parameter in self.named_parameters():
            wanted = before.get(name, True) if partial and before is not None else True
            parameter.requires_grad_(wanted)
        self.train()

    @contextmanager
    def as_frozen(self) -> Iterator[None]:
        """Freezes the module within a context; every parameter and mode is as before behind it."""
        required_grad = {p: p.requires_grad for p in self.parameters()}
        training = {m: m.training for m in self.modules()}
        before = self.__dict__.pop("_required_grad", None)
        self.freeze()
        try:
            yield
        finally:
            for parameter, required in required_grad.items():
                parameter.requires_grad_(required)
            for module, was_training in training.items():
                module.training = was_training
            self.__dict__.pop("_required_grad", None)
            if before is not None:
                self._required_grad = before


class ModelPT(NeuralModule):
    """A model that is made from a configuration, and saved together with it.

    ::

        class Classifier(ModelPT):
            def __init__(self, cfg, trainer=None):
                super().__init__(cfg, trainer)
                self.encoder = Encoder(**self.cfg.encoder)


        model.save_to("classifier.nemo")
        model = Classifier.restore_from("classifier.nemo")

    A subclass's constructor takes ``(cfg, trainer=None)``. There is no training loop here; a
    trainer, if there is one, is only kept.

    Args:
        cfg: the configuration, copied.
        trainer: what :attr:`trainer` returns.

    Raises:
        TypeError: if cfg is no dict, DictConfig or dataclass.

    Attributes:
        model_guid: a name of this object, under which its auxiliary losses are collected; see
            :class:`adapter_ext.AccessMixin`.
    """

    def __init__(self, cfg: Any, trainer: Any = None) -> None:
        super().__init__()
        self.model_guid = str(uuid.uuid4())
        self.cfg = cfg
        self._trainer = trainer

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Gives a copy of a model, or one that is unpickled, a guid of its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        old, new = self.model_guid, str(uuid.uuid4())
        for module in self.modules():
            if getattr(module, "model_guid", None) == old:
                setattr(module, "model_guid", new)  # noqa: B010 - it is no attribute of nn.Module

    def __copy__(self) -> Self:
        """A shallow copy has the modules of the original, and so its guid."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    @property
    def cfg(self) -> DictConfig:
        """The configuration; assigning one copies it."""
        return self._cfg

    @cfg.setter
    def cfg(self, cfg: Any) -> None:
        self._cfg = _to_config(cfg)

    @property
    def trainer(self) -> Any:
        """The trainer, None without one."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        self._trainer = trainer  # Lightning, too, keeps its trainer under this name

    def set_trainer(self, trainer: Any) -> None:
        """Sets :attr:`trainer`."""
        self.trainer = trainer

    # --- Hooks that models written for NeMo call or override --------------------------------------

    @classmethod
    def list_available_models(cls) -> list[Any]:
        """Pretrained models that can be fetched: none, nothing here is ever downloaded."""
        return []

    def setup_training_data(self, train_data_config: Any) -> None:
        """Override to make the training data loader."""
        self._update_dataset_config("train", train_data_config)

    def setup_validation_data(self, val_data_config: Any) -> None:
        """Override to make the validation data loader."""
        self._update_dataset_config("validation", val_data_config)

    def setup_test_data(self, test_data_config: Any) -> None:
        """Override to make the test data loader."""
        self._update_dataset_config("test", test_data_config)

    def _update_dataset_config(self, dataset_name: str, config: Any) -> None:
        """Keeps the configuration of a data set in ``cfg.{dataset_name}_ds``, unless it is None."""
        if dataset_name not in ("train", "validation", "test"):
            raise ValueError(
                f"dataset_name must be 'train', 'validation' or 'test', got {dataset_name!r}"
            )
        if config is not None:
            with open_dict(self.cfg):
                self.cfg[f"{dataset_name}_ds"] = _to_config(config)

    # --- Making, saving and restoring -------------------------------------------------------------

    @classmethod
    def from_config_dict(cls, config: Any, trainer: Any = None) -> Self:
        """Makes a model.

        Args:
            config: its configuration, or one that has it under ``model``.
            trainer: see the class.
        """
        config = _to_config(config)
        return cls(cfg=config.model if "model" in config else config, trainer=trainer)

    def save_to(self, save_path: str | os.PathLike[str]) -> None:
        """Writes configuration and weights to one file, atomically.

        Args:
            save_path: the file; NeMo names such files ``*.nemo``.

        Raises:
            ValueError: if a module has adapters that the configuration has not.
        """
        if isinstance(self, AdapterModelPTMixin):
            self._require_configured()
        config = cast("dict[str, Any]", OmegaConf.to_container(self.cfg, resolve=False))
        archive.write_archive(save_path, config, self.state_dict())

    @classmethod
    def restore_from(
        cls,
        restore_path: str | os.PathLike[str],
        override_config_path: str | os.PathLike[str] | Mapping[str, Any] | DictConfig | None = None,
        map_location: Any = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Any = None,
    ) -> Any:
        """Makes a model from a file that :meth:`save_to` wrote.

        The model is one of this very class: a file can't name one. Its adapters may be of
        registered classes only, see :func:`adapter_ext.register_target`; what else the constructor
        makes of the file's configuration is its own affair.

        Args:
            restore_path: the file.
            override_config_path: a configuration to use instead of the file's: a YAML file's path,
                or the configuration itself.
            map_location: the device of the model, None for the CPU.
            strict: whether the file must hold the very parameters and buffers of the model.
            return_config: return the configuration alone, make no model.
            trainer: see the class.

        Returns:
            The model, in evaluation mode; with return_config a DictConfig.

        Raises:
            FileNotFoundError: if there is no such file.
            adapter_ext.FileError: if its content is not as it should be.
            TypeError: if this is ModelPT itself, which is no model.
        """
        if cls is ModelPT and not return_config:
            raise TypeError(
                "restore_from must be called on the model's own class: a file can't name one"
            )
        config, state = archive.read_archive(restore_path)
        if isinstance(override_config_path, (str, os.PathLike)):
            override_config_path = cast(DictConfig, OmegaConf.load(os.fspath(override_config_path)))
        cfg = _to_config(config if override_config_path is None else override_config_path)
        if return_config:
            return cfg
        with targets_of_a_file():
            model = cls(cfg=cfg, trainer=trainer)
        try:
            model.load_state_dict(state, strict=strict)
        except RuntimeError as error:
            raise FileError(
                f"{os.fspath(restore_path)}: not the weights of this model: {error}"
            ) from error
        if map_location is not None:
            model.to(torch.device(map_location))
        return model.eval()


def _to_config(cfg: Any) -> DictConfig:
    """A copy of a configuration, interpolations kept.

    Those of a part of another configuration are resolved, as in NeMo: they may lead out of it.
    """
    if is_dataclass(cfg):
        cfg = OmegaConf.structured(cfg)
    if isinstance(cfg, DictConfig):
        # Through plain containers: a structured one would refuse keys that it does not know.
        cfg = OmegaConf.to_container(cfg, resolve=cfg._get_parent() is not None)
    if not isinstance(cfg, Mapping):
        raise TypeError(
            f"a model's configuration must be a dict, DictConfig or dataclass, "
            f"got {type(cfg).__name__}"
        )
    return OmegaConf.create(dict(cfg))
