# pyright: standard
"""Parquet files of a data set, one row group an item, read a few rows at a time.

In, as `datasets` writes them to the hub and to disk:

    data/train-00000-of-00002.parquet  data/validation-00000-of-00001.parquet
    docvqa/train/0000.parquet                     # the hub's own conversion: the folder says it

Out, for a converter:

    for group in list_row_groups(list_parquet_files(source)):          # footers only
        yield Item(index, key=group.key, path=group.path, split=group.split, payload=group)

    for row in read_rows(item.payload, ("image", "question")):         # in another process
        row                           # {"image": {"bytes": b"…", "path": None}, "question": "…"}
        image = image_bytes(row["image"])                              # encoded, as it is

A row group is streamed: in memory are a few rows and one page of each column (compressed, and as it
is). How large a page is lies with the file's writer. Arrow and `datasets` put all distinct pictures
of a row group into one dictionary page: with the usual 100 rows a group, of 1 MB each, the process
grew by 230 MB; 600 such rows in one group took 1.2 GB.
"""

import contextlib
import os
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from phi3v_data.converters.rows import show_name

ROWS_AT_ONCE = 8
"""Rows in memory: pages of 1 MB, and a few pictures a row, stay in the tens of megabytes."""

BUFFER_BYTES = 1 << 20
"""Read ahead per column: without a buffer Arrow reads a whole column chunk at once."""


class ParquetError(ValueError):
    """A file is no Parquet file, or damaged. The message names it, and the way out."""


@dataclass(frozen=True)
class RowGroup:
    """A run of rows of one file. Picklable."""

    path: str
    split: str
    name: str
    """The file's path below the source, for messages."""

    number: int
    """Row group of the file, from 0."""

    first_row: int
    """Number of its first row in the split, from 0, over all files."""

    num_rows: int

    @property
    def key(self) -> str:
        """A stable, unique name for the item made of it."""
        return f"{self.name} row group {self.number}"


@dataclass(frozen=True)
class ParquetFile:
    """One file and where it belongs."""

    path: Path
    name: str
    """Its path below the source, POSIX."""

    split: str


def list_parquet_files(source: Path) -> list[ParquetFile]:
    """The Parquet files under `source` (or `source` itself), by split, then by path.

    Splits come in the order train, val, test, then others by name. Hidden files and folders are
    left out.

    Raises:
        ParquetError: one is a pipe, a folder, or a link to nothing.
    """
    if source.is_file():
        is_one = source.suffix.lower() == ".parquet"
        shown = show_name(source.name)
        return [ParquetFile(source, shown, split_of(source.name))] if is_one else []
    files: list[ParquetFile] = []
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.lower().endswith(".parquet") and not name.startswith("."):
                path = Path(folder, name)
                relative = path.relative_to(source).as_posix()
                if not path.is_file():  # a pipe would be waited for
                    raise ParquetError(f"{show_name(relative)} is no regular file; remove it")
                files.append(ParquetFile(path, show_name(relative), split_of(relative)))
    order = {"train": 0, "val": 1, "test": 2}
    return sorted(files, key=lambda f: (order.get(f.split, 3), f.split, os.fsencode(f.name)))


def split_of(path: str | PurePath) -> str:
    """The split a path names: `data/validation-00000-of-00001.parquet` is `val`.

    The file's own name says it, or else its folder's; `train` where neither does, as `datasets`
    has it. `validation` and `valid` are called `val`.
    """
    path = PurePosixPath(path)
    stem = re.sub(r"-\d{5}-of-\d{5}.*$", "", path.stem)
    for name in (stem, path.parent.name):
        match = re.match(r"(train|validation|valid|val|dev|test)(?![a-z])[a-z0-9_]*", name.lower())
        if match:
            return {"validation": "val", "valid": "val"}.get(match[0], match[0])
    return "train"


def list_row_groups(files: Iterable[ParquetFile]) -> Iterator[RowGroup]:
    """Yield the row groups of `files` in order; only the footers are read.

    Raises:
        ParquetError: a file has no readable footer.
    """
    rows_of_split: dict[str, int] = {}
    for file in files:
        with _open(file.path, file.name) as opened, _named(file.name):
            numbers = [opened.metadata.row_group(k).num_rows for k in range(opened.num_row_groups)]
        for number, num_rows in enumerate(numbers):
            first_row = rows_of_split.get(file.split, 0)
            if num_rows:
                yield RowGroup(
                    os.fspath(file.path), file.split, file.name, number, first_row, num_rows
                )
            rows_of_split[file.split] = first_row + num_rows


def column_names(file: ParquetFile) -> tuple[str, ...]:
    """The columns of a file, top level only.

    Raises:
        ParquetError: the file has no readable footer.
    """
    with _open(file.path, file.name) as opened, _named(file.name):
        return tuple(opened.schema_arrow.names)


def read_rows(
    group: RowGroup, columns: Sequence[str], *, rows_at_once: int = ROWS_AT_ONCE
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one row group in order, a few in memory at a time.

    A cell whose text is not UTF-8 is None.

    Args:
        group: which rows.
        columns: the columns wanted; `query.en` is one field of a struct. One that the file lacks is
            absent from the rows.
        rows_at_once: rows in memory; more is faster where rows are small.

    Raises:
        ParquetError: the file is damaged; the rows before the damage were yielded.
    """
    done = 0
    try:
        with _open(Path(group.path), group.name) as opened:
            for batch in opened.iter_batches(
                rows_at_once,
                row_groups=[group.number],
                columns=list(columns),
                use_threads=False,  # the caller has one process a core already
            ):
                yield from _to_rows(batch)
                done += batch.num_rows
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the machine's trouble; Arrow's own findings have no number
        raise ParquetError(
            f"{group.key}: rows {done} to {group.num_rows - 1} cannot be read: {_problem(error)}"
        ) from error
    if done != group.num_rows:
        raise ParquetError(f"{group.key}: {done} rows, where its footer says {group.num_rows}")


def _to_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # Arrow looks at text no earlier
        columns = {name: _cells(batch.column(name)) for name in batch.schema.names}
        return [{name: columns[name][k] for name in columns} for k in range(batch.num_rows)]


def _cells(column: pa.Array) -> list[Any]:
    cells: list[Any] = []
    for cell in column:
        try:
            cells.append(cell.as_py())
        except UnicodeDecodeError:
            cells.append(None)
    return cells


def image_bytes(value: object) -> bytes:
    """The encoded bytes of an image cell: a struct `{bytes, path}`, or the bytes themselves.

    Raises:
        ValueError: there are none: the export kept paths of the machine it was made on.
    """
    content = cast("dict[str, object]", value).get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise ValueError("the row holds no image bytes")
    return content


def _open(path: Path, name: str) -> pq.ParquetFile:
    with _named(name):
        return pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)


@contextlib.contextmanager
def _named(name: str) -> Generator[None]:
    try:
        yield
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the machine's trouble; Arrow's own findings have no number
        raise ParquetError(
            f"{name} is damaged or no Parquet file: {_problem(error)}; fetch it again"
        ) from error


_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What Arrow raises on a damaged file."""


def _problem(error: Exception) -> str:
    """Arrow's words on one line: they quote the file's bytes."""
    return show_name(" ".join(str(error).split()))[:300]
