"""The run configs beside the weights, read as plain data: YAML of Megatron-Bridge and of NeMo 2. No torch.

Both spell Python objects as mappings with `_target_`; nothing is imported or called. Bridge's `run_config.yaml` has the
sections `model`, `tokenizer` and more (megatron/bridge/training/config.py); NeMo's `context/model.yaml` is the model alone,
its tokenizer inside (nemo/lightning/io/mixin.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mptq.checkpoint.locate import Location
from mptq.errors import CheckpointError

_LARGEST = 16 << 20  # bytes; run configs have 50 kB
_DEEPEST = 100
_PYTHON = "tag:yaml.org,2002:python/"
# What PyYAML's constructors raise for a scalar that is not of its tag's form, beside YAMLError.
_DAMAGE = (yaml.YAMLError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which takes nodes of tags it does not know for the data that they hold."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.YAMLError("it nests too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """No merge keys: no writer of run configs has them, and nested ones grow beyond all memory."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("it has merge keys (<<)")

    def inert(self, node: yaml.Node) -> Any:
        """The data of a node; of Python's tags, which name an object, `_target_` with that name."""
        kind, _, name = node.tag.removeprefix(_PYTHON).partition(":") if node.tag.startswith(_PYTHON) else ("", "", "")
        target = {"_target_": name} if kind and name else {}
        if isinstance(node, yaml.MappingNode):
            return target | self.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return target or self.construct_sequence(node, deep=True)
        return target or (self.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else None)


_Loader.add_constructor(None, _Loader.inert)


def load_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file, as plain data; raises CheckpointError when it is no such file."""
    try:
        with file.open("rb") as opened:
            text = opened.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise CheckpointError(f"{file} has more than {_LARGEST} bytes: that is no run config")
        document = yaml.load(text, _Loader)  # noqa: S506 (a subclass of the safe loader)
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file} is not a readable YAML file ({reason}): copy it again, or remove it") from error
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise CheckpointError(f"{file} is not a run config: it must be a mapping of names")
    return document


def run_config(location: Location) -> tuple[dict[str, Any], str]:
    """The run config of a checkpoint, with `model` and `tokenizer`, and where it was found; empty where there is none."""
    if location.config is None:
        return {}, "no run config"
    document = load_yaml(location.config)
    if location.framework == "NeMo 2":
        document = {"model": document, "tokenizer": _nemo_tokenizer(document, location.config.parent)}
        return document, f"{location.config.parent.name}/{location.config.name}"
    saved = location.directory / "tokenizer"
    if saved.is_dir():
        document["tokenizer"] = _mapping(document.get("tokenizer")) | {"tokenizer_model": str(saved)}
    return document, location.config.name


def _nemo_tokenizer(model: Mapping[str, Any], context: Path) -> dict[str, Any]:
    """What NeMo says of its tokenizer, in Megatron's words; its files lie in the context."""
    described = _mapping(model.get("tokenizer"))
    named = described.get("pretrained_model_name") or described.get("model_path")
    for name in ("nemo_tokenizer", named):
        if isinstance(name, str) and (context / name).exists():
            named = str(context / name)
            break
    kind = str(described.get("_target_", "")).rpartition(".")[2]
    return {key: value for key, value in (("tokenizer_model", named), ("tokenizer_type", kind)) if value}


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
