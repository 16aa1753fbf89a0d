"""Pictures that look the same though their bytes differ: scaled, compressed again, another format.

    one = look_of("val/a.jpg", 64)           # a number of 64 bits, or None
    find_near(train_looks, val_looks)        # [(position in train, position in val), ...]

A look is the perceptual hash "pHash" (Zauner, Implementation and Benchmarking of Perceptual Image
Hash Functions, 2010): the picture in grey at 32 x 32, its two-dimensional cosine transform, and of
the 8 x 8 lowest frequencies one bit each, whether it is above their median. Copies differ in a few
bits, other pictures in about half. A picture of one colour has no look: it would be that of all
other such pictures.
"""

import os
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from phi3v_data.images import FORMATS, ImageError, upright_rgb

if TYPE_CHECKING:
    from PIL import Image

MOST_BITS = 4
"""Looks that differ in so many bits are near."""

SIDE = 32
"""Of the grey picture, in pixels."""

LEAST_CONTRAST = 2.0
"""Standard deviation of the grey picture, of 255: below is one colour."""

Looks = NDArray[np.uint64]
"""One a picture."""


def look_of(file: str | os.PathLike[str]) -> int | None:
    """The look of an image file, turned upright.

    Returns:
        64 bits, or None: the picture has one colour, or does not decode.

    Raises:
        OSError: the file cannot be opened.
    """
    from PIL import Image

    with open(file, "rb") as content:
        try:
            picture = Image.open(content, formats=FORMATS)
            # JPEGs decode to an eighth of their sides where enough is left: many times faster.
            picture.draft("L", (2 * SIDE, 2 * SIDE))
            upright = upright_rgb(picture)
        except (ImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return None
    return look_of_picture(upright)


def look_of_picture(picture: "Image.Image") -> int | None:
    """The look of a decoded picture; None where it has one colour."""
    from PIL import Image

    grey = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(grey, dtype=np.float64)
    if pixels.std() < LEAST_CONTRAST:
        return None
    lowest = (_COSINES @ pixels @ _COSINES.T).ravel()
    bits = lowest > np.median(lowest[1:])  # the first is the brightness of the whole
    return int.from_bytes(np.packbits(bits).tobytes())


def _cosines() -> NDArray[np.float64]:
    """The 8 lowest rows of the cosine transform (DCT-II)."""
    place = np.pi * (2 * np.arange(SIDE) + 1) / (2 * SIDE)
    return np.cos(np.arange(8)[:, None] * place)


_COSINES = _cosines()  # (8, 32)

# Of six parts of two looks that differ in at most four bits, two are equal: what is equal in two
# parts (some 21 bits) is compared, all else never. Fifteen pairs of parts, fifteen sortings.
_PARTS = ((0, 11), (11, 11), (22, 11), (33, 11), (44, 10), (54, 10))
"""(first bit, number of bits)"""

_AT_ONCE = 1 << 22
"""Pairs that are compared at once, at most: 100 MB."""


def find_near(ones: Looks, others: Looks, most_bits: int = MOST_BITS) -> list[tuple[int, int]]:
    """The pictures of `others` that look as one of `ones` does.

    Args:
        ones: looks.
        others: looks.
        most_bits: in which near looks may differ, 0 to 4.

    Returns:
        (position in `ones`, position in `others`), one pair for each that has one, in the order of
        `others`; of several in `ones` the nearest, of these the first.

    Raises:
        ValueError: `most_bits` above 4: such pairs are not all found.
    """
    if not 0 <= most_bits <= MOST_BITS:
        raise ValueError(f"most_bits: expected 0 to {MOST_BITS}, got {most_bits}")
    # Each look once: frames of a video that stands still would else be compared with each other.
    looks, first = np.unique(ones, return_index=True)
    wanted, back = np.unique(others, return_inverse=True)
    # (bits, position in ones) in one number, so that the least is the nearest and the first.
    best = np.full(len(wanted), np.iinfo(np.int64).max)
    for a, (start_a, bits_a) in enumerate(_PARTS):
        for start_b, bits_b in _PARTS[a + 1 :]:
            mask = _mask(start_a, bits_a) | _mask(start_b, bits_b)
            _compare_alike(looks, first, wanted, mask, most_bits, best)
    found = best[back]
    return [
        (int(value & _POSITION), other)
        for other, value in enumerate(found.tolist())
        if value >> _POSITION_BITS <= most_bits
    ]


_POSITION_BITS = 48
_POSITION = (1 << _POSITION_BITS) - 1


def _mask(start: int, bits: int) -> int:
    return ((1 << bits) - 1) << start


def _compare_alike(
    looks: Looks,
    positions: NDArray[np.int64],
    wanted: Looks,
    mask: int,
    most_bits: int,
    best: NDArray[np.int64],
) -> None:
    """Note in `best` the near ones of all pairs that are equal under `mask`."""
    keys = looks & np.uint64(mask)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    of_wanted = wanted & np.uint64(mask)
    begins = np.searchsorted(ordered, of_wanted, "left")
    lengths = np.searchsorted(ordered, of_wanted, "right") - begins
    ends = np.cumsum(lengths)
    start = 0
    while start < len(wanted):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _AT_ONCE, "right")))
        part = slice(start, stop)
        owners = np.repeat(np.arange(start, stop), lengths[part])
        within = np.arange(len(owners)) - np.repeat(
            ends[part] - lengths[part] - done, lengths[part]
        )
        candidates = order[begins[owners] + within]
        bits = np.bitwise_count(looks[candidates] ^ wanted[owners]).astype(np.int64)
        is_near = bits <= most_bits
        values = bits[is_near] << _POSITION_BITS | positions[candidates[is_near]]
        np.minimum.at(best, owners[is_near], values)
        start = stop
