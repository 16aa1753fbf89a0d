"""The cache of byte ranges: bounded, shared, whole after a crash."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from phi3v_data.cache_place import DEFAULT_LIMIT_BYTES, cache_folder, cache_limit
from phi3v_data.coalesced_spans import coalesce
from phi3v_data.range_cache import Part, RangeCache, Refusal, piece_key

PIECE = 4096 * 4 - 8
"""Bytes of a piece that takes four blocks of the disk, its seal included."""

ROOM = 4096 * 4


def content_of(number: int) -> bytes:
    return bytes([number]) * PIECE


def key_of(number: int) -> str:
    return piece_key("hash of a shard", number * PIECE, PIECE)


def put(cache: RangeCache, *numbers: int) -> list[int]:
    """Write pieces; those that were let in."""
    let_in: list[int] = []
    for number in numbers:
        part = cache.begin(key_of(number), PIECE)
        if isinstance(part, Part):
            with part:
                part.write(content_of(number))
                part.commit()
            let_in.append(number)
    return let_in


def here(cache: RangeCache) -> list[int]:
    return [number for number in range(20) if cache.has(key_of(number))]


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# --- what is asked for together


def test_near_spans_are_one_request_and_far_ones_are_not() -> None:
    requests = coalesce([(904, 96), (0, 900), (5000, 10)], max_gap_bytes=100)
    assert [request[:2] for request in requests] == [(0, 1000), (5000, 10)]
    assert [request.spans for request in requests] == [(1, 0), (2,)]


@pytest.mark.parametrize(("gap", "count"), [(99, 2), (100, 1)])
def test_the_gap_decides_whether_spans_are_near(gap: int, count: int) -> None:
    assert len(coalesce([(0, 10), (110, 10)], max_gap_bytes=gap)) == count


def test_a_request_grows_no_further_than_its_limit_but_for_one_span() -> None:
    spans = [(0, 60), (60, 60), (120, 500), (620, 60)]
    requests = coalesce(spans, max_request_bytes=130)
    assert [request[:2] for request in requests] == [(0, 120), (120, 500), (620, 60)]


def test_spans_that_overlap_or_are_empty_are_covered_once() -> None:
    requests = coalesce([(0, 100), (50, 20), (70, 60), (10, 0)], max_gap_bytes=0)
    assert [request[:2] for request in requests] == [(0, 130)]
    assert sorted(requests[0].spans) == [0, 1, 2]


# --- where, and how much


def test_the_folder_and_the_limit_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PHI3V_CACHE", raising=False)
    monkeypatch.delenv("PHI3V_CACHE_LIMIT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "phi3v-data" / "shards"
    assert cache_limit() == DEFAULT_LIMIT_BYTES
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "shards"
    sizes = {"200GB": 200 * 10**9, "1.5 GiB": 3 << 29, "7k": 7000, "0": 0, "12": 12, "3B": 3}
    for text, expected in sizes.items():
        monkeypatch.setenv("PHI3V_CACHE_LIMIT", text)
        assert cache_limit() == expected
    for text in ("much", "-1", "3iB", "3 GG"):
        monkeypatch.setenv("PHI3V_CACHE_LIMIT", text)
        with pytest.raises(ValueError, match="PHI3V_CACHE_LIMIT: expected a size such as 200GB"):
            cache_limit()


# --- a piece


def test_a_piece_comes_back_as_it_was_written(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 10 * ROOM)
    assert cache.read(key_of(1)) is None
    assert cache.map(key_of(1)) is None
    assert put(cache, 1) == [1]
    assert cache.read(key_of(1)) == content_of(1)
    piece = cache.map(key_of(1))
    assert piece is not None
    assert piece.content == content_of(1)
    assert cache.begin(key_of(1), PIECE) is Refusal.BUSY


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_piece_is_not_believed(tmp_path: Path, damage: str) -> None:
    cache = RangeCache(tmp_path, 10 * ROOM)
    for read in (cache.read, cache.map):
        put(cache, 1)
        (path,) = tmp_path.glob("pieces/*/*")
        raw = bytearray(path.read_bytes())
        raw[PIECE // 2] ^= 1
        path.write_bytes({"flip": raw, "cut": raw[:-9], "empty": b""}[damage])
        assert read(key_of(1)) is None
        assert not path.exists()


def test_a_piece_that_was_given_up_leaves_nothing(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 10 * ROOM)
    part = cache.begin(key_of(1), PIECE)
    assert isinstance(part, Part)
    with part:
        part.write(b"half")
    assert files(tmp_path) == ["usage"]
    assert put(cache, 1) == [1]


# --- the limit


def test_without_a_plan_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 3 * ROOM)
    put(cache, 1, 2, 3)
    cache.read(key_of(1))
    assert put(cache, 4) == [4]
    assert here(cache) == [1, 3, 4]
    assert put(cache, 5) == [5]
    assert here(cache) == [1, 4, 5]


def test_with_a_plan_what_is_needed_last_goes_first(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 3 * ROOM)
    put(cache, 1, 2, 3)
    cache.publish([key_of(number) for number in (2, 4, 3, 1)])
    assert put(cache, 4) == [4]  # before 1, though 1 was not used for the longest
    assert here(cache) == [2, 3, 4]


def test_nothing_goes_for_what_is_needed_later_still(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 3 * ROOM)
    put(cache, 1, 2, 3)
    plan = cache.publish([key_of(number) for number in (1, 2, 3, 4)])
    assert put(cache, 4, 5) == []
    assert here(cache) == [1, 2, 3]
    plan.move_to(1)
    assert put(cache, 4) == [4]  # 1 is done with
    assert here(cache) == [2, 3, 4]


def test_what_nobody_plans_goes_before_what_is_planned(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 3 * ROOM)
    put(cache, 1, 2, 3)
    cache.publish([key_of(1)])
    put(cache, 4, 5, 6)
    assert here(cache) == [1, 5, 6]


def test_a_piece_larger_than_the_limit_is_refused_and_nothing_goes_for_it(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 3 * ROOM)
    put(cache, 1, 2)
    assert cache.begin(key_of(3), 4 * ROOM) is Refusal.NO_ROOM
    assert here(cache) == [1, 2]


def test_what_is_being_written_counts(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 3 * ROOM)
    parts = [cache.begin(key_of(number), PIECE) for number in (1, 2, 3)]
    assert all(isinstance(part, Part) for part in parts)
    assert cache.begin(key_of(4), PIECE) is Refusal.NO_ROOM


def test_the_cache_never_takes_more_than_its_limit(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 5 * ROOM)
    for number in range(20):
        put(cache, number)
        assert cache.num_bytes() <= 5 * ROOM
    (tmp_path / "usage").write_bytes(b"?")  # a count that is lost is made again
    put(cache, 30)
    assert cache.num_bytes() == 5 * ROOM


def test_an_index_is_let_in_whatever_the_limit_and_stays_while_it_is_held(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 2 * ROOM)
    put(cache, 1, 2)
    part = cache.begin_file("ab" * 32, 3 * ROOM)
    assert isinstance(part, Part)
    with part:
        part.write(bytes(3 * ROOM))
        part.commit()
    held = cache.hold_file("ab" * 32)
    assert held is not None
    assert here(cache) == []
    assert put(cache, 3) == []
    assert cache.file("ab" * 32).read_bytes() == bytes(3 * ROOM)
    held.close()
    assert put(cache, 3) == [3]
    assert cache.hold_file("ab" * 32) is None


# --- two processes

PREAMBLE = """
import os, sys, time
from pathlib import Path
from phi3v_data.range_cache import Part, RangeCache
from tests.data.test_range_cache import ROOM, PIECE, content_of, key_of, put
cache = RangeCache(Path(sys.argv[1]), int(sys.argv[2]))
"""


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    def start(code: str, folder: Path, limit: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + code, str(folder), str(limit)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
        )

    return start


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=30)


def test_kill_9_in_the_middle_of_a_piece_leaves_nothing(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(
        "part = cache.begin(key_of(1), PIECE); part.write(b'half'); cache.publish([key_of(2)]);"
        "print('writing', flush=True); time.sleep(60)",
        tmp_path,
        3 * ROOM,
    )
    try:
        assert line_of(process) == "writing"
        cache = RangeCache(tmp_path, 3 * ROOM)
        assert len(files(tmp_path)) == 3, "what a living process writes stays"
        assert cache.begin(key_of(1), PIECE) is Refusal.BUSY
    finally:
        kill(process)
    cache = RangeCache(tmp_path, 3 * ROOM)
    assert files(tmp_path) == ["usage"]
    assert put(cache, 1, 2, 3) == [1, 2, 3], "what it had counted is free again"
    assert cache.read(key_of(1)) == content_of(1)


def test_another_process_s_plan_is_heeded_while_it_lives(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    cache = RangeCache(tmp_path, 3 * ROOM)
    put(cache, 1, 2, 3)
    code = "cache.publish([key_of(1), key_of(2)]); print('told', flush=True); time.sleep(60)"
    process = start(code, tmp_path, 3 * ROOM)
    try:
        assert line_of(process) == "told"
        assert put(cache, 4, 5) == [4, 5]
        assert here(cache) == [1, 2, 5]
    finally:
        kill(process)
    assert put(cache, 6) == [6]
    assert here(cache) == [2, 5, 6]


def test_processes_that_write_at_once_keep_the_limit_and_read_whole_pieces(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    code = """
import random
for _ in range(150):
    number = random.randrange(12)
    content = cache.read(key_of(number))
    assert content is None or content == content_of(number)
    if content is None:
        put(cache, number)
print('done')
"""
    processes = [start(code, tmp_path, 5 * ROOM) for _ in range(3)]
    watching = RangeCache(tmp_path, 5 * ROOM)
    deadline = time.monotonic() + 60
    while any(process.poll() is None for process in processes):
        assert watching.num_bytes() <= 5 * ROOM
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [process.communicate(timeout=30)[0].strip() for process in processes] == ["done"] * 3
    assert not list((tmp_path / "parts").iterdir())


def test_a_child_of_a_fork_holds_no_lock_of_its_parent(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    code = """
part = cache.begin(key_of(1), PIECE)
child = os.fork()
if child == 0:
    print(os.getpid(), flush=True)
time.sleep(60)
"""
    process = start(code, tmp_path, 3 * ROOM)
    child = int(line_of(process))
    try:
        cache = RangeCache(tmp_path, 3 * ROOM)
        assert cache.begin(key_of(1), PIECE) is Refusal.BUSY
        process.kill()
        process.wait(timeout=30)
        assert put(cache, 1) == [1]
    finally:
        os.kill(child, signal.SIGKILL)
        kill(process)
