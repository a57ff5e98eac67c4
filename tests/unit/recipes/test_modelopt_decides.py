"""The plan, made without torch, assigns the schemes that ModelOpt's matching of the same config assigns to the modules.

A pattern may have the names of the Hugging Face model or those of Megatron: what it disables under either is disabled.
"""

import contextlib
import io
import warnings

import modelopt.torch.quantization as mtq
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mptq.errors import RecipeError
from mptq.formats.layout import canonical_weight
from mptq.model.tensors import hf_layer
from mptq.quantize.compressed_linears import Matrix
from mptq.recipes.assignment import Assignment
from mptq.recipes.modelopt import recipe_fields
from mptq.recipes.recipe import recipe_from
from mptq.recipes.schemes import SCHEMES
from tests.support.models import ARGS, MOE_ARGS, model

PATTERNS = st.sampled_from(
    [
        *("*self_attn*", "*mlp*", "*.0.*", "*layers.1.mlp.*", "*down_proj*", "*o_proj.*", "*[gu]*_proj*", "*experts.1.*"),
        *("*q_proj*", "*lm_head*", "*router*", "*layers.*.self_attn.[qkv]_proj*", "*.down_proj.weight_quantizer"),
    ]
)


@st.composite
def configs(draw):
    """Rules as ModelOpt's own configs have them: all weights in one format, and what is left out, in any order after it."""
    scheme = draw(st.sampled_from(["tensor", "row", "block", "mx"]))
    left_out = [{"quantizer_name": pattern, "enable": False} for pattern in draw(st.lists(PATTERNS, max_size=4))]
    weights = {"quantizer_name": "*weight_quantizer", "cfg": dict(SCHEMES[scheme].modelopt)}
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, weights, *left_out], "algorithm": "max"}


def matched(config, names):
    """The quantizers of weights that ModelOpt enables, by the names of the linears; empty if it refuses to enable none."""
    root = torch.nn.Module()
    for name in names:
        owner, (*path, last) = root, name.split(".")
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, Matrix((128, 128), torch.bfloat16))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            mtq.quantize(root, config | {"algorithm": None})
        except RuntimeError as error:
            if "no weight quantizer is enabled" not in str(error):
                raise
            return {}
    quantizers = {name: root.get_submodule(name).weight_quantizer for name in names}
    return {name: quantizer for name, quantizer in quantizers.items() if quantizer.is_enabled}


@settings(max_examples=60)
@given(configs(), st.sampled_from([ARGS, MOE_ARGS]))
def test_the_plan_predicts_what_modelopt_matches(config, fields):
    llama = model(fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mtq, "RANDOM_CFG", config, raising=False)
        recipe = recipe_from(recipe_fields("RANDOM_CFG"), "RANDOM_CFG")
    assignment = Assignment(recipe, llama)
    try:
        planned = {
            (hf_layer(llama, layer) + member, canonical_weight(layer, linear).removesuffix(".weight")): assignment.scheme(
                layer, linear
            )
            for layer, linear in assignment.linears()
            for member in linear.hf
        }
    except RecipeError as error:  # the projections of one linear in Megatron have different schemes
        assume("different schemes" not in str(error))
        raise
    found = matched(config, sorted({name for names in planned for name in names}))
    both = {names: found[names[0]] for names in planned if all(name in found for name in names)}
    assert both.keys() == {names for names, scheme in planned.items() if scheme is not None}
    assert all(quantizer.scheme.cell == planned[names].cell for names, quantizer in both.items())
