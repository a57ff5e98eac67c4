import pytest

from mptq.errors import RecipeError
from mptq.recipe import load_recipe, recipe_names

GOOD = "description: x\nweights: {scale: block, block_size: 128}\nhf: deepseek-fp8\n"


def test_built_in_recipes():
    assert recipe_names() == ["fp8-blockwise", "fp8-per-channel", "fp8-per-tensor"]
    assert load_recipe("fp8-blockwise").block == 128
    assert load_recipe("fp8-per-tensor").block is None
    grids = [load_recipe(name).grid(300, 128) for name in recipe_names()]
    assert grids == [(3, 1), (300, 1), ()]


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
def test_unknown_name_gives_the_nearest(name, near):
    with pytest.raises(RecipeError, match=f"unknown recipe '{name}': did you mean '{near}'"):
        load_recipe(name)


def test_unknown_name_lists_all():
    with pytest.raises(RecipeError, match=r"'zzz': there are fp8-blockwise, fp8-per-channel, fp8-per-tensor"):
        load_recipe("zzz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("description: x\nweights: {scale: column}\nhf: nothing\nextra: 1\n", r"weights\.scale.*hf.*extra"),
        ("description: x\nweights: {scale: block}\nhf: deepseek-fp8\n", "block_size goes with"),
        (GOOD.replace("deepseek-fp8", "compressed-tensors"), "carries `scale: tensor or row` weights, not block"),
        (GOOD.replace("128", "64"), r"weights\.block_size"),
        ("- a\n", "does not hold a recipe"),
        ("a: [", "is not YAML"),
        ("1: 2\n", "Keys should be strings"),
    ],
)
def test_every_mistake_in_a_file_is_said(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "bad.yaml"))


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml does not exist"):
        load_recipe(str(tmp_path / "none.yaml"))
