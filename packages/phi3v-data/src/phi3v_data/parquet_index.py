# pyright: standard
# pyarrow ships no type stubs.
"""Parquet that others wrote, read like shards: a file, or a folder of files, without a manifest.

    import pandas
    table = pandas.DataFrame({
        "id": ["a"], "source": ["mine"],
        "conversations": [[{"images": ["cat.jpg"], "user": "What is it?", "assistant": "A cat."}]],
        "images": [[{"bytes": open("cat.jpg", "rb").read(), "path": "cat.jpg"}]],
    })
    table.to_parquet("mine.parquet")

    open_shards("mine.parquet")[0].sample       # indexed on first use, then from the cache

Indexing reads everything once: every sample is checked against the schema, every image's header
is read and its hash noted. The index is kept in `$XDG_CACHE_HOME/phi3v-data/parquet` or
`~/.cache/phi3v-data/parquet` (`$PHI3V_CACHE/parquet`), under a name made of the files' paths,
sizes, times of change and the SHA-256 of their footers; when any of it changes, they are indexed
again.

Images that are stored as they are (their column uncompressed and PLAIN) are then mapped, as in
shards. Of other files a whole row group is read to have one image: they open with a warning that
says how many times more bytes that is. Their "offsets" in the index count the bytes of all images
before.
"""

import hashlib
import json
import mmap
import os
import shutil
import struct
import tempfile
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import ValidationError

from phi3v_data.atomic import TEMPORARY_MARK
from phi3v_data.cache_place import cache_folder
from phi3v_data.images import ImageError, probe_image
from phi3v_data.schema import Sample
from phi3v_data.shard_format import (
    FORMAT,
    INDEX,
    MANIFEST,
    SCHEMA_VERSION,
    VERSION,
    FileEntry,
    Manifest,
    Settings,
    ShardEntry,
    ShardError,
    Validation,
    parse_manifest,
)
from phi3v_data.shard_index import ImagePlace, IndexWriter
from phi3v_data.shard_store import LocalStore, Span

INDEXER_VERSION = 1
"""Raised with every change of what is checked or noted."""

LAYOUT = "layout.json"

ROWS_READ_AT_ONCE = 64

OPEN_ROW_GROUPS = 2
"""Decoded row groups that a store keeps, of files whose images cannot be mapped."""

_NEEDED = ("id", "source", "conversations", "images")


class ParquetWarning(UserWarning):
    """A Parquet file is read, but not as fast as shards are."""


class _FileLayout(msgspec.Struct, frozen=True):
    """How the images of a file are had."""

    is_mapped: bool
    group_starts: tuple[int, ...] = ()
    """Where not mapped: the bytes of all images before each row group."""

    read_per_image: float = 1.0
    """Bytes of images read to have one byte of a sample's, if samples are read in random order."""


@dataclass(frozen=True, slots=True)
class _Row:
    sample: Sample
    images: list[bytes]


