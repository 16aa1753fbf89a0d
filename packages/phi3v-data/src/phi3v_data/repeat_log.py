"""Hashes of millions of samples, and which of them occur twice, in little memory.

    with RepeatLog() as log:
        log.add(file=0, lines=np.array([1, 2]), hashes=np.array([7, 8]))
        log.add(file=1, lines=np.array([1]), hashes=np.array([8]))
        list(log.repeats())      # [Place(file=1, line=1), Place(file=0, line=2))]

Sixteen bytes an entry. The first `MEMORY_ENTRIES` stay in memory; more go to a temporary folder,
into files by the first bits of their hash, so that equal ones meet in a file that can be sorted in
memory. Fifty million entries are 800 MB on disk and 13 MB a file.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]

MEMORY_ENTRIES = 1 << 19
"""Held in memory, eight megabytes; when there are more, all of them go to disk."""

BUCKET_BITS = 6

_LINE_BITS = 44
"""Of a place; above them is the number of the file."""


class Place(NamedTuple):
    """A line of a file."""

    file: int
    line: int


class RepeatLog:
    """Takes hashes with their places; says which places repeat the hash of an earlier one."""

    def __init__(self, memory_entries: int = MEMORY_ENTRIES) -> None:
        self.num_entries = 0
        self._memory_entries = memory_entries
        self._waiting: list[np.ndarray[Any, np.dtype[np.uint64]]] = []
        self._num_waiting = 0
        self._stack = ExitStack()
        self._buckets: list[Any] = []

    def __enter__(self) -> "RepeatLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, file: int, lines: Numbers, hashes: Hashes) -> None:
        """Note the hashes of some lines. Places must come in ascending order.

        Raises:
            OSError: the temporary folder is full.
        """
        if not len(lines):
            return
        entries = np.empty((len(lines), 2), dtype=np.uint64)
        entries[:, 0] = hashes
        entries[:, 1] = lines
        entries[:, 1] |= np.uint64(file << _LINE_BITS)
        self._waiting.append(entries)
        self.num_entries += len(lines)
        self._num_waiting += len(lines)
        if self._num_waiting >= self._memory_entries:
            self._spill()

    def repeats(self) -> Iterator[tuple[Place, Place]]:
        """Yield (place, first place with the same hash) of every place but first ones, in order."""
        pairs = np.concatenate([_NO_PAIRS, *(_pairs(part) for part in self._parts())])
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        for start in range(0, len(pairs), 4096):
            for again, first in pairs[start : start + 4096].tolist():
                yield _place(again), _place(first)

    def _parts(self) -> Iterator[np.ndarray[Any, np.dtype[np.uint64]]]:
        """The entries, equal hashes in one part, in the order they came."""
        if not self._buckets:
            if self._waiting:
                yield np.concatenate(self._waiting)
            return
        self._spill()
        for bucket in self._buckets:
            bucket.flush()
            bucket.seek(0)
            yield np.fromfile(bucket, dtype=np.uint64).reshape(-1, 2)

    def _spill(self) -> None:
        if not self._waiting:
            return
        if not self._buckets:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="phi3v-data-"))
            for number in range(1 << BUCKET_BITS):
                path = os.path.join(folder, str(number))
                self._buckets.append(self._stack.enter_context(open(path, "w+b", buffering=0)))
        entries = np.concatenate(self._waiting)
        self._waiting, self._num_waiting = [], 0
        of_bucket = (entries[:, 0] >> np.uint64(64 - BUCKET_BITS)).astype(np.uint8)
        order = np.argsort(of_bucket, kind="stable")  # of bytes: a radix sort
        bounds = np.searchsorted(of_bucket[order], np.arange((1 << BUCKET_BITS) + 1))
        entries = entries[order]
        for number, bucket in enumerate(self._buckets):
            part = entries[bounds[number] : bounds[number + 1]]
            if len(part):
                bucket.write(part.tobytes())


_NO_PAIRS = np.empty((0, 2), dtype=np.uint64)


def _pairs(entries: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """(place, first place) of the entries whose hash an earlier one has; (repeats, 2)."""
    ordered = np.sort(entries[:, 0])  # ten times faster than sorting places along: mostly enough
    if len(entries) < 2 or (ordered[1:] != ordered[:-1]).all():
        return _NO_PAIRS
    order = np.argsort(entries[:, 0], kind="stable")
    hashes, places = entries[order, 0], entries[order, 1]
    is_first = np.ones(len(hashes), dtype=bool)
    is_first[1:] = hashes[1:] != hashes[:-1]
    if is_first.all():
        return _NO_PAIRS
    firsts = places[np.maximum.accumulate(np.where(is_first, np.arange(len(places)), 0))]
    return np.column_stack([places, firsts])[~is_first]


def _place(packed: int) -> Place:
    return Place(packed >> _LINE_BITS, packed & ((1 << _LINE_BITS) - 1))
