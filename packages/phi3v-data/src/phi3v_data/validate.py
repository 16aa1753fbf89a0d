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

import gc
import os
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any
from uuid import uuid4

import numpy as np

from phi3v_data.block_check import Block, BlockResult, Options, check_block, diagnostic, parse
from phi3v_data.checked_lines import MAX_PER_RULE, AnyPath, Progress
from phi3v_data.diagnostics import Diagnostic, Report
from phi3v_data.image_check import ImageCheck, Level
from phi3v_data.image_pass import FEW_IMAGES, UNUSED, FileImages, ImagePass, RunAll
from phi3v_data.jsonl import default_image_root, read_lines
from phi3v_data.line_set import LineSet
from phi3v_data.repeat_log import Place, RepeatLog
from phi3v_data.rules import RULES, Context, Line, select_rules
from phi3v_data.rules.across import MAX_CLASSES, Facts, FileFacts, Repeat, UnusedFiles
from phi3v_data.rules.rule import Rule
from phi3v_data.schema import Sample
from phi3v_data.worker_pool import num_cores, start_workers

RulesFor = Callable[[str], tuple[Rule, ...]]
"""A file to the rules that run on it."""

BLOCK_BYTES = 1 << 19
"""Of JSONL, looked at together: its columns stay in the cache of a core."""

TASK_BLOCKS = 4
"""In one task: handing over one takes as long as a block."""

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
    ids_across_files: bool = False,
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
        ids_across_files: ids are unique among all files (D101), not only within each.

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
        ids_across_files=ids_across_files,
    )
    with run.ids, run.contents:
        return run.report()


