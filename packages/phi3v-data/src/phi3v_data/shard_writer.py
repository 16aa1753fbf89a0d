# pyright: standard
# pyarrow ships no type stubs.
"""Conversations files to a shard directory, whole or not at all, from samples that passed.

    result = write_shards(["train.jsonl"], "shards/train")
    result.manifest.num_samples      # 300
    result.report.exit_status        # 1, and nothing written, if a sample has an error

Everything is written into a temporary directory beside the target, flushed, and renamed. The
layout is in `phi3v_data.shard_format`.
"""

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from phi3v_data.atomic import TEMPORARY_MARK, sync
from phi3v_data.checked_lines import (
    LINE_RULES,
    AnyPath,
    Checked,
    Progress,
    ReportBuilder,
    check,
)
from phi3v_data.diagnostics import Report
from phi3v_data.jsonl import default_image_root
from phi3v_data.schema import Sample
from phi3v_data.shard_format import (
    FORMAT,
    IMAGE_LEAF,
    INDEX,
    MANIFEST,
    REJECTED,
    SCHEMA_VERSION,
    VERSION,
    FileEntry,
    Manifest,
    Settings,
    ShardEntry,
    ShardError,
    SourceEntry,
    Validation,
    read_manifest,
    shard_name,
)
from phi3v_data.shard_index import ImagePlace, IndexReader, IndexWriter

SHARD_BYTES = 128 * 1024 * 1024
ROW_GROUP_BYTES = 32 * 1024 * 1024
ROW_GROUP_ROWS = 8192

_STRINGS = pa.list_(pa.string())
SHARD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field(
            "conversations",
            pa.list_(
                pa.struct(
                    [
                        pa.field("images", _STRINGS),
                        pa.field("user", pa.string()),
                        pa.field("assistant", pa.string()),
                        pa.field("answers", _STRINGS),
                    ]
                )
            ),
        ),
        pa.field(
            "images",
            pa.list_(pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])),
        ),
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

