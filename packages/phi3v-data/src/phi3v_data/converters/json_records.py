"""Records of JSON Lines, of one big JSON array, or of an array inside an object, however large.

In, any of these, told apart by the first byte and not by the file's name:

    {"id": 1, …}                     [{"id": 1, …}, {"id": 2, …},          {"version": "1.0",
    {"id": 2, …}                      {"id": 3, …}]                         "data": [{"id": 1, …}]}

Out, for a converter, a byte range an item:

    for group in list_record_groups(path, "train.json"):          # one pass, nothing parsed
        yield Item(index, key=group.key, path=group.path, payload=group)

    for row in read_records(item.payload):                        # in another process
        row        # Row(where="train.json[1] (line 1)", fields={"id": 2, …}, number=1)
        row        # or Rejected("bad_json", "train.json[2] (line 2): …")

Arrays of gigabytes are cut at the commas between their elements, by counting brackets outside of
strings; each element is then parsed alone. So what is wrong with one costs no other, unless it
leaves a bracket or a quote open: then where it ends is anyone's guess, and what cannot be told
apart is rejected together. In memory are one chunk, or one record; and, where `id_of` says what no
two records may share, eight bytes for each id met so far. A UTF-8 byte order mark at the start of
the file is passed over.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import msgspec
import numpy as np

from phi3v_data.converters import Rejected, rows
from phi3v_data.converters.rows import Row, RowError, SeenIds, canonical_id, parse_row, show_name
from phi3v_data.jsonl import byte_order_mark

MAX_RECORD_BYTES = 1 << 24
"""A longer record is refused, so that memory stays bounded: 16 MiB hold some embedded pictures."""

CHUNK_BYTES = 1 << 20

MAX_KEY_BYTES = 1 << 12
"""What is looked at of a member before the list in a document, key and all."""

_UTF8_MARK = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_MEMBER = re.compile(rb'\s*("(?:[^"\\]|\\.)*")\s*:\s*(\[)?')

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

    repeated: int = 0
    """Bit k is set where the k-th record has the id of an earlier one of the file."""

    problem: tuple[str, str] | None = None
    """After the last record of a file: (reason, detail) of what is wrong with the file's end."""

    @property
    def key(self) -> str:
        """A stable, unique name for the item made of it."""
        if self.is_array:
            return f"{self.name}[{self.first_number}]"
        return f"{self.name}:{self.first_line}"


class Place(NamedTuple):
    """Where an array's opening bracket is."""

    offset: int
    line: int
    """From 1."""

    key: str = ""
    """The key it is under, in an object that is the whole file; empty where it is the file."""


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
        """The element after the last comma yet: up to the closing bracket, or what was seen."""
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
            span = Span(self._element_start, end, self._element_line)
            self._element_start, self._element_line = end + 1, self._line
            yield span
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
    path: Path,
    name: str,
    *,
    at: Place | None = None,
    id_of: Callable[[bytes], str | None] | None = None,
    group_bytes: int | None = None,
) -> Iterator[RecordGroup]:
    """Yield the records of a file in groups, without parsing them.

    Args:
        path: the file.
        name: what messages call it.
        at: the array to read, as `find_list` says; None takes the whole file, array or lines.
        id_of: what no two records may share, read from a record's bytes (see `id_reader`).
        group_bytes: about how long a group is; None chooses by the file's size.

    Raises:
        ValueError: the file as a whole is something else: UTF-16, or one object over many lines.
    """
    wanted, name = group_bytes or rows.group_bytes(path), show_name(name)
    with open(path, "rb") as file:
        start = at or _find_start(file, name)
        first = os.pread(file.fileno(), 1, start.offset)
        if not first:
            return
        is_array = first == b"[" and not _is_stray_list(file, start.offset)
        groups = _Grouping(file, path, name, is_array, id_of)
        if is_array:
            cutter = ArrayCutter(start.offset + 1, start.line)
            file.seek(start.offset + 1)
            spans = cutter.cut(_chunks(file))
        else:
            cutter = None
            _check_is_lines(file, path, start.offset, name)
            spans = _line_spans(file, 0, os.fstat(file.fileno()).st_size, 1)
        for span in spans:
            groups.add(span)
            if groups.num_bytes >= wanted:
                yield groups.take()
        if cutter is not None:
            last, problem = cutter.rest(), _end_problem(file, cutter, start.key)
            if groups.num_added or problem or not _is_blank(file, last):  # else: []
                groups.add(last)
                yield groups.take(problem)
        elif groups.num_bytes:
            yield groups.take()


