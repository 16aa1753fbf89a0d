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
    sample: large string        the sample as a line of JSONL
    shard: uint32               number of the Parquet file
    images: list<struct<offset: uint64, length: uint64, width: uint32, height: uint32,
                        xxh3_64: uint64>>

where the bytes of an image are `length` bytes of its shard from byte `offset` on. The manifest
holds the byte range that every record batch lies in, and the xxh3-64 of every block of
`block_bytes`; a reader checks the blocks of a batch before Arrow parses it, since a flipped bit in
an IPC file can crash the process. The footer, behind the last batch, is checked on opening.

**manifest.json** is the `Manifest` below. `checksum`, the last field, is the xxh3-64 of the file
with the 16 digits of the checksum as zeros. `fingerprint` names the data: equal data, equal
fingerprint.

Bytes are a pure function of the input and the settings (and of the version of pyarrow).
"""

import json
import os
from pathlib import Path

import msgspec
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

FORMAT = "phi3v-shards"
VERSION = 2
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


_STRICT = ConfigDict(extra="forbid", strict=True)
# Entries are dataclasses with slots: there may be 40,000 of them.


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class FileEntry:
    """A file of the directory."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class ShardEntry(FileEntry):
    """A Parquet file."""

    num_samples: int
    num_images: int


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
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
    """Lines that are not blank."""

    ignored: tuple[str, ...]
    """Codes that ran on other files of the directory, and not on this one."""


class Validation(_Frozen):
    """Which rules ran, and what they found."""

    validator: str
    """Program and version."""

    rules: tuple[str, ...]
    """Codes of the rules that ran."""

    severities: dict[str, str]
    """Code of each rule that ran → `error` or `warning` in this run."""

    level: str
    """How closely images were looked at: `header`, `deep` or `full`."""

    counts: dict[str, int]
    """Findings by code. Errors can be here only with `drop_invalid`."""

    is_complete: bool
    """Whether everything was looked at; false where it stopped at so many errors."""


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

    input: str
    """Names the lines and the content of the images that were stored, and where shards end: what a
    later run compares to know that there is nothing to do."""

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
        text = json.dumps({**content, "checksum": _NO_CHECKSUM}, indent=1) + "\n"
        return text[:-_END] + xxhash.xxh3_64_hexdigest(text.encode()) + text[16 - _END :]


_NO_CHECKSUM = "0" * 16
_END = len(f'{_NO_CHECKSUM}"\n}}\n')
"""From the checksum's first digit to the end of the file."""


class _Version(msgspec.Struct):
    """What is read of a manifest before it is known to be one."""

    format: object = None
    version: object = None


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:05d}.parquet"


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and check the `manifest.json` of a folder.

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
    return parse_manifest(raw, os.fspath(directory))


def parse_manifest(raw: bytes, directory: str) -> Manifest:
    """Check the content of `manifest.json` and read it.

    Args:
        raw: all bytes of the file.
        directory: a path or an address, for messages.

    Raises:
        ShardError: another version, or damaged.
    """
    name = f"{directory.rstrip('/')}/{MANIFEST}"
    try:
        version = msgspec.json.decode(raw, type=_Version)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ShardError(f"{name}: damaged: not JSON: {error}") from None
    if version.format != FORMAT:
        raise ShardError(f"{name}: not the manifest of a shard directory: no format {FORMAT!r}")
    if version.version != VERSION:
        raise ShardError(
            f"{directory}: shard format version {version.version!r}, this program reads "
            f"{VERSION}; use the phi3v-data that wrote it, or write it again with "
            "`phi3v-data shard`"
        )
    checksum = xxhash.xxh3_64_hexdigest(
        b"".join((raw[:-_END], _NO_CHECKSUM.encode(), raw[16 - _END :]))
    )
    if raw[-_END : 16 - _END] != checksum.encode():
        raise ShardError(f"{name}: damaged or edited: its checksum does not match")
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise ShardError(f"{name}: not as expected: {error.errors()[0]['msg']}") from None
