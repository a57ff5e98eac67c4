import torch
from hypothesis import given
from hypothesis import strategies as st

from mptq.model.fused import Fusion

fusions = st.builds(
    lambda repeat, widths: Fusion(repeat, tuple(widths)),
    st.integers(1, 5),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
)


@given(fusions, st.integers(1, 4))
def test_split_and_merge_are_inverses(fusion, columns):
    fused = torch.arange(sum(fusion.rows) * columns).reshape(-1, columns)
    members = fusion.split(fused)
    assert [len(member) for member in members] == list(fusion.rows)
    assert torch.equal(fusion.merge(members), fused)
    again = fusion.split(fusion.merge(members))
    assert all(torch.equal(left, right) for left, right in zip(members, again, strict=True))


def test_split_of_grouped_query_attention_matches_megatron():
    # Two groups, each of two query heads, a key and a value head, of head_dim 3: rows named group.kind.
    fused = torch.tensor([10 * group + kind for group in (1, 2) for kind in (0, 0, 1, 2) for _ in range(3)])
    query, key, value = Fusion(2, (6, 3, 3)).split(fused[:, None])
    assert query.flatten().tolist() == [10] * 6 + [20] * 6
    assert key.flatten().tolist() == [11] * 3 + [21] * 3
    assert value.flatten().tolist() == [12] * 3 + [22] * 3


def test_alignment():
    assert Fusion(1, (100,)).aligned(128)  # a single member
    assert Fusion(1, (256, 128)).aligned(128)
    assert not Fusion(1, (320, 320)).aligned(128)
    assert not Fusion(3, (192, 64, 64)).aligned(128)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8), st.integers(1, 5), st.booleans())
def test_attention_and_gated_mlps_of_any_shape(groups, shared, dim, columns, vector):
    """Weights and biases are split and merged in the same way, and every row belongs to one member."""
    for fusion in (Fusion(groups, (shared * dim, dim, dim)), Fusion(1, (dim, dim)), Fusion(1, (dim,))):
        rows = torch.arange(sum(fusion.rows))
        fused = rows if vector else rows[:, None] * 100 + torch.arange(columns)
        members = fusion.split(fused)
        assert all(member.is_contiguous() for member in members)
        assert torch.equal(fusion.merge(members), fused)
        numbers = torch.cat([member if vector else member[:, 0] // 100 for member in members])
        assert torch.equal(numbers.sort().values, rows)
        assert torch.equal(numbers, torch.cat(fusion.split(rows)))
