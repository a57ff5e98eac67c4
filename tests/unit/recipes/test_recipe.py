import modelopt.torch.quantization as mtq
import pytest

from mptq.errors import RecipeError
from mptq.recipes.recipe import load_recipe, recipe_from, recipe_names
from mptq.recipes.schemes import SCHEMES, scheme_named
from tests.conftest import ROOT
from tests.support.processes import checked, python

GOOD = "description: x\nweights: {scale: block, block_size: 128}\nhf: deepseek-fp8\n"


def test_built_in_recipes():
    assert recipe_names() == [
        "fp8",
        "fp8-blockwise",
        "fp8-blockwise-gptq",
        "fp8-blockwise-ue8m0",
        "fp8-per-channel",
        "fp8-per-channel-gptq",
        "fp8-per-tensor",
        "mxfp8",
        "none",
    ]
    *schemes, nothing = (load_recipe(name).scheme for name in recipe_names())
    assert nothing is None
    assert [scheme.name for scheme in schemes] == [
        "tensor-static",
        "block",
        "block",
        "block-ue8m0",
        "row",
        "row",
        "tensor",
        "mx",
    ]
    assert [scheme.grid(300, 128) for scheme in schemes] == [(), (3, 1), (3, 1), (3, 1), (300, 1), (300, 1), (), (300, 4)]
    assert [name for name in recipe_names() if load_recipe(name).needs_data] == [
        "fp8",
        "fp8-blockwise-gptq",
        "fp8-per-channel-gptq",
    ]
    assert all(scheme_named(scheme.name) == scheme for scheme in schemes)


def test_the_recipe_that_only_converts():
    none = load_recipe("none")
    assert (none.weights, none.scheme, none.hf, none.needs_data) == (None, None, "plain", False)
    assert recipe_from(none.model_dump(mode="json"), "again") == none
    with pytest.raises(RecipeError, match="without weights to quantize, kv_cache cannot be set"):
        none.changed(kv_cache="fp8")
    with pytest.raises(RecipeError, match="without weights to quantize, overrides cannot be set"):
        none.changed(["decoder.layers.0.*"])


def test_recipe_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(GOOD)
    mine = load_recipe(str(tmp_path / "mine.yaml"))
    assert mine.name == "mine"
    assert mine.fingerprint == load_recipe("fp8-blockwise").fingerprint
    assert mine.fingerprint != load_recipe("fp8-per-tensor").fingerprint


@pytest.mark.parametrize(
    ("name", "near"),
    [("fp8-blokwise", "fp8-blockwise"), ("fp8_blockwise", "fp8-blockwise"), ("per-tensor", "fp8-per-tensor")],
)
def test_unknown_name_suggests_a_similar_one(name, near):
    with pytest.raises(RecipeError, match=f"unknown recipe '{name}': did you mean '{near}'"):
        load_recipe(name)


