r"""A page that shows a data set: one HTML file that needs nothing else and asks no network.

    result = write_preview(["train.jsonl", "val.jsonl"], "preview.html", images="images")
    result.num_samples, result.num_bytes, result.notes     # 1034, 21_873_112, ()

What is on it: every sample as a card with its images, its conversation and what the rules of
`validate` say about it; `preview.html` beside this module is the page without data. The data stands
in it as one JSON block, thumbnails included.

Bounded: at most `max_samples` samples, evenly spread over the files, and at most `max_mb` in all;
thumbnails get smaller, then fewer, then missing, long texts are cut, and the page says what it
left out.

Safe: data is shown as text only. Nothing in it can end the JSON block (`<` is `\u003c`), and the
page's Content-Security-Policy allows its own script, by hash, and no request at all.

The same input gives the same bytes.
"""

import base64
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, TypeAlias, cast

from phi3v_data.atomic import open_atomic
from phi3v_data.checked_lines import Checked, check
from phi3v_data.diagnostics import Diagnostic
from phi3v_data.image_place import ImagePlaces, MisplacedImage
from phi3v_data.jsonl import default_image_root, read_lines
from phi3v_data.rules import RULES, select_rules
from phi3v_data.rules.rule import Rule
from phi3v_data.thumbnails import Plan, draw, plan_thumbnails, spread
from phi3v_data.validate import validate

