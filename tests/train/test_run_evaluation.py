"""Evaluations while a run trains: when, what they leave, when they end it, and after a resume."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from phi3v_train.checkpoint import latest_checkpoint
from phi3v_train.cli import main
from phi3v_train.config import load_config
from phi3v_train.evaluate import evaluate_model
from phi3v_train.trainer import train

from tests.train.builders import log_lines, make_shards, toy_config, toy_overrides, toy_samples


@pytest.fixture(scope="module")
def toy(tiny: Path, toy_shards: Path) -> tuple[Path, Path]:
    return tiny, toy_shards


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three samples to evaluate on."""
    return make_shards(tmp_path_factory.mktemp("few"), toy_samples(3))


DROPOUT = ("method.name=lora", "method.lora.dropout=0.2")
"""What an evaluation would disturb that forgets the mode or the position of the random numbers."""


def history(output_dir: Path) -> list[dict[str, Any]]:
    path = output_dir / "eval" / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(toy: tuple[Path, Path], few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps: the loss every two and at the end, answers after the fourth."""
    output = tmp_path_factory.mktemp("runs") / "evaluated"
    options = (f"data.eval={few}", "eval.every_steps=2", "eval.generate_every_steps=4")
    options += ("eval.max_new_tokens=2", "eval.after=false", "checkpoint.every_steps=2")
    train(toy_config(*toy, output, *options, *DROPOUT))
    return output


def test_the_loss_is_measured_every_so_many_steps_and_at_the_end(evaluated: Path) -> None:
    points = history(evaluated)
    assert [point["step"] for point in points] == [2, 4, 6]
    assert [sorted(point) for point in points] == [
        ["loss", "step"],
        ["accuracy", "loss", "step"],
        ["loss", "step"],
    ]
    assert points[-1]["loss"] < points[0]["loss"]


def test_the_answers_after_a_step_are_kept(evaluated: Path) -> None:
    folder = evaluated / "eval" / "step-00000004"
    assert json.loads((folder / "eval.json").read_text())["num_samples"] == 3
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 3
    assert not (evaluated / "eval_after.json").exists()


def test_evaluating_changes_nothing_in_training(
    toy: tuple[Path, Path], evaluated: Path, tmp_path: Path
) -> None:
    train(toy_config(*toy, tmp_path, *DROPOUT))
    assert [line["loss"] for line in log_lines(tmp_path)] == [
        line["loss"] for line in log_lines(evaluated)
    ]


def test_a_run_ends_where_its_patience_does_and_stays_ended(
    toy: tuple[Path, Path], few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A rate so small that float32 weights stay as they are: the loss never gets better.
    options = (f"data.eval={few}", "eval.every_steps=1", "eval.patience=2", "eval.after=false")
    config = toy_config(*toy, tmp_path, *options, "optim.learning_rate=1e-30")
    result = train(config)
    assert (result.step, result.num_steps, result.exit_status) == (3, 6, 0)
    assert result.output == tmp_path / "model"
    told = capsys.readouterr().out
    assert "ended after 3 of 6 steps: no better loss than" in told
    assert "of step 1 in 2 evaluations (eval.patience)" in told
    assert [point["step"] for point in history(tmp_path)] == [1, 2, 3]
    again = train(config)
    assert again.step == 3
    assert [point["step"] for point in history(tmp_path)] == [1, 2, 3]


def test_a_resumed_run_knows_what_it_measured_and_forgets_what_came_later(
    toy: tuple[Path, Path], few: Path, tmp_path: Path
) -> None:
    options = (f"data.eval={few}", "eval.every_steps=1", "eval.after=false")
    train(toy_config(*toy, tmp_path, *options, "checkpoint.every_steps=2", "checkpoint.keep=9"))
    whole = history(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "latest").write_text("step-00000002\n")
    for later in ("step-00000004", "step-00000006"):
        (checkpoints / later).rename(tmp_path / later)
    assert latest_checkpoint(tmp_path) == checkpoints / "step-00000002"
    train(toy_config(*toy, tmp_path, *options), resume=True)
    assert history(tmp_path) == whole


def test_data_without_answers_is_refused_before_the_first_step(
    toy: tuple[Path, Path], tmp_path: Path
) -> None:
    from phi3v_data import Sample, Turn, write_samples, write_shards

    turn = Turn(images=(), user="What?")
    write_samples(tmp_path / "t.jsonl", [Sample(id="bare", source="toy", conversations=(turn,))])
    shards = tmp_path / "shards"
    write_shards([tmp_path / "t.jsonl"], shards, allow_missing_answer=True, num_workers=1)
    with pytest.raises(ValueError, match=r"sample 'bare' of .* has no answer to compare with"):
        train(toy_config(*toy, tmp_path / "run", f"data.eval={shards}"))
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.every_steps=5"], "eval.every_steps is set, but data.eval is not"),
        (["eval.generate_every_steps=5"], "eval.generate_every_steps is set, but data.eval"),
        (["data.eval=e", "eval.patience=2"], "by loss, but none is made .* eval.every_steps"),
        (
            ["data.eval=e", "eval.patience=2", "eval.every_steps=5", "eval.best_by=metric"],
            "by metric, but none is made .* set eval.generate_every_steps",
        ),
    ],
)
def test_settings_that_need_one_another_are_checked(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(None, ["model=m", "output_dir=o", "data.train=d", *overrides])


def test_eval_starts_no_processes_inside_one_of_many(
    toy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    words = ["eval", "--model", str(toy[0]), "--data", str(toy[1]), "--nproc", "2"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "--nproc 2 inside a process that torchrun started; leave --nproc out" in result.output


# --- two processes --------------------------------------------------------------------------------

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


def evaluating(toy: tuple[Path, Path], few: Path, output: Path, engine: str) -> list[str]:
    """A run that measures its loss every two steps, and answers before, after the fourth, after."""
    options = (f"data.eval={few}", "eval.every_steps=2", "eval.generate_every_steps=4")
    options += ("eval.max_new_tokens=2", "eval.before=true", f"parallel.engine={engine}")
    return toy_overrides(*toy, output, *options)


def eval_of(toy: tuple[Path, Path], output: Path) -> dict[str, Any]:
    """An odd number of samples, more than a batch of each process."""
    settings = {"num_crops": 1, "max_new_tokens": 3, "batch_size": 2, "metric": "anls", "limit": 11}
    paths = {"model": str(toy[0]), "data": str(toy[1]), "out_dir": str(output)}
    return {**settings, **paths, "device": "cpu"}


@pytest.fixture(scope="module")
def alone(toy: tuple[Path, Path], few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and an `eval` of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(load_config(None, evaluating(toy, few, folder / "run", "single")))
    evaluate_model(**eval_of(toy, folder / "eval"))
    return folder


@pytest.fixture(scope="module")
def together(toy: tuple[Path, Path], few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in one group of two processes, a run for every engine."""
    folder = tmp_path_factory.mktemp("together")
    runs = [evaluating(toy, few, folder / engine, engine) for engine in ENGINES]
    (folder / "asked.json").write_text(
        json.dumps({"runs": runs, "eval": eval_of(toy, folder / "eval")})
    )
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "tests.train.evaluation_run", str(folder / "asked.json")),
    ]
    group = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2]
    )
    assert group.returncode == 0, group.stdout + group.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_measure_and_answer_as_one_does(
    alone: Path, together: Path, engine: str
) -> None:
    for one, two in zip(history(alone / "run"), history(together / engine), strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    for when in ("before", "step-00000004", "after"):
        for name in ("predictions.jsonl", "eval.json"):
            file = Path("eval") / when / name
            assert (together / engine / file).read_text() == (alone / "run" / file).read_text()


@pytest.mark.slow
def test_eval_of_two_processes_answers_everything_once_and_as_one_does(
    alone: Path, together: Path
) -> None:
    names = {path.name for path in (together / "eval").iterdir()}
    assert names == {"predictions.jsonl", "eval.json"}
    for name in names:
        assert (together / "eval" / name).read_text() == (alone / "eval" / name).read_text()
    lines = (together / "eval" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"s{number}" for number in range(11)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_each_of_two_processes_logs_what_it_did_itself(together: Path, engine: str) -> None:
    logs = [
        [json.loads(line) for line in (together / engine / "logs" / name).read_text().splitlines()]
        for name in ("rank-0.jsonl", "rank-1.jsonl")
    ]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4, 5, 6]
    for first, second in zip(*logs, strict=True):
        assert first["step"] == second["step"]
        assert first["num_samples"] + second["num_samples"] == 4
        assert min(first["num_tokens"], second["num_tokens"]) > 0
        assert min(first["memory_gib"], second["memory_gib"]) > 0


@pytest.mark.slow
def test_the_command_eval_in_two_processes_prints_and_writes_what_one_does(
    toy: tuple[Path, Path], tmp_path: Path
) -> None:
    def words(nproc: str) -> list[str]:
        model, data = map(str, toy)
        return [
            *("eval", "--model", model, "--data", data, "--num_crops", "1", "--limit", "5"),
            *("--max_new_tokens", "2", "--device", "cpu", "--anls", "official"),
            *("--nproc", nproc, "--out_dir", str(tmp_path / nproc)),
        ]

    alone = CliRunner().invoke(main, words("1"))
    assert alone.exit_code == 0, alone.output
    command = [sys.executable, "-m", "phi3v_train.cli", *words("2")]
    two = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert two.returncode == 0, two.stderr
    assert two.stdout == alone.stdout
    assert two.stdout.startswith("ANLS ")
    for name in ("predictions.jsonl", "eval.json"):
        assert (tmp_path / "1" / name).read_text() == (tmp_path / "2" / name).read_text()
