"""The cover against a count of every element."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptq.checkpoint.chunk_cover import covers


def counted(shape, offsets, sizes):
    """How often each element is covered, by going through all of them."""
    count = dict.fromkeys(itertools.product(*map(range, shape)), 0)
    for offset, size in zip(offsets, sizes, strict=True):
        for place in itertools.product(*(range(start, start + length) for start, length in zip(offset, size, strict=True))):
            count[place] += 1
    return set(count.values()) <= {1}


@st.composite
def cuttings(draw):
    """A box cut into boxes by random cuts of random parts, some of them then moved, dropped, repeated or resized."""
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
def test_covers_is_what_counting_says(cutting):
    assert covers(*cutting) == counted(*cutting)


@pytest.mark.parametrize(
    ("offsets", "sizes", "whole"),
    [
        ([(0, 0), (2, 0)], [(2, 4), (2, 4)], True),
        ([(0, 0), (1, 0)], [(2, 4), (2, 4)], False),  # as many elements, but rows 1 twice and 3 never
        ([(0, 0), (0, 0)], [(2, 4), (2, 4)], False),
        ([(0, 0), (0, 2), (2, 0), (2, 3)], [(2, 2), (2, 2), (2, 3), (2, 1)], True),  # no grid
        ([(0, 0), (0, 1), (1, 3), (3, 0), (1, 1)], [(3, 1), (1, 3), (3, 1), (1, 3), (2, 2)], True),  # a pinwheel
        ([(0, 0), (0, 1), (1, 3), (3, 0)], [(3, 1), (1, 3), (3, 1), (1, 3)], False),  # without its middle
    ],
)
def test_four_by_four(offsets, sizes, whole):
    assert covers((4, 4), offsets, sizes) == whole


def test_many_boxes_that_are_no_grid():
    """100,000 rows cut in two at a place of each one's own: near-linear, so done in seconds."""
    rows = range(100_000)
    offsets = [(row, start) for row in rows for start in (0, 1 + row % 7)]
    sizes = [(1, length) for row in rows for length in (1 + row % 7, 9 - row % 7)]
    assert covers((100_000, 10), offsets, sizes)
    offsets[-1] = (99_999, offsets[-1][1] - 1)
    assert not covers((100_000, 10), offsets, sizes)
