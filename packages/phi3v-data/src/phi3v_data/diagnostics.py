"""What validation says, as data: how it looks is decided in `phi3v_data.report`.

Diagnostic(code="I101", severity="error", message="image 'val/a.jpg' does not exist",
file="train.jsonl", line=17, pointer="/conversations/0/images/0", ...)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from phi3v_data.line_set import LineSet

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Label:
    """Another place that a diagnostic is about: "first used here"."""

    message: str
    file: str

    line: int | None
    """From 1; None where the file as a whole is meant."""

    pointer: str = ""
    """JSON pointer into the line."""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One thing wrong."""

    code: str
    severity: Severity
    message: str
    help: str
    """The way out; may be empty."""

    file: str
    """The JSONL file, as given."""

    line: int | None
    """From 1; None where the file as a whole is meant."""

    column: int | None = None
    """Character in the line, from 1, for parse errors."""

    pointer: str = ""
    """JSON pointer into the line, for all others."""

    sample_id: str | None = None

    labels: tuple[Label, ...] = ()
    """Other places it is about."""

    num_findings: int = 1
    """How many findings this one stands for, where one cause hits many lines."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found."""

    files: tuple[str, ...]
    num_lines: int
    """Lines that are not blank."""

    num_valid: int
    """Samples without an error."""

    num_images: int
    """Distinct images looked at."""

    counts: dict[str, int]
    """Findings by code, all of them, in the order of `RULES`."""

    diagnostics: tuple[Diagnostic, ...]
    """In order of file and line; at most `MAX_PER_RULE` of each code."""

    rules: tuple[str, ...] = field(default=())
    """Codes of the rules that ran."""

    is_complete: bool = True
    """False where it stopped at so many errors: what comes after is not looked at."""

    severities: dict[str, Severity] = field(default_factory=dict[str, Severity])
    """Code of each rule that ran → its severity in this run."""

    invalid_lines: Mapping[str, LineSet] = field(default_factory=dict[str, LineSet])
    """File → numbers of its lines with an error."""

    image_hashes: Mapping[str, Mapping[str, int]] = field(
        default_factory=dict[str, Mapping[str, int]], repr=False
    )
    """Image root → path → xxh3 of the content; 0 where it was not read as a whole."""

    counts_by_file: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    """File → code → findings, all of them; empty where they were not counted by file."""

    cache_problem: str = ""
    """Why nothing is remembered of images for the next run; empty where it is."""

    @property
    def num_errors(self) -> int:
        """Findings of severity error."""
        return sum(n for code, n in self.counts.items() if self.severities[code] == "error")

    @property
    def num_warnings(self) -> int:
        """Findings of severity warning."""
        return sum(n for code, n in self.counts.items() if self.severities[code] == "warning")

    @property
    def exit_status(self) -> int:
        """0 without errors, else 1."""
        return 1 if self.num_errors else 0
