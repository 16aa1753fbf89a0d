"""Every distinct image of a data set looked at once, and the lines with an odd one read again.

    images = ImagePass((FileImages("train.jsonl", "images", rules, {"a.jpg": 1, "b.jpg": 2}),), ...)
    for diagnostic in images.findings(run_all):
        ...                         # Diagnostic(code="I101", file="train.jsonl", line=2, ...)
    images.num_images               # 2
    images.hashes["images"]         # {"a.jpg": xxh3 of its content, ...}

Images are checked in batches, in any process: what comes back of one is its hash, and what was
found where a rule about images has something to say. Most data sets have no such image, and their
lines are not read again.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from phi3v_data.block_check import diagnostic, parse
from phi3v_data.checked_lines import missing_root
from phi3v_data.diagnostics import Diagnostic
from phi3v_data.image_check import ImageCheck, Level, check_image
from phi3v_data.jsonl import read_lines
from phi3v_data.quick_scan import QuickSample
from phi3v_data.rules import Context
from phi3v_data.rules.rule import Rule
from phi3v_data.schema import Sample, Turn

BATCH_IMAGES = 64
"""Images in one task."""

FEW_IMAGES = 32
"""So few are checked in this process."""

RunAll = Callable[[Callable[[Any], Any], Iterator[Any]], Iterator[tuple[Any, Any]]]
"""(function, tasks) to (task, result), in the order of tasks."""


@dataclass(frozen=True)
class FileImages:
    """The images of one JSONL file."""

    file: str
    root: str
    """The image root."""

    rules: tuple[Rule, ...]
    """All that run on the file; those about images are picked from them."""

    first_lines: Mapping[str, int]
    """Path → the first line that has it."""


@dataclass
class ImagePass:
    """The images of all files: what rules say about them, and what became known of them."""

    files: tuple[FileImages, ...]
    num_crops: int
    level: Level
    use_cache: bool
    allow_missing_answer: bool

    num_images: int = 0
    """Distinct images looked at so far."""

    hashes: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    """Root → path → xxh3 of the content; 0 where it was not read as a whole."""

    def findings(
        self, run_all: RunAll, progress: Callable[[float], None] | None = None
    ) -> Iterator[Diagnostic]:
        """Look at every distinct image, and yield what the rules say.

        Args:
            run_all: runs the tasks, in other processes or in this one.
            progress: called with the part of a root's images that is done, 0 to 1.

        Yields:
            Findings of a file together, in the order of its lines. One without a line is about
            all lines with images of its file.
        """
        by_root: dict[str, list[FileImages]] = {}
        for file in self.files:
            if file.first_lines and not os.path.isdir(file.root):
                yield from _if_selected(missing_root(file.file, Path(file.root)), file)
            else:
                by_root.setdefault(file.root, []).append(file)
        for root, files in by_root.items():
            odd = self._check_images(root, files, run_all, progress)
            if odd:
                for file in files:
                    yield from self._findings_of_file(file, odd)

    def first_of_image(self, file: FileImages) -> dict[int, int]:
        """Hash of each image of `file` → the first line that has it.

        The hash is of the content, or else of the path.
        """
        hashes = self.hashes.get(file.root, {})
        found: dict[int, int] = {}
        for path, number in file.first_lines.items():
            digest = hashes.get(path) or xxhash.xxh3_64_intdigest(path.encode("utf-8", "replace"))
            found.setdefault(digest, number)
        return found

    def _check_images(
        self,
        root: str,
        files: Sequence[FileImages],
        run_all: RunAll,
        progress: Callable[[float], None] | None,
    ) -> dict[str, ImageCheck]:
        """Notes the hashes of all images under `root`; those that a rule speaks of."""
        paths = list(dict.fromkeys(path for file in files for path in file.first_lines))
        self.num_images += len(paths)
        odd: dict[str, ImageCheck] = {}
        hashes = self.hashes[root] = {}
        done = 0
        for batch, checks in run_all(_check_batch, self._batches(root, files, paths)):
            for path, (digest, check) in zip(batch.paths, checks, strict=True):
                hashes[path] = digest
                if check is not None:
                    odd[path] = check
            done += len(batch.paths)
            if progress is not None:
                progress(done / len(paths))
        return odd

    def _batches(
        self, root: str, files: Sequence[FileImages], paths: list[str]
    ) -> "Iterator[_Batch]":
        rules = tuple({rule.code: rule for file in files for rule in _image_rules(file)}.values())
        for start in range(0, len(paths), BATCH_IMAGES):
            batch = tuple(paths[start : start + BATCH_IMAGES])
            yield _Batch(
                os.path.abspath(root), batch, rules, self.num_crops, self.level, self.use_cache
            )

    def _findings_of_file(
        self, file: FileImages, odd: Mapping[str, ImageCheck]
    ) -> Iterator[Diagnostic]:
        """Run the rules about images on the lines that have one of `odd`."""
        mine = {path: check for path, check in odd.items() if path in file.first_lines}
        rules = _image_rules(file)
        if not mine or not rules:
            return
        missing = [path for path, check in mine.items() if check.kind == "missing"]
        if 1 < len(missing) == len(file.first_lines) and any(rule.code == "I101" for rule in rules):
            first = f"image {missing[0]!r} {mine[missing[0]].problem}"
            yield replace(
                missing_root(file.file, Path(file.root)),
                message=f"none of its {len(missing):,} images is under {file.root!r}; "
                f"the first: {first}",
                num_findings=len(missing),
            )
            return
        for number, sample in _samples_with(file.file, mine):
            context = Context(
                file=file.file,
                line_number=number,
                image_root=file.root,
                images={path: mine[path] for path in sample.images if path in mine},
                ids={},
                allow_missing_answer=self.allow_missing_answer,
                num_crops=self.num_crops,
            )
            for rule in rules:
                for finding in rule.check(sample, context):
                    yield diagnostic(rule, finding, context, sample)


def _image_rules(file: FileImages) -> list[Rule]:
    return [rule for rule in file.rules if rule.code.startswith("I") and rule.subject == "sample"]


def _if_selected(found: Diagnostic, file: FileImages) -> Iterator[Diagnostic]:
    if any(rule.code == found.code for rule in file.rules):
        yield found


_decode: Callable[[bytes], Any] = msgspec.json.Decoder(QuickSample).decode


def _samples_with(file: str, images: Mapping[str, ImageCheck]) -> Iterator[tuple[int, Sample]]:
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


# --- in a worker ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Images to check."""

    root: str
    paths: tuple[str, ...]
    rules: tuple[Rule, ...]
    num_crops: int
    level: Level
    use_cache: bool


def _check_batch(batch: _Batch) -> list[tuple[int, ImageCheck | None]]:
    """xxh3 of each image, and what was found where a rule has something to say about it."""
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
