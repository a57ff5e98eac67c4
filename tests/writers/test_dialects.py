import torch
from compressed_tensors.quantization import QuantizationConfig

from mptq.writers.dialects import DIALECTS


def test_deepseek_form():
    config = DIALECTS["deepseek-fp8"].config(["lm_head", "model.layers.0.mlp.up_proj"])
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.up_proj"],
    }
    assert DIALECTS["deepseek-fp8"].scale_shape(300, 128) == (3, 1)


def test_compressed_tensors_reads_its_form():
    dialect = DIALECTS["compressed-tensors"]
    config = dialect.config(["lm_head"])
    parsed = QuantizationConfig(**{key: value for key, value in config.items() if key != "quant_method"})
    group = parsed.config_groups["group_0"]
    assert group.weights.strategy == "channel"
    assert group.weights.num_bits == 8
    assert group.input_activations.strategy == "token"
    assert group.input_activations.dynamic
    assert parsed.ignore == ["lm_head"]
    assert dialect.scale_shape(300, 128) == torch.Size([300, 1])
