"""Which fields a Hugging Face `config.json` may have, by family: those that mptq understands, and no other. No torch.

A field that changes what the model computes and that nobody here reads would make another model without a word. So each field
is read by the family, or is one that changes nothing, or has the one value with which the family is what mptq takes it for.
Source: transformers' configuration and modeling files of each family; for fields of older versions, its releases 4.30 to 4.57.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from mptq.errors import CheckpointError
from mptq.model.architectures.config_json import concentration
from mptq.model.settings.settings import LARGEST

MOST_LAYERS = 1 << 14
_MOST_PROBLEMS = 12


def _printable(word: str) -> str:
    if not word.isprintable():
        raise ValueError("must be printable")
    return word


_Count = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
_Size = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
_Layers = Annotated[int, Field(strict=True, ge=0, le=MOST_LAYERS)]
_Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(strict=True, gt=0, le=1)]
_Word = Annotated[str, Field(strict=True, min_length=1, max_length=100), AfterValidator(_printable)]

RopeKind = Literal["default", "linear", "llama3", "yarn"]
Attention = Literal["full_attention", "sliding_attention"]
Block = Literal["mamba", "linear_attention", "attention", "full_attention", "mlp", "moe"]


class Rope(BaseModel):
    """`rope_parameters`, or `rope_scaling` of transformers before 5, where `rope_type` was first called `type`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rope_type: RopeKind | None = None
    type: RopeKind | None = None
    rope_theta: _Positive | None = None
    partial_rotary_factor: _Share | None = None
    factor: _Positive | None = None
    original_max_position_embeddings: _Count | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    mscale: _NotNegative | None = None
    mscale_all_dim: _NotNegative | None = None
    truncate: StrictBool | None = None
    attention_factor: _Positive | None = None
    attn_factor: _Positive | None = None

    @property
    def kind(self) -> RopeKind:
        """How frequencies are scaled."""
        return self.rope_type or self.type or "default"

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.rope_type and self.type and self.rope_type != self.type:
            raise ValueError(f"rope_type and type contradict each other ({self.rope_type}, {self.type})")
        if self.factor is not None and not (self.rope_type or self.type):
            raise ValueError("has a factor and no rope_type")
        if self.factor is None and self.kind != "default":
            raise ValueError(f"has no factor, which rope_type {self.kind} needs")
        return self

    @model_validator(mode="after")
    def _concentrated(self) -> Self:
        """The factor on cosine and sine is what the fields that have settings say: no setting is that factor itself."""
        factor = self.factor or 1.0
        expected = concentration(factor, 1.0 if self.mscale is None else self.mscale, self.mscale_all_dim or 0.0)
        stated = {"attention_factor": expected, "attn_factor": expected / concentration(factor, 1.0, 0.0)}
        for name, value in stated.items():
            found = getattr(self, name)
            if found is not None and (self.kind != "yarn" or not math.isclose(found, value, rel_tol=1e-6)):
                raise ValueError(f"has {name} {found:g}, which mptq reads only as yarn's mscale and mscale_all_dim")
        return self


