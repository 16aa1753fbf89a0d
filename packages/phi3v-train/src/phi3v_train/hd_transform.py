"""An image of any shape to crops of 336 x 336, as Phi-3.5-vision cuts it.

    640 x 480, num_crops=4   ->  resized to 672 x 504, padded with white to 672 x 672
                             ->  crops (2, 2): four uint8 tiles, row by row
                             ->  (2*2 + 1) * 144 + 1 + (2 + 1) * 12 = 757 image tokens

Arithmetic first (pure, from sizes alone), pixels after it. The float views of the published
processor, normalised and with the global view in front, are made from the uint8 tiles by
`phi3v_train.modeling_phi3_v.normalize_views`, on whatever device the model is.

Source: the rule is the published image processor's, restated from its recorded results.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CROP = 336
"""Side of a crop in pixels: the vision tower's input."""

TOKENS_PER_CROP_SIDE = 12
"""A crop is 24 x 24 patches, merged 2 x 2: 12 x 12 tokens."""

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP, in RGB order, for pixel values in [0, 1]."""

Resize = Literal["exact", "fast"]
"""How pixels are resized: `exact` is Pillow, equal to the published processor bit for bit; `fast`
is torch's uint8 kernel, at most `MAX_FAST_STEPS` away from it."""

MAX_FAST_STEPS = 2
"""Of 255. Its weights have 16 bits where Pillow's have 22, so either of the two passes may round
a value the other way: one step each."""


@dataclass(frozen=True, slots=True)
class HDLayout:
    """Where an image goes on its canvas of whole crops; all sizes in pixels, (height, width)."""

    resized_hw: tuple[int, int]
    """The image after resizing, before padding."""
    top_left: tuple[int, int]
    """Rows of white above and columns of white to the left of it."""
    grid: tuple[int, int]
    """(rows, columns) of local crops; the canvas is `CROP` times that."""

    @property
    def canvas_hw(self) -> tuple[int, int]:
        """(height, width) of the padded image: what the published code calls `image_sizes`."""
        return self.grid[0] * CROP, self.grid[1] * CROP

    @property
    def num_tokens(self) -> int:
        """Image tokens: the crops and the global view, their row ends, and one separator."""
        return num_image_tokens(*self.grid)


def num_image_tokens(rows: int, columns: int) -> int:
    """How many tokens an image of `rows` x `columns` local crops takes in the prompt."""
    side = TOKENS_PER_CROP_SIDE
    return (rows * columns + 1) * side * side + 1 + (rows + 1) * side


def hd_layout(width: int, height: int, num_crops: int) -> HDLayout:
    """Place an image of `width` x `height` pixels on a canvas of at most `num_crops` crops.

    Raises:
        ValueError: a size below 1, or a shape so long that its short side would round to nothing.
    """
    if width < 1 or height < 1 or num_crops < 1:
        raise ValueError(
            f"an image has at least 1 x 1 pixels and 1 crop, got {width} x {height} "
            f"and num_crops={num_crops}"
        )
    long_side, short_side = max(width, height), min(width, height)
    # Float division, as the published processor does it: the quotient can fall one below the
    # exact value (21 x 19), and its results are what the model was trained on.
    ratio = long_side / short_side
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
        scale += 1
    long_new = CROP * scale
    short_new = int(long_new / ratio)
    if short_new < 1:
        raise ValueError(
            f"an image of {width} x {height} pixels is too long and thin for "
            f"num_crops={num_crops}: its short side would shrink to nothing; crop it, or use more "
            "crops"
        )
    short_crops = math.ceil(short_new / CROP)
    offset = (short_crops * CROP - short_new) // 2
    if width >= height:
        return HDLayout((short_new, long_new), (offset, 0), (short_crops, scale))
    return HDLayout((long_new, short_new), (0, offset), (scale, short_crops))


