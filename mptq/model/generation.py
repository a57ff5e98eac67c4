"""The ids with which generation begins, ends and pads, as Hugging Face's config.json and generation_config.json have them.

No torch. Without `eos_token_id`, transformers and vLLM generate up to the limit of the length.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class GenerationSource:
    """What one file says: `fields` may have the `IDS`, and those of a whole generation config (sampling) where it is one."""

    name: str
    fields: Mapping[str, Any]
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Generation:
    """What is known: `ids` by their keys (of the end there may be a list), the `fields` of generation_config.json, warnings."""

    ids: Mapping[str, int | list[int]]
    fields: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def resolve(sources: Sequence[GenerationSource], vocabulary: int) -> Generation:
    """The ids, each from the first of `sources` that has one below `vocabulary`, and one warning of all that is wrong.

    Wrong are values that are not ids of the model, sources that disagree, and that nothing says where a text ends. The other
    fields are those of the first whole generation config.
    """
    ids: dict[str, int | list[int]] = {}
    notes: list[str] = []
    for key in IDS:
        found = list(_found(key, sources, vocabulary, notes))
        if not found:
            continue
        (first, kept), *others = found
        ids[key] = kept[0] if len(kept) == 1 else kept
        # A tokenizer has one end, which may be among several.
        differing = next(((name, told) for name, told in others if not set(told) <= set(kept)), None)
        if differing is not None:
            notes.append(f"{key}: {first} says {_word(kept)}, {differing[0]} says {_word(differing[1])}: {first} counts")
    if "eos_token_id" not in ids:
        notes.append(
            "no eos_token_id is known, so engines generate up to the limit: pass a --tokenizer or an --hf-config that says it"
        )
    fields = next((source.fields for source in sources if source.whole), {})
    rest = {key: value for key, value in fields.items() if value is not None and key not in IDS}
    return Generation(ids, rest | ids, (f"token ids: {'; '.join(notes)}",) if notes else ())


def _found(key: str, sources: Sequence[GenerationSource], vocabulary: int, notes: list[str]) -> Iterator[tuple[str, list[int]]]:
    """What each source says, where that is ids of the model; the others are noted. -1 is how some write that there is none."""
    for source in sources:
        value = source.fields.get(key)
        if value in (None, -1, []):
            continue
        told = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in told):
            notes.append(f"{source.name} has {key} {reprlib.repr(value)}, which is not a token id and is ignored")
        elif max(told) >= vocabulary:
            notes.append(f"{source.name} has {key} {_word(told)}, which is ignored: the model's vocabulary is of {vocabulary}")
        else:
            yield source.name, told


def _word(ids: Sequence[int]) -> str:
    return reprlib.repr(ids[0] if len(ids) == 1 else list(ids))
