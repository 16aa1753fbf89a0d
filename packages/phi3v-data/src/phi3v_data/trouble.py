"""The machine's trouble, told from a bad file's: it would meet every item after this one too."""

import errno

_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)


def is_machine_trouble(error: BaseException) -> bool:
    """Whether a run should stop for it: a full disk, no memory, no file handles."""
    if isinstance(error, OSError):
        return error.errno in _ERRNOS
    return isinstance(error, MemoryError)
