import json

import pytest
from phi3v_train.confusion import (
    confusion,
    confusion_json,
    confusion_table,
    is_classification,
)
from phi3v_train.metrics import count_by_class

SAID = ["Archery", "biking", "archery.", "Biking", "running", "biking"]
TRUE = ["Archery", "Archery", "Archery", "Biking", "Biking", "Biking"]


def test_a_row_of_the_matrix_says_what_a_class_was_taken_for() -> None:
    matrix = confusion(count_by_class(SAID, TRUE))
    assert matrix.labels == ("archery", "biking")
    assert matrix.counts == ((2, 1), (0, 2))
    assert matrix.other == (0, 1)


def test_the_json_of_a_matrix_reads_back() -> None:
    table = count_by_class(SAID, TRUE)
    assert json.loads(confusion_json(table)) == {
        "labels": ["archery", "biking"],
        "counts": [[2, 1], [0, 2]],
        "other": [0, 1],
    }


def test_the_table_has_a_line_a_class_and_one_for_all() -> None:
    assert confusion_table(count_by_class(SAID, TRUE)) == (
        "class     right      of  accuracy  taken for\n"
        "archery       2       3     66.7%  biking 1\n"
        "biking        2       3     66.7%  'running' 1\n"
        "all           4       6     66.7%\n"
    )


def test_the_table_names_the_commonest_mistakes_and_counts_the_rest() -> None:
    said = ["b", "b", "c", "d\nd", "e" * 80, "a"]
    table = confusion_table(count_by_class(said, ["a"] * 6))
    line = table.splitlines()[1]
    assert line.endswith("'b' 2, 'c' 1, 'd d' 1, 1 more")
    assert all(len(line) < 120 for line in table.splitlines())


@pytest.mark.parametrize(
    ("answers", "expected"),
    [(["yes", "no", "yes", "no"], True), (["1987", "page 2", "itc", "itc"], False)],
)
def test_answers_that_repeat_are_classes(answers: list[str], expected: bool) -> None:
    assert is_classification(count_by_class(answers, answers)) is expected
