"""What is known of images that did not change since they were last checked.

    with open_cache("deep") as cache:
        check_image(root, path, "deep", cache)     # looked at, and noted
        check_image(root, path, "deep", cache)     # from the cache

One SQLite file for all data sets of a user, `images.sqlite3` in `$XDG_CACHE_HOME/phi3v-data` or
`~/.cache/phi3v-data`. An entry is found by level and real path, and sealed with a hash of these, of
the file's size and times of change (nanoseconds; of content and of state, so that a copy under an
old date is noticed), of the versions of the checks and of Pillow, and of what was found. Unless all
of it is the same, the file is looked at again; so a damaged entry is not believed either. A damaged
cache is replaced by an empty one. Several processes may use it at once, each with an `open_cache`
of its own. Nothing but time is lost when it is deleted.
"""

import os
import sqlite3
import stat
import struct
import threading
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import astuple
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from phi3v_data.image_check import ImageCheck, Level
from phi3v_data.image_header import image_info

CHECKS_VERSION = 2
"""Raised with every change of `image_check`, `image_header` or `images` that changes a verdict."""

BATCH = 512
"""Entries written at once."""

FRESH_NS = 2_000_000_000
"""A file that changed less than this before it was checked is not noted: it could change once more
within the same tick of the disk's clock, and nothing would tell."""

MOST_AHEAD = 256
"""Entries read at once."""

MAX_BYTES = 2 << 30
"""A cache file that is larger starts anew: 250 bytes an image, so some eight million of them."""

_WAIT_S = 10
"""For another process that is writing."""


class _Entry(msgspec.Struct, array_like=True, frozen=True):
    """What is stored of a check."""

    kind: str
    problem: str
    cause: str
    num_bytes: int
    xxh3_64: int
    info: tuple[int, int, str, str, int, int, bool, bool] | None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Entry).decode


