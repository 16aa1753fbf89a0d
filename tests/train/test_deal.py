import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phi3v_train.deal import deal_steps, fewest_rows, sample_cost

CAPACITY = 100
tables = st.lists(st.lists(st.integers(1, CAPACITY), max_size=24), min_size=1, max_size=6)
worlds = st.integers(1, 6)


def dealt(steps, world_size, crops=None):
    """One deal of lists of lengths; missing places are 0."""
    width = max(len(step) for step in steps)
    lengths = np.array([step + [0] * (width - len(step)) for step in steps], np.int64)
    costs = sample_cost(lengths, lengths // 10 if crops is None else np.array(crops))
    return deal_steps(lengths, costs, world_size=world_size, capacity=CAPACITY)


def best_fit_decreasing(lengths):
    rooms = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(rooms, length)
        room = rooms.pop(place) if place < len(rooms) else CAPACITY
        bisect.insort(rooms, room - length)
    return len(rooms)


@settings(max_examples=50, deadline=None)
@given(tables, worlds)
def test_every_sample_has_a_row_and_no_row_is_over_capacity(steps, world_size):
    deal = dealt(steps, world_size)
    for lengths, row, rows_per_rank in zip(steps, deal.row, deal.rows_per_rank, strict=True):
        assert rows_per_rank >= 1
        assert (row[len(lengths) :] == -1).all()
        rooms = [CAPACITY] * int(rows_per_rank * world_size)
        for length, number in zip(lengths, row.tolist(), strict=False):
            assert number >= 0
            rooms[number] -= length
        assert min(rooms) >= 0


@settings(max_examples=50, deadline=None)
@given(tables, worlds)
def test_no_rank_runs_more_rows_than_best_fit_decreasing_spread_over_them(steps, world_size):
    deal = dealt(steps, world_size)
    for lengths, rows_per_rank in zip(steps, deal.rows_per_rank.tolist(), strict=True):
        assert rows_per_rank <= max(1, -(-best_fit_decreasing(lengths) // world_size))


@settings(max_examples=50, deadline=None)
@given(tables)
def test_no_packing_has_fewer_rows_than_the_bound(steps):
    for lengths in steps:
        bound = fewest_rows(np.array([lengths], np.int64).reshape(1, -1), CAPACITY)[0]
        assert 1 <= bound <= max(1, best_fit_decreasing(lengths))


def test_the_bound_counts_samples_of_which_few_share_a_row():
    assert fewest_rows(np.array([[51, 51, 51]]), CAPACITY) == 3  # 153 tokens, one to a row
    assert fewest_rows(np.array([[34] * 5]), CAPACITY) == 3  # 170 tokens, two to a row
    assert fewest_rows(np.array([[25] * 8]), CAPACITY) == 2


@settings(max_examples=40, deadline=None)
@given(tables, worlds)
def test_a_step_is_dealt_alike_alone_and_beside_others(steps, world_size):
    together = dealt(steps, world_size)
    for number, lengths in enumerate(steps):
        alone = dealt([lengths], world_size)
        assert alone.rows_per_rank[0] == together.rows_per_rank[number]
        assert alone.row[0].tolist() == together.row[number, : len(lengths)].tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8))
def test_ranks_differ_by_no_more_than_the_dearest_sample_where_rows_have_room(seed, world_size):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 20, (4, 40))  # short ones: a rank with room is always found
    costs = sample_cost(lengths, random.integers(0, 5, (4, 40)))
    deal = deal_steps(lengths, costs, world_size=world_size, capacity=1000)
    for cost, row, rows_per_rank in zip(costs, deal.row, deal.rows_per_rank, strict=True):
        loads = np.bincount(row // rows_per_rank, cost, world_size)
        assert loads.max() - loads.min() <= cost.max()


def test_where_the_even_deals_do_not_fit_rows_are_filled_first():
    # Three rows without a gap for three ranks. By load, 80 and 50 and 50 lie alone, then 40 goes
    # beside a 50 and leaves 10: only best fit over all rows ends with 80+20, 50+50 and 40+30+30.
    deal = dealt([[50, 30, 40, 20, 50, 80, 30]], 3)
    assert deal.rows_per_rank.tolist() == [1]
    assert np.bincount(deal.row[0], [50, 30, 40, 20, 50, 80, 30]).tolist() == [100, 100, 100]


def test_cost_has_the_proportions_of_the_real_model():
    linear = 17.71e6  # MFLOP of the LLM for 2,443 tokens; attention 1.17, 16.3 crops 6.07 TFLOP
    cost = sample_cost(np.array([2443, 0]), np.array([0, 163])).tolist()
    assert cost[0] == pytest.approx(linear + 1.17e6, rel=0.01)
    assert cost[1] / 10 == pytest.approx(6.07e6, rel=0.01)
