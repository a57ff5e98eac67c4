"""Rotary angles, computed as megatron-core does but without CUDA calls.

Source: megatron/core/models/common/embeddings/rotary_pos_embedding.py, yarn_rotary_pos_embedding.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from mptq.quiet import quiet_imports

with quiet_imports():
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

if TYPE_CHECKING:
    from mptq.model.config import ModelConfig


class _Alone:
    """A process group of one, for code that would otherwise use the default group."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


ALONE = _Alone()


@lru_cache(maxsize=64)
def angles(config: ModelConfig, length: int, device: torch.device) -> torch.Tensor:
    """Returns the rotary angles float32 [length, 1, 1, rotary dimensions] of positions 0, 1, ..."""
    frequencies = _rope(config) if config.yarn is None else _yarn(config, config.yarn)
    places = torch.arange(length, dtype=torch.float32)
    factor = config.get("seq_len_interpolation_factor")
    if factor is not None:
        places *= 1 / factor
    freqs = torch.outer(places, frequencies)
    twice = freqs.repeat_interleave(2, dim=-1) if config.get("rotary_interleaved") else torch.cat((freqs, freqs), dim=-1)
    return twice[:, None, None, :].to(device)


def _rope(config: ModelConfig) -> torch.Tensor:
    """Returns the inverse frequencies [dimensions / 2], scaled as in Llama 3 if `rope_scaling` is set."""
    found: torch.Tensor = RotaryEmbedding(
        config.latent.rotary_dim if config.latent else config.head_dim,
        float(config.get("rotary_percent")),
        rotary_base=config.get("rotary_base"),
        rope_scaling=bool(config.get("rope_scaling")),
        rope_scaling_factor=float(config.get("rope_scaling_factor")),
        use_cpu_initialization=True,
        cp_group=ALONE,
    ).inv_freq
    return found


def _yarn(config: ModelConfig, fields: Mapping[str, Any]) -> torch.Tensor:
    """Returns the YaRN inverse frequencies [dimensions / 2]: low ones divided by the factor, high ones kept."""
    base = config.get("rotary_base")
    dim = config.latent.rotary_dim if config.latent else config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    extrapolated = 1.0 / (base**exponents)
    interpolated = 1.0 / (fields["rotary_scaling_factor"] * base**exponents)
    whole = fields["correction_range_round_to_int"]
    low, high = yarn._yarn_find_correction_range(
        fields["beta_fast"],
        fields["beta_slow"],
        dim,
        base,
        fields["original_max_position_embeddings"],
        True if whole is None else whole,
    )
    kept = 1.0 - yarn._yarn_linear_ramp_mask(low, high, dim // 2, device=torch.device("cpu"))
    found: torch.Tensor = interpolated * (1 - kept) + extrapolated * kept
    return found


class Positions:
    """Replaces the rotary embedding that multi-latent attention creates for itself."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.device = torch.device("cpu")

    def get_rotary_seq_len(self, _context: Any, _transformer: Any, hidden: torch.Tensor, *_args: Any) -> int:
        """Returns the length of the sequences in `hidden` [length, sequences, hidden]."""
        self.device = hidden.device
        return hidden.shape[0]

    def __call__(self, length: int, **_packed: Any) -> Any:
        """Returns the angles; with YaRN, also the factor by which cosine and sine are multiplied."""
        found = angles(self.config, length, self.device)
        fields = self.config.yarn
        if fields is None:
            return found
        scaling = fields["rotary_scaling_factor"], fields["mscale"], fields["mscale_all_dim"]
        return found, yarn._yarn_get_concentration_factor(*scaling)
