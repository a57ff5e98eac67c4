"""The fields that a Hugging Face `config.json` may have, by family; any other field is an error. No torch.

Silently ignoring a field that changes what the model computes would produce a different model. So each field must be
one that the family reads, one that has no effect, or one with the only value that mptq supports for the family.
Source: the configuration and modeling files of each family in transformers; for older fields, releases 4.30 to 4.57.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from mptq.errors import CheckpointError
from mptq.model.architectures.config_json import concentration
from mptq.model.architectures.config_type import ConfigType
from mptq.model.architectures.registry import CONFIG_TYPES
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
    """`rope_parameters`, or `rope_scaling` in transformers before 5, where `rope_type` was originally `type`."""

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
        """The kind of frequency scaling."""
        return self.rope_type or self.type or "default"

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.rope_type and self.type and self.rope_type != self.type:
            raise ValueError(f"rope_type and type contradict each other ({self.rope_type}, {self.type})")
        if self.factor is not None and not (self.rope_type or self.type):
            raise ValueError("has a factor but no rope_type")
        if self.factor is None and self.kind != "default":
            raise ValueError(f"has no factor, which rope_type {self.kind} requires")
        return self

    @model_validator(mode="after")
    def _concentrated(self) -> Self:
        """Checks that an explicit factor on cosine and sine equals the one that follows from the other fields.

        There is no setting for the factor itself.
        """
        factor = self.factor or 1.0
        expected = concentration(factor, 1.0 if self.mscale is None else self.mscale, self.mscale_all_dim or 0.0)
        stated = {"attention_factor": expected, "attn_factor": expected / concentration(factor, 1.0, 0.0)}
        for name, value in stated.items():
            found = getattr(self, name)
            if found is not None and (self.kind != "yarn" or not math.isclose(found, value, rel_tol=1e-6)):
                raise ValueError(f"has {name} {found:g}, which mptq supports only if yarn's mscale and mscale_all_dim imply it")
        return self


class Fields(BaseModel):
    """The fields that mptq understands, with their valid values; None is treated as absent."""

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
            raise ValueError("layer_types has sliding_attention, but there is no sliding_window that this family reads")
        if self.word_embed_proj_dim not in (None, self.hidden_size):
            raise ValueError(f"word_embed_proj_dim is {self.word_embed_proj_dim}, but must be hidden_size ({self.hidden_size})")
        if layers is not None and (self.first_k_dense_replace or 0) > layers:
            raise ValueError(f"first_k_dense_replace is {self.first_k_dense_replace}, but there are {layers} layers")
        return self


SETTINGS = {
    "num_hidden_layers": "num_layers",
    "n_layer": "num_layers",
    "hidden_size": "hidden_size",
    "n_embd": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "n_inner": "ffn_hidden_size",
    "ffn_dim": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "n_head": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "attention_head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "n_positions": "max_position_embeddings",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "rope_theta": "rotary_base",
    "partial_rotary_factor": "rotary_percent",
    "num_local_experts": "num_moe_experts",
    "num_experts": "num_moe_experts",
    "n_routed_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
    "n_group": "moe_router_num_groups",
    "topk_group": "moe_router_group_topk",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
    "num_nextn_predict_layers": "mtp_num_layers",
    "use_bias": "add_bias_linear",
    "enable_bias": "add_bias_linear",
    "qkv_bias": "add_qkv_bias",
    "ssm_state_size": "mamba_state_dim",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "n_groups": "mamba_num_groups",
}
"""Field -> the setting that it gives, by megatron-core's name (settings.py)."""
EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
ACTIVATIONS = ("hidden_act", "mlp_hidden_act", "activation_function")

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
"""Fields of any family that do not affect what a model computes from its tensors: ids, dtypes, training, sampling."""

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
"""Fields of optional features -> the values besides None that turn them off; others need a family that reads them."""


def understood(fields: Mapping[str, Any], where: str) -> tuple[ConfigType, dict[str, Any]]:
    """Returns the type of a config, and its fields that are read and not None, validated by `Fields`.

    Raises CheckpointError for an unknown `model_type`, or one that lists all fields that are not understood or have
    invalid values.
    """
    model_type = fields.get("model_type")
    config_type = CONFIG_TYPES.get(model_type) if isinstance(model_type, str) else None
    if config_type is None:
        raise CheckpointError(f"{where}: {_unknown_type(model_type)}")
    given = {key: value for key, value in fields.items() if value is not None}
    problems = list(_foreign(given, config_type))
    read = {key: value for key, value in given.items() if key in config_type.fields.split()}
    try:
        found = Fields.model_validate(read)
    except ValidationError as error:
        problems += _wrong(error)
    if problems:
        more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
        raise CheckpointError(f"{where}: {'; '.join(problems[:_MOST_PROBLEMS])}{more}")
    return config_type, {key: getattr(found, key) for key in read}


def _unknown_type(model_type: Any) -> str:
    known = ", ".join(sorted(CONFIG_TYPES))
    if not isinstance(model_type, str):
        return f"it has no model_type: mptq understands the configs of {known}"
    return (
        f"mptq does not understand the config of model_type {_short(model_type)}, only those of {known}: omit --hf-config "
        "and pass settings that the checkpoint lacks as --config key=value"
    )


def _foreign(given: Mapping[str, Any], config_type: ConfigType) -> Iterator[str]:
    """Yields the problems with fields that `Fields` does not check."""
    fixed = _OFF | dict(config_type.fixed)
    read = set(config_type.fields.split()) - set(config_type.fixed)
    known = read.union(_NEUTRAL.split(), config_type.ignored.split())
    for key, value in given.items():
        if key in known:
            continue
        if key not in fixed:
            yield f"{_name(key)} is {_short(value)}: {_MAY_CHANGE}"
        elif value not in fixed[key]:
            accepted = " or ".join(map(_short, fixed[key])) or "absent"
            yield f"{key} is {_short(value)}, but mptq supports this family only if it is {accepted}"


def _wrong(error: ValidationError) -> Iterator[str]:
    """Yields the problems with values of fields; for rotary scaling of an unknown kind, only the kind."""
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
