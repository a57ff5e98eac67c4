"""The steps of a run on the disk: what each unit's outputs become, and the journal that says which of them are there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mptq.distributed import Ranks
from mptq.errors import OutputError, StoppedError
from mptq.output.background_writer import BackgroundWriter
from mptq.output.disk import sync, sync_folders, sync_tree
from mptq.output.journal import NAME, SCHEMA, Journal, committed, read
from mptq.output.manifest import FileHashes
from mptq.pipeline.options import differences

if TYPE_CHECKING:
    from mptq.calibration.hidden_state_pair import HiddenStatePair
    from mptq.output.journal import Row
    from mptq.plan.plan import Plan
    from mptq.report.run_log import RunLog
    from mptq.types import LayerOutput


class Writer(Protocol):
    """What stores one format: `HfWriter` and `MegatronWriter`."""

    format: str

    @property
    def complete(self) -> list[Path]:
        """The files that an earlier run has completed."""

    def prepare(self) -> None:
        """Make the files that several processes write."""

    def prepared(self) -> None:
        """They are made."""

    def write(self, output: LayerOutput) -> list[Path]:
        """Write tensors; the last of a unit's waits until they are on the disk. Returns the files that are complete now."""

    def account(self) -> Any:
        """What the journal must know of the unit that was written last, as plain data."""

    def join(self, accounts: Mapping[int, Any]) -> None:
        """All units are written, with these accounts, by whatever process."""

    def abort(self) -> None:
        """Let go of open files."""


STATE = ".activations-after-{}"
"""Both streams of activations after a unit, by its number modulo 2: the one before is there until the journal has the next."""


