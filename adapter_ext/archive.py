"""Archives of whole models, as NeMo's ``.nemo``: a tar of ``model_config.yaml`` and weights."""

from __future__ import annotations

import gzip
import inspect
import io
import itertools
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, BinaryIO, cast

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from torch import Tensor

from adapter_ext.files import atomic_write
from adapter_ext.torch_file import (
    FileError,
    check_dense,
    read_torch_file,
    reading,
    versions_of,
    with_versions,
    write_torch_file,
)

_CONFIG = "model_config.yaml"
_WEIGHTS = "model_weights.ckpt"
_MAX_CONFIG_BYTES = 16 * 2**20
_MAX_MEMBERS = 10_000
_MAX_DEPTH = 64
# A node of YAML takes about a kilobyte while it is read.
_MAX_NODES = 100_000
# Weights can hardly be compressed; what grows more than this is a bomb.
_MAX_EXPANSION = 20
_GZIP = b"\x1f\x8b"
# ${key}, ${.key}, ${a.b[0]}: another part of the same configuration.
_REFERENCE = re.compile(r"\$\{[\w.\[\]-]*\}")


def write_archive(
    path: str | os.PathLike[str], config: dict[str, Any], state: Mapping[str, Tensor]
) -> None:
    """Writes a model's archive, whole or not at all; see :func:`adapter_ext.files.atomic_write`.

    Args:
        path: the file.
        config: the model's configuration, of plain values; references (``${a.b}``) stay as they
            are.
        state: the model's state dict; the versions of its modules are written as well.

    Raises:
        FileError: if config or state has something that :func:`read_archive` would refuse.
        OSError: if the file can't be written.
    """
    try:
        text = OmegaConf.to_yaml(OmegaConf.create(config)).encode()
        _parse_config(text)
        state = _check_state(state)
    except Exception as error:
        raise FileError(f"{os.fspath(path)} can't be written: {error}") from error
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
        _add(archive, _CONFIG, io.BytesIO(text))
        # In the same folder: there must be room for it anyway.
        folder = os.path.dirname(os.path.realpath(path))
        with tempfile.TemporaryFile(dir=folder) as weights:
            write_torch_file(_changed(state, _as_stored), weights)
            weights.seek(0)
            try:
                read_torch_file(cast(BinaryIO, weights), values=False)
            except FileError as error:
                raise FileError(f"{os.fspath(path)} can't be written: {error}") from error
            _add(archive, _WEIGHTS, weights)


