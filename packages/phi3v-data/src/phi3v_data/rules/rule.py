"""What a rule is, and what it gets and gives.

def empty_answer(sample: Sample, context: Context) -> Iterator[Finding]:
\"\"\"An answer is empty or white space only. ...\"\"\"
yield Finding("the answer is empty", "leave 'assistant' out ...", "/conversations/0/assistant")

Rule("T101", "error", "sample", empty_answer)
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from phi3v_data.diagnostics import Label, Severity
from phi3v_data.image_check import ImageCheck


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong, before it is known where."""

    message: str
    help: str = ""
    """The way out, if there is one to name."""

    pointer: str = ""
    """JSON pointer into the line; empty: the line as a whole."""

    column: int | None = None
    """Character in the line, from 1, where parsing stopped."""

    labels: tuple[Label, ...] = ()
    """Other places it is about."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a JSONL file, and why it is not a sample."""

    content: bytes
    number: int
    """From 1."""

    error: ValidationError | None
    """None where it parsed as a sample."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a rule may know beside the sample."""

    file: str
    """The JSONL file, as given."""

    line_number: int
    """From 1."""

    image_root: str
    images: Mapping[str, ImageCheck]
    """Every image path of the sample, checked. Empty where no rule about images is selected."""

    ids: Mapping[str, tuple[str, int]]
    """id -> (file, line) of its first use in an earlier line."""

    allow_missing_answer: bool
    num_crops: int


@dataclass(frozen=True, slots=True)
class Rule:
    """A code and the function behind it."""

    code: str
    severity: Severity
    subject: Literal["line", "sample", "dataset"]
    """What the function gets: a `Line` that may have failed to parse, a `Sample`, or the `Facts` of
    all files (`rules.across`)."""

    check: Callable[..., Iterator[Any]]
    """`(subject, context)` to findings; `facts` alone to those across samples."""

    is_default: bool = True
    """Whether it runs unless it is ignored; others run where they are selected."""

    @property
    def name(self) -> str:
        """For people: `missing-image`."""
        return self.check.__name__.replace("_", "-")

    @property
    def summary(self) -> str:
        """The first line of the documentation."""
        return (self.check.__doc__ or "").strip().splitlines()[0]

    @property
    def documentation(self) -> str:
        """The whole documentation, without indentation."""
        import inspect

        return inspect.getdoc(self.check) or ""
