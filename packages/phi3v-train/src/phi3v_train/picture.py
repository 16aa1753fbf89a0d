"""Whatever a user holds in hand to one upright RGB picture.

    read_picture("a.jpg")                      # a path
    read_picture("https://example.org/a.jpg")  # or a data: address
    read_picture(jpeg_bytes)
    read_picture(Image.open("a.jpg"))          # any mode
    read_picture(array)                        # uint8 (H, W, 3), RGB

The picture is the one that training sees, whatever its mode, orientation or format: both use
`phi3v_data.images`.
"""

import os
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from phi3v_data.images import ImageError, decode_image, upright_rgb
from PIL import Image

Picture: TypeAlias = (
    Image.Image | NDArray[np.uint8] | str | os.PathLike[str] | bytes | bytearray | memoryview
)
"""What `read_picture` takes."""

_TIMEOUT_S = 30
_ADDRESSES = ("http://", "https://", "data:")


def read_picture(source: Picture) -> Image.Image:
    """Read one picture.

    Args:
        source: see the module docstring.

    Returns:
        An upright RGB image.

    Raises:
        ValueError: it is not a picture that can be read whole; the message says which and why.
    """
    try:
        if isinstance(source, Image.Image):
            return upright_rgb(source)
        if isinstance(source, np.ndarray):
            return _from_array(source)
        if isinstance(source, str | os.PathLike):
            return decode_image(_read_bytes(os.fspath(source)))
        if isinstance(source, bytes | bytearray | memoryview):
            return decode_image(bytes(source))
    except (ValueError, OSError, HTTPException) as error:
        # An address or a path may be a whole picture in base64: the message stays readable.
        reason = _shorten(str(error) or type(error).__name__)
        raise ValueError(f"cannot read the image {_name(source)}: {reason}") from error
    raise ValueError(
        "an image is a PIL image, a uint8 array (H, W, 3), a path, an address or encoded bytes, "
        f"got {type(source).__name__}"
    )


def _read_bytes(source: str) -> bytes:
    if source.lower().startswith(_ADDRESSES):
        with urllib.request.urlopen(source, timeout=_TIMEOUT_S) as response:
            return response.read()
    return Path(source).read_bytes()


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ImageError(f"expected uint8 (H, W, 3), got {array.dtype} {array.shape}")
    return Image.fromarray(array)


def _name(source: object) -> str:
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"of mode {source.mode}"
    if isinstance(source, np.ndarray):
        return "array"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"of {len(source):,} bytes"
    return _shorten(str(source))


def _shorten(text: str) -> str:
    return text if len(text) <= 300 else text[:150] + "…"