@dataclass
class _File:
    """What is known of one file so far."""

    num_lines: int = 0
    """All lines, blank ones too."""

    num_filled: int = 0
    blanks: LineSet = field(default_factory=LineSet)
    last_filled: int = 0
    with_images: LineSet = field(default_factory=LineSet)
    """Numbers of lines with images."""

    invalid: LineSet = field(default_factory=LineSet)
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
        ids_across_files: bool,
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
        self.numbers = {file: number for number, file in enumerate(files)}
        self.ids_across_files = ids_across_files
        self.ids = RepeatLog()
        self.contents = RepeatLog()
        self.name = uuid4().hex
        self.sizes = {file: os.path.getsize(file) for file in files}
        self.all_rules = {rule.code: rule for file in files for rule in rules[file]}
        self.takes_facts = any(rule.subject == "dataset" for rule in self.all_rules.values())
        self.takes_images = ImagePass.looks_at_images(self.all_rules)
        self.kept: list[Diagnostic] = []
        self.counts: Counter[str] = Counter()
        self.counts_by_file = {file: Counter[str]() for file in files}
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
                images.add_facts(file, self.of[file.file].facts)
        if not self.is_full:
            self._check_across(images.unused_files() if UNUSED in self.all_rules else ())
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
            counts_by_file={
                file: {code: counts[code] for code in self.all_rules if counts[code]}
                for file, counts in self.counts_by_file.items()
            },
            cache_problem=images.cache_problem,
            invalid_lines={file: found.invalid for file, found in self.of.items()},
            image_hashes=images.hashes,
        )

    # --- what is found

    @property
    def is_full(self) -> bool:
        """Whether there are errors enough."""
        return self.max_errors is not None and self.num_errors >= self.max_errors

    def _count(self, file: str, code: str, number: int) -> None:
        self.counts[code] += number
        self.counts_by_file[file][code] += number
        if self.all_rules[code].severity == "error":
            self.num_errors += number

    def _add(self, found: Diagnostic) -> None:
        self._count(found.file, found.code, 1)
        if found.severity == "error":
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
        for (blocks, _), results in run_all(_check_blocks, self._tasks()):
            for block, result in zip(blocks, results, strict=True):
                if block.file not in skipped:
                    self._take_block(block, result)
                if result.is_utf16:
                    skipped.add(block.file)
                done += block.end - block.start
                if self.is_full:
                    return
            if self.progress is not None:
                self.progress(int(done * share), total)

    def _tasks(self) -> Iterator[tuple[list[Block], Options]]:
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
                run=self.name,
            )
            blocks = [
                Block(file, start, min(size, start + BLOCK_BYTES))
                for start in range(0, size, BLOCK_BYTES)
            ]
            for start in range(0, len(blocks), TASK_BLOCKS):
                yield blocks[start : start + TASK_BLOCKS], options

    def _take_block(self, block: Block, result: BlockResult) -> None:
        found = self.of[block.file]
        base = found.num_lines + 1
        found.num_lines += result.num_lines
        found.num_filled += result.num_filled
        found.blanks.update(np.array(result.blanks, dtype=np.int64) + base)
        num_last = result.num_lines
        while result.blanks and num_last - 1 in result.blanks[-1:]:
            num_last -= 1
            result.blanks.pop()
        if num_last:
            found.last_filled = base + num_last - 1
        found.invalid.update(np.array(result.invalid, dtype=np.int64) + base)
        kept: Counter[str] = Counter()
        for number, finding in result.findings:
            kept[finding.code] += 1
            self._add(replace(finding, line=number + base))
        for code, count in (result.counts - kept).items():
            self._count(block.file, code, count)
        of_block = result.facts
        number_of_file = self.numbers[block.file]
        if any(rule.code == D_ID for rule in self.rules[block.file]):
            ids = of_block.ids
            if not self.ids_across_files:
                ids = ids + np.uint64(number_of_file * _GOLDEN % 2**64)  # no file has another's
            self.ids.add(number_of_file, of_block.lines + base, ids)
        if len(of_block.contents):
            self.contents.add(number_of_file, of_block.lines + base, of_block.contents)
        found.with_images.update(of_block.image_lines + base)
        for image, number in of_block.images.items():
            found.images.setdefault(image, number + base)
        facts = found.facts
        facts.num_samples += len(of_block.ids)
        for group, number in of_block.groups.items():
            facts.first_of_group.setdefault(group, number + base)
        if of_block.labels is None or facts.labels is None:
            facts.labels = None
            return
        for label, (count, number) in of_block.labels.items():
            facts.labels[label] += count
            facts.first_of_label.setdefault(label, number + base)
        if len(facts.labels) > MAX_CLASSES:
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
        """D101: ids with equal hashes are the same (64 bits); so many lines are read to say so."""
        files = list(self.of)
        shown: dict[str, dict[int, Place]] = {file: {} for file in files}
        rule = self.all_rules.get(D_ID)
        for again, first in self.ids.repeats():
            assert rule is not None
            file = files[again.file]
            if self.num_kept[D_ID] + sum(map(len, shown.values())) < MAX_PER_RULE:
                shown[file][again.line] = first
                continue
            self._count(file, D_ID, 1)
            if rule.severity == "error":
                self.of[file].invalid.add(again.line)
        for file, firsts in shown.items():
            for number, sample in _samples_of(file, set(firsts)):
                first = firsts[number]
                ids = {sample.id: (files[first.file], first.line)}
                context = self._context(file, number, {}, ids)
                for rule in self.rules[file]:
                    if rule.code == D_ID:
                        for finding in rule.check(sample, context):
                            self._add(diagnostic(rule, finding, context, sample))

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
                self.of[found.file].invalid.merge(self.of[found.file].with_images)
            if self.is_full:
                break
        for (file, code), number in images.more.items():
            self._count(file, code, number)
        self.num_images += images.num_images

    # --- across samples

    def _check_across(self, unused: tuple[UnusedFiles, ...]) -> None:
        by_file = {file: found.facts for file, found in self.of.items()}
        facts = Facts(by_file, self._repeats, unused)
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

    def _repeats(self) -> Iterator[Repeat]:
        """Samples that an earlier line has, whatever their ids."""
        files = list(self.of)
        for again, first in self.contents.repeats():
            yield Repeat(files[again.file], again.line, files[first.file], first.line)


_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 / golden ratio: multiples of it are far apart."""


def _is_about_a_line(rule: Rule) -> bool:
    return rule.subject != "dataset" and not rule.code.startswith("I") and rule.code != D_ID


def _samples_of(file: str, numbers: set[int]) -> Iterator[tuple[int, Sample]]:
    """The samples in some lines."""
    if not numbers:
        return
    last = max(numbers)
    for number, content in read_lines(file):
        if number in numbers:
            sample, _ = parse(content)
            if sample is not None:
                yield number, sample
        if number >= last:
            return


# --- workers -------------------------------------------------------------------------------------


def _check_blocks(task: tuple[list[Block], Options]) -> list[BlockResult]:
    blocks, options = task
    return [check_block(block, options) for block in blocks]


@contextmanager
def _workers(num_workers: int) -> Generator[RunAll, None, None]:
    """Yield what runs tasks: in processes, or in this one where `num_workers` is below 2."""
    if num_workers < 2:
        yield lambda function, tasks: ((task, function(task)) for task in tasks)
        return
    # Forking is ten times faster than starting anew, and safe where no other thread holds a lock.
    method = "fork" if threading.active_count() == 1 else "spawn"
    with ProcessPoolExecutor(
        num_workers, mp_context=get_context(method), initializer=gc.freeze
    ) as pool:  # frozen: collecting what is there since before would only copy its pages
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