def hd_crops(image: Image.Image, num_crops: int, resize: Resize = "exact") -> NDArray[np.uint8]:
    """Resize, pad and cut an RGB image: what a worker does with every picture.

    Each pixel goes from the resized picture straight to its place in a crop: there is no canvas in
    between. Where `resize` is exact, the pixels are the published processor's, bit for bit.

    Returns:
        uint8 (rows * columns, 3, 336, 336), row by row; `hd_layout` knows the grid.

    Raises:
        ValueError: see `hd_layout`; or the image is not RGB.
    """
    layout = _layout_of(image, num_crops)
    if resize == "fast":
        planes = _fast_planes(image, layout.resized_hw)
    else:
        planes = _planes(_resized(image, layout.resized_hw))
    return _crops_of_planes(planes, layout)


def hd_image(image: Image.Image, num_crops: int) -> NDArray[np.uint8]:
    """The resized and padded picture whose tiles are `hd_crops`: what the model sees, to look at.

    Returns:
        uint8 (height, width, 3), both multiples of 336; equal to the published processor's, bit
        for bit.

    Raises:
        ValueError: see `hd_layout`; or the image is not RGB.
    """
    layout = _layout_of(image, num_crops)
    tiles = hd_crops(image, num_crops).reshape(*layout.grid, 3, CROP, CROP)
    return tiles.transpose(0, 3, 1, 4, 2).reshape(*layout.canvas_hw, 3)


def _layout_of(image: Image.Image, num_crops: int) -> HDLayout:
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image, got mode {image.mode}; use decode_image first")
    return hd_layout(image.width, image.height, num_crops)


def _resized(image: Image.Image, size_hw: tuple[int, int]) -> Image.Image:
    height, width = size_hw
    if image.height > image.width:
        # The published code transposes a portrait, resizes it and transposes it back. Pillow
        # rounds to uint8 between its two passes, so the order of the passes matters: height
        # first, then width, in two calls, gives the same bits without the transpositions.
        image = image.resize((image.width, height), Image.Resampling.BILINEAR)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _planes(image: Image.Image) -> list[NDArray[np.uint8]]:
    """The bands of an RGB image: three (height, width)."""
    # Pillow keeps four bytes a pixel and packs one band as fast as all three, so this costs as
    # much as `np.asarray(image)` and spares the slow walk from pixels to planes behind it.
    size_hw = (image.height, image.width)
    bands = (image.tobytes("raw", band) for band in "RGB")
    return [np.frombuffer(band, dtype=np.uint8).reshape(size_hw) for band in bands]


def _fast_planes(image: Image.Image, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize with torch's antialiased uint8 kernel: (3, height, width)."""
    import torch  # here: the arithmetic above is used where torch is not needed

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W), channels last
    resized = torch.nn.functional.interpolate(pixels, size_hw, mode="bilinear", antialias=True)
    return resized[0].numpy()


def _crops_of_planes(
    planes: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], layout: HDLayout
) -> NDArray[np.uint8]:
    """Cut three planes (height, width), padded with white as `layout` says, into crops."""
    (rows, columns), (top, left), (height, width) = layout.grid, layout.top_left, layout.resized_hw
    crops = np.empty((rows * columns, 3, CROP, CROP), dtype=np.uint8)
    for index, crop in enumerate(crops):
        # The crop's upper left corner, then the part of it that the picture covers, both on the
        # canvas; padding is less than a crop, so that part is never empty.
        y, x = index // columns * CROP, index % columns * CROP
        y0, y1 = max(y, top), min(y + CROP, top + height)
        x0, x1 = max(x, left), min(x + CROP, left + width)
        if (y1 - y0, x1 - x0) != (CROP, CROP):
            crop.fill(255)
        for plane, band in zip(planes, crop, strict=True):
            band[y0 - y : y1 - y, x0 - x : x1 - x] = plane[
                y0 - top : y1 - top, x0 - left : x1 - left
            ]
    return crops
