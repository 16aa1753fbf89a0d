"""What a data set is made of, counted in one pass and bounded memory.

    stats = collect_stats(["train.jsonl", "val.jsonl"], images="images")
    stats.total.num_samples                    # 1,034
    stats.total.images_per_sample.quantile(.5) # 8
    print(to_json(stats))                      # {"version": 1, "files": [...], "total": {...}}

Exact: every number of samples, turns and image references, and every minimum, maximum and mean.
Approximate, so that any number of lines fits:

- quantiles above 1,024 are of values rounded down to 10 significant bits (less than 0.2 % low);
- distinct images and distinct answers are exact up to 262,144; above that the paths whose hash
  ends in some zeros stand for all (a uniform sample; the estimate is off by about 0.3 %), and
  `is_exact` is false. Sizes and formats are then those of the sample.

Lines that do not parse are counted, and the first of them named. What is *wrong* with the data is
for `phi3v-data validate` to say.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import msgspec
import xxhash

from phi3v_data.image_place import ImagePlaces, MisplacedImage
from phi3v_data.images import ImageError, probe_image
from phi3v_data.jsonl import default_image_root, read_lines
from phi3v_data.worker_pool import num_cores

AnyPath: TypeAlias = str | os.PathLike[str]

JSON_VERSION = 1
"""Of `to_json`. A key may be added without raising it, never removed or changed."""

MAX_DISTINCT = 262_144
"""Distinct keys counted exactly."""

MAX_COUNTED_LABELS = 200
"""Different answers, and sources, that are counted one by one; more are free text."""

MAX_NAMED = 20
"""Lines that do not parse, named; the rest is counted."""

MAX_SIZES = 10
"""Most frequent image sizes listed."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

PROBE_BATCH = 64
"""Images a thread looks at before it reports."""


class _Turn(msgspec.Struct):
    user: str
    images: list[str] = []
    assistant: str | None = None


class _Sample(msgspec.Struct):
    id: str
    conversations: list[_Turn]
    source: str = ""


_decoder = msgspec.json.Decoder(_Sample)


@dataclass
class Distribution:
    """Counts of whole numbers from 0."""

    bins: Counter[int] = field(default_factory=Counter[int])
    """Value → how often. Values above 1,024 are rounded down to 10 significant bits."""

    count: int = 0
    total: int = 0
    minimum: int | None = None
    maximum: int | None = None

    def add(self, value: int, times: int = 1) -> None:
        """Count `value`."""
        shift = max(0, value.bit_length() - 10)
        self.bins[value >> shift << shift] += times
        self.count += times
        self.total += value * times
        if self.minimum is None or value < self.minimum:
            self.minimum = value
        if self.maximum is None or value > self.maximum:
            self.maximum = value

    def update(self, other: "Distribution") -> None:
        """Add all that `other` counted."""
        self.bins.update(other.bins)
        self.count += other.count
        self.total += other.total
        for bound in (other.minimum, other.maximum):
            if bound is not None:
                self.minimum = bound if self.minimum is None else min(self.minimum, bound)
                self.maximum = bound if self.maximum is None else max(self.maximum, bound)

    @property
    def mean(self) -> float | None:
        """None without values."""
        return self.total / self.count if self.count else None

    def quantile(self, fraction: float) -> int | None:
        """The smallest value that at least `fraction` of the values do not exceed."""
        seen = 0
        for value in sorted(self.bins):
            seen += self.bins[value]
            if seen >= fraction * self.count:
                return max(value, self.minimum or 0)
        return None


class DistinctCount:
    """How many different keys there were, in bounded memory, with a value for a sample of them.

    A key is a 64-bit hash. While there are few, all are kept. When they become too many, those
    whose last bit is 1 are thrown out and each of the others counts double, and so on. What is
    kept is a uniform sample of the keys, and the same whatever their order.
    """

    def __init__(self, limit: int = MAX_DISTINCT) -> None:
        self.kept: dict[int, Any] = {}
        self._limit = limit
        self._level = 0  # low bits that are 0 in every key kept

    def add(self, key: int) -> bool:
        """Count a key; whether it is new and kept."""
        if key in self.kept or key & ((1 << self._level) - 1):
            return False
        self.kept[key] = None
        if len(self.kept) > self._limit:
            self._thin(self._level + 1)
        return key in self.kept

    def update(self, other: "DistinctCount") -> None:
        """Add all keys that `other` counted."""
        self.kept.update(other.kept)
        self._thin(max(self._level, other._level))

    def _thin(self, level: int) -> None:
        self._level = level
        while True:
            mask = (1 << self._level) - 1
            self.kept = {key: value for key, value in self.kept.items() if not key & mask}
            if len(self.kept) <= self._limit:
                return
            self._level += 1

    def set(self, key: int, value: Any) -> None:
        """Give a key its value, if it is still kept."""
        if key in self.kept:
            self.kept[key] = value

    @property
    def count(self) -> int:
        """Different keys: exact, or estimated."""
        return len(self.kept) << self._level

    @property
    def is_exact(self) -> bool:
        """Whether no key was thrown out."""
        return self._level == 0


