import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phi3v_train.epoch_order import (
    Shards,
    default_window_bytes,
    epoch_order,
    windowed_order,
    windowed_runs,
)

seeds = st.integers(0, 2**64 - 1)
epochs = st.integers(0, 5)


@st.composite
def shard_lists(draw):
    sizes = draw(st.lists(st.integers(0, 8), min_size=1, max_size=12))
    num_bytes = [draw(st.integers(1, 100)) for _ in sizes]
    return Shards(sizes, num_bytes, draw(st.integers(1, 500)))


def equal_shards(count, per_shard, window):
    return Shards([per_shard] * count, [1000] * count, window * 1000)


# --- plain ---------------------------------------------------------------------------------------


def test_the_order_is_these_numbers_on_every_machine_and_version():
    samples = np.arange(10)
    assert epoch_order(samples, seed=0, epoch=0).tolist() == [0, 7, 8, 2, 5, 9, 4, 6, 3, 1]
    assert epoch_order(samples, seed=0, epoch=1).tolist() == [9, 4, 1, 7, 5, 8, 0, 6, 3, 2]
    assert epoch_order(samples, seed=1, epoch=0).tolist() == [9, 8, 7, 4, 2, 0, 3, 6, 5, 1]


def test_the_keys_are_splitmix64():
    def mix(word):
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        return word ^ (word >> 31)

    golden = 0x9E3779B97F4A7C15
    start = mix((mix((7 + golden) % 2**64) + 3 + golden) % 2**64)
    keys = {i: mix((start + (i + 1) * golden) % 2**64) for i in range(100)}
    expected = sorted(keys, key=lambda i: keys[i])
    assert epoch_order(np.arange(100), seed=7, epoch=3).tolist() == expected


def correlation(a, b):
    return np.corrcoef(a, b)[0, 1]


def test_the_order_is_unrelated_to_that_of_the_file_and_of_the_next_epoch():
    # The rank correlation of two unrelated orders of n has a deviation of 1 / sqrt(n - 1): 0.01
    # here. 40 seeds: each within 4 of it, and their mean within 4 / sqrt(40).
    n = 10_001
    files = np.arange(n)
    against_files, against_next, of_neighbours = [], [], []
    for seed in range(40):
        first, second = (epoch_order(files, seed=seed, epoch=e) for e in (0, 1))
        against_files.append(correlation(files, first))
        against_next.append(correlation(np.argsort(first), np.argsort(second)))
        of_neighbours.append(correlation(first[1:], first[:-1]))
    for found in (against_files, against_next, of_neighbours):
        assert np.abs(found).max() < 0.04
        assert abs(np.mean(found)) < 0.04 / np.sqrt(40)
        assert 0.005 < np.std(found) < 0.015


def test_a_sample_comes_at_any_place_of_the_epoch_over_the_seeds():
    places = [epoch_order(np.arange(64), seed=s, epoch=0).tolist().index(0) for s in range(6400)]
    counts = np.bincount(np.array(places), minlength=64)  # 100 each, deviation 10
    assert 55 < counts.min()
    assert counts.max() < 145


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 99), min_size=1), seeds)
def test_leaving_a_sample_out_moves_no_other(samples, seed):
    everything = epoch_order(np.arange(100), seed=seed, epoch=0).tolist()
    some = epoch_order(np.array(sorted(samples)), seed=seed, epoch=0).tolist()
    assert some == [i for i in everything if i in samples]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=40), seeds)
def test_a_sample_that_is_there_twice_is_visited_twice(samples, seed):
    order = epoch_order(np.array(samples, np.int64), seed=seed, epoch=0).tolist()
    assert sorted(order) == sorted(samples)
    again = epoch_order(np.array(sorted(samples), np.int64), seed=seed, epoch=0).tolist()
    assert again == order


def test_the_visits_of_a_sample_lie_apart():
    order = epoch_order(np.repeat(np.arange(1000), 3), seed=0, epoch=0)
    gaps = [np.diff(np.flatnonzero(order == i)) for i in range(1000)]
    assert np.mean(gaps) == pytest.approx(3000 / 4, rel=0.1)  # of three points on a line


# --- windowed ------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(shard_lists(), seeds, epochs)
def test_made_shard_by_shard_it_is_the_same_order(shards, seed, epoch):
    total = sum(shards.sizes)
    whole = windowed_order(np.arange(total), shards, seed=seed, epoch=epoch)
    runs = [samples for _, samples in windowed_runs(shards, seed=seed, epoch=epoch)]
    assert np.concatenate(runs).tolist() == whole.tolist()
    assert sorted(whole.tolist()) == list(range(total))


@settings(max_examples=40, deadline=None)
@given(shard_lists(), seeds, st.data())
def test_leaving_a_sample_out_of_a_window_moves_no_other(shards, seed, data):
    total = sum(shards.sizes)
    kept = np.flatnonzero([data.draw(st.booleans()) for _ in range(total)])
    everything = windowed_order(np.arange(total), shards, seed=seed, epoch=0).tolist()
    some = windowed_order(kept, shards, seed=seed, epoch=0).tolist()
    assert some == [i for i in everything if i in kept]


@settings(max_examples=50, deadline=None)
@given(shard_lists(), seeds)
def test_a_shard_is_needed_no_longer_than_the_window(shards, seed):
    begin, begins = 0, {}
    for shard, samples in windowed_runs(shards, seed=seed, epoch=0):
        for sample in samples.tolist():
            holder = int(shards.of(np.array([sample]))[0])
            reading = max(begins.values())  # the shard before this one, whose turn has come
            assert reading - begins[holder] < shards.window_bytes
        if shard < len(shards.sizes):
            begins[shard] = begin
            begin += shards.num_bytes[shard]


def test_the_windowed_order_is_these_numbers_on_every_machine_and_version():
    shards = Shards([4, 3, 5, 2], [40, 30, 50, 20], 60)
    order = windowed_order(np.arange(14), shards, seed=0, epoch=0)
    assert order.tolist() == [9, 6, 5, 11, 7, 4, 10, 8, 3, 2, 1, 0, 12, 13]


def test_shards_come_in_another_order_every_epoch():
    shards = equal_shards(50, 1, 1)
    first, second = (shards.order(seed=0, epoch=e).tolist() for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert abs(correlation(first, second)) < 0.5


def test_a_window_mixes_nearly_as_well_as_it_can_and_few_shards_are_live():
    # 400 shards, a window of 32 (8 %), batches of 32: a uniform draw from 32 shards would have
    # 32 * (1 - (1 - 1/32) ** 32) = 20.4 of them.
    shards = equal_shards(400, 50, 32)
    order = windowed_order(np.arange(20_000), shards, seed=0, epoch=0)
    batches = (order // 50).reshape(-1, 32)
    assert np.mean([len(set(batch.tolist())) for batch in batches]) > 19
    spans = [np.flatnonzero(order // 50 == shard) for shard in range(400)]
    live = sum(span[-1] - span[0] for span in spans) / len(order)
    assert live < 33
    assert abs(correlation(np.arange(20_000), order)) < 4 / np.sqrt(400)


def test_the_window_defaults_to_128_shards():
    assert default_window_bytes([10, 20, 30]) == 128 * 20


def test_a_window_of_nothing_and_shards_without_a_size_are_refused():
    with pytest.raises(ValueError, match="window_bytes must be at least 1, got 0"):
        Shards([1], [1], 0)
    with pytest.raises(ValueError, match="samples and of bytes for every shard, got 2 and 1"):
        Shards([1, 2], [1], 5)
