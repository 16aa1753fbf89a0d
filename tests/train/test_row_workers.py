import gc
import json
import mmap
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phi3v_train import row_workers
from phi3v_train.collator import Batch, EncodedSample, collate
from phi3v_train.row_workers import Request, WorkerDied, rows_ahead
from phi3v_train.shared_rows import open_shared_row, row_bytes, share_row
from torch import Tensor

ROOM = 64 << 20


def toy(number: int, num_crops: int = 1) -> EncodedSample:
    return EncodedSample(
        sample_id=f"s{number}",
        input_ids=np.arange(number, number + 7),
        labels=np.array([-100] * 5 + [number, number + 1]),
        crops=np.full((num_crops, 3, 336, 336), number % 251, dtype=np.uint8),
        crop_grid=np.array([[num_crops, 1]] if num_crops else [], dtype=np.int32).reshape(-1, 2),
    )


def encode(numbers: Sequence[int]) -> list[EncodedSample]:
    return [toy(number) for number in numbers]


def requests(count: int, num_bytes: int = 1) -> list[Request]:
    return [Request((number, number + 100), num_bytes) for number in range(count)]


def ids(rows: Sequence[Batch]) -> list[tuple[str, ...]]:
    return [row.sample_ids for row in rows]


def make(
    asked: Sequence[Request],
    encode: Callable[[Sequence[int]], Sequence[EncodedSample]] = encode,
    num_workers: int = 2,
    max_bytes: int = ROOM,
) -> list[Batch]:
    return list(rows_ahead(asked, encode, num_workers=num_workers, max_bytes=max_bytes))


def rows_mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:phi3v-row")


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_hangs_and_nothing_stays() -> Iterator[None]:
    def too_long(*_: object) -> None:
        raise AssertionError("the workers hang")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    before = num_open_files()
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    assert multiprocessing.active_children() == []
    gc.collect()  # rows that an error's frames still hold
    assert num_open_files() <= before


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_crops", [0, 1, 3])
def test_a_shared_row_is_the_collated_one(num_crops: int) -> None:
    samples = [toy(3, num_crops), toy(5, num_crops)]
    found, expected = open_shared_row(*share_row(samples)), collate(samples)
    for name in Batch.__dataclass_fields__:
        value, other = getattr(found, name), getattr(expected, name)
        if isinstance(value, Tensor):
            assert (value.dtype, value.shape) == (other.dtype, other.shape), name
            assert torch.equal(value, other), name
        else:
            assert value == other, name


def test_all_tensors_of_a_row_are_one_memory_that_goes_with_the_last_of_them() -> None:
    (row,) = make([Request((1,), 1)])
    tensors = [row.input_ids, row.labels, row.pixel_values, row.crop_grid, row.cu_seqlens]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert rows_mapped() == 1
    pixels = row.pixel_values[0]
    del row, tensors
    assert rows_mapped() == 1
    assert int(pixels.float().mean()) == 1
    del pixels
    assert rows_mapped() == 0


def test_neither_the_trainer_nor_a_worker_has_a_file_in_dev_shm() -> None:
    def mapped(pid: int | None) -> set[str]:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {line.split()[-1] for line in lines if "/dev/shm/" in line}

    before = mapped(os.getpid())
    with closing(rows_ahead(requests(20), encode, num_workers=2, max_bytes=ROOM)) as rows:
        taken = [next(rows) for _ in range(5)]
        for process in [*multiprocessing.active_children(), multiprocessing.current_process()]:
            assert mapped(process.pid) <= before
    assert rows_mapped() == len(taken)


def test_the_size_of_a_row_is_known_before_it_is_made() -> None:
    handle, num_bytes = share_row([toy(1), toy(2, 4)])
    assert num_bytes == row_bytes(num_tokens=14, num_samples=2, num_images=2, num_local_crops=5)
    open_shared_row(handle, num_bytes)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_rows_come_in_the_order_they_were_asked_for(num_workers: int) -> None:
    def earlier_is_slower(numbers: Sequence[int]) -> list[EncodedSample]:
        time.sleep(0.02 * (7 - numbers[0] % 8))
        return encode(numbers)

    rows = make(requests(16), earlier_is_slower, num_workers)
    assert ids(rows) == [(f"s{n}", f"s{n + 100}") for n in range(16)]
    assert [int(row.labels[-1]) for row in rows] == [n + 101 for n in range(16)]


