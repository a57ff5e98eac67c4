"""Record how vLLM treats models that mptq writes: which linears it fuses and quantizes, and how it splits them over ranks.

    python -m tests.support.engine_cases DIR   # with mptq: a config.json for each case
    VLLM_ENV/bin/python scripts/record_vllm.py DIR tests/support/vllm_models.json   # the environment of check_vllm.sh

Builds each model on the meta device, with vLLM's own classes and quantization configs. For more than one rank, the
group size that vLLM sees is overridden; nothing is communicated. Each case has, per number of ranks: `packed`, the
packed_modules_mapping; `renamed`, prefixes that vLLM changes; `fp8` and `other`, the linears of the layers, the routed
experts and the output layer; and problems: `error`, an exception; `cut`, linears of which a rank has parts of blocks,
which vLLM builds (and then loads scales of the wrong rows for); `refined`, the factor by which Triton's MoE kernels
divide blocks that a rank has a part of.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

SETTINGS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
BLOCK = 128


def start(store: Path) -> None:
    """Set up a group of one process, in which models can be built; `store` is a file that torch.distributed creates."""
    import vllm_cpu
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    vllm_cpu.add_missing_operators()
    vllm_cpu.add_missing_kernels()
    vllm_cpu.add_missing_experts()
    checked = FusedMoEConfig.__post_init__

    def check(self: Any) -> None:
        with contextlib.suppress(NotImplementedError):
            checked(self)

    # vLLM computes experts without a gate only on GPUs; here nothing is computed.
    FusedMoEConfig.__post_init__ = check
    unquantized_fused_moe_method.select_unquantized_moe_backend = lambda **_: (None, None)
    place = f"file://{store}"
    init_distributed_environment(world_size=1, rank=0, local_rank=0, distributed_init_method=place, backend="gloo")
    initialize_model_parallel(1, 1)


def built(folder: Path, ranks: int) -> tuple[torch.nn.Module, Any]:
    """The model of a config.json on the meta device, as on the first of `ranks` ranks, and its config."""
    from vllm.distributed.parallel_state import get_tp_group
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import get_model_architecture, initialize_model

    arguments = EngineArgs(str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=128, enforce_eager=True)
    config = arguments.create_engine_config()
    get_tp_group().world_size = config.parallel_config.tensor_parallel_size = ranks
    kind, _ = get_model_architecture(config.model_config)
    fused = getattr(kind, "packed_modules_mapping", {})
    kind.packed_modules_mapping = dict(fused)  # a model with a compressed query extends the mapping of its class
    try:
        with torch.device("meta"):
            return initialize_model(config), config
    finally:
        get_tp_group().world_size, kind.packed_modules_mapping = 1, fused


def modules(model: torch.nn.Module) -> dict[str, Any]:
    """The linears of the layers, the routed experts and the output layer, by vLLM's names."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, LinearBase | ParallelLMHead)}
    return found | {layer.layer_name: layer for layer in model.modules() if isinstance(layer, RoutedExperts)}


def is_cut(layer: Any) -> bool:
    """Whether a rank has a part of a block of a linear that is quantized in blocks."""
    if getattr(layer, "weight_block_size", None) is None or getattr(layer, "tp_size", 1) == 1:
        return False
    sizes = [*layer.output_partition_sizes] if hasattr(layer, "output_partition_sizes") else []
    whole = layer.input_size == layer.input_size_per_partition
    return any(size % BLOCK for size in (sizes if whole else [layer.input_size_per_partition]))


def describe(folder: Path, ranks: int) -> dict[str, Any]:
    """How vLLM treats a case with this number of ranks."""
    try:
        model, config = built(folder, ranks)
    except (ValueError, AssertionError) as error:
        return {"error": str(error)}
    found = modules(model)
    fp8 = {name for name, layer in found.items() if any(part.dtype == torch.float8_e4m3fn for part in layer.parameters())}
    refined = {str(refine) for layer in found.values() if (refine := getattr(layer.quant_method, "weight_scale_refine", None))}
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    packed = config.quant_config.packed_modules_mapping if config.quant_config else model.packed_modules_mapping
    return {
        "packed": packed,
        "renamed": {} if mapper is None else {old: new for old, new in mapper.orig_to_new_prefix.items() if new},
        "fp8": sorted(fp8),
        "other": sorted(found.keys() - fp8),
        "cut": sorted(name for name, layer in found.items() if is_cut(layer)),
        "refined": sorted(refined),
    }


def main() -> None:
    """Build all cases and write the record."""
    folder, record = Path(sys.argv[1]), Path(sys.argv[2])
    os.environ |= SETTINGS
    from vllm import __version__
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()), tempfile.TemporaryDirectory() as scratch:
        start(Path(scratch) / "store")
    found = {}
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        by_ranks = {ranks: describe(folder / case["folder"], ranks) for ranks in case["ranks"]}
        found[name] = {"digest": case["digest"], "ranks": by_ranks}
        print(name, {ranks: made.get("error", "built") for ranks, made in by_ranks.items()}, flush=True)
    record.write_text(json.dumps({"vllm": __version__, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
