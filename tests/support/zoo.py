"""Tiny models of every architecture, as megatron-core builds and saves them: the table, and helpers for tests.

A row is the command line of a Megatron-LM training run (the common part is in `COMMON`), the class of transformers that
computes the same function, and notes on the mapping. tests/support/build_zoo.py builds them, in a separate process.

Behavior of megatron-core 0.19.2, for all of them:

- Arguments are stored under their destinations: --norm-epsilon is `layernorm_epsilon`, --apply-layernorm-1p
  `layernorm_zero_centered_gamma`. Biases in linears imply `add_qkv_bias`.
- With `bias_gelu_fusion`, which is on unless there are no biases, gelu is the tanh approximation; without it, gelu is exact.
- TEGroupedMLP saves what SequentialMLP saves: `mlp.experts.experts.linear_fc1.weight`, experts stacked, or with one key per
  layer `mlp.experts.experts.0.linear_fc1.weight_w`. Its parameters' names, `weight0`, are not in torch_dist checkpoints.
- Layers with experts are stacked like others, unless some layers have none: then there is one key per layer.
- Latent attention stores rope's pairs as neighbors (rope_interleave), and multiplies its softmax scale by the square of
  yarn's mscale for all dimensions; mla_down_proj_fusion changes nothing that is saved.
- A prediction layer's own layer is `mtp.layers.0.transformer_layer` in checkpoints, `mtp_model_layer` in the model.
- `expert_bias` is float32. Mamba's in_proj and conv1d are saved in parts: `in_proj.weight.z`, `.x`, `.B`, `.C`, `.dt`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.processes import checked, python
from tests.support.sharing import Shared

if TYPE_CHECKING:
    import torch

VOCABULARY = 500
"""Number of ids in use: the table has 512 rows, and the other rows are random too."""

COMMON = """
    --hidden-size 256 --ffn-hidden-size 384 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256
    --vocab-size 500 --make-vocab-size-divisible-by 128 --tokenizer-type NullTokenizer --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 1 --train-iters 100 --lr 1e-4 --save-interval 100 --ckpt-format torch_dist --transformer-impl local
    --distributed-backend gloo --bf16 --use-cpu-initialization --no-initialization --no-save-optim --no-save-rng
    --no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-masked-softmax-fusion --no-persist-layer-norm
    --no-gradient-accumulation-fusion
"""
"""Arguments of every run; a row's own arguments come after them and take precedence."""

ROPE = "--position-embedding-type rope --untie-embeddings-and-output-weights"
LLAMA = f"--num-layers 2 --normalization RMSNorm --swiglu --disable-bias-linear {ROPE}"
GQA = "--group-query-attention --num-query-groups 2"

# The other dispatchers need CUDA streams; the order in which tokens reach experts does not matter.
MIXTURE = "--moe-router-load-balancing-type none --moe-token-dispatcher-type allgather"
QWEN_MOE = f"{LLAMA} {GQA} {MIXTURE} --num-experts 8 --moe-router-topk 3 --moe-ffn-hidden-size 128 --norm-epsilon 1e-6"
QWEN3_MOE = f"{QWEN_MOE} --qk-layernorm --kv-channels 128"
MLA = (
    f"--normalization RMSNorm --swiglu --disable-bias-linear {ROPE} --norm-epsilon 1e-6 --multi-latent-attention "
    "--qk-layernorm --kv-lora-rank 128 --qk-head-dim 64 --qk-pos-emb-head-dim 32 --v-head-dim 64"
)
DEEPSEEK = (
    f"{MLA} {MIXTURE} --num-layers 3 --moe-layer-freq [0,1,1] --moe-ffn-hidden-size 128 "
    "--moe-shared-expert-intermediate-size 256 --moe-router-pre-softmax --moe-router-dtype fp32"
)
YARN = "--rotary-scaling-factor 40 --mscale 0.707 --mscale-all-dim 0.707"
LONG = "--position-embedding-type yarn --rotary-scaling-factor 4 --yarn-original-max-position-embeddings 64"
DEEPSEEK_V3 = (
    f"{DEEPSEEK} --q-lora-rank 128 --num-experts 16 --moe-router-topk 4 --moe-router-num-groups 4 --moe-router-group-topk 2 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5"
)
HYBRID = (
    f"--normalization RMSNorm --squared-relu --disable-bias-linear --position-embedding-type none {GQA} --is-hybrid-model "
    "--untie-embeddings-and-output-weights --mamba-state-dim 32 --mamba-head-dim 64 --mamba-num-heads 8 --mamba-num-groups 2"
)


