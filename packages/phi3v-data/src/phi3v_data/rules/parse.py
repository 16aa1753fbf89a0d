"""P: a line becomes JSON.

A line has at most one of these problems: the first. Repeated keys are named in JSON that is whole.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from phi3v_data.json_line import (
    MAX_DEPTH,
    JsonProblem,
    ParsedJson,
    num_repeated_keys,
    parse_json,
    shorten,
)
from phi3v_data.jsonl import byte_order_mark as find_byte_order_mark
from phi3v_data.rules.rule import Context, Finding, Line


@dataclass(frozen=True, slots=True)
class UnfinishedLine(Line):
    """The last line of a file, where it has no line break."""


def not_json(line: Line, context: Context) -> Iterator[Finding]:
    """A line is not one JSON object.

    A conversations file is JSON Lines: every line is one complete JSON object. A file that is one
    big JSON list, or pretty-printed over many lines, is not; `jq -c '.[]' list.json` turns a list
    into lines. JSON has no comments, no comma after the last item, no single quotes.
    """
    if line.error is None or _byte_order_mark(line) or _is_cut_off(line):
        return
    parsed = parse(line.content)
    if isinstance(parsed, ParsedJson):
        if not isinstance(parsed.value, dict):
            yield Finding("not a JSON object", "each line is one object: {...}", column=1)
        elif is_no_json(line.error):
            first = errors_of(line.error)[0]
            yield Finding(f"not JSON: {first['msg']}", "one JSON object a line", column=1)
    elif parsed.kind in ("not_json", "cut_off"):
        help = parsed.help or "one JSON object a line"
        if line.number == 1 and line.content.strip() in (b"[", b"{"):
            help = "the file looks pretty-printed: one JSON object a line, e.g. by `jq -c '.[]'`"
        yield Finding(f"not JSON: {parsed.message}", help, column=parsed.start + 1)


def byte_order_mark(line: Line, context: Context) -> Iterator[Finding]:
    r"""The file starts with a byte order mark (BOM).

    Some editors and spreadsheet programs write one. JSON forbids it, and most JSONL readers fail
    on the first line. Save the file as UTF-8 without BOM; `sed -i '1s/^\xEF\xBB\xBF//'` removes
    that of UTF-8, `iconv -f UTF-16 -t UTF-8` converts UTF-16.
    """
    encoding = _byte_order_mark(line)
    if encoding:
        yield Finding(
            f"the file starts with a {encoding} byte order mark",
            "save it as UTF-8 without BOM",
            column=1,
        )


def not_utf8(line: Line, context: Context) -> Iterator[Finding]:
    """A line is not UTF-8.

    JSON is UTF-8. Bytes of another encoding (often Latin-1 or Windows-1252) would change meaning
    from reader to reader. `iconv -f WINDOWS-1252 -t UTF-8` converts.
    """
    for problem in _problem(line, "not_utf8"):
        yield Finding(
            problem.message, "convert the file to UTF-8, e.g. by iconv", column=problem.start + 1
        )


def repeated_key(line: Line, context: Context) -> Iterator[Finding]:
    """An object has the same key twice.

    JSON readers differ in which of the two values they take, and most say nothing: what you see in
    an editor is not what you train on. Leave one, or rename one.
    """
    if not line.content.strip() or (line.error is None and num_repeated_keys(line.content) == 0):
        return
    parsed = parse(line.content)
    if isinstance(parsed, ParsedJson):
        for repeated in parsed.repeated_keys:
            first, again = repeated.first[0] + 1, repeated.again[0] + 1
            yield Finding(
                f"key {shorten(repeated.key)!r} occurs twice: first at column {first}, "
                f"again at {again}",
                "readers differ in which value they take: leave one",
                repeated.pointer,
                again,
            )


def not_finite(line: Line, context: Context) -> Iterator[Finding]:
    """A number is NaN or Infinity.

    JSON has finite numbers only. Python's `json.dumps` writes `NaN` all the same, unless told
    `allow_nan=False`; other readers then refuse the line. Leave the key out, or write `null`.
    """
    for problem in _problem(line, "not_finite"):
        yield Finding(f"not JSON: {problem.message}", problem.help, column=problem.start + 1)


def too_deep(line: Line, context: Context) -> Iterator[Finding]:
    """Objects and lists are nested more than 100 levels deep.

    A sample is four levels deep. Such a line is damaged or hostile: readers that call themselves
    once a level crash on it.
    """
    for problem in _problem(line, "too_deep"):
        yield Finding(f"not JSON: {problem.message}", problem.help, column=problem.start + 1)


def blank_line(line: Line, context: Context) -> Iterator[Finding]:
    """A line is blank, with samples after it.

    Here it is skipped. Other readers of JSON Lines refuse it, or take it for the end. Blank lines
    at the end of a file are fine.
    """
    if not line.content.strip():
        yield Finding("the line is blank", "some readers stop here: remove it")


def cut_off_file(line: Line, context: Context) -> Iterator[Finding]:
    """The last line ends inside of its JSON, without a line break: the file seems cut off.

    A disk was full, a download or a program was interrupted: more than this line may be missing.
    Fetch or write the file again.
    """
    if not _is_cut_off(line):
        return
    problem = parse(line.content)
    assert isinstance(problem, JsonProblem)
    ending = problem.message.removeprefix("the line ends ")
    yield Finding(
        f"the file ends {ending}: it seems cut off",
        "fetch or write it again: more than this line may be missing",
        column=problem.start + 1,
    )


def _is_cut_off(line: Line) -> bool:
    if line.error is None or not isinstance(line, UnfinishedLine):
        return False
    parsed = parse(line.content)
    return isinstance(parsed, JsonProblem) and parsed.kind == "cut_off"


def may_object(line: Line) -> bool:
    """Whether a P rule may have something to say; it has not where this is false."""
    if not line.content.strip() or _byte_order_mark(line):
        return True
    if line.error is None:
        return num_repeated_keys(line.content) > 0
    if is_no_json(line.error):
        return True
    parsed = parse(line.content)
    return (
        isinstance(parsed, JsonProblem)
        or not isinstance(parsed.value, dict)
        or len(parsed.repeated_keys) > 0
    )


def is_no_json(error: ValidationError) -> bool:
    """Whether a line is no sample because it is not even JSON."""
    return errors_of(error)[0]["type"] == "json_invalid"


def is_plainly_not_json(line: Line) -> bool:
    """Whether a line that is no sample has P101 and nothing else, told without reading it closely.

    False does not say that it has not.
    """
    content = line.content
    if line.error is None or line.number == 1 or isinstance(line, UnfinishedLine):
        return False
    if not is_no_json(line.error) or content.count(b"[") + content.count(b"{") > MAX_DEPTH:
        return False
    return content.isascii() and not _NOT_FINITE.search(content) and bool(content.strip())


_NOT_FINITE = re.compile(rb"(?i)nan|inf")


@lru_cache(maxsize=2)
def errors_of(error: ValidationError) -> list[Any]:
    """Pydantic's `errors()`, made once for all rules of a line."""
    return error.errors(include_url=False)


@lru_cache(maxsize=2)  # every rule of a line asks for the same one
def parse(content: bytes) -> ParsedJson | JsonProblem:
    """`parse_json`, once a line."""
    return parse_json(content)


def _problem(line: Line, kind: str) -> Iterator[JsonProblem]:
    if line.error is None or _byte_order_mark(line):
        return
    parsed = parse(line.content)
    if isinstance(parsed, JsonProblem) and parsed.kind == kind:
        yield parsed


def _byte_order_mark(line: Line) -> str:
    return find_byte_order_mark(line.content) if line.number == 1 else ""
