"""Processes that make rows ahead of the trainer, in order, bounded in bytes.

    requests = (Request(numbers, num_bytes) for ...)          # in the order of the plan
    with closing(rows_ahead(requests, encode, num_workers=2, max_bytes=512 << 20)) as rows:
        for row in rows:                                      # a Batch each, in that order
            ...

              one socket that all workers share
    trainer --- (7, [3, 90, 4]) --->  whichever worker is free takes it
            <-- (7, descriptor) ----  and hands its memory back: see shared_rows

The trainer asks for as many rows as `max_bytes` allow: those not yet handed out, whether made,
half made or waiting. A row that is larger than that is made alone. The kernel hands each request to
one worker, without a lock that a killed one could take along.

A worker's error arrives where its row would have; a worker that dies is an error at once. Workers
are deaf to Ctrl-C and friends, which reach the whole process group: the trainer decides what they
mean. They leave when their socket closes or their parent is gone.
"""

import gc
import mmap
import multiprocessing
import os
import signal
import socket
import struct
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize

import numpy as np
import torch

from phi3v_train.collator import Batch, EncodedSample
from phi3v_train.shared_rows import open_record, open_shared_row, share_failure, share_row

Encode = Callable[[Sequence[int]], Sequence[EncodedSample]]
"""Sample numbers to what a row is made of."""

MOST_ROWS_AHEAD = 256
"""However small they are: the kernel limits the descriptors under way."""

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
"""What a worker is deaf to."""

_LARGEST_REQUEST = 1 << 20
"""Bytes; four a sample."""

_LOOK_FOR_PARENT_S = 2.0
"""A parent that was killed closes its socket, unless another process inherited that."""

_LEAVE_S = 5.0
"""For a worker to finish the row it is at; then it is killed."""

_ANSWER = struct.Struct("<qqq")  # number of the request, 1 for a failure, bytes of the arrays
_IDLE = -1


@dataclass(frozen=True, slots=True)
class Request:
    """A row to be made."""

    numbers: tuple[int, ...]
    """Of its samples."""

    num_bytes: int
    """Size of the row when made."""


class WorkerDied(OSError):
    """A worker ended unasked. The message says how, and at which samples."""


def rows_ahead(
    requests: Iterable[Request], encode: Encode, *, num_workers: int, max_bytes: int
) -> Generator[Batch, None, None]:
    """Make rows in worker processes and yield them in the order of the requests.

    Close it where you leave early.

    Args:
        requests: read as far ahead as rows may be made.
        encode: runs in the workers.
        num_workers: processes, at least 1.
        max_bytes: of rows that are made or being made and not yet yielded.

    Raises:
        ValueError, OSError: `encode` raised it.
        WorkerDied: a worker was killed.
        RuntimeError: `encode` raised anything else; the message holds the worker's traceback.
    """
    workers = _Workers(encode, num_workers)
    try:
        yield from _in_order(workers, iter(requests), max_bytes)
    finally:
        workers.close()


def _in_order(
    workers: "_Workers", requests: Iterator[Request], max_bytes: int
) -> Generator[Batch, None, None]:
    ahead: deque[Request] = deque()  # asked for, in order; the first is the next to be yielded
    num_bytes = 0
    done: dict[int, Batch | Exception] = {}
    waiting = next(requests, None)
    first = 0  # the number of ahead[0]
    while True:
        while waiting is not None and (
            not ahead
            or (num_bytes + waiting.num_bytes <= max_bytes and len(ahead) < MOST_ROWS_AHEAD)
        ):
            if not workers.ask(first + len(ahead), waiting.numbers):
                break
            ahead.append(waiting)
            num_bytes += waiting.num_bytes
            waiting = next(requests, None)
        if not ahead:
            return
        while first not in done:
            number, row = workers.answer(first, ahead)
            done[number] = row
        row = done.pop(first)
        if isinstance(row, Exception):
            raise row
        num_bytes -= ahead.popleft().num_bytes
        first += 1
        yield row
        del row  # it is the trainer's alone while the next one is waited for