class Fields(BaseModel):
    """The fields that mptq understands, with the values that a model can have; one that is None counts as absent."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    num_hidden_layers: Annotated[int, Field(strict=True, ge=1, le=MOST_LAYERS)] | None = None
    n_layer: Annotated[int, Field(strict=True, ge=1, le=MOST_LAYERS)] | None = None
    hidden_size: _Count | None = None
    n_embd: _Count | None = None
    intermediate_size: _Count | None = None
    n_inner: _Count | None = None
    ffn_dim: _Count | None = None
    word_embed_proj_dim: _Count | None = None
    num_attention_heads: _Count | None = None
    n_head: _Count | None = None
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    attention_head_dim: _Count | None = None
    vocab_size: _Count | None = None
    max_position_embeddings: _Count | None = None
    n_positions: _Count | None = None
    tie_word_embeddings: StrictBool | None = None
    hidden_act: _Word | None = None
    mlp_hidden_act: _Word | None = None
    activation_function: _Word | None = None
    rms_norm_eps: _Positive | None = None
    layer_norm_epsilon: _Positive | None = None
    norm_epsilon: _Positive | None = None
    norm_eps: _Positive | None = None
    rope_theta: _Positive | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    partial_rotary_factor: _Share | None = None
    layer_types: list[Attention] | None = None
    sliding_window: _Size | None = None
    use_sliding_window: StrictBool | None = None
    max_window_layers: _Size | None = None
    use_bias: StrictBool | None = None
    enable_bias: StrictBool | None = None
    qkv_bias: StrictBool | None = None
    num_local_experts: _Layers | None = None
    num_experts: _Layers | None = None
    n_routed_experts: _Layers | None = None
    num_experts_per_tok: _Size | None = None
    moe_intermediate_size: _Size | None = None
    shared_expert_intermediate_size: _Size | None = None
    moe_shared_expert_intermediate_size: _Size | None = None
    n_shared_experts: _Size | None = None
    norm_topk_prob: StrictBool | None = None
    routed_scaling_factor: _Positive | None = None
    n_group: _Size | None = None
    topk_group: _Size | None = None
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] | None = None
    first_k_dense_replace: _Layers | None = None
    decoder_sparse_step: _Count | None = None
    mlp_only_layers: list[_Layers] | None = None
    num_nextn_predict_layers: _Layers | None = None
    q_lora_rank: _Count | None = None
    kv_lora_rank: _Count | None = None
    qk_nope_head_dim: _Count | None = None
    qk_rope_head_dim: _Count | None = None
    v_head_dim: _Count | None = None
    layers_block_type: list[Block] | None = None
    hybrid_override_pattern: Annotated[str, Field(pattern=r"^[M*E-]+$", max_length=MOST_LAYERS)] | None = None
    ssm_state_size: _Count | None = None
    mamba_num_heads: _Count | None = None
    mamba_head_dim: _Count | None = None
    n_groups: _Count | None = None

    @model_validator(mode="after")
    def _together(self) -> Self:
        layers = self.num_hidden_layers
        for name in ("layer_types", "layers_block_type", "hybrid_override_pattern"):
            entries = getattr(self, name)
            if entries is not None and layers is not None and len(entries) != layers:
                raise ValueError(f"{name} has {len(entries)} entries for {layers} layers")
        if "sliding_attention" in (self.layer_types or ()) and not self.sliding_window:
            raise ValueError("layer_types has sliding_attention, and there is no sliding_window that this family reads")
        if self.word_embed_proj_dim not in (None, self.hidden_size):
            raise ValueError(f"word_embed_proj_dim is {self.word_embed_proj_dim}, and must be hidden_size, {self.hidden_size}")
        if layers is not None and (self.first_k_dense_replace or 0) > layers:
            raise ValueError(f"first_k_dense_replace is {self.first_k_dense_replace}, of {layers} layers")
        return self


@dataclass(frozen=True)
class HfFamily:
    """One `model_type`. `keys` are the fields that its code reads, `settings` what it does where none of them says otherwise.

    `fixed` are fields that no setting expresses, with the values at which the family is what the settings say. `ignored` are
    fields that its configs have and that change nothing. `derived` are those that follow from others where they are absent;
    other families have constants there.
    """

    keys: str
    settings: dict[str, Any]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: str = ""
    derived: str = "head_dim num_key_value_heads"


_NEUTRAL = """
model_type architectures auto_map transformers_version torch_dtype dtype name_or_path _name_or_path tokenizer_class
quantization_config compression_config unsloth_version unsloth_fixed
bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
initializer_range init_std use_cache return_dict output_attentions output_hidden_states output_router_logits torchscript
use_bfloat16 tf_legacy_loss is_decoder problem_type finetuning_task id2label label2id task_specific_params prefix
attn_implementation _attn_implementation _attn_implementation_internal _attn_implementation_autoset
attention_dropout hidden_dropout residual_dropout embedding_dropout dropout activation_dropout layerdrop resid_pdrop
embd_pdrop attn_pdrop classifier_dropout
router_aux_loss_coef router_jitter_noise aux_loss_alpha seq_aux ep_size pretraining_tp
max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
"""Fields of any family that change nothing of what a model computes from its tensors: ids, dtypes, training, sampling."""

_OFF: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "sliding_window": (0,),
    "partial_rotary_factor": (1,),
    "shared_expert_intermediate_size": (0,),
    "num_nextn_predict_layers": (0,),
    "num_mtp_layers": (0,),
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "pruned_heads": ({},),
    "chunk_size_feed_forward": (0,),
}
"""Fields of features that a family has only where it reads them: the values, beside None, at which they are off."""

