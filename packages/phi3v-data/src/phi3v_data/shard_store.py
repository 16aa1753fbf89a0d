"""Where the files of a shard directory are, and how bytes of them are had.

    store = open_store("shards/train")               # or s3://bucket/shards/train
    store.read("manifest.json")                      # b'{...'
    store.local_path(manifest.index)                 # PosixPath('shards/train/index.arrow')
    store.ranges(manifest.shards[0], [(4, 900), (940, 1200)])    # [memoryview, memoryview]

A reader knows nothing else of disks and object stores. A store pickles as its name, starts no
thread before it is asked for bytes, and may be used in a process forked from the one that made it.
"""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from phi3v_data.addresses import is_address
from phi3v_data.shard_format import MANIFEST, FileEntry, ShardEntry, ShardError

Span = tuple[int, int]
"""(offset, length) in bytes."""


class ShardStore(Protocol):
    """The files of one shard directory, wherever they are. Safe to use from many threads."""

    @property
    def name(self) -> str:
        """The path or the address, as messages call it."""
        ...

    def read(self, file: str) -> bytes:
        """A small file, whole.

        Raises:
            ShardError: it is missing.
        """
        ...

    def local_path(self, entry: FileEntry) -> Path:
        """A file on this machine with the content of `entry`; its size is checked.

        Raises:
            ShardError: it is missing or has another size.
        """
        ...

    def ranges(self, entry: ShardEntry, spans: Sequence[Span]) -> list[memoryview]:
        """Bytes of a shard, one view for every (offset, length), in order.

        Raises:
            ShardError: the shard is missing or has another size.
        """
        ...

    def forget(self, entry: ShardEntry, spans: Sequence[Span]) -> bool:
        """Drop what is kept of these bytes, which were found damaged.

        Returns:
            Whether asking for them again may give others.
        """
        ...

    def close(self) -> None:
        """Let go of files and connections. Views that were handed out stay valid."""
        ...


class LocalStore:
    """A folder on this machine; shards are mapped when first needed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._folder = Path(os.path.abspath(path))
        self._maps: dict[str, memoryview] = {}

    @property
    def name(self) -> str:
        """The absolute path."""
        return os.fspath(self._folder)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return LocalStore, (self._folder,)

    def read(self, file: str) -> bytes:
        """See `ShardStore`."""
        path = self._folder / file
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ShardError(f"{path}: missing") from None

    def local_path(self, entry: FileEntry) -> Path:
        """See `ShardStore`."""
        path = self._folder / entry.name
        try:
            size = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise ShardError(f"{path}: missing, but the manifest names it") from None
        if size != entry.num_bytes:
            raise ShardError(f"{path}: damaged: {size} bytes, the manifest says {entry.num_bytes}")
        return path

    def ranges(self, entry: ShardEntry, spans: Sequence[Span]) -> list[memoryview]:
        """See `ShardStore`. The views are of the mapped file: nothing is copied."""
        content = self._maps.get(entry.name)
        if content is None:
            content = self._map(entry)
        return [content[offset : offset + length] for offset, length in spans]

    def forget(self, entry: ShardEntry, spans: Sequence[Span]) -> bool:
        """See `ShardStore`. Nothing is kept: the file itself is damaged."""
        del entry, spans
        return False

    def close(self) -> None:
        """See `ShardStore`."""
        self._maps = {}

    def _map(self, entry: ShardEntry) -> memoryview:
        with open(self.local_path(entry), "rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        # Two threads may come here at once; the first to arrive is kept. A lock could be held by
        # another thread when the process forks, and would never be free in the child.
        return self._maps.setdefault(entry.name, content)


def open_store(path_or_url: str | os.PathLike[str]) -> ShardStore:
    """The store of a path or an address.

    Raises:
        ValueError: nothing here can read such addresses.
    """
    if is_address(path_or_url):
        from phi3v_data.remote_store import RemoteStore

        return RemoteStore(os.fspath(path_or_url))
    if not (Path(path_or_url) / MANIFEST).is_file():
        from phi3v_data.parquet_index import ParquetStore, find_parquet

        files = find_parquet(path_or_url)
        if files:
            return ParquetStore(path_or_url, files)
    return LocalStore(path_or_url)
