"""Find all that is wrong with conversations files, before a training run does.

    report = validate(["train.jsonl", "val.jsonl"], images="images")
    report.exit_status                          # 0: no errors, 1: errors
    for diagnostic in report.diagnostics: ...   # Diagnostic(code="I101", file=..., line=17, ...)

Three passes, each over all cores:

1. Blocks of lines: the rules about one line, and facts of all lines (`block_check`).
2. Every distinct image, once (`image_check`).
3. The lines whose images have something wrong, read again; most data sets have none.

Then the rules across samples look at the facts. Memory does not grow with the size of the files but
for eight bytes a sample and rule, and the paths of distinct images.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from phi3v_data.block_check import Block, BlockResult, Options, check_block, diagnostic, parse
from phi3v_data.checked_lines import MAX_PER_RULE, AnyPath, Progress, missing_root
from phi3v_data.diagnostics import Diagnostic, Report
from phi3v_data.image_check import ImageCheck, Level, check_image
from phi3v_data.jsonl import default_image_root, read_lines
from phi3v_data.quick_scan import QuickSample
from phi3v_data.rules import RULES, Context, Line, select_rules
from phi3v_data.rules.across import MAX_LABELS, Facts, FileFacts, Repeat
from phi3v_data.rules.rule import Rule
from phi3v_data.schema import Sample, Turn
from phi3v_data.worker_pool import num_cores, start_workers

RulesFor = Callable[[str], tuple[Rule, ...]]
"""A file to the rules that run on it."""

BLOCK_BYTES = 1 << 18
"""Of JSONL, in one task: its columns stay in the cache of a core."""

SMALL_BYTES = 4 << 20
"""Files of so much in all, and not many images, are checked in this process."""

BATCH_IMAGES = 64
"""Images in one task."""

FEW_IMAGES = 32
"""So few are checked in this process."""

WINDOW = 4
"""Tasks under way, a worker."""

D_ID = "D101"

_OUR_CODES = frozenset(rule.code for rule in RULES)


def validate(
    paths: Sequence[AnyPath],
    *,
    images: AnyPath | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    rules_for: RulesFor | None = None,
    allow_missing_answer: bool = False,
    num_crops: int = 16,
    level: Level = "deep",
    use_cache: bool = False,
    max_errors: int | None = None,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check conversations files, the splits of one data set.

    Args:
        paths: JSONL files, that of training first. Ids are unique within each.
        images: the image root; by default `images/` beside each file, else its folder.
        select: code prefixes of the rules to run; by default those that are on by default.
        ignore: code prefixes of rules not to run.
        rules_for: which rules run on a file, instead of `select` and `ignore`.
        allow_missing_answer: the last turn may lack its answer (test splits).
        num_crops: most crops an image in training; decides how long and thin one may be (I105).
        level: how closely images are looked at; see `image_check`.
        use_cache: believe what an earlier run found out about files that did not change.
        max_errors: stop looking at so many errors.
        num_workers: processes; by default one a core. They are started for large data only.
        progress: called with (done, in all), in bytes of JSONL.

    Raises:
        ValueError: no files, a file that is not there, an unknown rule, `num_crops` below 1.
    """
    if not paths:
        raise ValueError("no files to check; expected at least one JSONL file")
    if num_crops < 1:
        raise ValueError(f"num_crops: expected 1 or more, got {num_crops}")
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"{os.fspath(path)}: no such file")
    chosen = select_rules(tuple(select), tuple(ignore))
    files = list(dict.fromkeys(os.fspath(path) for path in paths))
    run = _Run(
        files=files,
        roots={
            file: os.fspath(images) if images is not None else os.fspath(default_image_root(file))
            for file in files
        },
        rules={file: rules_for(file) if rules_for else chosen for file in files},
        allow_missing_answer=allow_missing_answer,
        num_crops=num_crops,
        level=level,
        use_cache=use_cache,
        max_errors=max_errors,
        num_workers=num_workers or num_cores(),
        progress=progress,
    )
    return run.report()


