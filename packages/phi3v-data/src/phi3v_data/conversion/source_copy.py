"""A source that must be brought here first: an archive unpacked, an address copied.

    copy = SourceCopy("UCF101_subset.tar.gz", "converted/.convert/source")
    copy.ensure()      # the folder with what was in it; from the second call on, at once

Regular files only, by their names: no modes, owners, times. One member that is a link or a device,
or would land outside, and the whole is refused: no data set needs it, and half of one is worth
nothing. The folder appears whole or not at all; a copy that was interrupted continues with the
files that are missing.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from phi3v_data.addresses import address_name, is_address, open_file_system, store_errors
from phi3v_data.atomic import TEMPORARY_MARK
from phi3v_data.conversion.trouble import StoreError, is_machine_trouble

_ARCHIVE = re.compile(r"\.(tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))$", re.IGNORECASE)

NUM_CONNECTIONS = 16
"""Files of an address that are under way at once."""


@dataclass(frozen=True)
class SourceCopy:
    """Where a source comes from, and the folder of this machine that it is brought to."""

    origin: str
    """An archive (`.tar`, `.tar.gz`, …), or an address of a folder, an archive or a file."""

    folder: str

    def ensure(self, on_progress: Callable[[int, int], None] | None = None) -> Path:
        """Bring it here, unless it is; return the folder, or the file at a file's address.

        Args:
            on_progress: called with the files that are here and all of them.

        Raises:
            ValueError: it is not there, damaged, or would write outside the folder; nothing stays.
            OSError: the disk is full, or the store does not answer; what is here stays.
        """
        folder = Path(self.folder)
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _only_one(folder.with_name(folder.name + ".lock")):
                if not folder.exists():
                    self._bring(folder, on_progress or (lambda done, total: None))
        single = folder / _single(self.origin)
        return single if is_address(self.origin) and single.exists() else folder

    @property
    def _partial(self) -> Path:
        return Path(self.folder + ".partial")

    @property
    def _fetched(self) -> Path:
        return Path(self.folder + ".archive")

    def _bring(self, folder: Path, on_progress: Callable[[int, int], None]) -> None:
        try:
            if not is_address(self.origin):
                self._unpack(Path(self.origin))
            elif is_archive(self.origin):
                _fetch(self.origin, self._fetched, on_progress)
                self._unpack(self._fetched / _single(self.origin))
            else:
                _fetch(self.origin, self._partial, on_progress)
        except ValueError:  # it will be no better the next time
            shutil.rmtree(self._partial, ignore_errors=True)
            shutil.rmtree(self._fetched, ignore_errors=True)
            raise
        self._partial.rename(folder)
        shutil.rmtree(self._fetched, ignore_errors=True)

    def _unpack(self, archive: Path) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir()
        _unpack(archive, self._partial)


def is_archive(source: str | os.PathLike[str]) -> bool:
    """Whether a path or an address is an archive, by its name."""
    return bool(_ARCHIVE.search(os.fspath(source).rstrip("/")))


def fingerprint(source: str | os.PathLike[str]) -> str:
    """What tells one source from another: an archive's SHA-256; of an address that of its listing.

    The listing has the name, the size, and the store's hash of every file, where it gives one.

    Raises:
        ValueError: there is nothing at the address.
        StoreError: the store does not answer.
    """
    if is_address(source):
        files = _list_files(str(source))
        digest = hashlib.sha256()
        for name in sorted(files):
            facts = files[name]
            line = [name.as_posix(), facts["size"], _content_tag(facts)]
            digest.update(json.dumps(line).encode() + b"\n")
        return digest.hexdigest()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- from an address -----------------------------------------------------------------------------


def _list_files(address: str) -> dict[PurePosixPath, dict[str, Any]]:
    """The files below an address by their names in it, or the one file that it is."""
    file_system, root = open_file_system(address)
    try:
        with store_errors(address):
            found: dict[str, dict[str, Any]] = file_system.find(root, detail=True)
    except FileNotFoundError as error:
        raise ValueError(f"source not found: nothing is at {address} ({error})") from error
    files: dict[PurePosixPath, dict[str, Any]] = {}
    folders: set[PurePosixPath] = set()
    for path, facts in found.items():
        if facts["type"] == "directory" or path.endswith("/"):
            continue  # the empty object of a folder that was made in a web page
        if path == root:
            return {_single(address): facts | {"name": path}}
        # Two keys that differ in `//` or `/./` only would be one file.
        key = path.removeprefix(f"{root}/")
        name = PurePosixPath(key)
        if ".." in name.parts or name.is_absolute() or "\0" in key:
            raise ValueError(f"refused source: its file {key!r} would land outside")
        if name.as_posix() != key:
            raise ValueError(f"refused source: its file {key!r} has no such name on a disk")
        files[name] = facts | {"name": path}
        folders.update(name.parents)
    if not files:
        raise ValueError(f"source not found: nothing is at {address}")
    for name in folders & files.keys():
        raise ValueError(f"refused source: its {str(name)!r} is a file and a folder")
    return files


def _single(address: str) -> PurePosixPath:
    """Where the file at an address goes: its name stays, for a split may be named by it."""
    return PurePosixPath(f"{address_name(address)}.d", address_name(address))


def _content_tag(facts: Mapping[str, Any]) -> str:
    """What a store says of the contents: S3's ETag, an MD5 of others."""
    for name in ("md5Hash", "ETag", "etag"):
        if facts.get(name):
            return str(facts[name]).strip('"')
    return ""


def _fetch(address: str, folder: Path, on_progress: Callable[[int, int], None]) -> None:
    """Copy an address into a folder, several files at once; what is there in full stays."""
    files = _list_files(address)
    file_system, _ = open_file_system(address)

    def fetch(name: PurePosixPath) -> None:
        with store_errors(f"{address}, file {files[name]['name']}"):
            _fetch_file(file_system, files[name], folder / name)

    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        try:
            for done, _ in enumerate(pool.map(fetch, files), 1):
                on_progress(done, len(files))
        except FileNotFoundError as error:
            raise ValueError(f"{address} changed while it was copied: {error} is gone") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _fetch_file(file_system: Any, facts: Mapping[str, Any], target: Path) -> None:
    size: int | None = facts["size"]  # some web servers do not say
    if target.exists() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2b(os.fsencode(target.name), digest_size=8).hexdigest()
    temporary = target.with_name(f".{digest}{TEMPORARY_MARK}")
    file_system.get_file(facts["name"], str(temporary))
    if size is not None and temporary.stat().st_size != size:
        raise StoreError(f"{temporary.stat().st_size} bytes arrived, not {size}")
    os.replace(temporary, target)


@contextmanager
def _only_one(path: Path) -> Generator[None]:
    """Hold a lock that other processes of this machine wait for."""
    with open(path, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- from an archive -----------------------------------------------------------------------------


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                _unpack_member(tar, member, folder)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if is_machine_trouble(error):
            raise
        raise ValueError(f"{archive.name} is damaged or no tar archive: {error}") from error


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\0" in member.name:
        raise ValueError(f"refused archive: its member {member.name!r} would land outside")
    if member.isdir():
        (folder / name).mkdir(parents=True, exist_ok=True)
        return
    if not member.isreg():
        raise ValueError(f"refused archive: its member {member.name!r} is a link or a device")
    data = tar.extractfile(member)
    assert data is not None, "a regular member has contents"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with data, open(folder / name, "wb") as file:
        shutil.copyfileobj(data, file, 1 << 20)
