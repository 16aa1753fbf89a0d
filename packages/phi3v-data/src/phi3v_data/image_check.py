"""One image path of a sample, looked at once: where it leads, and whether it decodes.

    check_image(Path("images"), "val/a.jpg")   # ImageCheck(kind="ok", info=..., xxh3_64=...)
    check_image(Path("images"), "../a.jpg")    # ImageCheck(kind="outside", problem="...", ...)

How closely the file is looked at is the level:

- `header`: it is there and says what it is. Size, orientation, mode; pixels are not looked at.
- `deep`, the default: every truncated file is found, and what Pillow's full decode refuses. The
  verdict is Pillow's, but most files need no decoding to know it: see `_jpeg_skeleton` and
  `_is_whole_png`. Whatever these cannot vouch for is decoded.
- `full`: everything is decoded.

A header that promises far more pixels than a file of its size can hold is refused at every level:
a decompression bomb.

The last two differ in one case: a PNG of more than `INFLATED_BYTES` whose checksums are all right
and whose compressed pixels are wrong all the same, as only a faulty writer makes it.

The hash lets a later reader of the same file (the shard writer) know that it writes the very bytes
that were checked.
"""

import io
import os
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from phi3v_data.image_header import (
    HUFFMAN,
    QUANTIZATION,
    SKIPPED,
    START_OF_SCAN,
    JpegHeader,
    PngHeader,
    is_checksum_right,
    is_plain_chunk,
    jpeg_header,
    png_header,
    read_from,
    read_header,
)
from phi3v_data.image_place import (
    MisplacedImage,
    find_place,
    open_place,
    other_path_on_disk,
    unreadable,
)
from phi3v_data.image_place import path_problem as path_problem
from phi3v_data.images import (
    ImageError,
    ImageInfo,
    TooManyPixelsError,
    decode_image,
    probe_file,
    probe_image,
)

if TYPE_CHECKING:
    from phi3v_data.check_cache import CheckCache

Level: TypeAlias = Literal["header", "deep", "full"]
"""How closely an image is looked at; see the module docstring."""

INFLATED_BYTES = 32 << 10
"""Of a PNG's pixels so much is decompressed at the deep level; beyond, checksums vouch for them."""


MANY_PIXELS = 16_000_000
"""Up to here an image is decoded whatever its file's size: that takes a fraction of a second."""

MOST_PIXELS_A_BYTE = {"JPEG": 4_000, "MPO": 4_000, "GIF": 4_000, "BMP": 4_000, "PPM": 4_000}
"""Of larger images: no writer of these formats packs more into a byte (JPEG 341, GIF 2,600)."""

MOST_PIXELS_A_BYTE_OF_OTHERS = 50_000
"""An empty page at 600 dpi as a fax (TIFF, group 4) has 40,000; WebP has no bound at all."""


class ImageCheck(msgspec.Struct, frozen=True, gc=False):
    """What became of one image path: a struct, since a dataclass takes 25 times as long to make."""

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
    """Hash of the file, where it was read as a whole: not at the header level."""

    cause: Literal["", "unreadable", "empty", "truncated", "too_large"] = ""
    """More about `missing` (`unreadable`: there, but the system does not let it be read) and
    `undecodable` (`too_large`: a decompression bomb); empty where there is no more to say."""

    path_on_disk: str = ""
    """The path as the disk has it, where it differs in upper and lower case and was found all the
    same. Only a disk that ignores case does that."""


def check_image(
    root: Path, path: str, level: Level = "deep", cache: "CheckCache | None" = None
) -> ImageCheck:
    """Look at `path` under `root`: inside, there, an image, whole.

    Args:
        root: the image root, a folder.
        path: as in the sample: relative, POSIX.
        level: how closely; see the module docstring.
        cache: of this level; what it knows of an unchanged file is taken from there, and what it
            does not know is added.
    """
    base = os.fspath(root)
    try:
        place = None
        if cache is not None:
            place = find_place(base, path)
            if known := cache.get(place.real, place.status):
                return _in_case_of_disk(known, base, path) if place.ignores_case else known
        descriptor, opened = open_place(base, path)
    except MisplacedImage as misplaced:
        return ImageCheck(misplaced.kind, str(misplaced), cause=misplaced.cause)
    check = _check_open(descriptor, opened.status.st_size, level)
    if cache is not None and place is not None:
        cache.put(place.real, place.status, check)
    return _in_case_of_disk(check, base, path) if opened.ignores_case else check


