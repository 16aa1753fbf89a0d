# pyright: standard
# pyarrow ships no type stubs; it enters by shard_file and shard_index.
"""Conversations files to a shard directory, whole or not at all, from samples that passed.

    result = write_shards(["train.jsonl"], "shards/train")
    result.manifest.num_samples      # 300
    result.report.exit_status        # 1, and nothing written, if a sample has an error

Two passes. `validate` says which lines have errors: there is one verdict, its own. The others are
dealt to shards (`shard_plan`), which are written by several processes (`shard_file`), each image
compared with what was validated. Finished shards survive the end of a run, and the next one goes on
with them; the directory gets its name when all is there (`shard_directory`). What is on disk:
`phi3v_data.shard_format`.
"""

import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import wait as wait_for_sentinel
from pathlib import Path

import pyarrow as pa
import xxhash

from phi3v_data.diagnostics import Diagnostic, Report
from phi3v_data.image_check import Level
from phi3v_data.jsonl import default_image_root
from phi3v_data.line_set import LineSet
from phi3v_data.rejected_lines import LineRules, rejected_lines
from phi3v_data.rules import select_rules
from phi3v_data.rules.rule import Rule
from phi3v_data.shard_directory import Work, existing_manifest, open_work
from phi3v_data.shard_file import ROW_GROUP_BYTES, ShardTask, WrittenShard, kept_shard, write_shard
from phi3v_data.shard_format import (
    FORMAT,
    INDEX,
    MANIFEST,
    REJECTED,
    SCHEMA_VERSION,
    VERSION,
    FileEntry,
    IndexEntry,
    Manifest,
    Settings,
    SourceEntry,
    Validation,
    read_manifest,
    shard_name,
)
from phi3v_data.shard_index import IndexReader, IndexWriter
from phi3v_data.shard_plan import ShardPlan, Source, plan_shards
from phi3v_data.validate import validate
from phi3v_data.worker_pool import num_cores, start_workers

AnyPath = str | os.PathLike[str]
Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all)."""

SMALL_BYTES = 32 * 1024 * 1024
"""So much is written before another process has started."""

SHARD_BYTES = 128 * 1024 * 1024

WINDOW = 2
"""Shards under way, a worker."""


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What `write_shards` did."""

    out_dir: Path
    report: Report
    """Of the validation, which is always run: the same as `validate` gives for these files."""

    manifest: Manifest | None
    """None: samples have errors, and nothing was written."""

    is_up_to_date: bool = False
    """The directory was already there, from the same input and settings; it was left alone."""

    num_kept: int = 0
    """Shards that an earlier run, which ended early, had finished."""

    undroppable: tuple[Diagnostic, ...] = ()
    """With `drop_invalid`: errors of the data set as a whole, the reason that nothing was written.
    No line can be left out for them."""