@dataclass
class _File:
    """What is known of one file so far."""

    num_lines: int = 0
    """All lines, blank ones too."""

    num_filled: int = 0
    blanks: list[int] = field(default_factory=list[int])
    last_filled: int = 0
    ids: list[Any] = field(default_factory=list[Any])
    id_lines: list[Any] = field(default_factory=list[Any])
    contents: list[Any] = field(default_factory=list[Any])
    image_lines: list[Any] = field(default_factory=list[Any])
    invalid: set[int] = field(default_factory=set[int])
    """Numbers of lines with an error."""

    images: dict[str, int] = field(default_factory=dict[str, int])
    """Path → the first line that has it."""

    facts: FileFacts = field(default_factory=FileFacts)


class _Run:
    """One validation, from files to a report."""

    def __init__(
        self,
        *,
        files: list[str],
        roots: dict[str, str],
        rules: dict[str, tuple[Rule, ...]],
        allow_missing_answer: bool,
        num_crops: int,
        level: Level,
        use_cache: bool,
        max_errors: int | None,
        num_workers: int,
        progress: Progress | None,
    ) -> None:
        self.roots = roots
        self.rules = rules
        self.allow_missing_answer = allow_missing_answer
        self.num_crops = num_crops
        self.level: Level = level
        self.use_cache = use_cache
        self.max_errors = max_errors
        self.num_workers = num_workers
        self.progress = progress
        self.of = {file: _File() for file in files}
        self.sizes = {file: os.path.getsize(file) for file in files}
        self.all_rules = {rule.code: rule for file in files for rule in rules[file]}
        self.takes_facts = any(rule.subject == "dataset" for rule in self.all_rules.values())
        self.takes_images = any(code.startswith("I") for code in self.all_rules)
        self.kept: list[Diagnostic] = []
        self.counts: Counter[str] = Counter()
        self.num_kept: Counter[str] = Counter()
        self.num_errors = 0
        self.num_images = 0

    def report(self) -> Report:
        """Do it."""
        total = sum(self.sizes.values())
        with _workers(self.num_workers if total > SMALL_BYTES else 0) as run_all:
            self._check_lines(run_all)
        self._check_blanks()
        self._check_ids()
        if self.takes_images and not self.is_full:
            num_paths = sum(len(found.images) for found in self.of.values())
            with _workers(self.num_workers if num_paths > FEW_IMAGES else 0) as run_all:
                self._check_images(run_all)
        elif self.takes_facts:
            for found in self.of.values():
                _note_images(found, {})
        if not self.is_full:
            self._check_across()
        if self.progress is not None:
            self.progress(total, total)
        order = {file: number for number, file in enumerate(self.of)}
        self.kept.sort(key=lambda d: (order[d.file], d.line or 0))
        num_filled = sum(found.num_filled for found in self.of.values())
        return Report(
            files=tuple(self.of),
            num_lines=num_filled,
            num_valid=num_filled - sum(len(found.invalid) for found in self.of.values()),
            num_images=self.num_images,
            counts={code: self.counts[code] for code in self.all_rules if self.counts[code]},
            diagnostics=tuple(self.kept),
            rules=tuple(self.all_rules),
            severities={code: rule.severity for code, rule in self.all_rules.items()},
            is_complete=not self.is_full,
        )

    # --- what is found

    @property
    def is_full(self) -> bool:
        """Whether there are errors enough."""
        return self.max_errors is not None and self.num_errors >= self.max_errors

    def _add(self, found: Diagnostic, count: int = 1) -> None:
        self.counts[found.code] += count
        if found.severity == "error":
            self.num_errors += count
            if found.line is not None:
                self.of[found.file].invalid.add(found.line)
        if self.num_kept[found.code] < MAX_PER_RULE:
            self.num_kept[found.code] += 1
            self.kept.append(found)

    # --- lines

    def _check_lines(self, run_all: "_RunAll") -> None:
        """The rules about one line, and the facts of all."""
        done, total = 0, sum(self.sizes.values())
        share = 0.5 if self.takes_images else 1.0
        skipped: set[str] = set()
        for (block, _), result in run_all(_check_block, self._blocks()):
            if block.file not in skipped:
                self._take_block(block, result)
            if result.is_utf16:
                skipped.add(block.file)
            done += block.end - block.start
            if self.progress is not None:
                self.progress(int(done * share), total)
            if self.is_full:
                return

    def _blocks(self) -> Iterator[tuple[Block, Options]]:
        for file, size in self.sizes.items():
            options = Options(
                rules=tuple(rule for rule in self.rules[file] if _is_about_a_line(rule)),
                allow_missing_answer=self.allow_missing_answer,
                num_crops=self.num_crops,
                takes_images=self.takes_images,
                takes_facts=self.takes_facts,
                has_other_rules=any(
                    rule.code not in _OUR_CODES and rule.subject != "dataset"
                    for rule in self.rules[file]
                ),
                max_per_rule=MAX_PER_RULE,
            )
            for start in range(0, size, BLOCK_BYTES):
                yield Block(file, start, min(size, start + BLOCK_BYTES)), options

    def _take_block(self, block: Block, result: BlockResult) -> None:
        found = self.of[block.file]
        base = found.num_lines + 1
        found.num_lines += result.num_lines
        found.num_filled += result.num_filled
        found.blanks.extend(number + base for number in result.blanks)
        num_last = result.num_lines
        while result.blanks and num_last - 1 in result.blanks[-1:]:
            num_last -= 1
            result.blanks.pop()
        if num_last:
            found.last_filled = base + num_last - 1
        found.invalid.update(number + base for number in result.invalid)
        kept: Counter[str] = Counter()
        for number, finding in result.findings:
            kept[finding.code] += 1
            self._add(replace(finding, line=number + base))
        for code, count in (result.counts - kept).items():
            self.counts[code] += count
            if self.all_rules[code].severity == "error":
                self.num_errors += count
        found.ids.append(result.ids)
        found.id_lines.append(result.id_lines + base)
        found.contents.append(result.contents)
        found.image_lines.append(result.image_lines + base)
        for image, number in result.images.items():
            found.images.setdefault(image, number + base)
        facts = found.facts
        facts.num_samples += len(result.ids)
        for group, number in result.groups.items():
            facts.first_of_group.setdefault(group, number + base)
        if result.labels is None or facts.labels is None:
            facts.labels = None
            return
        for label, (count, number) in result.labels.items():
            facts.labels[label] += count
            facts.first_of_label.setdefault(label, number + base)
        if len(facts.labels) > MAX_LABELS:
            facts.labels = None

    def _check_blanks(self) -> None:
        """Blank lines before the last sample of a file."""
        for file, found in self.of.items():
            rules = [rule for rule in self.rules[file] if rule.subject == "line"]
            for number in found.blanks:
                if number < found.last_filled:
                    context = self._context(file, number, {}, {})
                    line = Line(b"", number, None)
                    for rule in rules:
                        for finding in rule.check(line, context):
                            self._add(diagnostic(rule, finding, context, None))

    # --- ids

    def _check_ids(self) -> None:
        """D101: equal hashes say where to look, the ids themselves decide."""
        for file, found in self.of.items():
            rule = next((rule for rule in self.rules[file] if rule.code == D_ID), None)
            if rule is None or not found.ids:
                continue
            lines = _repeated(np.concatenate(found.ids), np.concatenate(found.id_lines))
            if not lines:
                continue
            first: dict[str, tuple[str, int]] = {}
            for number, sample in _samples_of(file, lines):
                context = self._context(file, number, {}, first)
                for finding in rule.check(sample, context):
                    self._add(diagnostic(rule, finding, context, sample))
                first.setdefault(sample.id, (file, number))

    def _context(
        self,
        file: str,
        number: int,
        images: dict[str, ImageCheck],
        ids: dict[str, tuple[str, int]],
    ) -> Context:
        return Context(
            file=file,
            line_number=number,
            image_root=self.roots[file],
            images=images,
            ids=ids,
            allow_missing_answer=self.allow_missing_answer,
            num_crops=self.num_crops,
        )

    # --- images

    def _check_images(self, run_all: "_RunAll") -> None:
        by_root: dict[str, list[str]] = {}
        for file, found in self.of.items():
            root = self.roots[file]
            if found.images and not os.path.isdir(root):
                self._add_missing_root(file, missing_root(file, Path(root)))
            else:
                by_root.setdefault(root, []).append(file)
        for root, files in by_root.items():
            paths = list(dict.fromkeys(path for file in files for path in self.of[file].images))
            self.num_images += len(paths)
            odd: dict[str, ImageCheck] = {}
            hashes: dict[str, int] = {}
            done, total = 0, sum(self.sizes.values())
            for batch, checks in run_all(_check_batch, self._batches(root, files, paths)):
                for path, (digest, check) in zip(batch.paths, checks, strict=True):
                    hashes[path] = digest
                    if check is not None:
                        odd[path] = check
                done += len(batch.paths)
                if self.progress is not None:
                    self.progress(int(total * (0.5 + 0.5 * done / len(paths))), total)
            for file in files:
                _note_images(self.of[file], hashes)
                if odd and not self.is_full:
                    self._check_odd_images(file, odd)

    def _batches(self, root: str, files: list[str], paths: list[str]) -> "Iterator[_Batch]":
        rules = tuple(
            {
                rule.code: rule
                for file in files
                for rule in self.rules[file]
                if rule.code.startswith("I") and rule.subject == "sample"
            }.values()
        )
        for start in range(0, len(paths), BATCH_IMAGES):
            batch = tuple(paths[start : start + BATCH_IMAGES])
            yield _Batch(
                os.path.abspath(root), batch, rules, self.num_crops, self.level, self.use_cache
            )

    def _check_odd_images(self, file: str, odd: dict[str, ImageCheck]) -> None:
        """Run the rules about images on the lines that have one of `odd`."""
        found = self.of[file]
        mine = {path: check for path, check in odd.items() if path in found.images}
        rules = [rule for rule in self.rules[file] if rule.code.startswith("I")]
        if not mine or not rules:
            return
        missing = [path for path, check in mine.items() if check.kind == "missing"]
        if 1 < len(missing) == len(found.images) and any(rule.code == "I101" for rule in rules):
            first = f"image {missing[0]!r} {mine[missing[0]].problem}"
            root = self.roots[file]
            everything = replace(
                missing_root(file, Path(root)),
                message=f"none of its {len(missing):,} images is under {root!r}; "
                f"the first: {first}",
                num_findings=len(missing),
            )
            self._add_missing_root(file, everything)
            return
        for number, sample in _samples_with(file, mine):
            images = {path: mine[path] for path in sample.images if path in mine}
            context = self._context(file, number, images, {})
            for rule in rules:
                if rule.subject == "sample":
                    for finding in rule.check(sample, context):
                        self._add(diagnostic(rule, finding, context, sample))
            if self.is_full:
                return

    def _add_missing_root(self, file: str, found: Diagnostic) -> None:
        """One cause, many lines: none of those with images is valid."""
        if all(rule.code != found.code for rule in self.rules[file]):
            return
        self._add(found)
        for numbers in self.of[file].image_lines:
            self.of[file].invalid.update(numbers.tolist())

    # --- across samples

    def _check_across(self) -> None:
        facts = Facts({file: found.facts for file, found in self.of.items()}, self._repeats())
        for rule in self.all_rules.values():
            if rule.subject != "dataset":
                continue
            for finding in rule.check(facts):
                if any(other.code == rule.code for other in self.rules[finding.file]):
                    self._add(
                        Diagnostic(
                            code=rule.code,
                            severity=rule.severity,
                            message=finding.message,
                            help=finding.help,
                            file=finding.file,
                            line=finding.line,
                            labels=finding.labels,
                            num_findings=finding.num_findings,
                        )
                    )

    def _repeats(self) -> list[Repeat]:
        """Samples that an earlier line has, whatever their ids."""
        files = list(self.of)
        hashes = [np.concatenate(f.contents) if f.contents else _NONE for f in self.of.values()]
        lines = [np.concatenate(f.id_lines) if f.id_lines else _NONE for f in self.of.values()]
        if not files or not sum(map(len, hashes)):
            return []
        numbers = np.concatenate(lines).astype(np.int64)
        owners = np.repeat(np.arange(len(files)), [len(part) for part in hashes])
        everything = np.concatenate(hashes)
        order = np.argsort(everything, kind="stable")
        ordered = everything[order]
        is_first = np.ones(len(ordered), dtype=bool)
        is_first[1:] = ordered[1:] != ordered[:-1]
        if is_first.all():
            return []
        starts = np.maximum.accumulate(np.where(is_first, np.arange(len(ordered)), 0))
        later = np.flatnonzero(~is_first)
        pairs = sorted(zip(order[later].tolist(), order[starts[later]].tolist(), strict=True))
        return [
            Repeat(
                files[owners[again]], int(numbers[again]), files[owners[first]], int(numbers[first])
            )
            for again, first in pairs
        ]


