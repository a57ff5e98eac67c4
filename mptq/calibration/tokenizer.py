"""Encodes documents as token ids with the model's own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.calibration.datasets.documents import Document, Messages, one_line
from mptq.errors import DataError
from mptq.model.generation import IDS, GenerationSource

if TYPE_CHECKING:
    import numpy as np


_UNREADABLE = (OSError, ValueError, TypeError, AttributeError, LookupError, ImportError)
"""What transformers raises for missing or malformed files, for tokenizers with custom code, and missing packages."""


def tokenizer_directory(source: Path | str) -> Path:
    """Returns a tokenizer's directory, given the directory or a file in it; raises DataError if it does not exist."""
    path = Path(source)
    if not path.exists():
        raise DataError(f"tokenizer {path} does not exist: pass a directory with tokenizer.json or tokenizer.model")
    return (path if path.is_dir() else path.parent).resolve()


def generation_config(directory: Path) -> list[GenerationSource]:
    """Returns the generation_config.json next to a tokenizer, if any; raises DataError if it is not a JSON object."""
    file = directory / "generation_config.json"
    return [GenerationSource(str(file), _json(file), whole=True)] if file.is_file() else []


def special_ids(directory: Path) -> GenerationSource:
    """Returns the ids of the special tokens that a tokenizer's files name, read as JSON, without transformers.

    Raises DataError for a file that is not a JSON object. Sources: transformers' tokenization_utils_base.py for the
    names and `added_tokens_decoder`, the tokenizer.json of `tokenizers` for `added_tokens` and the vocabulary.
    """
    config = _json(directory / "tokenizer_config.json")
    tokens = _json(directory / "special_tokens_map.json") | {key: value for key, value in config.items() if value is not None}
    wanted = {key: _content(tokens.get(key.removesuffix("_id"))) for key in IDS}
    wanted = {key: token for key, token in wanted.items() if token is not None}
    found: dict[str, Any] = {}
    for vocabulary in _vocabularies(directory, config):
        found |= {key: vocabulary[token] for key, token in wanted.items() if key not in found and token in vocabulary}
        if len(found) == len(wanted):
            break
    return GenerationSource(f"the tokenizer {directory}", found)


def _vocabularies(directory: Path, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the mappings from token to id in the files of a tokenizer, the small ones first."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        yield {content: int(number) for number, token in decoder.items() if (content := _content(token)) and number.isdecimal()}
    yield _json(directory / "added_tokens.json")
    whole = _json(directory / "tokenizer.json")
    added = whole.get("added_tokens")
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    yield {content: entry.get("id") for entry in entries if (content := _content(entry))}
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: pairs of piece and score
        yield {str(pair[0]): number for number, pair in enumerate(vocabulary) if isinstance(pair, list) and pair}
    yield vocabulary if isinstance(vocabulary, dict) else {}
    yield _json(directory / "vocab.json")


def _content(token: Any) -> str | None:
    """Returns the text of a token, given as a string or as an object with properties; None if there is none."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _json(file: Path) -> dict[str, Any]:
    """Reads the JSON object in a tokenizer's file; empty if there is no such file."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON ({one_line(error)}): copy the tokenizer again") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} is not a JSON object: copy the tokenizer again")
    return content


def load_tokenizer(source: Path | str, trust_remote_code: bool = False) -> Any:
    """Loads the transformers tokenizer in a local directory, given the directory or a file in it. Uses no network.

    Raises DataError if it does not exist, cannot be loaded, or needs its own code and `trust_remote_code` is not set.
    """
    directory = tokenizer_directory(source)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        # For a file that it cannot read, `tokenizers` raises Exception itself rather than a subclass.
        if type(error) is not Exception and not isinstance(error, _UNREADABLE):
            raise
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise DataError(
                f"tokenizer {directory} needs the Python code in its directory: pass --trust-remote-code if you trust it"
            ) from error
        raise DataError(f"tokenizer {directory} cannot be loaded: {one_line(error)}") from error


def encode(document: Document, tokenizer: Any, ended: bool) -> np.ndarray:
    """Returns the token ids of a document, int64 [n]; none for blank text.

    Text gets the special tokens that the tokenizer adds by default (often BOS) and, if `ended`, EOS unless the
    tokenizer has added it already. A chat is rendered with the chat template, and token ids are left as they are.
    Raises DataError for a chat if there is no chat template, or if it rejects the messages.
    """
    import numpy as np

    content = document.content
    if isinstance(content, np.ndarray):
        return content.astype(np.int64)
    if isinstance(content, list):
        return np.array(_encode_chat(content, document.where, tokenizer), np.int64)
    if not content.strip():
        return np.zeros(0, np.int64)
    ids = tokenizer(content, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    if ended and end is not None and ids[-1:] != [end]:
        ids = [*ids, end]
    return np.array(ids, np.int64)


def _encode_chat(messages: Messages, where: str, tokenizer: Any) -> list[int]:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise DataError(f"{where} is a chat, but the tokenizer has no chat template: use a dataset of plain text")
    try:
        ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(f"{where}: the tokenizer's chat template rejects these messages: {one_line(error)}") from error
    return ids
