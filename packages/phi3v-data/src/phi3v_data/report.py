"""Show what validation found: a `Report` in, one of five formats out.

    text      for people: the line, the place underlined, the way out
    concise   one line a finding, for editors and grep
    json      everything, for programs
    sarif     SARIF 2.1.0, for code hosts and dashboards
    github    workflow commands, shown in pull requests

`Diagnostic`s are data; how they look is decided in the modules `report_*` and nowhere else.
`docs/validation.md` shows each.
"""

from typing import Literal, get_args

from phi3v_data.diagnostics import Report
from phi3v_data.report_json import to_json as to_json
from phi3v_data.report_text import print_text as print_text
from phi3v_data.report_words import count as count
from phi3v_data.report_words import printable as printable

ReportFormat = Literal["text", "concise", "json", "sarif", "github"]
FORMATS: tuple[ReportFormat, ...] = get_args(ReportFormat)


def print_report(report: Report, output_format: ReportFormat) -> None:
    """Print a report on standard output."""
    import click

    if output_format == "text":
        print_text(report)
    elif output_format == "json":
        click.echo(to_json(report))
    elif output_format == "sarif":
        from phi3v_data.report_sarif import to_sarif

        click.echo(to_sarif(report))
    elif output_format == "concise":
        from phi3v_data.report_concise import to_concise

        for line in to_concise(report):
            click.echo(line)
    else:
        from phi3v_data.report_github import to_github

        for line in to_github(report):
            click.echo(line)
