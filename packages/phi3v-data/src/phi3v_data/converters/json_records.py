"""Records of a JSON Lines file or of one big JSON array, a byte range an item, however large.

In, either of these, told apart by the first byte and not by the file's name:

    {"id": 1, …}                     [{"id": 1, …}, {"id": 2, …},
    {"id": 2, …}                      {"id": 3, …}]

Out, for a converter:

    for group in list_record_groups(path, "train.json"):          # one pass, nothing parsed
        yield Item(index, key=group.key, path=group.path, payload=group)

    for record in read_records(item.payload):                     # in another process
        record     # Record(where="train.json[1] (line 1)", number=1, fields={"id": 2, …})
        record     # or Rejected("bad_json", "train.json[2] (line 2): …")

Arrays of gigabytes are cut at the commas between their elements, by counting brackets outside of
strings; each element is then parsed alone. So what is wrong with one costs no other, unless it
leaves a bracket or a quote open: then where it ends is anyone's guess, and what cannot be told
apart is rejected together. In memory are one chunk, or one record.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from phi3v_data.converters import Rejected, rows
from phi3v_data.converters.rows import RowError, parse_row
from phi3v_data.jsonl import byte_order_mark

MAX_RECORD_BYTES = 1 << 24
"""A longer record is refused, so that memory stays bounded: 16 MiB hold some embedded pictures."""

CHUNK_BYTES = 1 << 20

_UTF8_MARK = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"

_QUOTE = ord('"')
_COMMA = ord(",")
_STEPS = np.zeros(256, np.int8)
"""What a byte outside of strings does to the depth of brackets."""
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1
_MARKS = bytes(byte in b'"[]{},' for byte in range(256))
"""To translate by: 1 for the bytes that structure consists of."""


@dataclass(frozen=True)
class RecordGroup:
    """Consecutive records of one file. Picklable."""

    path: str
    name: str
    """The file's path below the source, for messages."""

    is_array: bool
    start: int
    """Offset of its first byte."""

    end: int
    """Offset after its last record."""

    first_line: int
    """Line of the file, from 1, in which `start` is."""

    first_number: int
    """Number of its first record in the file, from 0; in JSON Lines, blank lines count."""

    problem: tuple[str, str] | None = None
    """After the last record of a file: (reason, detail) of what is wrong with the file's end."""

    @property
    def key(self) -> str:
        """A stable, unique name for the item made of it."""
        if self.is_array:
            return f"{self.name}[{self.first_number}]"
        return f"{self.name}:{self.first_line}"


@dataclass(frozen=True)
class Record:
    """One object of the file."""

    where: str
    """File name and place, to start messages with."""

    number: int
    """Its place in the file, from 0: of lines (blank ones count), or of elements."""

    fields: dict[str, Any]
    """Its text is valid Unicode, and no key occurred twice."""


class Span(NamedTuple):
    """Where one element is, with the white space around it."""

    start: int
    end: int
    line: int
    """The line in which `start` is, from 1."""