AnyPath: TypeAlias = str | os.PathLike[str]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with (what is being done, done, in all)."""

TEXT_LIMITS = (4000, 1000, 300, 100)
"""Characters shown of a text; the first of which all texts take less than half of the page."""

MAX_FINDINGS = 20
"""Findings shown of one sample."""

FAULTY_SHARE = 4
"""Where not all samples fit, one in so many is kept for samples with findings."""


@dataclass(frozen=True, slots=True)
class PreviewResult:
    """What was written."""

    num_samples: int
    num_lines: int
    """Of all files; more than `num_samples` where not all are shown."""

    num_images: int
    """Distinct images with a thumbnail."""

    num_bytes: int
    counts: dict[str, int]
    """Findings by code, in all lines."""

    notes: tuple[str, ...]
    """What the page left out, a sentence each."""


@dataclass(slots=True)
class _Row:
    """A line that is shown."""

    file: int
    """Its number."""

    line: int
    content: bytes
    diagnostics: tuple[Diagnostic, ...]


@dataclass(slots=True)
class _Shown:
    """A sample as far as it can be made out, faulty or not."""

    id: str = ""
    source: str = ""
    turns: list["_ShownTurn"] = field(default_factory=list["_ShownTurn"])
    metadata: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    is_whole: bool = False
    """Whether the line parsed; if not, it is shown as it stands."""


@dataclass(slots=True)
class _ShownTurn:
    images: list[str]
    user: str
    assistant: str | None
    answers: list[str]


def write_preview(
    paths: Sequence[AnyPath],
    out: AnyPath,
    *,
    images: AnyPath | None = None,
    max_samples: int = 10_000,
    max_mb: float = 50,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    allow_missing_answer: bool = False,
    num_crops: int = 16,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> PreviewResult:
    """Check conversations files and write a page that shows them.

    Args:
        paths: JSONL files, the splits of one data set.
        out: the HTML file; it appears when complete.
        images: the image root; by default `images/` beside each file, else its folder.
        max_samples: samples shown, evenly spread; some of the room is for those with findings.
        max_mb: most megabytes (10^6 bytes) of the page.
        select: code prefixes of the rules to run; all by default. Every line is checked.
        ignore: code prefixes of rules not to run.
        allow_missing_answer: the last turn may lack its answer (test splits).
        num_crops: most crops an image in training, as in `validate`.
        num_workers: threads that decode images; by default one a core.
        progress: called with (what is being done, done, in all).

    Raises:
        ValueError: no files, a file that is not there, an unknown rule, `max_samples` or `max_mb`
            too small for anything.
    """
    if max_samples < 1:
        raise ValueError(f"max_samples: expected 1 or more, got {max_samples}")
    report = progress or _say_nothing
    rules = select_rules(tuple(select), tuple(ignore))
    template = _Template()
    budget = int(max_mb * 1_000_000) - template.num_bytes
    if budget < 100_000:
        least = (template.num_bytes + 100_000) / 1_000_000
        raise ValueError(f"max_mb: expected {least:.2f} or more, got {max_mb}")

    files = list(dict.fromkeys(os.fspath(path) for path in paths))
    lines = check(
        files,
        images=images,
        rules=tuple(rule for rule in rules if rule.subject != "dataset"),
        allow_missing_answer=allow_missing_answer,
        num_crops=num_crops,
        num_workers=num_workers,
        progress=lambda done, total: report("checking lines", done, total),
    )
    across = [rule.code for rule in rules if rule.subject == "dataset"]
    found: tuple[Diagnostic, ...] = ()
    counts: dict[str, int] = {}
    if across:
        checked = validate(
            files,
            images=images,
            select=across,
            allow_missing_answer=allow_missing_answer,
            num_workers=num_workers,
            progress=lambda done, total: report("checking across samples", done, total),
        )
        found, counts = checked.diagnostics, checked.counts
    chosen = _choose(files, max_samples, lines, found)
    chosen.counts.update(counts)
    rows: list[_Row] = chosen.rows
    notes = list(chosen.notes)
    shown = [_read_loosely(row.content) for row in rows]

    roots = [default_image_root(path) if images is None else Path(images) for path in files]
    gallery = _Gallery(roots)
    groups = [gallery.add(row.file, sample) for row, sample in zip(rows, shown, strict=True)]

    # Thumbnails take what the text leaves; both bounds are exact, since both are counted as JSON.
    content: dict[str, Any] = {}
    encoded = b""
    for limit in TEXT_LIMITS:
        content = _content(files, rules, rows, shown, groups, gallery, chosen, limit)
        encoded = _json(content)
        if len(encoded) <= budget // 2:
            break
    while len(encoded) > budget // 2 and len(rows) > 1:
        keep = spread(len(rows), len(rows) // 2)
        rows, shown = [rows[i] for i in keep], [shown[i] for i in keep]
        gallery = _Gallery(roots)
        groups = [gallery.add(row.file, sample) for row, sample in zip(rows, shown, strict=True)]
        content = _content(files, rules, rows, shown, groups, gallery, chosen, TEXT_LIMITS[-1])
        encoded = _json(content)
    if len(rows) < len(chosen.rows):
        notes.append(f"texts are long: only {len(rows):,} samples fit")
    if content["num_cut"]:
        notes.append(f"{content['num_cut']:,} long texts are cut")

    drawn = _draw(gallery, groups, budget - len(encoded) - 10_000, num_workers, report)
    notes += drawn.notes
    content["notes"] = notes
    content["images"] = drawn.images
    with open_atomic(out) as file:
        num_bytes = template.write(file.write, _json(content), drawn.data)
    return PreviewResult(
        num_samples=len(rows),
        num_lines=sum(chosen.num_lines),
        num_images=sum(1 for data in drawn.data if data),
        num_bytes=num_bytes,
        counts={rule.code: chosen.counts[rule.code] for rule in RULES if chosen.counts[rule.code]},
        notes=tuple(notes),
    )


def _say_nothing(what: str, done: int, total: int) -> None:
    pass


# --- which lines ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Chosen:
    num_lines: list[int]
    """Of each file."""

    rows: list[_Row] = field(default_factory=list[_Row])
    counts: Counter[str] = field(default_factory=Counter[str])
    num_faulty: int = 0
    """Lines with findings."""

    general: list[Diagnostic] = field(default_factory=list[Diagnostic])
    """About a file as a whole."""

    notes: list[str] = field(default_factory=list[str])


def _choose(
    paths: Sequence[str],
    max_samples: int,
    lines: Iterator[Checked],
    across: Sequence[Diagnostic],
) -> _Chosen:
    """Every line is checked; some are kept: an even part of them, and faulty ones."""
    of_line: dict[tuple[str, int], list[Diagnostic]] = {}
    for diagnostic in across:
        if diagnostic.line is not None:
            of_line.setdefault((diagnostic.file, diagnostic.line), []).append(diagnostic)
    num_lines = [sum(1 for _ in read_lines(path)) for path in paths]
    total = sum(num_lines)
    num_reserved = max_samples // FAULTY_SHARE if total > max_samples else 0
    even = set(spread(total, max_samples - num_reserved))
    chosen = _Chosen(num_lines, general=[d for d in across if d.line is None])
    number_of = {path: number for number, path in enumerate(paths)}
    for position, line in enumerate(lines):
        own = (
            *(d for d in line.diagnostics if d.line is not None),
            *of_line.get((line.file, line.line), ()),
        )
        chosen.general += [d for d in line.diagnostics if d.line is None]
        chosen.counts.update(d.code for d in line.diagnostics)
        chosen.num_faulty += bool(own)
        is_extra = position not in even and bool(own) and num_reserved > 0
        if position in even or is_extra:
            num_reserved -= is_extra
            chosen.rows.append(_Row(number_of[line.file], line.line, line.content, own))
    if len(chosen.rows) < total:
        num_shown = sum(1 for row in chosen.rows if row.diagnostics)
        chosen.notes.append(
            f"{len(chosen.rows):,} of {total:,} samples are shown, evenly spread; "
            f"{num_shown:,} of {chosen.num_faulty:,} with findings"
        )
    return chosen


# --- a line as it is shown ------------------------------------------------------------------------


def _read_loosely(content: bytes) -> _Shown:
    """What can be made out of a line, whatever is wrong with it."""
    try:
        record: Any = json.loads(content.decode("utf-8", "replace"), parse_constant=str)
    except (ValueError, RecursionError):
        return _Shown()
    if not isinstance(record, dict):
        return _Shown()
    fields = cast(dict[str, Any], record)
    shown = _Shown(id=_text(fields.get("id")), source=_text(fields.get("source")), is_whole=True)
    for turn in _list(fields.get("conversations")):
        if not isinstance(turn, dict):
            shown.is_whole = False
            continue
        part = cast(dict[str, Any], turn)
        assistant = part.get("assistant")
        shown.turns.append(
            _ShownTurn(
                images=[image for image in _list(part.get("images")) if isinstance(image, str)],
                user=_text(part.get("user")),
                assistant=None if assistant is None else _text(assistant),
                answers=[_text(answer) for answer in _list(part.get("answers"))],
            )
        )
    metadata = fields.get("metadata")
    if isinstance(metadata, dict):
        pairs = cast(dict[str, Any], metadata)
        shown.metadata = [(key, _text(value)) for key, value in pairs.items()]
    return shown


def _list(value: object) -> list[Any]:
    return cast(list[Any], value) if isinstance(value, list) else []


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


# --- images ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Image:
    path: str
    """As the sample names it."""

    file: str
    """Where it is; empty if nowhere."""

    problem: str


class _Gallery:
    """The distinct images of all samples, in order of first use."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots
        self._places = {root: ImagePlaces(root) for root in roots}
        self._numbers: dict[tuple[Path, str], int] = {}
        self.images: list[_Image] = []

    def add(self, file: int, sample: _Shown) -> list[list[int]]:
        """The numbers of the images of each turn."""
        root = self._roots[file]
        return [[self._number(root, path) for path in turn.images] for turn in sample.turns]

    def _number(self, root: Path, path: str) -> int:
        key = (root, path)
        if key not in self._numbers:
            self._numbers[key] = len(self.images)
            try:
                self.images.append(_Image(path, self._places[root].find(path), ""))
            except MisplacedImage as error:
                self.images.append(_Image(path, "", str(error)))
        return self._numbers[key]


