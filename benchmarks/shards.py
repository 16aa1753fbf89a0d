# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "phi3v-data",
#   "datasets",
#   "litdata",
#   "mosaicml-streaming",
#   "torch",
#   "webdataset",
# ]
# [tool.uv]
# override-dependencies = ["transformers>=5.17"]
# [tool.uv.sources]
# phi3v-data = { path = "../packages/phi3v-data", editable = true }
# ///
"""Reading samples in random order: our shards and others' formats, the same images in all.

    uv run benchmarks/shards.py --json shards.json

    ours        `open_shards`, every image compared with its hash on the way
    pread       one `pread` a sample from one flat file: no format at all
    raw         a JSONL file, and one `open().read()` an image
    litdata, mosaicml, webdataset, datasets    each at its own shuffle, hashes off where it has any;
                `datasets` streams our Parquet files

The peers do not live with this project's packages, so this script has an environment of its own
(its first lines; `uv run` makes it). A side whose package is absent is left out, and said.

Images are noise, with the sizes of photographs: median 70 kB, nine in ten below 175 kB, 2 to 8 a
sample. A run is a process of its own that opens the data, reads all samples once, and hashes every
byte with xxh3, on all sides, ours after its own check. Its time begins with the second batch of 8;
`first` is the time from opening to the first. Sides run in turns; figures are medians of ratios of
times over the rounds, above 1 where ours is faster. `workers` is the same through torch's
DataLoader with 2 workers, the bytes hashed in the worker. `memory` is anonymous memory
(/proc/self/smaps_rollup) over that after the imports, at most, with the batch.

    uv run benchmarks/shards.py --made_rows 10000000

measures opening and first batch on an index of so many rows, made up, over empty files.
"""

import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import xxhash
from phi3v_data.shards import ShardReader, open_shards
from PIL import Image
from ratios import Ratio, ratio

Bytes = bytes | memoryview
Sample = Sequence[Bytes]
"""The encoded images of a sample, or all of them in one."""

BATCH = 8
SHARD_BYTES = 64 << 20
NUM_WORKERS = 2

PACKAGES = {
    "litdata": "litdata",
    "mosaicml": "streaming",
    "webdataset": "webdataset",
    "datasets": "datasets",
}
DISTRIBUTIONS = ("litdata", "mosaicml-streaming", "webdataset", "datasets", "torch", "pyarrow")

TARGETS = {"pread": 1.1, "litdata": 2, "mosaicml": 4, "webdataset": 5, "datasets": 15, "raw": 2.5}
WORKER_TARGETS = {"litdata": 0.9, "mosaicml": 2.5, "webdataset": 3}
FIRST_MS_TARGET = 50
MEMORY_MB_TARGET = 32
MADE_FIRST_MS_TARGET = 1000

QUESTION = "What is the difference between these pictures? " + "word " * 30


