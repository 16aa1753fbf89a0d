"""Any videos sorted into `<split>/<Class>/`, to frames and a question about them.

In, a folder (or its `.tar.gz`), itself or inside one folder of any name:

    my_clips/
        train/wave/a.mp4
        test/wave/b.webm  test/run/c.avi       # splits and classes have any names

Out:

    images/train/wave/a.0.jpg … .7.jpg
    video_train.jsonl  video_test.jsonl

    {"id": "train-0000000000", "source": "video", "conversations": [
      {"images": ["train/wave/a.0.jpg", …],
       "user": "Classify the video into one of the following classes: run, wave.",
       "assistant": "wave"}]}

Clips come in the order train, val, test, then other splits, each in the bytewise order of paths,
and one counter runs over all of them: ids are the same on every machine, and a clip that is
rejected leaves a gap. Files directly in a split, or deeper than a class, are not clips; nor are
hidden ones and those without the ending of a video.

The converter of UCF-101 lists and converts clips with the functions below.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phi3v_data.converters import Item, Rejected, write_image
from phi3v_data.converters.rows import Row, RowError, show_name, text_field
from phi3v_data.converters.source_images import reference_problem
from phi3v_data.schema import Sample, Turn

if TYPE_CHECKING:
    from phi3v_data.video import Sampling, Short

EXTENSIONS = tuple(".avi .mp4 .m4v .mov .mkv .webm .mpg .mpeg .wmv .flv .ogv .3gp".split())
"""Endings of video files, in lower case."""

PROMPT = "Classify the video into one of the following classes: {classes}."

SPLITS = ("train", "val", "test")
"""Splits that come first, in this order."""

MAX_STEM_BYTES = 240
"""A file's name has 255 on every usual file system, and a picture's adds its number and ending."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Clip:
    """What a clip's item carries beside its path."""

    label: str
    stem: str
    """The images' names start with it: the file name without its last ending."""
    prompt: str


@dataclass(frozen=True)
class FrameOptions:
    """Which frames of a clip become which JPEGs."""

    num_frames: int = 8
    """Frames per clip, 1 to 1000."""

    quality: int = 75
    """JPEG quality, 1 to 100; 75 is PIL's default."""

    short: "Short" = "repeat"
    """A clip with fewer frames: `repeat` some, give `fewer`, or `reject` it."""

    sampling: "Sampling" = "uniform"
    """A clip of N frames is cut into `num_frames` equal stretches. Each gives its first frame
    (`uniform`: floor(k * N / num_frames)), its middle one (`center`) or a drawn one (`random`)."""

    seed: int = 0
    """What is drawn depends on it and the clip's key."""

    max_side: int | None = None
    """Frames are scaled down until their longer side is at most this many pixels; None: never."""


@dataclass(frozen=True)
class ClipFolders(FrameOptions):
    """Any tree of videos, `<split>/<Class>/<file>`."""

    dataset: str = "video"
    """Its name: output files and samples are named after it."""

    prompt: str = PROMPT
    """The question; `{classes}` becomes the sorted classes of all splits."""

    def __post_init__(self) -> None:
        check_frame_options(self)
        check_dataset_name(self.dataset)
        if not self.prompt.strip():
            raise ValueError("prompt: expected a question, got nothing")

    @property
    def name(self) -> str:
        """Output files and samples are named after it."""
        return self.dataset

    def discover(self, source: Path) -> Iterator[Item]:
        """Yield the clips split by split, each in the bytewise order of paths."""
        root = find_root(source, lambda folder: bool(_list_splits(folder)))
        if root is None:
            raise ValueError(
                f"no videos found in {source}: expected <split>/<Class>/*.avi "
                f"(or {', '.join(EXTENSIONS[1:4])}, …)"
            )
        clips = [
            (split, *clip) for split in _list_splits(root) for clip in list_clips(root / split)
        ]
        problems = {clip: found for clip in clips if (found := name_rejection(*clip))}
        # A class that no sample can name must not be in the question of all others.
        prompt = fill_prompt(self.prompt, {clip[1] for clip in clips if clip not in problems})
        for index, clip in enumerate(clips):
            split, label, file_name, stem = clip
            yield Item(
                index,
                key=show_name(f"{split}/{label}/{file_name}"),
                path=str(root / split / label / file_name),
                split=split,
                payload=problems.get(clip) or Clip(label, stem, prompt),
            )

    def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
        """Write a clip's frames and yield its one sample."""
        if isinstance(item.payload, Rejected):
            yield item.payload
        else:
            yield convert_clip(item, out_dir, self, self.name)


