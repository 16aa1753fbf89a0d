"""The Cauldron's form of a data set: rows of pictures and of questions about them.

In, a Parquet row:

    {"images": [{"bytes": b"…", "path": null}, …],
     "texts": [{"user": "…", "assistant": "…", "source": "NLVR2"}, …]}

Out, a sample of as many turns as the row has texts; the pictures come in the first:

    {"id": "train-0000000", "source": "nlvr2", "conversations": [
      {"images": ["train/5f3a….png", "train/91c0….png"], "user": "…", "assistant": "…"},
      {"images": [], "user": "…", "assistant": "…"}]}

Questions and answers are taken as they are: they hold their prompts. The number in the id counts
the rows of the split, over all files; a rejected row leaves a gap.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from phi3v_data.converters import Item, Rejected
from phi3v_data.converters.parquet_rows import (
    ParquetError,
    ParquetFile,
    RowGroup,
    column_names,
    image_bytes,
    list_row_groups,
    read_rows,
)
from phi3v_data.converters.rows import Row, RowError, text_field
from phi3v_data.converters.source_images import ImageStore
from phi3v_data.schema import Sample, Turn

COLUMNS = ("images", "texts")


def list_cauldron_items(files: list[ParquetFile], store: ImageStore) -> Iterator[Item]:
    """Yield one item a row group.

    Raises:
        ValueError: a file lacks the columns, or pictures are to be linked.
    """
    if store.policy == "link":
        raise ValueError("images=link: pictures inside a Parquet file have no links; use copy")
    for file in files:
        names = column_names(file)
        if not set(COLUMNS) <= set(names):
            raise ValueError(f"{file.name}: expected columns images and texts, got {names}")
    for index, group in enumerate(list_row_groups(files)):
        yield Item(index, key=group.key, path=group.path, split=group.split, payload=group)


def convert_cauldron_rows(
    item: Item, out_dir: Path, source: str, num_images: int, store: ImageStore
) -> Iterator[Sample | Rejected]:
    """Yield the samples of one row group, or why a row gives none.

    Args:
        item: one of `list_cauldron_items`.
        out_dir: the converter's output folder.
        source: the samples' `source`.
        num_images: how many pictures a row of this data set has.
        store: how pictures are taken over.
    """
    group = item.payload
    assert isinstance(group, RowGroup)
    number = group.first_row
    try:
        for number, fields in enumerate(read_rows(group, COLUMNS), start=group.first_row):
            try:
                turns = _turns(fields)
                images = _put_images(fields, num_images, out_dir, item, store)
            except RowError as error:
                yield Rejected(error.reason, f"{group.key}, row {number}: {error.detail}")
                continue
            turns[0] = turns[0].model_copy(update={"images": images})
            sample_id = f"{group.split}-{number:07d}"
            yield Sample(id=sample_id, source=source, conversations=tuple(turns))
    except ParquetError as error:
        yield Rejected("damaged_file", str(error))


def _turns(fields: dict[str, Any]) -> list[Turn]:
    texts = _list_of(fields, "texts")
    if not texts:
        raise RowError("no_text", "the row has no question, or one that is not UTF-8")
    rows: list[Row] = []
    for text in texts:
        if not isinstance(text, dict | None):
            raise RowError("bad_row", f"expected user and assistant in 'texts', got {text!r:.80}")
        rows.append(Row("", cast("dict[str, Any]", text or {})))
    return [Turn(user=text_field(r, "user"), assistant=text_field(r, "assistant")) for r in rows]


def _list_of(fields: dict[str, Any], key: str) -> list[object]:
    value: object = fields[key]
    if not isinstance(value, list | None):
        raise RowError("bad_row", f"expected a list under {key!r}, got {value!r:.80}")
    return cast("list[object]", value or [])


def _put_images(
    fields: dict[str, Any], num_images: int, out_dir: Path, item: Item, store: ImageStore
) -> tuple[str, ...]:
    cells = _list_of(fields, "images")
    if len(cells) != num_images:
        raise RowError("bad_row", f"expected {num_images} images, got {len(cells)}")
    try:
        contents = [image_bytes(cell) for cell in cells]
    except ValueError as error:
        raise RowError("missing_image", str(error)) from None
    return tuple(store.put_bytes(out_dir, item.split, c, item.key) for c in contents)
