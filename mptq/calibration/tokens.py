"""Calibration data: token sequences from datasets, and a record of exactly what was used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.calibration.datasets.options import DataOptions
from mptq.calibration.datasets.sources import Dataset, find_sources, unseen_source
from mptq.calibration.tokenizer import encode, load_tokenizer, tokenizer_directory
from mptq.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from mptq.calibration.datasets.corpus import Supply


@dataclass(frozen=True)
class TokenData:
    """Token ids of each sequence, int64 [length]; `account` records them for reports (plain values, no paths).

    `held_out` are of the datasets that calibrate, and `unseen` of a kind of text that never does.
    """

    calibration: tuple[np.ndarray, ...]
    held_out: tuple[np.ndarray, ...]
    unseen: tuple[np.ndarray, ...]
    account: dict[str, Any]


LEAST = {"calib_size": 1, "eval_size": 0, "unseen_size": 0, "seq_length": 2, "seed": 0}
"""Minimum of each numeric option."""


def needs_tokenizer(options: DataOptions) -> bool:
    """Whether any dataset is not tokenized yet; raises DataError for a name that is not a dataset."""
    return any(not source.kind.tokenized for source in find_sources(options.datasets))


def check_datasets(options: DataOptions) -> None:
    """Raises DataError with every problem, in one line, that can be found without reading the datasets."""
    problems = [
        f"{name} must be at least {least}, not {getattr(options, name)}"
        for name, least in LEAST.items()
        if (getattr(options, name) or 0) < least
    ]
    try:
        find_sources(options.datasets)
    except DataError as error:
        problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))


def load_tokens(options: DataOptions, tokenizer: Path | str | None, vocab_size: int, calibrate: bool) -> TokenData:
    """Returns held-out sequences and, if `calibrate`, calibration sequences; reads no more documents than they need.

    Data that calibrates is not the only kind that a model will see: with a tokenizer there are `unseen` sequences too.

    `tokenizer` is the directory of the model's tokenizer, or a file in it. The documents of each dataset are shuffled
    with the seed, and the held-out sequences are taken first, so they do not depend on `calib_size` or `calibrate`. The
    rest of a held-out document, and copies of it, are not used to calibrate; a dataset of a single document is split
    between sequences. The number of sequences of each dataset is proportional to its weight. Packed documents end with
    the tokenizer's EOS if it has one (chats and tokenized datasets are used as they are), and begin with BOS only if
    the tokenizer adds it by default.

    Raises DataError for problems that check_datasets finds, a missing or unreadable tokenizer or dataset, a row without
    a document, token ids outside `vocab_size`, and too little data.
    """
    check_datasets(options)
    from mptq.calibration.datasets.corpus import describe, interleave, shares

    sources = find_sources(options.datasets)
    weights = [source.weight for source in sources]
    supplies = _supplies(sources, options, tokenizer)
    wanted = shares(options.eval_size, weights), shares(options.calib_size if calibrate else 0, weights)
    held = [supply.take(count, hold_out=True) for supply, count in zip(supplies, wanted[0], strict=True)]
    used = [supply.take(count, hold_out=False) for supply, count in zip(supplies, wanted[1], strict=True)]
    rows = []
    for index, source in enumerate(sources):
        asked = wanted[0][index], wanted[1][index]
        supply = supplies[index]
        _check_enough(source, (len(held[index]), len(used[index])), asked, options, supply)
        _check_vocabulary(source, held[index] + used[index], tokenizer, vocab_size)
        about = {"name": source.name, "kind": source.kind.name, "weight": source.weight}
        about |= {"documents": supply.documents, "empty": supply.empty, "copies": supply.copies}
        rows.append(about | describe(held[index] + used[index]))
    calibration, held_out = interleave(used), interleave(held)
    unseen = _unseen(options, options.unseen(calibrate), tokenizer, vocab_size) if tokenizer else ()
    account = {
        "datasets": rows,
        "default_data": not options.datasets,
        "tokenizer": tokenizer_directory(tokenizer).name if tokenizer and needs_tokenizer(options) else None,
        "seed": options.seed,
        "packed": options.packed,
        "seq_length": options.seq_length,
        "calibration": describe(calibration),
        "held_out": describe(held_out),
        "unseen": describe(unseen) | {"name": unseen_source().name} if unseen else None,
    }
    return TokenData(calibration, held_out, unseen, account)


def _unseen(options: DataOptions, count: int, tokenizer: Path | str, vocab_size: int) -> tuple[np.ndarray, ...]:
    """Returns `count` sequences, or as many as there are, of the kind of text that never calibrates."""
    if not count:
        return ()
    source = unseen_source()
    (supply,) = _supplies([source], options, tokenizer)
    found = supply.take(count, hold_out=True)
    if found:
        _check_vocabulary(source, found, tokenizer, vocab_size)
    return tuple(found)


def _supplies(sources: Sequence[Dataset], options: DataOptions, tokenizer: Path | str | None) -> list[Supply]:
    """Returns a supply of sequences for each dataset, without reading any document yet."""
    from mptq.calibration.datasets.corpus import Supply

    loaded = None
    raw = [source.path for source in sources if not source.kind.tokenized]
    if raw:
        if tokenizer is None:
            raise DataError(f"no tokenizer for dataset {raw[0]!r}: pass the directory of the model's tokenizer")
        loaded = load_tokenizer(tokenizer, options.trust_remote_code)
    apart: set[bytes] = set()
    return [Supply(_encoded(source, options, loaded), options.seq_length, options.packed, apart) for source in sources]


def _encoded(source: Dataset, options: DataOptions, tokenizer: Any) -> Iterator[np.ndarray]:
    """Yields the documents of a dataset as token ids, int64 [n] each, shuffled with the seed."""
    import numpy as np

    for document in source.kind.read(source.path, options, np.random.PCG64(options.seed)):
        yield encode(document, tokenizer, options.packed)


def _check_enough(
    source: Dataset, there: tuple[int, int], asked: tuple[int, int], options: DataOptions, supply: Supply
) -> None:
    if there != asked:
        kind = f"of {options.seq_length} tokens" if options.packed else "(one document each)"
        counts = {"empty documents": supply.empty, "copies of held-out documents": supply.copies}
        left_out = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
        name = f"dataset {source.path!r}"
        more = "add datasets"
        if source.kind.name == "default":
            name, kind, more = "mptq's default data", f"{kind} of the kind {source.path!r}", "pass --calib-dataset"
        raise DataError(
            f"{name} has {sum(there)} usable sequences {kind}{left_out and ', not counting '}{left_out}, but "
            f"{sum(asked)} are needed "
            f"({asked[0]} held out, {asked[1]} to calibrate): {more}, or use fewer or shorter sequences"
        )


def _check_vocabulary(source: Dataset, sequences: Sequence[np.ndarray], tokenizer: Path | str | None, vocab_size: int) -> None:
    """Raises DataError for a token id for which the model has no embedding."""
    ends = [end for ids in sequences for end in (int(ids.min()), int(ids.max()))]
    strange = next((end for end in ends if not 0 <= end < vocab_size), None)
    if strange is None:
        return
    wrong = f"token id {strange}, but the model's vocabulary size is {vocab_size}"
    if source.kind.tokenized:
        raise DataError(f"dataset {source.path!r} has {wrong}: it was tokenized with another tokenizer")
    raise DataError(f"tokenizer {tokenizer} produces {wrong} (dataset {source.path!r}): it belongs to another model")
