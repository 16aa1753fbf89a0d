"""docs/evaluation.md: its commands are run, its table is what is written, its settings exist."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from phi3v_train.cli import main
from phi3v_train.config import EvalConfig
from phi3v_train.confusion import confusion_table
from phi3v_train.metrics import count_by_class
from phi3v_train.predictions import Prediction
from phi3v_train.tiny import init_tiny
from phi3v_train.trainer import train

from tests.train.builders import make_shards, toy_config, toy_samples

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "evaluation.md").read_text()
SMALLER = {
    "eval": ["--device", "cpu", "--max_new_tokens", "2", "--limit", "3"],
    "launch": [
        "device=cpu", "train.max_steps=2", "data.num_workers=0", "log.tensorboard=false",
        "eval.max_new_tokens=2", "eval.limit=3", "optim.warmup_steps=1",
    ],
}  # fmt: skip


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [text for kind, text in found if kind == language]


def commands() -> Iterator[list[str]]:
    for line in blocks("sh")[0].splitlines():
        program, *words = shlex.split(line)
        assert program == "phi3v-train"
        if "--nproc" in words:  # two processes: tests/train/test_run_evaluation.py
            place = words.index("--nproc")
            words = words[:place] + words[place + 2 :]
        yield words + SMALLER[words[0]]


def test_the_table_of_classes_is_the_one_that_is_written() -> None:
    truth = ["archery"] * 3 + ["biking"] * 3
    said = ["Archery", "archery.", "biking", "biking", "Biking", "running"]
    assert confusion_table(count_by_class(said, truth)) == blocks("")[0]


def test_the_settings_and_fields_of_the_page_exist() -> None:
    settings = PAGE.split("| setting | what |")[1].split("\n\n")[0]
    named = set(re.findall(r"`eval\.(\w+)`", settings))
    assert named == set(EvalConfig.model_fields) - {"max_new_tokens"}
    (fields,) = re.findall(r"in the order of the data: ([\w, ]+) \|", PAGE)
    assert fields.split(", ") == list(Prediction.__dataclass_fields__)


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = init_tiny("models/phi-3.5-vision", seed=1).path
    for place in ("shards/val", "shards/train", "shards/docvqa/val"):
        shards = make_shards(Path("made") / place, toy_samples(4))
        shutil.copytree(shards, place)
    for place, method in (("runs/full", "full"), ("runs/lora", "lora")):
        options = (f"method.name={method}", "train.max_steps=1")
        train(toy_config(tiny, Path("shards/train"), Path(place), *options))
    shutil.copytree("runs/full", "runs/docvqa")
    Path("ucf101.yaml").write_text(
        "{model: models/phi-3.5-vision, output_dir: runs/ucf101,"
        " data: {train: shards/train, num_crops: 1}}"
    )
    told: list[str] = []
    for words in commands():
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, f"{words}\n{result.output}\n{result.exception!r}"
        told.append(result.output)
    assert [text.split()[0] for text in told[:3]] == ["accuracy", "accuracy", "ANLS"]
    summary = json.loads(Path("runs/full/eval_val/eval.json").read_text())
    assert summary["num_questions"] == 3
    (point,) = Path("runs/ucf101/eval/history.jsonl").read_text().splitlines()
    assert json.loads(point)["step"] == 2
