"""Where an image path of a sample leads: to a file inside the image root, or to a problem.

    place = find_place("images", "val/a.jpg")
    place.file, place.status        # "images/val/a.jpg", os.stat_result(...)
    find_place("images", "../a.jpg")   # raises MisplacedImage: "leaves the image root by .."
    ImagePlaces("images").find("val/a.jpg")   # "/real/images/val/a.jpg"

Whoever opens an image that a data set names asks here first, so that nothing in the data can make
it read outside the root, nor wait for a pipe. A folder is looked at once for all its images.
"""

import os
import posixpath
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple


class MisplacedImage(ValueError):
    """The path leads to no file inside the image root; the message says why."""

    def __init__(
        self,
        kind: Literal["outside", "missing"],
        problem: str,
        cause: Literal["", "unreadable"] = "",
    ) -> None:
        super().__init__(problem)
        self.kind: Literal["outside", "missing"] = kind
        self.cause: Literal["", "unreadable"] = cause
        """`unreadable`: there, but the system does not let it be read."""


class Place(NamedTuple):
    """A regular file inside the image root."""

    file: str
    """To open it by: no link itself."""

    real: str
    """The same without links in its folders."""

    status: os.stat_result
    ignores_case: bool
    """Whether its disk finds names in any case."""


def find_place(root: str, path: str) -> Place:
    """The file that `path` names.

    Args:
        root: the image root.
        path: as in the sample: relative, POSIX.

    Raises:
        MisplacedImage: outside the root, missing, not a regular file, or not to be read.
    """
    problem = path_problem(path)
    if problem:
        raise MisplacedImage("outside", problem)
    file = f"{root}/{path}"
    slash = file.rindex("/")
    try:
        folder = _folder_of(root, file[:slash])
        status = os.lstat(file)
        is_file = stat.S_ISREG(status.st_mode)
        if not is_file and stat.S_ISLNK(status.st_mode):
            file = os.path.realpath(file)
            slash = file.rindex("/")
            folder = _folder_of(root, file[:slash])
            status = os.lstat(file)
            is_file = stat.S_ISREG(status.st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise MisplacedImage("missing", "does not exist") from None
    except (OSError, UnicodeEncodeError) as error:
        raise MisplacedImage("missing", unreadable(error), "unreadable") from error
    if not folder.is_inside:
        raise MisplacedImage("outside", "is a link that leads out of the image root")
    if not is_file:  # a folder, a pipe that would block, links in a circle
        is_circle = stat.S_ISLNK(status.st_mode)
        raise MisplacedImage("missing", "does not exist" if is_circle else "is not a file")
    return Place(file, folder.real + file[slash:], status, folder.ignores_case)


# Without O_NOFOLLOW a file that is exchanged for a link just now would be followed; without
# O_NONBLOCK, a pipe would block. Windows has neither, nor the cases.
_OPEN = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
)


def open_place(root: str, path: str) -> tuple[int, Place]:
    """`find_place`, and a descriptor of the file, open for reading: for the caller to close.

    Most files are opened first and asked afterwards what they are, which spares the system a walk
    along the path; `find_place` is for the others.

    Raises:
        MisplacedImage: as `find_place`.
    """
    if problem := path_problem(path):
        raise MisplacedImage("outside", problem)
    file = f"{root}/{path}"
    slash = file.rindex("/")
    try:
        folder = _folder_of(root, file[:slash])
        descriptor = os.open(file, _OPEN) if folder.is_inside else None
    except (OSError, UnicodeEncodeError):
        folder = descriptor = None
    if folder is not None and descriptor is not None:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            return descriptor, Place(file, folder.real + file[slash:], status, folder.ignores_case)
        os.close(descriptor)
    place = find_place(root, path)
    try:
        descriptor = os.open(place.file, _OPEN)
    except FileNotFoundError:
        raise MisplacedImage("missing", "does not exist") from None
    except OSError as error:
        raise MisplacedImage("missing", unreadable(error), "unreadable") from error
    return descriptor, place


