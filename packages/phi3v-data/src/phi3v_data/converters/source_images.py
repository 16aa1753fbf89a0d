"""A picture of the source goes to the output: copied, linked, or encoded anew.

    store = ImageStore("copy")
    store.put(out_dir, "img/42953.png", source / "img/42953.png", item.key)   # "img/42953.png"

Every picture is decoded whole on the way: one that died on its way to the disk is a named rejection
here, not a crash in training. A name that promises another format stays as it is: many files
called `.png` are JPEGs, and readers go by content.
"""

import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from phi3v_data.converters.jsonl_rows import RowError
from phi3v_data.converters.parquet_rows import write_image_once, write_row_image
from phi3v_data.images import ImageError, decode_image

Policy = Literal["copy", "link", "reencode"]


@dataclass(frozen=True)
class ImageStore:
    """How pictures are taken over."""

    policy: Policy = "copy"
    """`copy` the bytes; `link` (a hard link: no space, one file system); `reencode` as JPEG."""

    quality: int = 90
    """JPEG quality of `reencode`, 1 to 100."""

    def __post_init__(self) -> None:
        if self.policy not in ("copy", "link", "reencode"):
            raise ValueError(f"images: expected copy, link or reencode, got {self.policy!r}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: expected 1 to 100, got {self.quality!r}")

    def put(self, out_dir: Path, name: str, path: Path, writer: str) -> str:
        """Put the picture at `path` under `out_dir/images` and return its name there.

        Args:
            out_dir: the converter's output folder.
            name: the name it should have; `reencode` gives it the ending `.jpg`.
            path: an existing file.
            writer: the key of the item that writes it; several may write the same.

        Raises:
            RowError: the picture is empty or does not decode (`bad_image`).
            ValueError: `link` across file systems.
        """
        content = self._take(path.read_bytes(), path.name)
        if self.policy == "link":
            _link_once(path, out_dir / "images" / name)
            return name
        if self.policy == "reencode":
            name = str(PurePosixPath(name).with_suffix(".jpg"))
        write_image_once(out_dir, name, content, writer)
        return name

    def put_bytes(self, out_dir: Path, folder: str, content: bytes, writer: str) -> str:
        """Put a picture that is no file under `out_dir/images/folder`, named by its content.

        Raises:
            RowError: the picture is empty or does not decode (`bad_image`).
        """
        assert self.policy != "link", "what is no file has no links: refused before"
        return write_row_image(out_dir, folder, self._take(content, "a picture"), writer)

    def _take(self, content: bytes, name: str) -> bytes:
        if not content:
            raise RowError("bad_image", f"{name} is empty")
        try:
            picture = decode_image(content)
        except ImageError as error:
            raise RowError("bad_image", f"{name} does not decode: {error}") from None
        if self.policy != "reencode":
            return content
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()


def find_image(candidates: Sequence[Path], name: str) -> Path:
    """The first of `candidates` that is a file.

    Raises:
        RowError: none is (`missing_image`).
    """
    for path in candidates:
        try:
            if stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block
                return path
        except (OSError, ValueError):
            continue  # the next one: what is wrong with a path does not matter
    raise RowError("missing_image", f"{name[:120]} is not there")


def _link_once(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(path), target)  # of a link, what it leads to
    except FileExistsError:
        return  # by an earlier row or run: the same picture
    except OSError as error:
        raise ValueError(
            f"images=link needs source and output on one file system that has hard links: "
            f"{error.strerror}; use images=copy"
        ) from error
