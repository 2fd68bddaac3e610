"""Code that imports nemo.* runs on adapter_ext by nemo_names, without NeMo."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import nemo_names
import pytest
from layer_testing import D

import adapter_ext

PROGRAM = """
import torch
from omegaconf import OmegaConf

import nemo.core.adapter_mixins
from nemo.collections.common.parts import adapter_modules
from nemo.core import ModelPT, NeuralModule
from nemo.core.classes.common import safe_instantiate
from nemo.core.classes.mixins import AdapterModuleMixin, access_mixins, adapter_mixins
from nemo.core.classes.mixins.adapter_mixin_strategies import AbstractAdapterStrategy
from nemo.utils import logging, logging_mode


class Layer(NeuralModule, AdapterModuleMixin):
    def forward(self, x):
        return self.forward_enabled_adapters(x)


class Model(ModelPT, adapter_mixins.AdapterModelPTMixin):
    def __init__(self, cfg, trainer=None):
        super().__init__(cfg, trainer)
        self.layer = safe_instantiate(cfg.layer)
        self.setup_adapters()

    def forward(self, x):
        return self.layer(x)


class Twice(AbstractAdapterStrategy):
    def forward(self, input, adapter, *, module):
        return 2 * adapter(input)


model = Model(OmegaConf.create({"layer": {"_target_": __name__ + ".Layer"}}))
model.add_adapter("a1", adapter_modules.LinearAdapterConfig(in_features=WIDTH, dim=3))
adapter = model.layer.adapter_layer["a1"]
torch.nn.init.ones_(adapter.module[3].weight)
adapter.adapter_strategy = Twice()
x = torch.randn(4, WIDTH)
result = torch.equal(model(x), 2 * adapter(x)), bool(adapter(x).any())
config = adapter_mixins._prepare_default_adapter_config(global_key="g", meta_key="m")
logging.warning("seen", mode=logging_mode.ONCE)
logging.warning("seen", mode=logging_mode.ONCE)
"""


@pytest.fixture
def nemo(monkeypatch):
    modules = nemo_names.nemo_modules()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


@pytest.fixture
def messages():
    """What was logged, by whichever of NeMo's loggers."""

    class Collect(logging.Handler):
        def emit(self, record):
            found.append(record.getMessage())

    found, handler = [], Collect()
    logger = nemo_names.Logger()._logger
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_a_program_for_nemo_runs(nemo, monkeypatch, messages):
    module = type(sys)("program_for_nemo")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.WIDTH = D
    exec(compile(PROGRAM, module.__name__, "exec"), vars(module))
    assert module.result == (True, True)
    assert module.config == {"g": {"m": {"modules": {}}}}
    assert messages == ["seen"]
    assert isinstance(module.model, adapter_ext.AdapterModelPTMixin)


def test_modules_hold_our_names_and_nothing_else_is_there(nemo):
    import nemo.collections.common.parts.adapter_modules as adapter_modules
    from nemo.core.classes.mixins import adapter_mixins

    assert adapter_modules.LinearAdapter is adapter_ext.LinearAdapter
    assert adapter_mixins.register_adapter is adapter_ext.register_adapter
    with pytest.raises(ModuleNotFoundError, match=r"nemo\.collections\.asr"):
        import nemo.collections.asr  # noqa: F401


def test_the_logger(messages):
    log = nemo_names.Logger()
    before = log.get_verbosity()
    log.set_verbosity(log.ERROR)
    log.warning("quiet")
    log.error("an error of %s", "mine")
    log.set_verbosity(log.WARNING)
    log.warning("loud")
    log.warning("loud")
    log.info("quiet as well")
    log.set_verbosity(before)
    assert messages == ["an error of mine", "loud", "loud"]


@dataclasses.dataclass
class Fields:
    a: int = 0
    b: int = 0
    _target_: str = ""


class Arguments:
    def __init__(self, a, b):
        pass


class Others:
    def __init__(self, a, c, d):
        pass


def test_signatures_against_dataclasses():
    match = nemo_names.assert_dataclass_signature_match
    assert match(Arguments, Fields, ignore_args=["_target_"]) == (True, None, None)
    assert match(Arguments, Fields) == (False, None, {"_target_"})
    assert match(Others, Fields, ["_target_", "d"]) == (False, {"c"}, {"b"})
    assert match(Others, Fields, ["_target_", "d"], {"c": "b"}) == (True, None, None)


@pytest.mark.parametrize("target", ["os.system", "not_imported.Class", "nemo_names.Logger"])
def test_safe_instantiate_makes_modules_of_this_program_alone(target):
    with pytest.raises(ValueError, match=r"no torch\.nn\.Module"):
        nemo_names.safe_instantiate({"_target_": target})


def test_the_command_runs_tests(tmp_path):
    # As in a checkout of NeMo: packages, a conftest.py that can't be imported here.
    folder = tmp_path / "tests" / "core"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    (folder.parent / "conftest.py").write_text("import a_module_that_is_not_there\n")
    (folder / "test_it.py").write_text(
        "from nemo.core import NeuralModule\n\n\n"
        "def test_it():\n    assert NeuralModule().num_weights == 0\n"
    )
    run = subprocess.run(
        [sys.executable, Path(nemo_names.__file__), "-q", str(folder / "test_it.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed" in run.stdout