def test_nothing_asked_for_is_nothing_made() -> None:
    assert make([]) == []


class Counter:
    """How often something happened, in all workers."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 8 * 1000)

    def note(self, number: int) -> None:
        struct.pack_into("q", self.memory, 8 * number, 1)

    def __int__(self) -> int:
        return sum(struct.unpack("1000q", self.memory[:]))

    def settled(self) -> int:
        """The count when it has not changed for a while."""
        last, since = int(self), time.monotonic()
        while time.monotonic() - since < 0.3:
            time.sleep(0.02)
            if int(self) != last:
                last, since = int(self), time.monotonic()
        return last


@pytest.mark.parametrize(
    ("num_bytes", "ahead"), [(10, 10), (34, 2), (51, 1), (1000, 1)], ids=lambda value: str(value)
)
def test_no_more_rows_are_made_ahead_than_the_bytes_allow(num_bytes: int, ahead: int) -> None:
    made = Counter()

    def counted(numbers: Sequence[int]) -> list[EncodedSample]:
        made.note(numbers[0])
        return [toy(number, 0) for number in numbers]

    rows = rows_ahead(requests(40, num_bytes), counted, num_workers=2, max_bytes=100)
    with closing(rows):
        for taken in (1, 2, 3):
            next(rows)
            # The one handed out, and what the budget held while it was still in it.
            assert made.settled() == taken - 1 + ahead


def test_rows_are_made_while_the_trainer_does_something_else() -> None:
    made = Counter()

    def counted(numbers: Sequence[int]) -> list[EncodedSample]:
        made.note(numbers[0])
        return encode(numbers)

    with closing(rows_ahead(requests(30, 1), counted, num_workers=2, max_bytes=8)) as rows:
        next(rows)
        assert made.settled() == 8


def test_a_trainer_that_is_away_for_long_finds_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_workers, "_LOOK_FOR_PARENT_S", 0.05)
    asked = [Request((number,), 1) for number in range(600)]
    seen: list[str] = []
    with closing(
        rows_ahead(asked, lambda n: [toy(n[0], 0)], num_workers=2, max_bytes=ROOM)
    ) as rows:
        for row in rows:
            if len(seen) % 200 == 0:
                time.sleep(0.5)
            seen += row.sample_ids
    assert seen == [f"s{number}" for number in range(600)]


def test_a_long_run_holds_no_more_than_its_bounds() -> None:
    open_files, most_mapped = num_open_files(), 0
    with closing(rows_ahead(requests(300), encode, num_workers=2, max_bytes=4)) as rows:
        for row in rows:
            most_mapped = max(most_mapped, rows_mapped())
            del row
    assert most_mapped <= 6  # those ahead, the one at hand and the one before
    assert num_open_files() <= open_files


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_what_a_sample_raises_arrives_where_its_row_would_have(kind: type[Exception]) -> None:
    def fails(numbers: Sequence[int]) -> list[EncodedSample]:
        if numbers[0] == 3:
            raise kind("shard-00000.parquet: sample 's3': its picture is torn")
        return encode(numbers)

    rows = rows_ahead(requests(9), fails, num_workers=2, max_bytes=ROOM)
    assert ids([next(rows) for _ in range(3)]) == [(f"s{n}", f"s{n + 100}") for n in range(3)]
    with pytest.raises(kind, match=r"^shard-00000\.parquet: sample 's3': its picture is torn$"):
        next(rows)


def test_a_bug_in_a_worker_shows_its_traceback_and_samples() -> None:
    def fails(numbers: Sequence[int]) -> list[EncodedSample]:
        return [toy(numbers[7])]

    with pytest.raises(RuntimeError, match=r"samples number \[0, 100\]") as caught:
        make(requests(2), fails)
    assert "return [toy(numbers[7])]" in str(caught.value)
    assert "IndexError" in str(caught.value)


def test_a_worker_that_is_killed_is_an_error_that_says_at_which_samples() -> None:
    def dies(numbers: Sequence[int]) -> list[EncodedSample]:
        if numbers[0] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(numbers)

    with pytest.raises(WorkerDied) as caught:
        make(requests(9), dies)
    message = str(caught.value)
    assert "killed by SIGKILL while it made the row of samples number 4, 104" in message
    assert "lower data.num_workers" in message


def test_all_workers_killed_at_rest_are_an_error_too() -> None:
    with closing(rows_ahead(requests(9), encode, num_workers=2, max_bytes=1)) as rows:
        next(rows)
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join(10)
        with pytest.raises(WorkerDied, match="SIGKILL"):
            list(rows)


def test_a_worker_that_leaves_by_itself_is_an_error() -> None:
    with pytest.raises(WorkerDied, match="ended with status 3 while it made the row of"):
        make(requests(2), lambda _: os._exit(3))


@pytest.mark.parametrize("number", sorted(row_workers.SIGNALS))
def test_workers_are_deaf_to_what_a_terminal_sends_to_all(number: signal.Signals) -> None:
    def tries(numbers: Sequence[int]) -> list[EncodedSample]:
        os.kill(os.getpid(), number)
        return encode(numbers)

    assert len(make(requests(3), tries)) == 3


def test_leaving_early_ends_workers_that_are_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_workers, "_LEAVE_S", 0.2)

    def slow_later(numbers: Sequence[int]) -> list[EncodedSample]:
        time.sleep(60 if numbers[0] else 0)
        return encode(numbers)

    started = time.monotonic()
    with closing(rows_ahead(requests(9), slow_later, num_workers=2, max_bytes=ROOM)) as rows:
        next(rows)
    assert time.monotonic() - started < 5


# --- whole programs -------------------------------------------------------------------------------

PROGRAM = """
    import multiprocessing, sys, time
    from phi3v_train.row_workers import Request, rows_ahead
    from phi3v_train.collator import dummy_sample

    rows = rows_ahead(
        [Request((n,), 1) for n in range(10**6)], lambda _: [dummy_sample(1)],
        num_workers=2, max_bytes=50,
    )
    next(rows)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
