"""Every S rule: a line that breaks it, with the exact message."""

import json
from pathlib import Path
from typing import Any

import pytest

from .rule_lines import find, only, turn

SAMPLE_KEYS = "expected keys: id, source, conversations, metadata"
TURN_KEYS = "expected keys: images, user, assistant, answers"


@pytest.mark.parametrize(
    ("change", "code", "pointer", "message", "help"),
    [
        ({"id": ...}, "S102", "/id", "'id' is missing", SAMPLE_KEYS),
        (
            {"conversations": ...},
            "S102",
            "/conversations",
            "'conversations' is missing",
            SAMPLE_KEYS,
        ),
        ({"sorce": "x"}, "S103", "/sorce", "unknown key 'sorce'", "did you mean 'source'?"),
        ({"Id": "x"}, "S103", "/Id", "unknown key 'Id'", "did you mean 'id'?"),
        ({"user": "x"}, "S103", "/user", "'user' is out of place", "'user' is a key of a turn"),
        (
            {"height/width": 1},
            "S103",
            "/height~1width",
            "unknown key 'height/width'",
            "expected id, source, conversations, metadata; keys of your own go into metadata",
        ),
        ({"id": 3}, "S104", "/id", "id: expected a string, got a number", ""),
        ({"id": None}, "S104", "/id", "id: expected a string, got null", ""),
        (
            {"conversations": {}},
            "S104",
            "/conversations",
            "conversations: expected a list, got an object",
            "",
        ),
        (
            {"conversations": ["x"]},
            "S104",
            "/conversations/0",
            "conversations[0]: expected an object, got a string",
            "",
        ),
        (
            {"metadata": 1},
            "S104",
            "/metadata",
            "metadata: expected an object, got a number",
            "",
        ),
        ({"id": ""}, "S105", "/id", "'id' is empty", ""),
        (
            {"conversations": []},
            "S105",
            "/conversations",
            "conversations is empty",
            "a sample has at least one turn",
        ),
        (
            {"metadata": {"a": [1]}},
            "S108",
            "/metadata/a",
            "metadata.a: metadata holds strings, finite numbers, booleans and null only, "
            "got a list",
            "metadata is flat: no lists, no objects",
        ),
    ],
)
def test_what_is_wrong_with_a_sample_has_a_code_a_pointer_and_a_way_out(
    tmp_path: Path, change: dict[str, Any], code: str, pointer: str, message: str, help: str
):
    line = {key: value for key, value in {**turn(), **change}.items() if value is not ...}
    d = only(find(tmp_path, line), code)

    assert (d.pointer, d.message, d.help) == (pointer, message, help)
    assert d.severity == "error"


@pytest.mark.parametrize(
    ("fields", "code", "pointer", "message", "help"),
    [
        ({"user": ...}, "S102", "/user", "'user' is missing", TURN_KEYS),
        (
            {"asistant": "x"},
            "S103",
            "/asistant",
            "unknown key 'asistant'",
            "did you mean 'assistant'?",
        ),
        ({"id": "x"}, "S103", "/id", "'id' is out of place", "'id' is a key of the sample"),
        (
            {"assistant": 3},
            "S104",
            "/assistant",
            "conversations[0].assistant: expected a string, got a number",
            "",
        ),
        (
            {"answers": "Red"},
            "S104",
            "/answers",
            "conversations[0].answers: expected a list, got a string",
            'write ["Red"]',
        ),
        (
            {"images": "a.jpg"},
            "S107",
            "/images",
            "conversations[0].images: expected a list of paths, got a string",
            'write ["a.jpg"]',
        ),
        (
            {"images": [{"path": "a.jpg"}]},
            "S107",
            "/images/0",
            "conversations[0].images[0]: expected a path, got an object",
            "each image is one string",
        ),
        (
            {"answers": []},
            "S109",
            "",
            "answers is empty",
            "leave it out, or list the accepted answers",
        ),
        (
            {"answers": ["Blue"]},
            "S109",
            "",
            "assistant must be the first of answers, 'Blue': it is 'Red'",
            "put the answer to learn first",
        ),
        (
            {"answers": ["Blue"], "assistant": ...},
            "S109",
            "",
            "assistant must be the first of answers, 'Blue': there is none",
            "put the answer to learn first",
        ),
    ],
)
def test_what_is_wrong_with_a_turn_has_a_code_a_pointer_and_a_way_out(
    tmp_path: Path, fields: dict[str, Any], code: str, pointer: str, message: str, help: str
):
    line = turn(**fields)
    line["conversations"] = [
        {key: value for key, value in line["conversations"][0].items() if value is not ...}
    ]
    d = only(find(tmp_path, line), code)

    assert (d.pointer, d.message, d.help) == ("/conversations/0" + pointer, message, help)


def test_S103_points_at_the_key_itself(tmp_path: Path):
    line = json.dumps({**turn(), "sorce": "x"})

    assert only(find(tmp_path, line.encode()), "S103").column == line.index('"sorce"') + 1


def test_S106_names_each_turn_without_an_answer_but_the_last(tmp_path: Path):
    turns = [{"user": "u"}, {"user": "u", "assistant": None}, {"user": "u", "assistant": "a"}]
    diagnostics = find(tmp_path, {**turn(), "conversations": turns})

    assert [(d.code, d.pointer, d.message) for d in diagnostics] == [
        (
            "S106",
            f"/conversations/{k}",
            f"conversations[{k}] has no assistant: only the last turn may lack one",
        )
        for k in (0, 1)
    ]
    assert diagnostics[0].help == "answer it, or leave the turn out"


def test_all_that_is_wrong_with_a_line_is_reported_once(tmp_path: Path):
    line = {"id": "a", "conversations": [{"assistant": "x"}], "metadata": {"a": {}, "b": []}}

    assert [(d.code, d.pointer) for d in find(tmp_path, line)] == [
        ("S102", "/source"),
        ("S102", "/conversations/0/user"),
        ("S108", "/metadata/a"),
        ("S108", "/metadata/b"),
    ]


def test_S108_refuses_a_number_too_large_to_hold(tmp_path: Path):
    line = json.dumps({**turn(), "metadata": {"a": 1}}).replace("1", "1e999")

    assert only(find(tmp_path, line.encode()), "S108").message.endswith("got a number")


def test_messages_stay_short_whatever_the_data(tmp_path: Path):
    long = "x" * 100_000
    lines = (
        {**turn(), long: 1},
        {**turn(), "metadata": {long: []}},
        turn(answers=[long]),
        turn(images=long),
    )
    diagnostics = find(tmp_path, *lines)

    assert [d.code for d in diagnostics] == ["S103", "S108", "S109", "S107"]
    assert all(len(d.message) + len(d.help) < 300 for d in diagnostics)
