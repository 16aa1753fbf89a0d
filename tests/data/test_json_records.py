import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phi3v_data.converters import Rejected
from phi3v_data.converters import json_records as module
from phi3v_data.converters.json_records import (
    ArrayCutter,
    RecordGroup,
    list_record_groups,
    read_records,
)
from phi3v_data.converters.rows import Row

SCALARS = st.none() | st.booleans() | st.integers() | st.text('ab"\\[]{},:\n é\u2028', max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inside: (
        st.lists(inside, max_size=3) | st.dictionaries(st.text('a"\\[{,', max_size=3), inside)
    ),
    max_leaves=8,
)
INDENTS = st.sampled_from([None, 0, 2])


def chunks_of(content: bytes, size: int) -> list[bytes]:
    return [content[start : start + size] for start in range(0, len(content), size)]


def elements(content: bytes, chunk_bytes: int) -> list[bytes] | None:
    """The elements of a whole array as bytes; None where it is not closed or something follows."""
    cutter = ArrayCutter(1)
    spans = list(cutter.cut(chunks_of(content[1:], chunk_bytes)))
    if cutter.closing is None or content[cutter.closing :].strip() != b"]":
        return None
    last = cutter.rest()
    if spans or content[last.start : last.end].strip():
        spans.append(last)
    return [content[span.start : span.end] for span in spans]


def parse_by_elements(content: bytes, chunk_bytes: int) -> Any:
    pieces = elements(content, chunk_bytes)
    if pieces is None:
        raise ValueError("no array")
    return [json.loads(piece) for piece in pieces]


@settings(deadline=None)  # machines differ
@given(st.lists(VALUES, max_size=5), INDENTS, st.booleans(), st.integers(1, 40))
def test_the_elements_of_any_array_are_those_json_finds(
    values: list[Any], indent: int | None, ascii_only: bool, chunk_bytes: int
) -> None:
    content = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    assert parse_by_elements(content, chunk_bytes) == values


@settings(deadline=None)  # machines differ
@given(
    st.lists(VALUES, max_size=4),
    st.data(),
    st.sampled_from([b"", b'"', b"\\", b"[", b"]", b"{", b"}", b",", b":", b" ", b"1", b"\n"]),
    st.integers(1, 20),
)
def test_what_json_refuses_as_a_whole_is_refused_by_elements_and_the_other_way_round(
    values: list[Any], data: st.DataObject, put: bytes, chunk_bytes: int
) -> None:
    content = bytearray(json.dumps(values).encode())
    position = data.draw(st.integers(1, len(content)))
    content[position : position + data.draw(st.integers(0, 2))] = put
    by_elements = outcome(lambda: parse_by_elements(bytes(content), chunk_bytes))
    assert by_elements == outcome(lambda: json.loads(content))


def outcome(parse: Callable[[], Any]) -> Any:
    """What `parse` returns, or that it refuses."""
    try:
        return parse()
    except ValueError:
        return "refused"


@settings(deadline=None)  # machines differ
@given(st.lists(VALUES, min_size=1, max_size=4), INDENTS, st.integers(1, 9))
def test_lines_are_counted_across_chunks(
    values: list[Any], indent: int | None, chunk_bytes: int
) -> None:
    content = json.dumps(values, indent=indent).encode()
    cutter = ArrayCutter(1)
    spans = [*cutter.cut(chunks_of(content[1:], chunk_bytes)), cutter.rest()]
    assert [span.line for span in spans] == [1 + content.count(b"\n", 0, s.start) for s in spans]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def groups_of(path: Path, group_bytes: int | None = None) -> list[RecordGroup]:
    return list(list_record_groups(path, path.name, group_bytes=group_bytes))


def read_all(path: Path, group_bytes: int | None = None) -> list[Row | Rejected]:
    return [found for group in groups_of(path, group_bytes) for found in read_records(group)]


@settings(deadline=None)  # machines differ
@given(
    st.lists(st.dictionaries(st.text(max_size=3), SCALARS, max_size=3), max_size=8),
    st.sampled_from(["lines", "array", "pretty"]),
    st.integers(1, 200),
    st.integers(1, 64),
)
def test_the_records_do_not_depend_on_how_they_are_grouped(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    form: str,
    group_bytes: int,
    chunk_bytes: int,
) -> None:
    path = tmp_path_factory.mktemp("records") / "train.json"
    if form == "lines":
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        write(path, json.dumps(rows, indent=2 if form == "pretty" else None))
    whole = read_all(path)
    assert [record.fields for record in whole if isinstance(record, Row)] == rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk_bytes)
        groups = groups_of(path, group_bytes)
        assert [found for group in groups for found in read_records(group)] == whole
    assert len({group.key for group in groups}) == len(groups)


