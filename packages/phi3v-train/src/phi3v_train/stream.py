"""Shards to this rank's rows, in the order of the plan.

    stream = open_stream("shards/train", "models/tiny", StreamSettings(num_crops=1, ...))
    for step, rows in stream.steps(start=120):     # rows: list[Batch], on the host
        ...

Before the first row the whole order is known: text lengths and image sizes come from the shard
index, no image is decoded for it. Position is one integer, the number of steps the trainer has
finished; `stream.identity` says of which data and settings it is a position. Worker processes
decode and encode whole rows ahead; a row's content never depends on who made it.
"""

import bisect
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from phi3v_data.shard_format import ShardEntry, ShardError
from phi3v_data.shard_store import LocalStore
from phi3v_data.shards import ShardReader

from phi3v_train.chat import ChatEncoder
from phi3v_train.collator import Batch, EncodedSample, SampleEncoder, collate, dummy_sample
from phi3v_train.epoch_order import Shards, default_window_bytes
from phi3v_train.fetch_ahead import FetchAhead
from phi3v_train.hd_transform import Resize
from phi3v_train.image_lengths import image_lengths
from phi3v_train.mixture import mixture_samples
from phi3v_train.plan import (
    BatchUnit,
    EpochPlan,
    PlanSettings,
    Row,
    plan_epoch,
    split_overlong,
)
from phi3v_train.row_workers import Request, rows_ahead
from phi3v_train.shared_rows import row_bytes
from phi3v_train.sources import Source, Sources, open_sources
from phi3v_train.text_lengths import text_lengths

MOST_NAMED = 5
"""Samples listed by id where many have the same problem."""

PREFETCH_BYTES = 512 << 20
"""Of rows ahead of the trainer, unless said otherwise."""


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
    global_batch_unit: BatchUnit = "samples"
    """What `global_batch_size` counts: `samples` or `label_tokens`."""
    temperature: float = 1.0
    """Of a mixture; see `phi3v_train.mixture`."""
    epoch_size: int | None = None
    """Samples in an epoch of a mixture; none: as many as there are."""
    first: int | None = None
    """Use only the first so many samples; none: all."""
    window_bytes: int | None = 0
    """Samples are mixed with those of shards so near in the epoch's order; 0: all with all; none:
    all with all on this disk, and 128 shards where a directory is in an object store."""
    damaged: Literal["error", "skip"] = "error"
    """What becomes of a sample whose bytes are damaged in its shard."""
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    """Processes that make rows; 0: this one."""
    prefetch_bytes: int = PREFETCH_BYTES
    """Of rows that workers make ahead, all together."""


@dataclass(frozen=True, slots=True, eq=False)
class Measures:
    """What every sample amounts to, (N,) each."""

    num_tokens: NDArray[np.int64]
    num_crops: NDArray[np.int64]
    """Crops the vision tower runs, global views included."""
    num_images: NDArray[np.int64]
    num_label_tokens: NDArray[np.int64]
    """Tokens that carry loss."""


def measure_shards(
    reader: ShardReader,
    encoder: SampleEncoder,
    on_progress: Callable[[int], None] | None = None,
    *,
    cache_dir: Path | None = None,
) -> Measures:
    """Measure every sample, from texts and image sizes in the index.

    Args:
        reader: of a shard directory.
        encoder: tokenizer and crop count.
        on_progress: called with the number of samples measured so far.
        cache_dir: where text lengths are stored; none: the user's cache.

    Raises:
        ValueError: a sample that cannot be encoded; the message names it.
    """
    texts = text_lengths(reader, encoder.chat, cache_dir=cache_dir, on_progress=on_progress)
    images = image_lengths(reader, encoder.num_crops)
    return Measures(
        num_tokens=texts.num_tokens + images.num_tokens,
        num_crops=images.num_crops,
        num_images=images.num_images,
        num_label_tokens=texts.num_label_tokens,
    )


