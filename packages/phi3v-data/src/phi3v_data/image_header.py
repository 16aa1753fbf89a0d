"""What a JPEG or PNG says about itself, from its first bytes and without Pillow.

    with open("photo.jpg", "rb") as file:
        read_header(read_from(file.fileno()), size)   # ImageInfo(width=1200, height=1800, ...)

Ten times faster than opening it with Pillow, and careful: anything out of the ordinary (junk
between segments, several EXIF blocks, an animated PNG, a checksum that is wrong, ...) gives None,
and `phi3v_data.images.probe_image` is the one to say what the file is. So None is no verdict; and
what is not None is what `probe_image` says, which a test compares on mutated files.
"""

import os
import struct
import sys
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from phi3v_data.images import MAX_PIXELS, ORIENTATION_TAG, ImageInfo

ReadAt = Callable[[int, int], bytes]
"""(position, count) -> so many bytes of the file from there; fewer at its end."""

HEAD_BYTES = 4 << 10
"""Read at first; most headers without EXIF end within."""

MOST_HEAD_BYTES = 1 << 20
"""A header that is longer is left to Pillow."""


image_info = lru_cache(maxsize=4096)(ImageInfo)
"""One object for all images that are alike: made once, stored once."""


class JpegHeader(NamedTuple):
    """A JPEG up to its first pixels."""

    info: ImageInfo

    scan_start: int
    """Position of the first entropy-coded byte."""


class PngHeader(NamedTuple):
    """A PNG up to its first pixels."""

    info: ImageInfo

    pixels_start: int
    """Position of the first IDAT chunk."""

    row_bytes: int
    """Bytes of a decompressed row, with its filter byte; 0 where rows are interlaced."""

    num_rows: int
    """Rows as stored."""


def read_from(descriptor: int) -> ReadAt:
    """Read from an open file."""
    if sys.platform != "win32":
        return lambda position, count: os.pread(descriptor, count, position)

    def read_at(position: int, count: int) -> bytes:
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.read(descriptor, count)

    return read_at


def read_header(read_at: ReadAt, size: int) -> ImageInfo | None:
    """Read size, mode, format, orientation and depth of a JPEG or PNG of `size` bytes.

    Returns:
        The same as `probe_image`, or None: ask that.
    """
    num_bytes = HEAD_BYTES
    while True:
        head = read_at(0, num_bytes)
        if head.startswith(_JPEG):
            if header := jpeg_header(head):
                return header.info
        elif head.startswith(_PNG):
            if header := png_header(head):
                is_all = _ends_plainly(read_at, size, head, header.pixels_start)
                return header.info if is_all else None
        else:
            return None
        if num_bytes >= min(size, MOST_HEAD_BYTES):
            return None
        num_bytes *= 16


# --- JPEG -----------------------------------------------------------------------------------------

_JPEG = b"\xff\xd8\xff"
_MODE_OF_LAYERS = {1: "L", 3: "RGB", 4: "CMYK"}
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_ORIENTATION_IN_XMP = b"tiff:Orientation"

START_OF_SCAN, QUANTIZATION, HUFFMAN = 0xDA, 0xDB, 0xC4
FRAMES = (0xC0, 0xC1, 0xC2)
"""Baseline, extended sequential and progressive, all Huffman-coded."""

SKIPPED = frozenset((HUFFMAN, 0xDD, 0xFE, *range(0xE0, 0xF0)))
"""Segments with nothing to check, or (APPn) only where they are of a known kind."""


def jpeg_header(data: bytes) -> JpegHeader | None:
    """Walk the segments of a JPEG up to its first scan.

    Returns:
        None where `data` ends before that, or holds something out of the ordinary.
    """
    if not data.startswith(_JPEG):
        return None
    position, end = 2, len(data)
    size_wh: tuple[int, int] | None = None
    mode = ""
    orientation: int | None = None
    has_exif = has_xmp_orientation = False
    while position + 4 <= end:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        start = position + 4
        position += 2 + (data[position + 2] << 8 | data[position + 3])
        if not start <= position <= end:
            return None
        if marker == START_OF_SCAN:
            if size_wh is None:
                return None
            orientation = orientation if orientation is not None else 1
            if has_xmp_orientation and not has_exif:
                return None
            width, height = size_wh if orientation < 5 else size_wh[::-1]
            return JpegHeader(image_info(width, height, mode, "JPEG", orientation), position)
        if marker in FRAMES:
            num_layers = (position - start - 6) // 3
            if size_wh is not None or num_layers not in _MODE_OF_LAYERS:
                return None
            bits, height, width, layers = struct.unpack_from(">BHHB", data, start)
            if bits != 8 or layers != num_layers or position != start + 6 + 3 * layers:
                return None
            if not 0 < width * height <= MAX_PIXELS:
                return None
            size_wh, mode = (width, height), _MODE_OF_LAYERS[layers]
        elif marker == QUANTIZATION:
            while start < position:
                start += 65 if data[start] < 16 else 129
            if start != position:
                return None
        elif marker not in SKIPPED:
            return None
        elif marker == 0xE1 and data.startswith(b"Exif\0\0", start):
            orientation = None if has_exif else _exif_orientation(data[start + 6 : position])
            if orientation is None:
                return None
            has_exif = orientation != -1  # without the tag, XMP has the say
            orientation = orientation if 1 <= orientation <= 8 else 1
        elif marker == 0xE1 and data.startswith(_XMP, start):
            has_xmp_orientation |= data.find(_ORIENTATION_IN_XMP, start, position) >= 0
        elif not _is_plain_segment(marker, data, start, position):
            return None
    return None