def test_a_record_says_where_it_is(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", '\n{"a": 1}\n\n{"a": 2}')
    assert [(r.where, r.number) for r in read_all(lines) if isinstance(r, Row)] == [
        ("a.jsonl:2", 1), ("a.jsonl:4", 3),
    ]  # fmt: skip
    array = write(tmp_path / "b.json", '[\n  {"a": 1},\n\n  {"a": 2}, {}]')
    assert [(r.where, r.number) for r in read_all(array) if isinstance(r, Row)] == [
        ("b.json[0] (line 2)", 0), ("b.json[1] (line 4)", 1), ("b.json[2] (line 4)", 2),
    ]  # fmt: skip


def test_the_form_is_told_by_content_and_not_by_name(tmp_path: Path) -> None:
    for name in ("a.json", "b.jsonl"):
        for content in ('[{"a": 1}, {"a": 2}]', '{"a": 1}\n{"a": 2}', " \n\ufeff"[:2] + '{"a":1}'):
            found = read_all(write(tmp_path / name, content))
            assert all(isinstance(record, Row) for record in found), (name, content)


@pytest.mark.parametrize("content", ['[{"a": 1}]', '{"a": 1}\n'])
def test_a_byte_order_mark_takes_nothing_away(tmp_path: Path, content: str) -> None:
    (record,) = read_all(write(tmp_path / "a.json", b"\xef\xbb\xbf" + content.encode()))
    assert isinstance(record, Row)
    assert record.fields == {"a": 1}


@pytest.mark.parametrize("content", ["", "  \n", "[]", "[ \n ]\n"])
def test_a_file_without_records_has_no_groups(tmp_path: Path, content: str) -> None:
    assert groups_of(write(tmp_path / "a.json", content)) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"a": 1}, {"a": 2', ["ok", "bad_json", "truncated"]),
        ('[{"a": 1}, {"a": 2}', ["ok", "ok", "truncated"]),
        ('[{"a": 1},', ["ok", "bad_json", "truncated"]),
        ("[", ["bad_json", "truncated"]),
        ('[{"a": 1}] {"a": 2}', ["ok", "trailing_data"]),
        ("[] 1", ["bad_json", "trailing_data"]),
        ('[{"a": 1}, {"b": 2}}, {"c": 3}]', ["ok", "ok", "bad_json"]),
        ('[{"a": 1}, , {"a": 3}]', ["ok", "bad_json", "ok"]),
        ('[{"a": 1},]', ["ok", "bad_json"]),
        ('[{"a": 1}, 7, "x", null, [1, 2]]', ["ok"] + ["not_object"] * 4),
        ('[{"a": 1, "a": 2}, {"a": nope}, {"a": 3}]', ["duplicate_key", "bad_json", "ok"]),
        ('{"a": 1}\n{"a": \n{"a": 3}\n7\n', ["ok", "bad_json", "ok", "not_object"]),
        (b'{"a": "\xff"}\n{"a": 2}', ["bad_utf8", "ok"]),
        (b'[{"a": "\xff"}, {"a": 2}]', ["bad_utf8", "ok"]),
        (b'[{"a": "\\ud800"}, {"a": 2}]', ["bad_unicode", "ok"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_and_costs_nothing_else(
    tmp_path: Path, content: str | bytes, expected: list[str]
) -> None:
    found = read_all(write(tmp_path / "a.jsonl", content))
    assert [f.reason if isinstance(f, Rejected) else "ok" for f in found] == expected
    assert all(f.detail.startswith("a.jsonl") for f in found if isinstance(f, Rejected))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff\xfe[\x00", "is UTF-16; expected UTF-8"),
        (b"{\n  \"a\": 1\n}\n", "is one object over many lines"),
        (b'{"data": [{"a": 1},\n{"a": 2}]}', "is one object over many lines"),
        (b"id,image\n", "is no JSON: expected one object a line"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_says_what_was_expected(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        groups_of(write(tmp_path / "a.json", content))


@pytest.mark.parametrize("form", ["lines", "array"])
def test_a_record_too_long_is_rejected_and_the_next_one_read(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_RECORD_BYTES", 100)
    rows = [json.dumps({"a": "x" * 100}), json.dumps({"a": 2})]
    content = "\n".join(rows) if form == "lines" else f"[{','.join(rows)}]"
    first, second = read_all(write(tmp_path / "a.json", content))
    assert isinstance(first, Rejected)
    assert first.reason == "record_too_long"
    assert isinstance(second, Row)
    assert second.fields == {"a": 2}


def test_deep_brackets_are_a_bad_record_and_nothing_worse(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    found = read_all(write(tmp_path / "a.json", f'[{{"a": {deep}}}, {{"a": 2}}]'))
    assert [f.reason if isinstance(f, Rejected) else "ok" for f in found] == ["bad_json", "ok"]
