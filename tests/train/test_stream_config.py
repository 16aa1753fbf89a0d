"""What a configuration and a dry run say of the stream."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import fsspec  # pyright: ignore[reportMissingTypeStubs]
import pytest
import torch
from phi3v_data.shards import open_shards
from phi3v_train.collator import SampleEncoder
from phi3v_train.config import ConfigError, TrainConfig, dump_config, load_config
from phi3v_train.stream import StreamSettings, open_stream
from phi3v_train.trainer import describe, train

from tests.train.builders import log_lines, make_sample, make_shards, toy_config

REQUIRED = ("model=m", "output_dir=o")


def loaded(*overrides: str) -> TrainConfig:
    return load_config(None, [*REQUIRED, *overrides])


def sources(config: TrainConfig) -> list[tuple[str, float | None]]:
    return [(str(source.path), source.weight) for source in config.data.train]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of nine samples without images, the last three long."""
    samples = [
        make_sample(f"t{n}", ((), "Why? " * (300 if n > 5 else 1), f"So {n}.")) for n in range(9)
    ]
    return make_shards(tmp_path_factory.mktemp("texts"), samples)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("a", [("a", None)]),
        ("[a, b]", [("a", None), ("b", None)]),
        ("[{path: a, weight: 2}, {path: s3://b/c, weight: 0.5}]", [("a", 2.0), ("s3://b/c", 0.5)]),
        ("s3://bucket/shards/train", [("s3://bucket/shards/train", None)]),
        ("memory://shards", [("memory://shards", None)]),
    ],
)
def test_sources_are_a_name_or_a_list(
    tmp_path: Path, written: str, read: list[tuple[str, float | None]]
) -> None:
    config = loaded(f"data.train={written}")
    assert sources(config) == read
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config


