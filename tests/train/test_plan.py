from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phi3v_train.deal import sample_cost
from phi3v_train.epoch_order import epoch_order
from phi3v_train.plan import (
    PlanSettings,
    plan_changes,
    plan_epoch,
    split_overlong,
)

CAPACITY = 1000
lengths = st.lists(st.integers(1, CAPACITY), max_size=60)
arguments = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**63 - 1),
        "epoch": st.integers(0, 5),
        "global_batch_size": st.integers(1, 20),
        "world_size": st.integers(1, 5),
    }
)


def plan_of(num_tokens, num_crops=None, **changes):
    defaults = {"seed": 0, "epoch": 0, "global_batch_size": 8, "world_size": 1}
    crops = [1] * len(num_tokens) if num_crops is None else num_crops
    return plan_epoch(num_tokens, crops, max_tokens_per_row=CAPACITY, **{**defaults, **changes})


def all_rows(plan):
    return [plan.rows(k, r) for k in range(plan.num_steps) for r in range(plan.world_size)]


@given(lengths, arguments)
def test_every_sample_is_seen_exactly_once_an_epoch(num_tokens, arguments):
    plan = plan_of(num_tokens, **arguments)
    seen = [i for rows in all_rows(plan) for row in rows for i in row]
    assert sorted(seen) == list(range(len(num_tokens)))


@given(lengths, arguments)
def test_no_row_is_over_capacity(num_tokens, arguments):
    for rows in all_rows(plan_of(num_tokens, **arguments)):
        assert all(sum(num_tokens[i] for i in row) <= CAPACITY for row in rows)


@given(lengths, arguments)
def test_all_ranks_run_equally_many_rows_and_at_least_one(num_tokens, arguments):
    plan = plan_of(num_tokens, **arguments)
    for step in range(plan.num_steps):
        counts = {len(plan.rows(step, rank)) for rank in range(plan.world_size)}
        assert len(counts) == 1
        assert counts != {0}


@given(lengths, arguments, st.integers(1, 5))
def test_a_step_holds_the_same_samples_whatever_the_world_size(num_tokens, arguments, other):
    plan = plan_of(num_tokens, **arguments)
    again = plan_of(num_tokens, **{**arguments, "world_size": other})
    assert plan.num_steps == again.num_steps
    for step in range(plan.num_steps):
        assert _union(plan, step) == _union(again, step) == sorted(plan.samples(step))


def _union(plan, step):
    ranks = range(plan.world_size)
    return sorted(i for rank in ranks for row in plan.rows(step, rank) for i in row)


@given(lengths, arguments)
def test_only_the_last_step_may_be_smaller(num_tokens, arguments):
    plan = plan_of(num_tokens, **arguments)
    sizes = [len(plan.samples(step)) for step in range(plan.num_steps)]
    assert sizes[:-1] == [arguments["global_batch_size"]] * (len(sizes) - 1)
    assert sum(sizes) == len(num_tokens)


@given(lengths, arguments)
def test_the_same_arguments_give_the_same_plan(num_tokens, arguments):
    assert all_rows(plan_of(num_tokens, **arguments)) == all_rows(plan_of(num_tokens, **arguments))


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


