"""Every block of the pages on conversion, run on sources laid out as those pages say."""

import csv
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from phi3v_data.cli import main
from phi3v_data.converters import load_converter
from phi3v_data.jsonl import read_samples
from phi3v_data.schema import Sample
from PIL import Image

from tests.data.annotations import write_image, write_lines
from tests.data.clips import write_clip, write_tree

DOCS = Path(__file__).resolve().parents[1] / "docs"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    found = FENCE.findall((DOCS / page).read_text())
    return [text for kind, text in found if kind == language]


def run_commands(page: str) -> None:
    """Run the commands of a page in its order, in this process."""
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            words = shlex.split(line)
            assert words[0] == "phi3v-data", line
            is_run = "--out_dir" in words and "--engine" not in words
            extra = ["--workers", "0"] if is_run else []
            result = CliRunner().invoke(main, words[1:] + extra)
            assert result.exit_code == 0, f"{line}\n{result.output}"


def objects(text: str) -> list[Any]:
    """The JSON objects of a block, one after the other."""
    decoder, found, position = json.JSONDecoder(), [], 0
    while position < len(text):
        value, position = decoder.raw_decode(text, position)
        found.append(value)
        position += len(text[position:]) - len(text[position:].lstrip())
    return found


# --- the sources


def make_ucf101(root: Path) -> None:
    write_tree(root / "UCF101_subset", 1)
    lists = root / "ucf/ucfTrainTestlist"
    lists.mkdir(parents=True)
    names: list[str] = []
    for label in ("Archery", "Biking"):
        for group in range(1, 5):
            names.append(f"{label}/v_{label}_g{group:02}_c01.avi")
            write_clip(root / "ucf/UCF-101" / names[-1], seed=group)
    for fold in (1, 2, 3):
        test = [name for name in names if f"_g0{fold}_" in name]
        train = [f"{name} 1" for name in names if name not in test]
        (lists / f"trainlist0{fold}.txt").write_text("\r\n".join(train))
        (lists / f"testlist0{fold}.txt").write_text("\r\n".join(test))
    (lists / "classInd.txt").write_text("1 Archery\n2 Biking\n")


def make_video(root: Path) -> None:
    for name in ("train/wave/a.avi", "train/run/b.mp4", "held-out/wave/c.webm"):
        fourcc = {"avi": "XVID", "mp4": "mp4v", "webm": "VP80"}[name.rpartition(".")[2]]
        write_clip(root / "hmdb" / name, fourcc=fourcc)


def make_docvqa(root: Path) -> None:
    row = {
        "questionId": 26167, "question": "what is the page no or page mentioned ?", "docId": 7467,
        "image": "documents/ffbg0227_2.png", "ucsf_document_id": "ffbg0227",
        "ucsf_document_page_no": "2",
    }  # fmt: skip
    page = write_image(root / "docvqa/spdocvqa_images/ffbg0227_2.png")
    folder = root / "docvqa/spdocvqa_qas"
    folder.mkdir()
    answers = {"answers": ["2", "page 2"]}
    for split, name, more in (
        ("train", "train_v1.0_withQT.json", answers),
        ("val", "val_v1.0_withQT.json", answers),
        ("test", "test_v1.0.json", {}),
    ):
        data = [row | {"data_split": split} | more]
        text = json.dumps({"dataset_name": "docvqa", "dataset_split": split, "data": data})
        (folder / name).write_text(text)
    (root / "hub/DocVQA").mkdir(parents=True)
    image = {"bytes": page.read_bytes(), "path": None}
    table = pa.table(
        {
            "image": pa.array([image], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "question": ["what is the page no or page mentioned ?"],
            "answers": [["2", "page 2"]],
            "questionId": ["26167"],
        }
    )
    pq.write_table(table, root / "hub/DocVQA/validation-00000-of-00006.parquet")


def make_hateful_memes(root: Path) -> None:
    data = root / "hateful_memes/data"
    for number, split in enumerate(("train", "dev_seen", "dev_unseen", "test_seen", "test_unseen")):
        row = {"id": 42953 + number, "img": f"img/{42953 + number}.png", "text": "its their world"}
        write_lines(data / f"{split}.jsonl", row | ({} if "test" in split else {"label": 0}))
        write_image(data / row["img"])


def make_nlvr2(root: Path) -> None:
    for split, name in (("train", "train-10171-0"), ("dev", "dev-850-0")):
        folder = root / "nlvr2/images" / ("train/42" if split == "train" else "dev")
        for side in (0, 1):
            write_image(folder / f"{name}-img{side}.png", side)
        row: dict[str, object] = {
            "identifier": f"{name}-0", "sentence": "There is an empty glass.", "label": "False",
            "left_url": "https://example.org/l.png", "right_url": "https://example.org/r.png",
            "synset": "glass",
        }  # fmt: skip
        if split == "train":
            row["directory"] = 42
        write_lines(root / f"nlvr2/data/{split}.json", row)
        if split == "dev":
            write_lines(root / "nlvr2/data/balanced/balanced_dev.json", row)


def make_chats(root: Path) -> None:
    forms = next(text for text in blocks("datasets.md", "json") if '"from": "human"' in text)
    text = forms.replace("data:image/jpeg;base64,…", embedded())
    rows = objects(text)
    assert len(rows) == 5
    write_lines(root / "my_chats/train.jsonl", *rows)
    (root / "my_chats/val.json").write_text(json.dumps(rows[:1]))
    for name in ("001", "002"):
        write_image(root / f"my_chats/images/cats/{name}.jpg", int(name), "JPEG")
    write_clip(root / "my_chats/clips/1.mp4", fourcc="mp4v")


def embedded() -> str:
    import base64
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (16, 12)).save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


