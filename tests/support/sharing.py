"""What the processes of a test session share: each folder is made once, by the process that needs it first."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock


class Shared:
    """Makes folders below `root`, which all processes (pytest-xdist's workers) use."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder `name`, filled by `make(folder)` if no process has done so; waits while another one does."""
        folder = self.root / name
        done = folder.with_name(f"{folder.name}.done")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not done.exists():
                make(folder)
                done.touch()
        return folder


class Outputs[Key](Mapping[Key, Path]):
    """Output directories by what they were made of; `make(key)` makes or finds one when it is first asked for."""

    def __init__(self, keys: Iterable[Key], make: Callable[[Key], Path]) -> None:
        self._keys, self._make = tuple(keys), make

    def __getitem__(self, key: Key) -> Path:
        if key not in self._keys:
            raise KeyError(key)
        return self._make(key)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
