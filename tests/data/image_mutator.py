"""Small images of every format, and damaged copies of them without end: the same for a seed.

mutator = ImageMutator(seed=1)
mutator.next()      # b"\\x89PNG..."
"""

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image


def _picture(mode: str, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[: height // 2] = 200  # half of it compresses
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode in ("LA", "RGBA"):
        return Image.fromarray(pixels).convert(mode)
    return Image.fromarray(pixels[..., :3].copy()).convert(mode)


def make_seeds() -> list[bytes]:
    """One image of each kind that there are readers for, 100 bytes to 8 KB."""
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds: list[bytes] = []

    def add(mode: str, format: str, **options: object) -> None:
        buffer = io.BytesIO()
        _picture(mode).save(buffer, format, **options)
        seeds.append(buffer.getvalue())

    for mode in ("L", "RGB", "CMYK"):
        add(mode, "JPEG")
    add("RGB", "JPEG", progressive=True)
    add("RGB", "JPEG", exif=exif, subsampling=0, restart_marker_blocks=2)
    add("RGB", "MPO", save_all=True, append_images=[_picture("RGB")])
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        add(mode, "PNG")
    add("RGB", "PNG", save_all=True, append_images=[_picture("RGB").rotate(90)])
    add("RGB", "WEBP", quality=50)
    add("RGB", "WEBP", lossless=True)
    add("RGB", "WEBP", save_all=True, append_images=[_picture("RGB").rotate(90)])
    add("P", "GIF")
    add("P", "GIF", save_all=True, append_images=[_picture("P").rotate(90)])
    for mode in ("1", "P", "RGB"):
        add(mode, "BMP")
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        add("RGB", "TIFF", compression=compression)
    add("1", "TIFF", compression="group4")
    add("RGB", "TIFF", exif=exif)
    for mode in ("1", "L", "RGB"):
        add(mode, "PPM")
    return seeds


class ImageMutator:
    """Damaged images, one after the other."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._seeds = make_seeds()
        self._ways: list[Callable[[bytearray], None]] = [
            self._flip,
            self._flip,
            self._set_number,
            self._set_number,
            self._cut,
            self._erase,
            self._repeat,
            self._splice,
            self._fill,
        ]

    def next(self) -> bytes:
        """One image with one to four things done to it."""
        data = bytearray(self._random.choice(self._seeds))
        for _ in range(self._random.choice((1, 1, 1, 2, 4))):
            self._random.choice(self._ways)(data)
        if data.startswith(b"\x89PNG") and self._random.random() < 0.7:
            _mend_checksums(data)
        return bytes(data)

    def _place(self, data: bytearray) -> int:
        """Headers are short and tell most: every second time there."""
        end = len(data) if self._random.random() < 0.5 else min(len(data), 100)
        return self._random.randrange(max(end, 1))

    def _flip(self, data: bytearray) -> None:
        if data:
            data[self._place(data)] ^= 1 << self._random.randrange(8)

    def _set_number(self, data: bytearray) -> None:
        """A size, an offset, a count: large, small, or one off."""
        size, order = self._random.choice((2, 4)), self._random.choice("<>")
        number = self._random.choice(
            (0, 1, 255, 4000, 13000, 16383, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
        )
        place = self._place(data)
        data[place : place + size] = struct.pack(f"{order}I", number)[
            slice(4 - size, 4) if order == ">" else slice(0, size)
        ]

    def _cut(self, data: bytearray) -> None:
        del data[self._place(data) :]

    def _erase(self, data: bytearray) -> None:
        place = self._place(data)
        del data[place : place + self._random.choice((1, 2, 4, 30))]

    def _repeat(self, data: bytearray) -> None:
        place = self._place(data)
        part = data[place : place + self._random.randrange(1, 64)]
        data[place:place] = part * self._random.choice((1, 2, 40))

    def _splice(self, data: bytearray) -> None:
        other = self._random.choice(self._seeds)
        place = self._place(data)
        data[place:] = other[self._random.randrange(len(other)) :]

    def _fill(self, data: bytearray) -> None:
        place, number = self._place(data), self._random.randrange(1, 64)
        data[place : place + number] = bytes([self._random.choice((0, 0xFF, 0x80))]) * number


def _mend_checksums(data: bytearray) -> None:
    """Make the checksums of a PNG those of what its chunks hold now."""
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            return
        struct.pack_into(">I", data, end, zlib.crc32(data[position + 4 : end]))
        position = end + 4
