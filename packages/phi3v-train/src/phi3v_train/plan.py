"""The plan of an epoch as arithmetic: which samples form which row of which step on which rank.

Lengths and crop counts of all samples go in, before any image is read; rows of sample numbers come
out. Nothing is drawn from a random generator's state, so a run resumes from one integer, the step.

    >>> plan = plan_epoch([700, 300, 500, 900], [1, 1, 1, 4], seed=0, epoch=0,
    ...                   global_batch_size=4, world_size=2, max_tokens_per_row=1000)
    >>> plan.num_steps
    1
    >>> plan.rows(0, 0), plan.rows(0, 1)
    (((3,), (1,)), ((0,), (2,)))

1. *Order* (`phi3v_train.epoch_order`): a sort by keys made of seed, epoch and sample number.
2. *Step* k is the k-th run of that order: `global_batch_size` samples, or the fewest that hold so
   many label tokens (the last may hold less). World size and packing have no part in it.
3. *Deal* (`phi3v_train.deal`): the step's samples to ranks by cost, and there into rows. Rows are
   not padded; all ranks run equally many, a rank that has fewer gets empty ones (dummies).

Steps are dealt when they are asked for, some at a time: a plan of any size is there at once. What
is too large to sort at all is planned shard by shard, by `phi3v_train.shard_plan`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from phi3v_train.deal import Deal, deal_steps, sample_cost
from phi3v_train.epoch_order import Numbers, Shards, epoch_order, windowed_order

PLAN_VERSION = 2
"""Raised when the same arguments give another plan; a checkpoint of another version is refused."""

Row = tuple[int, ...]
BatchUnit = Literal["samples", "label_tokens"]
"""What the global batch is counted in."""

_SAMPLES_AT_ONCE = 4096
"""Dealt together where single steps are asked for: enough for numpy, milliseconds to wait for."""

_SAMPLES_AT_ONCE_IN_ALL = 1 << 18
"""Dealt together where all steps are: some 100 MB of arrays."""


@dataclass(frozen=True)
class PlanSummary:
    """What a plan amounts to, for `--dry-run` and the log."""

    num_samples: int
    """Visits of samples: one that comes twice counts twice."""

    num_dropped: int
    num_steps: int
    num_tokens: int

    num_label_tokens: int | None
    """None where the plan was made without label counts."""

    num_rows: int
    """Rows that hold samples, over all ranks."""

    num_empty_rows: int
    """Dummies, over all ranks."""

    utilisation: float
    """Tokens / (rows that hold samples x capacity); 0 to 1."""

    balance: float
    """Mean over the steps of (mean cost of a rank / dearest rank's cost); 1 is even."""

    tokens_per_rank: tuple[int, ...]
    crops_per_rank: tuple[int, ...]

    images_per_rank: tuple[int, ...] | None
    """None where the plan was made without image counts."""


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """One epoch. Steps are packed when asked for: a plan of any size is there at once."""

    order: Numbers
    """Sample numbers in the order of the epoch."""

    starts: Numbers
    """Where in the order each step starts, and behind them the length of the order."""

    num_tokens: Numbers
    """Per sample of the data set."""

    num_crops: Numbers
    """Per sample of the data set."""

    world_size: int
    max_tokens_per_row: int

    num_label_tokens: Numbers | None = None
    """Per sample of the data set, where known."""

    num_images: Numbers | None = None
    """Per sample of the data set, where known."""

    _dealt: dict[int, tuple[tuple[tuple[Row, ...], ...], ...]] = field(
        default_factory=dict, repr=False
    )  # the last block of steps: a cache, no state

    @property
    def num_steps(self) -> int:
        """Optimizer steps in this epoch."""
        return len(self.starts) - 1

    @property
    def num_dropped(self) -> int:
        """Samples of the data set that have no part in this epoch."""
        visited = np.zeros(len(self.num_tokens), bool)
        visited[self.order] = True
        return len(visited) - int(visited.sum())

    def samples(self, step: int) -> Row:
        """The samples of a step, in the order of the epoch."""
        assert 0 <= step < self.num_steps, f"step {step} of {self.num_steps}"
        return tuple(self.order[self.starts[step] : self.starts[step + 1]].tolist())

    def step_rows(self, step: int) -> tuple[tuple[Row, ...], ...]:
        """The rows of a step: one tuple per rank, all equally long, of tuples of samples."""
        assert 0 <= step < self.num_steps, f"step {step} of {self.num_steps}"
        at_once = steps_at_once(self.starts)
        block = step // at_once
        if block not in self._dealt:
            first = block * at_once
            rows = self._rows_of(first, min(first + at_once, self.num_steps))
            self._dealt.clear()
            self._dealt[block] = rows
        return self._dealt[block][step % at_once]

    def rows(self, step: int, rank: int) -> tuple[Row, ...]:
        """The rows that `rank` runs in `step`, in order; an empty row is a dummy."""
        assert 0 <= rank < self.world_size, f"rank {rank} of {self.world_size}"
        return self.step_rows(step)[rank]

    def _rows_of(self, first: int, stop: int) -> tuple[tuple[tuple[Row, ...], ...], ...]:
        starts = self.starts[first : stop + 1]
        samples = self.order[starts[0] : starts[-1]]
        return deal_rows(
            samples,
            starts - starts[0],
            self.num_tokens[samples],
            self.num_crops[samples],
            world_size=self.world_size,
            capacity=self.max_tokens_per_row,
        )

    def summary(self) -> PlanSummary:
        """Deal every step and count; one to two µs a sample."""
        num_rows = num_run = 0
        balance = 0.0
        tokens, crops, images = (np.zeros(self.world_size, np.int64) for _ in range(3))
        at_once = steps_at_once(self.starts, _SAMPLES_AT_ONCE_IN_ALL)
        for first in range(0, self.num_steps, at_once):
            starts = self.starts[first : first + at_once + 1]
            numbers = self.order[starts[0] : starts[-1]]
            lengths = self.num_tokens[numbers]
            costs = sample_cost(lengths, self.num_crops[numbers])
            deal, there = _deal_runs(
                starts - starts[0],
                lengths,
                costs,
                world_size=self.world_size,
                capacity=self.max_tokens_per_row,
            )
            num_steps = len(deal.rows_per_rank)
            rank = (deal.row // deal.rows_per_rank[:, None])[there]
            step = np.repeat(np.arange(num_steps), np.diff(starts))
            # Costs are whole numbers below 2**53: their sums are exact in float64 too.
            loads = np.bincount(
                step * self.world_size + rank, costs, num_steps * self.world_size
            ).reshape(num_steps, self.world_size)
            balance += float((loads.mean(axis=1) / loads.max(axis=1)).sum())
            run = deal.rows_per_rank * self.world_size
            filled = np.zeros((num_steps, run.max()), bool)
            filled[step, deal.row[there]] = True
            num_rows += int(filled.sum())
            num_run += int(run.sum())
            tokens += _sum_by(rank, lengths, self.world_size)
            crops += _sum_by(rank, self.num_crops[numbers], self.world_size)
            if self.num_images is not None:
                images += _sum_by(rank, self.num_images[numbers], self.world_size)
        num_tokens = int(tokens.sum())
        labels = self.num_label_tokens
        return PlanSummary(
            num_samples=len(self.order),
            num_dropped=self.num_dropped,
            num_steps=self.num_steps,
            num_tokens=num_tokens,
            num_label_tokens=None if labels is None else int(labels[self.order].sum()),
            num_rows=num_rows,
            num_empty_rows=num_run - num_rows,
            utilisation=num_tokens / (num_rows * self.max_tokens_per_row) if num_rows else 0.0,
            balance=balance / self.num_steps if self.num_steps else 1.0,
            tokens_per_rank=tuple(tokens.tolist()),
            crops_per_rank=tuple(crops.tolist()),
            images_per_rank=None if self.num_images is None else tuple(images.tolist()),
        )


def _sum_by(rank: Numbers, values: Numbers, world_size: int) -> Numbers:
    return np.bincount(rank, values, world_size).astype(np.int64)


def split_overlong(
    num_tokens: Sequence[int] | Numbers, max_tokens_per_row: int
) -> tuple[Numbers, Numbers]:
    """Sample numbers that fit a row, and those that don't, both rising."""
    fits = np.asarray(num_tokens, np.int64) <= max_tokens_per_row
    return np.flatnonzero(fits).astype(np.int64), np.flatnonzero(~fits).astype(np.int64)


def plan_epoch(
    num_tokens: Sequence[int] | Numbers,
    num_crops: Sequence[int] | Numbers,
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
    world_size: int,
    max_tokens_per_row: int,
    samples: Sequence[int] | Numbers | None = None,
    global_batch_unit: BatchUnit = "samples",
    num_label_tokens: Sequence[int] | Numbers | None = None,
    num_images: Sequence[int] | Numbers | None = None,
    shards: Shards | None = None,
) -> EpochPlan:
    """Plan one epoch.

    Args:
        num_tokens: length of every sample of the data set, (N,).
        num_crops: crops of every sample that the vision tower runs, global views included, (N,).
        seed: of the run.
        epoch: from 0.
        global_batch_size: per step over all ranks, in `global_batch_unit`.
        world_size: number of ranks.
        max_tokens_per_row: capacity of a row.
        samples: the sample numbers to plan, for example those that `split_overlong` keeps or
            `mixture_samples` draws; one may occur several times and is then visited as often.
            None: all N.
        global_batch_unit: `samples`: every step has as many. `label_tokens`: a step is the
            shortest run of the order whose label tokens reach `global_batch_size`, so that it
            has at most one sample more than needed; epochs may then differ in their number of
            steps.
        num_label_tokens: tokens that carry loss, of every sample, (N,); needed where the batch is
            counted in them, else for the summary.
        num_images: of every sample, (N,); for the summary.
        shards: visit the samples shard by shard, mixed within a window; none: in any order.

    Raises:
        ValueError: a sample is longer than a row, or an argument makes no plan.
    """
    lengths, crops, labels, images = (
        None if counts is None else np.asarray(counts, np.int64)
        for counts in (num_tokens, num_crops, num_label_tokens, num_images)
    )
    assert lengths is not None
    assert crops is not None
    check_counts(lengths, crops, labels, images)
    check_settings(
        seed=seed,
        epoch=epoch,
        global_batch_size=global_batch_size,
        world_size=world_size,
        max_tokens_per_row=max_tokens_per_row,
        global_batch_unit=global_batch_unit,
    )
    chosen = np.arange(len(lengths)) if samples is None else np.asarray(samples, np.int64)
    check_lengths(chosen, lengths[chosen], max_tokens_per_row)
    if shards is None:
        order = epoch_order(chosen, seed=seed, epoch=epoch)
    else:
        if shards.first[-1] != len(lengths):
            raise ValueError(
                f"expected the shards to hold {len(lengths)} samples, got {shards.first[-1]}"
            )
        order = windowed_order(chosen, shards, seed=seed, epoch=epoch)
    if global_batch_unit == "samples":
        starts = np.append(np.arange(0, len(order), global_batch_size), len(order))
    else:
        if labels is None:
            raise ValueError("global_batch_unit='label_tokens' needs num_label_tokens")
        starts = label_token_starts(check_labels(order, labels[order]), global_batch_size)
    return EpochPlan(
        order=order,
        starts=starts,
        num_tokens=lengths,
        num_crops=crops,
        world_size=world_size,
        max_tokens_per_row=max_tokens_per_row,
        num_label_tokens=labels,
        num_images=images,
    )


# --- what may go in ------------------------------------------------------------------------------


def check_settings(
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
    world_size: int,
    max_tokens_per_row: int,
    global_batch_unit: str,
) -> None:
    """Refuse settings that make no plan.

    Raises:
        ValueError: which, and what was expected.
    """
    for name, value in (
        ("global_batch_size", global_batch_size),
        ("world_size", world_size),
        ("max_tokens_per_row", max_tokens_per_row),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} must be from 0 to 2**64 - 1, got {value}")
    if global_batch_unit not in get_args(BatchUnit):
        raise ValueError(
            f"global_batch_unit must be one of {get_args(BatchUnit)}, got {global_batch_unit!r}"
        )


def check_counts(lengths: Numbers, crops: Numbers, *others: Numbers | None) -> None:
    """Refuse arrays that are not one number per sample.

    Raises:
        ValueError: their shapes.
    """
    if lengths.shape != crops.shape or lengths.ndim != 1:
        raise ValueError(
            "expected one length and one crop count per sample, "
            f"got {lengths.shape} lengths and {crops.shape} crop counts"
        )
    for other in others:
        if other is not None and other.shape != lengths.shape:
            raise ValueError(
                f"expected one label and image count per sample, got {other.shape} "
                f"for {lengths.shape} lengths"
            )


def check_lengths(samples: Numbers, lengths: Numbers, max_tokens_per_row: int) -> None:
    """Refuse samples that no row holds.

    Raises:
        ValueError: the first of them, and how many there are.
    """
    too_long = np.flatnonzero(lengths > max_tokens_per_row)
    if len(too_long):
        first = too_long[0]
        raise ValueError(
            f"sample {samples[first]} has {lengths[first]} tokens and {len(too_long)} samples do "
            f"not fit a row of {max_tokens_per_row}; raise max_tokens_per_row or leave them out"
        )
    empty = np.flatnonzero(lengths < 1)
    if len(empty):
        raise ValueError(f"sample {samples[empty[0]]} has {lengths[empty[0]]} tokens: at least 1")


def check_labels(samples: Numbers, labels: Numbers) -> Numbers:
    """Refuse samples that would never fill a batch counted in label tokens.

    Raises:
        ValueError: the first of them.
    """
    without = np.flatnonzero(labels < 1)
    if len(without):
        raise ValueError(
            f"sample {samples[without[0]]} has {labels[without[0]]} label tokens; leave out what "
            "has none, or count the global batch in samples"
        )
    return labels


# --- steps and rows ------------------------------------------------------------------------------


def label_token_starts(labels: Numbers, global_batch_size: int) -> Numbers:
    """Where the shortest runs start that hold `global_batch_size` label tokens each.

    Args:
        labels: label tokens of the samples in their order, at least 1 each.
        global_batch_size: label tokens of a step.

    Returns:
        The starts, rising, and behind them the number of samples; the last run may hold less.
    """
    sums = np.cumsum(labels)
    starts = [0]
    while starts[-1] < len(labels):
        before = sums[starts[-1] - 1] if starts[-1] else 0
        end = int(np.searchsorted(sums, before + global_batch_size)) + 1
        starts.append(min(end, len(labels)))
    return np.array(starts, np.int64)


def deal_rows(
    samples: Numbers,
    starts: Numbers,
    lengths: Numbers,
    crops: Numbers,
    *,
    world_size: int,
    capacity: int,
) -> tuple[tuple[tuple[Row, ...], ...], ...]:
    """The rows of several steps, per step and rank.

    Args:
        samples: of the steps, one step after the other.
        starts: where in them each step starts, and behind those their number.
        lengths: tokens of these samples.
        crops: of these samples.
        world_size: number of ranks.
        capacity: tokens of a row.
    """
    costs = sample_cost(lengths, crops)
    deal, there = _deal_runs(starts, lengths, costs, world_size=world_size, capacity=capacity)
    # The samples of a row, longest first.
    width = world_size * int(deal.rows_per_rank.max(initial=1))
    step = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    place = step * width + deal.row[there]
    sorted_by_row = np.lexsort((-lengths, place))
    bounds = np.searchsorted(place[sorted_by_row], np.arange((len(starts) - 1) * width + 1))
    numbers = samples[sorted_by_row].tolist()
    edges = bounds.tolist()

    def row(number: int) -> Row:
        return tuple(numbers[edges[number] : edges[number + 1]])

    return tuple(
        tuple(
            tuple(row(number * width + rank * count + k) for k in range(count))
            for rank in range(world_size)
        )
        for number, count in enumerate(deal.rows_per_rank.tolist())
    )


def steps_at_once(starts: Numbers, num_samples: int = _SAMPLES_AT_ONCE) -> int:
    """How many steps make about so many samples, all taken as long as the longest."""
    longest = int(np.diff(starts).max(initial=1))
    return max(1, num_samples // longest)


def _deal_runs(
    starts: Numbers, lengths: Numbers, costs: Numbers, *, world_size: int, capacity: int
) -> tuple[Deal, npt.NDArray[np.bool_]]:
    """Deal runs of samples; beside the deal, which of its places hold a sample."""
    sizes = np.diff(starts)
    there = np.arange(sizes.max(initial=0)) < sizes[:, None]
    table = np.zeros((2, *there.shape), np.int64)
    table[0, there], table[1, there] = lengths, costs
    return deal_steps(table[0], table[1], world_size=world_size, capacity=capacity), there


# --- identity ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanSettings:
    """Everything that decides which samples step k holds and how they are encoded.

    The world size is not among them: a run may go on with another number of ranks.
    """

    dataset_fingerprint: str
    """Of the shard directory; of several, of all of them and how they are mixed."""

    tokenizer_hash: str
    num_crops: int
    max_tokens_per_row: int
    seed: int
    global_batch_size: int
    resize: str = "exact"
    """How images are resized; `exact` is also what a checkpoint was that does not say it."""
    global_batch_unit: str = "samples"
    window_bytes: int = 0
    """0: samples are visited in any order, whatever shard they lie in."""
    version: int = PLAN_VERSION


def plan_changes(then: Mapping[str, Any], now: PlanSettings) -> tuple[str, ...]:
    """What differs from the settings in a checkpoint, as `field: old -> new`.

    Args:
        then: `dataclasses.asdict` of the settings that were saved.
        now: the settings of this run.
    """
    return tuple(
        f"{name}: {then.get(name, 'absent')} -> {value}"
        for name, value in asdict(now).items()
        if then.get(name, "absent") != value
    )
