import pytest
from hypothesis import given
from hypothesis import strategies as st
from phi3v_train.metrics import accuracy, count_by_class, normalize_answer


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
