"""A block of lines gives the same counts however few findings get words."""

from pathlib import Path

import pytest
from phi3v_data.block_check import Block, BlockResult, Options, check_block
from phi3v_data.json_line import read_closely, read_fast
from phi3v_data.rules import RULES

from tests.data.line_mutator import LineMutator

LINE_RULES = tuple(rule for rule in RULES if rule.code[0] in "PST")


def check(path: Path, max_per_rule: int) -> BlockResult:
    options = Options(
        rules=LINE_RULES,
        allow_missing_answer=False,
        num_crops=16,
        takes_images=True,
        takes_facts=True,
        has_other_rules=False,
        max_per_rule=max_per_rule,
        run=f"{path} {max_per_rule}",
    )
    return check_block(Block(str(path), 0, path.stat().st_size), options)


@pytest.mark.parametrize("seed", range(3))
def test_counting_without_words_counts_the_same(tmp_path: Path, seed: int) -> None:
    mutator = LineMutator(seed)
    path = tmp_path / "mutated.jsonl"
    path.write_bytes(b"".join(mutator.line() + b"\n" for _ in range(3000)))
    with_words, without = check(path, 10**9), check(path, 0)
    assert without.counts == with_words.counts
    assert without.invalid == with_words.invalid
    assert without.facts.lines.tolist() == with_words.facts.lines.tolist()
    assert without.findings == []
    assert len(with_words.findings) == with_words.counts.total() > 1000
    assert {"P101", "P104", "S102", "T102"} <= with_words.counts.keys()


def test_the_fast_reader_says_what_the_close_one_says_or_nothing() -> None:
    mutator = LineMutator(3)
    num_fast = 0
    for _ in range(5000):
        text = mutator.line().decode("utf-8", "replace")
        fast = read_fast(text)
        if fast is not None:
            num_fast += 1
            assert fast == read_closely(text)
    assert num_fast > 1000