def find_list(path: Path, name: str, key: str) -> tuple[Place, dict[str, Any]]:
    """Where the list under `key` of a document is, and what the document says before it.

    A document that is a list is that list, and says nothing.

    Raises:
        ValueError: it is not JSON, or there is no such list.
    """
    header: dict[str, Any] = {}
    name = show_name(name)
    with open(path, "rb") as file:
        start = _find_start(file, name)
        first = os.pread(file.fileno(), 1, start.offset)
        if first == b"[":
            return start, header
        if first != b"{":
            got = f"{first!r} first" if first else "nothing"
            raise ValueError(f"{name} is no JSON: expected an object or a list, got {got}")
        cutter = ArrayCutter(start.offset + 1, start.line)
        file.seek(start.offset + 1)
        members = cutter.cut(_chunks(file))
        while True:
            member = cutter.rest()  # of the next one as yet only its start is known
            head = os.pread(file.fileno(), MAX_KEY_BYTES, member.start)
            match = _MEMBER.match(head)
            if match and match[1] == json.dumps(key).encode() and match[2]:
                offset = match.start(2)
                line = member.line + head.count(b"\n", 0, offset)
                return Place(member.start + offset, line, key), header
            is_last = next(members, None) is None
            end = cutter.rest().end if is_last else cutter.rest().start - 1
            content = os.pread(file.fileno(), min(end - member.start, MAX_KEY_BYTES), member.start)
            try:
                header |= parse_row(b"{" + content + b"}")
            except RowError:
                header[match[1].decode("utf-8", "replace") if match else "?"] = None
            if is_last:
                raise ValueError(
                    f"{name}: expected a list under {key!r}, got the keys "
                    f"{', '.join(header) or 'none'}"
                )


def id_reader(id_key: str, *required: str) -> Callable[[bytes], str | None]:
    """A reader of one record's id that skips the rest: ten times the speed of parsing it.

    It returns None where there is no id, and where the record has no text under one of `required`:
    one that gives no sample takes no id from a later one that does.
    """
    fields = [
        ("id", int | str | None, msgspec.field(name=id_key, default=None)),
        *(
            (f"text_{k}", str | None, msgspec.field(name=key, default=None))
            for k, key in enumerate(required)
        ),
    ]
    decode = msgspec.json.Decoder(msgspec.defstruct("_Id", fields)).decode

    def read(record: bytes) -> str | None:
        try:
            identity, *texts = msgspec.structs.astuple(cast("Any", decode(record)))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            try:  # a number that only Python takes, a text that is none
                row = parse_row(record)
            except RowError:
                return None  # read_records says what is wrong with it
            identity, *texts = (row.get(key) for key in (id_key, *required))
        if not all(isinstance(text, str) and text.strip() for text in texts):
            return None
        return canonical_id(identity)

    return read


def read_records(group: RecordGroup) -> Iterator[Row | Rejected]:
    """Yield the records of a group in order, or why something is none; blank lines are skipped."""
    file_name = Path(group.name).name
    with open(group.path, "rb") as file:
        spans = _array_spans(file, group) if group.is_array else _group_lines(file, group)
        for k, span in enumerate(spans):
            number = group.first_number + k
            size = span.end - span.start
            is_too_long = size > MAX_RECORD_BYTES
            raw = _read(file, span, MAX_KEY_BYTES if is_too_long else size)
            content = raw.lstrip(_SPACE)
            line = span.line + raw.count(b"\n", 0, len(raw) - len(content))
            where = f"{file_name}:{line}"
            if group.is_array:
                where = f"{file_name}[{number}] (line {line})"
            elif not content and not is_too_long:
                continue
            try:
                if is_too_long:
                    detail = f"{size:,} bytes, more than the {MAX_RECORD_BYTES:,} that are read"
                    raise RowError("record_too_long", detail)
                if not content:
                    raise RowError("bad_json", "nothing stands where an object should")
                fields = parse_row(content.rstrip(_SPACE))
                if group.repeated >> k & 1:
                    raise RowError("duplicate_id", "an earlier one has the same id")
                yield Row(where, fields, number)
            except RowError as error:
                yield Rejected(error.reason, f"{where}: {error.detail}")
    if group.problem:
        reason, detail = group.problem
        yield Rejected(reason, f"{file_name}: {detail}")


class _Grouping:
    """Collects records into groups, and looks for ids that were met before."""

    def __init__(
        self,
        file: BinaryIO,
        path: Path,
        name: str,
        is_array: bool,
        id_of: Callable[[bytes], str | None] | None,
    ) -> None:
        self.num_bytes = 0
        """Of the group begun."""
        self.num_added = 0
        """Records so far, in all groups."""

        self._file, self._path, self._name, self._is_array = file, path, name, is_array
        self._id_of = id_of
        self._seen = SeenIds()
        self._ids: list[str | None] = []
        self._first = self._last = Span(0, 0, 0)
        self._first_number = 0

    def add(self, span: Span) -> None:
        if not self.num_bytes:
            self._first, self._first_number = span, self.num_added
        self._last = span
        # An element may be empty, where a comma is too many: it counts, to be named.
        self.num_bytes = span.end - self._first.start + 1
        self.num_added += 1
        if self._id_of:
            is_short = span.end - span.start <= MAX_RECORD_BYTES
            record = _read(self._file, span, span.end - span.start) if is_short else b""
            self._ids.append(self._id_of(record))

    def take(self, problem: tuple[str, str] | None = None) -> RecordGroup:
        repeated = self._seen.add(self._ids) if self._id_of else 0
        self.num_bytes, self._ids = 0, []
        return RecordGroup(
            path=str(self._path),
            name=self._name,
            is_array=self._is_array,
            start=self._first.start,
            end=self._last.end,
            first_line=self._first.line,
            first_number=self._first_number,
            repeated=repeated,
            problem=problem,
        )