MAKERS: list[Callable[[Path], None]] = [
    make_ucf101, make_video, make_docvqa, make_hateful_memes, make_nlvr2, make_chats,
]  # fmt: skip


# --- the pages


def test_the_commands_of_the_data_sets_page_give_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for make in MAKERS:
        make(tmp_path)
    shown: dict[str, Sample] = {}
    came: dict[str, Sample] = {}
    for text in blocks("datasets.md", "json"):
        for value in objects(text):
            if "source" in value:
                sample = Sample.from_json(json.dumps(value))
                shown[sample.source] = sample
    assert set(shown) == {"ucf101", "docvqa", "hateful_memes", "nlvr2", "jsonl"}
    page = (DOCS / "datasets.md").read_text()
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        # Several data sets go to the same folder, `converted`: each section begins anew.
        shutil.rmtree(tmp_path / "converted", ignore_errors=True)
        for language, text in FENCE.findall(section):
            for line in text.splitlines() if language == "sh" else ():
                words = shlex.split(line)
                extra = ["--workers", "0"] if words[1] == "convert" and "ray" not in words else []
                result = CliRunner().invoke(main, words[1:] + extra * ("--dry_run" not in words))
                assert result.exit_code == 0, f"{line}\n{result.output}"
        for path in tmp_path.glob("converted/*_*.jsonl"):
            for sample in read_samples(path, allow_missing_answer=True):
                if sample.source in shown and shown[sample.source].id == sample.id:
                    came[sample.source] = sample
    for source, sample in shown.items():
        if source != "ucf101":  # its images are shown as "..."
            assert came[source].to_json() == sample.to_json()
    assert cv2.imread(str(tmp_path / "hmdb_converted/images/train/wave/a.0.jpg")) is not None


def converter_fields(name: str) -> list[str]:
    found = load_converter(name)
    assert is_dataclass(found)
    return [field.name for field in fields(found)]


def test_the_options_of_the_data_sets_page_are_those_of_the_converters() -> None:
    page = (DOCS / "datasets.md").read_text()
    named = set(re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE))
    converters = ("ucf101", "video", "docvqa", "hateful_memes", "nlvr2", "jsonl")
    options = {field for name in converters for field in converter_fields(name)}
    assert named <= options
    assert options - named <= {"about", "dataset", "image_root", "system"}  # in the text


def test_the_converters_of_the_custom_page_run_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    function, class_ = blocks("custom-converters.md", "python")
    (tmp_path / "captions.py").write_text(function)
    (tmp_path / "my_captions.py").write_text(class_)
    (tmp_path / "raw").mkdir()
    with open(tmp_path / "raw/captions.txt", "w", newline="") as file:
        for name, text in (("cat", "A cat."), ("dog", "A dog.")):
            csv.writer(file, "excel-tab", lineterminator="\n").writerow((f"{name}.jpg", text))
            write_image(tmp_path / f"raw/{name}.jpg", kind="JPEG")
            (tmp_path / f"raw/{name}.txt").write_text(text)
    (tmp_path / "raw/captions.jpg").write_bytes((tmp_path / "raw/cat.jpg").read_bytes())
    run_commands("custom-converters.md")
    for path in ("converted/caption_train.jsonl", "from_list/captions_train.jsonl"):
        samples = {sample.id.partition(".")[0]: sample for sample in read_samples(path)}
        assert samples["dog"].conversations[0].user == "What is this?"
        assert samples["dog"].conversations[0].assistant == "A dog."


def test_the_entry_point_of_the_custom_page_is_that_of_the_built_in_ones() -> None:
    (block,) = blocks("custom-converters.md", "toml")
    ours = (DOCS.parent / "packages/phi3v-data/pyproject.toml").read_text()
    (group,) = tomllib.loads(block)["project"]["entry-points"]
    assert group in tomllib.loads(ours)["project"]["entry-points"]
