"""A shard directory in the making: beside its target, locked, kept when a run ends early.

    with open_work(target) as work:        # work.path: .train.tmp-shards beside shards/train
        ...                                # files in work.path / "whole"
        work.publish()                     # flushed to disk and renamed: shards/train

What is in it when a run ends early, even by kill -9, is there for the next run. Two runs never work
in one: the lock is the kernel's, and gone with the process that holds it.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from phi3v_data.atomic import TEMPORARY_MARK, sync
from phi3v_data.shard_file import DONE, WHOLE
from phi3v_data.shard_format import (
    INDEX,
    MANIFEST,
    REJECTED,
    Manifest,
    ShardError,
    read_manifest,
)

PATIENCE_SECONDS = 2.0
"""How long the lock is waited for: workers of a killed run hold it until they notice."""


@dataclass(frozen=True, slots=True)
class Work:
    """The folder that a run works in."""

    target: Path
    path: Path

    @property
    def whole(self) -> Path:
        """What will be published."""
        return self.path / WHOLE

    @property
    def done(self) -> Path:
        """What is needed to go on."""
        return self.path / DONE

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it to keep."""
        return not any(self.done.iterdir())

    def keep_only(self, names: set[str]) -> None:
        """Remove all but the files that belong to these shards."""
        for folder in (self.whole, self.done):
            for file in folder.iterdir():
                if file.name.removesuffix(".json").removesuffix(".index") not in names:
                    file.unlink()

    def publish(self) -> None:
        """Flush what is whole to disk and give it its name, in place of an older directory."""
        for path in (*self.whole.iterdir(), self.whole):
            sync(path)
        if self.target.is_dir() and any(self.target.iterdir()):
            # Two renames: between them there is no target, never half of one.
            os.rename(self.target, self.path / "old")
        os.rename(self.whole, self.target)
        sync(self.target.parent)


@contextmanager
def open_work(target: Path) -> Generator[Work]:
    """The folder for `target`, new or as an earlier run left it; gone afterwards if it is empty.

    Raises:
        ValueError: another run works in it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Work(target, target.parent / f".{target.name}{TEMPORARY_MARK}shards")
    with _locked(work):
        for folder in (work.whole, work.done):
            folder.mkdir(exist_ok=True)
        shutil.rmtree(work.path / "old", ignore_errors=True)
        try:
            yield work
        finally:
            if not work.whole.is_dir() or work.is_empty:
                shutil.rmtree(work.path)


def existing_manifest(target: Path, *, overwrite: bool) -> Manifest | None:
    """The manifest of the shard directory at `target`; None if there is none to compare with.

    Raises:
        ValueError: something else is there, or a directory that cannot be read.
    """
    if not target.exists():
        return None
    if not target.is_dir():
        raise ValueError(f"{target}: is a file; expected a directory to make")
    names = sorted(entry.name for entry in target.iterdir())
    ours = {MANIFEST, INDEX, REJECTED}
    foreign = [
        name
        for name in names
        if name not in ours and not (name.startswith("shard-") and name.endswith(".parquet"))
    ]
    if foreign:
        raise ValueError(
            f"{target}: holds files that are not shards ({foreign[0]}, ...); choose a new directory"
        )
    if not names or overwrite:
        return None
    try:
        return read_manifest(target)
    except ShardError as error:
        raise ValueError(f"{error}; --overwrite replaces it") from None


@contextmanager
def _locked(work: Work) -> Generator[None]:
    """Hold the lock of the folder; it is made if need be."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        work.path.mkdir(exist_ok=True)
        try:
            descriptor = os.open(work.path, os.O_RDONLY)
        except FileNotFoundError:  # another run has just removed it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, work.path):
                break
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise ValueError(f"{work.target}: another run is writing it right now") from None
            time.sleep(0.05)
        os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the folder that is open is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