def unreadable(error: OSError | UnicodeEncodeError) -> str:
    """What a refusal of the system says, to follow the path in a sentence."""
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else "no such name"
    return f"cannot be read: {reason}"


class ImagePlaces:
    """The image root of a file, its links resolved once."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.path.realpath(root)

    def find(self, path: str) -> str:
        """The file that `path` names, its links resolved.

        Raises:
            MisplacedImage: outside the root, missing, or not a regular file.
        """
        return find_place(self._root, path).real


def path_problem(path: str) -> str:
    """What is wrong with an image path before looking at any disk; empty if nothing."""
    if not path:
        return "is empty"
    if "\0" in path:
        return "holds a NUL character"
    if "\\" in path:
        return "holds a backslash; paths are POSIX, with /"
    if path[0] == "/" or (path[1:2] == ":" and path[0].isalpha()):
        return "is absolute; paths are relative to the image root"
    if ".." in path and ".." in path.split("/"):
        return "leaves the image root by .."
    return ""


# --- folders -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder with images, looked at once for all of them."""

    real: str
    """Without links."""

    is_inside: bool
    """Whether it is under the image root."""

    ignores_case: bool
    """Whether its disk finds names in any case."""


def _folder_of(root: str, folder: str) -> _Folder:
    """What is known of a folder is believed for a second at most: it may become another."""
    return _folder(root, folder, int(time.monotonic()))


@lru_cache(maxsize=4096)
def _folder(root: str, folder: str, tick: int) -> _Folder:
    real, real_root = os.path.realpath(folder, strict=True), _real_root(root, tick)
    is_inside = os.path.commonpath([real_root, real]) == real_root
    return _Folder(real, is_inside, is_inside and ignores_case(real))


@lru_cache(maxsize=64)
def _real_root(root: str, tick: int) -> str:
    return os.path.realpath(root)


def ignores_case(folder: str) -> bool:
    """Whether the disk finds the names of `folder` in any case, as macOS and Windows do."""
    try:
        with os.scandir(folder) as entries:
            names = (entry.name for entry in entries)
            name = next((name for name in names if name.swapcase() != name), None)
        if name is None:
            return False
        other = os.path.join(folder, name.swapcase())
        is_same = os.path.samestat(os.lstat(other), os.lstat(os.path.join(folder, name)))
    except OSError:
        return False
    # Else the two are hard links to one file.
    return is_same and name.swapcase() not in os.listdir(folder)


def names_by_lower_case(folder: str) -> dict[str, str]:
    """Names in `folder`, by their lower case; of two that differ in case only, the later."""
    try:
        return {name.lower(): name for name in sorted(os.listdir(folder))}
    except OSError:
        return {}


def path_on_disk(path: str, list_names: Callable[[str], Mapping[str, str]]) -> str:
    """`path` with every name in the case of the disk.

    Args:
        path: relative to the image root.
        list_names: a folder, relative to the root, to what it holds: lower case -> name.
    """
    found = ""
    for name in posixpath.normpath(path).split("/"):
        found = posixpath.join(found, list_names(found).get(name.lower(), name))
    return found


def other_path_on_disk(root: str, path: str) -> str:
    """`path` in the case of the disk, where it differs; else empty.

    For disks that ignore case: on others no such path leads anywhere.
    """

    def list_names(folder: str) -> dict[str, str]:
        status = os.stat(os.path.join(root, folder))
        return _names(os.path.join(root, folder), status.st_ino, status.st_mtime_ns)

    found = path_on_disk(path, list_names)
    return "" if found == posixpath.normpath(path) else found


@lru_cache(maxsize=256)
def _names(folder: str, inode: int, modified_ns: int) -> dict[str, str]:
    """Listed once while the folder does not change."""
    return names_by_lower_case(folder)