@contextmanager
def _telling(where: Path) -> Iterator[None]:
    """Say where it was that the disk was full, or failed."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{error.filename or where} cannot be written: {error.strerror or error}") from error


class Committer:
    """Writes what is made, behind what is being made, and commits each unit when all of it is on the disk.

    A unit's row in the journal is what the report and the metadata need of it. Activations are kept rather than computed again:
    a layer's forward passes take minutes, and its hidden states seconds to write. Memory: the output that is being written.
    """

    def __init__(self, plan: Plan, folder: Path, record: RunLog, ranks: Ranks) -> None:
        self.plan, self.folder, self.record, self.ranks = plan, folder, record, ranks
        self.writers: Sequence[Writer] = ()
        self.activations: HiddenStatePair | None = None
        self._together = Ranks()
        self._reported = 0
        self._behind = BackgroundWriter()
        self._hashes = FileHashes(folder)
        self._journal: Journal | None = None

    def begin(self, header: Mapping[str, Any], writers: Callable[[Mapping[int, Row]], Sequence[Writer]]) -> Collection[int]:
        """Go on where an earlier run was stopped, if there was one of this `header`; return the units that are done.

        `writers` are made from the rows of these.
        """
        rows: dict[int, Row] = self.ranks.agree(lambda: self._taken_over(header))
        self._journal = Journal(self.folder, header, self.ranks.rank)
        self.writers = writers(rows)
        if self.ranks.size > 1:
            self.ranks.agree(self._prepare)
            for writer in self.writers:
                writer.prepared()
        else:
            for writer in self.writers:
                self._hashes.add(writer.complete)
        return rows

    def _prepare(self) -> None:
        for writer in self.writers:
            writer.prepare()
        sync_tree(self.folder)  # what this process has made: the others sync what they write

    def _taken_over(self, header: Mapping[str, Any]) -> dict[int, Row]:
        begun = read(self.folder / NAME)[0]
        other = differences(begun, {"schema": SCHEMA, **header}) if begun else []
        if other:
            raise OutputError(
                f"{self.folder} was begun with another {' and '.join(other)}: go on with the same, or pass --overwrite "
                "instead of --resume to begin again"
            )
        return committed(self.folder)

    def follow(self, activations: HiddenStatePair, done: Collection[int]) -> None:
        """Keep these with every unit from now on; those of an earlier run are taken up where the last unit left them."""
        self.activations, self._together = activations, self.ranks
        layers = self.plan.model.num_layers
        through = [unit for unit in done if unit <= layers]
        if through and layers + 1 not in done:
            activations.load(self._state(max(through)))

    def write(self, output: LayerOutput, mine: bool = True) -> None:
        """Write an output behind; with a unit's last, commit it, unless it is another rank's."""
        work: Callable[[], None] = partial(self._write, output)
        if output.last:
            row = self._row(output.index)
            self._keep(output.index)
            if not mine:
                return
            work = partial(self._commit, output, row)
        with self.record.timed("waiting to write"):
            self._behind.do(work)

    def _keep(self, unit: int) -> None:
        """Keep the activations after a unit, where there are any: what each rank has, before any goes on."""
        if self.activations is None or unit > self.plan.model.num_layers:
            return
        self._behind.wait()
        self._together.wait()  # the unit before is committed
        state = self._state(unit)
        with self.record.timed("keep activations"), _telling(state):
            self.activations.save(state)
            sync(state)
            sync(self.folder)
        self._together.wait()

    def _state(self, unit: int) -> Path:
        return self.folder / STATE.format(unit % 2)

    def _row(self, unit: int) -> Row:
        rows = self.record.rows[self._reported :]
        self._reported += len(rows)
        layers = [row for row in self.record.layers if row["layer"] == unit - 1]
        return {"rank": self.ranks.rank, "tensors": rows, "layers": layers, "fidelity": self.record.fidelity}

    def _write(self, output: LayerOutput) -> None:
        with self.record.timed("write"), _telling(self.folder):
            self.record.bytes["write"] += output.nbytes
            # Each format at the same time: none waits for another's arithmetic or disk. All end before an error is raised.
            with ThreadPoolExecutor(len(self.writers), "format") as pool:
                for files in pool.map(lambda writer: writer.write(output), self.writers):
                    self._hashes.add(files)

    def _commit(self, output: LayerOutput, row: Row) -> None:
        assert self._journal is not None
        self._write(output)
        with self.record.timed("write"), _telling(self.folder):
            sync_folders(self.folder)  # the journal's own name among those of new files
            self._journal.commit(output.index, row | {"accounts": {writer.format: writer.account() for writer in self.writers}})

    def stop_if(self, asked: Callable[[], bool], unit: int) -> None:
        """Raise StoppedError after `unit`, with everything committed that was made, if it is asked for.

        Ranks that go through the layers together stop together, whichever is asked.
        """
        together = self._together if unit <= self.plan.model.num_layers + 1 else Ranks()
        if any(together.gather(asked())):
            self._behind.wait()
            together.wait()
            raise StoppedError(f"stopped after {len(committed(self.folder))} of {self.plan.outputs} steps")

    def wait(self) -> None:
        """Until everything that was given to write is on the disk."""
        self._behind.wait()

    def finish(self, finish: Callable[[Writer], Iterable[Path]]) -> dict[str, Any]:
        """Let each writer write what belongs to the whole, on rank 0; return size and hash of every file."""
        self.ranks.wait()
        if not self.ranks.first:
            return {}
        rows = committed(self.folder)
        self._report(rows)
        with self.record.timed("finish"), _telling(self.folder):
            for writer in self.writers:
                writer.join({unit: row["accounts"][writer.format] for unit, row in rows.items()})
                self._hashes.add(finish(writer))
            for file in self.folder.glob(STATE.partition("-")[0] + "-*"):
                file.unlink()
            return self._hashes.collect()

    def _report(self, rows: Mapping[int, Row]) -> None:
        """Make the record that of all units, in their order, whatever process made them."""
        record = self.record
        record.rows[:] = [entry for row in rows.values() for entry in row["tensors"]]
        record.layers[:] = [entry for row in rows.values() for entry in row["layers"]]
        for unit, row in rows.items():
            record.fidelity = row["fidelity"] or record.fidelity
            share = record.ranks.setdefault(row["rank"], {"rank": row["rank"], "units": 0, "bytes": 0})
            share["units"] += 1
            share["bytes"] += self.plan.weights[unit]

    def close(self) -> None:
        """Finish what is being written, and let go of files and threads."""
        self._behind.close()
        for writer in self.writers:
            writer.abort()
        self._hashes.close()
        if self._journal is not None:
            self._journal.close()