_NONE = np.empty(0, dtype=np.uint64)


def _is_about_a_line(rule: Rule) -> bool:
    return rule.subject != "dataset" and not rule.code.startswith("I") and rule.code != D_ID


def _note_images(found: _File, hashes: dict[str, int]) -> None:
    """Where each image is first, by the hash of its content, or else of its path."""
    for path, number in found.images.items():
        digest = hashes.get(path) or xxhash.xxh3_64_intdigest(path.encode("utf-8", "replace"))
        found.facts.first_of_image.setdefault(digest, number)


def _repeated(hashes: Any, lines: Any) -> set[int]:
    """The lines whose hash another line has, the first of them included."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    is_same = ordered[1:] == ordered[:-1]
    found = np.zeros(len(ordered), dtype=bool)
    found[1:] |= is_same
    found[:-1] |= is_same
    return set(lines[order[found]].tolist())


def _samples_of(file: str, numbers: set[int]) -> Iterator[tuple[int, Sample]]:
    """The samples in some lines."""
    for number, content in read_lines(file):
        if number in numbers:
            sample, _ = parse(content)
            if sample is not None:
                yield number, sample


_decode: Callable[[bytes], Any] = msgspec.json.Decoder(QuickSample).decode


def _samples_with(file: str, images: dict[str, ImageCheck]) -> Iterator[tuple[int, Sample]]:
    """The samples that have one of some images."""
    for number, content in read_lines(file):
        try:
            quick = _decode(content)
            turns = [turn.images for turn in quick.conversations if turn.images]
            is_wanted = any(path in images for paths in turns for path in paths)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError):
            is_wanted = True
        if is_wanted:
            sample, _ = parse(content)
            if sample is not None and any(path in images for path in sample.images):
                yield number, sample


# --- workers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Images to check."""

    root: str
    paths: tuple[str, ...]
    rules: tuple[Rule, ...]
    num_crops: int
    level: Level
    use_cache: bool


