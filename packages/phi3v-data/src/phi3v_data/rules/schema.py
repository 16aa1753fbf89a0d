"""S: JSON becomes a sample."""

import difflib
from collections.abc import Iterator
from typing import Any

from phi3v_data.rules.rule import Context, Finding, Line
from phi3v_data.schema import Sample, Turn


def schema(line: Line, context: Context) -> Iterator[Finding]:
    """A line is JSON, but not a sample.

    A key is missing, unknown, or of the wrong type; a conversation is empty; a turn that is not
    the last has no answer. `phi3v-data schema` prints the JSON Schema. Keys of your own belong
    into `metadata`, a flat object that is carried along.
    """
    if line.error is None:
        return
    seen: set[str] = set()
    for error in line.error.errors(include_url=False):
        kind, place = error["type"], error["loc"]
        if kind == "too_short" and error["input"]:
            continue  # pydantic counts the good items only; what is wrong with the others follows
        if kind == "json_invalid" or (kind == "model_type" and not place):
            return  # P101 says so
        if place[:1] == ("metadata",) and len(place) > 1:
            # One error per member of the union of allowed types: say it once.
            place = place[:2]
            message = "metadata holds strings, finite numbers, booleans and null only"
            help = "metadata is flat: no lists, no objects"
        else:
            message, help = _explain(error, line)
        pointer = "".join(f"/{part}" for part in place)
        if pointer not in seen:
            seen.add(pointer)
            yield Finding(message, help, pointer)


def _explain(error: Any, line: Line) -> tuple[str, str]:
    """(message, help) of one pydantic error."""
    kind, place, got = error["type"], error["loc"], error.get("input")
    name = place[-1] if place else ""
    record = Turn if place[:1] == ("conversations",) and len(place) > 2 else Sample
    if kind == "extra_forbidden":
        known = list(record.model_fields)
        near = difflib.get_close_matches(str(name).lower(), known, n=1)
        if near:
            return f"unknown key {name!r}", f"did you mean {near[0]!r}?"
        other = Sample if record is Turn else Turn
        if name in other.model_fields:
            where = "a turn" if other is Turn else "the sample"
            return f"{name!r} is out of place", f"{name!r} is a key of {where}"
        return (
            f"unknown key {name!r}",
            f"expected {', '.join(known)}; keys of your own go into metadata",
        )
    if kind == "missing":
        return f"{name!r} is missing", f"expected keys: {', '.join(record.model_fields)}"
    if kind == "too_short":
        return "conversations is empty", "a sample has at least one turn"
    if kind == "string_too_short":
        return f"{name!r} is empty", ""
    if kind == "value_error":
        return error["msg"].removeprefix("Value error, "), ""
    shown = _json_type(got)
    if kind == "string_type":
        return f"{_label(place)}: expected a string, got {shown}", ""
    if kind == "tuple_type":
        help = f'write ["{got}"]' if isinstance(got, str) and len(got) < 60 else ""
        return f"{_label(place)}: expected a list, got {shown}", help
    if kind in ("model_type", "dict_type"):
        return f"{_label(place)}: expected an object, got {shown}", ""
    return f"{_label(place)}: {error['msg']}", ""


def _label(place: tuple[int | str, ...]) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
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
