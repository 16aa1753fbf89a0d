"""The words of a report that every format shares."""

import json
import re

from phi3v_data.diagnostics import Report


def printable(text: str) -> str:
    """`text` with control characters spelt out, so that data cannot write to the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_json(value: object) -> str:
    """`value` as JSON that a terminal may show: no control character stands in it as it is."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return re.sub(r"[^ -~\n]", _escape_unprintable, text)


def _escape_unprintable(match: re.Match[str]) -> str:
    return match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1]


def count(number: int, noun: str) -> str:
    """`1 sample`, `1,200 samples`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def summary_parts(report: Report) -> tuple[str, str, str]:
    """(errors, warnings or nothing, the rest) of the last line of a report."""
    errors = count(report.num_errors, "error") if report.num_errors else "no errors"
    warnings = count(report.num_warnings, "warning") if report.num_warnings else ""
    rest = (
        f": {report.num_valid:,} of {count(report.num_lines, 'sample')} valid"
        f" ({count(report.num_images, 'image')} looked at)"
    )
    return errors, warnings, rest


def summary(report: Report) -> str:
    """`2 errors, 1 warning: 10 of 12 samples valid (18 images looked at)`."""
    errors, warnings, rest = summary_parts(report)
    return errors + (f", {warnings}" if warnings else "") + rest
