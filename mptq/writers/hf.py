"""The Hugging Face form: safetensors shards, their index, config.json with the quantization config, the tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.types import LayerOutput, TensorSpec
from mptq.writers.safetensors_stream import ShardFile, assign_shards

if TYPE_CHECKING:
    from mptq.arch.config import ModelConfig
    from mptq.writers.dialects import Contents, Dialect

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""What transformers' tokenizers save; copied as they are."""


class HfWriter:
    """Writes the tensors of `specs`, which come layer by layer, in files of at most `max_shard_bytes`.

    Memory: the tensors of one call to `write`; a shard is opened with its first tensor and closed with its last.
    """

    format = "hf"

    def __init__(self, directory: Path, specs: Sequence[TensorSpec], max_shard_bytes: int) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        shards = assign_shards(specs, max_shard_bytes)
        self.total_bytes = sum(spec.nbytes for spec in specs)
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        self._shards = dict(zip(names, shards, strict=True))
        self._file_of = {spec.name: name for name, shard in self._shards.items() for spec in shard}
        self._open: dict[str, ShardFile] = {}

    def write(self, output: LayerOutput) -> list[Path]:
        """Write a layer's tensors; return the files that are complete now."""
        done = []
        for tensor_name, tensor in output.tensors[self.format].items():
            name = self._file_of[tensor_name]
            if name not in self._open:
                self._open[name] = ShardFile(self.directory / name, self._shards[name])
            self._open[name].write(tensor_name, tensor)
            if self._open[name].complete:
                self._open.pop(name).close()
                done.append(self.directory / name)
        return done

    def finish(self, configs: Mapping[str, dict[str, Any]], tokenizer: Path | None) -> list[Path]:
        """Write the index, the tokenizer's files and the `configs`, by file name; return them."""
        assert not self._open, f"{sorted(self._open)} are incomplete"
        written = copy_tokenizer(tokenizer, self.directory) if tokenizer else []
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self._file_of}
            written.append(_write_json(self.directory / "model.safetensors.index.json", index))
        return written + [_write_json(self.directory / name, config) for name, config in configs.items()]

    def abort(self) -> None:
        """Close what is open; the directory is the caller's to remove."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def hf_configs(model: ModelConfig, dialect: Dialect, contents: Contents) -> dict[str, dict[str, Any]]:
    """config.json of the output, made by transformers' own config class, and the dialect's own files, by name."""
    import transformers

    family = model.family
    config = getattr(transformers, family.config_class)(
        architectures=[family.architecture],
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
        # transformers before 5, and engines, read the older name.
        rope_theta=model.rotary_base,
        tie_word_embeddings=model.tied_embeddings,
        dtype=model.dtype,
        bos_token_id=None,
        eos_token_id=None,
        **{name: getattr(model, size) for name, size in family.sizes.items()},
        **family.constants,
    )
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    fields["torch_dtype"] = model.dtype
    fields["quantization_config"] = dialect.config(contents)
    return {"config.json": fields} | dialect.files(contents)


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer files in a directory."""
    return [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]


def copy_tokenizer(source: Path, target: Path) -> list[Path]:
    """Copy the tokenizer's files, and generation_config.json where there is one; return the copies."""
    generation = source / "generation_config.json"
    files = tokenizer_files(source) + ([generation] if generation.is_file() else [])
    return [Path(shutil.copyfile(file, target / file.name)) for file in files]


def _write_json(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
