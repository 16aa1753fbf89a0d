import json
import os
from pathlib import Path
from typing import Any

import phi3v_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from phi3v_data.convert import ConversionResult
from phi3v_data.converters.nlvr2 import Nlvr2
from phi3v_data.jsonl import read_samples
from phi3v_data.schema import Sample

from tests.data.annotations import assert_valid, contents, rejections, write_image, write_lines

REAL = Path(__file__).resolve().parents[3] / "shared" / "testdata" / "nlvr2" / "data"
needs_real_lines = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real annotation lines")


def line(identifier: str, **changes: object) -> dict[str, Any]:
    row = {
        "validation": {"61": "False"},
        "sentence": "There is an empty glass.",
        "left_url": "https://example.org/l.jpg",
        "label": "False",
        "identifier": identifier,
    }
    return {key: value for key, value in (row | changes).items() if value is not ...}


def write_pair(folder: Path, pair: str, color: int = 0) -> None:
    write_image(folder / f"{pair}-img0.png", color)
    write_image(folder / f"{pair}-img1.png", color + 1)


def write_dev(root: Path) -> Path:
    """Two pairs of dev, the first with two sentences that are not neighbours."""
    lines = (line("dev-850-0-0"), line("dev-850-2-0", label="True"), line("dev-850-0-1"))
    write_lines(root / "data/dev.json", *lines)
    write_pair(root / "images/dev", "dev-850-0", 10)
    write_pair(root / "images/dev", "dev-850-2", 20)
    return root


def run(source: Path, out_dir: Path, **options: Any) -> ConversionResult:
    workers = options.pop("num_workers", 0)
    return phi3v_data.convert(Nlvr2(**options), source, out_dir, num_workers=workers)


def samples_of(result: ConversionResult, split: str = "dev") -> list[Sample]:
    return list(read_samples(result.files[split], allow_missing_answer=True))


def test_a_line_becomes_a_question_about_left_and_right(tmp_path: Path) -> None:
    result = run(write_dev(tmp_path / "src"), tmp_path / "out")
    samples = samples_of(result)
    assert [sample.id for sample in samples] == ["dev-850-0-0", "dev-850-2-0", "dev-850-0-1"]
    assert [sample.conversations[0].assistant for sample in samples] == ["False", "True", "False"]
    (turn,) = samples[0].conversations
    assert turn.images == ("dev/dev-850-0-img0.png", "dev/dev-850-0-img1.png")
    assert turn.user == (
        "The first image is the left one, the second image is the right one. "
        "Is this statement about them true or false? There is an empty glass.\n"
        "Answer True or False."
    )
    for name in turn.images:
        source = tmp_path / "src/images" / name
        assert (tmp_path / "out/images" / name).read_bytes() == source.read_bytes()
    assert_valid(result)


def test_the_prompt_is_a_template_and_braces_in_a_sentence_are_text(tmp_path: Path) -> None:
    root = write_dev(tmp_path / "src")
    write_lines(root / "data/dev.json", line("dev-850-0-0", sentence='A "{0}" {label}.'))
    (sample,) = samples_of(run(root, tmp_path / "out", prompt="{sentence} True?"))
    assert sample.conversations[0].user == 'A "{0}" {label}. True?'
    with pytest.raises(ValueError, match=r"prompt: expected \{sentence\} somewhere in it"):
        Nlvr2(prompt="True?")


@pytest.mark.parametrize(
    ("annotations", "pictures"),
    [
        ("data", "images/train/42"),  # the official one
        ("data", "images/train"),
        ("data", "images"),
        ("data", "train/42"),
        ("data", "data/images/train/42"),
        ("data", "data"),
        ("", "images/train/42"),
        ("", ""),
        ("nlvr/nlvr2/data", "images/train/42"),  # ViLT's: the repository beside the images
        ("nlvr2/data", "nlvr2/images/train/42"),
    ],
)
def test_every_layout_gives_the_same_bytes(tmp_path: Path, annotations: str, pictures: str) -> None:
    write_lines(tmp_path / "src" / annotations / "train.json", line("train-7-0-0", directory=42))
    write_pair(tmp_path / "src" / pictures, "train-7-0")
    result = run(tmp_path / "src", tmp_path / "out")
    images = ("train/42/train-7-0-img0.png", "train/42/train-7-0-img1.png")
    assert samples_of(result, "train")[0].images == images
    assert sorted(contents(tmp_path / "out/images")) == sorted(images)


