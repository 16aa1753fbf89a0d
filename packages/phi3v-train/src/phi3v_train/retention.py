"""Which checkpoints stay on disk.

    Keep(newest=2, best=1, every_steps=1000)

    step    250  500  750 1000 1250 1500 1750
    score   0.6  0.9  0.7  0.7  0.8  0.8  0.7        higher is better
    stays         x         x         x    x         best, multiple of 1000, two newest

Arithmetic over what is there: no list of its own could disagree with the disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Score:
    """What an evaluation said of a checkpoint."""

    name: str
    """Of the metric, for example `accuracy` or `loss`."""
    value: float
    higher_is_better: bool

    def is_better_than(self, other: "Score") -> bool:
        """Strictly better; NaN is worse than anything.

        Raises:
            ValueError: the two are of different metrics.
        """
        if (self.name, self.higher_is_better) != (other.name, other.higher_is_better):
            raise ValueError(f"{self.name} can't be compared with {other.name}")
        if other.value != other.value:
            return self.value == self.value
        if self.higher_is_better:
            return self.value > other.value
        return self.value < other.value


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint that is on disk."""

    step: int
    score: Score | None = None
    """None: it was not evaluated."""


@dataclass(frozen=True, slots=True)
class Keep:
    """The rule: a checkpoint stays if it is one of these."""

    newest: int = 2
    """The newest so many; at least 1."""
    best: int = 1
    """The best so many of those that have a score of the newest score's metric."""
    every_steps: int | None = None
    """Those whose step is a multiple of this; None: none for that reason."""


def ranked(saved: Sequence[Kept]) -> list[Kept]:
    """Those with a score, the best first; of equals the earlier.

    A run may have changed its metric on the way. What counts is the metric of the newest score.
    """
    scored = sorted((k for k in saved if k.score is not None), key=lambda k: k.step)
    if not scored:
        return []
    newest = scored[-1].score
    assert newest is not None
    order: list[Kept] = []
    for kept in scored:
        score = kept.score
        assert score is not None
        if (score.name, score.higher_is_better) != (newest.name, newest.higher_is_better):
            continue
        place = 0
        while place < len(order):
            other = order[place].score
            assert other is not None
            if score.is_better_than(other):
                break
            place += 1
        order.insert(place, kept)
    return order


def steps_to_remove(saved: Sequence[Kept], keep: Keep) -> list[int]:
    """The steps of the checkpoints that go, ascending."""
    steps = sorted(kept.step for kept in saved)
    stay = {*steps[-keep.newest :], *(kept.step for kept in ranked(saved)[: keep.best])}
    if keep.every_steps is not None:
        stay |= {step for step in steps if step % keep.every_steps == 0}
    return [step for step in steps if step not in stay]