def make_data(folder: Path, num_samples: int) -> None:
    """Conversations and images, as a person has them before anything else: `raw`."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    with open(folder / "train.jsonl", "w") as lines:
        for number in range(num_samples):
            names = [f"{number:06d}.{k}.jpg" for k in range(int(rng.integers(2, 9)))]
            for name in names:
                num_bytes = min(max(70_000 * math.exp(rng.normal() * 0.715), 27_000), 515_000)
                side = round(math.sqrt(num_bytes / 0.812))  # grey noise at quality 90
                pixels = rng.integers(0, 256, (side, side), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / name, quality=90)
            turn = {"images": names, "user": QUESTION, "assistant": "yes"}
            sample = {"id": f"s{number:06d}", "source": "made", "conversations": [turn]}
            lines.write(json.dumps(sample) + "\n")


def shuffled(num: int, seed: int) -> list[int]:
    """All numbers below `num`, in an order of their own."""
    order = list(range(num))
    random.Random(seed).shuffle(order)
    return order


# Each side: how it is written from our shards, and how it is read.


def write_pread(reader: ShardReader, folder: Path) -> None:
    """One file, and where each sample begins."""
    bounds = [0]
    with open(folder / "all.bin", "wb") as file:
        for record in reader:
            bounds.append(bounds[-1] + file.write(b"".join(record.images)))
    (folder / "bounds.json").write_text(json.dumps(bounds))


def read_pread(folder: Path, seed: int) -> Iterator[Sample]:
    """One system call a sample."""
    bounds = json.loads((folder / "bounds.json").read_text())
    file = os.open(folder / "all.bin", os.O_RDONLY)
    for i in shuffled(len(bounds) - 1, seed):
        yield (os.pread(file, bounds[i + 1] - bounds[i], bounds[i]),)


def read_raw(folder: Path, seed: int) -> Iterator[Sample]:
    """The recipe's way."""
    lines = (folder.parent / "raw" / "train.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    root = folder.parent / "raw" / "images"
    for i in shuffled(len(samples), seed):
        names = [name for turn in samples[i]["conversations"] for name in turn["images"]]
        yield [(root / name).read_bytes() for name in names]


def read_ours(folder: Path, seed: int) -> Iterator[Sample]:
    """With every image checked."""
    reader = open_shards(folder, verify="full")
    for i in shuffled(len(reader), seed):
        yield reader[i].images


def write_litdata(reader: ShardReader, folder: Path) -> None:
    """It has no lists of bytes: one blob, and the sizes."""
    from litdata.streaming import Cache  # pyright: ignore[reportMissingImports]

    cache: Any = Cache(str(folder), chunk_bytes=SHARD_BYTES)
    for i, record in enumerate(reader):
        cache[i] = {"data": b"".join(record.images), "sizes": sizes_of(record.images)}
    cache.done()
    cache.merge()


def open_litdata(folder: Path, seed: int) -> Any:
    """In place: nothing is copied to a cache."""
    from litdata import StreamingDataset  # pyright: ignore[reportMissingImports]

    return StreamingDataset(str(folder), shuffle=True, seed=seed)


def write_mosaicml(reader: ShardReader, folder: Path) -> None:
    """It has no lists of bytes either."""
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    columns = {"data": "bytes", "sizes": "bytes"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as writer:
        for record in reader:
            writer.write({"data": b"".join(record.images), "sizes": sizes_of(record.images)})


def open_mosaicml(folder: Path, seed: int) -> Any:
    """A local directory."""
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]

    return StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=seed, batch_size=BATCH)


def write_webdataset(reader: ShardReader, folder: Path) -> None:
    """A member of the archive an image."""
    from webdataset import ShardWriter  # pyright: ignore[reportMissingImports]

    with ShardWriter(str(folder / "%05d.tar"), maxsize=SHARD_BYTES, verbose=0) as writer:
        for i, record in enumerate(reader):
            images = {f"{k}.jpg": bytes(image) for k, image in enumerate(record.images)}
            writer.write({"__key__": f"{i:06d}", **images})


def open_webdataset(folder: Path, seed: int) -> Any:
    """Archives in random order, and a buffer of 1,000 samples."""
    from webdataset import WebDataset  # pyright: ignore[reportMissingImports]

    archives = sorted(map(str, folder.glob("*.tar")))
    return WebDataset(archives, shardshuffle=len(archives), seed=seed).shuffle(1000)


def open_datasets(folder: Path, seed: int) -> Any:
    """Our own Parquet files, streamed, and a buffer of 1,000 samples."""
    from datasets import load_dataset

    files = sorted(map(str, (folder.parent / "ours").glob("*.parquet")))
    data: Any = load_dataset("parquet", data_files=files, split="train", streaming=True)
    return data.shuffle(seed=seed, buffer_size=1000)


def images_of(item: Any) -> Sample:
    """The bytes in what a peer yields."""
    if "data" in item:
        return (item["data"],)
    if "images" in item:
        return [image["bytes"] for image in item["images"]]
    return [value for name, value in item.items() if name.endswith("jpg")]


def sizes_of(images: Iterable[Bytes]) -> bytes:
    """Lengths as the blob formats need them."""
    return np.array([len(image) for image in images], np.uint32).tobytes()


WRITERS: dict[str, Callable[[ShardReader, Path], None]] = {
    "pread": write_pread,
    "litdata": write_litdata,
    "mosaicml": write_mosaicml,
    "webdataset": write_webdataset,
}
READERS: dict[str, Callable[[Path, int], Iterator[Sample]]] = {
    "ours": read_ours,
    "pread": read_pread,
    "raw": read_raw,
}
PEERS: dict[str, Callable[[Path, int], Any]] = {
    "litdata": open_litdata,
    "mosaicml": open_mosaicml,
    "webdataset": open_webdataset,
    "datasets": open_datasets,
}
SIDES = (*READERS, *PEERS)


