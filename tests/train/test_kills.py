"""Runs that are killed again and again come to the same end as one that was left alone."""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from phi3v_train.checkpoint import latest_checkpoint, read_state
from phi3v_train.trainer import train

from tests.train.builders import log_lines, toy_config, weights_of
from tests.train.kills import Moment, run


def facts(output: Path) -> list[dict[str, Any]]:
    """What each step was: equal where it saw the same samples with the same weights."""
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate", "label_tokens")
    return [{name: line[name] for name in names} for line in log_lines(output)]


def kill_and_compare(
    tiny: Path, shards: Path, folder: Path, *, num_kills: int, seed: int, more: Sequence[str] = ()
) -> None:
    """Kill a run at random moments of its attempts until it was killed so often.

    Half of the moments are drawn from what an attempt of three steps computes, half from the
    changes that it makes to the disk: so imports apart, every part of an attempt has its share.
    """
    num_steps = num_kills + 2

    def attempt(output: Path, max_steps: int = num_steps) -> None:
        settings = (f"train.max_steps={max_steps}", "train.global_batch_size=2")
        saving = ("checkpoint.every_steps=1", *more)
        train(toy_config(tiny, shards, output, *settings, *saving))

    left_alone, killed = folder / "left alone", folder / "killed"
    run(partial(attempt, left_alone))
    whole = run(partial(attempt, folder / "measured", 3))

    draw = random.Random(seed)
    reached: list[int] = []
    kills = attempts = in_saves = 0
    while kills < num_kills:
        if attempts % 2:
            moment = Moment(change=draw.randrange(whole.num_changes))
        else:
            moment = Moment(cpu_seconds=draw.uniform(0, whole.cpu_seconds))
        attempts += 1
        kills += run(partial(attempt, killed), moment).was_killed
        in_saves += any((killed / "checkpoints").glob("*.tmp"))
        checkpoint = latest_checkpoint(killed)
        reached.append(0 if checkpoint is None else read_state(checkpoint).step)
    assert reached == sorted(reached), "a run went back behind a checkpoint"
    # The moments are to meet a run in many states.
    assert len(set(reached)) > num_kills // 4
    assert in_saves >= num_kills // 10
    assert not run(partial(attempt, killed)).was_killed

    assert [fact["step"] for fact in facts(killed)] == list(range(1, num_steps + 1))
    assert facts(killed) == facts(left_alone)
    found, expected = weights_of(killed), weights_of(left_alone)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name in ("best", "latest", "../eval/history.jsonl"):
        paths = [output / "checkpoints" / name for output in (killed, left_alone)]
        assert paths[0].exists() == paths[1].exists()
        if paths[0].exists():
            assert paths[0].read_text() == paths[1].read_text()
    names = [
        sorted(path.name for path in (output / "checkpoints").iterdir())
        for output in (killed, left_alone)
    ]
    assert names[0] == names[1]


def test_a_run_killed_ten_times_ends_as_one_that_was_left_alone(
    tiny: Path, toy_shards: Path, tmp_path: Path
) -> None:
    kill_and_compare(tiny, toy_shards, tmp_path, num_kills=10, seed=0)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_killed_fifty_times_keeps_its_best_checkpoint_too(
    tiny: Path, toy_shards: Path, tmp_path: Path
) -> None:
    measured = (f"data.eval={toy_shards}", "eval.every_steps=2", "eval.limit=2", "eval.after=false")
    kill_and_compare(tiny, toy_shards, tmp_path, num_kills=50, seed=1, more=measured)