def read_archive(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a model's archive, one of NeMo's included; nothing is extracted, imported or run.

    Args:
        path: the file, a tar or a gzipped tar.

    Returns:
        The configuration, of plain values with references left unresolved, and the state dict,
        with the versions of its modules if the file has them.

    Raises:
        FileError: if the file is of another kind, truncated or corrupted, or holds anything that
            has no place in an archive, or interpolations other than references.
        OSError: if the file can't be read.
    """
    with reading(path) as file:
        compressed = file.read(2) == _GZIP
        file.seek(0)
        members = _gzipped_members(file) if compressed else _members(file)
        config = _parse_config(members[_CONFIG].read(_MAX_CONFIG_BYTES + 1))
        return config, _check_state(read_torch_file(members[_WEIGHTS]))


def _add(archive: tarfile.TarFile, name: str, content: IO[bytes]) -> None:
    member = tarfile.TarInfo(f"./{name}")
    member.size = content.seek(0, os.SEEK_END)
    content.seek(0)
    archive.addfile(member, content)


def _as_stored(tensor: Tensor) -> Tensor:
    """A tensor as files have it: of as many values as its shape says, none computed when read."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    expanded = tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes()
    return tensor.contiguous() if expanded else tensor


def _changed(state: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    tensors = {key: change(tensor) for key, tensor in state.items()}
    return with_versions(tensors, versions_of(state))


def _check_state(state: Any) -> dict[str, Tensor]:
    """The state dict, with no other metadata than versions."""
    if not isinstance(state, Mapping):
        raise FileError(f"{_WEIGHTS} holds no state dict but an object of type {type(state)}")
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise FileError(f"{_WEIGHTS} has {key!r}, of type {type(tensor).__name__}: no tensor")
        check_dense(tensor, f"{key!r} in {_WEIGHTS}", complex_too=True)
    return with_versions(state, versions_of(state))


# --- The tar --------------------------------------------------------------------------------------


def _members(file: BinaryIO) -> dict[str, BinaryIO]:
    """The two members that matter, each as a file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=_Clamped(file, size), mode="r:") as archive:
        return _pick(archive, size, lambda content: content)


def _gzipped_members(file: BinaryIO) -> dict[str, BinaryIO]:
    limit = _MAX_CONFIG_BYTES + _MAX_EXPANSION * os.fstat(file.fileno()).st_size
    with gzip.open(file) as unzipped:
        stream = _Bounded(cast(BinaryIO, unzipped), limit)
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            # The stream can't go back to what was not read.
            return _pick(archive, limit, lambda content: io.BytesIO(content.read()))


def _pick(
    archive: tarfile.TarFile, limit: int, take: Callable[[IO[bytes]], IO[bytes]]
) -> dict[str, BinaryIO]:
    found: dict[str, BinaryIO] = {}
    for member in _checked_members(archive, limit):
        name = member.name.removeprefix("./")
        if name in found:
            raise FileError(f"the member {name!r} is there twice")
        if name in (_CONFIG, _WEIGHTS):
            found[name] = cast(BinaryIO, take(cast(IO[bytes], archive.extractfile(member))))
    for name in (_CONFIG, _WEIGHTS):
        if name not in found:
            raise FileError(f"it is no archive of a model: it has no {name}")
    return found


def _checked_members(archive: tarfile.TarFile, limit: int) -> Iterator[tarfile.TarInfo]:
    """The files in the archive; FileError for a member that could only do harm."""
    previous = -1
    for count in itertools.count():
        member = archive.next()
        if member is None:
            return
        name = member.name
        if count >= _MAX_MEMBERS:
            raise FileError(f"it has more than {_MAX_MEMBERS} members")
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or ":" in name[:3]:
            raise FileError(f"the member {name!r} would lie outside of the archive")
        # A negative size would make the next member the previous one, for ever.
        if member.offset <= previous or member.size < 0:
            raise FileError(f"the member {name!r} has an impossible size or position")
        if member.offset_data + member.size > limit:
            raise FileError(f"the member {name!r} claims {member.size} bytes, more than there are")
        previous = member.offset
        if member.isdir():
            continue
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
            raise FileError(f"the member {name!r} is no regular file but a link or the like")
        yield member


class _Clamped(io.RawIOBase):
    """A file for tarfile, which asks for as many bytes as the archive declares."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        rest = max(self._size - self._file.tell(), 0)
        return self._file.read(rest if size < 0 else min(size, rest))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class _Bounded(io.RawIOBase):
    """A stream that fails when more than a limit is read."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream = stream
        self._left = limit

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._left:
            raise FileError("it expands to far more than its size; weights do not")
        data = self._stream.read(size)
        self._left -= len(data)
        return data


# --- The configuration ----------------------------------------------------------------------------


# OmegaConf 2.4 allows for some 300 adapters, to be safe from aliases, which are refused here.
_NO_LIMIT: dict[str, Any] = dict.fromkeys(
    {"max_yaml_expanded_nodes"}.intersection(inspect.signature(OmegaConf.create).parameters)
)


def _parse_config(text: bytes) -> dict[str, Any]:
    if len(text) > _MAX_CONFIG_BYTES:
        raise FileError(f"{_CONFIG} has more than {_MAX_CONFIG_BYTES} bytes")
    _check_yaml(text.decode())
    # OmegaConf's own reader: it takes 1e-5 for a number and a date for a string, and refuses keys
    # that are there twice.
    config = OmegaConf.to_container(OmegaConf.create(text.decode(), **_NO_LIMIT), resolve=False)
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise FileError(f"{_CONFIG} must be a mapping with keys of type str")
    return cast("dict[str, Any]", config)


def _check_yaml(text: str) -> None:
    depth = nodes = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise FileError(f"{_CONFIG} has anchors or aliases, which are not allowed")
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if not isinstance(event, yaml.NodeEvent):
            continue
        nodes += 1
        if nodes > _MAX_NODES:
            raise FileError(f"{_CONFIG} has more than {_MAX_NODES} values")
        if event.tag is not None:
            raise FileError(f"{_CONFIG} has the tag {event.tag!r}; tags are not allowed")
        if depth == 0 and not isinstance(event, yaml.MappingStartEvent):
            raise FileError(f"{_CONFIG} must be a mapping")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                raise FileError(f"{_CONFIG} is nested more than {_MAX_DEPTH} levels deep")
        elif "${" in _REFERENCE.sub("", event.value):
            raise FileError(
                f"{_CONFIG} has {event.value!r}: of interpolations only references to other "
                f"values (${{a.b}}) are allowed in a file"
            )
    if nodes == 0:
        raise FileError(f"{_CONFIG} is empty")
