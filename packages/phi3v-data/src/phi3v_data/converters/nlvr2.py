"""NLVR2: two photographs and a statement about them, true or false.

In, the official annotations, one JSON object a line, and the pictures in any released layout:

    data/train.json  dev.json  test1.json  test2.json
    data/balanced/balanced_dev.json …  data/unbalanced/unbalanced_dev.json …
    images/train/<directory>/train-1-0-img0.png …   or  images/train/….png,  or all in images/
    images/dev/dev-850-0-img0.png  dev-850-0-img1.png

    {"identifier": "dev-850-0-0", "sentence": "There is an empty glass.", "label": "False", …}

or the Cauldron's form, Parquet with `images` and `texts`, where the questions on one pair are the
turns of one sample (see `converters/cauldron.py`).

Out, one sample a line, whatever the layout:

    images/dev/dev-850-0-img0.png  images/train/<directory>/train-1-0-img0.png …
    nlvr2_train.jsonl  nlvr2_dev.jsonl  nlvr2_test1.jsonl  nlvr2_balanced_dev.jsonl …

    {"id": "dev-850-0-0", "source": "nlvr2", "conversations": [
      {"images": ["dev/dev-850-0-img0.png", "dev/dev-850-0-img1.png"],
       "user": "The first image is the left one, the second image is the right one. Is this …",
       "assistant": "False"}]}

About one picture in twenty is gone from the addresses in the annotations: a pair that lacks one is
rejected as `missing_image`, or with `strict` nothing is converted and the first is named.

The parts `balanced` and `unbalanced` are rows of dev and test once more, with the same ids.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from phi3v_data.converters import About, Item, Rejected
from phi3v_data.converters.annotation_files import find_annotations, roots_above
from phi3v_data.converters.cauldron import convert_cauldron_rows, list_cauldron_items
from phi3v_data.converters.json_records import (
    RecordGroup,
    id_reader,
    list_record_groups,
    read_records,
)
from phi3v_data.converters.parquet_rows import list_parquet_files
from phi3v_data.converters.rows import Row, RowError, convert_rows, text_field
from phi3v_data.converters.source_images import ImageStore, Policy, find_image
from phi3v_data.schema import Sample, Turn

PROMPT = (
    "The first image is the left one, the second image is the right one. "
    "Is this statement about them true or false? {sentence}\nAnswer True or False."
)

LAYOUT = "data/{train,dev,test1,test2}.json beside images/, or Parquet with images and texts"

_SPLIT_FILE = re.compile(r"(balanced_|unbalanced_)?(train|dev|test1|test2|test)\.jsonl?")
_IDENTIFIER = re.compile(r"(train|dev|test1|test2|test)-[0-9]{1,9}-[0-9]{1,9}-[0-9]{1,9}")
_DIRECTORY = re.compile(r"[0-9]{1,4}")


@dataclass(frozen=True)
class Pairs:
    """What an item carries beside its path."""

    records: RecordGroup
    folders: tuple[str, ...]
    """Folders that may hold the pictures, in any of the layouts; nearest first."""


@dataclass(frozen=True)
class Nlvr2:
    """The official JSON lines, or the Cauldron's Parquet."""

    about: ClassVar[About] = About(
        "NLVR2",
        "https://lil.nlp.cornell.edu/nlvr/",
        "CC BY 4.0 for sentences and labels; the photographs belong to their owners and are for "
        "research only.",
    )

    prompt: str = PROMPT
    """The question asked of every pair; `{sentence}` is where the statement goes. Rows of Parquet
    files have their own."""

    strict: bool = False
    """Stop before anything is converted if a picture is missing, instead of rejecting its pair."""

    images: Policy = "copy"
    """How pictures reach the output: `copy` the files, `link` them (hard links, which take no
    space), or `reencode` them as JPEG."""

    quality: int = 90
    """JPEG quality of pictures that are encoded anew, 1 to 100."""

    def __post_init__(self) -> None:
        ImageStore(self.images, self.quality)
        if "{sentence}" not in self.prompt:
            raise ValueError(f"prompt: expected {{sentence}} somewhere in it, got {self.prompt!r}")

    @property
    def name(self) -> str:
        """Output files and samples are named after it."""
        return "nlvr2"

    def discover(self, source: Path) -> Iterator[Item]:
        """Yield groups of lines: train, dev, test1, test2, then the balanced and unbalanced."""
        files = _list_files(source)
        if not files:
            parquet_files = list_parquet_files(source)
            if not parquet_files:
                raise ValueError(f"no annotations found in {source}: expected {LAYOUT}")
            yield from list_cauldron_items(parquet_files, ImageStore(self.images, self.quality))
            return
        index = 0
        for path in files:
            folders = _image_folders(roots_above(path, source))
            name = path.name if path == source else path.relative_to(source).as_posix()
            for group in list_record_groups(path, name, id_of=id_reader("identifier", "sentence")):
                if self.strict:
                    _check_images(group, folders)
                payload = Pairs(group, folders)
                yield Item(index, group.key, group.path, split=path.stem, payload=payload)
                index += 1

    def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
        """Write the pictures of a group of rows and yield their samples."""
        store = ImageStore(self.images, self.quality)
        payload = item.payload
        if not isinstance(payload, Pairs):
            yield from convert_cauldron_rows(item, out_dir, self.name, 2, store)
            return
        yield from convert_rows(
            read_records(payload.records),
            lambda row: self._sample(row, item, payload.folders, out_dir, store),
        )

    def _sample(
        self, row: Row, item: Item, folders: tuple[str, ...], out_dir: Path, store: ImageStore
    ) -> Sample:
        identifier = _identifier(row)
        answer = _answer(row, item.split)
        user = self.prompt.replace("{sentence}", text_field(row, "sentence").strip())
        names = _image_names(row)
        paths = [_find(name, folders) for name in names]  # both, before one is written
        images = tuple(
            store.put(out_dir, name, path, item.key)
            for name, path in zip(names, paths, strict=True)
        )
        turn = Turn(images=images, user=user, assistant=answer)
        return Sample(id=identifier, source=self.name, conversations=(turn,))


