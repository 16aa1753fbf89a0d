"""I: images."""

import os
from collections.abc import Iterator
from functools import lru_cache

from phi3v_data.image_check import ImageCheck
from phi3v_data.images import formats_of_extension
from phi3v_data.rules.rule import Context, Finding
from phi3v_data.schema import Sample

CROP_SIDE_PX = 336
"""Side of a crop of the model."""

MOST_CROPS = 16
"""Crops an image the published model was trained with, at most: no advice goes beyond."""


def missing_image(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image file is not there, or cannot be read.

    Paths are relative to the image root: `images/` beside the JSONL file if there is one, else
    the file's own folder, or what `--images` says. Where no image of a file is found, the root is
    wrong and that is reported once.
    """
    for pointer, path, check in _images(sample, context):
        if check.kind == "missing":
            yield Finding(f"image {path!r} {check.problem}", _case_help(path, context), pointer)


def _case_help(path: str, context: Context) -> str:
    """Names the file that differs in upper and lower case only, the usual slip."""
    parent, _, name = path.rpartition("/")
    other = _names_by_lower_case(os.path.join(context.image_root, parent)).get(name.lower())
    return (
        f"there is {other!r}: case counts" if other else f"the image root is {context.image_root}"
    )


@lru_cache(maxsize=64)  # one listing a folder, not one a missing file
def _names_by_lower_case(folder: str) -> dict[str, str]:
    try:
        return {name.lower(): name for name in sorted(os.listdir(folder))}
    except OSError:
        return {}


def undecodable_image(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image file does not decode as a whole.

    It is empty, truncated, damaged, not an image, or a decompression bomb. Each distinct file is
    decoded once, completely: a header can be whole where the pixels are not.
    """
    for pointer, path, check in _images(sample, context):
        if check.kind == "undecodable":
            yield Finding(f"image {path!r} {check.problem}", "", pointer)


def image_outside_root(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image path leads out of the image root.

    Paths are relative, POSIX, and stay under the root: no `..`, no leading `/` or drive, no
    backslash, no link that leads out. So a data set can be moved, and data cannot make a reader
    open files of the machine.
    """
    for pointer, path, check in _images(sample, context):
        if check.kind == "outside":
            yield Finding(f"image {path!r} {check.problem}", "", pointer)


def wrong_extension(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image's file name promises another format than its content has.

    Harmless here, since formats are told by content; tools that go by the name will stumble.
    NLVR2 ships hundreds of them.
    """
    for pointer, path, check in _images(sample, context):
        promised = formats_of_extension(path)
        if check.info and promised and check.info.format not in promised:
            yield Finding(f"image {path!r} is {check.info.format} by content", "", pointer)


def extreme_aspect_ratio(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image is so long and thin that the model's resizing would leave it without a short side.

    The model sees an image in crops of 336 x 336 pixels, at most `--num_crops` of them. One that is
    very long and thin becomes a single row (or column) of them all, 336 x num_crops pixels long,
    with its short side in proportion, rounded down: nothing, where the long side is more than
    336 x num_crops times the short side. Crop or pad such an image, or use more crops. Validate
    with the num_crops you will train with (`data.num_crops`): one that passes at 16 can fail at 4.
    """
    for pointer, path, check in _images(sample, context):
        if check.info:
            width, height = check.info.width, check.info.height
            short, long = sorted((width, height))
            # Exactly where training refuses: a ratio above 336 lets its crops grow along the long
            # side alone, so it gets all of them, and int(336 * num_crops / (long / short)) is 0.
            # In whole numbers the comparison is exact; below 2**53 pixels so is that division's.
            if long > CROP_SIDE_PX * context.num_crops * short:
                help = "crop it, or pad its short side"
                enough = -(-long // (CROP_SIDE_PX * short))
                if enough <= MOST_CROPS:
                    help += f", or use at least {enough} crops, here and in training"
                yield Finding(
                    f"image {path!r} is {width}x{height} (width x height): "
                    f"its short side becomes 0 pixels at num_crops {context.num_crops}",
                    help,
                    pointer,
                )


def _images(sample: Sample, context: Context) -> Iterator[tuple[str, str, ImageCheck]]:
    """(JSON pointer, path, check) of each image that was looked at."""
    for t, turn in enumerate(sample.conversations):
        for k, path in enumerate(turn.images):
            if path in context.images:
                yield f"/conversations/{t}/images/{k}", path, context.images[path]
