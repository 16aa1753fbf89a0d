"""How many tokens and crops images take, a whole data set at once.

    counts = image_lengths(reader, num_crops=16)     # counts.num_tokens (N,), counts.num_crops (N,)

The same arithmetic as `phi3v_train.hd_transform.hd_layout`, over arrays: a million images take a
second, no pixel is read. Sizes come from the shard index.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray
from phi3v_data.shards import ShardReader

from phi3v_train.hd_transform import CROP, TOKENS_PER_CROP_SIDE, hd_layout


@dataclass(frozen=True, slots=True, eq=False)
class ImageCounts:
    """Of the images of every sample; (N,) each."""

    num_images: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    """Image tokens."""
    num_crops: NDArray[np.int64]
    """Crops the vision tower runs, global views included."""


def image_lengths(reader: ShardReader, num_crops: int) -> ImageCounts:
    """Count for every sample.

    Args:
        reader: of the data set.
        num_crops: most local crops an image may have.

    Raises:
        ValueError: an image so long and thin that it has no layout; the message names its sample.
    """
    num_images, sizes_wh = _sizes(reader)
    grid = crop_grids(sizes_wh, num_crops)
    flat = np.flatnonzero(grid[:, 0] == 0)
    if len(flat):
        image = int(flat[0])
        ends = np.cumsum(num_images)
        number = int(np.searchsorted(ends, image, side="right"))
        sample = reader.sample(number)
        name = sample.images[image - int(ends[number] - num_images[number])]
        try:
            width, height = sizes_wh[image].tolist()
            hd_layout(width, height, num_crops)
        except ValueError as error:
            raise ValueError(f"sample {sample.id!r}, image {name!r}: {error}") from None
        raise AssertionError("hd_layout places what crop_grids does not")
    local = grid[:, 0] * grid[:, 1]
    side = TOKENS_PER_CROP_SIDE
    tokens = (local + 1) * side * side + 1 + (grid[:, 0] + 1) * side
    return ImageCounts(num_images, _sums(tokens, num_images), _sums(local + 1, num_images))


def crop_grids(
    sizes_wh: Int64[NDArray[np.int64], "I 2"], num_crops: int
) -> Int64[NDArray[np.int64], "I 2"]:
    """(rows, columns) of local crops of each image, as `hd_layout` has it; 0, 0 where it has none.

    Args:
        sizes_wh: (width, height) in pixels.
        num_crops: most local crops an image may have.
    """
    long_side, short_side = sizes_wh.max(axis=1), sizes_wh.min(axis=1)
    ratio = long_side / short_side
    scale = np.ones(len(sizes_wh), dtype=np.int64)
    for wider in range(2, num_crops + 1):  # what fits at a scale fits at all smaller ones
        scale[wider * np.ceil(wider / ratio) <= num_crops] = wider
    short_new = (CROP * scale / ratio).astype(np.int64)
    short_crops = -(-short_new // CROP)
    scale[short_new < 1] = 0
    is_portrait = sizes_wh[:, 0] < sizes_wh[:, 1]
    return np.where(
        is_portrait[:, None],
        np.stack([scale, short_crops], axis=1),
        np.stack([short_crops, scale], axis=1),
    )


def _sizes(reader: ShardReader) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Images of every sample (N,), and the (width, height) of all of them (I, 2)."""
    sizes = [reader.image_sizes_wh(number) for number in range(len(reader))]
    num_images = np.array([len(of_sample) for of_sample in sizes], dtype=np.int64)
    flat = list(chain.from_iterable(sizes))
    return num_images, np.array(flat, dtype=np.int64).reshape(-1, 2)


def _sums(values: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums of consecutive runs of `values`, `counts` long each."""
    totals = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(values)])
    ends = np.cumsum(counts)
    return totals[ends] - totals[ends - counts]
