"""Writes the outputs of units to the disk, and commits each complete unit in the journal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.distributed import Ranks
from mptq.errors import OutputError, StoppedError
from mptq.output.background_writer import BackgroundWriter
from mptq.output.disk import sync, sync_folders, sync_tree
from mptq.output.file_hashes import FileHashes
from mptq.output.journal import NAME, SCHEMA, Journal, committed, read
from mptq.pipeline.options import differences
from mptq.plan.estimates import unit_bytes

if TYPE_CHECKING:
    from mptq.calibration.hidden_state_pair import HiddenStatePair
    from mptq.formats.protocol import Writer
    from mptq.output.journal import Row
    from mptq.plan.plan import Plan
    from mptq.plan.units import Unit
    from mptq.report.run_log import RunLog
    from mptq.types import LayerOutput


STATE = ".activations-after-{}"
"""File of the hidden states after a unit, by its number modulo 2: the previous one stays until the next commit."""


@contextmanager
def _disk_errors(where: Path) -> Iterator[None]:
    """Turns an OSError into an OutputError that names the path."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{error.filename or where} cannot be written: {error.strerror or error}") from error


class Committer:
    """Writes outputs in the background, and commits each unit when all of it is on the disk.

    A unit's row in the journal has what the report and the metadata need of it. Hidden states are saved, because
    computing them again takes minutes per layer, and writing them seconds. Memory: the output that is being written.
    """

    def __init__(self, plan: Plan, folder: Path, log: RunLog, ranks: Ranks) -> None:
        self.plan, self.folder, self.log, self.ranks = plan, folder, log, ranks
        self.writers: Mapping[str, Writer] = {}
        self.activations: HiddenStatePair | None = None
        self._together = Ranks()
        self._reported = 0
        self._behind = BackgroundWriter()
        self._hashes = FileHashes(folder)
        self._journal: Journal | None = None

    def begin(self, header: Mapping[str, Any], writers: Callable[[Mapping[int, Row]], Mapping[str, Writer]]) -> Collection[int]:
        """Resumes an unfinished run with the same `header`, if there is one; returns the units that are done.

        `writers` creates the writers, by format, from the journal rows of these units. Raises OutputError if the
        unfinished run had another header.
        """
        rows: dict[int, Row] = self.ranks.broadcast_object(lambda: self._resumed_rows(header))
        self._journal = Journal(self.folder, header, self.ranks.rank)
        self.writers = writers(rows)
        if self.ranks.size > 1:
            self.ranks.broadcast_object(self._prepare)
            for writer in self.writers.values():
                writer.prepared()
        else:
            for writer in self.writers.values():
                self._hashes.add(writer.complete)
        return rows

    def _prepare(self) -> None:
        for writer in self.writers.values():
            writer.prepare()
        sync_tree(self.folder)  # what this process has created; the others sync what they write

    def _resumed_rows(self, header: Mapping[str, Any]) -> dict[int, Row]:
        begun = read(self.folder / NAME)[0]
        other = differences(begun, {"schema": SCHEMA, **header}) if begun else []
        if other:
            raise OutputError(
                f"unfinished output {self.folder} differs in {' and '.join(other)}: resume with the same options, or pass "
                "--overwrite instead of --resume to start over"
            )
        return committed(self.folder)

    def follow(self, activations: HiddenStatePair, done: Collection[int]) -> None:
        """Saves these hidden states after every unit, and restores those of an earlier run's last unit."""
        self.activations, self._together = activations, self.ranks
        through = [unit for unit in self.plan.units if unit.flows and unit.number in done]
        if through and through[-1].hands_on:
            activations.load(self._state(through[-1]))

    def write(self, output: LayerOutput, mine: bool = True) -> None:
        """Writes an output in the background; the last one of a unit commits it, if it is this rank's (`mine`)."""
        work: Callable[[], None] = partial(self._write, output)
        if output.last:
            unit = self.plan.units[output.index]
            row = self._row(unit)
            self._keep(unit)
            if not mine:
                return
            work = partial(self._commit, output, row)
        with self.log.timed("waiting to write"):
            self._behind.do(work)

    def _keep(self, unit: Unit) -> None:
        """Saves the hidden states after a unit, if there are any. All ranks save theirs before any continues."""
        if self.activations is None or not unit.hands_on:
            return
        self._behind.wait()
        self._together.barrier()  # the previous unit is committed
        state = self._state(unit)
        with self.log.timed("keep activations"), _disk_errors(state):
            self.activations.save(state)
            sync(state)
            sync(self.folder)
        self._together.barrier()

    def _state(self, unit: Unit) -> Path:
        return self.folder / STATE.format(unit.number % 2)

    def _row(self, unit: Unit) -> Row:
        rows = self.log.rows[self._reported :]
        self._reported += len(rows)
        layers = [row for row in self.log.layers if row["layer"] == unit.layer]
        return {"rank": self.ranks.rank, "tensors": rows, "layers": layers, "fidelity": self.log.fidelity}

    def _write(self, output: LayerOutput) -> None:
        with self.log.timed("write"), _disk_errors(self.folder):
            self.log.bytes["write"] += output.nbytes
            # In parallel, so that no format waits for another's computation or disk. All end before an error is raised.
            with ThreadPoolExecutor(len(self.writers), "format") as pool:
                for files in pool.map(lambda writer: writer.write(output), self.writers.values()):
                    self._hashes.add(files)

    def _commit(self, output: LayerOutput, row: Row) -> None:
        assert self._journal is not None
        self._write(output)
        with self.log.timed("write"), _disk_errors(self.folder):
            sync_folders(self.folder)  # directory entries of new files, including the journal
            accounts = {form: writer.account() for form, writer in self.writers.items()}
            self._journal.commit(output.index, row | {"accounts": accounts})

    def stop_if(self, asked: Callable[[], bool], unit: Unit) -> None:
        """Raises StoppedError after `unit`, with all its outputs committed, if a stop was requested.

        Ranks that process the layers together stop together, whichever of them got the request.
        """
        together = self._together if unit.flows else Ranks()
        if any(together.all_gather(asked())):
            self._behind.wait()
            together.barrier()
            raise StoppedError(f"stopped after {len(committed(self.folder))} of {len(self.plan.units)} steps")

    def wait(self) -> None:
        """Waits until everything passed to `write` is on the disk."""
        self._behind.wait()

    def finish(self) -> dict[str, Any]:
        """Writes what belongs to the whole output, on rank 0; returns size and hash of every file (other ranks: {})."""
        self.ranks.barrier()
        if not self.ranks.first:
            return {}
        rows = committed(self.folder)
        self._report(rows)
        with self.log.timed("finish"), _disk_errors(self.folder):
            for form, writer in self.writers.items():
                writer.join({unit: row["accounts"][form] for unit, row in rows.items()})
                self._hashes.add(writer.finish())
            for file in self.folder.glob(STATE.partition("-")[0] + "-*"):
                file.unlink()
            return self._hashes.collect()

    def _report(self, rows: Mapping[int, Row]) -> None:
        """Fills the log with the rows of all units, in order, whichever process wrote them."""
        log, weights = self.log, unit_bytes(self.plan)
        log.rows[:] = [entry for row in rows.values() for entry in row["tensors"]]
        log.layers[:] = [entry for row in rows.values() for entry in row["layers"]]
        for unit, row in rows.items():
            log.fidelity = row["fidelity"] or log.fidelity
            share = log.ranks.setdefault(row["rank"], {"rank": row["rank"], "units": 0, "bytes": 0})
            share["units"] += 1
            share["bytes"] += weights[unit]

    def close(self) -> None:
        """Finishes pending writes, and closes files and threads."""
        self._behind.close()
        for writer in self.writers.values():
            writer.abort()
        self._hashes.close()
        if self._journal is not None:
            self._journal.close()
