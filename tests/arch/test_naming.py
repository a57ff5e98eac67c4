import pytest

from mptq.arch.config import from_args
from mptq.arch.naming import Part, layer_linears, locate
from mptq.errors import CheckpointError
from mptq.types import TensorSpec
from tests.arch.test_config import ARGS, TENSORS

CONFIG = from_args(ARGS, "args", TENSORS)
LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": (64,),
    "self_attention.linear_qkv.weight": (128, 64),
    "self_attention.linear_proj.weight": (64, 64),
    "mlp.linear_fc1.layer_norm_weight": (64,),
    "mlp.linear_fc1.weight": (192, 64),
    "mlp.linear_fc2.weight": (64, 96),
}
OUTER = {
    "embedding.word_embeddings.weight": (128, 64),
    "decoder.final_layernorm.weight": (64,),
    "output_layer.weight": (128, 64),
}


def specs(shapes):
    return {name: TensorSpec(name, "bfloat16", shape) for name, shape in shapes.items()}


def stacked(prefix=""):
    layers = {f"{prefix}decoder.layers.{name}": (2, *shape) for name, shape in LAYER.items()}
    return specs({prefix + name: shape for name, shape in OUTER.items()} | layers)


def per_layer(layer=LAYER):
    layers = {f"decoder.layers.{index}.{name}": shape for index in range(2) for name, shape in layer.items()}
    return specs(OUTER | layers)


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_stacked_layers(prefix):
    places = locate(stacked(prefix), CONFIG)
    assert places["decoder.layers.1.mlp.linear_fc2.weight"] == (
        Part(f"{prefix}decoder.layers.mlp.linear_fc2.weight", 1, (64, 96)),
    )
    fused_norm = f"{prefix}decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    assert places["decoder.layers.0.input_layernorm.weight"] == (Part(fused_norm, 0, (64,)),)
    assert len(places) == 3 + 2 * 6


def test_one_key_per_layer_with_local_norms():
    local = {
        name.replace("self_attention.linear_qkv.layer_norm", "input_layernorm.")
        .replace("mlp.linear_fc1.layer_norm", "pre_mlp_layernorm.")
        .replace("._", "."): shape
        for name, shape in LAYER.items()
    }
    places = locate(per_layer(local), CONFIG)
    assert places["decoder.layers.1.pre_mlp_layernorm.weight"][0].key == "decoder.layers.1.pre_mlp_layernorm.weight"


def test_gated_fc1_in_two():
    layer = {name: shape for name, shape in LAYER.items() if name != "mlp.linear_fc1.weight"}
    layer |= {"mlp.linear_fc1.weight_w": (96, 64), "mlp.linear_fc1.weight_v": (96, 64)}
    key = "decoder.layers.0.mlp.linear_fc1.weight"
    assert locate(per_layer(layer), CONFIG)[key] == (Part(f"{key}_w", None, (96, 64)), Part(f"{key}_v", None, (96, 64)))


def test_missing_tensor_is_named():
    tensors = stacked()
    del tensors["decoder.layers.mlp.linear_fc2.weight"]
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.0\.mlp\.linear_fc2\.weight is not in the checkpoint"):
        locate(tensors, CONFIG)


def test_wrong_shape_is_named():
    tensors = stacked() | specs({"decoder.layers.mlp.linear_fc2.weight": (2, 64, 97)})
    with pytest.raises(CheckpointError, match=r"linear_fc2\.weight has shape \[2, 64, 97\].*implies \[2, 64, 96\]"):
        locate(tensors, CONFIG)


def test_tensor_of_another_model_is_named():
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.mlp\.router\.weight: not part of a Llama-like model"):
        locate(stacked() | specs({"decoder.layers.mlp.router.weight": (2, 8, 64)}), CONFIG)


def test_optimizer_and_extra_state_are_left_out():
    extra = specs({"optimizer.state.exp_avg.decoder.final_layernorm.weight": (64,), "decoder.layers.x._extra_state": (1,)})
    locate(stacked() | extra, CONFIG)


def test_no_model_at_all():
    with pytest.raises(CheckpointError, match="no GPT model"):
        locate(specs({"a": (1,)}), CONFIG)


def test_members_of_linears():
    qkv, proj, fc1, fc2 = layer_linears(CONFIG)
    assert qkv.shape == (128, 64)
    assert qkv.members == (
        ("self_attn.q_proj", (64, 64)),
        ("self_attn.k_proj", (32, 64)),
        ("self_attn.v_proj", (32, 64)),
    )
    assert (proj.shape, fc1.shape, fc2.shape) == ((64, 64), (192, 64), (64, 96))
    assert qkv.crosses(128)
    assert not qkv.fits(128)
    assert not qkv.crosses(None)
    assert qkv.fits(None)
    assert not proj.crosses(128)
