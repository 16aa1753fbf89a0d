import pytest
from hypothesis import given
from hypothesis import strategies as st
from phi3v_train.metrics import (
    accuracy,
    anls,
    anls_of_one,
    count_by_class,
    normalize_answer,
    scorer,
)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("BabyCrawling", "babycrawling"),
        (" Yes. \n", "yes"),
        ("No...", "no"),
        ("0.28", "0.28"),
        ("3.5%.", "3.5%"),
        ("", ""),
        ("...", ""),
        ("two  words", "two  words"),
    ],
)
def test_answers_are_compared_as_the_recipe_compares_them(text, normalized):
    assert normalize_answer(text) == normalized


@given(st.text())
def test_normalizing_is_the_recipes_expression(text):
    assert normalize_answer(text) == text.strip().strip(".").lower()


def test_accuracy_is_the_share_of_equal_answers():
    assert accuracy(["Archery.", "x", " yes ", "NO"], ["archery", "y", "Yes.", "no"]) == 0.75


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="got 0 predictions and 0 references"):
        accuracy([], [])


def test_an_unequal_number_of_answers_is_an_error():
    with pytest.raises(ValueError, match="got 1 predictions and 2 references"):
        count_by_class(["a"], ["a", "b"])


def test_counts_by_class_are_rows_of_the_confusion_table():
    table = count_by_class(["a", "b", "b", "B.", "c"], ["A", "a", "a", "b", "b"])
    assert list(table) == ["a", "b"]
    assert (table["a"].num_samples, table["a"].num_correct) == (3, 1)
    assert table["a"].predicted == {"b": 2, "a": 1}
    assert table["b"].accuracy == 0.5


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1))
def test_classes_add_up_to_the_accuracy(pairs):
    predictions, references = zip(*pairs, strict=True)
    table = count_by_class(predictions, references)
    correct = sum(row.num_correct for row in table.values())
    assert correct / len(pairs) == pytest.approx(accuracy(predictions, references))
    assert sum(row.num_samples for row in table.values()) == len(pairs)


# --- ANLS -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "accepted", "official", "recipe"),
    [
        ("2", ["2", "page 2"], 1.0, 1.0),
        ("University", ["university"], 1.0, 0.9),
        (" ITC  Limited ", ["itc limited"], 1.0, 0.0),
        ("aug 21 1986", ["aug 27, 1986", "1986"], 10 / 12, 10 / 12),
        ("ab", ["ac"], 0.5, 0.0),  # exactly one half
        ("abc", ["axy"], 0.0, 0.0),
        ("", ["a"], 0.0, 0.0),
    ],
)
def test_anls_of_one_answer_by_the_competition_and_by_the_recipe(
    prediction, accepted, official, recipe
):
    assert anls_of_one(prediction, accepted) == pytest.approx(official)
    assert anls_of_one(prediction, accepted, "recipe") == pytest.approx(recipe)


def by_hand(prediction: str, accepted: list[str]) -> float:
    """The official score with a distance of its own: a table, no library."""

    def distance(a: str, b: str) -> int:
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, start=1):
            last, row[0] = row[0], i
            for j, y in enumerate(b, start=1):
                last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
        return row[-1]

    said, *known = (" ".join(text.lower().split()) for text in (prediction, *accepted))
    best = max(1 - distance(said, a) / (max(len(said), len(a)) or 1) for a in known)
    return best if best >= 0.5 else 0.0


@given(st.text("abAB c", max_size=8), st.lists(st.text("abAB c", max_size=8), min_size=1))
def test_anls_equals_a_distance_computed_by_hand(prediction, accepted):
    assert anls_of_one(prediction, accepted) == pytest.approx(by_hand(prediction, accepted))


def test_anls_is_the_mean_over_questions():
    assert anls(["Yes", "no idea"], [["yes", "YES"], ["true"]]) == 0.5
    assert anls(["Yes", "no idea"], [["yes", "YES"], ["true"]], "recipe") == pytest.approx(1 / 3)


def test_anls_needs_a_list_of_answers_per_prediction():
    with pytest.raises(ValueError, match="got 1 predictions and 2 references"):
        anls(["a"], [["a"], ["b"]])


def test_a_scorer_scores_one_prediction_by_its_metric():
    assert scorer("accuracy")(" Page 2.", ["2", "page 2"]) == 1.0
    assert scorer("accuracy")("page 3", ["2", "page 2"]) == 0.0
    assert scorer("anls")("page 3", ["2", "page 2"]) == pytest.approx(5 / 6)
    assert scorer("anls", "recipe")("PAGE 2", ["page 2"]) == 0.0
