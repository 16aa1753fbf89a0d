"""Damaged lines by the thousand: the validator says what is wrong, and nothing else happens."""

import gc
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from phi3v_data import Sample
from phi3v_data.checked_lines import Checked, check
from phi3v_data.fix_files import fix_files
from phi3v_data.rules import select_rules
from phi3v_data.validate import validate
from PIL import Image
from pydantic import ValidationError

from .line_mutator import SEEDS, LineMutator
from .peak_memory import run_measured

MOST_SECONDS = 1.0
"""For one line, whatever it holds."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data" / "images" / "val").mkdir(parents=True)
    for name in ("a.png", "val/b.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / "data" / "images" / name)
    Image.new("RGB", (9, 9)).save(tmp_path / "data" / "secret.png")
    (tmp_path / "data" / "images" / "link").symlink_to(tmp_path / "data")
    return tmp_path / "data"


def say_all(root: Path, lines: Sequence[bytes]) -> list[Checked]:
    (root / "x.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return list(check([root / "x.jsonl"], rules=select_rules(ignore=("D",))))


def slow_line(lines: Sequence[bytes], run: Callable[[Sequence[bytes]], Any]) -> bytes | None:
    """A line that takes `run` more than `MOST_SECONDS` by itself, found by halving."""
    started = time.perf_counter()
    run(lines)
    if time.perf_counter() - started < MOST_SECONDS:
        return None
    if len(lines) == 1:
        return lines[0]
    middle = len(lines) // 2
    return slow_line(lines[:middle], run) or slow_line(lines[middle:], run)


def assert_verdict_is_that_of_other_readers(checked: Checked) -> None:
    """Python's json and pydantic read what is valid, and the same; what they refuse is not."""
    codes = {diagnostic.code for diagnostic in checked.diagnostics}
    try:
        sample = Sample.from_json(checked.content)
    except ValidationError:
        sample = None
    if checked.sample is None:
        assert any(diagnostic.severity == "error" for diagnostic in checked.diagnostics)
        assert sample is not None or any(code[0] in "PS" for code in codes), checked
        assert sample is None or codes - {"S101"}, checked
        return
    assert sample is not None, checked
    assert checked.sample == sample, checked
    record = json.loads(checked.content.decode(), object_pairs_hook=strict_object)
    turns = record["conversations"]
    assert [turn.get("user") for turn in turns] == [turn.user for turn in sample.conversations]
    assert [path for turn in turns for path in turn.get("images", ())] == list(sample.images)
    assert not any(".." in path.split("/") or "\\" in path for path in sample.images), checked
    assert Sample.from_json(sample.to_json()).conversations == sample.conversations


def strict_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs), pairs
    return dict(pairs)


