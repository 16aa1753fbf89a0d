import json
from pathlib import Path

import pytest
from phi3v_train.predictions import Prediction, read_predictions, write_predictions
from phi3v_train.rrc import is_docvqa, rrc_submission, write_rrc_submission


def answered(name: str, text: str = "1986", source: str = "docvqa") -> Prediction:
    return Prediction(name, source, text, None, (), None, None)


def test_a_submission_has_the_number_of_every_question_and_its_answer(tmp_path: Path) -> None:
    said = [answered("test-57349"), answered("val-337", 'itc "limited" é')]
    assert is_docvqa(said)
    write_rrc_submission(said, tmp_path / "rrc.json")
    assert json.loads((tmp_path / "rrc.json").read_text(encoding="utf-8")) == [
        {"questionId": 57349, "answer": "1986"},
        {"questionId": 337, "answer": 'itc "limited" é'},
    ]


@pytest.mark.parametrize(
    "other",
    [answered("test-1", source="nlvr2"), answered("train-0000003"), answered("page 3")],
)
def test_what_is_no_question_of_the_challenge_gives_no_submission(other: Prediction) -> None:
    assert not is_docvqa([answered("test-1"), other])
    with pytest.raises(ValueError, match=r"expected a question of docvqa"):
        rrc_submission([other])


def test_no_predictions_are_no_submission() -> None:
    assert not is_docvqa([])


def test_a_question_answered_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="question 5 is answered twice"):
        rrc_submission([answered("val-5"), answered("test-5")])


def test_predictions_read_back_as_they_were_written(tmp_path: Path) -> None:
    said = [
        Prediction("a", "toy", "x\u2028y", "z", ("z", "é"), correct=False, score=0.5),
        answered("val-5"),
    ]
    write_predictions(said, tmp_path / "predictions.jsonl")
    assert read_predictions(tmp_path / "predictions.jsonl") == said


def test_a_line_that_is_no_prediction_is_named(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write_predictions([answered("val-5")], path)
    path.write_text(path.read_text() + '{"id": "b"}\n')
    with pytest.raises(ValueError, match=r"predictions\.jsonl:2: not a prediction"):
        read_predictions(path)
