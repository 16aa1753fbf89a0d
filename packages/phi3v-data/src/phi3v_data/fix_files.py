"""Repair conversations files: line by line with `phi3v_data.fixes`, then ids across lines.

    result = fix_files(["train.jsonl"])               # train.fixed.jsonl, safe repairs only
    result = fix_files(["train.jsonl"], unsafe=True, in_place=True)
    print(to_text(result))

    train.fixed.jsonl     the lines of train.jsonl: valid ones byte for byte, others repaired
    train.dropped.jsonl   what an unsafe fix gave up, with line number, code and reason:
        {"line": 17, "code": "T101", "reason": "the answer is empty",
         "pointer": "/conversations/0/assistant", "content": "..."}
    train.jsonl.bak       in place: the file as it was

A line is repaired, checked again by the rules, and repaired again, until the rules find nothing
that a repair helps. So a second run changes nothing.
"""

import base64
import codecs
import heapq
import itertools
import json
import os
import re
import shutil
import tempfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import ValidationError

from phi3v_data.atomic import TEMPORARY_MARK, open_atomic
from phi3v_data.checked_lines import AnyPath, Checked, Progress, check
from phi3v_data.diagnostics import Diagnostic
from phi3v_data.fixes import Place, folder_names, repair
from phi3v_data.jsonl import byte_order_mark, default_image_root
from phi3v_data.rules import select_rules
from phi3v_data.rules.rule import Rule
from phi3v_data.schema import Sample

MOST_ROUNDS = 8
"""Repairs and checks of one line: parsing, schema and text each show what is beneath."""

WINDOW_LINES = 4096
"""Faulty lines that are repaired together."""

WINDOW_BYTES = 32 * 2**20
"""Lines held in memory, until the faulty ones among them are repaired."""

DUPLICATE_ID = "D101"
BLANK_LINE = "P107"


@dataclass(frozen=True, slots=True)
class FixedFile:
    """What became of one file."""

    source: str
    target: str
    """What was written; in place: the source. Nothing was written there if `is_changed` is false
    and it is the source."""

    backup: str | None
    """In place: the file as it was, if it was changed."""

    dropped_file: str | None
    """The lines dropped, if any."""

    is_changed: bool
    num_lines: int
    """Lines of the source that are not blank."""

    num_repaired: int
    """Lines that were changed and kept."""

    num_dropped: int
    fixed: Mapping[str, int]
    """Code → findings that are gone from the lines kept."""

    dropped: Mapping[str, int]
    """Code → lines dropped for it: the first error of a line counts."""

    errors_left: Mapping[str, int]
    """Code → errors in what was written."""

    warnings_left: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class FixResult:
    """What became of all files."""

    files: tuple[FixedFile, ...]

    @property
    def num_errors_left(self) -> int:
        """Errors in what was written."""
        return sum(sum(file.errors_left.values()) for file in self.files)

    @property
    def exit_status(self) -> int:
        """0 where what was written has no errors, else 1."""
        return 1 if self.num_errors_left else 0