ImageFacts: TypeAlias = tuple[int, int, str] | str
"""Width, height, format; or why there is none of these: `missing`, `outside` or `unreadable`."""


@dataclass
class Stats:
    """One file, or all of them together."""

    file: str = ""
    """As given; empty for the total."""

    num_lines: int = 0
    """Lines that are not blank."""

    num_samples: int = 0
    """Lines that parse."""

    unparsed: list[tuple[str, int, str]] = field(default_factory=list[tuple[str, int, str]])
    """File, line and problem of the first `MAX_NAMED` lines that do not parse."""

    sources: Counter[str] = field(default_factory=Counter[str])
    """`source` → samples; at most `MAX_COUNTED_LABELS` of them, the rest under an empty name."""

    num_unanswered: int = 0
    """Turns without an answer."""

    turns_per_sample: Distribution = field(default_factory=Distribution)
    images_per_sample: Distribution = field(default_factory=Distribution)
    user_chars: Distribution = field(default_factory=Distribution)
    """Characters of a prompt."""

    assistant_chars: Distribution = field(default_factory=Distribution)
    """Characters of an answer."""

    labels: Counter[str] | None = field(default_factory=Counter[str])
    """Answer → turns; None where there are more than `MAX_COUNTED_LABELS`."""

    answers: DistinctCount = field(default_factory=DistinctCount)
    images: DistinctCount = field(default_factory=DistinctCount)

    image_facts: Counter[ImageFacts] = field(default_factory=Counter[ImageFacts])
    """Of distinct images (or the sample of them); empty where images were not looked at."""

    @property
    def num_unparsed(self) -> int:
        """Lines that do not parse."""
        return self.num_lines - self.num_samples

    @property
    def num_turns(self) -> int:
        """Of all samples."""
        return self.turns_per_sample.total

    @property
    def num_images(self) -> int:
        """Image references; an image used twice counts twice."""
        return self.images_per_sample.total

    @property
    def classes(self) -> Counter[str] | None:
        """The answers, if they look like classes: few, and each given twice on average."""
        labels = self.labels
        if not labels or sum(labels.values()) < 2 * len(labels):
            return None
        return labels

    @property
    def sizes(self) -> Counter[tuple[int, int]]:
        """(width, height) → images."""
        sizes: Counter[tuple[int, int]] = Counter()
        for facts, number in self.image_facts.items():
            if not isinstance(facts, str):
                sizes[facts[0], facts[1]] += number
        return sizes

    @property
    def formats(self) -> Counter[str]:
        """Format by content → images."""
        formats: Counter[str] = Counter()
        for facts, number in self.image_facts.items():
            if not isinstance(facts, str):
                formats[facts[2]] += number
        return formats

    @property
    def problems(self) -> Counter[str]:
        """`missing`, `outside` or `unreadable` → images."""
        return Counter({k: n for k, n in self.image_facts.items() if isinstance(k, str)})

    def along(self, axis: int) -> Distribution:
        """Widths (0) or heights (1) of the images, in pixels."""
        distribution = Distribution()
        for size, number in self.sizes.items():
            distribution.add(size[axis], number)
        return distribution


@dataclass(frozen=True)
class DatasetStats:
    """Several files, the splits of one data set."""

    files: tuple[Stats, ...]
    total: Stats

    looked_at_images: bool
    """Whether sizes and formats are known."""


