"""Documents, which every dataset reader yields in an order drawn from the seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mptq.errors import DataError

if TYPE_CHECKING:
    import numpy as np

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Document:
    """Text, the messages of a chat, or token ids (integers [n]); `where` is its location, for error messages."""

    content: str | Messages | np.ndarray
    where: str


def _text(text: Any) -> str | None:
    return text if isinstance(text, str) else None


def _messages(messages: Any) -> Messages | None:
    """Returns the messages without null keys (fill values of table columns), or None if they are not messages."""
    if not isinstance(messages, list) or not messages:
        return None
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        return None
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _completed(prompt: Any, completion: Any) -> str | Messages | None:
    """Joins a prompt and its completion, both strings or both lists of messages; None for anything else."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    before, after = _messages(prompt), _messages(completion)
    return before + after if before and after else None


FORMS: dict[tuple[str, ...], tuple[Callable[..., str | Messages | None], str]] = {
    ("text",): (_text, "a string"),
    ("messages",): (_messages, "a list of messages, each with a role"),
    ("prompt", "completion"): (_completed, "two strings or two lists of messages"),
}
"""Columns of a row that form a document, in order of preference -> function that makes it, and the expected values."""

COLUMNS = tuple(column for columns in FORMS for column in columns)
EXPECTED = "text, messages, or prompt and completion"


def from_row(row: Any, where: str) -> Document:
    """Returns the document in a row of a table or a JSON Lines file; an empty one if its columns are null.

    Raises DataError for a row without the columns, or with values of another type.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: the row is not a JSON object with {EXPECTED}")
    for columns, (make, expected) in FORMS.items():
        if all(row.get(column) is not None for column in columns):
            content = make(*(row[column] for column in columns))
            if content is None:
                raise DataError(f"{where}: {' and '.join(columns)} must be {expected}")
            return Document(content, where)
    if any(all(column in row for column in columns) for columns in FORMS):
        return Document("", where)
    raise DataError(f"{where}: the row has no {EXPECTED}, only {', '.join(map(str, row)) or 'nothing'}")


def usable_columns(columns: Iterable[str], where: str) -> list[str]:
    """Returns the columns of a table that form documents; raises DataError if there are none."""
    columns = list(columns)
    for form in FORMS:
        if set(form) <= set(columns):
            return [column for column in columns if column in COLUMNS]
    raise DataError(f"{where} has no columns {EXPECTED}: it has {', '.join(columns) or 'none'}")


def shuffled(count: int, bits: np.random.PCG64) -> Iterator[int]:
    """Yields 0 to `count` - 1 in random order by Fisher-Yates; time and memory grow only with the numbers taken.

    It draws raw bits, whose stream numpy keeps stable between versions, unlike that of `Generator.permutation`.
    """
    moved: dict[int, int] = {}
    for index in range(count):
        other = index + int(bits.random_raw()) % (count - index)
        here = moved.pop(index, index)
        if other == index:
            yield here
        else:
            yield moved.get(other, other)
            moved[other] = here


def one_line(error: BaseException) -> str:
    """Returns the message of an exception, in one line of at most 300 characters."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 300 else f"{message[:297]}..."
