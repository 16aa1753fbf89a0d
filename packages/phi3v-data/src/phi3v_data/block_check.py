"""Check one block of lines of a file: the rules on suspects, and facts of all lines.

    check_block(Block("train.jsonl", start=0, end=1 << 20), options)
    # BlockResult(num_lines=1748, findings=[(17, Diagnostic(…))], …)

A block is the lines that start in a range of bytes. It knows nothing of other blocks: line numbers
count from its first line, and what concerns several lines goes out as facts, small arrays that
whoever has all blocks puts together (`phi3v_data.rules.across`).
"""

from collections import Counter
from dataclasses import dataclass, field

from pydantic import ValidationError

from phi3v_data.block_facts import BlockFacts, gather
from phi3v_data.diagnostics import Diagnostic
from phi3v_data.quick_scan import scan_block
from phi3v_data.rules.parse import UnfinishedLine
from phi3v_data.rules.rule import Context, Finding, Line, Rule
from phi3v_data.rules.text import LONG_SAMPLE_CHARS
from phi3v_data.schema import Sample


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
    """Findings of one rule kept of a block; the rest is counted."""


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
    subjects: dict[str, Line | Sample | None] = {
        "line": (UnfinishedLine if is_last else Line)(line, context.line_number, error),
        "sample": sample,
    }
    is_valid = sample is not None
    for rule in options.rules:
        subject = subjects[rule.subject]
        if subject is None:
            continue
        for finding in rule.check(subject, context):
            is_valid = is_valid and rule.severity != "error"
            result.counts[rule.code] += 1
            if result.counts[rule.code] <= options.max_per_rule:
                result.findings.append((number, diagnostic(rule, finding, context, sample)))
    if not is_valid:
        result.invalid.append(number)
    return sample


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
    for found in error.errors(include_url=False, include_input=False):
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
