"""Counts and memory that several processes share."""

from __future__ import annotations

import multiprocessing
import os

import torch
from hypothesis import given
from hypothesis import strategies as st

from addenda.serving.shared import COUNTS, Board, Quota, pixel_bytes, pixel_slots, shared_memory


def test_a_quota_counts_what_was_taken_and_not_given_back() -> None:
    quota = Quota(10)
    assert quota.take(4)
    assert quota.take(6)
    assert not quota.take(1)
    quota.give(6)
    assert (quota.used, quota.take(7), quota.used) == (4, False, 4)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), max_size=40))
def test_the_processes_together_never_exceed_a_quota(takes: list[tuple[int, int]]) -> None:
    cells = [0, 0, 0]
    quotas = [Quota(10, cells, own) for own in range(3)]
    taken = 0
    for own, count in takes:
        expected = taken + count <= 10
        assert quotas[own].take(count) is expected
        taken += count * expected
        assert all(quota.used == taken for quota in quotas)
        assert quotas[own].others == taken - cells[own]


def test_a_board_is_the_same_memory_in_every_process() -> None:
    descriptor = shared_memory(Board.num_bytes(2))
    board = Board(descriptor, 2)

    def fill() -> None:
        mine = Board(descriptor, 2)
        for number, count in enumerate(COUNTS, 1):
            mine.cells(count)[2] = number

    process = multiprocessing.get_context("fork").Process(target=fill)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert [list(board.cells(count)) for count in COUNTS] == [[0, 0, number] for number in range(1, len(COUNTS) + 1)]
    board.clear(2)
    assert [board.cells(count)[2] for count in COUNTS] == [0, 0, 0, len(COUNTS)], "that a key file existed stays known"


def test_an_image_in_a_slot_has_its_bits_in_another_mapping_of_the_memory() -> None:
    shape = (3, 5, 7)
    descriptor = shared_memory(pixel_bytes(4, shape))
    written, read = pixel_slots(descriptor, shape), pixel_slots(descriptor, shape)
    os.close(descriptor)
    assert written.shape == (4, *shape)
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    for slot in (3, 0, 2, 1):
        written[slot].copy_(images[slot])
    assert torch.equal(read, images)
