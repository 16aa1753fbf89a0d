# /// script
# requires-python = ">=3.11"
# dependencies = ["phi3v-data", "phi3v-train", "mosaicml-streaming>=0.13"]
#
# [tool.uv]
# override-dependencies = ["transformers>=5.17"]
#
# [tool.uv.sources]
# phi3v-data = { path = "../packages/phi3v-data", editable = true }
# phi3v-train = { path = "../packages/phi3v-train", editable = true }
# ///
"""The whole stream, read, decode, encode, collate and hand over: samples a second against others.

    uv run benchmarks/stream.py --json stream.json

Every side gives a training process one epoch of the same made samples, shuffled, from the page
cache, through equally many workers. What is timed is the epoch, from asking for the first row to
having the last; rows are taken and let go, not read. `wall` is the time that passed, `cpu` that of
all processes together: on a machine that others use too, believe `cpu`.

    ours        shards, `open_stream`: packed rows in shared memory
    recipe      the cookbook's way restated: JSONL and image files, a map-style Dataset (open with
                Pillow, pad, to float, normalise, global view, zeros up to num_crops + 1 views an
                image), torch's DataLoader, a batch of one
    mosaicml    mosaicml-streaming's shards and loader around our encoder and collator, as many
                samples a row as ours has on average

A side whose package is not installed is left out, and said. What is printed is how many times less
time ours takes: the median over the rounds of (theirs / ours), and the least and largest of them.
The rounds go forth and back through the sides. Before anything is timed, the token ids of all sides
are compared.
"""

import importlib.util
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from encode import machine, make_page, make_photo, published_views, to_jpeg
from phi3v_data import Sample, Turn, write_samples, write_shards
from phi3v_train.chat import ChatEncoder
from phi3v_train.collator import Batch, SampleEncoder, collate
from phi3v_train.hd_transform import hd_layout
from phi3v_train.stream import StreamSettings, TrainStream, open_stream
from phi3v_train.tiny import init_tiny
from PIL import Image
from ratios import Ratio, ratio
from results import json_option, show_results
from torch.utils.data import DataLoader, Dataset

PEER = "streaming"
"""The module of mosaicml-streaming."""

CLOCKS = ("wall", "cpu")

VARIANTS = 6
"""Different pictures of a case; the samples take them in turn, each from a file of its own."""


@dataclass(frozen=True)
class Case:
    """A made data set."""

    name: str
    picture: Callable[[], Image.Image]
    images_per_sample: int
    num_samples: int
    num_crops: int
    question: str
    target: float
    """The claim: recipe / ours."""


CLASSES = "Classify the video into one of these classes: " + ", ".join(
    f"class {number}" for number in range(60)
)

CASES = (
    Case(
        name="8 frames 320x240, 4 crops",
        picture=lambda: make_photo(320, 240),
        images_per_sample=8,
        num_samples=48,
        num_crops=4,
        question=CLASSES,
        target=2.5,
    ),
    Case(
        name="page 1700x2200, 16 crops",
        picture=make_page,
        images_per_sample=1,
        num_samples=64,
        num_crops=16,
        question="What is the date of this letter?",
        target=1.7,
    ),
)

MAX_TOKENS_PER_ROW = 8192


@dataclass(frozen=True)
class Result:
    """One case, measured."""

    case: str
    num_samples: int
    num_images: int
    num_rows: int
    """Of ours."""
    num_workers: int
    target: float
    samples_per_second: float
    """Of ours, the median."""
    seconds: Mapping[str, Mapping[str, Sequence[float]]]
    """Of an epoch: side -> clock -> one a round."""
    ratios: Mapping[str, Mapping[str, Ratio]]
    """Side -> clock -> its time over ours."""


# --- the data -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A data set in every form, below one folder."""

    folder: Path
    samples: Sequence[Sample]

    @property
    def images(self) -> Path:
        """Image files; below it, what the samples name."""
        return self.folder / "images"

    @property
    def shards(self) -> Path:
        """Ours."""
        return self.folder / "shards"

    @property
    def mds(self) -> Path:
        """mosaicml-streaming's."""
        return self.folder / "mds"


