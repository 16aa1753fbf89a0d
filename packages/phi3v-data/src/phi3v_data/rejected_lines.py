"""What `rejected.jsonl` says about the lines that a shard directory leaves out.

    for rejected in rejected_lines(report, checked_by):
        ...      # {"file": "train.jsonl", "line": 17, "findings": [...], "content": "..."}

A report keeps a bounded number of findings of a rule. Lines beyond are looked at once more, one by
one, by the same rules: no line is left out without its reason.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v_data.block_check import diagnostic, parse
from phi3v_data.diagnostics import Diagnostic, Report
from phi3v_data.image_check import ImageCheck, Level, check_image
from phi3v_data.jsonl import explain, read_lines
from phi3v_data.rules import Context, Line
from phi3v_data.rules.rule import Rule

DUPLICATE_ID = "D101"
NO_SAMPLE = "S101"


@dataclass(frozen=True, slots=True)
class LineRules:
    """What lines were checked by."""

    rules_for: Callable[[str], tuple[Rule, ...]]
    root_of: Callable[[str], Path]
    """File → its image root."""

    level: Level
    allow_missing_answer: bool
    num_crops: int


def rejected_lines(report: Report, checked_by: LineRules) -> Iterator[dict[str, Any]]:
    """Yield every line with an error: where it is, what was found, what stands in it."""
    for file in report.files:
        invalid = report.invalid_lines[file]
        if not len(invalid):
            continue
        of_line: dict[int, list[Diagnostic]] = defaultdict(list)
        of_file: list[Diagnostic] = []
        for found in report.diagnostics:
            if found.file == file:
                if found.line is None:
                    of_file.append(found)
                else:
                    of_line[found.line].append(found)
        for number, content in read_lines(file):
            if number in invalid:
                findings = of_line.get(number, [])
                if not _has_error(findings):
                    findings = _findings(file, number, content, checked_by)
                if not _has_error(findings):  # a cause that all lines with images share
                    findings = [*findings, *(f for f in of_file if f.severity == "error")]
                if not _has_error(findings):
                    findings = [*findings, _across(report, file, number)]
                yield {
                    "file": os.path.basename(file),
                    "line": number,
                    "findings": [_as_dict(found) for found in findings],
                    "content": content.decode("utf-8", "replace"),
                }


def _has_error(findings: Sequence[Diagnostic]) -> bool:
    return any(found.severity == "error" for found in findings)


def _findings(file: str, number: int, content: bytes, by: LineRules) -> list[Diagnostic]:
    sample, error = parse(content)
    rules = by.rules_for(file)
    root = by.root_of(file)
    images: dict[str, ImageCheck] = {}
    if sample is not None and root.is_dir() and any(rule.code.startswith("I") for rule in rules):
        images = {path: check_image(root.absolute(), path, by.level) for path in sample.images}
    context = Context(
        file=file,
        line_number=number,
        image_root=os.fspath(root),
        images=images,
        ids={},
        allow_missing_answer=by.allow_missing_answer,
        num_crops=by.num_crops,
    )
    found: list[Diagnostic] = []
    for rule in rules:
        if rule.subject == "line":
            line = Line(content, number, error)
            found += [diagnostic(rule, f, context, sample) for f in rule.check(line, context)]
        elif rule.subject == "sample" and sample is not None:
            found += [diagnostic(rule, f, context, sample) for f in rule.check(sample, context)]
    if error is not None and not _has_error(found):
        found.append(
            Diagnostic(
                code=NO_SAMPLE,
                severity="error",
                message=f"it is no sample, though no rule that ran says so: {explain(error)}",
                help="let the rules P and S run",
                file=file,
                line=number,
            )
        )
    return found


def _across(report: Report, file: str, number: int) -> Diagnostic:
    """An error that only shows across samples, beyond those that the report keeps."""
    kept = Counter(found.code for found in report.diagnostics)
    codes = [
        code
        for code, severity in report.severities.items()
        if severity == "error" and code.startswith("D") and report.counts.get(code, 0) > kept[code]
    ]
    return Diagnostic(
        code=codes[0] if codes else DUPLICATE_ID,
        severity="error",
        message=f"found across samples ({', '.join(codes)}): an earlier line has the same",
        help="`phi3v-data rules` explains",
        file=file,
        line=number,
    )


def _as_dict(found: Diagnostic) -> dict[str, Any]:
    return {
        "code": found.code,
        "severity": found.severity,
        "message": found.message,
        "help": found.help,
        "pointer": found.pointer,
        "sample_id": found.sample_id,
    }
