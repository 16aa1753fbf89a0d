"""A picture of the source goes to the output: copied, linked, or encoded anew.

    store = ImageStore("copy")
    store.put(out_dir, "img/42953.png", source / "img/42953.png", item.key)   # "img/42953.png"

Every picture is decoded whole on the way: one that died on its way to the disk is a named rejection
here, not a crash in training. A name that promises another format stays as it is: many files
called `.png` are JPEGs, and readers go by content. A picture that rows repeat, once a question, is
kept once, whatever rows, groups and processes it comes from; one that is no file is named by its
content.

What an annotation names is looked for inside the source. Links in the source are followed, wherever
they lead: whoever owns the folder put them there, and in copies from a hub every file is one.
"""

import contextlib
import errno
import hashlib
import io
import os
import stat
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import xxhash

from phi3v_data.atomic import TEMPORARY_MARK
from phi3v_data.conversion.trouble import is_machine_trouble
from phi3v_data.converters.rows import RowError, name_problem
from phi3v_data.image_check import path_problem
from phi3v_data.images import ImageError, decode_image, probe_image

Policy = Literal["copy", "link", "reencode"]

MAX_IMAGE_BYTES = 1 << 29
"""A larger file is no picture of a data set, and must not fill memory."""

_EXTENSIONS = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "PPM": ".ppm",
}


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
            RowError: the picture is empty, cannot be read or does not decode (`bad_image`), or no
                file of that name can be written (`bad_name`).
            ValueError: `link` across file systems.
        """
        content = self._take(_read(path), path.name)
        if self.policy == "link":
            with _name_trouble(name):
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


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise RowError("bad_image", f"{path.name} has more than {MAX_IMAGE_BYTES:,} bytes")
    try:
        return path.read_bytes()
    except OSError as error:  # no permission, a bad sector
        if is_machine_trouble(error):
            raise
        detail = f"{path.name} cannot be read: {error.strerror}"
        raise RowError("bad_image", detail) from None


_NAME_ERRNOS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)
"""The name's trouble, not the disk's: too long, or a folder where another picture is a file."""


@contextlib.contextmanager
def _name_trouble(name: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NAME_ERRNOS:
            raise
        detail = f"no picture {name[:120]} can be written: {error.strerror}"
        raise RowError("bad_name", detail) from None


def reference_problem(path: str) -> str:
    """What forbids a path by which an annotation names a picture, to follow it; empty if nothing.

    Before looking at any disk: it leaves the folder, holds what no name should, or names no file.
    """
    problem = path_problem(path) or name_problem(path)
    return problem or ("" if PurePosixPath(path).parts else "names no file")


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


def write_row_image(out_dir: Path, folder: str, content: bytes, writer: str) -> str:
    """Write a picture to `out_dir/images/folder`, named by its content, and return its name.

    Args:
        out_dir: the converter's output folder.
        folder: where under `images/`.
        content: the encoded bytes.
        writer: the key of the item that writes it.

    Raises:
        ImageError: `content` is no image, by its header.
    """
    extension = _EXTENSIONS[probe_image(content).format]
    name = f"{folder}/{xxhash.xxh3_128_hexdigest(content)}{extension}"
    write_image_once(out_dir, name, content, writer)
    return name


def write_image_once(out_dir: Path, name: str, content: bytes, writer: str) -> None:
    """Write `content` to `out_dir/images/name` unless it is there, whole or not at all.

    For pictures that several items share: `write_image` has one temporary name a picture, which two
    processes would fight for. Here each item has its own, and removes what it left when killed.

    Raises:
        ValueError: `name` is absolute or leaves the image folder.
        RowError: the file system takes no file of that name (`bad_name`).
    """
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise ValueError(f"expected an image path inside images/, got {name!r}")
    target = out_dir / "images" / relative
    digest = hashlib.blake2b(
        os.fsencode(target.name) + b"\0" + os.fsencode(writer), digest_size=8
    ).hexdigest()
    temporary = target.with_name(f".{digest}{TEMPORARY_MARK}")
    # A name stands for one content, and a file appears whole: its size only tells what a power cut
    # emptied.
    with _name_trouble(name):
        if target.is_file() and target.stat().st_size == len(content):
            temporary.unlink(missing_ok=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, target)


def _link_once(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(path), target)  # of a link, what it leads to
    except FileExistsError:
        return  # by an earlier row or run: the same picture
    except OSError as error:
        if error.errno in _NAME_ERRNOS:
            raise
        raise ValueError(
            f"images=link needs source and output on one file system that has hard links: "
            f"{error.strerror}; use images=copy"
        ) from error
