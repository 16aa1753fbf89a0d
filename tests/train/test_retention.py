import pytest
from phi3v_train.retention import Keep, Kept, Score, ranked, steps_to_remove


def accuracy(value: float) -> Score:
    return Score("accuracy", value, higher_is_better=True)


def loss(value: float) -> Score:
    return Score("loss", value, higher_is_better=False)


SAVED = [
    Kept(250, accuracy(0.6)),
    Kept(500, accuracy(0.9)),
    Kept(750, accuracy(0.7)),
    Kept(1000),
    Kept(1250, accuracy(0.8)),
    Kept(1500, accuracy(0.8)),
    Kept(1750, accuracy(0.7)),
]


def staying(keep: Keep, saved: list[Kept] = SAVED) -> list[int]:
    gone = steps_to_remove(saved, keep)
    return [kept.step for kept in saved if kept.step not in gone]


def test_the_newest_the_best_and_every_kth_stay() -> None:
    assert staying(Keep(newest=2, best=1, every_steps=1000)) == [500, 1000, 1500, 1750]
    assert staying(Keep(newest=1, best=0)) == [1750]
    assert staying(Keep(newest=9, best=0)) == [kept.step for kept in SAVED]


def test_of_equal_scores_the_earlier_is_better() -> None:
    assert [kept.step for kept in ranked(SAVED)] == [500, 1250, 1500, 750, 1750, 250]
    assert staying(Keep(newest=1, best=2)) == [500, 1250, 1750]


def test_a_lower_loss_is_better() -> None:
    saved = [Kept(1, loss(0.5)), Kept(2, loss(0.4)), Kept(3, loss(0.6))]
    assert staying(Keep(newest=1, best=1), saved) == [2, 3]


def test_a_loss_that_is_not_a_number_is_worse_than_any() -> None:
    saved = [Kept(1, loss(float("nan"))), Kept(2, loss(9.0)), Kept(3, loss(float("nan")))]
    assert [kept.step for kept in ranked(saved)] == [2, 1, 3]


def test_where_the_metric_changed_on_the_way_the_newest_one_counts() -> None:
    saved = [Kept(1, loss(0.1)), Kept(2, accuracy(0.2)), Kept(3)]
    assert [kept.step for kept in ranked(saved)] == [2]
    assert staying(Keep(newest=1, best=1), saved) == [2, 3]


def test_nothing_goes_where_nothing_is() -> None:
    assert steps_to_remove([], Keep()) == []
    assert ranked([Kept(1), Kept(2)]) == []


def test_scores_of_two_metrics_are_not_compared() -> None:
    with pytest.raises(ValueError, match="loss can't be compared with accuracy"):
        loss(1.0).is_better_than(accuracy(1.0))