def _is_plain_segment(marker: int, data: bytes, start: int, end: int) -> bool:
    """Whether Pillow reads this application segment without stumbling."""
    if marker == 0xE0 and data.startswith(b"JFIF", start):
        return end - start >= 7
    if marker == 0xE2 and data.startswith(b"MPF\0", start):
        return False  # several pictures
    if marker == 0xE2 and data.startswith(b"ICC_PROFILE\0", start):
        return end - start >= 14
    if marker == 0xED and data.startswith(b"Photoshop 3.0\0", start):
        return data[end - 6 : end - 2] != b"8BIM"
    if marker == 0xEE and data.startswith(b"Adobe", start):
        return end - start >= 7
    return True


_SHORT, _RATIONAL = 3, 5
_X_RESOLUTION = 0x011A


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation tag's value, -1 if there is none; None: ask Pillow."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 10:
        return None
    (offset,) = struct.unpack_from(f"{order}I", exif, 4)
    if offset + 2 > len(exif):
        return None
    (num_tags,) = struct.unpack_from(f"{order}H", exif, offset)
    tags = exif[offset + 2 : offset + 2 + 12 * num_tags]
    if len(tags) != 12 * num_tags:
        return None
    found = -1
    for tag, kind, count, value in struct.iter_unpack(f"{order}HHI4s", tags):
        if tag == ORIENTATION_TAG:
            if found != -1 or (kind, count) != (_SHORT, 1):
                return None
            (found,) = struct.unpack(f"{order}H", value[:2])
        elif tag == _X_RESOLUTION and (kind, count) != (_RATIONAL, 1):
            return None  # Pillow reads it on opening, and fails where it is no number
    return found


# --- PNG ------------------------------------------------------------------------------------------

_PNG = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")
_CHECKSUM = struct.Struct(">I")

# (bits, colour type) -> (Pillow's mode, samples a pixel)
_MODES = {
    (1, 0): ("1", 1),
    (2, 0): ("L", 1),
    (4, 0): ("L", 1),
    (8, 0): ("L", 1),
    (16, 0): ("I;16", 1),
    (8, 2): ("RGB", 3),
    (16, 2): ("RGB", 3),
    (1, 3): ("P", 1),
    (2, 3): ("P", 1),
    (4, 3): ("P", 1),
    (8, 3): ("P", 1),
    (8, 4): ("LA", 2),
    (16, 4): ("RGBA", 2),
    (8, 6): ("RGBA", 4),
    (16, 6): ("RGBA", 4),
}

_LEAST_BYTES = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 0, b"bKGD": 0, b"sBIT": 0}
"""Chunks that Pillow reads or skips, and how long they are at least."""

_SMALL_BYTES = 1000
"""Compressed text or profiles up to here stay below Pillow's limit of 1 MiB: deflate shrinks by a
factor of 1,032 at most."""

_MOST_TEXT_BYTES = 1 << 20

# Pillow files texts under their keywords beside its own entries; these would be taken for them.
_TELLING_KEYWORDS = frozenset(
    (b"exif", b"xmp", b"transparency", b"interlace", b"bbox", b"default_image", b"icc_profile")
)


