import multiprocessing
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from phi3v_train.collator import Batch
from phi3v_train.plan import plan_changes
from phi3v_train.stream import StreamSettings, TrainStream, open_stream

SETTINGS = StreamSettings(
    num_crops=1, max_tokens_per_row=800, global_batch_size=5, num_epochs=2, seed=3
)


def names(rows: list[Batch]) -> list[tuple[str, ...]]:
    return [row.sample_ids for row in rows]


def samples_in(rows: list[Batch]) -> list[str]:
    return [name for row in rows for name in row.sample_ids if name]


def assert_same_rows(found: list[Any], expected: list[Any]) -> None:
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (_, rows), (_, others) in zip(found, expected, strict=True):
        assert names(rows) == names(others)
        for row, other in zip(rows, others, strict=True):
            assert torch.equal(row.input_ids, other.input_ids)
            assert torch.equal(row.labels, other.labels)
            assert torch.equal(row.pixel_values, other.pixel_values)


@pytest.fixture(scope="module")
def stream(tiny: Path, toy_shards: Path) -> TrainStream:
    return open_stream(toy_shards, tiny, SETTINGS)


def changed(stream: TrainStream, **changes: Any) -> TrainStream:
    settings = replace(stream.settings, **changes)
    return TrainStream(stream.sources, stream.encoder, stream.measures, settings)


def test_every_sample_is_seen_once_an_epoch_in_another_order(stream: TrainStream) -> None:
    assert (stream.steps_per_epoch, stream.num_steps) == (3, 6)
    orders: list[list[str]] = []
    for epoch in range(2):
        steps = list(stream.steps(3 * epoch, 3 * epoch + 3))
        orders.append([name for _, rows in steps for name in samples_in(rows)])
        assert sorted(orders[-1]) == sorted(f"s{number}" for number in range(12))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_yields_the_rows_that_would_have_come_next(
    stream: TrainStream, num_workers: int
) -> None:
    whole = list(stream.steps())
    resumed = list(changed(stream, num_workers=num_workers).steps(start=2))
    assert_same_rows(resumed, whole[2:])


def test_another_way_of_resizing_gives_other_pixels_and_is_another_identity(
    stream: TrainStream, tiny: Path, toy_shards: Path
) -> None:
    fast = open_stream(toy_shards, tiny, replace(SETTINGS, resize="fast"))
    assert plan_changes(asdict(stream.identity), fast.identity) == ("resize: exact -> fast",)
    ((_, rows),), ((_, fast_rows),) = stream.steps(0, 1), fast.steps(0, 1)
    assert names(rows) == names(fast_rows)
    pairs = [
        (row.pixel_values, other.pixel_values) for row, other in zip(rows, fast_rows, strict=True)
    ]
    assert not all(torch.equal(exact, other) for exact, other in pairs)


def test_a_step_may_be_the_last_one_asked_for(stream: TrainStream) -> None:
    assert [step for step, _ in stream.steps(1, 3)] == [1, 2]
    assert list(stream.steps(6)) == []


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_samples_of_a_step_do_not_depend_on_the_world_size(
    stream: TrainStream, world_size: int
) -> None:
    alone = [Counter(samples_in(rows)) for _, rows in stream.steps(0, 3)]
    shared = [Counter[str]() for _ in alone]
    num_rows: list[set[int]] = [set() for _ in alone]
    for rank in range(world_size):
        ranked = changed(stream, rank=rank, world_size=world_size)
        assert ranked.num_steps == stream.num_steps
        for step, rows in ranked.steps(0, 3):
            shared[step].update(samples_in(rows))
            num_rows[step].add(len(rows))
    assert shared == alone
    assert all(len(counts) == 1 for counts in num_rows)  # all ranks run equally many


def test_no_row_is_longer_than_its_capacity_and_a_row_is_its_samples_measured(
    stream: TrainStream,
) -> None:
    for _, rows in stream.steps(0, 3):
        for row in rows:
            assert len(row.input_ids) <= SETTINGS.max_tokens_per_row
            numbers = [int(name[1:]) for name in row.sample_ids]
            assert len(row.input_ids) == stream.measures.num_tokens[numbers].sum()


def test_samples_longer_than_a_row_stop_it_or_are_dropped(stream: TrainStream) -> None:
    pairs = [number for number in range(12) if number % 3 == 2]  # two images: 630 tokens or more
    with pytest.raises(
        ValueError, match=r"4 of 12 samples are longer than a row of 500 tokens \(s2: 6"
    ) as caught:
        changed(stream, max_tokens_per_row=500)
    assert "data.overlong=drop" in str(caught.value)
    short = changed(stream, max_tokens_per_row=500, overlong="drop")
    assert short.overlong.tolist() == pairs
    seen = [name for _, rows in short.steps(0, short.steps_per_epoch) for name in samples_in(rows)]
    assert sorted(seen) == sorted(f"s{n}" for n in range(12) if n not in pairs)


def test_many_samples_that_are_too_long_are_counted_not_listed(stream: TrainStream) -> None:
    with pytest.raises(ValueError, match=r"\(s0: .*s4: \d+ tokens, and 7 more\)"):
        changed(stream, max_tokens_per_row=10)


def test_where_nothing_fits_there_is_nothing_to_train_on(stream: TrainStream) -> None:
    with pytest.raises(ValueError, match="no sample that fits a row of 10 tokens"):
        changed(stream, max_tokens_per_row=10, overlong="drop")


def test_the_identity_follows_data_and_settings_but_not_who_works(stream: TrainStream) -> None:
    same = changed(stream, rank=1, world_size=2, num_workers=3, prefetch_bytes=9, num_epochs=5)
    assert same.identity == stream.identity
    assert changed(stream, seed=4).identity != stream.identity
    assert changed(stream, global_batch_size=4).identity != stream.identity


def test_progress_ends_with_all_samples_measured(tiny: Path, toy_shards: Path) -> None:
    seen: list[tuple[int, int]] = []
    open_stream(toy_shards, tiny, SETTINGS, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_damaged_after_sharding_is_one_line_that_names_its_sample(
    tiny: Path, toy_shards: Path, tmp_path: Path, num_workers: int
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(toy_shards, shards)
    (file,) = shards.glob("*.parquet")
    content = bytearray(file.read_bytes())
    start = content.index(b"\x89PNG")
    content[start + 60] ^= 0xFF
    file.write_bytes(content)
    damaged = open_stream(shards, tiny, replace(SETTINGS, num_workers=num_workers))
    with pytest.raises(ValueError, match=r"'?s\d+'?") as caught:
        list(damaged.steps(0, 3))
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    assert multiprocessing.active_children() == []  # though the error is still held


def test_leaving_early_ends_the_workers(stream: TrainStream) -> None:
    steps = changed(stream, num_workers=2).steps()
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    steps.close()
    assert multiprocessing.active_children() == []
