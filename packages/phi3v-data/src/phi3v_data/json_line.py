r"""One line of bytes to JSON, strictly, or what is wrong with it and where.

    parse_json(b'{"id": "a", "id": nul}')
    # JsonProblem(kind="not_json", message="'nul' is not a JSON value", start=18, end=21)
    parse_json(b'{"id": "a", "id": "b"}')
    # ParsedJson({"id": "b"}, repeated_keys=(RepeatedKey("id", "/id", (1, 5), (12, 16)),))

Fast parsers read good lines; this one reads what they refuse, and says it to a person. It takes
what RFC 8259 takes and no more: no NaN, no half of a surrogate pair, no second value. It keeps a
stack of its own instead of calling itself, so that no nesting can exhaust Python's.

Places are characters of the decoded line, from 0, with the end excluded.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from json import JSONDecodeError
from json.decoder import scanstring  # type: ignore[attr-defined]  # documented by its use in json
from typing import Literal, cast

MAX_DEPTH = 100
"""Objects and lists within one another. A sample needs four."""

MAX_DIGITS = 4300
"""Of a whole number: Python reads longer ones in quadratic time, and refuses to by default."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class JsonProblem:
    """The first thing that is not JSON."""

    kind: Literal["not_utf8", "not_json", "cut_off", "not_finite", "too_deep"]
    """`cut_off`: all is well up to the end, which comes too early."""

    message: str
    start: int
    end: int
    help: str = ""


@dataclass(frozen=True, slots=True)
class RepeatedKey:
    """A key that an object has twice; readers differ in which value they take."""

    key: str
    pointer: str
    first: Span
    """The key's first place, with its quotes."""

    again: Span


@dataclass(frozen=True, slots=True)
class ParsedJson:
    """A line that is JSON."""

    value: object
    """The last of several values of a key, as in most readers."""

    repeated_keys: tuple[RepeatedKey, ...] = ()
    """In the order of their repetitions."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the value of a JSON pointer stands."""

    value: Span
    key: Span | None
    """The key before it, where it is a member of an object."""

    is_exact: bool
    """False where the pointer leads nowhere: this is its nearest ancestor."""


def parse_json(line: bytes) -> ParsedJson | JsonProblem:
    """Parse one JSON text.

    Never raises: whatever the bytes are, there is a value or a problem.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        start = len(line[: error.start].decode())
        return JsonProblem(
            "not_utf8", f"not UTF-8: byte 0x{line[error.start]:02X}", start, start + 1
        )
    return read_fast(text) or read_closely(text)


def read_closely(text: str) -> ParsedJson | JsonProblem:
    """Read a text with the scanner below: slowly, and knowing where everything is."""
    scanner = _Scanner(text, None)
    try:
        value = scanner.scan()
    except _Stop as stop:
        return stop.problem
    return ParsedJson(value, tuple(scanner.repeated))


class _Doubt(ValueError):
    """Something that only the scanner can tell of."""


def read_fast(text: str) -> ParsedJson | None:
    """Read a text with Python's C reader, twenty times faster; None where the scanner has to."""
    if text.count("[") + text.count("{") > MAX_DEPTH or "\\ud" in text or "\\uD" in text:
        return None
    try:
        return ParsedJson(_decode_good(text))
    except ValueError:  # JSONDecodeError, _Doubt, a number of too many digits
        return None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Doubt
    return found


def _refuse_constant(_: str) -> object:
    raise _Doubt


_decode_good = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant).decode


def num_repeated_keys(line: bytes) -> int:
    """How often an object in a line of JSON repeats a key; at the speed of Python's C reader.

    For lines that another parser has taken: on others it may raise ValueError.
    """
    number = 0

    def look(pairs: list[tuple[str, object]]) -> None:
        nonlocal number
        number += len(pairs) - len({key for key, _ in pairs})

    json.loads(line, object_pairs_hook=look, parse_int=str, parse_float=str)
    return number


