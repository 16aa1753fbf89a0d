"""A report for people: each finding with its line, the place underlined, and the way out.

    train.jsonl:2:88: error P104 key 'id' occurs twice: first at column 2, again at 88
      |
    2 | …user": "What?", "assistant": "Red"}], "id": "b"}
      |                                        ^^^^
      = at: /id
      = help: readers differ in which value they take: leave one

Lines are cut to the width of the terminal around the place; characters that a terminal would obey
are spelt out. A trait that many images of a file have (`rules.images.TRAITS`) is one finding, which
counts the others and says the lines of some:

    train.jsonl:1:60: warning I114 image 'a.png' has transparency
      ...
      = note: and 4,999 more of I114 in this file: lines 2, 3, 4, 5, 6, …
"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3v_data.diagnostics import Diagnostic, Report
from phi3v_data.report_source import Spot, Spots, read_spots
from phi3v_data.report_words import printable, summary_parts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

STYLE = {"error": "bold red", "warning": "bold yellow"}
GUTTER = "blue"
NOTE = "cyan"
LEAST_WIDTH = 20
"""Columns of a line's text, however narrow the terminal."""

MOST_ALIKE = 3
"""Findings of one trait in a file that are shown one by one."""

LINES_ALIKE = 8
"""Lines that are named of the others."""

MOST_OF_A_CONTAINER = 40
"""Characters: a longer object or list is marked by its first bracket alone."""


def print_text(report: Report, console: "Console | None" = None) -> None:
    """Print findings and a summary; coloured on a terminal, unless NO_COLOR is set."""
    console = console or make_console()
    entries = _group(report)
    spots = read_spots([entry.first for entry in entries])
    for entry in entries:
        console.print(_render(entry, spots, console.width), end="\n\n")
    if entries:
        _print_left_out(report, entries, console)
    if report.counts:
        console.print(_summary_table(report))
    console.print(summary_line(report))


def make_console() -> "Console":
    """Standard output, coloured if it is a terminal or FORCE_COLOR is set; NO_COLOR wins."""
    import os

    from rich.console import Console

    if os.environ.get("NO_COLOR"):
        # rich would leave out the colours only and keep bold.
        return Console(soft_wrap=True, highlight=False, color_system=None, force_terminal=False)
    return Console(soft_wrap=True, highlight=False)


def summary_line(report: Report) -> "Text":
    """`2 errors, 1 warning: 10 of 12 samples are valid (18 images looked at)`."""
    from rich.text import Text

    errors, warnings, rest = summary_parts(report)
    text = Text()
    text.append(errors, STYLE["error"] if report.num_errors else "bold green")
    if warnings:
        text.append(", ")
        text.append(warnings, STYLE["warning"])
    text.append(rest)
    return text


@dataclass(frozen=True, slots=True)
class _Entry:
    """A finding that is shown."""

    first: Diagnostic
    num_more: int = 0
    """Findings of the same trait in the same file that it stands for."""

    more_lines: tuple[int, ...] = ()
    """Lines of some of them."""


def _group(report: Report) -> list[_Entry]:
    """What is shown: a trait that many images of a file have is one entry."""
    from phi3v_data.rules.images import TRAITS

    alike: dict[tuple[str, str], list[Diagnostic]] = {}
    for diagnostic in report.diagnostics:
        if diagnostic.code in TRAITS and diagnostic.severity == "warning":
            alike.setdefault((diagnostic.file, diagnostic.code), []).append(diagnostic)
    entries: list[_Entry] = []
    for diagnostic in report.diagnostics:
        kept = alike.get((diagnostic.file, diagnostic.code), [])
        counts = report.counts_by_file.get(diagnostic.file, {})
        number = counts.get(diagnostic.code, len(kept))
        if number <= MOST_ALIKE or not kept:
            entries.append(_Entry(diagnostic))
        elif diagnostic is kept[0]:
            lines = dict.fromkeys(other.line for other in kept[1:] if other.line is not None)
            entries.append(_Entry(diagnostic, number - 1, tuple(lines)[:LINES_ALIKE]))
    return entries


@dataclass(frozen=True, slots=True)
class _Mark:
    """A place to show, and how it is underlined."""

    file: str
    position: str
    """`train.jsonl:12:8`."""

    spot: Spot
    message: str
    style: str
    character: str


def _render(entry: _Entry, spots: Spots, width: int) -> "Text":
    from rich.text import Text

    diagnostic = entry.first
    style = STYLE[diagnostic.severity]
    text = Text()
    text.append(f"{printable(spots.position(diagnostic))}: ", "bold")
    text.append(f"{diagnostic.severity} {diagnostic.code}", style)
    text.append(f" {printable(diagnostic.message)}")

    marks: list[_Mark] = []
    notes: list[tuple[str, str]] = []
    spot = spots.of(diagnostic)
    if spot is not None:
        marks.append(_Mark(diagnostic.file, "", spot, "", style, "^"))
    for label in diagnostic.labels:
        label_spot, position = spots.of(label), spots.position(label)
        if label_spot is None or spot is None:
            notes.append(("note", f"{label.message}: {position}"))
        else:
            marks.append(_Mark(label.file, position, label_spot, label.message, GUTTER, "-"))
    where = [diagnostic.pointer] if diagnostic.pointer else []
    where += [f"sample {diagnostic.sample_id!r}"] if diagnostic.sample_id else []
    if where:
        notes.append(("at", " of ".join(where)))
    if diagnostic.num_findings > 1:
        notes.append(("note", f"one of {diagnostic.num_findings:,} findings with the same cause"))
    if entry.num_more:
        more = f"and {entry.num_more:,} more of {diagnostic.code} in this file"
        if entry.more_lines:
            more += f": lines {', '.join(map(str, entry.more_lines))}"
            more += ", …" if entry.num_more > len(entry.more_lines) else ""
        notes.append(("note", more))
    if diagnostic.help:
        notes.append(("help", diagnostic.help))

    gutter = max((len(str(mark.spot.line)) for mark in marks), default=1)
    if marks:
        text.append(f"\n{' ' * gutter} |", GUTTER)
        _append_marks(text, marks, diagnostic.file, gutter, max(width - gutter - 3, LEAST_WIDTH))
    for name, note in notes:
        text.append(f"\n{' ' * gutter} = ", GUTTER)
        text.append(f"{name}: ", NOTE)
        text.append(printable(note))
    return text


