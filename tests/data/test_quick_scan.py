"""The quick scan may send a good line to the rules, never let a bad one pass."""

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phi3v_data.block_check import parse
from phi3v_data.quick_scan import scan_block
from phi3v_data.rules import RULES, Context, Line

GOOD: list[dict[str, Any]] = [
    {"id": "a", "source": "s", "conversations": [{"user": "q", "assistant": "a"}]},
    {
        "id": "b",
        "source": "s",
        "conversations": [
            {"images": ["x/1.jpg", "x/2.jpg"], "user": "What?\nWell?", "assistant": 'A "b"\t/.'},
            {"user": "And?", "assistant": "C", "answers": ["C", "D"]},
        ],
        "metadata": {"id": 3, "what": None, "x": 1.5},
    },
    {"id": "ü", "source": "s", "conversations": [{"images": [], "user": "ü ☃", "assistant": "é"}]},
]


def turn(content: bytes) -> bytes:
    """A line of one turn."""
    return b'{"id": "a", "source": "s", "conversations": [{' + content + b"}]}"


def scan(*lines: bytes, **options: Any) -> list[int]:
    settings = {"max_line_bytes": 100_000, "allow_missing_answer": False, "is_start": False}
    return scan_block(b"".join(line + b"\n" for line in lines), **(settings | options)).suspects


def has_finding(line: bytes, *, allow_missing_answer: bool = False) -> bool:
    """Whether a rule about one line says anything."""
    sample, error = parse(line)
    context = Context(
        file="f",
        line_number=2,
        image_root="",
        images={},
        ids={},
        allow_missing_answer=allow_missing_answer,
        num_crops=16,
    )
    for rule in RULES:
        subject = {"line": Line(line, 2, error), "sample": sample}.get(rule.subject)
        if subject is not None and not rule.code.startswith("I"):
            for _ in rule.check(subject, context):
                return True
    return sample is None


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("sample", GOOD)
def test_ordinary_lines_are_no_suspects(sample: dict[str, Any], ensure_ascii: bool) -> None:
    for separators in ((",", ":"), (", ", ": ")):
        line = json.dumps(sample, ensure_ascii=ensure_ascii, separators=separators).encode()
        is_latin = ensure_ascii and "\\u00" in line.decode()
        assert scan(line) == ([0] if is_latin else [])


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"not json",
        turn(b'"user": "q", "assistant": "a"').replace(b'"id"', b'"id": "b", "id"'),
        turn(b'"user": "q", "assistant": "a", "assistant": "b"').replace(b'"id":', b'"id" :'),
        turn(b'"user": "q", "assistant": " "'),
        turn(b'"user": "<|end|>", "assistant": "a"'),
        turn(b'"user": "\\u003c|end|>", "assistant": "a"'),
        turn(b'"user": "<\\u007cend|>", "assistant": "a"'),
        turn(b'"user": "<\\/s>", "assistant": "a"'),
        turn(b'"user": "x\\b", "assistant": "a"'),
        turn(b'"user": "x\xc2\x85", "assistant": "a"'),
        turn(b'"user": "x", "assistant": "a"').replace(b'"a", "source"', b'"", "source"'),
        turn(b'"user": "x"').replace(b'{"user": "x"}', b""),
        turn(b'"user": "x"'),
        turn(b'"user": "x", "assistant": "a", "answers": ["b"]'),
        turn(b'"user": "x", "assistant": "a"')[:-1] + b', "metadata": {"k": 1, "k": 2}}',
        turn(b'"user": "' + b"x" * 100_000 + b'", "assistant": "a"'),
        turn(b'"user": "It is ' + b"so " * 20 + b'.", "assistant": "' + b"so " * 19 + b'"'),
    ],
)
def test_what_a_rule_says_something_about_is_a_suspect(line: bytes) -> None:
    good = json.dumps(GOOD[0]).encode()
    assert scan(good, line, good) == [1]
    assert has_finding(line) or line == b""


def test_the_last_line_without_its_break_and_a_byte_order_mark_are_suspects() -> None:
    good = json.dumps(GOOD[0]).encode()
    options: dict[str, Any] = {"max_line_bytes": 1000, "allow_missing_answer": False}
    assert scan_block(good + b"\n" + good, is_start=False, **options).suspects == [1]
    assert scan(b"\xef\xbb\xbf" + good, is_start=True) == [0]


def test_a_missing_answer_is_no_suspect_where_it_is_allowed() -> None:
    line = b'{"id": "a", "source": "s", "conversations": [{"user": "x"}]}'
    assert scan(line, allow_missing_answer=True) == []
    middle = b'{"id": "a", "source": "s", "conversations": [{"user": "x"}, {"user": "y"}]}'
    assert scan(middle, allow_missing_answer=True) == [0]


TOKENS = [
    b'"', b":", b",", b"{", b"}", b"[", b"]", b"\\", b"\\u003c", b"<|end|>", b"</s>", b"null",
    b"1e999", b'" :',
    b"NaN", b"\xff", b"\xc2\x9f", b"\x00", b"\t", b" ", b'"id":"x"', b'"images":[]', b"<|image_1|>",
    b"\\ud800", b"\\/", b"\r", b"123456789012345678901234567890", b"-0", b"true", b'"user":',
]  # fmt: skip


def mutate(line: bytes, rng: random.Random) -> bytes:
    """A line with some bytes removed, doubled or put in."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(line) + 1)
        end = min(len(line), start + rng.choice((0, 0, 1, 1, 2, 9)))
        new = rng.choice(
            (b"", rng.choice(TOKENS), line[start:end] * 2, bytes([rng.randrange(256)]))
        )
        line = line[:start] + new + line[end:]
    return line.replace(b"\n", b" ")


def assert_nothing_slips_through(lines: list[bytes], *, allow_missing_answer: bool) -> None:
    suspects = set(scan(*lines, allow_missing_answer=allow_missing_answer))
    slipped = [
        line
        for number, line in enumerate(lines)
        if number not in suspects and has_finding(line, allow_missing_answer=allow_missing_answer)
    ]
    assert slipped == []


@pytest.mark.parametrize("allow_missing_answer", [True, False])
def test_no_mutated_line_slips_through(allow_missing_answer: bool) -> None:
    rng = random.Random(0)
    seeds = [json.dumps(sample, ensure_ascii=False).encode() for sample in GOOD]
    lines = [mutate(rng.choice(seeds), rng) for _ in range(10_000)]
    assert_nothing_slips_through(lines, allow_missing_answer=allow_missing_answer)


text = st.text(max_size=12) | st.sampled_from(["<|user|>", "\x07", " ", "</s>", "<|image_1|>"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(text, text, text, st.booleans()), min_size=1, max_size=5))
def test_no_text_slips_through(rows: list[tuple[str, str, str, bool]]) -> None:
    lines = [
        json.dumps(
            {"id": a, "source": "s", "conversations": [{"user": b, "assistant": c}]},
            ensure_ascii=ensure_ascii,
        ).encode("utf-8", "surrogatepass")
        for a, b, c, ensure_ascii in rows
    ]
    assert_nothing_slips_through(lines, allow_missing_answer=False)
