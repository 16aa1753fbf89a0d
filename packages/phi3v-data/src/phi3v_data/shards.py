# pyright: standard
# pyarrow ships no type stubs; it enters by shard_index.
"""Shards: a validated data set as Parquet files that are read like a memory map.

    shards = open_shards("shards/train")    # or an address, or any Parquet of this schema
    len(shards)                     # 300
    record = shards[17]
    record.sample.conversations     # the Sample
    record.images                   # its images, encoded, as memoryviews of the file: no copy
    shards.image_sizes_wh(17)       # ((320, 240), ...), from the index: no image is touched
    shards.try_get(18)              # None where the row is damaged, which is counted:
    shards.damaged                  # {18: "shards/train/shard-00000.parquet: row 18, sample ..."}

What is on disk: `phi3v_data.shard_format`. Written by `shard_writer`, checked by `shard_verify`;
where the bytes come from is a `shard_store`, and Parquet that others wrote is a `parquet_index`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Literal, overload

import numpy as np
from pydantic import ValidationError
from xxhash import xxh3_64_intdigest

from phi3v_data.schema import Sample
from phi3v_data.shard_format import (
    MANIFEST,
    Manifest,
    ShardEntry,
    ShardError,
    parse_manifest,
    read_manifest,
)
from phi3v_data.shard_index import IndexReader
from phi3v_data.shard_store import LocalStore, ShardStore, open_store

__all__ = ["Record", "ShardError", "ShardReader", "Verify", "open_shards"]

Verify = Literal["full", "sampled", "off"]
"""Which images are compared with their hash when first read: all, those of one row in 16, none."""

_SAMPLED_ROWS = 16


class Record:
    """A sample with its images."""

    __slots__ = ("_reader", "_row", "_sample", "images")

    def __init__(self, reader: "ShardReader", row: int, images: tuple[memoryview, ...]) -> None:
        self.images = images
        """Encoded bytes of the images of all turns, in reading order: views of the mapped file, or
        of what was fetched."""
        self._reader = reader
        self._row = row
        self._sample: Sample | None = None

    @property
    def sample(self) -> Sample:
        """The sample; its text is read when first asked for.

        Raises:
            ShardError: the index is damaged.
        """
        if self._sample is None:
            self._sample = self._reader.sample(self._row)
        return self._sample

    def __repr__(self) -> str:
        return f"Record({self.sample.id!r}, {len(self.images)} images)"


class ShardReader:
    """A sequence of `Record`s. Open it with `open_shards`.

    Safe to use from many threads; pickles as its path, so that handing it to a worker is cheap, and
    may be used in a forked process. The bytes of an image are compared with their hash when first
    read. A file that another program shortens while it is open ends the process (SIGBUS), as with
    every mapped file; shards that are replaced under their name are safe.
    """

    def __init__(
        self, source: str | os.PathLike[str] | ShardStore, *, verify: Verify = "full"
    ) -> None:
        if verify not in ("full", "sampled", "off"):
            raise ValueError(f"verify: expected 'full', 'sampled' or 'off', got {verify!r}")
        self.store: ShardStore = (
            open_store(source) if isinstance(source, str | os.PathLike) else source
        )
        """Where the bytes come from."""
        self.manifest: Manifest = (
            read_manifest(self.store.name)
            if isinstance(self.store, LocalStore)
            else parse_manifest(self.store.read(MANIFEST), self.store.name)
        )
        self._index = IndexReader(self.store.local_path(self.manifest.index), self.manifest.index)
        self._verify: Verify = verify
        self._shards = self.manifest.shards
        self._count = self.manifest.num_samples
        # One byte a row, which takes no memory until it is written.
        self._is_verified = np.zeros(self._count, np.uint8).data
        self._damaged: dict[int, str] = {}

    @property
    def path(self) -> Path:
        """The directory.

        Raises:
            ValueError: it is not on this machine.
        """
        if "://" in self.store.name:
            raise ValueError(f"{self.store.name}: is not on this machine; see `store.name`")
        return Path(self.store.name)

    @property
    def fingerprint(self) -> str:
        """Names the data: equal for equal samples and images, wherever the directory is."""
        return self.manifest.fingerprint

    @property
    def damaged(self) -> MappingProxyType[int, str]:
        """The rows that `try_get` found damaged, with what is wrong."""
        return MappingProxyType(self._damaged)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"ShardReader({self.store.name!r}, {len(self)} samples)"

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _reopen, (self.store, self.fingerprint, self._verify)

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> list[Record]: ...
    def __getitem__(self, i: int | slice) -> Record | list[Record]:
        if isinstance(i, slice):
            return [self._record(row) for row in range(*i.indices(self._count))]
        return self._record(self._row(i))

    def __iter__(self) -> Iterator[Record]:
        return (self._record(row) for row in range(self._count))

    def try_get(self, i: int) -> Record | None:
        """The record, or None where it is damaged: then the row is in `damaged`.

        Raises:
            IndexError: there is no sample `i`.
        """
        row = self._row(i)
        try:
            return self._record(row)
        except ShardError as error:
            self._damaged[row] = str(error)
            return None

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
                f"{self.store.name}: row {row}: its text is not a sample: "
                f"{error.errors()[0]['msg']}"
            ) from None

    def id(self, i: int) -> str:
        """The id alone, from the index: no text is parsed."""
        return self._index.id(self._row(i))

    def image_sizes_wh(self, i: int) -> tuple[tuple[int, int], ...]:
        """(width, height) in pixels of each image, upright, from the index."""
        places = self._index.images(self._row(i))
        return tuple((place.width, place.height) for place in places)

    def image_bytes(self, i: int) -> int:
        """Encoded size of all images of a sample, from the index."""
        return sum(length for _, length in self._index.spans(self._row(i))[1])

    def image_spans(self, i: int) -> tuple[ShardEntry, list[tuple[int, int]]]:
        """The shard of a sample, and (offset, length) of each image there: for a store's plan."""
        shard, spans = self._index.spans(self._row(i))
        return self._shards[shard], spans

    def shard_name(self, i: int) -> str:
        """The file that holds the images of a sample."""
        return self._shards[self._index.shard(self._row(i))].name

    def close(self) -> None:
        """Let go of files and connections; records that were handed out stay valid."""
        self.store.close()

    def _row(self, i: int) -> int:
        row = i + self._count if i < 0 else i
        if not 0 <= row < self._count:
            raise IndexError(f"sample {i}: {self.store.name} holds {self._count}")
        return row

    def _record(self, row: int) -> Record:
        shard, spans = self._index.spans(row)
        if not spans:
            return Record(self, row, ())
        images = self.store.ranges(self._shards[shard], spans)
        if not self._is_verified[row]:
            if self._verify == "full" or (self._verify == "sampled" and row % _SAMPLED_ROWS == 0):
                images = self._checked(row, images, self._shards[shard], spans)
            self._is_verified[row] = 1
        return Record(self, row, tuple(images))

    def _checked(
        self, row: int, images: list[memoryview], entry: ShardEntry, spans: list[tuple[int, int]]
    ) -> list[memoryview]:
        """The images, with the hashes they should have."""
        try:
            self._check(row, images)
        except ShardError:
            # What was kept of it may be to blame: once more from where it came.
            if not self.store.forget(entry, spans):
                raise
            images = self.store.ranges(entry, spans)
            self._check(row, images)
        return images

    def _check(self, row: int, images: list[memoryview]) -> None:
        for image, xxh3_64 in zip(images, self._index.hashes(row), strict=True):
            if xxh3_64_intdigest(image) != xxh3_64:
                k = next(k for k, other in enumerate(images) if other is image)
                sample = self.sample(row)
                raise ShardError(
                    f"{self.store.name}/{self.shard_name(row)}: row {row}, sample "
                    f"{sample.id!r}, image {k + 1} ({sample.images[k]}): its bytes are damaged"
                )


def open_shards(
    source: str | os.PathLike[str] | ShardStore, *, verify: Verify = "full"
) -> ShardReader:
    """Open a directory written by `write_shards`, or Parquet of the same schema.

    Args:
        source: a shard directory: its path, its address on an object store, or a store opened with
            settings of its own. Or a Parquet file, or a folder of them, that others wrote: it is
            indexed on first use (`phi3v_data.parquet_index`).
        verify: which images are compared with their hash when first read: `full`, all of them;
            `sampled`, those of one row in 16; `off`, none. Texts and the index always are.

    Raises:
        ShardError: it is not one, is incomplete, of another format version, or damaged.
    """
    return ShardReader(source, verify=verify)


def _reopen(store: ShardStore, fingerprint: str, verify: Verify) -> ShardReader:
    reader = ShardReader(store, verify=verify)
    if reader.fingerprint != fingerprint:
        raise ShardError(f"{store.name}: was replaced by other data after it was opened")
    return reader
