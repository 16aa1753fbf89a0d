"""S: JSON becomes a sample.

pydantic finds what is wrong with a line; here each of its errors gets a code, a pointer and words.
"""

import difflib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

from pydantic import ValidationError

from phi3v_data.json_line import ParsedJson, json_pointer, shorten
from phi3v_data.json_place import key_span
from phi3v_data.rules.parse import errors_of, is_no_json, parse
from phi3v_data.rules.rule import Context, Finding, Line
from phi3v_data.schema import Sample, Turn

Place = tuple[int | str, ...]


def schema(line: Line, context: Context) -> Iterator[Finding]:
    """A line is JSON, but not a sample, in a way that no other S rule names.

    `phi3v-data schema` prints the JSON Schema.
    """
    yield from _findings(line, "S101")


def missing_key(line: Line, context: Context) -> Iterator[Finding]:
    """A key that every sample or turn has is missing.

    A sample has `id`, `source` and `conversations`, each turn has `user`.
    """
    yield from _findings(line, "S102")


def unknown_key(line: Line, context: Context) -> Iterator[Finding]:
    """A key is not one of a sample or a turn.

    Mostly a slip of the pen, and what stood under it would silently be left out. Keys of your own
    belong into `metadata`, a flat object that is carried along.
    """
    yield from _findings(line, "S103")


def wrong_type(line: Line, context: Context) -> Iterator[Finding]:
    """A value is of the wrong type.

    Nothing is converted: the number 3 is no text, and `null` is no empty list.
    """
    yield from _findings(line, "S104")


def empty_value(line: Line, context: Context) -> Iterator[Finding]:
    """A conversation has no turns, or an id or a source is empty.

    There would be nothing to learn, or no name to say it about.
    """
    yield from _findings(line, "S105")


def unanswered_turn(line: Line, context: Context) -> Iterator[Finding]:
    """A turn before the last has no answer.

    The next question builds on it. Only the last turn may lack its `assistant`, in test splits
    (T104).
    """
    yield from _findings(line, "S106")


def images_not_a_list(line: Line, context: Context) -> Iterator[Finding]:
    """The images of a turn are not a list of paths.

    Also a single image is a list: `"images": ["a.jpg"]`. A turn without images has `[]`, or no
    such key.
    """
    yield from _findings(line, "S107")


def metadata_not_flat(line: Line, context: Context) -> Iterator[Finding]:
    """A value of `metadata` is a list, an object, or a number that is not finite.

    Metadata becomes a column of flat values in shards. Write `"box_x": 1, "box_y": 2` in place of
    `"box": [1, 2]`, or the list as a string.
    """
    yield from _findings(line, "S108")


def answers_differ(line: Line, context: Context) -> Iterator[Finding]:
    """The `answers` of a turn are empty, or do not start with its `assistant`.

    `answers` lists all that are right, and `assistant` is the first of them. Where there is one
    answer only, leave `answers` out.
    """
    yield from _findings(line, "S109")


def _findings(line: Line, code: str) -> Iterator[Finding]:
    if line.error is not None:
        for of, finding in _all_findings(line.content, line.error):
            if of == code:
                yield finding


@lru_cache(maxsize=2)  # nine rules ask for the same line
def _all_findings(content: bytes, problem: ValidationError) -> tuple[tuple[str, Finding], ...]:
    """(code, finding) of everything that keeps a line of JSON from being a sample."""
    if is_no_json(problem):
        return ()  # P101 says so
    errors = errors_of(problem)
    parsed = parse(content)
    value = parsed.value if isinstance(parsed, ParsedJson) else None
    if not isinstance(value, dict):
        return ()  # a P rule says so
    sample = cast("dict[str, Any]", value)
    found: dict[str, tuple[str, Finding]] = {}
    for error in errors:
        place = error["loc"]
        if error["type"] == "too_short" and error["input"]:
            continue  # pydantic counts the good items only; what is wrong with the others follows
        if error["type"] == "value_error" and not place:
            continue  # the answers of all turns: below, each in its place
        if place[:1] == ("metadata",) and len(place) > 1:
            place = place[:2]  # one error per member of the union of types: say it once
        pointer = json_pointer(place)
        if pointer not in found:
            code, message, help = _explain(cast("dict[str, Any]", error), place)
            column = _column_of_key(content, pointer, str(place[-1])) if code == "S103" else None
            found[pointer] = code, Finding(message, help, pointer, column)
    for position in _unanswered(sample):
        pointer = json_pointer(("conversations", position))
        finding = Finding(
            f"conversations[{position}] has no assistant: only the last turn may lack one",
            "answer it, or leave the turn out",
            pointer,
        )
        found.setdefault(pointer + "/assistant", ("S106", finding))
    if not found:
        found[""] = "S101", Finding(errors[0]["msg"].removeprefix("Value error, "))
    return tuple(found.values())


