"""A report as workflow commands: GitHub shows each finding at its line of a pull request.

::error file=train.jsonl,line=2,endLine=2,col=88,endColumn=92,title=P104 repeated-key::key 'id' ...

Texts are escaped as GitHub's own toolkit does it, so that no data can start a command of its own.
"""

from collections.abc import Iterator

from phi3v_data.diagnostics import Report
from phi3v_data.report_source import read_spots
from phi3v_data.report_words import printable, summary


def to_github(report: Report) -> Iterator[str]:
    """The lines of a report: one command a finding, and a summary."""
    from phi3v_data.rules import all_rules

    names = {rule.code: rule.name for rule in all_rules()}
    spots = read_spots(report.diagnostics)
    for diagnostic in report.diagnostics:
        properties = {"file": diagnostic.file}
        if diagnostic.line is not None:
            properties |= {"line": str(diagnostic.line), "endLine": str(diagnostic.line)}
        spot = spots.of(diagnostic)
        if spot is not None:
            properties |= {"col": str(spot.column), "endColumn": str(max(spot.end, spot.start + 1))}
        elif diagnostic.column is not None:
            properties["col"] = str(diagnostic.column)
        properties["title"] = f"{diagnostic.code} {names.get(diagnostic.code, '')}".strip()
        lines = [diagnostic.message]
        if diagnostic.help:
            lines.append(f"help: {diagnostic.help}")
        lines += [f"{label.message}: {spots.position(label)}" for label in diagnostic.labels]
        message = "\n".join(map(printable, lines))
        given = ",".join(f"{key}={_property(value)}" for key, value in properties.items())
        yield f"::{diagnostic.severity} {given}::{_data(message)}"
    yield summary(report)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(printable(text)).replace(":", "%3A").replace(",", "%2C")
