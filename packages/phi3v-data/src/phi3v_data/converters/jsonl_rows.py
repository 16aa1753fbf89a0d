"""Rows of JSON lines annotations, a byte range an item, however large the file.

In, one object a line:

    {"id": 42953, "img": "img/42953.png", "label": 0, "text": "…"}

Out, for a converter:

    for lines in list_line_groups(path, "data/train.jsonl", "id"):       # one pass, ids only
        yield Item(index, key=lines.key, path=lines.path, payload=lines)

    for row in read_rows(item.payload):                                  # in another process
        row            # Row(where="train.jsonl:17", fields={"id": 42953, …})
        row            # or Rejected("bad_json", "train.jsonl:18: …")

A line that is no row is named and costs no other line. What is in memory is one line, and eight
bytes for each id met so far: a later line with the same id is rejected, in whatever process it is
read. A UTF-8 byte order mark at the start of the file is passed over; it takes nothing away.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from phi3v_data.converters import Rejected
from phi3v_data.converters.rows import Row, RowError, canonical_id, group_bytes, parse_row
from phi3v_data.jsonl import byte_order_mark

MAX_LINE_BYTES = 1 << 20
"""A longer line is no row of any data set, and a file without line breaks must not fill memory."""

_UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class LineGroup:
    """Consecutive lines of one file. Picklable."""

    path: str
    name: str
    """The file's path below the source, for messages."""

    start: int
    """Offset of its first byte."""

    end: int
    """Offset after its last line."""

    first_line: int
    """Number of its first line in the file, from 1."""

    repeated: int
    """Bit k is set where line `first_line + k` has the id of an earlier line of the file."""

    @property
    def key(self) -> str:
        """A stable, unique name for the item made of it."""
        return f"{self.name}:{self.first_line}"


def find_annotations(
    source: Path, pattern: re.Pattern[str], folders: tuple[str, ...], expected: str
) -> list[Path]:
    """The annotation files of a data set, by name; empty where there is none.

    Args:
        source: the data set's folder, one that holds it, or one annotation file.
        pattern: what the whole name of an annotation file looks like.
        folders: where they may be below the data set's folder; the first that has some is it.
        expected: the layout in words, for the error.

    Raises:
        ValueError: `source` holds several data sets.
    """
    if source.is_file():
        return [source] if pattern.fullmatch(source.name) else []
    inside = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    for roots in ([source], inside):
        found: dict[Path, list[Path]] = {}
        for root in roots:
            for folder in (root / name for name in folders):
                files = _matching_files(folder, pattern)
                if files:
                    found[root] = files
                    break
        if len(found) > 1:
            names = ", ".join(root.name for root in found)
            raise ValueError(f"{source} holds several data sets ({names}); name one of: {expected}")
        if found:
            return next(iter(found.values()))
    return []


def roots_above(annotation: Path, source: Path) -> list[Path]:
    """The folders beside which the images of an annotation file may be, nearest first.

    From the file's own folder up to `source`; further only where `source` is a folder of
    annotations alone (`data`, `annotations`, `balanced`, …) or the file itself. What a row names
    must not be looked for right in these, but in image folders of known names inside them.
    """
    top = Path(os.path.abspath(source))
    if top.is_file():
        top = top.parent
    while top.name in _ANNOTATION_FOLDERS:
        top = top.parent
    folder = Path(os.path.abspath(annotation)).parent
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]


_ANNOTATION_FOLDERS = ("data", "annotations", "balanced", "unbalanced")


def _matching_files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file()]
    return [folder / name for name in sorted(names, key=os.fsencode) if pattern.fullmatch(name)]


