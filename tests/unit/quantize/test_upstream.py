"""What docs/dev/upstream.md says of megatron-core's own real-quant configs, with the installed versions."""

import contextlib
import io
import warnings

import modelopt.torch.quantization as mtq
import pytest
import torch

from mptq.quiet import quiet_imports

with quiet_imports():  # neither the configs nor the layers of this file need Transformer Engine, only its Norm does
    from megatron.core.post_training.modelopt import layers as upstream

CONFIGS = {name: getattr(upstream, name) for name in ("FP8_PER_TENSOR_REAL_QUANT_CFG", "FP8_2D_BLOCKWISE_REAL_QUANT_CFG")}
MENDED = (
    "megatron-core or ModelOpt has mended this, or its error has another text: if weights are quantized, drop the section "
    "of docs/dev/upstream.md, its line in the README and this file, otherwise correct the error in docs/dev/upstream.md"
)
FP8 = [torch.float8_e4m3fn, torch.float8_e4m3fn]


def convert(rules):
    """Return the dtypes of two linears' weights after `mtq.quantize` and `mtq.compress`, and ModelOpt's error or ''."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.Linear(128, 256))
    error = ""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            mtq.quantize(model, {"quant_cfg": rules, "algorithm": "max"})
            mtq.compress(model)
        except RuntimeError as problem:
            error = str(problem)
    return [linear.weight.dtype for linear in model], error


def as_list(rules):
    """The same rules in ModelOpt's notation since 0.44: `default` is the pattern `*`."""
    entries = []
    for pattern, rule in rules.items():
        entry = {"quantizer_name": "*" if pattern == "default" else pattern}
        entries.append(entry | (rule if "enable" in rule else {"cfg": rule}))
    return entries


def default_first(rules):
    """The fix of docs/dev/upstream.md."""
    return {"default": rules["default"]} | {pattern: rule for pattern, rule in rules.items() if pattern != "default"}


@pytest.mark.parametrize("name", CONFIGS)
def test_megatron_cores_configs_quantize_nothing(name):
    found, error = convert(CONFIGS[name]["quant_cfg"])
    assert found == [torch.float32, torch.float32], MENDED
    assert "asks for weight quantization but no weight quantizer is enabled" in error, MENDED


@pytest.mark.parametrize("notation", [dict, as_list])
@pytest.mark.parametrize("name", CONFIGS)
def test_with_the_default_first_they_quantize_all_weights(name, notation):
    assert convert(notation(default_first(CONFIGS[name]["quant_cfg"]))) == (FP8, "")


@pytest.mark.parametrize("notation", [dict, as_list])
def test_the_last_rule_wins_in_both_notations(notation):
    """So the order is the fault, not the old notation."""
    rules = {"*weight_quantizer": {"num_bits": (4, 3), "axis": None}, "default": {"enable": False}}
    found, error = convert(notation(rules))
    assert found == [torch.float32, torch.float32]
    assert "no weight quantizer is enabled" in error
    assert convert(notation(default_first(rules))) == (FP8, "")
