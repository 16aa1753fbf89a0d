"""Forked processes that die at a chosen moment, as by `kill -9`: at no moment can they clean up.

    killed = run(work, Moment(cpu_seconds=0.7))     # after so much of its own computing
    killed = run(work, Moment(change=12))           # before its 12th change of a file or folder
    killed = run(work)                              # never

A fork has everything imported. Neither kind of moment is a time on the clock, so a busy machine
changes nothing: a process gets as far as on an idle one.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CHANGES = {
    "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate",
}  # fmt: skip
"""Audit events of Python that change a disk; `open` only if not for reading."""

PATIENCE_S = 300


@dataclass(frozen=True)
class Moment:
    """When a process dies; by default never."""

    cpu_seconds: float | None = None
    """Of its computing, in user and kernel mode."""
    change: int | None = None
    """Before which change of the disk, from 0."""


@dataclass(frozen=True)
class End:
    """How a process ended."""

    was_killed: bool
    num_changes: int
    """Of files and folders, that it made."""
    cpu_seconds: float
    """That it computed; known to a few milliseconds."""


def run(work: Callable[[], object], moment: Moment | None = None) -> End:
    """Do the work in a forked process, in one thread, until it is done or the moment has come."""
    moment = moment or Moment()
    fork = multiprocessing.get_context("fork")
    count = fork.RawValue("q", 0)

    def watch(name: str, arguments: tuple[object, ...]) -> None:
        # Opening to read changes nothing; flags 0 are O_RDONLY.
        if name not in CHANGES or (name == "open" and not arguments[2]):
            return
        if count.value == moment.change:
            os.kill(os.getpid(), signal.SIGKILL)
        count.value += 1

    def start() -> None:
        torch.set_num_threads(1)  # the threads of the one that forked did not come along
        sys.addaudithook(watch)
        work()

    process = fork.Process(target=start)
    process.start()
    assert process.pid is not None
    until = time.monotonic() + PATIENCE_S
    seconds, is_due = 0.0, False
    while process.is_alive() and not is_due:
        assert time.monotonic() < until, "the process did not end"
        process.join(0.002)
        seconds = _cpu_seconds(process.pid) or seconds
        is_due = moment.cpu_seconds is not None and seconds >= moment.cpu_seconds
    process.kill()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return End(process.exitcode != 0, count.value, seconds)


def _cpu_seconds(pid: int) -> float | None:
    """Computing of a process so far; None where it has ended."""
    clock = ~pid << 3 | 2  # as clock_getcpuclockid(3) makes it of a process
    try:
        return time.clock_gettime(clock)
    except OSError:
        return None
