"""The whole path on real UCF-101 clips: raw folder in, trained and evaluated model out."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from phi3v_data.cli import main as phi3v_data
from phi3v_data.jsonl import read_samples
from phi3v_train.cli import main as phi3v_train

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "testdata" / "ucf101" / "UCF-101"

SPLITS = {
    "train": ("ApplyEyeMakeup", "Archery", "BabyCrawling", "Basketball"),
    "val": ("Biking", "SoccerJuggling"),
    "test": ("Archery",),
}
"""Class folders of each split. One clip a class is at hand, so one of them serves twice."""

SHORT = ("optim.warmup_steps=1", "optim.learning_rate=1e-3", "device=cpu", "data.num_workers=0")


def run(program, *arguments: object) -> str:
    result = CliRunner().invoke(program, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips converted, validated and sharded, and a tiny model."""
    if not CLIPS.is_dir():
        pytest.skip("the real UCF-101 clips are not beside this checkout")
    work = tmp_path_factory.mktemp("ucf101")
    for split, labels in SPLITS.items():
        for label in labels:
            shutil.copytree(CLIPS / label, work / "clips" / split / label)
    run(phi3v_data, "convert", "ucf101", work / "clips", "--out_dir", work / "data",
        "--num_frames", 2, "--workers", 0)  # fmt: skip
    for split in SPLITS:
        file = work / "data" / f"ucf101_{split}.jsonl"
        assert "no errors" in run(phi3v_data, "validate", file)
        run(phi3v_data, "shard", file, "--out_dir", work / "shards" / split)
    run(phi3v_train, "init", "tiny", work / "tiny")
    return work


def launch(work: Path, name: str, *arguments: str) -> str:
    return run(phi3v_train, "launch", f"model={work / 'tiny'}", f"output_dir={work / name}",
        f"data.train={work / 'shards' / 'train'}", "data.num_crops=1",
        "train.global_batch_size=2", *SHORT, *arguments)  # fmt: skip


def test_real_clips_become_samples_and_shards_that_verify(work: Path) -> None:
    samples = list(read_samples(work / "data" / "ucf101_train.jsonl"))
    assert [sample.conversations[0].assistant for sample in samples] == list(SPLITS["train"])
    assert all(len(sample.images) == 2 for sample in samples)
    assert samples[1].images[0] == "train/Archery/video1.0.jpg"
    every_class = sorted({label for labels in SPLITS.values() for label in labels})
    assert all(
        sample.conversations[0].user
        == f"Classify the video into one of the following classes: {', '.join(every_class)}."
        for sample in samples
    )
    for split, labels in SPLITS.items():
        output = run(phi3v_data, "verify", work / "shards" / split)
        assert f"{len(labels)} sample" in output
        assert "all as written" in output


def test_a_model_trains_on_real_clips_and_answers_questions_about_others(work: Path) -> None:
    output = launch(
        work,
        "full",
        f"data.eval={work / 'shards' / 'val'}",
        "eval.before=true",
        "eval.max_new_tokens=4",
        "train.max_steps=3",
        "train.log_every=1",
    )
    assert "before training: accuracy" in output
    assert "after training: accuracy" in output
    folder = work / "full"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for when in ("before", "after"):
        assert json.loads((folder / f"eval_{when}.json").read_text())["num_samples"] == 2

    output = run(phi3v_train, "eval", "--model", folder / "model", "--num_crops", 1,
        "--data", work / "shards" / "test", "--max_new_tokens", 4, "--device", "cpu",
        "--out_dir", work / "eval")  # fmt: skip
    assert "accuracy" in output
    (line,) = (work / "eval" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["answer"] == "Archery"


def test_adapters_train_on_real_clips_and_are_put_on_for_evaluation(work: Path) -> None:
    launch(work, "lora", "method.name=lora", "method.lora.rank=4", "train.max_steps=1")
    output = run(phi3v_train, "eval", "--model", work / "tiny", "--adapter", work / "lora/adapter",
        "--data", work / "shards" / "val", "--num_crops", 1, "--max_new_tokens", 2,
        "--device", "cpu")  # fmt: skip
    assert "of 2)" in output