def consume(sample: Sample) -> int:
    """Hash every byte; how many there were."""
    for image in sample:
        xxhash.xxh3_64_intdigest(image)
    return sum(map(len, sample))


def hash_batch(items: list[Any]) -> tuple[int, int]:
    """What a DataLoader's worker hands over: (samples, bytes)."""
    samples = [item.images if hasattr(item, "images") else images_of(item) for item in items]
    return len(items), sum(map(consume, samples))


def batches(side: str, folder: Path, seed: int, num_workers: int) -> Iterator[tuple[int, int]]:
    """(samples, bytes) of each batch of 8, hashed."""
    if num_workers:
        from torch.utils.data import DataLoader

        is_ours = side == "ours"
        data: Any = open_shards(folder) if is_ours else PEERS[side](folder, seed)
        yield from DataLoader(
            data,
            BATCH,
            sampler=shuffled(len(data), seed) if is_ours else None,
            num_workers=num_workers,
            collate_fn=hash_batch,
        )
        return
    if side in READERS:
        samples = READERS[side](folder, seed)
    else:
        samples = map(images_of, PEERS[side](folder, seed))
    num_samples = num_bytes = 0
    for sample in samples:
        num_samples += 1
        num_bytes += consume(sample)
        if num_samples == BATCH:
            yield num_samples, num_bytes
            num_samples = num_bytes = 0
    if num_samples:
        yield num_samples, num_bytes


