"""What a model answered, a question a line.

predictions.jsonl

{"id": "val-26167", "source": "docvqa", "prediction": "page 2", "answer": "2",
 "answers": ["2", "page 2"], "correct": true, "score": 1.0, "turn": 1}

A split without answers gives the same lines with nulls: nothing to compare with.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from phi3v_data.atomic import write_atomic


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answered question."""

    id: str
    """Of the sample."""
    source: str
    """The data set it comes from."""
    prediction: str
    """What the model said, special tokens left out."""
    answer: str | None
    """What the data says; None where it says nothing."""
    answers: tuple[str, ...]
    """All accepted answers, `answer` first; empty where the data has none."""
    correct: bool | None
    """Equal to an accepted answer after `metrics.normalize_answer`; None: nothing to compare."""
    score: float | None
    """Its part in the metric, 0 to 1; None: nothing to compare."""
    turn: int = 1
    """Which of the sample's turns asked, from 1."""


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """Write predictions as JSON lines, whole or not at all."""
    lines = [json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in predictions]
    write_atomic(path, "".join(lines))


def read_predictions(path: Path) -> list[Prediction]:
    """Read what `write_predictions` wrote.

    Raises:
        ValueError: a line that is none; the message names it.
    """
    found: list[Prediction] = []
    with open(path, encoding="utf-8") as file:  # answers may hold what `splitlines` would cut at
        for number, line in enumerate(file, start=1):
            try:
                fields = json.loads(line)
                found.append(Prediction(**{**fields, "answers": tuple(fields["answers"])}))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number}: not a prediction: {error}") from None
    return found
