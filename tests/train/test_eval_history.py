import math
from pathlib import Path

import pytest
from phi3v_train.config import EvalConfig
from phi3v_train.eval_history import (
    Aim,
    EvalPoint,
    best_point,
    is_out_of_patience,
    joined,
    num_since_best,
    read_history,
    write_history,
)

LOSS = Aim("loss", is_higher_better=False)


def losses(*values: float) -> list[EvalPoint]:
    return [EvalPoint(10 * n, {"loss": value}) for n, value in enumerate(values, start=1)]


def test_the_best_is_the_first_of_the_lowest_losses() -> None:
    best = best_point(losses(3.0, 1.0, 2.0, 1.0), LOSS)
    assert best is not None
    assert best.step == 20


def test_the_best_is_the_highest_metric_where_it_was_measured() -> None:
    points = [EvalPoint(5, {"loss": 0.1}), EvalPoint(10, {"loss": 3.0, "accuracy": 0.5})]
    points = joined(points, 20, {"accuracy": 0.75})
    best = best_point(points, Aim.of(EvalConfig(best_by="metric")))
    assert best is not None
    assert best.step == 20
    assert best_point(points[:1], Aim("anls", is_higher_better=True)) is None


def test_patience_counts_evaluations_since_the_best() -> None:
    points = losses(3.0, 1.0, 2.0, 1.0)
    assert num_since_best(points, LOSS) == 2
    assert is_out_of_patience(points, LOSS, 2)
    assert not is_out_of_patience(points, LOSS, 3)
    assert not is_out_of_patience(points, LOSS, None)
    assert not is_out_of_patience(losses(3.0, 2.0, 1.0), LOSS, 1)
    assert not is_out_of_patience([], LOSS, 1)


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    points = losses(math.nan, 2.0, math.nan)
    best = best_point(points, LOSS)
    assert best is not None
    assert best.step == 20
    assert is_out_of_patience(points, LOSS, 1)


def test_patience_does_not_count_evaluations_that_measured_something_else() -> None:
    points = [*losses(1.0), EvalPoint(15, {"accuracy": 0.5}), EvalPoint(20, {"loss": 2.0})]
    assert num_since_best(points, LOSS) == 1


def test_two_measurements_of_a_step_are_one_point() -> None:
    points = joined(losses(1.0), 10, {"accuracy": 0.5})
    assert points == [EvalPoint(10, {"loss": 1.0, "accuracy": 0.5})]


def test_a_history_reads_back_up_to_the_step_a_run_goes_on_from(tmp_path: Path) -> None:
    points = losses(3.0, 0.1 + 0.2, 2.0)
    assert read_history(tmp_path, 30) == []
    write_history(tmp_path, points)
    assert read_history(tmp_path, 30) == points
    assert read_history(tmp_path, 29) == points[:2]


@pytest.mark.parametrize("line", ["[]", "{}", '{"step": 1, "loss": "x"}', "{"])
def test_a_line_that_is_no_evaluation_is_named(tmp_path: Path, line: str) -> None:
    write_history(tmp_path, losses(1.0))
    path = tmp_path / "eval" / "history.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"history\.jsonl:2: not an evaluation"):
        read_history(tmp_path, 99)
