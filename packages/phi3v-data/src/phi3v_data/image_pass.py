"""Every distinct image of a data set looked at once, and the lines with an odd one read again.

    images = ImagePass((FileImages("train.jsonl", "images", rules, {"a.jpg": 1, "b.jpg": 2}),), ...)
    for diagnostic in images.findings(run_all):
        ...                         # Diagnostic(code="I101", file="train.jsonl", line=2, ...)
    images.num_images               # 2
    images.hashes["images"]         # {"a.jpg": xxh3 of its content, ...}

Images are checked in batches, in any process: what comes back of one is its hash, and what was
found where a rule about images has something to say. Most data sets have no such image, and their
lines are not read again. In others every image has: of those that only traits are told of
(`rules.images.TRAITS`: alpha, a palette, ...) no more is held than which.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import xxhash

from phi3v_data.block_check import diagnostic, parse
from phi3v_data.checked_lines import MAX_PER_RULE, missing_root
from phi3v_data.diagnostics import Diagnostic
from phi3v_data.image_check import ImageCheck, Level, check_image
from phi3v_data.images import formats_of_extension
from phi3v_data.jsonl import read_lines
from phi3v_data.quick_sample import QuickSample
from phi3v_data.rules import RULES, Context
from phi3v_data.rules.across import FileFacts, Looks, UnusedFiles
from phi3v_data.rules.images import TRAITS, is_plain, unused_files
from phi3v_data.rules.rule import Rule
from phi3v_data.schema import Sample, Turn

if TYPE_CHECKING:
    from phi3v_data.check_cache import CheckCache

BATCH_IMAGES = 64
"""Images in one task."""

FEW_IMAGES = 32
"""So few are checked in this process."""

SHOWN_UNUSED = 5
"""Names of files that no sample names, in the finding."""

UNUSED = "I110"
NEAR = "D108"

RunAll = Callable[[Callable[[Any], Any], Iterator[Any]], Iterator[tuple[Any, Any]]]
"""(function, tasks) to (task, result), in the order of tasks."""

_OUR_CODES = frozenset(rule.code for rule in RULES)


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


class _Odd(NamedTuple):
    """An image that rules have something to say about."""

    codes: tuple[str, ...]
    """Of these rules."""

    check: ImageCheck | None
    """None where there are findings enough of all of them: then they are counted only."""


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

    cache_problem: str = ""
    """Why nothing is remembered of images, for people; empty where it is."""

    hashes: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    """Root → path → xxh3 of the content; 0 where it was not read as a whole."""

    looks: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    """Root → path → its look (`near_images`); only where they are compared (D108)."""

    more: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    """(file, code) → findings of a trait beyond those that are yielded: they are counted only."""

    @staticmethod
    def looks_at_images(codes: Iterable[str]) -> bool:
        """Whether one of these rules wants images looked at."""
        return any((code.startswith("I") and code != UNUSED) or code == NEAR for code in codes)

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
        try:
            yield from self._findings(run_all, progress)
        finally:
            _close_caches()  # what this process opened, where it ran the tasks itself

    def add_facts(self, file: FileImages, facts: FileFacts) -> None:
        """Note where each image of `file` is first, by content, and how it looks."""
        hashes, looks = self.hashes.get(file.root, {}), self.looks.get(file.root, {})
        of_looks = Looks()
        for path, number in file.first_lines.items():
            digest = hashes.get(path) or xxhash.xxh3_64_intdigest(path.encode("utf-8", "replace"))
            facts.first_of_image.setdefault(digest, number)
            look = looks.get(path)
            if look is not None:
                of_looks.add(path, number, digest, look)
        facts.looks = of_looks

    def unused_files(self) -> tuple[UnusedFiles, ...]:
        """The image files that no sample names, one entry for a root, without those that have none.

        Raises:
            ValueError: a root that cannot be listed.
        """
        found: list[UnusedFiles] = []
        for root, files in self._by_root().items():
            if not os.path.isdir(root):
                continue
            named = {path for file in files for path in file.first_lines}
            shown: list[str] = []
            number = 0
            try:
                for path in unused_files(root, named):
                    number += 1
                    if number <= SHOWN_UNUSED:
                        shown.append(path)
            except OSError as error:
                raise ValueError(f"image root {root!r}: cannot be listed: {error}") from error
            if number:
                found.append(UnusedFiles(files[0].file, root, tuple(shown), number))
        return tuple(found)

    def _by_root(self) -> dict[str, list[FileImages]]:
        by_root: dict[str, list[FileImages]] = {}
        for file in self.files:
            by_root.setdefault(file.root, []).append(file)
        return by_root

    def _findings(
        self, run_all: RunAll, progress: Callable[[float], None] | None
    ) -> Iterator[Diagnostic]:
        for root, files in self._by_root().items():
            if not os.path.isdir(root):
                for file in files:
                    if file.first_lines and any(rule.code == "I101" for rule in file.rules):
                        yield missing_root(file.file, Path(root))
                continue
            odd = self._check_images(root, files, run_all, progress)
            if odd:
                for file in files:
                    yield from self._findings_of_file(file, odd)

    def _check_images(
        self,
        root: str,
        files: Sequence[FileImages],
        run_all: RunAll,
        progress: Callable[[float], None] | None,
    ) -> dict[str, _Odd]:
        """Notes hashes and looks of all images under `root`; those that a rule speaks of."""
        paths = list(dict.fromkeys(path for file in files for path in file.first_lines))
        self.num_images += len(paths)
        odd: dict[str, _Odd] = {}
        counted_only: dict[tuple[str, ...], _Odd] = {}
        num_odd: Counter[tuple[str, str]] = Counter()  # (file, code) → images so far
        hashes, looks = self.hashes.setdefault(root, {}), self.looks.setdefault(root, {})
        done = 0
        for batch, result in run_all(_check_batch, self._batches(root, files, paths)):
            self.cache_problem = self.cache_problem or result.cache_problem
            looks.update(result.looks)
            hashes.update(zip(batch.paths, result.hashes, strict=True))
            for path, found in result.odd.items():
                is_kept = not all(code in TRAITS for code in found.codes)
                for file in files:
                    if path in file.first_lines:
                        for code in found.codes:
                            is_kept |= num_odd[file.file, code] < MAX_PER_RULE
                            num_odd[file.file, code] += 1
                        is_kept |= any(_is_error(rule, found.codes) for rule in file.rules)
                odd[path] = (
                    found
                    if is_kept
                    else counted_only.setdefault(found.codes, _Odd(found.codes, None))
                )
            done += len(batch.paths)
            if progress is not None:
                progress(done / len(paths))
        return odd

    def _batches(
        self, root: str, files: Sequence[FileImages], paths: list[str]
    ) -> "Iterator[_Batch]":
        rules = tuple({rule.code: rule for file in files for rule in _image_rules(file)}.values())
        takes_looks = any(rule.code == NEAR for file in files for rule in file.rules)
        for start in range(0, len(paths), BATCH_IMAGES):
            batch = tuple(paths[start : start + BATCH_IMAGES])
            yield _Batch(
                os.path.abspath(root),
                batch,
                rules,
                self.num_crops,
                self.level,
                self.use_cache,
                takes_looks,
            )

    def _findings_of_file(self, file: FileImages, odd: Mapping[str, _Odd]) -> Iterator[Diagnostic]:
        """Run the rules about images on the lines that have one of `odd`."""
        rules = _image_rules(file)
        if not rules:
            return
        missing = [path for path in file.first_lines if path in odd and _is_missing(odd[path])]
        if 1 < len(missing) == len(file.first_lines) and any(rule.code == "I101" for rule in rules):
            check = odd[missing[0]].check
            assert check is not None
            yield replace(
                missing_root(file.file, Path(file.root)),
                message=f"none of its {len(missing):,} images is under {file.root!r}; "
                f"the first: image {missing[0]!r} {check.problem}",
                num_findings=len(missing),
            )
            return
        num_kept: Counter[str] = Counter()
        for number, sample in _samples_with(file.file, odd):
            named = [odd[path] for path in sample.images if path in odd]
            codes = {code for one in named for code in one.codes}
            context = Context(
                file=file.file,
                line_number=number,
                image_root=file.root,
                images={
                    path: check
                    for path in sample.images
                    if path in odd and (check := odd[path].check) is not None
                },
                ids={},
                allow_missing_answer=self.allow_missing_answer,
                num_crops=self.num_crops,
            )
            for rule in rules:
                code = rule.code
                if code not in codes:
                    continue
                is_trait = code in TRAITS and rule.severity == "warning"
                if is_trait and num_kept[code] >= MAX_PER_RULE:
                    num_more = sum(code in one.codes for one in named)
                else:
                    num_more = sum(code in one.codes for one in named if one.check is None)
                    for finding in rule.check(sample, context):
                        num_kept[code] += 1
                        yield diagnostic(rule, finding, context, sample)
                if num_more:
                    self.more[file.file, code] += num_more


def _image_rules(file: FileImages) -> list[Rule]:
    return [rule for rule in file.rules if rule.code.startswith("I") and rule.subject == "sample"]


def _is_error(rule: Rule, codes: tuple[str, ...]) -> bool:
    return rule.severity == "error" and rule.code in codes


def _is_missing(odd: _Odd) -> bool:
    return odd.check is not None and odd.check.kind == "missing"


_decode: Callable[[bytes], Any] = msgspec.json.Decoder(QuickSample).decode


def _samples_with(file: str, images: Mapping[str, Any]) -> Iterator[tuple[int, Sample]]:
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
    takes_looks: bool


class _BatchResult(NamedTuple):
    """What was found."""

    hashes: list[int]
    """xxh3 of each image, in the order of the paths."""

    odd: dict[str, _Odd]
    looks: dict[str, int]
    cache_problem: str


def _check_batch(batch: _Batch) -> _BatchResult:
    checks = _open_cache(batch.level) if batch.use_cache else None
    # A rule of another package may look at all that a sample has: it gets every image.
    others = tuple(rule.code for rule in batch.rules if rule.code not in _OUR_CODES)
    result = _BatchResult([], {}, {}, "")
    root = Path(batch.root)
    codes_of_alike: dict[object, tuple[str, ...]] = {}
    for path in batch.paths:
        check = check_image(root, path, batch.level, checks)
        result.hashes.append(check.xxh3_64)
        ours = ()
        if not is_plain(path, check, batch.num_crops):
            # What our rules go by: many images of a data set are alike in it.
            promised = formats_of_extension(path)
            alike = (check.kind, check.cause, check.info, promised, bool(check.path_on_disk))
            ours = codes_of_alike.get(alike)
            if ours is None:
                ours = codes_of_alike[alike] = _codes(path, check, batch)
        if ours or others:
            result.odd[path] = _Odd((*others, *ours), check)
        if batch.takes_looks and check.kind == "ok":
            look = _look(batch.root, path)
            if look is not None:
                result.looks[path] = look
    if checks is None:
        return result
    checks.flush()
    return result._replace(cache_problem=checks.problem)


def _codes(path: str, check: ImageCheck, batch: _Batch) -> tuple[str, ...]:
    """Of our rules that have something to say about an image."""
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
    rules = (rule for rule in batch.rules if rule.code in _OUR_CODES)
    return tuple(rule.code for rule in rules if any(True for _ in rule.check(sample, context)))


def _look(root: str, path: str) -> int | None:
    from phi3v_data.image_place import ImagePlaces, MisplacedImage
    from phi3v_data.near_images import look_of

    try:
        return look_of(ImagePlaces(root).find(path))
    except (MisplacedImage, OSError):  # it was there just now
        return None


@cache
def _open_cache(level: Level) -> "CheckCache":
    """The cache of this process: opened once, not once a batch, which takes as long as a batch."""
    from phi3v_data.check_cache import CheckCache, default_path

    checks = CheckCache(default_path(), level)
    # Workers end without what `atexit` does.
    _opened.append((checks, Finalize(None, checks.close, exitpriority=10)))
    return checks


_opened: "list[tuple[CheckCache, Finalize]]" = []


def _close_caches() -> None:
    _open_cache.cache_clear()
    while _opened:
        checks, at_exit = _opened.pop()
        at_exit.cancel()
        checks.close()
