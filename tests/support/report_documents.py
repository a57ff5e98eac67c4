"""Documents of schema 2, like those of runs on models of any size; numbers are drawn with a fixed seed."""

import math
import random
from dataclasses import dataclass
from typing import Any

from mptq import report
from mptq.report.run_log import RunLog

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
BLOCKS = "E4M3, 128x128 blocks"
STATIC = "E4M3, one scale a tensor, static activations"


@dataclass
class Shape:
    """The model and the kind of run that a document describes."""

    layers: int = 30
    experts: int = 0
    formats: tuple[str, ...] = ("hf",)
    fidelity: bool = True
    hidden: int = 576


def document(shape: Shape = Shape()) -> dict[str, Any]:  # noqa: B008
    """A complete document."""
    draw = random.Random(7)
    rows = [row for form in shape.formats for layer in range(shape.layers) for row in tensors(draw, shape, form, layer)]
    base = {
        "schema": 2,
        "recipe": recipe(shape),
        "recipe_sha256": "e8a431d8c64859095daf92e7ddc3cfe95e9dd714904dab836c11e4d7d5c45504",
        "source": {"path": "/models/ckpt/iter_0000100", "iteration": 100, "metadata_sha256": "86e945abe926ecb1" * 4},
        "model": model(shape),
        "formats": list(shape.formats),
        **weights(shape),
        "schemes": {
            form: {STATIC if shape.fidelity else BLOCKS: len(rows) // len(shape.formats), "bfloat16": 1}
            for form in shape.formats
        },
        "excluded": ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(shape.layers) if shape.experts)],
        "differing": [],
        "dropped": {
            f"decoder.layers.mlp.linear_fc{part}._extra_state/shard_{layer}_{shape.layers}": "Transformer Engine's FP8 state"
            for part in (1, 2)
            for layer in range(shape.layers)
        },
        "predicted_peak_bytes": 1_113_246_208,
        "warnings": ["blocks of 128 split evenly across tensor-parallel ranks only up to TP=2"],
        "calibration": calibration(shape) if shape.fidelity else None,
        "fidelity": fidelity() if shape.fidelity else None,
        "gates": gates() if shape.fidelity else [],
        "relative_error": {form: report.relative_error(row for row in rows if row["format"] == form) for form in shape.formats},
        "layers": layers(draw, shape, rows),
        "tensors": rows,
    }
    return base | cost()


def recipe(shape: Shape) -> dict[str, Any]:
    fields = {"weights": {"scale": "block", "block_size": 128}, "hf": "deepseek-fp8"}
    if not shape.fidelity:
        return {"name": "fp8-blockwise", "description": "E4M3 weights in 128x128 blocks, as in DeepSeek-V3", **fields}
    words = "E4M3 weights and activations with one static scale a tensor, and an FP8 KV cache"
    return {"name": "fp8-static", "description": words, "weights": {"scale": "tensor"}, "kv_cache": "fp8"}


def model(shape: Shape) -> dict[str, Any]:
    return {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_experts": shape.experts or None,
        "vocab_size": 49152,
        "dtype": "bfloat16",
        "tokenizer": None,
    }


def weights(shape: Shape) -> dict[str, Any]:
    """Components, bytes and actions."""
    mlp = shape.layers * 3 * shape.hidden * 1536 * max(shape.experts, 1)
    attention = shape.layers * 4 * shape.hidden**2
    counts = {"embedding": 49152 * shape.hidden, "norms": 2 * shape.layers * shape.hidden, "attention": attention}
    counts |= {"experts": mlp, "router": shape.layers * shape.experts * shape.hidden} if shape.experts else {"mlp": mlp}
    quantized = {"attention", "mlp", "experts"}
    components = {
        name: {"parameters": count, "in": 2 * count}
        | {form: int(1.0005 * count) if name in quantized else 2 * count for form in shape.formats}
        for name, count in counts.items()
    }
    return {
        "bytes": {key: sum(row[key] for row in components.values()) for key in ("in", *shape.formats)},
        "components": components,
        "actions": {name: "FP8, 128x128 blocks" if name in quantized else "copied" for name in components},
    }


def tensors(draw: random.Random, shape: Shape, form: str, layer: int) -> list[dict[str, Any]]:
    """The rows of a layer in an output."""
    if form == "megatron":
        modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
        prefix = "decoder.layers"
    else:
        block = [f"experts.{expert}." for expert in range(shape.experts)] or [""]
        modules = [f"self_attn.{name}" for name in ATTENTION] + [f"mlp.{part}{name}" for part in block for name in MLP]
        prefix = "model.layers"
    heard = {kind: 2 ** draw.gauss(4 + 3 * layer / shape.layers, 0.6) for kind in ("qkv", "o_proj", "up", "down_proj")}
    return [tensor(draw, shape, form, f"{prefix}.{layer}.{module}.weight", heard) for module in modules]