class ParquetStore:
    """A `ShardStore` of Parquet files that have no manifest; it makes one, in the user's cache."""

    def __init__(self, path: str | os.PathLike[str], files: Sequence[Path]) -> None:
        self.name = os.path.abspath(path)
        """The absolute path of the file or the folder."""
        self._files = tuple(files)
        self._local = LocalStore(files[0].parent)
        self._cache: Path | None = None
        self._layouts: dict[str, _FileLayout] = {}
        self._groups: OrderedDict[tuple[str, int], dict[int, memoryview]] = OrderedDict()

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return ParquetStore, (self.name, self._files)

    def read(self, file: str) -> bytes:
        """See `ShardStore`. Indexes the files, if they are new or have changed.

        Raises:
            ShardError: a file is not Parquet of this schema, or a sample is not one; the message
                names file and row.
        """
        return LocalStore(self._indexed()).read(file)

    def local_path(self, entry: FileEntry) -> Path:
        """See `ShardStore`."""
        if entry.name == INDEX:
            return LocalStore(self._indexed()).local_path(entry)
        return self._local.local_path(entry)

    def ranges(self, entry: ShardEntry, spans: Sequence[Span]) -> list[memoryview]:
        """See `ShardStore`."""
        self._indexed()
        layout = self._layouts[entry.name]
        if layout.is_mapped:
            return self._local.ranges(entry, spans)
        return [self._image(entry, layout, span) for span in spans]

    def forget(self, entry: ShardEntry, spans: Sequence[Span]) -> bool:
        """See `ShardStore`. Nothing is kept: the file itself is damaged."""
        del entry, spans
        return False

    def close(self) -> None:
        """See `ShardStore`."""
        self._local.close()
        self._groups.clear()

    def _indexed(self) -> Path:
        """The folder of the index."""
        if self._cache is not None:
            return self._cache
        folder = cache_folder().parent / "parquet"
        place = folder / (_name_of(self.name) + "-" + _facts(self._files))
        if not _is_whole(place):
            _index(self.name, self._files, place)
        self._layouts = msgspec.json.decode(
            (place / LAYOUT).read_bytes(), type=dict[str, _FileLayout]
        )
        for name, layout in self._layouts.items():
            if not layout.is_mapped:
                warnings.warn(
                    f"{self._local.name}/{name}: its images are compressed or in a dictionary, so "
                    "that a whole row group is read to have one: in random order "
                    f"{layout.read_per_image:.0f} times the bytes. Write it with the column of "
                    "images uncompressed and PLAIN, or make shards of it, and they are mapped",
                    ParquetWarning,
                    stacklevel=2,
                )
        self._cache = place
        return place

    def _image(self, entry: ShardEntry, layout: _FileLayout, span: Span) -> memoryview:
        offset, length = span
        group = bisect_right(layout.group_starts, offset) - 1
        images = self._groups.get((entry.name, group))
        if images is None:
            path = self._local.local_path(entry)
            with _parquet_errors(path), _open(path) as file:
                images = _images_of_group(file, group, layout.group_starts[group])
            self._groups[entry.name, group] = images
            if len(self._groups) > OPEN_ROW_GROUPS:
                self._groups.popitem(last=False)
        image = images.get(offset)
        if image is None or len(image) != length:
            raise ShardError(f"{self._local.name}/{entry.name}: has changed since it was indexed")
        return image


def find_parquet(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The Parquet files at a path that is no shard directory; none where it is one, or nothing.

    A folder that holds an `index.arrow` is a shard directory that lost its manifest.
    """
    place = Path(path)
    if place.is_file() and place.suffix == ".parquet":
        return (place.absolute(),)
    if not place.is_dir() or (place / MANIFEST).exists() or (place / INDEX).exists():
        return ()
    return tuple(sorted(file.absolute() for file in place.glob("*.parquet") if file.is_file()))


def _index(name: str, files: Sequence[Path], place: Path) -> None:
    """Index the files into the folder `place`, which appears whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{TEMPORARY_MARK}", dir=place.parent))
    try:
        _write_index(name, files, temporary)
        for old in place.parent.glob(f"{_name_of(name)}-*"):
            shutil.rmtree(old, ignore_errors=True)
        try:
            os.rename(temporary, place)
        except OSError:
            if not _is_whole(place):  # else another process has just made the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_index(name: str, files: Sequence[Path], folder: Path) -> None:
    writer = IndexWriter(folder / INDEX)
    try:
        entries: list[ShardEntry] = []
        layouts: dict[str, _FileLayout] = {}
        ids: set[str] = set()
        image_bytes = 0
        for number, path in enumerate(files):
            num_samples = num_images = 0
            with _parquet_errors(path), _open(path) as file:
                _check_columns(path, file)
                layout = _layout(file)
                places = _mapped_places(path, file) if layout.is_mapped else _counted_places()
                next(places)
                for row, found in enumerate(_read_rows(path, file)):
                    if found.sample.id in ids:
                        raise ShardError(
                            f"{path}: row {row}: id {found.sample.id!r} was there before; ids are "
                            "unique"
                        )
                    ids.add(found.sample.id)
                    images = [
                        _place(path, row, found, k, places.send(image))
                        for k, image in enumerate(found.images)
                    ]
                    writer.add(found.sample, number, images)
                    num_samples += 1
                    num_images += len(images)
                    image_bytes += sum(map(len, found.images))
            layouts[path.name] = layout
            with open(path, "rb") as raw:
                sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
            entries.append(
                ShardEntry(
                    name=path.name,
                    num_bytes=path.stat().st_size,
                    sha256=sha256,
                    num_samples=num_samples,
                    num_images=num_images,
                )
            )
        if not ids:
            raise ShardError(f"{name}: holds no samples")
        index = writer.close()
    finally:
        writer.abort()
    named = [(entry.name, entry.sha256) for entry in (*entries, index)]
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        schema_version=SCHEMA_VERSION,
        input="",
        fingerprint=hashlib.sha256(json.dumps(named).encode()).hexdigest(),
        num_samples=len(ids),
        num_images=sum(entry.num_images for entry in entries),
        image_bytes=image_bytes,
        num_dropped=0,
        settings=Settings(
            shard_bytes=0, drop_invalid=False, allow_missing_answer=True, num_crops=0
        ),
        validation=Validation(
            validator=f"phi3v-data {version('phi3v-data')}, indexed: the schema only",
            rules=(),
            severities={},
            level="header",
            counts={},
            is_complete=True,
        ),
        sources=(),
        shards=tuple(entries),
        index=index,
        rejected=None,
    )
    (folder / LAYOUT).write_bytes(msgspec.json.encode(layouts))
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _check_columns(path: Path, file: pq.ParquetFile) -> None:
    names = file.schema_arrow.names
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise ShardError(
            f"{path}: has no column {missing[0]!r}; expected {', '.join(_NEEDED)}, "
            f"got {', '.join(names)}"
        )
    images = file.schema_arrow.field("images").type
    struct_: Any = getattr(images, "value_type", None)
    fields: list[pa.Field] = struct_.fields if isinstance(struct_, pa.StructType) else []
    if not {"bytes", "path"} <= {field.name for field in fields}:
        raise ShardError(
            f"{path}: its images are {images}; expected list<struct<bytes: binary, path: string>>"
        )