def list_line_groups(path: Path, name: str, id_key: str) -> Iterator[LineGroup]:
    """Yield the lines of a file in groups, reading each line's id on the way.

    Args:
        path: the file.
        name: what messages call it.
        id_key: the key that no two lines may share a value of; `7`, `"7"` and `"00007"` are one.

    Raises:
        ValueError: the file as a whole is something else: UTF-16, or one JSON array.
    """
    read_id = _IdReader(id_key)
    wanted_bytes = group_bytes(path)
    seen = _SeenIds()
    with open(path, "rb") as file:
        _check_is_json_lines(file.read(64), name)
        file.seek(0)
        start, first_line, line_number = 0, 1, 0
        hashes: list[int] = []
        positions: list[int] = []
        for line in _lines(file):
            identity = read_id(line) if line is not None else None
            if identity is not None:
                hashes.append(xxhash.xxh3_64_intdigest(identity.encode()))
                positions.append(line_number - first_line + 1)
            line_number += 1
            if file.tell() - start >= wanted_bytes:
                repeated = seen.add(hashes, positions)
                yield LineGroup(str(path), name, start, file.tell(), first_line, repeated)
                start, first_line = file.tell(), line_number + 1
                hashes, positions = [], []
        if file.tell() > start:
            repeated = seen.add(hashes, positions)
            yield LineGroup(str(path), name, start, file.tell(), first_line, repeated)


def read_rows(group: LineGroup) -> Iterator[Row | Rejected]:
    """Yield the rows of a group in order, or why a line is none; blank lines are passed over."""
    file_name = Path(group.name).name
    with open(group.path, "rb") as file:
        file.seek(group.start)
        for k, line in enumerate(_lines(file)):
            where = f"{file_name}:{group.first_line + k}"
            try:
                if line is None:
                    raise RowError("line_too_long", f"more than {MAX_LINE_BYTES:,} bytes")
                if line.strip():
                    fields = parse_row(line)
                    if group.repeated >> k & 1:
                        raise RowError("duplicate_id", "an earlier line has the same id")
                    yield Row(where, fields)
            except RowError as error:
                yield Rejected(error.reason, f"{where}: {error.detail}")
            if file.tell() >= group.end:
                return


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yield the lines from here on, without a byte order mark; None for one that is too long."""
    is_start = file.tell() == 0
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield None
        else:
            yield line.removeprefix(_UTF8_MARK) if is_start else line
        is_start = False


def _check_is_json_lines(head: bytes, name: str) -> None:
    encoding = byte_order_mark(head)
    if encoding not in ("", "UTF-8"):
        raise ValueError(f"{name} is {encoding}; expected UTF-8: save it as that")
    if head.removeprefix(_UTF8_MARK).lstrip().startswith(b"["):
        raise ValueError(f"{name} is one JSON array; expected one object a line")


class _IdReader:
    """Reads one key of a line and skips the rest: ten times the speed of `parse_row`."""

    def __init__(self, id_key: str) -> None:
        field = ("value", int | str | None, msgspec.field(name=id_key, default=None))
        self._decode = msgspec.json.Decoder(msgspec.defstruct("_Id", [field])).decode

    def __call__(self, line: bytes) -> str | None:
        try:
            return canonical_id(cast("Any", self._decode(line)).value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None  # read_rows says what is wrong with it


class _SeenIds:
    """Hashes of ids met so far, 8 bytes each: sorted arrays, each more than twice the next.

    Two of ten million different ids share one of these hashes with a chance of 3 in a million.
    """

    def __init__(self) -> None:
        self._levels: list[NDArray[np.uint64]] = []

    def add(self, hashes: list[int], positions: list[int]) -> int:
        """Add `hashes`; return a number whose bit `positions[k]` is set where the k-th was met."""
        new = np.array(hashes, dtype=np.uint64)
        is_new = np.zeros(len(new), dtype=bool)
        is_new[np.unique(new, return_index=True)[1]] = True
        for level in self._levels:
            places = np.searchsorted(level, new).clip(max=len(level) - 1)
            is_new &= level[places] != new
        fresh = np.sort(new[is_new])
        while self._levels and len(self._levels[-1]) <= 2 * len(fresh):
            fresh = np.concatenate([self._levels.pop(), fresh])
            fresh.sort()
        if len(fresh):
            self._levels.append(fresh)
        return sum(1 << positions[k] for k in np.flatnonzero(~is_new).tolist())
