"""Encoded image bytes to what the model sees: probe the header, or decode to RGB.

    probe_image("photo.jpg")         # ImageInfo(width=1200, height=1800, format="JPEG", ...)
    decode_image(data).size          # (1200, 1800): the same, always

One definition of "the picture" for validator, shards and training:

- the first frame of an animation;
- turned as its EXIF orientation says (EXIF that cannot be read counts as none, as in browsers);
- alpha is dropped, not blended: `convert("RGB")`, as the published processor does;
- 16-bit samples keep their high byte, as Pillow itself does for 16-bit RGB. (`convert("RGB")` of a
  16-bit grey image clips it to white instead.) 32-bit integer and float pixels have no defined
  white level and are refused;
- the numbers stand as stored: no colour profile (ICC) is applied, nor in the published processor;
- a file is read only by the decoders in `FORMATS`, none of which starts another program, and only
  up to `MAX_PIXELS`.
"""

import io
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pillow's names of the formats read (a JPEG of several pictures is reported as `MPO`). EPS, for
one, would run Ghostscript on the data."""

MAX_PIXELS = 178_956_970
"""Width times height above this is refused as a decompression bomb: Pillow's own limit (it warns
at half of it), stated here because a program can switch Pillow's off."""

ORIENTATION_TAG = 0x0112


class ImageError(ValueError):
    """The bytes are not an image that can be decoded whole. The message says why."""


class TooManyPixelsError(ImageError):
    """A decompression bomb: more than `MAX_PIXELS`."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the header says."""

    width: int
    """Pixels, after turning by EXIF: as the model sees it."""

    height: int
    """Pixels, after turning by EXIF."""

    mode: str
    """Pillow's mode as stored, for example `RGB`, `CMYK`, `P`, `I;16`."""

    format: str
    """Format by content: one of `FORMATS`, or `MPO`."""

    orientation: int
    """EXIF orientation, 1 to 8; 1 is upright."""

    bits: int = 8
    """Bits a sample as stored: 16 where there are more than 8, and 8 for 8 or fewer. (A 16-bit RGB
    PNG has mode `RGB`.)"""

    has_alpha: bool = False
    """Whether it has an alpha channel, or a colour or palette entries marked as transparent."""

    is_animated: bool = False
    """Whether it has more frames (or pages) than the first. `MPO` does not count: its other
    pictures are previews and gain maps."""


def probe_image(source: bytes | memoryview | str | os.PathLike[str]) -> ImageInfo:
    """Read size, mode, format and orientation without decoding the pixels.

    A header can be whole where the pixels are not: only `decode_image` finds a truncated file.

    Raises:
        ImageError: not an image in one of `FORMATS`, or a decompression bomb.
        OSError: the file cannot be opened.
    """
    if isinstance(source, (bytes, memoryview)):
        return probe_file(io.BytesIO(source))
    with open(source, "rb") as file:
        return probe_file(file)


def decode_image(data: bytes | memoryview) -> "Image.Image":
    """Decode the whole image to RGB, turned upright.

    Raises:
        ImageError: the bytes are not an image, are truncated or damaged, hold more than
            `MAX_PIXELS`, or have 32-bit pixels.
    """
    return upright_rgb(_open(io.BytesIO(data)))


def upright_rgb(image: "Image.Image") -> "Image.Image":
    """The picture of an opened image: its first frame, upright, RGB; see the module docstring.

    Raises:
        ImageError: as `decode_image`.
    """
    from PIL import Image

    try:
        # Before anything else: on a damaged PNG `getexif()` fails inside its own hidden load, and
        # the next `load()` then succeeds with half a picture.
        image.load()
        turn = _TURNS.get(_orientation(image))
        image = _to_rgb(image)
        return image if turn is None else image.transpose(Image.Transpose(turn))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly any type on damaged bytes
        raise _image_error(error) from error


# EXIF orientation -> Image.Transpose, by value so that Pillow is imported only when needed.
_TURNS = {
    2: 0,  # FLIP_LEFT_RIGHT
    3: 3,  # ROTATE_180
    4: 1,  # FLIP_TOP_BOTTOM
    5: 5,  # TRANSPOSE
    6: 4,  # ROTATE_270
    7: 6,  # TRANSVERSE
    8: 2,  # ROTATE_90
}


def _open(file: BinaryIO) -> "Image.Image":
    from PIL import Image

    try:
        image = Image.open(file, formats=FORMATS)
    except MemoryError:
        raise
    except Exception as error:  # as above: SyntaxError, struct.error, ValueError, OSError, ...
        raise _image_error(error) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise TooManyPixelsError(f"{width}x{height} pixels: more than the {MAX_PIXELS:,} allowed")
    return image


