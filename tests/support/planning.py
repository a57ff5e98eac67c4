"""Plans of models that exist only as metadata: for every family, and at the sizes of known models."""

from pathlib import Path

from mptq.checkpoint.index import Checkpoint, Tensor
from mptq.checkpoint.locate import Location
from mptq.model.checkpoint_keys import locate
from mptq.plan.plan import Plan, Source, plan_source
from mptq.recipes.recipe import load_recipe
from tests.support.models import ARGS, DEEPSEEK, FAMILY_ARGS, MOE_ARGS, SIGMOID, inner_shapes, model, specs


def source_of(args) -> Source:
    """A checkpoint of the model trained with these arguments, without its files."""
    found = specs(inner_shapes(model(args)))
    tensors = {name: Tensor(spec, ()) for name, spec in found.items()}
    checkpoint = Checkpoint(Location(Path("/c/iter_0000001"), Path("/c"), 1), tensors, {}, args, "args", "0" * 64)
    config = model(args, found)
    return Source(checkpoint, config, locate(found, config))


def planned(args, recipe, *ignored, formats=("hf",)) -> Plan:
    """The plan of a run on such a checkpoint."""
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    return plan_source(source_of(args), recipe.changed(ignored), formats)


def sized(args, hidden, ffn, heads, groups, head=128, **others):
    """The arguments of a model of two layers with these sizes; with experts, `ffn` is that of the dense layers."""
    sizes = {"hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": heads, "num_query_groups": groups}
    return args | sizes | {"kv_channels": head} | others


WHOLE = {"hidden_size": 256, "ffn_hidden_size": 384, "kv_channels": 128}
MIXTURE = {"moe_ffn_hidden_size": 256, "moe_shared_expert_intermediate_size": 512}
LATENTS = {"kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}
HYBRID = {"mamba_state_dim": 128, "mamba_head_dim": 64, "mamba_num_heads": 128, "mamba_num_groups": 8}


def whole(family):
    """The arguments of a small model of a family; all linears are whole blocks, except kv_a of latent attention."""
    args = FAMILY_ARGS[family] | WHOLE
    if "num_experts" in args:
        args |= {name: size for name, size in MIXTURE.items() if name in args}
    if "kv_lora_rank" in args:
        args |= LATENTS
    if "q_lora_rank" in args:
        args |= {"q_lora_rank": 256}
    if "hybrid_layer_pattern" in args:
        args |= HYBRID
    # Families without a head size of their own need hidden / heads.
    return (
        args | {"num_attention_heads": 2, "num_query_groups": 2}
        if family in ("Qwen2", "OPT", "StarCoder2", "Qwen2-MoE")
        else args
    )


QKV_BIAS = {"add_qkv_bias": True}
MODELS = {
    "Llama-2-7B": sized(ARGS, 4096, 11008, 32, 32),
    "Llama-3-8B": sized(ARGS, 4096, 14336, 32, 8),
    "Llama-3-70B": sized(ARGS, 8192, 28672, 64, 8),
    "Llama-3.2-1B": sized(ARGS, 2048, 8192, 32, 8, head=64),
    "Qwen2-1.5B": sized(ARGS, 1536, 8960, 12, 2, **QKV_BIAS),
    "Qwen2-7B": sized(ARGS, 3584, 18944, 28, 4, **QKV_BIAS),
    "Qwen3-30B-A3B": sized(
        MOE_ARGS, 2048, 6144, 32, 4, qk_layernorm=True, num_experts=128, moe_router_topk=8, moe_ffn_hidden_size=768
    ),
    "Mixtral-8x7B": sized(MOE_ARGS, 4096, 14336, 32, 8, moe_ffn_hidden_size=14336),
    "DeepSeek-V2-Lite": sized(
        FAMILY_ARGS["DeepSeek-V2"] | LATENTS,
        2048,
        10944,
        16,
        16,
        num_experts=64,
        moe_router_topk=6,
        moe_ffn_hidden_size=1408,
        moe_shared_expert_intermediate_size=2816,
    ),
    "DeepSeek-V3": sized(
        DEEPSEEK | SIGMOID | LATENTS,
        7168,
        18432,
        128,
        128,
        q_lora_rank=1536,
        num_experts=256,
        moe_router_topk=8,
        moe_router_num_groups=8,
        moe_router_group_topk=4,
        moe_ffn_hidden_size=2048,
        moe_shared_expert_intermediate_size=2048,
    ),
}
"""Two layers of known models; DeepSeek's first layer is dense."""
