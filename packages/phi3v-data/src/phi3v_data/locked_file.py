"""Advisory locks on files: held while a process lives, gone with it, however it ends.

    lock = try_lock(path)       # None: someone else holds it
    lock.fd                     # open for reading and writing
    lock.close()

`flock` is used, since its locks belong to an open file: threads of a process exclude each other as
processes do. A child of a fork would hold its parent's locks on; so it closes them at once.
"""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

_open: set[int] = set()


class LockedFile:
    """An open file whose lock this process holds."""

    __slots__ = ("_pid", "fd", "path")

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        """Where it was when it was locked."""
        self.fd = fd
        """Its descriptor, open for reading and writing."""
        self._pid = os.getpid()
        _open.add(fd)

    def close(self) -> None:
        """Release the lock. A second call, or one in a child of a fork, does nothing."""
        if self._pid == os.getpid() and self.fd in _open:
            _open.remove(self.fd)
            fcntl.flock(self.fd, fcntl.LOCK_UN)  # at once, even where a child is just beginning
            os.close(self.fd)
            self.fd = -1

    def remove(self) -> None:
        """Delete the file, then release the lock: nobody sees it without one."""
        with suppress(FileNotFoundError):
            self.path.unlink()
        self.close()


def try_lock(
    path: Path, *, create: bool = True, shared: bool = False, wait: bool = False
) -> LockedFile | None:
    """Lock a file.

    Args:
        path: the file.
        create: make it where it is missing.
        shared: a lock that others may hold too, unless one wants it alone.
        wait: until it is free.

    Returns:
        None where another holds it; where it is missing and `create` is false; where it went away,
        or another took its place, while it was locked.

    Raises:
        OSError: its folder is missing or cannot be written.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        fd = os.open(path, flags, 0o666)
    except FileNotFoundError:
        if create:
            raise
        return None
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(fd, kind if wait else kind | fcntl.LOCK_NB)
        is_ours = _is_at(fd, path)
    except BlockingIOError:
        is_ours = False
    except BaseException:
        os.close(fd)
        raise
    if not is_ours:
        os.close(fd)
        return None
    return LockedFile(path, fd)


def _is_at(fd: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def _close_in_child() -> None:
    for fd in _open:
        os.close(fd)
    _open.clear()


os.register_at_fork(after_in_child=_close_in_child)