def write_shards(
    paths: Sequence[AnyPath],
    out_dir: AnyPath,
    *,
    images: AnyPath | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    rules_for: Callable[[str], tuple[Rule, ...]] | None = None,
    level: Level = "deep",
    use_cache: bool = False,
    max_errors: int | None = None,
    allow_missing_answer: bool = False,
    num_crops: int = 16,
    shard_bytes: int = SHARD_BYTES,
    drop_invalid: bool = False,
    overwrite: bool = False,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> ShardResult:
    """Validate conversations files and write them as one shard directory.

    Args:
        paths: JSONL files, stored in this order; ids are unique among all of them.
        out_dir: the directory to make. If it is there from the same input and settings, nothing is
            written.
        images: the image root; by default `images/` beside each file, else its folder.
        select: as in `validate`, like the next seven.
        ignore: code prefixes of rules not to run.
        rules_for: which rules run on a file, instead of `select` and `ignore`.
        level: how closely images are looked at.
        use_cache: believe what an earlier run found out about files that did not change.
        max_errors: stop looking at so many errors; nothing is written then. Not with
            `drop_invalid`, which must know all.
        allow_missing_answer: the last turn may lack its answer (test splits).
        num_crops: most crops an image in training.
        shard_bytes: size at which a new Parquet file is begun.
        drop_invalid: leave out samples with errors, listing them in `rejected.jsonl`, rather than
            write nothing.
        overwrite: replace a shard directory made from other input or settings.
        num_workers: processes; by default one a core. Few bytes and single shards need none. The
            bytes on disk do not depend on it.
        progress: called with (what is being done, bytes done, bytes in all).

    Raises:
        ValueError: an argument is wrong: no such file or image root, no samples at all, `out_dir`
            holds something else; or a file changed while it was read.
        OSError: the disk refuses, or a worker process died. What is finished is kept for the next
            run, as after Ctrl-C or `kill -9`.
    """
    run = _Run(
        files=_files(paths),
        target=Path(os.path.abspath(out_dir)),
        shown_target=os.fspath(out_dir),
        images=_image_root(images),
        rules_for=rules_for or _one_choice(select_rules(tuple(select), tuple(ignore))),
        level=level,
        settings=Settings(
            shard_bytes=_at_least_one(shard_bytes, "shard_bytes"),
            drop_invalid=drop_invalid,
            allow_missing_answer=allow_missing_answer,
            num_crops=num_crops,
        ),
        num_workers=num_workers,
        progress=progress or _say_nothing,
    )
    existing = existing_manifest(run.target, overwrite=overwrite)
    if existing is not None:
        run.refuse(run.other_settings(existing))  # before hours of validation
    with open_work(run.target) as work:
        before = [_state(file) for file in run.files]
        report = validate(
            run.files,
            images=images,
            rules_for=run.rules_for,
            allow_missing_answer=allow_missing_answer,
            num_crops=num_crops,
            level=level,
            use_cache=use_cache,
            max_errors=None if drop_invalid else max_errors,
            num_workers=num_workers,
            progress=lambda done, total: run.progress("validating", done, total),
            ids_across_files=True,
        )
        if report.num_lines == 0:
            raise ValueError(f"{', '.join(report.files)}: no samples; nothing to write")
        if (report.num_errors and not drop_invalid) or not report.num_valid:
            return ShardResult(run.target, report, None)
        if not drop_invalid:
            _refuse_unnamed(report)
        undroppable = _of_no_line(report, run.rules_for)
        if undroppable:
            return ShardResult(run.target, report, None, undroppable=undroppable)
        plan = run.plan(report)
        for file, state in zip(run.files, before, strict=True):
            if _state(file) != state:
                raise ValueError(f"{file}: changed while it was validated; run again")
        if existing is not None:
            run.refuse(run.difference(existing, plan, report))
            return ShardResult(run.target, report, existing, is_up_to_date=True)
        manifest, num_kept = run.write(work, plan, report)
        work.publish()
    return ShardResult(run.target, report, manifest, num_kept=num_kept)


@dataclass(frozen=True, slots=True)
class _Run:
    """What is to be done, its arguments checked."""

    files: list[str]
    target: Path
    shown_target: str
    images: str | None
    rules_for: Callable[[str], tuple[Rule, ...]]
    level: Level
    settings: Settings
    num_workers: int | None
    progress: Progress

    def root_of(self, file: str) -> Path:
        """The image root of a file."""
        return default_image_root(file) if self.images is None else Path(self.images)

    def plan(self, report: Report) -> ShardPlan:
        """Deal the lines without errors to shards."""
        sources = [
            Source(
                file=file,
                root=os.path.abspath(self.root_of(file)),
                invalid=report.invalid_lines.get(file, LineSet()),
                hashes=report.image_hashes.get(os.fspath(self.root_of(file)), {}),
            )
            for file in self.files
        ]
        return plan_shards(sources, self.settings.shard_bytes)

    def refuse(self, difference: str) -> None:
        """Leave the directory that is there alone, if it differs."""
        if difference:
            raise ValueError(
                f"{self.shown_target}: is there already, {difference}; --overwrite replaces it"
            )

    def other_settings(self, existing: Manifest) -> str:
        """Which setting was different when `existing` was written; empty if none was."""
        for name in Settings.model_fields:
            then, now = getattr(existing.settings, name), getattr(self.settings, name)
            if then != now:
                return f"written with {name} {then}, not {now}"
        return ""

    def difference(self, existing: Manifest, plan: ShardPlan, report: Report) -> str:
        """What else was different when `existing` was written; empty if nothing was."""
        then, now = existing.validation, self._validation(report)
        if (then.validator, then.rules, then.severities) != (
            now.validator,
            now.rules,
            now.severities,
        ):
            return f"written with {then.validator} and its rules"
        if then.level != now.level:
            return f"written with level {then.level}, not {now.level}"
        if [(s.name, s.sha256) for s in existing.sources] != [
            (os.path.basename(s.file), s.sha256) for s in plan.sources
        ]:
            return "written from other conversations files"
        if existing.sources != self._sources(plan):
            return "written with other rules for some of its files"
        for entry in (*existing.shards, existing.index):
            path = self.target / entry.name
            if not path.is_file() or path.stat().st_size != entry.num_bytes:
                return f"and damaged: {entry.name} is not what its manifest says"
        if existing.input == _input(plan):
            return ""
        if existing.num_samples != plan.num_samples or existing.num_dropped:
            return "with other samples dropped"
        return self._changed_image(existing, plan)

    def _changed_image(self, existing: Manifest, plan: ShardPlan) -> str:
        index = IndexReader(self.target / existing.index.name, existing.index)
        hashes = (xxh3_64 for shard in plan.shards for xxh3_64 in shard.hashes)
        for row in range(existing.num_samples):
            for k, place in enumerate(index.images(row)):
                if place.xxh3_64 != next(hashes, None):
                    path = json.loads(index.sample_json(row))
                    paths = [p for turn in path["conversations"] for p in turn.get("images", ())]
                    return f"and image {paths[k]!r} has changed since"
        return "written by other versions of phi3v-data or pyarrow"

    def write(self, work: Work, plan: ShardPlan, report: Report) -> tuple[Manifest, int]:
        """Write what is missing; the manifest, and how many shards were there already."""
        work.keep_only({shard_name(shard.number) for shard in plan.shards})
        tasks = [
            ShardTask(shard, os.fspath(work.path), _versions(), ROW_GROUP_BYTES)
            for shard in plan.shards
        ]
        written: dict[int, WrittenShard] = {}
        for task in tasks:
            if (kept := kept_shard(task)) is not None:
                written[task.planned.number] = kept
        num_kept = len(written)
        missing = [task for task in tasks if task.planned.number not in written]
        done = plan.num_bytes - sum(task.planned.num_bytes for task in missing)
        self.progress("writing", done, plan.num_bytes)
        try:
            for task, shard in _write_all(missing, self.num_workers):
                written[task.planned.number] = shard
                done += task.planned.num_bytes
                self.progress("writing", done, plan.num_bytes)
        except KeyboardInterrupt:
            number = sum(kept_shard(task) is not None for task in missing) + num_kept
            raise KeyboardInterrupt(
                f"{number:,} of {len(tasks):,} shards are written and kept; the same command again "
                "goes on with them"
            ) from None
        shards = [written[number] for number in range(len(tasks))]
        manifest = self._manifest(work, plan, report, shards)
        (work.whole / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return read_manifest(work.whole), num_kept

    def _manifest(
        self, work: Work, plan: ShardPlan, report: Report, shards: list[WrittenShard]
    ) -> Manifest:
        index = _write_index(work, shards)
        num_dropped, rejected = self._write_rejected(work, report)
        entries = tuple(shard.entry for shard in shards)
        return Manifest(
            format=FORMAT,
            version=VERSION,
            schema_version=SCHEMA_VERSION,
            input=_input(plan),
            fingerprint=_fingerprint([*entries, index]),
            num_samples=plan.num_samples,
            num_images=sum(entry.num_images for entry in entries),
            image_bytes=sum(shard.image_bytes for shard in shards),
            num_dropped=num_dropped,
            settings=self.settings,
            validation=self._validation(report),
            sources=self._sources(plan),
            shards=entries,
            index=index,
            rejected=rejected,
        )

    def _validation(self, report: Report) -> Validation:
        return Validation(
            validator=f"phi3v-data {version('phi3v-data')}",
            rules=report.rules,
            severities=dict(report.severities),
            level=self.level,
            counts=dict(report.counts),
            is_complete=report.is_complete,
        )

    def _sources(self, plan: ShardPlan) -> tuple[SourceEntry, ...]:
        everywhere = {rule.code for file in self.files for rule in self.rules_for(file)}
        return tuple(
            SourceEntry(
                name=os.path.basename(source.file),
                sha256=source.sha256,
                num_lines=source.num_lines,
                ignored=tuple(
                    sorted(everywhere - {rule.code for rule in self.rules_for(source.file)})
                ),
            )
            for source in plan.sources
        )

    def _write_rejected(self, work: Work, report: Report) -> tuple[int, FileEntry | None]:
        """`rejected.jsonl`, if anything is left out."""
        if report.num_valid == report.num_lines:
            return 0, None
        checked_by = LineRules(
            rules_for=self.rules_for,
            root_of=self.root_of,
            level=self.level,
            allow_missing_answer=self.settings.allow_missing_answer,
            num_crops=self.settings.num_crops,
        )
        path = work.whole / REJECTED
        number = 0
        with open(path, "wb") as file:
            for line in rejected_lines(report, checked_by):
                file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                number += 1
        return number, FileEntry(name=REJECTED, num_bytes=path.stat().st_size, sha256=_sha256(path))


def _write_index(work: Work, shards: list[WrittenShard]) -> IndexEntry:
    """Put the rows of all shards together."""
    writer = IndexWriter(work.whole / INDEX)
    try:
        for shard in shards:
            with pa.OSFile(os.fspath(work.done / shard.index.name), "rb") as file:
                writer.add_table(pa.ipc.open_file(file).read_all())
        return writer.close()
    finally:
        writer.abort()


# --- workers --------------------------------------------------------------------------------------


def _write_all(
    tasks: list[ShardTask], num_workers: int | None
) -> Iterator[tuple[ShardTask, WrittenShard]]:
    """Write shards, in this process or in several, and yield them as they are finished."""
    if num_workers is None:
        is_small = sum(task.planned.num_bytes for task in tasks) < SMALL_BYTES
        num_workers = 1 if is_small else num_cores()
    num_workers = min(num_workers, len(tasks))
    if num_workers < 2:
        yield from ((task, write_shard(task)) for task in tasks)
        return
    waiting = iter(tasks)
    with _workers(num_workers) as pool:
        running: dict[Future[WrittenShard], ShardTask] = {}
        while True:
            while len(running) < WINDOW * num_workers and (task := next(waiting, None)):
                running[pool.submit(write_shard, task)] = task
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


@contextmanager
def _workers(num_workers: int) -> Generator[ProcessPoolExecutor]:
    """Processes; at the end, what is begun is finished and what waits is not begun."""
    # Forking is ten times faster than starting anew, and safe where no other thread holds a lock.
    method = "fork" if threading.active_count() == 1 else "spawn"
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context(method),
        initializer=_watch_parent,
    )
    try:
        start_workers(pool, num_workers)
        yield pool
    except BrokenProcessPool:
        raise OSError(
            "a worker process died, killed or for lack of memory; fewer workers need less of it"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _watch_parent() -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_sentinel([parent.sentinel])
    os._exit(1)


# --- arguments ------------------------------------------------------------------------------------


def _files(paths: Sequence[AnyPath]) -> list[str]:
    files = [os.fspath(path) for path in paths]
    if not files:
        raise ValueError("no files to write; expected at least one JSONL file")
    for file in files:
        if not os.path.isfile(file):
            raise ValueError(f"{file}: no such file")
        if files.count(file) > 1:
            raise ValueError(f"{file}: is given twice; ids are unique in a shard directory")
    return files


def _image_root(images: AnyPath | None) -> str | None:
    if images is None:
        return None
    if not os.path.isdir(images):
        raise ValueError(f"{os.fspath(images)}: no such folder; expected the image root")
    return os.fspath(images)


def _at_least_one(value: int, name: str) -> int:
    if value < 1:
        raise ValueError(f"{name}: expected 1 or more, got {value}")
    return value


def _one_choice(rules: tuple[Rule, ...]) -> Callable[[str], tuple[Rule, ...]]:
    return lambda file: rules


def _say_nothing(what: str, done: int, total: int) -> None:
    """No one is looking."""


def _state(file: str) -> tuple[int, int, int]:
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _refuse_unnamed(report: Report) -> None:
    """A line that is no sample is not valid, even where no rule runs that says so."""
    for file, numbers in report.invalid_lines.items():
        for number in numbers:
            raise ValueError(
                f"{file}:{number}: no rule that ran found an error, but it is no sample and cannot "
                "be stored; let the rules P and S run"
            )


def _of_no_line(
    report: Report, rules_for: Callable[[str], tuple[Rule, ...]]
) -> tuple[Diagnostic, ...]:
    """Errors that leaving out lines does not end."""
    of_data_sets = {
        rule.code for file in report.files for rule in rules_for(file) if rule.subject == "dataset"
    }
    return tuple(
        found
        for found in report.diagnostics
        if found.line is None and found.severity == "error" and found.code in of_data_sets
    )


def _versions() -> str:
    """Of what decides the bytes, beside the input."""
    return f"format {VERSION} schema {SCHEMA_VERSION} pyarrow {pa.__version__}"


def _input(plan: ShardPlan) -> str:
    return xxhash.xxh3_128_hexdigest(f"{plan.digest} {_versions()}".encode())


def _fingerprint(entries: list[FileEntry]) -> str:
    named = [(entry.name, entry.sha256) for entry in entries]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
