import torch
from compressed_tensors.quantization import QuantizationConfig

from mptq.formats.hf.quantization_config import DIALECTS, Contents
from mptq.recipes.schemes import SCHEMES, carried
from mptq.types import TensorSpec

BLOCK, ROW, TENSOR, MX = (SCHEMES[scale] for scale in ("block", "row", "tensor", "mx"))
STATIC = SCHEMES["tensor-static"]


def test_every_dialect_of_the_schemes_is_defined():
    assert DIALECTS.keys() == {"plain", *(dialect for scheme in SCHEMES.values() for dialect in scheme.forms)}


def test_deepseek_config_and_tensors():
    dialect = DIALECTS["deepseek-fp8"]
    contents = Contents({BLOCK: ["a"]}, ["lm_head", "model.layers.0.mlp.up_proj"])
    expected = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.up_proj"],
    }
    assert dialect.config(contents) == expected
    assert dialect.config(Contents(contents.groups, contents.excluded, kv_cache=True))["kv_cache_quant_algo"] == "FP8"
    assert dialect.files(contents) == {}
    assert dialect.scale("m", BLOCK, 300, 128) == TensorSpec("m.weight_scale_inv", "float32", (3, 1))
    assert [spec.name for spec in dialect.kv_scales("l.")] == ["l.self_attn.k_proj.k_scale", "l.self_attn.v_proj.v_scale"]


def compressed(groups, kv_cache=False):
    config = DIALECTS["compressed-tensors"].config(Contents(groups, ["lm_head"], kv_cache))
    return QuantizationConfig(**{key: value for key, value in config.items() if key != "quant_method"})


def test_compressed_tensors_parses_the_config():
    dialect = DIALECTS["compressed-tensors"]
    parsed = compressed({ROW: ["a", "b"]})
    group = parsed.config_groups["group_0"]
    assert group.weights.strategy == "channel"
    assert group.weights.num_bits == 8
    assert group.input_activations.strategy == "token"
    assert group.input_activations.dynamic
    assert group.targets == ["Linear"]
    assert parsed.ignore == ["lm_head"]
    assert parsed.kv_cache_scheme is None
    for scheme in (ROW, TENSOR):
        assert dialect.scale("m", scheme, 300, 128) == TensorSpec("m.weight_scale", "float32", torch.Size([300, 1]))
    assert dialect.scale("m", STATIC, 300, 128).shape == (1,)
    assert dialect.input_scale("m") == TensorSpec("m.input_scale", "float32", (1,))
    assert [spec.name for spec in dialect.kv_scales("l.")] == ["l.self_attn.k_scale", "l.self_attn.v_scale"]


def test_compressed_tensors_parses_groups_of_several_schemes():
    parsed = compressed({BLOCK: ["a", "b"], ROW: ["c"], STATIC: ["d"]}, kv_cache=True)
    groups = parsed.config_groups
    assert [group.targets for group in groups.values()] == [["a", "b"], ["c"], ["d"]]
    assert groups["group_0"].weights.block_structure == [128, 128]
    assert groups["group_0"].input_activations.group_size == 128
    assert groups["group_2"].weights.strategy == groups["group_2"].input_activations.strategy == "tensor"
    assert not groups["group_2"].input_activations.dynamic
    assert parsed.kv_cache_scheme.num_bits == 8


def test_modelopt_config_and_tensors():
    dialect = DIALECTS["modelopt"]
    config = dialect.config(Contents({STATIC: ["a"]}, ["lm_head"], kv_cache=True))
    assert (config["quant_method"], config["quant_algo"], config["ignore"]) == ("modelopt", "FP8", ["lm_head"])
    assert config["kv_cache_scheme"] == {"num_bits": 8, "type": "float", "dynamic": False}
    assert not config["config_groups"]["group_0"]["input_activations"]["dynamic"]
    files = dialect.files(Contents({STATIC: ["a"]}, ["lm_head"], kv_cache=True))
    quantization = files["hf_quant_config.json"]["quantization"]
    assert quantization == {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    assert dialect.scale("m", STATIC, 300, 128) == TensorSpec("m.weight_scale", "float32", ())


def test_modelopt_config_of_mxfp8():
    dialect = DIALECTS["modelopt"]
    config = dialect.config(Contents({MX: ["a"]}, ["lm_head"]))
    assert (config["quant_algo"], config["group_size"]) == ("MXFP8", 32)
    quantization = dialect.files(Contents({MX: ["a"]}, ["lm_head"]))["hf_quant_config.json"]["quantization"]
    assert quantization["kv_cache_quant_algo"] is None
    assert dialect.scale("m", MX, 300, 128) == TensorSpec("m.weight_scale", "uint8", (300, 4))


def test_plain_form_has_no_quantization_config():
    dialect, contents = DIALECTS["plain"], Contents({}, ["lm_head"])
    assert dialect.config(contents) is None
    assert dialect.files(contents) == {}
    assert carried("plain") == []
