"""A shard directory on an object store: any address that fsspec knows.

    store = RemoteStore("s3://bucket/shards/train")
    store.read("manifest.json")
    store.local_path(manifest.index)            # fetched once, kept in the cache
    store.plan((entry, spans) for ...)          # optional: what will be read, in order
    store.ranges(entry, [(4, 900), (912, 700)]) # one request, or none where it is in the cache
    store.close()

Near spans of a row are one request (`phi3v_data.coalesced_spans`); what came is kept on this
machine's disk (`phi3v_data.range_cache`), whole shards where `download="shards"`; what is planned
is fetched ahead (`phi3v_data.prefetch`); what failed in passing is asked again
(`phi3v_data.store_retries`).
"""

import hashlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from phi3v_data.addresses import open_file_system
from phi3v_data.cache_place import cache_folder, cache_limit
from phi3v_data.coalesced_spans import Request, coalesce
from phi3v_data.locked_file import LockedFile
from phi3v_data.prefetch import PlannedPiece, Prefetcher
from phi3v_data.range_cache import MappedPiece, Part, RangeCache, Refusal, piece_key
from phi3v_data.shard_format import FileEntry, IndexEntry, ShardEntry, ShardError
from phi3v_data.store_retries import RetryPolicy, ShortRead, retry

Download = Literal["ranges", "shards"]

CHUNK_BYTES = 8 * 1024 * 1024
"""Whole files are fetched in pieces of this: a cut connection costs one of them."""

PREFETCH_BYTES = 256 * 1024 * 1024

MOST_OPEN_SHARDS = 64
"""Maps of whole shards that a process keeps open."""

WAIT_FOR_OTHERS_S = 60.0
"""For a piece that another process is fetching; then one fetches it for oneself."""

_RETRIES = RetryPolicy()

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """How a store is read."""

    download: Download = "ranges"
    """`ranges`: the bytes of a row. `shards`: the whole shard, with its first row; for those who
    read most of it, where requests cost more than bytes."""

    cache: Path | None = None
    """The folder of the cache; by default `phi3v_data.cache_place.cache_folder()`."""

    limit_bytes: int | None = None
    """Of the cache; by default `phi3v_data.cache_place.cache_limit()`. 0 keeps no bytes of
    shards. An index is kept whatever the limit, since nothing can be read without it."""

    prefetch_bytes: int = PREFETCH_BYTES
    """Fetched ahead of the reader at most, a process; never more than an eighth of the cache
    (or one piece): what is fetched ahead is room that what was read cannot have."""

    retries: RetryPolicy = _RETRIES


