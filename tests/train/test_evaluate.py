import json
from pathlib import Path

import pytest
import torch
from phi3v_data import Sample, Turn, write_samples, write_shards
from phi3v_train.collator import collate
from phi3v_train.engine import World
from phi3v_train.eval_loss import evaluate_loss, open_eval_rows
from phi3v_train.evaluate import (
    EvalResult,
    evaluate,
    evaluate_model,
    evaluate_on_all_ranks,
    generate_answers,
    prompt_lengths,
    summarize,
    write_result,
)
from phi3v_train.predictions import Prediction
from phi3v_train.questions import Question, list_questions
from phi3v_train.stream import StreamSettings

from tests.train.builders import fresh_model, make_sample, make_shards, open_toy


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
    (plain,) = evaluate(model, encoder, reader, questions=[Question(0, 0)], max_new_tokens=4)
    assert model.training
    assert not plain.correct
    accepted = make_shards(tmp_path / "both", [_question("Nothing.", plain.prediction + ".")])
    encoder, reader = open_toy(tiny, accepted)
    (found,) = evaluate(model, encoder, reader, questions=[Question(0, 0)], max_new_tokens=4)
    answers = ("Nothing.", plain.prediction + ".")
    assert found == Prediction(
        "q", "toy", plain.prediction, "Nothing.", answers, correct=True, score=1.0
    )
    assert summarize([found, plain]).accuracy == 0.5


def _question(*answers: str) -> Sample:
    turn = Turn(images=(), user="What?", assistant=answers[0], answers=answers)
    return Sample(id="q", source="toy", conversations=(turn,))


