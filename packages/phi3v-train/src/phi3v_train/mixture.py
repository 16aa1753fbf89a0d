"""Several sources in one epoch: how many samples of each, and which.

    >>> mixture_counts([10_194, 300], weights=[2, 1], epoch_size=3_000).tolist()
    [2000, 1000]
    >>> mixture_counts([10_194, 300], temperature=2).tolist()
    [8957, 1537]
    >>> mixture_samples([5, 3], weights=[1, 2], epoch_size=6, seed=0, epoch=0).tolist()
    [2, 4, 5, 6, 6, 7]

The counts are exact in every epoch: shares of the epoch's size, rounded by largest remainder. A
source's samples stand in one fixed random row, read round and round: an epoch goes on where the one
before it stopped. So within an epoch, and over all epochs so far, the times that two samples of a
source were visited differ by at most one, and what one epoch leaves out comes first in the next.

Numbers run through the sources, one after the other. What a source holds, images or none, plays no
part. The order of the epoch is made of what comes out here, by `phi3v_train.plan.plan_epoch`.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from phi3v_train.epoch_order import Numbers, keys

_SOURCES = 0x4D4958  # sets the keys of a source's row apart from those of an epoch's order


def mixture_counts(
    sizes: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    temperature: float = 1.0,
    epoch_size: int | None = None,
) -> Numbers:
    """Samples of each source in an epoch.

    The share of source i is w_i ** (1 / temperature) over the sum of these.

    Args:
        sizes: samples of each source.
        weights: w, one per source, relative to each other; none: the sizes.
        temperature: 1 leaves the shares as they are, more makes them more alike, up to equal.
        epoch_size: samples in an epoch; none: as many as there are.

    Returns:
        (sources,), their sum is `epoch_size`. Largest remainder: everyone gets the whole part of
        their share, and what is left goes, one each, to those with the largest fractions (of
        equals, to the first).

    Raises:
        ValueError: an argument makes no mixture.
    """
    if weights is not None and len(weights) != len(sizes):
        raise ValueError(f"expected {len(sizes)} weights, one per source, got {len(weights)}")
    shares = sizes if weights is None else weights
    if any(not 0 <= share < float("inf") for share in shares) or not any(shares):
        raise ValueError(f"weights must be finite, not negative and not all 0, got {list(shares)}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    total = sum(sizes) if epoch_size is None else epoch_size
    if total < 1:
        raise ValueError(f"epoch_size must be at least 1, got {total}")
    for number, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        if share and size < 1:
            raise ValueError(f"source {number} has no samples; leave it out or give it weight 0")
    parts = [_tempered(share, max(shares), temperature) for share in shares]
    exact = [part * total / sum(parts) for part in parts]
    counts = [int(part) for part in exact]
    by_fraction = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])  # stable
    for i in by_fraction[: total - sum(counts)]:
        counts[i] += 1
    return np.array(counts, np.int64)


def _tempered(share: float, largest: float, temperature: float) -> Fraction:
    if temperature == 1:
        return Fraction(share)
    # Twelve digits: the last bits of a power differ between machines, and counts must not.
    return Fraction(f"{(share / largest) ** (1 / temperature):.12g}")


def mixture_samples(
    sizes: Sequence[int],
    *,
    seed: int,
    epoch: int,
    weights: Sequence[float] | None = None,
    temperature: float = 1.0,
    epoch_size: int | None = None,
    usable: Numbers | None = None,
) -> Numbers:
    """The samples of an epoch, rising; one that is visited twice is there twice.

    Args:
        sizes: samples of each source.
        seed: of the run.
        epoch: from 0.
        weights: see `mixture_counts`.
        temperature: see `mixture_counts`.
        epoch_size: see `mixture_counts`.
        usable: the numbers that may occur, rising, for example those that `split_overlong` keeps;
            a source is then as large as its usable part. None: all.

    Raises:
        ValueError: an argument makes no mixture.
    """
    ends = np.cumsum(np.asarray(sizes, np.int64))
    numbers = np.arange(sum(sizes)) if usable is None else usable
    cuts = np.searchsorted(numbers, np.concatenate([[0], ends]))
    counts = mixture_counts(
        np.diff(cuts).tolist(), weights=weights, temperature=temperature, epoch_size=epoch_size
    )
    drawn = [
        _next_of(numbers[start:end], count, seed=seed, epoch=epoch)
        for start, end, count in zip(cuts, cuts[1:], counts.tolist(), strict=False)
    ]
    return np.concatenate(drawn)


def _next_of(source: Numbers, count: int, *, seed: int, epoch: int) -> Numbers:
    """`count` samples of a source's endless row, from where the epochs before ended; rising."""
    size = len(source)
    if not count:
        return source[:0]
    whole, part = divmod(count, size)
    taken = np.full(size, whole, np.int64)
    if part:
        row = np.argsort(keys(source, seed, _SOURCES), kind="stable")
        start = epoch * count % size
        taken[row[np.arange(start, start + part) % size]] += 1
    return np.repeat(source, taken)
