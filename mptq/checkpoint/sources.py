"""Reads the YAML run configs that Megatron-Bridge and NeMo 2 save with the weights, as plain data. No torch.

Both write Python objects as mappings with `_target_`; nothing is imported or called. Bridge's `run_config.yaml` has the
sections `model`, `tokenizer` and more (megatron/bridge/training/config.py); NeMo's `context/model.yaml` has the model
only, including its tokenizer (nemo/lightning/io/mixin.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mptq.checkpoint.locate import Location
from mptq.errors import CheckpointError

_LARGEST = 16 << 20  # size limit in bytes; run configs have about 50 kB
_DEEPEST = 100
_PYTHON = "tag:yaml.org,2002:python/"
# Besides YAMLError, what PyYAML's constructors raise for a scalar that does not have the form of its tag.
_DAMAGE = (yaml.YAMLError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that nodes with unknown tags become the data that they hold."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.YAMLError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Rejects merge keys: no run config has them, and nested ones grow exponentially."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("it has merge keys (<<)")

    def inert(self, node: yaml.Node) -> Any:
        """Returns the data of a node, with the name of an object in a Python tag as `_target_`."""
        kind, _, name = node.tag.removeprefix(_PYTHON).partition(":") if node.tag.startswith(_PYTHON) else ("", "", "")
        target = {"_target_": name} if kind and name else {}
        if isinstance(node, yaml.MappingNode):
            return target | self.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return target or self.construct_sequence(node, deep=True)
        return target or (self.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else None)


_Loader.add_constructor(None, _Loader.inert)


def load_yaml(file: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file as plain data; raises CheckpointError if it is not such a file."""
    try:
        with file.open("rb") as opened:
            text = opened.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise CheckpointError(f"{file} has more than {_LARGEST} bytes: too large for a run config")
        document = yaml.load(text, _Loader)  # noqa: S506 (a subclass of the safe loader)
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file} is not a readable YAML file ({reason}): copy it again or remove it") from error
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise CheckpointError(f"{file} is not a run config: it must be a mapping with string keys")
    return document


def run_config(location: Location) -> tuple[dict[str, Any], str]:
    """Returns the run config of a checkpoint, with `model` and `tokenizer`, and its source; empty if there is none."""
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
    """Returns NeMo's tokenizer settings under Megatron's names; the tokenizer files are in the context directory."""
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
