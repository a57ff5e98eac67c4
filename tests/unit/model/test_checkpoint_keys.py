from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptq.errors import CheckpointError
from mptq.model.checkpoint_keys import SKIPPED, locate, passthrough_names, skipped
from mptq.model.tensors import layer_linears
from mptq.plan.estimates import actions, bytes_in
from mptq.plan.plan import Source, plan_source
from mptq.recipes.recipe import load_recipe
from mptq.types import TensorSlice
from tests.support.layouts import EXPERTS, Layout, inner_tensors, read, stored
from tests.support.models import ARGS, FAMILY_ARGS, HYBRID, LATENT, MOE_ARGS, OSS_ARGS, SHARED, inner_shapes, model, specs

CONFIG, MOE = model(ARGS), model(MOE_ARGS)
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
        TensorSlice(
            f"{prefix}decoder.layers.mlp.linear_fc2.weight", (1,), (64, 96), (2,), "decoder.layers.1.mlp.linear_fc2.weight"
        ),
    )
    fused_norm = f"{prefix}decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    assert places["decoder.layers.0.input_layernorm.weight"] == (
        TensorSlice(fused_norm, (0,), (64,), (2,), "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"),
    )
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
    assert locate(per_layer(layer), CONFIG)[key] == (
        TensorSlice(f"{key}_w", (), (96, 64), (), f"{key}_w"),
        TensorSlice(f"{key}_v", (), (96, 64), (), f"{key}_v"),
    )


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
    with pytest.raises(
        CheckpointError, match=r"decoder\.layers\.mlp\.router\.weight: not part of the model that the settings describe"
    ):
        locate(stacked() | specs({"decoder.layers.mlp.router.weight": (2, 8, 64)}), CONFIG)


def test_optimizer_and_extra_state_are_left_out():
    extra = specs({"optimizer.state.exp_avg.decoder.final_layernorm.weight": (64,), "decoder.layers.x._extra_state": (1,)})
    locate(stacked() | extra, CONFIG)


def test_no_model_at_all():
    with pytest.raises(CheckpointError, match="0 tensors named .*no language model in it"):
        locate(specs({"a": (1,)}), CONFIG)


EXPERT = {"linear_fc1.weight": (96, 64), "linear_fc2.weight": (64, 48)}
HALVES = {"linear_fc1.weight_w": (48, 64), "linear_fc1.weight_v": (48, 64), "linear_fc2.weight": (64, 48)}


def mixture(layers_stacked, experts_stacked, expert=EXPERT):
    """Returns the tensors of a mixture of 8 experts in one of megatron-core's layouts."""
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
def test_stacked_and_unstacked_experts(layers_stacked, experts_stacked, expert):
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
    with pytest.raises(CheckpointError, match=r"expert_bias: not part of the model that the settings"):
        locate(mixture(True, True) | extra, MOE)


KINDS = {
    **FAMILY_ARGS,
    "gpt-oss": OSS_ARGS,
    "tied": ARGS | {"untie_embeddings_and_output_weights": False},
    "shared": MOE_ARGS | SHARED,
    "dense between": MOE_ARGS | {"num_layers": 4, "moe_layer_freq": 2},
    "latent": LATENT | {"q_lora_rank": 24},
}
PREFIXES = st.sampled_from(["", "model.", "module.", "language_model."])


def layouts(config):
    """Draws a layout that a checkpoint of the model can have; tensors that only some layers have are not stacked.

    Parameter names (`local_experts.0`, `weight0`) come from models; stacked and split tensors come from torch_dist.
    """
    alike = len(set(config.kinds)) == 1
    return st.builds(
        Layout,
        PREFIXES,
        layers_stacked=st.booleans() if alike else st.just(False),
        experts_stacked=st.booleans(),
        experts=st.sampled_from(sorted(EXPERTS)),
        transformer_engine=st.booleans(),
        halves=st.booleans(),
    ).filter(lambda layout: layout.experts in ("numbered", "plain") or not (layout.experts_stacked or layout.halves))


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=12)
@given(st.data())
def test_every_layout_is_the_same_model(name, data):
    """In every layout the inner tensors, and therefore the contents of both outputs, are the same."""
    config = model(KINDS[name])
    layout = data.draw(layouts(config))
    inner = inner_tensors(config)
    tensors = stored(config, inner, layout)
    places = locate(specs({key: tensor.shape for key, tensor in tensors.items()}), config)
    assert places.keys() == inner.keys()
    for key, tensor in inner.items():
        assert torch.equal(read(tensors, places[key]), tensor), key


