"""Which hashes occur twice, in memory and on disk."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phi3v_data.repeat_log import Place, RepeatLog

blocks = st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=8)


def expected(parts: list[list[int]]) -> list[tuple[Place, Place]]:
    """Each file a part, lines from 1."""
    first: dict[int, Place] = {}
    found: list[tuple[Place, Place]] = []
    for file, part in enumerate(parts):
        for line, number in enumerate(part, 1):
            place = Place(file, line)
            if first.setdefault(number, place) != place:
                found.append((place, first[number]))
    return found


def spread(numbers: list[int]) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    """Hashes that differ in their first bits, too."""
    return np.array(numbers, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


@settings(deadline=None)
@given(blocks, st.sampled_from([1, 5, 1000]))
def test_every_place_but_the_first_is_named(parts: list[list[int]], memory_entries: int) -> None:
    with RepeatLog(memory_entries) as log:
        for file, part in enumerate(parts):
            log.add(file, np.arange(1, len(part) + 1), spread(part))
        assert list(log.repeats()) == expected(parts)


def test_nothing_is_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with RepeatLog(memory_entries=1) as log:
        log.add(0, np.arange(100), spread(list(range(100))))
        assert list(tmp_path.iterdir()) != []
    assert list(tmp_path.iterdir()) == []
