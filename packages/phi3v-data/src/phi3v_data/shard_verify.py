# pyright: standard
# pyarrow ships no type stubs.
"""Read a shard directory back and compare it with what its manifest says.

    verify_shards("shards/train")                    # [] or what is damaged
    verify("shards/train", num_sampled=100)          # Verified(num_read=800, findings=(), ...)

In this order: the manifest against its checksum; every file against its size and SHA-256; files
that nobody named; ids and pixel sizes of the Parquet rows against those of the index; and samples,
read as a training run reads them, so that each image is at its place and has its hash.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from phi3v_data.shard_format import (
    MANIFEST,
    FileEntry,
    Manifest,
    ShardEntry,
    ShardError,
    read_manifest,
)
from phi3v_data.shards import ShardReader

MOST_FINDINGS = 100
"""Named of one directory; the rest is counted."""

CHUNK_BYTES = 4 << 20

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class ShardFinding:
    """Something damaged in a shard directory."""

    file: str
    """Name in the directory; empty where it is about the directory itself."""

    problem: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What was looked at in a directory, and what is wrong."""

    directory: str
    num_shards: int
    num_samples: int
    num_images: int
    num_read: int
    """Samples read back."""

    num_findings: int
    findings: tuple[ShardFinding, ...]
    """At most `MOST_FINDINGS`."""


def verify_shards(path: str | os.PathLike[str]) -> list[ShardFinding]:
    """Read everything back: hashes of all files, counts, every sample, every image.

    Returns:
        What is wrong; empty if all is well.

    Raises:
        ShardError: there is no manifest to verify against, or it is of another version or damaged.
    """
    directory = Path(path)
    return list(_Verification(directory, read_manifest(directory), None, _say_nothing).findings())


