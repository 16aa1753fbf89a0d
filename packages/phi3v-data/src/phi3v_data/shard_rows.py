# pyright: standard
# pyarrow ships no type stubs.
"""Samples and their images as the columns of a shard.

    rows = Rows()
    rows.add(line, sample, [Image("/data/images/a.jpg", "a.jpg", size=900, xxh3_64=...)])
    table, places = rows.read()      # reads the images, straight into the column

`SHARD_SCHEMA` and `PARQUET_OPTIONS` are what `phi3v_data.shard_format` describes.
"""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from phi3v_data.image_header import read_header
from phi3v_data.images import ImageError, probe_image
from phi3v_data.schema import Sample
from phi3v_data.shard_format import IMAGE_LEAF

_STRINGS = pa.list_(pa.string())
_TURN = pa.struct(
    [
        pa.field("images", _STRINGS),
        pa.field("user", pa.string()),
        pa.field("assistant", pa.string()),
        pa.field("answers", _STRINGS),
    ]
)
_IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])

SHARD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("conversations", pa.list_(_TURN)),
        pa.field("images", pa.list_(_IMAGE)),
        pa.field("widths", pa.list_(pa.int32())),
        pa.field("heights", pa.list_(pa.int32())),
        pa.field("metadata", pa.string()),
    ]
)

_TEXT_LEAVES = [
    "id",
    "source",
    "conversations.list.element.images.list.element",
    "conversations.list.element.user",
    "conversations.list.element.assistant",
    "conversations.list.element.answers.list.element",
    "images.list.element.path",
    "widths.list.element",
    "heights.list.element",
    "metadata",
]

PARQUET_OPTIONS: dict[str, Any] = {
    "compression": dict.fromkeys(_TEXT_LEAVES, "ZSTD") | {IMAGE_LEAF: "NONE"},
    "use_dictionary": _TEXT_LEAVES,
    "write_statistics": _TEXT_LEAVES,
    "write_page_index": True,
    "write_page_checksum": True,
    "data_page_version": "1.0",
    "store_schema": False,
    # A page ends only between write batches: with the default, 1,024 images are one page.
    "write_batch_size": 16,
}


class Image(NamedTuple):
    """An image to be read."""

    file: str
    """Where it is, its links resolved."""

    path: str
    """As the sample names it."""

    size: int
    """Bytes that the file must have."""

    xxh3_64: int
    """Hash that its content must have."""


class ImageSize(NamedTuple):
    """What the header says: pixels, upright."""

    width: int
    height: int


class ChangedImage(ValueError):
    """An image is not what it was when it was validated. The message says which and how."""


class Rows:
    """The samples of one row group."""

    def __init__(self) -> None:
        self.num_bytes = 0
        """Of lines and images."""

        self._samples: list[Sample] = []
        self._images: list[Image] = []
        self._bounds = [0]

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, line: bytes, sample: Sample, images: Sequence[Image]) -> None:
        """Append a sample; its images are read later."""
        self._samples.append(sample)
        self._images.extend(images)
        self._bounds.append(len(self._images))
        self.num_bytes += len(line) + sum(image.size for image in images)

    def read(self) -> tuple[pa.Table, list[ImageSize]]:
        """Read the images; the rows, and the size of every image in order.

        Raises:
            ChangedImage: an image is not what it should be.
        """
        data, offsets, sizes = _read_images(self._images)
        content = pa.Array.from_buffers(
            pa.binary(), len(self._images), [None, pa.py_buffer(offsets), data]
        )
        paths = pa.array([image.path for image in self._images], pa.string())
        images = pa.StructArray.from_arrays([content, paths], fields=list(_IMAGE))
        samples = self._samples
        columns = [
            pa.array([sample.id for sample in samples], pa.string()),
            pa.array([sample.source for sample in samples], pa.string()),
            _conversations(samples),
            self._lists(images),
            self._lists(pa.array([size.width for size in sizes], pa.int32())),
            self._lists(pa.array([size.height for size in sizes], pa.int32())),
            pa.array([_metadata(sample) for sample in samples], pa.string()),
        ]
        return pa.Table.from_arrays(columns, schema=SHARD_SCHEMA), sizes

    def _lists(self, values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(self._bounds, pa.int32()), values)


def _conversations(samples: Sequence[Sample]) -> pa.Array:
    turns = [turn for sample in samples for turn in sample.conversations]
    bounds = np.cumsum([0, *(len(sample.conversations) for sample in samples)])
    columns = [
        pa.array([turn.images for turn in turns], _STRINGS),
        pa.array([turn.user for turn in turns], pa.string()),
        pa.array([turn.assistant for turn in turns], pa.string()),
        pa.array([turn.answers for turn in turns], _STRINGS),
    ]
    values = pa.StructArray.from_arrays(columns, fields=list(_TURN))
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), values)


def _metadata(sample: Sample) -> str | None:
    return None if sample.metadata is None else json.dumps(sample.metadata, ensure_ascii=False)


def _read_images(images: Sequence[Image]) -> tuple[pa.Buffer, np.ndarray, list[ImageSize]]:
    """Content one after the other, where each begins and the last ends, and their sizes."""
    offsets = np.zeros(len(images) + 1, dtype=np.int32)
    np.cumsum([image.size for image in images], out=offsets[1:])
    buffer = pa.allocate_buffer(int(offsets[-1]))
    whole = memoryview(buffer).cast("B")
    sizes: list[ImageSize] = []
    for image, start in zip(images, offsets.tolist(), strict=False):
        content = whole[start : start + image.size]
        _read_image(image, content)
        sizes.append(_size(image, content))
    return buffer, offsets, sizes


def _read_image(image: Image, content: memoryview) -> None:
    try:
        descriptor = os.open(image.file, os.O_RDONLY)
        try:
            num_read = 0
            while num_read < len(content):
                count = os.readv(descriptor, [content[num_read:]])
                if not count:
                    break
                num_read += count
            is_whole = num_read == len(content) and not os.read(descriptor, 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _changed(image, f"cannot be read any more: {error.strerror or error}") from None
    if not is_whole or xxhash.xxh3_64_intdigest(content) != image.xxh3_64:
        raise _changed(image, "changed while shards were written from it")


def _size(image: Image, content: memoryview) -> ImageSize:
    info = read_header(lambda start, count: bytes(content[start : start + count]), len(content))
    if info is None:
        try:
            info = probe_image(content)
        except ImageError as error:
            raise ValueError(
                f"{image.file}: no rule that ran found an error, but it cannot be stored: "
                f"{error}; let the rules I run"
            ) from None
    return ImageSize(info.width, info.height)


def _changed(image: Image, what: str) -> ChangedImage:
    return ChangedImage(f"{image.file}: {what}; run again")
