"""The output of a conversion at an address: `s3://bucket/converted`, or whatever fsspec writes to.

    s3://bucket/converted/
        images/…  ucf101_train.jsonl  …                  # as in a folder
        .convert/journal-00000000000000000000.jsonl      # until the run is done: its journal,
        .convert/journal-00000000000000048213.jsonl      # in pieces, named by where they start

Every file is written on this machine first and put there in one go. The journal is the truth of a
run, and its pieces let another machine continue where this one was lost; so each finished image is
there before the journal says so, and the pieces outrank a journal that was left on this machine.
One run at a time: nothing here keeps two machines from writing to one address.
"""

import functools
import hashlib
import os
import re
import tempfile
import uuid
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from phi3v_data.addresses import open_file_system, store_errors
from phi3v_data.atomic import open_atomic
from phi3v_data.conversion.outputs import IMAGES, WORK
from phi3v_data.conversion.trouble import StoreError

NUM_CONNECTIONS = 16
"""Images of an item, or pieces of a journal, that are under way at once."""

_PIECE = re.compile(r"journal-([0-9]{20})\.jsonl")

_PROCESS = uuid.uuid4().hex
"""Tells this process from others, whose memory:// is another."""


@dataclass(frozen=True)
class _Piece:
    """Of a journal."""

    start: int
    size: int
    name: str


