"""The BOS, EOS and PAD token ids for Hugging Face's config.json and generation_config.json. No torch.

Without `eos_token_id`, transformers and vLLM generate up to the length limit.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class GenerationSource:
    """The generation settings in one file: `fields` has `IDS`, and sampling fields if it is a `whole` config."""

    name: str
    fields: Mapping[str, Any]
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Generation:
    """The `ids` by key (`eos_token_id` may be a list), the `fields` of generation_config.json, and warnings."""

    ids: Mapping[str, int | list[int]]
    fields: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def resolve(sources: Sequence[GenerationSource], vocabulary: int) -> Generation:
    """Resolves the ids, each from the first of `sources` that has one below `vocabulary`.

    One warning lists all problems: values that are not token ids of the model, sources that disagree, and a missing
    `eos_token_id`. The other fields are those of the first whole generation config.
    """
    ids: dict[str, int | list[int]] = {}
    notes: list[str] = []
    for key in IDS:
        found = list(_found(key, sources, vocabulary, notes))
        if not found:
            continue
        (first, kept), *others = found
        ids[key] = kept[0] if len(kept) == 1 else kept
        # A tokenizer has a single EOS token, which may be one of several in another source.
        differing = next(((name, given) for name, given in others if not set(given) <= set(kept)), None)
        if differing is not None:
            notes.append(f"{key}: {first} has {_word(kept)}, {differing[0]} has {_word(differing[1])}: using {first}")
    if "eos_token_id" not in ids:
        notes.append(
            "no eos_token_id is known, so engines generate up to the limit: pass a --tokenizer or --hf-config that has it"
        )
    fields = next((source.fields for source in sources if source.whole), {})
    rest = {key: value for key, value in fields.items() if value is not None and key not in IDS}
    return Generation(ids, rest | ids, (f"token ids: {'; '.join(notes)}",) if notes else ())


def _found(key: str, sources: Sequence[GenerationSource], vocabulary: int, notes: list[str]) -> Iterator[tuple[str, list[int]]]:
    """Yields each source that has valid ids, and adds a note for the others. Some sources write -1 for none."""
    for source in sources:
        value = source.fields.get(key)
        if value in (None, -1, []):
            continue
        given = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in given):
            notes.append(f"{source.name} has {key} {reprlib.repr(value)}, which is not a token id and is ignored")
        elif max(given) >= vocabulary:
            notes.append(f"{source.name} has {key} {_word(given)}, which is ignored: the vocabulary has {vocabulary} tokens")
        else:
            yield source.name, given


def _word(ids: Sequence[int]) -> str:
    return reprlib.repr(ids[0] if len(ids) == 1 else list(ids))