class RemoteStore:
    """See the module. Safe to use from many threads.

    Pickles as its address and settings. Nothing is opened and no thread started before it is used;
    a child of a fork opens everything anew, and has no plan.
    """

    def __init__(self, address: str, settings: StoreSettings | None = None) -> None:
        """Remember where it is.

        Raises:
            ValueError: a setting is not one.
        """
        self.name = address.rstrip("/")
        """The address."""
        self.settings = settings or StoreSettings()
        if self.settings.download not in ("ranges", "shards"):
            raise ValueError(
                f"download: expected 'ranges' or 'shards', got {self.settings.download!r}"
            )
        # By process: what is open in a parent is of no use to its child.
        self._readers: dict[int, _Reader] = {}

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return RemoteStore, (self.name, self.settings)

    def __repr__(self) -> str:
        return f"RemoteStore({self.name!r})"

    def read(self, file: str) -> bytes:
        """A small file, whole, as it is now.

        Raises:
            ShardError: it is not there, or cannot be had.
        """
        return self._reader().read(file)

    def local_path(self, entry: FileEntry) -> Path:
        """A file of the directory on this machine's disk, its size and SHA-256 as `entry` says.

        It stays there until the store is closed.

        Raises:
            ShardError: it is not there, cannot be had, or is not what `entry` says.
        """
        return self._reader().local_path(entry)

    def ranges(self, entry: ShardEntry, spans: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Bytes of a shard.

        Args:
            entry: the shard.
            spans: (offset, length) in bytes.

        Returns:
            A read-only view for each span, in their order.

        Raises:
            ShardError: they cannot be had; the message says why, after how many tries.
        """
        return self._reader().ranges(entry, spans)

    def plan(self, upcoming: Iterable[tuple[ShardEntry, Sequence[tuple[int, int]]]]) -> None:
        """Fetch ahead what this process will read, and keep in the cache what is needed soonest.

        Args:
            upcoming: the arguments of the coming calls of `ranges`, in their order. It is taken a
                few thousand at a time, in whatever thread reads. A second plan replaces the first.
        """
        self._reader().plan(upcoming)

    def passed(self, entry: ShardEntry, spans: Sequence[tuple[int, int]]) -> None:
        """Tell the plan of this process that another process has read these bytes."""
        self._reader().passed(entry, spans)

    def forget(self, entry: ShardEntry, spans: Sequence[tuple[int, int]]) -> bool:
        """Drop what is kept of these bytes, which were found damaged: they are fetched anew.

        Returns:
            True: what was kept, or came over the line, may be to blame.
        """
        self._reader().forget(entry, spans)
        return True

    def close(self) -> None:
        """End the threads and let the cache go. Views that were given out stay valid."""
        reader = self._readers.pop(os.getpid(), None)
        if reader is not None:
            reader.close()

    def _reader(self) -> "_Reader":
        pid = os.getpid()
        reader = self._readers.get(pid)
        if reader is None:
            # Of two threads one comes first: setdefault takes no two. Making one opens nothing.
            reader = self._readers.setdefault(pid, _Reader(self.name, self.settings))
        return reader


class _Reader:
    """What a process has open of a store."""

    def __init__(self, address: str, settings: StoreSettings) -> None:
        self._fetcher = _Fetcher(address, settings)
        self._lock = threading.Lock()
        self._shards: dict[str, MappedPiece] = {}
        self._held: dict[str, LockedFile] = {}
        self._prefetcher: Prefetcher | None = None
        weakref.finalize(self, _let_go, self._held)

    def read(self, file: str) -> bytes:
        return self._fetcher.read(file)

    def local_path(self, entry: FileEntry) -> Path:
        with self._lock:
            path = self._fetcher.cache().file(entry.sha256)
            if entry.sha256 not in self._held:
                self._held[entry.sha256] = self._fetcher.hold_file(entry)
            return path

    def ranges(self, entry: ShardEntry, spans: Sequence[tuple[int, int]]) -> list[memoryview]:
        _check_spans(entry, spans)
        if self._fetcher.settings.download == "shards":
            shard = self._shard(entry)
            if shard is not None:
                return [shard[offset : offset + length] for offset, length in spans]
        found = [memoryview(b"")] * len(spans)
        for request in coalesce(spans):
            piece = _piece(entry, request.offset, request.length)
            if self._prefetcher is not None:
                self._prefetcher.reached(piece.key)
            content = self._fetcher.content(piece)
            for k in request.spans:
                offset, length = spans[k]
                found[k] = content[offset - request.offset : offset - request.offset + length]
        return found

    def passed(self, entry: ShardEntry, spans: Sequence[tuple[int, int]]) -> None:
        if self._prefetcher is not None:
            for piece in _pieces([(entry, spans)], self._fetcher.settings.download):
                self._prefetcher.reached(piece.key)

    def forget(self, entry: ShardEntry, spans: Sequence[tuple[int, int]]) -> None:
        cache = self._fetcher.cache()
        for request in (*coalesce(spans), Request(0, entry.num_bytes, ())):
            cache.forget(_piece(entry, request.offset, request.length).key)

    def plan(self, upcoming: Iterable[tuple[ShardEntry, Sequence[tuple[int, int]]]]) -> None:
        fetcher = self._fetcher
        cache = fetcher.cache()
        with self._lock:
            if self._prefetcher is None:
                ahead = min(fetcher.settings.prefetch_bytes, cache.limit_bytes // 8)
                self._prefetcher = Prefetcher(fetcher.fetch_ahead, cache.publish, ahead)
                # The threads know nothing of this object, so that it can be forgotten unclosed.
                weakref.finalize(self, _stop, self._prefetcher, fetcher)
        self._prefetcher.follow(_pieces(upcoming, fetcher.settings.download))

    def close(self) -> None:
        self._fetcher.closed.set()
        if self._prefetcher is not None:
            self._prefetcher.close()
        with self._lock:
            _let_go(self._held)
            self._shards.clear()

    def _shard(self, entry: ShardEntry) -> memoryview | None:
        """A whole shard; None where the cache has no room for it."""
        piece = _piece(entry, 0, entry.num_bytes)
        if self._prefetcher is not None:
            self._prefetcher.reached(piece.key)
        with self._lock:
            shard = self._shards.get(piece.key)
            if shard is not None and not shard.is_evicted():
                return shard.content
        shard = self._fetcher.shard(piece)
        with self._lock:
            self._shards.pop(piece.key, None)
            if shard is None:
                return None
            while len(self._shards) >= MOST_OPEN_SHARDS:
                del self._shards[next(iter(self._shards))]
            self._shards[piece.key] = shard
        return shard.content


class _Fetcher:
    """Brings pieces from the store, by way of the cache."""

    def __init__(self, address: str, settings: StoreSettings) -> None:
        self.settings = settings
        self.closed = threading.Event()
        self._address = address
        self._lock = threading.Lock()
        self._opened: tuple[Any, str] | None = None
        self._cache: RangeCache | None = None
        self._has_warned = False

    def cache(self) -> RangeCache:
        with self._lock:
            if self._cache is None:
                folder = self.settings.cache or cache_folder()
                limit = self.settings.limit_bytes
                try:
                    self._cache = RangeCache(folder, cache_limit() if limit is None else limit)
                except OSError as error:
                    raise ShardError(
                        f"{self._address}: its cache cannot be kept in {folder} ({error}); set "
                        "PHI3V_CACHE to a folder that can be written"
                    ) from error
            return self._cache

    def read(self, file: str) -> bytes:
        store, folder = self._store()
        what = f"{self._address}/{file}"
        try:
            return retry(lambda: store.cat_file(f"{folder}/{file}"), what, self.settings.retries)
        except FileNotFoundError:
            raise ShardError(f"{what}: missing") from None

    def content(self, piece: PlannedPiece) -> memoryview:
        """The bytes of a piece, of the cache or of the store."""
        cache = self.cache()
        given_up = time.monotonic() + WAIT_FOR_OTHERS_S
        while (content := cache.read(piece.key)) is None:
            part = self._begin(piece)
            if part is Refusal.BUSY and time.monotonic() < given_up:
                time.sleep(0.002)
                continue
            if isinstance(part, Refusal):
                return memoryview(self._range(piece, piece.offset, piece.length))
            with part:
                content = self._range(piece, piece.offset, piece.length)
                self._keep(part, content)
                return memoryview(content)
        return content

    def shard(self, piece: PlannedPiece) -> MappedPiece | None:
        """A whole shard as a map; None where the cache has no room for it."""
        cache = self.cache()
        while (shard := cache.map(piece.key)) is None:
            part = self._begin(piece)
            if part is Refusal.BUSY:
                time.sleep(0.01)
            elif part is Refusal.NO_ROOM:
                return None
            else:
                try:
                    with part:
                        self._download(piece, part)
                except OSError as error:
                    self._warn(error)
                    return None
        return shard

    def fetch_ahead(self, piece: PlannedPiece) -> bool:
        """Bring a piece into the cache, unless another is at it; false where it has no room."""
        if self.cache().has(piece.key):
            return True
        part = self._begin(piece)
        if isinstance(part, Refusal):
            return part is Refusal.BUSY
        with part:
            if self.settings.download == "shards":
                self._download(piece, part)
            else:
                self._keep(part, self._range(piece, piece.offset, piece.length, is_ahead=True))
        return True

    def hold_file(self, entry: FileEntry) -> LockedFile:
        """A whole file in the cache, checked, that nobody evicts while the lock is held."""
        cache = self.cache()
        while True:
            held = cache.hold_file(entry.sha256)
            if held is not None:
                if _is_intact(held.path, entry):
                    return held
                held.remove()
            part = cache.begin_file(entry.sha256, entry.num_bytes)
            if isinstance(part, Refusal):
                time.sleep(0.01)
                continue
            piece = PlannedPiece(entry.sha256, entry, 0, entry.num_bytes)
            with part:
                self._download(piece, part)

    def _download(self, piece: PlannedPiece, part: Part) -> None:
        """A whole file, its hash checked."""
        sha256 = hashlib.sha256()
        for offset in range(0, piece.length, CHUNK_BYTES):
            length = min(CHUNK_BYTES, piece.length - offset)
            content = self._range(piece, offset, length)
            sha256.update(content)
            part.write(content)
        if sha256.hexdigest() != piece.entry.sha256:
            raise ShardError(
                f"{self._address}/{piece.entry.name}: damaged, or replaced after the manifest was "
                "read: its SHA-256 does not match"
            )
        part.commit()

    def _range(
        self, piece: PlannedPiece, offset: int, length: int, is_ahead: bool = False
    ) -> bytes:
        store, folder = self._store()
        path = f"{folder}/{piece.entry.name}"
        what = f"{self._address}/{piece.entry.name}, bytes {offset}-{offset + length - 1}"

        def ask() -> bytes:
            content: bytes = store.cat_file(path, start=offset, end=offset + length)
            if len(content) != length:
                raise ShortRead(f"{len(content)} bytes came of {length}")
            return content

        try:
            return retry(ask, what, self.settings.retries, self.closed.wait)
        except FileNotFoundError:
            raise ShardError(f"{what}: missing, but the manifest names it") from None

    def _begin(self, piece: PlannedPiece) -> Part | Refusal:
        """As the cache's; a disk that cannot be written has no room."""
        try:
            return self.cache().begin(piece.key, piece.length)
        except OSError as error:
            self._warn(error)
            return Refusal.NO_ROOM

    def _keep(self, part: Part, content: bytes) -> None:
        """Write a piece whose bytes are in hand: where the disk fails, they are still of use."""
        try:
            part.write(content)
            part.commit()
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        """Once a process: every row would meet it."""
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "%s: what is read is not kept, and read anew each time: the cache %s cannot be "
                "written: %s",
                self._address,
                self.cache().folder,
                error,
            )

    def _store(self) -> tuple[Any, str]:
        with self._lock:
            if self._opened is None:
                self._opened = open_file_system(self._address)
            return self._opened


