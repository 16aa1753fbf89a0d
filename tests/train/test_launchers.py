"""`launch` in two processes, whoever starts them: the losses are those of one."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from phi3v_train.rank_place import SLURM, TORCHRUN
from phi3v_train.trainer import train

from tests.train.builders import losses_of, toy_config, toy_overrides

pytestmark = pytest.mark.slow  # a process imports for many seconds before its first step

LAUNCH = (sys.executable, "-m", "phi3v_train.cli", "launch")


@pytest.fixture(scope="module")
def expected(tiny: Path, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Six losses of one process."""
    output = tmp_path_factory.mktemp("runs") / "one"
    train(toy_config(tiny, toy_shards, output))
    return losses_of(output)


def free_ports(numbers: range) -> Iterator[int]:
    """Ports of this machine that nothing listens on."""
    for port in numbers:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


def run_together(commands: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> list[str]:
    """Run commands at the same time, each with its variables; what each said."""
    left_out = {*SLURM, *TORCHRUN, "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "OMP_NUM_THREADS": "1", **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        for command, more in commands
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def test_plain_torchrun_starts_the_processes(
    tiny: Path, toy_shards: Path, tmp_path: Path, expected: list[float]
) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    command = [*torchrun, "--nproc_per_node=2", *LAUNCH[1:]]
    (said,) = run_together([([*command, *toy_overrides(tiny, toy_shards, tmp_path / "two")], {})])
    assert "2 x cpu" in said
    assert losses_of(tmp_path / "two") == pytest.approx(expected, abs=1e-5)


def test_tasks_of_slurm_find_each_other(
    tiny: Path, toy_shards: Path, tmp_path: Path, expected: list[float]
) -> None:
    job = str(next(free_ports(range(20_000 + os.getpid() % 9_000, 30_000))))  # see rank_place
    command = [*LAUNCH, *toy_overrides(tiny, toy_shards, tmp_path / "two")]
    tasks = [
        {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NTASKS": "2",
            "SLURM_NNODES": "1",
            "SLURM_JOB_ID": job,
        }
        for rank in (0, 1)
    ]
    first, second = run_together([(command, task) for task in tasks])
    assert "2 x cpu" in first
    assert "step" not in second  # the first alone speaks
    assert losses_of(tmp_path / "two") == pytest.approx(expected, abs=1e-5)


def test_two_machines_meet_at_the_address_that_both_are_given(
    tiny: Path, toy_shards: Path, tmp_path: Path, expected: list[float]
) -> None:
    port = next(free_ports(range(30_000 + os.getpid() % 2_000, 32_768)))
    meeting = ("--nnodes", "2", "--rdzv_endpoint", f"127.0.0.1:{port}", "--nproc", "1")
    overrides = toy_overrides(tiny, toy_shards, tmp_path / "two")
    said = run_together(
        [([*LAUNCH, *meeting, "--node_rank", rank, *overrides], {}) for rank in ("0", "1")]
    )
    assert sum("2 x cpu" in text for text in said) == 1
    assert losses_of(tmp_path / "two") == pytest.approx(expected, abs=1e-5)
