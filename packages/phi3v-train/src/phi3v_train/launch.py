"""Start a training run: in this process, or as N processes through torchrun.

    launch("ucf101.yaml", ["seed=1"])             # trains here, on one device
    launch("ucf101.yaml", ["seed=1"], nproc=8)    # torchrun --nproc_per_node=8 ... launch ...

Under an existing torchrun (RANK, WORLD_SIZE and LOCAL_RANK are set) this process is one of many
and trains in place, so `torchrun --nnodes 2 ... -m phi3v_train.cli launch ucf101.yaml` works too.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from phi3v_train.config import ConfigError, TrainConfig, load_config

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def launch(
    config_path: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    nproc: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    max_restarts: int = 0,
) -> int:
    """Check the configuration, then train.

    Args:
        config_path: YAML file; none: the overrides alone.
        overrides: `dotted.key=value` each.
        nproc: processes on this machine, one per device; none or 1: this one.
        resume: there must be a checkpoint to go on from.
        overwrite: start anew, over what an earlier run left in the output folder.
        max_restarts: times all processes are started again after one of them failed; they go on
            from the newest checkpoint.

    Returns:
        Exit status: 0 when the run is finished, 128 + n when signal n ended it early, with a
        checkpoint saved; torchrun's where it failed.

    Raises:
        ConfigError: the configuration can't be used, or `nproc` doesn't fit it.
    """
    config = load_config(config_path, overrides)
    world_size = check_nproc(config, nproc, os.environ)
    if world_size is None:
        from phi3v_train.trainer import train

        return train(config, resume=resume, overwrite=overwrite).exit_status
    flags = [f"--{name}" for name, on in (("resume", resume), ("overwrite", overwrite)) if on]
    arguments = torchrun_command(
        world_size, config_path, overrides, flags, max_restarts=max_restarts
    )
    return run_forwarding_signals(arguments, worker_environment(os.environ, world_size))


def check_nproc(
    config: TrainConfig, nproc: int | None, environment: Mapping[str, str]
) -> int | None:
    """How many processes to start, or None where this one trains.

    Raises:
        ConfigError: `nproc` under torchrun, or more processes than samples in a step.
    """
    if nproc is None or nproc == 1:
        return None
    if under_torchrun(environment):
        raise ConfigError(
            f"--nproc {nproc} inside a process that torchrun started "
            f"(WORLD_SIZE={environment['WORLD_SIZE']}); leave --nproc out"
        )
    if nproc > config.train.global_batch_size:
        raise ConfigError(
            f"{nproc} processes share steps of {config.train.global_batch_size} samples: some "
            f"would idle; raise train.global_batch_size to at least {nproc}"
        )
    return nproc


def under_torchrun(environment: Mapping[str, str]) -> bool:
    """Is this process one of those that torchrun (or a launcher like it) started?"""
    return all(name in environment for name in _TORCHRUN_VARIABLES)


def torchrun_command(
    nproc: int,
    config_path: str | os.PathLike[str] | None,
    overrides: Sequence[str],
    flags: Sequence[str] = (),
    *,
    max_restarts: int = 0,
) -> list[str]:
    """The command line that runs `phi3v-train launch` in `nproc` processes."""
    return [
        sys.executable, "-m", "phi3v_train.elastic", "--standalone",
        f"--nproc_per_node={nproc}",
        f"--max_restarts={max_restarts}",
        # the default set, and the one by which batch systems announce the end of a job
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "-m", "phi3v_train.cli", "launch",
        *flags,
        "--",
        *([os.fspath(config_path)] if config_path is not None else []),
        *overrides,
    ]  # fmt: skip


def worker_environment(environment: Mapping[str, str], nproc: int) -> dict[str, str]:
    """The environment with the cores shared out, and time to save after a signal.

    torchrun alone would give each process one core and 30 seconds.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // nproc))
    return {
        "OMP_NUM_THREADS": threads,
        # torchrun kills after 30 seconds what was asked to end; a step and a save may take longer
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
        **environment,
    }


def run_forwarding_signals(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end, passing on the signals that ask for an orderly end.

    Returns:
        Its exit status; 128 + n where signal n was passed on or ended it, as a shell says it.
    """
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        if child is not None and child.poll() is None:
            child.send_signal(number)

    with _handling(forward, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)):
        # In a session of its own, so that Ctrl-C in a terminal reaches it once, through us.
        child = subprocess.Popen(arguments, env=dict(environment), start_new_session=True)
        for number in received:  # came while the child was being started
            child.send_signal(number)
        status = child.wait()
    if received:
        return 128 + received[0]
    return 128 - status if status < 0 else status


@contextmanager
def _handling(
    handler: Callable[[int, FrameType | None], Any], numbers: Sequence[int]
) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
