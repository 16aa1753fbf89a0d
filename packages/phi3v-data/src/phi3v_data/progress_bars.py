"""A bar for each thing that is done, one after the other.

with progress_bars() as progress:      # None where nobody is looking
    write_shards(..., progress=progress)
with progress_bar("validating") as progress:
    validate(..., progress=progress)
"""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, in all)."""

REFRESH_SECONDS = 0.1


@contextmanager
def progress_bars(*, is_bytes: bool = True) -> Generator[Progress | None]:
    """Bars on the error stream, only if that is a terminal, gone when done.

    They are drawn by whoever reports, not by a thread: processes can be forked meanwhile.

    Args:
        is_bytes: what is counted are bytes, and shown as such.
    """
    # Not Console.is_terminal: FORCE_COLOR would make that of a pipe.
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TaskID,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        *((DownloadColumn(),) if is_bytes else ()),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, auto_refresh=False) as bars:
        tasks: dict[str, TaskID] = {}
        drawn = 0.0

        def report(what: str, done: int, total: int) -> None:
            nonlocal drawn
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)
            if time.monotonic() - drawn > REFRESH_SECONDS or done >= total:
                bars.refresh()
                drawn = time.monotonic()

        yield report


@contextmanager
def progress_bar(description: str) -> Generator[Callable[[int, int], None] | None]:
    """One bar; see `progress_bars`."""
    with progress_bars() as progress:
        if progress is None:
            yield None
        else:
            yield lambda done, total: progress(description, done, total)
