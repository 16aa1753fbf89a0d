# pyright: standard
# pyarrow ships no type stubs.
"""`index.arrow`: where every image is, memory-mapped, every byte checked before Arrow reads it.

    writer = IndexWriter(path)
    writer.add(sample, shard=0, images=[ImagePlace(offset=4, length=900, ...)])
    entry = writer.close()                  # goes into the manifest

    index = IndexReader(path, entry)
    index.sample_json(17), index.images(17)

The layout is in `phi3v_data.shard_format`.
"""

import hashlib
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from phi3v_data.schema import Sample
from phi3v_data.shard_format import IndexEntry, ShardError

ROWS_PER_BATCH = 1024
BLOCK_BYTES = 256 * 1024

_IMAGE_TYPE = pa.struct(
    [
        pa.field("offset", pa.uint64(), nullable=False),
        pa.field("length", pa.uint64(), nullable=False),
        pa.field("width", pa.uint32(), nullable=False),
        pa.field("height", pa.uint32(), nullable=False),
        pa.field("xxh3_64", pa.uint64(), nullable=False),
    ]
)

INDEX_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        # Large: 1,024 long documents may pass the 2 GiB that 32-bit offsets reach.
        pa.field("sample", pa.large_string(), nullable=False),
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("images", pa.list_(pa.field("item", _IMAGE_TYPE, nullable=False)), nullable=False),
    ]
)


class ImagePlace(NamedTuple):
    """Where an image's bytes are in its shard, and what they are."""

    offset: int
    length: int
    width: int
    """Pixels, upright."""
    height: int
    xxh3_64: int


class IndexWriter:
    """Writes rows in batches and notes where each batch landed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sink = pa.OSFile(os.fspath(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, INDEX_SCHEMA)
        self._batches: list[tuple[int, int]] = []
        self._rows: list[dict[str, Any]] = []
        self._table = INDEX_SCHEMA.empty_table()

    def add(self, sample: Sample, shard: int, images: list[ImagePlace]) -> None:
        """Append a sample."""
        self._rows.append(
            {
                "id": sample.id,
                "source": sample.source,
                "sample": sample.to_json(),
                "shard": shard,
                "images": [place._asdict() for place in images],
            }
        )
        if len(self._rows) == ROWS_PER_BATCH:
            self._flush()

    def add_table(self, rows: pa.Table) -> None:
        """Append the rows of a table of `INDEX_SCHEMA`."""
        assert not self._rows, "add and add_table are not for the same index"
        whole = pa.concat_tables([self._table, rows])
        end = whole.num_rows // ROWS_PER_BATCH * ROWS_PER_BATCH
        for start in range(0, end, ROWS_PER_BATCH):
            self._write(whole.slice(start, ROWS_PER_BATCH))
        self._table = whole.slice(end)

    def close(self) -> IndexEntry:
        """Finish the file and describe it."""
        self._flush()
        self._writer.close()
        self._sink.close()
        sha256 = hashlib.sha256()
        blocks: list[str] = []
        num_bytes = 0
        with open(self._path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                sha256.update(block)
                blocks.append(xxhash.xxh3_64_hexdigest(block))
                num_bytes += len(block)
        return IndexEntry(
            name=self._path.name,
            num_bytes=num_bytes,
            sha256=sha256.hexdigest(),
            rows_per_batch=ROWS_PER_BATCH,
            batches=tuple(self._batches),
            block_bytes=BLOCK_BYTES,
            blocks=tuple(blocks),
        )

    def abort(self) -> None:
        """Close the file as it is."""
        self._sink.close()

    def _flush(self) -> None:
        if self._rows:
            self._write(pa.Table.from_pylist(self._rows, schema=INDEX_SCHEMA))
            self._rows = []
        elif self._table.num_rows:
            self._write(self._table)
            self._table = INDEX_SCHEMA.empty_table()

    def _write(self, rows: pa.Table) -> None:
        (batch,) = rows.combine_chunks().to_batches()
        start = self._sink.tell()
        self._writer.write_batch(batch)
        self._batches.append((start, self._sink.tell() - start))


@dataclass(frozen=True, slots=True)
class _Batch:
    """Columns of a record batch as numpy views of the map."""

    samples: Any  # pa.LargeStringArray
    ids: Any  # pa.StringArray
    shards: np.ndarray  # (rows,) uint32
    bounds: np.ndarray  # (rows + 1,) int32: images of row r are bounds[r]:bounds[r + 1]
    places: tuple[np.ndarray, ...]  # offset, length, width, height, xxh3_64: each (images,)


class IndexReader:
    """Rows of an index; a block is checked when first needed."""

    def __init__(self, path: Path, entry: IndexEntry) -> None:
        self._path = path
        self._entry = entry
        self._lock = threading.Lock()
        self._batches: dict[int, _Batch] = {}
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.num_bytes:
                raise ShardError(
                    f"{path}: damaged: {size} bytes, the manifest says {entry.num_bytes}"
                )
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)
        self._is_checked = bytearray(len(entry.blocks))
        start = entry.batches[0][0] if entry.batches else size
        end = sum(entry.batches[-1]) if entry.batches else size
        self._check(0, start)
        self._check(end, size)
        self._reader = pa.ipc.open_file(pa.py_buffer(self._map))

    def sample_json(self, row: int) -> bytes:
        """The sample of a row as a line of JSONL."""
        batch, k = self._locate(row)
        return bytes(batch.samples[k].as_buffer())

    def id(self, row: int) -> str:
        """The id of a row."""
        batch, k = self._locate(row)
        return batch.ids[k].as_py()

    def shard(self, row: int) -> int:
        """The number of the shard that holds the images of a row."""
        batch, k = self._locate(row)
        return int(batch.shards[k])

    def images(self, row: int) -> tuple[ImagePlace, ...]:
        """Where the images of a row are."""
        batch, k = self._locate(row)
        start, end = int(batch.bounds[k]), int(batch.bounds[k + 1])
        columns = [column[start:end].tolist() for column in batch.places]
        return tuple(ImagePlace(*place) for place in zip(*columns, strict=True))

    def check_all(self) -> None:
        """Check every block.

        Raises:
            ShardError: at the first damaged one.
        """
        self._check(0, self._entry.num_bytes)

    def _locate(self, row: int) -> tuple[_Batch, int]:
        number, k = divmod(row, self._entry.rows_per_batch)
        batch = self._batches.get(number)
        if batch is None:
            with self._lock:
                batch = self._batches.get(number) or self._load(number)
                self._batches[number] = batch
        return batch, k

    def _load(self, number: int) -> _Batch:
        start, length = self._entry.batches[number]
        self._check(start, start + length)
        batch = self._reader.get_batch(number)
        images = batch.column("images")
        places = images.values
        return _Batch(
            samples=batch.column("sample"),
            ids=batch.column("id"),
            shards=batch.column("shard").to_numpy(),
            bounds=images.offsets.to_numpy(),
            places=tuple(
                places.field(name).to_numpy()
                for name in ("offset", "length", "width", "height", "xxh3_64")
            ),
        )

    def _check(self, start: int, end: int) -> None:
        size = self._entry.block_bytes
        for number in range(start // size, -(-end // size)):
            if not self._is_checked[number]:
                block = self._view[number * size : (number + 1) * size]
                if xxhash.xxh3_64_hexdigest(block) != self._entry.blocks[number]:
                    raise ShardError(
                        f"{self._path}: damaged between bytes {number * size} and "
                        f"{number * size + len(block)}"
                    )
                self._is_checked[number] = 1


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise ShardError(f"{path}: missing, but the manifest names it") from None
