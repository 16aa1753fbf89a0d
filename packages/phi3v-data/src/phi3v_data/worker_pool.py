"""Processes that leave Ctrl-C to the one that started them.

    with ProcessPoolExecutor(2, mp_context=...) as pool:
        start_workers(pool, 2)

A terminal sends Ctrl-C to the whole group: workers that died of it would break the pool, and write
tracebacks between the lines of whoever answers.
"""

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool


def start_workers(pool: ProcessPoolExecutor, num_workers: int) -> None:
    """Start all processes of a pool, deaf to Ctrl-C.

    Raises:
        ValueError: they cannot start.
    """
    # What is started now inherits the mask. A Ctrl-C meanwhile is not lost: it waits.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        ready = [pool.submit(_nothing) for _ in range(num_workers)]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        for future in ready:
            future.result()
    except BrokenProcessPool:
        raise ValueError(
            "the worker processes cannot start; see their error above. A script that starts "
            'them needs `if __name__ == "__main__":` around the call, or num_workers of 0 or 1'
        ) from None


def num_cores() -> int:
    """Cores that this process may use: not always all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _nothing() -> None:
    """What a started worker does first."""
