"""Reads what ``torch.save`` wrote as data: nothing that a file names is imported, found or called.

``torch.load(weights_only=True)`` would do for tensors. For OmegaConf's objects, which NeMo puts
into its files, it must be told to trust OmegaConf's classes, in a list that the whole process
shares, and then runs their code on the file's data. Here a pickle is a list of instructions for a
machine that knows tensors and plain containers; OmegaConf's objects stay inert records.
"""

from __future__ import annotations

import errno
import io
import math
import os
import pickletools
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

_MAX_PICKLE_BYTES = 64 * 2**20
# A one-byte instruction can make an object of 64 bytes; a tensor takes some 35 instructions.
_MAX_INSTRUCTIONS = 4_000_000

_STORAGE_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
_DTYPES = frozenset(_STORAGE_DTYPES.values())

_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_DICTS = ("collections.OrderedDict", "collections.defaultdict")
# The attribute that holds the content of each kind of OmegaConf's nodes; None: of no interest.
_NODES = {
    "omegaconf.dictconfig.DictConfig": "_content",
    "omegaconf.listconfig.ListConfig": "_content",
    "omegaconf.base.UnionNode": "_content",
    "omegaconf.nodes.AnyNode": "_val",
    "omegaconf.nodes.StringNode": "_val",
    "omegaconf.nodes.IntegerNode": "_val",
    "omegaconf.nodes.FloatNode": "_val",
    "omegaconf.nodes.BooleanNode": "_val",
    "omegaconf.nodes.EnumNode": "_val",
    "omegaconf.base.ContainerMetadata": None,
    "omegaconf.base.Metadata": None,
}
# OmegaConf notes the types of values: plain ones, annotations, and NeMo's dataclasses.
_PLAIN_TYPES = frozenset(
    f"builtins.{name}"
    for name in (
        "Ellipsis",
        "bool",
        "bytes",
        "dict",
        "float",
        "int",
        "list",
        "object",
        "set",
        "str",
        "tuple",
    )
)
_ANNOTATIONS = frozenset(
    (
        *(f"typing.{name}" for name in ("Any", "Dict", "List", "Optional", "Tuple", "Union")),
        "_operator.getitem",
        "operator.getitem",
    )
)
_PYTHON_2_NAMES = {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str"}
_KNOWN = frozenset(
    (*_STORAGE_DTYPES, _TENSOR, _PARAMETER, *_DICTS, *_NODES, *_PLAIN_TYPES, *_ANNOTATIONS)
)
_CONFIGURATION_PACKAGES = ("nemo.", "adapter_ext.")


class FileError(ValueError):
    """Something is wrong with what a file holds, or with what is to be written to one."""


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file for reading; whatever its content makes fail in the block is a FileError.

    Args:
        path: the file.

    Yields:
        The open file.

    Raises:
        FileError: with path in the message.
        OSError: if the file can't be opened or read.
    """
    with open(path, "rb", opener=_open_without_waiting) as file:
        try:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileError("it is no regular file")
            if status.st_size == 0:
                raise FileError("it is empty")
            yield file
        except FileError as error:
            raise FileError(f"{os.fspath(path)}: {error}") from error
        except MemoryError:
            raise
        except Exception as error:
            # What a system call fails with has a number. A seek to an offset that is read from the
            # file and makes no sense fails with EINVAL, or without a number.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            raise FileError(
                f"{os.fspath(path)}: the file is corrupted or truncated "
                f"({type(error).__name__}: {error})"
            ) from error


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a named pipe would wait for someone to write to it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_torch_file(file: BinaryIO, *, values: bool = True) -> Any:
    """Reads a file in ``torch.save``'s zip format.

    Args:
        file: the file, seekable, at its begin.
        values: whether to read tensors; False makes them meta tensors, for what was written just
            now and only has to be readable.

    Returns:
        Plain containers and CPU tensors; every mapping is a dict, every parameter a tensor that
        requires no grad. See :func:`content_of` for OmegaConf's objects, and :func:`versions_of`
        for what a state dict notes besides its tensors.

    Raises:
        FileError: if the file is of another kind, or holds anything else. Corruption may raise
            other exceptions as well: use :func:`reading`.
    """
    if file.read(4) != b"PK\x03\x04":
        raise FileError(
            "it is no file in the zip format of torch.save (files of torch before 1.6 have to be "
            "saved again, with a newer torch)"
        )
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        return _Machine(archive, _checked_entries(archive, size), values).run()


def content_of(value: Any) -> Any:
    """The content of an OmegaConf node that was read from a file; any other value as it is.

    Interpolations and missing values are strings, as they were written.

    Args:
        value: a part of :func:`read_torch_file`'s result.

    Returns:
        A dict or list whose elements may be nodes again, or a plain value.

    Raises:
        FileError: if the node is incomplete.
    """
    for _ in range(2):  # a UnionNode holds another node; nothing else does
        if isinstance(value, _Node):
            attribute = _NODES[value.kind]
            if attribute is None or attribute not in value.attributes:
                raise FileError(f"an object of type {value.kind} has no content")
            value = value.attributes[attribute]
    return value


def versions_of(state: object) -> dict[str, int | str | None] | None:
    """The versions that a state dict's modules had, by which they upgrade it when they load it.

    Args:
        state: the state dict; whatever else its attribute ``_metadata`` holds is left out.

    Returns:
        By module path the version; None if the state dict says nothing of versions.

    Raises:
        FileError: if they are not as ``torch.nn.Module.state_dict`` notes them.
    """
    metadata = getattr(state, "_metadata", None)
    if metadata is None:
        return None
    if not isinstance(metadata, dict):
        raise FileError(f"_metadata must be a dict, got {type(metadata).__name__}")
    versions = {}
    for path, notes in metadata.items():
        if not isinstance(path, str) or not isinstance(notes, dict):
            raise FileError(
                f"_metadata must have a dict for each module path, got {type(notes).__name__} for "
                f"{path!r}"
            )
        version = notes.get("version")
        if version is not None and type(version) not in (int, str):
            raise FileError(
                f"the version of module {path!r} must be an int or a str, got "
                f"{type(version).__name__}"
            )
        versions[path] = version
    return versions


def with_versions(
    tensors: Mapping[str, Tensor], versions: Mapping[str, int | str | None] | None
) -> dict[str, Tensor]:
    """A state dict as ``torch.nn.Module.state_dict`` makes it; see :func:`versions_of`.

    Args:
        tensors: its tensors.
        versions: by module path the version; None if they are unknown.
    """
    state = OrderedDict(tensors)
    if versions is not None:
        vars(state)["_metadata"] = {path: {"version": versions[path]} for path in versions}
    return state


def write_torch_file(value: Any, file: BinaryIO) -> None:
    """``torch.save``, which hides an error of the file behind one of its own.

    Args:
        value: what to write.
        file: open for writing.

    Raises:
        OSError: if the file can't be written.
    """
    writer = _Writer(file)
    try:
        torch.save(value, cast(BinaryIO, writer))
    except RuntimeError:
        if writer.error is not None:
            raise writer.error from None
        raise


class _Writer(io.RawIOBase):
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def check_dense(tensor: Tensor, label: str, *, complex_too: bool = False) -> None:
    """Checks that a file can hold a tensor: a plain and dense one of a type that can be read.

    Args:
        tensor: the tensor.
        label: what to call it.
        complex_too: whether it may be complex.

    Raises:
        FileError: if it can't.
    """
    if type(tensor.detach()) is not Tensor:
        raise FileError(
            f"{label} is a {type(tensor).__name__}, of which a file can hold nothing; make it a "
            f"plain tensor (full_tensor() of one that processes share)"
        )
    known = tensor.dtype in _DTYPES and (complex_too or not tensor.is_complex())
    if tensor.layout is not torch.strided or tensor.is_meta or not known:
        raise FileError(
            f"{label} must be a dense tensor of a floating, {'complex, ' if complex_too else ''}"
            f"integer or bool type, got {tensor.layout}, {tensor.dtype} on {tensor.device}"
        )


def _checked_entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    entries: dict[str, zipfile.ZipInfo] = {}
    root = archive.infolist()[0].filename.partition("/")[0] if archive.infolist() else ""
    for entry in archive.infolist():
        folder, slash, name = entry.filename.partition("/")
        if not root or folder != root or not slash or ".." in name.split("/"):
            raise FileError(f"the zip entry {entry.filename!r} has no place in such a file")
        if name in entries:
            raise FileError(f"the zip entry {entry.filename!r} is there twice")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise FileError(f"the zip entry {entry.filename!r} is compressed; torch.save's are not")
        entries[name] = entry
    declared = sum(entry.file_size for entry in entries.values())
    if declared > size:
        raise FileError(f"its zip entries claim {declared} bytes, the file has {size}")
    if "data.pkl" not in entries:
        raise FileError("it is a zip file, but not torch.save's: it has no data.pkl")
    if entries["data.pkl"].file_size > _MAX_PICKLE_BYTES:
        raise FileError(
            f"its data.pkl has {entries['data.pkl'].file_size} bytes; the limit is "
            f"{_MAX_PICKLE_BYTES}"
        )
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise FileError("it was written on a big-endian machine, which is not supported")
    return entries


@dataclass(frozen=True)
class _Name:
    """What the file names: a class or function, which nobody looks up."""

    path: str


@dataclass(eq=False)
class _Node:
    """An object of OmegaConf."""

    kind: str
    attributes: dict[Any, Any] = field(default_factory=dict)


class _Opaque:
    """Something that OmegaConf's notes on types may hold, and nothing else may."""


@dataclass(frozen=True)
class _Storage:
    elements: Tensor


class _Machine:
    """Carries out the instructions of a pickle, of those that torch.save and OmegaConf need."""

    def __init__(
        self, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], values: bool
    ) -> None:
        self._archive = archive
        self._entries = entries
        self._values = values
        self._storages: dict[str, _Storage] = {}
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        instructions = pickletools.genops(self._archive.read(self._entries["data.pkl"]))
        for count, (opcode, argument, _) in enumerate(instructions):
            if count >= _MAX_INSTRUCTIONS:
                raise FileError(f"its pickle has more than {_MAX_INSTRUCTIONS} instructions")
            self._execute(opcode.name, argument)
        if len(self._stack) != 1 or self._marked:
            raise FileError("its pickle is incomplete")
        return self._stack[0]

    def _execute(self, instruction: str, argument: Any) -> None:
        stack = self._stack
        match instruction:
            case "PROTO" | "STOP":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(instruction == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(instruction[-1])
                items = tuple(stack[-size:])
                if len(items) != size:
                    raise FileError("its pickle is inconsistent: a tuple lacks elements")
                stack[-size:] = [items]
            case "MARK":
                self._marked.append(stack)
                self._stack = []
            case "TUPLE":
                items = tuple(self._pop_mark())
                self._stack.append(items)
            case "APPEND":
                item = stack.pop()
                _expect(stack[-1], list).append(item)
            case "APPENDS":
                appended = self._pop_mark()
                _expect(self._stack[-1], list).extend(appended)
            case "SETITEM":
                pair = [stack.pop(), stack.pop()][::-1]
                self._set_items(pair)
            case "SETITEMS":
                self._set_items(self._pop_mark())
            case "GLOBAL":
                stack.append(_name(argument))
            case "NEWOBJ":
                arguments = stack.pop()
                stack.append(_new(stack.pop(), arguments))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(self._call(stack.pop(), _expect(arguments, tuple)))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case _:
                raise FileError(f"its pickle has the instruction {instruction}, which is not used")

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marked.pop()
        return items

    def _set_items(self, items: list[Any]) -> None:
        target = _expect(self._stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple of tuples that share their elements would take forever to hash.
            if key is not None and type(key) not in (str, int, float, bool):
                raise FileError(f"a dict has a key of type {type(key).__name__}")
            if key in target:
                raise FileError(f"a dict has the key {key!r} twice")
            target[key] = value

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        path = _expect(function, _Name).path
        if path == _TENSOR:
            return _tensor(*arguments)
        if path == _PARAMETER:
            return _expect(arguments[0], Tensor)
        if path in _DICTS:
            return OrderedDict()
        if path in _ANNOTATIONS or path.startswith(_CONFIGURATION_PACKAGES):
            return _Opaque()
        raise FileError(f"its pickle calls {path}, which has no place in such a file")

    def _storage(self, reference: Any) -> _Storage:
        match reference:
            case ("storage", _Name(path=path), str(key), str(), int(count)):
                pass
            case _:
                raise FileError("its pickle refers to something that is no tensor's storage")
        if path not in _STORAGE_DTYPES:
            raise FileError(f"a tensor has the storage type {path}, which is not supported")
        dtype = _STORAGE_DTYPES[path]
        entry = self._entries.get(f"data/{key}")
        if entry is None:
            raise FileError(f"the values of a tensor, data/{key}, are missing")
        if count * dtype.itemsize != entry.file_size:
            raise FileError(
                f"data/{key} has {entry.file_size} bytes; a tensor claims {count} values of "
                f"{dtype.itemsize} bytes there"
            )
        if key not in self._storages:
            self._storages[key] = _Storage(self._read_storage(entry, dtype))
        if self._storages[key].elements.dtype != dtype:
            raise FileError(f"data/{key} is used as values of two types")
        return self._storages[key]

    def _read_storage(self, entry: zipfile.ZipInfo, dtype: torch.dtype) -> Tensor:
        if entry.file_size == 0 or not self._values:
            count = entry.file_size // dtype.itemsize
            return torch.empty(count, dtype=dtype, device="cpu" if self._values else "meta")
        values = bytearray(entry.file_size)
        target = memoryview(values)
        with cast(io.BufferedIOBase, self._archive.open(entry)) as file:
            while target:
                done = file.readinto(target[: 16 * 2**20])
                if not done:
                    raise FileError(f"{entry.filename} is truncated")
                target = target[done:]
        return torch.frombuffer(values, dtype=dtype)


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise FileError(
            f"its pickle is inconsistent: {kind.__name__} expected, got {type(value).__name__}"
        )
    return value


def _name(argument: str) -> _Name:
    module, _, name = argument.partition(" ")
    path = f"{'builtins' if module == '__builtin__' else module}.{name}"
    path = _PYTHON_2_NAMES.get(path, path)
    # Every storage type is named here, so that an unsupported one is called that.
    is_storage = module == "torch" and name.endswith("Storage")
    if path not in _KNOWN and not is_storage and not path.startswith(_CONFIGURATION_PACKAGES):
        raise FileError(
            f"its pickle refers to {path}, which has no place in such a file (a configuration must "
            f"be of plain values)"
        )
    return _Name(path)


def _new(cls: Any, arguments: Any) -> _Node | _Opaque:
    path = _expect(cls, _Name).path
    if path in _NODES and arguments == ():
        return _Node(path)
    if path.startswith(_CONFIGURATION_PACKAGES):
        return _Opaque()
    raise FileError(f"its pickle makes an object of type {path}, which has no place in such a file")


def _build(target: Any, state: Any) -> None:
    if isinstance(target, _Node):
        if target.attributes:
            raise FileError(f"its pickle sets the attributes of one {target.kind} twice")
        target.attributes = _expect(state, dict)
    elif isinstance(target, OrderedDict):
        if isinstance(state, dict) and "_metadata" in state:  # no other attribute is needed
            vars(target)["_metadata"] = state["_metadata"]
    elif not isinstance(target, (dict, _Opaque)):
        raise FileError(f"its pickle sets attributes of {type(target).__name__}")


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    backward_hooks: Any = None,
    metadata: Any = None,
) -> Tensor:
    elements = _expect(storage, _Storage).elements
    numbers = (offset, *_expect(size, tuple), *_expect(stride, tuple))
    if any(type(number) is not int or number < 0 for number in numbers) or metadata:
        raise FileError("a tensor's description is malformed")
    steps = zip(size, stride, strict=True)
    end = offset + sum((length - 1) * step for length, step in steps) + 1 if all(size) else 0
    if max(math.prod(size), end) > elements.numel():
        raise FileError(
            f"a tensor claims the shape {size} at {offset}, but its storage in the file has "
            f"{elements.numel()} values"
        )
    return torch.as_strided(elements, size, stride, offset if all(size) else 0)
