"""Documents as token ids, through the model's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.calibrate.documents import Document, Messages, one_line
from mptq.errors import DataError

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
