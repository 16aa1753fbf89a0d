"""One image path of a sample, looked at once: where it leads, and whether it decodes.

    check_image(Path("images"), "val/a.jpg")   # ImageCheck(kind="ok", info=..., xxh3_64=...)
    check_image(Path("images"), "../a.jpg")    # ImageCheck(kind="outside", problem="...", ...)

The hash lets a later reader of the same file (the shard writer) know that it writes the very bytes
that were checked.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phi3v_data.images import ImageError, ImageInfo, decode_image, probe_image


@dataclass(frozen=True, slots=True)
class ImageCheck:
    """What became of one image path."""

    kind: Literal["ok", "outside", "missing", "undecodable", "no_root"]
    """`outside` the image root; `no_root`: the root itself is missing, the file was not looked
    for."""

    problem: str = ""
    """Why it is not ok, to follow the path in a sentence."""

    info: ImageInfo | None = None
    """Size and format; None where not even the header can be read."""

    num_bytes: int = 0
    """Size of the file, where it was read."""

    xxh3_64: int = 0
    """Hash of the file, where it was read."""


def check_image(root: Path, path: str) -> ImageCheck:
    """Look at `path` under `root`: inside, there, decodable. Decodes the whole image."""
    import xxhash

    problem = path_problem(path)
    if problem:
        return ImageCheck("outside", problem)
    file = root / path
    real = os.path.realpath(file)
    if not os.path.exists(real):
        return ImageCheck("missing", "does not exist")
    real_root = os.path.realpath(root)
    if os.path.commonpath([real_root, real]) != real_root:
        return ImageCheck("outside", "is a link that leads out of the image root")
    if not os.path.isfile(real):
        return ImageCheck("missing", "is not a file")  # a folder, or a pipe that would block
    try:
        data = Path(real).read_bytes()
    except OSError as error:
        return ImageCheck("missing", f"cannot be read: {error.strerror}")
    digest = xxhash.xxh3_64_intdigest(data)
    if not data:
        return ImageCheck("undecodable", "is empty")
    info = None
    try:
        info = probe_image(data)
        decode_image(data)
    except ImageError as error:
        return ImageCheck("undecodable", f"does not decode: {error}", info, len(data), digest)
    return ImageCheck("ok", "", info, len(data), digest)


def path_problem(path: str) -> str:
    """What is wrong with an image path before looking at any disk; empty if nothing."""
    if not path:
        return "is empty"
    if "\0" in path:
        return "holds a NUL character"
    if "\\" in path:
        return "holds a backslash; paths are POSIX, with /"
    if path.startswith("/") or (len(path) > 1 and path[1] == ":" and path[0].isalpha()):
        return "is absolute; paths are relative to the image root"
    if ".." in path.split("/"):
        return "leaves the image root by .."
    return ""
