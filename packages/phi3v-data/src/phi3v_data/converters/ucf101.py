"""UCF-101: clips of human actions, one folder a class, to frames and a question about them.

In, a folder (or its `.tar.gz`), itself or inside one folder of any name; folders say the split:

    UCF101_subset/
        train/Archery/v_Archery_g01_c01.avi
        val/…  test/…                          # at least one of the three

or the whole archive, where the official lists say it:

    UCF-101/Archery/v_Archery_g01_c01.avi      # 13,320 clips of 101 classes
    ucfTrainTestlist/
        trainlist01.txt                        # Archery/v_Archery_g08_c01.avi 3
        testlist01.txt                         # Archery/v_Archery_g01_c01.avi
        …                                      # 02 and 03: the other folds

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

With lists, a clip is matched by class and file name, case and all, but not by its ending, so that a
re-encoded archive works. Clips of one group (`g08`) are cut from one video: validation takes whole
groups of the training list, and a clip that no list names may join the training clips only where
its group is not in the test list. What is in a list but not on disk is rejected as `missing_clip`,
once a class where all of a class is not there (`missing_class`).
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar, Literal

from phi3v_data.converters import About, Item, Rejected
from phi3v_data.converters.clip_folders import (
    EXTENSIONS,
    PROMPT,
    SPLITS,
    Clip,
    FrameOptions,
    check_frame_options,
    convert_clip,
    fill_prompt,
    find_root,
    list_clips,
    name_rejection,
)
from phi3v_data.converters.rows import show_name
from phi3v_data.schema import Sample

LAYOUT = "{train,val,test}/<Class>/*.avi"

CLIPS = "UCF-101"
LISTS = "ucfTrainTestlist"
"""The two folders of the whole archive."""

_LINE = re.compile(r"(?P<label>[^/\\]+)/(?P<file>[^/\\]+?)(\s+\d+)?")
_GROUP = re.compile(r"_(g\d+)_c\d+$", re.IGNORECASE)


@dataclass(frozen=True)
class Ucf101(FrameOptions):
    """The 10-class subset, or any tree of that shape, or the whole archive with its lists."""

    about: ClassVar[About] = About(
        "UCF-101",
        "https://www.crcv.ucf.edu/data/UCF101.php",
        "None is stated; the clips are from YouTube and are used for research.",
    )

    fold: int | None = None
    """Which of the three official pairs of lists to go by: 1, 2 or 3; the first if not given. Only
    for the whole archive."""

    val_fraction: float = 0.0
    """Part of the training clips that becomes validation, from 0 (none) to below 1. Of each class
    whole groups are drawn by `seed`, so that no source video is on both sides. Only for the whole
    archive."""

    unlisted: Literal["skip", "train"] = "skip"
    """What becomes of a clip that no list names: `skip` rejects it, `train` adds it to the training
    clips. Only for the whole archive."""

    lists: str | None = None
    """Folder of the official lists; if not given, `ucfTrainTestlist` beside `UCF-101`."""

    def __post_init__(self) -> None:
        check_frame_options(self)
        if self.fold not in (None, 1, 2, 3):
            raise ValueError(f"fold: expected 1, 2 or 3, got {self.fold!r}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction: expected 0 to below 1, got {self.val_fraction!r}")
        if self.unlisted not in ("skip", "train"):
            raise ValueError(f"unlisted: expected skip or train, got {self.unlisted!r}")

    @property
    def name(self) -> str:
        """Output files and samples are named after it."""
        return "ucf101"

    def discover(self, source: Path) -> Iterator[Item]:
        """Yield the clips of train, then val, then test, each in the bytewise order of paths.

        Of the whole archive, what is rejected for its place in the lists comes last.
        """
        root = find_root(source, lambda folder: _has_splits(folder) or self._has_lists(folder))
        if root is None and self.lists is not None:
            root = source
        if root is None:
            raise ValueError(
                f"no videos found in {source}: expected {LAYOUT}, or {CLIPS}/<Class>/*.avi with "
                f"the official lists in {LISTS}/"
            )
        if _has_splits(root):
            yield from self._discover_splits(root)
        else:
            yield from self._discover_archive(root)

    def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
        """Write a clip's frames and yield its one sample."""
        if isinstance(item.payload, Rejected):
            yield item.payload
        else:
            yield convert_clip(item, out_dir, self, self.name)

    def _discover_splits(self, root: Path) -> Iterator[Item]:
        if (self.fold, self.val_fraction, self.unlisted, self.lists) != (None, 0.0, "skip", None):
            raise ValueError(
                f"fold, val_fraction, unlisted and lists are for {CLIPS}/<Class>/*.avi with the "
                f"official lists; in {root} the folders already say the split: leave them out"
            )
        placed = [_Placed(split, *clip) for split in SPLITS for clip in list_clips(root / split)]
        if not placed:
            raise ValueError(
                f"no videos found in {root}: expected {LAYOUT} (or {', '.join(EXTENSIONS[1:4])}, …)"
            )
        yield from _make_items(placed, {split: root / split for split in SPLITS})

    def _has_lists(self, folder: Path) -> bool:
        """Whether `folder` is, or holds, the folder of clips, and there are lists for it."""
        if (folder / CLIPS).is_dir():
            beside = folder
        elif folder.absolute().name == CLIPS:
            beside = folder.absolute().parent
        else:
            return False
        return self.lists is not None or (beside / LISTS).is_dir()

    def _discover_archive(self, root: Path) -> Iterator[Item]:
        clips_root = root / CLIPS if (root / CLIPS).is_dir() else root
        folder = clips_root.absolute().parent / LISTS if self.lists is None else Path(self.lists)
        fold = self.fold or 1
        listed = _read_lists(folder, fold)
        test_groups = {_group(*key) for key, entry in listed.items() if entry.split == "test"}

        placed: list[_Placed] = []
        refused: list[tuple[str, Rejected]] = []
        missing = dict(listed)
        labels: set[str] = set()
        for label, file_name, stem in list_clips(clips_root):
            key = (label, os.path.splitext(file_name)[0])
            labels.add(label)
            missing.pop(key, None)
            if key in listed:
                placed.append(_Placed(listed[key].split, label, file_name, stem))
            elif self.unlisted == "train" and _group(*key) not in test_groups:
                placed.append(_Placed("train", label, file_name, stem))
            else:
                detail = f"no list of fold {fold} names it"
                if self.unlisted == "train":
                    detail += ", and others of its video are tested"
                refused.append((f"{label}/{file_name}", Rejected("unlisted", detail)))
        if not labels:
            raise ValueError(f"no videos found in {clips_root}: expected <Class>/*.avi in it")

        groups = {clip.group for clip in placed if clip.split == "train"}
        held_out = _draw_groups(groups, self.val_fraction, self.seed)
        placed = [
            replace(clip, split="val") if clip.split == "train" and clip.group in held_out else clip
            for clip in placed
        ]
        placed.sort(key=lambda clip: SPLITS.index(clip.split))  # stable: paths stay in order
        yield from _make_items(placed, dict.fromkeys(SPLITS, clips_root))
        refused += _name_missing(missing, labels)
        for index, (key, rejected) in enumerate(refused, len(placed)):
            path = str(clips_root / key)
            name = show_name(f"{rejected.reason}/{key}")
            yield Item(index, name, path, payload=rejected)


