"""DocVQA answers as the Robust Reading Competition takes them: one JSON file.

    rrc_submission.json

    [{"questionId": 49153, "answer": "university of california"}, ...]

(Challenge 17, task 1, `rrc.cvc.uab.es`: "My methods", upload.) The question's number is the end of
the sample's id, as `phi3v-data convert docvqa` writes it: `test-57349`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi3v_data.atomic import write_atomic

from phi3v_train.predictions import Prediction

SOURCE = "docvqa"

_QUESTION = re.compile(r"(?:train|val|test)-(0|[1-9][0-9]*)")
"""Ids that only count rows (the Cauldron's) have leading zeros."""


def is_docvqa(predictions: Sequence[Prediction]) -> bool:
    """Whether all of them answer a numbered question of DocVQA."""
    return bool(predictions) and all(
        p.source == SOURCE and _QUESTION.fullmatch(p.id) for p in predictions
    )


def rrc_submission(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """The submission.

    Raises:
        ValueError: an id that names no question, or one that occurs twice.
    """
    answers: dict[int, str] = {}
    for p in predictions:
        match = _QUESTION.fullmatch(p.id)
        if p.source != SOURCE or match is None:
            raise ValueError(
                f"sample {p.id!r} of {p.source!r}: expected a question of docvqa, its id such as "
                "test-57349; convert the challenge's own annotations"
            )
        number = int(match[1])
        if number in answers:
            raise ValueError(f"question {number} is answered twice; evaluate one split at a time")
        answers[number] = p.prediction
    return [{"questionId": number, "answer": answer} for number, answer in answers.items()]


def write_rrc_submission(predictions: Sequence[Prediction], path: Path) -> None:
    """Write the submission.

    Raises:
        ValueError: as `rrc_submission`.
    """
    write_atomic(path, json.dumps(rrc_submission(predictions), ensure_ascii=False) + "\n")
