"""Scores of predicted answers: pure functions of strings.

>>> accuracy([" Archery.", "billiards"], ["Archery", "BabyCrawling"])
0.5
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


def normalize_answer(text: str) -> str:
    """What two answers are compared by: outer white space, then full stops, off; lower case.

    Exactly the cookbook recipe's `strip().strip('.').lower()`, so that scores can be compared.
    """
    return text.strip().strip(".").lower()


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that equal their reference after `normalize_answer`; 0 to 1.

    Raises:
        ValueError: nothing to score, or not one reference per prediction.
    """
    _check(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return sum(normalize_answer(p) == normalize_answer(r) for p, r in pairs) / len(references)


@dataclass(frozen=True)
class ClassCount:
    """How one reference answer fared."""

    num_samples: int
    num_correct: int

    predicted: dict[str, int]
    """Normalized predictions by count, the most frequent first."""

    @property
    def accuracy(self) -> float:
        """Share of this class that was answered correctly; 0 to 1."""
        return self.num_correct / self.num_samples


def count_by_class(predictions: Sequence[str], references: Sequence[str]) -> dict[str, ClassCount]:
    """One row of the confusion table for every normalized reference, in alphabetical order.

    Raises:
        ValueError: nothing to score, or not one reference per prediction.
    """
    _check(predictions, references)
    table: dict[str, Counter[str]] = {}
    for prediction, reference in zip(predictions, references, strict=True):
        row = table.setdefault(normalize_answer(reference), Counter())
        row[normalize_answer(prediction)] += 1
    return {
        label: ClassCount(row.total(), row[label], dict(row.most_common()))
        for label, row in sorted(table.items())
    }


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if not references or len(predictions) != len(references):
        raise ValueError(
            "expected one prediction for each of at least one reference, "
            f"got {len(predictions)} predictions and {len(references)} references"
        )
