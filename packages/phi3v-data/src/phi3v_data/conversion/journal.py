"""The journal of a conversion: what is finished, so that a run that was killed continues.

    with Journal(work / "journal.jsonl", identity, output) as journal:
        journal.append(outcome)
        journal.read(17)                 # the outcome of item 17

One line an item after a first line that says which run it is; appended only. A line counts when its
line break is there: a kill in the middle of a write leaves a torn last line, which is cut off. So
are lines of items whose images are gone or empty (a power cut).

Where the output is at an address, what was appended is put there every few seconds, and at the end.
"""

import dataclasses
import errno
import json
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from phi3v_data.conversion.item_task import Outcome, Rejection
from phi3v_data.conversion.outputs import Output

BACK_UP_SECONDS = 3.0
"""How much of a run is lost with its machine, at most, where the output is at an address."""


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
        self._is_done = False
        header = json.dumps(identity).encode() + b"\n"
        self._file: BinaryIO = open(path, "a+b", buffering=0)
        try:
            self._load(header, check_same_run)
            self._back_up = _BackUp.start(path, output, self._end)
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
            OSError: the disk is full, or what was appended before cannot be put away.
        """
        if self._back_up is not None and self._back_up.error is not None:
            raise self._back_up.error
        line = json.dumps(dataclasses.asdict(outcome)).encode() + b"\n"
        written = self._file.write(line)
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._note(outcome)
        self._end += written
        if self._back_up is not None:
            self._back_up.end = self._end

    def read(self, index: int) -> Outcome:
        """What a finished item gave."""
        self._file.seek(self.offsets[index])
        with open(os.dup(self._file.fileno()), "rb") as file:
            return _outcome(json.loads(file.readline()))

    def remove(self) -> None:
        """The run is done: remove it, here and where it was put away."""
        self._is_done = True
        if self._back_up is not None:
            self._back_up.stop()
        self.path.unlink()
        self._output.finish()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._file.close()
        if self._back_up is None or self._is_done:
            return
        self._back_up.stop()
        try:
            self._back_up.put()
        except OSError as failure:
            if error is None:
                raise
            error.add_note(f"and the end of the journal stays on this machine: {failure}")


class _BackUp:
    """Puts away what was appended to a journal, every few seconds, beside the run."""

    def __init__(self, path: Path, output: Output, start: int, end: int) -> None:
        self.end = end
        """Where the last whole line ends."""
        self.error: OSError | None = None
        self._path = path
        self._output = output
        self._start = start
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @classmethod
    def start(cls, path: Path, output: Output, end: int) -> "_BackUp | None":
        """Begin; None where the journal is where it is needed.

        Raises:
            OSError: nothing can be put there.
        """
        start = output.backed_up()
        if start is None:
            return None
        if start > end:  # the journal was damaged and cut off
            output.finish()
            start = 0
        back_up = cls(path, output, start, end)
        back_up.put()
        back_up._thread.start()
        return back_up

    def put(self) -> None:
        """Put away what was not."""
        end = self.end
        if self._start == end:
            return
        with open(self._path, "rb") as file:
            file.seek(self._start)
            self._output.back_up(self._start, file.read(end - self._start))
        self._start = end

    def stop(self) -> None:
        """Wait for what is under way; afterwards nothing is put away unasked."""
        self._is_stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_stopped.wait(BACK_UP_SECONDS):
            try:
                self.put()
            except OSError as error:
                self.error = error
                return


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