def source(config, tensors):
    """Returns a checkpoint that consists of metadata only."""
    found = specs({key: tensor.shape for key, tensor in tensors.items()})
    items = {key: SimpleNamespace(spec=spec) for key, spec in found.items()}
    return Source(SimpleNamespace(blobs={}, tensors=items), config, locate(found, config))


def hf_output(plan, tensors):
    """Builds by hand the Hugging Face output of the `none` recipe."""
    places, found = plan.source.places, {}
    for inner, written in plan.layouts["hf"].by_canonical_name():
        tensor = read(tensors, places[inner])
        found |= {spec.name: (spec.dtype, spec.shape, tensor.shape) for spec in written}
    for layer in plan.layers:
        for linear in plan.linears(layer):
            members = linear.fusion.split(read(tensors, places[f"decoder.layers.{layer}.{linear.megatron}.weight"]))
            found |= dict(zip(((layer, name) for name in linear.hf), members, strict=True))
        for copy in plan.unquantized(layer):
            members = copy.for_hf(read(tensors, places[f"decoder.layers.{layer}.{copy.megatron}"]))
            assert [tuple(member.shape) for member in members] == list(copy.hf_shapes)
            found |= dict(zip(((layer, name) for name in copy.hf), members, strict=True))
    return found


@pytest.mark.parametrize("name", FAMILY_ARGS)
@settings(max_examples=5)
@given(st.data())
def test_hugging_face_tensors_do_not_depend_on_the_layout(name, data):
    config = model(FAMILY_ARGS[name])
    inner = inner_tensors(config)
    plain = stored(config, inner, Layout())
    other = stored(config, inner, data.draw(layouts(config)))
    plans = [plan_source(source(config, tensors), load_recipe("none"), ("hf",)) for tensors in (plain, other)]
    assert plans[0].layouts["hf"].specs == plans[1].layouts["hf"].specs
    first, second = (hf_output(plan, tensors) for plan, tensors in zip(plans, (plain, other), strict=True))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key], key


sizes = st.fixed_dictionaries(
    {
        "num_query_groups": st.sampled_from([1, 2, 4]),
        "kv_channels": st.sampled_from([8, 16, 24]),
        "ffn_hidden_size": st.integers(1, 9).map(lambda count: 8 * count),
        "num_layers": st.integers(1, 3),
        "vocab_size": st.integers(1, 128),
        "num_experts": st.sampled_from([None, 2, 3, 12]),
        "untie_embeddings_and_output_weights": st.booleans(),
        "add_qkv_bias": st.booleans(),
    }
)