def _end_problem(file: BinaryIO, cutter: ArrayCutter, key: str) -> tuple[str, str] | None:
    """What is wrong after the last record; `key` is the one that the array is under, if any."""
    if cutter.closing is None:
        return "truncated", "the file ends inside its array: there is no closing ]"
    bracket = os.pread(file.fileno(), 1, cutter.closing)
    if bracket != b"]":
        return "bad_json", "a } where the array should go on or end; nothing after it was read"
    file.seek(cutter.closing + 1)
    if not key:
        if any(chunk.strip(_SPACE) for chunk in _chunks(file)):
            return "trailing_data", "something follows the array's closing ]; it was not read"
        return None
    rest = file.read(CHUNK_BYTES)
    if not rest.strip(_SPACE):
        return "truncated", f"the file ends after the list under {key!r}: there is no closing }}"
    try:
        parse_row(b"{%s: 0%s" % (json.dumps(key).encode(), rest.rstrip(_SPACE)))
    except RowError as error:
        return error.reason, f"after the list under {key!r}: {error.detail}"
    return None


def _line_spans(file: BinaryIO, start: int, end: int, line: int) -> Iterator[Span]:
    file.seek(start)
    while start < end:
        while (piece := file.readline(CHUNK_BYTES)) and not piece.endswith(b"\n"):
            pass
        yield Span(start, file.tell(), line)
        start, line = file.tell(), line + 1


def _group_lines(file: BinaryIO, group: RecordGroup) -> Iterator[Span]:
    yield from _line_spans(file, group.start, group.end, group.first_line)


def _array_spans(file: BinaryIO, group: RecordGroup) -> Iterator[Span]:
    cutter = ArrayCutter(group.start, group.first_line)
    file.seek(group.start)
    yield from cutter.cut(_chunks(file, group.end))
    yield cutter.rest()


def _read(file: BinaryIO, span: Span, size: int) -> bytes:
    raw = os.pread(file.fileno(), size, span.start)
    return raw.removeprefix(_UTF8_MARK) if span.start == 0 else raw


def _chunks(file: BinaryIO, end: int | None = None) -> Iterator[bytes]:
    while True:
        wanted = CHUNK_BYTES if end is None else min(CHUNK_BYTES, end - file.tell())
        chunk = file.read(wanted)
        if not chunk:
            return
        yield chunk


def _find_start(file: BinaryIO, name: str) -> Place:
    """The first byte that is neither white space nor a byte order mark."""
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
    return Place(offset, line)


def _check_is_lines(file: BinaryIO, path: Path, start: int, name: str) -> None:
    """Refuse what is no JSON Lines at all; one bad line among good ones is another matter."""
    file.seek(start)
    first = file.readline(MAX_RECORD_BYTES).strip(_SPACE)
    if _is_object(first) or _is_object(second := file.readline(MAX_RECORD_BYTES).strip(_SPACE)):
        return
    if not first.startswith(b"{"):
        more = file.read(CHUNK_BYTES).splitlines()
        if not any(line.startswith(b"{") for line in (second, *more)):
            raise ValueError(
                f"{name} is no JSON: expected one object a line, or one array of objects, "
                f"got {first[:1]!r} first"
            )
    elif first == b"{" or (path.suffix.lower() == ".json" and len(first) < MAX_RECORD_BYTES):
        raise ValueError(
            f"{name} is one object over many lines; expected one object a line, or one array of "
            "objects. An array inside it is taken out by `jq -c '.KEY[]'`"
        )


def _is_stray_list(file: BinaryIO, start: int) -> bool:
    """Whether the array at `start` is one bad line before lines that are objects."""
    file.seek(start)
    first = file.readline(CHUNK_BYTES).rstrip(_SPACE)
    is_stray = first.endswith(b"]") and b"{" not in first
    return is_stray and _is_object(file.readline(MAX_RECORD_BYTES).strip(_SPACE))


def _is_object(line: bytes) -> bool:
    try:
        parse_row(line)
    except RowError as error:
        return error.reason not in ("bad_json", "not_object")
    return True


def _is_blank(file: BinaryIO, span: Span) -> bool:
    file.seek(span.start)
    return not any(chunk.strip(_SPACE) for chunk in _chunks(file, span.end))
