"""Lines that are written alike, read as columns: a program wrote them, so most are.

    {"id":"a","source":"s","conversations":[{"user":"Who?","assistant":"I"}]}
    {"id":"b","source":"s","conversations":[{"user":"Why?","assistant":"So"}]}

    group = AlikeLines(numbers=[0, 1], shape=…, …)
    group.shape.sample.id                   # "0": the first value
    group.texts(group.shape.sample.id)      # [b"a", b"b"]

One line of a group is decoded: its *shape*. Another has the same shape if it has as many quotes
and the same bytes between its values: then its JSON is that of the first with other strings, valid
where these strings are. That is decided by numpy for all lines of a block at once.

What does not fit (other keys, another order, other numbers in `metadata`) stays with who decodes
line by line; nothing is wrong with it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from phi3v_data.quick_sample import QuickSample, num_keys

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Places = np.ndarray[Any, np.dtype[np.int64]]

MIN_LINES = 24
"""Fewer lines of a shape are faster decoded one by one."""

MAX_MISSES = 2
"""Shapes of fewer lines, until the rest of those with as many quotes is decoded one by one."""

_MANY = 64
"""From here on comparing all bytes of a block is faster than going from one to the next."""

_NONE = np.zeros(0, dtype=np.int64)
_BACKSLASH = ord("\\")

_decode_shape: Callable[[bytes], QuickSample] = msgspec.json.Decoder(QuickSample).decode
_decode_text: Callable[[bytes], str] = msgspec.json.Decoder(str).decode


@dataclass(frozen=True)
class Shape:
    """How a line is written: what stands between its values, and what these are."""

    value_strings: list[int]
    """Of the strings of a line, keys and values, those that are values."""

    segments: list[bytes]
    """Before, between and behind the values, their quotes included."""

    sample: QuickSample
    """The sample, with the number of each value in place of it: `id` is `"0"`."""


@dataclass
class AlikeLines:
    """Lines of one shape."""

    numbers: Places
    """Of the lines in the block, (lines,), ascending."""

    shape: Shape
    content: bytes
    """The block."""

    begins: Places
    """Where each value of each line begins in the block, (lines, values)."""

    stops: Places
    """Where it stops."""

    unescaped: dict[int, dict[int, bytes]]
    """Value → line → its text as UTF-8, where it is written with escapes."""

    _texts: dict[int, list[bytes]] = field(default_factory=dict[int, list[bytes]])

    def texts(self, value: str) -> list[bytes]:
        """A value of all lines, as UTF-8."""
        number = int(value)
        texts = self._texts.get(number)
        if texts is None:
            content = self.content
            texts = [content[begin:stop] for begin, stop in self._spans(number)]
            for row, text in self.unescaped.get(number, {}).items():
                texts[row] = text
            self._texts[number] = texts
        return texts

    def text(self, row: int, value: str) -> bytes:
        """A value of one line."""
        number = int(value)
        raw = self.content[int(self.begins[row, number]) : int(self.stops[row, number])]
        return self.unescaped.get(number, {}).get(row, raw)

    def take(self, rows: Places) -> "AlikeLines":
        """Some of the lines."""
        place = {row: new for new, row in enumerate(rows.tolist())}
        return AlikeLines(
            self.numbers[rows],
            self.shape,
            self.content,
            self.begins[rows],
            self.stops[rows],
            {
                number: {place[row]: text for row, text in of_value.items() if row in place}
                for number, of_value in self.unescaped.items()
            },
        )

    def _spans(self, number: int) -> Iterator[tuple[int, int]]:
        begins, stops = self.begins[:, number].tolist(), self.stops[:, number].tolist()
        return zip(begins, stops, strict=True)


def places_of(byte: bytes, content: bytes, array: Bytes) -> Places:
    """Where a byte is in a block, (places,); fast where it is rare.

    Args:
        byte: one.
        content: the block.
        array: its bytes.
    """
    places: list[int] = []
    place = content.find(byte)
    while place >= 0:
        if len(places) == _MANY:
            return np.flatnonzero(array == byte[0])
        places.append(place)
        place = content.find(byte, place + 1)
    return np.array(places, dtype=np.int64)


def find_alike(
    content: bytes,
    array: Bytes,
    starts: Places,
    ends: Places,
    quotes: Places,
    candidates: Places,
    is_utf8: bool,
) -> tuple[list[AlikeLines], list[int]]:
    """Group lines by their shape.

    Args:
        content: a block of lines.
        array: its bytes.
        starts: where its lines start.
        ends: where they end, line break excluded.
        quotes: where all double quotes are.
        candidates: the lines to group, ascending; none has control characters.
        is_utf8: whether all of the block is valid UTF-8.

    Returns:
        Groups, and the candidates in none of them, ascending. Every line of a group is valid JSON
        of the schema's types.
    """
    has_escapes = b"\\" in content
    backslashes = places_of(b"\\", content, array) if has_escapes else _NONE
    is_hard = np.zeros(len(starts), dtype=bool)
    if has_escapes and len(quotes):
        # A quote behind one backslash is text; behind several, that takes counting.
        is_escaped = array[np.maximum(quotes - 1, 0)] == _BACKSLASH
        escaped = quotes[is_escaped]
        doubtful = escaped[array[np.maximum(escaped - 2, 0)] == _BACKSLASH]
        if len(doubtful):
            is_hard[np.searchsorted(ends, doubtful)] = True
        quotes = quotes[~is_escaped]
    if not is_utf8:
        high = np.flatnonzero(array >= 0x80)
        is_hard[np.unique(np.searchsorted(ends, high))] = True
    first_quote = np.searchsorted(quotes, starts)
    counts = np.diff(first_quote, append=len(quotes))
    is_easy = counts[candidates] > 0
    if has_escapes or not is_utf8:
        is_easy &= ~is_hard[candidates]
    easy = candidates[is_easy]
    groups: list[AlikeLines] = []
    loose: list[int] = candidates[~is_easy].tolist()
    of_count = counts[easy]
    for count in np.flatnonzero(np.bincount(of_count)).tolist():
        rest = easy[of_count == count]
        num_misses = 0
        while len(rest) >= MIN_LINES and count % 2 == 0 and num_misses < MAX_MISSES:
            table = quotes[first_quote[rest][:, None] + np.arange(count)]  # (lines, quotes)
            start, end = int(starts[rest[0]]), int(ends[rest[0]])
            shape = _shape(content, start, end, table[0].tolist())
            if shape is None:
                num_misses += 1
                loose.append(int(rest[0]))
                rest = rest[1:]
                continue
            fits, begins, stops = _fit(content, shape, table, starts[rest], ends[rest])
            found = np.flatnonzero(fits)
            if len(found) < MIN_LINES:
                num_misses += 1
                loose.extend(rest[found].tolist())
            else:
                group = AlikeLines(rest[found], shape, content, begins[found], stops[found], {})
                if has_escapes:
                    group = _unescape(group, backslashes, loose)
                groups.append(group)
            rest = rest[~fits]
        loose.extend(rest.tolist())
    return groups, sorted(loose)


def _shape(content: bytes, start: int, end: int, quotes: list[int]) -> Shape | None:
    """The shape of a line; None if it is not a sample."""
    bounds = [*quotes, end]
    value_strings: list[int] = []
    for number, close in enumerate(bounds[1:-1:2]):
        if content[close + 1 : bounds[2 * number + 2]].lstrip()[:1] != b":":
            value_strings.append(number)
    segments: list[bytes] = []
    position = start
    for number in value_strings:
        segments.append(content[position : quotes[2 * number] + 1])
        position = quotes[2 * number + 1]
    segments.append(content[position:end])
    line = segments[0] + b"".join(b"%d%s" % pair for pair in enumerate(segments[1:]))
    try:
        sample = _decode_shape(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if num_keys(sample) != len(quotes) // 2 - len(value_strings):
        return None  # a key twice
    return Shape(value_strings, segments, sample)


def _fit(
    content: bytes, shape: Shape, table: Places, starts: Places, ends: Places
) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], Places, Places]:
    """Which lines have a shape, and where the values of each line start and end."""
    opening = [2 * number for number in shape.value_strings]
    begins = table[:, opening] + 1
    stops = table[:, [place + 1 for place in opening]]
    lengths = np.array([len(segment) for segment in shape.segments])
    # A segment starts at the closing quote of the value before it.
    segment_starts = np.column_stack([starts, stops])
    fits = (np.column_stack([begins, ends]) - segment_starts == lengths).all(axis=1)
    places = segment_starts if fits.all() else segment_starts[fits]
    same = np.ones(len(places), dtype=bool)
    for number, segment in enumerate(shape.segments):
        size = len(segment)
        windows = np.ndarray(
            (len(content) - size + 1,), dtype=f"S{size}", buffer=content, strides=(1,)
        )
        same &= windows[places[:, number]] == segment
    fits[fits] = same
    return fits, begins, stops


def _unescape(group: AlikeLines, backslashes: Places, loose: list[int]) -> AlikeLines:
    """Put characters for escapes; a line with a faulty one goes to `loose`."""
    is_written = np.searchsorted(backslashes, group.begins) < np.searchsorted(
        backslashes, group.stops
    )
    faulty: set[int] = set()
    content = group.content
    for number in np.flatnonzero(is_written.any(axis=0)).tolist():
        rows = np.flatnonzero(is_written[:, number])
        begins, stops = group.begins[rows, number] - 1, group.stops[rows, number] + 1
        spans = zip(rows.tolist(), begins.tolist(), stops.tolist(), strict=True)
        of_value = group.unescaped[number] = {}
        for row, begin, stop in spans:
            try:
                of_value[row] = _decode_text(content[begin:stop]).encode()
            except (msgspec.DecodeError, UnicodeError):
                faulty.add(row)
    if not faulty:
        return group
    loose.extend(group.numbers[sorted(faulty)].tolist())
    return group.take(
        np.array([row for row in range(len(group.numbers)) if row not in faulty], dtype=np.int64)
    )
