"""Runs that are killed again and again come to the same end as one that was left alone."""

import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from phi3v_train.checkpoint import latest_checkpoint, read_state
from phi3v_train.trainer import train
from torch import Tensor

from tests.train.builders import log_lines, toy_config, weights_of

SETTINGS = ("checkpoint.every_steps=1", "log.report=false", "log.tensorboard=false")


def attempt(model: Path, shards: Path, output: Path, num_epochs: int) -> None:
    """What a process of the run does."""
    torch.set_num_threads(1)
    train(toy_config(model, shards, output, f"train.num_epochs={num_epochs}", *SETTINGS))


def run(arguments: tuple[Path, Path, Path, int], kill_after: float | None = None) -> bool:
    """Run a process to its end, or kill it after so many seconds; whether it was killed."""
    # A fork has everything imported. It computes in one thread: the others did not come along.
    process = multiprocessing.get_context("fork").Process(target=attempt, args=arguments)
    process.start()
    process.join(120 if kill_after is None else kill_after)
    was_running = process.is_alive()
    process.kill()
    process.join(60)
    if kill_after is None:
        assert not was_running, "the run did not end in two minutes"
    assert was_running or process.exitcode == 0, process.exitcode
    return was_running


def facts(output: Path) -> list[dict[str, Any]]:
    """What each step was: equal where it saw the same samples with the same weights."""
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate", "label_tokens")
    return [{name: line[name] for name in names} for line in log_lines(output)]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def kill_and_compare(
    tiny: Path, shards: Path, folder: Path, *, num_kills: int, num_epochs: int, seed: int
) -> None:
    left_alone, killed = folder / "left alone", folder / "killed"
    run((tiny, shards, left_alone, num_epochs))
    started = time.monotonic()
    run((tiny, shards, folder / "timed", num_epochs))
    seconds = time.monotonic() - started

    moments = random.Random(seed)
    reached: list[int] = []
    kills = 0
    while kills < num_kills:
        kills += run((tiny, shards, killed, num_epochs), moments.uniform(0, seconds * 0.7))
        checkpoint = latest_checkpoint(killed)
        reached.append(0 if checkpoint is None else read_state(checkpoint).step)
    assert reached == sorted(reached), "a run went back behind a checkpoint"
    assert reached[-1] > 0
    run((tiny, shards, killed, num_epochs))

    assert [fact["step"] for fact in facts(killed)] == list(range(1, 3 * num_epochs + 1))
    assert facts(killed) == facts(left_alone)
    assert_equal(weights_of(killed), weights_of(left_alone))
    names = {path.name for path in (killed / "checkpoints").iterdir()}
    newest = 3 * num_epochs
    assert names == {"latest", f"step-{newest - 1:08d}", f"step-{newest:08d}"}


def test_a_run_killed_three_times_ends_as_one_that_was_left_alone(
    tiny: Path, toy_shards: Path, tmp_path: Path
) -> None:
    kill_and_compare(tiny, toy_shards, tmp_path, num_kills=3, num_epochs=2, seed=0)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_killed_ten_times_ends_as_one_that_was_left_alone(
    tiny: Path, toy_shards: Path, tmp_path: Path
) -> None:
    kill_and_compare(tiny, toy_shards, tmp_path, num_kills=10, num_epochs=4, seed=1)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_killed_fifty_times_ends_as_one_that_was_left_alone(
    tiny: Path, toy_shards: Path, tmp_path: Path
) -> None:
    kill_and_compare(tiny, toy_shards, tmp_path, num_kills=50, num_epochs=12, seed=2)