def _in_case_of_disk(check: ImageCheck, root: str, path: str) -> ImageCheck:
    on_disk = other_path_on_disk(root, path)
    return msgspec.structs.replace(check, path_on_disk=on_disk) if on_disk else check


# --- what it is -----------------------------------------------------------------------------------


def _check_open(descriptor: int, size: int, level: Level) -> ImageCheck:
    """Look at an open file, and close it."""
    try:
        if level == "header":
            return _check_header(descriptor, size)
        data = _read_whole(descriptor, size)
    except OSError as error:
        return ImageCheck("missing", unreadable(error), cause="unreadable")
    finally:
        os.close(descriptor)
    return check_bytes(data, level)


def _read_whole(descriptor: int, size: int) -> bytes:
    data = os.read(descriptor, size + 1)
    if len(data) == size:
        return data
    parts = [data]  # a file that grows, or a disk that hands out less at a time
    while parts[-1]:
        parts.append(os.read(descriptor, 1 << 20))
    return b"".join(parts)


def _check_header(descriptor: int, size: int) -> ImageCheck:
    if not size:
        return ImageCheck("undecodable", "is empty", cause="empty")
    info = read_header(read_from(descriptor), size)
    if info is None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            try:
                info = probe_file(file)
            except ImageError as error:
                return _refused(error, None, size, 0)
    try:
        _refuse_bomb(info, size)
    except ImageError as error:
        return _refused(error, info, size, 0)
    return ImageCheck("ok", "", info, size)


def check_bytes(data: bytes, level: Level = "deep") -> ImageCheck:
    """Look at a file's content.

    Args:
        data: all of it.
        level: how closely; see the module docstring.
    """
    import xxhash

    digest = xxhash.xxh3_64_intdigest(data)
    if not data:
        return ImageCheck("undecodable", "is empty", None, 0, digest, "empty")
    info = None
    try:
        if level == "header":
            info = read_header(lambda start, count: data[start : start + count], len(data))
            info = info or probe_image(data)
            _refuse_bomb(info, len(data))
        else:
            info = _known_whole(data) if level == "deep" else None
            if info is None:
                info = probe_image(data)
                _refuse_bomb(info, len(data))
                decode_image(data)
    except ImageError as error:
        return _refused(error, info, len(data), digest)
    return ImageCheck("ok", "", info, len(data), digest)


def _refuse_bomb(info: ImageInfo, num_bytes: int) -> None:
    """Refuse, before decoding, a header that promises more pixels than such a file can hold.

    34 bytes of WebP decode to half a gigabyte, and take seconds.

    Raises:
        TooManyPixelsError: it does.
    """
    num_pixels = info.width * info.height
    most = MOST_PIXELS_A_BYTE.get(info.format, MOST_PIXELS_A_BYTE_OF_OTHERS) * num_bytes
    if num_pixels > max(MANY_PIXELS, most):
        raise TooManyPixelsError(
            f"{info.width}x{info.height} pixels in a file of {num_bytes:,} bytes: "
            "a decompression bomb"
        )


def _refused(error: ImageError, info: ImageInfo | None, num_bytes: int, digest: int) -> ImageCheck:
    problem = f"does not decode: {error}"
    if isinstance(error, TooManyPixelsError):
        return ImageCheck("undecodable", problem, info, num_bytes, digest, "too_large")
    is_truncated = "truncated" in str(error).lower()
    cause = "truncated" if is_truncated else ""
    return ImageCheck("undecodable", problem, info, num_bytes, digest, cause)


# --- whether it is whole --------------------------------------------------------------------------


