"""A tokenizer of whole words, and datasets of every kind, written by the libraries that define the formats."""

import json

import numpy as np
import pytest

WORDS = 4000
VOCABULARY = WORDS + 3
TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} </s> {% endfor %}"


def make_tokenizer(folder, *, template=None, bos=False, eos=True):
    """Word `wN` is token N + 3; <unk>, <s> and </s> are 0, 1 and 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(WORDS - 2)), "user", "assistant"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """The tokenizer without a chat template."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "words")


@pytest.fixture(scope="session")
def chat(tmp_path_factory):
    """The tokenizer with a chat template."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "chat", template=TEMPLATE)


def text(first, count):
    """`count` words, beginning with word `first`."""
    return " ".join(f"w{number}" for number in range(first, first + count))


def ids(first, count):
    """Their token ids."""
    return list(range(first + 3, first + 3 + count))


ROWS = [{"text": text(20 * row, 10)} for row in range(30)]
"""30 documents of 10 words each; no word is in two documents."""


def write_json_lines(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_indexed(prefix, documents, dtype=np.int32):
    """Writes with Megatron's own builder; a document is a list of parts, each a list of token ids."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for parts in documents:
        for part in parts:
            builder.add_item(torch.tensor(part))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix
