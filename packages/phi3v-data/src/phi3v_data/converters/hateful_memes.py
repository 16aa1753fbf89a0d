"""Hateful Memes: a picture with text on it, and whether the two together are hateful.

In, the official layout, itself or inside one folder of any name, with or without `data/`:

    data/train.jsonl  dev_seen.jsonl  dev_unseen.jsonl  test_seen.jsonl  test_unseen.jsonl
    data/img/42953.png …

    {"id": 42953, "img": "img/42953.png", "label": 0, "text": "its their character not their…"}

or the Cauldron's form, Parquet with `images` and `texts` (see `converters/cauldron.py`).

Out:

    images/img/42953.png …
    hateful_memes_train.jsonl  hateful_memes_dev_seen.jsonl …

    {"id": "train-42953", "source": "hateful_memes", "conversations": [
      {"images": ["img/42953.png"], "user": "Is this meme hateful? Answer yes or no.",
       "assistant": "No."}]}

Label 1 is answered `Yes.`, label 0 `No.`; a test file without labels gives samples without answers.

A split is a file: any `.jsonl` whose name starts with train, dev, val or test. Ids are numbers or
text with or without leading zeros, in the sample always of five digits; `img` may lack its zeros,
and `img/` may be beside `data/`, or in `images/`; further keys are passed over. dev_seen and
dev_unseen share 400 memes: do not train on one and evaluate on the other.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
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
from phi3v_data.converters.rows import Row, RowError, canonical_id, convert_rows, text_field
from phi3v_data.converters.source_images import (
    ImageStore,
    Policy,
    find_image,
    reference_problem,
)
from phi3v_data.schema import Sample, Turn

PROMPT = "Is this meme hateful? Answer yes or no."

ANSWERS = ("No.", "Yes.")
"""By label."""

LAYOUT = "data/{train,dev_seen,…}.jsonl beside data/img/, or Parquet with images and texts"

_SPLIT_FILE = re.compile(r"(train|dev|val|test)([_-][A-Za-z0-9_.-]*)?\.jsonl")


@dataclass(frozen=True)
class Memes:
    """What an item carries beside its path."""

    records: RecordGroup
    folder: str
    """The folder of the annotations: `img` is relative to it."""

    image_folders: tuple[str, ...]
    """Folders that hold the pictures by their names alone, nearest first."""


@dataclass(frozen=True)
class HatefulMemes:
    """The official JSON lines, or the Cauldron's Parquet."""

    about: ClassVar[About] = About(
        "Hateful Memes",
        "https://ai.meta.com/tools/hatefulmemes/",
        "Meta's Hateful Memes Dataset License: research use; the set may not be passed on.",
    )

    include_text: bool = False
    """Put the meme's text before the question, where the annotations have it."""

    prompt: str = PROMPT
    """The question asked of every meme. Rows of Parquet files have their own."""

    images: Policy = "copy"
    """How pictures reach the output: `copy` the files, `link` them (hard links, which take no
    space), or `reencode` them as JPEG."""

    quality: int = 90
    """JPEG quality of pictures that are encoded anew, 1 to 100."""

    def __post_init__(self) -> None:
        ImageStore(self.images, self.quality)
        if not self.prompt.strip():
            raise ValueError("prompt: expected a question, got an empty text")

    @property
    def name(self) -> str:
        """Output files and samples are named after it."""
        return "hateful_memes"

    def discover(self, source: Path) -> Iterator[Item]:
        """Yield groups of lines: train, dev, val, test, by name within each."""
        folders = ("", "data", "annotations")
        files = find_annotations(source, _SPLIT_FILE, folders, LAYOUT)
        if not files:
            parquet_files = list_parquet_files(source)
            if not parquet_files:
                raise ValueError(f"no annotations found in {source}: expected {LAYOUT}")
            yield from list_cauldron_items(parquet_files, ImageStore(self.images, self.quality))
            return
        index = 0
        for path in sorted(files, key=_split_order):
            image_folders = _image_folders(path, source)
            name = path.name if path == source else path.relative_to(source).as_posix()
            for group in list_record_groups(path, name, id_of=id_reader("id")):
                payload = Memes(group, str(path.parent), image_folders)
                yield Item(index, group.key, group.path, split=path.stem, payload=payload)
                index += 1

    def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
        """Write the pictures of a group of rows and yield their samples."""
        store = ImageStore(self.images, self.quality)
        payload = item.payload
        if not isinstance(payload, Memes):
            yield from convert_cauldron_rows(item, out_dir, self.name, 1, store)
            return
        yield from convert_rows(
            read_records(payload.records),
            lambda row: self._sample(row, item, payload, out_dir, store),
        )

    def _sample(
        self, row: Row, item: Item, memes: Memes, out_dir: Path, store: ImageStore
    ) -> Sample:
        number = canonical_id(row.fields.get("id"))
        if number is None:
            raise RowError("bad_id", f"expected a number or text, got {row.fields.get('id')!r:.80}")
        answer = _answer(row, item.split)
        user = self.prompt
        if self.include_text and row.fields.get("text"):
            user = f'The text on the meme reads: "{text_field(row, "text")}"\n{user}'
        name = row.fields.get("img", f"img/{number.zfill(5)}.png")
        image = _put_image(name, memes, item, out_dir, store)
        turn = Turn(images=(image,), user=user, assistant=answer)
        sample_id = f"{item.split}-{number.zfill(5)}"
        return Sample(id=sample_id, source=self.name, conversations=(turn,))


def _answer(row: Row, split: str) -> str | None:
    label = row.fields.get("label")
    if label is None:
        if split.startswith("test"):
            return None
        raise RowError("no_label", f"{split} needs labels; only test files may lack them")
    if isinstance(label, bool | int | float | str) and str(label) in _LABELS:
        return ANSWERS[_LABELS[str(label)]]
    raise RowError("bad_label", f"expected 0 or 1, got {label!r:.80}")


_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "False": 0, "True": 1}
"""A table saved with gaps turns whole numbers into fractions."""


def _put_image(name: object, memes: Memes, item: Item, out_dir: Path, store: ImageStore) -> str:
    if not isinstance(name, str):
        raise RowError("bad_row", f"expected a path under 'img', got {name!r:.80}")
    problem = reference_problem(name)
    if problem:
        raise RowError("unsafe_path", f"'img' {name!r:.80} {problem}")
    path = PurePosixPath(name)
    padded = path.with_name(path.stem.zfill(5) + path.suffix)
    places = [Path(memes.folder, candidate) for candidate in (path, padded)]
    for folder in memes.image_folders:
        places += [Path(folder, candidate.name) for candidate in (path, padded)]
    found = find_image(places, name)
    return store.put(out_dir, str(path.with_name(found.name)), found, item.key)


def _split_order(path: Path) -> tuple[int, str]:
    prefixes = ("train", "dev", "val", "test")
    return next(k for k, p in enumerate(prefixes) if path.name.startswith(p)), path.name


def _image_folders(annotation: Path, source: Path) -> tuple[str, ...]:
    roots = roots_above(annotation, source)
    names = ("img", "images/img", "images")
    folders = [str(root / name) for root in roots for name in names if (root / name).is_dir()]
    archives = [path for root in roots for path in sorted(root.glob("img.tar*"))]
    if archives and not folders:  # as copies often come: say so once, not for each meme
        raise ValueError(
            f"the pictures are still in {archives[0].name}: expected a folder img/ beside the "
            f"annotations; unpack it there: tar -xf {archives[0].name}"
        )
    return tuple(folders)
