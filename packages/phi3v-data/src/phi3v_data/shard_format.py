"""What a shard directory is on disk: enough to write another reader.

    shards/train/
      shard-00000.parquet   ordinary Parquet: any Parquet reader shows texts and pictures
      shard-00001.parquet   one row a sample, in the order of the input
      index.arrow           per sample: its text, and where the bytes of its images are
      rejected.jsonl        only with --drop_invalid: the lines left out, and why
      manifest.json         written last; without it the directory is not complete

**shard-N.parquet** has the columns

    id, source: string
    conversations: list<struct<images: list<string>, user: string, assistant: string,
                               answers: list<string>>>
    images: list<struct<bytes: binary, path: string>>      all of the sample, in reading order
    widths, heights: list<int32>                           pixels, upright
    metadata: string                                       a JSON object, or null

The leaf `images.list.element.bytes` is uncompressed, PLAIN, without dictionary and statistics, in
data pages v1: an image's bytes stand in the file as they are, behind their length (4 bytes,
little-endian). All other leaves are zstd with statistics. Every page has a checksum.

**index.arrow** is an Arrow IPC file, `rows_per_batch` rows a record batch, with the columns

    id, source: string
    sample: string              the sample as a line of JSONL
    shard: uint32               number of the Parquet file
    images: list<struct<offset: uint64, length: uint64, width: uint32, height: uint32,
                        xxh3_64: uint64>>

where the bytes of an image are `length` bytes of its shard from byte `offset` on. The manifest
holds the byte range that every record batch lies in, and the xxh3-64 of every block of
`block_bytes`; a reader checks the blocks of a batch before Arrow parses it, since a flipped bit in
an IPC file can crash the process. The footer, behind the last batch, is checked on opening.

**manifest.json** is the `Manifest` below. `checksum` is the xxh3-64 of the rest: JSON with sorted
keys and no white space. `fingerprint` names the data: equal data, equal fingerprint.

Bytes are a pure function of the input and the settings (and of the version of pyarrow).
"""

import json
import os
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, ValidationError

FORMAT = "phi3v-shards"
VERSION = 1
"""Of the format. A reader takes its own version only."""

SCHEMA_VERSION = 1
"""Of `phi3v_data.schema`: what a sample may hold."""

MANIFEST = "manifest.json"
INDEX = "index.arrow"
REJECTED = "rejected.jsonl"
IMAGE_LEAF = "images.list.element.bytes"


class ShardError(ValueError):
    """A shard directory is missing, made by another version, or damaged. The message says where."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Frozen):
    """A file of the directory."""

    name: str
    num_bytes: int
    sha256: str


class ShardEntry(FileEntry):
    """A Parquet file."""

    num_samples: int
    num_images: int


class IndexEntry(FileEntry):
    """`index.arrow`, and what is needed to trust a part of it."""

    rows_per_batch: int
    batches: tuple[tuple[int, int], ...]
    """[offset, length] in bytes of the range every record batch lies in, in order."""

    block_bytes: int
    blocks: tuple[str, ...]
    """xxh3-64 of every block, 16 hex digits."""


class SourceEntry(_Frozen):
    """A JSONL file the samples came from."""

    name: str
    """Its last path component."""

    sha256: str
    num_lines: int


class Validation(_Frozen):
    """Which rules ran, and what they found."""

    validator: str
    """Program and version."""

    rules: tuple[str, ...]
    counts: dict[str, int]
    """Findings by code. Errors can be here only with `drop_invalid`."""


class Settings(_Frozen):
    """What, beside the input, decides the bytes."""

    shard_bytes: int
    drop_invalid: bool
    allow_missing_answer: bool
    num_crops: int


class Manifest(_Frozen):
    """`manifest.json`."""

    format: str
    version: int
    schema_version: int
    """Of the sample schema."""

    fingerprint: str
    """SHA-256 over the names and hashes of shards and index: equal data, equal fingerprint."""

    num_samples: int
    num_images: int
    image_bytes: int
    num_dropped: int
    settings: Settings
    validation: Validation
    sources: tuple[SourceEntry, ...]
    shards: tuple[ShardEntry, ...]
    index: IndexEntry
    rejected: FileEntry | None
    checksum: str = ""

    def to_json(self) -> str:
        """The file's content, checksum included."""
        content = self.model_dump(mode="json", exclude={"checksum"})
        return json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n"


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:05d}.parquet"


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        ShardError: not a shard directory, another version, or a damaged manifest.
    """
    path = Path(directory) / MANIFEST
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = "has no manifest.json" if Path(directory).is_dir() else "is not a directory"
        raise ShardError(
            f"{os.fspath(directory)}: {what}; expected a directory written by `phi3v-data shard`"
        ) from None
    try:
        content: Any = json.loads(raw)
    except ValueError as error:
        raise ShardError(f"{path}: damaged: not JSON: {error}") from None
    fields = cast("dict[str, Any]", content if isinstance(content, dict) else {})
    if fields.get("format") != FORMAT:
        raise ShardError(f"{path}: not the manifest of a shard directory: no format {FORMAT!r}")
    version = fields.get("version")
    if version != VERSION:
        raise ShardError(
            f"{os.fspath(directory)}: shard format version {version!r}, this program reads "
            f"{VERSION}; use the phi3v-data that wrote it, or write it again with "
            "`phi3v-data shard`"
        )
    checksum = fields.pop("checksum", None)
    if checksum != _checksum(fields):
        raise ShardError(f"{path}: damaged or edited: its checksum does not match")
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise ShardError(f"{path}: not as expected: {error.errors()[0]['msg']}") from None
    if manifest.to_json().encode() != raw:
        raise ShardError(f"{path}: damaged or edited: not laid out as it was written")
    return manifest


def _checksum(content: dict[str, Any]) -> str:
    import xxhash

    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(canonical.encode())
