import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import phi3v_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from phi3v_data.converters.docvqa import DocVqa
from phi3v_data.jsonl import read_samples
from phi3v_data.schema import Sample
from PIL import Image

from tests.data.annotations import contents, rejections
from tests.data.peak_memory import run_measured

PAGES = Path(__file__).resolve().parents[3] / "shared" / "testdata" / "docvqa"

needs_pages = pytest.mark.skipif(
    not PAGES.is_dir(), reason="the real pages are not beside this checkout"
)


def png(shade: int = 255) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (40, 60), shade).save(buffer, "PNG")
    return buffer.getvalue()


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A row of the annotations; a change to None removes the key."""
    found = {
        "questionId": number,
        "question": f"What is number {number}?",
        "image": "documents/a_1.png",
        "docId": 7,
        "ucsf_document_id": "a",
        "ucsf_document_page_no": "1",
        "answers": [f"{number}.0", f"{number}"],
        "data_split": "train",
        **changes,
    }
    return {key: value for key, value in found.items() if value is not None}


def write_json(path: Path, rows: Iterable[Any], **header: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"dataset_name": "docvqa", **header, "data": list(rows)}))
    return path


def write_pages(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names or ("a_1.png",)):
        (folder / name).write_bytes(png(k))


def convert(
    source: Path, out: Path, converter: DocVqa | None = None, **options: Any
) -> phi3v_data.ConversionResult:
    options = {"num_workers": 0, **options}
    return phi3v_data.convert(converter or DocVqa(), source, out, **options)


def samples(result: phi3v_data.ConversionResult, split: str) -> list[Sample]:
    return list(read_samples(result.files[split], allow_missing_answer=True))


def assert_valid(result: phi3v_data.ConversionResult) -> None:
    """Only test may lack answers."""
    for split, path in result.files.items():
        options = {"allow_missing_answer": split == "test", "ignore": ["D102"]}  # toys are alike
        report = phi3v_data.validate([path], **options)
        assert report.counts == {}
        assert report.num_valid == report.num_lines == result.counts[split] > 0


# --- the challenge's JSON


def test_a_row_becomes_a_question_about_its_page_with_all_accepted_answers(tmp_path: Path) -> None:
    write_json(tmp_path / "src/train_v1.0_withQT.json", [row(12, question_types=["form", "table"])])
    write_pages(tmp_path / "src/documents")
    result = convert(tmp_path / "src", tmp_path / "out")
    assert_valid(result)
    turn = {
        "images": ["documents/a_1.png"],
        "user": "What is number 12?\nAnswer briefly.",
        "assistant": "12.0",
        "answers": ["12.0", "12"],
    }
    metadata = {
        "docId": 7,
        "ucsf_document_id": "a",
        "ucsf_document_page_no": "1",
        "question_types": "form, table",
    }
    (sample,) = samples(result, "train")
    assert json.loads(sample.to_json()) == {
        "id": "train-12",
        "source": "docvqa",
        "conversations": [turn],
        "metadata": metadata,
    }
    assert (tmp_path / "out/images/documents/a_1.png").read_bytes() == png(0)


@pytest.mark.parametrize(
    ("annotation", "pages", "image"),
    [
        ("train_v1.0.json", "documents", "documents/a_1.png"),
        ("train/train_v1.0.json", "train/documents", "documents/a_1.png"),
        ("train/train_v1.0.json", "documents", "documents/a_1.png"),
        ("spdocvqa_qas/train_v1.0_withQT.json", "spdocvqa_images", "documents/a_1.png"),
        ("spdocvqa_qas/train_v1.0_withQT.json", "spdocvqa_images", "a_1.png"),
        ("DocVQA/qas/train_v1.0.json", "DocVQA/documents", "documents/a_1.png"),
    ],
)
def test_pages_are_found_in_every_released_layout(
    tmp_path: Path, annotation: str, pages: str, image: str
) -> None:
    write_json(tmp_path / "src" / annotation, [row(1, image=image)])
    write_pages(tmp_path / "src" / pages)
    result = convert(tmp_path / "src", tmp_path / "out")
    assert [sample.images for sample in samples(result, "train")] == [("documents/a_1.png",)]
    assert_valid(result)


def test_an_annotation_file_alone_is_a_source(tmp_path: Path) -> None:
    path = write_json(tmp_path / "spdocvqa_qas/mine.json", [row(1)], dataset_split="val")
    write_pages(tmp_path / "spdocvqa_images")
    result = convert(path, tmp_path / "out")
    assert result.counts == {"val": 1}


def test_the_test_split_has_questions_without_answers_and_others_need_them(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        rows = [row(1, answers=None), row(2, answers=[]), row(3)]
        write_json(tmp_path / f"src/{split}_v1.0.json", rows)
    write_pages(tmp_path / "src/documents")
    result = convert(tmp_path / "src", tmp_path / "out")
    assert result.counts == {"train": 1, "val": 1, "test": 3}
    assert result.rejected == {"no_answer": 4}
    turns = [sample.conversations[0] for sample in samples(result, "test")]
    assert [turn.assistant for turn in turns] == [None, None, "3.0"]
    assert all("answers" not in turn.model_dump(exclude_none=True) for turn in turns[:2])
    assert_valid(result)


def test_the_file_with_question_types_stands_for_the_one_without(tmp_path: Path) -> None:
    write_json(tmp_path / "src/train_v1.0.json", [row(1)])
    write_json(tmp_path / "src/train_v1.0_withQT.json", [row(1, question_types=["form"])])
    write_pages(tmp_path / "src/documents")
    (sample,) = samples(convert(tmp_path / "src", tmp_path / "out"), "train")
    assert sample.metadata is not None
    assert sample.metadata["question_types"] == "form"

    write_json(tmp_path / "src/old/train_v1.0.json", [row(1)])
    with pytest.raises(ValueError, match=r"several annotations of train \(train_v1.0.json, .*old/"):
        list(DocVqa().discover(tmp_path / "src"))


def test_the_prompt_is_a_template(tmp_path: Path) -> None:
    write_json(tmp_path / "src/val_v1.0.json", [row(1, question="Is {this} it? ")])
    write_pages(tmp_path / "src/documents")
    converter = DocVqa(prompt="Q: {question} {}")
    (sample,) = samples(convert(tmp_path / "src", tmp_path / "out", converter), "val")
    assert sample.conversations[0].user == "Q: Is {this} it? {}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "Answer!"}, "prompt: expected {question}"),
        ({"prompt": "<|user|>{question}"}, r"prompt: '<\|user\|>' is a token"),
        ({"images": "move"}, "images: expected copy, link or reencode"),
        ({"quality": 0}, "quality: expected 1 to 100"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DocVqa(**options)


def test_a_bad_row_is_named_and_costs_no_other(tmp_path: Path) -> None:
    good = json.dumps(row(1)).encode()
    bad = [
        (b'{"questionId": 3, "question": "\xff", "image": "documents/a_1.png"}', "bad_utf8"),
        (json.dumps(row(1, answers=["another"])).encode(), "duplicate_id"),
        (json.dumps(row(1) | {"questionId": "1"}).encode(), "duplicate_id"),
        (b'{"questionId": 4, "question": "a?", "question": "b?"}', "duplicate_key"),
        (b'{"questionId": 5, "question": "a\tb?"}', "bad_json"),
        (b'{"questionId": 6, "question": "\\ud83d"}', "bad_unicode"),
        (b"[7]", "not_object"),
        (json.dumps(row(8, question=None)).encode(), "bad_row"),
        (json.dumps(row(8, question="  ")).encode(), "bad_row"),
        (json.dumps(row(8, questionId=None)).encode(), "bad_row"),
        (json.dumps(row(8, questionId=[8])).encode(), "bad_row"),
        (json.dumps(row(9, answers="text")).encode(), "bad_row"),
        (json.dumps(row(10, answers=["", " "])).encode(), "no_answer"),
        (json.dumps(row(11, question="<|end|>?")).encode(), "special_token"),
        (json.dumps(row(12, question="<|image_1|>?")).encode(), "special_token"),
        (json.dumps(row(13, image="documents/gone.png")).encode(), "missing_image"),
        (json.dumps(row(14, image="documents/empty.png")).encode(), "bad_image"),
        (json.dumps(row(15, image="documents/half.png")).encode(), "bad_image"),
        (json.dumps(row(16, image="../secret.png")).encode(), "bad_path"),
        (json.dumps(row(17, image=str(tmp_path / "secret.png"))).encode(), "bad_path"),
        (json.dumps(row(18, image="a\nb.png")).encode(), "bad_path"),
        (json.dumps(row(19, image=".")).encode(), "bad_path"),
        (json.dumps(row(20, image=None)).encode(), "bad_row"),
    ]
    last = [json.dumps(row(99, question="é€😀?")).encode(), json.dumps(row(8)).encode()]
    rows = [good, *(line for line, _ in bad), *last]
    (tmp_path / "src").mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    text = b'\xef\xbb\xbf{"data": [' + b",\r\n".join(rows) + b"]}\n"
    (tmp_path / "src/train_v1.0.json").write_bytes(text)
    write_pages(tmp_path / "src/documents", "a_1.png", "empty.png", "half.png")
    (tmp_path / "src/documents/empty.png").write_bytes(b"")
    (tmp_path / "src/documents/half.png").write_bytes(png()[:-30])
    result = convert(tmp_path / "src", tmp_path / "out")
    assert [sample.id for sample in samples(result, "train")] == ["train-1", "train-99", "train-8"]
    assert samples(result, "train")[1].conversations[0].user.startswith("é€😀?")
    found = rejections(result)
    assert [reason for reason, _ in found] == [reason for _, reason in bad]
    wheres = [detail.partition(":")[0].partition(" (")[0] for _, detail in found]
    assert wheres == [f"train_v1.0.json[{k}]" for k in range(1, len(bad) + 1)]
    assert "(questionId 13)" in dict(found)["missing_image"]
    assert_valid(result)
    assert set(contents(tmp_path / "out/images")) == {"documents/a_1.png"}


def test_an_answer_that_is_no_text_is_left_out_and_named(tmp_path: Path) -> None:
    write_json(tmp_path / "src/train_v1.0.json", [row(1, answers=["", "a", None, "<|end|>", "b"])])
    write_pages(tmp_path / "src/documents")
    result = convert(tmp_path / "src", tmp_path / "out")
    (sample,) = samples(result, "train")
    assert sample.conversations[0].answers == ("a", "b")
    assert result.rejected == {"bad_answer": 3}
    assert all(detail.endswith("this answer is left out") for _, detail in rejections(result))
    assert_valid(result)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "train_v1.0.json is no JSON: expected an object or a list, got nothing"),
        (b"questionId,image", "is no JSON: expected an object or a list, got b'q' first"),
        (b'{"data": {"a": 1}}', "expected a list under 'data', got the keys data"),
        (
            b'{"data_split": "train", "rows": [',
            "expected a list under 'data', got the keys data_sp",
        ),
        (b'\xff\xfe{\x00"\x00', "train_v1.0.json is UTF-16; expected UTF-8"),
        (b'{"data": []}', "nothing to convert"),
    ],
)
def test_what_is_no_annotations_at_all_is_refused_before_anything_is_written(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/train_v1.0.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("end", "reasons"),
    [
        ("", {"truncated": 1}),
        ("]", {"truncated": 1}),
        (', {"questionId": 3, "ques', {"bad_json": 1, "truncated": 1}),
        (",", {"bad_json": 1, "truncated": 1}),
        ("]} x", {"bad_json": 1}),
        ('], "data": [{"questionId": 3}]}', {"duplicate_key": 1}),
        ("}]}", {"bad_json": 1}),
        (", " + "[" * 100_000, {"bad_json": 1, "truncated": 1}),
    ],
)
def test_what_is_wrong_with_the_end_of_the_annotations_costs_no_row_before_it(
    tmp_path: Path, end: str, reasons: dict[str, int]
) -> None:
    write_pages(tmp_path / "src/documents")
    rows = ", ".join(json.dumps(row(k)) for k in (1, 2))
    (tmp_path / "src/train_v1.0.json").write_text(f'{{"data": [{rows}{end}')
    result = convert(tmp_path / "src", tmp_path / "out")
    assert [sample.id for sample in samples(result, "train")] == ["train-1", "train-2"]
    assert result.rejected == reasons
    assert_valid(result)


def test_a_folder_without_annotations_says_what_was_expected(tmp_path: Path) -> None:
    write_pages(tmp_path / "documents")
    with pytest.raises(
        ValueError, match=r"no annotations found in .*: expected \{train,val,test\}"
    ):
        list(DocVqa().discover(tmp_path))


def test_the_same_bytes_come_out_for_any_number_of_workers_and_a_page_is_kept_once(
    tmp_path: Path,
) -> None:
    rows = [row(k, image=f"documents/{'ab'[k % 2]}_1.png") for k in range(400)]
    write_json(tmp_path / "src/train_v1.0.json", rows)
    write_pages(tmp_path / "src/documents", "a_1.png", "b_1.png")
    assert len(list(DocVqa().discover(tmp_path / "src"))) > 3  # several items share the pages
    result = convert(tmp_path / "src", tmp_path / "one")
    convert(tmp_path / "src", tmp_path / "two", num_workers=2)
    assert [sample.id for sample in samples(result, "train")] == [f"train-{k}" for k in range(400)]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(contents(tmp_path / "one/images")) == {"documents/a_1.png", "documents/b_1.png"}


def test_ids_repeated_in_another_group_of_rows_are_rejected(tmp_path: Path) -> None:
    rows = [*(row(k) for k in range(300)), row(7), row(300)]
    write_json(tmp_path / "src/train_v1.0.json", rows)
    write_pages(tmp_path / "src/documents")
    result = convert(tmp_path / "src", tmp_path / "out")
    assert (result.counts, result.rejected) == ({"train": 301}, {"duplicate_id": 1})
    assert rejections(result)[0][1].startswith("train_v1.0.json[300] (line 1): an earlier one")


@pytest.mark.parametrize("images", ["link", "reencode"])
def test_pages_are_linked_or_encoded_anew_on_request(tmp_path: Path, images: Any) -> None:
    write_json(tmp_path / "src/train_v1.0.json", [row(1), row(2)])
    write_pages(tmp_path / "src/documents")
    result = convert(tmp_path / "src", tmp_path / "out", DocVqa(images=images))
    assert_valid(result)
    (name,) = {name for sample in samples(result, "train") for name in sample.images}
    if images == "link":
        assert (tmp_path / "out/images" / name).samefile(tmp_path / "src/documents/a_1.png")
    else:
        assert phi3v_data.probe_image(tmp_path / "out/images" / name).format == "JPEG"
        assert name == "documents/a_1.jpg"


MEASURE = """
import sys
from pathlib import Path
from phi3v_data.converters.docvqa import DocVqa
items = list(DocVqa().discover(Path(sys.argv[1])))
rows = sum(1 for item in items[-3:] for _ in DocVqa().convert(item, Path(sys.argv[2])))
print(len(items), rows, int(peak_mb()))
"""


def measure(folder: Path, num_bytes: int) -> tuple[int, int, int]:
    """(items, rows of the last three, peak in MiB) for annotations of about `num_bytes`."""
    line = json.dumps(row(10**8, question="x" * 400, image="documents/gone.png"))
    folder.mkdir()
    with open(folder / "train_v1.0.json", "w") as file:
        file.write('{"data": [')
        for k in range(num_bytes // len(line)):
            file.write("," * (k > 0) + line.replace(str(10**8), str(10**8 + k)))
        file.write("]}")
    output = run_measured(MEASURE, folder, folder / "out")
    num_items, num_rows, peak = map(int, output.split())
    return num_items, num_rows, peak


def test_memory_does_not_grow_with_the_annotations(tmp_path: Path) -> None:
    small, large = measure(tmp_path / "small", 1 << 18), measure(tmp_path / "large", 24 << 20)
    assert large[0] > 1000 > small[0]
    assert large[2] - small[2] < 20


@pytest.mark.slow
def test_annotations_of_a_gigabyte_take_less_than_300_mb(tmp_path: Path) -> None:
    num_items, num_rows, peak = measure(tmp_path / "src", 1 << 30)
    assert num_items > 2000
    assert num_rows > 1000
    assert peak < 300


# --- the hub's Parquet

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(
    path: Path, rows: list[dict[str, Any]], schema: pa.Schema, group: int = 3
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)
    return path


LMMS_LAB = pa.schema(
    [
        ("questionId", pa.string()),
        ("question", pa.string()),
        ("question_types", pa.list_(pa.string())),
        ("image", IMAGE),
        ("docId", pa.int64()),
        ("ucsf_document_id", pa.string()),
        ("ucsf_document_page_no", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("data_split", pa.string()),
    ]
)


def hub_row(number: int, shade: int = 0, **changes: Any) -> dict[str, Any]:
    cell = {"bytes": png(shade), "path": None}
    return row(number, questionId=str(number), question_types=["form"], image=cell) | changes


def test_hub_rows_become_the_samples_of_the_json(tmp_path: Path) -> None:
    root = tmp_path / "src"
    rows = [hub_row(k, shade=k // 3) for k in range(7)]
    tests = [hub_row(k, answers=None) for k in range(2)]
    write_parquet(root / "DocVQA/validation-00000-of-00002.parquet", rows[:4], LMMS_LAB)
    write_parquet(root / "DocVQA/validation-00001-of-00002.parquet", rows[4:], LMMS_LAB)
    write_parquet(root / "DocVQA/test-00000-of-00001.parquet", tests, LMMS_LAB)
    other = pa.schema([("image", IMAGE), ("other", pa.string())])
    write_parquet(root / "InfographicVQA/test-00000-of-00001.parquet", [{}], other)
    result = convert(root, tmp_path / "out", num_workers=2)
    assert result.counts == {"val": 7, "test": 2}
    assert not result.rejected
    assert_valid(result)
    found = samples(result, "val")
    assert [sample.id for sample in found] == [f"val-{k}" for k in range(7)]
    turn = found[4].conversations[0]
    assert (turn.user, turn.answers) == ("What is number 4?\nAnswer briefly.", ("4.0", "4"))
    assert found[4].metadata == {
        "docId": 7,
        "ucsf_document_id": "a",
        "ucsf_document_page_no": "1",
        "question_types": "form",
    }
    assert (tmp_path / "out/images" / turn.images[0]).read_bytes() == png(1)
    # A page is kept once, in whatever row group and file its questions are.
    assert len({name for sample in found for name in sample.images}) == 3
    assert len(contents(tmp_path / "out/images")) == 4
    convert(root, tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_hub_rows_with_queries_in_several_languages_ask_in_english(tmp_path: Path) -> None:
    query = pa.struct([("de", pa.string()), ("en", pa.string())])
    answer = pa.struct([("text", pa.string()), ("start", pa.int64())])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("image", IMAGE),
            ("query", query),
            ("answers", pa.list_(pa.string())),
            ("words", pa.list_(pa.string())),
            ("answer", answer),
        ]
    )
    cell = {"bytes": png(), "path": None}
    texts = {"query": {"de": "Was?", "en": "What?"}, "answers": ["b", "c"], "words": ["w"]}
    rows = [{"id": f"train_{k}", "image": cell, **texts} for k in range(2)]
    write_parquet(tmp_path / "src/data/train-00000-of-00001-0f.parquet", rows, schema)
    result = convert(tmp_path / "src", tmp_path / "out")
    assert_valid(result)
    assert [sample.id for sample in samples(result, "train")] == ["train-train_0", "train-train_1"]
    turn = samples(result, "train")[0].conversations[0]
    assert (turn.user, turn.answers) == ("What?\nAnswer briefly.", ("b", "c"))


def test_a_bad_hub_row_is_named_and_costs_no_other(tmp_path: Path) -> None:
    rows = [
        hub_row(1),
        hub_row(2, image=None),
        hub_row(3, image={"bytes": None, "path": "/home/me/3.png"}),
        hub_row(4, image={"bytes": b"not an image", "path": None}),
        hub_row(5, image={"bytes": png()[:-30], "path": None}),
        hub_row(1),
        hub_row(7, answers=[]),
        hub_row(8, question="@@@@"),
        hub_row(9, questionId=None),
        hub_row(10),
    ]
    path = write_parquet(tmp_path / "src/data/train-00000-of-00001.parquet", rows, LMMS_LAB, 4)
    # Uncompressed text is found and broken in place.
    uncompressed = pa.Table.from_pylist(rows, LMMS_LAB)
    pq.write_table(uncompressed, path, compression="none", row_group_size=4, write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"@@@@", b"\xff@@@"))
    result = convert(path, tmp_path / "out")
    assert [sample.id for sample in samples(result, "train")] == ["train-1", "train-10"]
    assert [reason for reason, _ in rejections(result)] == [
        *("missing_image", "missing_image", "bad_image", "bad_image", "duplicate_id"),
        *("no_answer", "bad_row", "bad_row"),
    ]
    detail = rejections(result)[3][1]
    where = "train-00000-of-00001.parquet row group 1, row 0 (questionId 5): "
    assert detail.startswith(where)
    assert_valid(result)


def test_damage_in_a_row_group_is_named_and_the_other_groups_are_kept(tmp_path: Path) -> None:
    rows = [hub_row(k, shade=k) for k in range(9)]
    path = write_parquet(tmp_path / "src/train-00000-of-00001.parquet", rows, LMMS_LAB)
    group = pq.ParquetFile(path).metadata.row_group(1)
    chunks = [group.column(k) for k in range(group.num_columns)]
    (chunk,) = [chunk for chunk in chunks if chunk.path_in_schema == "image.bytes"]
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    result = convert(path, tmp_path / "out")
    assert result.counts == {"train": 6}
    ((reason, detail),) = rejections(result)
    assert reason == "damaged_file"
    assert detail.startswith("train-00000-of-00001.parquet row group 1: rows 0 to 2 cannot be read")


def test_a_file_that_is_no_parquet_or_has_other_columns_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet", [{"a": 1}], pa.schema([("a", pa.int64())]))
    with pytest.raises(ValueError, match=r"train.parquet: expected the columns .*; got a"):
        convert(path, tmp_path / "out")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"train.parquet is damaged or no Parquet file: .*fetch"):
        convert(path, tmp_path / "out")
    write_json(tmp_path / "train_v1.0.json", [row(1)])
    with pytest.raises(ValueError, match=r"holds annotations \(train_v1.0.json\) and Parquet"):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pages_inside_parquet_are_encoded_anew_but_not_linked(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet", [hub_row(1)], LMMS_LAB)
    (sample,) = samples(convert(path, tmp_path / "out", DocVqa(images="reencode")), "train")
    assert phi3v_data.probe_image(tmp_path / "out/images" / sample.images[0]).format == "JPEG"
    with pytest.raises(ValueError, match="images=link: pictures inside a Parquet file"):
        convert(path, tmp_path / "other", DocVqa(images="link"))


def test_the_cauldron_gives_one_conversation_a_page_as_it_is(tmp_path: Path) -> None:
    text = pa.struct([(key, pa.string()) for key in ("user", "assistant", "source")])
    schema = pa.schema([("images", pa.list_(IMAGE)), ("texts", pa.list_(text))])
    rows = [
        {
            "images": [{"bytes": png(k), "path": None}],
            "texts": [
                {
                    "user": f"{q}?\nShort answer required.",
                    "assistant": f"{k}{q}.",
                    "source": "DocVQA",
                }
                for q in "ab"
            ],
        }
        for k in range(5)
    ]
    write_parquet(tmp_path / "src/docvqa/train-00000-of-00001.parquet", rows, schema, 2)
    write_parquet(tmp_path / "src/nlvr2/train-00000-of-00001.parquet", rows, schema, 2)
    result = convert(tmp_path / "src", tmp_path / "out")
    assert result.counts == {"train": 5}
    assert_valid(result)
    first, second = samples(result, "train")[4].conversations
    assert (tmp_path / "out/images" / first.images[0]).read_bytes() == png(4)
    assert (first.user, first.assistant) == ("a?\nShort answer required.", "4a.")
    assert (second.images, second.assistant) == ((), "4b.")


# --- the real ones


@needs_pages
def test_real_pages_and_questions_convert_whole(tmp_path: Path) -> None:
    result = convert(PAGES, tmp_path / "out", num_workers=2)
    expected = {
        split: json.loads((PAGES / name).read_text())["data"]
        for split, name in {
            "train": "train_v1.0_withQT.json",
            "val": "val_v1.0.json",
            "test": "test_v1.0.json",
        }.items()
    }
    assert result.counts == {split: len(rows) for split, rows in expected.items()}
    assert not result.rejected
    assert_valid(result)
    for split, rows in expected.items():
        for sample, original in zip(samples(result, split), rows, strict=True):
            (turn,) = sample.conversations
            assert sample.id == f"{split}-{original['questionId']}"
            assert turn.user == f"{original['question'].strip()}\nAnswer briefly."
            assert list(turn.answers or ()) == original.get("answers", [])
            (name,) = turn.images
            assert name == original["image"]
            assert (tmp_path / "out/images" / name).read_bytes() == (PAGES / name).read_bytes()


@needs_pages
def test_real_pages_in_parquet_give_the_samples_of_the_json(tmp_path: Path) -> None:
    rows = json.loads((PAGES / "val_v1.0.json").read_text())["data"]
    for one in rows:
        one["questionId"] = str(one["questionId"])
        one["image"] = {"bytes": (PAGES / one["image"]).read_bytes(), "path": None}
    write_parquet(tmp_path / "src/DocVQA/validation-00000-of-00001.parquet", rows, LMMS_LAB, 4)
    from_parquet = convert(tmp_path / "src", tmp_path / "a")
    from_json = convert(PAGES / "val_v1.0.json", tmp_path / "b")
    assert_valid(from_parquet)

    def without_images(result: phi3v_data.ConversionResult) -> list[Any]:
        return [
            sample.model_dump(exclude={"conversations": {0: {"images"}}})
            for sample in samples(result, "val")
        ]

    assert without_images(from_parquet) == without_images(from_json)
    pictures = [
        [(result.out_dir / "images" / s.images[0]).read_bytes() for s in samples(result, "val")]
        for result in (from_parquet, from_json)
    ]
    assert pictures[0] == pictures[1]
