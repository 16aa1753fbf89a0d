import json
from pathlib import Path

import pytest
from phi3v_data import Sample, Turn
from phi3v_train.evaluate import Prediction, evaluate, evaluate_model, generate_answers, summarize

from tests.train.builders import fresh_model, make_shards, open_toy


def test_answers_of_a_batch_equal_those_one_by_one(tiny: Path, toy_shards: Path) -> None:
    encoder, reader = open_toy(tiny, toy_shards)
    model = fresh_model(tiny)
    records = [reader[number] for number in range(6)]
    encoded = [encoder(r.sample, r.images, for_generation=True) for r in records]
    together = generate_answers(model, encoder, encoded, max_new_tokens=6)
    alone = [generate_answers(model, encoder, [e], max_new_tokens=6)[0] for e in encoded]
    assert together == alone
    assert any(together)


def test_a_limit_takes_the_first_samples_in_their_order(
    tiny: Path, toy_shards: Path, tmp_path: Path
) -> None:
    result = evaluate_model(
        tiny, toy_shards, num_crops=1, max_new_tokens=2, limit=3, out_dir=tmp_path, device="cpu"
    )
    lines = [json.loads(x) for x in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["s0", "s1", "s2"]
    assert json.loads((tmp_path / "eval.json").read_text()) == result.summary()
    assert str(result) == f"accuracy {result.accuracy:.3f} (0 of 3)"


def test_any_of_several_accepted_answers_is_right(tiny: Path, tmp_path: Path) -> None:
    encoder, reader = open_toy(tiny, make_shards(tmp_path / "ask", [_question("Nothing.")]))
    model = fresh_model(tiny).train()
    (plain,) = evaluate(model, encoder, reader, numbers=[0], max_new_tokens=4)
    assert model.training
    assert not plain.correct
    accepted = make_shards(tmp_path / "both", [_question("Nothing.", plain.prediction + ".")])
    encoder, reader = open_toy(tiny, accepted)
    (found,) = evaluate(model, encoder, reader, numbers=[0], max_new_tokens=4)
    assert found == Prediction("q", plain.prediction, "Nothing.", correct=True)
    assert summarize([found, plain]).accuracy == 0.5


def _question(*answers: str) -> Sample:
    turn = Turn(images=(), user="What?", assistant=answers[0], answers=answers)
    return Sample(id="q", source="toy", conversations=(turn,))


def test_a_folder_that_is_no_model_is_refused(toy_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model folder"):
        evaluate_model(tmp_path / "none", toy_shards, device="cpu")
