"""Pictures that look the same: the hash, finding near ones fast, the rule about splits (D108)."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
from phi3v_data import validate, write_samples
from phi3v_data.images import ORIENTATION_TAG
from phi3v_data.near_images import find_near, look_of, look_of_picture
from phi3v_data.schema import Sample, Turn
from PIL import Image


def picture(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """Soft coloured shapes: as different from another seed's as two photos."""
    numbers = np.random.default_rng(seed)
    coarse = numbers.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def num_bits(one: int | None, other: int | None) -> int:
    assert one is not None
    assert other is not None
    return (one ^ other).bit_count()


def test_a_copy_looks_the_same_however_it_was_saved(tmp_path: Path):
    original = picture(1)
    original.save(tmp_path / "a.png")
    look = look_of(tmp_path / "a.png")
    copies = {
        "again.jpg": (original, {"quality": 60}),
        "worse.jpg": (original, {"quality": 25}),
        "small.jpg": (original.resize((160, 120)), {"quality": 80}),
        "large.png": (original.resize((800, 600)), {}),
        "grey.png": (original.convert("L"), {}),
        "other.webp": (original, {"quality": 70}),
    }
    for name, (copy, options) in copies.items():
        copy.save(tmp_path / name, **options)
        assert num_bits(look, look_of(tmp_path / name)) <= 4, name


def test_a_copy_that_is_stored_turned_looks_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    picture(1).save(tmp_path / "a.png")
    picture(1).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif)

    assert num_bits(look_of(tmp_path / "a.png"), look_of(tmp_path / "turned.jpg")) <= 4


def test_different_pictures_differ_in_many_bits():
    looks = [look_of_picture(picture(seed)) for seed in range(60)]
    bits = [num_bits(a, b) for i, a in enumerate(looks) for b in looks[:i]]

    assert min(bits) > 8


def test_a_picture_of_one_colour_and_a_file_that_is_none_have_no_look(tmp_path: Path):
    Image.new("RGB", (90, 90), (250, 250, 250)).save(tmp_path / "white.jpg")
    (tmp_path / "text.jpg").write_bytes(b"no picture")
    picture(1).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])

    assert [look_of(tmp_path / name) for name in ("white.jpg", "text.jpg", "cut.png")] == [None] * 3


def near_one_by_one(ones: list[int], others: list[int], most_bits: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for position, other in enumerate(others):
        best = min((((one ^ other).bit_count(), k) for k, one in enumerate(ones)), default=(65, 0))
        if best[0] <= most_bits:
            found.append((best[1], position))
    return found


@pytest.mark.parametrize("most_bits", [0, 1, 4])
def test_all_near_pairs_are_found_and_no_others(most_bits: int):
    numbers = random.Random(7)
    ones = [numbers.getrandbits(64) for _ in range(300)]
    ones += ones[:20]  # the first of equal ones counts
    others = [numbers.getrandbits(64) for _ in range(50)]
    for num_changed in range(8):
        for one in numbers.sample(ones, 40):
            flipped = sum(1 << bit for bit in numbers.sample(range(64), num_changed))
            others.append(one ^ flipped)

    found = find_near(np.array(ones, dtype=np.uint64), np.array(others, dtype=np.uint64), most_bits)
    assert found == near_one_by_one(ones, others, most_bits)


def test_no_pictures_have_no_pairs():
    none, some = np.array([], dtype=np.uint64), np.array([1, 2], dtype=np.uint64)

    assert find_near(none, some) == find_near(some, none) == find_near(none, none) == []


def test_more_bits_than_the_search_can_promise_are_refused():
    with pytest.raises(ValueError, match="most_bits: expected 0 to 4, got 5"):
        find_near(np.array([1], dtype=np.uint64), np.array([1], dtype=np.uint64), 5)


@pytest.mark.parametrize("is_video", [False, True])
def test_a_hundred_thousand_pictures_are_compared_in_seconds(is_video: bool):
    numbers = np.random.default_rng(3)
    looks = numbers.integers(0, 1 << 64, 100_000, dtype=np.uint64)
    if is_video:  # of 1,000 scenes, each with 100 frames that differ in a few bits
        flips = np.uint64(1) << numbers.integers(0, 64, (2, 100_000), dtype=np.uint64)
        looks = np.repeat(looks[:1000], 100) ^ flips[0] ^ flips[1]
    looks[99_999] = looks[7] ^ np.uint64(0b1111 << 30)
    started = time.process_time()
    found = find_near(looks[:50_000], looks[50_000:])
    seconds = time.process_time() - started

    assert (7, 49_999) in found
    assert {other for _, other in found} == {49_999}
    assert seconds < 5


# --- D108 -----------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    picture(1).save("images/a.png")
    picture(2).save("images/b.png")
    picture(1).resize((200, 150)).save("images/a_small.jpg", quality=70)
    picture(3).save("images/c.png")
    picture(2).save("images/same_bytes.png")
    write("train.jsonl", "b.png", "a.png")
    write("val.jsonl", "c.png", "same_bytes.png", "a_small.jpg")
    return tmp_path


def write(name: str, *images: str) -> None:
    write_samples(
        name,
        [
            Sample(
                id=image,
                source="toy",
                conversations=(Turn(images=(image,), user=f"What is {name}?", assistant="It."),),
            )
            for image in images
        ],
    )


def test_D108_reports_pictures_of_two_splits_that_look_the_same(root: Path):
    report = validate(["train.jsonl", "val.jsonl"], select=["D108"], num_workers=1)
    (found,) = report.diagnostics

    assert (found.code, found.severity, found.file, found.line) == (
        "D108",
        "warning",
        "val.jsonl",
        3,
    )
    assert found.message == (
        "1 image looks like one in train.jsonl: the first, 'a_small.jpg', like 'a.png'"
    )
    assert [(label.file, label.line) for label in found.labels] == [("train.jsonl", 2)]
    assert found.num_findings == 1


def test_D108_leaves_the_same_bytes_to_D103(root: Path):
    report = validate(["train.jsonl", "val.jsonl"], select=["D103", "I102", "D108"], num_workers=1)

    assert report.counts == {"D103": 1, "D108": 1}
    write("val.jsonl", "same_bytes.png")
    report = validate(["train.jsonl", "val.jsonl"], select=["D103", "I102", "D108"], num_workers=1)
    assert report.counts == {"D103": 1}


def test_pictures_are_only_compared_where_D108_is_named(root: Path):
    select = ["P", "S", "I", "T", "D"]
    for report in (
        validate(["train.jsonl", "val.jsonl"], num_workers=1),
        validate(["train.jsonl", "val.jsonl"], select=select, num_workers=1),
    ):
        assert "D108" not in report.rules
        assert "D108" not in report.counts