def fix_files(
    paths: Sequence[AnyPath],
    *,
    images: AnyPath | None = None,
    unsafe: bool = False,
    in_place: bool = False,
    out_dir: AnyPath | None = None,
    rules: tuple[Rule, ...] | None = None,
    rules_for: Callable[[str], tuple[Rule, ...]] | None = None,
    allow_missing_answer: bool = False,
    num_crops: int = 16,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> FixResult:
    """Write conversations files anew, without what can be repaired.

    A valid line goes through byte for byte. Memory is bounded, whatever the size of a file.

    Args:
        paths: JSONL files.
        images: the image root; by default `images/` beside each file, else its folder.
        unsafe: guess, too, and drop the lines that still have errors. A sample whose id is used
            before gets a new one (`-2`), or is dropped where it is the same sample.
        in_place: replace each file; it is kept as `<name>.bak`, beside older backups.
        out_dir: write the files there, under their names; by default `train.jsonl` becomes
            `train.fixed.jsonl` beside it.
        rules: what to look for, by default what `validate` does; what no rule finds is not
            repaired.
        rules_for: which rules run on a file, instead of `rules`.
        allow_missing_answer: the last turn may lack its answer (test splits).
        num_crops: as in `validate`.
        num_workers: as in `validate`.
        progress: called with (bytes done, bytes in all).

    Raises:
        ValueError: no files, a file or image root that is not there, targets that would overwrite
            each other or an input, a file that changes meanwhile; or an unsafe fix would drop all
            samples with images because none is under the image root. Nothing is written then for
            this file, and no later one.
        OSError: a file cannot be written.
    """
    sources = [Path(path) for path in paths]
    targets = _targets(sources, in_place, None if out_dir is None else Path(out_dir))
    if images is not None and not os.path.isdir(images):
        raise ValueError(f"the image root {os.fspath(images)!r} is not a folder")
    if rules is None:
        rules = select_rules()
    total = sum(source.stat().st_size for source in sources)
    files: list[FixedFile] = []
    done = 0
    for source, target in zip(sources, targets, strict=True):
        options: dict[str, Any] = {
            "images": Path(images) if images is not None else default_image_root(source),
            "allow_missing_answer": allow_missing_answer,
            "num_crops": num_crops,
            "num_workers": num_workers,
        }
        before = done

        def shown(part: int, of: int, before: int = before) -> None:
            if progress is not None:
                progress(min(before + part, total), total)

        of_file = rules if rules_for is None else rules_for(os.fspath(source))
        files.append(_FileFix(source, target, in_place, unsafe, of_file, options).run(shown))
        done += source.stat().st_size
    if progress is not None:
        progress(total, total)
    return FixResult(tuple(files))


def to_text(result: FixResult) -> str:
    """What was done, for people: a line or a few for each file."""
    return "\n".join(_file_text(file) for file in result.files)


def _file_text(file: FixedFile) -> str:
    if not file.is_changed:
        text = f"{file.source}: nothing to fix"
        if file.target != file.source:
            text += f"; copied to {file.target}"
    else:
        text = f"{file.source} → {file.target}: {_lines_text(file.num_repaired)} repaired"
        text += _by_code(file.fixed)
    if file.num_dropped:
        text += f", {_lines_text(file.num_dropped)} dropped{_by_code(file.dropped)}"
        text += f"\n  dropped lines: {file.dropped_file}"
    if file.backup:
        text += f"\n  as it was: {file.backup}"
    if file.errors_left:
        num_left = sum(file.errors_left.values())
        text += f"\n  {num_left:,} error{'' if num_left == 1 else 's'} left"
        text += _by_code(file.errors_left)
    return text


def _lines_text(number: int) -> str:
    return f"{number:,} line{'' if number == 1 else 's'}"


def _by_code(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{code} {n:,}' for code, n in counts.items())})" if counts else ""


def _targets(sources: list[Path], in_place: bool, out_dir: Path | None) -> list[Path]:
    """Where each file goes; see `fix_files`."""
    if not sources:
        raise ValueError("no files to fix; expected at least one JSONL file")
    for source in sources:
        if not source.is_file():
            raise ValueError(f"{source}: no such file")
    if in_place and out_dir is not None:
        raise ValueError("in_place and out_dir exclude each other: which of them?")
    if in_place:
        targets = sources
    elif out_dir is not None:
        targets = [out_dir / source.name for source in sources]
    else:
        targets = [source.with_name(f"{source.stem}.fixed{source.suffix}") for source in sources]
    real_sources = {source.resolve() for source in sources}
    seen: set[Path] = set()
    for source, target in zip(sources, targets, strict=True):
        real = target.resolve()
        if real in seen:
            raise ValueError(f"{target} would be written twice; fix {source} by itself")
        if not in_place and real in real_sources:
            raise ValueError(f"{target} is itself to be fixed; in place, or to another out_dir")
        seen.add(real)
    return targets


def _dropped_path(target: Path, in_place: bool) -> Path:
    """`train.dropped.jsonl`. In place an older one holds what is nowhere else: it stays."""
    stem = target.stem.removesuffix(".fixed")
    path = target.with_name(f"{stem}.dropped.jsonl")
    number = 2
    while in_place and path.exists():
        path = target.with_name(f"{stem}.dropped-{number}.jsonl")
        number += 1
    return path


@dataclass(slots=True)
class _Fault:
    """A line that has findings, or one between two such."""

    number: int
    original: bytes
    """The line without its break."""

    line_break: bytes
    diagnostics: tuple[Diagnostic, ...]
    content: bytes
    fixed: Counter[str] = field(default_factory=Counter[str])

    @property
    def codes(self) -> Counter[str]:
        return Counter(diagnostic.code for diagnostic in self.diagnostics)


class _FileFix:
    """The fix of one file: counts, and the steps that share them."""

    def __init__(
        self,
        source: Path,
        target: Path,
        in_place: bool,
        unsafe: bool,
        rules: tuple[Rule, ...],
        options: dict[str, Any],
    ) -> None:
        self._source = source
        self._target = target
        self._in_place = in_place
        self._unsafe = unsafe
        # Rules about the data set as a whole name no line that a repair could change.
        of_lines = [rule for rule in rules if rule.subject in ("line", "sample")]
        self._line_rules = tuple(rule for rule in of_lines if not rule.code.startswith("D"))
        self._sample_rules = tuple(rule for rule in of_lines if rule.code.startswith("D"))
        self._order = [rule.code for rule in rules]
        self._options = options
        self._names = lru_cache(maxsize=64)(folder_names)
        self._num_lines = 0
        self._num_repaired = 0
        self._fixed: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._errors_left: Counter[str] = Counter()
        self._warnings_left: Counter[str] = Counter()
        self._removed = array("Q")
        """Numbers of lines that are not written."""
        self._found_an_image = False
        self._first_missing: Diagnostic | None = None

    def run(self, progress: Progress) -> FixedFile:
        """Fix, then write; see `fix_files`."""
        before = _state(self._source)
        folder = self._target.resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        mark = f".{self._target.name[:80]}{TEMPORARY_MARK}"
        with tempfile.TemporaryDirectory(prefix=mark, dir=folder) as scratch:
            self._scratch = Path(scratch)
            source = self._as_utf8()
            lines = self._scratch / "lines.jsonl"
            dropped = self._scratch / "dropped.jsonl"
            with open(lines, "wb") as lines_file, open(dropped, "wb") as dropped_file:
                self._repair_lines(source, lines_file, dropped_file, progress)
            self._refuse_to_drop_all_images()
            late = self._scratch / "dropped-late.jsonl"
            with open(late, "wb") as dropped_file:
                new_ids = self._settle_ids(source, lines, dropped_file)
            if _state(self._source) != before:
                raise ValueError(f"{self._source} changed while it was fixed; nothing was written")
            return self._write(lines, [dropped, late], new_ids)

    # ------------------------------------------------------------- lines

    def _as_utf8(self) -> Path:
        """The file, or, where it is UTF-16 (P102), its text as UTF-8 in the scratch folder.

        An unsafe fix replaces what is not UTF-16 by U+FFFD.
        """
        with open(self._source, "rb") as file:
            start = file.read(4)
        is_wanted = any(rule.code == "P102" for rule in self._line_rules)
        if not is_wanted or byte_order_mark(start) != "UTF-16":
            return self._source
        encoding = "utf-32" if start == b"\xff\xfe\0\0" else "utf-16"
        decoder = codecs.getincrementaldecoder(encoding)("replace" if self._unsafe else "strict")
        converted = self._scratch / "utf8.jsonl"
        with open(self._source, "rb") as file, open(converted, "wb") as out:
            try:
                while block := file.read(2**20):
                    out.write(decoder.decode(block).encode())
                out.write(decoder.decode(b"", final=True).encode())
            except UnicodeDecodeError:
                return self._source  # one finding, and it stays
        self._fixed["P102"] += 1
        return converted

    def _repair_lines(
        self, source: Path, lines: BinaryIO, dropped: BinaryIO, progress: Progress
    ) -> None:
        """Write the lines of `source`, repaired; a dropped one leaves a blank line behind.

        So a line keeps its number, by which later steps find it.
        """
        checks = check([source], rules=self._line_rules, progress=progress, **self._options)
        window: list[_Fault] = []
        num_faulty = num_bytes = 0
        blanks = range(1, 1)  # the blank lines since the last one that is not
        for number, raw, checked in _with_checks(source, checks):
            content = raw.rstrip(b"\r\n")
            diagnostics = _of_line(checked)
            if content.strip():
                self._num_lines += 1
                self._remove_blank(blanks)
                blanks = range(number + 1, number + 1)
            else:
                blanks = range(blanks.start, number + 1)
            if checked is not None:
                self._note_images(checked)
            if not diagnostics and not window:
                lines.write(raw)
                continue
            fault = _Fault(number, content, raw[len(content) :], diagnostics, content)
            window.append(fault)
            num_faulty += bool(diagnostics)
            num_bytes += len(raw)
            if num_faulty >= WINDOW_LINES or num_bytes >= WINDOW_BYTES:
                self._settle(window, lines, dropped)
                window, num_faulty, num_bytes = [], 0, 0
        self._settle(window, lines, dropped)

    def _remove_blank(self, numbers: range) -> None:
        """Leave out blank lines that have a line after them, where a rule objects (P107).

        Safe: they hold nothing, and readers that do not skip them fail.
        """
        if BLANK_LINE in self._order and numbers:
            self._fixed[BLANK_LINE] += len(numbers)
            self._removed.extend(numbers)

    def _note_images(self, checked: Checked) -> None:
        """Remember whether any image is where a path says: else the root is wrong."""
        if any(image.kind in ("ok", "undecodable") for image in checked.images):
            self._found_an_image = True

    def _settle(self, window: list[_Fault], lines: BinaryIO, dropped: BinaryIO) -> None:
        """Repair the faulty lines of a window as far as it goes, and write all of them."""
        open_faults = [fault for fault in window if fault.diagnostics]
        for _ in range(MOST_ROUNDS):
            attempts: list[tuple[_Fault, bytes]] = []
            for fault in open_faults:
                place = Place(
                    self._source,
                    fault.number,
                    self._options["images"],
                    self._options["allow_missing_answer"],
                    self._names,
                )
                new = repair(fault.content, set(fault.codes), place, unsafe=self._unsafe)
                if new is not None:
                    attempts.append((fault, new))
            if not attempts:
                break
            still_open: list[_Fault] = []
            results = self._check_again([new for _, new in attempts])
            for (fault, new), diagnostics in zip(attempts, results, strict=True):
                before, after = fault.codes, Counter(d.code for d in diagnostics)
                if before <= after:
                    continue  # it did not help: the line stays as it was
                fault.fixed += before - after
                fault.content, fault.diagnostics = new, diagnostics
                if diagnostics:
                    still_open.append(fault)
            open_faults = still_open
        for fault in window:
            self._finish(fault, lines, dropped)

    def _check_again(self, contents: list[bytes]) -> list[tuple[Diagnostic, ...]]:
        """What the rules say about lines, each by itself."""
        path = self._scratch / "again.jsonl"
        with open(path, "wb") as file:
            file.write(_FIRST_LINE)  # what is special about a first line is no matter of theirs
            file.writelines(content + b"\n" for content in contents)
        results: list[tuple[Diagnostic, ...]] = [()] * len(contents)
        for checked in check([path], rules=self._line_rules, **self._options):
            if checked.line > 1:
                results[checked.line - 2] = _of_line(checked)
                self._note_images(checked)
        return results

    def _finish(self, fault: _Fault, lines: BinaryIO, dropped: BinaryIO) -> None:
        """Count a line, and write it where it belongs."""
        errors = [d for d in fault.diagnostics if d.severity == "error"]
        if not fault.content.strip() and fault.content != fault.original:
            self._fixed += fault.fixed  # a byte order mark was all there was
            self._removed.append(fault.number)
            lines.write(b"\n")
        elif errors and self._unsafe:
            if errors[0].code == "I101":
                self._first_missing = self._first_missing or errors[0]
            first = errors[0]
            self._drop(
                dropped, fault.number, fault.original, first.code, first.message, first.pointer
            )
            lines.write(b"\n")
        else:
            self._fixed += fault.fixed
            self._num_repaired += fault.content != fault.original
            for diagnostic in fault.diagnostics:
                self._count_left(diagnostic)
            lines.write(fault.content + fault.line_break)

    def _count_left(self, diagnostic: Diagnostic) -> None:
        left = self._errors_left if diagnostic.severity == "error" else self._warnings_left
        left[diagnostic.code] += 1

    def _drop(
        self,
        file: BinaryIO,
        number: int,
        content: bytes,
        code: str,
        reason: str,
        pointer: str,
    ) -> None:
        self._removed.append(number)
        self._dropped[code] += 1
        record = {"line": number, "code": code, "reason": reason}
        if pointer:
            record["pointer"] = pointer
        content = content.rstrip(b"\r\n")
        try:
            record["content"] = content.decode()
        except UnicodeDecodeError:
            record["content_base64"] = base64.b64encode(content).decode()
        # ASCII: whatever the line holds, this file can be read and shown.
        file.write(json.dumps(record).encode() + b"\n")

    def _refuse_to_drop_all_images(self) -> None:
        if (
            self._first_missing is not None
            and not self._found_an_image
            and self._dropped["I101"] > 1
        ):
            raise ValueError(
                f"{self._source}: none of its images is under "
                f"{os.fspath(self._options['images'])!r}: "
                f"{self._dropped['I101']:,} samples would be dropped, the first because "
                f"{self._first_missing.message}. Give the folder the image paths start from: "
                "--images DIR"
            )

    # --------------------------------------------------------------- ids

    def _settle_ids(self, source: Path, lines: Path, dropped: BinaryIO) -> dict[int, str]:
        """Line → new id of each sample whose id is taken; the same sample again is dropped.

        Of several lines the first that was not repaired keeps the id: what was valid stays.
        """
        repeated: set[str] = set()
        if self._sample_rules:
            for checked in check([lines], rules=self._sample_rules, **self._options):
                for diagnostic in _of_line(checked):
                    is_id = diagnostic.code == DUPLICATE_ID and diagnostic.sample_id is not None
                    if self._unsafe and is_id:
                        assert diagnostic.sample_id is not None
                        repeated.add(diagnostic.sample_id)
                    else:
                        self._count_left(diagnostic)
        if not repeated:
            return {}
        # id → digest of a sample → (it was repaired, line): the least of them keeps the sample,
        # and the least of an id keeps the id.
        keepers: defaultdict[str, dict[int, tuple[bool, int]]] = defaultdict(dict)
        taken: defaultdict[str, set[int]] = defaultdict(set)
        for number, sample, original, raw in _samples(source, lines):
            base = re.fullmatch(r"(.*)-([0-9]{1,9})", sample.id, re.DOTALL)
            if base and base[1] in repeated:
                taken[base[1]].add(int(base[2]))
            if sample.id in repeated:
                of_id, digest = keepers[sample.id], _digest(sample)
                rank = raw != original, number
                of_id[digest] = min(of_id.get(digest, rank), rank)
        owners = {id: min(of_id.values())[1] for id, of_id in keepers.items()}
        # Looked for from where the last one was found: a thousand of one id take a thousand steps.
        numbers = {id: itertools.count(2) for id in keepers}
        new_ids: dict[int, str] = {}
        for number, sample, original, raw in _samples(source, lines):
            id = sample.id
            if id not in repeated or number == owners[id]:
                continue
            keeper = keepers[id][_digest(sample)][1]
            if keeper != number:
                reason = f"id {id!r} is used twice, by the same sample: line {keeper}"
                self._drop(dropped, number, original, DUPLICATE_ID, reason, "/id")
            else:
                free = next(n for n in numbers[id] if n not in taken[id])
                new_ids[number] = f"{id}-{free}"
                self._fixed[DUPLICATE_ID] += 1
                self._num_repaired += raw == original  # else it is counted already
        return new_ids

    # ----------------------------------------------------------- writing

    def _write(self, lines: Path, dropped: list[Path], new_ids: dict[int, str]) -> FixedFile:
        is_changed = bool(self._fixed or self._removed)
        target = Path(os.path.realpath(self._target)) if self._in_place else self._target
        backup = dropped_path = None
        if self._dropped:
            dropped_path = _dropped_path(target, self._in_place)
            with open_atomic(dropped_path) as out:
                _merge(dropped, out)
        elif not self._in_place:
            _dropped_path(target, False).unlink(missing_ok=True)  # of an earlier run
        if is_changed and self._in_place:
            backup = _back_up(target)
        if is_changed or not self._in_place:
            with open_atomic(target) as out:
                self._write_lines(lines, out, new_ids)
        return FixedFile(
            source=os.fspath(self._source),
            target=os.fspath(self._target),
            backup=os.fspath(backup) if backup else None,
            dropped_file=os.fspath(dropped_path) if dropped_path else None,
            is_changed=is_changed,
            num_lines=self._num_lines,
            num_repaired=self._num_repaired,
            num_dropped=sum(self._dropped.values()),
            fixed=self._ordered(self._fixed),
            dropped=self._ordered(self._dropped),
            errors_left=self._ordered(self._errors_left),
            warnings_left=self._ordered(self._warnings_left),
        )

    def _write_lines(self, lines: Path, out: BinaryIO, new_ids: dict[int, str]) -> None:
        removed = iter(np.sort(np.array(self._removed, dtype=np.uint64)))
        next_removed = next(removed, None)
        with open(lines, "rb") as file:
            for number, raw in enumerate(file, 1):
                if number == next_removed:
                    next_removed = next(removed, None)
                    continue
                if number in new_ids:
                    content = raw.rstrip(b"\r\n")
                    raw = _with_id(content, new_ids[number]) + raw[len(content) :]
                out.write(raw)

    def _ordered(self, counts: Counter[str]) -> dict[str, int]:
        return {code: counts[code] for code in self._order if counts[code]}


_FIRST_LINE = (
    Sample.model_validate(
        {"id": "0", "source": "0", "conversations": [{"user": "0", "assistant": "0"}]}
    )
    .to_json()
    .encode()
    + b"\n"
)


def _with_checks(
    path: Path, checks: Iterator[Checked]
) -> Iterator[tuple[int, bytes, Checked | None]]:
    """(number, line with its break, what the rules say) of every line, blank ones too."""
    checked = next(checks, None)
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if checked is not None and checked.line == number:
                yield number, raw, checked
                checked = next(checks, None)
            else:
                yield number, raw, None


def _of_line(checked: Checked | None) -> tuple[Diagnostic, ...]:
    """The findings of a line; those of the file as a whole are not the line's."""
    if checked is None:
        return ()
    return tuple(d for d in checked.diagnostics if d.line is not None)


def _samples(source: Path, lines: Path) -> Iterator[tuple[int, Sample, bytes, bytes]]:
    """(number, sample, line of `source`, line) of every line of `lines` that is a sample."""
    with open(source, "rb") as originals, open(lines, "rb") as file:
        for number, (original, raw) in enumerate(zip(originals, file, strict=True), 1):
            if raw.strip():
                try:
                    yield number, Sample.from_json(raw), original, raw
                except ValidationError:
                    continue


def _digest(sample: Sample) -> int:
    import xxhash

    return xxhash.xxh3_128_intdigest(sample.to_json().encode())


def _with_id(content: bytes, id: str) -> bytes:
    """A line that is a sample, with another id."""
    record = json.loads(content.decode()) | {"id": id}
    separators = (", ", ": ") if b'": ' in content else (",", ":")
    return json.dumps(record, ensure_ascii=False, separators=separators).encode()


def _merge(parts: list[Path], out: BinaryIO) -> None:
    """Join files of dropped lines in the order of their numbers."""

    def lines(path: Path) -> Iterator[bytes]:
        with open(path, "rb") as file:
            yield from file

    def line_number(line: bytes) -> int:
        return json.loads(line)["line"]

    key: Callable[[bytes], int] = line_number
    out.writelines(heapq.merge(*map(lines, parts), key=key))


def _back_up(path: Path) -> Path:
    """Keep `path` as `<name>.bak` too, or as `.bak-2`, ... where there are older ones."""
    for number in itertools.count(1):
        backup = path.with_name(path.name + (".bak" if number == 1 else f".bak-{number}"))
        try:
            os.link(path, backup)
        except FileExistsError:
            continue
        except OSError:  # a file system without links
            if backup.exists():
                continue
            with open(path, "rb") as old, open_atomic(backup) as new:
                shutil.copyfileobj(old, new, 2**20)
        return backup
    raise AssertionError("unreachable: there is always another number")


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
