"""What a run says: a line per interval, and a log anyone can read.

    step   10/120  loss 3.1415  lr 2.00e-04  grad 1.20  1,024 label tok  9,876 tok/s ...

    runs/first/log.jsonl              the same numbers, one JSON object a line (`Line`)
    runs/first/logs/rank-3.jsonl      of several processes: what each did itself (`RankLine`)
    runs/first/tensorboard/           for TensorBoard; `log.wandb` adds Weights & Biases

Only the main process speaks. Lines go to standard output, the progress bar to a terminal. Numbers
that are none (the gradient norm of a step that fp16 skips) are null.
"""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from phi3v_data.atomic import write_atomic
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from phi3v_train.config import TrainConfig, dump_config
from phi3v_train.tensorboard_log import TensorBoardLog
from phi3v_train.throughput import as_duration
from phi3v_train.wandb_log import WandbLog, require_wandb

LOG = "log.jsonl"
RANK_LOGS = "logs"
TENSORBOARD = "tensorboard"
"""Names below the run's folder."""


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

    memory_gib: float
    """Peak so far of the main process's device; on a CPU that of the process."""

    mfu: float | None
    """Share of the devices' peak that the model's operations took; None where that is unknown."""

    eta_seconds: float
    """To the last step, at the mean pace of this attempt, checkpoints and evaluations included."""

    seconds: float
    """Since the start of this process's training."""

    def __str__(self) -> str:
        mfu = "" if self.mfu is None else f"  MFU {self.mfu:.1%}"
        return (
            f"step {self.step:>{len(str(self.num_steps))}}/{self.num_steps}  "
            f"loss {self.loss:.4f}  lr {self.learning_rate:.2e}  grad {self.grad_norm:.2f}  "
            f"{self.label_tokens:,} label tok  {self.tokens_per_second:,.0f} tok/s  "
            f"{self.images_per_second:.1f} img/s  wait {self.data_wait:.0%}  "
            f"{self.memory_gib:.1f} GiB{mfu}  ETA {as_duration(self.eta_seconds)}"
        )


@dataclass(frozen=True, slots=True)
class RankLine:
    """One line of `logs/rank-N.jsonl`: the last step of an interval, on one rank."""

    step: int
    num_rows: int
    num_samples: int
    num_tokens: int
    num_crops: int
    """That the vision tower ran, global views included."""

    wait_seconds: float
    """That the rank waited for its rows."""

    memory_gib: float
    """Peak so far of its device; on a CPU that of the process."""

    seconds: float
    """Since the start of this process's training."""


class Sink(Protocol):
    """Where the numbers go beside the log file."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write values by name, `train/loss`, after `step` steps."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


def check_log(config: TrainConfig) -> None:
    """Find out before a run whether it could be logged.

    Raises:
        ValueError: wandb is asked for and not installed.
    """
    if config.log.wandb is not None:
        require_wandb()


def open_sinks(config: TrainConfig, *, start: int) -> list[Sink]:
    """What the configuration asks for; on the main process only.

    Raises:
        ValueError: wandb is asked for and not installed.
    """
    sinks: list[Sink] = []
    if config.log.tensorboard:
        board = TensorBoardLog(config.output_dir / TENSORBOARD, start=start)
        board.text("config", dump_config(config))
        sinks.append(board)
    if config.log.wandb is not None:
        settings = config.model_dump(mode="json")
        sinks.append(WandbLog(config.log.wandb, config.output_dir, settings))
    return sinks


class RunLog:
    """The voice of a run; a context manager around the loop.

    Args:
        output_dir: of the run.
        is_main: other ranks are silent.
        num_steps: of the whole run.
        start: steps already done; later lines of an earlier attempt are removed.
        rank: of this process, where there are several; None: no log of its own.
        sinks: of `open_sinks`; who opened them closes them.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        is_main: bool,
        num_steps: int,
        start: int,
        rank: int | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.path = output_dir / LOG
        self.rank_path = None if rank is None else output_dir / RANK_LOGS / f"rank-{rank}.jsonl"
        self.is_main = is_main
        self.num_steps = num_steps
        self.start = start
        self.started = time.perf_counter()
        self.console = Console(file=sys.stderr)
        self._sinks = tuple(sinks)
        self._progress: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> "RunLog":
        if self.rank_path is not None:
            self.rank_path.parent.mkdir(parents=True, exist_ok=True)
            _keep_lines_up_to(self.rank_path, self.start)
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
                    speed_estimate_period=3600,  # steps of a large model may take a minute
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
        """Print a line, append it to the log file, and hand it on."""
        if not self.is_main:
            return
        self.say(str(line))
        fields = asdict(line)
        _append(self.path, fields)
        others = ("step", "num_steps", "seconds")
        self._hand_on("train", line.step, {n: v for n, v in fields.items() if n not in others})

    def rank_line(self, line: RankLine) -> None:
        """Append a line to this rank's own log, where it has one."""
        if self.rank_path is not None:
            _append(self.rank_path, asdict(line))

    def scores(self, step: int, values: Mapping[str, float]) -> None:
        """Hand on what an evaluation after `step` steps measured."""
        self._hand_on("eval", step, values)

    def _hand_on(self, group: str, step: int, values: Mapping[str, float | None]) -> None:
        named = {f"{group}/{name}": v for name, v in values.items() if v is not None}
        for sink in self._sinks:
            sink.write(step, named)


def _append(path: Path, fields: Mapping[str, Any]) -> None:
    """One line of JSON, which knows no infinity."""
    whole = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in fields.items()
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(whole, allow_nan=False) + "\n")


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