def measure_sources(
    sources: Sources,
    encoder: SampleEncoder,
    on_progress: Callable[[int, int], None] | None = None,
) -> Measures:
    """Measure every sample of several shard directories, in the order of their numbers.

    Args:
        sources: the directories.
        encoder: tokenizer and crop count.
        on_progress: called with the number of samples measured so far, and that of all.

    Raises:
        ValueError: a sample that cannot be encoded; the message names it.
    """
    parts: list[Measures] = []
    for reader, start in zip(sources.readers, sources.starts[:-1], strict=True):

        def report(count: int, start: int = start) -> None:
            if on_progress is not None:
                on_progress(start + count, len(sources))

        parts.append(measure_shards(reader, encoder, report))
    return Measures(
        num_tokens=np.concatenate([part.num_tokens for part in parts]),
        num_crops=np.concatenate([part.num_crops for part in parts]),
        num_images=np.concatenate([part.num_images for part in parts]),
        num_label_tokens=np.concatenate([part.num_label_tokens for part in parts]),
    )


class TrainStream:
    """One rank's rows of a training run; make it with `open_stream`."""

    def __init__(
        self,
        sources: Sources,
        encoder: SampleEncoder,
        measures: Measures,
        settings: StreamSettings,
    ) -> None:
        self.sources = sources
        self.encoder = encoder
        self.measures = measures
        self.settings = settings
        lengths = measures.num_tokens[: settings.first]
        fitting, overlong = split_overlong(lengths, settings.max_tokens_per_row)
        self.overlong = overlong
        """Numbers of the samples longer than a row."""
        if len(overlong) and settings.overlong == "error":
            raise ValueError(
                f"{len(overlong)} of {len(sources)} samples are longer than a row of "
                f"{settings.max_tokens_per_row} tokens ({self.name_overlong()}); raise "
                "data.max_tokens_per_row, lower data.num_crops, or set data.overlong=drop"
            )
        if not len(fitting):
            raise ValueError(
                f"{sources.name} has no sample that fits a row of {settings.max_tokens_per_row} "
                "tokens; raise data.max_tokens_per_row"
            )
        self.num_skipped = 0
        """Samples of this rank that were damaged and left out so far."""
        self._skipped: list[str] = []
        self._samples = fitting
        self._plans: dict[int, EpochPlan] = {}
        self._epoch_ends: list[int] = []  # steps up to the end of each epoch, as far as asked for

    def name_overlong(self) -> str:
        """The first samples that are longer than a row, by id and length, and how many more."""
        names = [
            f"{self.sources.sample(int(n)).id}: {self.measures.num_tokens[n]} tokens"
            for n in self.overlong[:MOST_NAMED]
        ]
        more = len(self.overlong) - len(names)
        return ", ".join(names) + (f", and {more} more" if more else "")

    @cached_property
    def identity(self) -> PlanSettings:
        """What a position in this stream is a position of."""
        return PlanSettings(
            dataset_fingerprint=self._fingerprint(),
            tokenizer_hash=self.encoder.chat.fingerprint,
            num_crops=self.settings.num_crops,
            max_tokens_per_row=self.settings.max_tokens_per_row,
            seed=self.settings.seed,
            global_batch_size=self.settings.global_batch_size,
            resize=self.settings.resize,
            global_batch_unit=self.settings.global_batch_unit,
            window_bytes=self.window_bytes,
        )

    @cached_property
    def window_bytes(self) -> int:
        """`settings.window_bytes`, decided."""
        if self.settings.window_bytes is not None:
            return self.settings.window_bytes
        if all(isinstance(reader.store, LocalStore) for reader in self.sources.readers):
            return 0
        return default_window_bytes([entry.num_bytes for entry in self._entries])

    @property
    def _entries(self) -> list[ShardEntry]:
        return [entry for reader in self.sources.readers for entry in reader.manifest.shards]

    def _fingerprint(self) -> str:
        """Of all data and how it is mixed."""
        parts = [self.sources.fingerprint]
        if self.is_mixture and self.settings.temperature != 1:
            parts.append(f"temperature {self.settings.temperature:g}")
        if self.is_mixture and self.settings.epoch_size is not None:
            parts.append(f"{self.settings.epoch_size} samples an epoch")
        return "; ".join(parts)

    @property
    def is_mixture(self) -> bool:
        """Whether an epoch holds something else than every sample once."""
        return (
            self.sources.weights is not None
            or self.settings.temperature != 1
            or self.settings.epoch_size is not None
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in the first epoch."""
        return self._epoch_end(0)

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all epochs."""
        return self._epoch_end(self.settings.num_epochs - 1)

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a step counted from the start of the run."""
        while self._epoch_end(len(self._epoch_ends) - 1) <= step:
            self._epoch_end(len(self._epoch_ends))
        epoch = bisect.bisect_right(self._epoch_ends, step)
        return epoch, step - (self._epoch_ends[epoch - 1] if epoch else 0)

    def epochs_at(self, done: int) -> float:
        """Epochs, whole and begun, behind the first `done` steps."""
        if done == 0:
            return 0.0
        epoch, within = self.epoch_of(done - 1)
        return epoch + (within + 1) / self.plan(epoch).num_steps

    def _epoch_end(self, epoch: int) -> int:
        while len(self._epoch_ends) <= max(epoch, 0):
            start = self._epoch_ends[-1] if self._epoch_ends else 0
            self._epoch_ends.append(start + self.plan(len(self._epoch_ends)).num_steps)
        return self._epoch_ends[max(epoch, 0)]

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch; the last one asked for is kept, and the one before it."""
        if epoch not in self._plans:
            plan = plan_epoch(
                self.measures.num_tokens,
                self.measures.num_crops,
                seed=self.settings.seed,
                epoch=epoch,
                global_batch_size=self.settings.global_batch_size,
                world_size=self.settings.world_size,
                max_tokens_per_row=self.settings.max_tokens_per_row,
                samples=self._samples_of(epoch),
                global_batch_unit=self.settings.global_batch_unit,
                num_label_tokens=self.measures.num_label_tokens,
                num_images=self.measures.num_images,
                shards=self._shards,
            )
            # Two: what is fetched ahead may be of the next epoch.
            kept = {e: p for e, p in self._plans.items() if e == epoch - 1}
            self._plans = {**kept, epoch: plan}
        return self._plans[epoch]

    def _samples_of(self, epoch: int) -> NDArray[np.int64]:
        if not self.is_mixture:
            return self._samples
        return mixture_samples(
            self.sources.sizes,
            seed=self.settings.seed,
            epoch=epoch,
            weights=self.sources.weights,
            temperature=self.settings.temperature,
            epoch_size=self.settings.epoch_size,
            usable=self._samples,
        )

    @cached_property
    def _shards(self) -> Shards | None:
        if not self.window_bytes:
            return None
        return Shards(
            sizes=[entry.num_samples for entry in self._entries],
            num_bytes=[entry.num_bytes for entry in self._entries],
            window_bytes=self.window_bytes,
        )

    def samples_by_source(self, epoch: int) -> list[int]:
        """Visits of samples of each source in an epoch."""
        starts = np.array(self.sources.starts)
        sources = np.searchsorted(starts, self.plan(epoch).order, side="right") - 1
        return np.bincount(sources, minlength=len(self.sources.readers)).tolist()

    def rows_of_step(self, step: int) -> tuple[Row, ...]:
        """The rows this rank runs in a step, counted from the start of the run."""
        epoch, within = self.epoch_of(step)
        return self.plan(epoch).rows(within, self.settings.rank)

    def steps(
        self, start: int = 0, stop: int | None = None
    ) -> Generator[tuple[int, list[Batch]], None, None]:
        """Yield (step, its rows on this rank), in order. Close it where you leave early.

        Args:
            start: steps already done.
            stop: the step to stop before; default: the end of the last epoch.

        Raises:
            ValueError: a sample that cannot be read or encoded; the message names it and its shard.
            WorkerDied: a worker was killed.
        """
        stop = self.num_steps if stop is None else stop
        if start >= stop:
            return
        planned: dict[int, tuple[Row, ...]] = {}  # steps that were asked for and are not done

        def requests() -> Iterator[Request]:
            for step in range(start, stop):
                rows = planned[step] = self.rows_of_step(step)
                yield from (Request(row, self._row_bytes(row)) for row in rows)

        def rows_to_come() -> Iterator[Row]:
            for step in range(start, stop):
                yield from self.rows_of_step(step)

        with ExitStack() as stack:
            batches = stack.enter_context(closing(self._rows(requests())))
            ahead: FetchAhead | None = None
            for step in range(start, stop):
                made = [next(batches)]  # all ranks run at least one; now its step is planned
                if ahead is None:  # workers are forked by now: no thread of ours is copied
                    ahead = stack.enter_context(FetchAhead(self.sources, rows_to_come))
                rows = planned.pop(step)
                made += [next(batches) for _ in rows[1:]]
                for row, batch in zip(rows, made, strict=True):
                    if self.settings.num_workers:
                        ahead.passed(row)
                    self._note_skipped(row, batch)
                yield step, made

    def _note_skipped(self, row: Row, batch: Batch) -> None:
        if self.settings.damaged == "skip" and len(set(batch.sample_ids) - {""}) < len(row):
            made = set(batch.sample_ids)
            for number in row:
                try:
                    name = self.sources.sample(number).id
                except ShardError:
                    name = f"number {number}"
                if name not in made:
                    self.num_skipped += 1
                    self._skipped.append(f"{name} of {self.sources.place(number)}")

    def take_skipped(self) -> list[str]:
        """Name and shard of the samples that were left out since this was last asked."""
        taken, self._skipped = self._skipped, []
        return taken

    def _rows(self, requests: Iterator[Request]) -> Generator[Batch, None, None]:
        if self.settings.num_workers == 0:
            return (collate(self.encode_row(request.numbers)) for request in requests)
        return rows_ahead(
            requests,
            self.encode_row,
            num_workers=self.settings.num_workers,
            max_bytes=self.settings.prefetch_bytes,
        )

    def encode_row(self, numbers: Sequence[int]) -> list[EncodedSample]:
        """The samples of a row, read, decoded and encoded; of an empty row, one without loss.

        Damaged ones are left out where the settings say so.

        Raises:
            ValueError: a sample that cannot be read or encoded; the message names it and its shard.
        """
        if not numbers:
            return [dummy_sample(self.encoder.chat.ids.bos)]
        encoded: list[EncodedSample] = []
        for number in numbers:
            try:
                record = self.sources[number]
                sample, images = record.sample, record.images
            except ShardError as error:
                if self.settings.damaged == "error":
                    raise self._placed(error, number) from error
                continue
            try:
                encoded.append(self.encoder(sample, images))
            except ValueError as error:
                raise self._placed(error, number) from error
        return encoded or [dummy_sample(self.encoder.chat.ids.bos)]

    def _placed(self, error: ValueError, number: int) -> ValueError:
        """The same with the shard in its message."""
        place, told = self.sources.place(number), str(error)
        return ValueError(told if place in told else f"{place}: {told}")

    def _row_bytes(self, row: Row) -> int:
        if not row:
            return row_bytes(1, 1, 0, 0)
        numbers = np.array(row)
        measures = self.measures
        num_images = int(measures.num_images[numbers].sum())
        return row_bytes(
            num_tokens=int(measures.num_tokens[numbers].sum()),
            num_samples=len(row),
            num_images=num_images,
            num_local_crops=int(measures.num_crops[numbers].sum()) - num_images,
        )


def open_stream(
    shards: str | Path | Sequence[Source],
    model_folder: str | Path,
    settings: StreamSettings,
    on_progress: Callable[[int, int], None] | None = None,
) -> TrainStream:
    """Open a shard directory, or several, for training.

    Args:
        shards: made by `phi3v-data shard`; several with their weights.
        model_folder: holds the `tokenizer.json`.
        settings: see there.
        on_progress: called with the number of samples measured so far, and that of all.

    Raises:
        ValueError: not shards, not a model folder, or samples longer than a row.
    """
    listed = [Source(shards)] if isinstance(shards, str | Path) else shards
    sources = open_sources(listed)
    encoder = SampleEncoder(ChatEncoder(model_folder), settings.num_crops, settings.resize)
    return TrainStream(sources, encoder, measure_sources(sources, encoder, on_progress), settings)