def make(case: Case, folder: Path, num_samples: int) -> Made:
    """Draw the pictures and write the samples in every form."""
    whole = case.picture()
    pictures = [
        to_jpeg(_shifted(whole, number))
        for number in range(min(VARIANTS, num_samples * case.images_per_sample))
    ]
    samples: list[Sample] = []
    (folder / "images").mkdir(parents=True)
    for number in range(num_samples):
        names = [f"{number}-{place}.jpg" for place in range(case.images_per_sample)]
        for place, name in enumerate(names):
            (folder / "images" / name).write_bytes(pictures[(number + place) % len(pictures)])
        turn = Turn(images=tuple(names), user=case.question, assistant=f"Answer {number % 60}")
        samples.append(Sample(id=f"s{number}", source="made", conversations=(turn,)))
    made = Made(folder, samples)
    write_samples(folder / "train.jsonl", samples)
    write_shards([folder / "train.jsonl"], made.shards, num_workers=1)
    if importlib.util.find_spec(PEER) is not None:
        write_mds(made)
    return made


def _shifted(picture: Image.Image, number: int) -> Image.Image:
    """Another picture as hard to compress: the same, moved round."""
    return Image.fromarray(np.roll(np.asarray(picture), (37 * number, 61 * number), (0, 1)))


def write_mds(made: Made) -> None:
    """mosaicml-streaming has no list of images: one blob, and the sizes in it."""
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    columns = {"sample": "bytes", "sizes": "json", "images": "bytes"}
    with MDSWriter(out=str(made.mds), columns=columns) as out:
        for sample in made.samples:
            images = [(made.images / name).read_bytes() for name in sample.images]
            out.write(
                {
                    "sample": sample.to_json().encode(),
                    "sizes": [len(image) for image in images],
                    "images": b"".join(images),
                }
            )


# --- the recipe -----------------------------------------------------------------------------------


class RecipeDataset(Dataset[dict[str, torch.Tensor]]):
    """Samples of a JSONL file; everything is done per sample, in float."""

    def __init__(self, made: Made, chat: ChatEncoder, num_crops: int) -> None:
        self.lines = (made.folder / "train.jsonl").read_text().splitlines()
        self.images = made.images
        self.chat = chat
        self.num_crops = num_crops

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = Sample.from_json(self.lines[index])
        views: list[torch.Tensor] = []
        grids: list[tuple[int, int]] = []
        for name in sample.images:
            with Image.open(self.images / name) as picture:
                views.append(published_views(picture, self.num_crops))
                grids.append(hd_layout(*picture.size, self.num_crops).grid)
        ids, labels = self.chat.assemble(self.chat.encode_text(sample), grids)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "pixel_values": torch.stack(views),  # (images, num_crops + 1, 3, 336, 336)
            "image_sizes": torch.tensor(grids) * 336,
        }


def recipe_collate(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of one."""
    (sample,) = samples
    batch = {name: sample[name][None] for name in ("input_ids", "labels")}
    return {
        **batch,
        "attention_mask": torch.ones_like(batch["input_ids"]),
        "pixel_values": sample["pixel_values"],
        "image_sizes": sample["image_sizes"],
    }


# --- the sides ------------------------------------------------------------------------------------

Epoch = Callable[[], Iterator[torch.Tensor]]
"""Starts an epoch; yields the token ids of its rows."""


def our_side(stream: TrainStream) -> Epoch:
    """An epoch of our rows."""

    def epoch() -> Iterator[torch.Tensor]:
        for _, rows in stream.steps():
            yield from (row.input_ids for row in rows)

    return epoch


def recipe_side(made: Made, encoder: SampleEncoder, num_workers: int) -> Epoch:
    """An epoch the cookbook's way."""
    loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(
        RecipeDataset(made, encoder.chat, encoder.num_crops),
        batch_size=1,
        shuffle=True,
        collate_fn=recipe_collate,
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        generator=torch.Generator().manual_seed(0),
    )
    return lambda: (batch["input_ids"][0] for batch in loader)


def mosaicml_side(made: Made, encoder: SampleEncoder, num_workers: int, batch_size: int) -> Epoch:
    """An epoch of mosaicml-streaming with our encoder."""
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]

    class Encoded(StreamingDataset):  # pyright: ignore[reportUntypedBaseClass]
        def __getitem__(self, index: Any) -> Any:
            record = super().__getitem__(index)
            sample = Sample.from_json(record["sample"])
            ends = np.cumsum([0, *record["sizes"]]).tolist()
            blob = memoryview(record["images"])
            return encoder(sample, [blob[a:b] for a, b in itertools.pairwise(ends)])

    data = Encoded(local=str(made.mds), shuffle=True, batch_size=batch_size, num_canonical_nodes=1)
    loader: DataLoader[Batch] = DataLoader(
        data,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
    )
    return lambda: (batch.input_ids for batch in loader)


# --- measuring ------------------------------------------------------------------------------------