def _read_rows(path: Path, file: pq.ParquetFile) -> Iterator[_Row]:
    names = file.schema_arrow.names
    columns = [*_NEEDED, *(name for name in ("metadata",) if name in names)]
    row = 0
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(ROWS_READ_AT_ONCE, row_groups=[group], columns=columns):
            for content in batch.to_pylist():
                yield _row(path, row, content)
                row += 1


def _row(path: Path, row: int, content: dict[str, Any]) -> _Row:
    where = f"{path}: row {row}, sample {content['id']!r}"
    fields = {name: content[name] for name in ("id", "source")}
    metadata = content.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = msgspec.json.decode(metadata)
        except msgspec.DecodeError as error:
            raise ShardError(f"{where}: metadata: {error}") from None
    if metadata is not None:
        fields["metadata"] = metadata
    fields["conversations"] = [
        {key: value for key, value in turn.items() if value is not None}
        for turn in content["conversations"] or ()
    ]
    try:
        sample = Sample.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ShardError(f"{where}: {place or 'sample'}: {first['msg']}") from None
    images = content["images"] or []
    if len(images) != len(sample.images):
        raise ShardError(
            f"{where}: its conversations name {len(sample.images)} images, and it has {len(images)}"
        )
    for k, (image, name) in enumerate(zip(images, sample.images, strict=True)):
        if image is None or image.get("bytes") is None:
            raise ShardError(
                f"{where}, image {k + 1} ({name}): has no bytes; write the images into the file"
            )
        # A writer may keep no more than the last part of a path.
        path_k = image.get("path")
        if path_k is not None and path_k.rpartition("/")[2] != name.rpartition("/")[2]:
            raise ShardError(
                f"{where}, image {k + 1}: is {path_k!r}, and its conversations name {name!r} there"
            )
    return _Row(sample, [image["bytes"] for image in images])


def _place(path: Path, row: int, found: _Row, k: int, offset: int) -> ImagePlace:
    image = found.images[k]
    try:
        info = probe_image(image)
    except ImageError as error:
        raise ShardError(
            f"{path}: row {row}, sample {found.sample.id!r}, image {k + 1} "
            f"({found.sample.images[k]}): {error}"
        ) from None
    return ImagePlace(offset, len(image), info.width, info.height, xxhash.xxh3_64_intdigest(image))


