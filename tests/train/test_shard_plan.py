import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phi3v_train.epoch_order import Shards
from phi3v_train.plan import plan_epoch, split_overlong
from phi3v_train.shard_plan import PlannedStep, ShardMeasures, plan_shards

CAPACITY = 1000


@st.composite
def data_sets(draw):
    """Shards and the lengths of their samples."""
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=8))
    num_bytes = [draw(st.integers(1, 100)) for _ in sizes]
    shards = Shards(sizes, num_bytes, draw(st.integers(1, 400)))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    return shards, random.integers(1, CAPACITY + 1, sum(sizes))


arguments = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**64 - 1),
        "epoch": st.integers(0, 5),
        "global_batch_size": st.integers(1, 20),
        "world_size": st.integers(1, 4),
    }
)


def measure_of(shards, lengths, *, with_labels=True):
    def measure(shard):
        own = lengths[shards.first[shard] : shards.first[shard + 1]]
        return ShardMeasures(own, own // 144, own % 9 + 1 if with_labels else None)

    return measure


def planned(shards, lengths, **changes):
    defaults = {"seed": 0, "epoch": 0, "global_batch_size": 8, "world_size": 1}
    return plan_shards(
        shards,
        measure_of(shards, lengths),
        max_tokens_per_row=CAPACITY,
        **{**defaults, **changes},
    )


@settings(max_examples=50, deadline=None)
@given(data_sets(), arguments, st.sampled_from(["samples", "label_tokens"]))
def test_steps_and_rows_are_those_of_the_plan_made_at_once(data_set, arguments, unit):
    shards, lengths = data_set
    arguments = {**arguments, "global_batch_unit": unit}
    whole = plan_epoch(
        lengths,
        lengths // 144,
        max_tokens_per_row=CAPACITY,
        num_label_tokens=lengths % 9 + 1,
        shards=shards,
        **arguments,
    )
    expected = [
        PlannedStep(step, whole.samples(step), whole.step_rows(step))
        for step in range(whole.num_steps)
    ]
    assert list(planned(shards, lengths, **arguments)) == expected


def test_many_steps_at_a_time_are_the_same_too():
    shards = Shards([5000] * 20, [10] * 20, 45)
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 100_000)
    arguments: dict[str, Any] = {
        "seed": 1, "epoch": 1, "global_batch_size": 64, "world_size": 3,
    }  # fmt: skip
    whole = plan_epoch(
        lengths, lengths // 144, max_tokens_per_row=CAPACITY, shards=shards, **arguments
    )
    steps = list(planned(shards, lengths, **arguments))
    assert [s.samples for s in steps] == [whole.samples(k) for k in range(whole.num_steps)]
    assert steps[900].rows == whole.step_rows(900)


@settings(max_examples=50, deadline=None)
@given(data_sets(), arguments, st.integers(0, 12), st.sampled_from(["samples", "label_tokens"]))
def test_a_later_start_leaves_out_the_steps_before_it(data_set, arguments, start, unit):
    arguments = {**arguments, "global_batch_unit": unit}
    everything = list(planned(*data_set, **arguments))
    assert list(planned(*data_set, **arguments, start=start)) == everything[start:]


@settings(max_examples=50, deadline=None)
@given(data_sets(), arguments)
def test_overlong_samples_are_dropped_where_asked_for(data_set, arguments):
    shards, lengths = data_set
    kept, _ = split_overlong(lengths, 700)
    whole = plan_epoch(
        lengths, lengths // 144, max_tokens_per_row=700, samples=kept, shards=shards, **arguments
    )
    steps = plan_shards(
        shards,
        measure_of(shards, lengths, with_labels=False),
        max_tokens_per_row=700,
        drop_overlong=True,
        **arguments,
    )
    assert [s.rows for s in steps] == [whole.step_rows(k) for k in range(whole.num_steps)]


def test_an_overlong_sample_is_named_when_its_shard_is_reached():
    shards = Shards([2, 2], [1, 1], 1)
    with pytest.raises(ValueError, match="sample 3 has 1001 tokens"):
        list(planned(shards, np.array([5, 5, 5, 1001])))


def test_every_shard_is_measured_once_and_only_when_its_turn_has_come():
    shards = Shards([1000] * 100, [10] * 100, 20)
    measured = []

    def measure(shard):
        measured.append(shard)
        return ShardMeasures(np.full(1000, 500), np.ones(1000, np.int64))

    steps = plan_shards(
        shards,
        measure,
        seed=0,
        epoch=0,
        global_batch_size=100,
        world_size=1,
        max_tokens_per_row=CAPACITY,
    )
    next(steps)
    assert len(measured) < 40
    assert len(list(steps)) == 999
    assert sorted(measured) == list(range(100))


def test_memory_does_not_grow_with_the_data_set():
    def peak(num_shards):
        shards = Shards([2000] * num_shards, [10] * num_shards, 50)
        lengths = np.ones(2000, np.int64)
        steps = plan_shards(
            shards,
            lambda _: ShardMeasures(lengths, lengths),
            seed=0,
            epoch=0,
            global_batch_size=64,
            world_size=1,
            max_tokens_per_row=CAPACITY,
        )
        tracemalloc.start()
        for _ in steps:
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(4)  # what Python and numpy keep from the first call on
    assert peak(100) < 1.5 * peak(20) < 32e6  # five times the samples


def test_settings_are_refused_before_the_first_step():
    shards = Shards([1], [1], 1)
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        planned(shards, np.array([1]), world_size=0)
    with pytest.raises(ValueError, match="start must be at least 0, got -1"):
        planned(shards, np.array([1]), start=-1)


def test_measures_of_another_number_of_samples_are_refused():
    steps = plan_shards(
        Shards([3], [1], 1),
        lambda _: ShardMeasures(np.array([1, 2]), np.array([1, 2])),
        seed=0,
        epoch=0,
        global_batch_size=1,
        world_size=1,
        max_tokens_per_row=CAPACITY,
    )
    with pytest.raises(ValueError, match="expected 3 lengths of shard 0, got 2"):
        next(steps)


def test_a_batch_in_label_tokens_needs_them_of_every_shard():
    shards, lengths = Shards([3], [1], 1), np.array([1, 2, 3])
    steps = plan_shards(
        shards,
        measure_of(shards, lengths, with_labels=False),
        seed=0,
        epoch=0,
        global_batch_size=1,
        world_size=1,
        max_tokens_per_row=CAPACITY,
        global_batch_unit="label_tokens",
    )
    with pytest.raises(ValueError, match="needs num_label_tokens"):
        next(steps)


@settings(max_examples=20, deadline=None)
@given(data_sets())
def test_every_sample_is_planned_exactly_once(data_set):
    seen = sorted(i for s in planned(*data_set, world_size=3) for i in s.samples)
    assert seen == list(range(len(data_set[1])))
