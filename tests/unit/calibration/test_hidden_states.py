"""Sequences in batches, and the hidden states between layers, in memory and in files."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mptq.calibration.hidden_states import Batch, HiddenStates, batches, chunks, flat


@given(st.lists(st.integers(1, 6), max_size=30), st.integers(1, 5), st.integers(0, 100))
def test_batches_hold_every_token_once_and_no_padding(lengths, size, start):
    found = batches(lengths, size, start)
    rows = [row for batch in found for row in range(batch.tokens.start, batch.tokens.stop)]
    assert rows == list(range(start, start + sum(lengths)))
    assert [batch.length for batch in found for _ in range(batch.count)] == lengths
    assert all(1 <= batch.count <= size for batch in found)
    # No batch has room for the first sequence of the next one.
    assert all(left.length != right.length or left.count == size for left, right in pairwise(found))


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 20))
def test_chunks_hold_every_token_once(start, count, size):
    found = list(chunks(slice(start, start + count), size))
    assert [row for piece in found for row in range(piece.start, piece.stop)] == list(range(start, start + count))
    assert all(piece.stop - piece.start <= size for piece in found)


def test_flat_concatenates_sequences():
    found = flat([np.array([5, 6]), np.array([7]), np.array([8, 9, 10])])
    assert (found.tolist(), found.dtype) == ([5, 6, 7, 8, 9, 10], torch.int64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_memory_and_file_hold_the_same(tmp_path, dtype):
    torch.manual_seed(0)
    parts = batches([3, 3, 3, 2, 2], 2)
    tokens = parts[-1].tokens.stop
    kept = [HiddenStates(tokens, 8, dtype, folder, "reference") for folder in (None, tmp_path)]
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == tokens * 8 * dtype.itemsize
    written = [torch.randn(part.count, part.length, 8).to(dtype) for part in parts]
    for activations in kept:
        for part, states in reversed(list(zip(parts, written, strict=True))):
            activations.write(part, states)
        found = [activations.read(part, torch.device("cpu")) for part in parts]
        assert all(torch.equal(left, right) for left, right in zip(found, written, strict=True))
        assert torch.equal(activations.states, torch.cat([states.flatten(0, 1) for states in written]))
    for activations in kept:
        activations.close()
        activations.close()
        assert activations.states.numel() == 0
    assert not list(tmp_path.iterdir())


def test_a_write_takes_states_of_any_stride_and_touches_its_rows_only():
    activations = HiddenStates(12, 4, torch.float32, None, "quantized")
    activations.states.fill_(-1)
    states = torch.arange(24.0).view(3, 2, 4)
    activations.write(Batch(4, 2, 3), states.transpose(0, 1))  # transposed, as run_layer returns them
    assert torch.equal(activations.states[4:10].view(2, 3, 4), states.transpose(0, 1))
    assert (activations.states[[*range(4), 10, 11]] == -1).all()


def test_two_streams_share_a_folder(tmp_path):
    streams = [HiddenStates(2, 4, torch.bfloat16, tmp_path, name) for name in ("reference", "quantized")]
    for value, stream in enumerate(streams):
        stream.write(Batch(0, 1, 2), torch.full((1, 2, 4), value, dtype=torch.bfloat16))
    assert [float(stream.states.float().mean()) for stream in streams] == [0, 1]
    streams[0].close()
    assert float(streams[1].states.float().mean()) == 1
    streams[1].close()