class CheckCache:
    """Checks of one level; made by `open_cache`. Threads may share it, processes may not."""

    def __init__(self, path: Path | None, level: Level, problem: str = "") -> None:
        self.path = path
        """The file; None where nothing is stored."""
        self.problem = problem
        """Why nothing is stored, for people; empty where all is well."""
        self.num_hits = 0
        self._prefix = f"{level}\0".encode()
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()
        self._pending: dict[bytes, bytes] = {}
        self._forget_ahead()
        if path is not None:
            self._reopen()

    def get(self, path: str, status: os.stat_result) -> ImageCheck | None:
        """What is known of the file at `path`, with no links in it, while `status` is its state."""
        if self._connection is None:
            return None
        key = self._prefix + path.encode("utf-8", "surrogateescape")
        with self._lock:
            try:
                value = self._find(key)
            except sqlite3.DatabaseError as error:
                self._recover(error)
                return None
        if value is None:
            return None
        content = value[16:]
        if not value.startswith(_seal(key, status, content)):
            return None
        entry = _decode(content)
        self.num_hits += 1
        kind: Any = entry.kind
        cause: Any = entry.cause
        info = None if entry.info is None else image_info(*entry.info)
        return ImageCheck(kind, entry.problem, info, entry.num_bytes, entry.xxh3_64, cause)

    def put(self, path: str, status: os.stat_result, check: ImageCheck) -> None:
        """Note what was found. `status` is from before the file was read.

        Only verdicts on content are kept: whether a file is there is asked anew every time.
        """
        newest = max(status.st_mtime_ns, status.st_ctime_ns)
        if (
            self._connection is None
            or check.kind not in ("ok", "undecodable")
            or not stat.S_ISREG(status.st_mode)
            or check.num_bytes != status.st_size
            or not newest + FRESH_NS < time.time_ns()
        ):
            return
        key = self._prefix + path.encode("utf-8", "surrogateescape")
        info = None if check.info is None else astuple(check.info)
        content = _encode(
            _Entry(check.kind, check.problem, check.cause, check.num_bytes, check.xxh3_64, info)
        )
        with self._lock:
            self._pending[key] = _seal(key, status, content) + content
            if len(self._pending) >= BATCH:
                self._write()

    def flush(self) -> None:
        """Write what is noted and not yet written."""
        with self._lock:
            self._write()

    def close(self) -> None:
        """Write the rest and close the file."""
        with self._lock:
            self._write()
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _find(self, key: bytes) -> bytes | None:
        """The value of a key.

        Paths are mostly asked for in the order of their names, as frames of a video are: where the
        last rows that were read in advance were of use, more are read.
        """
        assert self._connection is not None
        value = self._pending.get(key) or self._ahead.get(key)
        if value is not None:
            self._num_used += 1
            return value
        if self._ahead_from <= key <= self._ahead_to:
            return None
        was_useful = 2 * self._num_used >= len(self._ahead)
        self._num_ahead = min(4 * self._num_ahead, MOST_AHEAD) if was_useful else 1
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN")  # else every read would lock and unlock the file
        rows = self._connection.execute(_SELECT, (key, self._num_ahead)).fetchall()
        # Of damaged rows SQLite may say that they hold numbers.
        self._ahead = {k: v for k, v in rows if isinstance(k, bytes) and isinstance(v, bytes)}
        self._ahead_from, self._ahead_to = key, max(self._ahead, default=key)
        self._num_used = 0
        value = self._ahead.get(key)
        self._num_used = int(value is not None)
        return value

    def _write(self) -> None:
        if self._connection is None or not self._pending:
            return
        try:
            self._connection.commit()  # ends the reading one, whose view of the file may be old
            with self._connection:
                self._connection.executemany(_INSERT, self._pending.items())
        except sqlite3.DatabaseError as error:
            self._recover(error)
        self._pending.clear()
        self._forget_ahead()

    def _forget_ahead(self) -> None:
        self._ahead: dict[bytes, bytes] = {}
        self._ahead_from, self._ahead_to = b"", b""
        self._num_ahead, self._num_used = 1, 0

    def _recover(self, error: sqlite3.DatabaseError) -> None:
        """After a failure: replace a damaged file; go on without where that is not the trouble."""
        assert self._connection is not None
        self._connection.close()
        self._connection = None
        self._forget_ahead()
        if _is_damage(error) and not self.problem:
            self._replace()
        else:
            self._give_up(error)

    def _reopen(self) -> None:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self.path.stat().st_size > MAX_BYTES:
                _remove(self.path)
            self._connection = _connect(self.path)
        except sqlite3.DatabaseError as error:
            if _is_damage(error):
                self._replace()
            else:
                self._give_up(error)
        except OSError as error:
            self._give_up(error)

    def _replace(self) -> None:
        assert self.path is not None
        try:
            _remove(self.path)
            self._connection = _connect(self.path)
        except (OSError, sqlite3.DatabaseError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.problem = f"no cache at {self.path}: {error}"
        self._connection = None
        self.path = None


@contextmanager
def open_cache(level: Level, path: Path | None = None) -> Generator[CheckCache]:
    """Open the cache for checks of a level; what was noted is written at the end.

    Where the cache cannot be used (a home that is read-only, a full disk), checks go on without:
    `CheckCache.problem` says so, and is for the caller to tell.

    Args:
        level: of `check_image`. A check of another level does not answer for it.
        path: the file; by default `default_path()`.
    """
    with closing(CheckCache(path or default_path(), level)) as checks:
        yield checks


def default_path() -> Path:
    """`$XDG_CACHE_HOME/phi3v-data/images.sqlite3`, or the same under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # Relative paths in it are to be ignored, says the XDG specification.
    folder = Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()
    return folder / "phi3v-data" / "images.sqlite3"


_SELECT = "SELECT key, value FROM checks WHERE key >= ? ORDER BY key LIMIT ?"
_INSERT = "INSERT OR REPLACE INTO checks VALUES (?, ?)"


def _connect(path: Path) -> sqlite3.Connection:
    # A lock of ours guards it where threads share it.
    connection = sqlite3.connect(path, timeout=_WAIT_S, check_same_thread=False)
    connection.text_factory = bytes  # there is no text, but damage may look like some
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = OFF")  # sealed entries: a torn one is not believed
        connection.execute(
            "CREATE TABLE IF NOT EXISTS checks "
            "(key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
        )
        connection.execute(_SELECT, (b"", 1)).fetchone()
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether the file is to blame, not its being locked, read-only or on a full disk."""
    if not isinstance(error, sqlite3.OperationalError):
        return True
    # Another program's table under our name, or one of an earlier layout.
    return any(
        words in str(error) for words in ("no such column", "no such table", "has no column")
    )


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _seal(key: bytes, status: os.stat_result, content: bytes) -> bytes:
    state = _STATE.pack(status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return xxhash.xxh3_128_digest(key + state + _versions() + content)


_STATE = struct.Struct("<qqq")


@cache
def _versions() -> bytes:
    return f"{CHECKS_VERSION} {version('pillow')}".encode()