def _stop(prefetcher: Prefetcher, fetcher: _Fetcher) -> None:
    fetcher.closed.set()
    prefetcher.stop()


def _let_go(held: dict[str, LockedFile]) -> None:
    for lock in held.values():
        lock.close()
    held.clear()


def _piece(entry: FileEntry, offset: int, length: int) -> PlannedPiece:
    return PlannedPiece(piece_key(entry.sha256, offset, length), entry, offset, length)


def _pieces(
    upcoming: Iterable[tuple[ShardEntry, Sequence[tuple[int, int]]]], download: Download
) -> Iterator[PlannedPiece]:
    for entry, spans in upcoming:
        if download == "shards":
            if spans:
                yield _piece(entry, 0, entry.num_bytes)
        else:
            for request in coalesce(spans):
                yield _piece(entry, request.offset, request.length)


def _check_spans(entry: ShardEntry, spans: Sequence[tuple[int, int]]) -> None:
    for offset, length in spans:
        if offset < 0 or length < 0 or offset + length > entry.num_bytes:
            raise ShardError(
                f"{entry.name}: bytes {offset}-{offset + length - 1} are not in it: "
                f"it has {entry.num_bytes}"
            )


def _is_intact(path: Path, entry: FileEntry) -> bool:
    """Whether a file still has its content: a disk may have lost some since it was fetched."""
    if path.stat().st_size != entry.num_bytes:
        return False
    with open(path, "rb") as file:
        if not isinstance(entry, IndexEntry):
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
        # As good, and ten times as fast.
        blocks = iter(lambda: file.read(entry.block_bytes), b"")
        return tuple(map(xxhash.xxh3_64_hexdigest, blocks)) == entry.blocks
