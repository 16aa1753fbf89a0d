"""The machine's trouble, told from a bad file's: it would meet every item after this one too."""

import errno

_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)


class StoreError(OSError):
    """The store at an address did not do what was asked. The message says where and why."""


def is_machine_trouble(error: BaseException) -> bool:
    """Whether a run should stop for it: a full disk, no memory, no file handles, no connection."""
    if isinstance(error, OSError):
        return isinstance(error, StoreError) or error.errno in _ERRNOS
    return isinstance(error, MemoryError)
