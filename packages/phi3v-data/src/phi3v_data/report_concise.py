"""A report of one line a finding, for editors and `grep`.

train.jsonl:2:88: P104 key 'id' occurs twice: first at column 2, again at 88
1 error: 1 of 2 samples valid (0 images looked at)
"""

from collections.abc import Iterator

from phi3v_data.diagnostics import Report
from phi3v_data.report_source import read_spots
from phi3v_data.report_words import printable, summary


def to_concise(report: Report) -> Iterator[str]:
    """The lines of a report: `file:line:column: code message`, and a summary."""
    spots = read_spots(report.diagnostics)
    for diagnostic in report.diagnostics:
        place = spots.position(diagnostic)
        yield printable(f"{place}: {diagnostic.code} {diagnostic.message}")
    yield summary(report)