def test_unknown_name_lists_all():
    known = "fp8, fp8-blockwise, fp8-blockwise-gptq, fp8-blockwise-ue8m0, fp8-per-channel, fp8-per-channel-gptq, "
    known += "fp8-per-tensor, mxfp8, none"
    with pytest.raises(RecipeError, match=f"'zzz': the built-in recipes are {known}"):
        load_recipe("zzz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("description: x\nweights: {scale: column}\nhf: nothing\nextra: 1\n", r"weights\.scale.*hf.*extra"),
        ("description: x\nweights: {scale: block}\nhf: deepseek-fp8\n", "block_size must be 128 with `scale: block`"),
        (GOOD.replace("deepseek-fp8", "modelopt"), "`hf: modelopt` supports tensor-static or mx weights, not block"),
        (GOOD + "misalinged: keep\n", "misalinged: unknown key, did you mean 'misaligned'"),
        (GOOD + "calibration: {method: mse}\n", "calibration.method: ModelOpt's mse calibrator is for integer formats"),
        (GOOD + "algorithm: awq_lite\n", "algorithm: awq_lite is not supported: engines' FP8 checkpoints have no place for"),
        (GOOD + "algorithm: gptq\n", "algorithm: gptq is not supported: it is about codes, not scales: use `rounding: gptq`"),
        (GOOD + "rounding: gptk\n", "rounding: Input should be 'nearest', 'scales', 'gptq' or 'qep'"),
        (GOOD + "rounding: scales\nalgorithm: mse\n", "`rounding: scales` searches for the scales itself: `algorithm` must"),
        (
            "description: x\nweights: {scale: mx, block_size: 32}\nhf: modelopt\nrounding: scales\n",
            "`rounding: scales` cannot be",
        ),
        ("description: x\nweights: null\nhf: plain\nrounding: gptq\n", "quantize, rounding cannot be set"),
        (
            GOOD.replace("128}", "128, scale_format: ue8m0}") + "algorithm: mse\n",
            "`algorithm: mse` cannot be used with `sc",
        ),
        (
            "description: x\nweights: {scale: row, scale_format: ue8m0}\nhf: compressed-tensors\n",
            "ue8m0` requires `scale",
        ),
        (GOOD.replace("deepseek-fp8", "compressed-tensors").replace("128}", "128, scale_format: ue8m0}"), "not block-ue8m0"),
        (
            GOOD + "algorithm: mse\noverrides: [{pattern: a, recipe: mxfp8}]\n",
            "`algorithm: mse` cannot be used with `scale: mx`",
        ),
        (GOOD + "rounding: scales\noverrides: [{pattern: a, recipe: mxfp8}]\n", "`rounding: scales` cannot be used with `sc"),
        (GOOD + "algorithm: mse\noverrides: [{pattern: a, recipe: fp8-blockwise-ue8m0}]\n", "`algorithm: mse` cannot be used"),
        (GOOD + "algorithm: least\n", "algorithm: 'least' is unknown: use max or mse"),
        (
            "description: x\nweights: {scale: mx, block_size: 32}\nhf: modelopt\nalgorithm: mse\n",
            "cannot be used with `scale: mx`",
        ),
        ("description: x\nweights: null\nhf: plain\nalgorithm: mse\n", "quantize, algorithm cannot be set"),
        (GOOD + "calibration: {method: percentile}\n", "percentile must be set with"),
        (GOOD + "overrides: [{pattern: x, recipe: fp8-blokwise}]\n", r"overrides\.0\.recipe: .*did you mean 'fp8-blockwise'"),
        (GOOD + "activations: static\nkv_cahce: fp8\n", r"kv_cahce: unknown key.*`activations: static` requires"),
        (GOOD.replace("deepseek-fp8", "plain"), "`hf: plain` supports no quantized weights, not block"),
        ("description: x\nweights: null\nhf: modelopt\n", r"quantize, hf cannot be set \(and `hf` must be plain\)"),
        ("description: x\nhf: plain\n", "weights: Field required"),
        (GOOD.replace("128", "64"), "block_size must be 128 with `scale: block`"),
        ("- a\n", "is not a recipe: it must be a mapping"),
        ("a: [", "is not valid YAML"),
        ("1: 2\n", "Keys should be strings"),
    ],
)
def test_every_mistake_in_a_file_is_reported(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "bad.yaml"))


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml does not exist"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_changes_by_command_line_options():
    changed = load_recipe("fp8-blockwise").changed(["decoder.layers.0.*"], "fp8")
    assert [(override.pattern, override.scheme) for override in changed.overrides] == [("decoder.layers.0.*", None)]
    assert changed.needs_data
    assert recipe_from(changed.model_dump(mode="json"), "again") == changed
    with pytest.raises(RecipeError, match="kv_cache: Input should be 'none' or 'fp8'"):
        changed.changed(kv_cache="int8")


def test_overrides_take_the_scheme_of_a_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text(GOOD + "overrides: [{pattern: 'a*', recipe: fp8}, {pattern: b, recipe: none}]\n")
    mine = load_recipe(str(tmp_path / "mine.yaml"))
    assert [override.scheme for override in mine.overrides] == [SCHEMES["tensor-static"], None]
    assert mine.needs_data


