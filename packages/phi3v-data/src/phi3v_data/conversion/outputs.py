"""Where a conversion goes: one interface over a folder and an address.

    output = open_output("converted")            # or "s3://bucket/converted"
    with output.images() as folder:              # a converter writes folder/images/…
        ...
    with output.open("ucf101_train.jsonl") as file:
        file.write(...)                          # appears whole or not at all

An `Output` is a small picklable value: every process has its own.
"""

import hashlib
import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from phi3v_data.addresses import is_address
from phi3v_data.atomic import open_atomic

IMAGES = "images"
WORK = ".convert"
JOURNAL = "journal.jsonl"


class Output(Protocol):
    """The folder of a conversion, wherever it is. Names are those of files directly in it."""

    @property
    def work(self) -> Path:
        """A folder on this machine for what a run needs until it is done."""
        ...

    @property
    def takes_processes(self) -> bool:
        """Whether other processes can write to it too."""
        ...

    def images(self) -> AbstractContextManager[Path]:
        """A folder for a converter to write `images/` to; when it ends well, they are in place."""
        ...

    def image_size(self, name: str) -> int | None:
        """Bytes of an image; None where it is not there."""
        ...

    def image_names(self) -> Iterator[str]:
        """All images, in no order."""
        ...

    def remove_image(self, name: str) -> None:
        """Remove an image that is there."""
        ...

    def names(self) -> list[str]:
        """Files and folders directly in it, sorted; none where it does not exist."""
        ...

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for writing; it appears whole when the block ends well."""
        ...

    def read(self, name: str) -> bytes:
        """The bytes of a file that is there."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file or a folder, where there is one."""
        ...

    def location(self, name: str) -> Any:
        """Where a file is: a `Path`, or an address."""
        ...

    def is_begun(self) -> bool:
        """Whether the journal of a run that is not done is there.

        Raises:
            ValueError: nothing can be written there.
        """
        ...

    def restore(self, journal: Path) -> None:
        """Bring back what `back_up` put away, unless the journal here goes on from it."""
        ...

    def backed_up(self) -> int | None:
        """Bytes of the journal that were put away; None where `work` is beside the output."""
        ...

    def back_up(self, start: int, lines: bytes) -> None:
        """Put away what stands in the journal from byte `start` on."""
        ...

    def finish(self) -> None:
        """Remove what was put away: the run is done."""
        ...


@dataclass(frozen=True)
class LocalOutput:
    """A folder of this machine, or of a file system that all machines mount."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def work(self) -> Path:
        """Beside the output, so that it is found by whoever continues."""
        return self.folder / WORK

    @property
    def takes_processes(self) -> bool:
        """A file system is everybody's."""
        return True

    @contextmanager
    def images(self) -> Generator[Path]:
        """The folder itself: `write_image` renames into place."""
        yield self.folder

    def image_size(self, name: str) -> int | None:
        """Bytes of an image; None where it is not there."""
        return self.size(f"{IMAGES}/{name}")

    def image_names(self) -> Iterator[str]:
        """All images, in no order."""
        root = self.folder / IMAGES
        for folder, _, names in os.walk(root):
            for name in names:
                yield (Path(folder) / name).relative_to(root).as_posix()

    def remove_image(self, name: str) -> None:
        """Remove an image, and the folders that it leaves empty."""
        path = self.folder / IMAGES / name
        path.unlink()
        for folder in path.parents:
            if folder == self.folder or any(folder.iterdir()):
                break
            folder.rmdir()

    def names(self) -> list[str]:
        """Files and folders directly in it, sorted; none where it does not exist."""
        return sorted(os.listdir(self.folder)) if self.folder.is_dir() else []

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for writing; it appears whole when the block ends well."""
        return open_atomic(self.folder / name)

    def read(self, name: str) -> bytes:
        """The bytes of a file that is there."""
        return (self.folder / name).read_bytes()

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            return os.stat(self.folder / name).st_size
        except OSError:
            return None

    def remove(self, name: str) -> None:
        """Remove a file or a folder, where there is one."""
        path = self.folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def location(self, name: str) -> Path:
        """Where a file is."""
        return self.folder / name

    def is_begun(self) -> bool:
        """Whether the journal of a run that is not done is there."""
        return (self.work / JOURNAL).exists()

    def restore(self, journal: Path) -> None:
        """Nothing to do: the journal is beside the output."""

    def backed_up(self) -> None:
        """The journal is beside the output."""

    def back_up(self, start: int, lines: bytes) -> None:
        """Nothing to do: the journal is beside the output."""

    def finish(self) -> None:
        """Nothing to do: nothing was put away."""


def open_output(out_dir: str | os.PathLike[str]) -> Output:
    """The output at a path or an address (`s3://bucket/folder`).

    Raises:
        ValueError: a file has that name, or there is no package for such addresses.
    """
    if is_address(out_dir):
        from phi3v_data.conversion.remote_output import RemoteOutput

        return RemoteOutput(str(out_dir))
    folder = Path(out_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out_dir is a file: {out_dir}; name a folder")
    return LocalOutput(folder)


class HashedFile:
    """Writes on to a file, and knows what went through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, content: bytes) -> None:
        """Write all of `content`."""
        self._file.write(content)
        self._digest.update(content)
        self.num_bytes += len(content)

    @property
    def sha256(self) -> str:
        """Of all that was written, as hexadecimal digits."""
        return self._digest.hexdigest()
