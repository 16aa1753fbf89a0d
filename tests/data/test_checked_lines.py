"""Lines one by one get the findings that `validate` has for them."""

from pathlib import Path

import pytest
from phi3v_data import validate
from phi3v_data.checked_lines import check

WHOLE = b'{"id": "a", "source": "s", "conversations": [{"user": "u", "assistant": "v"}]}'


@pytest.mark.parametrize(
    "ending",
    [
        b"",
        b"\n",
        b"\n" + WHOLE[:40],
        b"\n" + WHOLE[:40] + b"\n",
        b"\n" + WHOLE[:40] + b"\n  ",
        b"\nno",
    ],
)
def test_the_end_of_a_file_is_judged_as_validate_judges_it(tmp_path: Path, ending: bytes):
    (tmp_path / "x.jsonl").write_bytes(WHOLE + ending)
    report = validate([tmp_path / "x.jsonl"])
    found = [d for checked in check([tmp_path / "x.jsonl"]) for d in checked.diagnostics]

    assert found == list(report.diagnostics)


def test_a_last_line_that_is_cut_off_is_a_cut_off_file(tmp_path: Path):
    (tmp_path / "x.jsonl").write_bytes(WHOLE + b"\n" + WHOLE[:40])
    _, last = check([tmp_path / "x.jsonl"])

    assert [found.code for found in last.diagnostics] == ["P108"]