def check_dataset_name(name: str) -> None:
    """Raise ValueError where a data set's name could not start a file's."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"dataset: expected letters, digits and `_.-`, as for a file, got {name!r}"
        )


def check_frame_options(options: FrameOptions) -> None:
    """Raise ValueError where an option is out of range."""
    for name in ("num_frames", "quality", "seed", "max_side"):
        value = getattr(options, name)
        if type(value) is not int and not (name == "max_side" and value is None):
            raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if not 1 <= options.num_frames <= 1000:
        raise ValueError(f"num_frames: expected 1 to 1000, got {options.num_frames!r}")
    if not 1 <= options.quality <= 100:
        raise ValueError(f"quality: expected 1 to 100, got {options.quality!r}")
    if options.short not in ("repeat", "fewer", "reject"):
        raise ValueError(f"short: expected repeat, fewer or reject, got {options.short!r}")
    if options.sampling not in ("uniform", "center", "random"):
        raise ValueError(f"sampling: expected uniform, center or random, got {options.sampling!r}")
    if options.max_side is not None and options.max_side < 1:
        raise ValueError(f"max_side: expected at least 1 pixel, got {options.max_side!r}")


def read_clip(path: Path, options: FrameOptions, key: str) -> list[bytes] | Rejected:
    """The wanted frames of a video as JPEGs, or why there are none; `key` seeds what is drawn."""
    from phi3v_data import video

    try:
        return video.read_jpegs(
            path,
            options.num_frames,
            short=options.short,
            sampling=options.sampling,
            seed=f"{options.seed} {key}",
            quality=options.quality,
            max_side=options.max_side,
        )
    except video.VideoError as error:
        return Rejected(error.reason, error.detail)


def convert_clip(
    item: Item, out_dir: Path, options: FrameOptions, source_name: str
) -> Sample | Rejected:
    """Write the frames of the clip in `item.payload` and return its sample, or say why not."""
    clip = item.payload
    assert isinstance(clip, Clip)
    jpegs = read_clip(Path(item.path), options, item.key)
    if isinstance(jpegs, Rejected):
        return jpegs
    images = [
        write_image(out_dir, f"{item.split}/{clip.label}/{clip.stem}.{k}.jpg", jpeg)
        for k, jpeg in enumerate(jpegs)
    ]
    turn = Turn(images=tuple(images), user=clip.prompt, assistant=clip.label)
    return Sample(id=f"{item.split}-{item.index:010d}", source=source_name, conversations=(turn,))


def name_rejection(split: str, label: str, file_name: str, stem: str) -> Rejected | None:
    """Why a clip gives no sample, by its name and its class's; None where they are fine."""
    problem = reference_problem(f"{split}/{label}/{file_name}")
    if not problem and len(os.fsencode(stem)) > MAX_STEM_BYTES:
        problem = "is too long for the names of its pictures"
    if problem:
        return Rejected("bad_name", f"its path {problem}")
    try:
        text_field(Row("", {"class": label}), "class")
    except RowError as error:
        return Rejected("bad_name", f"its class is no answer: {error.detail}")
    return None


def fill_prompt(prompt: str, classes: set[str]) -> str:
    """Put the sorted class names in the place of `{classes}`."""
    return prompt.replace("{classes}", ", ".join(sorted(classes)))


def find_root(source: Path, is_root: Callable[[Path], bool]) -> Path | None:
    """`source` where it has the layout, or the only folder in it that has.

    Raises:
        ValueError: `source` is no folder, or several folders in it have the layout.
    """
    if not source.is_dir():
        raise ValueError(f"expected a folder of videos or a .tar.gz of it, got the file {source}")
    if is_root(source):
        return source
    roots = [child for child in sorted(source.iterdir()) if child.is_dir() and is_root(child)]
    if len(roots) > 1:
        raise ValueError(
            f"{source} holds several data sets ({', '.join(root.name for root in roots)}); name one"
        )
    return roots[0] if roots else None


def list_clips(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (class, file name, stem for the images) of `folder/<Class>/*` in bytewise path order.

    Nothing where there is no such folder.
    """
    if not folder.is_dir():
        return
    # A folder sorts with its slash: "A-b/x" comes before "A/x".
    labels = sorted(_names(folder, directories=True), key=lambda name: os.fsencode(name + "/"))
    for label in labels:
        taken: set[str] = set()
        for name in sorted(_names(folder / label, directories=False), key=os.fsencode):
            stem, extension = os.path.splitext(name)
            if extension.lower() not in EXTENSIONS:
                continue
            # a.avi and a.mp4 must not write the same images: the later keeps its whole name.
            stem = name if stem in taken else stem
            taken.add(stem)
            yield label, name, stem


def _list_splits(folder: Path) -> list[str]:
    """Names of the folders that hold at least one clip of a class, in output order."""
    names = [
        name
        for name in _names(folder, directories=True)
        if next(list_clips(folder / name), None) is not None
    ]
    return sorted(
        names, key=lambda name: (SPLITS.index(name) if name in SPLITS else 3, os.fsencode(name))
    )


def _names(folder: Path, *, directories: bool) -> list[str]:
    with os.scandir(folder) as entries:
        return [
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and entry.is_dir() == directories
        ]
