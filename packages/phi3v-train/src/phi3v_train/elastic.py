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

_TALKERS = "torch.distributed.elastic"


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with its command line.

    Returns:
        0, 1 where a worker failed for good, or 128 + n where signal n ended the run.
    """
    try:
        return _run(arguments)
    except KeyboardInterrupt:  # torchrun was not yet ready for it
        return 128 + signal.SIGINT


def _run(arguments: Sequence[str]) -> int:
    # Here, because it takes seconds in which Ctrl-C may come.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "LOGLEVEL" not in os.environ:  # which is torchrun's own
        _silence()
    try:
        run.main(list(arguments))
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.stderr.write(f"process {rank} {describe_end(failure.exitcode)}\n")
        return 1
    return 0


def _silence() -> None:
    """Warnings tell which worker got which signal when; errors are told in a line here."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(_TALKERS):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)


def describe_end(status: int) -> str:
    """How a process ended, from its exit status as `subprocess` has it."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by signal {-status} ({signal.Signals(-status).name})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
