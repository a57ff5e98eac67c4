"""Reads pickles without executing anything from them, and without torch.

A pickle is a program that may call any importable function. Here every global becomes a subclass of `Inert`, which
records the name, the arguments and the state that the pickle gives it. Nothing is imported. The few globals that are
known to `_Unpickler`, and those that a caller passes, build objects no larger than the bytes that describe them.
"""

from __future__ import annotations

import gc
import io
import pickle
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NoReturn, Self

from mptq.checkpoint.pickle_opcodes import OpcodeError, check
from mptq.errors import CheckpointError

_LARGE = 1 << 20  # bytes; the objects from a larger pickle would slow down the garbage collector
_GLOBALS = 4096  # limit of distinct globals in a pickle; a class takes 1 kB, and checkpoints name dozens
_TUPLES = 10_000  # nesting depth of tuples that can be hashed on the stack of any thread
_NO_TUPLES = bytes(set(range(256)) - set(b"t\x85\x86\x87"))  # all bytes but TUPLE, TUPLE1, TUPLE2 and TUPLE3
_HASH_FRAME = 256  # bytes of stack per level to hash nested tuples: more than twice what is needed
_OF_CHECKPOINTS = (
    # Pickle's own, and plain data of the standard library.
    r"builtins\.(set|frozenset|bytearray|complex|dict|list|tuple|int|float|str|bool|bytes|slice|range|object)",
    r"_codecs\.encode|copyreg\._reconstructor|argparse\.Namespace|types\.SimpleNamespace|signal\.Signals",
    r"(collections|datetime|decimal|enum|fractions|pathlib(\._local)?|uuid)\.[A-Za-z]\w*",
    # NumPy's scalars and arrays, including the states of its generators.
    r"numpy\.(dtype|ndarray)|numpy\.(dtypes|random\._pickle)\.\w+|numpy\._?core\.multiarray\.(scalar|_reconstruct)",
    # torch's dtypes, sizes, devices, storages, layouts, tensors; checkpoint metadata and plans; activation functions.
    r"torch\.(\w*float\w*|\w*int\d\w*|bool|half|double|long|short|complex\d+|Size|device|Tensor|\w*Storage|strided)",
    r"torch\._utils\._rebuild_\w+|torch\.serialization\._get_layout|torch\.storage\.\w+|torch\.nn\.parameter\.\w+",
    r"torch\.distributed\.checkpoint\.[\w.]+|torch\.nn\.functional\.\w+|torch\._C\._nn\.\w+",
    # The frameworks whose settings the arguments contain.
    r"(megatron|transformer_engine|modelopt|nemo)\.[\w.]+",
)
_KNOWN_NAME = re.compile("|".join(_OF_CHECKPOINTS))
_DAMAGE = (
    pickle.UnpicklingError,
    OpcodeError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    MemoryError,
)


class Inert:
    """Stands for an object of a class that is not imported; `global_name` is its full name, such as `torch.Size`.

    It has only two slots, so a pickle cannot set any other attributes.
    """

    __slots__ = ("args", "state")
    global_name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_kwargs: Any) -> Self:
        """Records the arguments and does nothing else."""
        self = object.__new__(cls)
        self.args = args
        self.state = None
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
        # The contents of arguments are not shown: a pickle can make an argument contain itself.
        shown = (repr(arg) if isinstance(arg, str | int | float | None) else "..." for arg in self.args)
        return f"{self.global_name}({', '.join(shown)})"


@lru_cache(_GLOBALS)
def _inert(full: str, name: str) -> type[Inert]:
    """Returns the class that stands for a global. Cached, because a class is a reference cycle that is freed late."""
    return type(name, (Inert,), {"__slots__": (), "global_name": full})