def _append_marks(text: "Text", marks: list[_Mark], file: str, gutter: int, width: int) -> None:
    """The lines of `marks`, those of `file` first, in their order."""
    marks = sorted(marks, key=lambda m: (m.file != file, m.file, m.spot.line, m.character != "^"))
    shown_file, previous, shown = file, 0, None
    for mark in marks:
        if mark.file != shown_file:
            text.append(f"\n{' ' * gutter} ::: {printable(mark.position)}", GUTTER)
            shown_file, previous, shown = mark.file, 0, None
        elif previous and mark.spot.line > previous + 1:
            text.append("\n...", GUTTER)
        window = shown if shown and mark.spot.line == previous else None
        if window is None or not window.shows(mark.spot):
            window = _Window.around(mark.spot, width)
            text.append(f"\n{mark.spot.line:>{gutter}} | ", GUTTER)
            text.append(window.text)
        if not mark.spot.is_whole_line:
            indent, length = window.underline(mark.spot)
            text.append(f"\n{' ' * gutter} | ", GUTTER)
            text.append(" " * indent + mark.character * length, mark.style)
            if mark.message:
                text.append(f" {printable(mark.message)}", mark.style)
        shown, previous = window, mark.spot.line


@dataclass(frozen=True, slots=True)
class _Window:
    """The part of a line that fits the terminal."""

    text: str
    """As shown, with an ellipsis where it is cut."""

    begin: int
    """Characters of the line, from 0."""

    end: int
    columns: tuple[int, ...]
    """Terminal column at which each character from `begin` to and with `end` starts."""

    @classmethod
    def around(cls, spot: Spot, width: int) -> "_Window":
        from rich.cells import cell_len

        shown = [printable(character) for character in spot.text]
        cells = [cell_len(character) for character in shown]
        start = min(spot.start - spot.text_start, len(shown))
        room = width - (1 if spot.text_start else 0) - (1 if spot.is_cut else 0)
        begin, end = 0, len(shown)
        if sum(cells) > room:
            room = width - 2
            begin = start
            used = 0
            while begin > 0 and used + cells[begin - 1] <= room // 2:
                begin -= 1
                used += cells[begin]
            end = start
            while end < len(shown) and used + cells[end] <= room:
                used += cells[end]
                end += 1
            while begin > 0 and used + cells[begin - 1] <= room:
                begin -= 1
                used += cells[begin]
        before = "…" if begin or spot.text_start else ""
        after = "…" if end < len(shown) or spot.is_cut else ""
        columns = [len(before)]
        for width_of_one in cells[begin:end]:
            columns.append(columns[-1] + width_of_one)
        return cls(
            before + "".join(shown[begin:end]) + after,
            spot.text_start + begin,
            spot.text_start + end,
            tuple(columns),
        )

    def shows(self, spot: Spot) -> bool:
        return self.begin <= spot.start and spot.end <= self.end

    def underline(self, spot: Spot) -> tuple[int, int]:
        """(column, length) of the line under `spot`."""
        start = self.columns[min(spot.start, self.end) - self.begin]
        end = spot.end
        is_container = spot.text[spot.start - spot.text_start :][:1] in ("{", "[")
        if is_container and end - spot.start > MOST_OF_A_CONTAINER:
            end = spot.start + 1
        stop = self.columns[max(min(end, self.end), self.begin) - self.begin]
        return start, max(stop - start, 1)


def _print_left_out(report: Report, entries: list[_Entry], console: "Console") -> None:
    shown: Counter[str] = Counter()
    for entry in entries:
        shown[entry.first.code] += 1 + entry.num_more
    left_out = {code: n - shown[code] for code, n in report.counts.items() if n > shown[code]}
    if left_out:
        parts = ", ".join(f"{n:,} of {code}" for code, n in left_out.items())
        console.print(f"Not shown, counted below: {parts}")


def _summary_table(report: Report) -> object:
    from rich.box import SIMPLE
    from rich.table import Table

    from phi3v_data.rules import all_rules

    names = {rule.code: rule.name for rule in all_rules()}
    table = Table("code", "severity", "rule", "count", box=SIMPLE)
    table.columns[3].justify = "right"
    for code, number in report.counts.items():
        severity = report.severities[code]
        table.add_row(
            code,
            severity,
            names.get(code, ""),
            f"{number:,}",
            style=STYLE[severity].removeprefix("bold "),
        )
    return table
