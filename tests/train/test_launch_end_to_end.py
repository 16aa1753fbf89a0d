import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from phi3v_train.checkpoint import latest_checkpoint, read_state
from phi3v_train.trainer import train

from tests.train.builders import losses_of, toy_config, toy_overrides, weights_of

pytestmark = pytest.mark.slow  # a process imports for many seconds before its first step

LONG = ("train.num_epochs=10", "checkpoint.every_steps=3")


def start(overrides: list[str], *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "phi3v_train.cli", "launch", *options, *overrides]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"{path.name} did not come in a minute")


@pytest.fixture(scope="module")
def uninterrupted(
    tiny: Path, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(toy_config(tiny, toy_shards, output, *LONG))
    return weights_of(output)


@pytest.mark.long
def test_two_processes_give_the_losses_of_one(tiny: Path, toy_shards: Path, tmp_path: Path) -> None:
    process = start(toy_overrides(tiny, toy_shards, tmp_path / "two"), "--nproc", "2")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    train(toy_config(tiny, toy_shards, tmp_path / "one"))
    assert len(losses_of(tmp_path / "two")) == 6
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    tiny: Path,
    toy_shards: Path,
    tmp_path: Path,
    uninterrupted: dict[str, torch.Tensor],
    number: signal.Signals,
) -> None:
    process = start(toy_overrides(tiny, toy_shards, tmp_path, *LONG))
    wait_for(tmp_path / "checkpoints" / "latest", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    step = read_state(checkpoint).step
    assert 3 <= step < 30
    if number == signal.SIGINT:
        assert process.returncode == 130, output
        assert f"stopped after {step} of 30 steps; run the same command again" in output
    else:
        assert process.returncode == -signal.SIGKILL
    train(toy_config(tiny, toy_shards, tmp_path, *LONG))
    found = weights_of(tmp_path)
    assert found.keys() == uninterrupted.keys()
    assert all(torch.equal(found[name], uninterrupted[name]) for name in found)
    assert len(losses_of(tmp_path)) == 30
