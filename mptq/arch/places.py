"""Where a checkpoint has the tensors of a model, and which of its items are no part of the model.

Checkpoints stack layers and experts into one tensor, number experts in the last part of a name, fuse norms into Transformer
Engine's linears and split fused matrices in parts; these are the alternatives of `SPELLINGS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from mptq.arch.config import ModelConfig
from mptq.arch.naming import final_norm, layer_copies, layer_linears, megatron_layer, outer_copies
from mptq.errors import CheckpointError
from mptq.types import TensorSpec


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the checkpoint, or one layer or expert of a stack, that makes up (some rows of) an inner tensor.

    `index` is the place in the leading dimensions of a stack, whose sizes are `stack`; both are empty where there is no stack.
    `spelled` is the inner name as this checkpoint has it: without stacks and prefix.
    """

    key: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    stack: tuple[int, ...] = ()
    spelled: str = ""


_EXPERT = r"experts\.experts\.(\d+)\.(linear_fc[12])\."
SPELLINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"input_layernorm\.(\w+)$", (r"self_attention.linear_qkv.layer_norm_\1",)),
    (r"pre_mlp_layernorm\.(\w+)$", (r"mlp.linear_fc1.layer_norm_\1",)),
    (r"(?<=\d\.)norm\.(\w+)$", (r"mixer.in_proj.layer_norm_\1",)),
    (r"self_attention\.q_layernorm\.(\w+)$", (r"self_attention.linear_q_up_proj.layer_norm_\1",)),
    (r"self_attention\.kv_layernorm\.(\w+)$", (r"self_attention.linear_kv_up_proj.layer_norm_\1",)),
    (r"linear_fc1\.(weight|bias)$", (r"linear_fc1.\1_w", r"linear_fc1.\1_v")),
    (r"mixer\.in_proj\.weight$", tuple(f"mixer.in_proj.weight.{part}" for part in ("z", "x", "B", "C", "dt"))),
    (r"mixer\.conv1d\.(\w+)$", tuple(rf"mixer.conv1d.\1.{part}" for part in ("x", "B", "C"))),
    (r"mixer\.conv1d\.(\w+)$", (r"mixer.conv1d_\1",)),
    (_EXPERT + r"(weight|bias)$", (r"experts.local_experts.\1.\2.\3",)),
    (_EXPERT + r"(weight|bias)$", (r"experts.experts.\2.\3\1",)),
    (_EXPERT + r"(weight|bias)$", (r"experts.\2.\3\1",)),
    # Stacked experts of a model without an inner `experts` module.
    (_EXPERT + r"(weight|bias)$", (r"experts.\1.\2.\3",)),
    (r"experts\.experts\.(\d+)\.linear_fc1\.(weight|bias)$", (r"experts.\1.linear_fc1.\2_w", r"experts.\1.linear_fc1.\2_v")),
)
"""Pattern in an inner name -> what else it can be in a checkpoint: one tensor, or several, by rows."""

DROPPED = {
    "_extra_state": "Transformer Engine's FP8 state, of no meaning outside training",
    "optimizer.": "optimizer state",
    "chained_": "optimizer state",
    "rng_state": "random number generator state",
    "rerun_state": "rerun state machine",
    "opt_param_scheduler": "learning rate scheduler",
    "common_state": "training arguments, read for the architecture",
    "dataloader": "data loader state",
    "rotary_pos_emb.inv_freq": "recomputed from rotary_base",
    "local_tokens_per_expert": "a counter of training",
    "qb_beta": "a counter of training",
}
"""Part of a key -> why it is not in the output."""
MTP = "mtp."
"""What the keys of multi-token prediction layers begin with."""


