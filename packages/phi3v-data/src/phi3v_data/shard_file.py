# pyright: standard
# pyarrow ships no type stubs.
"""One shard, from its plan to its files: in any process, whole or not at all.

written = write_shard(ShardTask(planned, "shards/.train.tmp-shards"))
written.entry.sha256           # of whole/shard-00000.parquet in there

work/whole/shard-00000.parquet     the shard
work/done/shard-00000.index        its rows of the index, an Arrow IPC file
work/done/shard-00000.json         the journal: input and hashes; written last, so that a run
                                   that goes on knows what it can keep (`kept_shard`)
"""

import hashlib
import mmap
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from phi3v_data.atomic import TEMPORARY_MARK, sync, write_atomic
from phi3v_data.image_place import ImagePlaces, MisplacedImage
from phi3v_data.jsonl import explain
from phi3v_data.schema import Sample
from phi3v_data.shard_format import IMAGE_LEAF, FileEntry, ShardEntry, shard_name
from phi3v_data.shard_index import INDEX_SCHEMA
from phi3v_data.shard_plan import LineDigest, PlannedShard, Segment
from phi3v_data.shard_rows import PARQUET_OPTIONS, SHARD_SCHEMA, Image, ImageSize, Rows

ROW_GROUP_BYTES = 32 * 1024 * 1024
ROW_GROUP_ROWS = 8192

WRITE_BYTES = 8 * 1024 * 1024
"""Written at once: the page cache then holds a shard in larger pieces, and mapping it takes a third
of the page faults (246 → 72 on one of 63 MB)."""

WHOLE = "whole"
"""The folder of what will be published."""

DONE = "done"
"""The folder of what is needed to go on."""


class WrittenShard(BaseModel):
    """The journal of a finished shard."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    input: str
    """`PlannedShard.digest`, and the versions of what writes."""

    entry: ShardEntry
    image_bytes: int
    index: FileEntry
    """Its rows of the index."""


@dataclass(frozen=True, slots=True)
class ShardTask:
    """What a worker is told."""

    planned: PlannedShard
    directory: str
    versions: str
    """Of what decides the bytes, beside the input."""

    row_group_bytes: int
    """A row group ends with the sample that reaches this."""


def kept_shard(task: ShardTask) -> WrittenShard | None:
    """What an earlier run finished of the same input, if every byte of it is still there."""
    work, name = Path(task.directory), shard_name(task.planned.number)
    try:
        raw = (work / DONE / f"{name}.json").read_bytes()
        written = WrittenShard.model_validate_json(raw)
    except (FileNotFoundError, ValidationError):
        return None
    files = ((work / WHOLE / name, written.entry), (work / DONE / f"{name}.index", written.index))
    is_kept = written.input == _input(task) and all(
        path.is_file() and path.stat().st_size == entry.num_bytes and _sha256(path) == entry.sha256
        for path, entry in files
    )
    return written if is_kept else None


def write_shard(task: ShardTask) -> WrittenShard:
    """Write a shard and its journal.

    Raises:
        ValueError: a line or an image is not what it was when it was planned.
        OSError: the disk refuses.
    """
    work, name = Path(task.directory), shard_name(task.planned.number)
    # Under a name of its own: a worker that outlives a killed run may still be at the same shard.
    mark = f"{TEMPORARY_MARK}{os.getpid()}"
    path, index = work / WHOLE / f"{name}{mark}", work / DONE / f"{name}.index{mark}"
    try:
        rows = _write_parquet(task, path)
        places = list(_locate(path, rows))
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with pa.OSFile(os.fspath(index), "wb") as sink, pa.ipc.new_file(sink, INDEX_SCHEMA) as out:
            out.write_table(_index_rows(task.planned.number, rows, places))
        sync(path)
        sync(index)
        written = WrittenShard(
            input=_input(task),
            entry=ShardEntry(
                name=name,
                num_bytes=path.stat().st_size,
                sha256=sha256,
                num_samples=len(rows.samples),
                num_images=len(places),
            ),
            image_bytes=sum(task.planned.sizes),
            index=FileEntry(
                name=f"{name}.index", num_bytes=index.stat().st_size, sha256=_sha256(index)
            ),
        )
        os.replace(path, work / WHOLE / name)
        os.replace(index, work / DONE / f"{name}.index")
    finally:
        path.unlink(missing_ok=True)
        index.unlink(missing_ok=True)
    write_atomic(work / DONE / f"{name}.json", written.model_dump_json())
    return written


@dataclass(slots=True)
class _WrittenRows:
    """What the index needs to know of a shard's rows."""

    samples: list[Sample]
    num_images: list[int]
    """Of each sample."""

    sizes: list[ImageSize]
    """Of each image."""

    images_of_group: list[int]
    lengths: Sequence[int]
    """Of each image, in bytes."""

    hashes: Sequence[int]