def find_place(text: str, pointer: str) -> Place | None:
    """Where `pointer` leads in a JSON text; None where the text is not JSON up to there."""
    parts = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
    scanner = _Scanner(text, parts)
    try:
        scanner.scan()
    except _Stop:
        pass  # what was found before it still stands
    return scanner.place


def json_pointer(parts: "tuple[int | str, ...]") -> str:
    """`("metadata", "a/b")` -> `/metadata/a~1b` (RFC 6901)."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


class _Stop(Exception):
    def __init__(self, problem: JsonProblem) -> None:
        self.problem = problem


@dataclass(slots=True)
class _Open:
    """An object or a list whose end is not yet read."""

    start: int
    value: "dict[str, object] | list[object]"
    key: str = ""
    key_span: Span = (0, 0)
    """Of the member being read."""

    keys: "dict[str, Span] | None" = None
    """Of an object: its keys so far."""


_scan_string = cast("Callable[[str, int, bool], tuple[str, int]]", scanstring)

_BLANK = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_BEGUN_NUMBER = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.|(?:\.[0-9]+)?[eE][+-]?)?)?")
_WORD = re.compile(r"[-+.\w]+")
_NOT_FINITE = re.compile(r"[-+]?(?:nan|inf|infinity)", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")
_LITERALS: dict[str, object] = {"true": True, "false": False, "null": None}


class _Scanner:
    """Reads a text once from left to right."""

    def __init__(self, text: str, wanted: list[str] | None) -> None:
        self.text = text
        self.position = 0
        self.repeated: list[RepeatedKey] = []
        self.place: Place | None = None
        self._wanted = wanted
        self._stack: list[_Open] = []

    def scan(self) -> object:
        self._skip_blanks()
        if self.position == len(self.text):
            raise self._problem("not_json", "there is nothing on the line", 0, len(self.text))
        while True:
            start = self.position
            character = self.text[start : start + 1]
            if character == "{" or character == "[":
                self._open(character)
                if not self._is_closed_at_once():
                    continue  # its first value comes next
                value = self._stack.pop().value
            else:
                value = self._scalar(character)
            self._note(start, self._stack)
            # A value is read: to which object or list does it belong, and does that end here too?
            while self._stack:
                top = self._stack[-1]
                if isinstance(top.value, dict):
                    top.value[top.key] = value
                else:
                    top.value.append(value)
                if not self._is_closed_after_value(top):
                    break
                self._stack.pop()
                value = top.value
                self._note(top.start, self._stack)
            else:
                break
        self._skip_blanks()
        if self.position < len(self.text):
            raise self._more_than_one_value()
        return value

    # --- objects and lists

    def _open(self, character: str) -> None:
        if len(self._stack) == MAX_DEPTH:
            raise self._problem(
                "too_deep",
                f"nested more than {MAX_DEPTH} levels deep",
                self.position,
                self.position + 1,
                "a sample is four levels deep",
            )
        is_object = character == "{"
        self._stack.append(
            _Open(self.position, {} if is_object else [], keys={} if is_object else None)
        )
        self.position += 1
        self._skip_blanks()

    def _is_closed_at_once(self) -> bool:
        top = self._stack[-1]
        end = "]" if top.keys is None else "}"
        if self._next() == end:
            self.position += 1
            return True
        if top.keys is not None:
            self._key(top)
        return False

    def _is_closed_after_value(self, top: _Open) -> bool:
        """Read `,` and what leads to the next value, or the end of `top`."""
        self._skip_blanks()
        character = self._next()
        end = "]" if top.keys is None else "}"
        if character == end:
            self.position += 1
            return True
        if character != ",":
            raise self._unexpected(f"expected ',' or '{end}'")
        comma = self.position
        self.position += 1
        self._skip_blanks()
        if self._next() == end:
            raise self._problem(
                "not_json",
                f"a comma before '{end}'",
                comma,
                comma + 1,
                "JSON has no comma after the last item",
            )
        if top.keys is not None:
            self._key(top)
        return False

    def _key(self, top: _Open) -> None:
        start = self.position
        if self._next() != '"':
            problem = self._unexpected("expected a key in double quotes")
            raise problem
        top.key = key = self._string()
        top.key_span = (start, self.position)
        assert top.keys is not None
        if key in top.keys:
            pointer = self._pointer()
            self.repeated.append(RepeatedKey(key, pointer, top.keys[key], top.key_span))
        else:
            top.keys[key] = top.key_span
        self._skip_blanks()
        if self._next() != ":":
            raise self._unexpected("expected ':' after the key")
        self.position += 1
        self._skip_blanks()

    # --- strings, numbers, words

    def _scalar(self, character: str) -> object:
        if character == '"':
            return self._string()
        if not character:
            raise self._cut_off()
        match = _WORD.match(self.text, self.position)
        if match is None:
            raise self._unexpected("expected a value")
        word, start = match[0], self.position
        number = _NUMBER.fullmatch(word)
        if number is not None:
            self.position = match.end()
            if number[1] or number[2] or len(word) > MAX_DIGITS:
                return float(word)
            return int(word)
        if word in _LITERALS:
            self.position = match.end()
            return _LITERALS[word]
        if match.end() == len(self.text):
            if any(literal.startswith(word) for literal in _LITERALS):
                raise self._cut_off("a word")
            if _BEGUN_NUMBER.fullmatch(word):
                raise self._cut_off("a number")
        if _NOT_FINITE.fullmatch(word):
            raise self._problem(
                "not_finite",
                f"{word} is not JSON: a number is finite",
                start,
                match.end(),
                "leave the key out, or write null",
            )
        shown = shorten(word)
        if re.match(r"[-+.]?[0-9]", word):
            raise self._problem(
                "not_json",
                f"{shown!r} is not a JSON number",
                start,
                match.end(),
                _number_help(word),
            )
        help = ""
        if word.lower() in _LITERALS or word == "None":
            help = f"write {'null' if word == 'None' else word.lower()}"
        raise self._problem("not_json", f"{shown!r} is not a JSON value", start, match.end(), help)

    def _string(self) -> str:
        try:
            value, end = _scan_string(self.text, self.position + 1, True)
        except JSONDecodeError:
            return self._faulty_string()
        if _SURROGATE.search(value):
            return self._faulty_string()
        self.position = end
        return value

    def _faulty_string(self) -> str:
        """Walk through a string that Python's C reader refuses, or that holds half a pair."""
        self.position += 1
        while True:
            match = _PLAIN.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            character = self._next()
            if not character:
                raise self._cut_off("a string")
            if character == "\\":
                self._escape()
                continue
            assert character != '"', "the string has a fault"
            raise self._problem(
                "not_json",
                f"control character U+{ord(character):04X} in a string",
                self.position,
                self.position + 1,
                "write it as an escape, "
                + {"\n": r"\n", "\t": r"\t", "\r": r"\r"}.get(
                    character, rf"\u{ord(character):04x}"
                ),
            )

    def _escape(self) -> None:
        """Go past the escape at the position."""
        text, start = self.text, self.position
        match = _ESCAPE.match(text, start)
        if match is None:
            rest = text[start + 1 : start + 6]
            if not rest or (
                rest[0] == "u"
                and start + 1 + len(rest) == len(text)
                and re.fullmatch(r"u[0-9a-fA-F]{0,3}", rest)
            ):
                raise self._cut_off("a string")
            end = start + (2 if rest[0] != "u" else 1 + len(rest.split('"')[0]))
            help = r"a backslash itself is written \\" if rest[0] != "u" else r"\u and four digits"
            raise self._problem(
                "not_json", f"{text[start:end]} is not an escape of JSON", start, end, help
            )
        self.position = match.end()
        escape = match[0]
        code = int(escape[2:], 16) if escape[1] == "u" else 0
        if not 0xD800 <= code <= 0xDFFF:
            return
        low = _ESCAPE.match(text, self.position)
        if code <= 0xDBFF and low and re.fullmatch(r"\\u[dD][c-fC-F]..", low[0]):
            self.position = low.end()
            return
        raise self._problem(
            "not_json",
            f"{escape} is half of a surrogate pair",
            start,
            match.end(),
            "no character has this number: write the whole pair, or the character itself",
        )

    # --- places

    def _pointer(self) -> str:
        return json_pointer(tuple(self._path(self._stack)))

    @staticmethod
    def _path(stack: list[_Open]) -> "list[str]":
        return [o.key if isinstance(o.value, dict) else str(len(o.value)) for o in stack]

    def _note(self, start: int, stack: list[_Open]) -> None:
        """A value from `start` to here, inside of `stack`: is it the one that is looked for?"""
        wanted = self._wanted
        if wanted is None or len(stack) > len(wanted):
            return
        if self._path(stack) != wanted[: len(stack)]:
            return
        is_exact = len(stack) == len(wanted)
        # Inner values end before outer ones: an outer one is only of use where no inner was found.
        # A key that comes again brings its value again, and the last one counts.
        if is_exact or self.place is None:
            key = stack[-1].key_span if stack and isinstance(stack[-1].value, dict) else None
            self.place = Place((start, self.position), key, is_exact)

    # --- what is wrong

    def _skip_blanks(self) -> None:
        match = _BLANK.match(self.text, self.position)
        assert match is not None
        self.position = match.end()

    def _next(self) -> str:
        return self.text[self.position : self.position + 1]

    def _problem(
        self,
        kind: Literal["not_json", "cut_off", "not_finite", "too_deep"],
        message: str,
        start: int,
        end: int,
        help: str = "",
    ) -> _Stop:
        return _Stop(JsonProblem(kind, message, start, end, help))

    def _cut_off(self, inside: str = "") -> _Stop:
        if not inside:
            inside = "an object" if self._stack and self._stack[-1].keys is not None else "a list"
        end = len(self.text)
        return self._problem("cut_off", f"the line ends inside {inside}", end, end)

    def _unexpected(self, expected: str) -> _Stop:
        character = self._next()
        if not character:
            return self._cut_off()
        start, end, help = self.position, self.position + 1, ""
        match = _WORD.match(self.text, start)
        if match is not None:
            end = match.end()
        shown = shorten(self.text[start:end])
        if character == "'":
            help = "strings stand in double quotes"
        elif self.text.startswith(("//", "/*", "#"), start):
            help = "JSON has no comments"
        elif expected.startswith("expected a key") and match:
            help = f'write "{shown}"'
        return self._problem("not_json", f"{expected}, got {_name(shown)}", start, end, help)

    def _more_than_one_value(self) -> _Stop:
        character = self._next()
        message = f"{_name(character)} after the end of the value"
        help = ""
        if character in "{[":
            message, help = "a second value on the line", "one JSON object a line"
        elif character == ",":
            help = "lines of a conversations file are not separated by commas"
        elif self.text.startswith(("//", "/*", "#"), self.position):
            help = "JSON has no comments"
        return self._problem("not_json", message, self.position, self.position + 1, help)


def _name(text: str) -> str:
    """`'x'`, and the number of a character that cannot be seen."""
    return repr(text) if text.isprintable() else f"U+{ord(text[0]):04X}"


def _number_help(word: str) -> str:
    if word.startswith("+"):
        return "no plus sign"
    if re.match(r"-?0[0-9]", word):
        return "no leading zeros; a code with leading zeros is a string"
    if re.match(r"-?\.", word):
        return "a digit stands before the point"
    if re.search(r"\.(?![0-9])", word):
        return "a digit stands after the point"
    return ""


def shorten(text: str, most: int = 60) -> str:
    """`text`, with its middle left out where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}"
