"""Read pickles without executing anything from them, and without torch.

A pickle is a program that may call any importable function. Here every global becomes a subclass of `Inert`: a record of
the name, the arguments and the state that the pickle gave it. Nothing is imported. What is made of the few globals in
`_PLAIN`, and of those that a caller names, cannot hold or cost more than the bytes that describe it.
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

_LARGE = 1 << 20  # bytes of a pickle of which so much is made that the garbage collector would notice
_GLOBALS = 4096  # distinct ones in a pickle; a class takes 1 kB, and checkpoints name dozens
_TUPLES = 10_000  # nested tuples whose hash fits any thread's stack
_NO_TUPLES = bytes(set(range(256)) - set(b"t\x85\x86\x87"))  # what is not TUPLE, TUPLE1, TUPLE2 or TUPLE3
_HASH_FRAME = 256  # bytes of stack for the hash of a tuple inside of another: more than twice what it takes
_OF_CHECKPOINTS = (
    # Pickle's own, and plain data of the standard library.
    r"builtins\.(set|frozenset|bytearray|complex|dict|list|tuple|int|float|str|bool|bytes|slice|range|object)",
    r"_codecs\.encode|copyreg\._reconstructor|argparse\.Namespace|types\.SimpleNamespace|signal\.Signals",
    r"(collections|datetime|decimal|enum|fractions|pathlib(\._local)?|uuid)\.[A-Za-z]\w*",
    # NumPy's scalars and arrays, the states of its generators among them.
    r"numpy\.(dtype|ndarray)|numpy\.(dtypes|random\._pickle)\.\w+|numpy\._?core\.multiarray\.(scalar|_reconstruct)",
    # torch's dtypes, sizes, devices, storages, layouts, tensors; its checkpoints' metadata and plans; activation functions.
    r"torch\.(\w*float\w*|\w*int\d\w*|bool|half|double|long|short|complex\d+|Size|device|Tensor|\w*Storage|strided)",
    r"torch\._utils\._rebuild_\w+|torch\.serialization\._get_layout|torch\.storage\.\w+|torch\.nn\.parameter\.\w+",
    r"torch\.distributed\.checkpoint\.[\w.]+|torch\.nn\.functional\.\w+|torch\._C\._nn\.\w+",
    # The frameworks whose settings the arguments are.
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
    """Stands for an object of a class that is not imported; `global_name` is that class, as in `torch.Size`.

    It has two slots and no more, so that a pickle cannot give it attributes of other names.
    """

    __slots__ = ("args", "state")
    global_name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_kwargs: Any) -> Self:
        """Record the arguments; nothing else happens."""
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
        # What is inside of an argument is not shown: a pickle can make it contain itself.
        shown = (repr(arg) if isinstance(arg, str | int | float | None) else "..." for arg in self.args)
        return f"{self.global_name}({', '.join(shown)})"


@lru_cache(_GLOBALS)
def _inert(full: str, name: str) -> type[Inert]:
    """The class that stands for a global: one for the pickles of all tensors, because a class is a cycle, and stays a while."""
    return type(name, (Inert,), {"__slots__": (), "global_name": full})


class Call:
    """A function that a pickle may call. A pickle may also give any object on its stack a state: this one takes none."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """What the function makes of the arguments."""
        return self._function(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("a function has no state")


class _Elements:
    """The lists that sets are made of: every element has been written once, so copies of them are no more than the bytes."""

    def __init__(self, most: int) -> None:
        self.left = most

    def __call__(self, items: Any) -> list[Any]:
        if type(items) is not list or len(items) > self.left:
            raise pickle.UnpicklingError("a set of something else than a list of its own")
        self.left -= len(items)
        return items


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes | bytearray, known: Mapping[str, Any]) -> None:
        super().__init__(io.BytesIO(data))
        elements = _Elements(len(data))
        # No function here refers to the unpickler: in a cycle, its memo would outlive it.
        self._globals: dict[str, Any] = {
            "collections.OrderedDict": Call(dict[Any, Any]().copy),  # its items follow
            "builtins.set": Call(lambda items: set(elements(items))),
            "builtins.frozenset": Call(lambda items: frozenset(elements(items))),
            **known,
        }

    def find_class(self, module: str, name: str) -> Any:
        # The protocols up to 2, torch.save's among them, call the builtins what Python 2 did.
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        found = self._globals.get(full)
        if found is None:
            if len(self._globals) >= _GLOBALS:
                raise pickle.UnpicklingError(f"more than {_GLOBALS} globals")
            found = self._globals[full] = _inert(full, name)
        return found

    @property
    def names(self) -> Iterable[str]:
        """The globals that were referred to, and those that are known."""
        return self._globals

    def persistent_load(self, pid: Any) -> Any:
        """Tensor storages are named here and never read."""
        return self.find_class("torch", "Storage")(pid)


def foreign(names: Iterable[str]) -> list[str]:
    """Those of the globals `names` that checkpoints of Megatron have no use for, sorted, each printable."""
    return sorted(ascii(name)[1:-1] for name in names if not _KNOWN_NAME.fullmatch(name))


def load_pickle(
    data: bytes | bytearray, where: str, known: Mapping[str, Any] | None = None, names: set[str] | None = None
) -> Any:
    """The object that the pickle `data` describes, with every class inert but those in `known`, by their full names.

    Raises CheckpointError naming `where` when `data` is not a whole pickle of plain data. Memory: at most 300 bytes for
    each byte of `data`. The full names of the globals that it refers to are added to `names`.
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
    """Nothing becomes garbage while an index is made, and looking for it takes longer than making it.

    What a host has frozen stays frozen, and a collector that it has disabled stays disabled.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if large and not gc.get_freeze_count():  # which counts them one by one
                # To the oldest generation with all of it, and back into use: else the next collection goes through it at once.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _with_stack_for(data: bytes | bytearray, load: Callable[[], Any]) -> Any:
    """Run `load` where hashing the deepest tuple that `data` can spell does not overflow the stack.

    CPython hashes nested tuples by recursion in C, unguarded: a dict's key of 100 kB of TUPLE1 would end the process.
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
        raise MemoryError("it may nest tuples deeper than there is memory") from error
    finally:
        threading.stack_size(before)
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