def _column_of_key(content: bytes, pointer: str, key: str) -> int | None:
    """Where a key stands, from 1."""
    written = f'"{key}"'.encode("utf-8", "surrogatepass")
    if b"\\" not in content and content.count(written) == 1:
        return len(content[: content.index(written)].decode("utf-8", "replace")) + 1
    span = key_span(content, pointer)
    return span[0] + 1 if span else None


def _unanswered(sample: dict[str, Any]) -> Iterator[int]:
    turns = sample.get("conversations")
    if isinstance(turns, list):
        for position, turn in enumerate(cast("list[Any]", turns)[:-1]):
            if isinstance(turn, dict) and cast("dict[str, Any]", turn).get("assistant") is None:
                yield position


def _explain(error: dict[str, Any], place: Place) -> tuple[str, str, str]:
    """(code, message, help) of one pydantic error."""
    kind, got = error["type"], error.get("input")
    name = place[-1] if place else ""
    record = Turn if place[:1] == ("conversations",) and len(place) > 2 else Sample
    label, shown = _label(place), _json_type(got)
    if place[:1] == ("metadata",) and len(place) > 1:
        return (
            "S108",
            f"{label}: metadata holds strings, finite numbers, booleans and null only, got {shown}",
            "metadata is flat: no lists, no objects",
        )
    if kind == "extra_forbidden":
        return "S103", *_unknown_key(str(name), record)
    if kind == "missing":
        return (
            "S102",
            f"{name!r} is missing",
            f"expected keys: {', '.join(record.model_fields)}",
        )
    if kind == "too_short":
        return "S105", "conversations is empty", "a sample has at least one turn"
    if kind == "string_too_short":
        return "S105", f"{name!r} is empty", ""
    if kind == "value_error" and isinstance(got, dict):
        turn = cast("dict[str, Any]", got)
        if not turn.get("answers"):
            return "S109", "answers is empty", "leave it out, or list the accepted answers"
        first, assistant = turn["answers"][0], turn.get("assistant")
        said = "there is none" if assistant is None else f"it is {shorten(assistant)!r}"
        return (
            "S109",
            f"assistant must be the first of answers, {shorten(first)!r}: {said}",
            "put the answer to learn first",
        )
    if place[-1:] == ("images",) and kind == "tuple_type":
        help = f'write ["{got}"]' if isinstance(got, str) and len(got) < 60 else ""
        return "S107", f"{label}: expected a list of paths, got {shown}", help
    if "images" in place[-2:] and kind == "string_type":
        return "S107", f"{label}: expected a path, got {shown}", "each image is one string"
    if kind == "string_type":
        return "S104", f"{label}: expected a string, got {shown}", ""
    if kind == "tuple_type":
        help = f'write ["{got}"]' if isinstance(got, str) and len(got) < 60 else ""
        return "S104", f"{label}: expected a list, got {shown}", help
    if kind in ("model_type", "dict_type"):
        return "S104", f"{label}: expected an object, got {shown}", ""
    return "S101", f"{label}: {error['msg']}", ""


@lru_cache(
    maxsize=256
)  # the same slip of the pen is in many lines; looking for a near name is slow
def _unknown_key(name: str, record: type[Sample | Turn]) -> tuple[str, str]:
    """(message, help) of a key that is not one of `record`'s."""
    known, shown = list(record.model_fields), shorten(name)
    other = Sample if record is Turn else Turn
    if name in other.model_fields:
        where = "a turn" if other is Turn else "the sample"
        return f"{shown!r} is out of place", f"{shown!r} is a key of {where}"
    near = difflib.get_close_matches(shown.lower(), known, n=1)
    if near:
        return f"unknown key {shown!r}", f"did you mean {near[0]!r}?"
    return (
        f"unknown key {shown!r}",
        f"expected {', '.join(known)}; keys of your own go into metadata",
    )


def _label(place: Place) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{shorten(part)}"
    return text.lstrip(".")


def _json_type(value: object) -> str:
    for types, name in (
        (type(None), "null"),
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "a string"),
        (list, "a list"),
        (dict, "an object"),
    ):
        if isinstance(value, types):
            return name
    return type(value).__name__
