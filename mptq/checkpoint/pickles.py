"""Read pickles without executing anything from them, and without torch.

A pickle is a program that may call any importable function. Here every global except a few plain containers becomes a
subclass of `Inert`: a record of the name, the arguments and the state that the pickle gave it. Nothing is imported.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from functools import cache
from typing import Any

from mptq.errors import CheckpointError

_CONTAINERS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "complex"): complex,
}


class Inert:
    """Stands for an object of a class that is not imported; `global_name` is that class, as in `torch.Size`."""

    global_name = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **_kwargs: Any) -> Inert:
        """Record the arguments; nothing else happens."""
        self = object.__new__(cls)
        self.args = args
        return self

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, _item: Any) -> None:
        """Ignore the items of a list subclass."""

    def extend(self, _items: Any) -> None:
        """Ignore the items of a list subclass."""

    def add(self, _item: Any) -> None:
        """Ignore the items of a set subclass."""

    def __setitem__(self, _key: Any, _value: Any) -> None:
        """Ignore the items of a dict subclass."""

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.args))
        return f"{self.global_name}({shown})"


@cache
def _inert_class(module: str, name: str) -> type[Inert]:
    return type(name, (Inert,), {"global_name": f"{module}.{name}"})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _CONTAINERS.get((module, name)) or _inert_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """Tensor storages are named here and never read."""
        return _inert_class("torch", "Storage")(pid)


def load_pickle(data: bytes, where: str) -> Any:
    """The object that the pickle `data` describes, with every unknown class inert.

    Raises CheckpointError naming `where` when `data` is not a whole pickle.
    """
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{where} is not a readable pickle ({error}): the checkpoint is damaged") from error


def load_torch_zip(data: bytes, where: str) -> Any:
    """The object in a file that `torch.save` wrote, given as bytes; its tensors stay inert.

    Raises CheckpointError naming `where` when `data` is no such file.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            member = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            return load_pickle(archive.read(member), where)
    except (zipfile.BadZipFile, StopIteration) as error:
        raise CheckpointError(f"{where} was not written by torch.save (torch 1.6 or later)") from error
