"""A bad input gets one clear line, an exit status, and leaves nothing half-written behind.

What one command alone can be given wrong is tested with that command (tests/data, tests/train);
here is what passes through several: conversions, shards, model folders, checkpoints.
"""

import json
import re
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from phi3v_data.cli import main as phi3v_data
from phi3v_data.schema import Sample, Turn
from phi3v_data.shard_writer import write_shards
from phi3v_train.cli import main as phi3v_train
from PIL import Image

from tests.data.clips import truncate, write_clip


def run(program: click.Command, *arguments: object) -> Result:
    return CliRunner().invoke(program, [str(argument) for argument in arguments])


def files_under(folder: Path) -> dict[str, bytes]:
    """Every path below a folder, and what is in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def assert_one_line(result: Result, status: int, *parts: str) -> None:
    assert result.exit_code == status, result.output
    # transformers shows a progress bar of its own while it loads weights
    lines = [line for line in result.output.splitlines() if line and "Loading weights" not in line]
    assert len(lines) == 1, result.output
    assert lines[0].startswith("Error: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shards/` of two samples and the model folder `tiny/`; tests work on copies."""
    folder = tmp_path_factory.mktemp("made")
    samples: list[Sample] = []
    for number, label in enumerate(("Archery", "Biking")):
        (folder / "images").mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), (number * 90, 80, 120)).save(folder / f"images/{label}.png")
        turn = Turn(images=(f"{label}.png",), user="Which class?", assistant=label)
        samples.append(Sample(id=label, source="toy", conversations=(turn,)))
    jsonl = folder / "train.jsonl"
    jsonl.write_text("".join(f"{s.model_dump_json(exclude_none=True)}\n" for s in samples))
    assert write_shards([jsonl], folder / "shards").manifest is not None
    assert run(phi3v_train, "init", "tiny", folder / "tiny").exit_code == 0
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "work"))


def launch(work: Path, *arguments: str) -> Result:
    return run(phi3v_train, "launch", f"model={work / 'tiny'}", f"output_dir={work / 'run'}",
        f"data.train={work / 'shards'}", "data.num_crops=1", "data.num_workers=0",
        "device=cpu", "train.global_batch_size=2", *arguments)  # fmt: skip


def evaluate(work: Path, *arguments: object) -> Result:
    return run(phi3v_train, "eval", "--model", work / "tiny", "--data", work / "shards",
        "--num_crops", 1, "--max_new_tokens", 2, "--device", "cpu",
        "--out_dir", work / "eval", *arguments)  # fmt: skip


# --- raw videos -----------------------------------------------------------------------------------


def test_a_missing_source_folder_is_named_and_nothing_written(tmp_path: Path) -> None:
    result = run(phi3v_data, "convert", "ucf101", tmp_path / "none", "--out_dir", tmp_path / "out")
    assert_one_line(result, 2, f"source not found: {tmp_path / 'none'}")
    assert not files_under(tmp_path)


def test_a_source_without_videos_says_what_was_expected_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    (tmp_path / "src" / "train" / "Archery").mkdir(parents=True)
    before = files_under(tmp_path)
    result = run(phi3v_data, "convert", "ucf101", tmp_path / "src", "--out_dir", tmp_path / "out")
    assert_one_line(result, 2, "no videos found", "{train,val,test}/<Class>/*.avi")
    assert files_under(tmp_path) == before


