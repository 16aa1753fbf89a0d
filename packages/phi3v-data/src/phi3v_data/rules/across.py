"""D: across samples, what only the whole data set tells.

Rules here get `Facts`, gathered from all lines of all files, and yield an `AcrossFinding` for each
cause: forty images that train and val share are one finding.
"""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from phi3v_data.diagnostics import Label

MAX_CLASSES = 1000
"""More different answers than this in a file are no classes: the rules about classes are silent."""

MAX_LABEL_CHARS = 60
"""A longer answer is no class."""

MIN_REPEATS = 5
"""Answers are classes where each occurs this often, on average."""

IMBALANCE = 20
"""Times that the most frequent class may be as frequent as the median one."""


@dataclass(frozen=True, slots=True)
class AcrossFinding:
    """One thing wrong with the data set."""

    message: str
    file: str
    line: int | None
    help: str = ""
    labels: tuple[Label, ...] = ()
    num_findings: int = 1


@dataclass(frozen=True, slots=True)
class Repeat:
    """A sample that an earlier line has."""

    file: str
    line: int
    first_file: str
    first_line: int


@dataclass(frozen=True, slots=True)
class UnusedFiles:
    """Image files that no sample names."""

    file: str
    """The first of the JSONL files with this image root."""

    root: str
    first_paths: tuple[str, ...]
    """Some of them, relative to the root."""

    num_files: int


@dataclass(slots=True)
class Looks:
    """How the images of a file look (`near_images`), in the order of lines."""

    paths: list[str] = field(default_factory=list[str])
    lines: list[int] = field(default_factory=list[int])
    """The first with the image."""

    contents: list[int] = field(default_factory=list[int])
    """Hashes, as in `FileFacts.first_of_image`."""

    looks: "array[int]" = field(default_factory=lambda: array("Q"))

    def add(self, path: str, line: int, content: int, look: int) -> None:
        """Add one image."""
        self.paths.append(path)
        self.lines.append(line)
        self.contents.append(content)
        self.looks.append(look)


@dataclass(slots=True)
class FileFacts:
    """What one file holds."""

    num_samples: int = 0

    labels: Counter[str] | None = field(default_factory=Counter[str])
    """Answers of one-turn samples; None where there are too many to be classes."""

    first_of_label: dict[str, int] = field(default_factory=dict[str, int])
    """Label → the first line that has it."""

    first_of_group: dict[str, int] = field(default_factory=dict[str, int])
    """Group of clips (`v_Archery_g05`) → the first line that has it."""

    first_of_image: dict[int, int] = field(default_factory=dict[int, int])
    """Hash of an image (of its content, or of its path where it is not read) → the first line."""

    looks: Looks = field(default_factory=Looks)
    """Empty unless they are compared (D108)."""


@dataclass(slots=True)
class Facts:
    """What all files hold."""

    files: dict[str, FileFacts] = field(default_factory=dict[str, FileFacts])

    repeats: Callable[[], Iterable[Repeat]] = tuple
    """Samples that an earlier line has, in order; there may be millions."""
    unused: tuple[UnusedFiles, ...] = ()
    """Empty unless they are looked for (I110)."""


GROUP = re.compile(r"([^/]*_g[0-9]+)_c[0-9]+")
"""Clips of one source video in UCF-101 and its kin: `v_Archery_g05_c02`."""


def group_of(image: str) -> str | None:
    """The group that an image's name tells: `v_Archery_g05`."""
    found = GROUP.search(image)
    return found[1] if found else None


def classes_of(facts: FileFacts) -> Mapping[str, int]:
    """Label → samples, where the answers are classes; empty where they are not."""
    labels = facts.labels
    if not labels or sum(labels.values()) < MIN_REPEATS * len(labels):
        return {}
    return labels


def duplicate_sample(facts: Facts) -> Iterator[AcrossFinding]:
    """A sample occurs twice under different ids.

    Same images, questions and answers. Within a split it counts double; in two splits, what is
    evaluated was trained on.
    """
    for repeat in facts.repeats():
        is_same_file = repeat.file == repeat.first_file
        place = "" if is_same_file else f" of {repeat.first_file}"
        yield AcrossFinding(
            f"the same images, questions and answers as in line {repeat.first_line}{place}",
            repeat.file,
            repeat.line,
            "keep one" if is_same_file else "no sample should be in two splits",
            (Label("first here", repeat.first_file, repeat.first_line),),
        )


def shared_image(facts: Facts) -> Iterator[AcrossFinding]:
    """Two splits share images.

    What is evaluated has been seen in training. Images count as the same by content; where images
    are not looked at, by path.
    """
    yield from _shared(facts, ("image is", "images are"), lambda found: found.first_of_image)


def near_image(facts: Facts) -> Iterator[AcrossFinding]:
    """Two splits have pictures that look the same, though their files differ.

    The same picture scaled, compressed again or in another format: what is evaluated has been seen
    in training. Pictures are compared by a perceptual hash (pHash, 64 bits of which at most 4
    differ), those of one colour are left out, and those with the same bytes are reported by D103.
    Scanned forms and neighbouring frames of a video can look the same without being it, so look at
    them. It decodes every image: off by default, switched on by `--select D108`, or by
    `severity = {D108 = "warning"}` beside the other rules.
    """
    import numpy as np

    from phi3v_data.near_images import find_near

    for (one, of_one), (other, of_other) in combinations(facts.files.items(), 2):
        first, second = of_one.looks, of_other.looks
        pairs = [
            (a, b)
            for a, b in find_near(np.array(first.looks), np.array(second.looks))
            if second.contents[b] not in of_one.first_of_image
        ]
        if pairs:
            a, b = min(pairs, key=lambda pair: second.lines[pair[1]])
            plural = "images look" if len(pairs) > 1 else "image looks"
            yield AcrossFinding(
                f"{len(pairs):,} {plural} like one in {one}: the first, {second.paths[b]!r}, "
                f"like {first.paths[a]!r}",
                other,
                second.lines[b],
                "if it is the same picture, leave it out of one split",
                (Label("this one", one, first.lines[a]),),
                len(pairs),
            )