def fuzz(root: Path, num_lines: int, seed: int, *, batch_lines: int, compare_every: int) -> int:
    """Validate mutated lines in batches; every so manieth is compared with other readers, too.

    Returns:
        How many lines were valid.
    """
    mutator = LineMutator(seed)
    num_valid, fastest = 0, math.inf
    for batch in range(num_lines // batch_lines):
        lines = [mutator.line() for _ in range(batch_lines)]
        (root / "x.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        is_compared = batch % compare_every == 0
        # Mutations of one seed share its id, which would leave no line valid.
        # Line by line, blank lines (P107) are skipped.
        ignore = ["D", "P107"] if is_compared else []
        started = time.perf_counter()
        report = validate([root / "x.jsonl"], ignore=ignore, num_workers=1)
        seconds = time.perf_counter() - started
        fastest = min(fastest, seconds)
        if seconds > 2 * fastest + MOST_SECONDS:  # a busy machine, or one slow line?
            assert slow_line(lines, lambda some: say_all(root, some)) is None
        num_valid += report.num_valid
        if is_compared:
            all_checked = say_all(root, lines)
            for checked in all_checked:
                assert_verdict_is_that_of_other_readers(checked)
            assert report.num_lines == len(all_checked)
            assert report.num_valid == sum(checked.sample is not None for checked in all_checked)
            assert report.counts == Counter(d.code for c in all_checked for d in c.diagnostics)
    return num_valid


def test_damaged_lines_get_the_verdict_of_other_readers(root: Path):
    num_valid = fuzz(root, 5000, 1, batch_lines=500, compare_every=2)

    assert 100 < num_valid < 2500  # neither all broken nor all harmless: there was a choice


def test_no_damaged_line_takes_longer_than_a_second(root: Path):
    mutator = LineMutator(seed=2)

    assert slow_line([mutator.line() for _ in range(2000)], lambda x: say_all(root, x)) is None


def test_the_same_seed_gives_the_same_lines():
    one, same, other = (LineMutator(seed) for seed in (1, 1, 2))
    lines = [one.line() for _ in range(100)]

    assert lines == [same.line() for _ in range(100)]
    assert lines != [other.line() for _ in range(100)]
    assert not any(b"\n" in line for line in lines)


def test_damaged_lines_are_fixed_or_dropped_and_nothing_is_left(root: Path):
    mutator = LineMutator(seed=3)
    lines = [SEEDS[1].replace(b'"a"', b'"first"', 1), *(mutator.line() for _ in range(2000))]
    (root / "x.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (fixed,) = fix_files([root / "x.jsonl"], unsafe=True).files
    (again,) = fix_files([root / "x.fixed.jsonl"], unsafe=True).files

    assert fixed.num_repaired > 100
    assert fixed.errors_left == {}
    assert not again.is_changed
    assert validate([root / "x.fixed.jsonl"]).num_errors == 0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", [4, 5])
def test_half_a_million_damaged_lines(root: Path, seed: int):
    """In a process of its own, which opens nothing outside the image root and stays small."""
    script = """
        import os, sys, time
        from pathlib import Path
        folder, num_lines, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
        sys.path.insert(0, sys.argv[4])
        from data.test_fuzz_lines import fuzz

        opened_outside = []

        def watch(event, arguments):
            if event == "open" and isinstance(arguments[0], (str, bytes)):
                path = os.path.realpath(os.fsdecode(arguments[0]))
                is_inside = path.startswith(os.path.realpath(folder / "images") + os.sep)
                if path.endswith(("secret.png", "hostname")) and not is_inside:
                    opened_outside.append(path)

        sys.addaudithook(watch)
        started = time.perf_counter()
        num_valid = fuzz(folder, num_lines, seed, batch_lines=20_000, compare_every=10)
        seconds = time.perf_counter() - started
        print(num_valid, len(opened_outside), int(peak_mb()), int(seconds))
    """
    tests = Path(__file__).parents[1]
    output = run_measured(script, root, 500_000, seed, tests)
    num_valid, num_opened_outside, peak_mb, _ = map(int, output.split())

    assert num_valid > 2000
    assert num_opened_outside == 0
    assert peak_mb < 400


@pytest.mark.parametrize(
    "user", [f"<|image_{'7' * 5000}|>", "<|image_18446744073709551616|>", "<|image_1|>" * 20_000]
)
def test_image_marks_of_any_number_and_length_are_findings(root: Path, user: str):
    line = json.dumps(
        {"id": "a", "source": "s", "conversations": [{"user": user, "assistant": "a"}]}
    ).encode()
    (checked,) = say_all(root, [line])

    assert "T103" in {diagnostic.code for diagnostic in checked.diagnostics}
    assert len(checked.diagnostics[0].message) < 10_000


def test_a_turn_of_thousands_of_placed_images_takes_no_longer_than_a_second(root: Path):
    many = {
        "images": ["a.png"] * 20_000,
        "user": "".join(f"<|image_{k + 1}|>" for k in range(20_000)),
        "assistant": "a",
    }
    line = json.dumps({"id": "a", "source": "s", "conversations": [many]}).encode()

    assert slow_line([line], lambda lines: say_all(root, lines)) is None


@pytest.mark.parametrize("run", [say_all, lambda root, _: validate([root / "x.jsonl"])])
def test_faulty_lines_leave_nothing_in_memory(
    root: Path, run: Callable[[Path, Sequence[bytes]], object]
):
    """An exception that a validator of the schema raises held its frames, and those the block."""
    line = SEEDS[1].replace(b'["Red"', b'["Blue"')
    (root / "x.jsonl").write_bytes(b"\n".join([line] * 500))
    num_objects: list[int] = []
    for _ in range(3):
        run(root, [line] * 500)
        gc.collect()
        num_objects.append(len(gc.get_objects()))

    assert num_objects[2] - num_objects[1] < 100