def test_a_truncated_video_is_rejected_and_counted_and_the_rest_can_be_trained_on(
    tmp_path: Path,
) -> None:
    for name in ("train/Archery/a.avi", "train/Archery/b.avi", "train/Biking/c.avi"):
        write_clip(tmp_path / "src" / name)
    truncate(tmp_path / "src/train/Archery/a.avi", 0.5)
    out = tmp_path / "out"
    result = run(
        phi3v_data, "convert", "ucf101", tmp_path / "src", "--out_dir", out, "--workers", 0
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"truncated\W+1\b", result.output)
    (line,) = (out / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "truncated"
    jsonl = out / "ucf101_train.jsonl"
    assert len(jsonl.read_text().splitlines()) == 2
    assert run(phi3v_data, "validate", jsonl).exit_code == 0
    assert run(phi3v_data, "shard", jsonl, "--out_dir", tmp_path / "shards").exit_code == 0


# --- conversations --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["validate", "shard"])
def test_a_line_that_is_not_json_is_named_with_file_and_line(work: Path, command: str) -> None:
    jsonl = work / "train.jsonl"
    lines = jsonl.read_text().splitlines()
    jsonl.write_text("\n".join([lines[0], lines[1][:-5], ""]))
    before = files_under(work)
    options = ("--out_dir", work / "new") if command == "shard" else ()
    result = run(phi3v_data, command, jsonl, *options)
    assert result.exit_code == 1
    (finding,) = (
        line for line in result.output.splitlines() if "P101" in line and ".jsonl" in line
    )
    assert finding.startswith(f"{jsonl}:2:")
    assert files_under(work) == before


# --- shards ---------------------------------------------------------------------------------------


def test_shards_of_another_version_are_refused_by_every_command(work: Path) -> None:
    path = work / "shards" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    before = files_under(work)
    for result in (run(phi3v_data, "verify", work / "shards"), launch(work), evaluate(work)):
        assert_one_line(result, 1, "version 99", "this program reads 2", "phi3v-data shard")
    assert files_under(work) == before


@pytest.mark.parametrize(
    ("there", "problem"), [(True, "has no manifest.json"), (False, "is not a directory")]
)
def test_a_folder_that_is_no_shard_directory_is_refused(
    work: Path, there: bool, problem: str
) -> None:
    shutil.rmtree(work / "shards")
    if there:
        (work / "shards").mkdir()
    before = files_under(work)
    for result in (launch(work), evaluate(work)):
        assert_one_line(result, 1, f"{work / 'shards'}: {problem}", "phi3v-data shard")
    assert files_under(work) == before


# --- configuration --------------------------------------------------------------------------------


def test_a_misspelt_key_gets_the_nearest_name_and_starts_nothing(work: Path) -> None:
    config = work / "run.yaml"
    config.write_text(
        f"model: {work / 'tiny'}\noutput_dir: {work / 'run'}\n"
        f"data: {{train: {work / 'shards'}}}\noptim:\n  learning_rat: 1e-4\n"
    )
    before = files_under(work)
    result = run(phi3v_train, "launch", config)
    assert_one_line(result, 1, "optim.learning_rat", "line 5", "optim.learning_rate")
    assert_one_line(launch(work, "train.num_epoch=2"), 1, "train.num_epoch", "train.num_epochs")
    assert files_under(work) == before


# --- model folders --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda tiny: shutil.rmtree(tiny), ("/tiny",)),
        (lambda tiny: (tiny / "config.json").unlink(), ("tiny", "config.json")),
        (lambda tiny: (tiny / "config.json").write_text("{"), ("config.json",)),
        (lambda tiny: (tiny / "config.json").write_text('{"model_type": "llama"}'), ("llama",)),
        (lambda tiny: (tiny / "tokenizer.json").unlink(), ("tokenizer.json",)),
        (lambda tiny: (tiny / "model.safetensors").unlink(), ("tiny", "model.safetensors")),
    ],
    ids=["missing", "no config", "config no json", "other model", "no tokenizer", "no weights"],
)
def test_a_model_folder_that_is_none_is_refused(work: Path, spoil, parts: tuple[str, ...]) -> None:
    spoil(work / "tiny")
    before = files_under(work)
    for result in (launch(work), evaluate(work)):
        assert_one_line(result, 1, *parts)
    assert files_under(work) == before


def test_an_adapter_folder_that_is_none_is_refused(work: Path) -> None:
    before = files_under(work)
    assert_one_line(evaluate(work, "--adapter", work / "tiny"), 1, "is not an adapter folder")
    assert files_under(work) == before


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_a_checkpoint_folder_that_is_none_is_refused(work: Path, there: bool) -> None:
    folder = work / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "latest").write_text("step-00000007\n")
    if there:
        (folder / "step-00000007").mkdir()
    before = files_under(work)
    for arguments in ((), ("--resume",)):
        assert_one_line(
            launch(work, *arguments), 1, "step-00000007", "is not a checkpoint", "output_dir"
        )
    assert files_under(work) == before


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ("{", "is damaged"),
        ("{}", "is damaged"),
        ('{"format_version": 99}', "checkpoint format 99, this program reads 1"),
        ("[]", "is damaged"),
        ('{"format_version": 1}', "is damaged"),
    ],
)  # fmt: skip
def test_a_checkpoint_whose_state_cannot_be_read_is_refused(
    work: Path, state: str, problem: str
) -> None:
    folder = work / "run" / "checkpoints"
    (folder / "step-00000007").mkdir(parents=True)
    (folder / "latest").write_text("step-00000007\n")
    (folder / "step-00000007" / "state.json").write_text(state)
    before = files_under(work)
    assert_one_line(launch(work), 1, "step-00000007", problem)
    assert files_under(work) == before


def test_resume_without_a_checkpoint_is_refused(work: Path) -> None:
    before = files_under(work)
    assert_one_line(launch(work, "--resume"), 1, "has no checkpoint to resume from")
    assert files_under(work) == before
