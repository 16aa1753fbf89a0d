"""How long every sample's text is: counted once per data set and tokenizer, by all cores.

    counts = text_lengths(reader, chat)      # counts.num_tokens (N,), counts.num_label_tokens (N,)

A plan needs these numbers before the first step, and they only change with the data, the tokenizer
or the format of prompts. So they are stored under the hash of these three, in
`$XDG_CACHE_HOME/phi3v-train/text_lengths` or below `~/.cache`:

    | 8 bytes: xxh3-64 of the rest | 2 x N int32, little-endian: tokens, then tokens with loss |

A file that is damaged or of another size is made anew. Nothing but time is lost when it is deleted.
"""

import fcntl
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from phi3v_data.atomic import write_atomic
from phi3v_data.shards import ShardReader
from phi3v_data.worker_pool import num_cores, start_workers

from phi3v_train.chat import PROMPT_FORMAT_VERSION, ChatEncoder

CHUNK = 2048
"""Samples counted at once: enough for bulk tokenization, few enough for a bar that moves."""

WORTH_A_PROCESS = 16 * CHUNK
"""Samples behind every process: starting one costs a second."""

_HASH_BYTES = 8


@dataclass(frozen=True, slots=True, eq=False)
class TextCounts:
    """Tokens of every sample's text, its images left out; (N,) each."""

    num_tokens: NDArray[np.int64]
    num_label_tokens: NDArray[np.int64]
    """Those that carry loss."""


def text_lengths(
    reader: ShardReader,
    chat: ChatEncoder,
    *,
    cache_dir: Path | None = None,
    num_workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> TextCounts:
    """Count, or take what was counted before.

    Args:
        reader: of the data set.
        chat: the tokenizer's side.
        cache_dir: where counts are stored; none: the user's cache.
        num_workers: most processes; none: one a core. Few samples are counted in this one.
        on_progress: called with the number of samples counted so far.

    Raises:
        ValueError: a sample that cannot be encoded; the message names it.
    """
    path = (cache_dir or _cache_dir()) / f"{_key(reader, chat)}.bin"
    counts = _stored(path, len(reader))
    if counts is None:
        with _alone(path) as is_writable:
            counts = _stored(path, len(reader))  # another rank may have been first
            if counts is None:
                chunks = _counted(reader, chat, num_workers or num_cores(), on_progress)
                counts = np.concatenate([_NOTHING, *chunks], axis=1)
                if is_writable:
                    body = counts.astype("<i4").tobytes()
                    with suppress(OSError):  # a full disk is no reason not to train
                        write_atomic(path, xxhash.xxh3_64_digest(body) + body)
    if on_progress is not None:
        on_progress(len(reader))
    return TextCounts(counts[0], counts[1])


_NOTHING = np.zeros((2, 0), dtype=np.int64)


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "phi3v-train" / "text_lengths"


def _key(reader: ShardReader, chat: ChatEncoder) -> str:
    parts = (reader.fingerprint, chat.fingerprint, str(PROMPT_FORMAT_VERSION))
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())


# --- stored ---------------------------------------------------------------------------------------


def _stored(path: Path, count: int) -> NDArray[np.int64] | None:
    try:
        content = path.read_bytes()
    except OSError:  # none yet, or none that can be read
        return None
    head, body = content[:_HASH_BYTES], content[_HASH_BYTES:]
    if xxhash.xxh3_64_digest(body) != head or len(body) != 2 * count * 4:
        return None
    return np.frombuffer(body, dtype="<i4").reshape(2, count).astype(np.int64)


@contextmanager
def _alone(path: Path) -> Generator[bool, None, None]:
    """One process of this machine at a time; yields whether `path` can be written.

    Ranks that start together would all count the same. The lock goes with the process that has it.
    Where the folder cannot be written to, all count, and nothing is stored.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "wb")
    except OSError:
        yield False
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield True


# --- counted --------------------------------------------------------------------------------------


def _counted(
    reader: ShardReader,
    chat: ChatEncoder,
    num_workers: int,
    on_progress: Callable[[int], None] | None,
) -> Iterator[NDArray[np.int64]]:
    """(2, n) of one chunk after the other."""
    starts = range(0, len(reader), CHUNK)
    done = 0
    num_workers = min(num_workers, len(reader) // WORTH_A_PROCESS)
    chunks = (
        _in_processes(reader, chat, starts, num_workers)
        if num_workers > 1
        else (_count(reader, chat, start) for start in starts)
    )
    for counts in chunks:
        done += counts.shape[1]
        if on_progress is not None:
            on_progress(done)
        yield counts


def _count(reader: ShardReader, chat: ChatEncoder, start: int) -> NDArray[np.int64]:
    stop = min(start + CHUNK, len(reader))
    return chat.count_tokens([reader.sample(number) for number in range(start, stop)])


def _in_processes(
    reader: ShardReader, chat: ChatEncoder, starts: range, num_workers: int
) -> Iterator[NDArray[np.int64]]:
    # Spawned: this module is light (no torch), and a fork would come with the trainer's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_open, initargs=(reader, chat)
    ) as pool:
        start_workers(pool, num_workers)
        try:
            running: dict[int, Future[NDArray[np.int64]]] = {}
            ahead = iter(starts)
            for start in starts:
                while len(running) < 4 * num_workers and (more := next(ahead, None)) is not None:
                    running[more] = pool.submit(_count_opened, more)
                yield running.pop(start).result()
        except BrokenProcessPool:
            raise OSError(
                "a process that counted text lengths was killed; where memory ran out, free some "
                "and run the same command again"
            ) from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_opened: tuple[ShardReader, ChatEncoder] | None = None
"""In a worker: what it reads and counts with."""


def _open(reader: ShardReader, chat: ChatEncoder) -> None:
    global _opened
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _opened = (reader, chat)


def _count_opened(start: int) -> NDArray[np.int64]:
    assert _opened is not None
    return _count(*_opened, start)