"""


def start(then: str) -> "tuple[subprocess.Popen[str], list[int]]":
    """A program that has taken one row; and the process ids of its workers."""
    code = textwrap.dedent(PROGRAM) + then
    program: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdout is not None
    return program, [int(pid) for pid in program.stdout.readline().split()]


def end(program: Any, pids: list[int]) -> tuple[int, str]:
    """(status, standard error) of a program that ends soon, and its workers with it."""
    _, errors = program.communicate(timeout=30)
    wait_until_gone(pids)
    return program.returncode, errors


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 15
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Not gone, and not a process that only waits for being forgotten by who adopted it."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_program_that_forgets_to_close_its_rows_ends() -> None:
    program, pids = start("")
    assert len(pids) == 2
    assert end(program, pids) == (0, "")


@pytest.mark.slow
def test_an_uncaught_error_in_the_trainer_leaves_no_workers() -> None:
    status, errors = end(*start("raise SystemExit(1 / 0)\n"))
    assert (status, errors.count("Traceback")) == (1, 1)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_is_one_traceback_and_no_workers() -> None:
    program, pids = start("for row in rows: time.sleep(0.01)\n")
    os.killpg(program.pid, signal.SIGINT)
    status, errors = end(program, pids)
    assert status != 0
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_workers_leave_when_the_trainer_is_killed() -> None:
    reading, writing = os.pipe()
    trainer = os.fork()
    if trainer == 0:  # no test goes on in here
        rows = rows_ahead(requests(10**6), encode, num_workers=2, max_bytes=50)
        next(rows)
        pids = [process.pid for process in multiprocessing.active_children()]
        os.write(writing, repr(pids).encode())
        time.sleep(60)
        os._exit(1)
    os.close(writing)
    pids = json.loads(os.read(reading, 1000))
    os.close(reading)
    assert len(pids) == 2
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    wait_until_gone(pids)
