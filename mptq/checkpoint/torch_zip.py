"""Reads the zip archives that `torch.save` writes, on their own or inside shards, with all bounds checked.

Format: caffe2/serialize/inline_container.cc in torch writes uncompressed members, each with its CRC-32. The standard
library parses the zip structures. A member's bytes are always within its record.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from isal import isal_zlib

from mptq.checkpoint.pickles import load_pickle
from mptq.errors import CheckpointError

_DIRECTORY = 16 << 20  # size limit in bytes for the central directory: 200,000 members
_LOCAL = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
_DAMAGE = (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError, EOFError, KeyError, OSError)


class StorageRecord(NamedTuple):
    """One `torch.save` file: `length` bytes at `offset` of `file`, a path relative to the checkpoint directory."""

    file: str
    offset: int
    length: int


class Member(NamedTuple):
    """`size` bytes at `offset` of the file that holds the archive, and their CRC-32 (0 if the writer omitted it)."""

    offset: int
    size: int
    crc: int


class _Window(io.RawIOBase):
    """A file object for a part of a file; nothing outside that part can be read."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length = descriptor, offset, length
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if not 0 <= base + offset <= self._length:
            raise ValueError("an offset is outside the record")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = self._length - self._position
        size = left if size is None or size < 0 else min(size, left)
        if size > _DIRECTORY:
            raise ValueError(f"the zip directory is too large ({size} bytes)")
        found = os.pread(self._descriptor, size, self._offset + self._position)
        self._position += len(found)
        return found


@dataclass(frozen=True, slots=True)
class Archive:
    """An open `torch.save` file, with its members by name (without the common top-level folder)."""

    descriptor: int
    where: str
    members: Mapping[str, Member]

    def read(self, name: str, most: int) -> bytes:
        """Returns the bytes of a member; raises CheckpointError if it is missing, over `most` bytes, or damaged."""
        member = self.members.get(name)
        if member is None:
            raise CheckpointError(f"{self.where} was not written by torch.save (torch 1.6 or later): it has no {name}")
        if member.size > most:
            raise CheckpointError(f"{self.where}: {name} of {member.size} bytes is too large: the checkpoint is damaged")
        data = os.pread(self.descriptor, member.size, member.offset)
        require_crc(isal_zlib.crc32(data), member, f"{self.where}: {name}")
        return data


def require_crc(found: int, member: Member, where: str) -> None:
    """Raises CheckpointError if `found` is not the CRC-32 of `member`; passes if it has none (torch can omit it)."""
    if member.crc and found != member.crc:
        raise CheckpointError(f"{where} has changed since it was written (CRC-32): copy the checkpoint again")


@contextmanager
def open_record(file: Path, where: str, offset: int = 0, length: int | None = None) -> Iterator[Archive]:
    """Opens the `torch.save` file in the `length` bytes at `offset` of `file`, by default the whole file.

    Raises CheckpointError naming `where` unless these bytes are a zip archive of uncompressed members.
    """
    with file.open("rb", buffering=0) as opened:
        descriptor = opened.fileno()
        end = os.fstat(descriptor).st_size
        length = end if length is None else length
        if offset + length > end:
            raise CheckpointError(f"{where} is truncated: {file} has {end} bytes; copy it again")
        yield Archive(descriptor, where, _members(descriptor, offset, length, where))


def _members(descriptor: int, offset: int, length: int, where: str) -> dict[str, Member]:
    try:
        with zipfile.ZipFile(_Window(descriptor, offset, length)) as archive:
            return {
                info.filename.partition("/")[2]: _member(descriptor, offset, archive.start_dir, info)
                for info in archive.infolist()
            }
    except _DAMAGE as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{where} was not written by torch.save (torch 1.6 or later), or is damaged: {reason}") from error


def _member(descriptor: int, offset: int, directory: int, info: zipfile.ZipInfo) -> Member:
    """Returns the place of a member's bytes, which are after its local header and before the central directory."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise ValueError("a member is compressed or encrypted, which torch never does")
    if not 0 <= info.header_offset <= directory - _LOCAL.size:
        raise ValueError("a member is outside the record")
    signature, name, extra = _LOCAL.unpack(os.pread(descriptor, _LOCAL.size, offset + info.header_offset))
    start = info.header_offset + _LOCAL.size + name + extra
    if signature != b"PK\3\4" or start + info.file_size > directory:
        raise ValueError("a member is outside the record")
    return Member(offset + start, info.file_size, info.CRC)


def load_torch_file(file: Path, where: str, record: StorageRecord | None = None, names: set[str] | None = None) -> Any:
    """Returns the object in a `torch.save` file, or in a record of a shard; its tensors and classes stay inert.

    Raises CheckpointError naming `where` if it is not such a file or is damaged. Memory: that of its pickle. Adds the
    globals that it refers to to `names`.
    """
    offset, length = (record.offset, record.length) if record else (0, None)
    with open_record(file, where, offset, length) as archive:
        return load_pickle(archive.read("data.pkl", 1 << 30), where, names=names)
