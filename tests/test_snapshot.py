"""Snapshots of modules: natively compared, and in Python, which torch.compile traces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapter_ext import _C
from adapter_ext.snapshot import Snapshot, read_parameters


class Strategy:
    pass


class OtherStrategy(Strategy):
    pass


class OtherModule(nn.Sequential):
    pass


@pytest.fixture(params=["native", "python"])
def read(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr(_C, "read_parameters", None)
    return read_parameters


def make():
    module = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    module.strategy = Strategy()
    return module


def look(module, **others):
    linear, relu = module
    return Snapshot.of(
        module,
        own=("strategy", "forward", "_forward_hooks"),
        empty=(module._forward_hooks, linear._forward_hooks),
        objects=(module.strategy, linear),
        entries=((relu.__dict__, "inplace"), (linear.__dict__, "forward")),
        containers=(module,),
        parameters=((linear._parameters, "weight"), (linear._parameters, "bias")),
        **others,
    )


CHANGES = {
    "type of the module": lambda m: setattr(m, "__class__", OtherModule),
    "own value": lambda m: setattr(m, "strategy", Strategy()),
    "own value that is gone": lambda m: delattr(m, "strategy"),
    "own value where there was none": lambda m: setattr(m, "forward", torch.sin),
    "table of hooks": lambda m: setattr(m, "_forward_hooks", {}),
    "hook": lambda m: m.register_forward_hook(lambda *_: None),
    "hook on a layer": lambda m: m[0].register_forward_hook(lambda *_: None),
    "type of an object": lambda m: setattr(m.strategy, "__class__", OtherStrategy),
    "value": lambda m: setattr(m[1], "inplace", True),
    "value where there was none": lambda m: setattr(m[0], "forward", torch.sin),
    "layer": lambda m: m.__setitem__(1, nn.ReLU()),
    "layer more": lambda m: m.append(nn.ReLU()),
    "layer less": lambda m: m.pop(1),
    "order of layers": lambda m: m._modules.update({"0": m._modules.pop("0")}),
    "no parameter": lambda m: setattr(m[0], "bias", None),
    "parameter deleted": lambda m: delattr(m[0], "bias"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change, read):
    module, other = make(), make()
    snapshots = [look(module), look(other)]
    want = [*module[0].parameters(), *other[0].parameters()]
    got = read([module, other], snapshots)
    assert len(got) == 4
    assert all(g is w for g, w in zip(got, want, strict=True))
    CHANGES[change](module)
    assert read([module, other], snapshots) is None
    assert read([other, module], snapshots[::-1]) is None
    assert read([other], snapshots[1:])[0] is want[2]


def test_parameters_are_those_of_now(read):
    module = make()
    snapshot = look(module)
    module[0].weight = nn.Parameter(torch.ones(2, 3))
    weight, bias = read([module], [snapshot])
    assert weight is module[0].weight
    assert bias is module[0].bias


def test_what_is_found_within_a_part_counts(read):
    module, part = make(), make()
    whole = look(module, within=look(part))
    assert len(read([module], [whole])) == 4
    part[1].inplace = True
    assert read([module], [whole]) is None


def test_copies_with_the_same_parts_are_told_apart(read):
    module = make()
    snapshot = look(module)
    copy = nn.Sequential()
    copy.__dict__ = {**module.__dict__}
    assert read([copy], [snapshot]) is not None
    copy.forward = torch.sin
    assert read([copy], [snapshot]) is None
    assert read([module], [snapshot]) is not None


@pytest.mark.parametrize("field", Snapshot._fields)
def test_malformed_snapshots_are_errors(field):
    module = make()
    snapshot = look(module)
    if field == "kind":
        assert _C.read_parameters([module], [snapshot._replace(kind=None)]) is None
        return
    with pytest.raises(TypeError, match="snapshot"):
        _C.read_parameters([module], [snapshot._replace(**{field: None})])
    items = getattr(snapshot, field)
    wrong = items[:-1] if field != "empty" else (1,)
    with pytest.raises(TypeError, match="snapshot"):
        _C.read_parameters([module], [snapshot._replace(**{field: wrong})])


@pytest.mark.parametrize(
    "arguments",
    [([], [None]), ([nn.ReLU()], []), ([nn.ReLU()], [()]), ([nn.ReLU()], [None]), ([], None)],
)
def test_other_arguments_are_errors(arguments):
    with pytest.raises(TypeError, match=r"snapshot|incompatible"):
        _C.read_parameters(*arguments)


def test_objects_without_a_dictionary_are_an_error():
    with pytest.raises(AttributeError, match="__dict__"):
        _C.read_parameters([object()], [look(make())._replace(kind=object)])