def tokens_of(epoch: Epoch) -> tuple[int, int, int]:
    """(rows, tokens, sum of their ids) of an epoch: equal tokens, equal sums."""
    rows = list(epoch())
    return len(rows), sum(len(ids) for ids in rows), sum(int(ids.sum()) for ids in rows)


def time_epoch(epoch: Epoch) -> dict[str, float]:
    """Seconds by clock from asking for the first row to having the last, workers included."""
    wall, cpu = time.perf_counter(), _cpu_seconds()
    for ids in epoch():
        del ids
    passed = time.perf_counter() - wall
    return {"wall": passed, "cpu": _cpu_seconds() - cpu}


def _cpu_seconds() -> float:
    """Of this process and of all its children that have ended: every side's do with the epoch."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(case: Case, work: Path, *, samples: int | None, workers: int, rounds: int) -> Result:
    """Check that the sides agree, then time them in turns.

    Raises:
        ValueError: they don't agree.
    """
    num_samples = min(samples or case.num_samples, case.num_samples)
    folder = work / case.name.replace(" ", "-")
    made = make(case, folder, num_samples)
    model = init_tiny(folder / "model", seed=0).path
    stream = open_stream(
        made.shards,
        model,
        StreamSettings(
            num_crops=case.num_crops,
            max_tokens_per_row=MAX_TOKENS_PER_ROW,
            global_batch_size=16,
            num_epochs=1,
            seed=0,
            num_workers=workers,
        ),
    )
    sides = {
        "ours": our_side(stream),
        "recipe": recipe_side(made, stream.encoder, workers),
    }
    num_rows = stream.plan(0).summary().num_rows
    if importlib.util.find_spec(PEER) is not None:
        per_row = max(1, round(num_samples / num_rows))
        sides["mosaicml"] = mosaicml_side(made, stream.encoder, workers, per_row)
    contents = {name: tokens_of(epoch)[1:] for name, epoch in sides.items()}  # warms the cache too
    if len(set(contents.values())) != 1:
        raise ValueError(f"{case.name}: the sides give other tokens, not comparable: {contents}")

    seconds: dict[str, dict[str, list[float]]] = {
        name: {clock: [] for clock in CLOCKS} for name in sides
    }
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            for clock, value in time_epoch(sides[name]).items():
                seconds[name][clock].append(value)
    shutil.rmtree(folder)
    return Result(
        case=case.name,
        num_samples=num_samples,
        num_images=num_samples * case.images_per_sample,
        num_rows=num_rows,
        num_workers=workers,
        target=case.target,
        samples_per_second=num_samples / float(np.median(seconds["ours"]["wall"])),
        seconds=seconds,
        ratios={
            name: {clock: ratio(of_side[clock], seconds["ours"][clock]) for clock in CLOCKS}
            for name, of_side in seconds.items()
            if name != "ours"
        },
    )


def table(results: Sequence[Result]) -> Iterator[str]:
    """The lines of the table."""
    yield f"{'theirs / ours':28}{'clock':7}{'recipe':20}{'target':9}{'mosaicml':20}target"
    for result in results:
        for clock in CLOCKS:
            recipe, mosaicml = (
                str(result.ratios[side][clock]) if side in result.ratios else "not installed"
                for side in ("recipe", "mosaicml")
            )
            yield (f"{result.case:28}{clock:7}{recipe:20}>= {result.target:<6}{mosaicml:20}>= 1")
    yield ""
    for result in results:
        yield (
            f"{result.case:28}{result.samples_per_second:.1f} samples/s, {result.num_workers} "
            f"workers, {result.num_images} images in {result.num_rows} rows"
        )


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=7, help="Times every side is measured.")
@click.option("--workers", type=click.IntRange(0), default=2, help="Of every side.")
@click.option("--samples", type=click.IntRange(1), help="Only the first so many of every case.")
@json_option
def main(rounds: int, workers: int, samples: int | None, json_file: Path | None) -> None:
    """The whole stream: samples a second against other ways to feed a trainer."""
    about = machine() | {"rounds": rounds, "load": os.getloadavg()[0]}
    if importlib.util.find_spec(PEER) is None:
        click.echo(
            "mosaicml-streaming is not installed: left out. `uv run` this file to have it.\n"
        )
    else:
        about["mosaicml-streaming"] = version("mosaicml-streaming")
    try:
        with tempfile.TemporaryDirectory(prefix="phi3v-stream-") as work:
            results = [
                measure(case, Path(work), samples=samples, workers=workers, rounds=rounds)
                for case in CASES
            ]
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    show_results(about, table(results), results, json_file)


if __name__ == "__main__":
    main()
