"""Their time over ours, round by round: what the benchmarks print.

ratio([2.0, 2.2, 1.9], [1.0, 1.0, 1.0])        # Ratio(median=2.0, min=1.9, max=2.2)
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Their time / our time over the rounds."""

    median: float
    min: float
    max: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.min:.2f}-{self.max:.2f})"


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Round by round, then their median and range."""
    values = [their / our for their, our in zip(theirs, ours, strict=True)]
    return Ratio(statistics.median(values), min(values), max(values))
