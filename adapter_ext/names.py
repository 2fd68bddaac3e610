"""What an adapter can be called."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

GLOBAL_CONFIG = "global_cfg"
"""Among the adapters' configurations the key of the settings of all."""

METADATA = "adapter_meta_cfg"
"""In there the key of what is known of where adapters are."""

FILE_CONFIG = "__cfg__"
"""In adapter files of NeMo's format the key of the configurations."""

FILE_PATHS = "__module_paths__"
"""In adapter files of NeMo's format the key of the modules' paths."""

# nn.ModuleDict refuses a key that is one of its own attributes.
_RESERVED = frozenset((GLOBAL_CONFIG, FILE_CONFIG, FILE_PATHS, *dir(nn.ModuleDict())))


def check_adapter_name(name: object, taken: Iterable[str] = ()) -> None:
    """Checks that an adapter can have a name.

    Args:
        name: the name, without a module's.
        taken: the names that there are already.

    Raises:
        ValueError: if name is no non-empty printable str, has ``.``, ``+`` or ``:`` in it, is
            reserved (``global_cfg``, attributes of ``nn.ModuleDict``, keys of adapter files), or is
            taken, but for the case of letters, which files on some systems do not tell apart.
    """
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(f"an adapter's name must be a non-empty printable str, got {name!r}")
    if any(character in name for character in ".+:"):
        raise ValueError(f"an adapter's name can't have '.', '+' or ':' in it, got {name!r}")
    if name in _RESERVED:
        raise ValueError(f"an adapter can't be named {name!r}, which is reserved")
    taken = list(taken)
    if name in taken:
        raise ValueError(f"an adapter named {name!r} exists already; there are {taken}")
    for other in taken:
        if other.casefold() == name.casefold():
            raise ValueError(f"the adapters' names {other!r} and {name!r} differ by case only")