def test_the_order_is_unrelated_to_that_of_the_file_and_of_the_next_epoch():
    first, second = (epoch_order(np.arange(20_000), seed=5, epoch=e) for e in (0, 1))
    for a, b in ((np.arange(20_000), first), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


@given(st.sets(st.integers(0, 99), min_size=1), st.integers(0, 99))
def test_leaving_a_sample_out_moves_no_other(samples, seed):
    everything = epoch_order(np.arange(100), seed=seed, epoch=0).tolist()
    some = epoch_order(np.array(sorted(samples)), seed=seed, epoch=0).tolist()
    assert some == [i for i in everything if i in samples]


def test_overlong_samples_are_split_off_by_number():
    kept, overlong = split_overlong([5, 1001, 1000, 2000], CAPACITY)
    assert (kept.tolist(), overlong.tolist()) == ([0, 2], [1, 3])
    plan = plan_of([5, 1001, 1000, 2000], samples=kept)
    assert sorted(plan.samples(0)) == [0, 2]
    assert plan.num_dropped == plan.summary().num_dropped == 2


def test_an_overlong_sample_in_the_plan_is_named():
    with pytest.raises(ValueError, match="sample 1 has 1001 tokens and 2 samples do not fit"):
        plan_of([5, 1001, 1000, 2000])


@pytest.mark.parametrize("name", ["global_batch_size", "world_size"])
def test_a_plan_of_nothing_a_step_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        plan_of([1], **{name: 0})


def test_lengths_and_crop_counts_must_match():
    with pytest.raises(ValueError, match="one length and one crop count per sample"):
        plan_of([1, 2], [1])


def test_the_dearest_sample_has_a_rank_to_itself():
    plan = plan_of([900, 300, 300, 300], world_size=2, global_batch_size=4)
    assert sorted(sorted(i for row in plan.rows(0, r) for i in row) for r in (0, 1)) == [
        [0],
        [1, 2, 3],
    ]


def test_crops_count_when_samples_are_dealt():
    plan = plan_of([100] * 4, [17, 1, 1, 1], world_size=2, global_batch_size=4)
    assert sorted(len(row) for r in (0, 1) for row in plan.rows(0, r)) == [1, 3]


def test_cost_has_the_proportions_of_the_real_model():
    linear = 17.71e6  # MFLOP of the LLM for 2,443 tokens; attention 1.17, 16.3 crops 6.07 TFLOP
    cost = sample_cost(np.array([2443, 0]), np.array([0, 163])).tolist()
    assert cost[0] == pytest.approx(linear + 1.17e6, rel=0.01)
    assert cost[1] / 10 == pytest.approx(6.07e6, rel=0.01)


def test_an_empty_data_set_has_no_steps():
    assert plan_of([]).num_steps == 0
    assert plan_of([]).summary().balance == 1


def test_the_summary_counts_rows_dummies_and_tokens():
    summary = plan_of([1000, 400, 500], world_size=3, global_batch_size=3).summary()
    assert (summary.num_rows, summary.num_empty_rows, summary.num_tokens) == (3, 0, 1900)
    assert summary.utilisation == pytest.approx(1900 / 3000)
    assert plan_of([1000], world_size=3).summary().num_empty_rows == 2


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_ranks_carry_nearly_the_same_where_the_batch_allows_it(seed):
    random = np.random.default_rng(seed)
    plan = plan_of(
        random.integers(50, 900, 640),
        random.integers(2, 10, 640),
        seed=seed,
        global_batch_size=64,
        world_size=8,
    )
    assert plan.summary().balance > 0.95


def test_a_plan_of_a_million_samples_is_there_at_once():
    plan = plan_of(np.full(1_000_000, 500), np.ones(1_000_000, np.int64), world_size=8)
    assert plan.num_steps == 125_000
    assert len(plan.rows(124_999, 7)) == 1


SETTINGS = PlanSettings("data", "tokenizer", 4, CAPACITY, 0, 16)


def test_a_change_of_any_field_is_noticed():
    for name, value in asdict(SETTINGS).items():
        other = value + "x" if isinstance(value, str) else value + 1
        changes = plan_changes(asdict(SETTINGS), replace(SETTINGS, **{name: other}))
        assert changes == (f"{name}: {value} -> {other}",)


def test_changed_settings_are_named():
    assert plan_changes(asdict(SETTINGS), SETTINGS) == ()
    assert plan_changes(asdict(SETTINGS), replace(SETTINGS, num_crops=16, seed=1)) == (
        "num_crops: 4 -> 16",
        "seed: 0 -> 1",
    )
    assert plan_changes({}, SETTINGS)[0] == "dataset_fingerprint: absent -> data"
