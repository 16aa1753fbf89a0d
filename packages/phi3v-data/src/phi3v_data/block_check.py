"""Check one block of lines of a file: the rules on suspects, and facts of all lines.

    check_block(Block("train.jsonl", start=0, end=1 << 20), options)
    # BlockResult(num_lines=1748, findings=[(17, Diagnostic(…))], …)

A block is the lines that start in a range of bytes. It knows nothing of other blocks: line numbers
count from its first line, and what concerns several lines goes out as facts, small arrays that
whoever has all blocks puts together (`phi3v_data.rules.across`).
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from pydantic import ValidationError

from phi3v_data.block_facts import BlockFacts, gather
from phi3v_data.diagnostics import Diagnostic, Severity
from phi3v_data.json_line import num_repeated_keys
from phi3v_data.quick_scan import scan_block
from phi3v_data.rules import RULES
from phi3v_data.rules.parse import (
    UnfinishedLine,
    errors_of,
    is_no_json,
    is_plainly_not_json,
    may_object,
)
from phi3v_data.rules.rule import Context, Finding, Line, Rule
from phi3v_data.rules.text import LONG_SAMPLE_CHARS
from phi3v_data.schema import Sample

_OUR_CODES = frozenset(rule.code for rule in RULES)


@dataclass(frozen=True)
class Block:
    """The lines that start in a range of bytes of a file."""

    file: str
    start: int
    end: int


@dataclass(frozen=True)
class Options:
    """What holds for all blocks."""

    rules: tuple[Rule, ...]
    """Those about one line: subject `line` or `sample`, but neither images nor ids."""

    allow_missing_answer: bool
    num_crops: int
    takes_images: bool
    """Whether the paths of images are wanted."""

    takes_facts: bool
    """Whether the facts for rules across samples are."""

    has_other_rules: bool
    """Whether there are rules that the quick scan does not stand for."""

    max_per_rule: int
    """Findings of one rule that get words in a process; the rest is counted."""

    run: str
    """Names the validation: what a process has found in it so far."""

    @cached_property
    def severity_of(self) -> dict[str, Severity]:
        """Code of each of `rules` → its severity."""
        return {rule.code: rule.severity for rule in self.rules}

    def rules_without(self, letters: str) -> tuple[Rule, ...]:
        """`rules` without those of ours whose codes begin with one of some letters."""
        rules = self._without.get(letters)
        if rules is None:
            rules = self._without[letters] = tuple(
                rule
                for rule in self.rules
                if rule.code[0] not in letters or rule.code not in _OUR_CODES
            )
        return rules

    @cached_property
    def _without(self) -> dict[str, tuple[Rule, ...]]:
        return {}


@dataclass
class BlockResult:
    """What a block gave. Lines count from 0 in it."""

    num_lines: int
    """All lines, blank ones too."""

    num_filled: int = 0
    """Lines that are not blank."""

    findings: list[tuple[int, Diagnostic]] = field(default_factory=list[tuple[int, Diagnostic]])
    counts: Counter[str] = field(default_factory=Counter[str])

    invalid: list[int] = field(default_factory=list[int])
    """Lines with an error."""

    blanks: list[int] = field(default_factory=list[int])
    """Lines with nothing but white space."""

    facts: BlockFacts = field(default_factory=BlockFacts)

    is_utf16: bool = False
    """The file is: nothing in it is a line."""


def check_block(block: Block, options: Options) -> BlockResult:
    """Check the lines that start in a range of bytes.

    Raises:
        OSError: the file cannot be read.
    """
    content = _read(block)
    is_start = block.start == 0
    scan = scan_block(
        content,
        max_line_bytes=LONG_SAMPLE_CHARS,
        allow_missing_answer=options.allow_missing_answer,
        is_start=is_start,
    )
    num_lines = len(scan.ends)
    result = BlockResult(num_lines, num_lines)
    parsed: dict[int, Sample] = {}
    last = -1 if content.endswith(b"\n") else num_lines - 1
    if options.has_other_rules:
        # What rules of other packages object to, the quick scan cannot know.
        scan.suspects, scan.alike, scan.loose = list(range(num_lines)), [], {}
    for number in scan.suspects:
        line = scan.line(number).rstrip(b"\r\n")
        if not line.strip():
            result.num_filled -= 1
            result.blanks.append(number)
            continue
        sample = _check_line(line, number, number == last, is_start, block.file, options, result)
        if sample is not None:
            parsed[number] = sample
        if number == 0 and is_start and line.startswith((b"\xff\xfe", b"\xfe\xff")):
            result.is_utf16 = True
            return result
    result.facts = gather(
        scan, parsed, takes_facts=options.takes_facts, takes_images=options.takes_images
    )
    return result


def _read(block: Block) -> bytes:
    with open(block.file, "rb") as file:
        if block.start:
            file.seek(block.start - 1)
            if file.read(1) != b"\n":
                file.readline()  # begins in an earlier block
        start = file.tell()
        if start >= block.end:
            return b""
        content = file.read(block.end - start)
        return content if content.endswith(b"\n") else content + file.readline()


def _check_line(
    line: bytes,
    number: int,
    is_last: bool,
    is_start: bool,
    file: str,
    options: Options,
    result: BlockResult,
) -> Sample | None:
    """Run the rules on one line; return its sample, where it is one."""
    sample, error = parse(line)
    context = Context(
        file=file,
        # Only the first line of a file is special; the others are numbered later.
        line_number=number + 1 if is_start else number + 2,
        image_root="",
        images={},
        ids={},
        allow_missing_answer=options.allow_missing_answer,
        num_crops=options.num_crops,
    )
    subject = (UnfinishedLine if is_last else Line)(line, context.line_number, error)
    tally, most = _tally(options.run), options.max_per_rule
    # Where there are enough findings to show, no words are needed: counting is a lot faster.
    if "P101" in options.severity_of and tally["P101"] >= most and is_plainly_not_json(subject):
        result.counts["P101"] += 1
        result.invalid.append(number)
        return None
    is_counted_error = False
    skipped = "" if may_object(subject) else "P"
    if error is None and not skipped and "P104" in options.severity_of and tally["P104"] >= most:
        result.counts["P104"] += num_repeated_keys(line)
        is_counted_error = options.severity_of["P104"] == "error"
        skipped = "P"
    if error is None or is_no_json(error):
        skipped += "S"
    is_valid = sample is not None and not is_counted_error
    for rule in options.rules_without(skipped):
        of_rule = subject if rule.subject == "line" else sample
        if of_rule is None:
            continue
        for finding in rule.check(of_rule, context):
            is_valid = is_valid and rule.severity != "error"
            result.counts[rule.code] += 1
            if tally[rule.code] < most:
                tally[rule.code] += 1
                result.findings.append((number, diagnostic(rule, finding, context, sample)))
    if not is_valid:
        result.invalid.append(number)
    return sample


_tallies: dict[str, Counter[str]] = {}


def _tally(run: str) -> Counter[str]:
    """Of a run: code → findings with words that this process has made.

    A process gets blocks in the order of the files: what comes after so many is never among the
    first so many of all.
    """
    if run not in _tallies:
        _tallies.clear()
        _tallies[run] = Counter()
    return _tallies[run]


def parse(line: bytes) -> tuple[Sample | None, ValidationError | None]:
    """A line as a sample, or why it is none."""
    try:
        return Sample.from_json(line), None
    except ValidationError as error:
        _forget_frames(error)
        return None, error


def _forget_frames(error: ValidationError) -> None:
    """Let go of what the schema's own exceptions hold.

    Their tracebacks hold frames, these hold the error, and pydantic's part of that circle is closed
    to Python's garbage collector: block after block would stay in memory.
    """
    error.__traceback__ = None
    for found in errors_of(error):
        raised: object = found.get("ctx", {}).get("error")
        if isinstance(raised, BaseException):
            raised.__traceback__ = None


def diagnostic(rule: Rule, finding: Finding, context: Context, sample: Sample | None) -> Diagnostic:
    """A finding with its place."""
    return Diagnostic(
        code=rule.code,
        severity=rule.severity,
        message=finding.message,
        help=finding.help,
        file=context.file,
        line=context.line_number,
        column=finding.column,
        pointer=finding.pointer,
        sample_id=sample.id if sample else None,
        labels=finding.labels,
    )
