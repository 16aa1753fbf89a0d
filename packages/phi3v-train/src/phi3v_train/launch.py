"""Start a training run: in this process, or as N processes through torchrun.

    launch("ucf101.yaml", ["seed=1"])             # trains here, on one device
    launch("ucf101.yaml", ["seed=1"], nproc=8)    # torchrun --nproc_per_node=8 ... launch ...
    launch("ucf101.yaml", max_restarts=3)         # torchrun too: it starts a failed process again
    launch("ucf101.yaml", nproc=8, nnodes=2, node_rank=0, rdzv_endpoint="host0:29400")

Under an existing torchrun, or as one of several tasks of Slurm, this process is one of many and
trains in place, so `torchrun --nnodes 2 ... -m phi3v_train.cli launch ucf101.yaml` and
`srun phi3v-train launch ucf101.yaml` work too; see `rank_place`.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from phi3v_train.config import ConfigError, TrainConfig, load_config
from phi3v_train.rank_place import rank_place


@dataclass(frozen=True, slots=True)
class Crew:
    """The processes that share a run, where we start them."""

    nproc: int
    """On this machine, one per device."""
    nnodes: int = 1
    """Machines; the same command is started on each."""
    node_rank: int | None = None
    """Which machine this is, from 0; 0 keeps the list of who has come."""
    rdzv_endpoint: str | None = None
    """Where machine 0 listens, `host:port`."""

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.nproc * self.nnodes


def launch(
    config_path: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    nproc: int | None = None,
    nnodes: int = 1,
    node_rank: int | None = None,
    rdzv_endpoint: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    max_restarts: int = 0,
) -> int:
    """Check the configuration, then train.

    Args:
        config_path: YAML file; none: the overrides alone.
        overrides: `dotted.key=value` each.
        nproc: processes on this machine, one per device; none or 1: this one.
        nnodes: machines; the same call is made on each.
        node_rank: which machine this is, from 0.
        rdzv_endpoint: `host:port` of machine 0, where they meet.
        resume: there must be a checkpoint to go on from.
        overwrite: start anew, over what an earlier run left in the output folder.
        max_restarts: times all processes are started again after one of them failed; they go on
            from the newest checkpoint.

    Returns:
        Exit status: 0 when the run is finished, 128 + n when signal n ended it early, with a
        checkpoint saved; torchrun's where it failed.

    Raises:
        ConfigError: the configuration can't be used, or the processes don't fit it.
    """
    config = load_config(config_path, overrides)
    crew = check_crew(
        config,
        os.environ,
        nproc=nproc,
        nnodes=nnodes,
        node_rank=node_rank,
        rdzv_endpoint=rdzv_endpoint,
        max_restarts=max_restarts,
    )
    if crew is None:
        from phi3v_train.trainer import train

        return train(config, resume=resume, overwrite=overwrite).exit_status
    flags = [f"--{name}" for name, on in (("resume", resume), ("overwrite", overwrite)) if on]
    arguments = torchrun_command(crew, config_path, overrides, flags, max_restarts=max_restarts)
    return run_forwarding_signals(arguments, worker_environment(os.environ, crew.nproc))


def check_crew(
    config: TrainConfig,
    environment: Mapping[str, str],
    *,
    nproc: int | None = None,
    nnodes: int = 1,
    node_rank: int | None = None,
    rdzv_endpoint: str | None = None,
    max_restarts: int = 0,
) -> Crew | None:
    """Which processes to start, or None where this one trains.

    A single one is started too where it may have to be started again.

    Raises:
        ConfigError: wishes that contradict each other or the launcher we are under, or more
            processes than samples in a step.
    """
    if nnodes == 1 and (node_rank is not None or rdzv_endpoint is not None):
        raise ConfigError("--node_rank and --rdzv_endpoint are for many machines; add --nnodes")
    crew = Crew(nproc or 1, nnodes, node_rank, rdzv_endpoint)
    if nnodes > 1:
        if rdzv_endpoint is None:
            raise ConfigError(
                f"--nnodes {nnodes} needs --rdzv_endpoint HOST:PORT, the same on every machine: a "
                "free port of one of them"
            )
        if not rdzv_endpoint.rpartition(":")[0] or not rdzv_endpoint.rpartition(":")[2].isdigit():
            raise ConfigError(f"--rdzv_endpoint: expected HOST:PORT, got {rdzv_endpoint!r}")
        if node_rank is not None and node_rank >= nnodes:
            raise ConfigError(
                f"--node_rank {node_rank} with --nnodes {nnodes}; machines are numbered 0 to "
                f"{nnodes - 1}"
            )
    place = rank_place(environment)
    # A task of Slurm per machine may start the processes of that machine.
    is_task_per_node = place.launcher == "Slurm" and place.world_size == nnodes
    if crew.world_size > 1 and place.launcher is not None and not is_task_per_node:
        given = f"--nproc {crew.nproc}" if nnodes == 1 else f"--nnodes {nnodes}"
        name = "WORLD_SIZE" if place.launcher == "torchrun" else "SLURM_NTASKS"
        raise ConfigError(
            f"{given} inside a process that {place.launcher} started "
            f"({name}={place.world_size}); leave {given.split()[0]} out"
        )
    if max_restarts and place.launcher is not None and not is_task_per_node:
        ways = {
            "torchrun": "give torchrun its own --max_restarts",
            "Slurm": "start one task per machine, with --nproc and --nnodes",
        }
        raise ConfigError(
            f"--max_restarts {max_restarts} inside a process that {place.launcher} started: only "
            f"what it starts itself can it start again; {ways[place.launcher]}"
        )
    world_size = max(crew.world_size, place.world_size)
    if world_size > config.train.global_batch_size:
        raise ConfigError(
            f"{world_size} processes share steps of {config.train.global_batch_size} samples: some "
            f"would idle; raise train.global_batch_size to at least {world_size}"
        )
    return crew if crew.world_size > 1 or max_restarts else None


def torchrun_command(
    crew: Crew,
    config_path: str | os.PathLike[str] | None,
    overrides: Sequence[str],
    flags: Sequence[str] = (),
    *,
    max_restarts: int = 0,
) -> list[str]:
    """The command line that runs `phi3v-train launch` in the processes of this machine."""
    return [
        sys.executable, "-m", "phi3v_train.elastic",
        *_rendezvous(crew),
        f"--nproc_per_node={crew.nproc}",
        f"--max_restarts={max_restarts}",
        # the default set, and the one by which batch systems announce the end of a job
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "-m", "phi3v_train.cli", "launch",
        *flags,
        "--",
        *([os.fspath(config_path)] if config_path is not None else []),
        *overrides,
    ]  # fmt: skip


def _rendezvous(crew: Crew) -> list[str]:
    if crew.nnodes == 1:
        return ["--standalone"]
    assert crew.rdzv_endpoint is not None
    options = [
        f"--nnodes={crew.nnodes}",
        "--rdzv_backend=c10d",  # the one that takes machines back after a restart
        f"--rdzv_endpoint={crew.rdzv_endpoint}",
        "--rdzv_id=phi3v-train",
    ]
    if crew.node_rank is not None:
        options.append(f"--rdzv_conf=is_host={int(crew.node_rank == 0)}")
    if crew.rdzv_endpoint.rpartition(":")[0] in ("localhost", "127.0.0.1"):
        options.append("--local_addr=127.0.0.1")  # else by its name, which others may not know
    return options


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

    A second Ctrl-C kills it and the processes that it started, each with its own group: torchrun
    would go on waiting for them.

    Returns:
        Its exit status; 128 + n where signal n was passed on or ended it, as a shell says it.
    """
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: FrameType | None) -> None:
        is_impatient = bool(received) and number == signal.SIGINT
        received.append(number)
        if child is None or child.poll() is not None:
            return
        if is_impatient:
            _kill_with_children(child)
        else:
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


def _kill_with_children(process: subprocess.Popen[bytes]) -> None:
    listed = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/children")]
    process.kill()  # first, so that it starts no others
    for pid in (int(number) for text in listed for number in text.split()):
        with suppress(ProcessLookupError):
            is_leader = os.getpgid(pid) == pid  # as torchrun's are: their own children go too
            os.killpg(pid, signal.SIGKILL) if is_leader else os.kill(pid, signal.SIGKILL)


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
