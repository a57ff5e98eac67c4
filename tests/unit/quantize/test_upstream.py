"""What docs/upstream.md says of megatron-core's own real-quant configs, with the installed versions."""

import contextlib
import io
import warnings

import modelopt.torch.quantization as mtq
import pytest
import torch

from mptq.quiet import quiet_imports

with quiet_imports():
    from megatron.core.post_training.modelopt import layers as upstream

CONFIGS = {name: getattr(upstream, name) for name in ("FP8_PER_TENSOR_REAL_QUANT_CFG", "FP8_2D_BLOCKWISE_REAL_QUANT_CFG")}
MENDED = "megatron-core or ModelOpt has mended this: drop the section of docs/upstream.md, its line in the README and this test"


def dtypes(config):
    """The dtypes of the weights of two linears after `mtq.quantize` and `mtq.compress`."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.Linear(128, 256))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        mtq.quantize(model, config)
        mtq.compress(model)
    return [linear.weight.dtype for linear in model]


def with_the_default_first(config):
    """The rules in the order in which they are meant: a later one overrides an earlier one."""
    rules = {"*": {"enable": False}} | {name: rule for name, rule in config["quant_cfg"].items() if name != "default"}
    return config | {"quant_cfg": rules}


@pytest.mark.parametrize("name", CONFIGS)
def test_upstreams_configs_quantize_nothing(name):
    found = []
    try:
        found = dtypes(CONFIGS[name])
    except RuntimeError as error:  # older versions of ModelOpt do not raise
        if "no weight quantizer is enabled" not in str(error):
            raise
    assert torch.float8_e4m3fn not in found, MENDED


@pytest.mark.parametrize("name", CONFIGS)
def test_upstreams_configs_quantize_all_weights_with_the_default_first(name):
    assert dtypes(with_the_default_first(CONFIGS[name])) == [torch.float8_e4m3fn, torch.float8_e4m3fn]
