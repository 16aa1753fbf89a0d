"""Every P rule: a line that breaks it, with the exact message."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phi3v_data.rules import RULES, Context, Line, parse
from phi3v_data.schema import Sample
from pydantic import ValidationError

from .rule_lines import find, only, turn

GOOD = json.dumps(turn()).encode()


def test_P101_gives_line_and_column_of_what_is_not_json(tmp_path: Path):
    d = only(find(tmp_path, GOOD, '{"id": "é", "source": nul}'.encode()), "P101")

    assert (d.line, d.column, d.pointer) == (2, 23, "")
    assert d.message == "not JSON: 'nul' is not a JSON value"
    assert d.help == "one JSON object a line"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "a"', "not JSON: the line ends inside an object"),
        (b'{"id": "a', "not JSON: the line ends inside a string"),
        (b'{"id": "a",}', "not JSON: a comma before '}'"),
        (b'{"id": "\\ud800"}', "not JSON: \\ud800 is half of a surrogate pair"),
        (GOOD + GOOD, "not JSON: a second value on the line"),
        (b"[1, 2]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"12", "not a JSON object"),
    ],
)
def test_P101_says_what_stopped_it(tmp_path: Path, line: bytes, message: str):
    assert only(find(tmp_path, GOOD, line), "P101").message == message


def test_P101_recognises_a_pretty_printed_file(tmp_path: Path):
    diagnostics = find(tmp_path, b"[", b" {}", b"]")

    assert diagnostics[0].help == (
        "the file looks pretty-printed: one JSON object a line, e.g. by `jq -c '.[]'`"
    )


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (b"\xef\xbb\xbf" + GOOD, "UTF-8"),
        (b"\xef\xbb\xbf{", "UTF-8"),
        ("\n".join(["{}"] * 5).encode("utf-16"), "UTF-16"),
    ],
)
def test_P102_names_a_byte_order_mark_and_nothing_else(
    tmp_path: Path, content: bytes, encoding: str
):
    d = only(find(tmp_path, content), "P102")

    assert (d.message, d.column) == (f"the file starts with a {encoding} byte order mark", 1)
    assert d.help == "save it as UTF-8 without BOM"


def test_P103_names_the_byte_that_is_not_utf8(tmp_path: Path):
    d = only(find(tmp_path, '{"id": "é'.encode() + b"\xe9"), "P103")

    assert (d.message, d.column) == ("not UTF-8: byte 0xE9", 10)
    assert d.help == "convert the file to UTF-8, e.g. by iconv"


def test_P104_names_a_repeated_key_and_both_places(tmp_path: Path):
    d = only(find(tmp_path, GOOD[:-1] + b', "id": "b"}'), "P104")

    assert d.message == "key 'id' occurs twice: first at column 2, again at 88"
    assert (d.column, d.pointer) == (88, "/id")
    assert d.help == "readers differ in which value they take: leave one"


def test_P104_looks_into_turns_and_metadata(tmp_path: Path):
    line = (
        b'{"id": "a", "source": "s", "metadata": {"k": 1, "k": 1}, '
        b'"conversations": [{"user": "u", "assistant": "a", "user": "v"}]}'
    )

    assert [(d.code, d.pointer) for d in find(tmp_path, line)] == [
        ("P104", "/metadata/k"),
        ("P104", "/conversations/0/user"),
    ]


def test_P104_also_speaks_of_lines_that_are_no_samples(tmp_path: Path):
    assert [d.code for d in find(tmp_path, b'{"id": "a", "id": "b"}')] == ["P104", "S102", "S102"]


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_P105_refuses_numbers_that_are_not_finite(tmp_path: Path, word: str):
    line = GOOD[:-1] + f', "metadata": {{"a": {word}}}}}'.encode()
    d = only(find(tmp_path, line), "P105")

    assert d.message == f"not JSON: {word} is not JSON: a number is finite"
    assert d.help == "leave the key out, or write null"
    assert line[(d.column or 0) - 1 :].startswith(word.encode())


@pytest.mark.parametrize("line", [b"[" * 5000, b'{"a":' * 5000, b"[" * 150 + b"]" * 150])
def test_P106_refuses_absurd_nesting(tmp_path: Path, line: bytes):
    d = only(find(tmp_path, line), "P106")

    assert d.message == "not JSON: nested more than 100 levels deep"
    assert d.help == "a sample is four levels deep"


def line_of(content: bytes, kind: type[Line] = Line) -> Line:
    """A line as the runner makes it."""
    try:
        Sample.from_json(content)
    except ValidationError as error:
        return kind(content, 7, error)
    return kind(content, 7, None)


def codes(line: Line) -> list[str]:
    """Codes of what the P and S rules say of a line."""
    rules = [rule for rule in RULES if rule.subject == "line"]
    return [rule.code for rule in rules for _ in rule.check(line, context())]


@pytest.mark.parametrize("content", [b"", b" \t"])
def test_P107_warns_of_a_blank_line_and_nothing_else_does(content: bytes):
    (finding,) = parse.blank_line(Line(content, 7, None), context())

    assert (finding.message, finding.help) == (
        "the line is blank",
        "some readers stop here: remove it",
    )
    assert codes(Line(content, 7, None)) == ["P107"]
    assert {rule.code: rule.severity for rule in RULES}["P107"] == "warning"


def test_P108_says_that_a_file_seems_cut_off():
    line = line_of(GOOD[:-20], parse.UnfinishedLine)
    (finding,) = parse.cut_off_file(line, context())

    assert codes(line) == ["P108"]
    assert finding.message == "the file ends inside a string: it seems cut off"
    assert finding.help == "fetch or write it again: more than this line may be missing"
    assert finding.column == len(GOOD) - 20 + 1


def test_P108_wants_both_a_missing_line_break_and_json_that_goes_on():
    assert codes(line_of(GOOD[:-20])) == ["P101"]
    assert codes(line_of(GOOD, parse.UnfinishedLine)) == []
    assert codes(line_of(GOOD[:-1] + b",}", parse.UnfinishedLine)) == ["P101"]


def context() -> Context:
    return Context(
        file="x.jsonl",
        line_number=2,
        image_root="images",
        images={},
        ids={},
        allow_missing_answer=True,
        num_crops=16,
    )


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=300)
@given(st.data())
def test_every_line_that_is_no_sample_gets_a_finding(data: st.DataObject):
    """Whatever pydantic refuses, a P or S rule names: no line fails unnamed."""
    line = bytearray(json.dumps({**turn(images=["a.png"]), "metadata": {"k": 1.5}}).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(line) - 1))
        kind = data.draw(st.sampled_from(["replace", "delete", "insert", "cut"]))
        piece = data.draw(
            st.binary(min_size=1, max_size=3)
            | st.sampled_from([b"null", b"[]", b"{}", b'"', b"NaN", b"1e999", b'"\\ud800"', b"["])
        )
        if kind == "cut":
            del line[max(position, 1) :]
        elif kind == "insert":
            line[position:position] = piece
        else:
            line[position : position + len(piece)] = piece if kind == "replace" else b""
        line = line or bytearray(b" ")
    content = bytes(line).replace(b"\n", b" ")
    try:
        Sample.from_json(content)
        error = None
    except ValidationError as caught:
        error = caught
    record = Line(content, 2, error)
    findings = [
        finding
        for rule in RULES
        if rule.subject == "line"
        for finding in rule.check(record, context())
    ]
    if error is not None:
        assert findings, content
        assert all(finding.message for finding in findings)