@dataclass(frozen=True)
class Row:
    """One architecture.

    `argv` is what the training run adds to `COMMON`; `hf` the class of transformers; `note` describes differences.
    `length` is the number of tokens of each of the four sequences; with `te`, tensors are saved under the names of
    Transformer Engine's layers where they differ from the local ones (zoo_weights.py, `te_key`). `activation` names a
    function of megatron.core.activations and `embedding_scale` is the factor on the embeddings: Megatron-Bridge sets
    these on the config and the model, and no argument specifies them.
    """

    argv: str
    hf: str
    note: str = ""
    length: int = 24
    te: bool = False
    activation: str | None = None
    embedding_scale: float = 1.0

    @property
    def group(self) -> str:
        """The models that are built in one process: starting one costs more than several models."""
        kinds = {"--hybrid-layer-pattern": "hybrid", "--multi-latent-attention": "latent", "--num-experts": "mixture"}
        return next((kind for flag, kind in kinds.items() if flag in self.argv.split()), "dense")


ZOO: dict[str, Row] = {
    "llama": Row(f"{LLAMA} {GQA}", "LlamaForCausalLM"),
    "llama-mha-tied": Row(
        LLAMA.replace(" --untie-embeddings-and-output-weights", ""),
        "LlamaForCausalLM",
        "tie_word_embeddings; num_query_groups is 1 in the args, which has no effect without group_query_attention",
    ),
    "llama-mqa": Row(f"{LLAMA} --group-query-attention --num-query-groups 1", "LlamaForCausalLM", "one KV head"),
    "llama3": Row(
        f"{LLAMA} {GQA} --use-rope-scaling --rope-scaling-factor 8 --rotary-base 500000",
        "LlamaForCausalLM",
        "rope_type llama3: factor 8; low_freq_factor 1, high_freq_factor 4 and original_max_position_embeddings 8192 are "
        "constants in megatron-core. Only waves longer than 2048 positions change: hence the longer sequences",
        length=192,
    ),
    "mistral": Row(
        f"{LLAMA} {GQA} --window-size 7,0",
        "MistralForCausalLM",
        "window_size (7, 0) is seven positions before a token and the token itself: sliding_window = 8. The local core "
        "attention applies it",
    ),
    "qwen2": Row(f"{LLAMA} {GQA} --add-qkv-bias", "Qwen2ForCausalLM", "biases only in linear_qkv"),
    "qwen3": Row(
        f"{LLAMA} {GQA} --qk-layernorm --kv-channels 128 --rotary-base 1000000",
        "Qwen3ForCausalLM",
        "RMSNorm of each head of q and k, before the rotation, one weight [head_dim] for all heads: q_norm, k_norm",
    ),
    "qwen2-yarn": Row(
        f"{LLAMA} {GQA} --add-qkv-bias {LONG}",
        "Qwen2ForCausalLM",
        "rope_type yarn; the factor on cosine and sine is the default of every engine, 0.1 ln 4 + 1. Waves that turn less than "
        "once in 64 positions are stretched: hence the longer sequences",
        length=96,
    ),
    "qwen3-yarn": Row(
        f"{LLAMA} {GQA} --qk-layernorm --kv-channels 128 {LONG} --mscale 0.707 --no-yarn-correction-range-round-to-int",
        "Qwen3ForCausalLM",
        "with another factor on cosine and sine: attention_factor, and truncate False",
        length=96,
    ),
    "partial-rotary": Row(
        f"{LLAMA} {GQA} --rotary-percent 0.5",
        "none",
        "the first half of each head is rotated. transformers' LlamaForCausalLM does not read partial_rotary_factor",
    ),
    "arcee": Row(
        f"--num-layers 2 --normalization RMSNorm --squared-relu --disable-bias-linear {ROPE} {GQA}",
        "ArceeForCausalLM",
        "an MLP without a gate: hidden_act relu2, up_proj and down_proj",
    ),
    "nemotron": Row(
        f"--num-layers 2 --squared-relu --apply-layernorm-1p --rotary-percent 0.5 --disable-bias-linear {ROPE} {GQA}",
        "NemotronForCausalLM",
        "LayerNorm with (1 + weight) and bias; norm_eps; partial_rotary_factor; hidden_act relu2; up_proj and down_proj",
    ),
    "gpt": Row(
        "--num-layers 2 --ffn-hidden-size 512",
        "GPT2LMHeadModel",
        "with bias_gelu_fusion, the default, the fused function computes the tanh approximation: activation gelu_new. GPT-2 "
        "has its linears transposed (Conv1D) and q, k, v one after another, not interleaved by head; n_inner = 512",
    ),
    "gpt-erf": Row(
        "--num-layers 2 --ffn-hidden-size 512 --no-bias-gelu-fusion",
        "GPT2LMHeadModel",
        "without the fusion it is torch's exact gelu: activation gelu",
    ),
    "gpt-rope": Row(
        f"--num-layers 2 {ROPE} {GQA}",
        "Starcoder2ForCausalLM",
        "use_bias, hidden_act gelu_pytorch_tanh (bias_gelu_fusion), norm_epsilon; mlp_type default: c_fc and c_proj",
    ),
    "gemma": Row(
        "--num-layers 2 --normalization RMSNorm --apply-layernorm-1p --disable-bias-linear --position-embedding-type rope "
        "--kv-channels 128 --group-query-attention --num-query-groups 1",
        "GemmaForCausalLM",
        "the args specify neither the gate nor the activation (swiglu False): there is no argument for a gated gelu, and "
        "nothing reads --openai-gelu. The scale of the embeddings is not in them either, as Megatron-Bridge trains it; "
        "--use-mup --mup-embedding-mult 16 --mup-attn-scale-power 0.5 is the same function bit for bit",
        activation="fast_gelu",
        embedding_scale=16.0,
    ),
    "mixtral": Row(
        f"{LLAMA} {GQA} {MIXTURE} --num-experts 4 --moe-router-topk 2",
        "MixtralForCausalLM",
        "softmax over the chosen logits, which is the softmax over all, normalized",
    ),
    "qwen2-moe": Row(
        f"{QWEN_MOE} --add-qkv-bias --moe-router-pre-softmax "
        "--moe-shared-expert-intermediate-size 256 --moe-shared-expert-gate",
        "Qwen2MoeForCausalLM",
        "moe_router_pre_softmax is norm_topk_prob False, as Megatron-Bridge maps it for Qwen3-MoE; it has no Qwen2-MoE",
    ),
    "qwen3-moe": Row(QWEN3_MOE, "Qwen3MoeForCausalLM", "norm_topk_prob True"),
    "qwen3-moe-pre-softmax": Row(f"{QWEN3_MOE} --moe-router-pre-softmax", "Qwen3MoeForCausalLM", "norm_topk_prob False"),
    "moe-freq-list": Row(
        f"{QWEN3_MOE} --num-layers 3 --moe-layer-freq [0,1,1]",
        "Qwen3MoeForCausalLM",
        "1 is a layer with experts: mlp_only_layers [0]. One key per layer",
    ),
    "moe-freq-number": Row(
        f"{QWEN3_MOE} --num-layers 4 --moe-layer-freq 2",
        "Qwen3MoeForCausalLM",
        "layers 0 and 2 have experts, while decoder_sparse_step 2 means 1 and 3: so mlp_only_layers [1, 3]",
    ),
    "deepseek-v2-lite": Row(
        f"{DEEPSEEK} {YARN} --num-experts 8 --moe-router-topk 3 --moe-router-topk-scaling-factor 1.5 "
        "--moe-router-num-groups 1 --moe-router-group-topk 1",
        "DeepseekV2ForCausalLM",
        "greedy routing in one group, which limits nothing, norm_topk_prob False. The norms of the latents have epsilon 1e-6 "
        "in transformers, regardless of the config, hence norm_epsilon 1e-6",
    ),
    "deepseek-v3": Row(
        f"{DEEPSEEK_V3} --rope-type rope",
        "DeepseekV3ForCausalLM",
        "norm_topk_prob True. A group's score is the sum of its best topk / group_topk experts, in transformers of its best "
        "two: the same only if topk is twice group_topk",
    ),
    "deepseek-v3-yarn": Row(f"{DEEPSEEK_V3} {YARN}", "DeepseekV3ForCausalLM"),
    "deepseek-v3-latents": Row(
        f"{DEEPSEEK_V3} {YARN} --q-lora-rank 256 --kv-lora-rank 512 --qk-pos-emb-head-dim 64 --qk-head-dim 128 "
        "--v-head-dim 128",
        "DeepseekV3ForCausalLM",
        "the latents of the real model, 512 + 64: 576 rows are not a multiple of 128, and the only size that engines' kernels "
        "of latent attention are built for",
    ),
    "gpt-oss": Row(
        f"{GQA} {MIXTURE} --num-layers 4 --normalization RMSNorm --untie-embeddings-and-output-weights --num-experts 4 "
        "--moe-router-topk 2 --quick-geglu --no-bias-gelu-fusion --glu-linear-offset 1 --activation-func-clamp-value 7 "
        "--softmax-type learnable "
        "--window-size 7,0 --window-attn-skip-freq 2 --position-embedding-type yarn --rotary-base 150000 "
        "--rotary-scaling-factor 32 --yarn-original-max-position-embeddings 4096 --no-yarn-correction-range-round-to-int",
        "GptOssForCausalLM",
        "every second layer is a full one: layer_types sliding, full, sliding, full. Biases in all linears, including the "
        "experts' and the router's. rope_type yarn with truncate False; mscale 1 and mscale_all_dim 0, the defaults, are "
        "equivalent to no mscale in transformers. Gate and up are halves here, alternating rows in transformers. Without the "
        "fusion, because the fused function clamps before it adds the experts' bias, which SequentialMLP leaves to it: "
        "transformers and grouped experts, whose linears add it themselves, clamp the sum",
    ),
    "deepseek-v3-mtp": Row(f"{DEEPSEEK_V3} {YARN} --mtp-num-layers 1", "DeepseekV3ForCausalLM"),
    "nemotron-h": Row(
        f"{HYBRID} --hybrid-layer-pattern M*-M",
        "NemotronHForCausalLM",
        "no positions at all; every layer is one of Mamba 2 (M), attention (*) and MLP (-), and has one norm",
    ),
    "nemotron-h-moe": Row(
        f"{HYBRID} {MIXTURE} --hybrid-layer-pattern ME*E --num-experts 8 --moe-router-topk 3 --moe-ffn-hidden-size 128 "
        "--moe-shared-expert-intermediate-size 256 --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
        "--moe-router-topk-scaling-factor 2.5 --moe-router-dtype fp32 --moe-router-num-groups 1 --moe-router-group-topk 1",
        "NemotronHForCausalLM",
        "experts (E) without gates",
    ),
}

