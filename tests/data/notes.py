"""A toy data set whose texts say what happens, and its converter; workers import little else."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phi3v_data.converters import Item, Rejected, write_image
from phi3v_data.schema import Sample, Turn


@dataclass(frozen=True)
class Notes:
    """Text files; what one says happens. Each conversion is logged."""

    name = "notes"

    def discover(self, source: Path) -> Iterator[Item]:
        for index, path in enumerate(sorted(source.rglob("*.txt"))):
            yield Item(index, key=path.relative_to(source).as_posix(), path=str(path))

    def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
        text = Path(item.path).read_text()
        images = [write_image(out_dir, f"{item.key}.{k}.jpg", text.encode() * 9) for k in range(2)]
        time.sleep(float(os.environ.get("SECONDS", "0")))
        if text == "raise":
            raise KeyError("no such label")
        if text == "interrupt":
            marker = Path(f"{os.environ['MARKER']}-{item.index}")  # each interrupts once
            if not marker.exists():
                marker.touch()
                raise KeyboardInterrupt
        with open(os.environ["LOG"], "a") as log:
            log.write(item.key + "\n")
        turn = Turn(images=tuple(images), user="What?", assistant=text)
        yield Sample(id=item.key, source="notes", conversations=(turn,))


def write_notes(folder: Path, *texts: str) -> Path:
    for number, text in enumerate(texts):
        path = folder / f"{number % 3}/{number:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
