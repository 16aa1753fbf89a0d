"""A report as SARIF 2.1.0, which code hosts, editors and dashboards read.

    {"version": "2.1.0", "runs": [{
      "tool": {"driver": {"name": "phi3v-data", "rules": [{"id": "P104", ...}]}},
      "results": [{"ruleId": "P104", "level": "error", "message": {"text": "key 'id' ..."},
                   "locations": [{"physicalLocation": {
                     "artifactLocation": {"uri": "train.jsonl"},
                     "region": {"startLine": 2, "startColumn": 88, "endColumn": 92}}}], ...}]}]}

Lines and columns count from 1, columns in characters (`columnKind`), ends are excluded, as SARIF
has it.
"""

from pathlib import Path
from typing import Any
from urllib.parse import quote

from phi3v_data.diagnostics import Diagnostic, Label, Report
from phi3v_data.report_source import Spots, read_spots
from phi3v_data.report_words import printable_json
from phi3v_data.rules.rule import Rule

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def to_sarif(report: Report) -> str:
    """The report as a SARIF log of one run."""
    from importlib.metadata import version

    from phi3v_data.rules import all_rules

    known = {rule.code: rule for rule in all_rules()}
    codes = list(dict.fromkeys((*report.rules, *report.counts)))
    index = {code: position for position, code in enumerate(codes)}
    spots = read_spots(report.diagnostics)
    run = {
        "tool": {
            "driver": {
                "name": "phi3v-data",
                "semanticVersion": version("phi3v-data"),
                "rules": [_rule(code, known.get(code), report) for code in codes],
            }
        },
        "columnKind": "unicodeCodePoints",
        "invocations": [{"executionSuccessful": True, "exitCode": report.exit_status}],
        "results": [_result(d, index, spots) for d in report.diagnostics],
        "properties": {
            "numLines": report.num_lines,
            "numValid": report.num_valid,
            "numImages": report.num_images,
            "counts": report.counts,
        },
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return printable_json(log)


def _rule(code: str, rule: Rule | None, report: Report) -> dict[str, Any]:
    level = report.severities.get(code, "error")
    descriptor: dict[str, Any] = {"id": code, "defaultConfiguration": {"level": level}}
    if rule is not None:
        descriptor |= {
            "name": rule.name,
            "shortDescription": {"text": rule.summary},
            "fullDescription": {"text": rule.documentation},
            "help": {"text": rule.documentation, "markdown": rule.documentation},
        }
    return descriptor


def _result(diagnostic: Diagnostic, index: dict[str, int], spots: Spots) -> dict[str, Any]:
    text = diagnostic.message
    if diagnostic.help:
        text += f"\nhelp: {diagnostic.help}"
    result: dict[str, Any] = {
        "ruleId": diagnostic.code,
        "level": diagnostic.severity,
        "message": {"text": text},
        "locations": [{"physicalLocation": _physical(diagnostic, spots)}],
    }
    if diagnostic.code in index:
        result["ruleIndex"] = index[diagnostic.code]
    if diagnostic.labels:
        result["relatedLocations"] = [
            {
                "id": position,
                "message": {"text": label.message},
                "physicalLocation": _physical(label, spots),
            }
            for position, label in enumerate(diagnostic.labels)
        ]
    if diagnostic.num_findings > 1:
        result["occurrenceCount"] = diagnostic.num_findings
    properties = {"pointer": diagnostic.pointer, "sampleId": diagnostic.sample_id}
    properties = {key: value for key, value in properties.items() if value}
    if properties:
        result["properties"] = properties
    return result


def _physical(subject: Diagnostic | Label, spots: Spots) -> dict[str, Any]:
    location: dict[str, Any] = {"artifactLocation": {"uri": _uri(subject.file)}}
    if subject.line is None:
        return location
    region: dict[str, Any] = {"startLine": subject.line}
    spot = spots.of(subject)
    if spot is not None:
        region |= {"startColumn": spot.column, "endColumn": max(spot.end, spot.start) + 1}
        if not spot.is_whole_line:
            start, end = spot.start - spot.text_start, spot.end - spot.text_start
            region["snippet"] = {"text": spot.text[start:end]}
    elif isinstance(subject, Diagnostic) and subject.column is not None:
        region["startColumn"] = subject.column
    return location | {"region": region}


def _uri(file: str) -> str:
    path = Path(file)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())
