"""`phi3v-data cat`: one sample of a shard directory, in the terminal.

$ phi3v-data cat shards/train 17
╭─ shards/train 17: train-0000000017 (ucf101) ─────╮
│ 1  train/Archery/v_Archery_g01_c01.0.jpg  320x240, 7,412 bytes
│ user      Classify the video ...
│ assistant Archery
╰─ shard-00000.parquet ────────────────────────────╯
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phi3v_data.input_error import InputError

if TYPE_CHECKING:
    from phi3v_data.shards import Record, ShardReader


@click.command("cat", context_settings={"ignore_unknown_options": True})  # -1 is the last
@click.argument("directory", type=click.Path())
@click.argument("samples", nargs=-1, required=True, metavar="SAMPLE...")
@click.option(
    "--images",
    "out_dir",
    type=click.Path(file_okay=False),
    help="Write its images into this folder, as they were stored.",
)
@click.option(
    "--id", "by_id", is_flag=True, help="SAMPLE is an id, even if it looks like a number."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object a line, with sizes of images."
)
def cat_command(
    directory: str, samples: tuple[str, ...], out_dir: str | None, by_id: bool, as_json: bool
) -> None:
    """Show samples of a shard directory.

    SAMPLE is a number, from 0, or from the end: -1 is the last; or an id. DIRECTORY may be an
    address (s3://...), or any Parquet of the same columns.

    \b
      phi3v-data cat shards/train 17
      phi3v-data cat shards/train train-0000000017 --images looked_at
      phi3v-data cat shards/train 17 --json | jq .sample.conversations
      phi3v-data cat shards/train -1

    Exit status: 0 shown, 1 damaged or not a shard directory, 2 no such sample.
    """
    from phi3v_data.shards import ShardError, open_shards

    try:
        reader = open_shards(directory)
        for row in [_row(reader, directory, text, by_id) for text in samples]:
            record = reader[row]
            if as_json:
                click.echo(_as_json(reader, row, record))
            else:
                _print(reader, directory, row, record)
            if out_dir is not None:
                for path in _write_images(record, Path(out_dir)):
                    click.echo(f"wrote {path}", err=as_json)
    except ShardError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(str(error)) from error


def _row(reader: "ShardReader", directory: str, text: str, by_id: bool) -> int:
    """The row that a number or an id means."""
    if not by_id and re.fullmatch(r"-?[0-9]+", text):
        number = int(text)
        if -len(reader) <= number < len(reader):
            return number % len(reader)
        last = len(reader) - 1
        raise InputError(
            f"{directory} has no sample {text}: expected 0 to {last:,}, or -1 for the last; "
            "--id takes it as an id"
        )
    rows = [row for row in range(len(reader)) if reader.id(row) == text]
    if not rows:
        near = _near(reader, text)
        hint = f"; did you mean {near!r}?" if near else ""
        raise InputError(f"{directory} has no sample of id {text!r} among {len(reader):,}{hint}")
    return rows[0]


def _near(reader: "ShardReader", text: str) -> str:
    import difflib

    ids = [reader.id(row) for row in range(min(len(reader), 10_000))]
    return next(iter(difflib.get_close_matches(text, ids, n=1)), "")


def _as_json(reader: "ShardReader", row: int, record: "Record") -> str:
    import json

    sizes = reader.image_sizes_wh(row)
    content: dict[str, Any] = {
        "row": row,
        "shard": reader.shard_name(row),
        "sample": json.loads(record.sample.to_json()),
        "images": [
            {"path": path, "width": width, "height": height, "num_bytes": len(image)}
            for path, (width, height), image in zip(
                record.sample.images, sizes, record.images, strict=True
            )
        ],
    }
    return json.dumps(content)  # ASCII: data cannot write to the terminal


def _print(reader: "ShardReader", directory: str, row: int, record: "Record") -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    from phi3v_data.report import printable

    sample = record.sample
    images = iter(zip(reader.image_sizes_wh(row), record.images, strict=True))
    text = Text()
    number = 0
    for turn in sample.conversations:
        for path in turn.images:
            (width, height), image = next(images)
            number += 1
            text.append(f"{number:<10}", "bold")
            size = f"{width}x{height}"
            text.append(f"{size:<10} {len(image):>10,} bytes  {printable(path)}\n", "dim")
        for who, words in (("user", turn.user), ("assistant", turn.assistant)):
            if words is not None:
                lines = [printable(line) for line in words.split("\n")]
                text.append(f"{who:<10}", "bold").append("\n          ".join(lines) + "\n")
        for answer in (turn.answers or ())[1:]:
            text.append("or        ", "bold").append(printable(answer) + "\n")
    for key, value in (sample.metadata or {}).items():
        text.append("metadata  ", "bold").append(printable(f"{key}: {value}") + "\n", "dim")
    text.rstrip()
    title = Text(printable(f"{directory} {row}: {sample.id} ({sample.source})"))
    shard = Text(reader.shard_name(row))
    Console(highlight=False).print(
        Panel(text, title=title, title_align="left", subtitle=shard, subtitle_align="left")
    )


def _write_images(record: "Record", out_dir: Path) -> list[Path]:
    """Write images under the last part of their paths, numbered: nothing else of a path counts."""
    from phi3v_data.atomic import write_atomic

    written: list[Path] = []
    for number, (path, image) in enumerate(
        zip(record.sample.images, record.images, strict=True), start=1
    ):
        name = re.sub(r"[^\w.-]", "_", path.replace("\\", "/").rpartition("/")[2])[-100:]
        target = out_dir / f"{number:02d}-{name}"
        if os.path.lexists(target) and target.read_bytes() != bytes(image):
            raise InputError(f"{target}: is there already and is another image")
        write_atomic(target, bytes(image))
        written.append(target)
    return written
