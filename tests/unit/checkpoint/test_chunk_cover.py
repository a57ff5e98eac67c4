"""Compares `covers` with a count of every element."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptq.checkpoint.chunk_cover import covers


def counted(shape, offsets, sizes):
    """Counts how often each element is covered, by brute force."""
    count = dict.fromkeys(itertools.product(*map(range, shape)), 0)
    for offset, size in zip(offsets, sizes, strict=True):
        for place in itertools.product(*(range(start, start + length) for start, length in zip(offset, size, strict=True))):
            count[place] += 1
    return set(count.values()) <= {1}


@st.composite
def cuttings(draw):
    """Cuts a box at random into smaller boxes, some of which are then moved, dropped, repeated or resized."""
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=0, max_size=3)))
    boxes = [(tuple(0 for _ in shape), shape)]
    for _ in range(draw(st.integers(0, 5))) if shape else ():
        offset, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, size[dim]))
        boxes.append((offset, (*size[:dim], cut, *size[dim + 1 :])))
        moved = (*offset[:dim], offset[dim] + cut, *offset[dim + 1 :])
        boxes.append((moved, (*size[:dim], size[dim] - cut, *size[dim + 1 :])))
    if draw(st.booleans()) and shape:
        place = draw(st.integers(0, len(boxes) - 1))
        offset = tuple(draw(st.integers(0, size)) for size in shape)
        boxes[place] = offset, tuple(draw(st.integers(0, size - start)) for size, start in zip(shape, offset, strict=True))
    if draw(st.booleans()):
        boxes.append(boxes[draw(st.integers(0, len(boxes) - 1))])
    return shape, [offset for offset, _ in boxes], [size for _, size in boxes]


@given(cuttings())
@settings(max_examples=400)
def test_covers_agrees_with_counting(cutting):
    assert covers(*cutting) == counted(*cutting)


@pytest.mark.parametrize(
    ("offsets", "sizes", "whole"),
    [
        ([(0, 0), (2, 0)], [(2, 4), (2, 4)], True),
        ([(0, 0), (1, 0)], [(2, 4), (2, 4)], False),  # the right number of elements, but row 1 twice and row 3 never
        ([(0, 0), (0, 0)], [(2, 4), (2, 4)], False),
        ([(0, 0), (0, 2), (2, 0), (2, 3)], [(2, 2), (2, 2), (2, 3), (2, 1)], True),  # not a grid
        ([(0, 0), (0, 1), (1, 3), (3, 0), (1, 1)], [(3, 1), (1, 3), (3, 1), (1, 3), (2, 2)], True),  # a pinwheel
        ([(0, 0), (0, 1), (1, 3), (3, 0)], [(3, 1), (1, 3), (3, 1), (1, 3)], False),  # without its middle
    ],
)
def test_four_by_four(offsets, sizes, whole):
    assert covers((4, 4), offsets, sizes) == whole


def test_many_boxes_that_are_not_a_grid():
    """100,000 rows, each cut in two at a different place, are checked in near-linear time, so in seconds."""
    rows = range(100_000)
    offsets = [(row, start) for row in rows for start in (0, 1 + row % 7)]
    sizes = [(1, length) for row in rows for length in (1 + row % 7, 9 - row % 7)]
    assert covers((100_000, 10), offsets, sizes)
    offsets[-1] = (99_999, offsets[-1][1] - 1)
    assert not covers((100_000, 10), offsets, sizes)