def test_a_folder_that_is_no_model_is_refused(toy_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model folder"):
        evaluate_model(tmp_path / "none", toy_shards, device="cpu")


def test_a_split_without_answers_is_answered_and_not_scored(tiny: Path, tmp_path: Path) -> None:
    turn = Turn(images=(), user="What?")
    write_samples(tmp_path / "t.jsonl", [Sample(id="q", source="toy", conversations=(turn,))])
    write_shards(
        [tmp_path / "t.jsonl"], tmp_path / "shards", allow_missing_answer=True, num_workers=1
    )
    result = evaluate_model(
        tiny, tmp_path / "shards", max_new_tokens=2, device="cpu", out_dir=tmp_path / "eval"
    )
    assert str(result) == "1 answers; the data has none to compare them with"
    (line,) = (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["answer"] is None
    assert json.loads((tmp_path / "eval" / "eval.json").read_text()) == {
        "metric": "accuracy",
        "num_samples": 1,
        "num_questions": 1,
        "score": None,
    }


def conversation(*answers: str | None) -> Sample:
    """A picture, and as many questions about it as answers; each new one with a picture more."""
    turns = [
        Turn(images=(f"{number}.png",), user=f"What is {number}?", assistant=answer)
        for number, answer in enumerate(answers)
    ]
    return Sample(id="talk", source="toy", conversations=tuple(turns))


def test_every_turn_is_asked_after_those_before_it_as_the_data_has_them(
    tiny: Path, tmp_path: Path
) -> None:
    talk = conversation("One.", "Two.", "Three.")
    shards = make_shards(tmp_path / "talk", [talk, make_sample("s", ((), "Who?", "Nobody."))])
    result = evaluate_model(
        tiny, shards, num_crops=1, max_new_tokens=6, device="cpu", out_dir=tmp_path / "eval"
    )
    found = [(p.id, p.turn, p.answer) for p in result.predictions]
    assert found == [
        *(("talk", 1, "One."), ("talk", 2, "Two."), ("talk", 3, "Three.")),
        ("s", 1, "Nobody."),
    ]
    summary = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert (summary["num_samples"], summary["num_questions"]) == (2, 4)
    # The same conversations, each cut after a question.
    encoder, reader = open_toy(tiny, shards)
    for number in range(3):
        cut = talk.model_copy(update={"conversations": talk.conversations[: number + 1]})
        images = reader[0].images[: number + 1]
        encoded = encoder(cut, images, for_generation=True)
        (alone,) = generate_answers(fresh_model(tiny), encoder, [encoded], max_new_tokens=6)
        assert result.predictions[number].prediction == alone


def test_where_the_last_turn_has_no_answer_that_one_alone_is_asked(
    tiny: Path, tmp_path: Path
) -> None:
    make_shards(tmp_path, [conversation("One.", "Two.")])  # draws the pictures
    write_samples(tmp_path / "t.jsonl", [conversation("One.", None)])
    write_shards(
        [tmp_path / "t.jsonl"],
        tmp_path / "test",
        allow_missing_answer=True,
        num_workers=1,
    )
    result = evaluate_model(tiny, tmp_path / "test", num_crops=1, max_new_tokens=2, device="cpu")
    assert [(p.turn, p.answer) for p in result.predictions] == [(2, None)]
    assert result.score is None


def said(name: str, text: str, *answers: str, score: float, source: str = "toy") -> Prediction:
    return Prediction(name, source, text, answers[0], answers, text in answers, score)


def test_answers_that_are_classes_leave_a_confusion_matrix_and_docvqa_a_submission(
    tmp_path: Path,
) -> None:
    classes = summarize([said(f"s{n}", "yes", "yes", score=1.0) for n in range(4)])
    write_result(classes, tmp_path / "classes")
    assert {path.name for path in (tmp_path / "classes").iterdir()} == {
        *("confusion.json", "confusion.txt", "eval.json", "predictions.jsonl")
    }
    texts = [said(f"val-{n}", f"{n}", f"{n}", score=1.0, source="docvqa") for n in range(4)]
    write_result(summarize(texts, "anls"), tmp_path / "texts")
    assert {path.name for path in (tmp_path / "texts").iterdir()} == {
        *("rrc_submission.json", "eval.json", "predictions.jsonl")
    }


def test_the_summary_of_anls_has_both_scores() -> None:
    result = summarize(
        [said("a", "x", "x", score=1.0), said("b", "abcx", "abcd", score=0.75)], "anls"
    )
    assert isinstance(result, EvalResult)
    assert str(result) == "ANLS 0.8750 (2 answers, 1 of them exact)"
    summary = result.summary()
    assert (summary["metric"], summary["score"], summary["anls"]) == ("anls", 0.875, 0.875)
    assert (summary["accuracy"], summary["num_correct"]) == (0.5, 1)


def test_samples_with_and_without_answers_are_not_scored_together() -> None:
    bare = Prediction("bare", "toy", "x", None, (), None, None)
    with pytest.raises(ValueError, match=r"'bare' has no answer .* 1 of 2 samples have one"):
        summarize([said("a", "x", "x", score=1.0), bare])
    with pytest.raises(ValueError, match="no samples to evaluate"):
        summarize([])


def test_a_prompt_is_as_long_as_it_is_when_encoded(tiny: Path, toy_shards: Path) -> None:
    encoder, reader = open_toy(tiny, toy_shards, num_crops=2)
    records = [reader[number] for number in range(6)]
    encoded = [encoder(r.sample, r.images, for_generation=True) for r in records]
    lengths = prompt_lengths(reader, encoder, list_questions(reader, 6))
    assert lengths == [len(e.input_ids) for e in encoded]


@pytest.mark.parametrize("count", [1, 7])
def test_ranks_answer_every_sample_once_and_merge_in_the_order_of_the_data(
    tiny: Path, toy_shards: Path, count: int
) -> None:
    encoder, reader = open_toy(tiny, toy_shards)
    model = fresh_model(tiny)
    cpu = torch.device("cpu")
    alone = evaluate_on_all_ranks(
        model, encoder, reader, World(0, 1, cpu), count=count, max_new_tokens=3
    )
    shares: list[list[tuple[Question, Prediction]]] = []

    class Recording(World):
        def gather(self, value):
            shares.append(value)
            own = {question for question, _ in value}
            asked = zip(list_questions(reader, count), alone, strict=True)
            return [value, [pair for pair in asked if pair[0] not in own]]

    for rank in range(2):
        merged = evaluate_on_all_ranks(
            model, encoder, reader, Recording(rank, 2, cpu), count=count, max_new_tokens=3
        )
        assert merged == alone
    questions = [question for share in shares for question, _ in share]
    assert sorted(questions) == list_questions(reader, count)
    assert abs(len(shares[0]) - len(shares[1])) <= 1


# --- the loss -------------------------------------------------------------------------------------


def settings(**changes: int) -> StreamSettings:
    base = {"num_crops": 1, "max_tokens_per_row": 4096, "global_batch_size": 4, "num_epochs": 3}
    return StreamSettings(**{**base, "seed": 7, **changes})  # pyright: ignore[reportArgumentType]


def loss_over(
    tiny: Path, shards: Path, *, limit: int | None = None, ranks: int = 1, **changes: int
) -> float:
    """The loss as `ranks` processes would compute it, one after the other."""
    encoder, _ = open_toy(tiny, shards)
    model = fresh_model(tiny)
    sums: list[tuple[float, ...]] = []

    class Adding(World):
        def sum(self, *values):
            sums.append(tuple(map(float, values)))
            return list(values)

    def loss_sum(batch, *, is_last):
        return model.packed_loss(batch)

    for rank in range(ranks):
        rows = open_eval_rows(
            shards, encoder, settings(rank=rank, world_size=ranks, **changes), limit=limit
        )
        evaluate_loss(rows, loss_sum, Adding(rank, ranks, torch.device("cpu")))
    total, count = map(sum, zip(*sums, strict=True))
    return total / count


def test_the_loss_is_the_mean_over_the_label_tokens_of_each_sample_alone(
    tiny: Path, toy_shards: Path
) -> None:
    encoder, reader = open_toy(tiny, toy_shards)
    model = fresh_model(tiny)
    total, count = 0.0, 0
    with torch.no_grad():
        for record in reader:
            encoded = encoder(record.sample, record.images)
            total += float(model.packed_loss(collate([encoded])))
            count += int((encoded.labels != -100).sum())
    assert loss_over(tiny, toy_shards) == pytest.approx(total / count, rel=1e-5)


def test_the_loss_depends_neither_on_rows_nor_on_ranks(tiny: Path, toy_shards: Path) -> None:
    whole = loss_over(tiny, toy_shards)
    # Shorter than some samples: those have a row of their own.
    assert loss_over(tiny, toy_shards, max_tokens_per_row=64) == pytest.approx(whole, rel=1e-5)
    assert loss_over(tiny, toy_shards, ranks=2) == pytest.approx(whole, rel=1e-5)


def test_the_loss_of_the_first_samples_is_theirs_alone(tiny: Path, tmp_path: Path) -> None:
    few = [make_sample(f"s{n}", ((), f"What is {n}?", f"Thing {n}.")) for n in range(3)]
    more = [*few, make_sample("long", ((), "Who? " * 900, "Nobody, " * 30))]
    alone = make_shards(tmp_path / "few", few)
    together = make_shards(tmp_path / "more", more)
    expected = loss_over(tiny, alone)
    assert loss_over(tiny, together, limit=3) == pytest.approx(expected, rel=1e-5)
    assert loss_over(tiny, together) != pytest.approx(expected, rel=1e-3)
