"""Finds the tensors of a model in a checkpoint, and the items that are not part of the model.

Checkpoints may stack layers and experts into one tensor, number experts in the last part of a name, fuse norms into
Transformer Engine's linears, and split fused matrices into parts. `KEY_VARIANTS` lists the resulting names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from mptq.errors import CheckpointError
from mptq.model.config import ModelConfig
from mptq.model.tensors import final_norm, layer_copies, layer_linears, megatron_layer, outer_copies
from mptq.types import TensorSlice, TensorSpec

_EXPERT = r"experts\.experts\.(\d+)\.(linear_fc[12])\."
KEY_VARIANTS: tuple[tuple[str, tuple[str, ...]], ...] = (
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
    # Stacked experts in a model without an inner `experts` module.
    (_EXPERT + r"(weight|bias)$", (r"experts.\1.\2.\3",)),
    (r"experts\.experts\.(\d+)\.linear_fc1\.(weight|bias)$", (r"experts.\1.linear_fc1.\2_w", r"experts.\1.linear_fc1.\2_v")),
)
"""Pattern in an inner name -> its variant in a checkpoint: one tensor, or several that are concatenated by rows."""

SKIPPED = {
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
"""Part of a key -> reason why the item is not in the output."""
MTP = "mtp."
"""Prefix of the keys of multi-token prediction layers."""


def locate(tensors: Mapping[str, TensorSpec], config: ModelConfig) -> dict[str, tuple[TensorSlice, ...]]:
    """Finds each inner tensor of the model in the checkpoint: inner name -> its parts, concatenated by rows.

    Raises CheckpointError if a tensor is missing, has the wrong shape, or is not part of the model.
    """
    prefix = _prefix(tensors, config)
    places: dict[str, tuple[TensorSlice, ...]] = {}
    for copy in (copy for group in outer_copies(config) for copy in group):
        key = prefix + copy.megatron
        if key not in tensors:
            raise CheckpointError(_missing(copy.megatron, [key]))
        places[copy.megatron] = (TensorSlice(key, (), copy.shape, (), copy.megatron),)
    shapes = {kind: _shapes(config, config.kinds.index(kind)) for kind in set(config.kinds)}
    search = _Search(tensors, prefix, config)
    for layer, kind in enumerate(config.kinds):
        for name, sizes in shapes[kind].items():
            inner = megatron_layer(layer) + name
            places[inner] = search.place(layer, inner, sizes)
    places |= _carried(tensors, prefix)
    _check_shapes(tensors, places)
    _check_all_used(tensors, places)
    return places


def _shapes(config: ModelConfig, layer: int) -> dict[str, _Sizes]:
    """Returns the shapes of the tensors of a layer, by name."""
    shapes: dict[str, _Sizes] = {}
    for linear in layer_linears(config, layer):
        name = f"{linear.megatron}.weight"
        shapes[name] = _Sizes(linear.shape, linear.key_rows, _alike(name), linear.expert)
    for copy in layer_copies(config, layer):
        expert = re.search(_NUMBER, copy.megatron)
        shapes[copy.megatron] = _Sizes(copy.shape, copy.key_rows, _alike(copy.megatron), int(expert[1]) if expert else None)
    return shapes


_NUMBER = r"\.(\d+)\."


def _alike(name: str) -> str:
    return re.sub(_NUMBER, ".N.", name)


def passthrough_names(places: Mapping[str, tuple[TensorSlice, ...]]) -> list[str]:
    """Returns the inner names that only a Megatron output has, unchanged: multi-token prediction layers."""
    return [name for name in places if name.startswith(MTP)]


def _carried(tensors: Mapping[str, TensorSpec], prefix: str) -> dict[str, tuple[TensorSlice, ...]]:
    found: dict[str, tuple[TensorSlice, ...]] = {}
    for key, spec in tensors.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name.startswith(MTP) and _drop_reason(key) is None:
            found[name] = (TensorSlice(key, (), spec.shape, (), name),)
    return found


def skipped(keys: Iterable[str]) -> dict[str, str]:
    """Returns the keys that are not in the output, with the reason."""
    return {key: reason for key in keys if (reason := _drop_reason(key)) is not None}


def _drop_reason(key: str) -> str | None:
    for part, reason in SKIPPED.items():  # a plain loop: there are tens of thousands of keys, and a generator is slower
        if part in key:
            return reason
    return None


def _prefix(tensors: Mapping[str, TensorSpec], config: ModelConfig) -> str:
    """Returns the prefix before `decoder.` in the model's keys: "", `model.`, `module.` or similar."""
    anchor = f"{final_norm(config)}.weight"
    found = [key.removesuffix(anchor) for key in tensors if key.endswith(anchor) and _drop_reason(key) is None]
    if len(found) != 1:
        raise CheckpointError(
            f"the checkpoint has {len(found)} tensors named *{anchor}, but one is expected: mptq finds no language model in it"
        )
    return found[0]


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Shape of a tensor of a layer, and the `rows` of its parts in checkpoints that split it.

    `alike` is its name with expert numbers replaced, so that it is the same for all experts. `expert` is the number of
    the expert that it belongs to, if any.
    """

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    alike: str
    expert: int | None


_Chosen = tuple[int, ...]
"""The positions of the numbers in a dotted name that are leading dimensions of a stacked tensor instead."""


class _Search:
    """Finds the tensors of layers, each under the first variant of its name that exists, unstacked or stacked.

    There are tens of thousands of tensors with several variants each, so the variant that was found for one tensor is
    tried first for similar ones.
    """

    def __init__(self, tensors: Mapping[str, TensorSpec], prefix: str, config: ModelConfig) -> None:
        self.tensors, self.prefix, self.config = tensors, prefix, config
        self.found: dict[str, tuple[int, _Chosen]] = {}
        self.stacks: dict[str, tuple[int, TensorSlice]] = {}

    def place(self, layer: int, inner: str, sizes: _Sizes) -> tuple[TensorSlice, ...]:
        """Returns the parts of the tensor with the inner name `inner`, which belongs to `layer`."""
        stack = self.stacks.get(sizes.alike)
        if stack is not None and stack[0] == layer and sizes.expert is not None:
            first = stack[1]
            return (TensorSlice(first.key, (*first.index[:-1], sizes.expert), first.shape, first.stack, inner),)
        parts = self._search(inner, sizes)
        spelling, chosen = self.found[sizes.alike]
        if spelling == 0 and chosen and sizes.expert is not None and inner.split(".")[chosen[-1] - 1] == "experts":
            self.stacks[sizes.alike] = layer, parts[0]  # the layer's other experts are in that tensor too
        return parts

    def _search(self, inner: str, sizes: _Sizes) -> tuple[TensorSlice, ...]:
        tried: dict[str, None] = {}
        for spelling, chosen, names in self._candidates(inner, sizes.alike):
            keys = tuple(self.prefix + _without(name, chosen) for name in names)
            if all(key in self.tensors for key in keys):
                self.found[sizes.alike] = spelling, chosen
                return tuple(self._parts(names, keys, chosen, sizes))
            tried |= dict.fromkeys(keys)
        raise CheckpointError(_missing(inner, tried))

    def _candidates(self, inner: str, alike: str) -> Iterator[tuple[int, _Chosen, tuple[str, ...]]]:
        if alike in self.found:
            spelling, chosen = self.found[alike]
            yield spelling, chosen, _spelled(inner, spelling)
        for spelling in range(len(KEY_VARIANTS) + 1):
            names = _spelled(inner, spelling)
            if names:
                # All names of a variant have their numbers in the same places.
                numbers = tuple(place for place, word in enumerate(names[0].split(".")) if word.isdigit())
                yield from ((spelling, chosen, names) for chosen in _choices(numbers))

    def _parts(self, names: tuple[str, ...], keys: tuple[str, ...], chosen: _Chosen, sizes: _Sizes) -> Iterator[TensorSlice]:
        """Yields one part per key."""
        shape, rows = sizes.shape, sizes.rows
        heights = rows if len(keys) > 1 and len(rows) == len(keys) else (shape[0] // len(keys),) * len(keys)
        for name, key, height in zip(names, keys, heights, strict=True):
            words = name.split(".") if chosen else []
            index = tuple(int(words[place]) for place in chosen)
            stack = tuple(_stack(words[place - 1], self.config) for place in chosen)
            yield TensorSlice(key, index, (height, *shape[1:]), stack, name)


def _missing(inner: str, tried: Iterable[str]) -> str:
    first, *others = tried
    more = f" and {len(others)} other names" if others else ""
    return f"{inner} is not in the checkpoint (looked for {first}{more}): the checkpoint is incomplete"


def _without(name: str, chosen: _Chosen) -> str:
    """Returns a dotted name without the components at the `chosen` positions."""
    return ".".join(word for place, word in enumerate(name.split(".")) if place not in chosen) if chosen else name


@lru_cache(maxsize=64)
def _choices(numbers: tuple[int, ...]) -> tuple[_Chosen, ...]:
    """Returns every selection of these positions, starting with none; the last position varies fastest."""
    choices = product((False, True), repeat=len(numbers))
    return tuple(tuple(place for place, take in zip(numbers, taken, strict=True) if take) for taken in choices)


def _spelled(inner: str, spelling: int) -> tuple[str, ...]:
    """Returns the names of an inner tensor in variant `spelling` of `KEY_VARIANTS` (from 1); 0 is the inner name.

    Empty if the variant does not apply.
    """
    if spelling == 0:
        return (inner,)
    pattern, words = KEY_VARIANTS[spelling - 1]
    match = re.search(pattern, inner)
    return () if match is None else tuple(inner[: match.start()] + match.expand(word) for word in words)


def _stack(word: str, config: ModelConfig) -> int:
    return config.num_layers if word == "layers" else config.num_experts


def _check_shapes(tensors: Mapping[str, TensorSpec], places: Mapping[str, tuple[TensorSlice, ...]]) -> None:
    for inner, parts in places.items():
        for part in parts:
            expected = part.stack + part.shape
            if tensors[part.key].shape != expected:
                raise CheckpointError(
                    f"{part.key} has shape {list(tensors[part.key].shape)}, but the architecture implies {list(expected)} "
                    f"for {inner}: find the source of each setting with `mptq inspect` and correct it with --config key=value"
                )


def _check_all_used(tensors: Mapping[str, TensorSpec], places: Mapping[str, tuple[TensorSlice, ...]]) -> None:
    used = {part.key for parts in places.values() for part in parts}
    unknown = sorted(key for key in tensors if key not in used and _drop_reason(key) is None)
    if unknown:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise CheckpointError(
            f"{shown}: not part of the model that the settings describe, so the output would be a different model"
        )
