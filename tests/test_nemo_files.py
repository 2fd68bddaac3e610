"""Files that NeMo 3.0.0 itself wrote (see data/make_nemo_files.py) load, and give its outputs."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from model_testing import unchanged
from safetensors.torch import load_file
from torch import nn

from adapter_ext import AdapterModelPTMixin, AdapterModuleMixin, ModelPT, NeuralModule, files
from adapter_ext.__main__ import main
from adapter_ext.archive import read_archive

DATA = Path(__file__).parent / "data"
WIDTH = 11


class Block(NeuralModule, AdapterModuleMixin):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.forward_enabled_adapters(self.linear(x))


class Stack(NeuralModule):
    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Model(ModelPT, AdapterModelPTMixin):
    def __init__(self, cfg, trainer=None):
        super().__init__(cfg, trainer)
        self.encoder = Stack(3)
        self.decoder = Stack(2)
        self.setup_adapters()

    def forward(self, x):
        return self.decoder(self.encoder(x))

    @property
    def adapter_module_names(self):
        return ["", "encoder", "decoder"]

    @property
    def default_adapter_module_name(self):
        return "encoder"


@pytest.fixture
def expected():
    return load_file(DATA / "nemo_expected.safetensors")


@pytest.fixture
def base(expected):
    """The model without adapters."""
    model = Model({"any": "thing"}).eval()
    state = {key: expected[key] for key in model.state_dict()}
    model.load_state_dict(state)
    return model


def check(model, expected):
    assert model.get_enabled_adapters() == ["fr"]  # NeMo saved "de" disabled
    model.set_enabled_adapters("de", True)
    # Of results in the thousands, the small ones are differences.
    atol = 5e-7 * float(expected["y"].abs().max())
    torch.testing.assert_close(model(expected["x"]), expected["y"], rtol=1e-5, atol=atol)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    strategy = model.decoder.blocks[1].adapter_layer["de"].adapter_strategy
    assert (strategy.stochastic_depth, strategy.l2_lambda) == (0.25, 0.5)


def test_all_adapters(base, expected):
    base.load_adapters(DATA / "nemo_adapters.pt")
    check(base, expected)


@pytest.mark.parametrize("name", ["de", "decoder:de"])
def test_one_adapter_by_its_bare_and_its_qualified_name(base, expected, name):
    base.load_adapters(DATA / "nemo_adapters.pt", name)
    base.load_adapters(DATA / "nemo_fr.pt", "fr")
    check(base, expected)


def test_b6_a_subset_that_nemo_saved(base):
    """NeMo writes the configuration of all adapters into it, and can't read it itself."""
    base.load_adapters(DATA / "nemo_fr.pt")
    assert {row.name for row in base.list_adapters()} == {"fr"}
    with unchanged(base), pytest.raises(KeyError, match="no adapter named 'de'"):
        base.load_adapters(DATA / "nemo_fr.pt", "de")


def test_a_whole_model(expected):
    model = Model.restore_from(DATA / "nemo_model.nemo")
    assert model.cfg.any == "thing"
    check(model, expected)


def test_the_versions_in_a_model_that_nemo_saved_are_read():
    """Without them a module takes its state for one of an older version, and changes it."""
    _, state = read_archive(DATA / "nemo_model.nemo")
    with tarfile.open(DATA / "nemo_model.nemo") as archive:
        weights = io.BytesIO(archive.extractfile("./model_weights.ckpt").read())
    by_torch = torch.load(weights, weights_only=True)
    assert {path: notes["version"] for path, notes in state._metadata.items()} == {
        path: notes.get("version") for path, notes in by_torch._metadata.items()
    }
    assert len(state._metadata) > 20


def test_convert_and_inspect(base, expected, tmp_path, capsys):
    assert main(["convert", str(DATA / "nemo_adapters.pt"), str(tmp_path / "a.safetensors")]) == 0
    assert files.read_adapters(tmp_path / "a.safetensors").adapters.keys() == {"fr", "de"}
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    assert "relu" in capsys.readouterr().out
    base.load_adapters(tmp_path / "a.safetensors")
    check(base, expected)