def collect_stats(
    paths: Sequence[AnyPath],
    *,
    images: AnyPath | None = None,
    look_at_images: bool = True,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DatasetStats:
    """Count what is in conversations files.

    Args:
        paths: JSONL files.
        images: the image root; by default `images/` beside each file, else its folder.
        look_at_images: read the header of every distinct image, for its size and format.
        num_workers: threads that read headers; by default two a core.
        progress: called with (bytes of JSONL done, bytes in all).

    Raises:
        ValueError: no files, or a file that is not there.
    """
    if not paths:
        raise ValueError("no files to count; expected at least one JSONL file")
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"{os.fspath(path)}: no such file")
    sizes = [os.path.getsize(path) for path in paths]
    total, files = Stats(), list[Stats]()
    with _Prober(total.images, num_workers or 2 * num_cores()) as prober:
        for number, path in enumerate(paths):
            root = default_image_root(path) if images is None else images
            probe = prober.of_root(root) if look_at_images else None
            done = sum(sizes[:number])

            def report(num_bytes: int, done: int = done) -> None:
                if progress is not None:
                    progress(min(done + num_bytes, sum(sizes)), sum(sizes))

            stats = _count_file(path, os.fspath(root), total, probe, report)
            files.append(stats)
            _add(total, stats)
    for stats in (*files, total):
        # Of two files that share an image, each counts it; it was looked at once.
        known = (total.images.kept.get(key) for key in stats.images.kept)
        stats.image_facts.update(facts for facts in known if facts is not None)
    return DatasetStats(tuple(files), total, look_at_images)


Probe: TypeAlias = Callable[[int, str], None]


def _count_file(
    path: AnyPath, root: str, total: Stats, probe: Probe | None, report: Callable[[int], None]
) -> Stats:
    stats = Stats(file=os.fspath(path))
    prefix = f"{root}\0"
    num_bytes = 0
    for number, line in read_lines(path):
        stats.num_lines += 1
        num_bytes += len(line) + 1
        if stats.num_lines % 1024 == 0:
            report(num_bytes)
        try:
            sample = _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if len(stats.unparsed) < MAX_NAMED:
                stats.unparsed.append((stats.file, number, str(error)))
            continue
        stats.num_samples += 1
        stats.sources[_bounded(stats.sources, sample.source)] += 1
        stats.turns_per_sample.add(len(sample.conversations))
        num_images = 0
        for turn in sample.conversations:
            num_images += len(turn.images)
            stats.user_chars.add(len(turn.user))
            _count_answer(stats, turn.assistant)
            for image in turn.images:
                key = _hash(prefix + image)
                if stats.images.add(key) and total.images.add(key) and probe is not None:
                    probe(key, image)
        stats.images_per_sample.add(num_images)
    report(num_bytes)
    return stats


def _count_answer(stats: Stats, answer: str | None) -> None:
    if answer is None:
        stats.num_unanswered += 1
        return
    stats.assistant_chars.add(len(answer))
    stats.answers.add(_hash(answer))
    if stats.labels is not None:
        stats.labels[answer] += 1
        if len(stats.labels) > MAX_COUNTED_LABELS:
            stats.labels = None


def _add(total: Stats, stats: Stats) -> None:
    """Add a file to the total; its images are there already."""
    total.num_lines += stats.num_lines
    total.num_samples += stats.num_samples
    total.num_unanswered += stats.num_unanswered
    total.unparsed += stats.unparsed[: MAX_NAMED - len(total.unparsed)]
    for name, number in stats.sources.items():
        total.sources[_bounded(total.sources, name)] += number
    total.turns_per_sample.update(stats.turns_per_sample)
    total.images_per_sample.update(stats.images_per_sample)
    total.user_chars.update(stats.user_chars)
    total.assistant_chars.update(stats.assistant_chars)
    total.answers.update(stats.answers)
    if total.labels is not None:
        total.labels.update(stats.labels or ())
        if stats.labels is None or len(total.labels) > MAX_COUNTED_LABELS:
            total.labels = None


def _bounded(counter: Counter[str], name: str) -> str:
    """`name`, or the empty name once there are too many."""
    return name if name in counter or len(counter) < MAX_COUNTED_LABELS else ""


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


class _Prober:
    """Reads image headers on threads; a bounded number of them is under way."""

    def __init__(self, results: DistinctCount, num_workers: int) -> None:
        self._results = results
        self._executor = ThreadPoolExecutor(num_workers, thread_name_prefix="probe")
        self._running: deque[Future[list[tuple[int, ImageFacts]]]] = deque()
        self._max_running = 4 * num_workers
        self._batch: list[tuple[int, str]] = []
        self._places = ImagePlaces(".")

    def of_root(self, root: AnyPath) -> Probe:
        """Images of this root from now on."""
        self._start()
        self._places = ImagePlaces(root)
        return self._probe

    def _probe(self, key: int, path: str) -> None:
        self._batch.append((key, path))
        if len(self._batch) == PROBE_BATCH:
            self._start()

    def _start(self) -> None:
        if self._batch:
            self._running.append(self._executor.submit(_probe_batch, self._places, self._batch))
            self._batch = []
        while len(self._running) > self._max_running:
            self._take()

    def _take(self) -> None:
        for key, facts in self._running.popleft().result():
            self._results.set(key, facts)

    def __enter__(self) -> "_Prober":
        return self

    def __exit__(self, error_type: object, error: object, traceback: object) -> None:
        try:
            if error is None:
                self._start()
                while self._running:
                    self._take()
        finally:
            self._executor.shutdown(wait=True, cancel_futures=True)


