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
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import xxhash

from phi3v_data.schema import Sample
from phi3v_data.shard_format import IndexEntry, ShardError

ROWS_PER_BATCH = 1024
BLOCK_BYTES = 256 * 1024
_MAGIC_BYTES = 8

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


class _Batch(NamedTuple):
    """Where the columns of a record batch start in the file, in items of their type.

    Numbers, not arrays: a reader of ten million rows keeps ten thousand of these.
    """

    sample_bounds: int  # int64, one more than rows
    sample_text: int  # bytes
    id_bounds: int  # int32, one more than rows
    id_text: int  # bytes
    shard: int  # uint32
    bounds: int  # int32: images of row r are bounds[r]:bounds[r + 1]
    offset: int  # uint64
    length: int  # uint64
    width: int  # uint32
    height: int  # uint32
    xxh3_64: int  # uint64


class IndexReader:
    """Rows of an index; a block is checked when first needed.

    Arrow tells where the columns of a batch lie; numbers are then read from the map. There is no
    lock: what two threads find out at the same time is the same.
    """

    def __init__(self, path: Path, entry: IndexEntry) -> None:
        self._path = path
        self._entry = entry
        self._rows_per_batch = entry.rows_per_batch
        self._batches: dict[int, _Batch] = {}
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.num_bytes:
                raise ShardError(
                    f"{path}: damaged: {size} bytes, the manifest says {entry.num_bytes}"
                )
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)
        self._base: int = pa.py_buffer(self._map).address
        whole = self._view[: size // 8 * 8]
        self._u64 = whole.cast("Q")
        self._u32 = whole.cast("I")
        self._is_checked = bytearray(len(entry.blocks))
        start = entry.batches[0][0] if entry.batches else size
        end = sum(entry.batches[-1]) if entry.batches else size
        self._check(0, start)
        self._check(end, size)

    def spans(self, row: int) -> tuple[int, list[tuple[int, int]]]:
        """The shard of a row, and (offset, length) in bytes of each of its images there."""
        # Unpacked and without calls: reading a row is to cost little beside hashing its images.
        per_batch = self._rows_per_batch
        batch = self._batches.get(row // per_batch) or self._load(row // per_batch)
        _, _, _, _, shard, bounds, offset, length, _, _, _ = batch
        row %= per_batch
        u32, u64 = self._u32, self._u64
        start, end = u32[bounds + row], u32[bounds + row + 1]
        if start == end:
            return u32[shard + row], []
        offsets = u64[offset + start : offset + end].tolist()
        lengths = u64[length + start : length + end].tolist()
        return u32[shard + row], list(zip(offsets, lengths, strict=True))

    def hashes(self, row: int) -> list[int]:
        """The xxh3-64 of each image of a row."""
        batch, k = self._locate(row)
        start, end = self._u32[batch.bounds + k], self._u32[batch.bounds + k + 1]
        if start == end:
            return []
        return self._u64[batch.xxh3_64 + start : batch.xxh3_64 + end].tolist()

    def sample_json(self, row: int) -> bytes:
        """The sample of a row as a line of JSONL."""
        batch, k = self._locate(row)
        at, text = batch.sample_bounds + k, batch.sample_text
        return bytes(self._view[text + self._u64[at] : text + self._u64[at + 1]])

    def id(self, row: int) -> str:
        """The id of a row."""
        batch, k = self._locate(row)
        at, text = batch.id_bounds + k, batch.id_text
        return str(self._view[text + self._u32[at] : text + self._u32[at + 1]], "utf-8")

    def shard(self, row: int) -> int:
        """The number of the shard that holds the images of a row."""
        batch, k = self._locate(row)
        return self._u32[batch.shard + k]

    def images(self, row: int) -> tuple[ImagePlace, ...]:
        """Where the images of a row are."""
        batch, k = self._locate(row)
        u64, u32 = self._u64, self._u32
        start, end = u32[batch.bounds + k], u32[batch.bounds + k + 1]
        if start == end:
            return ()
        columns = (
            u64[batch.offset + start : batch.offset + end],
            u64[batch.length + start : batch.length + end],
            u32[batch.width + start : batch.width + end],
            u32[batch.height + start : batch.height + end],
            u64[batch.xxh3_64 + start : batch.xxh3_64 + end],
        )
        return tuple(ImagePlace(*place) for place in zip(*columns, strict=True))

    def check_all(self) -> None:
        """Check every block.

        Raises:
            ShardError: at the first damaged one.
        """
        self._check(0, self._entry.num_bytes)

    def _locate(self, row: int) -> tuple[_Batch, int]:
        number, k = divmod(row, self._rows_per_batch)
        return self._batches.get(number) or self._load(number), k

    def _load(self, number: int) -> _Batch:
        start, length = self._entry.batches[number]
        self._check(start, start + length)
        if start == 0:  # the magic bytes and the schema come before the first batch
            start, length = _MAGIC_BYTES, length - _MAGIC_BYTES
        messages = pa.ipc.MessageReader.open_stream(
            pa.py_buffer(self._view[start : start + length])
        )
        message = messages.read_next_message()
        if message.type == "schema":
            message = messages.read_next_message()
        batch = pa.ipc.read_record_batch(message, INDEX_SCHEMA)
        images = batch.column("images")
        places = images.values
        sample, id_ = batch.column("sample").buffers(), batch.column("id").buffers()

        def begin(buffer: Any, item_bytes: int) -> int:
            if buffer is None or buffer.size == 0:  # no row of this batch has any
                return 0
            position = buffer.address - self._base
            assert position % item_bytes == 0, "Arrow aligns buffers to 8 bytes"
            return position // item_bytes

        found = _Batch(
            sample_bounds=begin(sample[1], 8),
            sample_text=begin(sample[2], 1),
            id_bounds=begin(id_[1], 4),
            id_text=begin(id_[2], 1),
            shard=begin(batch.column("shard").buffers()[1], 4),
            bounds=begin(images.buffers()[1], 4),
            offset=begin(places.field("offset").buffers()[1], 8),
            length=begin(places.field("length").buffers()[1], 8),
            width=begin(places.field("width").buffers()[1], 4),
            height=begin(places.field("height").buffers()[1], 4),
            xxh3_64=begin(places.field("xxh3_64").buffers()[1], 8),
        )
        self._batches[number] = found
        return found

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
