"""I: images."""

import os
import posixpath
from collections.abc import Collection, Iterator
from functools import lru_cache

from phi3v_data.image_check import ImageCheck
from phi3v_data.image_place import names_by_lower_case
from phi3v_data.images import formats_of_extension
from phi3v_data.rules.across import AcrossFinding, Facts
from phi3v_data.rules.rule import Context, Finding
from phi3v_data.schema import Sample

CROP_SIDE_PX = 336
"""Side of a crop of the model."""

MOST_CROPS = 16
"""Crops an image the published model was trained with, at most: no advice goes beyond."""


def missing_image(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image file is not there.

    Paths are relative to the image root: `images/` beside the JSONL file if there is one, else
    the file's own folder, or what `--images` says. Where no image of a file is found, the root is
    wrong and that is reported once.
    """
    for pointer, path, check in _images(sample, context):
        if check.kind == "missing" and check.cause != "unreadable":
            yield Finding(f"image {path!r} {check.problem}", _case_help(path, context), pointer)


def _case_help(path: str, context: Context) -> str:
    """Names the file that differs in upper and lower case only, the usual slip."""
    parent, _, name = path.rpartition("/")
    folder = os.path.abspath(os.path.join(context.image_root, parent))
    other = _names_by_lower_case(folder).get(name.lower())
    return (
        f"there is {other!r}: case counts" if other else f"the image root is {context.image_root}"
    )


# One listing a folder, not one a missing file. By absolute path: the current folder may change.
_names_by_lower_case = lru_cache(maxsize=64)(names_by_lower_case)


def undecodable_image(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image file does not decode as a whole.

    It is empty, truncated, damaged, or not an image. A header can be whole where the pixels are
    not, so every distinct file is looked at to its end; the verdict is that of a full decode by
    Pillow, as training does it. `--deep full` really decodes everything. At the header level
    (`--deep header`) only files are found that do not even start as an image.
    """
    for pointer, path, check in _images(sample, context):
        if check.kind == "undecodable" and check.cause != "too_large":
            help = _HELP_BY_CAUSE.get(check.cause, "")
            yield Finding(f"image {path!r} {check.problem}", help, pointer)


_HELP_BY_CAUSE = {
    "empty": "fetch it again: nothing of it has arrived",
    "truncated": "fetch it again: its end is missing",
}


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


def unreadable_image(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image file is there, and the system does not let it be read.

    Most often it belongs to somebody else (`chmod a+r`), or lies in a folder that does (`chmod
    a+rx`). Disks that fail and network disks that are gone end here too.
    """
    for pointer, path, check in _images(sample, context):
        if check.cause == "unreadable":
            help = "check who may read it and its folder"
            yield Finding(f"image {path!r} {check.problem}", help, pointer)


def too_many_pixels(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image has more pixels than are decoded.

    More than 178,956,970 of them (Pillow's own limit), as its header says; or more than 16 million,
    and thousands for each byte of the file, more than pictures of its format can have. That may be
    a decompression bomb: a small file that fills the memory. If it is a real picture, make it
    smaller; the model sees 16 x 336 x 336 of its pixels at most.
    """
    for pointer, path, check in _images(sample, context):
        if check.cause == "too_large":
            help = f"make it smaller: the model sees at most {MOST_CROPS * CROP_SIDE_PX**2:,}"
            yield Finding(f"image {path!r} {check.problem}", help, pointer)


def other_case_on_disk(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image path differs from the file's name in upper and lower case.

    It is found all the same, since this disk ignores case, as those of macOS and Windows do. The
    disk of a training machine will not find it. (A disk that minds case gives I101 instead.)
    """
    for pointer, path, check in _images(sample, context):
        if check.path_on_disk:
            yield Finding(
                f"image {path!r} is {check.path_on_disk!r} on disk",
                "write it as it is on disk: only disks that ignore case find it",
                pointer,
            )


TINY_PX = 8
"""Images with no side of so many pixels are reported as tiny."""


def tiny_image(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image is less than 8 pixels wide and high.

    Such files are tracking pixels, spacers, or what a server sends in place of a deleted picture.
    The model sees at least 24 x 24 patches of every image, so each pixel would fill three patches
    in each direction. Small pictures that are meant (icons, digits of 28 x 28) are not reported.
    """
    for pointer, path, check in _images(sample, context):
        info = check.info
        if info and info.width < TINY_PX and info.height < TINY_PX:
            yield Finding(
                f"image {path!r} is {info.width}x{info.height} (width x height): hardly a picture",
                "leave it out if it stands for one that is gone",
                pointer,
            )


def turned_by_exif(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image is stored turned, and its EXIF orientation says how to turn it back.

    Training here turns it upright, as viewers do, and sizes are those after turning. The published
    code ignores the orientation, and so do many tools: boxes and coordinates in answers may be
    meant for the picture as stored. Photos of phones are often like this.
    """
    for pointer, path, check in _images(sample, context):
        if check.info and check.info.orientation != 1:
            yield Finding(
                f"image {path!r} is stored turned: EXIF orientation {check.info.orientation}",
                "it is turned upright for training; coordinates in answers must be of that",
                pointer,
            )


def cmyk_image(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image has the colours of print: CMYK.

    Training converts it to RGB by plain arithmetic, without its colour profile, as the published
    processor does. Colours come out harsher than in a viewer. Convert it with its profile if
    colours matter.
    """
    for pointer, path, check in _images(sample, context):
        if check.info and check.info.mode == "CMYK":
            help = "its colours will be harsher than in a viewer; save it as RGB"
            yield Finding(f"image {path!r} is CMYK", help, pointer)


def palette_image(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image has a palette.

    Training looks every pixel up in it, and nothing is lost. But pictures that were reduced to 256
    colours or fewer have bands and dots where the original has none. (A GIF always has a palette;
    it is not reported.)
    """
    for pointer, path, check in _images(sample, context):
        if check.info and check.info.mode in ("P", "PA") and check.info.format != "GIF":
            help = "it is converted to RGB; use the original if it was reduced to a palette"
            yield Finding(f"image {path!r} has a palette", help, pointer)


def transparent_image(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image has transparency: an alpha channel, or a colour that is marked as transparent.

    Training drops alpha, as the published processor does: it does not blend. Where a viewer shows
    the background, the model sees whatever colour the file happens to have there, often black.
    Lay it on a background of your choice if any of it is really transparent; the header does not
    tell.
    """
    for pointer, path, check in _images(sample, context):
        if check.info and check.info.has_alpha:
            help = "alpha is dropped, not blended; lay it on a background if it is see-through"
            yield Finding(f"image {path!r} has transparency", help, pointer)


def deep_image(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image has more than 8 bits a sample.

    Training keeps the high byte of 16 bits. Scientific and medical pictures often use a small part
    of the range, and come out all but black: scale them to 8 bits yourself, by the window that
    matters. (32-bit pixels have no defined white level and are refused, I102.)
    """
    for pointer, path, check in _images(sample, context):
        if check.info and check.info.bits > 8:
            help = (
                "of each the high byte is kept; scale it to 8 bits if it uses little of the range"
            )
            yield Finding(f"image {path!r} has more than 8 bits a sample", help, pointer)


def animated_image(sample: Sample, context: Context) -> Iterator[Finding]:
    """An image has several frames, or pages.

    Training sees the first only. Where the others matter, give them as images of their own;
    `phi3v-data convert video` makes frames out of clips.
    """
    for pointer, path, check in _images(sample, context):
        if check.info and check.info.is_animated:
            help = "only the first is seen; give the others as images of their own if they matter"
            yield Finding(f"image {path!r} has several frames", help, pointer)


TRAITS = frozenset(("I104", "I111", "I112", "I113", "I114", "I115", "I116"))
"""Rules of traits that all images of a data set may have, since one program wrote them: reports for
people show the first place, and count the others."""


def unused_file(facts: Facts) -> Iterator[AcrossFinding]:
    """Image files under the image root are named by no sample.

    They may be left over, or samples may be missing. All files of one image root are looked at
    together, so give all splits at once. Lines that do not parse name no image: repair them first.
    Files count as images by their extension. Off by default, switched on by `--unused`.
    """
    for unused in facts.unused:
        shown = ", ".join(map(repr, unused.first_paths))
        shown += ", …" if unused.num_files > len(unused.first_paths) else ""
        plural = "files" if unused.num_files > 1 else "file"
        yield AcrossFinding(
            f"no sample names {unused.num_files:,} image {plural} under {unused.root!r}: {shown}",
            unused.file,
            None,
            "validate all splits at once, or remove what is left over",
            num_findings=unused.num_files,
        )


def is_plain(path: str, check: ImageCheck, num_crops: int) -> bool:
    """Whether none of the rules of this module has anything to say: true of most images.

    Many times faster than to run them.
    """
    info = check.info
    if check.kind != "ok" or info is None or check.path_on_disk:
        return False
    promised = formats_of_extension(path)
    short, long = sorted((info.width, info.height))
    return (
        info.mode in ("RGB", "L", "1", "YCbCr")
        and info.orientation == 1
        and info.bits == 8
        and not (info.has_alpha or info.is_animated)
        and (not promised or info.format in promised)
        and long >= TINY_PX
        and long <= CROP_SIDE_PX * num_crops * short
    )


def unused_files(root: str | os.PathLike[str], referenced: Collection[str]) -> Iterator[str]:
    """Yield the image files under `root` that no sample names, as POSIX paths relative to it.

    Files count as images by their extension. Folders are listed one at a time, in order of name;
    links to folders are not followed.

    Args:
        root: the image root.
        referenced: every image path of all samples; a set.

    Raises:
        OSError: `root` cannot be listed. Folders within that cannot are left out.
    """
    # Paths that are written in an odd way: ./a.jpg, b//c.jpg.
    odd = {normal for path in referenced if (normal := posixpath.normpath(path)) != path}
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            if not folder:
                raise
            continue
        folders.extend(
            f"{folder}{entry.name}/"
            for entry in reversed(entries)
            if entry.is_dir(follow_symlinks=False)
        )
        for entry in entries:
            path = folder + entry.name
            if (
                path not in referenced
                and path not in odd
                and formats_of_extension(path)
                and entry.is_file()
            ):
                yield path


def _images(sample: Sample, context: Context) -> Iterator[tuple[str, str, ImageCheck]]:
    """(JSON pointer, path, check) of each image that was looked at."""
    for t, turn in enumerate(sample.conversations):
        for k, path in enumerate(turn.images):
            if path in context.images:
                yield f"/conversations/{t}/images/{k}", path, context.images[path]
