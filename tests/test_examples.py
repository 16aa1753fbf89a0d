"""examples/<task>/: every configuration runs, and so does every command of its page."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from phi3v_data.cli import main as phi3v_data
from phi3v_train.cli import main as phi3v_train
from phi3v_train.config import TrainConfig, load_config
from phi3v_train.tiny import init_tiny

from tests.train.builders import log_lines, make_shards, toy_samples, weights_of, write_picture

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TASKS = ("docvqa", "hateful_memes", "nlvr2", "ucf101")
CONFIGS = sorted(path for task in TASKS for path in (EXAMPLES / task).glob("*.yaml"))
CPU = ("device=cpu", "data.num_crops=1", "data.num_workers=0", "eval.max_new_tokens=2")

PUBLISHED = {
    # task/method: learning rate, epochs, rank, alpha (as in the cookbook's tables)
    "docvqa/full": (5e-6, 2, None, None),
    "docvqa/frozen-vision": (1e-4, 2, None, None),
    "docvqa/lora": (2e-4, 2, 32, 16),
    "docvqa/qlora": (2e-4, 2, 32, 16),
    "hateful_memes/full": (5e-5, 2, None, None),
    "hateful_memes/frozen-vision": (1e-4, 3, None, None),
    "hateful_memes/lora": (2e-4, 2, 128, 256),
    "hateful_memes/qlora": (2e-4, 2, 128, 256),
    "nlvr2/full": (1e-5, 3, None, None),
    "nlvr2/frozen-vision": (2e-5, 2, None, None),
    "ucf101/full": (4e-5, 1, None, None),
    "ucf101/frozen-vision": (4e-5, 1, None, None),
    "ucf101/lora": (4e-5, 1, 64, 128),
    "ucf101/qlora": (4e-5, 1, 64, 128),
}
SCORES = {
    "docvqa": "83.65 82.60 79.19 78.74 82.46 82.34 81.85 81.85",
    "hateful_memes": "86.4 85.4 79.4 78.6 86.6 85.2 84.0 83.8",
    "nlvr2": "89.40 89.20",
    "ucf101": "",
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


# --- what they say --------------------------------------------------------------------------------


def test_there_is_a_configuration_for_every_row_of_the_published_tables() -> None:
    rows = {
        f"{row}-{precision}"
        for row in PUBLISHED
        for precision in (("bf16", "fp16") if row[0] in "dh" else ("bf16",))
    }
    assert {name_of(path) for path in CONFIGS} == rows


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_configuration_has_the_published_hyper_parameters(path: Path) -> None:
    config = load_config(path)
    row, _, precision = name_of(path).rpartition("-")
    task, _, method = row.partition("/")
    lora = config.method.lora
    has_adapters = config.method.name != "full"
    assert (
        config.optim.learning_rate,
        config.train.num_epochs,
        lora.rank if has_adapters else None,
        lora.lora_alpha if has_adapters else None,
    ) == PUBLISHED[row]
    assert config.precision == precision
    assert config.train.global_batch_size == 64
    assert config.data.num_crops == (4 if task == "ucf101" else 16)
    assert config.method.name == (method if method in ("lora", "qlora") else "full")
    assert config.method.freeze == (("vision", "projector") if "frozen" in method else ())
    assert config.eval.metric == ("anls" if task == "docvqa" else "accuracy")


@pytest.mark.parametrize("task", TASKS)
def test_published_scores_are_called_references(task: str) -> None:
    said: list[str] = []
    for path in sorted((EXAMPLES / task).glob("*.yaml")):
        text = path.read_text()
        found = re.findall(r"^# Published by .* (\d\d\.\d+),", text, re.MULTILINE)
        said += found
        if found:
            assert "reference, not reproduced here" in text
    assert sorted(said) == sorted(SCORES[task].split())
    page = (EXAMPLES / task / "README.md").read_text()
    for path in (EXAMPLES / task).glob("*.yaml"):
        assert f"`{path.name}`" in page


# --- that they run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_tiny(tmp_path_factory.mktemp("models") / "tiny", seed=1).path


@pytest.fixture(scope="module")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("toy"), toy_samples(4))


def configured(path: Path, model: Path, shards: Path, output_dir: Path) -> TrainConfig:
    """An example, with toy data and a tiny model in place of the real ones."""
    # fp16 needs a GPU, and bf16 is slow without one: only full training keeps it here.
    precision = "bf16" if path.stem == "full-bf16" else "fp32"
    return load_config(
        path,
        [
            f"model={model}", f"output_dir={output_dir}", f"data.train={shards}",
            f"data.eval={shards}", f"precision={precision}", "train.global_batch_size=4",
            "train.max_steps=2", "optim.warmup_steps=1", "eval.before=false", "eval.limit=2", *CPU,
        ],
    )  # fmt: skip


def run_parameters() -> list[Any]:
    """One of each method by default: that a number differs changes nothing about running."""
    quick = {"docvqa/lora-bf16", "hateful_memes/qlora-bf16", "nlvr2/frozen-vision-bf16"}
    marks = [() if name_of(path) in quick else pytest.mark.slow for path in CONFIGS]
    return [
        pytest.param(path, marks=mark, id=name_of(path))
        for path, mark in zip(CONFIGS, marks, strict=True)
    ]


@pytest.mark.parametrize("path", run_parameters())
def test_an_example_trains_and_is_evaluated(
    path: Path, tiny: Path, toy_shards: Path, tmp_path: Path
) -> None:
    from phi3v_train.trainer import train

    result = train(configured(path, tiny, toy_shards, tmp_path))
    assert result.step == 2
    assert [line["step"] for line in log_lines(tmp_path)][-1] == 2
    summary = json.loads((tmp_path / "eval_after.json").read_text())
    assert summary["metric"] == ("anls" if path.parent.name == "docvqa" else "accuracy")
    assert len(weights_of(tmp_path)) > 0


# --- the pages ------------------------------------------------------------------------------------


def raw_docvqa(folder: Path) -> None:
    for split, name in (
        ("train", "train_v1.0_withQT"),
        ("val", "val_v1.0_withQT"),
        ("test", "test_v1.0"),
    ):
        rows: list[dict[str, Any]] = []
        for number in range(2):
            page = f"documents/{split}{number}_1.png"
            write_picture(folder / "spdocvqa_images" / Path(page).name, (60, 80), number)
            row = {
                "questionId": 337 + number, "question": f"what is {number}?", "image": page,
                "docId": number, "ucsf_document_id": f"{split}{number}",
                "ucsf_document_page_no": "1", "data_split": split,
            }  # fmt: skip
            rows.append(row if split == "test" else {**row, "answers": ["2", "page 2"]})
        path = folder / "spdocvqa_qas" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"dataset_name": "docvqa", "data": rows}))


def raw_hateful_memes(folder: Path) -> None:
    for first, split in ((10, "train"), (20, "dev_seen")):
        rows: list[str] = []
        for number in (first, first + 1):
            write_picture(folder / "data" / "img" / f"{number:05}.png", (70, 60), number)
            row = {"id": number, "img": f"img/{number:05}.png", "label": number % 2, "text": "ha"}
            rows.append(json.dumps(row) + "\n")
        (folder / "data" / f"{split}.jsonl").write_text("".join(rows))


def raw_nlvr2(folder: Path) -> None:
    for split in ("train", "dev"):
        rows: list[str] = []
        for number in range(2):
            for side in (0, 1):
                name = f"{split}-{number}-0-img{side}.png"
                write_picture(folder / "images" / split / name, (60, 50), number + side)
            row = {"identifier": f"{split}-{number}-0-0", "sentence": "One.", "label": "False"}
            rows.append(json.dumps({**row, "directory": 0}) + "\n")
        path = folder / "data" / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(rows))


def raw_ucf101(folder: Path) -> None:
    import cv2
    import numpy as np

    for split in ("train", "val"):
        for number, name in enumerate(("Archery", "Biking"), start=1):
            path = folder / split / name / f"v_{name}_g0{number}_c01.avi"
            path.parent.mkdir(parents=True)
            code = cv2.VideoWriter.fourcc(*"XVID")
            video = cv2.VideoWriter(str(path), code, 25, (64, 48))
            for shade in range(10):
                video.write(np.full((48, 64, 3), 20 * shade + number, np.uint8))
            video.release()


RAW: dict[str, tuple[str, Callable[[Path], None]]] = {
    "docvqa": ("docvqa", raw_docvqa),
    "hateful_memes": ("hateful_memes", raw_hateful_memes),
    "nlvr2": ("nlvr2", raw_nlvr2),
    "ucf101": ("UCF101_subset", raw_ucf101),
}


@pytest.mark.parametrize(
    "task",
    [
        "hateful_memes",
        *[pytest.param(t, marks=pytest.mark.slow) for t in TASKS if t != "hateful_memes"],
    ],
)
def test_the_commands_of_a_page_lead_from_the_download_to_a_score(
    task: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, make = RAW[task]
    Path(folder).mkdir()
    make(Path(folder))
    Path("examples").symlink_to(EXAMPLES)
    for name in ("phi-3-vision", "phi-3.5-vision"):
        shutil.copytree(tiny, Path("models") / name)
    page = (EXAMPLES / task / "README.md").read_text()
    scored: list[Path] = []
    for line in "\n".join(re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S)).splitlines():
        if not line.strip():
            continue
        program, *words = shlex.split(line)
        if words and words[0] == "launch":  # smaller than life
            words += [*CPU, "precision=fp32", "train.global_batch_size=2", "train.max_steps=1"]
            words += ["method.lora.rank=4", "eval.before=false", "eval.after=false"]
        elif words and words[0] == "eval":
            words += ["--num_crops", "1", "--max_new_tokens", "2", "--device", "cpu"]
            scored.append(Path(words[words.index("--out_dir") + 1]))
        elif "convert" in words:
            words += ["--workers", "1"]
        command = {"phi3v-data": phi3v_data, "phi3v-train": phi3v_train}[program]
        result = CliRunner().invoke(command, words)
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
    assert scored
    for out_dir in scored:
        assert json.loads((out_dir / "eval.json").read_text())["num_samples"] == 2
    if task == "docvqa":
        submission = json.loads((scored[-1] / "rrc_submission.json").read_text())
        assert [entry["questionId"] for entry in submission] == [337, 338]