def png_header(data: bytes) -> PngHeader | None:
    """Walk the chunks of a PNG up to its first pixels, with their checksums.

    Returns:
        None where `data` ends before that, or holds something out of the ordinary.
    """
    if not data.startswith(_PNG + b"\0\0\0\x0dIHDR") or len(data) < 33:
        return None
    width, height, bits, color, method, row_filter, interlace = struct.unpack_from(
        ">IIBBBBB", data, 16
    )
    mode, num_samples = _MODES.get((bits, color), ("", 0))
    if not mode or method or row_filter or interlace > 1 or not 0 < width * height <= MAX_PIXELS:
        return None
    row_bytes = 0 if interlace else 1 + (width * bits * num_samples + 7) // 8
    has_alpha = mode in ("LA", "RGBA")
    has_palette = mode != "P"
    if not is_checksum_right(data, 8, 13):
        return None
    orientation = -1
    position = 33
    while position + 12 <= len(data):
        length, kind = _CHUNK.unpack_from(data, position)
        if kind == b"IDAT":
            if not has_palette:
                return None
            orientation = orientation if 1 <= orientation <= 8 else 1
            rows = height
            if orientation >= 5:
                width, height = height, width
            info = image_info(
                width, height, mode, "PNG", orientation, 16 if bits == 16 else 8, has_alpha
            )
            return PngHeader(info, position, row_bytes, rows)
        start, end = position + 8, position + 8 + length
        if end + 4 > len(data) or not is_checksum_right(data, position, length):
            return None
        if kind == b"PLTE":
            if has_palette is (mode == "P") or length % 3 or not 3 <= length <= 768:
                return None
            has_palette = True
        elif kind == b"tRNS":
            if has_alpha or length < {"P": 1, "RGB": 6}.get(mode, 2):
                return None
            has_alpha = True
        elif kind == b"eXIf":
            exif = data[start:end]
            value = _exif_orientation(exif) if orientation == -1 else None
            if value is None or value == -1:
                return None  # without the tag, XMP has the say
            orientation = value
        elif not is_plain_chunk(kind, data[start:end]):
            return None
        position = end + 4
    return None


def is_checksum_right(data: bytes | memoryview, position: int, length: int) -> bool:
    """Whether the checksum of the PNG chunk at `position` is that of its content."""
    end = position + 8 + length
    return _CHECKSUM.unpack_from(data, end)[0] == zlib.crc32(data[position + 4 : end])


def is_plain_chunk(kind: bytes, content: bytes) -> bool:
    """Whether Pillow reads this PNG chunk without stumbling, and takes nothing from it."""
    length = len(content)
    if kind in _LEAST_BYTES:
        return length >= _LEAST_BYTES[kind]
    if kind == b"iCCP":
        name, _, profile = content.partition(b"\0")
        return len(name) < 80 and profile[:1] == b"\0" and _is_bounded(profile[1:])
    if kind in (b"tEXt", b"zTXt", b"iTXt"):
        return length <= _MOST_TEXT_BYTES and _is_plain_text(kind, content)
    # Unknown to Pillow, and allowed to be: a small first letter says it is not needed.
    return kind not in (b"eXIf", b"acTL", b"fcTL", b"fdAT") and kind.isalpha() and kind[0] >= 97


def _is_plain_text(kind: bytes, content: bytes) -> bool:
    keyword, _, text = content.partition(b"\0")
    if keyword in _TELLING_KEYWORDS or keyword == b"Raw profile type exif":
        return False
    if kind == b"zTXt":
        return text[:1] == b"\0" and len(text) <= _SMALL_BYTES
    if kind == b"iTXt" and text[:1] != b"\0":
        return len(text) <= _SMALL_BYTES and keyword != b"XML:com.adobe.xmp"
    return keyword != b"XML:com.adobe.xmp" or _ORIENTATION_IN_XMP not in text


def _is_bounded(compressed: bytes) -> bool:
    """Whether it is below Pillow's limit when decompressed. What is damaged is not read."""
    if len(compressed) <= _SMALL_BYTES:
        return True
    decompressor = zlib.decompressobj()
    try:
        decompressor.decompress(compressed, 1 << 20)
    except zlib.error:
        return True
    return not decompressor.unconsumed_tail


def _ends_plainly(read_at: ReadAt, size: int, head: bytes, position: int) -> bool:
    """Whether a PNG's chunks from its first pixels on end in time and tell no orientation.

    Writers cut pixels into chunks of one size, so the last ones are found by arithmetic: where the
    type stands at the computed place, everything before it is pixels. Else it is walked.
    """
    header = head[position : position + 8]
    chunk_bytes = 12 + int.from_bytes(header[:4])
    end = size - 12  # of all but the end mark; an empty chunk, whatever it is, tells nothing
    if position + chunk_bytes == end:
        return True
    last = size - (size - position) % chunk_bytes
    for guess in (last, last - chunk_bytes):
        if guess > position:
            guessed = read_at(guess, 8)
            if guessed[4:] == b"IDAT":
                position, header = guess, guessed
                if position + 12 + int.from_bytes(header[:4]) == end:
                    return True
                break
    is_past_pixels = False
    while True:
        if len(header) < 8:
            return False  # truncated: Pillow says how
        length, kind = _CHUNK.unpack(header)
        if kind == b"IEND":
            return True
        if position + 12 + length > size:
            return False
        if kind == b"IDAT":
            if is_past_pixels:
                return False
        else:
            is_past_pixels = True
            if kind == b"PLTE" or length > _MOST_TEXT_BYTES:
                return False
            if not is_plain_chunk(kind, read_at(position + 8, length)):
                return False
        position += 12 + length
        header = read_at(position, 8)