def _write_parquet(task: ShardTask, path: Path) -> _WrittenRows:
    planned = task.planned
    written = _WrittenRows([], [], [], [], planned.sizes, planned.hashes)
    digest = LineDigest()
    rows = Rows()
    start = 0
    with (
        open(path, "wb", buffering=WRITE_BYTES) as file,
        pq.ParquetWriter(file, SHARD_SCHEMA, **PARQUET_OPTIONS) as writer,
    ):
        for segment in planned.segments:
            places = ImagePlaces(segment.root)
            for number, line in _lines(segment):
                sample = _sample(segment, number, line)
                end = start + len(sample.images)
                sizes, hashes = planned.sizes[start:end], planned.hashes[start:end]
                start = end
                digest.add(line, sizes, hashes)
                images = _images(segment, number, places, sample, sizes, hashes)
                rows.add(line, sample, images)
                written.samples.append(sample)
                written.num_images.append(len(images))
                if rows.num_bytes >= task.row_group_bytes or len(rows) >= ROW_GROUP_ROWS:
                    _flush(writer, rows, written)
                    rows = Rows()
        if len(rows):
            _flush(writer, rows, written)
    if digest.hexdigest() != planned.digest:
        raise _changed(", ".join(dict.fromkeys(segment.file for segment in planned.segments)))
    return written


def _flush(writer: pq.ParquetWriter, rows: Rows, written: _WrittenRows) -> None:
    table, sizes = rows.read()
    writer.write_table(table, row_group_size=len(rows))
    written.sizes.extend(sizes)
    written.images_of_group.append(len(sizes))


def _lines(segment: Segment) -> Iterator[tuple[int, bytes]]:
    """Number and content of the lines that are stored."""
    skipped = frozenset(segment.skipped)
    with open(segment.file, "rb") as file:
        file.seek(segment.start)
        number, position = segment.first_line, segment.start
        while position < segment.end and (raw := file.readline()):
            line = raw.rstrip(b"\r\n")
            if line.strip() and number not in skipped:
                yield number, line
            number, position = number + 1, position + len(raw)


def _sample(segment: Segment, number: int, line: bytes) -> Sample:
    try:
        return Sample.from_json(line)
    except ValidationError as error:
        raise ValueError(
            f"{segment.file}:{number}: no rule that ran found an error, but it cannot be stored: "
            f"{explain(error)}; let the rules P and S run, or run again if it changed meanwhile"
        ) from None


def _images(
    segment: Segment,
    number: int,
    places: ImagePlaces,
    sample: Sample,
    sizes: "array[int]",
    hashes: "array[int]",
) -> list[Image]:
    if len(sizes) != len(sample.images):
        raise _changed(segment.file)
    try:
        return [
            Image(places.find(path), path, size, xxh3_64)
            for path, size, xxh3_64 in zip(sample.images, sizes, hashes, strict=True)
        ]
    except MisplacedImage as error:
        raise ValueError(
            f"{segment.file}:{number}: an image of sample {sample.id!r} {error}; it changed while "
            "shards were written from it; run again"
        ) from None


def _changed(file: str) -> ValueError:
    return ValueError(f"{file}: changed while shards were written from it; run again")


# --- where the images are -------------------------------------------------------------------------


def _locate(path: Path, rows: _WrittenRows) -> Iterator[int]:
    """Find each image, in order, in the pages of its row group, comparing its hash.

    Images of a page follow one another; between pages there is a header. So the next image is
    nearly always right here, and else a short search for its length away.

    Yields:
        Positions of the first bytes of images.
    """
    metadata = pq.read_metadata(path)
    images = iter(zip(rows.lengths, rows.hashes, strict=True))
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
    ):
        for group, num_images in enumerate(rows.images_of_group):
            row_group = metadata.row_group(group)
            columns = [row_group.column(c) for c in range(row_group.num_columns)]
            (leaf,) = (column for column in columns if column.path_in_schema == IMAGE_LEAF)
            assert leaf.compression == "UNCOMPRESSED"
            position = leaf.data_page_offset
            end = position + leaf.total_compressed_size
            for _ in range(num_images):
                length, xxh3_64 = next(images)
                prefix = struct.pack("<I", length)
                while True:
                    position = content.find(prefix, position, end)
                    assert position >= 0, f"{path}: an image is not where it was written"
                    start = position + len(prefix)
                    with view[start : start + length] as image:
                        if xxhash.xxh3_64_intdigest(image) == xxh3_64:
                            break
                    position += 1
                yield start
                position = start + length


def _index_rows(number: int, rows: _WrittenRows, places: list[int]) -> pa.Table:
    images = INDEX_SCHEMA.field("images").type
    values = pa.StructArray.from_arrays(
        [
            pa.array(places, pa.uint64()),
            pa.array(np.asarray(rows.lengths, dtype=np.uint64)),
            pa.array([size.width for size in rows.sizes], pa.uint32()),
            pa.array([size.height for size in rows.sizes], pa.uint32()),
            pa.array(np.asarray(rows.hashes, dtype=np.uint64)),
        ],
        fields=list(images.value_type),
    )
    bounds = pa.array(np.cumsum([0, *rows.num_images]), pa.int32())
    samples = rows.samples
    columns = {
        "id": pa.array([sample.id for sample in samples], pa.string()),
        "source": pa.array([sample.source for sample in samples], pa.string()),
        "sample": pa.array([sample.to_json() for sample in samples], pa.large_string()),
        "shard": pa.array([number] * len(samples), pa.uint32()),
        "images": pa.ListArray.from_arrays(bounds, values, type=images),
    }
    return pa.Table.from_arrays(list(columns.values()), schema=INDEX_SCHEMA)


def _input(task: ShardTask) -> str:
    return f"{task.planned.digest} {task.versions} {task.row_group_bytes}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