@settings(max_examples=60)
@given(sizes, st.data())
def test_sizes_do_not_matter(fields, data):
    """Parts are found in every layout, for any heads, groups, widths, experts and vocabulary padding."""
    config = model(ARGS | {"moe_router_topk": 2} | fields)
    inner = inner_tensors(config)
    tensors = stored(config, inner, data.draw(layouts(config)))
    places = locate(specs({key: tensor.shape for key, tensor in tensors.items()}), config)
    heads, groups, dim = 4, config.num_query_groups, config.head_dim
    for layer in range(config.num_layers):
        fused = read(tensors, places[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"])
        assert torch.equal(fused, inner[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"])
        query, key, value = layer_linears(config, layer)[0].fusion.split(fused)
        for group in range(groups):
            start, wide = group * (heads // groups + 2) * dim, heads // groups * dim
            assert torch.equal(query[group * wide : (group + 1) * wide], fused[start : start + wide])
            assert torch.equal(key[group * dim : (group + 1) * dim], fused[start + wide : start + wide + dim])
            assert torch.equal(value[group * dim : (group + 1) * dim], fused[start + wide + dim : start + wide + 2 * dim])
    words = read(tensors, places["embedding.word_embeddings.weight"])
    assert words.shape == (128, 64)
    assert torch.equal(words, inner["embedding.word_embeddings.weight"])


def test_mixer_norm_is_not_the_norm_before_it():
    """A hybrid layer has `norm`, which Transformer Engine fuses into `in_proj`, and `mixer.norm`, which it does not."""
    config = model(HYBRID)
    tensors = stored(config, inner_tensors(config), Layout(transformer_engine=True))
    places = locate(specs({key: tensor.shape for key, tensor in tensors.items()}), config)
    assert places["decoder.layers.0.norm.weight"][0].key == "decoder.layers.0.mixer.in_proj.layer_norm_weight"
    assert places["decoder.layers.0.mixer.norm.weight"][0].key == "decoder.layers.0.mixer.norm.weight"
    assert [part.key.rpartition(".")[2] for part in places["decoder.layers.0.mixer.in_proj.weight"]] == [
        "z",
        "x",
        "B",
        "C",
        "dt",
    ]


def test_convolution_under_its_parameters_name():
    config = model(HYBRID)
    shapes = {name.replace("conv1d.", "conv1d_"): shape for name, shape in inner_shapes(config).items()}
    places = locate(specs(shapes), config)
    assert places["decoder.layers.3.mixer.conv1d.bias"][0].key == "decoder.layers.3.mixer.conv1d_bias"


PREDICTION = {
    "mtp.layers.0.enorm.weight": (64,),
    "mtp.layers.0.eh_proj.weight": (64, 128),
    "mtp.layers.0.transformer_layer.mlp.linear_fc2.weight": (64, 96),
}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_prediction_layers_are_kept_for_megatron_only(prefix):
    tensors = stored(CONFIG, inner_tensors(CONFIG), Layout(prefix))
    extra = {prefix + name: torch.zeros(shape) for name, shape in PREDICTION.items()}
    extra[f"{prefix}mtp.layers.0.transformer_layer.mlp.linear_fc2._extra_state"] = torch.zeros(1)
    made = source(CONFIG, tensors | extra)
    assert passthrough_names(made.places) == list(PREDICTION)
    plan = plan_source(made, load_recipe("fp8-per-tensor"), ("hf", "megatron"))
    assert [(copy.megatron, copy.shape) for copy in plan.passthrough] == list(PREDICTION.items())
    written = {spec.name: spec.shape for spec in plan.layouts["megatron"].specs}
    assert {name: written.get(prefix + name) or written.get(name) for name in PREDICTION} == PREDICTION
    assert not [spec.name for spec in plan.layouts["hf"].specs if "mtp" in spec.name]
    without = plan_source(source(CONFIG, tensors), load_recipe("fp8-per-tensor"), ("hf",))
    assert without.layouts["hf"].specs == plan.layouts["hf"].specs
    assert len(plan.units) == len(without.units) + len(PREDICTION)


def test_prediction_layers_are_listed_as_dropped_if_no_output_has_them():
    tensors = stored(CONFIG, inner_tensors(CONFIG), Layout(""))
    made = source(CONFIG, tensors | {name: torch.zeros(shape) for name, shape in PREDICTION.items()})
    alone = plan_source(made, load_recipe("fp8-per-tensor"), ("hf",))
    reason = "multi-token prediction, which only the Megatron output has"
    assert alone.skipped == made.skipped | dict.fromkeys(PREDICTION, reason)
    assert plan_source(made, load_recipe("fp8-per-tensor"), ("megatron",)).skipped == made.skipped
    assert actions(alone)["multi-token prediction"] == "left out"
    assert bytes_in(alone) == sum(tensor.nbytes for tensor in tensors.values())


def test_every_dropped_item_has_a_reason():
    keys = [
        "decoder.layers.0.mlp.linear_fc1._extra_state",
        "optimizer.state.exp_avg.x",
        "rng_state/shard_0",
        "decoder.x.weight",
    ]
    assert skipped(keys) == {
        keys[0]: SKIPPED["_extra_state"],
        keys[1]: "optimizer state",
        keys[2]: "random number generator state",
    }


def test_two_models_in_one_checkpoint():
    both = specs({f"{prefix}decoder.final_layernorm.weight": (64,) for prefix in ("student.", "teacher.")})
    with pytest.raises(CheckpointError, match="has 2 tensors named"):
        locate(both, CONFIG)