class ArrayCutter:
    """Cuts a JSON array into its elements, chunk by chunk.

    It starts after the opening bracket, or after a comma between elements, and is done where the
    array's own closing bracket is. What stands between two commas is an element, be it empty: the
    caller parses each, and so finds what is no JSON.
    """

    def __init__(self, start: int = 0, line: int = 1) -> None:
        self.closing: int | None = None
        """Offset of the bracket that closes the array; None as long as it was not met."""

        self._offset = start  # of the next chunk
        self._element_start, self._element_line = start, line
        self._line = line
        self._depth = 1
        self._in_string = False
        self._is_escaped = False

    def cut(self, chunks: Iterable[bytes]) -> Iterator[Span]:
        """Yield the elements that a comma ends; `chunks` follow one another in the file."""
        for chunk in chunks:
            yield from self._cut(chunk)
            if self.closing is not None:
                return

    def rest(self) -> Span:
        """The last element, after the last comma: up to the closing bracket, or what was seen."""
        end = self._offset if self.closing is None else self.closing
        return Span(self._element_start, end, self._element_line)

    def _cut(self, chunk: bytes) -> Iterator[Span]:
        plain = self._without_escapes(chunk)
        places = np.flatnonzero(np.frombuffer(plain.translate(_MARKS), np.bool_))
        marks = np.frombuffer(plain, np.uint8)[places]
        in_string = (np.cumsum(marks == _QUOTE) + self._in_string) % 2 == 1
        depths = np.cumsum(np.where(in_string, 0, _STEPS[marks]), dtype=np.int64) + self._depth
        ends = np.flatnonzero(depths <= 0)
        closing = int(places[ends[0]]) if len(ends) else None
        counted = 0
        commas = places[(marks == _COMMA) & ~in_string & (depths == 1)].tolist()
        for place in commas:
            if closing is not None and place > closing:
                break
            self._line += chunk.count(b"\n", counted, place)
            counted = place
            end = self._offset + place
            yield Span(self._element_start, end, self._element_line)
            self._element_start, self._element_line = end + 1, self._line
        if closing is not None:
            self.closing = self._offset + closing
        elif len(places):
            self._in_string, self._depth = bool(in_string[-1]), int(depths[-1])
        self._line += chunk.count(b"\n", counted)
        self._offset += len(chunk)

    def _without_escapes(self, chunk: bytes) -> bytes:
        """The chunk with its escapes blanked, so that every quote left begins or ends a string."""
        if self._is_escaped:
            chunk = b"_" + chunk[1:]
        self._is_escaped = False
        if b"\\" in chunk:
            # Of a run of backslashes the pairs go first; an odd one escapes what follows.
            chunk = chunk.replace(b"\\\\", b"__").replace(b'\\"', b"__")
            self._is_escaped = chunk.endswith(b"\\")
        return chunk


def list_record_groups(
    path: Path, name: str, group_bytes: int | None = None
) -> Iterator[RecordGroup]:
    """Yield the records of a file in groups, without parsing them.

    Args:
        path: the file, JSON Lines or one JSON array.
        name: what messages call it.
        group_bytes: about how long a group is; None chooses by the file's size.

    Raises:
        ValueError: the file as a whole is something else: UTF-16, or one object over many lines.
    """
    group_bytes = group_bytes or rows.group_bytes(path)
    with open(path, "rb") as file:
        start, line = _find_start(file, name)
        file.seek(start)
        first = file.read(1)
        if first == b"[":
            yield from _array_groups(file, path, name, start + 1, line, group_bytes)
        elif first == b"{":
            _check_is_lines(file, path, start, name)
            yield from _line_groups(file, path, name, group_bytes)
        elif first:
            raise ValueError(
                f"{name} is no JSON: expected one object a line, or one array of objects, "
                f"got {first!r} first"
            )


def read_records(group: RecordGroup) -> Iterator[Record | Rejected]:
    """Yield the records of a group in order, or why something is none; blank lines are skipped."""
    file_name = Path(group.name).name
    with open(group.path, "rb") as file:
        spans = _array_spans(file, group) if group.is_array else _line_spans(file, group)
        for k, span in enumerate(spans):
            number = group.first_number + k
            size = span.end - span.start
            raw = os.pread(file.fileno(), min(size, MAX_RECORD_BYTES), span.start)
            raw = raw.removeprefix(_UTF8_MARK) if span.start == 0 else raw
            content = raw.lstrip(_SPACE)
            line = span.line + raw.count(b"\n", 0, len(raw) - len(content))
            where = f"{file_name}:{line}"
            if group.is_array:
                where = f"{file_name}[{number}] (line {line})"
            elif not content:
                continue
            try:
                if size > MAX_RECORD_BYTES:
                    detail = f"{size:,} bytes, more than the {MAX_RECORD_BYTES:,} that are read"
                    raise RowError("record_too_long", detail)
                if not content:
                    raise RowError("bad_json", "nothing stands where an object should")
                yield Record(where, number, parse_row(content.rstrip(_SPACE)))
            except RowError as error:
                yield Rejected(error.reason, f"{where}: {error.detail}")
    if group.problem:
        reason, detail = group.problem
        yield Rejected(reason, f"{file_name}: {detail}")


def _array_groups(
    file: BinaryIO, path: Path, name: str, start: int, line: int, group_bytes: int
) -> Iterator[RecordGroup]:
    cutter = ArrayCutter(start, line)
    file.seek(start)
    first: Span | None = None
    number = first_number = 0
    for span in cutter.cut(_chunks(file)):
        first = first or span
        number += 1
        if span.end - first.start >= group_bytes:
            yield RecordGroup(
                str(path), name, True, first.start, span.end, first.line, first_number
            )
            first, first_number = None, number
    last = cutter.rest()
    problem = _end_problem(file, cutter)
    if number == 0 and problem is None and _is_blank(file, last):
        return  # []
    first = first or last
    yield RecordGroup(
        str(path), name, True, first.start, last.end, first.line, first_number, problem
    )


