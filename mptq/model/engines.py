"""How engines treat the linears of a layer: which they fuse, and how tensor parallelism splits them. No torch.

Source: vLLM's models and `validate_fp8_block_shape`; SGLang's DeepSeek model fuses the same projections. The names are
in `Family.fused`. tests/support/vllm_models.json records the behavior of vLLM for every family
(scripts/record_vllm.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from mptq.model import tensors
from mptq.model.config import LayerKind, ModelConfig
from mptq.model.tensors import LinearSpec


@dataclass(frozen=True, eq=False)
class Group:
    """Linears of a layer that engines hold in one module, so with one scheme: fused linears or routed experts.

    Most groups have one linear, which is either fused in Megatron or plain. `patterns` match all of `linears` and
    nothing else in the layer.
    """

    linears: tuple[LinearSpec, ...]
    patterns: tuple[str, ...]

    @property
    def fused(self) -> bool:
        """Whether the linears are rows of a single matrix, which has one scale in a per-tensor scheme."""
        return self.linears[0].expert is None

    @cached_property
    def ragged(self) -> bool:
        """Whether the last block of rows may be partial: in fused linears that are replicated on every rank.

        This is kv_a of multi-latent attention with a compressed query (576 rows), as in DeepSeek's own checkpoints.
        vLLM and SGLang could also load a single linear with a partial block, but transformers can load neither.
        """
        return len(self.linears) > 1 and all(linear.kind in _REPLICATED for linear in self.linears)

    def fits(self, unit: tuple[int, int]) -> bool:
        """Whether engines can load every projection in whole cells of `unit` (rows, columns), but for a `ragged` end."""
        return _fits(self, unit)


@lru_cache(maxsize=4096)  # called for each of hundreds of experts
def _fits(group: Group, unit: tuple[int, int]) -> bool:
    *first, last = _of_one_expert(group.linears)
    return all(linear.fits(unit) for linear in first) and last.fits((1, unit[1]) if group.ragged else unit)


_REPLICATED = ("linear_q_down_proj", "linear_kv_down_proj")
_ROW_PARALLEL = ("linear_proj", "linear_fc2", "out_proj")
"""Last parts of the names of Megatron's row-parallel linears: tensor parallelism splits their columns.

Of all others that are not replicated it splits the rows.
"""
_EXPERTS = "mlp.experts"


def groups(config: ModelConfig, layer: int) -> Mapping[str, Group]:
    """Returns the group of each linear of a layer, by Megatron name."""
    return _groups(config, config.kinds[layer])


@lru_cache(maxsize=16)
def _groups(config: ModelConfig, kind: LayerKind) -> dict[str, Group]:
    linears = tensors.linears_of(config, kind)
    experts = tuple(linear for linear in linears if linear.expert is not None)
    several = [Group(experts, (f"*{_EXPERTS}*",))] if experts else []
    by_module = {module: linear for linear in linears for module in linear.hf}
    for members in map(str.split, tensors.names(config).fused.values()):
        for first in (module for module in by_module if module.endswith(f".{members[0]}")):
            owner = first.removesuffix(members[0])
            if all(owner + member in by_module for member in members):
                fused = tuple(dict.fromkeys(by_module[owner + member] for member in members))
                several.append(Group(fused, tuple(f"*.{linear.megatron}" for linear in fused)))
    found = {linear.megatron: Group((linear,), (f"*.{linear.megatron}",)) for linear in linears}
    return found | {linear.megatron: group for group in several if len(group.linears) > 1 for linear in group.linears}


def serves(config: ModelConfig, tp: int) -> bool:
    """Whether engines can serve the model with `tp` tensor-parallel ranks, in any precision."""
    heads, groups = config.num_attention_heads, config.num_query_groups
    divided = heads % tp == 0 and (config.latent is not None or groups % tp == 0 or tp % groups == 0)
    kinds = [_of_one_expert(tensors.linears_of(config, kind)) for kind in set(config.kinds)]
    return divided and all(splits(config, linear, tp) for linears in kinds for linear in linears)


def splits(config: ModelConfig, linear: LinearSpec, tp: int, block: int = 1) -> bool:
    """Whether each of `tp` ranks gets whole blocks of `linear` by columns or rows, or all of it if replicated.

    Each rank has at least one head of K and V; these are shared if there are more ranks than heads.
    """
    if linear.kind in _REPLICATED:
        return True
    if linear.kind in _ROW_PARALLEL:
        return linear.in_features % (tp * block) == 0
    rows = linear.parts or linear.fusion.rows
    ranks = [tp] * len(rows)
    if linear.kind == "linear_qkv":
        ranks[1:] = [min(tp, config.num_query_groups)] * 2
    return all(count % (share * block) == 0 for count, share in zip(rows, ranks, strict=True))


def _of_one_expert(linears: tuple[LinearSpec, ...]) -> tuple[LinearSpec, ...]:
    """Returns the linears with only the first expert's: all experts have the same shapes, and there are hundreds."""
    return tuple(linear for linear in linears if not linear.expert)
