"""Conversations JSONL: read with errors that name file and line, write whole or not at all.

    for sample in read_samples("ucf101_train.jsonl"): ...
    write_samples("mine.jsonl", samples)

A reader stops at the first bad line. To see *all* that is wrong, validate the file.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from phi3v_data.atomic import open_atomic
from phi3v_data.schema import Sample


class JsonlError(ValueError):
    """A line is not a sample. The message starts with `file:line`."""

    def __init__(self, path: str | os.PathLike[str], line_number: int, problem: str) -> None:
        super().__init__(f"{os.fspath(path)}:{line_number}: {problem}")
        self.path = Path(path)
        self.line_number = line_number
        self.problem = problem


BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def byte_order_mark(first_line: bytes) -> str:
    """The encoding whose byte order mark the first line of a file starts with; empty if none."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if first_line.startswith(mark):
            return encoding
    return ""


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes without line break) of every line that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            stripped = line.rstrip(b"\r\n")
            if stripped.strip():
                yield number, stripped


def read_samples(
    path: str | os.PathLike[str], *, allow_missing_answer: bool = False
) -> Iterator[Sample]:
    """Yield the samples of a JSONL file in order, one line in memory at a time.

    Args:
        path: the JSONL file, UTF-8.
        allow_missing_answer: take samples whose last turn has no answer (test splits).

    Raises:
        JsonlError: at the first line that is not a sample.
    """
    for number, line in read_lines(path):
        encoding = byte_order_mark(line) if number == 1 else ""
        if encoding:
            problem = f"the file starts with a {encoding} byte order mark; save it as UTF-8 without"
            raise JsonlError(path, number, problem)
        try:
            sample = Sample.from_json(line)
        except ValidationError as error:
            raise JsonlError(path, number, explain(error)) from None
        if sample.conversations[-1].assistant is None and not allow_missing_answer:
            raise JsonlError(
                path,
                number,
                f"sample {sample.id!r}: the last turn has no assistant; "
                "allow it with --allow_missing_answer (test splits)",
            )
        yield sample


def write_samples(path: str | os.PathLike[str], samples: Iterable[Sample]) -> int:
    """Write samples to `path`, one a line, and return how many; the file appears when complete."""
    count = 0
    with open_atomic(path) as file:
        for sample in samples:
            file.write(sample.to_json().encode() + b"\n")
            count += 1
    return count


def explain(error: ValidationError) -> str:
    """The first finding of a pydantic error in one line, with the JSON pointer of its place."""
    # pydantic counts the good turns only, so a bad one also makes "too few" of them.
    errors = [
        e for e in error.errors(include_url=False) if not (e["type"] == "too_short" and e["input"])
    ]
    pointer = "".join(f"/{part}" for part in errors[0]["loc"])
    suffix = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{pointer or '/'}: {errors[0]['msg']}{suffix}"


def default_image_root(path: str | os.PathLike[str]) -> Path:
    """Where the images of a JSONL file are unless told: `images/` beside it, else its folder."""
    folder = Path(path).parent
    images = folder / "images"
    return images if images.is_dir() else folder
