"""Show what validation found: `Report` in, text or JSON out.

    train.jsonl:17: error I101 image 'val/a.jpg' does not exist
        at /conversations/0/images/0 of sample 'val-0000000003'
        help: the image root is images

`Diagnostic`s are data; how they look is decided here and nowhere else.
"""

import json
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from phi3v_data.diagnostics import Diagnostic, Report
from phi3v_data.rules import RULES
from phi3v_data.validate import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

JSON_VERSION = 1
"""Of the JSON below. A key may be added without raising it, never removed or changed."""

_STYLE = {"error": "bold red", "warning": "bold yellow"}


def to_json(report: Report) -> str:
    """The report as one JSON object; keys as the fields of `Report` and `Diagnostic`."""
    return json.dumps(
        {
            "version": JSON_VERSION,
            "files": report.files,
            "num_lines": report.num_lines,
            "num_valid": report.num_valid,
            "num_images": report.num_images,
            "num_errors": report.num_errors,
            "num_warnings": report.num_warnings,
            "rules": report.rules,
            "counts": report.counts,
            "diagnostics": [asdict(diagnostic) for diagnostic in report.diagnostics],
        },
        indent=2,
        ensure_ascii=False,
    )


def print_text(report: Report, console: "Console | None" = None) -> None:
    """Print findings and a summary; coloured on a terminal, unless NO_COLOR is set."""
    from rich.console import Console

    console = console or Console(soft_wrap=True, highlight=False)
    for diagnostic in report.diagnostics:
        console.print(_render(diagnostic))
    shown = Counter(diagnostic.code for diagnostic in report.diagnostics)
    left_out = {code: n - shown[code] for code, n in report.counts.items() if n > shown[code]}
    if left_out:
        parts = ", ".join(f"{n:,} of {code}" for code, n in left_out.items())
        console.print(f"Not shown, counted below: {parts}")
    if report.counts:
        console.print(_summary_table(report))
    console.print(summary_line(report))


def summary_line(report: Report) -> "Text":
    """`2 errors, 1 warning: 10 of 12 samples are valid (18 images looked at)`."""
    from rich.text import Text

    text = Text()
    if report.num_errors:
        text.append(count(report.num_errors, "error"), _STYLE["error"])
    else:
        text.append("no errors", "bold green")
    if report.num_warnings:
        text.append(", ")
        text.append(count(report.num_warnings, "warning"), _STYLE["warning"])
    text.append(f": {report.num_valid:,} of {count(report.num_lines, 'sample')} valid")
    text.append(f" ({count(report.num_images, 'image')} looked at)")
    return text


@contextmanager
def progress_bar(description: str) -> Generator[Progress | None]:
    """A progress bar on the error stream, only if that is a terminal, gone when done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def printable(text: str) -> str:
    """`text` with control characters spelt out, so that data cannot write to the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _render(diagnostic: Diagnostic) -> "Text":
    from rich.text import Text

    place = diagnostic.file
    for number in (diagnostic.line, diagnostic.column):
        if number is not None:
            place += f":{number}"
    text = Text()
    text.append(f"{printable(place)}: ", "bold")
    text.append(f"{diagnostic.severity} {diagnostic.code}", _STYLE[diagnostic.severity])
    text.append(f" {printable(diagnostic.message)}")
    where = [f"at {diagnostic.pointer}"] if diagnostic.pointer else []
    where += [f"of sample {diagnostic.sample_id!r}"] if diagnostic.sample_id else []
    if where:
        text.append(f"\n    {printable(' '.join(where))}", "dim")
    if diagnostic.help:
        text.append("\n    help: ", "cyan")
        text.append(printable(diagnostic.help))
    return text


def _summary_table(report: Report) -> object:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table("code", "severity", "rule", "count", box=SIMPLE)
    table.columns[3].justify = "right"
    for rule in RULES:
        if rule.code in report.counts:
            table.add_row(
                rule.code,
                rule.severity,
                rule.name,
                f"{report.counts[rule.code]:,}",
                style=_STYLE[rule.severity].removeprefix("bold "),
            )
    return table


def count(number: int, noun: str) -> str:
    """`1 sample`, `1,200 samples`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