def _probe_batch(places: ImagePlaces, batch: list[tuple[int, str]]) -> list[tuple[int, ImageFacts]]:
    return [(key, _probe_one(places, path)) for key, path in batch]


def _probe_one(places: ImagePlaces, path: str) -> ImageFacts:
    try:
        info = probe_image(places.find(path))
    except MisplacedImage as error:
        return error.kind
    except (ImageError, OSError):
        return "unreadable"
    return info.width, info.height, info.format


# --- as JSON --------------------------------------------------------------------------------------


def to_json(stats: DatasetStats) -> str:
    """The statistics as one JSON object.

    `{"version": 1, "files": [S, ...], "total": S}`, where S has `file` (null in the total),
    `num_lines`, `num_samples`, `num_unparsed`, `unparsed` (`[{file, line, problem}]`, the first
    20), `sources` (name → samples), `num_turns`, `turns_per_sample`, `num_unanswered`,
    `num_images` (references), `num_distinct_images` with `is_exact_images`, `images_per_sample`,
    `num_distinct_answers` with `is_exact_answers`, `answers` (answer → turns, most frequent first;
    null where they are no classes), `user_chars`, `assistant_chars`, and `images`: null where
    they were not looked at, else `width`, `height` (pixels), `sizes` (`[{width, height, count}]`,
    the 10 most frequent), `formats` and `problems` (name → images). A distribution is `{count,
    mean, min, p5, p25, p50, p75, p95, p99, max, counts}`; `counts` maps a value to its frequency
    and is null where there are more than 200 values.
    """
    looked_at = stats.looked_at_images
    content = {
        "version": JSON_VERSION,
        "files": [_as_dict(file, looked_at) for file in stats.files],
        "total": _as_dict(stats.total, looked_at),
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def _as_dict(stats: Stats, looked_at_images: bool) -> dict[str, Any]:
    classes = stats.classes
    images: dict[str, Any] | None = None
    if looked_at_images:
        images = {
            "width": _distribution_dict(stats.along(0)),
            "height": _distribution_dict(stats.along(1)),
            "sizes": [
                {"width": width, "height": height, "count": number}
                for (width, height), number in ranked(stats.sizes)[:MAX_SIZES]
            ],
            "formats": dict(ranked(stats.formats)),
            "problems": dict(ranked(stats.problems)),
        }
    return {
        "file": stats.file or None,
        "num_lines": stats.num_lines,
        "num_samples": stats.num_samples,
        "num_unparsed": stats.num_unparsed,
        "unparsed": [
            {"file": file, "line": line, "problem": problem}
            for file, line, problem in stats.unparsed
        ],
        "sources": dict(ranked(stats.sources)),
        "num_turns": stats.num_turns,
        "turns_per_sample": _distribution_dict(stats.turns_per_sample),
        "num_unanswered": stats.num_unanswered,
        "num_images": stats.num_images,
        "num_distinct_images": stats.images.count,
        "is_exact_images": stats.images.is_exact,
        "images_per_sample": _distribution_dict(stats.images_per_sample),
        "num_distinct_answers": stats.answers.count,
        "is_exact_answers": stats.answers.is_exact,
        "answers": None if classes is None else dict(ranked(classes)),
        "user_chars": _distribution_dict(stats.user_chars),
        "assistant_chars": _distribution_dict(stats.assistant_chars),
        "images": images,
    }


def _distribution_dict(distribution: Distribution) -> dict[str, Any]:
    quantiles = {f"p{round(100 * q)}": distribution.quantile(q) for q in QUANTILES}
    counts = {str(value): distribution.bins[value] for value in sorted(distribution.bins)}
    mean = distribution.mean
    return {
        "count": distribution.count,
        "mean": None if mean is None else round(mean, 3),
        "min": distribution.minimum,
        **quantiles,
        "max": distribution.maximum,
        "counts": counts if len(counts) <= MAX_COUNTED_LABELS else None,
    }


K = TypeVar("K")


def ranked(counter: "Counter[K]") -> list[tuple[K, int]]:
    """Most frequent first; equals in the order of their names."""
    return sorted(counter.items(), key=lambda pair: (-pair[1], str(pair[0])))
