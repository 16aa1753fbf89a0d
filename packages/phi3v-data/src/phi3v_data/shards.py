# pyright: standard
# pyarrow ships no type stubs; it enters by shard_index.
"""Shards: a validated data set as Parquet files that are read like a memory map.

    shards = open_shards("shards/train")
    len(shards)                     # 300
    record = shards[17]
    record.sample.conversations     # the Sample
    record.images                   # its images, encoded, as memoryviews of the file: no copy
    shards.image_sizes_wh(17)       # ((320, 240), ...), from the index: no image is touched

What is on disk: `phi3v_data.shard_format`. Written by `shard_writer`, checked by `shard_verify`.
"""

import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import xxhash
from pydantic import ValidationError

from phi3v_data.schema import Sample
from phi3v_data.shard_format import FileEntry, Manifest, ShardError, read_manifest
from phi3v_data.shard_index import IndexReader

__all__ = ["Record", "ShardError", "ShardReader", "open_shards"]


@dataclass(frozen=True, slots=True)
class Record:
    """A sample with its images."""

    sample: Sample
    images: tuple[memoryview, ...]
    """Encoded bytes of the images of all turns, in reading order: views of the mapped file."""


class ShardReader:
    """A sequence of `Record`s. Open it with `open_shards`.

    Safe to use from many threads; pickles as its path, so that handing it to a worker is cheap.
    The bytes of an image are compared with their hash when first read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(os.path.abspath(path))
        self.manifest: Manifest = read_manifest(self._path)
        self._index = IndexReader(self._path / self.manifest.index.name, self.manifest.index)
        self._lock = threading.Lock()
        self._maps: dict[int, memoryview] = {}
        self._is_verified = bytearray(self.manifest.num_samples)

    @property
    def path(self) -> Path:
        """The directory."""
        return self._path

    @property
    def fingerprint(self) -> str:
        """Names the data: equal for equal samples and images, wherever the directory is."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __repr__(self) -> str:
        return f"ShardReader({os.fspath(self._path)!r}, {len(self)} samples)"

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _reopen, (self._path, self.fingerprint)

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> list[Record]: ...
    def __getitem__(self, i: int | slice) -> Record | list[Record]:
        if isinstance(i, slice):
            return [self._record(row) for row in range(*i.indices(len(self)))]
        return self._record(self._row(i))

    def __iter__(self) -> Iterator[Record]:
        return (self._record(row) for row in range(len(self)))

    def sample(self, i: int) -> Sample:
        """The sample alone, from the index: no image is touched.

        Raises:
            IndexError: there is no sample `i`.
            ShardError: the index is damaged.
        """
        row = self._row(i)
        try:
            return Sample.from_json(self._index.sample_json(row))
        except ValidationError as error:
            raise ShardError(
                f"{self._path}: row {row}: its text is not a sample: {error.errors()[0]['msg']}"
            ) from None

    def image_sizes_wh(self, i: int) -> tuple[tuple[int, int], ...]:
        """(width, height) in pixels of each image, upright, from the index."""
        places = self._index.images(self._row(i))
        return tuple((place.width, place.height) for place in places)

    def image_bytes(self, i: int) -> int:
        """Encoded size of all images of a sample, from the index."""
        return sum(place.length for place in self._index.images(self._row(i)))

    def shard_name(self, i: int) -> str:
        """The file that holds the images of a sample."""
        return self.manifest.shards[self._index.shard(self._row(i))].name

    def _row(self, i: int) -> int:
        row = i + len(self) if i < 0 else i
        if not 0 <= row < len(self):
            raise IndexError(f"sample {i}: {self._path} holds {len(self)}")
        return row

    def _record(self, row: int) -> Record:
        sample = self.sample(row)
        places = self._index.images(row)
        if not places:
            return Record(sample, ())
        number = self._index.shard(row)
        content = self._map(number)
        images = tuple(content[place.offset : place.offset + place.length] for place in places)
        if not self._is_verified[row]:
            for k, (image, place) in enumerate(zip(images, places, strict=True)):
                if xxhash.xxh3_64_intdigest(image) != place.xxh3_64:
                    raise ShardError(
                        f"{self._path / self.manifest.shards[number].name}: row {row}, sample "
                        f"{sample.id!r}, image {k + 1} ({sample.images[k]}): its bytes are damaged"
                    )
            self._is_verified[row] = 1
        return Record(sample, images)

    def _map(self, number: int) -> memoryview:
        content = self._maps.get(number)
        if content is None:
            with self._lock:
                content = self._maps.get(number)
                if content is None:
                    content = self._maps[number] = self._open_map(number)
        return content

    def _open_map(self, number: int) -> memoryview:
        entry = self.manifest.shards[number]
        path = self._path / entry.name
        problem = _size_problem(path, entry)
        if problem:
            raise ShardError(f"{path}: {problem}")
        with open(path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def open_shards(path: str | os.PathLike[str]) -> ShardReader:
    """Open a directory written by `write_shards`.

    Raises:
        ShardError: it is not one, is incomplete, of another format version, or damaged.
    """
    return ShardReader(path)


def _reopen(path: Path, fingerprint: str) -> ShardReader:
    reader = ShardReader(path)
    if reader.fingerprint != fingerprint:
        raise ShardError(f"{path}: was replaced by other data after it was opened")
    return reader


def _size_problem(path: Path, entry: FileEntry) -> str:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != entry.num_bytes:
        return f"damaged: {size} bytes, the manifest says {entry.num_bytes}"
    return ""
