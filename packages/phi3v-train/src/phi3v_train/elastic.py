"""torchrun, whose ends are told in a line instead of a traceback.

    python -m phi3v_train.elastic --standalone --nproc_per_node=2 -m phi3v_train.cli launch …

    process 1 was killed by signal 9 (SIGKILL)         a worker failed, restarts are used up: 1
                                                        stopped by signal n: 128 + n

Workers say themselves what happened to them; what torchrun adds is where it itself was at the time.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with its command line.

    Returns:
        0, 1 where a worker failed for good, or 128 + n where signal n ended the run.
    """
    # Its warnings tell which worker got which signal when; errors are told below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main(list(arguments))
    except SignalException as error:
        # A second Ctrl-C takes torchrun out of its wait for the workers.
        for worker in _children():
            os.killpg(worker, signal.SIGKILL)
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.stderr.write(f"process {rank} {describe_end(failure.exitcode)}\n")
        return 1
    return 0


def describe_end(status: int) -> str:
    """How a process ended, from its exit status as `subprocess` has it."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by signal {-status} ({signal.Signals(-status).name})"


def _children() -> list[int]:
    """Processes that this one started; each leads a process group of its own."""
    listed = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return [int(number) for text in listed for number in text.split()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
