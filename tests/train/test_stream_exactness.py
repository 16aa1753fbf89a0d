"""Position is one integer: whoever worked before and works after, nothing is lost or repeated."""

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from phi3v_train.checkpoint import CheckpointError
from phi3v_train.collator import Batch
from phi3v_train.sources import Source
from phi3v_train.stream import StreamSettings, TrainStream, open_stream
from phi3v_train.trainer import train

from tests.train.builders import make_sample, make_shards, toy_config

SETTINGS = StreamSettings(
    num_crops=1, max_tokens_per_row=700, global_batch_size=5, num_epochs=2, seed=3
)
CREWS = list(itertools.product(range(4), range(1, 5)))  # (workers, ranks)
Step = tuple[tuple[str, ...], ...]
"""The samples of all ranks in a step, by rank."""


def read(stream: TrainStream, crew: tuple[int, int], start: int, stop: int | None) -> list[Step]:
    """What all ranks of a crew are given from one step to another."""
    num_workers, world_size = crew
    ranks: list[list[tuple[str, ...]]] = []
    for rank in range(world_size):
        settings = replace(
            stream.settings, num_workers=num_workers, world_size=world_size, rank=rank
        )
        ranked = TrainStream(stream.sources, stream.encoder, stream.measures, settings)
        with closing(ranked.steps(start, stop)) as steps:
            ranks.append(
                [tuple(n for row in rows for n in row.sample_ids if n) for _, rows in steps]
            )
    return list(zip(*ranks, strict=True))


def names(rows: Sequence[Batch]) -> tuple[str, ...]:
    return tuple(name for row in rows for name in row.sample_ids if name)


def samples(steps: Sequence[Step]) -> list[Counter[str]]:
    """The samples of each step, whichever rank had them."""
    return [Counter(name for names in step for name in names) for step in steps]


def planned(stream: TrainStream) -> list[Counter[str]]:
    """The samples of each step as the plan has them."""
    epochs = [stream.plan(epoch) for epoch in range(stream.settings.num_epochs)]
    return [
        Counter(stream.sources.sample(number).id for number in plan.samples(step))
        for plan in epochs
        for step in range(plan.num_steps)
    ]


