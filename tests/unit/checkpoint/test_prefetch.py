"""Tensors are read ahead in order, at most two, and errors are raised when the tensor is taken."""

import threading

import pytest
import torch

from mptq.checkpoint.prefetch import Item, Prefetcher

ITEMS = [Item(str(number), (number,)) for number in range(6)]


def test_two_are_read_before_they_are_taken():
    read, second, third = [], threading.Event(), threading.Event()

    def reading(item):
        read.append(item)
        if len(read) == 2:
            second.set()
        if len(read) == 3:
            third.set()
        return torch.zeros(item.shape)

    ahead = Prefetcher(reading, ITEMS)
    assert second.wait(60)
    assert not third.wait(0.1)
    for item in ITEMS:
        assert ahead.take(item).shape == item.shape
    ahead.close()
    assert read == ITEMS
    with pytest.raises(AssertionError, match="after the last"):
        ahead.take(ITEMS[0])


def test_an_error_is_raised_for_its_own_tensor():
    def reading(item):
        if item.name == "1":
            raise OSError("no such disk")
        return torch.zeros(item.shape)

    ahead = Prefetcher(reading, ITEMS)
    ahead.take(ITEMS[0])
    with pytest.raises(OSError, match="no such disk"):
        ahead.take(ITEMS[1])
    ahead.close()


def test_another_order_is_a_mistake():
    ahead = Prefetcher(lambda item: torch.zeros(item.shape), ITEMS)
    with pytest.raises(AssertionError, match="is read where"):
        ahead.take(ITEMS[1])
    ahead.close()
