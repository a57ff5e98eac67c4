"""Generate greedily from a Hugging Face directory with vLLM on the CPU, and check the weights and scales that it loaded.

    python scripts/generate_vllm.py [--emulate] OUT        # in the environment created by check_vllm.sh

Columns of every linear's weight are computed and compared with the file's, and so are the scales of the cache
(hf_output.py) and, with --emulate, the weights of routed experts and the scales of their inputs. Exits with 1 if they
differ. Without a tokenizer in the directory, prompts and continuations are token ids.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import hf_output
import torch

# A single process, so that the loaded model can be inspected and operators can be added.
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def methods(model: torch.nn.Module) -> Counter[str]:
    """Count the linears of each name by their quantization method, scheme and kernel in vLLM."""
    found: Counter[str] = Counter()
    for name, layer in linears(model).items():
        scheme = getattr(layer, "scheme", None)
        owner = scheme or layer.quant_method
        kernel = next((value for key, value in vars(owner).items() if key.endswith(("linear", "kernel"))), None)
        parts = [type(part).__name__ for part in (layer.quant_method, scheme, kernel) if part is not None]
        found[f"{name.rpartition('.')[2]}: {' / '.join(parts)}"] += 1
    return found


def linears(model: torch.nn.Module) -> dict[str, Any]:
    """The linears of the layers, fused as vLLM fuses them."""
    from vllm.model_executor.layers.linear import LinearBase

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LinearBase)}


def check_linears(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    """Print the checks of the linears; return whether all compute with the file's values."""
    for line, count in sorted(methods(model).items()):
        print(f"  {count:3} {line}")
    packed = getattr(model, "packed_modules_mapping", {})
    worst = {True: (0.0, ""), False: (0.0, "")}
    for name, layer in linears(model).items():
        owner, _, last = name.rpartition(".")
        modules = [f"{owner}.{member}" for member in packed.get(last, [last])]
        fp8 = tensors[f"{modules[0]}.weight"].dtype == torch.float8_e4m3fn
        worst[fp8] = max(
            worst[fp8], (hf_output.column_error(lambda units, layer=layer: layer(units)[0], modules, tensors), name)
        )
    for fp8, (error, name) in worst.items():
        print(f"  {'FP8' if fp8 else 'BF16'} weights against the file's: {error:.1e} at most {name and f'({name})'}")
    return max(worst.values())[0] < hf_output.NOISE


def check_experts(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    """Print the checks of routed experts, whose weights vllm_cpu.py keeps; return whether they are the file's."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    worst, static = 0.0, True
    layers = [layer for layer in model.modules() if isinstance(layer, RoutedExperts) and hasattr(layer, "loaded")]
    for layer in layers:
        names = {
            "w13": [name for name in (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name) if name],
            "w2": [layer.ckpt_down_proj_name],
        }
        for (kind, members), loaded in zip(names.items(), layer.loaded, strict=True):
            modules = [[f"{layer.layer_name}.{expert}.{name}" for name in members] for expert in range(len(loaded))]
            for weight, group in zip(loaded, modules, strict=True):
                stored = torch.cat([hf_output.weight(tensors, module) for module in group])
                worst = max(worst, float(torch.linalg.vector_norm(weight - stored) / torch.linalg.vector_norm(stored)))
            scales = [tensors[f"{group[0]}.input_scale"] for group in modules if f"{group[0]}.input_scale" in tensors]
            if scales:  # a single scale for all experts: the largest of theirs
                static &= bool((getattr(layer, f"{kind}_input_scale") == torch.stack(scales).max()).all())
    if layers:
        kinds = sorted({str(tensors[name].dtype) for name in tensors if ".experts." in name and name.endswith(".weight")})
        print(f"  experts of {len(layers)} layers ({', '.join(kinds)}) against the file's: {worst:.1e} at most")
    return worst < hf_output.NOISE and static


def check_cache(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    """Print the scales of K and V; return whether they are the file's."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    layers = [layer for layer in model.modules() if isinstance(layer, Attention | MLAAttention)]
    found = [(layer._k_scale_float, layer._v_scale_float) for layer in layers]
    stored = [hf_output.kv_scales(tensors, index) for index in range(len(layers))]
    right = [
        layer.kv_cache_dtype.startswith("fp8") and (one == two) for layer, one, two in zip(layers, found, stored, strict=True)
    ]
    if stored[0] is None:
        print(f"  cache: {layers[0].kv_cache_dtype}, no scales")
        return True
    first = ", ".join(f"{scale:.6g}" for scale in (*found[0], *found[-1]))
    print(
        f"  cache: {layers[0].kv_cache_dtype}, K and V of the first and last layer {first}; {sum(right)} of {len(right)} equal"
    )
    return all(right)


def load(folder: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    """The model loaded by vLLM. The output sets the cache's dtype, except in DeepSeek's form, where vLLM needs the option."""
    from vllm import LLM

    asked = "fp8" if config.get("quant_method") == "fp8" and hf_output.kv_scales(tensors, 0) else "auto"
    silent = not (Path(folder) / "tokenizer_config.json").is_file()
    return LLM(
        folder,
        max_model_len=min(512, longest(Path(folder))),
        enforce_eager=True,
        dtype="bfloat16",
        kv_cache_dtype=asked,
        skip_tokenizer_init=silent,
    )


def longest(folder: Path) -> int:
    """The maximum number of positions of the model."""
    return int(json.loads((folder / "config.json").read_text())["max_position_embeddings"])


def prompts(folder: Path) -> list[Any]:
    """Text prompts, or token ids for a model without a tokenizer."""
    if (folder / "tokenizer_config.json").is_file():
        return list(hf_output.PROMPTS)
    return [{"prompt_token_ids": list(range(start, start + 12))} for start in (3, 100, 200)]


def main() -> None:
    """Load the model with the output's own quantization config, check it, and print the continuations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--emulate", action="store_true", help="add what vLLM's CPU build lacks (vllm_cpu.py)")
    options = parser.parse_args()
    os.environ |= SETTINGS | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if options.emulate:
        import vllm_cpu

        vllm_cpu.add_missing_operators()
        vllm_cpu.add_missing_kernels()
        vllm_cpu.add_missing_experts()
    from vllm import SamplingParams

    config, tensors = hf_output.load_config(options.out), hf_output.load_tensors(options.out)
    model = load(str(options.out), config, tensors)
    print(f"{options.out.name}: {config.get('quant_method', 'not quantized')}{', emulated' if options.emulate else ''}")
    checks = [check_linears, check_experts, check_cache]
    right = [model.apply_model(lambda inner, check=check: check(inner, tensors))[0] for check in checks]
    asked = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    for request in model.generate(prompts(options.out), asked, use_tqdm=False):
        (found,) = request.outputs
        print(f"  {request.prompt or request.prompt_token_ids!r} -> {found.text or list(found.token_ids)!r}")
    if not all(right):
        sys.exit(f"{options.out}: vLLM does not compute with the weights and scales of the file")


if __name__ == "__main__":
    main()