def locate(tensors: Mapping[str, TensorSpec], config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    """Where each inner tensor of the model is in the checkpoint: inner name -> parts, one above the other by rows.

    Raises CheckpointError for a missing tensor, one of a wrong shape, and one that is not part of the model.
    """
    prefix = _prefix(tensors, config)
    places: dict[str, tuple[Part, ...]] = {}
    for copy in (copy for group in outer_copies(config) for copy in group):
        key = prefix + copy.megatron
        if key not in tensors:
            raise CheckpointError(_missing(copy.megatron, [key]))
        places[copy.megatron] = (Part(key, (), copy.shape, (), copy.megatron),)
    shapes = {kind: _shapes(config, layer) for layer, kind in enumerate(config.kinds)}
    for layer, kind in enumerate(config.kinds):
        for name, sizes in shapes[kind].items():
            inner = megatron_layer(layer) + name
            places[inner] = _place(tensors, prefix, inner, sizes, config)
    places |= _carried(tensors, prefix)
    _check_shapes(tensors, places)
    _check_all_used(tensors, places)
    return places


def _shapes(config: ModelConfig, layer: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shape of each tensor of a layer, and the rows of its parts where checkpoints split it."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for linear in layer_linears(config, layer):
        shapes[f"{linear.megatron}.weight"] = linear.shape, linear.key_rows
    for copy in layer_copies(config, layer):
        shapes[copy.megatron] = copy.shape, copy.key_rows
    return shapes


def carried(places: Mapping[str, tuple[Part, ...]]) -> list[str]:
    """The inner names that only a Megatron output has, as they are: multi-token prediction layers."""
    return [name for name in places if name.startswith(MTP)]


def _carried(tensors: Mapping[str, TensorSpec], prefix: str) -> dict[str, tuple[Part, ...]]:
    found: dict[str, tuple[Part, ...]] = {}
    for key, spec in tensors.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name.startswith(MTP) and _drop_reason(key) is None:
            found[name] = (Part(key, (), spec.shape, (), name),)
    return found


def dropped(keys: Iterable[str]) -> dict[str, str]:
    """The keys that the output leaves out, with the reason."""
    return {key: reason for key in keys if (reason := _drop_reason(key)) is not None}


def _drop_reason(key: str) -> str | None:
    return next((reason for part, reason in DROPPED.items() if part in key), None)


def _prefix(tensors: Mapping[str, TensorSpec], config: ModelConfig) -> str:
    """What stands before `decoder.` in the model's keys: nothing, `model.`, `module.` and the like."""
    anchor = f"{final_norm(config)}.weight"
    found = [key.removesuffix(anchor) for key in tensors if key.endswith(anchor) and _drop_reason(key) is None]
    if len(found) != 1:
        raise CheckpointError(
            f"the checkpoint has {len(found)} tensors named *{anchor}: no language model in it that mptq knows"
        )
    return found[0]


def _place(
    tensors: Mapping[str, TensorSpec],
    prefix: str,
    inner: str,
    sizes: tuple[tuple[int, ...], tuple[int, ...]],
    config: ModelConfig,
) -> tuple[Part, ...]:
    """Where a tensor of a layer is: the first of its spellings, in a key of its own or in stacks, that the checkpoint has.

    `sizes` are its shape, and its rows in each of its parts. Parts are made of the keys that are there only: there are tens
    of thousands of tensors, with several spellings each.
    """
    tried: dict[str, None] = {}
    for names in _spellings(inner):
        for chosen, keys in _stackings(prefix, names):
            if all(key in tensors for key in keys):
                return tuple(_parts(names, keys, chosen, sizes, config))
            tried |= dict.fromkeys(keys)
    raise CheckpointError(_missing(inner, tried))


def _missing(inner: str, tried: Iterable[str]) -> str:
    return f"{inner} is not in the checkpoint (looked for {', '.join(tried)}): the checkpoint is incomplete"


def _stackings(prefix: str, names: tuple[str, ...]) -> Iterator[tuple[tuple[int, ...], tuple[str, ...]]]:
    """The keys of a spelling with each number in them (layer, expert) left there, or taken out, and which are taken out.

    All names of a spelling have their numbers in the same places.
    """
    words = [name.split(".") for name in names]
    numbers = [place for place, word in enumerate(words[0]) if word.isdigit()]
    for chosen in _choices(tuple(numbers)):
        rest = [[word for place, word in enumerate(parts) if place not in chosen] for parts in words] if chosen else words
        yield chosen, tuple(prefix + ".".join(parts) for parts in rest)


@lru_cache(maxsize=64)
def _choices(numbers: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Every selection of places, none first; the last place changes fastest."""
    choices = product((False, True), repeat=len(numbers))
    return tuple(tuple(place for place, take in zip(numbers, taken, strict=True) if take) for taken in choices)


def _parts(
    names: tuple[str, ...],
    keys: tuple[str, ...],
    chosen: tuple[int, ...],
    sizes: tuple[tuple[int, ...], tuple[int, ...]],
    config: ModelConfig,
) -> Iterator[Part]:
    """The parts of a tensor of a layer, one a key."""
    shape, rows = sizes
    heights = rows if len(keys) > 1 and len(rows) == len(keys) else (shape[0] // len(keys),) * len(keys)
    for name, key, height in zip(names, keys, heights, strict=True):
        words = name.split(".")
        index = tuple(int(words[place]) for place in chosen)
        stack = tuple(_stack(words[place - 1], config) for place in chosen)
        yield Part(key, index, (height, *shape[1:]), stack, name)


def _spellings(inner: str) -> Iterator[tuple[str, ...]]:
    yield (inner,)
    for pattern, words in SPELLINGS:
        match = re.search(pattern, inner)
        if match is not None:
            head = inner[: match.start()]
            yield tuple(head + match.expand(word) for word in words)


def _stack(word: str, config: ModelConfig) -> int:
    return config.num_layers if word == "layers" else config.num_experts


def _check_shapes(tensors: Mapping[str, TensorSpec], places: Mapping[str, tuple[Part, ...]]) -> None:
    for inner, parts in places.items():
        for part in parts:
            expected = part.stack + part.shape
            if tensors[part.key].shape != expected:
                raise CheckpointError(
                    f"{part.key} has shape {list(tensors[part.key].shape)}, but the architecture implies {list(expected)} "
                    f"for {inner}: see `mptq inspect` for where each setting comes from, and correct it with --config key=value"
                )


def _check_all_used(tensors: Mapping[str, TensorSpec], places: Mapping[str, tuple[Part, ...]]) -> None:
    used = {part.key for parts in places.values() for part in parts}
    unknown = sorted(key for key in tensors if key not in used and _drop_reason(key) is None)
    if unknown:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise CheckpointError(
            f"{shown}: not part of the model that the settings describe, so the output would not be this model"
        )
