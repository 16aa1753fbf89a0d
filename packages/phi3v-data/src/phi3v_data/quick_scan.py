"""Which lines of a block need a closer look, decided on bytes and columns, not line by line.

    scan = scan_block(content, max_line_bytes=400_000, …)
    scan.suspects          # [17]: every other line is a sample without a fault of its own
    scan.alike             # most lines, as columns of values: `alike_lines`
    scan.loose[3].id       # the others, decoded by msgspec

A line that is no suspect passes every rule that looks at one line: `P`, `S` and `T`. A suspect may
pass too; the rules decide. So this may be wrong in one direction only, and a test holds it to that.

What makes a suspect: msgspec does not decode it to the schema; more keys in its bytes than in what
it decodes to (a key twice: msgspec takes the last); a byte that special tokens, image marks or
escaped control characters need; an answer that is blank, or in its question; a long text; a blank
line, a byte order mark.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from phi3v_data.alike_lines import AlikeLines, find_alike, places_of
from phi3v_data.quick_sample import QuickSample, num_keys

LONG_ANSWER_CHARS = 40
"""A shorter answer may well be in its question: a class among classes."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Places = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class Scan:
    """What a block holds."""

    content: bytes
    starts: Places
    ends: Places
    """Of each line, without its line break. Blank lines are here too."""

    suspects: list[int]
    """Numbers of lines, ascending."""

    alike: list[AlikeLines]
    """Lines that are no suspects, by how they are written."""

    loose: dict[int, QuickSample]
    """The other lines that are no suspects, decoded one by one."""

    def line(self, number: int) -> bytes:
        """A line without its line break."""
        return self.content[int(self.starts[number]) : int(self.ends[number])]


_decode: Callable[[bytes], QuickSample] = msgspec.json.Decoder(QuickSample).decode

_QUOTE, _BACKSLASH, _BREAK, _ZERO = (ord(c) for c in '"\\\n0')
_SPACED_KEY = re.compile(rb'"[ \t\r]+:')
_IS_AFTER_LESS = np.isin(np.arange(256), list(b"|su/\\"))
"""What follows in `<|end|>`, `<s>`, `<unk>`, `</s>`, or an escape of these."""
_IS_ODD_ESCAPE = np.isin(np.arange(256), list(b"bfr"))


def scan_block(
    content: bytes, *, max_line_bytes: int, allow_missing_answer: bool, is_start: bool
) -> Scan:
    """Scan whole lines.

    Args:
        content: lines, each with its line break, except perhaps the last of a file.
        max_line_bytes: a longer line is a suspect.
        allow_missing_answer: the last turn may lack its answer.
        is_start: whether the block begins a file: a byte order mark may be there.
    """
    array: Bytes = np.frombuffer(content, dtype=np.uint8)
    # Looking for places takes longest, so both are looked for at once.
    places: Places = np.flatnonzero((array == _BREAK) | (array == _QUOTE))
    is_quote = array[places] == _QUOTE
    ends, quotes = places[~is_quote], places[is_quote]
    num_breaks = len(ends)
    if content and content[-1] != _BREAK:
        ends = np.append(ends, len(array))
    starts: Places = np.concatenate([_FIRST, ends[:-1] + 1]) if len(ends) else ends
    is_suspect = np.zeros(len(ends), dtype=bool)
    is_suspect[_byte_suspects(content, array, ends, num_breaks)] = True
    lengths = ends - starts
    is_suspect |= (lengths > max_line_bytes) | (lengths == 0)
    if is_start and content[:1] in (b"\xef", b"\xfe", b"\xff"):
        is_suspect[0] = True
    if num_breaks < len(ends):
        is_suspect[-1] = True  # perhaps cut off
    groups, rest = find_alike(
        content, array, starts, ends, quotes, np.flatnonzero(~is_suspect), _is_utf8(content)
    )
    alike: list[AlikeLines] = []
    for group in groups:
        faulty = _faulty_rows(group, array, allow_missing_answer)
        if len(faulty):
            is_suspect[group.numbers[faulty]] = True
            group = group.take(np.delete(np.arange(len(group.numbers)), faulty))
        if len(group.numbers):
            alike.append(group)
    scan = Scan(content, starts, ends, [], alike, {})
    if rest:
        lines = [scan.line(number) for number in rest]
        for number, line, sample in zip(rest, lines, _decode_all(lines), strict=True):
            if (
                sample is not None
                # In a string a quote is escaped: `":` ends a key, or follows a backslash in a
                # text, and its line has too many.
                and num_keys(sample) == line.count(b'":')
                and not _has_spaced_key(line)
                and _is_plain(sample, allow_missing_answer)
            ):
                scan.loose[number] = sample
            else:
                is_suspect[number] = True
    scan.suspects.extend(np.flatnonzero(is_suspect).tolist())
    return scan


_FIRST = np.zeros(1, dtype=np.int64)


