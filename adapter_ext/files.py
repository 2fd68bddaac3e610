"""Adapter files: ``.safetensors``, and ``.pt`` in NeMo's layout.

A ``.safetensors`` file names each tensor as the model's state dict does, and its metadata hold
``format`` ("adapter_ext"), ``format_version``, ``adapters`` (JSON: by name the module, the paths of
the host modules, the configuration, and for each host the versions of the adapter's modules),
``global_cfg`` (JSON) and ``sha256``, over all the rest.

A ``.pt`` file is a dict that ``torch.save`` wrote: by ``"module:name"`` a list with a state dict
for each host module, whose keys start with ``"name."``; ``__cfg__``, an OmegaConf DictConfig; and
``__module_paths__``, which NeMo ignores, and which a file of NeMo's lacks.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import reprlib
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import Tensor

from adapter_ext.names import (
    FILE_CONFIG,
    FILE_PATHS,
    GLOBAL_CONFIG,
    METADATA,
    check_adapter_name,
)
from adapter_ext.registry import nemo_path
from adapter_ext.torch_file import FileError as FileError
from adapter_ext.torch_file import (
    check_dense,
    content_of,
    read_torch_file,
    reading,
    versions_of,
    with_versions,
    write_torch_file,
)

FORMAT_VERSION = "1"
"""Version of the ``.safetensors`` layout."""

SUFFIXES = (".safetensors", ".pt")
"""Suffixes of adapter files."""

_MAX_HEADER_BYTES = 32 * 2**20
_MAX_DEPTH = 32
_MAX_KEY_PARTS = 256
_MAX_VALUES = 100_000
# More than the instructions of a pickle can make: it would have to use the same state often.
_MAX_ENTRIES = 600_000
_MAX_CHARACTERS = 2**20  # of one configuration: what is shared counts each time
_LAYER = "adapter_layer"

# Of what files hold, which may be lists of lists, shared: written out they can be endless.
_short = reprlib.Repr()
_short.maxlevel = 2
_short.maxstring = _short.maxother = 200


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as files hold it.

    Attributes:
        name: its name, without the module's.
        module: the module it was added to as the user named it: ``""``, ``"encoder"``,
            ``"encoder+decoder"``.
        config: plain values, with ``_target_`` and ``enabled``, without interpolations.
        paths: for each state the path of its host module in the model, ``""`` for the model itself;
            None if they are unknown (NeMo's files): states are in the order of ``modules()``.
        states: state dicts of the adapter, one for each host module: ``"module.0.weight"``, ...;
            if they have ``_metadata``, files keep the modules' versions in there.
    """

    name: str
    module: str
    config: dict[str, Any]
    paths: list[str] | None
    states: list[dict[str, Tensor]]

    @property
    def qualified(self) -> str:
        """``"module:name"``, or name alone if module is ``""``."""
        return f"{self.module}:{self.name}" if self.module else self.name


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds.

    Attributes:
        adapters: by name, in the order of the file.
        global_config: the settings of all adapters (``adapters.global_cfg`` in the configuration of
            a model), without ``adapter_meta_cfg``.
    """

    adapters: dict[str, SavedAdapter]
    global_config: dict[str, Any]


def write_adapters(path: str | os.PathLike[str], content: AdapterFile) -> None:
    """Writes an adapter file, whole or not at all; see :func:`atomic_write`.

    Args:
        path: the file; its suffix, ``.safetensors`` or ``.pt``, says which format.
        content: what to write; tensors may be on any device. In a ``.pt`` file the classes of this
            package are named as NeMo names them.

    Raises:
        FileError: if content is not fit for a file (a malformed name or configuration, values that
            are not finite, ...). Nothing is written then.
        OSError: if the file can't be written.
        ValueError: if path has another suffix.
    """
    suffix = _suffix(path)
    try:
        content = _checked(content)
        # Own memory: neither shared with another tensor, nor part of a bigger one.
        content = _with_tensors(content, lambda t: t.detach().cpu().clone().contiguous())
        if suffix == ".safetensors":
            data = _to_safetensors(content)
        else:
            saved = _to_nemo(content)
    except FileError as error:
        raise FileError(f"{os.fspath(path)} can't be written: {error}") from error
    with atomic_write(path) as file:
        if suffix == ".safetensors":
            file.write(data)
        else:
            write_torch_file(saved, file)
            file.seek(0)
            try:
                read_torch_file(file, values=False)
            except FileError as error:
                raise FileError(f"{os.fspath(path)} can't be written: {error}") from error


def read_adapters(
    path: str | os.PathLike[str], *, map_location: torch.device | str | None = None
) -> AdapterFile:
    """Reads an adapter file, one of NeMo's included. Nothing that it names is imported or run.

    Args:
        path: the file; its suffix, ``.safetensors`` or ``.pt``, says which format.
        map_location: device of the tensors; None means the CPU.

    Raises:
        FileError: if the file is of another kind or version, truncated or corrupted, or holds
            anything that has no place in an adapter file.
        OSError: if the file can't be read.
        ValueError: if path has another suffix.
    """
    suffix = _suffix(path)
    with reading(path) as file:
        if suffix == ".safetensors":
            content = _from_safetensors(file.read())
        else:
            content = _from_nemo(read_torch_file(file))
        content = _checked(content)
    if map_location is None:
        return content
    return _with_tensors(content, lambda t: t.to(map_location))


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file for writing that replaces path when it is complete, and on the disk.

    At any time path is the old file or the whole new one, even if the process is killed (which may
    leave a temporary file, ``.*.tmp``, in the folder). If the block raises, path stays as it is.

    Args:
        path: the file; of a symbolic link the one it points to.

    Yields:
        The temporary file, open for writing and reading.

    Raises:
        OSError: if the file can't be written, or path is something else than a file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise OSError(errno.EINVAL, "not a regular file, which it would be replaced by", path)
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "x+b") as file:
            with contextlib.suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == str(temporary):
            # Of the same type, which goes by the number, and about the file that the caller knows.
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise
    # The renaming is on the disk when the folder is; not every system can do that.
    with contextlib.suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"an adapter file's name ends in {' or '.join(SUFFIXES)}; got {os.fspath(path)!r}"
        )
    return suffix


def _with_tensors(content: AdapterFile, change: Callable[[Tensor], Tensor]) -> AdapterFile:
    return replace(
        content,
        adapters={
            name: replace(
                adapter,
                states=[
                    with_versions({k: change(t) for k, t in state.items()}, versions_of(state))
                    for state in adapter.states
                ],
            )
            for name, adapter in content.adapters.items()
        },
    )


# --- Checks, the same for reading and writing -----------------------------------------------------


def _checked(content: AdapterFile) -> AdapterFile:
    """The content with configurations of plain values; FileError if anything is wrong with it."""
    adapters: dict[str, SavedAdapter] = {}
    for name, adapter in content.adapters.items():
        try:
            check_adapter_name(name, adapters)
        except ValueError as error:
            raise FileError(str(error)) from error
        if adapter.name != name:
            raise FileError(f"adapter {name!r} is called {adapter.name!r} as well")
        adapters[name] = _checked_adapter(adapter)
    config = _plain_config(content.global_config, GLOBAL_CONFIG)
    if not isinstance(config, dict) or METADATA in config:
        raise FileError(f"{GLOBAL_CONFIG} must be a dict without {METADATA}")
    return AdapterFile(adapters, config)


def _checked_adapter(adapter: SavedAdapter) -> SavedAdapter:
    label = f"adapter {adapter.name!r}"
    module, paths, states = adapter.module, adapter.paths, adapter.states
    if not isinstance(module, str) or not (
        module == "" or (":" not in module and all(map(_is_path, module.split("+"))))
    ):
        raise FileError(f"{label}: {_short.repr(module)} can't name a module")
    config = _plain_config(adapter.config, f"the configuration of {label}")
    if not isinstance(config, dict) or "_target_" not in config:
        raise FileError(f"{label}: the configuration must be a dict with _target_")
    if not isinstance(config.setdefault("enabled", True), bool):
        raise FileError(f"{label}: enabled must be a bool, got {_short.repr(config['enabled'])}")
    if not states:
        raise FileError(f"{label} has no states")
    _check_paths(paths, label)
    if paths is not None and len(paths) != len(states):
        raise FileError(f"{label}: {len(states)} states for the module paths {paths}")
    for index, state in enumerate(states):
        where = f"{label}, state {index}" if paths is None else f"{label}, module {paths[index]!r}"
        for key, tensor in state.items():
            _check_tensor(key, tensor, where)
        try:
            versions_of(state)
        except FileError as error:
            raise FileError(f"{where}: {error}") from error
    return replace(adapter, config=config)


def _check_paths(paths: object, label: str) -> None:
    if paths is None:
        return
    if not isinstance(paths, list):
        raise FileError(f"{label}: the module paths must be a list, got {_short.repr(paths)}")
    for path in paths:
        if not isinstance(path, str) or not (path == "" or _is_path(path)):
            raise FileError(f"{label}: {_short.repr(path)} can't be the path of a module")
    if len(set(paths)) != len(paths):
        raise FileError(f"{label}: a module path is there twice: {_short.repr(paths)}")


def _check_tensor(key: object, tensor: object, where: str) -> None:
    if not isinstance(key, str) or not key or not key.isprintable():
        raise FileError(f"{where}: {key!r} can't name a parameter")
    where = f"{where}: parameter {key!r}"
    if not isinstance(tensor, Tensor):
        raise FileError(f"{where} is no tensor but of type {type(tensor).__name__}")
    check_dense(tensor, where)
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise FileError(f"{where} has the shape {tuple(tensor.shape)}, but not that many values")
    if not tensor.isfinite().all():
        raise FileError(f"{where} has values that are not finite")


def _plain_config(value: Any, label: str) -> Any:
    """A copy of a configuration; FileError unless it is of plain values, all resolved."""
    counter = itertools.count()
    characters = 0

    def check_text(text: str) -> None:
        nonlocal characters
        characters += len(text)
        if characters > _MAX_CHARACTERS:
            raise FileError(f"{label} has more than {_MAX_CHARACTERS} characters")
        if "${" in text or text == "???":
            raise FileError(
                f"{label} has {_short.repr(text)}: interpolations and missing values are not "
                f"allowed in a file"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise FileError(f"{label} has {_short.repr(text)}, which is no valid text") from error

    def copy(value: Any, depth: int) -> Any:
        # What a pickle or a YAML file shares would be copied more often than any memory could hold.
        if next(counter) >= _MAX_VALUES:
            raise FileError(f"{label} has more than {_MAX_VALUES} values")
        if depth > _MAX_DEPTH:
            raise FileError(f"{label} is nested more than {_MAX_DEPTH} levels deep")
        value = content_of(value)
        if isinstance(value, dict):
            target = value.get("_target_") if "_target_" in value else "a"
            target = content_of(target)
            if not isinstance(target, str) or not _is_dotted_name(target):
                raise FileError(
                    f"{label}: _target_ must be a dotted name, got {_short.repr(target)}"
                )
            for key in value:
                if type(key) is not str:
                    raise FileError(f"{label}: keys must be of type str, got {_short.repr(key)}")
                check_text(key)
            return {key: copy(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [copy(item, depth + 1) for item in value]
        # Exactly these types: a subclass, of an Enum for example, would not come back as itself.
        if type(value) is str:
            check_text(value)
        elif type(value) is float or type(value) is int:
            if not math.isfinite(value) or (type(value) is int and abs(value) >= 2**63):
                raise FileError(f"{label} has the number {value}, which is not finite or too big")
        elif value is not None and type(value) is not bool:
            raise FileError(f"{label} has a value of type {type(value).__name__}")
        return value

    return copy(value, 0)


def _is_path(path: str) -> bool:
    """Whether a submodule can be at a path; the names of those in containers are numbers."""
    return path.isprintable() and all(path.split("."))


def _is_dotted_name(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


# --- .safetensors ---------------------------------------------------------------------------------


def _to_safetensors(content: AdapterFile) -> bytes:
    tensors = {}
    adapters = {}
    for name, adapter in content.adapters.items():
        entry = {
            "module": adapter.module,
            "paths": adapter.paths,
            "config": adapter.config,
            "versions": [versions_of(state) for state in adapter.states],
        }
        adapters[name] = entry if adapter.paths else {**entry, "states": len(adapter.states)}
        for path, state in zip(_key_paths(adapter), adapter.states, strict=True):
            prefix = f"{path}.{_LAYER}.{name}." if path else f"{_LAYER}.{name}."
            tensors.update({f"{prefix}{key}": tensor for key, tensor in state.items()})
    hosts = _hosts(content.adapters)
    for key in tensors:
        _owner(key, hosts)  # no other program would find it either
    metadata = {
        "format": "adapter_ext",
        "format_version": FORMAT_VERSION,
        "adapters": json.dumps(adapters, allow_nan=False),
        "global_cfg": json.dumps(content.global_config, allow_nan=False),
    }
    data = safetensors.torch.save(tensors, metadata)
    header, start = _header(data)
    metadata["sha256"] = _digest(header, memoryview(data)[start:])
    return safetensors.torch.save(tensors, metadata)


def _from_safetensors(data: bytes) -> AdapterFile:
    header, start = _header(data)
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != "adapter_ext":
        raise FileError("it is a safetensors file, but holds no adapters of adapter_ext")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise FileError(
            f"it has format version {metadata.get('format_version')!r}; this adapter_ext reads "
            f"version {FORMAT_VERSION!r}"
        )
    # Other programs may leave it out; what a program of ours wrote always has it.
    digest = metadata.pop("sha256", None)
    if digest is not None and digest != _digest(header, memoryview(data)[start:]):
        raise FileError("it is corrupted: its checksum differs from that of its content")
    listed = _parse_json(metadata.get("adapters", ""), "adapters")
    if not isinstance(listed, dict):
        raise FileError("its list of adapters is no JSON object")
    adapters = {}
    states = 0
    for name, entry in listed.items():
        adapters[name] = _listed_adapter(name, entry, _MAX_VALUES - states)
        states += len(adapters[name].states)
    content = AdapterFile(adapters, _parse_json(metadata.get("global_cfg", ""), GLOBAL_CONFIG))
    hosts = _hosts(adapters)
    for key, tensor in safetensors.torch.load(data).items():
        state, parameter = _owner(key, hosts)
        state[parameter] = tensor
    return content


def _listed_adapter(name: str, entry: Any, most_states: int) -> SavedAdapter:
    if not isinstance(entry, dict) or not {"module", "paths", "config"} <= entry.keys():
        raise FileError(f"adapter {name!r} lacks its module, paths or configuration")
    paths = entry["paths"]
    _check_paths(paths, f"adapter {name!r}")
    count = entry.get("states") if paths is None else len(paths)
    if type(count) is not int or not 0 < count <= most_states:
        raise FileError(f"adapter {name!r} has {_short.repr(count)} states")
    # Files of before adapter_ext kept versions lack them, and so do states of unknown versions.
    label = f"the versions of adapter {name!r}"
    versions = _list(entry.get("versions", [None] * count), label)
    if len(versions) != count:
        raise FileError(f"{label} are those of {len(versions)} states; it has {count}")
    states = [with_versions({}, v if v is None else _dict(v, label)) for v in versions]
    return SavedAdapter(name, entry["module"], entry["config"], paths, states)


def _key_paths(adapter: SavedAdapter) -> list[str]:
    return list(map(str, range(len(adapter.states)))) if adapter.paths is None else adapter.paths


def _hosts(adapters: Mapping[str, SavedAdapter]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """The states by name and path."""
    return {
        (name, path): state
        for name, adapter in adapters.items()
        for path, state in zip(_key_paths(adapter), adapter.states, strict=True)
    }


def _owner(
    key: str, hosts: Mapping[tuple[str, str], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], str]:
    """The state that a tensor's key belongs to, and the name of the parameter."""
    parts = key.split(".")
    if len(parts) > _MAX_KEY_PARTS:
        raise FileError(f"a tensor's key has more than {_MAX_KEY_PARTS} parts: {key[:80]!r}...")
    found = []
    for position, part in enumerate(parts[:-2]):
        host = (parts[position + 1], ".".join(parts[:position]))
        if part == _LAYER and host in hosts:
            found.append((hosts[host], ".".join(parts[position + 2 :])))
    if len(found) != 1:
        raise FileError(
            f"tensor {key!r} belongs to {'several' if found else 'none'} of the listed adapters "
            f"and modules"
        )
    return found[0]


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and the offset of what follows."""
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or end > len(data) or data[8:9] != b"{":
        raise FileError("it is no safetensors file, or truncated")
    if end > _MAX_HEADER_BYTES:
        raise FileError(f"its header has {end} bytes; the limit is {_MAX_HEADER_BYTES}")
    return _parse_json(data[8:end].decode(), "the header"), end


def _digest(header: Mapping[str, Any], values: bytes | memoryview) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(values)
    return digest.hexdigest()


def _parse_json(text: object, label: str) -> Any:
    if not isinstance(text, str):
        raise FileError(f"{label} is no text")
    try:
        return json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise FileError(f"{label} is nested too deep") from error
    except json.JSONDecodeError as error:
        raise FileError(f"{label} is no JSON: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise FileError(f"the key {key!r} is there twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> None:
    raise FileError(f"the number {name} is not allowed in JSON")


def _list(value: Any, label: str) -> list[Any]:
    if not isinstance(value, list):
        raise FileError(f"{label}: a list was expected, got {type(value).__name__}")
    return value


# --- .pt, NeMo's layout ---------------------------------------------------------------------------


def _to_nemo(content: AdapterFile) -> dict[str, Any]:
    saved: dict[str, Any] = {}
    paths = {}
    for adapter in content.adapters.values():
        saved[adapter.qualified] = [_nemo_state(adapter.name, state) for state in adapter.states]
        if adapter.paths is not None:
            paths[adapter.qualified] = adapter.paths
    modules = {name: adapter.module for name, adapter in content.adapters.items()}
    config: dict[str, Any] = {
        name: _with_nemo_paths(adapter.config) for name, adapter in content.adapters.items()
    }
    config[GLOBAL_CONFIG] = {**content.global_config, METADATA: {"modules": modules}}
    return {**saved, FILE_CONFIG: OmegaConf.create(config), FILE_PATHS: paths}


def _nemo_state(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    versions = versions_of(state)
    if versions is not None:
        versions = {f"{name}.{path}" if path else name: versions[path] for path in versions}
    return with_versions({f"{name}.{key}": tensor for key, tensor in state.items()}, versions)


def _with_nemo_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nemo_paths(item) for item in value]
    if not isinstance(value, dict):
        return value
    result = {key: _with_nemo_paths(item) for key, item in value.items()}
    if "_target_" in result:
        result["_target_"] = nemo_path(result["_target_"])
    return result


def _from_nemo(saved: Any) -> AdapterFile:
    if not isinstance(saved, dict) or FILE_CONFIG not in saved:
        raise FileError(f"it holds no adapters: {FILE_CONFIG}, their configuration, is missing")
    config = _dict(saved[FILE_CONFIG], FILE_CONFIG)
    global_config = dict(_dict(config.get(GLOBAL_CONFIG, {}), GLOBAL_CONFIG))
    metadata = _dict(global_config.pop(METADATA, {}), METADATA)
    modules = _dict(metadata.get("modules", {}), f"{METADATA}.modules")
    paths = _dict(saved.get(FILE_PATHS, {}), FILE_PATHS)
    adapters: dict[str, SavedAdapter] = {}
    entries = 0
    for qualified, states in saved.items():
        if qualified in (FILE_CONFIG, FILE_PATHS):
            continue
        if not isinstance(qualified, str):
            raise FileError(f"{qualified!r} can't name an adapter")
        module, _, name = qualified.partition(":") if ":" in qualified else ("", "", qualified)
        if name in adapters:
            raise FileError(f"two adapters are named {name!r}")
        # NeMo's configuration may have more adapters than were saved.
        if name not in config or name == GLOBAL_CONFIG:
            raise FileError(f"the configuration lacks adapter {name!r}")
        if content_of(modules.get(name, "")) != module:
            raise FileError(
                f"adapter {name!r} is saved for the module {module!r}, but its configuration names "
                f"{_short.repr(content_of(modules.get(name, '')))}"
            )
        found = []
        for index, state in enumerate(_list(states, f"adapter {name!r}")):
            state = _dict(state, f"state {index} of adapter {name!r}")
            found.append(_state_of(name, state, config))
            entries += 1 + len(state) + len(versions_of(state) or ())
            if entries > _MAX_ENTRIES:
                raise FileError(f"its adapters have more than {_MAX_ENTRIES} tensors and versions")
        adapters[name] = SavedAdapter(name, module, config[name], paths.get(qualified), found)
    for qualified in paths:
        if qualified not in saved:
            raise FileError(f"{FILE_PATHS} has {qualified!r}, which is no adapter of the file")
    return AdapterFile(adapters, global_config)


def _state_of(name: str, state: dict[Any, Any], config: dict[Any, Any]) -> dict[str, Tensor]:
    result = {}
    for key, tensor in state.items():
        owner, dot, parameter = key.partition(".") if isinstance(key, str) else ("", "", "")
        if owner == name and dot:
            result[parameter] = tensor
        elif not dot or owner not in config:
            raise FileError(f"adapter {name!r} has {key!r}, which is none of its parameters")
        # else: NeMo also saves adapters whose parameters' names have this one's in them.
    versions = versions_of(state)
    if versions is not None:
        parts = ((path.partition("."), version) for path, version in versions.items())
        versions = {rest: version for (owner, _, rest), version in parts if owner == name}
    return with_versions(result, versions)


def _dict(value: Any, label: str) -> dict[Any, Any]:
    value = content_of(value)
    if not isinstance(value, dict):
        raise FileError(f"{label}: a dict was expected, got {type(value).__name__}")
    return value