def _has_splits(folder: Path) -> bool:
    return any((folder / split).is_dir() for split in SPLITS)


@dataclass(frozen=True)
class _Placed:
    """A clip found on disk and the split it goes to."""

    split: str
    label: str
    file_name: str
    stem: str
    """What its images' names start with."""

    @property
    def group(self) -> "_Group":
        return _group(self.label, os.path.splitext(self.file_name)[0])


@dataclass(frozen=True)
class _Listed:
    """A line of a list."""

    split: str
    file_name: str


_Group = tuple[str, str]
"""(class, `g08`), or (class, the file's stem) where the name does not say its group."""


def _group(label: str, file_stem: str) -> _Group:
    match = _GROUP.search(file_stem)
    return label, match[1].lower() if match else file_stem


def _draw_groups(groups: set[_Group], fraction: float, seed: int) -> set[_Group]:
    """In every class that has at least two groups, `fraction` of them, at least one, not all."""

    def order(group: _Group) -> bytes:
        return blake2b(os.fsencode(f"{seed} {'/'.join(group)}")).digest()

    drawn: set[_Group] = set()
    for label in {label for label, _ in groups}:
        of_class = sorted((group for group in groups if group[0] == label), key=order)
        number = max(1, min(len(of_class) - 1, int(fraction * len(of_class) + 0.5)))
        if fraction > 0 and len(of_class) > 1:
            drawn.update(of_class[:number])
    return drawn


def _make_items(placed: Sequence[_Placed], folders: Mapping[str, Path]) -> Iterator[Item]:
    """Number the clips; `folders` says where the classes of a split lie."""
    problems = {
        clip: problem
        for clip in placed
        if (problem := name_rejection(clip.split, clip.label, clip.file_name, clip.stem))
    }
    # A class that no sample can name must not be in the question of all others.
    prompt = fill_prompt(PROMPT, {clip.label for clip in placed if clip not in problems})
    for index, clip in enumerate(placed):
        yield Item(
            index,
            key=show_name(f"{clip.split}/{clip.label}/{clip.file_name}"),
            path=str(folders[clip.split] / clip.label / clip.file_name),
            split=clip.split,
            payload=problems.get(clip) or Clip(clip.label, clip.stem, prompt),
        )


def _name_missing(
    missing: Mapping[tuple[str, str], _Listed], labels: set[str]
) -> Iterator[tuple[str, Rejected]]:
    """Yield (path, why) of what is listed but not on disk; a class of which nothing is, once."""
    absent = Counter(label for label, _ in missing if label not in labels)
    for label, number in sorted(absent.items()):
        yield label, Rejected("missing_class", f"{number} clips listed, none found")
    for (label, _), entry in sorted(missing.items()):
        if label in labels:
            detail = f"in the list of {entry.split}, but not found"
            yield f"{label}/{entry.file_name}", Rejected("missing_clip", detail)


def _read_lists(folder: Path, fold: int) -> dict[tuple[str, str], _Listed]:
    """(class, file name without its ending) → where the lists of a fold place it."""
    listed: dict[tuple[str, str], _Listed] = {}
    for split in ("train", "test"):
        path = folder / f"{split}list{fold:02}.txt"
        if not path.is_file():
            raise ValueError(f"expected the official list {path.name} in {folder}: not found")
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                # Names as the file system has them, whatever their encoding.
                text = os.fsdecode(line.removeprefix(b"\xef\xbb\xbf").strip())
                if not text:
                    continue
                match = _LINE.fullmatch(text)
                if match is None or {".", ".."} & {match["label"], match["file"]}:
                    raise ValueError(f"{path}:{number}: expected <Class>/<file>, got {text!r}")
                key = match["label"], os.path.splitext(match["file"])[0]
                if key in listed and listed[key].split != split:
                    raise ValueError(f"{path}:{number}: {text!r} is in the list of train, too")
                listed[key] = _Listed(split, match["file"])
    if not listed:
        raise ValueError(f"the lists of fold {fold} in {folder} name no clip")
    return listed
