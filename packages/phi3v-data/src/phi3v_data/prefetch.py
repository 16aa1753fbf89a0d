"""Fetching along a plan: what will be read next is in the cache when it is read.

    prefetcher = Prefetcher(fetch, publish, max_ahead_bytes)
    prefetcher.follow(pieces)           # an iterator, in order of use; threads start here
    prefetcher.reached(key)             # the reader is there
    prefetcher.close()

It takes the plan a window at a time, so that a plan may be as long as an epoch, and tells the
others who share the cache what is in the window.
"""

import logging
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from phi3v_data.published_plan import PublishedPlan
from phi3v_data.shard_format import FileEntry, ShardError
from phi3v_data.store_retries import Stopped

NUM_THREADS = 4
"""They wait for answers; more would take the connection from the reader that waits itself."""

WINDOW = 4096
"""Pieces of the plan that are known at a time; told to the others anew when half is done with."""

LATE = 64
"""A piece is given up for read when the reader is this many further: readers with threads get a
little out of order, and some rows may be skipped."""

_log = logging.getLogger(__name__)


class PlannedPiece(NamedTuple):
    """A piece that will be read."""

    key: str
    entry: FileEntry
    offset: int
    length: int


class Prefetcher:
    """See the module. Safe to use from many threads, of one process."""

    def __init__(
        self,
        fetch: Callable[[PlannedPiece], bool],
        publish: Callable[[Sequence[str]], PublishedPlan],
        max_ahead_bytes: int,
        num_threads: int = NUM_THREADS,
    ) -> None:
        """Nothing runs yet.

        Args:
            fetch: brings a piece into the cache; false where it finds no room.
            publish: tells the others the keys of the window.
            max_ahead_bytes: fetched and not yet read; one piece may be larger.
            num_threads: that fetch at once.
        """
        self._fetch = fetch
        self._publish = publish
        self._max_ahead_bytes = max_ahead_bytes
        self._num_threads = num_threads
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._published: PublishedPlan | None = None
        self._begin(iter(()))

    def follow(self, pieces: Iterator[PlannedPiece]) -> None:
        """Follow another plan from now on."""
        with self._changed:
            self._begin(pieces)
            self._refill()
            if self._window and not self._threads and not self._closed:
                for number in range(self._num_threads):
                    name = f"phi3v-prefetch-{number}"
                    thread = threading.Thread(target=self._work, name=name, daemon=True)
                    self._threads.append(thread)
                    thread.start()
            self._changed.notify_all()

    def reached(self, key: str) -> None:
        """The reader asks for this piece now; one that is not in the plan changes nothing."""
        with self._changed:
            positions = self._positions.get(key)
            if not positions:
                return
            position = positions.popleft()
            self._used.add(position)
            cursor = max(self._cursor, position - LATE)
            while cursor in self._used:
                cursor += 1
            while self._cursor < cursor:
                self._pass(self._cursor)
                self._cursor += 1
            if self._cursor - self._published_from > WINDOW // 2:
                self._refill()
            elif self._published is not None:
                self._published.move_to(self._cursor - self._published_from)
            self._changed.notify_all()

    def close(self, timeout_s: float = 30.0) -> None:
        """End the threads, waiting for the answers they wait for, and withdraw the plan."""
        self.stop()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s)

    def stop(self) -> None:
        """As `close`, but without waiting."""
        with self._changed:
            self._closed = True
            if self._published is not None:
                self._published.withdraw()
                self._published = None
            self._changed.notify_all()

    def _begin(self, pieces: Iterator[PlannedPiece]) -> None:
        self._source = pieces
        self._window: deque[PlannedPiece] = deque()
        self._published_from = 0
        """Position of the first of the window, and of the first key that was published."""
        self._cursor = 0
        """Position of the first piece that is still to be read."""
        self._taken = 0
        """Position of the first piece that no thread took yet."""
        self._positions: defaultdict[str, deque[int]] = defaultdict(deque)
        self._used: set[int] = set()
        self._ahead: Counter[str] = Counter()
        self._ahead_bytes = 0
        self._version = object()

    def _refill(self) -> None:
        while self._window and self._published_from < self._cursor:
            self._window.popleft()
            self._published_from += 1
        end = self._published_from + len(self._window)
        for piece in islice(self._source, WINDOW - len(self._window)):
            self._window.append(piece)
            self._positions[piece.key].append(end)
            end += 1
        if self._published is not None:
            self._published.withdraw()
            self._published = None
        if self._window and not self._closed:
            self._published = self._publish([piece.key for piece in self._window])

    def _pass(self, position: int) -> None:
        """The reader is beyond it."""
        self._used.discard(position)
        piece = self._window[position - self._published_from]
        positions = self._positions.get(piece.key)
        if positions and positions[0] == position:  # it was never asked for
            positions.popleft()
        if not positions:
            self._positions.pop(piece.key, None)
        if position < self._taken:
            self._ahead[piece.key] -= 1
            if not self._ahead[piece.key]:
                del self._ahead[piece.key]
                self._ahead_bytes -= piece.length
        else:
            self._taken = position + 1

    def _take(self) -> PlannedPiece | None:
        """The next piece to fetch; None while enough is ahead."""
        while self._taken < self._published_from + len(self._window):
            piece = self._window[self._taken - self._published_from]
            is_new = piece.key not in self._ahead
            fits = self._ahead_bytes + piece.length <= self._max_ahead_bytes
            if is_new and not fits and self._ahead:
                return None
            self._taken += 1
            self._ahead[piece.key] += 1
            if is_new:
                self._ahead_bytes += piece.length
                return piece
        return None

    def _work(self) -> None:
        while True:
            with self._changed:
                while (piece := None if self._closed else self._take()) is None:
                    if self._closed:
                        return
                    self._changed.wait()
                version, cursor = self._version, self._cursor
            while not self._try(piece):
                with self._changed:
                    while not self._closed and cursor == self._cursor and version is self._version:
                        self._changed.wait()
                    cursor = self._cursor
                    if self._closed:
                        return
                    if version is not self._version or piece.key not in self._ahead:
                        break  # the reader passed it

    def _try(self, piece: PlannedPiece) -> bool:
        """Whether there is nothing more to do for it now."""
        try:
            return self._fetch(piece)
        except Stopped:
            return True
        except (ShardError, OSError) as error:
            # The reader will ask for it, and be told the same, where somebody hears it.
            _log.warning("fetching ahead failed: %s", error)
            return False