def _check_block(task: tuple[Block, Options]) -> BlockResult:
    return check_block(*task)


def _check_batch(batch: _Batch) -> list[tuple[int, ImageCheck | None]]:
    """xxh3 of each image, and what was found where a rule has something to say about it."""
    from contextlib import ExitStack

    from phi3v_data.check_cache import open_cache

    results: list[tuple[int, ImageCheck | None]] = []
    with ExitStack() as stack:
        cache = stack.enter_context(open_cache(batch.level)) if batch.use_cache else None
        for path in batch.paths:
            check = check_image(Path(batch.root), path, batch.level, cache)
            results.append((check.xxh3_64, check if _is_odd(path, check, batch) else None))
    return results


def _is_odd(path: str, check: ImageCheck, batch: _Batch) -> bool:
    if check.kind != "ok":
        return True
    turn = Turn(images=(path,), user="", assistant="")
    sample = Sample(id="-", source="-", conversations=(turn,))
    context = Context(
        file="",
        line_number=1,
        image_root=batch.root,
        images={path: check},
        ids={},
        allow_missing_answer=True,
        num_crops=batch.num_crops,
    )
    return any(True for rule in batch.rules for _ in rule.check(sample, context))


_RunAll = Callable[[Callable[[Any], Any], Iterator[Any]], Iterator[tuple[Any, Any]]]
"""(function, tasks) to (task, result), in the order of tasks."""


@contextmanager
def _workers(num_workers: int) -> Generator[_RunAll, None, None]:
    """Yield what runs tasks: in processes, or in this one where `num_workers` is below 2."""
    if num_workers < 2:
        yield lambda function, tasks: ((task, function(task)) for task in tasks)
        return
    # Forking is ten times faster than starting anew, and safe where no other thread holds a lock.
    method = "fork" if threading.active_count() == 1 else "spawn"
    with ProcessPoolExecutor(num_workers, mp_context=get_context(method)) as pool:
        start_workers(pool, num_workers)

        def run_all(
            function: Callable[[Any], Any], tasks: Iterator[Any]
        ) -> Iterator[tuple[Any, Any]]:
            running: list[tuple[Any, Future[Any]]] = []
            try:
                for task in tasks:
                    running.append((task, pool.submit(function, task)))
                    if len(running) >= WINDOW * num_workers:
                        first, future = running.pop(0)
                        yield first, future.result()
                for first, future in running:
                    yield first, future.result()
            finally:
                for _, future in running:
                    future.cancel()

        yield run_all
