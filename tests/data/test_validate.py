import json
import threading
from pathlib import Path
from typing import Any

import pytest
from phi3v_data import Sample, Turn, decode_image, image_check, write_samples
from phi3v_data.checked_lines import MAX_PER_RULE, check
from phi3v_data.diagnostics import Diagnostic
from phi3v_data.validate import validate
from PIL import Image


def sample(id: str, *images: str, answer: str = "a") -> Sample:
    turns = (Turn(images=images, user="u", assistant=answer),)
    return Sample(id=id, source="toy", conversations=turns)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (10, 10)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def test_a_clean_file_has_no_findings(root: Path):
    write_samples(root / "x.jsonl", [sample(str(i), f"{i}.png") for i in range(3)])
    report = validate([root / "x.jsonl"])

    assert (report.num_lines, report.num_valid, report.num_images) == (3, 3, 3)
    assert (report.counts, report.diagnostics, report.exit_status) == ({}, (), 0)
    assert "I101" in report.rules


def test_findings_are_data_in_order_of_file_and_line(root: Path):
    write_samples(root / "a.jsonl", [sample("1"), sample("2", answer=" ")])
    write_samples(root / "b.jsonl", [sample("1", answer="<|end|>")])
    report = validate([root / "b.jsonl", root / "a.jsonl"])

    assert [(Path(d.file).name, d.line, d.code) for d in report.diagnostics] == [
        ("b.jsonl", 1, "T102"),
        ("a.jsonl", 2, "T101"),
    ]
    assert isinstance(report.diagnostics[0], Diagnostic)
    assert report.diagnostics[0].sample_id == "1"
    assert (report.num_errors, report.num_warnings, report.exit_status) == (2, 0, 1)
    assert report.num_valid == 1


def test_warnings_leave_a_sample_valid_and_the_exit_status_zero(root: Path):
    Image.new("RGB", (9, 9)).save(root / "images" / "x.jpg", "PNG")
    write_samples(root / "x.jsonl", [sample("1", "x.jpg")])
    report = validate([root / "x.jsonl"])

    assert (report.num_valid, report.num_warnings, report.exit_status) == (1, 1, 0)


def test_splits_may_share_ids(root: Path):
    for name in ("train", "val"):
        write_samples(root / f"{name}.jsonl", [sample("1")])

    assert validate([root / "train.jsonl", root / "val.jsonl"]).exit_status == 0


def test_each_distinct_image_is_decoded_once(root: Path, monkeypatch: pytest.MonkeyPatch):
    decoded: list[int] = []
    lock = threading.Lock()
    decode = decode_image

    def counted(data: bytes) -> Image.Image:
        with lock:
            decoded.append(len(data))
        return decode(data)

    monkeypatch.setattr(image_check, "decode_image", counted)
    write_samples(root / "x.jsonl", [sample(str(i), "0.png", "1.png") for i in range(700)])
    report = validate([root / "x.jsonl"], level="full")

    assert (len(decoded), report.num_images, report.num_valid) == (2, 2, 700)


def test_a_missing_image_root_is_one_finding(root: Path):
    write_samples(root / "x.jsonl", [sample(str(i), f"{i}.png") for i in range(50)])
    report = validate([root / "x.jsonl"], images=root / "nowhere")
    (finding,) = report.diagnostics

    assert report.counts == {"I101": 1}
    assert "nowhere" in finding.message
    assert "is not a folder" in finding.message
    assert "--images" in finding.help
    assert finding.line is None
    assert (report.num_valid, report.exit_status) == (0, 1)


def test_a_wrong_image_root_is_one_finding(root: Path):
    (root / "other").mkdir()
    write_samples(root / "x.jsonl", [sample(str(i), f"{i}.png") for i in range(300)])
    report = validate([root / "x.jsonl"], images=root / "other")
    (finding,) = report.diagnostics

    assert report.counts == {"I101": 1}
    assert "none of its 300 images is under" in finding.message
    assert "the first: image '0.png' does not exist" in finding.message
    assert (finding.num_findings, report.num_valid) == (300, 0)
    assert finding.help.endswith("--images DIR")


def test_one_missing_image_among_found_ones_is_named_by_itself(root: Path):
    write_samples(root / "x.jsonl", [sample(str(i), f"{i}.png") for i in range(5)])
    report = validate([root / "x.jsonl"])

    assert [(d.code, d.line) for d in report.diagnostics] == [("I101", 4), ("I101", 5)]


