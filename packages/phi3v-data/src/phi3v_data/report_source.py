"""The lines that a report shows: read once, cut to what stands around the place that is meant.

    spots = read_spots(report.diagnostics)
    spots.of(diagnostic)   # Spot(line=17, start=84, end=96, text='...', ...) or None

Files may have changed since they were checked, or be gone: what is not there any more is None.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from phi3v_data.diagnostics import Diagnostic, Label
from phi3v_data.json_line import find_place
from phi3v_data.json_place import Span, token

MARGIN = 1000
"""Characters kept on each side of a place: more than any terminal shows."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A place in a line, with the text around it. Positions are characters of the line, from 0."""

    line: int
    """From 1."""

    start: int
    end: int
    """Equal to `start` where the place is the end of the line."""

    text: str
    """A piece of the line."""

    text_start: int
    """Where `text` begins in the line."""

    is_cut: bool
    """The line goes on after `text`."""

    is_whole_line: bool
    """The line as a whole is meant, no place in it."""

    @property
    def column(self) -> int:
        """From 1."""
        return self.start + 1


_Key = tuple[str, int, int | None, str]
"""(file, line, column, pointer)"""


class Spots:
    """The places of a report, by what they belong to."""

    def __init__(self, found: dict[_Key, Spot]) -> None:
        self._found = found

    def of(self, subject: Diagnostic | Label) -> Spot | None:
        """The place of a diagnostic or a label; None where there is no such line to show."""
        key = _key(subject)
        return None if key is None else self._found.get(key)

    def position(self, subject: Diagnostic | Label) -> str:
        """`train.jsonl:17:85`, as far as it is known."""
        spot = self.of(subject)
        parts = [subject.file]
        if subject.line is not None:
            parts.append(str(subject.line))
            column = subject.column if isinstance(subject, Diagnostic) else None
            if column is not None:
                parts.append(str(column))
            elif spot is not None:
                parts.append(str(spot.column))
        return ":".join(parts)


def read_spots(diagnostics: Iterable[Diagnostic]) -> Spots:
    """Find the places of `diagnostics` and of their labels; each file is read at most once."""
    by_file: dict[str, dict[int, set[_Key]]] = {}
    for diagnostic in diagnostics:
        for subject in (diagnostic, *diagnostic.labels):
            key = _key(subject)
            if key is not None:
                by_file.setdefault(key[0], {}).setdefault(key[1], set()).add(key)
    found: dict[_Key, Spot] = {}
    for file, by_line in by_file.items():
        last = max(by_line)
        try:
            with open(file, "rb") as lines:
                for number, content in enumerate(lines, start=1):
                    if number in by_line:
                        text = content.rstrip(b"\r\n").decode("utf-8", "replace")
                        for key in by_line[number]:
                            found[key] = _spot(text, *key[1:])
                    if number >= last:
                        break
        except OSError:
            continue  # gone since it was checked: there is nothing to show
    return Spots(found)


def _key(subject: Diagnostic | Label) -> _Key | None:
    if subject.line is None:
        return None
    column = subject.column if isinstance(subject, Diagnostic) else None
    return subject.file, subject.line, column, subject.pointer


def _spot(text: str, line: int, column: int | None, pointer: str) -> Spot:
    start, end = _span(text, column, pointer)
    begin = max(0, start - MARGIN)
    stop = max(min(end, start + MARGIN), start) + MARGIN
    return Spot(
        line=line,
        start=start,
        end=end,
        text=text[begin:stop],
        text_start=begin,
        is_cut=stop < len(text),
        is_whole_line=column is None and not pointer,
    )


def _span(text: str, column: int | None, pointer: str) -> Span:
    if column is not None:
        return token(text, min(column - 1, len(text)))
    place = find_place(text, pointer) if pointer else None
    return place.value if place else (0, len(text))
