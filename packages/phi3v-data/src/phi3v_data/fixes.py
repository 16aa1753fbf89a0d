r"""Repairs of a faulty line: one function each, its docstring says what it does and why it is safe.

    S104  {"id": 7, ...}                {"id": "7", ...}                           safe
    I101  "images": ["val/A.JPG"]       "images": ["val/a.jpg"], which is there    safe
    T102  "assistant": "Red<|end|>"     "assistant": "Red"                         unsafe

What is wrong is decided by `phi3v_data.rules` alone: a repair is tried only on a line in which a
rule found one of its codes, and kept only if the rule finds less afterwards. So a valid line is
never touched, down to its line break; what no rule objects to stays, for example CRLF and white
space around an answer (training strips what it does not want).

A *safe* repair changes how a line says something, not what it says: every reader that could make
sense of the line before gets the same sample. An *unsafe* one guesses, or gives something up.

Not repaired, and therefore dropped by an unsafe fix: a line that is not JSON or is cut off, a
sample without a usable conversation or answer, an image that is missing, damaged or outside the
root (a question about a picture that is not shown teaches to guess). Never changed: the image files
themselves, so a wrong extension (I104) stays a warning.
"""

import difflib
import inspect
import json
import math
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from phi3v_data.image_check import path_problem
from phi3v_data.rules import IMAGE_MARK, SPECIAL_TOKEN
from phi3v_data.rules.text import ODD_CHARACTER
from phi3v_data.schema import Sample, Turn

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a line stands, for the repairs that need to know."""

    file: Path
    """The JSONL file, as given."""

    line: int
    """From 1."""

    image_root: Path
    allow_missing_answer: bool

    names: Callable[[str], dict[str, str | None]]
    """A folder → its names by `folded` name; None where several fold to the same."""


@dataclass(frozen=True, slots=True)
class Fix:
    """One repair, and the codes it belongs to."""

    codes: tuple[str, ...]
    is_safe: bool
    function: Callable[..., Any]
    apply: Callable[[bytes, Place], bytes | None]
    """A line without its line break → the repaired one, or None where it cannot help."""

    @property
    def name(self) -> str:
        """For people: `whole-number-as-text`."""
        return self.function.__name__.replace("_", "-")

    @property
    def documentation(self) -> str:
        """What it does and why it is safe, or not."""
        return inspect.getdoc(self.function) or ""


def repair(content: bytes, codes: set[str], place: Place, *, unsafe: bool) -> bytes | None:
    """Apply every repair of `codes` to a line; None if none changes it.

    Args:
        content: the line without its line break.
        codes: the codes found in it.
        place: where it stands.
        unsafe: unsafe repairs too.
    """
    repaired = content
    for fix in FIXES:
        if (unsafe or fix.is_safe) and not codes.isdisjoint(fix.codes):
            changed = fix.apply(repaired, place)
            repaired = repaired if changed is None else changed
    return repaired if repaired != content else None


# ------------------------------------------------------------------- bytes: P, parsing

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def byte_order_mark(content: bytes, place: Place) -> bytes | None:
    """Remove a UTF-8 byte order mark from the beginning of a line.

    It says nothing that UTF-8 does not say. Files that were joined have one on a later line, too.
    A file in UTF-16 is converted as a whole before its lines are looked at.
    """
    while content.startswith(_BYTE_ORDER_MARK):
        content = content.removeprefix(_BYTE_ORDER_MARK)
    return content


# Every alternative matches to the end if need be, and gives nothing back: one pass over the line,
# whatever it holds.
_STRING = rb'"[^"\\]*+(?:\\(?:.|\Z)[^"\\]*+)*+(?:"|\Z)'
_STRINGS = re.compile(_STRING, re.DOTALL)
_EXTRA_COMMA = re.compile(_STRING + rb"|,\s*+(?=[}\]]|\Z)", re.DOTALL)
_NOT_A_NUMBER = re.compile(_STRING + rb"|-?\b(?:NaN|Infinity|nan|inf)\b", re.DOTALL)
_CONTROL = re.compile(rb"[\x00-\x1f]")


def loosely_written_json(content: bytes, place: Place) -> bytes | None:
    """Remove commas before a closing bracket or the end; write control characters as escapes.

    `{"id": "a",}`, a line `{...},` of a list, a tab as it is within a string: JSON forbids them,
    but there is one way to read them. Kept only if the line then is JSON.
    """
    tidy = _tidy(content)
    return tidy if _is_json(tidy) else None


def not_a_number_to_null(content: bytes, place: Place) -> bytes | None:
    """Write NaN and Infinity, which JSON lacks, as null.

    Unsafe: infinity is not nothing. pandas and Python's json write them for empty cells.
    """
    tidy = _NOT_A_NUMBER.sub(
        lambda match: match[0] if match[0].startswith(b'"') else b"null", _tidy(content)
    )
    return tidy if _is_json(tidy) else None


def _tidy(content: bytes) -> bytes:
    content = _EXTRA_COMMA.sub(lambda m: m[0] if m[0].startswith(b'"') else b"", content)
    return _STRINGS.sub(
        lambda string: _CONTROL.sub(lambda c: b"\\u%04x" % c[0][0], string[0]), content
    )


_WINDOWS_1252 = {
    0xDC00 + byte: bytes([byte]).decode("cp1252")
    for byte in range(0x80, 0x100)
    if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}


def windows_1252_to_utf8(content: bytes, place: Place) -> bytes | None:
    """Read the bytes that are not UTF-8 as Windows-1252, which holds Latin-1's letters.

    Unsafe: the true encoding is a guess. Characters that are UTF-8 already stay, so a line in both
    comes out right.
    """
    text = content.decode(errors="surrogateescape").translate(_WINDOWS_1252)
    return _encoded(text)


def repeated_key(content: bytes, place: Place) -> bytes | None:
    """Remove a key that an object repeats with the same value.

    Any reader gets the same, whichever of the two it takes.
    """

    def same_only(pairs: list[tuple[str, Any]]) -> Object:
        merged: Object = {}
        for key, value in pairs:
            # `==` would take 1 for True and 1.0.
            if key in merged and json.dumps(merged[key]) != json.dumps(value):
                raise ValueError("two values of one key")
            merged[key] = value
        return merged

    return _rewritten(content, same_only)


def last_of_repeated_keys(content: bytes, place: Place) -> bytes | None:
    """Of a key that an object repeats with different values, keep the last.

    Unsafe: one of the values was meant. The last is what nearly every reader takes, this one too.
    """
    return _rewritten(content, dict)


def _rewritten(content: bytes, hook: Callable[[list[tuple[str, Any]]], Object]) -> bytes | None:
    try:
        record = json.loads(
            content.decode(), object_pairs_hook=hook, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError):
        return None
    return _dumped(record, content)


# ------------------------------------------------------------------ objects: S, the schema

_LISTS = {"images": str, "answers": str, "conversations": dict}
"""Keys whose value is a list → the type of its items."""

_TEXTS = ("id", "source", "user", "assistant")


def single_value_to_list(sample: Object, place: Place) -> bool:
    """Write a single image, answer or turn as the list of one that is expected.

    There is no other reading: `"images": "a.jpg"` is `"images": ["a.jpg"]`.
    """
    changed = False
    for record in (sample, *_turns(sample)):
        for key, type_ in _LISTS.items():
            if isinstance(record.get(key), type_):
                record[key] = [record[key]]
                changed = True
    return changed


def null_to_absent(sample: Object, place: Place) -> bool:
    """Leave out `images` that are null.

    There are no images then, and nothing else can be meant; leaving the key out says the same.
    """
    turns = [turn for turn in _turns(sample) if turn.get("images", ()) is None]
    for turn in turns:
        del turn["images"]
    return bool(turns)


def whole_number_as_text(sample: Object, place: Place) -> bool:
    """Write a whole number as text where text is expected: `"id": 7`, `"assistant": 3`.

    The digits are the text; there is no other way to write them.
    """
    return _texts_from_numbers(sample, int)


def fraction_as_text(sample: Object, place: Place) -> bool:
    """Write a number with a fraction as text where text is expected: `"assistant": 2.5`.

    Unsafe: 2.50 becomes "2.5", and whether that or "2,5" is the answer is not known.
    """
    return _texts_from_numbers(sample, float)


def _texts_from_numbers(sample: Object, type_: type[int] | type[float]) -> bool:
    changed = False
    for record in (sample, *_turns(sample)):
        for key in _TEXTS:
            if type(record.get(key)) is type_:  # a boolean is an int, but not a number
                record[key] = str(record[key])
                changed = True
        answers = _list(record.get("answers"))
        for k, answer in enumerate(answers):
            if type(answer) is type_:
                answers[k] = str(answer)
                changed = True
    return changed


def answer_of_answers(sample: Object, place: Place) -> bool:
    """Make `assistant` the first of `answers` where one is among the other, or missing.

    `assistant` is by definition the first of the accepted answers, whose order means nothing else.
    An empty list of answers is left out.
    """
    changed = False
    for turn in _turns(sample):
        answers, assistant = turn.get("answers"), turn.get("assistant")
        if answers == []:
            del turn["answers"]
        elif not isinstance(answers, list) or answers[0] == assistant:
            continue
        elif assistant is None:
            turn["assistant"] = answers[0]
        elif assistant in answers:
            turn["answers"] = [
                assistant,
                *(a for a in cast("list[Any]", answers) if a != assistant),
            ]
        else:
            continue
        changed = True
    return changed


def answer_joins_answers(sample: Object, place: Place) -> bool:
    """Put `assistant` before `answers` that lack it.

    Unsafe: it is then accepted as right, which the list did not say.
    """
    changed = False
    for turn in _turns(sample):
        answers, assistant = turn.get("answers"), turn.get("assistant")
        if isinstance(answers, list) and isinstance(assistant, str) and assistant not in answers:
            turn["answers"] = [assistant, *answers]
            changed = True
    return changed


def key_in_other_case(sample: Object, place: Place) -> bool:
    """Write a key as expected that differs in case or outer white space only: `"ID"`, `"user "`.

    Only where the expected key is absent and the value is of its type.
    """
    return _rename_keys(sample, lambda key, known: [k for k in known if k == key.strip().lower()])


def misspelt_key(sample: Object, place: Place) -> bool:
    """Write a key as the nearest one that is expected, absent, and of the value's type: `"sorce"`.

    Unsafe: it may be a key of its own.
    """
    return _rename_keys(
        sample,
        lambda key, known: difflib.get_close_matches(key.strip().lower(), known, n=1, cutoff=0.75),
    )


def _rename_keys(sample: Object, nearest: Callable[[str, list[str]], list[str]]) -> bool:
    changed = False
    # The sample first: its turns may be under a key that is renamed.
    for model in (Sample, Turn):
        for record in [sample] if model is Sample else _turns(sample):
            known = list(model.model_fields)
            for key in [key for key in record if key not in known]:
                near = nearest(key[:64], known)
                if near and near[0] not in record and _fits(near[0], record[key]):
                    items = [(near[0] if k == key else k, v) for k, v in record.items()]
                    record.clear()
                    record.update(items)
                    changed = True
    return changed


def _fits(key: str, value: object) -> bool:
    """Whether a value is of the type that a key has."""
    if key == "metadata":
        return isinstance(value, dict)
    if key in _LISTS:
        return isinstance(value, list) and all(
            isinstance(item, _LISTS[key]) for item in cast("list[object]", value)
        )
    return isinstance(value, str)


def own_key_to_metadata(sample: Object, place: Place) -> bool:
    """Move an unknown key of the sample with a flat value into `metadata`, where such keys belong.

    It is carried along and never read there, as it would have been. A key that looks like a
    misspelt one, or is a key of a turn, is left: it was meant to be read.
    """
    known = [*Sample.model_fields, *Turn.model_fields]
    moved: Object = {}
    for key, value in sample.items():
        if not difflib.get_close_matches(key.strip().lower()[:64], known, n=1) and _is_flat(value):
            moved[key] = value
    return _move_to_metadata(sample, [(sample, key, key, value) for key, value in moved.items()])


def any_key_to_metadata(sample: Object, place: Place) -> bool:
    """Move all other unknown keys into `metadata`, and flatten it.

    Lists and objects become their JSON as text; a key of a turn is named `conversations/0/key`.
    Unsafe: a misspelt key would have been read, and code that looked for a key finds it elsewhere.
    """
    known = {*Sample.model_fields, *Turn.model_fields}
    moves: list[tuple[Object, str, str, Any]] = []
    for prefix, record in _records(sample):
        for key, value in record.items():
            if key not in known:
                moves.append((record, key, prefix + key, value))
    metadata = sample.get("metadata")
    changed = False
    if isinstance(metadata, dict):
        nested = cast("Object", metadata)
        for key, value in nested.items():
            if isinstance(value, (list, dict)):
                nested[key] = json.dumps(value, ensure_ascii=False)
                changed = True
    return _move_to_metadata(sample, moves) or changed


def _move_to_metadata(sample: Object, moves: list[tuple[Object, str, str, Any]]) -> bool:
    """Move (record, its key, the key in metadata, value), where metadata can take it."""
    metadata = sample.get("metadata")
    if not moves or not (metadata is None or isinstance(metadata, dict)):
        return False
    taken = cast("Object", metadata or {})
    if any(name in taken for _, _, name, _ in moves):
        return False
    for record, key, name, value in moves:
        del record[key]
        taken[name] = value if _is_flat(value) else json.dumps(value, ensure_ascii=False)
    sample["metadata"] = taken
    return True


def _is_flat(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (str, int))


def missing_id_or_source(sample: Object, place: Place) -> bool:
    """Name a sample without an id by its file and line, `train-17`; its source by its file.

    Unsafe: the names are made up.
    """
    stem = place.file.name.partition(".")[0] or place.file.name
    changed = False
    for key, name in (("id", f"{stem}-{place.line}"), ("source", stem)):
        if sample.get(key) in (None, ""):
            sample[key] = name
            changed = True
    return changed


# ------------------------------------------------------------------------- I, images


def image_path(sample: Object, place: Place) -> bool:
    r"""Write an image's path so that it leads to the file it names.

    `\` becomes `/`; a path from the folder of the JSONL file, or an absolute one, becomes one from
    the image root; upper and lower case become the file's where exactly one file matches. Only
    where the path leads to no file now and does so then, inside the image root: it can mean no
    other.
    """
    return _repair_paths(sample, place, with_parents=False)


def image_path_with_parents(sample: Object, place: Place) -> bool:
    """The same for a path with `..`, taken by its letters: `val/../a.jpg` is `a.jpg`.

    Unsafe: where `val` is a link, the system would have gone elsewhere.
    """
    return _repair_paths(sample, place, with_parents=True)


def _repair_paths(sample: Object, place: Place, *, with_parents: bool) -> bool:
    changed = False
    for turn in _turns(sample):
        images = _list(turn.get("images"))
        for k, path in enumerate(images):
            if isinstance(path, str) and not _leads_to_file(place.image_root, path):
                found = _file_meant(path, place, with_parents=with_parents)
                if found is not None:
                    images[k] = found
                    changed = True
    return changed


def _file_meant(path: str, place: Place, *, with_parents: bool) -> str | None:
    written = path.replace("\\", "/")
    if "\0" in written or (".." in written.split("/") and not with_parents):
        return None
    root = os.path.abspath(place.image_root)
    folder = os.path.abspath(place.file.parent)
    candidates = [posixpath.normpath(written)]
    from_folder = os.path.normpath(os.path.join(folder, written))
    if from_folder.startswith(os.path.join(root, "")):
        candidates.append(Path(os.path.relpath(from_folder, root)).as_posix())
    for candidate in candidates:
        if _leads_to_file(place.image_root, candidate):
            return candidate
        other = _in_other_case(candidate, place)
        if other is not None and _leads_to_file(place.image_root, other):
            return other
    return None


def _leads_to_file(root: Path, path: str) -> bool:
    if path_problem(path) or not os.path.isfile(root / path):
        return False
    real_root = os.path.realpath(root)
    return os.path.commonpath([real_root, os.path.realpath(root / path)]) == real_root


def _in_other_case(path: str, place: Place) -> str | None:
    """The one path that differs in case (or Unicode form) only; None if there are none, or more."""
    if path_problem(path):
        return None
    found: list[str] = []
    for part in path.split("/"):
        folder = os.path.join(place.image_root, *found)
        name = place.names(folder).get(folded(part))
        if name is None:
            return None
        found.append(name)
    return "/".join(found)


def folder_names(folder: str) -> dict[str, str | None]:
    """The names in a folder by `folded` name; None where several fold to the same."""
    names: dict[str, str | None] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                key = folded(entry.name)
                names[key] = None if key in names else entry.name
    except OSError:  # not a folder, or not ours to read: nothing is found in it
        return {}
    return names


def folded(name: str) -> str:
    """A name without its case and Unicode form: macOS writes é as two characters."""
    return unicodedata.normalize("NFC", name).casefold()


# ------------------------------------------------------------------------------ T, text

_MOST_PASSES = 8
"""Removing a token can join what was around it to another: that often, then the line is given up,
so that a line made of nothing else costs no more."""

_MARK_AND_BREAK = re.compile(rf"(?:{IMAGE_MARK.pattern})\n?")
_TOKEN_OR_MARK = re.compile(f"{SPECIAL_TOKEN.pattern}|{IMAGE_MARK.pattern}")


def special_token(sample: Object, place: Place) -> bool:
    """Remove special tokens of the model from the texts, and image marks from answers.

    Unsafe: the text may have been about them. An answer of nothing else is empty then (T101).
    """
    changed = False
    for turn in _turns(sample):
        for key, pattern in (("user", SPECIAL_TOKEN), ("assistant", _TOKEN_OR_MARK)):
            text = turn.get(key)
            if isinstance(text, str) and pattern.search(text):
                turn[key] = _without(pattern, text)
                changed = True
        answers = _list(turn.get("answers"))
        for k, text in enumerate(answers):
            if isinstance(text, str) and _TOKEN_OR_MARK.search(text):
                answers[k] = _without(_TOKEN_OR_MARK, text)
                changed = True
    return changed


def _without(pattern: re.Pattern[str], text: str) -> str:
    for _ in range(_MOST_PASSES):
        text, num_removed = pattern.subn("", text)
        if not num_removed:
            break
    return text


def marks_numbered_across_turns(sample: Object, place: Place) -> bool:
    """Number a turn's image marks from 1 where they go on from the turns before.

    The chat format of the model numbers images over the whole conversation; here `k` counts within
    the turn. Only where a turn's marks are exactly the numbers its images have in the conversation.
    """
    changed = False
    num_before = 0
    for turn in _turns(sample):
        num_images = len(_list(turn.get("images")))
        user = turn.get("user")
        if isinstance(user, str) and num_before and num_images:
            first = num_before + 1
            new = {str(first + k): str(k + 1) for k in range(num_images)}
            marks = [match[1] for match in IMAGE_MARK.finditer(user)]
            if sorted(marks) == sorted(new):
                turn["user"] = IMAGE_MARK.sub(partial(_renumbered, new), user)
                changed = True
        num_before += num_images
    return changed


def _renumbered(new: Mapping[str, str], mark: re.Match[str]) -> str:
    return f"<|image_{new[mark[1]]}|>"


def marks_removed(sample: Object, place: Place) -> bool:
    """Remove the image marks of a turn whose marks do not match its images.

    The images then come before the text. Unsafe: which word a picture belonged to is lost.
    """
    changed = False
    for turn in _turns(sample):
        user = turn.get("user")
        num_images = len(_list(turn.get("images")))
        if isinstance(user, str):
            marks = sorted(match[1] for match in IMAGE_MARK.finditer(user))
            if marks and marks != sorted(str(k + 1) for k in range(num_images)):
                turn["user"] = _without(_MARK_AND_BREAK, user)
                changed = True
    return changed


def control_character(sample: Object, place: Place) -> bool:
    r"""Write line breaks in texts as `\n`, and remove other control characters but tabs.

    Unsafe: an escape sequence's letters stay behind, and the text may have been about them.
    """
    changed = False
    for turn in _turns(sample):
        for record, key in _text_places(turn):
            text = re.sub(r"\r\n?", "\n", record[key])
            text = ODD_CHARACTER.sub("", text)
            changed = changed or text != record[key]
            record[key] = text
    return changed


def _text_places(turn: Object) -> list[tuple[Any, Any]]:
    """(record or list, key or index) of every text of a turn."""
    answers = _list(turn.get("answers"))
    places = [(turn, key) for key in ("user", "assistant") if isinstance(turn.get(key), str)]
    return [*places, *((answers, k) for k, text in enumerate(answers) if isinstance(text, str))]


def empty_answer(sample: Object, place: Place) -> bool:
    """Remove empty ones among several accepted answers.

    With `--allow_missing_answer` an empty answer of the last turn is left out, too. Unsafe: saying
    nothing may have been right.
    """
    turns = _turns(sample)
    changed = False
    for turn in turns:
        answers = turn.get("answers")
        if isinstance(answers, list):
            texts = cast("list[Any]", answers)
            kept = [a for k, a in enumerate(texts) if k == 0 or not _is_blank(a)]
            changed = changed or len(kept) < len(texts)
            turn["answers"] = kept
    if place.allow_missing_answer and turns and _is_blank(turns[-1].get("assistant")):
        last = turns[-1]
        if len(_list(last.get("answers"))) <= 1:
            last.pop("answers", None)
            del last["assistant"]
            changed = True
    return changed


def _is_blank(text: object) -> bool:
    return isinstance(text, str) and not text.strip()


# ---------------------------------------------------------------------------- the table


def _of_bytes(codes: str, is_safe: bool, function: Callable[[bytes, Place], bytes | None]) -> Fix:
    return Fix(tuple(codes.split()), is_safe, function, function)


def _of_sample(codes: str, is_safe: bool, function: Callable[[Object, Place], bool]) -> Fix:
    def apply(content: bytes, place: Place) -> bytes | None:
        sample = _loaded(content)
        if sample is None or not function(sample, place):
            return None
        return _dumped(sample, content)

    return Fix(tuple(codes.split()), is_safe, function, apply)


FIXES: tuple[Fix, ...] = (
    _of_bytes("P101 P102", True, byte_order_mark),
    _of_bytes("P103", False, windows_1252_to_utf8),
    _of_bytes("P101", True, loosely_written_json),
    _of_bytes("P101 P105", False, not_a_number_to_null),
    _of_bytes("P104", True, repeated_key),
    _of_bytes("P104", False, last_of_repeated_keys),
    _of_sample("S102 S103", True, key_in_other_case),
    _of_sample("S102 S103", False, misspelt_key),
    _of_sample("S107", True, null_to_absent),
    _of_sample("S104 S107", True, single_value_to_list),
    _of_sample("S104", True, whole_number_as_text),
    _of_sample("S104", False, fraction_as_text),
    _of_sample("S106 S109", True, answer_of_answers),
    _of_sample("S109", False, answer_joins_answers),
    _of_sample("S103", True, own_key_to_metadata),
    _of_sample("S103 S108", False, any_key_to_metadata),
    _of_sample("S102 S104 S105", False, missing_id_or_source),
    _of_sample("I101 I103", True, image_path),
    _of_sample("I101 I103", False, image_path_with_parents),
    _of_sample("T102", False, special_token),
    _of_sample("T103", True, marks_numbered_across_turns),
    _of_sample("T103", False, marks_removed),
    _of_sample("T105", False, control_character),
    _of_sample("T101", False, empty_answer),
)
"""All repairs of a line, in the order they are tried. Ids used twice (D101), blank lines (P107) and
UTF-16 (P102) are the business of `phi3v_data.fix_files`, which sees all lines."""


def _loaded(content: bytes) -> Object | None:
    """The object of a line; None where it is not one, or repeats a key."""

    def unique(pairs: list[tuple[str, Any]]) -> Object:
        record = dict(pairs)
        if len(record) < len(pairs):
            raise ValueError("a key is repeated")
        return record

    try:
        record = json.loads(
            content.decode(), object_pairs_hook=unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError):
        return None
    return cast("Object", record) if isinstance(record, dict) else None


def _dumped(record: object, like: bytes) -> bytes | None:
    """JSON in one line, spaced as `like`; None where it cannot be written (lone surrogates, 1e999).

    Fractions are written as short as they are exact: 1.50 becomes 1.5.
    """
    separators = (", ", ": ") if b'": ' in like else (",", ":")
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=separators)
    except (ValueError, RecursionError):
        return None
    return _encoded(text)


def _encoded(text: str) -> bytes | None:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return None


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _records(sample: Object) -> list[tuple[str, Object]]:
    """(prefix of its keys in metadata, record) of the sample and its turns."""
    turns = _list(sample.get("conversations"))
    return [
        ("", sample),
        *(
            (f"conversations/{t}/", cast("Object", turn))
            for t, turn in enumerate(turns)
            if isinstance(turn, dict)
        ),
    ]


def _turns(sample: Object) -> list[Object]:
    return [record for prefix, record in _records(sample) if prefix]


def _list(value: object) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []
