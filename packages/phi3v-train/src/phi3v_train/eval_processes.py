"""Evaluation in several processes of this machine, one a device, through torchrun.

run_eval_processes(8, {"model": Path("runs/a/model"), "data": Path("shards/val"), "limit": None})

# python -m phi3v_train.elastic --standalone --nproc_per_node=8 -m phi3v_train.cli eval ...
"""

import os
import sys
from collections.abc import Mapping

from phi3v_train.launch import run_forwarding_signals, worker_environment
from phi3v_train.rank_place import rank_place


def eval_command_line(nproc: int, options: Mapping[str, object]) -> list[str]:
    """The command line that runs `phi3v-train eval` with these options in `nproc` processes.

    Args:
        nproc: how many.
        options: by name; None: not given.
    """
    given = {name: str(value) for name, value in options.items() if value is not None}
    return [
        sys.executable, "-m", "phi3v_train.elastic", "--standalone",
        f"--nproc_per_node={nproc}",
        "-m", "phi3v_train.cli", "eval",
        *[f"--{name}={value}" for name, value in given.items()],
    ]  # fmt: skip


def run_eval_processes(nproc: int, options: Mapping[str, object]) -> int:
    """Run them to their end; their exit status.

    Raises:
        ValueError: this process is itself one of many.
    """
    place = rank_place(os.environ)
    if place.launcher is not None:
        raise ValueError(
            f"--nproc {nproc} inside a process that {place.launcher} started; leave --nproc out"
        )
    command = eval_command_line(nproc, options)
    return run_forwarding_signals(command, worker_environment(os.environ, nproc))
