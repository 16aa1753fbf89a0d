r"""The strict parser, on the cases of a public suite and on mutated lines."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from phi3v_data.json_line import (
    MAX_DEPTH,
    JsonProblem,
    ParsedJson,
    RepeatedKey,
    json_pointer,
    num_repeated_keys,
    parse_json,
    shorten,
)

SUITE = Path(__file__).resolve().parents[3] / "shared/testdata/json_parsing"


@pytest.mark.skipif(not SUITE.is_dir(), reason="the suite of JSON files is not at hand")
def test_every_file_of_the_suite_is_taken_or_refused_as_its_name_says():
    wrong: list[str] = []
    names = sorted(SUITE.glob("*.json"))
    for path in names:
        is_taken = isinstance(parse_json(path.read_bytes()), ParsedJson)
        if path.name.startswith("y_" if not is_taken else "n_"):
            wrong.append(path.name)

    assert len(names) > 150
    assert wrong == []


@pytest.mark.skipif(not SUITE.is_dir(), reason="the suite of JSON files is not at hand")
def test_what_is_taken_has_the_value_that_python_reads():
    for path in SUITE.glob("y_*.json"):
        parsed = parse_json(path.read_bytes())

        assert isinstance(parsed, ParsedJson)
        assert parsed.value == json.loads(path.read_bytes()), path.name


@pytest.mark.parametrize(
    ("line", "kind", "message", "place", "help"),
    [
        (b'{"a": nul}', "not_json", "'nul' is not a JSON value", (6, 9), ""),
        (b'{"a": True}', "not_json", "'True' is not a JSON value", (6, 10), "write true"),
        (b'{"a": None}', "not_json", "'None' is not a JSON value", (6, 10), "write null"),
        (
            b'{"a": 1,}',
            "not_json",
            "a comma before '}'",
            (7, 8),
            "JSON has no comma after the last item",
        ),
        (
            b"{'a': 1}",
            "not_json",
            'expected a key in double quotes, got "\'"',
            (1, 2),
            "strings stand in double quotes",
        ),
        (b"{a: 1}", "not_json", "expected a key in double quotes, got 'a'", (1, 2), 'write "a"'),
        (b'{"a" 1}', "not_json", "expected ':' after the key, got '1'", (5, 6), ""),
        (b'{"a": 1 "b": 2}', "not_json", "expected ',' or '}', got '\"'", (8, 9), ""),
        (
            b'{"a": 1} // x',
            "not_json",
            "'/' after the end of the value",
            (9, 10),
            "JSON has no comments",
        ),
        (b"{} {}", "not_json", "a second value on the line", (3, 4), "one JSON object a line"),
        (
            b"{},",
            "not_json",
            "',' after the end of the value",
            (2, 3),
            "lines of a conversations file are not separated by commas",
        ),
        (
            b"[007]",
            "not_json",
            "'007' is not a JSON number",
            (1, 4),
            "no leading zeros; a code with leading zeros is a string",
        ),
        (b"[+1]", "not_json", "'+1' is not a JSON number", (1, 3), "no plus sign"),
        (
            b"[1.]",
            "not_json",
            "'1.' is not a JSON number",
            (1, 3),
            "a digit stands after the point",
        ),
        (
            b'["a\tb"]',
            "not_json",
            "control character U+0009 in a string",
            (3, 4),
            r"write it as an escape, \t",
        ),
        (
            rb'["C:\data"]',
            "not_json",
            r"\d is not an escape of JSON",
            (4, 6),
            r"a backslash itself is written \\",
        ),
        (
            rb'["\ud800"]',
            "not_json",
            r"\ud800 is half of a surrogate pair",
            (2, 8),
            "no character has this number: write the whole pair, or the character itself",
        ),
        (b"  ", "not_json", "there is nothing on the line", (0, 2), ""),
        (
            b'{"a": NaN}',
            "not_finite",
            "NaN is not JSON: a number is finite",
            (6, 9),
            "leave the key out, or write null",
        ),
        (
            b"[-Infinity]",
            "not_finite",
            "-Infinity is not JSON: a number is finite",
            (1, 10),
            "leave the key out, or write null",
        ),
        ('["é'.encode() + b'\xe9"]', "not_utf8", "not UTF-8: byte 0xE9", (3, 4), ""),
        (
            b"[" * 9999,
            "too_deep",
            "nested more than 100 levels deep",
            (100, 101),
            "a sample is four levels deep",
        ),
        (b'{"a": "b', "cut_off", "the line ends inside a string", (8, 8), ""),
        (b'{"a": "b\\', "cut_off", "the line ends inside a string", (9, 9), ""),
        (b'{"a": "b\\u00', "cut_off", "the line ends inside a string", (12, 12), ""),
        (b'{"a": [1, ', "cut_off", "the line ends inside a list", (10, 10), ""),
        (b'{"a": {"b": 1}', "cut_off", "the line ends inside an object", (14, 14), ""),
        (b'{"a": 1.', "cut_off", "the line ends inside a number", (8, 8), ""),
        (b'{"a": tr', "cut_off", "the line ends inside a word", (8, 8), ""),
    ],
)
def test_the_first_problem_is_named_with_its_characters(
    line: bytes, kind: str, message: str, place: tuple[int, int], help: str
):
    problem = parse_json(line)

    assert isinstance(problem, JsonProblem)
    assert (problem.kind, problem.message) == (kind, message)
    assert ((problem.start, problem.end), problem.help) == (place, help)


def test_nesting_up_to_the_limit_is_taken():
    assert isinstance(parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH), ParsedJson)
    assert isinstance(parse_json(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1)), JsonProblem)


def test_repeated_keys_are_named_with_both_places():
    line = b'{"a": 1, "b": [{"c": 1, "\\u0063": 2}], "a": 3, "a": 4}'
    parsed = parse_json(line)

    assert isinstance(parsed, ParsedJson)
    assert parsed.value == {"a": 4, "b": [{"c": 2}]}
    assert parsed.repeated_keys == (
        RepeatedKey("c", "/b/0/c", (16, 19), (24, 32)),
        RepeatedKey("a", "/a", (1, 4), (39, 42)),
        RepeatedKey("a", "/a", (1, 4), (47, 50)),
    )
    assert num_repeated_keys(line) == 3
    assert num_repeated_keys(b'{"a": {"a": 1}, "b": [{"a": 1}, {"a": 1}]}') == 0


def test_a_very_long_number_is_a_number():
    parsed = parse_json(b"[" + b"1" * 100_000 + b"]")

    assert parsed == ParsedJson([float("inf")])


def test_pointers_escape_what_separates_them():
    assert json_pointer(("a/b", 0, "c~d")) == "/a~1b/0/c~0d"


def test_long_texts_are_shortened_in_their_middle():
    assert shorten("x" * 60) == "x" * 60
    assert shorten("a" * 50 + "b" * 50) == "a" * 30 + "…" + "b" * 29


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON, st.booleans())
def test_what_python_writes_is_read_back(value: object, ensure_ascii: bool):
    assert parse_json(json.dumps(value, ensure_ascii=ensure_ascii).encode()) == ParsedJson(value)


@given(st.binary(max_size=60) | st.text('{}[]":,\\u0a1e-.tnf N', max_size=40).map(str.encode))
def test_no_bytes_crash_it_and_it_is_no_more_lenient_than_python(line: bytes):
    parsed = parse_json(line)
    if isinstance(parsed, ParsedJson):
        json.loads(line)
    else:
        assert 0 <= parsed.start <= parsed.end <= len(line)
