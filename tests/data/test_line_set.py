"""Numbers of lines, a bit each."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from phi3v_data.line_set import CHUNK_BYTES, LineSet

numbers = st.lists(st.integers(0, 20 * CHUNK_BYTES), max_size=30)


@given(numbers, numbers, numbers)
def test_it_is_a_set(one: list[int], many: list[int], merged: list[int]) -> None:
    lines = LineSet(one)
    lines.update(np.array(many, dtype=np.int64))
    lines.merge(LineSet(merged))
    expected = {*one, *many, *merged}
    assert list(lines) == sorted(expected)
    assert len(lines) == len(expected)
    assert all(number in lines for number in expected)
    assert all(number + 1 in lines or number + 1 not in expected for number in expected)
    assert lines == LineSet(expected)


def test_what_is_no_line_number_is_not_in_it() -> None:
    assert -1 not in LineSet([7])
    assert 10**12 not in LineSet([7])
    assert "7" not in LineSet([7])