def probe_file(file: BinaryIO) -> ImageInfo:
    """`probe_image` of an open file, read from its start.

    Raises:
        ImageError: as `probe_image`.
    """
    image = _open(file)
    # Before what follows, which may load the pixels or look at other frames.
    mode, format, bits, has_alpha = image.mode, image.format, _bits(image), _has_alpha(image)
    width, height = image.size
    # TIFF reports the size it has after turning, and turns by itself in load().
    is_turned_by_pillow = image.format == "TIFF"
    orientation = _header_orientation(image, file)
    if orientation >= 5 and not is_turned_by_pillow:
        width, height = height, width
    assert format is not None
    return ImageInfo(width, height, mode, format, orientation, bits, has_alpha, _is_animated(image))


_BITS_PER_SAMPLE = 258
"""A TIFF tag."""


def _bits(image: "Image.Image") -> int:
    if image.mode.startswith("I") or image.mode == "F":
        return 16
    is_deep = False
    if image.format == "PNG":
        stream: Any = getattr(image, "png", None)
        is_deep = stream is not None and stream.im_rawmode.endswith("16B")
    elif image.format == "TIFF":
        tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
        is_deep = any(bits > 8 for bits in tags.get(_BITS_PER_SAMPLE, ()))
    elif image.format == "PPM":
        tiles: list[Any] = getattr(image, "tile", [])  # args: ("RGB", 65535), the largest value
        is_deep = any(tile.args[-1] > 255 for tile in tiles if tile.codec_name == "ppm")
    return 16 if is_deep else 8


def _has_alpha(image: "Image.Image") -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _is_animated(image: "Image.Image") -> bool:
    if image.format not in ("PNG", "GIF", "WEBP", "TIFF"):
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except MemoryError:
        raise
    except Exception:  # as in _orientation: a damaged second frame, of which nothing is used
        return True


def _orientation(image: "Image.Image") -> int:
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except MemoryError:
        raise
    except Exception:  # broken EXIF, in as many exception types as there are ways to break it
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _header_orientation(image: "Image.Image", file: BinaryIO) -> int:
    """The orientation `decode_image` will use, without decoding.

    Pillow looks for a PNG's EXIF by decoding it whole, since the chunk may follow the pixels.
    Walking the chunk headers finds those that matter; only such a late one costs a decode.
    """
    if image.format != "PNG":
        return _orientation(image)
    if _has_late_metadata(file):
        try:
            image.load()
        except (OSError, SyntaxError, ValueError, struct.error):
            return 1  # decode_image is the one to say so
        return _orientation(image)
    from PIL import Image

    try:
        value = Image.Image.getexif(image).get(ORIENTATION_TAG, 1)
    except MemoryError:
        raise
    except Exception:  # as in _orientation
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _has_late_metadata(file: BinaryIO) -> bool:
    """Whether a PNG has a chunk that may carry an orientation after its first pixel chunk."""
    position = 8
    seen_pixels = False
    while True:
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            return False
        length, kind = struct.unpack(">I4s", header)
        if kind == b"IDAT":
            seen_pixels = True
        elif seen_pixels and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
            return True
        elif kind == b"IEND":
            return False
        position += 12 + length


_WHITE_IS_ZERO = 0
"""A value of TIFF's tag PhotometricInterpretation: the samples are a negative."""


def _to_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode == "RGB":
        return image.copy() if image.readonly else image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        import numpy as np
        from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

        tags: Mapping[int, Any] = image.tag_v2 if isinstance(image, TiffImageFile) else {}
        # Pillow hands the samples of a 12-bit TIFF on as they are, in 16 bits.
        num_low_bits = 4 if tags.get(BITSPERSAMPLE) == (12,) else 8
        high_byte = (np.asarray(image) >> num_low_bits).clip(0, 255)
        if tags.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
            high_byte = 255 - high_byte  # Pillow does so itself, but up to 8 bits only
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            f"mode {image.mode} (32-bit pixels) has no defined white level; save it with 8 bits"
        )
    if "transparency" in image.info:
        # Dropping alpha is what we want; without this Pillow advises RGBA in a warning per palette.
        image = image.copy()  # the caller's keeps it
        del image.info["transparency"]
    return image.convert("RGB")


def _image_error(error: Exception) -> ImageError:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return ImageError(f"not an image in a format that is read ({', '.join(FORMATS)})")
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))
        size = f"{int(pixels[0]):,}" if pixels else "too many"
        return TooManyPixelsError(f"{size} pixels: more than the {MAX_PIXELS:,} allowed")
    return ImageError(str(error) or type(error).__name__)


_EXTENSIONS = {
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".jpe": ("JPEG", "MPO"),
    ".jfif": ("JPEG", "MPO"),
    ".mpo": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".webp": ("WEBP",),
    ".gif": ("GIF",),
    ".bmp": ("BMP",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
    ".ppm": ("PPM",),
    ".pgm": ("PPM",),
    ".pbm": ("PPM",),
    ".pnm": ("PPM",),
}


def formats_of_extension(path: str) -> tuple[str, ...]:
    """The formats a file name promises; empty where its extension promises nothing."""
    return _EXTENSIONS.get(os.path.splitext(path)[1].lower(), ())
