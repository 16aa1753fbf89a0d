"""What a run says: a box at the start, a line per interval, a log anyone can read.

    ╭─ phi3v-train ───────────────────────────────────────╮
    │ model      models/tiny (312,448 parameters)         │
    │ method     full, fp32                               │
    │ ...                                                 │
    ╰─────────────────────────────────────────────────────╯
    step   10/120  loss 3.1415  lr 2.0e-04  grad 1.20  1,024 label tok  9,876 tok/s ...

    runs/first/log.jsonl    the same numbers, one JSON object a line

Only the main process speaks. Lines go to standard output, the progress bar to a terminal.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from phi3v_data.atomic import write_atomic
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


@dataclass(slots=True)
class Interval:
    """Sums over the steps since the last line."""

    num_steps: int = 0
    loss: float = 0.0
    """Sum of the steps' mean losses."""
    label_tokens: int = 0
    tokens: int = 0
    images: int = 0
    wait_seconds: float = 0.0
    """Time the trainer waited for its rows, the mean over the ranks."""
    started: float = 0.0

    def add(self, *, loss: float, label_tokens: int, tokens: int, images: int, wait: float) -> None:
        """Count one step."""
        self.num_steps += 1
        self.loss += loss
        self.label_tokens += label_tokens
        self.tokens += tokens
        self.images += images
        self.wait_seconds += wait


@dataclass(frozen=True, slots=True)
class Line:
    """One line of `log.jsonl`."""

    step: int
    num_steps: int
    epoch: float
    loss: float
    """Mean over the interval's steps of the loss per label token."""
    learning_rate: float
    grad_norm: float
    """Before clipping, of the interval's last step."""
    label_tokens: int
    tokens_per_second: float
    images_per_second: float
    data_wait: float
    """Share of the interval's time that the trainer waited for its rows, the mean over the ranks;
    0 to 1. More workers lower it, where there are cores for them."""
    memory_gib: float | None
    """Peak on the device so far; None on a CPU."""
    seconds: float
    """Since the start of this process's training."""

    def __str__(self) -> str:
        memory = "" if self.memory_gib is None else f"  {self.memory_gib:.1f} GiB"
        return (
            f"step {self.step:>{len(str(self.num_steps))}}/{self.num_steps}  "
            f"loss {self.loss:.4f}  lr {self.learning_rate:.2e}  grad {self.grad_norm:.2f}  "
            f"{self.label_tokens:,} label tok  {self.tokens_per_second:,.0f} tok/s  "
            f"{self.images_per_second:.1f} img/s  wait {self.data_wait:.0%}{memory}"
        )


class RunLog:
    """The voice of a run; a context manager around the loop.

    Args:
        output_dir: of the run.
        is_main: other ranks are silent.
        num_steps: of the whole run.
        start: steps already done; later lines of an earlier attempt are removed.
    """

    def __init__(self, output_dir: Path, *, is_main: bool, num_steps: int, start: int) -> None:
        self.path = output_dir / "log.jsonl"
        self.is_main = is_main
        self.num_steps = num_steps
        self.start = start
        self.started = time.perf_counter()
        self.console = Console(file=sys.stderr)
        self._progress: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> "RunLog":
        if self.is_main:
            _keep_lines_up_to(self.path, self.start)
            if self.console.is_terminal:
                self._progress = Progress(
                    TextColumn("training"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[note]}"),
                    TimeRemainingColumn(),
                    console=self.console,
                    transient=True,
                )
                self._task = self._progress.add_task(
                    "", total=self.num_steps, completed=self.start, note=""
                )
                self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def box(self, rows: Mapping[str, str]) -> None:
        """Show what is about to run."""
        if self.is_main:
            print_box(rows)

    def say(self, text: str) -> None:
        """Print a sentence above the progress bar."""
        if not self.is_main:
            return
        if self._progress is not None:
            self._progress.console.print(Text(text), soft_wrap=True)
        else:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def advance(self, step: int, loss: float) -> None:
        """Move the progress bar to `step` steps done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, note=f"loss {loss:.3f}")

    def line(self, line: Line) -> None:
        """Print a line and append it to the log file."""
        if not self.is_main:
            return
        self.say(str(line))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")


def print_box(rows: Mapping[str, str]) -> None:
    """Print names and values in a box, on standard output."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
    console.print(Panel(table, title="phi3v-train", title_align="left", expand=False))


def _keep_lines_up_to(path: Path, step: int) -> None:
    """Drop what an interrupted attempt logged beyond the checkpoint that the run goes on from."""
    if not path.is_file():
        return
    kept: list[str] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(text)["step"] > step:
                break
        except (ValueError, KeyError):
            break  # a line cut off by a kill: nothing behind it is whole either
        kept.append(text + "\n")
    write_atomic(path, "".join(kept))
