"""Groups of processes that lose one, or are stopped."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from phi3v_train.checkpoint import checkpoint_folder, latest_checkpoint, read_state
from phi3v_train.elastic import describe_end
from phi3v_train.restarts import has_started, note_start
from phi3v_train.trainer import train

from tests.train.builders import log_lines, losses_of, toy_config, toy_overrides

PATIENCE_S = 300
LONG = ("train.num_epochs=7", "checkpoint.every_steps=3")
"""21 steps."""


def test_the_end_of_a_process_is_told_in_words() -> None:
    assert describe_end(3) == "ended with status 3"
    assert describe_end(-9) == "was killed by signal 9 (SIGKILL)"


def test_an_attempt_after_the_first_does_not_overwrite_what_that_did(tmp_path: Path) -> None:
    checkpoint_folder(tmp_path).mkdir()
    first = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0"}
    second = {**first, "TORCHELASTIC_RESTART_COUNT": "1"}
    assert not has_started(tmp_path, second)
    note_start(tmp_path, first)
    assert has_started(tmp_path, second)
    assert not has_started(tmp_path, first)
    assert not has_started(tmp_path, {**second, "TORCHELASTIC_RUN_ID": "b"})
    assert not has_started(tmp_path, {})


# --- real groups ----------------------------------------------------------------------------------


@contextmanager
def launched(overrides: list[str], *options: str) -> Iterator[subprocess.Popen[str]]:
    """A group started by `launch`; nothing of it outlives the block."""
    command = [sys.executable, "-m", "phi3v_train.cli", "launch", *options, *overrides]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            left = [*workers_of(process), *children(process.pid), process.pid]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            process.wait()


def children(pid: int) -> list[int]:
    listed = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(number) for text in listed for number in text.split()]


def workers_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes that train, below torchrun."""
    return [worker for torchrun in children(launcher.pid) for worker in children(torchrun)]


def is_running(pid: int) -> bool:
    """A process that ended and that nobody has asked about yet is not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not is_so():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)


def step_of(output: Path) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    checkpoint = latest_checkpoint(output)
    return 0 if checkpoint is None else read_state(checkpoint).step


@pytest.fixture(scope="module")
def losses(tiny: Path, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of a run of one process that was left alone."""
    output = tmp_path_factory.mktemp("runs") / "left alone"
    train(toy_config(tiny, toy_shards, output, *LONG))
    return losses_of(output)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [("--nproc", "2"), ()])
def test_a_run_that_lost_a_process_in_a_step_starts_again_from_the_newest_checkpoint(
    tiny: Path, toy_shards: Path, tmp_path: Path, losses: list[float], processes: tuple[str, ...]
) -> None:
    overrides = toy_overrides(tiny, toy_shards, tmp_path, *LONG)
    with launched(overrides, *processes, "--max_restarts", "1", "--overwrite") as process:
        wait_until(lambda: step_of(tmp_path) > 0, process)
        saved = step_of(tmp_path)
        wait_until(lambda: log_lines(tmp_path)[-1]["step"] > saved, process)
        os.kill(workers_of(process)[-1], signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    assert "going on from step-" in output
    assert [line["step"] for line in log_lines(tmp_path)] == list(range(1, 22))
    assert losses_of(tmp_path) == pytest.approx(losses, abs=1e-4)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_group_at_once(tiny: Path, toy_shards: Path, tmp_path: Path) -> None:
    with launched(toy_overrides(tiny, toy_shards, tmp_path, *LONG), "--nproc", "2") as process:
        wait_until(lambda: step_of(tmp_path) > 0, process)
        workers = workers_of(process)
        assert len(workers) == 2
        for worker in workers:  # as if their step took hours
            os.kill(worker, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert not any(map(is_running, workers))


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_another_engine_after_every_signal(
    tiny: Path, toy_shards: Path, tmp_path: Path, losses: list[float]
) -> None:
    """SIGTERM to two processes of DDP, SIGUSR1 to one alone, Ctrl-C to two of FSDP2, then one."""
    steps = [0]

    def stop_group(number: signal.Signals, engine: str) -> None:
        settings = (*LONG, f"parallel.engine={engine}")
        overrides = toy_overrides(tiny, toy_shards, tmp_path, *settings)
        with launched(overrides, "--nproc", "2") as process:
            wait_until(lambda: step_of(tmp_path) > steps[-1], process)
            process.send_signal(number)
            output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 128 + number, output
        assert "Traceback" not in output
        assert "run the same command again to go on" in output
        steps.append(step_of(tmp_path))

    def stop_one(number: signal.Signals) -> None:
        def watch() -> None:
            while step_of(tmp_path) == steps[-1]:
                time.sleep(0.01)
            os.kill(os.getpid(), number)

        watcher = threading.Thread(target=watch)
        watcher.start()
        result = train(toy_config(tiny, toy_shards, tmp_path, *LONG))
        watcher.join()
        assert result.exit_status == 128 + number
        steps.append(step_of(tmp_path))

    stop_group(signal.SIGTERM, "ddp")
    stop_one(signal.SIGUSR1)
    stop_group(signal.SIGINT, "fsdp2")
    assert steps == sorted(set(steps))
    assert steps[-1] < 21
    assert train(toy_config(tiny, toy_shards, tmp_path, *LONG)).exit_status == 0
    assert [line["step"] for line in log_lines(tmp_path)] == list(range(1, 22))
    assert losses_of(tmp_path) == pytest.approx(losses, abs=1e-4)