@pytest.mark.parametrize(
    ("name", "scheme", "kv_cache"),
    [
        ("FP8_DEFAULT_CFG", "tensor-static", "none"),
        ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "block", "none"),
        ("FP8_PER_CHANNEL_PER_TOKEN_CFG", "row", "none"),
        ("MXFP8_DEFAULT_CFG", "mx", "none"),
        ("general/ptq/fp8_default-kv_fp8", "tensor-static", "fp8"),
    ],
)
def test_modelopts_recipes(name, scheme, kv_cache):
    recipe = load_recipe(name)
    assert (recipe.scheme.name, recipe.kv_cache) == (scheme, kv_cache)
    assert recipe.name == name.rpartition("/")[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "NVFP4_DEFAULT_CFG",
            r"not support ModelOpt's NVFP4_DEFAULT_CFG: \*weight_quantizer, \*input_quantizer has E2M1 in blocks of 16",
        ),
        ("INT8_DEFAULT_CFG", r"\*weight_quantizer, \*input_quantizer has INT8$"),
        ("W4A8_AWQ_BETA_CFG", r"awq_full? is not supported: .*INT4 in blocks of 128 and then E4M3|awq_lite is not supported"),
        ("INT8_SMOOTHQUANT_CFG", "algorithm smoothquant is not supported: engines' FP8 checkpoints have no place for"),
        ("NVFP4_FOUR_OVER_SIX_CFG", "algorithm mse has fp8_scale_sweep False, start_multiplier 1.0"),
        ("huggingface/nemotron_vl/ptq/disabled_quantizers", "ModelOpt has no recipe"),
        ("FP8_KV_CFG", "it quantizes no weights"),
        ("FP8_DEFUALT_CFG", "did you mean FP8_DEFAULT_CFG"),
        ("general/ptq/fp8_default-kv_fp8_cast", "constant amax"),
        ("general/ptq/fp8_defualt-kv_fp8", "did you mean general/ptq/fp8_default-kv_fp8"),
    ],
)
def test_modelopts_other_recipes_are_refused_with_the_reason(name, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FOO_CFG", "ModelOpt has no config FOO_CFG: see `mptq recipes` for mptq's own"),
        (
            "abc/def",
            "ModelOpt has no recipe abc/def: see `mptq recipes` for mptq's own (a recipe file's name ends in .yaml)",
        ),
        (
            "nvfp4",
            "unknown recipe 'nvfp4': the built-in recipes are fp8, fp8-blockwise, fp8-blockwise-gptq, fp8-blockwise-ue8m0, "
            "fp8-per-channel, fp8-per-channel-gptq, fp8-per-tensor, mxfp8, none",
        ),
    ],
)
def test_nothing_is_suggested_if_no_name_is_similar(name, message):
    with pytest.raises(RecipeError) as failure:
        load_recipe(name)
    assert str(failure.value) == message


def test_modelopts_exclusions_are_overrides():
    recipe = load_recipe("MAMBA_MOE_FP8_CONSERVATIVE_CFG")
    assert {"*q_proj*", "*self_attention.linear_qkv*"} <= {override.pattern for override in recipe.overrides}
    assert all(override.optional and override.scheme is None for override in recipe.overrides)


def test_modelopts_exclusions_match_the_linears_that_they_name(monkeypatch):
    kept = ("*gate_proj*", "*.down_proj.*", "*o_proj.weight_quantizer")
    rules = [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3), "axis": 0}}]
    rules += [{"quantizer_name": name, "enable": False} for name in kept]
    monkeypatch.setattr(mtq, "MINE_CFG", {"quant_cfg": rules, "algorithm": "max"}, raising=False)
    patterns = [override.pattern for override in load_recipe("MINE_CFG").overrides]
    assert patterns == ["*gate_proj*", "*.down_proj.*", "*.down_proj", "*o_proj"]


def test_modelopts_mse_is_the_recipes(monkeypatch):
    monkeypatch.setattr(mtq, "MINE_CFG", mtq.FP8_DEFAULT_CFG | {"algorithm": {"method": "mse"}}, raising=False)
    assert load_recipe("MINE_CFG").algorithm == "mse"
    assert load_recipe("FP8_DEFAULT_CFG").algorithm == "max"
    for given in ({"method": "max", "layerwise": {"enable": True}}, {}, None):
        monkeypatch.setattr(mtq, "MINE_CFG", mtq.FP8_DEFAULT_CFG | {"algorithm": given}, raising=False)
        assert load_recipe("MINE_CFG").algorithm == "max"
    monkeypatch.setattr(mtq, "MINE_CFG", mtq.FP8_DEFAULT_CFG | {"algorithm": ["max", "mse"]}, raising=False)
    with pytest.raises(RecipeError, match="is unknown: use max or mse"):
        load_recipe("MINE_CFG")


def test_modelopts_gptq_is_mptqs_rounding(monkeypatch):
    for given in ("gptq", {"method": "gptq", "layerwise": {"enable": True}, "perc_damp": 0.01}):
        monkeypatch.setattr(mtq, "MINE_CFG", mtq.FP8_DEFAULT_CFG | {"algorithm": given}, raising=False)
        assert load_recipe("MINE_CFG").rounding == "gptq"
    monkeypatch.setattr(mtq, "MINE_CFG", mtq.FP8_DEFAULT_CFG | {"algorithm": {"method": "gptq", "perc_damp": 0.5}})
    with pytest.raises(RecipeError, match=r"algorithm gptq has perc_damp 0\.5"):
        load_recipe("MINE_CFG")


def test_rounding_needs_data_and_propagates():
    changed = load_recipe("fp8-blockwise").changed(rounding="gptq")
    assert (changed.rounding, changed.needs_data, changed.propagates) == ("gptq", True, True)
    assert not load_recipe("fp8-blockwise").propagates


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_the_script_prints():
    """Of the installed ModelOpt: an update with other recipes needs another table."""
    printed = checked(python(ROOT / "scripts" / "modelopt_table.py")).stdout
    assert f"\n\n{printed}\n" in (ROOT / "docs" / "recipes.md").read_text()