class Call:
    """A function that a pickle may call. It rejects a state, which a pickle can assign to any object on its stack."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Returns the result of the function."""
        return self._function(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("a function has no state")


class _Elements:
    """Checks the lists that sets are built from: each element is used once, so sets do not exceed the pickle."""

    def __init__(self, most: int) -> None:
        self.left = most

    def __call__(self, items: Any) -> list[Any]:
        if type(items) is not list or len(items) > self.left:
            raise pickle.UnpicklingError("a set that is not built from a list of its own")
        self.left -= len(items)
        return items


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes | bytearray, known: Mapping[str, Any]) -> None:
        super().__init__(io.BytesIO(data))
        elements = _Elements(len(data))
        # No function here may refer to the unpickler: the memo would stay alive in a reference cycle.
        self._globals: dict[str, Any] = {
            "collections.OrderedDict": Call(dict[Any, Any]().copy),  # filled by later opcodes
            "builtins.set": Call(lambda items: set(elements(items))),
            "builtins.frozenset": Call(lambda items: frozenset(elements(items))),
            **known,
        }

    def find_class(self, module: str, name: str) -> Any:
        # Protocols up to 2, which torch.save uses, have the Python 2 name of the builtins module.
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        found = self._globals.get(full)
        if found is None:
            if len(self._globals) >= _GLOBALS:
                raise pickle.UnpicklingError(f"more than {_GLOBALS} globals")
            found = self._globals[full] = _inert(full, name)
        return found

    @property
    def names(self) -> Iterable[str]:
        """The globals that the pickle referred to, and the known ones."""
        return self._globals

    def persistent_load(self, pid: Any) -> Any:
        """Returns an inert object for a tensor storage, which is never read here."""
        return self.find_class("torch", "Storage")(pid)


def foreign(names: Iterable[str]) -> list[str]:
    """Returns the globals among `names` that Megatron checkpoints do not need, sorted and escaped for printing."""
    return sorted(ascii(name)[1:-1] for name in names if not _KNOWN_NAME.fullmatch(name))


def load_pickle(
    data: bytes | bytearray, where: str, known: Mapping[str, Any] | None = None, names: set[str] | None = None
) -> Any:
    """Returns the object that the pickle `data` describes. All classes are inert except those in `known`, by full name.

    Raises CheckpointError naming `where` if `data` is not a complete pickle of plain data. Memory: at most 300 bytes
    per byte of `data`. Adds the full names of the globals that it refers to to `names`.
    """
    try:
        check(data)
        with gc_paused(large=len(data) > _LARGE):
            unpickler = _Unpickler(data, known or {})
            loaded = _with_stack_for(data, unpickler.load)
        if names is not None:
            names.update(unpickler.names)
        return loaded
    except _DAMAGE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{where} is not a readable pickle ({reason}): the checkpoint is damaged") from error


@contextmanager
def gc_paused(large: bool = True) -> Iterator[None]:
    """Disables garbage collection while an index is built: there is no garbage, and the search is slow.

    Objects that the host application froze stay frozen, and a collector that it disabled stays disabled.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if large and not gc.get_freeze_count():  # slow: counts the objects one by one
                # Moves all objects to the oldest generation; otherwise the next collection would traverse them at once.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _with_stack_for(data: bytes | bytearray, load: Callable[[], Any]) -> Any:
    """Runs `load` with enough stack to hash the deepest tuple that `data` can describe.

    CPython hashes nested tuples by unguarded recursion in C: a dict key of 100 kB of TUPLE1 would crash the process.
    """
    most = len(data.translate(None, _NO_TUPLES))
    if most <= _TUPLES:
        return load()
    result: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(load())
        except (*_DAMAGE, CheckpointError) as error:
            failure.append(error)

    before = threading.stack_size((most * _HASH_FRAME + (1 << 20)) // 4096 * 4096)
    try:
        thread = threading.Thread(target=run)
        thread.start()
    except RuntimeError as error:
        raise MemoryError("its tuples may be nested too deeply for the available memory") from error
    finally:
        threading.stack_size(before)
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
