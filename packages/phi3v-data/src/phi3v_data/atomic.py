"""Files that appear whole or not at all: write to a temporary name beside the target, rename.

with open_atomic(path) as file:
    file.write(...)          # nothing exists at `path` yet
# now it does; after an exception or a kill it never does
"""

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_MARK = ".tmp-"
"""Part of every temporary name, so that left-overs of a killed run can be told and removed."""


@contextmanager
def open_atomic(path: str | os.PathLike[str]) -> Generator[BinaryIO]:
    """Open `path` for writing bytes; it appears under its name when the block ends well.

    The parent folder is made. The bytes are flushed to disk before the rename, so that a power
    cut leaves the old file or the new one.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
        prefix=f".{target.name[:80]}{TEMPORARY_MARK}", dir=target.parent
    )
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write `content` to `path`, whole or not at all; text is UTF-8."""
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file, or the entries of a folder, to disk, so that it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