def _is_utf8(content: bytes) -> bool:
    if content.isascii():
        return True
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _decode_all(lines: list[bytes]) -> list[QuickSample | None]:
    """A sample of each line; None where it does not decode."""
    samples: list[QuickSample | None] = []
    rest = iter(lines)
    while True:
        try:
            # Where a line does not decode, those before it are in the list, it is out of `rest`.
            samples.extend(map(_decode, rest))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            samples.append(None)
        else:
            return samples


def _byte_suspects(content: bytes, array: Bytes, ends: Places, num_breaks: int) -> Places:
    """Lines with bytes that no ordinary text has."""
    found: list[Places] = []
    is_low = array < 32
    if np.count_nonzero(is_low) > num_breaks:
        found.append(np.flatnonzero(is_low & (array != _BREAK)))
    if b"\x7f" in content:
        found.append(places_of(b"\x7f", content, array))
    if b"<" in content:
        places = places_of(b"<", content, array)
        found.append(places[_IS_AFTER_LESS[_next(array, places, 1)]])
    if b"\\" in content:
        places = places_of(b"\\", content, array)
        second = _next(array, places, 1)
        # An escaped quote, slash or line break is ordinary; backspace, form feed and return are
        # not. \\u00XX may be anything of ASCII; what is beyond, writers of pure ASCII have
        # everywhere.
        is_ascii = (second == ord("u")) & (_next(array, places, 2) == _ZERO)
        is_ascii &= _next(array, places, 3) == _ZERO
        found.append(places[_IS_ODD_ESCAPE[second] | is_ascii])
    if b"\xc2" in content:
        places = places_of(b"\xc2", content, array)
        found.append(places[_next(array, places, 1) < 0xA0])
    if not any(map(len, found)):
        return _NONE
    return np.unique(np.searchsorted(ends, np.concatenate(found)))


_NONE = np.zeros(0, dtype=np.int64)


def _next(array: Bytes, places: Places, number: int) -> Bytes:
    """The byte so many behind each place."""
    return array[np.minimum(places + number, len(array) - 1)]


def _faulty_rows(group: AlikeLines, array: Bytes, allow_missing_answer: bool) -> list[int]:
    """Of lines of one shape: those for which `_is_plain` does not hold."""
    sample = group.shape.sample
    lengths = group.stops - group.begins
    is_faulty = (lengths[:, [int(sample.id), int(sample.source)]] == 0).any(axis=1)
    last = sample.conversations[-1]
    for turn in sample.conversations:
        if not isinstance(turn.assistant, str):
            if turn is not last or not allow_missing_answer or isinstance(turn.answers, list):
                is_faulty[:] = True
            continue
        answer = int(turn.assistant)
        first = array[group.begins[:, answer]]
        # Only these may begin white space: what is no letter of ASCII, or an escape.
        is_doubtful = (first <= 32) | (first > 126) | (first == _BACKSLASH) | (first == _QUOTE)
        for row in np.flatnonzero(is_doubtful | (lengths[:, answer] == 0)).tolist():
            is_faulty[row] |= _is_blank(group.text(row, turn.assistant))
        long = np.flatnonzero(lengths[:, answer] >= LONG_ANSWER_CHARS).tolist()
        if long:
            answers, questions = group.texts(turn.assistant), group.texts(turn.user)
            is_faulty[[row for row in long if answers[row] in questions[row]]] = True
        if isinstance(turn.answers, list):
            if not turn.answers:
                is_faulty[:] = True
                continue
            answers, accepted = group.texts(turn.assistant), map(group.texts, turn.answers)
            for row, (expected, *texts) in enumerate(zip(answers, *accepted, strict=True)):
                is_faulty[row] |= texts[0] != expected or any(map(_is_blank, texts))
    return np.flatnonzero(is_faulty).tolist()


def _is_blank(text: bytes) -> bool:
    return not text.decode().strip()


def _has_spaced_key(line: bytes) -> bool:
    """Whether white space may stand between a key and its colon, which hides it from counting."""
    has_gap = b'" ' in line or b'"\t' in line or b'"\r' in line  # a regex takes ten times as long
    return has_gap and _SPACED_KEY.search(line) is not None


def _is_plain(sample: QuickSample, allow_missing_answer: bool) -> bool:
    """Whether the schema's other demands and the rules about answers hold without question."""
    turns = sample.conversations
    if not (turns and sample.id and sample.source):
        return False
    last = turns[-1]
    for turn in turns:
        answer, answers = turn.assistant, turn.answers
        if isinstance(answer, str):
            if not answer or answer.isspace():
                return False
            if len(answer) >= LONG_ANSWER_CHARS and answer in turn.user:
                return False
        elif turn is not last or not allow_missing_answer:
            return False
        if isinstance(answers, list) and not (
            answers and answers[0] == answer and all(map(str.strip, answers))
        ):
            return False
    return True
