"""Which lines of a block need a closer look, decided on bytes and columns, not line by line.

    scan = scan_block(content, max_line_bytes=400_000, …)
    scan.suspects          # [17]: every other line is a sample without a fault of its own
    scan.samples[3].id     # decoded by msgspec

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

LONG_ANSWER_CHARS = 40
"""A shorter answer may well be in its question: a class among classes."""

MetadataValue = str | int | float | bool | None
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Places = np.ndarray[Any, np.dtype[np.int64]]


class QuickTurn(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """`schema.Turn`, for speed."""

    user: str
    images: list[str] | msgspec.UnsetType = msgspec.UNSET
    assistant: str | msgspec.UnsetType | None = msgspec.UNSET
    answers: list[str] | msgspec.UnsetType | None = msgspec.UNSET


class QuickSample(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """`schema.Sample`, for speed."""

    id: str
    source: str
    conversations: list[QuickTurn]
    metadata: dict[str, MetadataValue] | msgspec.UnsetType | None = msgspec.UNSET


@dataclass(frozen=True)
class Scan:
    """What a block holds."""

    lines: list[bytes]
    """Without line breaks; the blank ones are here too."""

    samples: list[QuickSample | None]
    """Of each line; None where it does not decode."""

    suspects: list[int]
    """Places in `lines`, ascending."""


_decode: Callable[[bytes], Any] = msgspec.json.Decoder(QuickSample).decode

_QUOTE, _COLON, _BACKSLASH, _LESS, _BREAK, _ZERO = (ord(c) for c in '":\\<\n0')
_SPACED_KEY = re.compile(rb'"[ \t\r]+:')
_AFTER_LESS = np.frombuffer(b"|su/\\", dtype=np.uint8)
"""What follows in `<|end|>`, `<s>`, `<unk>`, `</s>`, or an escape of these."""
_ODD_ESCAPES = np.frombuffer(b"bfr", dtype=np.uint8)


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
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    array: Bytes = np.frombuffer(content, dtype=np.uint8)
    ends: Places = np.flatnonzero(array == _BREAK)
    if len(ends) < len(lines):
        ends = np.append(ends, len(array))
    suspects = _byte_suspects(array, ends)
    suspects.update(np.flatnonzero(np.diff(ends, prepend=-1) > max_line_bytes).tolist())
    if is_start and lines and lines[0][:1] in (b"\xef", b"\xfe", b"\xff"):
        suspects.add(0)
    if lines and not content.endswith(b"\n"):
        suspects.add(len(lines) - 1)  # perhaps cut off
    samples = _decode_all(lines)
    num_keys, plain = _look_at(samples, allow_missing_answer)
    suspects.update(number for number, is_plain in enumerate(plain) if not is_plain)
    differs = _count_keys(array, ends) != np.array(num_keys, dtype=np.int64)
    suspects.update(np.flatnonzero(differs).tolist())
    suspects.update(n for n in _gaps_after_quotes(array, ends) if _SPACED_KEY.search(lines[n]))
    return Scan(lines, samples, sorted(suspects))


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


def _byte_suspects(array: Bytes, ends: Places) -> set[int]:
    """Lines with bytes that no ordinary text has."""
    is_control = ((array < 32) & (array != _BREAK)) | (array == 127)
    places = np.flatnonzero((array == _LESS) | (array == _BACKSLASH) | (array == 0xC2) | is_control)
    if not len(places):
        return set()
    first = array[places]
    second = array[np.minimum(places + 1, len(array) - 1)]
    is_token = (first == _LESS) & np.isin(second, _AFTER_LESS)
    # An escaped quote, slash or line break is ordinary; backspace, form feed and return are not.
    is_escape = (first == _BACKSLASH) & np.isin(second, _ODD_ESCAPES)
    # \\u00XX may be anything of ASCII; what is beyond, writers of pure ASCII have everywhere.
    third = array[np.minimum(places + 2, len(array) - 1)]
    fourth = array[np.minimum(places + 3, len(array) - 1)]
    is_ascii = (first == _BACKSLASH) & (second == ord("u")) & (third == _ZERO) & (fourth == _ZERO)
    is_c1 = (first == 0xC2) & (second < 0xA0)
    found = is_token | is_escape | is_ascii | is_c1 | is_control[places]
    return set(np.searchsorted(ends, places[found]).tolist())


def _count_keys(array: Bytes, ends: Places) -> Places:
    """Places of `":` in each line: its keys, where nothing is odd about them.

    In a string a quote is escaped: `":` ends a key, or follows a backslash in a text, and its line
    has too many. White space before a colon hides a key: `_gaps_after_quotes` sees to it.
    """
    keys = np.flatnonzero((array[:-1] == _QUOTE) & (array[1:] == _COLON))
    return np.diff(np.searchsorted(keys, ends), prepend=0)


def _gaps_after_quotes(array: Bytes, ends: Places) -> list[int]:
    """Lines with white space after a quote that is not escaped."""
    if len(array) < 3:
        return []
    is_gap = (array[1:-1] == _QUOTE) & (array[2:] <= 32) & (array[:-2] != _BACKSLASH)
    places = np.flatnonzero(is_gap) + 1
    places = places[array[places + 1] != _BREAK]
    return np.unique(np.searchsorted(ends, places)).tolist()


def _look_at(
    samples: list[QuickSample | None], allow_missing_answer: bool
) -> tuple[list[int], list[bool]]:
    """Of each sample: its keys; whether schema and the rules about answers hold without question.

    The first half is for the most common kind of sample, and says what the functions below say.
    """
    unset = msgspec.UNSET
    num_keys: list[int] = []
    plain: list[bool] = []
    for sample in samples:
        if sample is None:
            num_keys.append(-1)
            plain.append(False)
            continue
        turns = sample.conversations
        if len(turns) == 1 and sample.metadata is unset:
            turn = turns[0]
            answer = turn.assistant
            if (
                answer
                and turn.answers is unset
                and len(answer) < LONG_ANSWER_CHARS
                and sample.id
                and sample.source
                and not answer.isspace()
            ):
                num_keys.append(5 if turn.images is unset else 6)
                plain.append(True)
                continue
        num_keys.append(_num_keys(sample))
        plain.append(_is_plain(sample, allow_missing_answer))
    return num_keys, plain


def _num_keys(sample: QuickSample) -> int:
    unset = msgspec.UNSET
    number = 3 + len(sample.conversations)
    for turn in sample.conversations:
        number += (
            (turn.images is not unset) + (turn.assistant is not unset) + (turn.answers is not unset)
        )
    if sample.metadata is not unset:
        number += 1 + (len(sample.metadata) if sample.metadata else 0)
    return number


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
