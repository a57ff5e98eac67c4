"""Writes the Hugging Face format: safetensors shards, index, config.json with a quantization config, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.formats.hf.safetensors_stream import ShardFile, assign_shards
from mptq.formats.hf.tokenizer import copy_tokenizer
from mptq.formats.protocol import Writer
from mptq.model.architectures.config_json import config_fields
from mptq.model.architectures.registry import family_of
from mptq.types import LayerOutput

if TYPE_CHECKING:
    from mptq.formats.hf.layout import HfLayout
    from mptq.formats.protocol import WriterOptions
    from mptq.model.generation import Generation


class HfWriter(Writer):
    """Writes the tensors of `layout`, layer by layer, to files of at most `options.max_shard_bytes`.

    Memory: the tensors of one call to `write`. A shard is opened with its first tensor and closed with its last. `done` are
    the tensors that an earlier run has written. If several processes write, `prepare` creates the files in advance.
    """

    def __init__(self, directory: Path, layout: HfLayout, options: WriterOptions, done: Collection[str] = frozenset()) -> None:
        self.directory, self.layout, self.options = directory, layout, options
        directory.mkdir(parents=True, exist_ok=True)
        shards = assign_shards(layout.specs, options.max_shard_bytes)
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        self._shards = dict(zip(names, shards, strict=True))
        self._file_of = {spec.name: name for name, shard in self._shards.items() for spec in shard}
        self._open: dict[str, ShardFile] = {}
        self._done = done
        self._begun = {name for name, shard in self._shards.items() if any(spec.name in done for spec in shard)}

    def prepare(self) -> None:
        """Creates the files that do not exist yet."""
        for name in self._shards:
            if name not in self._begun:
                ShardFile(self.directory / name, self._shards[name]).close()

    def prepared(self) -> None:
        """Marks all files as created by another process."""
        self._begun = set(self._shards)

    @property
    def complete(self) -> list[Path]:
        """The files that an earlier run completed."""
        return [self.directory / name for name, shard in self._shards.items() if all(spec.name in self._done for spec in shard)]

    def write(self, output: LayerOutput) -> list[Path]:
        """Writes tensors and returns the files that are now complete.

        After the last tensors of a unit, waits until all of it is on disk.
        """
        done = []
        for tensor_name, tensor in output.tensors["hf"].items():
            name = self._file_of[tensor_name]
            if name not in self._open:
                self._open[name] = ShardFile(self.directory / name, self._shards[name], self._done, name in self._begun)
            self._open[name].write(tensor_name, tensor, output.first)
            if self._open[name].complete:
                file = self._open.pop(name)
                file.sync()
                file.close()
                done.append(self.directory / name)
        if output.last:
            for file in self._open.values():
                file.sync()
        return done

    def join(self, _accounts: Mapping[int, None]) -> None:
        """Closes open files once all processes have written their units."""
        self.abort()

    def finish(self) -> list[Path]:
        """Writes the index, the tokenizer files and the configs, and returns all files."""
        assert not self._open, f"{sorted(self._open)} are incomplete"
        written = [self.directory / name for name in self._shards]
        written += copy_tokenizer(self.options.tokenizer, self.directory) if self.options.tokenizer else []
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": self.layout.nbytes}, "weight_map": self._file_of}
            written.append(_write_json(self.directory / "model.safetensors.index.json", index))
        configs = hf_configs(self.layout, self.options.generation)
        return written + [_write_json(self.directory / name, config) for name, config in configs.items()]

    def abort(self) -> None:
        """Closes open files; the caller removes the directory."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def hf_configs(layout: HfLayout, generation: Generation) -> dict[str, dict[str, Any]]:
    """Returns the config files of the output by name; config.json is made with the config class of transformers.

    generation_config.json is included if any generation settings are known.
    """
    import transformers

    model, dialect, contents = layout.model, layout.dialect, layout.contents
    family = family_of(model)
    assert family is not None, "planned without a Hugging Face architecture"
    given = config_fields(model, family) | dict(generation.ids)
    # Older rotary embedding keys are for other readers: transformers would treat them as overrides.
    older = {name: given.pop(name) for name in _OLDER if name in given}
    config = getattr(transformers, family.config_class)(**given)
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    fields |= older | {"torch_dtype": model.dtype}
    quantization = dialect.config(contents)
    if quantization is not None:
        fields["quantization_config"] = quantization
    generation_config = {"generation_config.json": dict(generation.fields)} if generation.fields else {}
    return {"config.json": fields} | generation_config | dialect.files(contents)


_OLDER = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Keys that engines and transformers before version 5 read instead of `rope_parameters`."""


def _write_json(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
