"""A bounded cache of byte ranges on this machine's disk, shared by all processes of a user.

    cache = RangeCache(folder, limit_bytes)
    key = piece_key(shard.sha256, offset, length)
    content = cache.read(key)                   # None: it is not here
    part = cache.begin(key, length)             # or Refusal.BUSY, or Refusal.NO_ROOM
    part.write(content); part.commit()

    folder/
      usage           bytes taken, 8 bytes; its lock guards admission and eviction
      pieces/3f/KEY   a piece: its bytes, then their xxh3-64, 8 bytes, little-endian
      files/SHA256    a file of a shard directory as it is
      parts/NAME      being written; locked by its writer
      plans/          what each process needs next: `phi3v_data.published_plan`

A key names content (the SHA-256 of the shard, and the range), not an address: data that changed has
other keys, a copy elsewhere the same.

*Two processes.* One writes a piece, the others wait for it: the lock of its part is the sign, and
it is gone when the writer is, however it ended. A piece gets its name when it is whole. Bytes are
counted before they are written, so the limit holds, whatever many write at once.

*A crash* leaves a part without a lock (deleted by the next process that opens the cache), and a
count that is too high (put right by the next eviction). A piece that a power cut tore fails its
hash, is deleted, and fetched again.

*Eviction.* First goes what no live process plans to use, the longest unused first; then what is
needed last (Belady's rule), but nothing for the sake of what is needed later still: that is refused
with NO_ROOM, and its reader goes without the cache. Deleting a file somebody reads is safe: its
bytes stay until it is closed.
"""

import mmap
import os
import struct
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType

import xxhash

from phi3v_data.locked_file import LockedFile, try_lock
from phi3v_data.published_plan import PublishedPlan, next_uses, publish

SEAL_BYTES = 8

SLACK = 0.05
"""Of the limit, freed beyond need where many pieces are: listing them all is dear, so it should not
be done for every new one."""

MANY_PIECES = 1000

_USAGE = struct.Struct("<q")
_DISK_BLOCK_BYTES = 4096
_DEAR_LISTING_S = 0.01


class Refusal(Enum):
    """Why nothing can be written under a key now."""

    BUSY = "another is writing it, or it is here by now: read again in a moment"
    NO_ROOM = "it does not fit, or all that is here is needed sooner"


def piece_key(sha256: str, offset: int, length: int) -> str:
    """The name of a range of a file with that SHA-256: 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(f"{sha256}:{offset}:{length}".encode())


def plan_key(key: str) -> int:
    """A key as plans hold it: 63 bits of it."""
    return int(key[:16], 16) >> 1


class Part:
    """A file that is being written; not committed at the end of its `with`, it is deleted."""

    def __init__(self, lock: LockedFile, final: Path, is_sealed: bool) -> None:
        self._lock: LockedFile | None = lock
        self._final = final
        self._hash = xxhash.xxh3_64() if is_sealed else None
        self._num_written = 0

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes.

        Raises:
            OSError: the disk is full, or its like.
        """
        assert self._lock is not None
        if self._hash is not None:
            self._hash.update(content)
        rest = memoryview(content)
        while rest:
            written = os.pwrite(self._lock.fd, rest, self._num_written)
            self._num_written += written
            rest = rest[written:]

    def commit(self) -> None:
        """Give the file its name."""
        assert self._lock is not None
        if self._hash is None:  # nothing in it would tell that a power cut tore it
            os.fsync(self._lock.fd)
        else:
            os.pwrite(
                self._lock.fd, self._hash.intdigest().to_bytes(8, "little"), self._num_written
            )
        self._final.parent.mkdir(exist_ok=True)
        self._lock.path.rename(self._final)
        self._lock.close()
        self._lock = None

    def __enter__(self) -> "Part":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.remove()
            self._lock = None


