"""P: a line becomes JSON."""

import re
from collections.abc import Iterator

from phi3v_data.jsonl import byte_order_mark as find_byte_order_mark
from phi3v_data.rules.rule import Context, Finding, Line


def not_json(line: Line, context: Context) -> Iterator[Finding]:
    """A line is not one JSON object.

    A conversations file is JSON Lines: every line is one complete JSON object. A file that is one
    big JSON list, or pretty-printed over many lines, is not; `jq -c '.[]' list.json` turns a list
    into lines. NaN and Infinity are not JSON.
    """
    if line.error is None or _byte_order_mark(line) or _first_bad_byte(line.content) is not None:
        return
    first = line.error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        problem = str(first.get("ctx", {}).get("error", first["msg"]))
        place = re.search(r" at line \d+ column (\d+)$", problem)
        column = None
        if place:
            problem = problem[: place.start()]
            # The parser counts bytes, people count characters.
            column = len(line.content[: int(place[1])].decode("utf-8", "ignore")) or 1
        problem = re.sub(r"^EOF while parsing", "the line ends inside", problem)
        problem = problem.replace("expected ident", "no such value")  # nul, NaN, True
        help = "one JSON object a line"
        if line.number == 1 and line.content.strip() in (b"[", b"{"):
            help = "the file looks pretty-printed: one JSON object a line, e.g. by `jq -c '.[]'`"
        yield Finding(f"not JSON: {problem}", help, column=column)
    elif first["type"] == "model_type" and not first["loc"]:
        yield Finding("not a JSON object", "each line is one object: {...}", column=1)


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
    if line.error is None or _byte_order_mark(line):
        return
    position = _first_bad_byte(line.content)
    if position is not None:
        yield Finding(
            f"not UTF-8: byte 0x{line.content[position]:02X}",
            "convert the file to UTF-8, e.g. by iconv",
            column=len(line.content[:position].decode()) + 1,
        )


def _byte_order_mark(line: Line) -> str:
    return find_byte_order_mark(line.content) if line.number == 1 else ""


def _first_bad_byte(content: bytes) -> int | None:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None
