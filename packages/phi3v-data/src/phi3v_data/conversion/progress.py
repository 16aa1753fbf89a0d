"""The progress bar of a conversion: done, rate, rejected so far, time left.

    with conversion_progress(True, "convert ucf101", "items") as show:
        show(17, 400, 1)             # done, all, rejected

On stderr; drawn only when asked for.
"""

import contextlib
from collections.abc import Callable, Generator


@contextlib.contextmanager
def conversion_progress(
    enabled: bool, title: str, unit: str
) -> Generator[Callable[[int, int, int], None], None, None]:
    """Yield `show(done, all, rejected)`; `unit` is what is counted."""
    if not enabled:
        yield lambda done, total, rejected: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TextColumn("[red]{task.fields[rejected]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, rate="", rejected="")

        def show(done: int, total: int, rejected: int) -> None:
            if bar.tasks[0].total is None:  # what an earlier run did gives no rate
                bar.reset(task, total=total, completed=done)
            bar.update(task, completed=done)
            speed = bar.tasks[0].finished_speed or bar.tasks[0].speed
            bar.update(
                task,
                rate=f"{speed:.1f}/s" if speed else "",
                rejected=f"{rejected} rejected" if rejected else "",
            )

        yield show