class MappedPiece:
    """A piece as a memory map."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        self.content = memoryview(self._map)[:-SEAL_BYTES]
        """Its bytes; they stay valid when the piece is evicted."""

    def is_whole(self) -> bool:
        """Whether its bytes have the hash they were written with."""
        return _seal(self.content) == bytes(memoryview(self._map)[-SEAL_BYTES:])

    def is_evicted(self) -> bool:
        """Whether its file was deleted, so that only this map keeps its bytes on the disk."""
        return os.fstat(self._fd).st_nlink == 0

    def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            os.close(self._fd)


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    num_bytes: int  # on the disk, in whole blocks
    used_ns: int


class RangeCache:
    """See the module. Threads may share one; a child of a fork makes its own."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Open it, make its folders, and delete what crashed processes left.

        Raises:
            OSError: the folder cannot be made or written.
        """
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._no_listing_before = 0.0
        with self._locked():
            for path in folder.joinpath("parts").iterdir():
                left = try_lock(path, create=False)
                if left is not None:
                    left.remove()
            next_uses(folder / "plans")  # deletes dead ones

    def read(self, key: str) -> memoryview | None:
        """The bytes of a piece, a copy of its own; None where it is not here, or damaged."""
        path = self._piece(key)
        try:
            with open(path, "rb", buffering=0) as file:
                content = memoryview(file.read())
                _note_use(file.fileno())
        except FileNotFoundError:
            return None
        if bytes(content[-SEAL_BYTES:]) != _seal(content[:-SEAL_BYTES]):
            path.unlink(missing_ok=True)
            return None
        return content[:-SEAL_BYTES]

    def map(self, key: str) -> MappedPiece | None:
        """A piece as a memory map, its hash checked; None where it is not here, or damaged."""
        path = self._piece(key)
        try:
            piece = MappedPiece(path)
        except FileNotFoundError:
            return None
        except ValueError:  # an empty file, which cannot be mapped
            path.unlink(missing_ok=True)
            return None
        if not piece.is_whole():
            path.unlink(missing_ok=True)
            return None
        _note_use(path)
        return piece

    def has(self, key: str) -> bool:
        """Whether a piece is here, perhaps damaged."""
        return self._piece(key).exists()

    def forget(self, key: str) -> None:
        """Delete a piece, if it is here."""
        self._piece(key).unlink(missing_ok=True)

    def begin(self, key: str, num_bytes: int) -> Part | Refusal:
        """Begin to write a piece of that many bytes.

        Raises:
            OSError: the disk does not let it.
        """
        return self._begin(key, self._piece(key), num_bytes + SEAL_BYTES, plan_key(key))

    def file(self, sha256: str) -> Path:
        """Where a whole file of that hash is, if it is here."""
        return self.folder / "files" / sha256

    def begin_file(self, sha256: str, num_bytes: int) -> Part | Refusal:
        """Begin to write a whole file, an index: it is let in whatever the limit."""
        return self._begin(sha256, self.file(sha256), num_bytes, None)

    def hold_file(self, sha256: str) -> LockedFile | None:
        """Keep a whole file from being evicted until the lock is closed; None: it is not here."""
        path = self.file(sha256)
        while path.exists():
            held = try_lock(path, create=False, shared=True)
            if held is not None:
                _note_use(path)
                return held
        return None

    def publish(self, keys: Sequence[str]) -> PublishedPlan:
        """Tell what this process will read, in order."""
        with self._locked():
            return publish(self.folder / "plans", [plan_key(key) for key in keys])

    def num_bytes(self) -> int:
        """What it takes on the disk, counted anew."""
        with self._locked():
            return sum(entry.num_bytes for entry in self._listing())

    def _piece(self, key: str) -> Path:
        return self.folder / "pieces" / key[:2] / key

    def _begin(self, name: str, final: Path, size: int, use: int | None) -> Part | Refusal:
        with self._locked() as usage:
            lock = try_lock(self.folder / "parts" / name)
            if lock is None:
                return Refusal.BUSY
            if final.exists():
                lock.remove()
                return Refusal.BUSY
            try:
                is_room = self._make_room(usage, _on_disk(size), use)
                # Its size from the start, so that whoever counts files counts it whole.
                os.ftruncate(lock.fd, size if is_room else 0)
            except BaseException:
                lock.remove()
                raise
            if not is_room:
                lock.remove()
                return Refusal.NO_ROOM
        return Part(lock, final, is_sealed=use is not None)

    @contextmanager
    def _locked(self) -> Generator[int]:
        """Alone with the cache, among threads and processes; gives the descriptor of `usage`."""
        while True:
            for name in ("pieces", "files", "parts", "plans"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            lock = try_lock(self.folder / "usage", wait=True)
            if lock is not None:
                break
        try:
            yield lock.fd
        finally:
            lock.close()

    def _make_room(self, usage: int, need: int, use: int | None) -> bool:
        """Count `need` bytes in, after evicting as much as they need; false where they may not."""
        is_index = use is None
        if need > self.limit_bytes and not is_index:
            return False
        content = os.pread(usage, _USAGE.size, 0)
        if len(content) == _USAGE.size:
            (used,) = _USAGE.unpack(content)
            if 0 <= used <= self.limit_bytes - need:
                os.pwrite(usage, _USAGE.pack(used + need), 0)
                return True
        begun = time.monotonic()
        if begun < self._no_listing_before and not is_index:
            return False
        used, is_room = self._evict(need, use)
        is_room = is_room or is_index  # nothing can be read without it
        os.pwrite(usage, _USAGE.pack(used + need if is_room else used), 0)
        took = time.monotonic() - begun
        if not is_room and took > _DEAR_LISTING_S:
            # Nothing to be had here for now: no more than a tenth of the time goes into looking.
            self._no_listing_before = begun + 10 * took
        return is_room

    def _evict(self, need: int, use: int | None) -> tuple[int, bool]:
        """Delete what may go for `need` bytes; what is used then, and whether they fit."""
        entries = list(self._listing())
        used = sum(entry.num_bytes for entry in entries)
        uses = next_uses(self.folder / "plans")
        own = -1 if use is None else uses.get(use)
        victims: list[tuple[float, int, _Entry]] = []
        for entry in entries:
            is_piece = entry.path.parent.parent.name == "pieces"
            planned = uses.get(plan_key(entry.path.name)) if is_piece else None
            is_needed_sooner = planned is not None and (own is None or planned <= own)
            if entry.path.parent.name != "parts" and not is_needed_sooner:
                # Unplanned first, then by next use, the latest first.
                order = -1.0 if planned is None else 1 / (1 + planned)
                victims.append((order, entry.used_ns, entry))
        victims.sort(key=lambda victim: victim[:2])
        target = self.limit_bytes - need
        if used - sum(victim[2].num_bytes for victim in victims) > target:
            if use is not None:
                return used, False  # no use in evicting some
        slack = int(SLACK * self.limit_bytes) if len(entries) > MANY_PIECES else 0
        for order, _, entry in victims:
            if used <= (target - slack if order < 0 else target):
                break
            if self._delete(entry):
                used -= entry.num_bytes
        return used, used <= target

    def _delete(self, entry: _Entry) -> bool:
        if entry.path.parent.name == "files":
            unused = try_lock(entry.path, create=False)
            if unused is None:
                return False
            unused.remove()
        else:
            entry.path.unlink(missing_ok=True)
        return True

    def _listing(self) -> Iterator[_Entry]:
        seen: set[int] = set()  # a part may become a piece meanwhile: one file still
        folders = [self.folder / "parts", self.folder / "files"]
        folders += [Path(entry.path) for entry in os.scandir(self.folder / "pieces")]
        for folder in folders:
            for entry in os.scandir(folder):
                with suppress(FileNotFoundError):  # renamed, or found damaged, just now
                    status = entry.stat(follow_symlinks=False)
                    if status.st_ino in seen:
                        continue
                    seen.add(status.st_ino)
                    yield _Entry(Path(entry.path), _on_disk(status.st_size), status.st_mtime_ns)


def _note_use(file: int | Path) -> None:
    now = time.time_ns()  # the disk's own clock ticks every few milliseconds only
    os.utime(file, ns=(now, now))


def _seal(content: memoryview) -> bytes:
    return xxhash.xxh3_64_intdigest(content).to_bytes(SEAL_BYTES, "little")


def _on_disk(num_bytes: int) -> int:
    return -(-num_bytes // _DISK_BLOCK_BYTES) * _DISK_BLOCK_BYTES
