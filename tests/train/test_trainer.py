import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from phi3v_train.checkpoint import CheckpointError
from phi3v_train.config import load_config
from phi3v_train.trainer import describe, train

from tests.train.builders import log_lines, losses_of, toy_config, weights_of

LOGGED = ("log.tensorboard=true", "log.report=true")


@pytest.fixture(scope="module")
def toy(tiny: Path, toy_shards: Path) -> tuple[Path, Path]:
    return tiny, toy_shards


@pytest.fixture(scope="module")
def finished(toy: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all six steps, evaluated before and after; tests copy it or read it."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    evaluation = (f"data.eval={toy[1]}", "eval.before=true", "eval.limit=4")
    train(toy_config(*toy, output, *evaluation, *LOGGED, "eval.max_new_tokens=3"))
    return output


def assert_equal_weights(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_steps_a_resume_and_the_rest_equal_the_uninterrupted_run_bitwise(
    toy: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    options = (f"method.name={method}", "method.lora.dropout=0.1")
    options += ("checkpoint.every_steps=2", "checkpoint.keep=9")
    whole = train(toy_config(*toy, tmp_path / "whole", *options))
    assert (whole.step, whole.num_steps, whole.exit_status) == (6, 6, 0)
    checkpoints = tmp_path / "resumed" / "checkpoints"
    name = "step-00000002"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / name, checkpoints / name)
    (checkpoints / "latest").write_text(f"{name}\n")
    assert train(toy_config(*toy, tmp_path / "resumed", *options), resume=True).step == 6
    assert_equal_weights(weights_of(tmp_path / "resumed"), weights_of(tmp_path / "whole"))
    assert [line["step"] for line in log_lines(tmp_path / "resumed")] == [3, 4, 5, 6]


def test_rows_of_another_capacity_give_the_same_losses(
    toy: tuple[Path, Path], finished: Path, tmp_path: Path
) -> None:
    train(toy_config(*toy, tmp_path, "data.max_tokens_per_row=800", "data.num_workers=1"))
    assert len(losses_of(tmp_path)) == 6
    assert losses_of(tmp_path) == pytest.approx(losses_of(finished), abs=1e-5)


def test_gradient_checkpointing_gives_the_same_losses(
    toy: tuple[Path, Path], finished: Path, tmp_path: Path
) -> None:
    train(toy_config(*toy, tmp_path, "method.gradient_checkpointing=true"))
    assert losses_of(tmp_path) == pytest.approx(losses_of(finished), abs=1e-5)


def test_the_log_has_a_line_per_interval(finished: Path) -> None:
    lines = log_lines(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == pytest.approx([k / 3 for k in range(1, 7)])
    rates = [line["learning_rate"] for line in lines]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert all(line["num_steps"] == 6 and line["label_tokens"] > 0 for line in lines)
    assert all(line["grad_norm"] > 0 and 0 <= line["data_wait"] <= 1 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_an_evaluation_before_and_after_is_kept_with_its_predictions(finished: Path) -> None:
    for when in ("before", "after"):
        result = json.loads((finished / f"eval_{when}.json").read_text())
        assert result["num_samples"] == 4
        lines = (finished / "eval" / when / "predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == ["s0", "s1", "s2", "s3"]


def test_a_run_writes_what_its_docstring_lists(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *("checkpoints", "config.yaml", "env.json", "eval", "eval_after.json", "eval_before.json"),
        *("log.jsonl", "model", "report.html", "tensorboard"),
    }
    assert load_config(finished / "config.yaml").output_dir == finished


def test_a_run_that_a_signal_stops_leaves_a_line_of_its_last_step_and_its_report(
    toy: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop_after_the_first_line() -> None:
        while not (tmp_path / "log.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    config = toy_config(*toy, tmp_path, "train.num_epochs=100", "train.log_every=5", LOGGED[1])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(stop_after_the_first_line)
        result = train(config)
    assert result.stopped_by is signal.SIGUSR1
    assert log_lines(tmp_path)[-1]["step"] == result.step
    assert f"{result.step} of 300 steps" in (tmp_path / "report.html").read_text()
    *_, wrote, stopped = capsys.readouterr().out.splitlines()
    assert wrote == f"wrote {tmp_path / 'report.html'}"
    assert stopped.startswith(f"stopped after {result.step} of 300 steps; run the same command")


def test_a_finished_run_called_again_says_so_and_gives_its_result(
    toy: tuple[Path, Path], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "model")
    result = train(toy_config(*toy, output))
    assert (result.step, result.output) == (6, output / "model")
    assert "6 of 6 steps are done" in capsys.readouterr().out
    assert_equal_weights(weights_of(output), weights_of(finished))
    assert log_lines(output) == log_lines(finished)


def test_other_settings_are_refused_until_overwrite_starts_anew(
    toy: tuple[Path, Path], finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(finished, output)
    (output / "notes.txt").write_text("mine")
    config = toy_config(*toy, output, "seed=5", "train.max_steps=1")
    with pytest.raises(CheckpointError, match=r"another run: .*seed: 0 -> 5") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert train(config, overwrite=True).step == 1
    assert len(log_lines(output)) == 1
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "eval_before.json").exists()


def test_overwrite_removes_nothing_where_the_new_run_cannot_start(
    toy: tuple[Path, Path], finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(finished, output)
    with pytest.raises(ValueError, match="longer than a row"):
        train(toy_config(*toy, output, "data.max_tokens_per_row=20"), overwrite=True)
    with pytest.raises(ValueError, match="over the model it starts from"):
        train(toy_config(output / "model", toy[1], output), overwrite=True)
    assert_equal_weights(weights_of(output), weights_of(finished))
    assert log_lines(output) == log_lines(finished)


def test_resume_without_a_checkpoint_and_resume_with_overwrite_are_refused(
    toy: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        train(toy_config(*toy, tmp_path), resume=True)
    with pytest.raises(ValueError, match="choose one"):
        train(toy_config(*toy, tmp_path), resume=True, overwrite=True)


def test_a_dry_run_shows_rows_steps_and_what_trains_and_writes_nothing(
    toy: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    describe(toy_config(*toy, tmp_path / "run", "method.freeze=[vision]"), world_size=2)
    shown = capsys.readouterr().out
    for part in ("rows", "6 of 4 samples", "3 an epoch", "trainable", "vision 0 of", "2 x cpu"):
        assert part in shown
    assert not (tmp_path / "run").exists()


def test_training_shows_no_progress_bars_and_warnings_of_libraries(
    toy: tuple[Path, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    train(toy_config(*toy, tmp_path, "method.name=lora", "train.max_steps=1", *LOGGED))
    assert capfd.readouterr().err == ""
    assert [str(warning.message) for warning in recwarn] == []
