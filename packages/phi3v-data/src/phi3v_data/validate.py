"""Find all that is wrong with conversations files, before a training run does.

    report = validate(["train.jsonl", "val.jsonl"], images="images")
    report.exit_status                          # 0: no errors, 1: errors
    for diagnostic in report.diagnostics: ...   # Diagnostic(code="I101", file=..., line=17, ...)

Three passes, each over all cores:

1. Blocks of lines: the rules about one line, and facts of all lines (`block_check`).
2. Every distinct image, once (`image_pass`).
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
from typing import Any

import numpy as np

from phi3v_data.block_check import Block, BlockResult, Options, check_block, diagnostic, parse
from phi3v_data.checked_lines import MAX_PER_RULE, AnyPath, Progress
from phi3v_data.diagnostics import Diagnostic, Report
from phi3v_data.image_check import ImageCheck, Level
from phi3v_data.image_pass import FEW_IMAGES, FileImages, ImagePass, RunAll
from phi3v_data.jsonl import default_image_root, read_lines
from phi3v_data.rules import RULES, Context, Line, select_rules
from phi3v_data.rules.across import MAX_LABELS, Facts, FileFacts, Repeat
from phi3v_data.rules.rule import Rule
from phi3v_data.schema import Sample
from phi3v_data.worker_pool import num_cores, start_workers

RulesFor = Callable[[str], tuple[Rule, ...]]
"""A file to the rules that run on it."""

BLOCK_BYTES = 1 << 18
"""Of JSONL, in one task: its columns stay in the cache of a core."""

SMALL_BYTES = 4 << 20
"""Files of so much in all, and not many images, are checked in this process."""

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
        images = ImagePass(
            files=tuple(
                FileImages(file, self.roots[file], self.rules[file], found.images)
                for file, found in self.of.items()
            ),
            num_crops=self.num_crops,
            level=self.level,
            use_cache=self.use_cache,
            allow_missing_answer=self.allow_missing_answer,
        )
        if self.takes_images and not self.is_full:
            num_paths = sum(len(found.images) for found in self.of.values())
            with _workers(self.num_workers if num_paths > FEW_IMAGES else 0) as run_all:
                self._check_images(images, run_all)
        if self.takes_facts:
            for file in images.files:
                self.of[file.file].facts.first_of_image = images.first_of_image(file)
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

    def _check_lines(self, run_all: RunAll) -> None:
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

    def _check_images(self, images: ImagePass, run_all: RunAll) -> None:
        total = sum(self.sizes.values())

        def progress(part: float) -> None:
            if self.progress is not None:
                self.progress(int(total * (0.5 + 0.5 * part)), total)

        for found in images.findings(run_all, progress):
            self._add(found)
            if found.line is None:  # one cause, many lines: none of those with images is valid
                for numbers in self.of[found.file].image_lines:
                    self.of[found.file].invalid.update(numbers.tolist())
            if self.is_full:
                break
        self.num_images += images.num_images

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


# --- workers -------------------------------------------------------------------------------------


def _check_block(task: tuple[Block, Options]) -> BlockResult:
    return check_block(*task)


@contextmanager
def _workers(num_workers: int) -> Generator[RunAll, None, None]:
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
