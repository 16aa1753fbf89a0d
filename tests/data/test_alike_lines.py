"""Lines that are written alike are read as what they say, line by line."""

import json
import random
from typing import Any

import numpy as np
import pytest
from phi3v_data.alike_lines import MIN_LINES, AlikeLines
from phi3v_data.block_facts import gather
from phi3v_data.quick_scan import Scan, scan_block

TEXTS = [
    "plain", "ü ☃", 'with "quotes"', "two\nlines", "back\\slash", 'ends in \\"', "\\", "tab\there",
    "https://x.y/z", '{"id": "x"}', '","user":"', "é", "\u2003wide space", "a: b, c", "ends\\\\",
]  # fmt: skip


def text(rng: random.Random) -> str:
    return rng.choice(TEXTS) if rng.random() < 0.4 else "plain"


def sample(rng: random.Random, number: int, kind: int) -> dict[str, Any]:
    turns = [
        {
            "images": [f"{number}/v_A_g{number % 7}_c{k}.jpg" for k in range(kind % 3)],
            "user": text(rng),
            "assistant": text(rng),
        }
        for _ in range(1 + kind // 3)
    ]
    return {"id": f"{text(rng)}-{number}", "source": "s", "conversations": turns}


def lines_of(seed: int, num_kinds: int = 6) -> list[bytes]:
    rng = random.Random(seed)
    return [
        json.dumps(
            sample(rng, number, rng.randrange(num_kinds)), ensure_ascii=rng.random() < 0.3
        ).encode()
        for number in range(400)
    ]


def scan(lines: list[bytes]) -> Scan:
    content = b"".join(line + b"\n" for line in lines)
    return scan_block(content, max_line_bytes=10_000, allow_missing_answer=False, is_start=False)


def as_sample(group: AlikeLines, row: int) -> dict[str, Any]:
    """The line, put together from its values."""
    shape = group.shape.sample

    def read(value: str) -> str:
        assert group.text(row, value) == group.texts(value)[row]
        return group.text(row, value).decode()

    return {
        "id": read(shape.id),
        "source": read(shape.source),
        "conversations": [
            {
                "images": [read(path) for path in turn.images or ()],
                "user": read(turn.user),
                "assistant": read(str(turn.assistant)),
            }
            for turn in shape.conversations
        ],
    }


@pytest.mark.parametrize("seed", range(5))
def test_values_are_those_of_the_lines(seed: int) -> None:
    lines = lines_of(seed)
    found = scan(lines)
    numbers: list[int] = []
    for group in found.alike:
        for row, number in enumerate(group.numbers.tolist()):
            assert as_sample(group, row) == json.loads(lines[number])
            numbers.append(number)
    assert len(numbers) > 100
    assert sorted([*numbers, *found.loose, *found.suspects]) == list(range(len(lines)))


def test_few_lines_of_a_shape_are_decoded_one_by_one() -> None:
    line = b'{"id":"a","source":"s","conversations":[{"user":"q","assistant":"a"}]}'
    assert scan([line] * (MIN_LINES - 1)).alike == []
    assert len(scan([line] * MIN_LINES).alike) == 1


def test_lines_of_another_shape_are_left_out() -> None:
    line = (
        b'{"id":"a","source":"s","conversations":[{"user":"q","assistant":"a"}],"metadata":{"k":1}}'
    )
    others = [line.replace(b":1}", b":%d}" % k) for k in range(2, 9)]
    found = scan([line] * MIN_LINES + others)
    assert [group.numbers.tolist() for group in found.alike] == [list(range(MIN_LINES))]
    assert sorted(found.loose) == list(range(MIN_LINES, MIN_LINES + 7))
    assert found.suspects == []


@pytest.mark.parametrize("seed", range(5))
def test_facts_do_not_depend_on_how_lines_were_read(seed: int) -> None:
    lines = lines_of(seed, num_kinds=3)
    together = gather(scan(lines), {}, takes_facts=True, takes_images=True)
    assert scan(lines).alike
    for number, line in enumerate(lines):
        one_by_one = scan([line])
        assert one_by_one.alike == []
        if one_by_one.suspects:
            continue  # text that looks like a key: the rules look at such a line
        alone = gather(one_by_one, {}, takes_facts=True, takes_images=True)
        (row,) = np.flatnonzero(together.lines == number).tolist()
        assert alone.ids.tolist() == [together.ids[row]]
        assert alone.contents.tolist() == [together.contents[row]]
        assert alone.labels is not None
        assert together.labels is not None
        assert alone.labels.keys() <= together.labels.keys()
        assert alone.images.keys() <= together.images.keys()
        assert alone.groups.keys() <= together.groups.keys()
        assert (number in together.image_lines) == bool(len(alone.image_lines))
    assert list(together.images.values()) == sorted(together.images.values())
    assert together.labels is not None
    assert sum(count for count, _ in together.labels.values()) == len(together.lines)
    for label, (_, first) in together.labels.items():
        assert json.loads(lines[first])["conversations"][0]["assistant"] == label
