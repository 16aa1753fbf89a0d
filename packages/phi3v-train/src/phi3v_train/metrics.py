"""Scores of predicted answers: pure functions of strings.

>>> accuracy([" Archery.", "billiards"], ["Archery", "BabyCrawling"])
0.5
>>> anls(["Aug 21 1986"], [["Aug 27, 1986", "27 August 1986"]])
0.8333333333333334
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rapidfuzz.distance import Levenshtein

Metric = Literal["accuracy", "anls"]
AnlsVariant = Literal["official", "recipe"]

ANLS_TAU = 0.5
"""An answer of which half or more has to be changed counts nothing."""


def normalize_answer(text: str) -> str:
    """What two answers are compared by: outer white space, then full stops, off; lower case.

    Exactly the cookbook recipe's `strip().strip('.').lower()`, so that scores can be compared.
    """
    return text.strip().strip(".").lower()


def is_correct(prediction: str, accepted: Sequence[str]) -> bool:
    """Whether a prediction equals any of the accepted answers after `normalize_answer`."""
    return normalize_answer(prediction) in {normalize_answer(answer) for answer in accepted}


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that equal their reference after `normalize_answer`; 0 to 1.

    Raises:
        ValueError: nothing to score, or not one reference per prediction.
    """
    _check(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return sum(normalize_answer(p) == normalize_answer(r) for p, r in pairs) / len(references)


def anls_of_one(
    prediction: str, accepted: Sequence[str], variant: AnlsVariant = "official"
) -> float:
    """Levenshtein similarity to the nearest accepted answer, 0 below the threshold; 0 to 1.

    The distance is divided by the longer of the two lengths.

    `official`, as the Robust Reading Competition scores DocVQA: in lower case, white space run
    together; a similarity of exactly one half counts. `recipe`, as the cookbook's script: texts as
    they are; one half doesn't count, and an empty prediction is wrong.

    Args:
        prediction: what the model said.
        accepted: all answers that count as right; at least one.
        variant: see above.
    """
    if variant == "recipe":
        if not prediction:
            return 0.0
        best = max(_similarity(prediction, answer) for answer in accepted)
        return best if 1 - best < ANLS_TAU else 0.0
    best = max(_similarity(_folded(prediction), _folded(answer)) for answer in accepted)
    return best if best >= ANLS_TAU else 0.0


def anls(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    variant: AnlsVariant = "official",
) -> float:
    """Average Normalized Levenshtein Similarity (Biten et al., ICCV 2019); 0 to 1.

    Raises:
        ValueError: nothing to score, or not one list of references per prediction.
    """
    _check(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return sum(anls_of_one(p, accepted, variant) for p, accepted in pairs) / len(references)


def scorer(
    metric: Metric, variant: AnlsVariant = "official"
) -> Callable[[str, Sequence[str]], float]:
    """The score of one prediction against its accepted answers; the metric is the mean of it."""
    if metric == "accuracy":
        return lambda prediction, accepted: float(is_correct(prediction, accepted))
    return lambda prediction, accepted: anls_of_one(prediction, accepted, variant)


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str) -> float:
    return 1 - Levenshtein.distance(a, b) / max(len(a), len(b), 1)


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


def _check(predictions: Sequence[str], references: Sequence[object]) -> None:
    if not references or len(predictions) != len(references):
        raise ValueError(
            "expected one prediction for each of at least one reference, "
            f"got {len(predictions)} predictions and {len(references)} references"
        )