def verify(
    path: str | os.PathLike[str],
    *,
    num_sampled: int | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Compare a shard directory with its manifest, and say what was looked at.

    Args:
        path: the directory, on this machine.
        num_sampled: samples of each shard to read back, spread evenly; by default all.
        progress: called with (what is being done, bytes done, bytes in all).
    """
    directory = Path(path)
    shown = os.fspath(path)
    try:
        manifest = read_manifest(directory)
    except ShardError as error:
        problem = str(error).removeprefix(f"{directory}: ")
        return Verified(shown, 0, 0, 0, 0, 1, (ShardFinding("", problem),))
    verification = _Verification(directory, manifest, num_sampled, progress or _say_nothing)
    kept: list[ShardFinding] = []
    number = 0
    for finding in verification.findings():
        number += 1
        if number <= MOST_FINDINGS:
            kept.append(finding)
    return Verified(
        directory=shown,
        num_shards=len(manifest.shards),
        num_samples=manifest.num_samples,
        num_images=manifest.num_images,
        num_read=verification.num_read,
        num_findings=number,
        findings=tuple(kept),
    )


class _Verification:
    """One directory."""

    def __init__(
        self, directory: Path, manifest: Manifest, num_sampled: int | None, progress: Progress
    ) -> None:
        self.num_read = 0
        self._directory = directory
        self._manifest = manifest
        self._num_sampled = num_sampled
        self._progress = progress

    def findings(self) -> Iterator[ShardFinding]:
        manifest = self._manifest
        entries: list[FileEntry] = [*manifest.shards, manifest.index]
        entries += [manifest.rejected] if manifest.rejected else []
        damaged: set[str] = set()
        done, total = 0, sum(entry.num_bytes for entry in entries)
        for entry in entries:
            problem = self._problem(entry, done, total)
            if problem:
                damaged.add(entry.name)
                yield ShardFinding(entry.name, problem)
            done += entry.num_bytes
        named = {entry.name for entry in entries} | {MANIFEST}
        for file in sorted(self._directory.iterdir()):
            if file.name not in named:
                yield ShardFinding(file.name, "not in the manifest")
        if sum(shard.num_samples for shard in manifest.shards) != manifest.num_samples:
            yield ShardFinding(MANIFEST, "the counts of its shards do not add up")
        elif manifest.index.name not in damaged:  # a damaged index is not for its parser
            try:
                yield from self._findings_of_rows(ShardReader(self._directory), damaged)
            except ShardError as error:
                yield ShardFinding(manifest.index.name, str(error))

    def _problem(self, entry: FileEntry, done: int, total: int) -> str:
        path = self._directory / entry.name
        problem = _size_problem(path, entry)
        if problem:
            return problem
        sha256 = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                sha256.update(chunk)
                done += len(chunk)
                self._progress("hashing", done, total)
        is_same = sha256.hexdigest() == entry.sha256
        return "" if is_same else "damaged: its SHA-256 does not match the manifest"

    def _findings_of_rows(self, reader: ShardReader, damaged: set[str]) -> Iterator[ShardFinding]:
        start = 0
        num_images = 0
        done, total = 0, sum(shard.num_bytes for shard in self._manifest.shards)
        for shard in self._manifest.shards:
            rows = range(start, start + shard.num_samples)
            start = rows.stop
            of_shard = sum(len(reader.image_spans(row)[1]) for row in rows)
            num_images += of_shard
            if of_shard != shard.num_images:
                problem = f"{of_shard} images in the index, the manifest says {shard.num_images}"
                yield ShardFinding(shard.name, problem)
            if shard.name not in damaged:  # a damaged file is not for a Parquet parser
                yield from self._compare(reader, shard, rows)
            if not _size_problem(self._directory / shard.name, shard):
                # What is missing was said once already, and is not said once a row.
                yield from self._read_back(reader, shard, rows, done, total)
            done += shard.num_bytes
        if num_images != self._manifest.num_images:
            problem = f"{num_images} images, the manifest says {self._manifest.num_images}"
            yield ShardFinding(self._manifest.index.name, problem)

    def _compare(
        self, reader: ShardReader, shard: ShardEntry, rows: range
    ) -> Iterator[ShardFinding]:
        """The columns of the Parquet file that the index has too."""
        import pyarrow.parquet as pq

        columns = ["id", "source", "widths", "heights"]
        with pq.ParquetFile(self._directory / shard.name, page_checksum_verification=True) as file:
            if file.metadata.num_rows != len(rows):
                problem = f"{file.metadata.num_rows} rows, the manifest says {len(rows)}"
                yield ShardFinding(shard.name, problem)
                return
            row = rows.start
            for batch in file.iter_batches(columns=columns):
                for there in batch.to_pylist():
                    sample = reader.sample(row)
                    sizes = tuple(zip(there["widths"], there["heights"], strict=True))
                    if (there["id"], there["source"], sizes) != (
                        sample.id,
                        sample.source,
                        reader.image_sizes_wh(row),
                    ):
                        problem = f"row {row}, sample {sample.id!r}: the index says otherwise"
                        yield ShardFinding(shard.name, problem)
                    row += 1

    def _read_back(
        self, reader: ShardReader, shard: ShardEntry, rows: range, done: int, total: int
    ) -> Iterator[ShardFinding]:
        count = len(rows) if self._num_sampled is None else min(self._num_sampled, len(rows))
        for k in range(count):
            row = rows[k * len(rows) // count]
            try:
                _ = reader[row].sample
            except ShardError as error:
                place = f"{reader.path / shard.name}: "
                yield ShardFinding(shard.name, str(error).removeprefix(place))
            self.num_read += 1
            if not k % 64 or k + 1 == count:
                self._progress("reading back", done + shard.num_bytes * (k + 1) // count, total)


def _say_nothing(what: str, done: int, total: int) -> None:
    """No one is looking."""


def _size_problem(path: Path, entry: FileEntry) -> str:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != entry.num_bytes:
        return f"damaged: {size} bytes, the manifest says {entry.num_bytes}"
    return ""