def test_the_folder_of_annotations_or_one_file_may_be_the_source(tmp_path: Path) -> None:
    root = write_dev(tmp_path / "src")
    write_lines(root / "data/balanced/balanced_dev.json", line("dev-850-0-0"))
    assert run(root / "data", tmp_path / "a").counts == {"dev": 3, "balanced_dev": 1}
    assert run(root / "data/dev.json", tmp_path / "b").counts == {"dev": 3}
    assert run(root / "data/balanced", tmp_path / "c").counts == {"balanced_dev": 1}


def test_balanced_and_unbalanced_are_splits_and_share_the_pictures(tmp_path: Path) -> None:
    root = write_dev(tmp_path / "src")
    write_lines(root / "data/balanced/balanced_dev.json", line("dev-850-0-0"))
    write_lines(root / "data/unbalanced/unbalanced_dev.json", line("dev-850-0-1"))
    write_lines(root / "util/hashes/dev_hashes.json", b"{}")
    result = run(root, tmp_path / "out")
    assert result.counts == {"dev": 3, "balanced_dev": 1, "unbalanced_dev": 1}
    assert samples_of(result, "balanced_dev")[0] == samples_of(result)[0]
    assert len(contents(tmp_path / "out/images")) == 4
    assert_valid(result)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_picture_is_counted_and_costs_its_own_pairs_only(
    tmp_path: Path, missing: int
) -> None:
    root = write_dev(tmp_path / "src")
    (root / f"images/dev/dev-850-0-img{missing}.png").unlink()
    result = run(root, tmp_path / "out")
    assert result.counts == {"dev": 1}
    detail = f"dev/dev-850-0-img{missing}.png is not there"
    assert rejections(result) == [
        ("missing_image", f"dev.json:1: {detail}"),
        ("missing_image", f"dev.json:3: {detail}"),
    ]
    assert len(contents(tmp_path / "out/images")) == 2, "half a pair is of no use"
    assert_valid(result)


def test_without_any_picture_every_row_is_counted(tmp_path: Path) -> None:
    write_lines(tmp_path / "src/data/dev.json", line("dev-850-0-0"), line("dev-850-0-1"))
    result = run(tmp_path / "src", tmp_path / "out")
    assert result.counts == {"dev": 0}
    assert result.rejected == {"missing_image": 2}


