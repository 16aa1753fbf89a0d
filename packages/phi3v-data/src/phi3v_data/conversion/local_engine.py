"""Convert items in processes of this machine.

for outcome in run_local(task, items, num_workers=8):      # in any order
...
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing.connection import wait as wait_for_sentinel

from phi3v_data.conversion.item_task import ItemTask, Outcome, died
from phi3v_data.converters import Item
from phi3v_data.worker_pool import start_workers


def run_local(
    task: ItemTask, items: Iterable[Item], num_workers: int
) -> Generator[Outcome, None, None]:
    """Yield the outcomes as they come, in any order.

    Args:
        task: what to do with an item.
        items: taken when a worker is free, not before: a generator may end early.
        num_workers: processes; 0 converts in this one.

    Raises:
        OSError, MemoryError: the machine's trouble, of a worker.
        ValueError: the processes cannot start.
    """
    if num_workers == 0:
        for item in items:
            yield task(item)
        return
    waiting = iter(items)
    while (first := next(waiting, None)) is not None:
        lost: list[Item] = []
        yield from _run_pool(task, chain([first], waiting), num_workers, lost)
        # A process died and took the pool along. One of these killed it: one by one, it shows.
        suspects = iter(lost)
        while (suspect := next(suspects, None)) is not None:
            culprits: list[Item] = []
            yield from _run_pool(task, chain([suspect], suspects), 1, culprits, window=1)
            yield from map(died, culprits)


def _run_pool(
    task: ItemTask, waiting: Iterator[Item], num_workers: int, lost: list[Item], window: int = 4
) -> Iterator[Outcome]:
    """Work off `waiting` in one pool; if it breaks, put the items under way into `lost`.

    At most `window` items a worker are under way: enough to keep all busy, few to hold or lose.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        num_workers,
        # Neither this process's threads nor its memory: a fork of a process with threads may hang.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(task,),
    )
    running: dict[Future[Outcome], Item] = {}
    is_done = False
    try:
        start_workers(pool, num_workers)
        is_more = True
        while is_more or running:
            while is_more and len(running) < window * num_workers:
                item = next(waiting, None)
                if item is None:
                    is_more = False
                else:
                    lost.append(item)  # until it is submitted: a broken pool refuses
                    future = pool.submit(_work, item)
                    running[future] = lost.pop()
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                outcome = future.result()
                del running[future]
                yield outcome
        is_done = True
    except BrokenProcessPool:
        yield from _collect(running)
        lost.extend(running.values())
    except KeyboardInterrupt:
        yield from _collect(running)
        raise
    finally:
        if not is_done:  # what is half done is not waited for: its images have no final names
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
        pool.shutdown(cancel_futures=True)


def _collect(running: dict[Future[Outcome], Item]) -> Iterator[Outcome]:
    """Take out of `running` what is finished."""
    for future in list(running):
        if future.done() and not future.cancelled() and future.exception() is None:
            del running[future]
            yield future.result()


_TASK: list[ItemTask] = []
"""In a worker: what it does with an item; empty elsewhere."""


def _start_worker(task: ItemTask) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _TASK.append(task)


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_sentinel([parent.sentinel])
    os._exit(1)


def _work(item: Item) -> Outcome:
    return _TASK[0](item)
