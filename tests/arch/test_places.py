import pytest

from mptq.arch.config import from_args
from mptq.arch.places import Part, locate
from mptq.errors import CheckpointError
from mptq.types import TensorSpec
from tests.arch.test_config import ARGS, MOE_ARGS, TENSORS

CONFIG = from_args(ARGS, "args", TENSORS)
MOE = from_args(MOE_ARGS, "args", TENSORS)
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
        Part(f"{prefix}decoder.layers.mlp.linear_fc2.weight", (1,), (64, 96), (2,)),
    )
    fused_norm = f"{prefix}decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    assert places["decoder.layers.0.input_layernorm.weight"] == (Part(fused_norm, (0,), (64,), (2,)),)
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
    assert locate(per_layer(layer), CONFIG)[key] == (Part(f"{key}_w", (), (96, 64)), Part(f"{key}_v", (), (96, 64)))


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


EXPERT = {"linear_fc1.weight": (96, 64), "linear_fc2.weight": (64, 48)}
HALVES = {"linear_fc1.weight_w": (48, 64), "linear_fc1.weight_v": (48, 64), "linear_fc2.weight": (64, 48)}


def mixture(layers_stacked, experts_stacked, expert=EXPERT):
    """The tensors of a mixture of 8 experts, saved in one of the ways that megatron-core has."""
    shared = {name: shape for name, shape in LAYER.items() if not name.startswith("mlp.linear")}
    shared |= {"pre_mlp_layernorm.weight": (64,), "mlp.router.weight": (8, 64)}
    if experts_stacked:
        experts = {f"mlp.experts.experts.{name}": (8, *shape) for name, shape in expert.items()}
    else:
        experts = {f"mlp.experts.experts.{index}.{name}": shape for index in range(8) for name, shape in expert.items()}
    if layers_stacked:
        layers = {f"decoder.layers.{name}": (2, *shape) for name, shape in (shared | experts).items()}
        return specs(OUTER | layers)
    return per_layer(shared | experts)


@pytest.mark.parametrize("expert", [EXPERT, HALVES], ids=["whole", "halves"])
@pytest.mark.parametrize("layers_stacked", [True, False])
@pytest.mark.parametrize("experts_stacked", [True, False])
def test_experts_in_stacks_and_in_keys_of_their_own(layers_stacked, experts_stacked, expert):
    places = locate(mixture(layers_stacked, experts_stacked, expert), MOE)
    assert len(places) == 3 + 2 * (2 + 3 + 2 * 8)
    parts = places["decoder.layers.1.mlp.experts.experts.5.linear_fc1.weight"]
    assert [part.key.rpartition(".")[2] for part in parts] == [name.rpartition(".")[2] for name in expert if "fc1" in name]
    index = ((1,) if layers_stacked else ()) + ((5,) if experts_stacked else ())
    stack = ((2,) if layers_stacked else ()) + ((8,) if experts_stacked else ())
    assert all((part.index, part.stack) == (index, stack) for part in parts)
    assert (".layers.1." in parts[0].key, ".experts.5." in parts[0].key) == (not layers_stacked, not experts_stacked)


def test_wrong_number_of_experts_is_named():
    tensors = mixture(True, True) | specs({"decoder.layers.mlp.experts.experts.linear_fc2.weight": (2, 7, 64, 48)})
    with pytest.raises(CheckpointError, match=r"linear_fc2\.weight has shape \[2, 7, 64, 48\].*implies \[2, 8, 64, 48\]"):
        locate(tensors, MOE)


def test_missing_expert_is_named():
    tensors = mixture(False, False)
    del tensors["decoder.layers.1.mlp.experts.experts.7.linear_fc2.weight"]
    with pytest.raises(
        CheckpointError, match=r"decoder\.layers\.1\.mlp\.experts\.experts\.7\.linear_fc2\.weight is not in the"
    ):
        locate(tensors, MOE)


def test_tensor_of_another_mixture_is_named():
    extra = specs({"decoder.layers.mlp.router.expert_bias": (2, 8)})
    with pytest.raises(CheckpointError, match=r"expert_bias: not part of a Mixtral-like model"):
        locate(mixture(True, True) | extra, MOE)
