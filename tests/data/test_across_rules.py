import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from phi3v_data import validate, write_samples
from phi3v_data.checked_lines import LINE_RULES, check
from phi3v_data.diagnostics import Diagnostic, Label
from phi3v_data.rules import select_rules
from phi3v_data.rules.across import group_of
from phi3v_data.schema import Sample, Turn
from PIL import Image

from tests.data.line_report import ReportBuilder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    return tmp_path


def write(
    name: str, *answers: str, images: dict[int, list[str]] | None = None, user: str = "What?"
) -> str:
    """A file of one-turn samples, each with a question of its own."""
    path = Path(f"{name}.jsonl")
    samples = [
        Sample(
            id=f"{name}-{number}",
            source="toy",
            conversations=(
                Turn(
                    images=tuple((images or {}).get(number, ())),
                    user=f"{user} {name} {number}",
                    assistant=answer,
                ),
            ),
        )
        for number, answer in enumerate(answers)
    ]
    write_samples(path, samples)
    return str(path)


def findings(code: str, *files: str, select: tuple[str, ...] = ()) -> list[Diagnostic]:
    report = validate(list(files), select=select or [code])
    assert set(report.counts) <= {code}
    return list(report.diagnostics)


def picture(name: str, color: int = 0) -> str:
    path = Path("images") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (color, 0, 0)).save(path)
    return name


def test_D102_reports_a_sample_that_is_there_twice(root: Path) -> None:
    same = (Turn(user="Q", assistant="A"),)
    write_samples(
        "a.jsonl",
        [Sample(id=str(n), source="s", conversations=same) for n in range(2)],
    )
    write_samples("b.jsonl", [Sample(id="x", source="s", conversations=same)])
    one, two = findings("D102", "a.jsonl", "b.jsonl")
    assert (one.file, one.line) == ("a.jsonl", 2)
    assert one.message == "the same images, questions and answers as in line 1"
    assert one.labels == (Label("first here", "a.jsonl", 1),)
    assert (two.file, two.line) == ("b.jsonl", 1)
    assert two.message == "the same images, questions and answers as in line 1 of a.jsonl"
    assert two.help == "no sample should be in two splits"


def test_D102_finds_the_same_however_it_is_written(root: Path) -> None:
    Path("a.jsonl").write_text(
        '{"id": "1", "source": "s", "conversations": [{"user": "Q", "assistant": "é"}]}\n'
        '{"conversations":[{"assistant":"\\u00e9","user":"Q","images":[]}],"source":"s","id":"2"}\n'
        '{"id": "3", "source": "s", "metadata": {"k": 1}, '
        '"conversations": [{"user": "Q", "assistant": "é"}]}\n'
    )
    assert [d.line for d in findings("D102", "a.jsonl")] == [2, 3]


def test_D102_lets_other_answers_and_other_pictures_be(root: Path) -> None:
    turns = [("Q", "A", ()), ("Q", "B", ()), ("Q", "A", ("x.png",)), ("R", "A", ())]
    samples = [
        Sample(id=str(n), source="s", conversations=(Turn(images=i, user=q, assistant=a),))
        for n, (q, a, i) in enumerate(turns)
    ]
    write_samples("a.jsonl", samples)
    assert findings("D102", "a.jsonl") == []


def test_D103_reports_pictures_that_two_splits_share_by_content(root: Path) -> None:
    names = [picture("train/a.png", 1), picture("train/b.png", 2), picture("val/c.png", 2)]
    train = write("train", "x", "y", images={0: names[:1], 1: names[1:2]})
    val = write("val", "z", "z", "w", images={1: [names[2]], 2: [names[0]]})
    (found,) = findings("D103", train, val, select=("D103", "I"))
    assert found.message == "2 images are in train.jsonl too"
    assert (found.file, found.line, found.num_findings) == ("val.jsonl", 2, 2)
    assert found.labels == (Label("first here", "train.jsonl", 2),)
    (by_path,) = findings("D103", train, val, select=("D103",))  # no picture is read
    assert (by_path.message, by_path.line) == ("1 image is in train.jsonl too", 3)


def test_D104_reports_groups_of_clips_that_two_splits_share(root: Path) -> None:
    train = write("train", "x", images={0: ["train/A/v_A_g05_c01.0.jpg"]})
    val = write("val", "x", "y", images={0: ["val/A/v_A_g06_c01.0.jpg"], 1: ["v_A_g05_c02.0.jpg"]})
    (found,) = findings("D104", train, val)
    assert found.message == "1 group of clips is in train.jsonl too (v_A_g05)"
    assert (found.file, found.line) == ("val.jsonl", 2)


def test_the_group_is_in_the_name_of_a_clip() -> None:
    assert group_of("train/Archery/v_Archery_g05_c02.3.jpg") == "v_Archery_g05"
    assert group_of("documents/ffbg0227_2.png") is None


