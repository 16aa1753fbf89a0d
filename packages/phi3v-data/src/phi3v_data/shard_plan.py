"""Which lines of conversations files go into which shard: decided before anything is written.

    plan = plan_shards(sources, skipped, shard_bytes=128 << 20)
    plan.shards[0].segments      # (Segment(file="train.jsonl", start=0, end=51_200, ...),)
    plan.shards[0].digest        # names lines and images: equal input, equal digest

Sizes of files decide, so the plan is cheap, and the same whoever carries it out: shards can be
written in any order by any process. It holds 16 bytes an image.
"""

import hashlib
import os
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import xxhash
from pydantic import ValidationError

from phi3v_data.image_place import ImagePlaces, MisplacedImage
from phi3v_data.jsonl import byte_order_mark, explain
from phi3v_data.line_set import LineSet
from phi3v_data.quick_sample import QuickSample
from phi3v_data.schema import Sample

MAX_ROW_BYTES = (1 << 31) - (1 << 26)
"""Images of one sample, in bytes: 32-bit offsets reach no further than a row group of them."""


@dataclass(frozen=True, slots=True)
class Source:
    """A conversations file, with what validation found out about it."""

    file: str
    root: str
    """The image root of its paths."""

    invalid: LineSet
    """Numbers of lines to leave out."""

    hashes: Mapping[str, int]
    """Image path → xxh3 of the content that was validated; 0 or missing: nothing is known."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring lines of one file."""

    file: str
    root: str
    start: int
    """Of the first line, in bytes."""

    end: int
    first_line: int
    """Its number."""

    skipped: tuple[int, ...]
    """Numbers of lines in between that are left out."""


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One Parquet file to be written."""

    number: int
    segments: tuple[Segment, ...]
    num_samples: int
    num_bytes: int
    """Of lines and images."""

    sizes: "array[int]"
    """Of its images, in bytes, in order."""

    hashes: "array[int]"
    """xxh3 of its images, in order."""

    digest: str
    """Of its lines, and the sizes and hashes of its images."""


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """What was seen of a file while planning."""

    file: str
    sha256: str
    num_lines: int
    """Lines that are not blank."""


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """All shards."""

    sources: tuple[PlannedSource, ...]
    shards: tuple[PlannedShard, ...]

    @property
    def num_samples(self) -> int:
        """Of all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Of lines and images of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """Names lines, images and the bounds of shards: equal input, equal digest."""
        return xxhash.xxh3_128_hexdigest("".join(s.digest for s in self.shards).encode())


