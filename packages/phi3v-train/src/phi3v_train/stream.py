"""Shards to this rank's rows, in the order of the plan.

    stream = open_stream("shards/train", "models/tiny", StreamSettings(num_crops=1, ...))
    for step, rows in stream.steps(start=120):     # rows: list[Batch], on the host
        ...

Before the first row the whole order is known: text lengths and image sizes come from the shard
index, no image is decoded for it. Position is one integer, the number of steps the trainer has
finished; `stream.identity` says of which data and settings it is a position. Worker processes
decode and encode whole rows ahead; a row's content never depends on who made it.
"""

import os
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from phi3v_data.shards import ShardReader, open_shards
from torch.utils.data import DataLoader, Dataset

from phi3v_train.chat import ChatEncoder
from phi3v_train.collator import Batch, SampleEncoder, collate, dummy_row
from phi3v_train.hd_transform import Resize
from phi3v_train.plan import EpochPlan, PlanSettings, Row, plan_epoch, split_overlong

MOST_NAMED = 5
"""Samples listed by id where many have the same problem."""


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What decides the rows, and who makes them."""

    num_crops: int
    max_tokens_per_row: int
    global_batch_size: int
    num_epochs: int
    seed: int
    overlong: str = "error"
    """`error` or `drop`: what becomes of samples longer than a row."""
    resize: Resize = "exact"
    """How images are resized; see `phi3v_train.hd_transform`."""
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    """Processes that make rows; 0: this one."""
    prefetch_rows: int = 2
    """Rows each worker keeps ready."""


@dataclass(frozen=True, slots=True)
class Measures:
    """Tokens and crops of every sample of a shard directory."""

    num_tokens: NDArray[np.int64]
    num_crops: NDArray[np.int64]
    """Crops the vision tower runs, global views included."""


def measure_shards(
    reader: ShardReader, encoder: SampleEncoder, on_progress: Callable[[int], None] | None = None
) -> Measures:
    """Length and crop count of every sample, from texts and image sizes in the index.

    Raises:
        ValueError: a sample that cannot be encoded; the message names it.
    """
    tokens = np.zeros(len(reader), dtype=np.int64)
    crops = np.zeros(len(reader), dtype=np.int64)
    for number in range(len(reader)):
        sample = reader.sample(number)
        try:
            sizes = reader.image_sizes_wh(number)
            tokens[number], crops[number] = encoder.measure(sample, sizes)
        except ValueError as error:
            raise ValueError(f"sample {sample.id!r}: {error}") from error
        if on_progress is not None:
            on_progress(number + 1)
    return Measures(tokens, crops)


@dataclass(frozen=True, slots=True)
class _Failure:
    """What went wrong in a worker, carried to the trainer as a value: one line, no traceback."""

    message: str


class _Rows(Dataset["Batch | _Failure"]):
    """Rows of sample numbers to batches; lives in the workers."""

    def __init__(self, reader: ShardReader, encoder: SampleEncoder) -> None:
        self.reader = reader
        self.encoder = encoder

    def __getitem__(self, row: Row) -> "Batch | _Failure":  # pyright: ignore[reportIncompatibleMethodOverride]
        if not row:
            return dummy_row(self.encoder.chat.ids.bos)
        try:
            records = [self.reader[number] for number in row]
            return collate([self.encoder(r.sample, r.images) for r in records])
        except ValueError as error:
            return _Failure(str(error))


class TrainStream:
    """One rank's rows of a training run; make it with `open_stream`."""

    def __init__(
        self,
        reader: ShardReader,
        encoder: SampleEncoder,
        measures: Measures,
        settings: StreamSettings,
    ) -> None:
        self.reader = reader
        self.encoder = encoder
        self.measures = measures
        self.settings = settings
        fitting, overlong = split_overlong(measures.num_tokens, settings.max_tokens_per_row)
        self.overlong = overlong
        """Numbers of the samples longer than a row."""
        if len(overlong) and settings.overlong == "error":
            raise ValueError(
                f"{len(overlong)} of {len(reader)} samples are longer than a row of "
                f"{settings.max_tokens_per_row} tokens ({self._name(overlong)}); raise "
                "data.max_tokens_per_row, lower data.num_crops, or set data.overlong=drop"
            )
        if not len(fitting):
            raise ValueError(
                f"{reader.path} has no sample that fits a row of {settings.max_tokens_per_row} "
                "tokens; raise data.max_tokens_per_row"
            )
        self._samples = fitting
        self._plans: dict[int, EpochPlan] = {}

    def _name(self, numbers: NDArray[np.int64]) -> str:
        names = [
            f"{self.reader.sample(int(n)).id}: {self.measures.num_tokens[n]} tokens"
            for n in numbers[:MOST_NAMED]
        ]
        more = len(numbers) - len(names)
        return ", ".join(names) + (f", and {more} more" if more else "")

    @cached_property
    def identity(self) -> PlanSettings:
        """What a position in this stream is a position of."""
        return PlanSettings(
            dataset_fingerprint=self.reader.fingerprint,
            tokenizer_hash=self.encoder.chat.fingerprint,
            num_crops=self.settings.num_crops,
            max_tokens_per_row=self.settings.max_tokens_per_row,
            seed=self.settings.seed,
            global_batch_size=self.settings.global_batch_size,
            resize=self.settings.resize,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.plan(0).num_steps

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all epochs."""
        return self.steps_per_epoch * self.settings.num_epochs

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch; the last one asked for is kept."""
        if epoch not in self._plans:
            plan = plan_epoch(
                self.measures.num_tokens,
                self.measures.num_crops,
                seed=self.settings.seed,
                epoch=epoch,
                global_batch_size=self.settings.global_batch_size,
                world_size=self.settings.world_size,
                max_tokens_per_row=self.settings.max_tokens_per_row,
                samples=self._samples,
            )
            self._plans = {epoch: plan}
        return self._plans[epoch]

    def rows_of_step(self, step: int) -> tuple[Row, ...]:
        """The rows this rank runs in a step, counted from the start of the run."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self.plan(epoch).rows(within, self.settings.rank)

    def steps(
        self, start: int = 0, stop: int | None = None
    ) -> Generator[tuple[int, list[Batch]], None, None]:
        """Yield (step, its rows on this rank), in order. Close it where you leave early.

        Args:
            start: steps already done.
            stop: the step to stop before; default: the end of the last epoch.

        Raises:
            ValueError: a sample that cannot be read or encoded; the message names it.
        """
        stop = self.num_steps if stop is None else stop
        loader = iter(self._loader(start, stop))
        try:
            for step in range(start, stop):
                rows: list[Batch] = []
                for _ in self.rows_of_step(step):
                    row = next(loader)
                    if isinstance(row, _Failure):
                        raise ValueError(row.message)
                    rows.append(row)
                yield step, rows
        finally:
            # Ends the workers, whoever still holds this generator or an error raised in it: they
            # ignore SIGTERM, so Python would wait for them for ever when it exits.
            del loader

    def _loader(self, start: int, stop: int) -> "DataLoader[Batch | _Failure]":
        settings = self.settings
        return DataLoader(
            _Rows(self.reader, self.encoder),
            batch_size=None,
            sampler=_RowSequence(self, start, stop),
            num_workers=settings.num_workers,
            prefetch_factor=settings.prefetch_rows if settings.num_workers else None,
            worker_init_fn=_start_worker,
            collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType]: typed for lists only
        )


class _RowSequence:
    """The rows from one step to another, one after another: what a loader calls a sampler."""

    def __init__(self, stream: TrainStream, start: int, stop: int) -> None:
        self.stream = stream
        self.start = start
        self.stop = stop

    def __iter__(self) -> Iterator[Row]:
        for step in range(self.start, self.stop):
            yield from self.stream.rows_of_step(step)


def _as_it_is(row: "Batch | _Failure") -> "Batch | _Failure":
    return row


def _start_worker(_: int) -> None:
    # These reach the whole process group of a terminal or batch job. The trainer decides what
    # they mean; a worker leaves when its loader, or its parent, is gone.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def open_stream(
    shards: str | Path,
    model_folder: str | Path,
    settings: StreamSettings,
    on_progress: Callable[[int], None] | None = None,
) -> TrainStream:
    """Open a shard directory for training.

    Args:
        shards: made by `phi3v-data shard`.
        model_folder: holds the `tokenizer.json`.
        settings: see there.
        on_progress: called with the number of samples measured so far.

    Raises:
        ValueError: not shards, not a model folder, or samples longer than a row.
    """
    reader = open_shards(shards)
    encoder = SampleEncoder(ChatEncoder(model_folder), settings.num_crops, settings.resize)
    return TrainStream(reader, encoder, measure_shards(reader, encoder, on_progress), settings)
