"""What the rules across samples need to know of a block of lines.

    gather(scan, parsed, takes_facts=True, takes_images=True)
    # BlockFacts(lines=[0, 1, 2], ids=[…], contents=[…], labels={"Archery": (2, 0)}, images=…)

Small arrays and dictionaries, not samples: whoever has those of all blocks puts them together
(`phi3v_data.validate`). Lines count from 0 in the block.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from phi3v_data.alike_lines import AlikeLines
from phi3v_data.quick_sample import QuickSample
from phi3v_data.quick_scan import Scan
from phi3v_data.rules.across import MAX_CLASSES, MAX_LABEL_CHARS, group_of
from phi3v_data.schema import Sample

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]

_digest = xxh3_64_intdigest

MAX_LABEL_BYTES = 4 * MAX_LABEL_CHARS

_NO_HASHES: Hashes = np.empty(0, dtype=np.uint64)
_NO_NUMBERS: Numbers = np.empty(0, dtype=np.int64)


@dataclass
class BlockFacts:
    """The facts of one block."""

    lines: Numbers = field(default_factory=lambda: np.empty(0, np.int64))
    """Numbers of the lines that are samples, ascending."""

    ids: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))
    """xxh3 of the id of each of them."""

    contents: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))
    """xxh3 of its images, questions and answers; empty unless asked for."""

    labels: dict[str, tuple[int, int]] | None = field(default_factory=dict[str, tuple[int, int]])
    """Answer of a one-turn sample → how often, first line; None: they are no classes."""

    groups: dict[str, int] = field(default_factory=dict[str, int])
    """Group of clips → first line."""

    images: dict[str, int] = field(default_factory=dict[str, int])
    """Path of an image → first line; in the order of lines."""

    image_lines: Numbers = field(default_factory=lambda: np.empty(0, np.int64))
    """Lines with images, ascending."""


def gather(
    scan: Scan, parsed: Mapping[int, Sample], *, takes_facts: bool, takes_images: bool
) -> BlockFacts:
    """The facts of all samples of a block.

    Args:
        scan: the block; its suspects are left out.
        parsed: those suspects that are samples all the same.
        takes_facts: whether the facts for rules across samples are wanted.
        takes_images: whether the paths of images are.
    """
    facts = BlockFacts()
    loose: dict[int, QuickSample | Sample] = {**scan.loose, **parsed}
    lines = [group.numbers for group in scan.alike]
    ids = [_digests(group.texts(group.shape.sample.id)) for group in scan.alike]
    if loose:
        lines.append(np.array(list(loose), dtype=np.int64))
        ids.append(_digests(_bytes(sample.id) for sample in loose.values()))
    numbers = np.concatenate([_NO_NUMBERS, *lines])
    order = np.argsort(numbers, kind="stable")
    facts.lines = numbers[order]
    facts.ids = np.concatenate([_NO_HASHES, *ids])[order]
    if takes_facts:
        contents = [_contents(group) for group in scan.alike]
        if loose:
            contents.append(np.fromiter(map(_content, loose.values()), np.uint64, len(loose)))
        facts.contents = np.concatenate([_NO_HASHES, *contents])[order]
        facts.labels = _labels(scan.alike, loose)
    if takes_facts or takes_images:
        image_lines: list[int] = []
        for group in scan.alike:
            _add_images_of_group(group, facts, image_lines)
        for number, sample in loose.items():
            _add_images(number, _images(sample), facts, image_lines)
        if len(scan.alike) + bool(loose) > 1:
            facts.images = dict(sorted(facts.images.items(), key=itemgetter(1)))
        facts.image_lines = np.array(sorted(image_lines), dtype=np.int64)
    return facts


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digests(texts: Iterable[bytes]) -> Hashes:
    return np.frombuffer(b"".join(map(xxh3_64_digest, texts)), dtype=">u8").astype(np.uint64)


# --- content: images, questions and answers, however they are written ----------------------------
#
# The hashes of these texts, and of a mark between turns and one for a missing answer, are the
# digits of a number of base `_BASE`, modulo 2**64: for columns, numpy counts it.


def _content(sample: QuickSample | Sample) -> int:
    value = 0
    for turn in sample.conversations:
        for path in turn.images or ():
            value = value * _BASE + _digest(_bytes(path))
        value = value * _BASE + _TURN
        value = value * _BASE + _digest(_bytes(turn.user))
        answer = turn.assistant
        value = value * _BASE + (_digest(_bytes(answer)) if answer else _UNANSWERED)
        value &= 2**64 - 1
    return value


def _contents(group: AlikeLines) -> Hashes:
    values = np.zeros(len(group.numbers), dtype=np.uint64)
    base = np.uint64(_BASE)
    for turn in group.shape.sample.conversations:
        for path in turn.images or ():
            values = values * base + _digests(group.texts(path))
        values = values * base + np.uint64(_TURN)
        values = values * base + _digests(group.texts(turn.user))
        if turn.assistant:
            values = values * base + _digests(group.texts(turn.assistant))
        else:
            values = values * base + np.uint64(_UNANSWERED)
    return values


_BASE, _TURN, _UNANSWERED = (_digest(name) | 1 for name in (b"base", b"turn", b"unanswered"))


# --- labels: answers of one-turn samples ---------------------------------------------------------


def _labels(
    alike: Sequence[AlikeLines], loose: Mapping[int, QuickSample | Sample]
) -> dict[str, tuple[int, int]] | None:
    found: dict[bytes, tuple[int, int]] = {}
    num_answered = num_samples = 0
    for group in alike:
        num_samples += len(group.numbers)
        turns = group.shape.sample.conversations
        if len(turns) > 1:
            return None
        if turns[0].assistant:
            answers = group.texts(turns[0].assistant)
            num_answered += len(answers)
            for label, count in Counter(answers).items():
                _count(found, label, count, int(group.numbers[answers.index(label)]))
                if len(found) > MAX_CLASSES:
                    return None
    for number, sample in loose.items():
        num_samples += 1
        turns = list(sample.conversations)
        if len(turns) > 1:
            return None
        answer = turns[0].assistant
        if answer:
            num_answered += 1
            _count(found, _bytes(answer), 1, number)
    if not found:
        return {}
    labels = {label.decode("utf-8", "surrogatepass"): pair for label, pair in found.items()}
    is_classes = num_answered == num_samples and len(labels) <= MAX_CLASSES
    return labels if is_classes and max(map(len, labels)) <= MAX_LABEL_CHARS else None


def _count(found: dict[bytes, tuple[int, int]], label: bytes, count: int, line: int) -> None:
    known, first = found.get(label, (0, line))
    found[label] = known + count, min(first, line)


# --- images --------------------------------------------------------------------------------------


def _images(sample: QuickSample | Sample) -> list[str]:
    return [path for turn in sample.conversations for path in turn.images or ()]


def _add_images(number: int, paths: list[str], facts: BlockFacts, image_lines: list[int]) -> None:
    if not paths:
        return
    image_lines.append(number)
    for path in paths:
        _note_first(facts.images, path, number)
    group = group_of(paths[0])
    if group is not None:
        _note_first(facts.groups, group, number)


def _add_images_of_group(group: AlikeLines, facts: BlockFacts, image_lines: list[int]) -> None:
    turns = group.shape.sample.conversations
    columns = [group.texts(path) for turn in turns for path in turn.images or ()]
    if not columns:
        return
    numbers = group.numbers.tolist()
    image_lines.extend(numbers)
    for number, *paths in zip(numbers, *columns, strict=True):
        for path in paths:
            _note_first(facts.images, path.decode(), number)
    for path, number in zip(columns[0], numbers, strict=True):
        if b"_g" in path:
            name = group_of(path.decode())
            if name is not None:
                _note_first(facts.groups, name, number)


def _note_first(found: dict[str, int], name: str, number: int) -> None:
    """Keep the lowest number: groups of lines do not come in the order of lines."""
    if found.setdefault(name, number) > number:
        found[name] = number