def _identifier(row: Row) -> str:
    value = row.fields.get("identifier")
    if not isinstance(value, str) or not _IDENTIFIER.fullmatch(value):
        raise RowError("bad_id", f"expected an identifier as dev-850-0-1, got {value!r:.80}")
    return value


def _answer(row: Row, split: str) -> str | None:
    label = row.fields.get("label")
    if label is None:
        if split.split("_")[-1].startswith("test"):
            return None
        raise RowError("no_label", f"{split} needs labels; only test files may lack them")
    answer = str(label).capitalize() if isinstance(label, str | bool) else ""
    if answer not in ("True", "False"):
        raise RowError("bad_label", f"expected True or False, got {label!r:.80}")
    return answer


def _image_names(row: Row) -> tuple[str, str]:
    """The two pictures' names in the output: `train/<directory>/train-1-0-img0.png`."""
    pair = _identifier(row).rpartition("-")[0]
    directory = row.fields.get("directory")
    folder = pair.partition("-")[0]
    if directory is not None:
        if isinstance(directory, bool) or not _DIRECTORY.fullmatch(str(directory)):
            raise RowError("bad_row", f"expected a number as directory, got {directory!r:.80}")
        folder = f"{folder}/{directory}"
    return f"{folder}/{pair}-img0.png", f"{folder}/{pair}-img1.png"


def _find(name: str, folders: tuple[str, ...]) -> Path:
    """Look for a picture by directory, by split, and flat, in every folder."""
    split, *_, file_name = name.split("/")
    layouts = dict.fromkeys((name, f"{split}/{file_name}", file_name))
    return find_image([Path(folder, layout) for folder in folders for layout in layouts], name)


def _check_images(group: RecordGroup, folders: tuple[str, ...]) -> None:
    for row in read_records(group):
        if isinstance(row, Row):
            try:
                for name in _image_names(row):
                    _find(name, folders)
            except RowError as error:
                if error.reason == "missing_image":
                    raise ValueError(
                        f"{row.where}: {error.detail}; get it, or leave out strict to have such "
                        "pairs rejected and counted"
                    ) from None


def _list_files(source: Path) -> list[Path]:
    folders = ("", "data", "annotations", "nlvr2/data", "nlvr/nlvr2/data")
    parts = ("", "balanced", "unbalanced")
    files = find_annotations(source, _SPLIT_FILE, folders, LAYOUT)
    if files and not source.is_file():
        parent = files[0].parent
        files += [
            path
            for part in parts[1:]
            if (parent / part).is_dir()
            for path in find_annotations(parent / part, _SPLIT_FILE, ("",), LAYOUT)
        ]
    splits = ("train", "dev", "test", "test1", "test2")
    return sorted(
        files, key=lambda p: (parts.index(p.stem.rpartition("_")[0]), splits.index(_last(p)))
    )


def _last(path: Path) -> str:
    return path.stem.rpartition("_")[2]


def _image_folders(roots: list[Path]) -> tuple[str, ...]:
    names = ("images", "imgs", "img", "")
    found = [str(root / name) for root in roots for name in names if (root / name).is_dir()]
    return tuple(found)