@dataclass(frozen=True)
class RemoteOutput:
    """A folder at an address."""

    address: str

    def __str__(self) -> str:
        return self.address

    def __reduce__(self) -> tuple[type["RemoteOutput"], tuple[str]]:
        return RemoteOutput, (self.address,)  # without what is cached in it

    @property
    def work(self) -> Path:
        """In the user's cache, for this address alone."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        owner = "" if self.takes_processes else _PROCESS
        digest = hashlib.sha256(f"{self.address.rstrip('/')}{owner}".encode()).hexdigest()[:32]
        return cache / "phi3v-data" / "convert" / digest

    @property
    def takes_processes(self) -> bool:
        """A store is everybody's; what is in memory, one process's."""
        return not self.address.lower().startswith("memory:")

    @contextmanager
    def images(self) -> Generator[Path]:
        """A folder of this machine, whose images are put in place at the end."""
        with self._temporary_folder() as folder:
            yield folder
            root = folder / IMAGES
            files = [path for path in root.rglob("*") if path.is_file()]
            names = [f"{IMAGES}/{path.relative_to(root).as_posix()}" for path in files]
            with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
                for _ in pool.map(self._put, files, names):
                    pass

    def image_size(self, name: str) -> int | None:
        """Bytes of an image; None where it is not there. As it was at the first call."""
        return self._image_sizes.get(name)

    @functools.cached_property
    def _image_sizes(self) -> dict[str, int]:
        # One request for 1,000 images, where asking for each would take hours.
        return {name: facts["size"] for name, facts in self._find(IMAGES).items()}

    def image_names(self) -> Iterator[str]:
        """All images, in no order."""
        return iter(self._find(IMAGES))

    def remove_image(self, name: str) -> None:
        """Remove an image that is there."""
        with self._open_store(f"{IMAGES}/{name}") as (file_system, path):
            file_system.rm_file(path)

    def names(self) -> list[str]:
        """Files and folders directly in it, sorted; none where it does not exist."""
        try:
            with self._open_store("") as (file_system, root):
                found: list[str] = file_system.ls(root, detail=False)
        except FileNotFoundError:
            return []
        # A folder that was made in a web page is an empty object, listed in itself.
        paths = (path.rstrip("/") for path in found)
        return sorted(path.rpartition("/")[2] for path in paths if path != root)

    @contextmanager
    def open(self, name: str) -> Generator[BinaryIO]:
        """Open a file for writing; it appears whole when the block ends well."""
        with self._temporary_folder() as folder:
            local = folder / Path(name).name  # stores guess the content's type by it
            with local.open("wb") as file:
                yield file
            self._put(local, name)

    def read(self, name: str) -> bytes:
        """The bytes of a file that is there."""
        with self._open_store(name) as (file_system, path):
            return file_system.cat_file(path)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            with self._open_store(name) as (file_system, path):
                facts: dict[str, Any] = file_system.info(path)
        except FileNotFoundError:
            return None
        return None if facts["type"] == "directory" else facts["size"]

    def remove(self, name: str) -> None:
        """Remove a file or a folder, where there is one."""
        try:
            with self._open_store(name) as (file_system, path):
                file_system.rm(path, recursive=True)
        except FileNotFoundError:
            pass  # there is none

    def location(self, name: str) -> str:
        """Where a file is."""
        return f"{self.address.rstrip('/')}/{name}" if name else self.address

    # --- the journal

    def is_begun(self) -> bool:
        """Whether the journal of a run that is not done was put away.

        Raises:
            ValueError: there is no such bucket.
        """
        return bool(self._pieces())

    def restore(self, journal: Path) -> None:
        """Make the journal on this machine that which was put away, and what goes on from there."""
        pieces = self._pieces()
        if not pieces:  # the run was finished, or begun anew, elsewhere
            journal.unlink(missing_ok=True)
            return
        if journal.exists():
            last = pieces[-1]
            with open(journal, "rb") as file:
                file.seek(last.start)
                if file.read(last.size) == self.read(last.name):
                    return
        with open_atomic(journal) as file, ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            for first in range(0, len(pieces), 4 * NUM_CONNECTIONS):  # not all in memory
                names = [piece.name for piece in pieces[first : first + 4 * NUM_CONNECTIONS]]
                for content in pool.map(self.read, names):
                    file.write(content)

    def backed_up(self) -> int:
        """Bytes of the journal that were put away."""
        return sum(piece.size for piece in self._pieces())

    def back_up(self, start: int, lines: bytes) -> None:
        """Put away a piece of the journal."""
        with self.open(f"{WORK}/journal-{start:020}.jsonl") as file:
            file.write(lines)

    def finish(self) -> None:
        """Remove what was put away."""
        self.remove(WORK)

    def _pieces(self) -> list[_Piece]:
        """From 0 on, as far as one begins where the other ends."""
        try:
            found = self._find(WORK)
        except FileNotFoundError as error:
            raise ValueError(f"there is no bucket for {self}: {error}; make it first") from error
        sizes = {int(m[1]): found[m[0]]["size"] for m in map(_PIECE.fullmatch, found) if m}
        pieces: list[_Piece] = []
        end = 0
        while sizes.get(end):
            pieces.append(_Piece(end, sizes[end], f"{WORK}/journal-{end:020}.jsonl"))
            end += sizes[end]
        return pieces

    # --- the store

    @contextmanager
    def _open_store(self, name: str) -> Generator[tuple[Any, str]]:
        file_system, root = open_file_system(self.address)
        with store_errors(self.location(name)):
            yield file_system, f"{root}/{name}" if name else root

    def _find(self, folder: str) -> dict[str, dict[str, Any]]:
        """All files below a folder, by their names in it; none where it does not exist."""
        with self._open_store(folder) as (file_system, root):
            found: dict[str, dict[str, Any]] = file_system.find(root, detail=True)
        return {
            path.removeprefix(f"{root}/"): facts
            for path, facts in found.items()
            if facts["type"] != "directory"  # one that came to be meanwhile, as s3fs has it
        }

    def _put(self, file: Path, name: str) -> None:
        try:
            with self._open_store(name) as (file_system, path):
                file_system.put_file(str(file), path)
        except FileNotFoundError as error:  # the bucket went away
            raise StoreError(f"{self.location(name)}: {error}") from error

    @contextmanager
    def _temporary_folder(self) -> Generator[Path]:
        """Below `work`: what a killed process leaves there goes when the run is done."""
        self.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="put-", dir=self.work) as folder:
            yield Path(folder)
