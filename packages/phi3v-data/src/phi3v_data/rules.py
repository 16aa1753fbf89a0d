"""What can be wrong with a sample: one function a code, its docstring is its documentation.

    phi3v-data rules          # the table below
    phi3v-data rules I101     # one rule, explained

The first letter groups the codes: `P` parsing a line, `S` the schema, `I` images, `T` text,
`D` across samples. A rule gets a line or a sample with its `Context` and yields a `Finding` for
each thing wrong. Adding one is a function and an entry in `RULES`.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from pydantic import ValidationError

from phi3v_data.image_check import ImageCheck
from phi3v_data.images import formats_of_extension
from phi3v_data.jsonl import byte_order_mark as find_byte_order_mark
from phi3v_data.schema import Sample, Turn

Severity = Literal["error", "warning"]

CROP_SIDE_PX = 336
"""Side of a crop of the model."""

MOST_CROPS = 16
"""Crops an image the published model was trained with, at most: no advice goes beyond."""


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


# --- P: a line becomes JSON ---------------------------------------------------------------------


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


# --- S: JSON becomes a sample -------------------------------------------------------------------


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


# --- I: images ----------------------------------------------------------------------------------


def missing_image(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image file is not there, or cannot be read.

    Paths are relative to the image root: `images/` beside the JSONL file if there is one, else
    the file's own folder, or what `--images` says. Where no image of a file is found, the root is
    wrong and that is reported once.
    """
    for pointer, path, check in _images(sample, context):
        if check.kind == "missing":
            yield Finding(f"image {path!r} {check.problem}", _case_help(path, context), pointer)


def _case_help(path: str, context: Context) -> str:
    """Names the file that differs in upper and lower case only, the usual slip."""
    parent, _, name = path.rpartition("/")
    other = _names_by_lower_case(os.path.join(context.image_root, parent)).get(name.lower())
    return (
        f"there is {other!r}: case counts" if other else f"the image root is {context.image_root}"
    )


@lru_cache(maxsize=64)  # one listing a folder, not one a missing file
def _names_by_lower_case(folder: str) -> dict[str, str]:
    try:
        return {name.lower(): name for name in sorted(os.listdir(folder))}
    except OSError:
        return {}


