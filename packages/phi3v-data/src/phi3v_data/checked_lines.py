"""Lines of conversations files one by one, with what the rules say about each and its images.

    for checked in check(["train.jsonl"], images="images"):
        checked.sample        # None if there is any error
        checked.diagnostics

For whoever needs the samples one by one, to show or to repair them. `phi3v_data.validate` runs the
same rules over whole files at once, is faster, and is the verdict on a data set: it also knows of
blank lines, and of what shows across samples only.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from phi3v_data.block_check import diagnostic, parse
from phi3v_data.diagnostics import Diagnostic
from phi3v_data.image_check import ImageCheck, check_image
from phi3v_data.jsonl import byte_order_mark, default_image_root, read_lines
from phi3v_data.rules import RULES, Context, Line
from phi3v_data.rules.parse import UnfinishedLine
from phi3v_data.rules.rule import Rule
from phi3v_data.schema import Sample
from phi3v_data.worker_pool import num_cores

AnyPath = str | os.PathLike[str]
Progress = Callable[[int, int], None]
"""Called with (bytes of JSONL done, bytes in all)."""

MAX_PER_RULE = 100
"""Diagnostics kept of one rule; the rest is counted."""

WINDOW_LINES = 512
"""Lines whose images may be under way at once: enough for every worker, bounded in memory."""

LINE_RULES = tuple(rule for rule in RULES if rule.subject != "dataset")
"""The rules that a line is checked by, one after the other."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A line after all rules."""

    file: str
    line: int
    content: bytes
    """The line, without its line break."""

    sample: Sample | None
    """The sample, if it passed: None if there is any error."""

    image_root: Path
    images: tuple[ImageCheck, ...]
    """The checks of `sample.images`, in that order; empty where images were not looked at."""

    num_new_images: int
    """Distinct images that no earlier line has."""

    diagnostics: tuple[Diagnostic, ...]


def check(
    paths: Sequence[AnyPath],
    *,
    images: AnyPath | None = None,
    rules: tuple[Rule, ...] = LINE_RULES,
    allow_missing_answer: bool = False,
    num_crops: int = 16,
    ids_across_files: bool = False,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Checked]:
    """Yield every line of `paths` in order, with what the rules say about it.

    Each distinct image is decoded once, on `num_workers` threads (Pillow's decoders release the
    interpreter lock).

    Raises:
        ValueError: no files, a file that is not there, `num_crops` below 1.
    """
    if not paths:
        raise ValueError("no files to check; expected at least one JSONL file")
    if num_crops < 1:
        raise ValueError(f"num_crops: expected 1 or more, got {num_crops}")
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"{os.fspath(path)}: no such file")
    # A generator runs its first line when first asked: check the arguments before that.
    return _check(
        [Path(path) for path in paths],
        None if images is None else Path(images),
        rules,
        allow_missing_answer,
        num_crops,
        ids_across_files,
        num_workers or num_cores(),
        progress,
    )


@dataclass(slots=True)
class _Pending:
    """A line whose images are under way."""

    path: Path
    line: Line
    sample: Sample | None
    root: Path
    images: "dict[str, Future[ImageCheck] | ImageCheck]"
    num_new_images: int
    position: int
    """Bytes of all files up to and with this line."""


def _check(
    paths: list[Path],
    images: Path | None,
    rules: tuple[Rule, ...],
    allow_missing_answer: bool,
    num_crops: int,
    ids_across_files: bool,
    num_workers: int,
    progress: Progress | None,
) -> Iterator[Checked]:
    total = sum(path.stat().st_size for path in paths)
    looks_at_images = any(rule.code.startswith("I") for rule in rules)
    ids: dict[str, tuple[str, int]] = {}
    current: Path | None = None
    reported_roots: set[tuple[Path, Path]] = set()

    def finish(pending: _Pending) -> Checked:
        nonlocal current
        if pending.path != current:
            current = pending.path
            if not ids_across_files:
                ids.clear()
        file = os.fspath(pending.path)
        results: dict[str, ImageCheck] = {}
        for path, started in pending.images.items():
            results[path] = started if isinstance(started, ImageCheck) else started.result()
            # A future weighs a kilobyte, its result a tenth.
            images_started[pending.root, path] = results[path]
        context = Context(
            file=file,
            line_number=pending.line.number,
            image_root=os.fspath(pending.root),
            images=results,
            ids=ids,
            allow_missing_answer=allow_missing_answer,
            num_crops=num_crops,
        )
        sample = pending.sample
        diagnostics: list[Diagnostic] = []
        for rule in rules:
            subject = pending.line if rule.subject == "line" else sample
            if subject is not None:
                for finding in rule.check(subject, context):
                    diagnostics.append(diagnostic(rule, finding, context, sample))
        without_root = any(image.kind == "no_root" for image in results.values())
        if without_root and (pending.path, pending.root) not in reported_roots:
            reported_roots.add((pending.path, pending.root))
            diagnostics.append(missing_root(file, pending.root))
        if sample is not None:
            ids.setdefault(sample.id, (file, pending.line.number))
        is_valid = not without_root and not any(d.severity == "error" for d in diagnostics)
        if progress is not None:
            progress(min(pending.position, total), total)
        return Checked(
            file=file,
            line=pending.line.number,
            content=pending.line.content,
            sample=sample if is_valid else None,
            image_root=pending.root,
            images=tuple(results[path] for path in sample.images) if sample and results else (),
            num_new_images=pending.num_new_images,
            diagnostics=tuple(diagnostics),
        )

    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")
    images_started: dict[tuple[Path, str], Future[ImageCheck] | ImageCheck] = {}
    window: deque[_Pending] = deque()
    position = 0
    try:
        for path in paths:
            root = images if images is not None else default_image_root(path)
            has_root = root.is_dir()
            for number, content, is_unfinished in _lines(path):
                position += len(content) + 1
                sample, error = parse(content)
                num_before = len(images_started)
                of_line: dict[str, Future[ImageCheck] | ImageCheck] = {}
                for image in sample.images if sample and looks_at_images else ():
                    key = (root, image)
                    if key not in images_started:
                        images_started[key] = (
                            executor.submit(check_image, root.absolute(), image)
                            if has_root
                            else ImageCheck("no_root")
                        )
                    of_line[image] = images_started[key]
                line = (UnfinishedLine if is_unfinished else Line)(content, number, error)
                num_new = len(images_started) - num_before
                window.append(_Pending(path, line, sample, root, of_line, num_new, position))
                if len(window) >= WINDOW_LINES:
                    yield finish(window.popleft())
                if number == 1 and byte_order_mark(content) == "UTF-16":
                    break  # nothing after it is a line
        while window:
            yield finish(window.popleft())
        if progress is not None:
            progress(total, total)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Number and content of each line, and whether the file ends in it, without a line break."""
    last: tuple[int, bytes] | None = None
    for line in read_lines(path):
        if last is not None:
            yield *last, False
        last = line
    if last is not None:
        with open(path, "rb") as file:
            file.seek(-len(last[1]), os.SEEK_END)
            yield *last, file.read() == last[1]


def missing_root(file: str, root: Path) -> Diagnostic:
    """One finding for all images of a file."""
    return Diagnostic(
        code="I101",
        severity="error",
        message=f"the image root {os.fspath(root)!r} is not a folder: no image was looked at",
        help="give the folder the image paths start from: --images DIR",
        file=file,
        line=None,
    )