def _known_whole(data: bytes) -> ImageInfo | None:
    """What it is, of an image that Pillow surely decodes; None: it has to be tried.

    Raises:
        TooManyPixelsError: a JPEG whose file is too small for its pixels.
    """
    if header := jpeg_header(data):
        _refuse_bomb(header.info, len(data))
        return header.info if _is_whole_jpeg(data, header) else None
    if header := png_header(data):
        return header.info if _is_whole_png(data, header) else None
    return None


# In entropy-coded data 0xFF is followed by 0 or a restart marker; anything else ends it.
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_END_OF_IMAGE = b"\xff\xd9"
_BETWEEN_SCANS = SKIPPED | {QUANTIZATION, HUFFMAN, START_OF_SCAN}


def _is_whole_jpeg(data: bytes, header: JpegHeader) -> bool:
    """Whether Pillow surely decodes a JPEG.

    libjpeg forgives all damage to entropy-coded data: it warns, and Pillow does not listen. What
    it does not forgive is wrong segments, and a file that ends before its end marker. So the same
    JPEG without its entropy-coded data has the same fate, if the end marker is there, and takes
    a tenth of the time: then libjpeg fills the picture with grey.
    """
    skeleton = _jpeg_skeleton(data, header.scan_start)
    if skeleton is None:
        return False
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(skeleton), formats=("JPEG",))
        if image.format != "JPEG":
            return False
        image.draft("L", (1, 1))  # an eighth of the size, grey: the cheapest there is
        image.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _jpeg_skeleton(data: bytes, scan_start: int) -> bytes | None:
    """The JPEG without entropy-coded data; None where its segments do not lead to an end marker."""
    parts = [data[:scan_start]]
    position, is_in_scan = scan_start, True
    while True:
        if is_in_scan:
            found = _END_OF_SCAN.search(data, position)
            if found is None:
                return None
            position = found.start()
        if data.startswith(_END_OF_IMAGE, position):
            return b"".join((*parts, _END_OF_IMAGE))
        if position + 4 > len(data) or data[position] != 0xFF:
            return None
        marker = data[position + 1]
        length = data[position + 2] << 8 | data[position + 3]
        end = position + 2 + length
        if marker not in _BETWEEN_SCANS or length < 2 or end > len(data):
            return None
        parts.append(data[position:end])
        position, is_in_scan = end, marker == START_OF_SCAN


def _is_whole_png(data: bytes, header: PngHeader) -> bool:
    """Whether Pillow surely decodes a PNG.

    All its chunks are there with the right checksum, up to its end mark, and in an ordinary order.
    Up to `INFLATED_BYTES` of its pixels are decompressed, and its rows looked at: all of a small
    picture.
    """
    if not header.row_bytes:
        return False
    view = memoryview(data)
    position = header.pixels_start
    pixels: list[memoryview] = []
    is_past_pixels = False
    while position + 8 <= len(data):
        length = int.from_bytes(view[position : position + 4])
        kind = data[position + 4 : position + 8]
        end = position + 8 + length
        if kind == b"IEND":
            return _are_pixels_right(pixels, header)
        if end + 4 > len(data) or not is_checksum_right(view, position, length):
            return False
        if kind == b"IDAT":
            if is_past_pixels:
                return False
            pixels.append(view[position + 8 : end])
        else:
            is_past_pixels = True
            if kind == b"PLTE" or not is_plain_chunk(kind, data[position + 8 : end]):
                # An orientation is the one thing that may come late.
                return False
        position = end + 4
    return False


def _are_pixels_right(parts: list[memoryview], header: PngHeader) -> bool:
    num_bytes = header.row_bytes * header.num_rows
    is_small = num_bytes <= INFLATED_BYTES
    most = num_bytes + 1 if is_small else INFLATED_BYTES
    decompressor = zlib.decompressobj()
    rows = b""
    try:
        for part in parts:
            rows += decompressor.decompress(part, most - len(rows))
            if len(rows) == most:
                break
    except zlib.error:
        return False
    if (len(rows), decompressor.eof) != (num_bytes, True) if is_small else len(rows) < most:
        return False  # rows too few or too many: Pillow forgives some of it
    return max(rows[:: header.row_bytes]) <= _MOST_FILTER


_MOST_FILTER = 4
"""Row filters of PNG are 0 to 4."""
