"""Held-out sequences are kept separate for any documents; sharing, mixing and hashing."""

import hashlib
import struct

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from mptq.calibration.datasets.corpus import Supply, describe, interleave, shares
from mptq.calibration.datasets.documents import shuffled

STEP = 1000


def make_documents(lengths):
    """Document d has the tokens d * STEP, d * STEP + 1, ...: no token is in two documents."""
    return [np.arange(length) + STEP * number for number, length in enumerate(lengths)]


def taken(documents, length, packed, counts):
    supply = Supply(iter(documents), length, packed, set())
    return supply.take(counts[0], hold_out=True), supply.take(counts[1], hold_out=False)


def tokens(sequences):
    return [int(token) for sequence in sequences for token in sequence]


corpora = st.lists(st.integers(0, 40), min_size=1, max_size=20)
lengths = st.integers(2, 12)
counts = st.tuples(st.integers(0, 5), st.integers(0, 30))


@given(corpora, lengths, st.booleans(), counts)
def test_no_held_out_token_is_calibrated_on(corpus, length, packed, asked):
    held, used = taken(make_documents(corpus), length, packed, asked)
    assert len(held) <= asked[0]
    assert len(used) <= asked[1]
    everything = tokens(held) + tokens(used)
    assert len(set(everything)) == len(everything)  # no token occurs twice, so none is both held out and calibrated on
    if sum(size > 0 for size in corpus) > 1:
        assert not {token // STEP for token in tokens(held)} & {token // STEP for token in tokens(used)}
    sizes = {len(sequence) for sequence in held + used}
    assert sizes <= ({length} if packed else set(range(2, length + 1)))


@given(corpora, lengths, st.booleans(), st.integers(0, 5), st.integers(0, 30))
def test_held_out_sequences_do_not_depend_on_calibration(corpus, length, packed, hold, calibrate):
    alone, _ = taken(make_documents(corpus), length, packed, (hold, 0))
    beside, _ = taken(make_documents(corpus), length, packed, (hold, calibrate))
    assert tokens(alone) == tokens(beside)


@given(corpora, lengths, counts)
def test_packing_loses_only_the_rest_of_the_last_document(corpus, length, asked):
    held, used = taken(make_documents(corpus), length, True, (asked[0], 10**6))
    assume(len(held) == asked[0])
    filled = [size for size in corpus if size]
    if len(filled) == 1:
        assert len(held) + len(used) == filled[0] // length
    else:
        touched = {token // STEP for token in tokens(held)}
        assert len(used) == sum(size for number, size in enumerate(corpus) if number not in touched) // length


@given(st.lists(st.integers(0, 30), min_size=2, max_size=20), lengths)
def test_one_document_per_sequence(corpus, length):
    assume(sum(size > 0 for size in corpus) > 1)
    held, used = taken(make_documents(corpus), length, False, (1, 10**6))
    assert [s.tolist() for s in held + used] == [d[:length].tolist() for d in make_documents(corpus) if len(d) >= 2]


@given(corpora, st.data(), lengths, st.booleans())
def test_copies_of_what_is_held_out_are_left_out(corpus, data, length, packed):
    documents = make_documents(corpus)
    assume(sum(len(document) > 0 for document in documents) > 1)
    doubled = data.draw(st.permutations(documents + documents))
    held, used = taken(doubled, length, packed, (2, 10**6))
    assert not {token // STEP for token in tokens(held)} & {token // STEP for token in tokens(used)}


def test_documents_beyond_those_needed_are_not_read():
    read = []

    def documents():
        for document in make_documents([10] * 100):
            read.append(document)
            yield document

    held, used = taken(documents(), 8, True, (1, 3))
    assert len(held) + len(used) == 4
    assert len(read) == 4  # one held out, three for 24 tokens


def test_documents_left_out_are_counted():
    filled, copy = np.arange(6), np.arange(6)
    documents = [filled, np.zeros(0, np.int64), copy, np.arange(1), np.arange(9)]
    for packed, empty in ((True, 1), (False, 2)):
        supply = Supply(iter(documents), 6, packed, set())
        supply.take(1, hold_out=True)
        supply.take(9, hold_out=False)
        assert (supply.empty, supply.copies) == (empty, 1 + (not packed))  # cut to 6 tokens, the last is a copy too


def test_documents_used_are_counted():
    supply = Supply(iter(make_documents([5, 0, 5, 5, 5])), 4, True, set())
    supply.take(1, hold_out=True)
    assert supply.documents == 1
    supply.take(2, hold_out=False)
    assert supply.documents == 3


@given(st.integers(0, 500), st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_shares_are_in_proportion(total, weights):
    parts = shares(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1 + 1e-6


def test_shares_round_the_largest_remainders_up():
    assert shares(8, [1, 1, 1]) == [3, 3, 2]
    assert shares(10, [0.26, 0.25, 0.49]) == [3, 2, 5]  # remainders 0.6, 0.5, 0.9
    assert shares(7, [3, 1]) == [5, 2]


def test_groups_are_spread_evenly():
    groups = [[np.array([group * 10 + at]) for at in range(size)] for group, size in enumerate((4, 2, 0))]
    assert tokens(interleave(groups)) == [0, 10, 1, 2, 11, 3]
    assert interleave([[], []]) == ()


def test_description_hashes_lengths_and_ids():
    said = describe([np.array([7, 300]), np.array([1])])
    data = struct.pack("<qqq", 2, 7, 300) + struct.pack("<qq", 1, 1)
    assert said == {"sequences": 2, "tokens": 3, "sha256": hashlib.sha256(data).hexdigest()}
    assert describe([np.array([7, 300, 1])])["sha256"] != said["sha256"]


@given(st.integers(0, 200), st.integers(0, 2**64))
def test_shuffling_is_a_permutation(count, seed):
    order = list(shuffled(count, np.random.PCG64(seed)))
    assert sorted(order) == list(range(count))
    assert order == list(shuffled(count, np.random.PCG64(seed)))


def test_shuffling_is_uniform_and_lazy():
    counted = {}
    for seed in range(6000):
        order = tuple(shuffled(3, np.random.PCG64(seed)))
        counted[order] = counted.get(order, 0) + 1
    assert len(counted) == 6
    assert min(counted.values()) > 850
    assert 0 <= next(shuffled(10**15, np.random.PCG64(0))) < 10**15


def test_shuffling_never_changes():
    assert list(shuffled(10, np.random.PCG64(0))) == [1, 2, 0, 8, 7, 9, 5, 3, 6, 4]
