"""The order in which an epoch visits the samples: a key for each of them, and a sort.

    epoch_order(np.arange(10), seed=0, epoch=0)             # [0 7 8 2 5 9 4 6 3 1]: everywhere

    shards = Shards(sizes=[150] * 1600, num_bytes=[64 << 20] * 1600, window_bytes=8 << 30)
    windowed_order(np.arange(240_000), shards, seed=0, epoch=0)   # few shards open at a time

*Plain.* Sample i has the key splitmix64 (the i-th output of the generator started from seed and
epoch); the order is the samples by rising key. Written out here so that no version of numpy can
change it. A sample's key depends on its number alone: leaving one out moves no other before or
behind its neighbours. A number that occurs several times has a key for each time.

*Windowed*, for shards that are fetched as they are needed. The shards stand in a row by rising key
of their own, so each begins at some byte of that row; every sample of a shard goes from there a
random way forward, less than the window; the order is the samples by the place they reach. Behind
the beginning of a shard lie only its own samples and later ones, so the order can be made a shard
at a time and only what the window spans is held (`windowed_runs`); a shard is needed from its
beginning until the window is past.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHARDS = 0x5348415244  # sets the keys of shards apart from those of samples

DEFAULT_WINDOW_SHARDS = 128
"""Mixes like a buffer of 1,000 samples in each of 16 workers, and costs no memory."""


# --- plain ---------------------------------------------------------------------------------------


def _mix(words: Words) -> Words:
    """splitmix64's output function (Steele, Lea, Flood 2014), a bijection of 64-bit words."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def keys(numbers: Numbers, *words: int) -> Words:
    """A key for every number, all different, of a generator started from `words`."""
    start = np.zeros(1, np.uint64)  # arrays wrap around, silently; scalars warn
    for word in words:
        start = _mix(start + np.uint64(word) + _GOLDEN)
    return _mix(start + (numbers.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def _keys_of_times(samples: Numbers, seed: int, epoch: int) -> Words:
    """Keys of samples, where one may occur several times."""
    found = keys(samples, seed, epoch)
    if len(samples) < 2 or bool((samples[1:] > samples[:-1]).all()):
        return found  # rising: every sample occurs once
    by_number = np.argsort(samples, kind="stable")
    ranked = samples[by_number]
    is_first = np.concatenate([[True], ranked[1:] != ranked[:-1]])
    places = np.arange(len(samples))
    time = np.empty(len(samples), np.uint64)
    time[by_number] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    again = time > 0  # the first time has the key of a sample that occurs once
    found[again] = _mix(found[again] + time[again] * _GOLDEN)
    return found


def epoch_order(samples: Numbers, *, seed: int, epoch: int) -> Numbers:
    """The sample numbers in the order in which this epoch visits them."""
    return samples[np.argsort(_keys_of_times(samples, seed, epoch), kind="stable")]


# --- windowed ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Shards:
    """Where the samples lie: numbers run through the shards, one after the other."""

    sizes: Sequence[int] | Numbers
    """Samples of each shard."""

    num_bytes: Sequence[int] | Numbers
    """Size of each shard, in bytes."""

    window_bytes: int
    """How far apart in bytes, at most, shards lie whose samples meet; about so much is open."""

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.num_bytes):
            raise ValueError(
                "expected a number of samples and of bytes for every shard, got "
                f"{len(self.sizes)} and {len(self.num_bytes)}"
            )
        if self.window_bytes < 1:
            raise ValueError(f"window_bytes must be at least 1, got {self.window_bytes}")

    @cached_property
    def first(self) -> Numbers:
        """Number of each shard's first sample, and behind them the count of all."""
        return np.concatenate([[0], np.cumsum(np.asarray(self.sizes, np.int64))]).astype(np.int64)

    def of(self, samples: Numbers) -> Numbers:
        """The shard of each sample."""
        return np.searchsorted(self.first, samples, side="right") - 1

    def order(self, *, seed: int, epoch: int) -> Numbers:
        """The shards by rising key."""
        return np.argsort(keys(np.arange(len(self.sizes)), seed, epoch, _SHARDS), kind="stable")


def default_window_bytes(num_bytes: Sequence[int] | Numbers) -> int:
    """What `DEFAULT_WINDOW_SHARDS` shards of the average size take."""
    mean = int(np.sum(num_bytes, dtype=np.int64)) // max(1, len(num_bytes))
    return max(1, DEFAULT_WINDOW_SHARDS * mean)


def _reached(samples: Numbers, begins: Numbers, shards: Shards, seed: int, epoch: int) -> Numbers:
    way = _keys_of_times(samples, seed, epoch) % np.uint64(shards.window_bytes)
    return begins + way.astype(np.int64)


def windowed_order(samples: Numbers, shards: Shards, *, seed: int, epoch: int) -> Numbers:
    """The sample numbers in the order in which this epoch visits them, shard by shard.

    Args:
        samples: numbers, rising (one may occur several times).
        shards: that hold them.
        seed: of the run.
        epoch: from 0.
    """
    order = shards.order(seed=seed, epoch=epoch)
    sizes = np.asarray(shards.num_bytes, np.int64)[order]
    begin = np.empty(len(order), np.int64)  # of every shard, in bytes
    begin[order] = np.cumsum(sizes) - sizes
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    of = shards.of(samples)
    by_shard = np.argsort(place[of], kind="stable")
    samples, of = samples[by_shard], of[by_shard]
    reached = _reached(samples, begin[of], shards, seed, epoch)
    return samples[np.argsort(reached, kind="stable")]


def windowed_runs(shards: Shards, *, seed: int, epoch: int) -> Iterator[tuple[int, Numbers]]:
    """`windowed_order` of all samples, made a shard at a time; what a window spans is held.

    Yields:
        (the shard whose beginning the order has come to, the samples to visit before it); with
        the last one, the number of shards, come the rest.
    """
    begin = 0
    samples = np.empty(0, np.int64)
    reached = np.empty(0, np.int64)
    for shard in shards.order(seed=seed, epoch=epoch).tolist():
        passed = int(np.searchsorted(reached, begin))
        yield shard, samples[:passed]
        more = np.arange(int(shards.first[shard]), int(shards.first[shard + 1]))
        samples = np.concatenate([samples[passed:], more])
        begins = np.full(len(more), begin, np.int64)
        reached = np.concatenate([reached[passed:], _reached(more, begins, shards, seed, epoch)])
        rising = np.argsort(reached, kind="stable")
        samples, reached = samples[rising], reached[rising]
        begin += int(shards.num_bytes[shard])
    yield len(shards.sizes), samples