def _leaf(file: pq.ParquetFile, group: int) -> pq.ColumnChunkMetaData:
    """The column of the images' bytes; writers name the list's items differently."""
    row_group = file.metadata.row_group(group)
    for number in range(row_group.num_columns):
        column = row_group.column(number)
        names = column.path_in_schema.split(".")
        if names[0] == "images" and names[-1] == "bytes":
            return column
    raise AssertionError("its columns were checked")


def _layout(file: pq.ParquetFile) -> _FileLayout:
    leaves = [_leaf(file, group) for group in range(file.num_row_groups)]
    if all(
        leaf.compression == "UNCOMPRESSED"
        and not leaf.has_dictionary_page
        and set(leaf.encodings) <= {"PLAIN", "RLE", "BIT_PACKED"}
        for leaf in leaves
    ):
        return _FileLayout(is_mapped=True)
    starts: list[int] = []
    position = 0
    read = 0
    num_rows = 0
    for group in range(file.num_row_groups):
        starts.append(position)
        size = sum(map(len, _images_of_group(file, group, 0).values()))
        rows = file.metadata.row_group(group).num_rows
        position += size
        read += size * rows
        num_rows += rows
    return _FileLayout(
        is_mapped=False,
        group_starts=tuple(starts),
        read_per_image=read / max(position, 1),
    )


def _images_of_group(file: pq.ParquetFile, group: int, start: int) -> dict[int, memoryview]:
    """Images of a row group by the bytes of all images before them."""
    images: dict[int, memoryview] = {}
    table = file.read_row_group(group, columns=["images"])
    for chunk in table.column("images").chunks:
        for image in chunk.flatten().field("bytes"):
            buffer = image.as_buffer()
            if buffer is not None:
                images[start] = memoryview(buffer)
                start += buffer.size
    return images


def _counted_places() -> Generator[int, bytes, None]:
    """Images come in, the bytes before them come out."""
    position = 0
    image = yield 0
    while True:
        start = position
        position += len(image)
        image = yield start


def _mapped_places(path: Path, file: pq.ParquetFile) -> Generator[int, bytes, None]:
    """Images come in, in their order in the file, and where their bytes start comes out.

    They follow one another behind their lengths; between pages there is a header. So the next one
    is nearly always right here, and else a short search for its length away.
    """
    bounds = [
        (leaf.data_page_offset, leaf.data_page_offset + leaf.total_compressed_size)
        for leaf in (_leaf(file, group) for group in range(file.num_row_groups))
    ]
    group = 0
    position = bounds[0][0] if bounds else 0
    with (
        open(path, "rb") as raw,
        mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        start = 0
        while True:
            image = yield start
            prefix = struct.pack("<I", len(image))
            while True:
                position = content.find(prefix, position, bounds[group][1])
                if position >= 0:
                    start = position + 4
                    if content[start : start + len(image)] == image:
                        position = start + len(image)
                        break
                    position += 1
                elif group + 1 < len(bounds):
                    group += 1
                    position = bounds[group][0]
                else:
                    raise ShardError(f"{path}: its images are not stored as its footer says")


def _open(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)


@contextmanager
def _parquet_errors(path: Path) -> Generator[None]:
    """Say which file it is that Arrow cannot read."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{path}: cannot be read as Parquet: {error}") from None


def _name_of(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:16]


def _facts(files: Sequence[Path]) -> str:
    """A hash of all that tells whether the files have changed."""
    facts: list[Any] = [INDEXER_VERSION, VERSION, SCHEMA_VERSION]
    for path in files:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            file.seek(max(state.st_size - 8, 0))
            tail = file.read(8)
            length = struct.unpack("<I", tail[:4])[0] if len(tail) == 8 else 0
            file.seek(max(state.st_size - 8 - length, 0))
            footer = hashlib.sha256(file.read()).hexdigest()
        facts.append([path.name, state.st_size, state.st_mtime_ns, footer])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _is_whole(place: Path) -> bool:
    """Whether there is an index; one that is damaged is made again."""
    try:
        manifest = parse_manifest((place / MANIFEST).read_bytes(), os.fspath(place))
        return (place / INDEX).stat().st_size == manifest.index.num_bytes
    except (FileNotFoundError, ShardError):
        return False