def undecodable_image(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image file does not decode as a whole.

    It is empty, truncated, damaged, not an image, or a decompression bomb. Each distinct file is
    decoded once, completely: a header can be whole where the pixels are not.
    """
    for pointer, path, check in _images(sample, context):
        if check.kind == "undecodable":
            yield Finding(f"image {path!r} {check.problem}", "", pointer)


def image_outside_root(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image path leads out of the image root.

    Paths are relative, POSIX, and stay under the root: no `..`, no leading `/` or drive, no
    backslash, no link that leads out. So a data set can be moved, and data cannot make a reader
    open files of the machine.
    """
    for pointer, path, check in _images(sample, context):
        if check.kind == "outside":
            yield Finding(f"image {path!r} {check.problem}", "", pointer)


def wrong_extension(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image's file name promises another format than its content has.

    Harmless here, since formats are told by content; tools that go by the name will stumble.
    NLVR2 ships hundreds of them.
    """
    for pointer, path, check in _images(sample, context):
        promised = formats_of_extension(path)
        if check.info and promised and check.info.format not in promised:
            yield Finding(f"image {path!r} is {check.info.format} by content", "", pointer)


def extreme_aspect_ratio(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image is so long and thin that the model's resizing would leave it without a short side.

    The model sees an image in crops of 336 x 336 pixels, at most `--num_crops` of them. One that is
    very long and thin becomes a single row (or column) of them all, 336 x num_crops pixels long,
    with its short side in proportion, rounded down: nothing, where the long side is more than
    336 x num_crops times the short side. Crop or pad such an image, or use more crops. Validate
    with the num_crops you will train with (`data.num_crops`): one that passes at 16 can fail at 4.
    """
    for pointer, path, check in _images(sample, context):
        if check.info:
            width, height = check.info.width, check.info.height
            short, long = sorted((width, height))
            # Exactly where training refuses: a ratio above 336 lets its crops grow along the long
            # side alone, so it gets all of them, and int(336 * num_crops / (long / short)) is 0.
            # In whole numbers the comparison is exact; below 2**53 pixels so is that division's.
            if long > CROP_SIDE_PX * context.num_crops * short:
                help = "crop it, or pad its short side"
                enough = -(-long // (CROP_SIDE_PX * short))
                if enough <= MOST_CROPS:
                    help += f", or use at least {enough} crops, here and in training"
                yield Finding(
                    f"image {path!r} is {width}x{height} (width x height): "
                    f"its short side becomes 0 pixels at num_crops {context.num_crops}",
                    help,
                    pointer,
                )


def _images(sample: Sample, context: Context) -> Iterator[tuple[str, str, ImageCheck]]:
    """(JSON pointer, path, check) of each image that was looked at."""
    for t, turn in enumerate(sample.conversations):
        for k, path in enumerate(turn.images):
            if path in context.images:
                yield f"/conversations/{t}/images/{k}", path, context.images[path]


# --- T: text ------------------------------------------------------------------------------------


def empty_answer(sample: Sample, context: Context) -> Iterator[Finding]:
    """An answer is empty or white space only.

    The model would learn to say nothing. A question without an answer, as in test splits, leaves
    `assistant` out.
    """
    for t, turn in enumerate(sample.conversations):
        if turn.assistant is not None and not turn.assistant.strip():
            yield Finding(
                "the answer is empty",
                "leave 'assistant' out where there is no answer",
                f"/conversations/{t}/assistant",
            )
        for k, answer in enumerate(turn.answers or ()):
            if k > 0 and not answer.strip():  # answers[0] is assistant
                yield Finding("the answer is empty", "", f"/conversations/{t}/answers/{k}")


SPECIAL_TOKEN = re.compile(
    r"<\|(?:user|assistant|system|end|endoftext|image|placeholder[0-9]+)\|>|<unk>|</?s>"
)
IMAGE_MARK = re.compile(r"<\|image_([0-9]+)\|>")


def special_token(sample: Sample, context: Context) -> Iterator[Finding]:
    """A text holds a special token of the model.

    `<|user|>`, `<|assistant|>`, `<|system|>`, `<|end|>`, `<|endoftext|>`, `<|image|>`,
    `<|placeholderN|>`, `<s>`, `</s>` and `<unk>` are not text to the tokenizer: they would end a
    turn or open another. An image mark `<|image_k|>` may stand in `user` (see T103), never in an
    answer.
    """
    for t, turn in enumerate(sample.conversations):
        texts = [("user", turn.user), ("assistant", turn.assistant or "")]
        texts += [(f"answers/{k}", text) for k, text in enumerate(turn.answers or ()) if k > 0]
        for key, text in texts:
            tokens = SPECIAL_TOKEN.findall(text)
            if key != "user":
                tokens += [match[0] for match in IMAGE_MARK.finditer(text)]
            for token in dict.fromkeys(tokens):
                yield Finding(
                    f"the text holds {token!r}, a special token of the model",
                    "the chat format adds such tokens itself: remove it",
                    f"/conversations/{t}/{key}",
                )


def image_marks(sample: Sample, context: Context) -> Iterator[Finding]:
    """The marks `<|image_k|>` of a turn do not match its images.

    Without marks the images come before the text. With marks, each image of the turn stands
    exactly once where its mark is; k counts within the turn, from 1.
    """
    for t, turn in enumerate(sample.conversations):
        marks = [int(match[1]) for match in IMAGE_MARK.finditer(turn.user)]
        if not marks:
            continue
        wanted = range(1, len(turn.images) + 1)
        problems = [
            *(f"<|image_{k}|> has no image" for k in sorted(set(marks)) if k not in wanted),
            *(f"image {k} is placed {marks.count(k)} times" for k in wanted if marks.count(k) > 1),
            *(f"image {k} is not placed" for k in wanted if k not in marks),
        ]
        if problems:
            num_images = len(turn.images)
            yield Finding(
                f"image marks do not match the turn's {num_images} "
                f"image{'' if num_images == 1 else 's'}: {', '.join(problems)}",
                "k counts within the turn; without any mark the images come first",
                f"/conversations/{t}/user",
            )


def missing_answer(sample: Sample, context: Context) -> Iterator[Finding]:
    """The last turn has no answer.

    There is nothing to learn from it. Test splits have none: `--allow_missing_answer`.
    """
    last = len(sample.conversations) - 1
    if sample.conversations[last].assistant is None and not context.allow_missing_answer:
        yield Finding(
            "the last turn has no 'assistant'",
            "test splits: --allow_missing_answer",
            f"/conversations/{last}",
        )


# --- D: across samples --------------------------------------------------------------------------


def duplicate_id(sample: Sample, context: Context) -> Iterator[Finding]:
    """An id occurs twice.

    Ids name samples in every message, prediction and seed; they are unique within a file, and
    among files written to shards together.
    """
    if sample.id in context.ids:
        file, line_number = context.ids[sample.id]
        place = f"line {line_number}" if file == context.file else f"{file}:{line_number}"
        yield Finding(f"id {sample.id!r} is already used: {place}", "", "/id")


@dataclass(frozen=True, slots=True)
class Rule:
    """A code and the function behind it."""

    code: str
    severity: Severity
    subject: Literal["line", "sample"]
    """What the function gets: a `Line` that may have failed to parse, or a `Sample`."""

    check: Callable[[Any, Context], Iterator[Finding]]

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


RULES: tuple[Rule, ...] = (
    Rule("P101", "error", "line", not_json),
    Rule("P102", "error", "line", byte_order_mark),
    Rule("P103", "error", "line", not_utf8),
    Rule("S101", "error", "line", schema),
    Rule("I101", "error", "sample", missing_image),
    Rule("I102", "error", "sample", undecodable_image),
    Rule("I103", "error", "sample", image_outside_root),
    Rule("I104", "warning", "sample", wrong_extension),
    Rule("I105", "error", "sample", extreme_aspect_ratio),
    Rule("T101", "error", "sample", empty_answer),
    Rule("T102", "error", "sample", special_token),
    Rule("T103", "error", "sample", image_marks),
    Rule("T104", "error", "sample", missing_answer),
    Rule("D101", "error", "sample", duplicate_id),
)


def select_rules(select: tuple[str, ...] = (), ignore: tuple[str, ...] = ()) -> tuple[Rule, ...]:
    """The rules whose code starts with one of `select` (all, if empty) and none of `ignore`.

    Raises:
        ValueError: a prefix that no code starts with.
    """
    codes = [rule.code for rule in RULES]
    for prefix in (*select, *ignore):
        if not prefix or not any(code.startswith(prefix) for code in codes):
            near = difflib.get_close_matches(prefix.upper(), codes, n=1)
            hint = f"did you mean {near[0]}?" if near else "`phi3v-data rules` lists them"
            raise ValueError(f"no rule's code starts with {prefix!r}; {hint}")
    return tuple(
        rule
        for rule in RULES
        if (not select or rule.code.startswith(select)) and not rule.code.startswith(ignore or "\0")
    )