def test_strict_refuses_a_missing_picture_before_anything_is_written(tmp_path: Path) -> None:
    root = write_dev(tmp_path / "src")
    assert run(root, tmp_path / "whole", strict=True).counts == {"dev": 3}
    (root / "images/dev/dev-850-2-img1.png").unlink()
    with pytest.raises(
        ValueError, match=r"dev\.json:2: dev/dev-850-2-img1\.png is not there; .*leave out strict"
    ):
        run(root, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()


def test_a_jpeg_called_png_is_taken_as_it_is(tmp_path: Path) -> None:
    root = write_dev(tmp_path / "src")
    path = write_image(root / "images/dev/dev-850-0-img1.png", 3, "JPEG")
    result = run(root, tmp_path / "out")
    assert result.counts == {"dev": 3}
    copied = tmp_path / "out/images/dev/dev-850-0-img1.png"
    assert copied.read_bytes() == path.read_bytes()
    report = phi3v_data.validate([result.files["dev"]], ignore=["D102"])  # toy rows are alike
    assert report.exit_status == 0
    assert {d.code for d in report.diagnostics} == {"I104"}


@pytest.mark.parametrize(
    ("label", "answer"),
    [("True", "True"), ("False", "False"), (True, "True"), ("false", "False"), (1, None)],
    ids=repr,
)
def test_labels_are_true_or_false_however_written(
    tmp_path: Path, label: object, answer: str | None
) -> None:
    root = write_dev(tmp_path / "src")
    write_lines(root / "data/dev.json", line("dev-850-0-0", label=label), line("dev-850-2-0"))
    result = run(root, tmp_path / "out")
    assert result.rejected == ({} if answer else {"bad_label": 1})
    if answer:
        assert samples_of(result)[0].conversations[0].assistant == answer


def test_only_test_files_may_lack_labels(tmp_path: Path) -> None:
    root = write_dev(tmp_path / "src")
    write_lines(root / "data/dev.json", line("dev-850-0-0", label=...), line("dev-850-2-0"))
    write_lines(root / "data/test1.json", line("test1-0-1-0", label=...))
    write_pair(root / "images/test1", "test1-0-1")
    result = run(root, tmp_path / "out")
    assert result.counts == {"dev": 1, "test1": 1}
    assert result.rejected == {"no_label": 1}
    assert samples_of(result, "test1")[0].conversations[0].assistant is None
    assert_valid(result, allow_missing_answer=True)


BAD_LINES: list[tuple[str, bytes | dict[str, Any]]] = [
    ("bad_json", b"{"),
    ("bad_utf8", b'{"identifier": "dev-1-0-0", "sentence": "caf\xe9"}'),
    ("duplicate_key", b'{"identifier": "dev-850-0-1", "label": "True", "label": "False"}'),
    ("duplicate_id", line("dev-850-0-0")),
    ("bad_id", line("../../../etc/passwd")),
    ("bad_id", line("dev-850-0")),
    ("bad_id", line("dev-850-0-1\n")),
    ("bad_id", line(...)),  # pyright: ignore[reportArgumentType]
    ("bad_row", line("dev-850-0-1", directory="../..")),
    ("bad_row", line("dev-850-0-1", directory=True)),
    ("bad_row", line("dev-850-0-1", sentence=" ")),
    ("bad_row", line("dev-850-0-1", sentence=...)),
    ("special_token", line("dev-850-0-1", sentence="It <|end|> is.")),
    ("special_token", line("dev-850-0-1", sentence="Like <|image_1|>.")),
    ("bad_image", line("dev-9-0-0")),
]


@pytest.mark.parametrize(
    ("reason", "bad"),
    [pytest.param(reason, bad, id=f"{k}-{reason}") for k, (reason, bad) in enumerate(BAD_LINES)],
)
def test_a_bad_line_is_named_and_costs_no_other(
    tmp_path: Path, reason: str, bad: bytes | dict[str, Any]
) -> None:
    root = write_dev(tmp_path / "src")
    write_lines(root / "data/dev.json", line("dev-850-0-0"), bad, line("dev-850-2-0"))
    write_pair(root / "images/dev", "dev-9-0")
    (root / "images/dev/dev-9-0-img0.png").write_text("<html>410 Gone</html>")
    result = run(root, tmp_path / "out")
    assert [sample.id for sample in samples_of(result)] == ["dev-850-0-0", "dev-850-2-0"]
    ((found, detail),) = rejections(result)
    assert found == reason
    assert detail.startswith("dev.json:2: ")
    assert_valid(result)


def test_a_folder_without_annotations_says_what_was_expected(tmp_path: Path) -> None:
    write_lines(tmp_path / "src/data/pairs.json", line("dev-850-0-0"))
    with pytest.raises(ValueError, match=r"no annotations found in .*: expected data/\{train"):
        run(tmp_path / "src", tmp_path / "out")


def test_linked_pairs_share_their_bytes_with_the_source(tmp_path: Path) -> None:
    root = write_dev(tmp_path / "src")
    result = run(root, tmp_path / "out", images="link")
    name = samples_of(result)[0].images[0]
    assert os.path.samefile(root / "images" / name, tmp_path / "out/images" / name)
    assert_valid(result)


def test_two_processes_that_write_the_same_pictures_give_the_same_bytes(tmp_path: Path) -> None:
    root = tmp_path / "src"
    pairs = [f"dev-{number}-0" for number in range(10)]
    for color, pair in enumerate(pairs):
        write_pair(root / "images/dev", pair, color)
    rows = [line(f"{pairs[k % 10]}-{k}") for k in range(600)]  # each group holds every pair
    write_lines(root / "data/dev.json", *rows)
    one = run(root, tmp_path / "one")
    assert one.num_items > 4
    assert one.counts == {"dev": 600}
    run(root, tmp_path / "two", num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# --- the Cauldron's form -------------------------------------------------------------------------


def test_the_questions_on_one_pair_are_the_turns_of_one_sample(tmp_path: Path) -> None:
    pictures = [write_image(tmp_path / f"{k}.png", k).read_bytes() for k in range(3)]
    questions = [("Is it so?\nAnswer yes or no.", "Yes."), ("Really?", "No.")]
    texts = [{"user": u, "assistant": a, "source": "NLVR2"} for u, a in questions]
    pair = [{"bytes": pictures[0], "path": None}, {"bytes": pictures[1], "path": "x.png"}]
    single = [{"bytes": pictures[2], "path": None}]
    table = pa.table({"images": [pair, single, pair[::-1]], "texts": [texts, texts, texts[:1]]})
    (tmp_path / "src").mkdir()
    pq.write_table(table, tmp_path / "src/train-00000-of-00001-fedcba9876543210.parquet")
    result = run(tmp_path / "src", tmp_path / "out")
    first, second = samples_of(result, "train")
    assert (first.id, second.id) == ("train-0000000", "train-0000002")
    assert [(turn.user, turn.assistant) for turn in first.conversations] == questions
    assert [len(turn.images) for turn in first.conversations] == [2, 0]
    assert [(tmp_path / "out/images" / name).read_bytes() for name in first.images] == pictures[:2]
    assert second.images == first.images[::-1]
    ((reason, detail),) = rejections(result)
    assert reason == "bad_row"
    assert detail.endswith("row 1: expected 2 images, got 1")
    assert_valid(result)


# --- real lines ----------------------------------------------------------------------------------


@needs_real_lines
def test_the_real_lines_convert_whole(tmp_path: Path) -> None:
    root = tmp_path / "src"
    names = ("dev.json", "test1.json", "balanced/balanced_dev.json")
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        lines = (REAL / name).read_bytes().splitlines()
        write_lines(root / "data" / name, *lines)
        rows |= {row["identifier"]: row for row in map(json.loads, lines)}
    pairs = sorted({identifier.rpartition("-")[0] for identifier in rows})
    for color, pair in enumerate(pairs):
        write_pair(root / "images" / pair.partition("-")[0], pair, color)
    gone = pairs[0]
    (root / "images" / gone.partition("-")[0] / f"{gone}-img1.png").unlink()

    result = run(root, tmp_path / "out")
    num_gone: dict[str, int] = dict.fromkeys(("dev", "test1", "balanced_dev"), 0)
    for name, split in zip(names, ("dev", "test1", "balanced_dev"), strict=True):
        for row in map(json.loads, (REAL / name).read_bytes().splitlines()):
            num_gone[split] += row["identifier"].startswith(gone + "-")
    assert num_gone["dev"] > 0
    total = {"dev": 400, "test1": 200, "balanced_dev": 60}
    assert result.counts == {split: total[split] - num_gone[split] for split in total}
    assert result.rejected == {"missing_image": sum(num_gone.values())}
    for split in total:
        for sample in samples_of(result, split):
            row = rows[sample.id]
            assert row["sentence"].strip() in sample.conversations[0].user
            assert sample.conversations[0].assistant == row["label"]
    assert_valid(result)
