"""Checks that settings have valid values, before anything is derived from them. No torch.

Source: the checks of megatron/core/transformer/transformer_config.py and the modules that read the fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

from mptq.errors import CheckpointError
from mptq.model.settings.settings import KINDS, LARGEST, Settings
from mptq.model.settings.values import short

_COUNTS = """
hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size padded_vocab_size
max_position_embeddings seq_length moe_ffn_hidden_size moe_router_topk kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
original_max_position_embeddings yarn_original_max_position_embeddings mamba_state_dim mamba_head_dim mamba_num_groups
mamba_num_heads
"""
_COUNTS_OR_NONE = """
q_lora_rank moe_shared_expert_intermediate_size moe_router_num_groups moe_router_group_topk
"""
_POSITIVE = """
layernorm_epsilon softmax_scale rotary_base rope_scaling_factor seq_len_interpolation_factor rotary_scaling_factor beta_fast
beta_slow yarn_rotary_scaling_factor yarn_beta_fast yarn_beta_slow activation_func_clamp_value
"""
_MOST = 1 << 14
"""Limit of layers and experts: there are objects for each, so more would only waste memory."""
WORDS = {
    "normalization": ("LayerNorm", "RMSNorm"),
    "softmax_type": ("vanilla", "off-by-one", "learnable"),
    "rope_type": ("rope", "yarn"),
    "moe_router_score_function": ("softmax", "sigmoid", "sqrtsoftplus"),
}
"""Setting -> the values that megatron-core knows."""


def _whole(value: Any, least: int, most: int = LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < float("inf")


def _frequency(value: Any) -> bool:
    """Whether the value is a valid layer frequency: one of every N layers, or a flag for each layer."""
    flags = isinstance(value, list | tuple) and all(flag in (0, 1) for flag in value)
    return flags or _whole(value, 1)


def _window(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(_whole(side, 0) for side in value)


Test = tuple[Callable[[Any], bool], str]
_TESTS: dict[str, Test] = {
    **dict.fromkeys(_COUNTS.split(), (lambda value: _whole(value, 1), "a whole number above 0")),
    **dict.fromkeys(_COUNTS_OR_NONE.split(), (lambda value: _whole(value, 0), "a whole number")),
    **dict.fromkeys(_POSITIVE.split(), (_above_zero, "a number above 0")),
    "num_layers": (lambda value: _whole(value, 1, _MOST), f"a whole number from 1 to {_MOST}"),
    "num_moe_experts": (lambda value: _whole(value, 0, _MOST), f"a whole number up to {_MOST}"),
    "mtp_num_layers": (lambda value: _whole(value, 0, _MOST), f"a whole number up to {_MOST}"),
    "rotary_percent": (lambda value: _above_zero(value) and value <= 1, "above 0 and at most 1"),
    "window_size": (_window, "[tokens to the left, 0]"),
    "window_attn_skip_freq": (_frequency, "a whole number above 0, or 0 or 1 for each layer"),
    "moe_layer_freq": (_frequency, "a whole number above 0, or 0 or 1 for each layer"),
    "no_rope_freq": (_frequency, "a whole number above 0, or 0 or 1 for each layer"),
    **{key: (words.__contains__, " or ".join(words)) for key, words in WORDS.items()},
}
_ANYTHING: Test = (lambda _: True, "")


def _plain(value: Any, kinds: tuple[type, ...]) -> bool:
    finite = not isinstance(value, float) or math.isfinite(value)
    return finite and isinstance(value, kinds) and not isinstance(value, bool)


_OF_KIND: dict[tuple[type, ...], Test] = {
    kinds: (partial(_plain, kinds=kinds), wanted)
    for kinds, wanted in {(int,): "a whole number", (float, int): "a number", (str,): "a string"}.items()
}
"""Types of `KINDS` -> the test for settings without their own. Flags are not checked: their truth value is used."""
_MULTIPLES = (
    ("num_attention_heads", "num_query_groups"),
    ("num_moe_experts", "moe_router_num_groups"),
    ("moe_router_topk", "moe_router_group_topk"),
)
"""Pairs where the first must be a multiple of the second."""
_AT_MOST = (("moe_router_topk", "num_moe_experts"), ("moe_router_group_topk", "moe_router_num_groups"))
"""Pairs where the first must not exceed the second."""
_BY_LAYER = tuple((key, "num_layers") for key in ("window_attn_skip_freq", "moe_layer_freq", "no_rope_freq"))
"""Pairs where the first, if it is a list, must have as many entries as the second says."""


def check(settings: Settings) -> None:
    """Raises CheckpointError for the first setting with an invalid value, naming its source."""
    for problem in chain(_alone(settings), _together(settings)):
        raise CheckpointError(f"{problem}: correct it with --config key=value")


def _alone(settings: Settings) -> Iterator[str]:
    for key, value in settings.items():
        fits, wanted = _TESTS.get(key) or _OF_KIND.get(KINDS.get(key, ()), _ANYTHING)
        if value is not None and not fits(value):
            yield f"{_stated(settings, key)}, but must be {wanted}"


def _together(settings: Settings) -> Iterator[str]:
    """Yields problems with combinations of settings; `_alone` has already reported those that are not numbers."""
    for many, few in _both(settings, _MULTIPLES):
        if settings[many] % settings[few]:
            yield f"{_stated(settings, many)}, but must be a multiple of {few} ({settings[few]})"
    for part, whole in _both(settings, _AT_MOST):
        if settings[part] > settings[whole]:
            yield f"{_stated(settings, part)}, but must be at most {whole} ({settings[whole]})"
    for flags, _ in _both(settings, _BY_LAYER):
        entries = settings[flags]
        if isinstance(entries, list | tuple) and len(entries) != settings["num_layers"]:
            yield f"{_stated(settings, flags)}, but has {len(entries)} entries for {settings['num_layers']} layers"


def _both(settings: Mapping[str, Any], pairs: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    return [pair for pair in pairs if all(settings.get(key) for key in pair)]


def _stated(settings: Settings, key: str) -> str:
    return f"{key} is {short(repr(settings[key]))} (from {settings.sources.get(key)})"