def _end_problem(file: BinaryIO, cutter: ArrayCutter) -> tuple[str, str] | None:
    if cutter.closing is None:
        return "truncated", "the file ends inside its array: there is no closing ]"
    bracket = os.pread(file.fileno(), 1, cutter.closing)
    if bracket != b"]":
        return "bad_json", "a } where the array should go on or end; nothing after it was read"
    file.seek(cutter.closing + 1)
    if any(chunk.strip(_SPACE) for chunk in _chunks(file)):
        return "trailing_data", "something follows the array's closing ]; it was not read"
    return None


def _line_groups(file: BinaryIO, path: Path, name: str, group_bytes: int) -> Iterator[RecordGroup]:
    file.seek(0)
    start, line = 0, 1
    while True:
        num_lines, is_whole_line = 0, True
        while file.tell() - start < group_bytes or not is_whole_line:
            # To the size wanted, then to the end of the line reached, in pieces.
            missing = group_bytes - (file.tell() - start)
            piece = (
                file.read(min(missing, CHUNK_BYTES)) if missing > 0 else file.readline(CHUNK_BYTES)
            )
            if not piece:
                break
            num_lines += piece.count(b"\n")
            is_whole_line = piece.endswith(b"\n")
        if file.tell() == start:
            return
        yield RecordGroup(str(path), name, False, start, file.tell(), line, line - 1)
        start, line = file.tell(), line + num_lines


def _array_spans(file: BinaryIO, group: RecordGroup) -> Iterator[Span]:
    cutter = ArrayCutter(group.start, group.first_line)
    file.seek(group.start)
    yield from cutter.cut(_chunks(file, group.end))
    yield cutter.rest()


def _line_spans(file: BinaryIO, group: RecordGroup) -> Iterator[Span]:
    file.seek(group.start)
    number = group.first_line
    while (start := file.tell()) < group.end:
        while (piece := file.readline(CHUNK_BYTES)) and not piece.endswith(b"\n"):
            pass
        end = file.tell()
        yield Span(start, end, number)
        file.seek(end)
        number += 1


def _chunks(file: BinaryIO, end: int | None = None) -> Iterator[bytes]:
    while True:
        wanted = CHUNK_BYTES if end is None else min(CHUNK_BYTES, end - file.tell())
        chunk = file.read(wanted)
        if not chunk:
            return
        yield chunk


def _find_start(file: BinaryIO, name: str) -> tuple[int, int]:
    """(offset, line) of the first byte that is neither white space nor a byte order mark."""
    head = file.read(8)
    encoding = byte_order_mark(head)
    if encoding not in ("", "UTF-8"):
        raise ValueError(f"{name} is {encoding}; expected UTF-8: save it as that")
    offset = len(_UTF8_MARK) if encoding else 0
    line = 1
    file.seek(offset)
    for chunk in _chunks(file):
        rest = chunk.lstrip(_SPACE)
        line += chunk.count(b"\n", 0, len(chunk) - len(rest))
        offset += len(chunk) - len(rest)
        if rest:
            break
    return offset, line


def _check_is_lines(file: BinaryIO, path: Path, start: int, name: str) -> None:
    file.seek(start)
    first_line = file.readline(MAX_RECORD_BYTES)
    is_whole = first_line.endswith(b"\n") or len(first_line) < MAX_RECORD_BYTES
    first_line = first_line.strip()
    is_one_object = first_line == b"{"
    if path.suffix.lower() == ".json" and is_whole:
        try:
            parse_row(first_line)
        except RowError as error:
            is_one_object = error.reason == "bad_json"
    if is_one_object:
        raise ValueError(
            f"{name} is one object over many lines; expected one object a line, or one array of "
            "objects. An array inside it is taken out by `jq -c '.KEY[]'`"
        )


def _is_blank(file: BinaryIO, span: Span) -> bool:
    file.seek(span.start)
    return not any(chunk.strip(_SPACE) for chunk in _chunks(file, span.end))
