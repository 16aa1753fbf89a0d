"""A report as one JSON object: its keys are the fields of `Report` and `Diagnostic`."""

from dataclasses import asdict

from phi3v_data.diagnostics import Report
from phi3v_data.report_words import printable_json

JSON_VERSION = 1
"""A key may be added without raising it, never removed or changed."""


def to_json(report: Report) -> str:
    """The report as one JSON object."""
    return printable_json(
        {
            "version": JSON_VERSION,
            "files": report.files,
            "num_lines": report.num_lines,
            "num_valid": report.num_valid,
            "num_images": report.num_images,
            "num_errors": report.num_errors,
            "num_warnings": report.num_warnings,
            "is_complete": report.is_complete,
            "rules": report.rules,
            "severities": report.severities,
            "counts": report.counts,
            "counts_by_file": report.counts_by_file,
            "diagnostics": [asdict(diagnostic) for diagnostic in report.diagnostics],
        }
    )