def tensor(draw: random.Random, shape: Shape, form: str, name: str, heard: dict[str, float]) -> dict[str, Any]:
    kind = name.split(".")[-2]
    shared = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}.get(kind, kind)
    relative = abs(draw.gauss(0.0265, 0.0006)) * (1.2 if kind == "down_proj" else 1)
    amax = 2 ** draw.gauss(-1, 1.1)
    return {
        "format": form,
        "name": name,
        "source": f"decoder.layers.{name.split('.')[2]}.{name.split('.', 3)[3]}",
        "dtype_before": "bfloat16",
        "dtype_after": "float8_e4m3fn",
        "shape": [1536, shape.hidden],
        "amax": amax,
        "norm": 210.9 * amax,
        "relative_error": relative,
        "max_abs_error": amax / 28,
        "sqnr_db": -20 * math.log10(relative),
        "scheme": STATIC if shape.fidelity else BLOCKS,
        "scale_min": amax / 448 / 8,
        "scale_max": amax / 448,
        "zeros": draw.uniform(0, 0.004),
        "saturated": draw.uniform(0, 0.0004),
        "input_amax": heard.get(shared) if shape.fidelity else None,
        "served_error": None if shape.fidelity else 1.4 * relative,
        **(rounded(draw) if shape.fidelity else {}),
    }


def rounded(draw: random.Random) -> dict[str, Any]:
    nearest = abs(draw.gauss(0.022, 0.004))
    return {"rounding": "gptq", "output_error": nearest * draw.uniform(0.4, 0.9), "output_error_nearest": nearest}


def layers(draw: random.Random, shape: Shape, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = report.layer_rows(RunLog(rows=rows), shape.layers)
    error = 0.012
    for row in found:
        error *= 1 + draw.uniform(-0.02, 0.13) * 30 / shape.layers
        row["hidden_relative_error"] = error if shape.fidelity else None
        row["hidden_token_error"] = 1.1 * error if shape.fidelity else None
        row["hidden_cosine"] = 1 - error**2 / 2 if shape.fidelity else None
        scales = {"k_scale": draw.uniform(0.02, 0.1), "v_scale": draw.uniform(0.005, 0.02)}
        row["kv_cache"] = scales if shape.fidelity else None
        row["experts"] = experts(draw, shape) if shape.experts and shape.fidelity and row["layer"] else None
    return found


def experts(draw: random.Random, shape: Shape) -> dict[str, Any]:
    tokens = [max(0, int(2 ** draw.gauss(9, 2)) - 12) for _ in range(shape.experts)]
    return {"tokens": tokens, "fallback": [expert for expert, count in enumerate(tokens) if count < 32]}


def calibration(shape: Shape) -> dict[str, Any]:
    part = {"sequences": 512, "tokens": 1_048_576, "sha256": "ab12" * 16}
    names = (("c4.jsonl", "jsonl", 3.0), ("code", "parquet", 1.0))
    return {
        "datasets": [
            {"name": name, "kind": kind, "weight": weight, "sha256": "cd34" * 16, **sizes}
            for name, kind, weight in names
            for sizes in [
                {"documents": 812, "empty": 2, "copies": 3, "sequences": int(128 * weight), "tokens": int(262_144 * weight)}
            ]
        ],
        "default_data": False,
        "tokenizer": "/models/tokenizer",
        "seed": 1234,
        "packed": True,
        "seq_length": 2048,
        "calibration": part,
        "held_out": part | {"sequences": 64, "tokens": 131_072},
        "unseen": part | {"sequences": 64, "tokens": 131_072, "name": "plays"},
        "activation_bytes": 524_288 * shape.hidden * 2,
        "activations_on_disk": False,
        "propagate": "quantized",
        "method": "max",
    }


def fidelity() -> dict[str, Any]:
    return predictions() | {"unseen": predictions() | {"kl": {"mean": 0.0141, "standard_error": 0.0002}}, "served": None}


def predictions() -> dict[str, Any]:
    return {
        "tokens": 131_008,
        "sequences": 64,
        "kl": {"mean": 0.00832, "standard_error": 0.00009},
        "perplexity": {"reference": 12.413, "quantized": 12.498, "ratio": 1.00685, "ratio_standard_error": 0.0004},
        "top1_agreement": {"mean": 0.9641, "standard_error": 0.0005},
    }


def gates() -> list[dict[str, Any]]:
    return [
        {"name": "max_kl", "limit": 0.02, "value": 0.00832, "met": True},
        {"name": "max_ppl_increase", "limit": 0.5, "value": 0.685, "met": False},
    ]


def cost() -> dict[str, Any]:
    stages = {
        "imports": 7.411,
        "read": 2.367,
        "calibrate": 81.2,
        "quantize": 11.205,
        "measure": 5.782,
        "write": 3.1,
        "finish": 0.9,
    }
    return {
        "seconds": stages | {"total": 113.4},
        "bytes_per_second": {"read": 1.31e9, "write": 0.62e9},
        "peak_rss_bytes": 1_063_038_976,
        "versions": {"python": "3.12.1", "mptq": "0.1.0", "torch": "2.14.1", "safetensors": "0.8.0"},
    }