def a_stream(tiny: Path, shards: Sequence[Source], settings: StreamSettings) -> TrainStream:
    return open_stream(shards, tiny, settings)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source with images and one without."""
    folder = tmp_path_factory.mktemp("two")
    pictures = [make_sample(f"p{n}", ([f"{n}.png"], "What? " * (n % 4), "It.")) for n in range(7)]
    texts = [make_sample(f"t{n}", ((), "Why? " * (n % 5 + 1), "So. " * n + "!")) for n in range(9)]
    return make_shards(folder / "p", pictures), make_shards(folder / "t", texts)


@pytest.fixture(scope="module", params=["plain", "mixture", "label tokens", "window"], ids=str)
def stream(request: pytest.FixtureRequest, tiny: Path, two: tuple[Path, Path]) -> TrainStream:
    pictures, texts = two
    kind: str = request.param
    settings = {
        "plain": SETTINGS,
        "mixture": replace(SETTINGS, epoch_size=13, temperature=2.0),
        "label tokens": replace(SETTINGS, global_batch_unit="label_tokens", global_batch_size=60),
        "window": replace(SETTINGS, window_bytes=1 << 12),
    }[kind]
    weight = (3.0, 1.0) if kind == "mixture" else (None, None)
    return a_stream(tiny, [Source(pictures, weight[0]), Source(texts, weight[1])], settings)


def resumes(stream: TrainStream, crews: Sequence[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    """Every pair of crews and every step to stop at: (which, whether nothing was lost)."""

    @cache
    def part(crew: tuple[int, int], start: int, stop: int) -> list[Counter[str]]:
        return samples(read(stream, crew, start, stop))

    whole, end = planned(stream), stream.num_steps
    for before, after in itertools.product(crews, crews):
        for stop in range(1, end):
            found = part(before, 0, end)[:stop] + part(after, stop, end)
            yield f"{before} to {after} at {stop}", found == whole


def test_a_resume_yields_what_was_left_in_the_order_of_the_plan(stream: TrainStream) -> None:
    crews = [(0, 1), (0, 3), (2, 2)]
    outcomes = dict(resumes(stream, crews))
    assert len(outcomes) == 9 * (stream.num_steps - 1)
    assert [name for name, is_exact in outcomes.items() if not is_exact] == []


@pytest.mark.slow
@pytest.mark.long
def test_a_resume_between_any_two_crews_yields_what_was_left(stream: TrainStream) -> None:
    outcomes = dict(resumes(stream, CREWS))
    assert len(outcomes) == len(CREWS) ** 2 * (stream.num_steps - 1)
    assert [name for name, is_exact in outcomes.items() if not is_exact] == []


def test_a_run_that_was_cut_while_workers_were_ahead_is_at_the_step_it_consumed(
    stream: TrainStream,
) -> None:
    settings = replace(stream.settings, num_workers=2)
    cut = TrainStream(stream.sources, stream.encoder, stream.measures, settings)
    with closing(cut.steps()) as steps:
        taken = [next(steps)[0] for _ in range(2)]
    assert taken == [0, 1]
    assert samples(read(stream, (1, 2), 2, None)) == planned(stream)[2:]


def test_every_step_of_every_crew_gives_each_rank_equally_many_rows(stream: TrainStream) -> None:
    for _, world_size in CREWS[:4]:
        for step in range(stream.num_steps):
            counts = set()
            for rank in range(world_size):
                settings = replace(stream.settings, world_size=world_size, rank=rank)
                ranked = TrainStream(stream.sources, stream.encoder, stream.measures, settings)
                counts.add(len(ranked.rows_of_step(step)))
            assert len(counts) == 1
            assert min(counts) > 0


# --- mixtures -------------------------------------------------------------------------------------


def test_a_mixture_has_its_shares_in_every_epoch(tiny: Path, two: tuple[Path, Path]) -> None:
    settings = replace(SETTINGS, epoch_size=12)
    mixed = a_stream(tiny, [Source(two[0], 1.0), Source(two[1], 2.0)], settings)
    assert mixed.samples_by_source(0) == [4, 8]
    epochs = samples(read(mixed, (0, 1), 0, None))
    for epoch in (epochs[:3], epochs[3:]):
        seen = [name for step in epoch for name in step.elements()]
        assert Counter(name[0] for name in seen) == {"p": 4, "t": 8}
    assert epochs[:3] != epochs[3:]


def test_sources_without_weights_are_all_seen_once(tiny: Path, two: tuple[Path, Path]) -> None:
    joined = a_stream(tiny, [Source(path) for path in two], SETTINGS)
    seen = sum(samples(read(joined, (0, 2), 0, joined.steps_per_epoch)), Counter[str]())
    assert seen == Counter([f"p{n}" for n in range(7)] + [f"t{n}" for n in range(9)])


def test_a_weight_for_some_sources_only_is_refused(tiny: Path, two: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="shards has no weight and others have one"):
        a_stream(tiny, [Source(two[0], 1.0), Source(two[1])], SETTINGS)


def test_the_identity_covers_all_sources_and_how_they_are_mixed(
    tiny: Path, two: tuple[Path, Path]
) -> None:
    def identity(*weights: float | None, **changes: object) -> object:
        listed = [Source(path, weight) for path, weight in zip(two, weights, strict=True)]
        return a_stream(tiny, listed, replace(SETTINGS, **changes)).identity  # pyright: ignore[reportArgumentType]

    identities = [
        identity(None, None),
        identity(1.0, 1.0),
        identity(1.0, 2.0),
        identity(1.0, 2.0, temperature=2.0),
        identity(1.0, 2.0, epoch_size=10),
        a_stream(tiny, [Source(two[0])], SETTINGS).identity,
    ]
    assert len(set(identities)) == len(identities)


# --- refusals -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tiny: Path, two: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after one step."""
    output = tmp_path_factory.mktemp("begun") / "run"
    train(toy_config(tiny, two[1], output, "train.max_steps=1", "eval.after=false"))
    return output


def refusal(output: Path, tmp_path: Path, model: Path, shards: object, *more: str) -> str:
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    with pytest.raises(CheckpointError) as caught:
        train(toy_config(model, Path(str(shards)), copy, "train.max_steps=1", *more))
    return str(caught.value)


def test_other_data_is_refused_and_named(
    tiny: Path, two: tuple[Path, Path], begun: Path, tmp_path: Path
) -> None:
    message = refusal(begun, tmp_path, tiny, two[0])
    assert "dataset_fingerprint: " in message
    assert "tokenizer" not in message
    both = f"data.train=[{two[0]}, {two[1]}]"
    shutil.rmtree(tmp_path / "copy")
    assert "dataset_fingerprint: " in refusal(begun, tmp_path, tiny, two[1], both)


def test_another_tokenizer_is_refused_and_named(
    tiny: Path, two: tuple[Path, Path], begun: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    message = refusal(begun, tmp_path, other, two[1])
    assert "tokenizer_hash: " in message
    assert "dataset_fingerprint" not in message


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.num_crops=4", "num_crops: 1 -> 4"),
        ("data.max_tokens_per_row=900", "max_tokens_per_row: 8192 -> 900"),
        ("train.global_batch_size=3", "global_batch_size: 4 -> 3"),
        ("train.global_batch_unit=label_tokens", "global_batch_unit: samples -> label_tokens"),
        ("data.shuffle_window_mib=1", "window_bytes: 0 -> 1048576"),
        ("seed=1", "seed: 0 -> 1"),
    ],
)
def test_other_settings_of_the_data_are_refused_and_named(
    tiny: Path, two: tuple[Path, Path], begun: Path, tmp_path: Path, setting: str, said: str
) -> None:
    assert said in refusal(begun, tmp_path, tiny, two[1], setting)
