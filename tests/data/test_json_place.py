import pytest
from phi3v_data.json_place import key_span, span, token

LINE = (
    '{"id": "é", "conversations": [{"user": "u\\"x", "images": []}, {"user" : 12 }],'
    ' "a/b": {"c~d": null}}'
)


@pytest.mark.parametrize(
    ("pointer", "text"),
    [
        ("/id", '"é"'),
        ("/conversations/0/user", '"u\\"x"'),
        ("/conversations/0/images", "[]"),
        ("/conversations/1/user", "12"),
        ("/conversations/1", '{"user" : 12 }'),
        ("/a~1b/c~0d", "null"),
        ("", LINE),
    ],
)
def test_a_pointer_leads_to_the_characters_of_its_value(pointer: str, text: str):
    start, end = span(LINE.encode(), pointer)

    assert LINE[start:end] == text


@pytest.mark.parametrize(
    ("pointer", "text"),
    [
        ("/conversations/0/assistant", '{"user": "u\\"x", "images": []}'),
        ("/conversations/0/images/3", "[]"),
        ("/id/x/y", '"é"'),
        ("/source", LINE),
    ],
)
def test_what_is_not_there_leads_to_what_lacks_it(pointer: str, text: str):
    start, end = span(LINE.encode(), pointer)

    assert LINE[start:end] == text


def test_of_a_repeated_key_the_last_value_is_meant():
    line = b'{"a": {"b": 1}, "a": {"b": 2}}'

    assert span(line, "/a/b") == (27, 28)


def test_keys_are_found_with_their_quotes():
    start, end = key_span(LINE.encode(), "/conversations/1/user") or (0, 0)

    assert LINE[start:end] == '"user"'
    assert key_span(LINE.encode(), "/conversations/1") is None
    assert key_span(LINE.encode(), "/conversations/1/x") is None


def test_a_line_that_breaks_off_still_shows_what_came_before():
    assert span(b'{"a": 12, "b": ', "/a") == (6, 8)
    assert span(b'{"a": 12, "b": ', "/b") == (0, 15)
    assert span(b"\xff\xfe", "/b") == (0, 2)


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [('{"a\\"b": 1}', 1, 7), ("[-1.5e3]", 1, 7), ("[nul]", 1, 4), ("[,]", 1, 2), ('["x', 1, 2)],
)
def test_a_token_is_what_begins_at_a_character(text: str, start: int, end: int):
    assert token(text, start) == (start, end)


def test_no_token_begins_after_the_end():
    assert token("[1", 2) == (2, 2)