@dataclass(slots=True)
class _Drawn:
    images: list[list[Any]]
    """[path, width, height, problem] of each image of the gallery."""

    data: list[str]
    """Base64 of each thumbnail; empty where there is none."""

    notes: list[str]


def _draw(
    gallery: _Gallery,
    groups: list[list[list[int]]],
    budget: int,
    num_workers: int | None,
    report: Progress,
) -> _Drawn:
    of_sample = [[number for turn in group for number in turn] for group in groups]
    files = [image.file for image in gallery.images]
    of_sample_files = [[files[n] for n in numbers if files[n]] for numbers in of_sample]
    plan = plan_thumbnails(of_sample_files, budget * 3 / 4)  # base64 writes three bytes as four
    wanted = _wanted(of_sample, plan)
    by_file: dict[str, list[int]] = {}
    for number in sorted(wanted):
        if files[number]:
            by_file.setdefault(files[number], []).append(number)

    images: list[list[Any]] = [[i.path, 0, 0, i.problem] for i in gallery.images]
    data = [""] * len(files)
    budget -= 3 * len(data)  # quotes and a comma
    num_without_room = 0
    for done, (file, thumbnail) in enumerate(draw(list(by_file), plan.edge_px, num_workers), 1):
        encoded = base64.b64encode(thumbnail.data).decode()
        for number in by_file[file]:
            images[number][1:] = [thumbnail.width, thumbnail.height, thumbnail.problem[:80]]
            if len(encoded) <= budget:
                budget -= len(encoded)
                data[number] = encoded
            elif encoded:
                num_without_room += 1
        report("drawing", done, len(by_file))
    notes: list[str] = []
    num_more = len(files) - len(wanted)
    if num_more:
        drawn = "1 image" if plan.max_per_group == 1 else f"{plan.max_per_group} images"
        notes.append(f"{drawn} of each sample at most, without {num_more:,} others")
    if num_without_room:
        notes.append(f"{num_without_room:,} images for want of room")
    if plan.edge_px < 320 and by_file:
        notes.append(f"images are no larger than {plan.edge_px} pixels")
    return _Drawn(images, data, notes)


def _wanted(of_sample: list[list[int]], plan: Plan) -> set[int]:
    return {numbers[i] for numbers in of_sample for i in spread(len(numbers), plan.max_per_group)}


# --- the JSON block -------------------------------------------------------------------------------


