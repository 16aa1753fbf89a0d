# pyright: standard
# pyarrow ships no type stubs.
"""Read a shard directory back and compare it with what its manifest says.

verify_shards("shards/train")   # [] or what is damaged
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phi3v_data.shard_format import FileEntry, ShardError, read_manifest
from phi3v_data.shards import ShardReader


@dataclass(frozen=True, slots=True)
class ShardFinding:
    """Something damaged in a shard directory."""

    file: str
    """Name in the directory."""

    problem: str


def verify_shards(path: str | os.PathLike[str]) -> list[ShardFinding]:
    """Read everything back: hashes of all files, counts, every sample, every image.

    Returns:
        What is wrong; empty if all is well.

    Raises:
        ShardError: there is no manifest to verify against, or it is of another version or damaged.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    findings: list[ShardFinding] = []
    entries: list[FileEntry] = [*manifest.shards, manifest.index]
    entries += [manifest.rejected] if manifest.rejected else []
    for entry in entries:
        problem = _problem(directory / entry.name, entry)
        if problem:
            findings.append(ShardFinding(entry.name, problem))
    named = {entry.name for entry in entries} | {"manifest.json"}
    for file in sorted(directory.iterdir()):
        if file.name not in named:
            findings.append(ShardFinding(file.name, "not in the manifest"))
    damaged = {finding.file for finding in findings}
    if manifest.index.name in damaged:
        return findings
    try:
        findings += _verify_samples(ShardReader(directory), damaged)
    except ShardError as error:
        findings.append(ShardFinding(manifest.index.name, str(error)))
    return findings


def _verify_samples(reader: ShardReader, damaged: set[str]) -> Iterator[ShardFinding]:
    import pyarrow.parquet as pq

    manifest = reader.manifest
    for shard in manifest.shards:
        if shard.name not in damaged:  # a damaged file is not for a Parquet parser
            num_rows = pq.read_metadata(reader.path / shard.name).num_rows
            if num_rows != shard.num_samples:
                problem = f"{num_rows} rows, the manifest says {shard.num_samples}"
                yield ShardFinding(shard.name, problem)
    if sum(shard.num_samples for shard in manifest.shards) != manifest.num_samples:
        yield ShardFinding("manifest.json", "the counts of its shards do not add up")
    num_images = 0
    unreadable = {s.name for s in manifest.shards if _size_problem(reader.path / s.name, s)}
    for row in range(len(reader)):
        num_images += len(reader.sample(row).images)
        name = reader.shard_name(row)
        if name not in unreadable:  # said once already, not once a row
            try:
                _ = reader[row]
            except ShardError as error:
                yield ShardFinding(name, str(error).removeprefix(f"{reader.path / name}: "))
    if num_images != manifest.num_images:
        problem = f"{num_images} images, the manifest says {manifest.num_images}"
        yield ShardFinding(manifest.index.name, problem)


def _size_problem(path: Path, entry: FileEntry) -> str:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != entry.num_bytes:
        return f"damaged: {size} bytes, the manifest says {entry.num_bytes}"
    return ""


def _problem(path: Path, entry: FileEntry) -> str:
    problem = _size_problem(path, entry)
    if problem:
        return problem
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            return "damaged: its SHA-256 does not match the manifest"
    return ""