class LineDigest:
    """The digest of a shard's input, line by line; whoever writes a shard compares it."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def add(self, line: bytes, sizes: "array[int]", hashes: "array[int]") -> None:
        """Append a line, without its line break, and its images."""
        self._state.update(b"%d,%d\n" % (len(line), len(sizes)))
        self._state.update(line)
        self._state.update(sizes.tobytes())
        self._state.update(hashes.tobytes())

    def hexdigest(self) -> str:
        """Of all so far."""
        return self._state.hexdigest()


def plan_shards(sources: list[Source], shard_bytes: int) -> ShardPlan:
    """Read the files once, ask the disk for the sizes of their images, and set the bounds.

    A shard ends before the sample that would take it beyond `shard_bytes`; it holds one at least.

    Raises:
        ValueError: a line that is not left out holds no sample, or images that cannot be read or
            are too large.
    """
    shards: list[PlannedShard] = []
    seen: list[PlannedSource] = []
    current = _Shard(0)
    for source in sources:
        sha256 = hashlib.sha256()
        num_lines = 0
        images = _Images(source)
        with open(source.file, "rb") as file:
            position = 0
            for number, raw in enumerate(file, start=1):
                sha256.update(raw)
                start, position = position, position + len(raw)
                line = raw.rstrip(b"\r\n")
                if not line.strip():
                    continue
                num_lines += 1
                if number not in source.invalid:
                    sizes, hashes = images.of_line(line, number)
                    num_bytes = len(line) + sum(sizes)
                    if current.num_samples and current.num_bytes + num_bytes > shard_bytes:
                        shards.append(current.close())
                        current = _Shard(len(shards))
                    current.add(source, number, start, position, line, sizes, hashes)
                if number == 1 and byte_order_mark(line) == "UTF-16":
                    sha256.update(file.read())
                    break  # nothing after it is a line
        seen.append(PlannedSource(source.file, sha256.hexdigest(), num_lines))
    if current.num_samples:
        shards.append(current.close())
    return ShardPlan(tuple(seen), tuple(shards))


class _Shard:
    """A shard that lines are added to."""

    def __init__(self, number: int) -> None:
        self.num_samples = 0
        self.num_bytes = 0
        self._number = number
        self._segments: list[Segment] = []
        self._sizes = array("Q")
        self._hashes = array("Q")
        self._digest = LineDigest()

        self._source: Source | None = None  # of the segment that is open
        self._start = self._end = self._first_line = self._last_line = 0
        self._skipped: list[int] = []

    def add(
        self,
        source: Source,
        number: int,
        start: int,
        end: int,
        line: bytes,
        sizes: "array[int]",
        hashes: "array[int]",
    ) -> None:
        if source is not self._source:
            self._close_segment()
            self._source, self._start, self._first_line = source, start, number
        else:
            self._skipped.extend(
                skipped
                for skipped in range(self._last_line + 1, number)
                if skipped in source.invalid
            )
        self._end, self._last_line = end, number
        self.num_samples += 1
        self.num_bytes += len(line) + sum(sizes)
        self._sizes += sizes
        self._hashes += hashes
        self._digest.add(line, sizes, hashes)

    def close(self) -> PlannedShard:
        self._close_segment()
        return PlannedShard(
            number=self._number,
            segments=tuple(self._segments),
            num_samples=self.num_samples,
            num_bytes=self.num_bytes,
            sizes=self._sizes,
            hashes=self._hashes,
            digest=self._digest.hexdigest(),
        )

    def _close_segment(self) -> None:
        if self._source is not None:
            self._segments.append(
                Segment(
                    file=self._source.file,
                    root=self._source.root,
                    start=self._start,
                    end=self._end,
                    first_line=self._first_line,
                    skipped=tuple(self._skipped),
                )
            )
        self._source, self._skipped = None, []


_decode: Callable[[bytes], Any] = msgspec.json.Decoder(QuickSample).decode


class _Images:
    """Sizes and hashes of the images of one file."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._places = ImagePlaces(source.root)
        self._known: dict[str, tuple[int, int]] = {}

    def of_line(self, line: bytes, number: int) -> "tuple[array[int], array[int]]":
        """Sizes and hashes of the images of a line, in order."""
        sizes, hashes = array("Q"), array("Q")
        for path in self._paths(line, number):
            known = self._known.get(path)
            if known is None:
                known = self._known[path] = self._look_at(path, number)
            sizes.append(known[0])
            hashes.append(known[1])
        if sum(sizes) > MAX_ROW_BYTES:
            raise ValueError(
                f"{self._source.file}:{number}: its images are {sum(sizes):,} bytes; a sample in a "
                f"shard may hold {MAX_ROW_BYTES:,}"
            )
        return sizes, hashes

    def _paths(self, line: bytes, number: int) -> list[str]:
        try:
            quick: QuickSample = _decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass  # the schema itself is the one to say
        else:
            unset = msgspec.UNSET
            return [
                p for turn in quick.conversations if turn.images is not unset for p in turn.images
            ]
        try:
            return list(Sample.from_json(line).images)
        except ValidationError as error:
            raise ValueError(
                f"{self._source.file}:{number}: no rule that ran found an error, but it cannot be "
                f"stored: {explain(error)}; let the rules P and S run"
            ) from None

    def _look_at(self, path: str, number: int) -> tuple[int, int]:
        try:
            known = self._source.hashes.get(path)
            if known:
                return os.stat(os.path.join(self._source.root, path)).st_size, known
            with open(self._places.find(path), "rb") as file:
                content = file.read()
        except (OSError, MisplacedImage) as error:
            problem = (error.strerror or error) if isinstance(error, OSError) else error
            raise ValueError(
                f"{self._source.file}:{number}: image {path!r}: no rule that ran found an error, "
                f"but it cannot be stored: {problem}; let the rules I run, or run again if it "
                "changed meanwhile"
            ) from None
        return len(content), xxhash.xxh3_64_intdigest(content)