def anonymous_mb() -> float:
    """Anonymous memory of this process, in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def run_side(side: str, folder: Path, seed: int, num_workers: int) -> dict[str, float]:
    """One epoch in this process."""
    if num_workers or side in PEERS:
        importlib.import_module("torch.utils.data")
    if side in PEERS:
        importlib.import_module(PACKAGES[side])
    before = anonymous_mb()
    peak = before
    num_samples = num_bytes = 0
    first = paused = 0.0
    start = time.perf_counter()
    for number, (samples, size) in enumerate(batches(side, folder, seed, num_workers)):
        num_samples += samples
        num_bytes += size
        if number == 0:
            first = time.perf_counter() - start
        if number % 16 == 0 and not num_workers:
            pause = time.perf_counter()
            peak = max(peak, anonymous_mb())
            paused += time.perf_counter() - pause
    seconds = time.perf_counter() - start - first - paused
    return {
        "seconds": seconds,
        "first_ms": first * 1e3,
        "memory_mb": peak - before,
        "samples": num_samples,
        "bytes": num_bytes,
    }


def call_side(side: str, folder: Path, seed: int, num_workers: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    command += ["--seed", str(seed), "--workers", str(num_workers)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / ".hf")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    if done.returncode:
        raise click.ClickException(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def call_writer(side: str, folder: Path) -> None:
    """Write a peer's files in a process of its own: some leave threads behind."""
    command = [sys.executable, __file__, "--write", side, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise click.ClickException(f"writing {side} failed:\n{done.stderr[-3000:]}")


def measure(sides: Sequence[str], num_samples: int, rounds: int, folder: Path) -> dict[str, Any]:
    """All sides in turns."""
    from phi3v_data.shard_writer import write_shards

    make_data(folder / "raw", num_samples)
    write_shards(
        [folder / "raw" / "train.jsonl"], folder / "ours", shard_bytes=SHARD_BYTES, num_workers=1
    )
    manifest = open_shards(folder / "ours").manifest
    for side in sides:
        (folder / side).mkdir(exist_ok=True)
        if side in WRITERS:
            call_writer(side, folder / side)
    cases = [(side, 0) for side in sides]
    if any(side in WORKER_TARGETS for side in sides) and has_package("torch"):
        cases += [(side, NUM_WORKERS) for side in sides if side == "ours" or side in WORKER_TARGETS]
    runs: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    for number in range(rounds):
        for side, num_workers in cases[:: -1 if number % 2 else 1]:
            run = call_side(side, folder / side, number, num_workers)
            assert run["samples"] == num_samples, (side, num_workers, run)
            assert run["bytes"] == manifest.image_bytes, (side, num_workers, run)
            runs[side, num_workers].append(run)
    seconds = {case: [run["seconds"] for run in found] for case, found in runs.items()}
    return {
        "num_samples": num_samples,
        "num_images": manifest.num_images,
        "image_bytes": manifest.image_bytes,
        "rounds": rounds,
        "num_cores": len(os.sched_getaffinity(0)),
        "versions": {
            name: version(name)
            for name in ("phi3v-data", *DISTRIBUTIONS)
            if name == "phi3v-data" or has_distribution(name)
        },
        "sides": [
            {
                "side": side,
                "workers": num_workers,
                "ratio": ratio(seconds[side, num_workers], seconds["ours", num_workers]),
                "first_ms": statistics.median(run["first_ms"] for run in runs[side, num_workers]),
                "memory_mb": max(run["memory_mb"] for run in runs[side, num_workers]),
                "gb_per_second": manifest.image_bytes
                / statistics.median(seconds[side, num_workers])
                / 1e9,
            }
            for side, num_workers in cases
        ],
    }


def has_package(name: str) -> bool:
    """Whether it is installed here."""
    return importlib.util.find_spec(name) is not None


def has_distribution(name: str) -> bool:
    """Whether it is installed here, by the name it is published under."""
    return importlib.util.find_spec({"mosaicml-streaming": "streaming"}.get(name, name)) is not None


def print_result(result: dict[str, Any], left_out: Sequence[str]) -> None:
    """A line a side."""
    click.echo(
        f"{result['num_samples']:,} samples, {result['num_images']:,} images, "
        f"{result['image_bytes'] / 1e9:.2f} GB, {result['num_cores']} cores, medians of "
        f"{result['rounds']} rounds\n\n"
        f"{'':>12} {'workers':>7}  {'their time / ours':<24}{'first ms':>9} {'memory MiB':>11}"
    )
    for line in result["sides"]:
        targets = WORKER_TARGETS if line["workers"] else TARGETS
        found: Ratio = line["ratio"]
        bound = f">= {targets[line['side']]}" if line["side"] in targets else ""
        memory = "" if line["workers"] else f"{line['memory_mb']:.0f}"
        click.echo(
            f"{line['side']:>12} {line['workers']:>7}  {found!s:<18}{bound:<6}"
            f"{line['first_ms']:>9.0f} {memory:>11}"
        )
    click.echo(f"\nours: first <= {FIRST_MS_TARGET} ms, memory <= {MEMORY_MB_TARGET} MiB")
    click.echo(", ".join(f"{name} {number}" for name, number in result["versions"].items()))
    for side in left_out:
        click.echo(f"left out: {side}, its package is not installed")


def make_rows(num_rows: int, folder: Path) -> None:
    """A shard directory of so many samples of two images, all zeros in files without content."""
    import hashlib

    import pyarrow as pa
    from phi3v_data import shard_format as fmt
    from phi3v_data.shard_index import INDEX_SCHEMA, IndexWriter

    image_bytes, per_shard, step = 260_000, 250, 1 << 18
    hash_of_zeros = xxhash.xxh3_64_intdigest(bytes(image_bytes))
    folder.mkdir()
    writer = IndexWriter(folder / fmt.INDEX)
    for start in range(0, num_rows, step):
        rows = np.arange(start, min(start + step, num_rows))
        images = np.arange(2 * len(rows))
        offsets = (rows % per_shard).repeat(2) * 2 * image_bytes + images % 2 * image_bytes
        same = [np.full(2 * len(rows), value) for value in (image_bytes, 500, 400)]
        hashes = np.full(2 * len(rows), hash_of_zeros, np.uint64)
        image_type: Any = INDEX_SCHEMA.field("images").type.value_type
        columns = [offsets, *same, hashes]
        places = pa.StructArray.from_arrays(
            [pa.array(c, f.type) for c, f in zip(columns, image_type.fields, strict=True)],
            fields=image_type.fields,
        )
        texts = [
            f'{{"id":"s{i}","source":"made","conversations":[{{"images":["{i}.0.jpg","{i}.1.jpg"],'
            f'"user":"What is it?","assistant":"yes"}}]}}'
            for i in rows.tolist()
        ]
        lists = pa.ListArray.from_arrays(
            pa.array(np.arange(0, 2 * len(rows) + 1, 2), pa.int32()),
            places,
            type=INDEX_SCHEMA.field("images").type,
        )
        table = pa.Table.from_arrays(
            [
                pa.array([f"s{i}" for i in rows.tolist()]),
                pa.array(["made"] * len(rows)),
                pa.array(texts, pa.large_string()),
                pa.array(rows // per_shard, pa.uint32()),
                lists,
            ],
            schema=INDEX_SCHEMA,
        )
        writer.add_table(table)
    index = writer.close()
    shards: list[fmt.ShardEntry] = []
    for number in range(-(-num_rows // per_shard)):
        size = per_shard * 2 * image_bytes
        os.close(os.open(folder / fmt.shard_name(number), os.O_CREAT | os.O_WRONLY))
        os.truncate(folder / fmt.shard_name(number), size)
        shards.append(
            fmt.ShardEntry(
                name=fmt.shard_name(number),
                num_bytes=size,
                sha256=hashlib.sha256(str(number).encode()).hexdigest(),
                num_samples=per_shard,
                num_images=2 * per_shard,
            )
        )
    template = open_shards(folder.parent / "ours").manifest
    manifest = template.model_copy(
        update={"num_samples": num_rows, "index": index, "shards": tuple(shards)}
    )
    (folder / fmt.MANIFEST).write_text(manifest.to_json())


def run_made(folder: Path, seed: int) -> dict[str, float]:
    """Open, and read one batch."""
    before = anonymous_mb()
    start = time.perf_counter()
    reader = open_shards(folder)
    opened = time.perf_counter()
    rng = random.Random(seed)
    num_bytes = sum(consume(reader[rng.randrange(len(reader))].images) for _ in range(BATCH))
    assert num_bytes == BATCH * 520_000
    return {
        "open_ms": (opened - start) * 1e3,
        "first_ms": (time.perf_counter() - start) * 1e3,
        "memory_mb": anonymous_mb() - before,
    }


def measure_made(num_rows: int, rounds: int, folder: Path) -> None:
    """Print opening and first batch at this many rows."""
    from phi3v_data.shard_writer import write_shards

    make_data(folder / "raw", 8)
    write_shards([folder / "raw" / "train.jsonl"], folder / "ours", num_workers=1)
    make_rows(num_rows, folder / "made")
    runs = [call_side("made", folder / "made", number, 0) for number in range(rounds)]
    size = (folder / "made" / "index.arrow").stat().st_size
    click.echo(
        f"{num_rows:,} rows, index of {size / 1e9:.2f} GB, medians of {rounds}: opening "
        f"{statistics.median(run['open_ms'] for run in runs):.0f} ms, first batch "
        f"{statistics.median(run['first_ms'] for run in runs):.0f} ms "
        f"(<= {MADE_FIRST_MS_TARGET}), memory "
        f"{max(run['memory_mb'] for run in runs):.0f} MiB (<= {MEMORY_MB_TARGET})"
    )


@click.command()
@click.option("--samples", default=2000, show_default=True, type=click.IntRange(BATCH))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--sides", default=",".join(SIDES), show_default=True, help="Beside ours.")
@click.option("--made_rows", type=click.IntRange(1), help="Measure a made index of so many rows.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result here.")
@click.option("--side", hidden=True)
@click.option("--write", hidden=True)
@click.option("--folder", hidden=True, type=click.Path(path_type=Path))
@click.option("--seed", hidden=True, default=0)
@click.option("--workers", hidden=True, default=0)
def main(
    samples: int,
    rounds: int,
    sides: str,
    made_rows: int | None,
    json_file: Path | None,
    side: str | None,
    write: str | None,
    folder: Path | None,
    seed: int,
    workers: int,
) -> None:
    """Measure and print."""
    if folder is not None:
        if write is not None:
            WRITERS[write](open_shards(folder.parent / "ours"), folder)
        elif side == "made":
            click.echo(json.dumps(run_made(folder, seed)))
        else:
            assert side is not None
            click.echo(json.dumps(run_side(side, folder, seed, workers)))
            sys.stdout.flush()
            os._exit(0)  # some peers leave threads that hold the process
        return
    chosen = ["ours", *(name for name in sides.split(",") if name != "ours")]
    unknown = [name for name in chosen if name not in SIDES]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r}; expected of {', '.join(SIDES)}")
    left_out = [name for name in chosen if name in PACKAGES and not has_package(PACKAGES[name])]
    with tempfile.TemporaryDirectory() as temporary:
        if made_rows is not None:
            measure_made(made_rows, rounds, Path(temporary))
            return
        present = [name for name in chosen if name not in left_out]
        result = measure(present, samples, rounds, Path(temporary))
    print_result(result, left_out)
    if json_file is not None:
        content = {**result, "left_out": left_out}
        json_file.write_text(json.dumps(content, indent=2, default=vars))


if __name__ == "__main__":
    main()
