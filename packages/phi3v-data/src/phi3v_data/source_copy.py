"""A source that must be brought here first: an archive unpacked, an address copied.

    copy = SourceCopy("UCF101_subset.tar.gz", "converted/.convert/source")
    copy.ensure()      # the folder with what was in it; from the second call on, at once

Regular files only, by their names: no modes, owners, times. One member that is a link or a device,
or would land outside, and the whole is refused: no data set needs it, and half of one is worth
nothing. The folder appears whole or not at all; a copy that was interrupted continues.
"""

import fcntl
import hashlib
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from phi3v_data.addresses import address_name, is_address, open_file_system
from phi3v_data.atomic import TEMPORARY_MARK
from phi3v_data.trouble import is_machine_trouble

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
            ValueError: it is not there, damaged, or would write outside the folder.
        """
        folder = Path(self.folder)
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _only_one(folder.with_name(folder.name + ".lock")):
                if not folder.exists():
                    self._bring(folder, on_progress or (lambda done, total: None))
        name = address_name(self.origin)
        is_file = is_address(self.origin) and not _ARCHIVE.search(name)
        single = folder / f"{name}.d" / name
        return single if is_file and single.exists() else folder

    def _bring(self, folder: Path, on_progress: Callable[[int, int], None]) -> None:
        partial = folder.with_name(folder.name + ".partial")
        if not is_address(self.origin):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _unpack(Path(self.origin), partial)
        elif _ARCHIVE.search(address_name(self.origin)):
            archive = folder.with_name(address_name(self.origin))
            _fetch({archive: self.origin}, on_progress)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _unpack(archive, partial)
            archive.unlink()
        else:
            partial.mkdir(exist_ok=True)
            _fetch(_list_files(self.origin, partial), on_progress)
        partial.rename(folder)


def is_archive(source: str | os.PathLike[str]) -> bool:
    """Whether a path or an address is an archive, by its name."""
    return bool(_ARCHIVE.search(os.fspath(source)))


def fingerprint(source: str | os.PathLike[str]) -> str:
    """What tells one archive from another: its SHA-256, or what the store of an address says."""
    if is_address(source):
        file_system, path = open_file_system(str(source))
        try:
            return f"{file_system.size(path)} bytes, {file_system.ukey(path)}"
        except FileNotFoundError:
            raise ValueError(f"source not found: {source}") from None
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- from an address -----------------------------------------------------------------------------


def _list_files(address: str, folder: Path) -> dict[Path, str]:
    """Where each file below an address goes, or the one file that it is."""
    file_system, root = open_file_system(address)
    found: dict[str, dict[str, object]] = file_system.find(root, detail=True)
    if not found:
        raise ValueError(f"source not found: nothing is at {address}")
    files: dict[Path, str] = {}
    for path in found:
        if path == root:  # a file, not a folder; its name may be a split's
            name = PurePosixPath(f"{address_name(address)}.d", address_name(address))
        else:
            name = PurePosixPath(path.removeprefix(root).lstrip("/"))
        if ".." in name.parts or "\0" in path:
            raise ValueError(f"refused source: its file {path!r} would land outside")
        files[folder / name] = file_system.unstrip_protocol(path)
    return files


def _fetch(files: dict[Path, str], on_progress: Callable[[int, int], None]) -> None:
    """Copy addresses to paths, several at once; what is here in its full size stays."""
    done = 0
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        try:
            for _ in pool.map(_fetch_file, files, files.values()):
                done += 1
                on_progress(done, len(files))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _fetch_file(target: Path, address: str) -> None:
    file_system, path = open_file_system(address)
    try:
        if target.exists() and target.stat().st_size == file_system.size(path):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.blake2b(os.fsencode(target.name), digest_size=8).hexdigest()
        temporary = target.with_name(f".{digest}{TEMPORARY_MARK}")
        file_system.get_file(path, str(temporary))
    except FileNotFoundError:
        raise ValueError(f"source not found: nothing is at {address}") from None
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