class _Workers:
    """The processes and the socket to them."""

    def __init__(self, encode: Encode, num_workers: int) -> None:
        assert num_workers > 0
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._socket, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LARGEST_REQUEST)
        self._at = mmap.mmap(-1, 8 * num_workers)  # shared: the request each worker is at
        at = np.frombuffer(self._at, dtype=np.int64)
        at[:] = _IDLE
        self._at_array = at
        # Forked, as torch's own loader does it: the encoder and the open shards come along without
        # being copied, and a worker is there in milliseconds. It never touches CUDA.
        context = multiprocessing.get_context("fork")
        self._processes: list[BaseProcess] = []
        # What is started now inherits the mask; a signal meanwhile is not lost: it waits.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for index in range(num_workers):
                arguments = (index, theirs, self._socket, at, encode, os.getpid())
                process = context.Process(
                    target=_work, args=arguments, name=f"phi3v-row-{index}", daemon=True
                )
                process.start()
                self._processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
            # At exit too, and before multiprocessing waits for its children.
            self.close = Finalize(self, _close, (self._socket, self._processes), exitpriority=100)

    def ask(self, number: int, samples: Sequence[int]) -> bool:
        """Put a request in the queue; False where that is full."""
        content = _ASK.pack(number) + np.array(samples, dtype=np.uint32).tobytes()
        try:
            self._socket.send(content, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):  # all are gone; `answer` says why
            return True
        return True

    def answer(self, first: int, ahead: Sequence[Request]) -> tuple[int, Batch | Exception]:
        """Wait for a row: (number of its request, the row or what came instead of it)."""
        sentinels = [process.sentinel for process in self._processes]
        ready = wait([self._socket, *sentinels])
        if self._socket not in ready:
            self._raise_death(first, ahead)
        content, handles, _, _ = socket.recv_fds(
            self._socket, _ANSWER.size, 1, socket.MSG_CMSG_CLOEXEC
        )
        if not content:
            self._raise_death(first, ahead)
        if not handles:
            raise OSError(
                "a row of a data worker could not be taken: this process has too many open "
                "files; raise its limit (ulimit -n)"
            )
        number, is_failure, num_bytes = _ANSWER.unpack(content)
        if is_failure:
            kind, message = open_record(handles[0])
            kinds: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": OSError}
            return number, kinds.get(kind, RuntimeError)(message)
        return number, open_shared_row(handles[0], num_bytes)

    def _raise_death(self, first: int, ahead: Sequence[Request]) -> None:
        dead = wait([process.sentinel for process in self._processes], timeout=_LEAVE_S)
        for index, process in enumerate(self._processes):
            if process.sentinel in dead:
                process.join()
                at = int(self._at_array[index])
                samples = ahead[at - first].numbers if first <= at < first + len(ahead) else ()
                raise WorkerDied(_death(process.exitcode, samples))
        raise AssertionError("the workers closed their socket and live on")


_ASK = struct.Struct("<q")


def _death(exitcode: int | None, samples: Sequence[int]) -> str:
    assert exitcode is not None
    how = f"ended with status {exitcode}"
    if exitcode < 0:
        how = f"was killed by {signal.Signals(-exitcode).name}"
    at = ""
    if samples:
        shown = ", ".join(map(str, samples[:5])) + (", ..." if len(samples) > 5 else "")
        at = f" while it made the row of samples number {shown}"
    advice = ""
    if exitcode == -signal.SIGKILL:
        advice = "; where memory ran out, lower data.num_workers or data.prefetch_mib"
    return f"a data worker {how}{at}{advice}"


def _close(ours: socket.socket, processes: list[BaseProcess]) -> None:
    """End the workers, whatever they are at."""
    ours.close()
    deadline = time.monotonic() + _LEAVE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


# --- in the worker --------------------------------------------------------------------------------


def _work(
    index: int,
    theirs: socket.socket,
    trainers: socket.socket,
    at: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    encode: Encode,
    parent: int,
) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    trainers.close()
    gc.freeze()  # what came along is the trainer's: it is not for a worker to collect
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    theirs.settimeout(_LOOK_FOR_PARENT_S)
    while request := _receive(theirs, parent):
        (number,) = _ASK.unpack_from(request)
        samples: list[int] = np.frombuffer(request, np.uint32, offset=_ASK.size).tolist()
        at[index] = number
        handle, num_bytes, is_failure = _make(encode, samples)
        is_sent = _send(theirs, _ANSWER.pack(number, is_failure, num_bytes), handle, parent)
        os.close(handle)
        at[index] = _IDLE
        if not is_sent:
            return


def _make(encode: Encode, samples: Sequence[int]) -> tuple[int, int, bool]:
    """(descriptor, bytes, whether it is a failure)."""
    try:
        return *share_row(encode(samples)), False
    except ValueError as error:
        return *share_failure(("ValueError", str(error))), True
    except OSError as error:
        return *share_failure(("OSError", str(error))), True
    except Exception:
        message = f"a data worker failed on samples number {samples}:\n{traceback.format_exc()}"
        return *share_failure(("RuntimeError", message)), True


def _receive(theirs: socket.socket, parent: int) -> bytes:
    """The next request; empty where there will be none."""
    while os.getppid() == parent:
        try:
            return theirs.recv(_LARGEST_REQUEST)
        except TimeoutError:
            continue
        except ConnectionResetError:
            break
    return b""


def _send(theirs: socket.socket, content: bytes, handle: int, parent: int) -> bool:
    """Hand a row over; False where nobody takes it any more."""
    while os.getppid() == parent:
        try:
            socket.send_fds(theirs, [content], [handle])
        except TimeoutError:  # the trainer is busy
            continue
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True
    return False