def _content(
    paths: Sequence[AnyPath],
    rules: tuple[Rule, ...],
    rows: list[_Row],
    shown: list[_Shown],
    groups: list[list[list[int]]],
    gallery: _Gallery,
    chosen: _Chosen,
    limit: int,
) -> dict[str, Any]:
    """All but the thumbnails. Repeated texts (a prompt that is always the same) stand once."""
    texts: dict[str, int] = {}
    num_cut = 0

    def cut(text: str) -> str:
        nonlocal num_cut
        if len(text) <= limit:
            return text
        num_cut += 1
        return f"{text[:limit]} … [{len(text) - limit:,} more characters]"

    def number(text: str) -> int:
        return texts.setdefault(cut(text), len(texts))

    samples: list[dict[str, Any]] = []
    for row, sample, images in zip(rows, shown, groups, strict=True):
        entry: dict[str, Any] = {
            "f": row.file,
            "l": row.line,
            "i": cut(sample.id),
            "s": number(sample.source),
            "t": [
                {
                    "i": numbers,
                    "u": number(turn.user),
                    "n": len(turn.user),
                    **({} if turn.assistant is None else {"a": number(turn.assistant)}),
                    **({"o": [cut(a) for a in turn.answers]} if len(turn.answers) > 1 else {}),
                    **({"m": len(turn.assistant)} if turn.assistant is not None else {}),
                }
                for turn, numbers in zip(sample.turns, images, strict=True)
            ],
        }
        if sample.metadata:
            entry["m"] = [[cut(key), cut(value)] for key, value in sample.metadata]
        if row.diagnostics:
            entry["d"] = [_finding(d) for d in row.diagnostics[:MAX_FINDINGS]]
            entry["dn"] = len(row.diagnostics)
        if not sample.is_whole or any(d.code[0] in "PS" for d in row.diagnostics):
            column = next((d.column for d in row.diagnostics if d.column is not None), None)
            entry["r"] = _excerpt(row.content.decode("utf-8", "replace"), column, limit)
        samples.append(entry)
    used = {d.code for row in rows for d in row.diagnostics} | {d.code for d in chosen.general}
    return {
        "files": [
            {"name": os.fspath(path), "lines": lines}
            for path, lines in zip(paths, chosen.num_lines, strict=True)
        ],
        "rules": {
            rule.code: {"name": rule.name, "severity": rule.severity, "summary": rule.summary}
            for rule in rules
            if rule.code in used
        },
        "counts": dict(sorted(chosen.counts.items())),
        "severities": {rule.code: rule.severity for rule in rules},
        "general": [_finding(d) for d in chosen.general[:MAX_FINDINGS]],
        "num_cut": num_cut,
        "notes": [],
        "texts": list(texts),
        "samples": samples,
        "images": [[i.path, 10_000, 10_000, i.problem or " " * 80] for i in gallery.images],
    }


def _finding(diagnostic: Diagnostic) -> list[Any]:
    return [
        diagnostic.code,
        diagnostic.severity,
        diagnostic.message[:1000],
        diagnostic.help[:1000],
        diagnostic.pointer,
        [[label.message[:200], label.file, label.line] for label in diagnostic.labels[:10]],
    ]


def _excerpt(line: str, column: int | None, limit: int) -> list[Any]:
    """[the part around `column`, where the column is in it or -1]."""
    spot = 0 if column is None else column - 1
    start = max(0, min(spot - limit // 2, len(line) - limit))
    text = line[start : start + limit]
    before, after = ("…" if start else ""), ("…" if start + limit < len(line) else "")
    return [before + text + after, -1 if column is None else spot - start + len(before)]


_ESCAPES = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}


def _json(content: object) -> bytes:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, from an escape or a file name
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


class _Template:
    """`preview.html`, split at the places for data and policy."""

    def __init__(self) -> None:
        html = package_files("phi3v_data").joinpath("preview.html").read_text(encoding="utf-8")
        script = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
        style = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
        assert len(script) == len(style) == 1
        policy = (
            "default-src 'none'; img-src data:; "
            f"script-src '{_sha256(script[0])}'; style-src '{_sha256(style[0])}'; "
            "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; "
            "trusted-types 'none'"
        )
        before, _, after = html.replace("{{policy}}", policy, 1).partition("{{data}}")
        assert after, "preview.html has no place for the data"
        self._before, self._after = before.encode(), after.encode()
        self.num_bytes = len(self._before) + len(self._after)

    def write(self, write: Callable[[bytes], object], content: bytes, data: list[str]) -> int:
        """Write the page; the thumbnails follow as the last key of the JSON object."""
        parts = (
            self._before,
            content[:-1] + b',"thumbnails":',
            json.dumps(data, separators=(",", ":")).encode(),
            b"}",
            self._after,
        )
        for part in parts:
            write(part)
        return sum(len(part) for part in parts)


def _sha256(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
