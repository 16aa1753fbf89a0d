"""UCF-101: clips of human actions, one folder a class, to frames and a question about them.

In, a folder (or its `.tar.gz`), itself or inside one folder of any name:

    UCF101_subset/
        train/Archery/v_Archery_g01_c01.avi
        val/…  test/…                          # at least one of the three

Out:

    images/train/Archery/v_Archery_g01_c01.0.jpg … .7.jpg
    ucf101_train.jsonl  ucf101_val.jsonl  ucf101_test.jsonl

    {"id": "train-0000000000", "source": "ucf101", "conversations": [
      {"images": ["train/Archery/v_Archery_g01_c01.0.jpg", …],
       "user": "Classify the video into one of the following classes: Archery, Biking.",
       "assistant": "Archery"}]}

These are the files of the Phi-3 cookbook's converter, name for name. The number in an id counts
all clips of train, val and test in the bytewise order of their paths, as they are found: the same
on every machine, and a clip that is rejected leaves a gap.

The class is the folder's name, never the file's: 128 clips of the archive differ in case. Any file
name and the usual video containers are taken; hidden files and other files are not clips.
"""

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phi3v_data.converters import Item, Rejected, write_image
from phi3v_data.schema import Sample, Turn

if TYPE_CHECKING:
    from phi3v_data.video import Short

SPLITS = ("train", "val", "test")

EXTENSIONS = tuple(".avi .mp4 .m4v .mov .mkv .webm .mpg .mpeg .wmv .flv .ogv .3gp".split())
"""Endings of video files, in lower case."""

LAYOUT = "{train,val,test}/<Class>/*.avi"


@dataclass(frozen=True)
class Clip:
    """What a clip's item carries beside its path."""

    label: str
    stem: str
    """The images' names start with it: the file name without its last ending."""
    prompt: str


@dataclass(frozen=True)
class Ucf101:
    """The 10-class subset, or any tree of that shape."""

    num_frames: int = 8
    """Frames per clip, evenly spaced: number k is frame floor(k * N / num_frames) of N."""

    quality: int = 75
    """JPEG quality, 1 to 100; 75 is PIL's default."""

    short: "Short" = "repeat"
    """A clip with fewer frames: `repeat` some, give `fewer`, or `reject` it."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_frames <= 1000:
            raise ValueError(f"num_frames: expected 1 to 1000, got {self.num_frames!r}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: expected 1 to 100, got {self.quality!r}")
        if self.short not in ("repeat", "fewer", "reject"):
            raise ValueError(f"short: expected repeat, fewer or reject, got {self.short!r}")

    @property
    def name(self) -> str:
        """Output files and samples are named after it."""
        return "ucf101"

    def discover(self, source: Path) -> Iterator[Item]:
        """Yield the clips of train, then val, then test, each in the bytewise order of paths."""
        root = _find_root(source)
        clips = [(split, *clip) for split in SPLITS for clip in _list_clips(root / split)]
        if not clips:
            raise ValueError(
                f"no videos found in {source}: expected {LAYOUT} "
                f"(or {', '.join(EXTENSIONS[1:4])}, …)"
            )
        classes = sorted({label for _, label, _, _ in clips})
        prompt = f"Classify the video into one of the following classes: {', '.join(classes)}."
        for index, (split, label, file_name, stem) in enumerate(clips):
            yield Item(
                index,
                key=f"{split}/{label}/{file_name}",
                path=str(root / split / label / file_name),
                split=split,
                payload=Clip(label, stem, prompt),
            )

    def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
        """Write a clip's frames and yield its one sample."""
        from phi3v_data import video

        clip = item.payload
        assert isinstance(clip, Clip)
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in item.key):
            yield Rejected("bad_name", "the path holds control characters or is not UTF-8")
            return
        try:
            frames = video.read_frames(item.path, self.num_frames, short=self.short)
            jpegs = [video.encode_jpeg(frame, self.quality) for frame in frames]
        except video.VideoError as error:
            yield Rejected(error.reason, error.detail)
            return
        images = [
            write_image(out_dir, f"{item.split}/{clip.label}/{clip.stem}.{k}.jpg", jpeg)
            for k, jpeg in enumerate(jpegs)
        ]
        turn = Turn(images=tuple(images), user=clip.prompt, assistant=clip.label)
        yield Sample(id=f"{item.split}-{item.index:010d}", source=self.name, conversations=(turn,))


def _find_root(source: Path) -> Path:
    """The folder that holds the splits: `source`, or the only folder in it that does."""
    candidates = [source, *sorted(child for child in source.iterdir() if child.is_dir())]
    roots = [root for root in candidates if any((root / split).is_dir() for split in SPLITS)]
    if not roots:
        raise ValueError(f"no videos found in {source}: expected {LAYOUT}")
    if roots[0] != source and len(roots) > 1:
        raise ValueError(
            f"{source} holds several data sets ({', '.join(root.name for root in roots)}); name one"
        )
    return roots[0]


def _list_clips(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (class, file name, stem for the images) of one split in bytewise path order."""
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


def _names(folder: Path, *, directories: bool) -> list[str]:
    with os.scandir(folder) as entries:
        return [
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and entry.is_dir() == directories
        ]
