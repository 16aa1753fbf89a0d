"""The order of an epoch as arithmetic: which samples form which row of which step on which rank.

Lengths and crop counts of all samples go in, before any image is read; rows of sample numbers come
out. Nothing is drawn from a random generator's state, so a run resumes from one integer, the step.

    >>> plan = plan_epoch([700, 300, 500, 900], [1, 1, 1, 4], seed=0, epoch=0,
    ...                   global_batch_size=4, world_size=2, max_tokens_per_row=1000)
    >>> plan.num_steps
    1
    >>> plan.rows(0, 0), plan.rows(0, 1)
    (((3,), (1,)), ((0,), (2,)))

1. *Order*: sample i has the key splitmix64 (i-th output of the generator started from seed and
   epoch); the epoch's order is the samples by rising key. Written out here so that no version of
   numpy can change it. A sample's key depends on its number alone: leaving one out moves no other
   before or behind its neighbours.
2. *Step* k is the k-th run of `global_batch_size` samples of that order (the last may be shorter).
   World size and packing have no part in it.
3. *Deal*: the step's samples, dearest first, each to the rank that carries the least so far. Cost
   is the model's arithmetic: linear and quadratic in tokens, linear in crops.
4. *Pack*: on its rank a step's samples, longest first, each into the first row with room. Rows are
   not padded; all ranks run equally many, a rank that has fewer gets empty ones (dummies).
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PLAN_VERSION = 1
"""Raised when the same arguments give another plan; a checkpoint of another version is refused."""

Numbers = npt.NDArray[np.int64]
Row = tuple[int, ...]


# --- cost ----------------------------------------------------------------------------------------

# Forward MFLOP of Phi-3.5-vision, in whole numbers so that every machine deals alike. Other sizes
# of the model keep about these proportions.
_MFLOP_PER_TOKEN = 7_249  # 2 x 3.624 G matmul weights
_MFLOP_PER_1000_TOKENS_SQUARED = 197  # causal attention: 32 layers x 2 x 3072 FLOP per pair
_MFLOP_PER_CROP = 372_700  # 23 CLIP layers on 577 tokens (366 G) and the projector


def sample_cost(num_tokens: Numbers, num_crops: Numbers) -> Numbers:
    """Forward cost of each sample in MFLOP; only the proportions matter."""
    return (
        _MFLOP_PER_TOKEN * num_tokens
        + num_tokens * num_tokens * _MFLOP_PER_1000_TOKENS_SQUARED // 1000
        + _MFLOP_PER_CROP * num_crops
    )


# --- order ---------------------------------------------------------------------------------------

_GOLDEN = 0x9E3779B97F4A7C15


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's output function (Steele, Lea, Flood 2014), a bijection of 64-bit words."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _keys(seed: int, epoch: int, samples: Numbers) -> npt.NDArray[np.uint64]:
    golden = np.uint64(_GOLDEN)
    start = _mix(np.array([seed], np.uint64) + golden)  # arrays wrap around, silently; scalars warn
    start = _mix(start + np.uint64(epoch) * np.ones(1, np.uint64) + golden)
    return _mix(start + (samples.astype(np.uint64) + np.uint64(1)) * golden)


def epoch_order(samples: Numbers, *, seed: int, epoch: int) -> Numbers:
    """The sample numbers in the order in which this epoch visits them."""
    return samples[np.argsort(_keys(seed, epoch, samples), kind="stable")]


# --- plan ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanSummary:
    """What a plan amounts to, for `--dry-run` and the log."""

    num_samples: int
    num_dropped: int
    num_steps: int
    num_tokens: int

    num_rows: int
    """Rows that hold samples, over all ranks."""

    num_empty_rows: int
    """Dummies, over all ranks."""

    utilisation: float
    """Tokens / (rows that hold samples x capacity); 0 to 1."""

    balance: float
    """Mean over the steps of (mean cost of a rank / dearest rank's cost); 1 is even."""


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """One epoch. Steps are packed when asked for: a plan of any size is there at once."""

    order: Numbers
    """Sample numbers in the order of the epoch."""

    num_tokens: Numbers
    """Per sample of the data set."""

    num_crops: Numbers
    """Per sample of the data set."""

    global_batch_size: int
    world_size: int
    max_tokens_per_row: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps in this epoch."""
        return -(-len(self.order) // self.global_batch_size)

    @property
    def num_dropped(self) -> int:
        """Samples of the data set that have no part in this epoch."""
        return len(self.num_tokens) - len(self.order)

    def samples(self, step: int) -> Row:
        """The samples of a step, in the order of the epoch."""
        assert 0 <= step < self.num_steps, f"step {step} of {self.num_steps}"
        start = step * self.global_batch_size
        return tuple(self.order[start : start + self.global_batch_size].tolist())

    def step_rows(self, step: int) -> tuple[tuple[Row, ...], ...]:
        """The rows of a step: one tuple per rank, all equally long, of tuples of samples."""
        samples = np.array(self.samples(step), np.int64)
        lengths = self.num_tokens[samples]
        costs = sample_cost(lengths, self.num_crops[samples])
        length_of = dict(zip(samples.tolist(), lengths.tolist(), strict=True))
        hands = _deal(samples.tolist(), costs.tolist(), self.world_size)
        packed = [_pack(hand, length_of, self.max_tokens_per_row) for hand in hands]
        most = max(len(rows) for rows in packed)
        return tuple(rows + ((),) * (most - len(rows)) for rows in packed)

    def rows(self, step: int, rank: int) -> tuple[Row, ...]:
        """The rows that `rank` runs in `step`, in order; an empty row is a dummy."""
        assert 0 <= rank < self.world_size, f"rank {rank} of {self.world_size}"
        return self.step_rows(step)[rank]

    def summary(self) -> PlanSummary:
        """Pack every step and count; about 5 µs a sample."""
        costs = sample_cost(self.num_tokens, self.num_crops)
        num_rows = num_empty = 0
        balance = 0.0
        for step in range(self.num_steps):
            ranks = self.step_rows(step)
            loads = [sum(int(costs[i]) for row in rows for i in row) for rows in ranks]
            balance += sum(loads) / len(loads) / max(loads) if max(loads) else 1.0
            full = sum(1 for rows in ranks for row in rows if row)
            num_rows += full
            num_empty += sum(len(rows) for rows in ranks) - full
        tokens = int(self.num_tokens[self.order].sum())
        return PlanSummary(
            num_samples=len(self.order),
            num_dropped=self.num_dropped,
            num_steps=self.num_steps,
            num_tokens=tokens,
            num_rows=num_rows,
            num_empty_rows=num_empty,
            utilisation=tokens / (num_rows * self.max_tokens_per_row) if num_rows else 0.0,
            balance=balance / self.num_steps if self.num_steps else 1.0,
        )


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
) -> EpochPlan:
    """Plan one epoch.

    Args:
        num_tokens: length of every sample of the data set, (N,).
        num_crops: crops of every sample that the vision tower runs, global views included, (N,).
        seed: of the run.
        epoch: from 0.
        global_batch_size: samples per step over all ranks.
        world_size: number of ranks.
        max_tokens_per_row: capacity of a row.
        samples: the sample numbers to plan, for example those that `split_overlong` keeps; none:
            all N.

    Raises:
        ValueError: a sample is longer than a row, or an argument makes no plan.
    """
    lengths = np.asarray(num_tokens, np.int64)
    crops = np.asarray(num_crops, np.int64)
    chosen = np.arange(len(lengths)) if samples is None else np.asarray(samples, np.int64)
    if lengths.shape != crops.shape or lengths.ndim != 1:
        raise ValueError(
            "expected one length and one crop count per sample, "
            f"got {lengths.shape} lengths and {crops.shape} crop counts"
        )
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
    too_long = chosen[lengths[chosen] > max_tokens_per_row]
    if len(too_long):
        first = int(too_long[0])
        raise ValueError(
            f"sample {first} has {lengths[first]} tokens and {len(too_long)} samples do not fit a "
            f"row of {max_tokens_per_row}; raise max_tokens_per_row or leave them out"
        )
    return EpochPlan(
        order=epoch_order(chosen.astype(np.int64), seed=seed, epoch=epoch),
        num_tokens=lengths,
        num_crops=crops,
        global_batch_size=global_batch_size,
        world_size=world_size,
        max_tokens_per_row=max_tokens_per_row,
    )


def _deal(samples: list[int], costs: list[int], world_size: int) -> list[list[int]]:
    """Dearest first, each to the least loaded rank; ties go to the lower rank."""
    hands: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]  # a heap already
    for cost, _, sample in sorted(
        (-cost, place, sample)
        for place, (cost, sample) in enumerate(zip(costs, samples, strict=True))
    ):
        load, rank = loads[0]
        hands[rank].append(sample)
        heapq.heapreplace(loads, (load - cost, rank))
    return hands


def _pack(hand: list[int], length_of: dict[int, int], capacity: int) -> tuple[Row, ...]:
    """First-fit decreasing."""
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in sorted(hand, key=lambda sample: -length_of[sample]):  # stable
        length = length_of[sample]
        for index, free in enumerate(room):
            if length <= free:
                rows[index].append(sample)
                room[index] -= length
                break
        else:
            rows.append([sample])
            room.append(capacity - length)
    return tuple(tuple(row) for row in rows)


# --- identity ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanSettings:
    """Everything that decides which samples step k holds and how they are encoded.

    The world size is not among them: a run may go on with another number of ranks.
    """

    dataset_fingerprint: str
    """Of the shard directory."""

    tokenizer_hash: str
    num_crops: int
    max_tokens_per_row: int
    seed: int
    global_batch_size: int
    resize: str = "exact"
    """How images are resized; `exact` is also what a checkpoint was that does not say it."""
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