def test_D105_reports_a_class_that_drowns_the_others(root: Path) -> None:
    (found,) = findings("D105", write("a", *["yes"] * 300, *["no"] * 10, *["maybe"] * 10))
    assert found.message == (
        "'yes' is 94% of the answers; half of the 3 classes have 10 samples or fewer"
    )
    assert findings("D105", write("b", *["yes"] * 60, *["no"] * 40)) == []


def test_D106_reports_labels_that_are_nearly_the_same(root: Path) -> None:
    answers = ["BabyCrawling"] * 60 + ["Babycrawling"] * 2 + ["Archery"] * 40 + ["Archary"]
    found = findings("D106", write("a", *answers))
    assert [(d.line, d.message) for d in found] == [
        (61, "the answer 'Babycrawling' (2 times) is nearly 'BabyCrawling' (60 times)"),
        (103, "the answer 'Archary' (once) is nearly 'Archery' (40 times)"),
    ]
    assert found[0].help == "if it is the same class, write 'BabyCrawling'"


def test_D106_lets_numbers_and_frequent_neighbours_be(root: Path) -> None:
    answers = [f"class {n}" for n in range(1, 10) for _ in range(30)]
    assert findings("D106", write("a", *answers, *["boats"] * 30, *["coats"] * 30)) == []


def test_D107_reports_labels_that_training_lacks(root: Path) -> None:
    train = write("train", *["Archery"] * 5, *["Biking"] * 5)
    val = write("val", *["Archery"] * 5, *["Diving"] * 5)
    (found,) = findings("D107", train, val)
    assert found.message == "1 label that train.jsonl lacks: 'Diving'"
    assert (found.file, found.line) == ("val.jsonl", 6)
    assert findings("D107", val, train)[0].message == "1 label that val.jsonl lacks: 'Biking'"


def test_free_answers_are_no_classes(root: Path) -> None:
    train = write("train", *(f"answer {n}" for n in range(50)))
    val = write("val", *(f"another {n}" for n in range(50)))
    for code in ("D105", "D106", "D107"):
        assert findings(code, train, val) == []


# --- the two ways through a file give the same verdict


def messy(number: int, rng: random.Random) -> bytes:
    """A line that is right, or wrong in one of many ways."""
    turn = Turn(images=(rng.choice(["a.png", "b.png"]),), user="Q", assistant=str(number))
    line = Sample(id=str(number), source="s", conversations=(turn,)).to_json().encode()
    faults = (
        (b'"source":"s"', b'"sauce":"s"'), (b'"Q"', b'"<|end|>"'), (b'"Q"', b'"\\u0007"'),
        (b"a.png", b"gone.png"), (b"b.png", b"../b.png"), (b"}", b""), (b'"Q"', b'"\xff"'),
        (str(number).encode(), b""), (b'"id":"%d"' % number, b'"id":"7"'), (line, b""),
        (b'"s",', b'"s","source":"t",'),
    )  # fmt: skip
    return line.replace(*rng.choice(faults), 1) if rng.random() < 0.2 else line


def test_blocks_and_lines_give_the_same_findings(root: Path) -> None:
    picture("a.png")
    picture("b.png")
    rng = random.Random(1)
    lines = [messy(number, rng) for number in range(3000)]
    Path("x.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    builder = ReportBuilder(LINE_RULES)
    for checked in check(["x.jsonl"]):
        builder.add(checked)
    slow = builder.report(["x.jsonl"])
    fast = validate(["x.jsonl"], ignore=["D102", "P107"])  # lines do not know of blank ones
    assert (fast.num_lines, fast.num_valid, fast.num_images) == (
        slow.num_lines, slow.num_valid, slow.num_images,
    )  # fmt: skip
    assert fast.counts == slow.counts
    assert len(fast.counts) > 6

    def key(found: Diagnostic) -> tuple[Any, ...]:
        return (found.line or 0, found.code, found.pointer, found.message)

    assert sorted(fast.diagnostics, key=key) == sorted(slow.diagnostics, key=key)


def test_many_blocks_in_many_processes_give_what_one_gives(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["phi3v_data.validate"]
    picture("a.png")
    picture("b.png")
    rng = random.Random(2)
    Path("x.jsonl").write_bytes(b"\n".join(messy(number, rng) for number in range(4000)))
    one = validate(["x.jsonl"], num_workers=1)
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    monkeypatch.setattr(module, "BLOCK_BYTES", 10_000)
    many = validate(["x.jsonl"], num_workers=2)
    assert many == one


def test_it_stops_at_so_many_errors(root: Path) -> None:
    write("x", *[" "] * 50)
    report = validate(["x.jsonl"], max_errors=10, select=["T101"])
    assert not report.is_complete
    assert report.num_errors >= 10
    assert validate(["x.jsonl"], max_errors=51, select=["T101"]).is_complete


def test_rules_may_differ_from_file_to_file(root: Path) -> None:
    train, test = write("train", " "), write("test", " ")
    report = validate(
        [train, test],
        rules_for=lambda file: select_rules(("T101",) if file == train else ("D101",)),
    )
    assert Counter(d.file for d in report.diagnostics) == {train: 1}