_PARQUET_OPTIONS: dict[str, Any] = {
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


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What `write_shards` did."""

    out_dir: Path
    report: Report
    """Of the validation that ran while writing; from the manifest, if `is_up_to_date`."""

    manifest: Manifest | None
    """None: samples have errors, and nothing was written."""

    is_up_to_date: bool = False
    """The directory was already there, from the same input and settings; it was left alone."""


def write_shards(
    paths: Sequence[AnyPath],
    out_dir: AnyPath,
    *,
    images: AnyPath | None = None,
    shard_bytes: int = SHARD_BYTES,
    drop_invalid: bool = False,
    overwrite: bool = False,
    allow_missing_answer: bool = False,
    num_crops: int = 16,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> ShardResult:
    """Validate conversations files and write them as one shard directory.

    Args:
        paths: JSONL files, stored in this order; ids are unique among all of them.
        out_dir: the directory to make. If it is there from the same input and settings, nothing is
            done.
        images: the image root; by default `images/` beside each file, else its folder.
        shard_bytes: size at which a new Parquet file is begun.
        drop_invalid: leave out samples with errors, listing them in `rejected.jsonl`, rather than
            write nothing.
        overwrite: replace a shard directory made from other input or settings.
        allow_missing_answer: the last turn may lack its answer (test splits).
        num_crops: see `phi3v_data.validate`.
        num_workers: threads that decode images; by default one a core.
        progress: called with (bytes of JSONL done, bytes in all).

    Raises:
        ValueError: an argument is wrong: no such file or image root, no samples at all, `out_dir`
            holds something else.
    """
    target = Path(os.path.abspath(out_dir))
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes: expected 1 or more, got {shard_bytes}")
    if images is not None and not os.path.isdir(images):
        raise ValueError(f"{os.fspath(images)}: no such folder; expected the image root")
    settings = Settings(
        shard_bytes=shard_bytes,
        drop_invalid=drop_invalid,
        allow_missing_answer=allow_missing_answer,
        num_crops=num_crops,
    )
    checked_lines = check(
        paths,
        images=images,
        allow_missing_answer=allow_missing_answer,
        num_crops=num_crops,
        ids_across_files=True,
        num_workers=num_workers,
        progress=progress,
    )
    files = [Path(path) for path in paths]
    existing = _existing(target, overwrite)
    if existing is not None and not overwrite:
        difference = _difference(target, existing, files, images, settings)
        if difference:
            raise ValueError(
                f"{os.fspath(out_dir)}: is there already, {difference}; --overwrite replaces it"
            )
        if existing.num_dropped == 0:
            return ShardResult(target, _report_of(existing, files), existing, is_up_to_date=True)
        # What was dropped could be whole by now: only writing again tells.

    with _temporary_directory(target) as temporary:
        builder = ReportBuilder(LINE_RULES)
        writer = _DirectoryWriter(temporary, settings)
        try:
            for checked in checked_lines:
                builder.add(checked)
                writer.add(checked)
            report = builder.report([os.fspath(path) for path in paths])
            if report.num_lines == 0:
                raise ValueError(f"{', '.join(report.files)}: no samples; nothing to write")
            if not writer.is_writing or report.num_valid == 0:
                return ShardResult(target, report, None)
            manifest = writer.close(files, report)
        finally:
            writer.abort()
        if existing is not None and not overwrite:
            if manifest == existing:
                return ShardResult(target, report, existing, is_up_to_date=True)
            raise ValueError(
                f"{os.fspath(out_dir)}: is there already, with other samples dropped; "
                "--overwrite replaces it"
            )
        _publish(temporary, target)
    return ShardResult(target, report, manifest)


class _DirectoryWriter:
    """Receives checked lines; stops writing at the first error unless errors are dropped."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.is_writing = True
        self._directory = directory
        self._settings = settings
        self._index = IndexWriter(directory / INDEX)
        self._shard: _ShardWriter | None = None
        self._shards: list[ShardEntry] = []
        self._num_dropped = 0
        self._image_bytes = 0
        self._rejected = None
        self._num_lines: dict[str, int] = {}

    def add(self, checked: Checked) -> None:
        self._num_lines[checked.file] = self._num_lines.get(checked.file, 0) + 1
        if checked.sample is not None:
            if self.is_writing:
                self._write(checked)
        elif self._settings.drop_invalid:
            self._reject(checked)
        else:
            self.is_writing = False

    def close(self, files: list[Path], report: Report) -> Manifest:
        self._close_shard()
        index = self._index.close()
        rejected = None
        if self._rejected is not None:
            self._rejected.close()
            rejected = _file_entry(self._directory / REJECTED)
        named = [(entry.name, entry.sha256) for entry in (*self._shards, index)]
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            schema_version=SCHEMA_VERSION,
            fingerprint=hashlib.sha256(json.dumps(named).encode()).hexdigest(),
            num_samples=sum(shard.num_samples for shard in self._shards),
            num_images=sum(shard.num_images for shard in self._shards),
            image_bytes=self._image_bytes,
            num_dropped=self._num_dropped,
            settings=self._settings,
            validation=Validation(
                validator=_validator(), rules=report.rules, counts=dict(report.counts)
            ),
            sources=tuple(
                SourceEntry(
                    name=path.name,
                    sha256=_sha256(path),
                    num_lines=self._num_lines.get(os.fspath(path), 0),
                )
                for path in files
            ),
            shards=tuple(self._shards),
            index=index,
            rejected=rejected,
        )
        (self._directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return read_manifest(self._directory)

    def abort(self) -> None:
        """Close what is open; harmless after `close`."""
        if self._shard is not None:
            self._shard.abort()
        self._index.abort()
        if self._rejected is not None:
            self._rejected.close()

    def _write(self, checked: Checked) -> None:
        assert checked.sample is not None
        images = [
            _read_again(checked.image_root / path, image.xxh3_64)
            for path, image in zip(checked.sample.images, checked.images, strict=True)
        ]
        num_bytes = len(checked.content) + sum(map(len, images))
        if self._shard and self._shard.num_bytes + num_bytes > self._settings.shard_bytes:
            self._close_shard()
        if self._shard is None:
            self._shard = _ShardWriter(self._directory / shard_name(len(self._shards)))
        self._shard.add(checked, images, num_bytes)
        self._image_bytes += sum(map(len, images))

    def _close_shard(self) -> None:
        if self._shard is not None:
            shard, self._shard = self._shard, None
            entry, rows = shard.close()
            for sample, places in rows:
                self._index.add(sample, len(self._shards), places)
            self._shards.append(entry)

    def _reject(self, checked: Checked) -> None:
        if self._rejected is None:
            self._rejected = open(self._directory / REJECTED, "wb")
        self._num_dropped += 1
        line = {
            "file": Path(checked.file).name,
            "line": checked.line,
            "findings": [
                {
                    key: value
                    for key, value in asdict(diagnostic).items()
                    if key in ("code", "severity", "message", "help", "pointer", "sample_id")
                }
                for diagnostic in checked.diagnostics
            ],
            "content": checked.content.decode("utf-8", "replace"),
        }
        self._rejected.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


class _ShardWriter:
    """One Parquet file; when closed, it is read again to learn where the images are."""

    def __init__(self, path: Path) -> None:
        self.num_bytes = 0
        self._path = path
        self._writer = pq.ParquetWriter(path, SHARD_SCHEMA, **_PARQUET_OPTIONS)
        self._rows: list[dict[str, Any]] = []
        self._rows_bytes = 0
        self._samples: list[tuple[Sample, list[tuple[int, int, int, int]]]] = []
        self._images_of_group: list[int] = []
        self._num_images = 0

    def add(self, checked: Checked, images: list[bytes], num_bytes: int) -> None:
        sample = checked.sample
        assert sample is not None
        infos = [image.info for image in checked.images]
        sizes = [(info.width, info.height) for info in infos if info is not None]
        assert len(sizes) == len(images)
        metadata = sample.metadata
        self._rows.append(
            {
                "id": sample.id,
                "source": sample.source,
                "conversations": [turn.model_dump() for turn in sample.conversations],
                "images": [
                    {"bytes": data, "path": path}
                    for data, path in zip(images, sample.images, strict=True)
                ],
                "widths": [width for width, _ in sizes],
                "heights": [height for _, height in sizes],
                "metadata": None if metadata is None else json.dumps(metadata, ensure_ascii=False),
            }
        )
        self._samples.append(
            (
                sample,
                [
                    (len(data), width, height, image.xxh3_64)
                    for data, (width, height), image in zip(
                        images, sizes, checked.images, strict=True
                    )
                ],
            )
        )
        self._num_images += len(images)
        self.num_bytes += num_bytes
        self._rows_bytes += num_bytes
        if self._rows_bytes >= ROW_GROUP_BYTES or len(self._rows) >= ROW_GROUP_ROWS:
            self._flush()

    def close(self) -> tuple[ShardEntry, list[tuple[Sample, list[ImagePlace]]]]:
        self._flush()
        self._writer.close()
        with (
            open(self._path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            wanted = [image for _, images in self._samples for image in images]
            places = iter(list(self._locate(content, wanted)))
            sha256 = hashlib.sha256(content).hexdigest()
            num_bytes = len(content)
        rows = [(sample, [next(places) for _ in images]) for sample, images in self._samples]
        entry = ShardEntry(
            name=self._path.name,
            num_bytes=num_bytes,
            sha256=sha256,
            num_samples=len(rows),
            num_images=self._num_images,
        )
        return entry, rows

    def abort(self) -> None:
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            table = pa.Table.from_pylist(self._rows, schema=SHARD_SCHEMA)
            self._writer.write_table(table, row_group_size=len(self._rows))
            self._images_of_group.append(sum(len(row["images"]) for row in self._rows))
            self._rows, self._rows_bytes = [], 0

    def _locate(
        self, content: mmap.mmap, wanted: list[tuple[int, int, int, int]]
    ) -> Iterator[ImagePlace]:
        """Find each image, in order, in the pages of its row group, comparing its hash.

        Images of a page follow one another; between pages there is a header. So the next image is
        nearly always right here, and else a short search for its length away.
        """
        metadata = pq.read_metadata(self._path)
        images = iter(wanted)
        view = memoryview(content)
        try:
            for group, num_images in enumerate(self._images_of_group):
                row_group = metadata.row_group(group)
                columns = [row_group.column(c) for c in range(row_group.num_columns)]
                (leaf,) = (column for column in columns if column.path_in_schema == IMAGE_LEAF)
                assert leaf.compression == "UNCOMPRESSED"
                position = leaf.data_page_offset
                end = position + leaf.total_compressed_size
                for _ in range(num_images):
                    length, width, height, xxh3_64 = next(images)
                    prefix = struct.pack("<I", length)
                    while True:
                        position = content.find(prefix, position, end)
                        assert position >= 0, f"{self._path}: an image is not where it was written"
                        start = position + 4
                        if xxhash.xxh3_64_intdigest(view[start : start + length]) == xxh3_64:
                            break
                        position += 1
                    yield ImagePlace(start, length, width, height, xxh3_64)
                    position = start + length
        finally:
            view.release()


def _read_again(path: Path, xxh3_64: int) -> bytes:
    data = path.read_bytes()
    if xxhash.xxh3_64_intdigest(data) != xxh3_64:
        raise ValueError(f"{path}: changed while shards were written from it; run again")
    return data


def _existing(target: Path, overwrite: bool) -> Manifest | None:
    """The manifest of the shard directory at `target`, if there is one to compare with."""
    if not target.exists():
        return None
    if not target.is_dir():
        raise ValueError(f"{target}: is a file; expected a directory to make")
    names = sorted(entry.name for entry in target.iterdir())
    ours = {MANIFEST, INDEX, REJECTED}
    foreign = [
        name
        for name in names
        if name not in ours and not (name.startswith("shard-") and name.endswith(".parquet"))
    ]
    if foreign:
        raise ValueError(
            f"{target}: holds files that are not shards ({foreign[0]}, ...); choose a new directory"
        )
    if not names or overwrite:
        return None
    try:
        return read_manifest(target)
    except ShardError as error:
        raise ValueError(f"{error}; --overwrite replaces it") from None


def _difference(
    target: Path,
    existing: Manifest,
    files: list[Path],
    images: AnyPath | None,
    settings: Settings,
) -> str:
    """What was different when `existing` was written; empty if nothing was."""
    for name in Settings.model_fields:
        then, now = getattr(existing.settings, name), getattr(settings, name)
        if then != now:
            return f"written with {name} {then}, not {now}"
    if (existing.validation.validator, existing.validation.rules) != (
        _validator(),
        tuple(rule.code for rule in LINE_RULES),
    ):
        return f"written with {existing.validation.validator} and its rules"
    if [(s.name, s.sha256) for s in existing.sources] != [(p.name, _sha256(p)) for p in files]:
        return "written from other conversations files"
    for entry in (*existing.shards, existing.index):
        path = target / entry.name
        if not path.is_file() or path.stat().st_size != entry.num_bytes:
            return f"and damaged: {entry.name} is not what its manifest says"
    if existing.num_dropped:
        return ""
    index = IndexReader(target / existing.index.name, existing.index)
    row = 0
    same: dict[Path, int] = {}
    for source, file in zip(existing.sources, files, strict=True):
        root = default_image_root(file) if images is None else Path(images)
        for _ in range(source.num_lines):
            sample = Sample.from_json(index.sample_json(row))
            for path, place in zip(sample.images, index.images(row), strict=True):
                image = root / path
                if image not in same:
                    try:
                        same[image] = xxhash.xxh3_64_intdigest(image.read_bytes())
                    except OSError:
                        return f"and image {path!r} cannot be read any more"
                if same[image] != place.xxh3_64:
                    return f"and image {path!r} has changed since"
            row += 1
    return ""


def _report_of(manifest: Manifest, files: list[Path]) -> Report:
    return Report(
        files=tuple(os.fspath(file) for file in files),
        num_lines=sum(source.num_lines for source in manifest.sources),
        num_valid=manifest.num_samples,
        num_images=manifest.num_images,
        counts=dict(manifest.validation.counts),
        diagnostics=(),
        rules=manifest.validation.rules,
    )


@contextmanager
def _temporary_directory(target: Path) -> Iterator[Path]:
    """A directory beside `target`, gone afterwards unless it was renamed.

    It is locked while it is written, so that left-overs of a killed run can be told from the work
    of a living one, and are removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}{TEMPORARY_MARK}"
    for stale in target.parent.glob(f"{prefix}*"):
        with _lock(stale) as is_free:
            if not is_free:
                raise ValueError(f"{target}: another run is writing it right now")
            shutil.rmtree(stale)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        with _lock(temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _lock(directory: Path) -> Iterator[bool]:
    """Lock a directory; the kernel unlocks it when this process ends, however it ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _publish(temporary: Path, target: Path) -> None:
    """Flush `temporary` to disk and give it its name, in place of an older directory."""
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    if target.is_dir() and any(target.iterdir()):
        # Two renames: between them there is no `target`, never half of one.
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}{TEMPORARY_MARK}", dir=target.parent))
        os.rename(target, old)
        os.rename(temporary, target)
        shutil.rmtree(old)
    else:
        os.rename(temporary, target)
    sync(target.parent)


def _file_entry(path: Path) -> FileEntry:
    return FileEntry(name=path.name, num_bytes=path.stat().st_size, sha256=_sha256(path))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _validator() -> str:
    return f"phi3v-data {version('phi3v-data')}"