for _name in ("mixtral", "moe-freq-list", "deepseek-v2-lite", "deepseek-v3-mtp"):
    ZOO[f"{_name}-te"] = replace(ZOO[_name], te=True, note=f"the tensors of {_name}")


class Builder:
    """Builds each model once, in separate processes."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def __call__(self, name: str, *, tp: int = 1, pp: int = 1, ep: int = 1, per_layer: bool = False) -> Path:
        """The folder of the model: `ckpt`, and `logits.pt` if it was built in one process.

        Models that take one process are built together with the rest of their group, others alone.
        """
        sizes = {"tp": tp, "pp": pp, "ep": ep}
        options = [f"--{kind}={size}" for kind, size in sizes.items()] + ["--per-layer"] * per_layer
        alone = per_layer or max(sizes.values()) > 1
        names = [name] if alone else [other for other, row in ZOO.items() if row.group == ZOO[name].group]
        layout = "-".join([*map(str, sizes.values()), "layers" if per_layer else "stacks"])

        def build(folder: Path) -> None:
            module = "tests.support.build_zoo"
            checked(python("-m", module, *names, "--out", folder, *options, processes=tp * pp * ep))

        return self.shared(f"zoo/{layout}-{names[0]}", build) / name


def observed(folder: Path) -> dict[str, torch.Tensor]:
    """megatron-core's results: "ids", "logits" and "hidden" (tests/support/build_zoo.py)."""
    import torch

    return torch.load(folder / "logits.pt", weights_only=True)
