"""Checks the opcodes of a pickle before it is loaded: only harmless ones are accepted.

The C unpickler trusts some operands: a memo index of 2 ** 31 makes it fill 32 GB, the length of a bytearray is
allocated before it is read, and an extension code fetches any registered object. So only the opcodes are accepted that
protocols 2 to 5 use for plain data and objects (see Lib/pickletools.py in Python), with operands that the size of the
file allows.
"""

from __future__ import annotations

import re
from collections.abc import Callable


class OpcodeError(ValueError):
    """The bytes are not a pickle of plain data and objects."""


def _counted(opcode: bytes, lengths: range) -> bytes:
    """Returns a pattern for an opcode whose operand is a length byte followed by that many bytes."""
    return opcode + b"(?:" + b"|".join(re.escape(bytes([length])) + rb".{%d}" % length for length in lengths) + b")"


_BARE = rb"[\x94)}\]\x81bueteRNQ\x85\x86\x87(\x88\x89a\x93s01\x90\x91\x92]"
_OPERANDS = (
    rb"j....",  # LONG_BINGET
    rb"[hKq].",  # BINGET, BININT1, BINPUT
    rb"M..",  # BININT2
    rb"J....",  # BININT
    _counted(rb"\x8a", range(18)),  # LONG1, of up to 128 bits and a sign, as in the state of numpy's PCG64
    _counted(rb"\x8c", range(256)),  # SHORT_BINUNICODE
    rb"\x95.{8}",  # FRAME
    rb"G.{8}",  # BINFLOAT
    rb"c[^\n]{0,255}\n[^\n]{0,255}\n",  # GLOBAL
)
# This regular expression scans 160 MB/s; the rare opcodes are handled in Python.
_RUN = re.compile(rb"(?:%s*+(?:%s))*+%s*+" % (_BARE, b"|".join(_OPERANDS), _BARE), re.DOTALL)
_BYTES_A_SET = 16


def check(data: bytes | bytearray) -> None:
    """Checks the opcodes of `data` up to its STOP; raises OpcodeError. Memory: negligible."""
    position = sets = 0
    while True:
        run = _RUN.match(data, position)
        position = run.end() if run else position
        opcode = bytes(data[position : position + 1])
        if opcode == b".":
            return
        step = _RARE.get(opcode)
        if step is None:
            raise OpcodeError(f"unsupported opcode {opcode!r} at byte {position}" if opcode else "it is truncated")
        sets += opcode == b"\x8f"
        if sets * _BYTES_A_SET > len(data) + 1024:
            raise OpcodeError("it creates more sets than it can fill")  # an empty set takes 216 bytes
        position = step(data, position + 1)


def _sized(width: int) -> Callable[[bytes | bytearray, int], int]:
    """Skips an operand that is a length of `width` bytes followed by that many bytes."""

    def skip(data: bytes | bytearray, position: int) -> int:
        end = position + width + int.from_bytes(data[position : position + width], "little")
        if end > len(data):
            raise OpcodeError("it is truncated")
        return end

    return skip


def _put(data: bytes | bytearray, position: int) -> int:
    """Skips a memo index. Picklers count from 0, so no index exceeds the number of bytes before it."""
    if int.from_bytes(data[position : position + 4], "little") > position:
        raise OpcodeError(f"memo index out of range at byte {position}")
    return position + 4


def _fixed(width: int) -> Callable[[bytes | bytearray, int], int]:
    return lambda _data, position: position + width


_RARE: dict[bytes, Callable[[bytes | bytearray, int], int]] = {
    b"\x80": _fixed(1),  # PROTO
    b"r": _put,  # LONG_BINPUT
    b"\x8f": _fixed(0),  # EMPTY_SET
    b"U": _sized(1),  # SHORT_BINSTRING
    b"C": _sized(1),  # SHORT_BINBYTES
    b"X": _sized(4),  # BINUNICODE
    b"T": _sized(4),  # BINSTRING
    b"B": _sized(4),  # BINBYTES
    b"\x8d": _sized(8),  # BINUNICODE8
    b"\x8e": _sized(8),  # BINBYTES8
}