def test_a_lone_source_is_written_as_its_name() -> None:
    assert "train: shards/a\n" in dump_config(loaded("data.train=shards/a"))


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("[]", "data.train"),
        ("3", "data.train"),
        ("[{path: a, weight: 0}]", "weight"),
        ("[{path: a, wait: 1}]", "wait"),
        ("[{weight: 1}]", "path"),
    ],
)
def test_what_is_no_source_is_one_line_that_names_it(written: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        loaded(f"data.train={written}")
    assert "\n" not in str(caught.value)


def test_a_dry_run_shows_sources_shares_balance_and_what_is_dropped(
    tiny: Path, toy_shards: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toy_config(
        tiny,
        toy_shards,
        tmp_path / "run",
        f"data.train=[{{path: {toy_shards}, weight: 3}}, {{path: {texts}, weight: 1}}]",
        "data.max_tokens_per_row=800",
        "data.overlong=drop",
        "data.epoch_size=16",
    )
    describe(config, world_size=2)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in ("16 samples an epoch", "12 of 12", "4 of 9", "8 of 4 samples each; 4 an epoch"):
        assert part in shown
    assert "3 too long for a row: t6: " in shown
    assert "of 800 tokens full" in shown
    assert "balance" in shown
    assert not (tmp_path / "run").exists()


def test_a_run_on_two_sources_trains_on_both(
    tiny: Path, toy_shards: Path, texts: Path, tmp_path: Path
) -> None:
    both = f"data.train=[{toy_shards}, {texts}]"
    batch = ("train.global_batch_unit=label_tokens", "train.global_batch_size=40")
    train(toy_config(tiny, toy_shards, tmp_path, both, *batch, "train.num_epochs=1"))
    lines = log_lines(tmp_path)
    assert lines[-1]["epoch"] == 1.0
    assert lines[-1]["step"] == lines[-1]["num_steps"] == len(lines)
    assert all(line["label_tokens"] >= 40 for line in lines[:-1])


@pytest.mark.parametrize("is_slow", [True, False])
def test_the_log_says_which_part_of_the_time_was_spent_waiting_for_rows(
    tiny: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_slow: bool
) -> None:
    real = SampleEncoder.__call__

    def slowly(self: SampleEncoder, *arguments, **options):
        time.sleep(1.0)
        return real(self, *arguments, **options)

    if is_slow:
        monkeypatch.setattr(SampleEncoder, "__call__", slowly)
    steps = ("train.global_batch_size=2", "train.max_steps=2", "train.log_every=2")
    train(toy_config(tiny, texts, tmp_path, *steps))
    (line,) = log_lines(tmp_path)
    waited = line["data_wait"] * line["seconds"]
    assert 0 <= line["data_wait"] <= 1
    assert waited >= 3.9 if is_slow else waited < 3.9


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_sample_is_named_with_its_shard(
    tiny: Path, tmp_path: Path, num_workers: int
) -> None:
    shards = make_shards(
        tmp_path, [make_sample(f"s{n}", ([f"{n}.png"], "What?", "It.")) for n in range(3)]
    )
    settings = StreamSettings(
        num_crops=1,
        max_tokens_per_row=800,
        global_batch_size=3,
        num_epochs=1,
        seed=0,
        num_workers=num_workers,
    )
    stream = open_stream(shards, tiny, settings)
    (file,) = shards.glob("*.parquet")
    content = bytearray(file.read_bytes())
    content[content.index(b"\x89PNG") + 60] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00000\.parquet.*sample 's0'") as caught:
        list(stream.steps())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shards_at_an_address_give_the_rows_of_the_same_shards_on_disk(
    tiny: Path, toy_shards: Path, num_workers: int
) -> None:
    store = fsspec.filesystem("memory")
    for file in toy_shards.iterdir():
        store.pipe_file(f"/toy-{num_workers}/train/{file.name}", file.read_bytes())
    settings = StreamSettings(
        num_crops=1, max_tokens_per_row=800, global_batch_size=5, num_epochs=1, seed=3
    )
    local = open_stream(toy_shards, tiny, settings)
    remote = open_stream(
        f"memory://toy-{num_workers}/train", tiny, replace(settings, num_workers=num_workers)
    )
    assert remote.identity == local.identity
    for (step, rows), (_, others) in zip(remote.steps(), local.steps(), strict=True):
        for row, other in zip(rows, others, strict=True):
            assert row.sample_ids == other.sample_ids, step
            assert torch.equal(row.pixel_values, other.pixel_values)


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_sample_is_left_out_and_named_where_that_is_asked_for(
    tiny: Path, toy_shards: Path, tmp_path: Path, num_workers: int
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(toy_shards, shards)
    reader = open_shards(shards)
    damaged = next(i for i in range(len(reader)) if reader.image_spans(i)[1])
    entry, spans = reader.image_spans(damaged)
    flip(shards / entry.name, spans[0][0] + 5)
    settings = StreamSettings(
        num_crops=1, max_tokens_per_row=800, global_batch_size=5, num_epochs=1, seed=3,
        num_workers=num_workers, damaged="skip",
    )  # fmt: skip
    stream = open_stream(shards, tiny, settings)
    names = [n for _, rows in stream.steps() for row in rows for n in row.sample_ids]
    expected = {reader.sample(i).id for i in range(len(reader))} - {reader.sample(damaged).id}
    assert sorted(set(names) - {""}) == sorted(expected)
    assert stream.num_skipped == 1
    assert stream.take_skipped() == [f"{reader.sample(damaged).id} of {shards}/{entry.name}"]
    assert stream.take_skipped() == []


def test_shards_in_an_object_store_are_mixed_in_a_window_unless_told(
    tiny: Path, toy_shards: Path
) -> None:
    store = fsspec.filesystem("memory")
    for file in toy_shards.iterdir():
        store.pipe_file(f"/windowed/train/{file.name}", file.read_bytes())
    settings = StreamSettings(
        num_crops=1, max_tokens_per_row=800, global_batch_size=5, num_epochs=1, seed=3,
        window_bytes=None,
    )  # fmt: skip
    assert open_stream(toy_shards, tiny, settings).window_bytes == 0
    assert open_stream("memory://windowed/train", tiny, settings).window_bytes > 0
    told = replace(settings, window_bytes=77)
    assert open_stream("memory://windowed/train", tiny, told).window_bytes == 77