_SIZES = (
    "num_hidden_layers hidden_size intermediate_size num_attention_heads vocab_size max_position_embeddings tie_word_embeddings"
)
_ROTARY = "rope_theta rope_scaling rope_parameters"
_DECODER = f"{_SIZES} {_ROTARY} num_key_value_heads head_dim hidden_act rms_norm_eps layer_types"
_WINDOW = "sliding_window use_sliding_window max_window_layers"
_EXPERTS = "num_local_experts num_experts n_routed_experts num_experts_per_tok moe_intermediate_size norm_topk_prob"
_ROUTING = "n_shared_experts routed_scaling_factor n_group topk_group"
_SPARSE = f"{_EXPERTS} shared_expert_intermediate_size decoder_sparse_step mlp_only_layers"
_DEEPSEEK = (
    f"{_SIZES} {_ROTARY} hidden_act rms_norm_eps {_EXPERTS} {_ROUTING} topk_method "
    "first_k_dense_replace num_nextn_predict_layers q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"
)
_MAMBA = "layers_block_type hybrid_override_pattern ssm_state_size mamba_num_heads mamba_head_dim n_groups"

_LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
}
_GPT = _LLAMA | {"normalization": "LayerNorm", "gated_linear_unit": False, "add_bias_linear": True}
_LEARNED = _GPT | {"position_embedding_type": "learned_absolute"}
_LATENT = _LLAMA | {"multi_latent_attention": True, "qk_layernorm": True}
SIGMOID: dict[str, Any] = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
_DEEPSEEK3 = HfFamily(
    _DEEPSEEK,
    _LATENT | SIGMOID,
    {
        "moe_layer_freq": (1,),
        "rope_interleave": (True,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "norm_topk_prob": (True,),
    },
    "head_dim qk_head_dim num_key_value_heads",
    derived="",
)

FAMILIES = {
    "llama": HfFamily(_DECODER, _LLAMA),
    "mistral": HfFamily(f"{_DECODER} sliding_window", _LLAMA, derived="head_dim"),
    "mixtral": HfFamily(
        f"{_DECODER} {_EXPERTS} sliding_window", _LLAMA | {"moe_router_pre_softmax": False}, derived="head_dim"
    ),
    "qwen2": HfFamily(f"{_DECODER} {_WINDOW}", _LLAMA | {"add_qkv_bias": True}, ignored="attention_bias", derived="head_dim"),
    "qwen2_moe": HfFamily(
        f"{_DECODER} {_WINDOW} {_SPARSE} qkv_bias",
        _LLAMA | {"add_qkv_bias": True, "moe_shared_expert_gate": True},
        ignored="attention_bias",
        derived="head_dim",
    ),
    "qwen3": HfFamily(f"{_DECODER} {_WINDOW}", _LLAMA | {"qk_layernorm": True}, derived=""),
    "qwen3_moe": HfFamily(
        f"{_DECODER} {_WINDOW} {_SPARSE}", _LLAMA | {"qk_layernorm": True}, ignored="qkv_bias", derived="head_dim"
    ),
    "deepseek_v2": HfFamily(
        _DEEPSEEK,
        _LATENT | {"moe_router_pre_softmax": True},
        {
            "moe_layer_freq": (1,),
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
            "norm_topk_prob": (False,),
        },
        "head_dim qk_head_dim num_key_value_heads",
        derived="",
    ),
    "deepseek_v3": _DEEPSEEK3,
    "kimi_k2": _DEEPSEEK3,
    "nemotron": HfFamily(
        f"{_SIZES} {_ROTARY} num_key_value_heads head_dim hidden_act norm_eps partial_rotary_factor",
        _LLAMA
        | {
            "normalization": "LayerNorm",
            "layernorm_zero_centered_gamma": True,
            "gated_linear_unit": False,
            "rotary_percent": 0.5,
        },
        ignored="rms_norm_eps",
    ),
    "nemotron_h": HfFamily(
        f"{_SIZES} {_EXPERTS} {_ROUTING} {_MAMBA} num_key_value_heads head_dim attention_head_dim mlp_hidden_act "
        "layer_norm_epsilon moe_shared_expert_intermediate_size num_nextn_predict_layers",
        _LLAMA | {"gated_linear_unit": False, "position_embedding_type": "none"},
        {
            "use_bias": (False,),
            "use_conv_bias": (True,),
            "mamba_proj_bias": (False,),
            "mamba_hidden_act": ("silu",),
            "conv_kernel": (4,),
            "time_step_limit": ([0, float("inf")], [0, {"__float__": "Infinity"}]),
            "residual_in_fp32": (False,),
            "moe_latent_size": (),
            "norm_topk_prob": (True,),
        },
        "rms_norm_eps rope_theta rope_scaling num_query_groups expand chunk_size time_step_rank time_step_min time_step_max "
        "time_step_floor use_mamba_kernels mamba_ssm_cache_dtype rescale_prenorm_residual num_logits_to_keep "
        "moe_shared_expert_overlap mtp_layers_block_type mtp_hybrid_override_pattern",
        derived="",
    ),
    "starcoder2": HfFamily(
        f"{_SIZES} {_ROTARY} num_key_value_heads hidden_act norm_epsilon sliding_window use_bias layer_types",
        _GPT,
        {"norm_type": ("layer_norm",), "mlp_type": ("default",)},
        "head_dim rms_norm_eps",
        "head_dim",
    ),
    "gpt2": HfFamily(
        "n_layer n_embd n_inner n_head n_positions vocab_size activation_function layer_norm_epsilon tie_word_embeddings",
        _LEARNED | {"share_embeddings_and_output_weights": True},
        {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
        "n_ctx reorder_and_upcast_attn summary_type summary_use_proj summary_activation summary_proj_to_labels "
        "summary_first_dropout",
    ),
    "opt": HfFamily(
        "num_hidden_layers hidden_size ffn_dim num_attention_heads vocab_size max_position_embeddings tie_word_embeddings "
        "activation_function enable_bias word_embed_proj_dim",
        _LEARNED | {"layernorm_epsilon": 1e-5},
        {"do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,), "layer_norm_elementwise_affine": (True,)},
    ),
}
"""`model_type` -> what is known of it."""


def understood(fields: Mapping[str, Any], where: str) -> tuple[HfFamily, dict[str, Any]]:
    """The family of a config and those of its fields that say something, in the forms of `Fields`.

    Raises CheckpointError for a family that is not known and for every field that is not understood or has a value that no
    model can have, together.
    """
    kind = fields.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise CheckpointError(f"{where}: {_unknown_family(kind)}")
    told = {key: value for key, value in fields.items() if value is not None}
    problems = list(_foreign(told, family))
    wanted = {key: value for key, value in told.items() if key in family.keys.split()}
    try:
        found = Fields.model_validate(wanted)
    except ValidationError as error:
        problems += _wrong(error)
    if problems:
        more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
        raise CheckpointError(f"{where}: {'; '.join(problems[:_MOST_PROBLEMS])}{more}")
    return family, {key: getattr(found, key) for key in wanted}


def _unknown_family(kind: Any) -> str:
    known = ", ".join(sorted(FAMILIES))
    if not isinstance(kind, str):
        return f"it has no model_type: mptq understands the configs of {known}"
    return (
        f"mptq does not understand the config of model_type {_short(kind)}, only those of {known}: leave --hf-config out, and "
        "give what the checkpoint does not say as --config key=value"
    )


def _foreign(told: Mapping[str, Any], family: HfFamily) -> Iterator[str]:
    """What is wrong with the fields that `Fields` does not check."""
    fixed = _OFF | dict(family.fixed)
    known = {*_NEUTRAL.split(), *family.ignored.split()} | (set(family.keys.split()) - set(family.fixed))
    for key, value in told.items():
        if key in known:
            continue
        if key not in fixed:
            yield f"{_name(key)} is {_short(value)}: {_MAY_CHANGE}"
        elif value not in fixed[key]:
            accepted = " or ".join(map(_short, fixed[key])) or "absent"
            yield f"{key} is {_short(value)}, and mptq can express this family only where it is {accepted}"


def _wrong(error: ValidationError) -> Iterator[str]:
    """What is wrong with the values of fields; of rotary scaling of an unknown kind, the kind alone."""
    items = error.errors()
    unknown = {item["loc"][:-1] for item in items if item["loc"][-1:] in (("rope_type",), ("type",))}
    for item in items:
        if item["type"] == "extra_forbidden" and item["loc"][:-1] in unknown:
            continue
        place = ".".join(_name(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ").replace("Input should", "it must", 1)
        if item["type"] == "extra_forbidden":
            message = _MAY_CHANGE
        yield f"{place} is {_short(item['input'])}: {message}" if place else message


def _name(key: object) -> str:
    word = str(key)
    return word if len(word) <= 60 and word.isascii() and word.isprintable() else _short(word)


def _short(value: Any) -> str:
    return _REPR.repr(value)


_MAY_CHANGE = "mptq does not understand it, and it may change what the model computes"
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
