"""Documents as token ids, through the model's own tokenizer."""

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
"""What transformers raises for files that are missing or malformed, for code of its own, and for packages it lacks."""


def tokenizer_directory(source: Path | str) -> Path:
    """The directory of a tokenizer, given itself or a file inside of it; raises DataError when there is none."""
    path = Path(source)
    if not path.exists():
        raise DataError(f"tokenizer {path} does not exist: name a directory with tokenizer.json or tokenizer.model")
    return (path if path.is_dir() else path.parent).resolve()


def generation_config(directory: Path) -> list[GenerationSource]:
    """The generation_config.json beside a tokenizer, if there is one; raises DataError where it is not a JSON object."""
    file = directory / "generation_config.json"
    return [GenerationSource(str(file), _json(file), whole=True)] if file.is_file() else []


def special_ids(directory: Path) -> GenerationSource:
    """The ids of the special tokens that a tokenizer's files name, read as JSON: no transformers.

    Raises DataError for a file that is not a JSON object. Source: transformers' tokenization_utils_base.py, for the names and
    `added_tokens_decoder`; the tokenizer.json of `tokenizers`, for `added_tokens` and the vocabulary.
    """
    config = _json(directory / "tokenizer_config.json")
    told = _json(directory / "special_tokens_map.json") | {key: value for key, value in config.items() if value is not None}
    wanted = {key: _content(told.get(key.removesuffix("_id"))) for key in IDS}
    wanted = {key: token for key, token in wanted.items() if token is not None}
    found: dict[str, Any] = {}
    for vocabulary in _vocabularies(directory, config):
        found |= {key: vocabulary[token] for key, token in wanted.items() if key not in found and token in vocabulary}
        if len(found) == len(wanted):
            break
    return GenerationSource(f"the tokenizer {directory}", found)


def _vocabularies(directory: Path, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Token -> id in the files of a tokenizer, the small ones first."""
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
    if isinstance(vocabulary, list):  # of Unigram: pairs of piece and score
        yield {str(pair[0]): number for number, pair in enumerate(vocabulary) if isinstance(pair, list) and pair}
    yield vocabulary if isinstance(vocabulary, dict) else {}
    yield _json(directory / "vocab.json")


def _content(token: Any) -> str | None:
    """The text of a token, which may be an object with its properties."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _json(file: Path) -> dict[str, Any]:
    """The object in a tokenizer's file; empty where there is no such file."""
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
    """The transformers tokenizer in a local directory, of which a file may be named instead. Uses no network.

    Raises DataError when it is not there, cannot be read, or runs code of its own without `trust_remote_code`.
    """
    directory = tokenizer_directory(source)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        # For a file that it cannot read, `tokenizers` raises Exception itself, of no class of its own.
        if type(error) is not Exception and not isinstance(error, _UNREADABLE):
            raise
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise DataError(
                f"tokenizer {directory} needs Python code that is in its directory: pass --trust-remote-code if you trust it"
            ) from error
        raise DataError(f"tokenizer {directory} cannot be loaded: {one_line(error)}") from error


def encode(document: Document, tokenizer: Any, ended: bool) -> np.ndarray:
    """Token ids of a document, int64 [n]; none for blank text.

    Text gets the special tokens that the tokenizer adds by default (its BOS before every document, if it has that
    habit) and, when `ended`, its EOS, unless it added that itself. A chat is what the chat template makes of it, and token
    ids are left as they are.
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
        raise DataError(f"{where} is a chat, and the tokenizer has no chat template: name a dataset with text instead")
    try:
        ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(f"{where}: the tokenizer's chat template does not take these messages: {one_line(error)}") from error
    return ids
