"""Where a checkpoint has the tensors of a model, and which of its items are no part of the model.

Checkpoints stack layers and experts into one tensor, fuse norms into Transformer Engine's linears and split gated fc1 in two;
the latter are the alternatives of `LAYER_SPELLINGS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from mptq.arch.config import ModelConfig
from mptq.arch.naming import layer_copies, layer_linears, megatron_layer, outer_copies
from mptq.errors import CheckpointError
from mptq.types import TensorSpec


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the checkpoint, or one layer or expert of a stack, that makes up (some rows of) an inner tensor.

    `index` is the place in the leading dimensions of a stack, whose sizes are `stack`; both are empty where there is no stack.
    """

    key: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    stack: tuple[int, ...] = ()


LAYER_SPELLINGS: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("self_attention.linear_qkv.layer_norm_weight",),
    "pre_mlp_layernorm.weight": ("mlp.linear_fc1.layer_norm_weight",),
    "linear_fc1.weight": ("linear_fc1.weight_w", "linear_fc1.weight_v"),
}
"""End of an inner name -> what else it can be in a checkpoint: one tensor, or several, by rows."""

DROPPED = {
    "_extra_state": "Transformer Engine's FP8 state, of no meaning outside training",
    "optimizer.": "optimizer state",
    "rng_state": "random number generator state",
    "rerun_state": "rerun state machine",
    "opt_param_scheduler": "learning rate scheduler",
    "common_state": "training arguments, read for the architecture",
    "dataloader": "data loader state",
    "rotary_pos_emb.inv_freq": "recomputed from rotary_base",
}
"""Part of a key -> why it is not in the output."""


def locate(tensors: Mapping[str, TensorSpec], config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    """Where each inner tensor of the model is in the checkpoint: inner name -> parts, one above the other by rows.

    Raises CheckpointError for a missing tensor, one of a wrong shape, and one that is not part of the model.
    """
    prefix = _prefix(tensors)
    places: dict[str, tuple[Part, ...]] = {}
    for copy in outer_copies(config):
        places[copy.megatron] = _place(tensors, copy.megatron, [(Part(prefix + copy.megatron, (), copy.shape),)])
    shapes: dict[str, tuple[int, ...]] = {f"{linear.megatron}.weight": linear.shape for linear in layer_linears(config)}
    shapes |= {copy.megatron: copy.shape for copy in layer_copies(config)}
    for layer in range(config.num_layers):
        for name, shape in shapes.items():
            inner = megatron_layer(layer) + name
            places[inner] = _place(tensors, inner, _layer_candidates(prefix + inner, shape, config))
    _check_shapes(tensors, places, config.source)
    _check_all_used(tensors, places, config.family.name)
    return places


def dropped(keys: Iterable[str]) -> dict[str, str]:
    """The keys that the output leaves out, with the reason."""
    return {key: reason for key in keys if (reason := _drop_reason(key)) is not None}


def _drop_reason(key: str) -> str | None:
    return next((reason for part, reason in DROPPED.items() if part in key), None)


def _prefix(tensors: Mapping[str, TensorSpec]) -> str:
    """What stands before `decoder.` in the model's keys: nothing, `model.` or `module.`."""
    anchor = "decoder.final_layernorm.weight"
    found = [key.removesuffix(anchor) for key in tensors if key.endswith(anchor) and _drop_reason(key) is None]
    if len(found) != 1:
        raise CheckpointError(f"the checkpoint has {len(found)} tensors named *{anchor}: no GPT model in it that mptq knows")
    return found[0]


def _layer_candidates(inner: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[tuple[Part, ...]]:
    """Every way in which checkpoints store a tensor of a layer: each spelling, in a key of its own or in stacks."""
    other = ((inner.removesuffix(end), words) for end, words in LAYER_SPELLINGS.items() if inner.endswith(end))
    spellings = [(inner,), *(tuple(owner + word for word in words) for owner, words in other)]
    for keys in spellings:
        part_shape = (shape[0] // len(keys), *shape[1:])
        yield from zip(*(_stackings(key, part_shape, config) for key in keys), strict=True)


def _stackings(key: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[Part]:
    """A tensor with each number in its key (layer, expert) left there, or taken out of it as its place in a stack."""
    sizes = {"layers": config.num_layers, "experts": config.num_experts}
    words = key.split(".")
    numbers = [place for place, word in enumerate(words) if word.isdigit()]
    for chosen in product((False, True), repeat=len(numbers)):
        taken = [place for place, take in zip(numbers, chosen, strict=True) if take]
        rest = ".".join(word for place, word in enumerate(words) if place not in taken)
        yield Part(rest, tuple(int(words[place]) for place in taken), shape, tuple(sizes[words[place - 1]] for place in taken))


def _place(tensors: Mapping[str, TensorSpec], inner: str, candidates: Iterable[tuple[Part, ...]]) -> tuple[Part, ...]:
    tried: dict[str, None] = {}
    for parts in candidates:
        if all(part.key in tensors for part in parts):
            return parts
        tried |= dict.fromkeys(part.key for part in parts)
    raise CheckpointError(f"{inner} is not in the checkpoint (looked for {', '.join(tried)}): the checkpoint is incomplete")


def _check_shapes(tensors: Mapping[str, TensorSpec], places: Mapping[str, tuple[Part, ...]], source: str) -> None:
    for inner, parts in places.items():
        for part in parts:
            expected = part.stack + part.shape
            if tensors[part.key].shape != expected:
                raise CheckpointError(
                    f"{part.key} has shape {list(tensors[part.key].shape)}, but {source} implies {list(expected)} "
                    f"for {inner}: the arguments do not belong to these weights"
                )


def _check_all_used(tensors: Mapping[str, TensorSpec], places: Mapping[str, tuple[Part, ...]], family: str) -> None:
    used = {part.key for parts in places.values() for part in parts}
    unknown = sorted(key for key in tensors if key not in used and _drop_reason(key) is None)
    if unknown:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise CheckpointError(f"{shown}: not part of a {family}-like model, so the output would not be this model")
