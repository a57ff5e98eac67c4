import pytest

from mptq.errors import RecipeError
from mptq.recipes.schemes import SCHEMES, STRIP_ROWS, Scheme, carried, scheme_named


def made(cell, **more):
    return Scheme("x", "block", "words", cell, {}, **more)


@pytest.mark.parametrize("rows", [3, 96, 256])
def test_cells_that_do_not_fit_strips_are_refused(rows):
    with pytest.raises(ValueError, match=f"x: the rows of a cell must divide {STRIP_ROWS}, but {rows} do not"):
        made((rows, rows))


@pytest.mark.parametrize(
    ("cell", "grid", "block", "unit", "shared"),
    [
        ((0, 0), (), None, (1, 1), True),
        ((1, 0), (300, 1), None, (1, 1), False),
        ((1, 32), (300, 6), None, (1, 32), False),
        ((64, 64), (5, 3), 64, (64, 64), False),
        ((128, 128), (3, 2), 128, (128, 128), False),
    ],
)
def test_what_follows_from_a_cell(cell, grid, block, unit, shared):
    scheme = made(cell)
    assert (scheme.grid(300, 180), scheme.block, scheme.unit, scheme.shared) == (grid, block, unit, shared)


def test_schemes_by_name_and_by_dialect():
    assert [scheme_named(name) for name in SCHEMES] == list(SCHEMES.values())
    known = "tensor, row, block, block-ue8m0, tensor-static, mx"
    with pytest.raises(RecipeError, match=f"unknown scheme 'rows': use one of {known}"):
        scheme_named("rows")
    assert carried("deepseek-fp8") == ["block", "block-ue8m0"]
    assert carried("modelopt") == ["tensor-static", "mx"]
    assert carried("plain") == []
