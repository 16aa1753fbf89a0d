"""The journal of a conversion: what is finished, so that a run that was killed continues.

    with Journal(work / "journal.jsonl", identity, output) as journal:
        journal.append(outcome)
        journal.read(17)                 # the outcome of item 17

One line an item after a first line that says which run it is; appended only. A line counts when its
line break is there: a kill in the middle of a write leaves a torn last line, which is cut off. So
are lines of items whose images are gone or empty (a power cut).
"""

import dataclasses
import errno
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from phi3v_data.item_task import Outcome, Rejection
from phi3v_data.outputs import Output


class Journal:
    """An open journal."""

    def __init__(
        self,
        path: Path,
        identity: dict[str, Any],
        output: Output,
        check_same_run: Callable[[dict[str, Any]], None],
    ) -> None:
        """Open or begin the journal at `path`.

        Raises:
            ValueError: of `check_same_run`, which gets the identity that an earlier run wrote.
        """
        self.path = path
        self.offsets: dict[int, int] = {}
        """Item index → where its line starts."""
        self.num_samples: dict[int, int] = {}
        """Item index → samples it gave."""
        self.num_rejected = 0
        """Items with something rejected."""
        self._output = output
        output.restore(path)
        header = json.dumps(identity).encode() + b"\n"
        self._file: BinaryIO = open(path, "a+b", buffering=0)
        try:
            self._load(header, check_same_run)
        except BaseException:
            self._file.close()
            raise

    def _load(self, header: bytes, check_same_run: Callable[[dict[str, Any]], None]) -> None:
        self._end = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                except ValueError:
                    break
                if self._end == 0:
                    check_same_run(entry)
                elif _images_are_there(entry["samples"], self._output):
                    self._note(_outcome(entry))
                self._end += len(line)
        self._file.truncate(self._end)
        if self._end == 0:
            self._file.write(header)
            self._end = len(header)

    def _note(self, outcome: Outcome) -> None:
        self.offsets[outcome.index] = self._end
        self.num_samples[outcome.index] = len(outcome.samples)
        self.num_rejected += bool(outcome.rejections)

    def append(self, outcome: Outcome) -> None:
        """Write down a finished item.

        Raises:
            OSError: the disk is full.
        """
        line = json.dumps(dataclasses.asdict(outcome)).encode() + b"\n"
        written = self._file.write(line)
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._note(outcome)
        self._end += written
        self._output.back_up(self.path)

    def read(self, index: int) -> Outcome:
        """What a finished item gave."""
        self._file.seek(self.offsets[index])
        with open(os.dup(self._file.fileno()), "rb") as file:
            return _outcome(json.loads(file.readline()))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def is_barren(path: Path) -> bool:
    """Whether a journal holds no finished item: nothing is lost by starting anew."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        return sum(1 for _ in zip(file, range(2), strict=False)) < 2


def _outcome(entry: dict[str, Any]) -> Outcome:
    rejections = [
        Rejection(found["reason"], found["detail"], found["num_before"], tuple(found["traceback"]))
        for found in entry["rejections"]
    ]
    return Outcome(entry["index"], tuple(entry["samples"]), tuple(rejections))


def _images_are_there(lines: Iterable[str], output: Output) -> bool:
    names = (
        name
        for line in lines
        for turn in json.loads(line)["conversations"]
        for name in turn["images"]
    )
    return all(output.image_size(name) for name in names)
