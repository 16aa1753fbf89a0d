"""Writing a shard directory, against a plain pyarrow write of the same table.

    uv run python benchmarks/shard_writing.py --json shard_writing.json

    plain       the table of all samples in memory, images included, to Parquet files: the same row
                groups and settings, flushed to disk. Nothing is read, hashed or indexed
    ours        `write_shards` without its validation: images are read from disk and compared with
                their hashes, rows made, Parquet written, every image located in it, files hashed
                with SHA-256, the index written, everything flushed to disk; default workers
    one worker  the same in one process

On 2,000 samples of 2 to 8 images, JPEG files of about 100 kB, in the page cache; in turns; medians
of ratios of wall time.
"""

import json
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from phi3v_data import Sample, Turn, open_shards, write_samples
from phi3v_data.atomic import sync
from phi3v_data.shard_rows import PARQUET_OPTIONS
from phi3v_data.shard_writer import write_shards
from PIL import Image
from ratios import Ratio, ratio

TARGET = 2.0
"""ours / plain, at most."""


@dataclass(frozen=True)
class Result:
    """What was measured."""

    num_samples: int
    num_bytes: int
    num_shards: int
    ours: Ratio
    """ours / plain"""

    one_worker: Ratio
    plain_mb_per_second: float
    """The median, on this machine, at this load."""

    validation_seconds: float
    """Of the first run: taken off the time of ours."""

    num_cores: int
    versions: Mapping[str, str]


def write_dataset(folder: Path, num_samples: int, edge_px: int) -> Path:
    """Samples of 2 to 8 images; a hundred distinct pictures, each file with bytes of its own."""
    rng = np.random.default_rng(0)
    draw = random.Random(0)
    pictures: list[bytes] = []
    for _ in range(100):
        coarse = rng.integers(0, 255, (edge_px // 8, edge_px // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((edge_px, edge_px), Image.Resampling.BICUBIC)
        image.save(folder / "one.jpg", quality=90)
        pictures.append((folder / "one.jpg").read_bytes())
    samples: list[Sample] = []
    for number in range(num_samples):
        paths = tuple(f"{number // 100}/{number}.{k}.jpg" for k in range(draw.randint(2, 8)))
        for path in paths:
            (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
            comment = b"\xff\xfe\x00\x22" + f"{path:<32}".encode()
            picture = draw.choice(pictures)
            (folder / "images" / path).write_bytes(picture[:2] + comment + picture[2:])
        turn = Turn(images=paths, user=f"What is in picture {number}?", assistant="a pattern")
        samples.append(Sample(id=f"s{number}", source="made", conversations=(turn,)))
    write_samples(folder / "train.jsonl", samples)
    return folder / "train.jsonl"


def write_plain(tables: list[list[pa.Table]], folder: Path) -> None:
    """One file for each list of row groups."""
    folder.mkdir()
    for number, groups in enumerate(tables):
        path = folder / f"{number}.parquet"
        with pq.ParquetWriter(path, groups[0].schema, **PARQUET_OPTIONS) as writer:
            for group in groups:
                writer.write_table(group, row_group_size=len(group))
        sync(path)


def time_ours(jsonl: Path, folder: Path, num_workers: int | None) -> tuple[float, float]:
    """Seconds of writing, and of the validation before it."""
    begin: dict[str, float] = {}

    def note(what: str, done: int, total: int) -> None:
        begin.setdefault(what, time.perf_counter())
        begin[f"last {what}"] = time.perf_counter()

    start = time.perf_counter()
    result = write_shards([jsonl], folder, level="deep", num_workers=num_workers, progress=note)
    end = time.perf_counter()
    assert result.manifest is not None
    # From the end of validation on: the plan is part of writing.
    return end - begin["last validating"], begin["last validating"] - start


def measure(num_samples: int, edge_px: int, rounds: int, folder: Path) -> Result:
    """Run all sides in turns."""
    jsonl = write_dataset(folder, num_samples, edge_px)
    manifest = write_shards([jsonl], folder / "first").manifest
    assert manifest is not None
    tables: list[list[pa.Table]] = []
    for shard in manifest.shards:
        with pq.ParquetFile(folder / "first" / shard.name) as file:
            tables.append([file.read_row_group(g) for g in range(file.num_row_groups)])
    assert len(open_shards(folder / "first")) == num_samples

    def plain() -> float:
        start = time.perf_counter()
        write_plain(tables, folder / "out")
        return time.perf_counter() - start

    calls: dict[str, Callable[[], float]] = {
        "plain": plain,
        "ours": lambda: time_ours(jsonl, folder / "out", None)[0],
        "one worker": lambda: time_ours(jsonl, folder / "out", 1)[0],
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            shutil.rmtree(folder / "out", ignore_errors=True)
            seconds[name].append(calls[name]())
    shutil.rmtree(folder / "out", ignore_errors=True)
    _, validation = time_ours(jsonl, folder / "out", None)
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    return Result(
        num_samples=num_samples,
        num_bytes=num_bytes,
        num_shards=len(manifest.shards),
        ours=ratio(seconds["ours"], seconds["plain"]),
        one_worker=ratio(seconds["one worker"], seconds["plain"]),
        plain_mb_per_second=num_bytes / 1e6 / sorted(seconds["plain"])[rounds // 2],
        validation_seconds=validation,
        num_cores=len(os.sched_getaffinity(0)),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("phi3v-data", "pyarrow", "xxhash")},
        },
    )


@click.command()
@click.option("--samples", default=2000, show_default=True, type=click.IntRange(10))
@click.option("--edge", default=560, show_default=True, type=click.IntRange(16), help="Pixels.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result here.")
def main(samples: int, edge: int, rounds: int, json_file: Path | None) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(samples, edge, rounds, Path(folder))
    click.echo(
        f"{result.num_samples:,} samples, {result.num_bytes / 1e6:,.0f} MB in {result.num_shards} "
        f"shards, {result.num_cores} cores, medians of {rounds} rounds\n"
    )
    click.echo(f"      ours / plain   {result.ours}   <= {TARGET}")
    click.echo(f"one worker / plain   {result.one_worker}")
    click.echo(f"             plain   {result.plain_mb_per_second:,.0f} MB/s here and now")
    click.echo(f"        validation   {result.validation_seconds:.2f} s, not in these times")
    click.echo(", ".join(f"{name} {number}" for name, number in result.versions.items()))
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(result), indent=2))


if __name__ == "__main__":
    main()