def shared_group(facts: Facts) -> Iterator[AcrossFinding]:
    """Two splits share a group of clips.

    In UCF-101 and data sets like it, clips of one group (`g05` in `v_Archery_g05_c02`) are cut from
    one video: same place, same people. A model tested on them is tested on what it has seen. Split
    by group: `phi3v-data convert ucf101 --val_fraction` does.
    """
    what = ("group of clips is", "groups of clips are")
    yield from _shared(facts, what, lambda found: found.first_of_group)


def _shared(
    facts: Facts, what: tuple[str, str], get: Callable[[FileFacts], Mapping[Any, int]]
) -> Iterator[AcrossFinding]:
    for (one, of_one), (other, of_other) in combinations(facts.files.items(), 2):
        first, second = get(of_one), get(of_other)
        shared = first.keys() & second.keys()
        if shared:
            # The earliest line of the later file: where a reader starts to look.
            key = min(shared, key=lambda k: (second[k], first[k]))
            number, name = len(shared), f" ({key})" if isinstance(key, str) else ""
            yield AcrossFinding(
                f"{number:,} {what[number > 1]} in {one} too{name}",
                other,
                second[key],
                "a split is evaluated fairly where it shares nothing with training",
                (Label("first here", one, first[key]),),
                number,
            )


def class_imbalance(facts: Facts) -> Iterator[AcrossFinding]:
    """One class is more than 20 times as frequent as the median class.

    A model that always answers it looks good. Weigh it in evaluation, or sample the classes evenly.
    """
    for file, found in facts.files.items():
        classes = classes_of(found)
        if len(classes) < 2:
            continue
        ordered = sorted(classes.values())
        median = ordered[len(ordered) // 2 if len(ordered) > 2 else 0]
        label, most = max(classes.items(), key=lambda pair: pair[1])
        if most > IMBALANCE * median:
            share = most / sum(ordered)
            yield AcrossFinding(
                f"{label!r} is {share:.0%} of the answers; half of the {len(classes)} classes "
                f"have {median:,} samples or fewer",
                file,
                found.first_of_label[label],
            )


def label_typo(facts: Facts) -> Iterator[AcrossFinding]:
    """Two labels differ in upper and lower case or spacing only, or a rare one by one letter.

    `BabyCrawling` and `Babycrawling` are two classes to the model and to the score.
    """
    total: Counter[str] = Counter()
    place: dict[str, tuple[str, int]] = {}
    for file, found in facts.files.items():
        for label, number in classes_of(found).items():
            total[label] += number
            place.setdefault(label, (file, found.first_of_label[label]))
    seen: dict[str, str] = {}
    for label in sorted(total, key=lambda name: (-total[name], name)):  # the frequent one is right
        for key in _near_keys(label):
            known = seen.get(key)
            if known is not None and _is_typo(label, known, total):
                file, line = place[label]
                yield AcrossFinding(
                    f"the answer {label!r} ({_times(total[label])}) is nearly "
                    f"{known!r} ({_times(total[known])})",
                    file,
                    line,
                    f"if it is the same class, write {known!r}",
                    (Label(f"{known!r} first here", *place[known]),),
                )
                break
        for key in _near_keys(label):
            seen.setdefault(key, label)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number:,} times"


def _near_keys(label: str) -> Iterator[str]:
    """Keys of which labels at most one letter apart share one."""
    plain = re.sub(r"[\W_]+", "", label.casefold())
    yield f"={plain}"
    if len(plain) >= 5:
        for k in range(len(plain)):
            yield plain[:k] + plain[k + 1 :]
        yield plain


def _is_typo(label: str, known: str, total: Counter[str]) -> bool:
    plain, other = (re.sub(r"[\W_]+", "", text.casefold()) for text in (label, known))
    if plain == other:
        return True
    if re.sub(r"\d", "", plain) == re.sub(r"\d", "", other):  # class 1 and class 2
        return False
    return _is_one_apart(plain, other) and total[label] * 20 <= total[known]


def _is_one_apart(one: str, other: str) -> bool:
    """Whether one letter more, less or different makes them the same."""
    shorter, longer = sorted((one, other), key=len)
    k = next((k for k, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), None)
    if k is None:
        return len(longer) - len(shorter) == 1
    return shorter[k:] == longer[k + 1 :] or shorter[k + 1 :] == longer[k + 1 :]


def unknown_label(facts: Facts) -> Iterator[AcrossFinding]:
    """A split has labels that the first one lacks.

    The first file is taken for training. What it never says cannot be learned, and counts as wrong
    in the evaluation.
    """
    files = list(facts.files.items())
    if not files:
        return
    (first, of_first), *others = files
    known = classes_of(of_first)
    if not known:
        return
    for file, found in others:
        lacking = sorted(set(classes_of(found)) - set(known))
        if lacking:
            shown = ", ".join(map(repr, lacking[:3])) + (", …" if len(lacking) > 3 else "")
            plural = "s" if len(lacking) > 1 else ""
            yield AcrossFinding(
                f"{len(lacking):,} label{plural} that {first} lacks: {shown}",
                file,
                found.first_of_label[lacking[0]],
                num_findings=len(lacking),
            )