def test_images_may_lie_beside_the_file_when_there_is_no_images_folder(tmp_path: Path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    write_samples(tmp_path / "x.jsonl", [sample("1", "a.png")])

    assert validate([tmp_path / "x.jsonl"]).exit_status == 0


def test_many_findings_are_counted_and_a_bounded_part_is_kept(root: Path):
    write_samples(root / "x.jsonl", [sample(str(i), answer=" ") for i in range(3 * MAX_PER_RULE)])
    report = validate([root / "x.jsonl"], select=["T"])

    assert report.counts == {"T101": 3 * MAX_PER_RULE}
    assert len(report.diagnostics) == MAX_PER_RULE


def test_select_and_ignore_decide_which_rules_run(root: Path):
    write_samples(root / "x.jsonl", [sample("1", "no.png", answer=" "), sample("1", "0.png")])

    def codes(**options: Any) -> list[str]:
        return sorted(validate([root / "x.jsonl"], **options).counts)

    assert codes() == ["D101", "I101", "T101"]
    assert codes(select=["I", "T"]) == ["I101", "T101"]
    assert codes(ignore=["I101", "D"]) == ["T101"]
    assert validate([root / "x.jsonl"], ignore=["I"]).num_images == 0


def test_crlf_and_blank_lines_are_fine_and_lines_keep_their_numbers(root: Path):
    lines = [sample("1").to_json(), "", "  ", sample("2", answer=" ").to_json()]
    (root / "x.jsonl").write_bytes("\r\n".join(lines).encode())
    report = validate([root / "x.jsonl"])

    assert report.num_lines == 2
    assert [(d.code, d.line) for d in report.diagnostics] == [
        ("P107", 2), ("P107", 3), ("T101", 4),
    ]  # fmt: skip


def test_progress_ends_at_the_size_of_the_files(root: Path):
    write_samples(root / "x.jsonl", [sample(str(i)) for i in range(20)])
    seen: list[tuple[int, int]] = []
    validate([root / "x.jsonl"], progress=lambda done, total: seen.append((done, total)))
    size = (root / "x.jsonl").stat().st_size

    assert seen[-1] == (size, size)
    assert seen == sorted(seen)
    assert len(seen) >= 2


def test_the_samples_that_pass_come_with_their_images(root: Path):
    write_samples(root / "x.jsonl", [sample("1", "0.png", "1.png", "0.png"), sample("1")])
    first, second = check([root / "x.jsonl"])

    assert first.sample == sample("1", "0.png", "1.png", "0.png")
    assert [image.info.width for image in first.images if image.info] == [10, 10, 10]
    assert second.sample is None
    assert second.diagnostics[0].code == "D101"


def test_stopping_half_way_leaves_no_threads(root: Path):
    write_samples(root / "x.jsonl", [sample(str(i), "0.png") for i in range(2000)])
    checked = check([root / "x.jsonl"], num_workers=2)
    next(checked)
    checked.close()  # type: ignore[attr-defined]

    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        ([], {}, "no files to check"),
        (["nope.jsonl"], {}, "nope.jsonl: no such file"),
        (["x.jsonl"], {"num_crops": 0}, "num_crops: expected 1 or more, got 0"),
        (["x.jsonl"], {"select": ["Q"]}, "no rule's code starts with 'Q'"),
    ],
)
def test_wrong_arguments_are_value_errors(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    paths: list[str],
    options: dict[str, Any],
    message: str,
):
    write_samples(root / "x.jsonl", [sample("1")])
    monkeypatch.chdir(root)
    with pytest.raises(ValueError, match=message):
        validate(paths, **options)


SHARED = Path(__file__).resolve().parents[3] / "shared" / "testdata"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared test data is not here")
def test_real_document_pages_are_valid(tmp_path: Path):
    rows = json.loads((SHARED / "docvqa" / "val_v1.0.json").read_text())["data"]
    samples = [
        Sample(
            id=str(row["questionId"]),
            source="docvqa",
            conversations=(
                Turn(
                    images=(row["image"],),
                    user=row["question"],
                    assistant=row["answers"][0],
                    answers=tuple(row["answers"]),
                ),
            ),
        )
        for row in rows
    ]
    write_samples(tmp_path / "val.jsonl", samples)
    report = validate([tmp_path / "val.jsonl"], images=SHARED / "docvqa")

    assert report.counts == {}
    assert report.num_images == 3


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared test data is not here")
def test_no_torture_case_of_a_json_parser_crashes_and_none_is_a_sample(tmp_path: Path):
    paths = sorted((SHARED / "json_parsing").rglob("*.json"))
    assert len(paths) > 100
    for path in paths:
        file = tmp_path / "x.jsonl"
        file.write_bytes(path.read_bytes() + b"\n")
        report = validate([file])
        assert report.num_valid == 0, path
        assert report.num_lines == 0 or report.num_errors > 0, path


def test_P107_reports_blank_lines_before_samples_only(root: Path):
    lines = [sample("1").to_json(), "", " \t", sample("2").to_json(), "", ""]
    (root / "x.jsonl").write_text("\n".join(lines) + "\n")
    report = validate([root / "x.jsonl"], select=["P"])

    assert [(d.code, d.line, d.message) for d in report.diagnostics] == [
        ("P107", 2, "the line is blank"),
        ("P107", 3, "the line is blank"),
    ]
    assert (report.num_lines, report.num_valid) == (2, 2)


def test_P108_reports_a_file_that_seems_cut_off(root: Path):
    whole = sample("2").to_json()
    (root / "x.jsonl").write_text(sample("1").to_json() + "\n" + whole[:-20])
    (found,) = validate([root / "x.jsonl"]).diagnostics

    assert (found.code, found.line) == ("P108", 2)
    assert found.message.endswith("it seems cut off")
    (root / "x.jsonl").write_text(sample("1").to_json() + "\n" + whole)
    assert validate([root / "x.jsonl"], select=["P"]).diagnostics == ()


def test_D101_points_at_the_first_use(root: Path):
    write_samples(root / "x.jsonl", [sample("1"), sample("2"), sample("1", answer="b")])
    (found,) = validate([root / "x.jsonl"], select=["D101"]).diagnostics
    (label,) = found.labels

    assert (found.line, label.message, label.line) == (3, "first used here", 1)
