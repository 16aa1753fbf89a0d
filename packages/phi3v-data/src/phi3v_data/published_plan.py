"""What a process will need from the cache next, told to all who share it.

    plan = publish(folder, keys)        # in order of use
    plan.move_to(3)                     # the first three are done with
    next_uses(folder)                   # {key: how many pieces until some process needs it}

A file a process, locked while it lives: the cursor, then the keys, 8 bytes each. Processes of one
job go through their plans at one pace, so that the distances of all can be compared. Whoever calls
these functions holds the lock of the cache, so that nobody sees a file before it is locked.
"""

import os
import secrets
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

from phi3v_data.locked_file import LockedFile, try_lock

_CURSOR = struct.Struct("<q")


class PublishedPlan:
    """The plan of this process."""

    def __init__(self, lock: LockedFile) -> None:
        self._lock = lock

    def move_to(self, cursor: int) -> None:
        """The keys before `cursor` are done with."""
        if self._lock.fd >= 0:
            os.pwrite(self._lock.fd, _CURSOR.pack(cursor), 0)

    def withdraw(self) -> None:
        """Delete it."""
        self._lock.remove()


def publish(folder: Path, keys: Sequence[int]) -> PublishedPlan:
    """Tell the others. Keys are 63-bit numbers, in order of use; a key may occur again."""
    lock = try_lock(folder / f"{os.getpid()}-{secrets.token_hex(8)}")
    assert lock is not None, "a new name, yet someone has locked it"
    os.write(lock.fd, _CURSOR.pack(0) + array("q", keys).tobytes())
    return PublishedPlan(lock)


def next_uses(folder: Path) -> dict[int, int]:
    """Key → how many pieces its soonest user needs before it. Dead plans are deleted."""
    found: dict[int, int] = {}
    for entry in os.scandir(folder):
        path = Path(entry.path)
        dead = try_lock(path, create=False)
        if dead is not None:
            dead.remove()
            continue
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # withdrawn just now
            continue
        keys = array("q", content[_CURSOR.size :])
        (cursor,) = _CURSOR.unpack_from(content)
        for position in range(len(keys) - 1, cursor - 1, -1):  # backwards: the soonest use stays
            distance = position - cursor
            found[keys[position]] = min(distance, found.get(keys[position], distance))
    return found
