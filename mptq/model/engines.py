"""What engines make of a layer's linears: which they fuse, and how tensor parallelism splits them. No torch.

Source: vLLM's models and `validate_fp8_block_shape`; SGLang's DeepSeek model fuses the same projections. The names are
`Family.fused`. tests/support/vllm_models.json has what an installed vLLM says of every family (scripts/record_vllm.py).
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
    """Linears of one layer that engines hold in one module, and so in one scheme: fused ones, or a layer's routed experts.

    Most have one linear, which is a fused matrix of Megatron's or a plain one. `patterns` match all of `linears`, and nothing
    else of the layer.
    """

    linears: tuple[LinearSpec, ...]
    patterns: tuple[str, ...]

    @property
    def fused(self) -> bool:
        """Whether the linears are the rows of one matrix, which has one scale where a scale belongs to a tensor."""
        return self.linears[0].expert is None

    @cached_property
    def ragged(self) -> bool:
        """Whether the last rows may be a part of a block: of fused linears that every rank has whole.

        That is kv_a of multi-latent attention with a compressed query (576 rows), as in DeepSeek's own checkpoints. vLLM and
        SGLang would read a single linear of such rows too, but transformers reads neither.
        """
        return len(self.linears) > 1 and all(linear.kind in _REPLICATED for linear in self.linears)

    def fits(self, unit: tuple[int, int]) -> bool:
        """Whether engines read every projection in cells of `unit` (rows, columns): whole ones, but for a `ragged` end."""
        return _fits(self, unit)


@lru_cache(maxsize=4096)  # asked of each of hundreds of experts
def _fits(group: Group, unit: tuple[int, int]) -> bool:
    *first, last = _of_one_expert(group.linears)
    return all(linear.fits(unit) for linear in first) and last.fits((1, unit[1]) if group.ragged else unit)


_REPLICATED = ("linear_q_down_proj", "linear_kv_down_proj")
_ROW_PARALLEL = ("linear_proj", "linear_fc2", "out_proj")
"""Last names of Megatron's linears whose columns tensor parallelism splits; of others that it splits, the rows."""
_EXPERTS = "mlp.experts"


def groups(config: ModelConfig, layer: int) -> Mapping[str, Group]:
    """The group of each linear of a layer, by its Megatron name."""
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
    """Whether engines serve the model, in whatever precision, with `tp` tensor-parallel ranks."""
    heads, groups = config.num_attention_heads, config.num_query_groups
    divided = heads % tp == 0 and (config.latent is not None or groups % tp == 0 or tp % groups == 0)
    kinds = [_of_one_expert(tensors.linears_of(config, kind)) for kind in set(config.kinds)]
    return divided and all(splits(config, linear, tp) for linears in kinds for linear in linears)


def splits(config: ModelConfig, linear: LinearSpec, tp: int, block: int = 1) -> bool:
    """Whether each of `tp` ranks gets whole blocks of `linear`: of its columns, of its rows, or all of it.

    Of K and V each rank has one head at least: ranks share them where there are more ranks than heads.
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
    """The linears, but of the first expert alone: all have the same shapes, and there are hundreds."""
    return tuple(linear for linear in linears if not linear.expert)
