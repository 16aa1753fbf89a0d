"""An epoch planned shard by shard: for what is too large to hold the lengths of at once.

    steps = plan_shards(shards, measure, seed=0, epoch=0, global_batch_size=64, world_size=8,
                        max_tokens_per_row=8192, start=120)
    for planned in steps:
        planned.step, planned.samples, planned.rows[rank]       # 120, (17, 4, ...), ((17, 9), ...)

`measure(shard)` gives the lengths of one shard's samples when the order comes to it. Held are the
measures of the samples that the window spans and of the step being filled; steps and rows are those
of `phi3v_train.plan.plan_epoch` with the same `shards`, one after the other.

What one gives up: the number of steps is known at the end only, and to go on at a step, the order
before it is made again, without dealing it (a fraction of a µs a sample, and `measure` of the
shards before it).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from phi3v_train.epoch_order import Numbers, Shards, windowed_runs
from phi3v_train.plan import (
    BatchUnit,
    Row,
    check_counts,
    check_labels,
    check_lengths,
    check_settings,
    deal_rows,
    label_token_starts,
    steps_at_once,
)

_SAMPLES_AT_ONCE = 1 << 15
"""Cut into steps and dealt together: a few MB, and several times faster than step by step."""


@dataclass(frozen=True, eq=False)
class ShardMeasures:
    """What is known of one shard's samples, in their order."""

    num_tokens: Numbers
    num_crops: Numbers
    """Crops the vision tower runs, global views included."""
    num_label_tokens: Numbers | None = None
    """Needed where the global batch is counted in them."""


@dataclass(frozen=True)
class PlannedStep:
    """One step of an epoch."""

    step: int
    """From 0."""
    samples: Row
    """In the order of the epoch."""
    rows: tuple[tuple[Row, ...], ...]
    """One tuple per rank, all equally long, of tuples of samples; an empty row is a dummy."""


def plan_shards(
    shards: Shards,
    measure: Callable[[int], ShardMeasures],
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
    world_size: int,
    max_tokens_per_row: int,
    global_batch_unit: BatchUnit = "samples",
    drop_overlong: bool = False,
    start: int = 0,
) -> Iterator[PlannedStep]:
    """Plan one epoch, step by step.

    Args:
        shards: and the window in which their samples are mixed.
        measure: a shard's number to the lengths of its samples; called once per shard.
        seed: of the run.
        epoch: from 0.
        global_batch_size: per step over all ranks, in `global_batch_unit`.
        world_size: number of ranks.
        max_tokens_per_row: capacity of a row.
        global_batch_unit: see `phi3v_train.plan.plan_epoch`.
        drop_overlong: leave out samples that are longer than a row; else they are an error.
        start: the first step to yield.

    Raises:
        ValueError: an argument makes no plan; a sample does not fit, when its shard is reached.
    """
    check_settings(
        seed=seed,
        epoch=epoch,
        global_batch_size=global_batch_size,
        world_size=world_size,
        max_tokens_per_row=max_tokens_per_row,
        global_batch_unit=global_batch_unit,
    )
    if start < 0:
        raise ValueError(f"start must be at least 0, got {start}")
    needs_labels = global_batch_unit == "label_tokens"

    def steps() -> Iterator[PlannedStep]:
        step = 0
        measured = _Measured(shards, measure, needs_labels)
        pending = np.empty((4, 0), np.int64)  # samples, lengths, crops, labels
        for shard, samples in windowed_runs(shards, seed=seed, epoch=epoch):
            more = measured.take(samples)
            if drop_overlong:
                more = more[:, more[1] <= max_tokens_per_row]
            check_lengths(more[0], more[1], max_tokens_per_row)
            pending = np.concatenate([pending, more], axis=1)
            is_last = shard == len(shards.sizes)
            if not is_last:
                measured.open(shard)
                if pending.shape[1] < _SAMPLES_AT_ONCE:
                    continue
            starts = _starts(pending, global_batch_size, needs_labels, with_rest=is_last)
            skipped = min(max(start - step, 0), len(starts) - 1)
            at_once = steps_at_once(starts, _SAMPLES_AT_ONCE)
            for first in range(skipped, len(starts) - 1, at_once):
                bounds = starts[first : first + at_once + 1]
                numbers, lengths, crops, _ = pending[:, bounds[0] : bounds[-1]]
                dealt = deal_rows(
                    numbers,
                    bounds - bounds[0],
                    lengths,
                    crops,
                    world_size=world_size,
                    capacity=max_tokens_per_row,
                )
                for place, rows in enumerate(dealt):
                    of_step = pending[0, bounds[place] : bounds[place + 1]]
                    yield PlannedStep(step + first + place, tuple(of_step.tolist()), rows)
            step += len(starts) - 1
            pending = pending[:, starts[-1] :].copy()

    return steps()


def _starts(
    pending: Numbers, global_batch_size: int, needs_labels: bool, *, with_rest: bool
) -> Numbers:
    """Where the steps start in what is pending, and behind them where the whole ones end."""
    count = pending.shape[1]
    if not needs_labels:
        starts = np.append(np.arange(0, count, global_batch_size), count)
        is_whole = count % global_batch_size == 0
    else:
        labels = check_labels(pending[0], pending[3])
        starts = label_token_starts(labels, global_batch_size)
        is_whole = not count or int(labels[starts[-2] :].sum()) >= global_batch_size
    return starts if with_rest or is_whole else starts[:-1]


class _Measured:
    """The measures of the shards that still have samples to come."""

    def __init__(
        self, shards: Shards, measure: Callable[[int], ShardMeasures], needs_labels: bool
    ) -> None:
        self.shards = shards
        self.measure = measure
        self.needs_labels = needs_labels
        self.of: dict[int, Numbers] = {}
        """(3, samples): lengths, crops, labels (0 where not needed) of each shard."""
        self.left: dict[int, int] = {}

    def open(self, shard: int) -> None:
        """Ask for a shard's measures."""
        found = self.measure(shard)
        lengths = np.asarray(found.num_tokens, np.int64)
        crops = np.asarray(found.num_crops, np.int64)
        if len(lengths) != self.shards.sizes[shard]:
            raise ValueError(
                f"expected {self.shards.sizes[shard]} lengths of shard {shard}, got {len(lengths)}"
            )
        labels = np.zeros_like(lengths)
        if self.needs_labels:
            if found.num_label_tokens is None:
                raise ValueError("global_batch_unit='label_tokens' needs num_label_tokens")
            labels = np.asarray(found.num_label_tokens, np.int64)
        check_counts(lengths, crops, labels)
        if len(lengths):
            self.of[shard] = np.stack([lengths, crops, labels])
            self.left[shard] = len(lengths)

    def take(self, samples: Numbers) -> Numbers:
        """(4, samples): themselves and their measures; a shard is let go with its last sample."""
        taken = np.empty((4, len(samples)), np.int64)
        taken[0] = samples
        shard_of = self.shards.of(samples)
        by_shard = np.argsort(shard_of, kind="stable")
        shards, starts = np.unique(shard_of[by_shard], return_index=True)
        for shard, places in zip(shards.tolist(), np.split(by_shard, starts[1:]), strict=False):
            taken[1:, places] = self.of[shard][:, samples[places] - self.shards.first[shard]]
            self.left[shard] -= len(places)
            if not self.left[shard]:
                del self.of[shard], self.left[shard]
        return taken
